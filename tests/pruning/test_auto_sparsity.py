"""Automatic sparsity: the search against brute force, on traces and on made-up scores; its record; bad input."""

from __future__ import annotations

import math
from collections import UserDict
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spade_fast import AutoSparsity, FallbackError, FallbackWarning, Trace, TraceAppliedError, trace, trace_batch
from spade_fast.pruning.auto_sparsity import LIMITS, Search
from spade_fast.pruning.calibration import calibrate
from spade_fast.pruning.ladders import LEVELS, Level
from spade_fast.pruning.layers import find_layers
from spade_fast.pruning.pruned_layer import PrunedLayer
from spade_fast.pruning.solve import LayerReport, solve_sparsities
from spade_fast.targets import class_against, log_probability, neuron

SOLVERS = ["exact", "sparsegpt"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Linear(24, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 6)]
    return nn.Sequential(*layers)


@pytest.fixture
def sample() -> Tensor:
    return torch.randn(1, 24, generator=torch.Generator().manual_seed(5))


def calibration_of(sample: Tensor, seed: int = 0) -> Tensor:
    return sample + 0.5 * torch.randn(80, 24, generator=torch.Generator().manual_seed(seed))


def probability(model: nn.Module, sample: Tensor, target: int) -> float:
    with torch.no_grad():
        return float(model(sample).softmax(1)[0, target])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("keep", [0.99, 0.9, 0.5])
def test_the_largest_limit_that_keeps_the_probability(model, sample, solver, keep):
    batches = calibration_of(sample)
    made = trace(model, batches, inputs=sample, solver=solver, keep=keep)
    model.eval()
    target = int(model(sample).argmax())
    dense = probability(model, sample, target)
    layers, _ = find_layers(model)
    grams = calibrate(model, batches, layers).grams
    levels = {
        layer.name: solve_sparsities(
            layer,
            layer.matrix(layer.weight(model).detach()),
            grams[layer.name][None],
            solver=solver,
            sparsities=LEVELS,
        )
        for layer in layers
    }
    scores = []
    for limit in LIMITS:
        pruned = nn.Sequential(*model)
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        for layer in layers:
            within = [weight for weight, (report,) in levels[layer.name] if report.measured_error <= limit]
            if within:
                layer.weight(pruned).data.copy_(layer.restore(within[-1][0]))
        scores.append(probability(pruned, sample, target))
        model.load_state_dict(kept)
    found = made.auto
    held = LIMITS.index(found.error)
    assert found.keep == keep and found.kept and math.isclose(found.dense, dense, rel_tol=1e-5)
    assert math.isclose(found.score, scores[held], rel_tol=1e-3) and scores[held] >= keep * dense
    assert all(score < keep * dense for score in scores[held + 1 : held + 4])
    assert made.decision.class_before == target
    assert math.isclose(made.decision.probability_after_of_class_before, found.score, rel_tol=1e-5)
    assert all(report.measured_error <= found.error for report in made.reports)
    by_limit = {trial.error: trial for trial in found.curve}
    assert sorted(by_limit) == [trial.error for trial in found.curve]
    assert by_limit[found.error].score == found.score
    assert math.isclose(by_limit[found.error].sparsity, made.sparsity, rel_tol=1e-6)
    for trial in found.curve:
        assert math.isclose(trial.score, scores[LIMITS.index(trial.error)], rel_tol=1e-3, abs_tol=1e-6)


def ladder_of(errors: list[float]) -> list[Level]:
    """Return a ladder of one layer with 10 weights; the number of removed weights is the index of the level."""
    layer, _ = find_layers(nn.Linear(10, 1))
    levels = []
    for removed, error in enumerate([0.0, *errors]):
        weight = torch.ones(1, 10)
        weight[0, :removed] = 0
        report = LayerReport("", (1, 10), removed / 10, removed / 10, removed, "exact", 1, measured_error=error)
        levels.append(Level(report, PrunedLayer.from_dense(layer[0], weight) if removed else None))
    return levels


def search_of(scores: list[float | tuple[float, ...]], limits: list[float]) -> tuple[Search, list[int]]:
    """Return a search on a ladder whose levels have these scores and errors, and a list of the levels it tries."""
    state, tried = [0], []

    @contextmanager
    def applied(pruned):
        state[0] = 10 - len(pruned[0].values) if pruned else 0
        tried.append(state[0])
        yield
        state[0] = 0

    def goal():
        score = scores[state[0]]
        return score if isinstance(score, tuple) else (score,)

    return Search({"": ladder_of(limits)}, goal, applied), tried


