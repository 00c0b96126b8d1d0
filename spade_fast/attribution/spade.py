"""`Spade`, which runs any Captum method on traces (Moakhar, Iofinova, Frantar, Alistarh, arXiv 2310.04519)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for
from spade_fast._util.modes import evaluation_mode
from spade_fast._util.progress import Progress
from spade_fast._util.ranges import stage
from spade_fast._util.signatures import with_fields_of
from spade_fast.attribution.asking import asking, check_one_function
from spade_fast.attribution.cam import check_layout
from spade_fast.attribution.lost_decisions import has_answers, warn_of_lost_decisions
from spade_fast.attribution.means import mean_attributions
from spade_fast.attribution.method_networks import checked_network, find_network, networks_of, undone
from spade_fast.attribution.method_samples import concatenate, for_augmenter, samples_of, takes_tensors
from spade_fast.attribution.network_calls import network_calls
from spade_fast.attribution.outputs import answers_of, network_inputs, score_of_target
from spade_fast.attribution.sample_arguments import (
    bind_arguments,
    check_number_of_targets,
    divide_arguments,
    innermost,
)
from spade_fast.pruning.calibration import Batches, draw_id
from spade_fast.pruning.config import AUTO, PruneConfig, PruneOptions, Sparsity
from spade_fast.pruning.decision import Decision
from spade_fast.pruning.exchange import weights_held
from spade_fast.pruning.goals import NOISY_COPIES, Goal, Score, naming, sample_goal
from spade_fast.pruning.session import Session, compiled_network
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import traces_by_level
from spade_fast.targets.class_names import class_names_of
from spade_fast.targets.classification import checked_target

with extra_for("Spade needs"):
    from captum.attr import (
        Attribution,
        DataLoaderAttribution,
        FeaturePermutation,
        Lime,
        LimeBase,
    )
    from captum.log import log_usage

if TYPE_CHECKING:
    from typing_extensions import Unpack

_COMPARING_SAMPLES = (FeaturePermutation, DataLoaderAttribution)

# Function of a sample, a tensor [1, ...] or a tuple of such tensors, and its id.
Augmenter = Callable[[Any, str], Batches]


class Spade(Attribution):
    """Runs an attribution method on each sample's trace instead of the dense network (SPADE, arXiv 2310.04519).

    Like Captum's `NoiseTunnel`, it wraps any attribution object and keeps its interface. The weights of the method's
    own model are swapped while it runs and always restored, so that layer and neuron methods and methods with hooks
    work unchanged.

    Parameters
    ----------
    attribution_method : captum.attr.Attribution
        Any Captum method built on an `nn.Module`. Methods with hooks should be built on
        `prepare_for_attribution(model)`.
    calibration : callable, Tensor or iterable of batches
        Source of the calibration data: an `ImageAugmenter`, or any function that takes the sample, ``[1, ...]`` or a
        tuple of such tensors, and its id and returns batches as `spade_fast.trace` takes them. If batches are given
        directly (a tensor, or an iterable that can be iterated repeatedly), one trace is made and used for all samples.

        The network is called as the method calls it: a batch has a tensor for each input, of the same dtype and number
        of dimensions, and is completed by the sample's `additional_forward_args`, whose rows are repeated. It may have
        these itself, and a mapping of keyword arguments is left as it is.
    sparsity, progress
        As in `spade_fast.trace`. Automatic sparsity, the default, keeps the probability of the target of each sample
        (or the output for the target, where the network does not return logits, or what a target function says);
        without a target, that of the class that the dense network predicts. One trace for all samples keeps the mean
        over them. If the calibration has noise (``ImageAugmenter(noise=...)``), a trace also keeps the mean over four
        noisy copies of the sample.
    draws : int
        Number of calibrations of each sample, each with other random numbers: an augmenter is called with the ids
        ``NAME``, ``NAME/draw1``, ``NAME/draw2`` and so on.
    samples_per_solve : int
        Number of samples traced together, with one solver call per layer. It affects only memory and speed.
    model : nn.Module, optional
        The network, if the method was built on a function that calls it. Batches then have all arguments of the
        network itself.
    keep, solver, layers, block, damping, precision, compile, memory_limit, seed, strict
        The other fields of `PruneConfig`; the default of `seed` is the augmenter's seed. With several shares in `keep`
        or several draws each sample has several traces, and the result is the mean of their attributions, each first
        divided by the sum of its absolute values.

    Attributes
    ----------
    traces : list of Trace
        The traces of the last call of `attribute`, sample by sample, draw by draw, and in the order of `keep`; those of
        all samples together if batches were given directly. The trace of one sample knows its `decision`, if the method
        was built on a network, or a function around it, that returns logits of two or more classes.

    Raises
    ------
    TypeError
        `attribution_method` is not a Captum method, or its model cannot be found.
    ValueError
        A field of the configuration is out of range; the method's network and `model` share no parameters; the method
        compares samples (`FeaturePermutation`, `LayerFeaturePermutation`, `DataLoaderAttribution`), but `calibration`
        is a function.

    Examples
    --------
    >>> import torch
    >>> from captum.attr import Saliency
    >>> from spade_fast import ImageAugmenter, Spade
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    >>> spade = Spade(Saliency(model), ImageAugmenter(n=64, hue=0), keep=(0.9, 0.5))
    >>> spade.attribute(torch.rand(2, 3, 4, 4), target=1).shape
    torch.Size([2, 3, 4, 4])
    """

    @with_fields_of(PruneConfig)
    def __init__(
        self,
        attribution_method: Attribution,
        calibration: Augmenter | Batches,
        *,
        sparsity: Sparsity = AUTO,
        draws: int = 1,
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
        if callable(calibration) and isinstance(innermost(attribution_method), _COMPARING_SAMPLES):
            raise InvalidValueError(
                f"{type(innermost(attribution_method)).__name__} compares samples, but an augmenter makes a trace for "
                "each sample alone: pass calibration batches instead, which make one trace for all samples"
            )
        if options.get("seed") is None:
            options["seed"] = _seed_of(calibration)
        self.config = PruneConfig(sparsity=sparsity, **options)
        self.draws = integer("draws", draws, 1)
        if self.draws > 1 and not callable(calibration):
            raise InvalidValueError("draws need an augmenter: calibration batches given directly are one draw")
        if self.draws > 1 and not takes_tensors(attribution_method):
            raise InvalidValueError(
                f"the results of {type(attribution_method).__name__} have no mean: ask for one draw"
            )
        if self.config.sparsity == AUTO and not takes_tensors(attribution_method):
            raise InvalidValueError(
                f"sparsity={AUTO!r} needs the samples as tensors: give a number for {type(attribution_method).__name__}"
            )
        self.samples_per_solve = integer("samples_per_solve", samples_per_solve, 1)
        super().__init__(attribution_method.forward_func)
        self.attribution_method = attribution_method
        self.calibration = calibration
        self.model = find_network(attribution_method) if model is None else checked_network(model, attribution_method)
        self.progress = progress
        self.traces: list[Trace] = []
        self._lost: list[Trace] = []  # those whose lost decision matters to what was asked

    @property
    def multiplies_by_inputs(self) -> bool:
        return bool(self.attribution_method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        return bool(self.attribution_method.has_convergence_delta())

    @log_usage()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        *args: Any,
        sample_ids: Sequence[str | int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Trace each sample and run the attribution method on its trace.

        The network is in evaluation mode meanwhile; its modes, buffers and weights are restored afterwards.

        Parameters
        ----------
        inputs : Tensor ``[S, ...]`` or tuple of such tensors
            One row of each tensor per sample; or what `DataLoaderAttribution` and `LLMAttribution` take. If the tensors
            have different numbers of rows, or the network does not return an entry per row (but a sum over all, for
            example), or cannot run a row alone, they are one sample as a whole.
        *args, **kwargs
            Passed to the wrapped method. `target` may be what Captum takes; the name of a class, if the network has a
            Hugging Face configuration with names; or a function of the network's output that returns one number per
            sample, such as those of `spade_fast.targets`; or a list of these, one per sample. Each sample gets its own
            part of the arguments, by Captum's rules of broadcasting: `target` if it is a list or a tensor of several
            entries; `baselines` and `feature_mask` if they have as many dimensions as the inputs, and `layer_baselines`
            and `layer_mask` as many as the layer's output, with one entry per sample; tensors in
            `additional_forward_args` with one entry per sample. Everything else is shared, also the baselines of
            methods that draw from them (`GradientShap`, `DeepLiftShap` and their layer and neuron methods).
        sample_ids : sequence of str or int, optional
            One name per sample; with the augmenter's seed it determines the sample's augmentations. Default: the index.

        Returns
        -------
        Tensor or tuple
            The result of the wrapped method: attributions, a tuple of them, or attributions and convergence delta.

        Warns
        -----
        DecisionWarning
            A trace predicts another class for its sample than the dense network, or answers otherwise what the target
            asks. None is given for functions that do not tell what the answers are (`Target.answers`).

        Raises
        ------
        TypeError, ValueError
            The wrapped method does not take an argument, the inputs have the wrong type or shape, there are not as many
            targets, baselines, masks or sample ids as samples, the target does not return one finite number per sample
            or has no gradient, or the method is Grad-CAM on a layer whose output has
            its channels last.
        UserError
            All errors of `spade_fast.trace`. The model is restored after any error.
        """
        arguments = bind_arguments(self.attribution_method, inputs, args, kwargs)
        if "target" in arguments and takes_tensors(self.attribution_method):
            arguments["target"] = checked_target(arguments["target"], class_names_of(self.model))
        if self._traces_each > 1 and arguments.get("return_convergence_delta"):
            raise InvalidValueError(
                "a mean over several traces has no convergence delta: ask for one keep and one draw"
            )
        self.traces, self._lost = [], []
        self._compiled = compiled_network(self.config)  # for the samples of this call
        with ExitStack() as stack:
            stack.callback(setattr, self, "_compiled", None)
            for network in networks_of(self.model, self.attribution_method):
                stack.enter_context(evaluation_mode(network))
            with weights_held(self.model):
                samples = samples_of(self.attribution_method, inputs, arguments)
            check_number_of_targets(arguments.get("target"), samples)
            ids = list(map(str, range(len(samples)) if sample_ids is None else sample_ids))
            if len(ids) != len(samples):
                raise InvalidValueError(
                    f"sample_ids must have one name for each of the {len(samples)} samples, got {len(ids)}"
                )
            if callable(self.calibration):
                result = self._attribute_each(samples, arguments, ids)
            else:
                result = self._attribute_all(inputs, samples, arguments, ids)
        warn_of_lost_decisions(self._lost, self.traces)
        return result

    @property
    def _traces_each(self) -> int:
        return self.draws * len(self.config.keeps)

    def _attribute_all(self, inputs: Any, samples: list[Any], arguments: dict[str, Any], ids: list[str]) -> Any:
        """Attribute all samples at once on one trace, or several."""
        assert not callable(self.calibration)
        check_one_function(arguments.get("target"))
        name = ",".join(ids)
        goal = self._mean_goal(name, samples, arguments) if self.config.sparsity == AUTO else None
        batches = self._calls(self.calibration, inputs, arguments, of_all=True)
        (self.traces,) = self._trace([batches], [name], [goal])
        with weights_held(self.model):
            dense = self._answers(inputs, arguments) if len(ids) == 1 else None
        return mean_attributions([self._attribute_on(made, inputs, arguments, dense) for made in self.traces])

    def _attribute_each(self, samples: list[Any], arguments: dict[str, Any], ids: list[str]) -> Any:
        """Attribute each sample on its own traces."""
        of_samples = divide_arguments(self.attribution_method, samples, arguments)
        results = []
        for start in range(0, len(samples), self.samples_per_solve):
            group = range(start, min(start + self.samples_per_solve, len(samples)))
            traces = self._trace_group(samples, of_samples, ids, group)
            for index in group:
                with weights_held(self.model):
                    dense = self._answers(samples[index], of_samples[index])
                on_traces = [
                    self._attribute_on(made, samples[index], of_samples[index], dense) for made in traces[index]
                ]
                results.append(mean_attributions(on_traces))
                self.traces += traces[index]
        if len(results) > 1 and _returns_coefficients(self.attribution_method, arguments):
            results = _padded([result.reshape(1, -1) for result in results])
        return concatenate(results)

    def _trace_group(
        self, samples: Sequence[Any], of_samples: Sequence[dict[str, Any]], ids: list[str], group: range
    ) -> dict[int, list[Trace]]:
        """Return the traces of some samples, by the index of the sample."""
        assert callable(self.calibration)
        goals: list[Goal | None] = [None] * len(group)
        if self.config.sparsity == AUTO:
            goals = [self._goal(ids[index], samples[index], of_samples[index]) for index in group]
        traces: dict[int, list[Trace]] = {index: [] for index in group}
        for draw in range(self.draws):
            names = [draw_id(ids[index], draw) for index in group]
            batches = [
                self._calls(self.calibration(for_augmenter(samples[index]), name), samples[index], of_samples[index])
                for index, name in zip(group, names, strict=True)
            ]
            for index, made in zip(group, self._trace(batches, names, goals), strict=True):
                traces[index] += made
        return traces

    def _trace(
        self, batches: Sequence[Batches], names: Sequence[str], goals: Sequence[Goal | None]
    ) -> list[list[Trace]]:
        session = Session(self.model, self.config, self.progress, self._compiled)
        traces = traces_by_level(session, batches, names, goals)
        session.warn()
        return traces

    def _calls(self, batches: Batches, inputs: Any, arguments: Mapping[str, Any], *, of_all: bool = False) -> Batches:
        """Return batches as calls of the network, if it is the method's, so that it is called as the method does."""
        network = innermost(self.attribution_method).forward_func
        if not takes_tensors(self.attribution_method) or type(network) is not type(self.model):
            return batches
        return network_calls(batches, inputs, arguments.get("additional_forward_args"), of_all=of_all)

    def _goal(self, name: str, sample: Any, arguments: Mapping[str, Any]) -> Goal:
        """Return what a sample's traces are to keep."""
        augmenter: Any = self.calibration
        noisy = hasattr(augmenter, "noisy") and augmenter.noise > 0
        copies = _copies(augmenter.noisy(for_augmenter(sample), name, NOISY_COPIES)) if noisy else ()
        with weights_held(self.model):
            with naming(name):
                score = score_of_target(self.attribution_method, self.model, sample, arguments)
            return sample_goal(name, score, sample, copies)

    def _mean_goal(self, name: str, samples: Sequence[Any], arguments: Mapping[str, Any]) -> Goal:
        """Return what a trace of several samples is to keep: the mean of their scores."""
        pairs = zip(samples, divide_arguments(self.attribution_method, samples, arguments), strict=True)
        with weights_held(self.model):
            with naming(name):
                scores = [
                    (one, score_of_target(self.attribution_method, self.model, one, given)) for one, given in pairs
                ]
            targets = ", ".join(dict.fromkeys(score.target for _, score in scores))
            mean = Score(targets, lambda _: math.fsum(score(one) for one, score in scores) / len(scores))
            return sample_goal(name, mean, samples)

    def _attribute_on(self, made: Trace, inputs: Any, arguments: dict[str, Any], dense: Tensor | None) -> Any:
        if takes_tensors(self.attribution_method):
            at_input = bool(arguments.get("attribute_to_layer_input"))
            check_layout(innermost(self.attribution_method), network_inputs(inputs, arguments), at_input)
        with made.applied(self.model), stage("attribute"):
            pruned = None if dense is None else self._answers(inputs, arguments)
            if dense is not None and pruned is not None:
                made.decision = decision = Decision.between(dense, pruned)
                if not decision.kept and has_answers(arguments.get("target")):
                    self._lost.append(made)
            method, model = self.attribution_method, self.model
            with undone(method, inputs), asking(method, model, arguments) as asked:
                return method.attribute(inputs, **asked)

    def _answers(self, inputs: Any, arguments: Mapping[str, Any]) -> Tensor | None:
        if not takes_tensors(self.attribution_method):
            return None
        return answers_of(self.attribution_method, self.model, inputs, arguments)


def _seed_of(calibration: Any) -> int | None:
    seed = getattr(calibration, "seed", None)
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else None


def _copies(noisy: Any) -> list[Any]:
    """Return the noisy copies of a sample one by one, given one below the other."""
    return list(zip(*map(_copies, noisy), strict=True)) if isinstance(noisy, tuple) else list(noisy.chunk(NOISY_COPIES))


def _padded(rows: Sequence[Tensor]) -> list[Tensor]:
    """Return rows ``[1, features]`` of one length: a feature that a sample's mask lacks has the coefficient 0."""
    longest = max(row.shape[1] for row in rows)
    return [F.pad(row, (0, longest - row.shape[1])) for row in rows]


def _returns_coefficients(method: Attribution, arguments: Mapping[str, Any]) -> bool:
    """Whether the result is the coefficients of an interpretable model, of which Captum makes a row per sample."""
    method = innermost(method)
    return isinstance(method, LimeBase) and not (isinstance(method, Lime) and arguments.get("return_input_shape", True))
