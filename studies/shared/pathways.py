"""Pathways: an image's most important neurons, the others being silenced.

Khakzar et al., Neural Response Interpretation through the Lens of Critical Pathways, CVPR 2021 (arXiv 2103.16886):
NeuronMCT estimates what a neuron contributes by the first-order term of removing it, its activation times the gradient
of the class's score. A neuron is one element of an activation map. Written from the paper's description.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Neurons = Mapping[str, Tensor]  # by name of the module that takes the activations


def neuron_contributions(module: nn.Module, image: Tensor, target: int, inputs_of: Sequence[str]) -> Neurons:
    """Return ``|activation x gradient of the logit|`` of each neuron.

    Parameters
    ----------
    module, image, target
        The network, its input ``[1, C, H, W]`` and the class.
    inputs_of
        Names of the modules whose inputs are the neurons.
    """
    met: dict[str, Tensor] = {}

    def keep(name: str, activations: Tensor) -> Tensor:
        met[name] = activations
        return activations

    with torch.enable_grad(), _inputs_changed(module, inputs_of, keep):
        logit = module(image.detach().requires_grad_())[0, target]
    gradients = torch.autograd.grad(logit, [met[name] for name in inputs_of])
    return {name: (met[name] * gradient).abs().detach() for name, gradient in zip(inputs_of, gradients, strict=True)}


def strongest(contributions: Neurons, share: float) -> Neurons:
    """Return the masks of the neurons to keep: this share of all neurons of the network, those that contribute most."""
    everything = torch.cat([values.flatten() for values in contributions.values()])
    count = max(1, round(share * len(everything)))
    threshold = everything.kthvalue(len(everything) - count + 1).values
    return {name: values >= threshold for name, values in contributions.items()}


@contextmanager
def silenced_but(module: nn.Module, kept: Neurons) -> Iterator[None]:
    """Set all other neurons to zero during a ``with`` block, for images in batches of any size."""
    with _inputs_changed(module, list(kept), lambda name, activations: activations * kept[name]):
        yield


@contextmanager
def _inputs_changed(module: nn.Module, names: Sequence[str], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, inputs: (change(name, inputs[0]), *inputs[1:])

    with ExitStack() as stack:
        for name in names:
            stack.callback(module.get_submodule(name).register_forward_pre_hook(hook(name)).remove)
        yield
