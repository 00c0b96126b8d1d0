"""Shapes of real layers (ResNet-50, EfficientNet-Lite0, ViT-B/16) and random problems of these shapes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spade_fast.ops import flops

BYTES = 4  # per float32


@dataclass(frozen=True)
class Convolution:
    """A convolution and its input: square images, kernels and strides, "same" padding."""

    channels: int
    image: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    images: int = 256
    channels_last: bool = False

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def columns(self) -> int:
        return self.kernel**2 * self.channels // self.groups

    def __str__(self) -> str:
        parts = [f"{self.kernel}x{self.kernel}", f"{self.channels} at {self.image}x{self.image}"]
        if self.groups > 1:
            parts.insert(0, "depthwise" if self.groups == self.channels else f"{self.groups} groups")
        if self.stride > 1:
            parts.append(f"stride {self.stride}")
        if self.channels_last:
            parts.append("channels last")
        return ", ".join([*parts, f"{self.images} images"])

    def gram_work(self) -> float:
        """Operations of the distinct products, as `spade-fast profile` counts them."""
        x = torch.empty(self.images, self.channels, self.image, self.image, device="meta")
        gram = torch.empty(1, self.groups, self.columns, self.columns, device="meta")
        kernel, stride, padding, dilation = ((n, n) for n in (self.kernel, self.stride, self.padding, 1))
        return flops.gram_conv2d(gram, x, kernel, stride, padding, dilation)

    def read(self) -> float:
        """Bytes of the input."""
        return float(BYTES * self.images * self.channels * self.image**2)

    def random_input(self) -> Tensor:
        x = torch.randn(self.images, self.channels, self.image, self.image)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x


@dataclass(frozen=True)
class Weights:
    """Size of a solver's input: a number of problems of rows by columns, and which columns are removed together."""

    rows: int
    columns: int
    block: int = 1
    problems: int = 1
    n: int = 0
    m: int = 0

    def __str__(self) -> str:
        size = f"{self.rows}x{self.columns}"
        size = f"{self.problems} x {size}" if self.problems > 1 else size
        if self.m > 0:
            return f"{size}, {self.n}:{self.m}"
        return f"{size}, blocks of {self.block}" if self.block > 1 else size

    @property
    def steps(self) -> int:
        """Removals per row."""
        return self.columns // self.m * self.n if self.m > 0 else self.columns // self.block

    def path_work(self) -> float:
        """Operations of eliminating the removed columns of every row's inverse Hessian, one symmetric update each."""
        kept = self.columns - self.steps * self.block
        return self.problems * self.rows * (self.columns**3 - kept**3) / 3

    def random_problem(self) -> tuple[Tensor, Tensor]:
        """Weights ``[B, R, C]`` and Hessians ``[B, C, C]``, conditioned well enough to compare masks."""
        problems, columns = self.problems, self.columns
        common = torch.randn(problems, 4 * columns, 32) @ torch.randn(problems, 32, columns)
        x = torch.randn(problems, 4 * columns, columns) + 0.3 * common
        return torch.randn(problems, self.rows, columns) / columns**0.5, x.mT @ x / (2 * columns)


def inverse(hessian: Tensor) -> Tensor:
    """Inverse of positive definite matrices."""
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian)).contiguous()
