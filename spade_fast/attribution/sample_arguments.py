"""Divides the arguments of a Captum method among the samples of a batch, by Captum's rules of what is per sample."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from typing import Any

from torch import Tensor

from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for

with extra_for("Spade needs"):
    from captum.attr import (
        Attribution,
        DeepLiftShap,
        GradientShap,
        LayerActivation,
        LayerGradientShap,
        NeuronDeepLiftShap,
        NeuronGradientShap,
    )

# Their baselines are a distribution, which all samples share.
_OF_A_DISTRIBUTION = (GradientShap, DeepLiftShap, LayerGradientShap, NeuronGradientShap, NeuronDeepLiftShap)
_LIKE_INPUTS = ("baselines", "feature_mask")
_LIKE_LAYER = ("layer_baselines", "layer_mask")


def innermost(method: Attribution) -> Attribution:
    """Return the method that a wrapper such as `NoiseTunnel` runs, or `method` itself."""
    inner = getattr(method, "attribution_method", None)
    return innermost(inner) if isinstance(inner, Attribution) else method


def bind_arguments(
    method: Attribution, inputs: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all arguments of `method.attribute` except the inputs, by name.

    Raises
    ------
    TypeError
        `method.attribute`, or that of the method it wraps, does not take an argument.
    """
    signature = inspect.signature(method.attribute)
    try:
        bound = signature.bind(inputs, *args, **kwargs).arguments
    except TypeError as error:
        raise InvalidTypeError(f"{type(method).__name__}.attribute: {error}") from error
    bound.pop(next(iter(bound)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            passed_on = bound.pop(name, {})
            inner = getattr(method, "attribution_method", None)
            bound.update(bind_arguments(inner, inputs, (), passed_on) if isinstance(inner, Attribution) else passed_on)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and name in bound:
            raise InvalidTypeError(f"pass the arguments of {type(method).__name__}.attribute by name")
    return dict(bound)


def check_number_of_targets(target: Any, samples: Sequence[Any]) -> None:
    """Raise ValueError if there are several targets, but not one for each sample, or row of a sample as a whole."""
    first = samples[0] if isinstance(samples[0], tuple) else (samples[0],)
    rows = [len(one) for one in first if isinstance(one, Tensor)]
    counts = rows if len(samples) == 1 else [len(samples)]
    if _is_one_each(target) and counts and len(target) not in counts:
        of = "the sample" if counts[0] == 1 else f"all samples or one for each of the {counts[0]} samples"
        raise InvalidValueError(f"target must be one class for {of}, got {len(target)}")


def divide_arguments(method: Attribution, samples: Sequence[Any], arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the arguments of each sample; a single sample has all of them.

    A `target` is one for all samples, or a list or tensor of one per sample. Baselines and feature masks are broadcast
    to the inputs (`layer_baselines` and `layer_mask` to the layer's output): they are per sample if they have as many
    dimensions and one entry per sample. Baselines that are a distribution are shared. Tensors among
    `additional_forward_args` are per sample if they have one entry per sample. All other arguments are shared.

    Parameters
    ----------
    method
        The method that will run on each sample.
    samples : sequence of Tensor ``[1, ...]``, or of tuples of these
    arguments
        By name, as :func:`bind_arguments` returns them.

    Raises
    ------
    ValueError
        An argument has neither one entry for all samples nor one per sample.
    """
    count = len(samples)
    if count == 1:
        return [dict(arguments)]
    tensors = samples[0] if isinstance(samples[0], tuple) else (samples[0],)
    divided: dict[str, list[Any]] = {}
    for name, value in arguments.items():
        if name == "target":
            divided[name] = _divide_target(value, count)
        elif name == "additional_forward_args":
            divided[name] = _divide(name, value, count, [None])
        elif name in _LIKE_INPUTS and not (name == "baselines" and _is_distribution(method, arguments)):
            divided[name] = _divide(name, value, count, [one.dim() for one in tensors])
        elif name not in _LIKE_LAYER:
            divided[name] = [value] * count
    of_samples = [{name: parts[index] for name, parts in divided.items()} for index in range(count)]
    for name in arguments.keys() & set(_LIKE_LAYER):
        parts = _divide(name, arguments[name], count, _layer_dimensions(method, samples[0], arguments, of_samples[0]))
        for own, part in zip(of_samples, parts, strict=True):
            own[name] = part
    return of_samples


def _divide(name: str, value: Any, count: int, dimensions: Sequence[int | None]) -> list[Any]:
    """Divide a value, or each of a tuple of values, among the samples.

    `dimensions` are those that a tensor with one entry per sample has, for each value; the last applies to all further
    ones. None: any number of dimensions.
    """
    if not isinstance(value, tuple):
        return list(_divide_tensor(name, value, count, dimensions[0]))
    needed = chain(dimensions, repeat(dimensions[-1]))
    parts = [_divide_tensor(name, one, count, next(needed)) for one in value]
    return [tuple(part[index] for part in parts) for index in range(count)]


def _divide_tensor(name: str, value: Any, count: int, dimensions: int | None) -> Sequence[Any]:
    if not isinstance(value, Tensor) or value.dim() == 0 or value.dim() != (dimensions or value.dim()):
        return [value] * count
    if len(value) == count:
        return value.split(1)
    if dimensions is not None and len(value) != 1:
        raise InvalidValueError(
            f"{name} of {dimensions} dimensions must have one entry for all samples or one for each of {count}, "
            f"got {list(value.shape)}"
        )
    return [value] * count


def _divide_target(value: Any, count: int) -> list[Any]:
    return [value[index : index + 1] for index in range(count)] if _is_one_each(value) else [value] * count


def _is_one_each(target: Any) -> bool:
    return isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)


def _is_distribution(method: Attribution, arguments: Mapping[str, Any]) -> bool:
    return bool(arguments.get("draw_baseline_from_distrib")) or isinstance(innermost(method), _OF_A_DISTRIBUTION)


def _layer_dimensions(
    method: Any, sample: Any, arguments: Mapping[str, Any], of_sample: Mapping[str, Any]
) -> list[int | None]:
    """Return the dimensions of the tensors that a layer method's layer returns (or takes), by running the model."""
    method = innermost(method)
    values = LayerActivation(method.forward_func, method.layer, method.device_ids).attribute(
        sample, of_sample.get("additional_forward_args"), arguments.get("attribute_to_layer_input", False)
    )
    return [value.dim() for value in (values if isinstance(values, tuple) else (values,))]
