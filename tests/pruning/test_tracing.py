"""From a model and data to traces: settings, fallbacks, several samples, memory limit, bad input."""

from __future__ import annotations

import json
import logging
import math
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from spade_fast import FallbackError, FallbackWarning, trace, trace_batch
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.pruning.calibration import Calibration, calibrate
from spade_fast.pruning.config import PruneConfig, parse_bytes
from spade_fast.pruning.goals import Goal, output_score, sample_goal
from spade_fast.pruning.layers import UnknownLayerError, find_layers
from spade_fast.pruning.memory_plan import group_by_memory, samples_per_solve
from spade_fast.pruning.session import Session
from spade_fast.pruning.solve import solve_layer, solve_sparsities
from spade_fast.pruning.tracing import traces_by_level, traces_by_solver

SOLVERS = ["exact", "sparsegpt"]


class SmallNet(nn.Module):
    """Ordinary, depthwise and pointwise convolutions, batch norm, a head, and a module that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 10, 1)
        self.head = nn.Linear(10, 6)
        self.idle = nn.Linear(10, 10)
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.pointwise(self.depthwise(x).relu()).relu()
        return self.head(self.dropout(x.mean((2, 3))))


LAYERS = ["stem", "depthwise", "pointwise", "head"]


@pytest.fixture
def model() -> SmallNet:
    return SmallNet()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(48, 3, 7, 7)


def state(model: nn.Module) -> list[Tensor | bool]:
    return [*(tensor.clone() for tensor in model.state_dict().values()), *(m.training for m in model.modules())]


def same_state(one: list, other: list) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("solver", SOLVERS)
def test_trace_is_calibration_then_solving_of_each_layer(model, images, solver):
    before = state(model)
    made = trace(model, images, sparsity=0.6, solver=solver, layers=LAYERS)
    assert same_state(before, state(model))
    assert made.layers == tuple(LAYERS)
    layers, _ = find_layers(model, LAYERS)
    calibration = calibrate(model, images, layers)
    for layer, report in zip(layers, made.reports, strict=True):
        weight = layer.weight(model).detach()
        (expected,), (other,) = solve_layer(
            layer, layer.matrix(weight), calibration.grams[layer.name][None], solver=solver, sparsity=0.6
        )
        assert torch.equal(made.weight(layer.name), layer.restore(expected))
        assert report.measured_error == other.measured_error and report.name == layer.name
        assert report.block == {"stem": 9}.get(layer.name, 1) or solver == "sparsegpt"
        assert report.removed == round(0.6 * layer.numel / report.block) * report.block or solver == "sparsegpt"
    assert made.header["images"] == 48 and made.header["passes"] == 1
    assert set(made.header["seconds"]) == {"augment", "forward", "gram", "solve"}
    json.dumps(made.header)


def test_measured_error_is_that_of_the_outputs(model, images):
    model.eval()
    made = trace(model, images, sparsity=0.5, layers=["stem"])
    bias = model.stem.bias.detach()[:, None, None]
    dense = model.stem(images) - bias
    with made.applied(model), torch.no_grad():
        change = (model.stem(images) - bias - dense).norm() / dense.norm()
    assert math.isclose(float(change), made.reports[0].measured_error, rel_tol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_together_are_as_alone(model, solver):
    samples = [torch.randn(n, 3, 7, 6) * scale for n, scale in ((40, 1.0), (33, 3.0), (50, 0.1))]
    together = trace_batch(model, samples, sparsity=0.5, solver=solver, layers=LAYERS, sample_ids=["a", 2, "c"])
    assert [made.sample_id for made in together] == ["a", "2", "c"]
    for sample, made in zip(samples, together, strict=True):
        alone = trace(model, sample, sparsity=0.5, solver=solver, layers=LAYERS)
        assert made.header["images"] == alone.header["images"] == len(sample)
        for name in LAYERS:
            assert torch.equal(made.mask(name), alone.mask(name))
            assert torch.allclose(made.weight(name), alone.weight(name), rtol=1e-3, atol=1e-4)
    assert [made.sample_id for made in trace_batch(model, samples, sparsity={"head": 1.0})] == ["0", "1", "2"]


@pytest.mark.parametrize(("limit", "passes"), [(None, 1), (4 * 27**2, 3), (2 * 4 * 27**2 + 1, 3)])
@pytest.mark.parametrize("sparsity", [0.5, "auto"])
def test_solvers_share_a_calibration(model, sparsity, limit, passes):
    """The traces are those of separate calls, bit for bit; the network runs once, and solvers restore what they use."""
    model.eval()
    samples = [torch.randn(20, 3, 7, 6) for _ in range(3)]
    ids = ["a", "b", "c"]
    scores = [output_score(model, sample[:1], None) for sample in samples]
    goals = [sample_goal(*each) for each in zip(ids, scores, [one[:1] for one in samples], strict=True)]
    asked: list[Goal | None] = [*goals] if sparsity == "auto" else [None] * 3
    keep = (0.9, 0.5) if sparsity == "auto" else 0.9
    steps: list[tuple[str, str, int, int]] = []
    stages = {"augment", "forward", "gram", "solve"} | ({"search"} if sparsity == "auto" else set())

    def session(solver: str) -> Session:
        config = PruneConfig(sparsity=sparsity, keep=keep, solver=solver, layers=LAYERS, memory_limit=limit)
        return Session(model, config, lambda *step: steps.append((solver, *step)))

    alone = [traces_by_level(session(solver), samples, ids, asked) for solver in SOLVERS]
    expected, before = [step for step in steps if step[:2] != (SOLVERS[1], "calibrate")], state(model)
    steps.clear()
    batches: list[int] = []
    hook = model.head.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    first = session(SOLVERS[0])
    both = [first, first.with_solver(SOLVERS[1], lambda *step: steps.append((SOLVERS[1], *step)))]
    together = traces_by_solver(both, samples, ids, asked)
    hook.remove()
    assert batches.count(8) == 2 * 3 * passes  # batches of 8, 8 and 4; the search runs the network on single images
    assert same_state(before, state(model)) and sorted(steps) == sorted(expected)
    for solver, of_solver, of_alone in zip(SOLVERS, together, alone, strict=True):
        for levels, others in zip(of_solver, of_alone, strict=True):
            for made, other in zip(levels, others, strict=True):
                assert all(torch.equal(made.weight(name), other.weight(name)) for name in other.layers)
                plain = [[replace(one, seconds=0.0) for one in each.reports] for each in (made, other)]
                assert plain[0] == plain[1] and made.layers == other.layers
                assert {**made.header, "seconds": {}} == {**other.header, "seconds": {}}
                assert made.header["settings"]["solver"] == solver and made.header["seconds"].keys() == stages
    times = [[levels[0].header["seconds"] for levels in of_solver] for of_solver in together]
    for one, other in zip(*times, strict=True):
        assert all(one[name] == other[name] for name in ("augment", "forward", "gram")) and one["solve"] > 0
    if passes > 1:
        with pytest.warns(FallbackWarning, match="to stay within memory_limit"):
            first.warn()


@pytest.mark.parametrize("solvers", [1, 2])
def test_gram_matrices_are_freed_layer_by_layer(model, images, monkeypatch, solvers):
    grams, held = list[weakref.ref[Tensor]](), list[int]()

    def noted(*args, **kwargs) -> Calibration:
        calibration = calibrate(*args, **kwargs)
        grams.extend(map(weakref.ref, calibration.grams.values()))
        return calibration

    monkeypatch.setattr("spade_fast.pruning.session.calibrate", noted)

    def count(stage: str, *_: int) -> None:
        if stage == "solve":
            held.append(sum(gram() is not None for gram in grams))

    first = Session(model, PruneConfig(sparsity=0.5, layers=LAYERS), count)
    sessions = [first, first.with_solver("sparsegpt", None)][:solvers]
    traces_by_solver(sessions, [images], ["0"], [None])
    assert len(grams) == 4 and held == [3, 2, 1, 0]


def test_solvers_share_their_fallbacks(model, images):
    """One warning tells of both, whichever solver it came from."""
    model.register_parameter("table", nn.Parameter(torch.randn(4, 4)))
    first = Session(model, PruneConfig(sparsity=0.5), None)
    second = first.with_solver("sparsegpt", None)
    assert (first.config.solver, second.config.solver) == ("exact", "sparsegpt")
    second.fall_back("kept less than asked for", "sample 'a'")
    with pytest.warns(FallbackWarning, match="sample 'a'"):
        first.warn()


def test_one_solver_call_a_layer(model, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "spade_fast.pruning.ladders.solve_sparsities",
        lambda layer, weight, hessians, **options: (
            calls.append((layer.name, len(hessians))) or solve_sparsities(layer, weight, hessians, **options)
        ),
    )
    trace_batch(model, [torch.randn(9, 3, 5, 5)] * 4, sparsity=0.5, layers=LAYERS)
    assert sorted(calls) == sorted((name, 4) for name in LAYERS)


def reached(made) -> dict[str, float]:
    return {report.name: report.sparsity for report in made.reports}


def test_sparsity_as_number_mapping_or_function(model, images):
    assert reached(trace(model, images, sparsity=1, layers="*d")) == {"head": 1.0}
    mapping = {"stem": 0.25, "*wise": 0.5, "point*": 0.75, "he?d": 0}
    made = trace(model, images, sparsity=mapping)
    assert reached(made) == {"stem": 0.25, "depthwise": 0.5, "pointwise": 0.5} and made.layers == tuple(LAYERS[:3])
    assert made.header["settings"]["sparsity"] == mapping
    made = trace(model, images, sparsity=lambda name: 0.5 if name in ("stem", "head") else 0)
    assert made.layers == ("stem", "head") and made.header["settings"]["sparsity"] == "function"
    # A pattern may be of a layer that is not asked for now.
    assert reached(trace(model, images, sparsity=mapping, layers=["stem"])) == {"stem": 0.25}
    before = state(model)
    nothing = trace(model, images, sparsity=0)
    assert nothing.layers == () and nothing.sparsity == 0
    with nothing.applied(model):
        assert same_state(before, state(model))


def test_few_weights_may_round_to_none(model, images):
    made = trace(model, images, sparsity=0.001, layers=["head"])
    assert made.layers == () and made.reports[0].removed == 0 and made.reports[0].reached == 0


def test_blocks(model, images):
    made = trace(model, images, sparsity=0.5, block=1, layers=LAYERS)
    assert {report.block for report in made.reports} == {1}
    assert [report.removed for report in made.reports] == [round(0.5 * n) for n in (216, 72, 80, 60)]
    with pytest.raises(ValueError, match=r"block 9 does not divide the 8 columns of layer 'pointwise'"):
        trace(model, images, sparsity=0.5, block=9)
    assert trace(model, images, sparsity=0.5, block=9, layers=["stem", "depthwise"]).layers == ("stem", "depthwise")


def test_unreached_layers_are_left_alone_and_named(model, images):
    with pytest.warns(FallbackWarning, match=r"did not reach them: idle$") as caught:
        made = trace(model, images, sparsity=0.5)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert made.layers == tuple(LAYERS)
    report = made.reports[-1]
    assert (report.name, report.removed, report.reached) == ("idle", 0, 0) and "not reached" in report.note
    assert "not reached" in made.summary()
    with pytest.raises(FallbackError, match=r"idle"):
        trace(model, images, sparsity=0.5, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(model, images, sparsity=0.5, layers=LAYERS, strict=True)
        trace(model, images, sparsity={"idle": 0, "*": 0.5}, strict=True)


class Doubled(nn.Linear):
    """Computes its weight in a way of its own."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.stored = self._parameters.pop("weight")
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, 2 * self.stored, self.bias)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.tied, self.plain = nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(5, 5)
        self.normed = Doubled()
        self.tied.weight = self.table.weight

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        x = self.tied(x + self.table.weight[0])
        return self.normed(self.plain(x) if use else x)


