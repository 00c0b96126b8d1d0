"""`Spade`, which runs any Captum method on traces (Moakhar, Iofinova, Frantar, Alistarh, arXiv 2310.04519)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast._util.progress import Progress
from spade_fast._util.ranges import stage
from spade_fast._util.signatures import with_fields_of
from spade_fast.pruning import tracing
from spade_fast.pruning.calibration import Batches
from spade_fast.pruning.config import PruneConfig, PruneOptions, Sparsity
from spade_fast.pruning.traces import Trace

with extra_for("Spade needs"):
    from captum.attr import Attribution, DeepLiftShap, GradientShap
    from captum.log import log_usage

if TYPE_CHECKING:
    from typing_extensions import Unpack

Augmenter = Callable[[Tensor, str], Batches]


class Spade(Attribution):
    """Runs an attribution method on each sample's trace instead of the dense network (SPADE, arXiv 2310.04519).

    Like Captum's `NoiseTunnel`, it wraps any attribution object and keeps its interface. The weights of the method's
    own model are swapped while it runs and always restored, so that layer and neuron methods and methods with hooks
    work unchanged.

    Parameters
    ----------
    attribution_method : captum.attr.Attribution
        Any Captum method built on an `nn.Module` with one input tensor. Methods with hooks should be built on
        `prepare_for_attribution(model)`.
    calibration : callable, Tensor or iterable of Tensor
        Source of the calibration data: an `ImageAugmenter`, or any function that takes the sample ``[1, ...]`` and its
        id and returns batches. If batches are given directly (a tensor, or an iterable of tensors that can be iterated
        repeatedly), one trace is made and used for all samples.
    sparsity, progress
        As in `spade_fast.trace`.
    samples_per_solve : int
        Number of samples traced together, with one solver call per layer. It affects only memory and speed.
    model : nn.Module, optional
        The network, if the method was built on a function that calls it.
    solver, layers, block, damping, precision, memory_limit, seed, strict
        The other fields of `PruneConfig`; the default of `seed` is the augmenter's seed.

    Attributes
    ----------
    traces : list of Trace
        The traces of the last call of `attribute`, one per sample (only one if batches were given directly).

    Raises
    ------
    TypeError
        `attribution_method` is not a Captum method, or its model cannot be found.
    ValueError
        A field of the configuration is out of range.

    Examples
    --------
    >>> import torch
    >>> from captum.attr import Saliency
    >>> from spade_fast import ImageAugmenter, Spade
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    >>> spade = Spade(Saliency(model), ImageAugmenter(n=64, hue=0), sparsity=0.5)
    >>> spade.attribute(torch.rand(2, 3, 4, 4), target=1).shape
    torch.Size([2, 3, 4, 4])
    """

    @with_fields_of(PruneConfig)
    def __init__(
        self,
        attribution_method: Attribution,
        calibration: Augmenter | Batches,
        *,
        sparsity: Sparsity,
        samples_per_solve: int = 8,
        model: nn.Module | None = None,
        progress: Progress | None = None,
        **options: Unpack[PruneOptions],
    ) -> None:
        if not isinstance(attribution_method, Attribution):
            given = type(attribution_method).__name__
            raise InvalidTypeError(
                f"attribution_method must be a captum.attr method, such as Saliency(model), got {given}"
            )
        if isinstance(calibration, Iterator):
            raise InvalidTypeError("calibration is an iterator, which can be used only once: pass a list or a function")
        if options.get("seed") is None:
            options["seed"] = _seed_of(calibration)
        self.config = PruneConfig(sparsity=sparsity, **options)
        self.samples_per_solve = integer("samples_per_solve", samples_per_solve, 1)
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        self.calibration = calibration
        self.model = _find_model(attribution_method) if model is None else model
        self.progress = progress
        self.traces: list[Trace] = []

    @property
    def multiplies_by_inputs(self) -> bool:
        return bool(self.attribution_method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        return bool(self.attribution_method.has_convergence_delta())

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor],
        *args: Any,
        sample_ids: Sequence[str | int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trace each sample and run the attribution method on its trace.

        Parameters
        ----------
        inputs : Tensor ``[S, ...]``
            One entry per sample; or a tuple of one such tensor.
        *args, **kwargs
            Passed to the wrapped method. `target`, `baselines`, `additional_forward_args` and `feature_mask` with one
            entry per sample are split among the samples according to Captum's rules.
        sample_ids : sequence of str or int, optional
            One name per sample; with the augmenter's seed it determines the sample's augmentations. Default: the index.

        Returns
        -------
        Tensor or tuple
            The result of the wrapped method: attributions, a tuple of them, or attributions and convergence delta.

        Raises
        ------
        TypeError, ValueError
            The wrapped method does not take an argument, the inputs have the wrong type or shape, or there are not as
            many targets or sample ids as samples.
        UserError
            All errors of `spade_fast.trace`. The model is restored after any error.
        """
        tensor = _single_input(inputs)
        count = len(tensor)
        arguments = _bind(self.attribution_method, inputs, args, kwargs)
        ids = [str(index) for index in range(count)] if sample_ids is None else [str(name) for name in sample_ids]
        if len(ids) != count:
            raise InvalidValueError(f"sample_ids must have one name for each of the {count} samples, got {len(ids)}")
        shares_baselines = arguments.get("draw_baseline_from_distrib", False) or isinstance(
            self.attribution_method, GradientShap | DeepLiftShap
        )
        per_sample = [
            {name: _share(name, value, index, count, shares_baselines) for name, value in arguments.items()}
            for index in range(count)
        ]

        self.traces = []
        if not callable(self.calibration):
            self.traces = [
                tracing.trace(
                    self.model,
                    self.calibration,
                    sample_id=",".join(ids),
                    progress=self.progress,
                    **self.config.options(),
                )
            ]
            with self.traces[0].applied(self.model), stage("attribute"):
                return self.attribution_method.attribute(inputs, **arguments)

        results = []
        for start in range(0, count, self.samples_per_solve):
            group = range(start, min(start + self.samples_per_solve, count))
            for index, trace in zip(group, self._trace(tensor, ids, group), strict=True):
                sample = tensor[index : index + 1]
                with trace.applied(self.model), stage("attribute"):
                    result = self.attribution_method.attribute(
                        (sample,) if isinstance(inputs, tuple) else sample, **per_sample[index]
                    )
                self.traces.append(trace)
                results.append(result)
        return _concatenate(results)

    def _trace(self, tensor: Tensor, ids: list[str], group: range) -> list[Trace]:
        assert callable(self.calibration)
        batches = [self.calibration(tensor[index : index + 1].detach(), ids[index]) for index in group]
        names = [ids[index] for index in group]
        return tracing.trace_batch(
            self.model, batches, sample_ids=names, progress=self.progress, **self.config.options()
        )


