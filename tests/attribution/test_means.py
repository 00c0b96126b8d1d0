"""Means of attributions."""

from __future__ import annotations

import torch

from spade_fast.attribution.means import mean_attributions


def test_each_sample_of_each_result_counts_alike():
    one, other = torch.randn(3, 2, 4, 5), 1000 * torch.randn(3, 2, 4, 5)
    found = mean_attributions([one, other])
    for sample in range(3):
        expected = (one[sample] / one[sample].abs().sum() + other[sample] / other[sample].abs().sum()) / 2
        assert torch.allclose(found[sample], expected)
    assert mean_attributions([other]) is other


def test_tuples_scalars_zeros_and_half_precision():
    first, second = mean_attributions([(torch.ones(2, 3), torch.zeros(2)), (torch.zeros(2, 3), torch.ones(2))])
    assert torch.allclose(first, torch.full((2, 3), 1 / 12)) and torch.allclose(second, torch.full((2,), 0.25))
    half = torch.full((1, 3, 224, 224), 8.0, dtype=torch.float16)  # whose sum overflows
    half[..., 0] = 0.01  # whose share of the sum would be 0
    found = mean_attributions([half, half])
    assert torch.allclose(found, half.float() / half.float().sum(), rtol=1e-5) and found.min() > 0
    assert isinstance(mean_attributions([[torch.ones(1, 2)], [torch.ones(1, 2)]]), list)


def test_inputs_of_a_sample_keep_their_relative_size():
    first, second = torch.rand(2, 3), 10 * torch.rand(2, 4, 5)
    found = mean_attributions([(first, second), (2 * first, 2 * second)])
    for sample in range(2):
        total = first[sample].sum() + second[sample].sum()
        assert torch.allclose(found[0][sample], first[sample] / total)
        assert torch.allclose(found[1][sample], second[sample] / total)
    (of_layer,) = mean_attributions([[(first, second)], [(first, second)]])
    assert torch.allclose(of_layer[1], found[1])
    shared = mean_attributions([(first, second[:1]), (first, second[:1])])  # of one sample
    assert torch.allclose(shared[0], first / (first.sum() + second[:1].sum()))