def test_one_warning_names_everything(recwarn):
    model = Mixed()
    samples: list = [[(torch.randn(20, 4), True)], [(torch.zeros(20, 4), True)], [(torch.randn(20, 4), False)]]
    first, second, third = trace_batch(model, samples, sparsity=0.5, damping=0.0)
    (warning,) = [w for w in recwarn if w.category is FallbackWarning]
    message = str(warning.message)
    assert "cannot be pruned: normed (its weight is computed from other parameters), tied (" in message
    assert "did not reach them: plain" in message and "damped more than requested: plain (" in message
    assert first.layers == second.layers == ("plain",) and third.layers == ()
    reports = [{report.name: report for report in made.reports} for made in (first, second, third)]
    assert reports[0]["plain"].note == "" and "not reached" in reports[2]["plain"].note
    assert all("computed" in of["normed"].note and "used by" in of["tied"].note for of in reports)
    assert reports[1]["plain"].retries > 0 and reports[0]["plain"].retries == 0
    strict = {"sparsity": 0.5, "damping": 0.0, "strict": True}
    for sample, layers, name in (
        (samples[0], None, "normed"),
        (samples[0], "tied", "tied"),
        (samples[2], "plain", "pl"),
    ):
        with pytest.raises(FallbackError, match=name):
            trace(model, sample, layers=layers, **strict)
    with pytest.raises(FallbackError, match=r"damped more than requested: plain"):
        trace(model, samples[1], layers="plain", **strict)


