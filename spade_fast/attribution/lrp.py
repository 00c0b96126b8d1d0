"""Layer-wise relevance propagation (LRP) as a Captum method, for networks with skip connections and batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import extra_for

with extra_for("LRP needs"):
    from captum.attr import InputXGradient
    from captum.log import log_usage

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Elementwise functions that map zero to zero: they pass relevance on unchanged.
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh)
# Modules whose gradient is their rule, because they are linear without weights or select one input.
_GRADIENT = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Identity, nn.Flatten, nn.Unflatten, nn.ZeroPad2d),
)
_LEAVES = (*_CONVOLUTIONS, *_BATCH_NORMS, *_ACTIVATIONS, *_GRADIENT, nn.Linear)


class LRP(InputXGradient):
    """Layer-wise relevance propagation with the z+ rule for convolutions and the epsilon rule for linear layers.

    This is the composite EpsilonPlus (Kohlbrenner et al.). A batch norm that follows a convolution is merged into it.
    The backward pass propagates relevance divided by activation, so that sums (such as skip connections), means and
    concatenations in the forward pass need no rule: their gradient is the rule.

    Parameters
    ----------
    model : nn.Module
        A network in evaluation mode whose layers are convolution, linear, pooling, dropout, batch norm and activation
        modules. Functions called in its forward pass propagate relevance by their gradient, which is correct for ReLU
        and for linear functions; products of two activations must not occur.
    epsilon : float
        Added to the magnitude of the denominators.

    Raises
    ------
    ValueError
        The network has modules without a rule, such as attention.

    References
    ----------
    .. [1] Bach et al., On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance
       Propagation, PLOS ONE 2015.
    .. [2] Kohlbrenner et al., Towards Best Practice in Explaining Neural Network Decisions with LRP, IJCNN 2020.
    """

    def __init__(self, model: nn.Module, epsilon: float = 1e-6) -> None:
        super().__init__(model)
        self.model = model
        self.epsilon = epsilon
        self._rules = _find_rules(model)
        self._in_rule = False
        self._last: tuple[Tensor, int, Any, Tensor] | None = None
        self._before: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    @log_usage()
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Any:
        """Compute the relevance of the inputs; arguments and result are those of Captum's `InputXGradient`.

        The relevance sums to the target's output minus what biases absorb: the biases of linear layers, and those of
        convolutions at outputs without any positive product to receive the relevance.
        """
        with self._hooks():
            return super().attribute(inputs, target, additional_forward_args)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = [module.register_forward_hook(getattr(self, name)) for module, name in self._rules.items()]
        activations = [module for module, name in self._rules.items() if name == "_activation"]
        handles += [module.register_forward_pre_hook(self._before_activation) for module in activations]
        try:
            yield
        finally:
            self._last = None
            self._before.clear()
            for handle in handles:
                handle.remove()

    def _convolution(self, module: Any, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self._in_rule:
            return None
        output = self._carried_by(self._positive_part(module, args[0], module.weight), output)
        self._last = (output, output._version, module, args[0])
        return output

    def _batch_norm(self, module: Any, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        if self._last is None or module.running_var is None:
            return None
        last, version, convolution, inputs = self._last
        if last is not args[0] or last._version != version:  # an activation in place came between
            return None
        scale = (module.running_var + module.eps).rsqrt()
        scale = scale if module.weight is None else scale * module.weight
        weight = convolution.weight * scale.view(-1, *[1] * (convolution.weight.dim() - 1))
        return self._carried_by(self._positive_part(convolution, inputs, weight), output)

    def _linear(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return self._carried_by(output, output)

    def _before_activation(self, module: nn.Module, args: tuple[Tensor]) -> Tensor:
        self._before[module] = (args[0], args[0].clone())
        return args[0].clone()

    def _activation(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        given, carrier = self._before.pop(module)
        result = self._carried_by(carrier, output)
        return given.copy_(result) if output is args[0] else result

    def _positive_part(self, convolution: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        """Return the sum of the positive products of inputs and weights, per output."""
        weight = weight.detach()
        parameters = {"weight": weight.clamp(min=0)}
        if convolution.bias is not None:
            parameters["bias"] = torch.zeros_like(convolution.bias)
        self._in_rule = True
        try:
            positive = functional_call(convolution, parameters, inputs.clamp(min=0))
            if (inputs < 0).any():
                parameters["weight"] = weight.clamp(max=0)
                positive = positive + functional_call(convolution, parameters, inputs.clamp(max=0))
            return positive
        finally:
            self._in_rule = False

    def _carried_by(self, carrier: Tensor, value: Tensor) -> Tensor:
        """Return `value` with a gradient that passes its relevance on to `carrier`."""
        stable = carrier + torch.where(carrier < 0, -self.epsilon, self.epsilon)
        ratio = (value / stable).detach()
        return value.detach() + (carrier - carrier.detach()) * ratio


def _find_rules(model: nn.Module) -> dict[nn.Module, str]:
    """Return the modules that have a rule, each with the name of the method that is its hook."""
    kinds = {
        _CONVOLUTIONS: "_convolution",
        _BATCH_NORMS: "_batch_norm",
        _ACTIVATIONS: "_activation",
        (nn.Linear,): "_linear",
    }
    rules: dict[nn.Module, str] = {}
    unknown: set[str] = set()
    inside: set[nn.Module] = set()  # submodules that a layer runs itself, such as its padding
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, _LEAVES):
            inside.update(module.modules())
            rules.update((module, hook) for types, hook in kinds.items() if isinstance(module, types))
        elif isinstance(module, nn.MultiheadAttention) or not any(True for _ in module.children()):
            inside.update(module.modules())
            unknown.add(type(module).__name__)
    if unknown:
        raise InvalidValueError(f"LRP has no rule for {', '.join(sorted(unknown))}")
    return rules
