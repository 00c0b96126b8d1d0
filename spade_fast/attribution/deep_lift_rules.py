"""Rules of Captum's DeepLIFT for the stand-ins, which it finds by exact type."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_fast.attribution.function_kinds import ELEMENTWISE, MAX_POOLS, RECTIFIER, SOFTMAX
from spade_fast.attribution.stand_ins import StandIns


def teach_deep_lift() -> None:
    """Register the rules with Captum, if it is installed."""
    try:
        from captum.attr._core import deep_lift
    except ImportError:
        return
    rules = {
        RECTIFIER: deep_lift.nonlinear,
        ELEMENTWISE: deep_lift.nonlinear,
        SOFTMAX: _softmax,
        **{name: partial(_max_pool, getattr(F, name), int(name[-2])) for name in MAX_POOLS},
    }
    for kind, stand_in in StandIns().of_kind.items():
        deep_lift.SUPPORTED_NON_LINEAR.setdefault(type(stand_in), rules[kind])


def _softmax(
    module: Any, inputs: Tensor, outputs: Tensor, grad_input: Tensor, grad_output: Tensor, eps: float
) -> Tensor:
    """Rule for softmax as the product of exponentials and the reciprocal of their sum, for each sample by itself."""
    first, second = inputs.chunk(2)
    largest = torch.maximum(first, second).amax(module.dim, keepdim=True)
    exponentials = [(one - largest).exp() for one in (first, second)]
    sums = [one.sum(module.dim, keepdim=True) for one in exponentials]
    gradient, difference = grad_output.chunk(2)[0], first - second
    of_exponential = gradient * (1 / sums[0] + 1 / sums[1]) / 2
    of_reciprocal = (gradient * (exponentials[0] + exponentials[1]) / 2).sum(module.dim, keepdim=True)
    slope = torch.where(difference.abs() < eps, exponentials[0], (exponentials[0] - exponentials[1]) / difference)
    multiplier = (of_exponential - of_reciprocal / (sums[0] * sums[1])) * slope
    return torch.cat([multiplier, multiplier])


def _max_pool(
    pool: Callable[..., tuple[Tensor, Tensor]],
    dimensions: int,
    module: Any,
    inputs: Tensor,
    outputs: Tensor,
    grad_input: Tensor,
    grad_output: Tensor,
    eps: float,
) -> Tensor:
    """Captum's rule for max pooling, but for windows that overlap too: there Captum's loses all but one of the outputs
    with the same maximum.

    An output's change is divided in two: from the baseline to the larger of both outputs, due to the input's maximum,
    and from there to the output, due to the baseline's maximum.
    """
    settings = (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
    _, indices = pool(inputs, *settings, return_indices=True)
    output, reference = outputs.chunk(2)
    larger = torch.maximum(output, reference)
    changes = grad_output * torch.cat([larger - reference, output - larger])
    shares = torch.zeros_like(inputs).flatten(-dimensions)
    shares.scatter_add_(-1, indices.flatten(-dimensions), changes.flatten(-dimensions))
    of_input, of_baseline = shares.view_as(inputs).chunk(2)
    first, second = inputs.chunk(2)
    difference = first - second
    multiplier = torch.where(difference.abs() < eps, grad_input.chunk(2)[0], (of_input + of_baseline) / difference)
    return torch.cat([multiplier, multiplier])