@pytest.mark.parametrize("solver", SOLVERS)
def test_memory_limit_splits_layers(model, images, solver, caplog):
    plain = trace(model, images, sparsity=0.5, solver=solver, layers=LAYERS)
    # stem 27² + depthwise 8·9² + pointwise 8² + head 10² floats of 4 bytes
    limit = 4 * 27**2
    with caplog.at_level(logging.INFO, "spade_fast"), pytest.warns(FallbackWarning, match=r"memory_limit: 3 passes"):
        split = trace(model, list(images.split(20)), sparsity=0.5, solver=solver, layers=LAYERS, memory_limit=limit)
    assert "3 passes" in caplog.text
    assert split.layers == plain.layers and split.header["passes"] == 3
    for name in LAYERS:
        assert torch.equal(split.mask(name), plain.mask(name))
        assert torch.allclose(split.weight(name), plain.weight(name), rtol=1e-3, atol=1e-4)
    trace(model, images, sparsity=0.5, layers=LAYERS, memory_limit="1 MB", strict=True)
    with pytest.raises(FallbackError, match=r"3 passes"):
        trace(model, images, sparsity=0.5, layers=LAYERS, memory_limit=limit, strict=True)
    with pytest.raises(MemoryError, match=r"layer 'stem' needs 2916 bytes.*2915"):
        trace(model, images, sparsity=0.5, memory_limit=limit - 1)


