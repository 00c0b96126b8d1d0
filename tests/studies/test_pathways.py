"""Pathways: what neurons contribute, and what silencing the others does."""

from __future__ import annotations

import torch
from torch import nn

from studies.shared.pathways import neuron_contributions, silenced_but, strongest


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_after_the_last_rectifier_a_contribution_is_what_removing_the_neuron_costs() -> None:
    module, image = network(), torch.randn(1, 2, 3, 3)
    contributions = neuron_contributions(module, image, 1, ["2"])
    dense = module(image)[0, 1]
    for channel, row, column in ((0, 0, 0), (3, 1, 2), (5, 2, 2)):
        keep = torch.ones(1, 6, 3, 3, dtype=torch.bool)
        keep[0, channel, row, column] = False
        with silenced_but(module, {"2": keep}):
            change = abs(float((module(image)[0, 1] - dense).detach()))
        assert abs(change - float(contributions["2"][0, channel, row, column])) < 1e-6


def test_the_strongest_of_all_layers_together_are_kept() -> None:
    contributions = {"a": torch.tensor([1.0, 8.0, 3.0]), "b": torch.tensor([[7.0, 2.0, 9.0]])}
    kept = strongest(contributions, 0.5)
    assert kept["a"].tolist() == [False, True, False] and kept["b"].tolist() == [[True, False, True]]
    assert all(bool(one.all()) for one in strongest(contributions, 1.0).values())


def test_silenced_neurons_pass_neither_values_nor_gradients_and_come_back() -> None:
    module, image = network(), torch.randn(2, 2, 3, 3, requires_grad=True)
    before = module(image)
    nothing = torch.zeros(1, 6, 3, 3, dtype=torch.bool)
    with silenced_but(module, {"2": nothing}):
        silent = module(image)
        (gradient,) = torch.autograd.grad(silent.sum(), image)
    assert torch.allclose(silent, module[2].bias.expand(2, 3)) and not gradient.any()
    assert torch.equal(module(image), before)
