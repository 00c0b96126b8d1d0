"""Goals of automatic sparsity: noisy copies beside the sample."""

from __future__ import annotations

import pytest
import torch

from spade_fast import AssumptionWarning
from spade_fast.pruning.goals import Score, sample_goal


def test_noisy_copies_count_unless_the_noise_destroys_the_score():
    scores = {1.0: 0.8, 2.0: 0.3, 3.0: 0.1}
    score, copies = Score("class 1", lambda given: scores[float(given)]), torch.tensor([2.0, 3.0]).split(1)
    goal = sample_goal("x", score, torch.tensor(1.0), copies)
    assert goal.target == "class 1"
    assert goal() == pytest.approx((0.8, 0.2))
    scores[2.0] = 0.0
    assert goal() == pytest.approx((0.8, 0.05))
    scores[3.0] = 0.079
    with pytest.warns(AssumptionWarning, match="sample 'x': with the noise, .* falls from 0.8 to 0.0395"):
        goal = sample_goal("x", score, torch.tensor(1.0), copies)
    assert goal() == (0.8,)
