"""Scores of maps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import Case
from studies.shared.scores import localisation, perturbation, separation


def test_a_map_of_the_evidence_alone_is_perfect(loaded: LoadedModel, cases: list[Case]) -> None:
    case = cases[0]
    assert case.mask is not None
    assert localisation(loaded, case, case.mask.float()) == {"auc": 1.0, "pointing": 1.0, "energy": 1.0}
    with pytest.raises(ValueError, match="no mask"):
        localisation(loaded, replace(case, mask=None), torch.rand(24, 24))


def test_maps_that_do_not_depend_on_the_class_separate_nothing(loaded: LoadedModel, cases: list[Case]) -> None:
    case = cases[0]
    mirrored = replace(case, mask=case.rival_mask, rival_mask=case.mask)
    attributions = torch.rand(24, 24)
    found = [separation(loaded, one, attributions) for one in (case, mirrored)]
    for score in ("share", "auc"):
        assert found[0][score] + found[1][score] == pytest.approx(1)
    assert case.mask is not None
    assert separation(loaded, case, case.mask.float()) == {"share": 1.0, "auc": 1.0}


def test_pixels_outside_both_evidences_do_not_matter(loaded: LoadedModel, cases: list[Case]) -> None:
    rival = torch.zeros(24, 24, dtype=torch.bool)
    rival[:, 20:] = True
    case = replace(cases[0], rival_mask=rival)
    attributions = torch.rand(24, 24)
    changed = attributions.clone()
    changed[:, 12:20] = 9
    assert separation(loaded, case, attributions) == separation(loaded, case, changed)


def test_the_pixels_that_matter_raise_insertion_and_lower_deletion(loaded: LoadedModel, cases: list[Case]) -> None:
    image = torch.zeros(1, 3, 24, 24)
    image[..., 8:16, 8:16] = torch.tensor([3.0, -3.0, 3.0]).view(3, 1, 1)
    with torch.no_grad():
        logits = [loaded.module(one) for one in (image, torch.zeros_like(image))]
    case = replace(cases[0], image=image, target=int((logits[0] - logits[1]).argmax()))
    square = torch.zeros(24, 24)
    square[8:16, 8:16] = 1
    good, bad = (perturbation(loaded, case, one) for one in (square, 1 - square))
    assert good["insertion"] > bad["insertion"] and good["deletion"] < bad["deletion"]
