"""The method of the studies: Fourier with the views of MACO, known to `visualize` only while they paint."""

from __future__ import annotations

import pytest
import torch

from spade_fast import Feature, visualize
from spade_fast.attribution.visualization.parametrizations import PARAMETRIZATIONS, Fourier, Maco
from studies.visualization.methods import FOURIER_MACO_VIEWS, own_methods


def test_only_the_views_differ_from_fourier(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    def picture(method: str) -> torch.Tensor:
        return visualize(model, Feature(1), method=method, size=(32, 32), view=(24, 24), steps=3).pictures

    with own_methods():
        mixed = picture(FOURIER_MACO_VIEWS)
        fourier = picture("fourier")
        assert not torch.equal(mixed, fourier) and not torch.equal(mixed, picture("maco"))
        monkeypatch.setattr(Fourier, "views", Maco.views)
        assert torch.equal(mixed, picture("fourier"))


def test_the_package_knows_the_method_only_meanwhile() -> None:
    before = list(PARAMETRIZATIONS)
    with own_methods():
        assert [*before, FOURIER_MACO_VIEWS] == list(PARAMETRIZATIONS)
    assert list(PARAMETRIZATIONS) == before
