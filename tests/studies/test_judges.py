"""Judges: what they see of a picture at few pixels, ranks of classes, and features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spade_fast.inputs.networks import LoadedModel
from studies.visualization.judges import SIDES, Judge, features, features_of_each, likeness, rank_of, verdicts


def colour_judge(side: int = 128) -> LoadedModel:
    """Classes: red, green and blue, by the mean colour, and no colour."""
    last = nn.Linear(3, 4)
    with torch.no_grad():
        last.weight.copy_(20 * torch.eye(4, 3))
        last.bias.zero_()
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    return LoadedModel("colours", module.eval(), (0.5,) * 3, (0.25,) * 3, side, side)


def stripes(side: int, period: int) -> Tensor:
    """Vertical stripes of black and white."""
    columns = (torch.arange(side) // (period // 2)) % 2
    return columns.float().expand(1, 3, side, side)


@pytest.mark.parametrize("side", [48, 64, 96])
def test_few_pixels_keep_coarse_stripes_and_lose_fine_ones(side: int) -> None:
    judge = Judge(colour_judge())
    fine, coarse = (0.25 * judge.sees(stripes(192, period), side) + 0.5 for period in (2, 64))
    inner = (..., slice(8, -8), slice(8, -8))
    assert float((fine[inner] - 0.5).abs().max()) < 0.05
    assert float(coarse[inner].min()) < 0.05 and float(coarse[inner].max()) > 0.95


def test_whole_pictures_are_seen_at_the_judges_size_and_normalisation() -> None:
    judge = Judge(colour_judge())
    assert judge.sees(stripes(192, 64)).shape == (1, 3, 128, 128)
    same = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(judge.sees(same), (same - 0.5) / 0.25)
    assert float(judge.sees(stripes(192, 2)).abs().max()) <= 2  # colours stay between 0 and 1


def test_ranks_count_the_classes_that_are_at_least_as_probable() -> None:
    found = torch.tensor([0.1, 0.4, 0.3, 0.2])
    assert [rank_of(found, target) for target in range(4)] == [3, 0, 1, 2]
    assert rank_of(torch.full((4,), 0.25), 0) == 3  # a network that prefers nothing recognises nothing


def test_verdicts_hold_rank_and_probability_at_each_resolution_of_the_judges_own_class() -> None:
    green = torch.tensor([0.1, 0.9, 0.5]).view(3, 1, 1).expand(3, 160, 160)
    found = verdicts(Judge(colour_judge()), green, 1)
    assert list(found) == list(SIDES) == ["full", "96", "64", "48"]
    assert all(one["rank"] == 0 and one["probability"] > 0.99 for one in found.values())
    judge = Judge(colour_judge(), {17: 2})
    assert judge.knows(17) and not judge.knows(2)
    assert verdicts(judge, green, 17)["64"]["rank"] == 2  # blue, behind green and no colour's tie with it


def test_a_fine_pattern_is_recognised_at_full_resolution_only() -> None:
    first = nn.Conv2d(3, 2, (1, 2), bias=False)
    with torch.no_grad():
        first.weight[0] = torch.tensor([1.0, -1.0]).view(1, 2)
        first.weight[1] = 0.2
    network = nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    judge = Judge(LoadedModel("edges", network, (0.0,) * 3, (1.0,) * 3, 192, 192))
    found = verdicts(judge, stripes(192, 2)[0], 0)
    assert [one["rank"] for one in found.values()] == [0, 1, 1, 1]


def test_features_are_what_the_last_linear_layer_takes(loaded: LoadedModel) -> None:
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    judge = Judge(loaded)
    found = features(judge, images)
    last = loaded.module.get_submodule("6")
    torch.testing.assert_close(last(found), loaded.module(judge.sees(images)))
    assert found.shape == (3, 8) and not last._forward_pre_hooks
    few = features(judge, images, 6)
    torch.testing.assert_close(last(few), loaded.module(judge.sees(images, 6)))
    assert not torch.allclose(few, found)


def test_features_may_be_means_of_a_layers_maps(loaded: LoadedModel) -> None:
    images = torch.rand(2, 3, 24, 24)
    judge = Judge(loaded, layer="2")
    maps = loaded.module[:3](judge.sees(images))
    torch.testing.assert_close(features(judge, images), maps.mean((2, 3)))


def test_features_of_each_picture_are_none_without_one(loaded: LoadedModel) -> None:
    picture = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(0))
    judge = Judge(loaded)
    first, second = features_of_each(judge, [None, picture], 6)
    assert first is None and second is not None and torch.equal(second, features(judge, picture[None], 6)[0])


def test_likeness_is_the_mean_cosine() -> None:
    examples = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert likeness(torch.tensor([1.0, 0.0]), examples) == pytest.approx(0.5)
    assert likeness(torch.tensor([-1.0, 0.0]), examples[:1]) == pytest.approx(-1)
