"""What the dense network and a trace predict for the sample."""

from __future__ import annotations

import copy
import json
import threading

import pytest
import torch
from torch import nn

from spade_fast import Decision, Trace, TraceAppliedError, trace
from spade_fast.pruning.decision import probabilities, repeatable


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()


@pytest.fixture
def sample():
    return torch.randn(1, 12, generator=torch.Generator().manual_seed(1))


def make(model, sample, sparsity):
    noise = torch.randn(64, 12, generator=torch.Generator().manual_seed(2))
    return trace(model, sample + noise, sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [0.2, 1.0])
def test_the_decision_is_that_of_both_networks(model, sample, sparsity, tmp_path):
    made, before = make(model, sample, sparsity), copy.deepcopy(model.state_dict())
    assert made.decision is None and "decision" not in made.summary()
    decision = made.record_decision(model, sample)
    assert model.training and all(torch.equal(one, model.state_dict()[name]) for name, one in before.items())
    dense = model.eval()(sample).detach().softmax(1)[0]
    with made.applied(model):
        pruned = model(sample).detach().softmax(1)[0]
    assert (decision.class_before, decision.class_after) == (int(dense.argmax()), int(pruned.argmax()))
    found = (decision.probability_before, decision.probability_after, decision.probability_after_of_class_before)
    assert found == pytest.approx([float(dense.max()), float(pruned.max()), float(pruned[dense.argmax()])])
    assert decision.kept == (dense.argmax() == pruned.argmax()) and decision == made.decision
    made.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace").decision == decision


def test_a_lost_decision_is_shown(model, sample):
    made = make(model, sample, 0.5)
    made.decision = Decision(2, 0.75, 0, 0.5, 0.25)
    assert not made.decision.kept and "decision lost" in repr(made)
    assert "decision: class 2 (75.0%), lost to class 0 (50.0%; class 2: 25.0%)" in made.summary()
    made.decision = Decision(2, 0.75, 2, 0.5, 0.5)
    assert "lost" not in repr(made) and "decision: class 2 (75.0%), kept (50.0%)" in made.summary()


def test_outputs_that_hold_logits():
    logits = torch.tensor([[1.0, 2.0]])
    for output in ({"loss": 0.5, "logits": logits}, (logits, None)):
        assert torch.equal(probabilities(output), logits.softmax(1)[0])


@pytest.mark.parametrize(
    "output, message",
    [
        (torch.zeros(2, 3), r"one row of logits for one image, got \[2, 3\]"),
        (torch.zeros(3), r"got \[3\]"),
        ((), "got tuple"),
        ({"scores": torch.zeros(1, 3)}, "got dict with the entries scores"),
        (torch.zeros(1, 3, dtype=torch.int64), "one row of logits"),
        (torch.zeros(1, 1), "single logit"),
        (torch.full((1, 3), torch.nan), "NaN or infinite"),
    ],
)
def test_other_outputs_are_no_decision(output, message):
    with pytest.raises(ValueError, match=message):
        probabilities(output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_softmax_at_the_end_of_a_network_is_not_repeated(dtype):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = probabilities(logits.softmax(1))
    assert torch.equal(found, logits.softmax(1)[0].to(found.dtype))
    assert torch.allclose(probabilities(logits.log_softmax(1)).double(), logits.double().softmax(1)[0], atol=1e-2)
    assert torch.equal(probabilities(logits.abs()), logits.abs().to(found.dtype).softmax(1)[0])


class Noisy(nn.Linear):
    def forward(self, *, image):
        return super().forward(image) + torch.randn(len(image), self.out_features)


def test_random_networks_with_keyword_inputs(sample):
    """Dense network and trace draw the same numbers, and the user's next ones are what they would have been."""
    noisy = Noisy(12, 5)
    made = trace(noisy, [{"image": sample}], sparsity=0)
    torch.manual_seed(3)
    decisions = [made.record_decision(noisy, image=sample) for _ in range(5)]
    assert all(one.probability_before == one.probability_after and one == decisions[0] for one in decisions)
    following = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(following, torch.rand(1))


def test_random_networks_in_two_threads():
    def draw(meanwhile):
        first = torch.rand(3)
        meanwhile()
        return first + torch.rand(3)

    expected, before = repeatable(draw, lambda: None), torch.get_rng_state()
    inside, other_inside, done = threading.Event(), threading.Event(), threading.Event()
    results = []

    def draw_in_other_thread() -> None:
        inside.wait()
        results.append(repeatable(draw, lambda: other_inside.set() or done.wait(0.2)))

    thread = threading.Thread(target=draw_in_other_thread)
    thread.start()
    results.append(repeatable(draw, lambda: inside.set() or other_inside.wait(0.2)))
    done.set()
    thread.join()
    assert all(torch.equal(one, expected) for one in results)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_compared_in_float32():
    assert probabilities(torch.tensor([[1.0, 2.0]], dtype=torch.float16)).dtype == torch.float32


def test_an_applied_trace_is_refused(model, sample):
    made = make(model, sample, 0.5)
    with made.applied(model), pytest.raises(TraceAppliedError):
        made.record_decision(model, sample)
    assert made.decision is None


@pytest.mark.parametrize(
    "changes",
    [
        {"class_before": -1},
        {"class_after": 1.5},
        {"class_after": True},
        {"probability_before": "1"},
        {"probability_after": float("nan")},
        {"probability_after": float("inf")},
        {"more": 1},
        {"class_before": None},
    ],
)
def test_damaged_entries_are_refused(changes):
    entries = {**json.loads(json.dumps(vars(Decision(0, 0.5, 1, 0.5, 0.25)))), **changes}
    with pytest.raises(ValueError, match="a decision has"):
        Decision.from_entries(entries)
