"""Class activation maps: Grad-CAM and LayerCAM as Captum methods, and the choice of the layer that they use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spade_fast._util.errors import InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast.attribution.asking import answering_functions
from spade_fast.attribution.layouts import LAST, Layouts
from spade_fast.targets.answers import answering
from spade_fast.targets.network_outputs import described
from spade_fast.targets.target import function_target

with extra_for("class activation maps need"):
    from captum._utils.common import _select_targets
    from captum._utils.gradient import compute_layer_gradients_and_eval
    from captum.attr import GuidedGradCam, LayerGradCam
    from captum.attr._utils.attribution import GradientAttribution, LayerAttribution
    from captum.log import log_usage

Reshape = Callable[[Tensor], Tensor]


class _ClassActivationMap(LayerAttribution, GradientAttribution):
    """A method that weights the feature maps of a layer by their gradients."""

    def __init__(self, forward_func: Any, layer: nn.Module, reshape: Reshape | None = None) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        GradientAttribution.__init__(self, forward_func)
        self.reshape = reshape

    def _maps(self, inputs: Any, target: Any, more: Any, at_input: bool) -> tuple[Tensor, Tensor]:
        """Return the layer's maps ``[N, C, h, w]`` and their gradients."""
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        more = more if more is None or isinstance(more, tuple) else (more,)

        def check(_: nn.Module, given: Any, output: Any) -> None:
            read = given if at_input else output
            read = read[0] if isinstance(read, tuple) and len(read) == 1 else read
            if not isinstance(read, Tensor):
                found = f"one with {len(read)}" if isinstance(read, tuple) else type(read).__name__
                raise InvalidValueError(f"{type(self).__name__} needs a layer with one output, got {found}")

        hook = self.layer.register_forward_hook(check)
        try:
            with answering_functions(self, target) as asked, Layouts(inputs, more) as layouts:
                gradients, values = compute_layer_gradients_and_eval(
                    self.forward_func, self.layer, inputs, asked, more, attribute_to_layer_input=at_input
                )
        finally:
            hook.remove()
        reshape = self.reshape or _reshape(layouts, values[0])
        maps, gradients = (reshape(one) for one in (values[0], gradients[0]))
        if not isinstance(maps, Tensor) or maps.dim() != 4:
            if self.reshape:
                raise InvalidValueError(f"reshape must return maps [N, C, h, w], got {described(maps)}")
            raise InvalidValueError(
                f"{type(self).__name__} needs a layer whose output is [N, C, h, w], or tokens whose places in the "
                f"image the network tells, got {list(maps.shape)}: give reshape, a function that makes maps of it"
            )
        return maps, gradients


def _reshape(layouts: Layouts, output: Tensor) -> Reshape:
    """Return the function that makes maps of a layer's output, as far as the network's operations tell."""
    tokens = layouts.tokens(output)
    if tokens is not None:
        return tokens.to_map
    return lambda one: one.permute(0, 3, 1, 2) if layouts.channels(output) == LAST else one


class GradCam(_ClassActivationMap):
    """Grad-CAM: the feature maps of a layer, each weighted by its mean gradient.

    Captum's `LayerGradCam` with the same arguments, but for layers of any layout: maps with their channels last, as in
    Swin transformers, and tokens, of which those that are the positions of a feature map make the map again. The
    network tells which these are: they are followed from the convolution that embeds the patches. Class, register and
    distillation tokens are left out.

    Parameters
    ----------
    forward_func : callable
        The network.
    layer : nn.Module
        A module of the network. In a vision transformer this should be the first norm of the last block: what comes
        after the last attention has no gradient at patches if the class token alone is read.
    reshape : callable, optional
        Makes maps ``[N, C, h, w]`` of the layer's output, in place of what the network tells. It is applied to the
        gradients too.

    References
    ----------
    .. [1] Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization, ICCV
       2017.

    Examples
    --------
    >>> import torch
    >>> from torchvision.models import VisionTransformer
    >>> from spade_fast.attribution import GradCam
    >>> model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    >>> GradCam(model, model.encoder.layers[-1].ln_1).attribute(torch.rand(1, 3, 32, 32), target=2).shape
    torch.Size([1, 1, 4, 4])
    """

    @log_usage()
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
    ) -> Tensor:
        """Compute the layer's map ``[N, 1, h, w]``, without its negative parts if `relu_attributions`.

        Arguments are those of Captum's `LayerGradCam`; `target` may also be a function of the network's output.
        ValueError is raised if the layer's output is neither a feature map nor tokens whose places the network tells.
        """
        maps, gradients = self._maps(inputs, target, additional_forward_args, attribute_to_layer_input)
        found = (gradients.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)
        return F.relu(found) if relu_attributions else found


class LayerCam(_ClassActivationMap):
    """LayerCAM: the feature maps of a layer, weighted at each position by the positive part of the gradient there.

    Grad-CAM, in contrast, weights each feature map as a whole by its mean gradient.

    Parameters
    ----------
    forward_func : callable
        The network.
    layer : nn.Module
        A module of the network; its output may be what that of `GradCam` may be.
    reshape : callable, optional
        As in `GradCam`.

    References
    ----------
    .. [1] Jiang et al., LayerCAM: Exploring Hierarchical Class Activation Maps for Localization, IEEE TIP 2021.
    """

    @log_usage()
    def attribute(self, inputs: Any, target: Any = None, additional_forward_args: Any = None) -> Tensor:
        """Compute the layer's non-negative map ``[N, 1, h, w]``; arguments and errors are those of `GradCam`."""
        maps, gradients = self._maps(inputs, target, additional_forward_args, at_input=False)
        return F.relu((F.relu(gradients) * maps).sum(1, keepdim=True))