def test_search_on_made_up_scores():
    limits = [LIMITS[index] for index in (5, 10, 15, 20, 25, 30, 35)]
    search, tried = search_of([1.0, 0.99, 0.97, 0.95, 0.91, 0.6, 0.2, 0.1], limits)
    nine, five = search.run([0.9, 0.5])
    assert nine.levels == {"": 4} and five.levels == {"": 5} and len(tried) == len(set(tried))
    assert nine.auto.error == LIMITS[24] and five.auto.error == LIMITS[29]  # the last limits before the next level
    assert (nine.auto.score, five.auto.score, nine.auto.dense) == (0.91, 0.6, 1.0)
    assert nine.auto.curve == five.auto.curve and nine.auto.kept and five.auto.kept


def test_everything_holds_and_scores_may_rise_again():
    search, _ = search_of([1.0] * 4, [LIMITS[3], LIMITS[4], LIMITS[5]])
    (found,) = search.run([0.9])
    assert found.levels == {"": 3} and found.auto.error == LIMITS[-1]
    # One level, one limit wide, fails amid levels that hold.
    limits = [LIMITS[index] for index in (10, 20, 21, 30)]
    search, _ = search_of([1.0, 0.95, 0.5, 0.95, 0.1], limits)
    (found,) = search.run([0.9])
    assert found.levels == {"": 3} and found.auto.kept and found.auto.error == LIMITS[29]


def test_all_scores_must_be_kept():
    limits = [LIMITS[10], LIMITS[20], LIMITS[30]]
    search, _ = search_of([(1.0, 0.2), (0.99, 0.19), (0.98, 0.11), (0.9, 0.02)], limits)
    assert [found.levels[""] for found in search.run([0.9, 0.5, 0.05])] == [1, 2, 3]
    search, _ = search_of([1.0, 0.95, math.nan, math.nan], limits)
    assert [found.levels[""] for found in search.run([0.9])] == [1]


def test_nothing_holds():
    search, _ = search_of([1.0, 0.3, 0.2, 0.1], [LIMITS[10], LIMITS[20], LIMITS[30]])
    (found,) = search.run([0.9])
    assert found.levels == {"": 1} and not found.auto.kept and found.auto.score == 0.3
    assert "keeps 30.0% of the dense score, less than the 90% asked for" in str(found.auto)
    search, _ = search_of([(1.0, 0.5), (0.95, 0.1)], [LIMITS[10]])
    (found,) = search.run([0.9])
    assert "keeps 95.0% of the dense score, but less than the 90% asked for on noisy copies" in str(found.auto)
    search, _ = search_of([1.0, 0.99], [0.9])  # above all limits
    (found,) = search.run([0.9])
    assert found.levels == {"": 1} and found.auto.error == 0.9 and found.auto.kept


