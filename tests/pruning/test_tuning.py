"""The search for sparsities: against full traces, what it keeps, what it costs and what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from spade_fast import FallbackError, FallbackWarning, ops, trace, tune
from spade_fast.pruning.layers import UnknownLayerError, find_layers
from spade_fast.pruning.stages import group_layers
from spade_fast.pruning.tuning_result import Trial
from spade_fast.targets import class_against

SOLVERS = ["exact", "sparsegpt"]


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.point = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.point(self.conv(x).relu())


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(Block(8), nn.BatchNorm2d(8), Block(8))
        self.drop = nn.Dropout()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.body(self.stem(x).relu()).mean((2, 3))))


STAGES = {"head": ["head"], "body.2": ["body.2.conv", "body.2.point"], "body.0": ["body.0.conv", "body.0.point"]}
STAGES["stem"] = ["stem"]
LEVELS = (0.0, 0.3, 0.6, 0.9)

by_blocks = partial(tune, stages="blocks")


@pytest.fixture
def model() -> Network:
    return Network()


@pytest.fixture
def samples() -> list[Tensor]:
    return [torch.randn(20, 3, 6, 6) + 0.2 * i for i in range(3)]


@pytest.fixture
def score(samples):
    """Probability of the class that the dense network ranks second: there is something to gain."""

    def probability(model: nn.Module, i: int) -> float:
        assert not model.training
        with torch.no_grad():
            return float(model(samples[i][:1]).softmax(1)[0, i])

    return probability


def state(model: nn.Module) -> list[object]:
    tensors = [tensor.clone() for tensor in model.state_dict().values()]
    return [*tensors, *(module.training for module in model.modules()), [id(p) for p in model.parameters()]]


def same_state(one: list, other: list) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def by_full_traces(model, samples, score, *, rounds=1, candidates=LEVELS, stages=STAGES, **options):
    """The same search, with a whole trace of each sample for everything that is tried."""

    def mean(shares: dict[str, float]) -> tuple[float, float]:
        scores, sparsities = [], []
        for i, sample in enumerate(samples):
            made = trace(
                model, sample, sparsity={n: shares[s] for s, names in stages.items() for n in names}, **options
            )
            with made.applied(model):
                weights = [layer.weight(model) for layer in find_layers(model)[0]]
                sparsities.append(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights))
                scores.append(score(model, i))
        return math.fsum(scores) / len(scores), math.fsum(sparsities) / len(sparsities)

    model.eval()
    chosen = dict.fromkeys(stages, 0.0)
    before = best = mean(chosen)[0]
    tried = []
    for turn in range(1, rounds + 1):
        start = best
        for stage in stages:
            scores = {share: mean({**chosen, stage: share}) for share in candidates}
            for share in candidates:
                if share != chosen[stage]:
                    score_of_share, sparsity = scores[share]
                    tried.append(Trial(turn, stage, share, sparsity, None, score_of_share))
            chosen[stage] = min(candidates, key=lambda share: (-scores[share][0], share))
            best = scores[chosen[stage]][0]
        if best <= start:
            break
    return chosen, before, best, tried


@pytest.mark.parametrize("solver", SOLVERS)
def test_search_by_paths_is_search_by_full_traces(model, samples, score, solver):
    found = by_blocks(model, samples, score, candidates=LEVELS, solver=solver)
    chosen, before, after, tried = by_full_traces(model, samples, score, solver=solver)
    assert found.stages == chosen and len(set(chosen.values())) > 1 and found.after > found.before
    assert found.before == before and found.after == pytest.approx(after, abs=1e-6)
    assert found.settings["stages"] == STAGES and list(found.settings["stages"]) == list(STAGES)
    assert list(found.sparsity) == [layer.name for layer in find_layers(model)[0]]
    for one, other in zip(found.history, tried, strict=True):
        assert (one.round, one.stage, one.candidate, one.kept) == (other.round, other.stage, other.candidate, None)
        assert one.score == pytest.approx(other.score, abs=1e-6)
        assert one.sparsity == pytest.approx(other.sparsity, abs=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tuned_sparsities_reproduce_the_weights(model, samples, score, solver, dtype):
    model, samples = model.to(dtype), [sample.to(dtype) for sample in samples]
    seen: dict[int, list[dict[str, Tensor]]] = {0: [], 1: [], 2: []}

    def looking(model: nn.Module, i: int) -> float:
        seen[i].append({layer.name: layer.weight(model).detach().clone() for layer in find_layers(model)[0]})
        with torch.no_grad():
            return float(model(samples[i][:1]).softmax(1)[0, i])

    options = {"solver": solver, "damping": 0.02, "layers": ["body*", "head"]}
    found = by_blocks(model, samples, looking, candidates=LEVELS, **options)
    assert set(found.sparsity) == {"body.0.conv", "body.0.point", "body.2.conv", "body.2.point", "head"}
    assert any(found.sparsity.values())
    configurations = [dict.fromkeys(found.stages, 0.0)]
    for trial in found.history:  # from what is kept of the stages before
        earlier = {stage: found.stages[stage] for stage in list(found.stages)[: list(found.stages).index(trial.stage)]}
        configurations.append({**dict.fromkeys(found.stages, 0.0), **earlier, trial.stage: trial.candidate})
    for i, sample in enumerate(samples):
        made = trace(model, sample, sparsity=found.sparsity, solver=solver, damping=0.02)
        (position,) = [n for n, shares in enumerate(configurations) if shares == found.stages][-1:]
        weights = seen[i][position]
        for name, share in found.sparsity.items():
            if share == 0:
                assert name not in made.layers
                continue
            assert torch.equal(weights[name] == 0, ~made.mask(name))
            precision = 1e-5 if dtype == torch.float32 else 1e-10
            assert torch.allclose(weights[name], made.weight(name), rtol=precision, atol=precision)


def test_one_path_a_layer_and_chunk_of_samples(model, samples, score, monkeypatch):
    calls: list[str] = []
    for name in ("obs_path", "obs_solution", "inverse_cholesky", "sparsegpt"):
        native = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, _op=native, _name=name, **b: calls.append(_name) or _op(*a, **b))
    by_blocks(model, samples, score)
    assert {name: calls.count(name) for name in set(calls)} == {"obs_path": 6, "obs_solution": 6, "inverse_cholesky": 6}
    calls.clear()
    with pytest.warns(FallbackWarning, match="2 samples per solve"):
        limited = by_blocks(model, samples, score, memory_limit=2 * 4 * 72**2)
    assert calls.count("obs_path") == calls.count("obs_solution") == 12
    calls.clear()
    by_blocks(model, samples, score, solver="sparsegpt", candidates=LEVELS)
    assert {name: calls.count(name) for name in set(calls)} == {"sparsegpt": 6 * 3, "inverse_cholesky": 6}
    assert limited.sparsity == by_blocks(model, samples, score).sparsity


@pytest.mark.parametrize("solver", SOLVERS)
def test_same_again_and_model_as_it_was(model, samples, score, solver):
    model.train()
    model.head.weight.requires_grad_(False)
    before = state(model)
    found = [by_blocks(model, samples, score, solver=solver, rounds=2) for _ in range(2)]
    assert found[0] == found[1] and same_state(before, state(model))
    assert not model.head.weight.requires_grad


@pytest.mark.parametrize("step", ["calibrate", "solve", "search"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_model_is_as_it_was_after_exceptions(model, samples, score, step, error):
    model.train()
    before = state(model)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == step and done == (17 if step == "search" else 2):
            raise error

    with pytest.raises(error):
        by_blocks(model, samples, score, progress=interrupt)
    assert same_state(before, state(model))
    calls = []

    def failing(model: nn.Module, i: int) -> float:
        model.body[1].running_mean.add_(1)
        calls.append(i)
        if len(calls) == 40:
            raise error
        return float(len(calls))

    with pytest.raises(error):
        by_blocks(model, samples, failing)
    assert same_state(before, state(model))
    by_blocks(model, samples, score, candidates=[0.5])  # nothing is reserved any more


def test_ties_stay_dense(model, samples):
    found = by_blocks(model, samples, lambda model, i: 1)
    assert set(found.sparsity.values()) == {0.0} and found.before == found.after == 1
    levels = iter([0.0] + [1.0, 2.0, 2.0] * 4)  # of the best ones the lowest
    found = by_blocks(
        model, samples[:1], lambda model, i: next(levels), candidates=[0.9, 0.3, 0.6, 0.3], stages={"a": "head"}
    )
    assert found.sparsity == {"head": 0.6} and found.settings["candidates"] == [0.0, 0.3, 0.6, 0.9]


def zeros(model: nn.Module, name: str) -> float:
    weight = model.get_parameter(f"{name}.weight")
    return float((weight == 0).float().mean())


def test_rounds_end_when_nothing_improves(model, samples):
    stages = {"late": "head", "early": ["stem"]}

    def coupled(model: nn.Module, i: int) -> float:
        """The head is worth pruning only with a pruned stem, which is searched later."""
        early, late = round(zeros(model, "stem"), 1), round(zeros(model, "head"), 1)
        return early - late if early < 0.5 else early + late

    options = {"candidates": [0.4, 0.8], "stages": stages, "block": 1}
    once = by_blocks(model, samples[:2], coupled, **options)
    assert once.stages == {"late": 0.0, "early": 0.8} and once.after == pytest.approx(0.8)
    steps: list[tuple[str, int, int]] = []
    again = by_blocks(model, samples[:2], coupled, rounds=9, progress=lambda *step: steps.append(step), **options)
    assert again.stages == {"late": 0.8, "early": 0.8} and again.after == pytest.approx(1.6)
    assert max(trial.round for trial in again.history) == 2  # the third tries nothing new
    search = [(done, total) for stage, done, total in steps if stage == "search"]
    assert search[-1] == (24, 24) and [done for done, _ in search] == sorted(done for done, _ in search)
    assert again == by_blocks(model, samples[:2], coupled, rounds=9, **options)


def test_progress(model, samples, score):
    steps: list[tuple[str, int, int]] = []
    by_blocks(model, samples, score, candidates=[0.5], progress=lambda *step: steps.append(step))
    batches = [("calibrate", i, 9) for i in range(1, 10)]
    solving = [("solve", i, 6) for i in range(1, 7)]
    search = [("search", i, 12) for i in range(1, 13)]
    assert steps == [*batches, *solving, *search]


def test_stages(model):
    layers = find_layers(model)[0]
    assert group_layers(model, layers, "blocks") == STAGES
    assert list(group_layers(model, layers[1:3], "blocks")) == ["body.0"]
    assert list(group_layers(model, layers, "layers")) == [layer.name for layer in reversed(layers)]
    given = {"points": "*point", "rest": ["stem", "body*"]}
    assert group_layers(model, layers, given) == {
        "points": ["body.0.point", "body.2.point"],
        "rest": ["stem", "body.0.conv", "body.2.conv"],
    }
    wrapped = nn.Sequential(nn.ModuleDict({"net": model}))  # is looked through
    names = list(group_layers(wrapped, find_layers(wrapped)[0], "blocks"))
    assert names == ["0.net.head", "0.net.body.2", "0.net.body.0", "0.net.stem"]
    attention = nn.MultiheadAttention(4, 2)
    assert group_layers(attention, find_layers(attention)[0], "blocks") == {
        "out_proj": ["out_proj"],
        "in_proj_weight": ["in_proj_weight"],
    }
    plain = nn.Linear(3, 2)
    assert group_layers(plain, find_layers(plain)[0], "blocks") == {"weight": ["weight"]}


def test_layers_that_cannot_be_pruned(samples, score):
    class Partly(Network):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(3, 3)

    model = Partly()
    with pytest.warns(FallbackWarning, match=r"did not reach them: idle$") as caught:
        found = by_blocks(model, samples, score, candidates=[0.5])
    assert "idle" not in found.sparsity and "idle" not in found.stages
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.warns(FallbackWarning), pytest.raises(ValueError, match=r"there is no layer to tune"):
        by_blocks(model, samples, score, layers="idle")


@pytest.fixture
def inputs(samples):
    return [sample[:1] for sample in samples]


@pytest.fixture
def sensitive(model, inputs):
    """The model with logits that are large and depend on the input alone, so that pruning changes its decisions."""
    model.eval()
    with torch.no_grad():
        features = model.body(model.stem(torch.cat(inputs)).relu()).mean((0, 2, 3))
        model.head.weight.mul_(30)
        model.head.bias.copy_(-model.head.weight @ features)
    return model


def sparsity_of(model: nn.Module) -> float:
    weights = [layer.weight(model) for layer in find_layers(model)[0]]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def middle(model: nn.Module, i: int) -> float:
    """A score that is best at a sparsity of a half."""
    return sparsity_of(model) * (1 - sparsity_of(model)) + i


def measure(model, samples, inputs, score=middle, **options) -> tuple[float, float, float]:
    """Means over the samples' traces: sparsity, share kept of the predicted class's probability, score."""
    measured = []
    for i, (sample, given) in enumerate(zip(samples, inputs, strict=True)):
        with torch.no_grad():
            dense = model(given).softmax(1)[0]
        with trace(model, sample, inputs=given, **options).applied(model), torch.no_grad():
            after = model(given).softmax(1)[0, dense.argmax()]
            measured.append((sparsity_of(model), min(1.0, float(after / dense.max())), score(model, i)))
    sparsity, kept, scores = (math.fsum(values) / len(values) for values in zip(*measured, strict=True))
    return sparsity, kept, scores


@pytest.mark.filterwarnings("ignore:kept less than asked for")
@pytest.mark.parametrize("solver", SOLVERS)
def test_shares_to_keep_are_tried_by_whole_traces(sensitive, samples, inputs, solver):
    found = tune(sensitive, samples, middle, inputs=inputs, candidates=[0.3, 0.9, 0.6, 0.3], solver=solver, keep=0.75)
    assert [trial.candidate for trial in found.history] == found.settings["candidates"] == [0.9, 0.6, 0.3]
    assert found.settings["stages"] == "auto" and found.settings["keep"] == 0.75 and found.stages == {}
    for trial in found.history:
        sparsity, kept, score = measure(sensitive, samples, inputs, solver=solver, keep=trial.candidate)
        assert (trial.round, trial.stage) == (1, "auto")
        assert (trial.sparsity, trial.kept) == pytest.approx((sparsity, kept), abs=1e-6)
        assert trial.score == (pytest.approx(score) if kept >= 0.75 else None)
    scores = {trial.candidate: trial.score for trial in found.history if trial.score is not None}
    assert 0 < len(scores) < 3  # one keeps too little
    assert found.options == {"sparsity": "auto", "keep": max(scores, key=lambda share: scores[share])}
    assert found.before == 1 and found.after == max(scores.values()) and found.kept >= 0.75


@pytest.mark.parametrize("stages", ["auto", "blocks", "layers"])
def test_confident_networks_are_not_left_dense(model, samples, inputs, stages):
    with torch.no_grad():
        model.head.weight.mul_(30)
        model.eval()
        assert all(model(given).softmax(1).max() > 0.99 for given in inputs)
    bare = tune(model, samples, lambda model, i: 0.5, candidates=[0.5], stages="blocks")
    assert not any(bare.sparsity.values()) and bare.kept is None and "keep" not in bare.settings
    found = tune(model, samples, inputs=inputs, stages=stages, keep=0.8)
    assert found.before == 0 and found.after > 0.3 and found.kept >= 0.8
    sparsity, kept, _ = measure(model, samples, inputs, **found.options)
    assert (found.after, found.kept) == pytest.approx((sparsity, kept), abs=1e-5)


def test_what_is_to_be_kept_can_be_asked_for(model, samples, inputs):
    options = {"candidates": [0.9], "solver": "sparsegpt", "keep": 0.5}
    found = tune(model, samples, inputs=inputs, targets=[class_against(0, 1), None, 2], **options)
    shares = []
    for sample, given, target in zip(samples, inputs, [class_against(0, 1), None, 2], strict=True):
        shares.append(trace(model, sample, inputs=given, target=target, keep=0.9, solver="sparsegpt").auto.share)
    assert found.kept == pytest.approx(math.fsum(min(1.0, share) for share in shares) / 3, rel=1e-5)
    with pytest.raises(TypeError, match="targets are what is kept of inputs: give inputs"):
        tune(model, samples, middle, targets=[1, 2, 0], stages="blocks")
    with pytest.raises(ValueError, match="targets must have one entry for each of the 3 samples, got 1"):
        tune(model, samples, inputs=inputs, targets=[1])


def test_stages_that_lose_too_much_are_not_scored(sensitive, samples, inputs):
    scored = []

    def score(model: nn.Module, i: int) -> float:
        scored.append(sparsity_of(model))
        return sparsity_of(model)

    options = {"candidates": [0.3, 0.6, 0.9], "stages": "blocks", "keep": 0.9}
    found = tune(sensitive, samples, score, inputs=inputs, **options)
    floors = dict(zip(STAGES, (1 - 0.1 * share for share in (40 / 1536, 688 / 1536, 1320 / 1536, 1)), strict=True))
    for trial in found.history:
        assert (trial.score is None) == (trial.kept < floors[trial.stage])
    kept = [trial for trial in found.history if trial.score is not None]
    assert 0 < len(kept) < len(found.history) == 12 and len(scored) == 3 * (1 + len(kept))
    assert found.kept >= 0.9
    default = tune(sensitive, samples, inputs=inputs, **options)  # the score is the sparsity
    assert default.history == tuple(replace(one, score=pytest.approx(one.score)) for one in found.history)
    assert len(scored) == 3 * (1 + len(kept))
    again = tune(sensitive, samples, score, inputs=inputs, rounds=3, **options)  # may lose all of it in every stage
    assert again.after >= found.after and again.kept >= 0.9


def test_equal_scores_keep_more_and_equal_traces_are_scored_once(sensitive, samples, inputs):
    scored: list[int] = []

    def score(model: nn.Module, i: int) -> float:
        scored.append(i)
        return 1.0

    one = {"inputs": inputs[:1], "candidates": [0.5, 0.8, 0.8 + 1e-9], "keep": 0.1}
    found = tune(sensitive, samples[:1], score, **one)
    assert found.options["keep"] == 0.8 + 1e-9 and "the largest of 3 shares with this score" in found.summary()
    assert len(scored) == 1 + len({trial.sparsity for trial in found.history}) < 4


def test_nothing_keeps_enough(sensitive, samples, inputs):
    options = {"inputs": inputs, "candidates": [0.3, 0.2], "keep": 1.0}
    with pytest.warns(
        FallbackWarning, match=r"kept less than asked for: \d.*% with the largest candidate, 0.3"
    ) as caught:
        found = tune(sensitive, samples, middle, **options)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert found.options["keep"] == 0.3 and found.kept < 1 and found.after == found.history[0].score
    assert found.history[1].score is None
    with pytest.raises(FallbackError, match="kept less than asked for"):
        tune(sensitive, samples, middle, strict=True, **options)


def test_layers_go_with_automatic_sparsity(sensitive, samples, inputs):
    found = tune(sensitive, samples, inputs=inputs, layers=["body*", "head"], candidates=[0.8])
    assert found.options == {"sparsity": "auto", "keep": 0.8, "layers": ["body*", "head"]}
    assert set(trace(sensitive, samples[0], inputs=inputs[0], **found.options).layers) <= set(
        ("body.0.conv", "body.0.point", "body.2.conv", "body.2.point", "head")
    )


def test_automatic_search_leaves_the_model_as_it_was_and_tells_its_progress(sensitive, samples, inputs):
    sensitive.train()
    before = state(sensitive)
    steps: list[tuple[str, int, int]] = []

    def gradient(model: nn.Module, i: int) -> float:
        assert not model.training and torch.is_grad_enabled()
        given = inputs[i].clone().requires_grad_()
        return float(torch.autograd.grad(model(given).max(), given)[0].abs().sum())

    options = {"inputs": inputs, "candidates": [0.9, 0.3], "keep": 0.8}
    found = [tune(sensitive, samples, gradient, progress=lambda *step: steps.append(step), **options) for _ in "ab"]
    assert found[0] == found[1] and same_state(before, state(sensitive))
    search = [step[1:] for step in steps if step[0] == "search"]
    assert search[: len(search) // 2] == [(1, 9), (2, 9), (3, 9), (6, 9), (9, 9)]
    with pytest.raises(KeyboardInterrupt):
        tune(sensitive, samples, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), **options)
    assert same_state(before, state(sensitive))


def test_bad_arguments(model, samples, score):
    def refuse(error: type[Exception], message: str, samples=samples, score=score, stages="blocks", **options) -> None:
        before = state(model)
        with pytest.raises(error, match=message):
            tune(model, samples, score, stages=stages, **options)
        assert same_state(before, state(model))

    refuse(ValueError, "samples is empty", samples=[])
    refuse(TypeError, "score must be a function", score="probability")
    for value in (None, "high", [1.0]):
        refuse(TypeError, "score must return a number, got .* for sample 0", score=lambda *_, value=value: value)
    for value in (math.nan, math.inf):
        refuse(ValueError, "score must return a finite number", score=lambda *_, value=value: value)
    refuse(ValueError, r"candidates\[1\] must lie between 0 and 1, got 1.5", candidates=[0.5, 1.5])
    refuse(TypeError, r"candidates\[0\] must be a number", candidates=["x"])
    refuse(TypeError, "candidates must be numbers", candidates=0.5)
    refuse(ValueError, "candidates must include a sparsity above 0", candidates=[0])
    refuse(ValueError, "rounds must be at least 1", rounds=0)
    refuse(TypeError, "rounds must be an integer", rounds=1.5)
    refuse(ValueError, "stages must be 'auto', 'blocks', 'layers' or a mapping", stages="parts")
    refuse(UnknownLayerError, "'haed'", stages={"a": "haed"})
    refuse(ValueError, "unknown solver 'obs'", solver="obs")
    refuse(ValueError, "sample '1'.*NaN", samples=[samples[0], samples[1] / 0])
    refuse(ValueError, "no layer to tune", stages={})
    refuse(TypeError, "stages='auto' needs the samples themselves.*give inputs", stages="auto")
    refuse(TypeError, "without a score, tune needs the samples", score=None)
    refuse(ValueError, "inputs must have one entry for each of the 3 samples, got 2", inputs=samples[:2])
    refuse(TypeError, "inputs must have one entry for each of the samples, got 3", inputs=3)
    refuse(
        ValueError, "sample '1': the model cannot run inputs", inputs=[samples[0][:1], torch.ones(2), samples[2][:1]]
    )
    refuse(ValueError, "keep must be one number", keep=[0.5, 0.9])
    refuse(ValueError, "keep must be above 0 and at most 1, got 90: did you mean 0.9", keep=90)
    automatic = {"stages": "auto", "inputs": [sample[:1] for sample in samples]}
    refuse(ValueError, "shares to keep, above 0", candidates=[0.5, 0], **automatic)
    refuse(ValueError, "shares to keep, above 0", candidates=[], **automatic)
    refuse(
        ValueError, r"candidates\[0\] must lie between 0 and 1, got 90: did you mean 0.9", candidates=[90], **automatic
    )
    refuse(ValueError, "rounds must be 1 with stages='auto', got 2", rounds=2, **automatic)
    refuse(TypeError, "score must return a number, got 'high' for sample 0", score=lambda *_: "high", **automatic)
    iterators = [iter(sample.split(5)) for sample in samples]
    refuse(ValueError, "iterator", samples=iterators, memory_limit=3 * 4 * 72**2)