def _seed_of(calibration: Any) -> int | None:
    seed = getattr(calibration, "seed", None)
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def _find_model(method: Attribution) -> nn.Module:
    for candidate in (method.forward_func, getattr(method, "model", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    raise InvalidTypeError(
        f"{type(method).__name__} was built on a function, {method.forward_func!r}, not on a module: "
        "pass the network whose weights it uses as Spade(..., model=...)"
    )


def _single_input(inputs: Tensor | tuple[Tensor]) -> Tensor:
    tensor = inputs[0] if isinstance(inputs, tuple) and len(inputs) == 1 else inputs
    if not isinstance(tensor, Tensor):
        given = f"a tuple of {len(inputs)}" if isinstance(inputs, tuple) else type(inputs).__name__
        raise InvalidTypeError(f"inputs must be one tensor (Spade traces models of one input), got {given}")
    if tensor.dim() < 2 or len(tensor) == 0:
        raise InvalidValueError(
            f"inputs must have shape [samples, ...] with at least one sample, got {list(tensor.shape)}"
        )
    return tensor


def _bind(method: Attribution, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments except the inputs, by name; wrong ones raise TypeError here, before any solving."""
    signature = inspect.signature(method.attribute)
    bound = signature.bind(inputs, *args, **kwargs).arguments
    bound.pop(next(iter(bound)))
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and name in bound:
            raise InvalidTypeError(f"pass the arguments of {type(method).__name__}.attribute by name")
    return dict(bound)


def _share(name: str, value: Any, index: int, count: int, shares_baselines: bool) -> Any:
    """Return one sample's part of an argument, according to Captum's rules on which arguments are per sample."""

    def part(tensor: Any) -> Any:
        per_sample = isinstance(tensor, Tensor) and tensor.dim() > 0 and len(tensor) == count
        return tensor[index : index + 1] if per_sample else tensor

    if name == "target":
        listed = isinstance(value, list) or (isinstance(value, Tensor) and value.numel() > 1)
        if not listed:
            return value
        if len(value) != count:
            raise InvalidValueError(
                f"target must be one class for all samples or one for each of the {count} samples, got {len(value)}"
            )
        return value[index : index + 1]
    if name in ("additional_forward_args", "feature_mask") or (name == "baselines" and not shares_baselines):
        return tuple(map(part, value)) if isinstance(value, tuple) else part(value)
    return value


def _concatenate(results: list[Any]) -> Any:
    first = results[0]
    if isinstance(first, Tensor):
        return torch.cat(results) if first.dim() else torch.stack(results)
    if isinstance(first, tuple | list):
        return type(first)(_concatenate(list(parts)) for parts in zip(*results, strict=True))
    return first if len(results) == 1 else results