def test_memory_limit_splits_samples(model):
    samples = [torch.randn(12, 3, 6, 6) for _ in range(5)]
    plain = trace_batch(model, samples, sparsity=0.5, layers=LAYERS)
    with pytest.warns(FallbackWarning, match=r"2 samples per solve"):
        split = trace_batch(model, samples, sparsity=0.5, layers=LAYERS, memory_limit=2 * 4 * 27**2 + 1)
    for one, other in zip(plain, split, strict=True):
        assert one.layers == other.layers
        assert all(torch.equal(one.mask(name), other.mask(name)) for name in LAYERS)


def test_streams_are_run_once_only(model, images):
    made = trace(model, iter(images.split(7)), sparsity=0.5, layers=LAYERS)
    assert made.header["images"] == 48
    stream = iter(images.split(7))
    with pytest.raises(ValueError, match=r"iterator.* 3 passes"):
        trace(model, stream, sparsity=0.5, layers=LAYERS, memory_limit=4 * 27**2)
    assert len(next(stream)) == 7  # nothing was taken from it


def test_progress(model, images):
    def stages(batches, **options) -> list[tuple[str, int, int]]:
        seen: list[tuple[str, int, int]] = []
        trace(model, batches, sparsity=0.5, layers=LAYERS, progress=lambda *step: seen.append(step), **options)
        return seen

    solving = [("solve", i, 4) for i in range(1, 5)]
    assert stages(images.split(24)) == [("calibrate", 1, 2), ("calibrate", 2, 2), *solving]
    assert stages(iter([images])) == [("calibrate", 1, 1), *solving]
    assert stages(batch for batch in [images, images]) == [("calibrate", 1, 0), ("calibrate", 2, 0), *solving]
    with pytest.warns(FallbackWarning):
        steps = stages([images], memory_limit=4 * 27**2)
    assert [step for step in steps if step[0] == "calibrate"] == [("calibrate", i, 3) for i in range(1, 4)]
    assert [step for step in steps if step[0] == "solve"] == solving


def test_augmented_images_are_calibration_data(model):
    augmenter = ImageAugmenter(n=20, batch_size=8, seed=3)
    image = torch.rand(3, 9, 9)
    one, other = (trace(model, augmenter(image, "x"), sparsity=0.5, layers=LAYERS, seed=3) for _ in range(2))
    assert one.header["images"] == 20 and one.header["settings"]["seed"] == 3
    assert all(torch.equal(one.weight(name), other.weight(name)) for name in LAYERS)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(model, images, solver, dtype):
    model = model.to(dtype)
    made = trace(model, images.to(dtype), sparsity=0.5, solver=solver, layers=LAYERS)
    for report in made.reports:
        assert made.weight(report.name).dtype == dtype
        assert int((~made.mask(report.name)).sum()) == report.removed > 0
    with made.applied(model):
        assert torch.equal(model.head.weight, made.weight("head"))


