"""Maps without a network."""

from __future__ import annotations

import torch

from studies.shared.plain_maps import centre, edges


def test_edges_are_where_colours_change() -> None:
    image = torch.zeros(1, 3, 10, 12)
    image[:, 1, :, 6:] = 2.0
    found = edges(image)
    assert found.shape == (10, 12)
    assert torch.equal(found > 0, torch.isin(torch.arange(12), torch.tensor([5, 6])).expand(10, 12))
    assert torch.allclose(found[:, 5], torch.tensor(8.0))  # a step of 2, weighted 1 + 2 + 1
    assert torch.allclose(edges(image.mT), found.mT)


def test_the_centre_map_falls_from_the_middle() -> None:
    found = centre(torch.zeros(1, 3, 5, 9))
    assert found.shape == (5, 9) and int(found.argmax()) == 2 * 9 + 4
    assert torch.allclose(found, found.flip(0)) and torch.allclose(found, found.flip(1))
    assert (found[2].diff() < 0).tolist() == [False] * 4 + [True] * 4