def check_layout(method: Any, inputs: tuple[Any, ...], at_input: bool = False) -> None:
    """Raise ValueError if a method is Captum's Grad-CAM and its layer's output (or input) is not ``[N, C, h, w]``.

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
        with torch.no_grad(), Layouts(inputs) as layouts:
            method.forward_func(*inputs)
    finally:
        hook.remove()
    for maps in tree_leaves(read):
        if not isinstance(maps, Tensor):
            continue
        if layouts.channels(maps) == LAST or layouts.tokens(maps) is not None:
            kind = "of tokens" if maps.dim() == 3 else "with the channels last"
            raise InvalidValueError(
                f"Captum's Grad-CAM needs a layer of feature maps [N, C, h, w], got {list(maps.shape)} {kind}: use "
                "spade_fast.attribution.GradCam"
            )


def last_feature_layer(model: nn.Module, image: Tensor, target: Any) -> nn.Module:
    """Return the layer that CAM methods use: the last module in the forward pass whose output is a feature map.

    If tokens follow, as in a vision transformer, it is the last norm whose tokens influence the target at the places of
    patches. If the class token is read, that is the first norm of the last block, as in the literature: behind the last
    attention the patches' tokens have no influence and no gradient, and the norm makes tokens of equal scale. If the
    mean of all tokens is read, it is the norm before. Where a function reads a layer, only what is before that counts.

    Parameters
    ----------
    model : nn.Module
    image : Tensor ``[1, C, H, W]``
        An input of the model, which is run once.
    target : int, tuple of int or callable
        What is to be explained of the output, as in Captum, or a function of the output.

    Raises
    ------
    ValueError
        The network has no such module; the places of its tokens in the image are unknown, or the target does not depend
        on them; or the order of the module's dimensions is unknown.
    """
    names = {module: name for name, module in model.named_modules() if module is not model}
    containers = {module for module in names if any(True for _ in module.children())}
    found: list[tuple[nn.Module, Tensor, int]] = []
    tokens: list[Tensor] = []  # after the last of these
    norms: list[tuple[nn.Module, Tensor]] = []

    def look(module: nn.Module, _: object, output: object) -> None:
        if not isinstance(output, Tensor):
            return
        if module in containers and found and found[-1][1] is output and found[-1][2] == output._version:
            return  # the output of its last submodule
        if output.dim() == 4 and min(output.shape[-2:]) > 1:
            found.append((module, output, output._version))
            tokens.clear()
        elif output.dim() == 3 and output.shape[1] > 1:
            tokens.append(output)
            if module not in containers and "norm" in type(module).__name__.lower() and output.requires_grad:
                norms.append((module, output))

    hooks = [module.register_forward_hook(look) for module in names]
    function = callable(target)
    try:
        with (
            answering(model, target) if function else nullcontext(),
            torch.enable_grad(),
            Layouts(image) as layouts,
        ):
            output = model(image.detach().clone().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise InvalidValueError("it has no layer whose output is a feature map")
    if function:
        if not output.requires_grad:
            raise InvalidValueError(f"target {function_target(target)} has no gradient")
        found, tokens = _influences(output, found, tokens)
    layer, maps, _ = found[-1]
    channels = layouts.channels(maps)
    if channels is not None and not tokens:
        return layer
    of_tokens = (
        _last_influence(norms, layouts, output if function else _select_targets(output, target)) if norms else None
    )
    if of_tokens is not None:
        return of_tokens
    if tokens:
        raise InvalidValueError(f"its features after the layer {names[layer]!r} are tokens, not feature maps")
    raise InvalidValueError(
        f"its features after the layer {names[layer]!r}, {list(maps.shape)}, have dimensions whose order is not known"
    )


def _influences(
    target: Tensor, maps: list[tuple[nn.Module, Tensor, int]], tokens: list[Tensor]
) -> tuple[list[tuple[nn.Module, Tensor, int]], list[Tensor]]:
    """Return the maps and tokens on which a target function depends, or all maps if it depends on none."""
    read = [one for one in (*(output for _, output, _ in maps), *tokens) if one.requires_grad]
    gradients = torch.autograd.grad(target.sum(), read, allow_unused=True, retain_graph=True)
    before = [one for one, gradient in zip(read, gradients, strict=True) if gradient is not None]

    def has(tensor: Tensor) -> bool:
        return any(tensor is one for one in before)

    return [one for one in maps if has(one[1])] or maps, [one for one in tokens if has(one)]


def _last_influence(norms: list[tuple[nn.Module, Tensor]], layouts: Layouts, target: Tensor) -> nn.Module | None:
    """Return the last norm whose tokens influence the target beyond the class token; None if their places are unknown.

    The tokens whose places are unknown count as well, as there must be none behind those that are chosen.
    """
    gradients = torch.autograd.grad(target.sum(), [output for _, output in norms], allow_unused=True)
    if not any(gradient is not None and gradient.any() for gradient in gradients):
        raise InvalidValueError("its target depends on no tokens: all gradients are 0, as before a layer of zeros")
    for (module, output), gradient in reversed(list(zip(norms, gradients, strict=True))):
        if gradient is None or not gradient.any():
            continue
        places = layouts.tokens(output)
        if places is None:
            return None
        if places.to_map(gradient).any():
            return module
    return None