@pytest.mark.parametrize("solver", SOLVERS)
def test_modes_of_the_caller_change_nothing(model, images, solver):
    options = {"sparsity": 0.5, "solver": solver, "layers": LAYERS, "strict": True}
    plain = trace(model, images, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        others = [trace(model, images, **options)]
    others.append(trace(model, images.clone().requires_grad_(), **options))
    with torch.inference_mode():
        others.append(trace(model, images, **options))
    with torch.no_grad():
        others.append(trace(model.requires_grad_(False), images, **options))
    for other in others:
        assert all(torch.equal(plain.weight(name), other.weight(name)) for name in LAYERS)
        assert [report.measured_error for report in plain.reports] == [r.measured_error for r in other.reports]
        assert not other.weight("head").is_inference()
        with other.applied(model):
            assert torch.equal(model.head.weight, other.weight("head"))


def test_embeddings_that_scale_their_rows_are_left_as_they_were():
    embedded = nn.Sequential(nn.Embedding(6, 4, max_norm=0.5), nn.Linear(4, 2))
    before, words = embedded[0].weight.detach().clone(), torch.arange(6).reshape(2, 3)
    made = trace(embedded, words, sparsity=0.5, layers="1")
    assert torch.equal(embedded[0].weight, before)
    with made.applied(embedded):
        assert torch.equal(embedded[1].weight, made.weight("1"))


@pytest.mark.parametrize("step", ["calibrate", "solve"])
def test_model_is_as_it_was_after_an_exception(model, images, step):
    model.train()
    model.norm.eval()
    before = state(model)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace(model, images, sparsity=0.5, progress=interrupt)
    assert same_state(before, state(model))


def test_bad_arguments(model, images):
    def refuse(error: type[Exception], message: str, batches=images, **options) -> None:
        before = state(model)
        with pytest.raises(error, match=message):
            trace(model, batches, **{"sparsity": 0.5, "layers": LAYERS, **options})
        assert same_state(before, state(model))

    for value in (-0.1, 1.01, math.nan, math.inf):
        refuse(ValueError, "sparsity must lie between 0 and 1, got", sparsity=value)
        refuse(ValueError, r"sparsity\['head'\] must lie", sparsity={"head": value})
        refuse(ValueError, r"sparsity\('stem'\) must lie", sparsity=lambda name, value=value: value)
    for wrong in ("0.5", None, True, [0.5]):
        refuse(TypeError, "sparsity must be a number", sparsity=wrong)
    refuse(TypeError, r"sparsity\('stem'\) must be a number", sparsity=lambda name: None)
    refuse(UnknownLayerError, "layer name 'haed' matches no layer.*'head'", sparsity={"haed": 0.5})
    refuse(UnknownLayerError, "layer pattern 'x[*]' matches no layer", sparsity={"stem": 0.5, "x*": 0.5})
    refuse(KeyError, "'haed'", layers=["haed"])
    refuse(ValueError, "layers is empty", layers=[])
    refuse(ValueError, "unknown solver 'obs': choose from exact, sparsegpt", solver="obs")
    refuse(ValueError, "block must be at least 1, got 0", block=0)
    refuse(TypeError, "block must be an integer, got 2.5", block=2.5)
    for value in (-1, math.nan, math.inf, "x"):
        refuse(ValueError, "damping must be a number of at least 0", damping=value)
    refuse(ValueError, "unknown precision 'half': choose from float32, bf16", precision="half")
    refuse(TypeError, "seed must be an integer", seed="x")
    refuse(ValueError, "empty", batches=[])
    refuse(ValueError, "empty", batches=images[:0])
    refuse(ValueError, "batch 1 has NaN", batches=[images, images / 0])
    refuse(ValueError, r"batch 0 \(torch.float32 \[4, 2, 7, 7\]\)", batches=images[:4, :2])
    refuse(TypeError, "batch 0 .*float64", batches=images.double())
    refuse(TypeError, "batches must be", batches=5)
    with pytest.raises(TypeError, match=r"model must be"):
        trace(model.forward, images, sparsity=0.5)
    with pytest.raises(ValueError, match=r"Flatten has no layer"):
        trace(nn.Flatten(), images, sparsity=0.5)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_bf16_calibration_gives_nearly_the_same_trace(solver):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(576, 4)
    )
    x = torch.randn(64, 3, 8, 8)
    plain = trace(model, x, sparsity=0.5, solver=solver)
    made = trace(model, x, sparsity=0.5, solver=solver, precision="bf16")
    assert made.header["settings"]["precision"] == "bf16" and plain.header["settings"]["precision"] == "float32"
    for before, after in zip(plain.reports, made.reports, strict=True):
        assert after.removed == before.removed
        assert after.measured_error == pytest.approx(before.measured_error, rel=0.02)
    with pytest.raises(ValueError, match=r"precision='bf16' needs float32 weights, but layer '0' has torch.float64"):
        trace(model.double(), x.double(), sparsity=0.5, precision="bf16")