def test_a_score_that_no_sparsity_keeps(model, sample):
    def score(output: Tensor) -> Tensor:
        return torch.tensor([float(torch.equal(output, dense)) + 0.25])

    model.eval()
    dense = model(sample)
    options = {"inputs": sample, "target": score, "solver": "sparsegpt"}
    with pytest.warns(FallbackWarning, match="kept less than asked for: sample 'x' .*keeps 20.0% of the dense score"):
        made = trace(model, calibration_of(sample), sample_id="x", **options)
    assert not made.auto.kept and 0 < made.sparsity < 0.5
    with pytest.raises(FallbackError, match="kept less than asked for"):
        trace(model, calibration_of(sample), strict=True, **options)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_together_are_as_alone(model, solver):
    samples = [torch.randn(1, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    batches = [calibration_of(one, seed) for seed, one in enumerate(samples)]
    targets = [None, 0, 3, None, 5]
    together = trace_batch(model, batches, inputs=samples, targets=targets, solver=solver)
    with pytest.warns(FallbackWarning, match="in parts"):
        chunked = trace_batch(model, batches, inputs=samples, targets=targets, solver=solver, memory_limit="20 KB")
    for index, made in enumerate(together):
        alone = trace(model, batches[index], inputs=samples[index], target=targets[index], solver=solver)
        for other in (alone, chunked[index]):
            assert other.auto.error == made.auto.error and other.layers == made.layers
            assert all(torch.equal(other.mask(name), made.mask(name)) for name in made.layers)


def test_file(model, sample, tmp_path):
    made = trace(model, calibration_of(sample), inputs=sample, layers="0")
    made.save(tmp_path / "trace.safetensors")
    read = Trace.load(tmp_path / "trace.safetensors")
    assert read.auto == made.auto and isinstance(read.auto, AutoSparsity)
    assert read.target == made.target == f"class {made.decision.class_before}" and f"({made.target})" in made.summary()
    assert read.header["settings"]["sparsity"] == "auto" and f"error limit {made.auto.error:.3f}" in made.summary()
    assert repr(read).endswith(f", keep=0.9, error={made.auto.error:.3f})")
    given = trace(model, calibration_of(sample), sparsity=0.5)
    assert given.auto is None and given.target is None
    entries = made.auto.entries()
    for change in (
        {"kept": 1},
        {"curve": [[0.1, 0.2]]},
        {"curve": 3},
        {"error": math.inf},
        {"score": "1"},
        {"dense": 0},
        {"x": 1},
    ):
        with pytest.raises(ValueError, match="automatic sparsity"):
            AutoSparsity.from_entries({**entries, **change})


def test_inputs_in_all_forms_and_decisions(model, sample):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
            return self.inner(x if shift is None else x + shift)

    named, shift = Named(), torch.full((1, 24), 0.1)
    data = [{"x": calibration_of(sample), "shift": shift}]
    by_name = trace(named, data, inputs={"x": sample, "shift": shift})
    by_place = trace(named, data, inputs=[sample, shift])
    assert by_name.auto == by_place.auto and by_name.decision == by_place.decision is not None
    assert trace(named, data, sparsity=0.5, inputs=(sample, shift)).decision is not None
    single = trace(nn.Linear(24, 1), calibration_of(sample), inputs=sample, target=lambda output: output.abs()[:, 0])
    assert single.auto.kept and single.decision is None


def test_bad_arguments(model, sample):
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def refuse(error: type[Exception], message: str, **options) -> None:
        with pytest.raises(error, match=message):
            trace(model, calibration_of(sample), **options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.training

    refuse(TypeError, "sparsity='auto' needs the sample itself")
    refuse(TypeError, "inputs must be the sample as the model takes it.*got int", inputs=3)
    for options in ({}, {"sparsity": 0.5}):
        refuse(ValueError, r"cannot run inputs \(torch.float32 \[1, 3\]\)", inputs=sample[:, :3], **options)
        refuse(
            ValueError,
            r"cannot run inputs \(torch.float64 \[1, 24\]\)",
            inputs=UserDict(input=sample.double()),
            **options,
        )
    refuse(ValueError, "one row of logits for one image, got.*give a target, a function", inputs=sample.expand(2, -1))
    refuse(ValueError, "target must be a class from 0 to 5, got 6", inputs=sample, target=6)
    refuse(ValueError, "no class names: give the index of a class instead of 'cat'", inputs=sample, target="cat")
    refuse(TypeError, "target must be the index or name of a class, or a function.*got 0.5", inputs=sample, target=0.5)
    refuse(
        ValueError, r"lambda> must return one number.*got \[1, 6\] for 1", inputs=sample, target=lambda output: output
    )
    refuse(TypeError, "lambda> must return a tensor.*got None", inputs=sample, target=lambda output: None)
    refuse(ValueError, "lambda> must be finite, got nan", inputs=sample, target=lambda output: output[:, 0] * math.nan)
    for factor in (0.0, -1.0):
        refuse(
            ValueError,
            "sample '0': the dense network's score is -?[01].*lambda>, of which no share",
            inputs=sample,
            target=lambda output, factor=factor: factor * torch.ones(len(output)),
        )
    refuse(ValueError, r"must be one number, got \(0.9, 0.5\): trace once for each", inputs=sample, keep=(0.5, 0.9))
    refuse(ValueError, "what sparsity='auto' keeps", inputs=sample, target=1, sparsity=0.5)
    refuse(TypeError, "target must be the index or name of a class.*got True", inputs=sample, target=True)
    refuse(ValueError, r"the model cannot run inputs.*\[1, 3\]", inputs=sample[:, :3], sparsity=0.5)
    with pytest.raises(ValueError, match="inputs must have one entry for each of the 2 samples, got 1"):
        trace_batch(model, [sample, sample], inputs=[sample])
    with pytest.raises(ValueError, match="targets must have one entry for each of the 1 samples, got 2"):
        trace_batch(model, [sample], inputs=[sample], targets=[1, 2])
    for of_all in (1, "1", torch.tensor(1)):
        with pytest.raises(TypeError, match="targets must have one entry for each of the samples, got"):
            trace_batch(model, [sample], inputs=[sample], targets=of_all)
    with pytest.raises(TypeError, match=r"give inputs, or a number as sparsity.*sample 'b' lacks them"):
        trace_batch(model, [sample, sample], inputs=[sample, None], sample_ids=["a", "b"])
    with pytest.raises(ValueError, match="sample 'b': the model cannot run inputs"):
        trace_batch(model, [sample, sample], inputs=[sample, sample[:, :3]], sample_ids=["a", "b"])


def test_a_trace_whose_score_is_not_finite_keeps_nothing(model, sample):
    with torch.no_grad():
        dense = model.eval()(sample)

    def score(output: Tensor, near: float) -> Tensor:
        return torch.tensor([1.0 if float((output - dense).norm() / dense.norm()) <= near else math.nan])

    made = trace(model, calibration_of(sample), inputs=sample, target=lambda output: score(output, 0.05))
    with made.applied(model), torch.no_grad():
        assert float(score(model(sample), 0.05)) == 1.0
    assert made.auto.kept and made.auto.error < LIMITS[-1] and {point.score for point in made.auto.curve} == {1.0}
    with pytest.raises(ValueError, match=r"sample '0': in the mildest trace: target .* must be finite, got nan"):
        trace(model, calibration_of(sample), inputs=sample, target=lambda output: score(output, 0.0))


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
def test_targets_in_other_types(model, sample, kind):
    data = calibration_of(sample)
    expected = trace(model, data, inputs=sample, target=2).auto
    assert trace(model, data, inputs=sample, target=kind(2)).auto == expected
    (made,) = trace_batch(model, [data], inputs=[sample], targets=kind([2]) if kind is not np.int64 else [kind(2)])
    assert made.auto == expected


def test_questions_other_than_a_class(model, sample):
    data = calibration_of(sample)
    targets = [class_against(1, 4), log_probability(2), neuron("0", 3), lambda output: output.softmax(1)[:, 2]]
    model[0].bias.data[3] -= 2 * model[0](sample)[0, 3].detach().clamp(max=0)  # the neuron is above 0
    with torch.no_grad():
        logits, neurons = model.eval()(sample)[0], model[0](sample)[0]
    kept = [(logits[1] - logits[4]).sigmoid(), logits.softmax(0)[2], neurons[3], logits.softmax(0)[2]]
    for made, expected in zip(trace_batch(model, [data] * 4, inputs=[sample] * 4, targets=targets), kept, strict=True):
        assert made.auto.dense == pytest.approx(float(expected), rel=1e-4)
        decision, score = made.decision, made.auto.score
        if targets[0].name == made.target:
            assert decision.class_before == (1 if logits[1] > logits[4] else 4)
            assert decision.class_after == (1 if score > 0.5 else 4)
            assert decision.probability_after == pytest.approx(max(score, 1 - score), rel=1e-4)
        else:
            assert decision.class_before == int(logits.argmax())
    assert not any(module._forward_hooks for module in model.modules())
    model.config = type("Config", (), {"id2label": dict(enumerate("abcdef"))})()
    assert trace(model, data, inputs=sample, target="c").auto == trace(model, data, inputs=sample, target=2).auto


def test_a_single_logit_has_no_decision(sample):
    model = nn.Sequential(nn.Linear(sample.shape[1], 1, bias=False))
    model[0].weight.data.mul_(model(sample).sign())
    made = trace(model, calibration_of(sample), inputs=sample, target=0)
    assert made.decision is None and made.auto.dense == pytest.approx(float(model(sample)))


def test_the_dense_network_is_scored_while_no_trace_can_be_applied(model, sample):
    other, refused = trace(model, calibration_of(sample), sparsity=0.9), []

    def score(output: Tensor) -> Tensor:
        try:
            with other.applied(model):
                pass
        except TraceAppliedError as error:
            refused.append(str(error))
        return torch.ones(1)

    trace(model, calibration_of(sample), inputs=sample, target=score)
    pruning, applied = (sum(what in one for one in refused) for what in ("being pruned", "already applied"))
    assert pruning == 2 and applied == len(refused) - 2 > 0


def test_autocast_of_the_caller(model, sample):
    with torch.autocast("cpu", torch.bfloat16):
        made = trace(model, calibration_of(sample), inputs=sample, keep=0.99)
        with made.applied(model), torch.no_grad():
            score = float(model.eval()(sample).float().softmax(1)[0, made.decision.class_before])
    assert made.auto.score == pytest.approx(score, rel=1e-3) and made.auto.score != made.auto.dense


def test_an_error_in_the_search_leaves_the_model_as_it_was(model, sample):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def score(output: Tensor) -> Tensor:
        calls.append(output)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return torch.ones(1)

    with pytest.raises(KeyboardInterrupt):
        trace(model, calibration_of(sample), inputs=sample, target=score)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
