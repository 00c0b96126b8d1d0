"""The rows of all studies can be made, here on a small network with the names of EfficientNet's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spade_fast.inputs.networks import LoadedModel
from studies import insertion, localisation, mosaics, settings, triggers
from studies.shared.cases import Case, probabilities
from studies.shared.ladders import Calibration
from studies.shared.making import Maker, Other
from studies.shared.rows import Rows, Source

OTHERS = ("same trigger", "other trigger", "clean", "its own alone", "the other alone", "another")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._expand_conv = nn.Conv2d(6, 100, 1)
        self._first = nn.ReLU()
        self._depthwise_conv = nn.Conv2d(100, 100, 3, padding=1, groups=100)
        self._second = nn.ReLU()
        self._project_conv = nn.Conv2d(100, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        found = self._second(self._depthwise_conv(self._first(self._expand_conv(images))))
        return images + self._project_conv(found)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self._blocks = nn.ModuleList([Block()])
        self._conv_head = nn.Conv2d(6, 16, 1)
        self._relu = nn.ReLU()
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._fc = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self._blocks[0](self._stem(images))
        return self._fc(self._avg_pooling(self._relu(self._conv_head(features))).flatten(1))


@pytest.fixture
def network() -> LoadedModel:
    torch.manual_seed(0)
    return LoadedModel("small", Small().eval(), (0.5,) * 3, (0.25,) * 3, 24, 24)


@pytest.fixture
def stages(network: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Sequence[Rows]]:
    """The stages of each study, with the same sparsity everywhere in place of those that are tuned."""
    monkeypatch.setattr(localisation, "tuned_sparsity", lambda *_: {"_conv_head": 0.5, "_blocks.0._expand_conv": 0.0})
    main = {**localisation._main(network), **localisation._means()}
    return {
        "localisation": [main, localisation._controls(), localisation._exact(network)],
        "triggers": [triggers._rows()],
        "mosaics": [mosaics._rows()],
        "insertion": insertion._stages(Calibration()),
        "settings": [settings._rows(network)],
    }


def few_images(one: Source) -> Source:
    """The same source, calibrated on few images."""
    return replace(one, weights=replace(one.weights, calibration=replace(one.weights.calibration, images=2)))


@pytest.mark.parametrize("study", ["localisation", "triggers", "mosaics", "insertion", "settings"])
def test_every_row_has_a_map_for_each_method_and_what_the_tables_need(
    network: LoadedModel, cases: list[Case], stages: Mapping[str, Sequence[Rows]], study: str
) -> None:
    case = replace(cases[0], target=int(probabilities(network, cases[0].image).argmax()))
    others = {whose: {case.name: Other(whose, cases[1].image, 1)} for whose in OTHERS}
    maker = Maker(network, case.image, others, localisation.NEURONS)
    made: dict[str, Any] = {}
    for stage in stages[study]:
        few = {
            name: replace(one, groups=tuple(tuple(map(few_images, group)) for group in one.groups))
            for name, one in stage.items()
        }
        for name, maps, facts in maker.maps(case, few):
            assert tuple(maps) == stage[name].methods
            assert all(one.shape == (24, 24) and torch.isfinite(one).all() for one in maps.values())
            assert stage[name].plain or 0 <= facts["probability"] <= 1
            kept = [source.weights.keep for source in stage[name].sources() if source.weights.keep]
            assert bool(kept) == ("kept" in facts)
            made[name] = maps
    assert list(made) == [name for stage in stages[study] for name in stage]
    if study == "localisation":
        assert not torch.equal(made["fast two"]["saliency"], made["dense"]["saliency"])
        assert all(name in made for pair in localisation._PAIRS for name in pair)
    if study in ("triggers", "insertion"):
        pairs = {"triggers": triggers._PAIRS, "insertion": insertion._PAIRS}[study]
        assert all(name in made for pair in pairs for name in pair)


def test_neurons_of_pathways_are_inputs_that_a_rectifier_has_made(network: LoadedModel, cases: list[Case]) -> None:
    maker = Maker(network, cases[0].image, neurons=localisation.NEURONS)
    least = []
    for name in maker._neurons:
        network.module.get_submodule(name).register_forward_pre_hook(lambda _, inputs: least.append(inputs[0].min()))
    with torch.no_grad():
        network.module(cases[0].image)
    assert len(least) == 3 and min(least) >= 0