@pytest.mark.parametrize("solver", SOLVERS)
def test_bf16_samples_together_are_as_alone(model, solver):
    options = {"sparsity": 0.5, "solver": solver, "layers": LAYERS, "precision": "bf16", "strict": True}
    samples = [torch.randn(20, 3, 7, 6) for _ in range(3)]
    for sample, made in zip(samples, trace_batch(model, samples, **options), strict=True):
        alone = trace(model, sample, **options)
        assert made.layers == alone.layers == tuple(LAYERS)
        assert all(torch.equal(made.weight(name), alone.weight(name)) for name in LAYERS)


def test_bad_samples(model, images):
    with pytest.raises(ValueError, match=r"samples is empty"):
        trace_batch(model, [], sparsity=0.5)
    with pytest.raises(ValueError, match=r"each of the 2 samples, got 1"):
        trace_batch(model, [images, images], sparsity=0.5, sample_ids=["a"])
    with pytest.raises(ValueError, match=r"sample '1'.*empty"):
        trace_batch(model, [images, []], sparsity=0.5, layers=LAYERS)
    with pytest.raises(ValueError, match=r"sample 'b'.*batch 0 has NaN"):
        trace_batch(model, [images, images / 0], sparsity=0.5, sample_ids=["a", "b"], layers=LAYERS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["pointwise.weight", "norm.bias"])
def test_weights_that_are_not_finite_are_named(model, images, name, value):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    with pytest.raises(ValueError, match=f"parameter '{name}' of the model has NaN or infinite values"):
        trace(model, images, sparsity=0.5)


def test_the_largest_weights_are_finite(model, images):
    largest = torch.finfo(torch.float32).max
    with torch.no_grad():
        model.get_parameter("norm.bias")[:2] = largest
        model.get_parameter("pointwise.weight").view(-1)[:4] = torch.tensor([largest, largest, -largest, -largest])
    with pytest.raises(ValueError, match=r"layer '.*' got NaN, infinite or overflowing inputs"):  # not the weights
        trace(model, images, sparsity=0.5)


def test_meta_models_are_refused(images):
    with torch.device("meta"):
        model = SmallNet()
    with pytest.raises(ValueError, match=r"'stem.weight' is on the meta device"):
        trace(model, images, sparsity=0.5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(1, 1), ("12", 12), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("500m", 5 * 10**8), ("64KiB", 65536), ("9b", 9)],
)
def test_parse_bytes(given, expected):
    assert parse_bytes(given) == expected


@pytest.mark.parametrize(
    ("given", "error"),
    [(given, ValueError) for given in ("", "GB", "-1", "2 apples", 0, -3)]
    + [(given, TypeError) for given in (1.5, True, [])],
)
def test_parse_bytes_refuses(given, error):
    with pytest.raises(error, match=r"memory_limit"):
        parse_bytes(given)


def test_grouping():
    sizes = {"a": 5, "b": 3, "c": 4, "d": 2, "e": 6}
    groups = group_by_memory(sizes, 10)
    assert sorted(name for group in groups for name in group) == list("abcde")
    assert all(sum(sizes[name] for name in group) <= 10 for group in groups) and len(groups) == 2
    assert group_by_memory(sizes, None) == [list("abcde")]
    assert group_by_memory({}, 10) == group_by_memory({}, None) == []
    assert samples_per_solve(sizes, None, 7) == 7 == samples_per_solve({}, 1, 7)
    assert samples_per_solve(sizes, 20, 7) == 3 and samples_per_solve(sizes, 6, 7) == 1
