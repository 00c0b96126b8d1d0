"""`tune`: from samples to the sparsities, or the share kept by automatic sparsity, with the best score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spade_fast._util.checks import integer
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast._util.modes import undisturbed
from spade_fast._util.progress import Progress
from spade_fast._util.signatures import with_fields_of
from spade_fast._util.versions import library_version
from spade_fast.pruning.calibration import Batches
from spade_fast.pruning.config import AUTO, PruneConfig, PruneOptions, check_shares
from spade_fast.pruning.exchange import weights_held
from spade_fast.pruning.goals import Goal, output_score, sample_goal
from spade_fast.pruning.keep_search import search_keeps
from spade_fast.pruning.ladders import LEVELS, Ladder, solve_ladders
from spade_fast.pruning.session import Session, naming_sample, per_sample
from spade_fast.pruning.stage_search import StageSearch
from spade_fast.pruning.stages import Stages, check_stages, group_layers
from spade_fast.pruning.tuning_result import Tuning
from spade_fast.pruning.tuning_samples import Samples, TraceScore
from spade_fast.targets.target import TargetLike

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHARES_KEPT = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SPARSITIES = (0.2, 0.5, 0.8, 0.9, 0.95, 0.99)


@with_fields_of(PruneConfig, but="sparsity")
def tune(
    model: nn.Module,
    samples: Sequence[Batches],
    score: TraceScore | None = None,
    *,
    inputs: Sequence[Any] | None = None,
    targets: Sequence[TargetLike | None] | None = None,
    candidates: Iterable[float] | None = None,
    stages: Stages = AUTO,
    rounds: int = 1,
    progress: Progress | None = None,
    **options: Unpack[PruneOptions],
) -> Tuning:
    """Search for the sparsity with the best score whose traces keep the decisions.

    With the stages ``"auto"``, the sparsity is automatic (:class:`spade_fast.AutoSparsity`): each sample's layers take
    their own sparsities, and the search is for the share of the dense model's probability that they are to keep. It
    makes the traces of ``trace(model, samples[i], inputs=inputs[i], keep=...)`` for all candidates. Among equal scores
    the largest share is chosen: equal traces have equal scores, and on other samples it keeps the most.

    With other stages, each stage of layers gets one sparsity for all samples (SPADE, arXiv 2310.04519). All layers are
    dense at the start. Stage by stage, starting with the last, each candidate is applied to all layers of the stage,
    and the one with the highest mean score is kept; among equal scores the lowest sparsity. The traces are those of
    ``trace(model, samples[i], sparsity=...)``.

    Either way only candidates count whose traces keep, on average over the samples, the share `keep` of the dense
    model's probability of the class that it predicts, or of other `targets`; what rises counts as kept. The others are
    not scored.

    All solving is done before the search, because a layer's trace does not depend on the sparsities of other layers;
    trying a candidate then needs no solving. With exact OBS each layer and sample has one path
    (:func:`spade_fast.ops.obs_path`), from which the weights at all sparsities follow in one call of
    :func:`spade_fast.ops.obs_solution`. SparseGPT, which has no path, needs one sweep per sparsity; the sweeps share
    one factor per sample.

    Parameters
    ----------
    model : nn.Module
        The dense model. It is in evaluation mode throughout and is restored afterwards, also after an exception.
    samples : sequence
        The calibration data of each sample, as `batches` of :func:`spade_fast.trace`.
    score : callable, optional
        Called as ``score(model, i)`` while the pruned weights of sample `i` are applied to the model, and once per
        sample on the dense model. It returns a finite number, where higher is better and equal calls give equal
        results: how well an attribution map predicts the dense network's decision, for example, or finds the object. It
        may compute gradients. By default the score is the sparsity: the share of zeros in the layers that are tuned.
    inputs : sequence, optional
        The samples themselves, as `inputs` of :func:`spade_fast.trace`, whose probabilities are to be kept. Without
        them nothing is, and the score alone decides; the stages ``"auto"`` and the default score need them.
    targets : sequence, optional
        What is to be kept of each of the `inputs`, as `target` of :func:`spade_fast.trace`; by default the probability
        of the class that the dense model predicts.
    candidates : iterable of float, optional
        What to try. With the stages ``"auto"``, shares to keep, above 0 and at most 1; by default nine from 0.99 to
        0.3. With other stages, sparsities, between 0 and 1; by default six from 0.2 to 0.99. 0 is always among them.
    stages : "auto", "blocks", "layers" or mapping
        ``"auto"``: automatic sparsity. Otherwise which layers share a sparsity. ``"layers"``: each layer has its own.
        ``"blocks"``: a stage is an outermost module that is not a plain container (Sequential, ModuleList, ModuleDict)
        and does not contain all layers of the model, such as a residual block. A mapping assigns layer names or
        patterns to names of stages; a layer belongs to the first stage whose patterns it matches, and stays dense if
        there is none. The stage with the model's last layer is searched first.
    rounds : int
        Maximum number of passes over all stages. The search ends after a round in which the score did not rise. In the
        first, what may be lost grows with the weights of the stages searched so far; otherwise the first stages would
        use it up.
    progress : callable, optional
        Called as ``progress(stage, done, total)`` for the stages ``"calibrate"`` (batches), ``"solve"`` (layers) and
        ``"search"`` (traces).
    keep : float
        Mean share of the dense model's probabilities that is to be kept; one number.
    solver, layers, block, damping, precision, compile, memory_limit, seed, strict
        Fields of :class:`PruneConfig`. Layers outside `layers` stay dense.

    Returns
    -------
    Tuning

    Raises
    ------
    TypeError, ValueError
        An argument is invalid, or a score is not a finite number; `inputs` are missing where they are needed.
    FallbackError
        With `strict`: as in :func:`spade_fast.trace_batch`, or every candidate keeps too little.
    UserError
        All errors of :func:`spade_fast.trace_batch`.

    Warns
    -----
    FallbackWarning
        As in :func:`spade_fast.trace_batch`. Layers that no sample's data reaches are not tuned. If every share to keep
        that is tried keeps less than `keep`, the largest is chosen.

    Notes
    -----
    Hessians and paths are freed as soon as their layer is solved. The surviving weights and a bit mask of each sample,
    layer and sparsity are kept on the CPU until the end: with float32 weights, 9 bytes per weight and sample for the
    five sparsities among which ``"auto"`` chooses, and 7.4 for the default candidates of other stages. While a layer
    is being solved, its dense weights at all sparsities are also in memory.

    Examples
    --------
    >>> import torch
    >>> from spade_fast import trace, tune
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    >>> inputs = [torch.randn(1, 8), torch.randn(1, 8)]
    >>> samples = [each + 0.1 * torch.randn(64, 8) for each in inputs]

    The sparsest traces that keep 80 %:

    >>> tuning = tune(model, samples, inputs=inputs, keep=0.8)
    >>> sample_trace = trace(model, samples[0], inputs=inputs[0], **tuning.options)

    The sparsity of each layer at which a gradient is largest:

    >>> def gradient(model, i):
    ...     sample = inputs[i].clone().requires_grad_()
    ...     return float(torch.autograd.grad(model(sample).max(), sample)[0].abs().sum())
    >>> tuning = tune(model, samples, gradient, inputs=inputs, stages="layers")
    >>> sample_trace = trace(model, samples[0], **tuning.options)
    """
    samples = list(samples)
    if not samples:
        raise InvalidValueError("samples is empty: give the calibration data of at least one sample")
    if score is not None and not callable(score):
        raise InvalidTypeError(f"score must be a function of the model and a sample's index, got {score!r}")
    automatic = check_stages(stages) == AUTO
    shares = checked_candidates(candidates, stages)
    check_rounds(rounds, stages)
    if inputs is None and (automatic or score is None):
        needing = f"stages={AUTO!r} needs" if automatic else "without a score, tune needs"
        raise InvalidTypeError(f"{needing} the samples themselves, as the model takes them: give inputs")
    inputs = None if inputs is None else per_sample("inputs", inputs, samples)
    if targets is not None and inputs is None:
        raise InvalidTypeError("targets are what is kept of inputs: give inputs")
    asked = per_sample("targets", targets, [None] * len(samples))
    config = PruneConfig(sparsity=AUTO, **options)
    keep, *more = config.keeps
    if more:
        raise InvalidValueError(f"keep must be one number, got {config.keeps}")
    session = Session(model, config if automatic else replace(config, sparsity=shares[-1]), progress)
    grouped: dict[str, list[str]] = {}
    if not automatic:
        grouped = group_layers(model, session.layers, stages)
        named = {name for names in grouped.values() for name in names}
        session.layers = [layer for layer in session.layers if layer.name in named]
    ids = [str(s) for s in range(len(samples))]
    goals: list[Goal] | None = None
    if inputs is not None:
        goals = []
        with weights_held(session.model), undisturbed(session.model):
            for s, (given, target) in enumerate(zip(inputs, asked, strict=True)):
                with naming_sample(ids, s):
                    scored = output_score(session.model, given, target)
                goals.append(sample_goal(ids[s], scored, given))

    ladders = solve_samples(session, samples, ids, LEVELS if automatic else shares[1:])
    sizes = {layer.name: layer.numel for layer in session.layers if any(layer.name in each for each in ladders)}
    if not sizes:
        session.warn()
        raise InvalidValueError("there is no layer to tune: the calibration data reaches no layer that can be pruned")
    gradients = torch.is_grad_enabled()  # the score may compute gradients
    with undisturbed(model), torch.set_grad_enabled(gradients):
        measured = Samples(model, ladders, goals, score)
        before = measured.dense_score()
        if automatic:
            found = search_keeps(measured, shares, keep, session.progress)
        else:
            grouped = {stage: [name for name in names if name in sizes] for stage, names in grouped.items()}
            grouped = {stage: names for stage, names in grouped.items() if names}
            found = StageSearch(measured, grouped, sizes, shares, keep, session.progress).run(rounds, before)
    if found.kept is not None and found.kept < keep:
        session.fall_back("kept less than asked for", f"{found.kept:.1%} with the largest candidate, {shares[0]:g}")
    session.warn()
    settings = session.config.record()
    layers = {} if not automatic or settings["layers"] is None else {"layers": settings["layers"]}
    del settings["sparsity"], settings["layers"]
    if goals is None:
        del settings["keep"]
    settings.update(candidates=shares, rounds=rounds, samples=len(samples), library_version=library_version())
    settings["stages"] = AUTO if automatic else grouped
    return Tuning({**found.options, **layers}, before, found.score, found.kept, found.history, settings)


def checked_candidates(candidates: Iterable[float] | None, stages: Stages) -> list[float]:
    """Return what to try: for ``"auto"`` shares to keep, descending; otherwise sparsities, ascending, 0 among them.

    Raises
    ------
    TypeError, ValueError
        They are invalid.
    """
    automatic = stages == AUTO
    if candidates is None:
        candidates = SHARES_KEPT if automatic else SPARSITIES
    if isinstance(candidates, (str, bytes)) or not isinstance(candidates, Iterable):
        raise InvalidTypeError(f"candidates must be numbers between 0 and 1, got {candidates!r}")
    given = list(candidates)
    check_shares({f"candidates[{index}]": share for index, share in enumerate(given)})
    if automatic:
        shares = sorted(set(map(float, given)), reverse=True)
        if not shares or shares[-1] == 0:
            raise InvalidValueError(f"with stages={AUTO!r}, candidates must be shares to keep, above 0; got {given}")
        return shares
    shares = sorted({0.0, *map(float, given)})
    if len(shares) == 1:
        raise InvalidValueError("candidates must include a sparsity above 0")
    return shares


def check_rounds(rounds: int, stages: Stages) -> None:
    """Raise TypeError or ValueError unless a search can have so many rounds."""
    integer("rounds", rounds, 1)
    if stages == AUTO and rounds > 1:
        raise InvalidValueError(
            f"rounds must be 1 with stages={AUTO!r}, got {rounds}: there is nothing to go through again"
        )


def solve_samples(
    session: Session, samples: Sequence[Batches], ids: Sequence[str], sparsities: Sequence[float]
) -> list[dict[str, Ladder]]:
    """Return each sample's ladders at some sparsities, of the layers that its data reached."""
    solved: list[dict[str, Ladder]] = [{} for _ in samples]
    with session.exact_types():
        plan = session.plan(samples)
        done, to_do = 0, len(session.layers) * len(plan.chunks)
        for chunk in plan.chunks:
            for layers, calibrations in session.calibrated(plan, chunk, samples, ids):
                for layer in layers:
                    given = session.gather(layer, calibrations)
                    for s, ladder in solve_ladders(session, given, sparsities).ladders.items():
                        solved[chunk[s]][layer.name] = ladder
                    del given  # the Gram matrices
                    done += 1
                    session.progress("solve", done, to_do)
    return solved
