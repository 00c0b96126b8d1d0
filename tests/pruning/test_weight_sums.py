"""A parameter that is added to others before it is multiplied by inputs is named, a bias is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import FallbackError, FallbackWarning, trace


class Parts(nn.Module):
    """A layer that can be pruned, and one that is computed from three parameters."""

    def __init__(self, use: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.w, self.a, self.b = (nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (2, 6), (6, 2)))
        self.register_buffer("mask", torch.eye(6))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, self.first(x))


class Adapted(nn.Linear):
    """LoRA written by hand."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.a, self.b = (nn.Parameter(torch.randn(shape)) for shape in ((2, 6), (6, 2)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


SUMS: dict[str, tuple[Callable[[Parts, Tensor], Tensor], str]] = {
    "LoRA": (lambda m, x: F.linear(x, m.w + m.b @ m.a), "aten.add"),
    "scaled": (lambda m, x: x @ (0.5 * (m.b @ m.a) + m.w).T.contiguous(), "aten.add"),
    "in one call": (lambda m, x: x @ torch.addmm(m.w, m.b, m.a), "aten.addmm"),
    "a buffer": (lambda m, x: torch.einsum("oi,bi->bo", m.w + m.mask, x), "aten.add"),
    "a constant": (lambda m, x: F.linear(x, m.w + torch.ones(6, 6)), "aten.add"),
    "a kernel": (lambda m, x: F.conv1d(x[..., None], (m.w + m.mask)[..., None]), "aten.add"),
    "joined": (lambda m, x: F.linear(x, torch.cat([m.w, m.mask])), "aten.cat"),
    "to the left": (lambda m, x: (m.w + m.mask) @ x.T, "aten.add"),
}
BIASES: dict[str, Callable[[Parts, Tensor], Tensor]] = {
    "positions": lambda m, x: m.first(x.expand(6, 6) + m.w),
    "sums of them": lambda m, x: m.first(x.expand(6, 6) + (m.w + m.mask)),
    "class tokens": lambda m, x: m.first(torch.cat([m.w, x])),
    "latent queries": lambda m, x: m.first(m.w + m.mask) @ x.T,
    "sparse inputs": lambda m, x: m.first(x.to_sparse() @ m.mask + m.w[:1]),
    "written into an empty tensor": lambda m, x: m.first(torch.zeros(6, 6).copy_(x[:1]) + m.w) @ x.T,
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", SUMS)
def test_sums_are_named(name, inference):
    use, function = SUMS[name]
    model, x = Parts(use), torch.randn(30, 6)
    with (
        torch.inference_mode(inference),
        pytest.warns(FallbackWarning, match=rf"\bw \(its weight is used by {function}\)"),
    ):
        made = trace(model, x, sparsity=0.5)
    assert made.layers == ("first",)
    with pytest.raises(FallbackError, match="its weight is used by"):
        trace(model, x, sparsity=0.5, strict=True)


@pytest.mark.parametrize("name", BIASES)
def test_biases_are_not(name):
    model = Parts(BIASES[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = trace(model, torch.randn(1, 6), sparsity=0.5, strict=True)
    assert made.layers == ("first",)


def test_an_adapted_layer_names_all_three():
    with pytest.warns(FallbackWarning) as caught:
        trace(nn.Sequential(nn.Linear(6, 6), Adapted()), torch.randn(30, 6), sparsity=0.5)
    message = str(caught[0].message)
    assert all(f"{name} (its weight is used by aten." in message for name in ("1", "1.a", "1.b"))
