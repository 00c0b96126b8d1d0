"""Class activation maps: LayerCAM as a Captum method, and the choice of the layer that CAM methods use."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast.attribution.layouts import FIRST, LAST, Layouts

with extra_for("class activation maps need"):
    from captum._utils.gradient import compute_layer_gradients_and_eval
    from captum.attr import GuidedGradCam, LayerGradCam
    from captum.attr._utils.attribution import GradientAttribution, LayerAttribution
    from captum.log import log_usage


class LayerCam(LayerAttribution, GradientAttribution):
    """LayerCAM: the feature maps of a layer, weighted at each position by the positive part of the gradient there.

    Grad-CAM, in contrast, weights each feature map as a whole by its mean gradient.

    Parameters
    ----------
    forward_func : callable
        The network.
    layer : nn.Module
        A module of the network with output ``[N, C, h, w]``.

    References
    ----------
    .. [1] Jiang et al., LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, IEEE TIP 2021.
    """

    def __init__(self, forward_func: Any, layer: nn.Module) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        GradientAttribution.__init__(self, forward_func)

    @log_usage()
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Tensor:
        """Compute the layer's non-negative map ``[N, 1, h, w]``; arguments are those of Captum's `LayerGradCam`.

        ValueError is raised if the layer's output is not a feature map, or has its channels last.
        """
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if additional_forward_args is not None and not isinstance(additional_forward_args, tuple):
            additional_forward_args = (additional_forward_args,)
        with Layouts(inputs[0]) as layouts:
            (gradients,), (maps,) = compute_layer_gradients_and_eval(
                self.forward_func, self.layer, inputs, target, additional_forward_args
            )
        if maps.dim() != 4 or layouts.channels(maps) == LAST:
            raise InvalidValueError(f"LayerCAM needs a layer whose output is [N, C, h, w], got {list(maps.shape)}")
        return F.relu((F.relu(gradients) * maps).sum(1, keepdim=True))


def check_layout(method: Any, inputs: tuple[Any, ...], at_input: bool = False) -> None:
    """Raise ValueError if a Captum method is Grad-CAM and the channels of its layer's output (or input) are last.

    Parameters
    ----------
    method : captum.attr.Attribution
    inputs : tuple
        Arguments of the method's network, which is run once.
    at_input : bool
        Whether the method reads the layer's input.
    """
    method = method.grad_cam if isinstance(method, GuidedGradCam) else method
    if not isinstance(method, LayerGradCam):
        return
    read: list[Any] = []
    hook = method.layer.register_forward_hook(lambda _, given, output: read.append(given if at_input else output))
    try:
        with torch.no_grad(), Layouts(inputs[0]) as layouts:
            method.forward_func(*inputs)
    finally:
        hook.remove()
    for maps in tree_leaves(read):
        if isinstance(maps, Tensor) and layouts.channels(maps) == LAST:
            raise InvalidValueError(
                f"Grad-CAM needs a layer of feature maps [N, C, h, w], got {list(maps.shape)} with the channels last"
            )


def last_feature_layer(model: nn.Module, image: Tensor) -> nn.Module:
    """Return the last module in the forward pass whose output is a feature map ``[1, C, h, w]``, which CAM methods use.

    Parameters
    ----------
    model : nn.Module
    image : Tensor ``[1, C, H, W]``
        An input of the model, which is run once.

    Raises
    ------
    ValueError
        The network has no such module; its features become tokens after that module, as in a vision transformer; or the
        module's channels are last, or their dimension is unknown.
    """
    names = {module: name for name, module in model.named_modules() if module is not model}
    containers = {module for module in names if any(True for _ in module.children())}
    found: list[tuple[nn.Module, Tensor, int]] = []  # the last one
    tokens: list[Tensor] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        if not isinstance(output, Tensor):
            return
        if module in containers and found and found[0][1] is output and found[0][2] == output._version:
            return  # the output of its last submodule
        if output.dim() == 4 and min(output.shape[-2:]) > 1:
            found[:] = [(module, output, output._version)]
            tokens.clear()
        elif output.dim() == 3 and output.shape[1] > 1:
            tokens.append(output)

    hooks = [module.register_forward_hook(look) for module in names]
    try:
        with torch.no_grad(), Layouts(image) as layouts:
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise InvalidValueError("it has no layer whose output is a feature map")
    layer, maps, _ = found[0]
    if tokens:
        raise InvalidValueError(f"its features after the layer {names[layer]!r} are tokens, not feature maps")
    channels = layouts.channels(maps)
    if channels != FIRST:
        reason = "have their channels last" if channels == LAST else "have dimensions whose order is not known"
        raise InvalidValueError(f"its features after the layer {names[layer]!r}, {list(maps.shape)}, {reason}")
    return layer
