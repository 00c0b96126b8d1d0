"""A batch from its input to its folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spade_fast._util.checks import check_names, integer
from spade_fast._util.signatures import with_fields_of
from spade_fast.batch.engine import ENGINES, drive, open_engine
from spade_fast.batch.index import can_index, write_index
from spade_fast.batch.job import bytes_per_sample, make_job
from spade_fast.batch.memory import samples_together
from spade_fast.batch.samples import find_samples
from spade_fast.batch.schedule import Schedule
from spade_fast.batch.store import Store
from spade_fast.batch.worker import Outcome, patiently
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import AUTO, PruneConfig, PruneOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

SummaryCallback = Callable[["Summary"], None]


@dataclass
class Summary:
    """How far a batch is.

    Attributes
    ----------
    total
        Samples of the input.
    before
        Samples that were finished when the run began.
    workers, samples_per_solve
        How it works on the others.
    traces_per_sample
        Traces that it makes of each: one per level and draw.
    finished
        Samples finished by this run (or meanwhile by another one on the same folder).
    failed
        Errors of the samples that failed, by sample id.
    seconds
        Since the work began.
    skipped
        Number of files in the folder that are not samples: ``hidden`` files and folders, those of macOS and Windows
        included, and ``other`` files, without the suffix of an image format.
    """

    total: int
    before: int
    workers: int
    samples_per_solve: int
    traces_per_sample: int
    finished: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Samples neither finished nor failed."""
        return self.total - self.before - self.finished - len(self.failed)


@with_fields_of(PruneConfig)
def run(
    samples: Any,
    out: str | Path,
    *,
    model: str = Setup.model,
    sparsity: float | Mapping[str, float] | str = AUTO,
    methods: Sequence[str] = (),
    target: int | str | None = None,
    draws: int = 1,
    augmentations: int = Setup.augmentations,
    device: str = Setup.device,
    threads: int = 1,
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    samples_per_solve: int | None = None,
    pack: int | None = None,
    dry_run: bool = False,
    progress: SummaryCallback | None = None,
    **options: Unpack[PruneOptions],
) -> Summary:
    """Trace every sample of an input into a folder; what is finished there is not done again.

    At the end the folder's index is written, if pyarrow is installed (`spade_fast.batch.write_index`).

    On machines of one kind a sample's files depend on settings, network and sample alone: not on the number of workers,
    the samples solved together, the order, or interruptions.

    Parameters
    ----------
    samples
        A folder of photos, with its subfolders, but without hidden files and folders; a file name or pattern (``*``,
        ``?``, ``[...]``, ``**``); a ``.csv`` or ``.parquet`` list with a column ``path`` and optionally a column
        ``id``; a dataset with ``__len__`` and ``__getitem__``, or ``module:callable``, which returns one.
    out
        Folder for the results, which all workers can write to under this path.
    model
        Name of the network, for `spade_fast.load_model`.
    sparsity
        ``"auto"``, a number or a mapping, as in `spade_fast.PruneConfig`. Automatic sparsity keeps the probability of
        the class that the dense network predicts, or of the `target`.
    methods
        Keys of `spade_fast.attribution.METHODS`: each sample is also explained, on the dense network and on its trace,
        for the class that the dense network predicts, or for the `target`.
    target
        What is explained of every sample: the index or name of a class, or ``module:callable``, a function of the
        network's output that returns one number per sample, such as one of `spade_fast.targets`.
    draws
        With several draws of calibration images or several shares to `keep`, which need `methods`, a trace is made for
        each draw and share. The maps are the mean over these traces, each map divided by its sum; the file of the trace
        is that of the first draw and the largest share. Draw 1 of a sample ``a`` is calibrated as a sample ``a/draw1``
        would be, and so on. Each draw takes as long as the first; another share only another explanation.
    augmentations
        Calibration images per sample.
    device
        As torch names it. ``"cuda"`` gives each worker on a machine a GPU of its own.
    threads
        Processor threads per worker. The network's outputs differ in their last bits between numbers of threads, so
        this is a setting of the results; the number of workers is not.
    engine
        ``"local"``: processes on this machine. ``"ray"``: actors on a Ray cluster, to whose nodes the paths of samples
        and results mean the same files, and which have the network's packages.
    address
        Of the cluster; None for the one this process is connected to, or else one that is started on this machine.
    workers
        None for one per GPU, or one per `threads` processors; on this machine as far as memory allows. More than a
        Ray cluster has room for wait for nodes to join. A script that starts processes must do so under
        ``if __name__ == "__main__":``. 0 works in this process (``"local"`` only), which a sample may kill.
    samples_per_solve
        At most; None for as many as memory allows, up to 8 on a GPU and up to one per thread on processors.
    pack
        Samples whose files a worker moves into one zip file when they are finished; None to leave each its own. At the
        end all are packed, by as many. `Results` reads both.
    dry_run
        Check everything, but write and do nothing.
    progress
        Called with the summary so far, at the start and after each sample.
    keep, solver, layers, block, damping, precision, compile, memory_limit, seed, strict
        The other fields of `spade_fast.PruneConfig`; `seed`, of the augmentations, is 0 by default.

    Returns
    -------
    Summary
        Samples that failed are in it, and in the folder's ``errors``; a repeated run tries them again.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError, ImportError
        An argument, the input, the network, the device or a package is wrong or missing; or the folder holds other
        things, or results of other settings or files.
    OutputError
        The folder cannot be written, as when its disk is full. What is in it is intact.
    ConnectionError
        The cluster cannot be reached, or Ray's process on this machine died.
    ChildProcessError
        No worker begins to work; or, in this process, the device is lost.
    """
    if workers is not None:
        integer("workers", workers, 0)
    for name, number in (("samples_per_solve", samples_per_solve), ("pack", pack)):
        if number is not None:
            integer(name, number, 1)
    check_names("engine", [engine], ENGINES)
    source = find_samples(samples)
    if options.get("seed") is None:
        options["seed"] = 0
    config = PruneConfig(sparsity=sparsity, **options)
    setup = Setup(model, device, augmentations)
    here = engine == "local"
    job, network = make_job(
        source, Path(out), config, setup, methods=methods, target=target, draws=draws, threads=threads, here=here
    )
    job = replace(job, pack=pack or 0)
    store = Store(job)
    with open_engine(engine, address) as place, closing(store):
        store.check()
        todo = store.todo(source)
        workers = min(place.count_workers(job, network, workers), max(1, len(todo)))
        sharing = max(1, workers)
        together = samples_per_solve or samples_together(
            job.facts["threads"], job.facts["device"], bytes_per_sample(job, network), place.free_bytes(job) // sharing
        )
        together = max(1, min(together, -(-len(todo) // sharing)))
        before = len(source.ids) - len(todo)
        summary = Summary(len(source.ids), before, workers, together, job.traces_per_sample, skipped=source.skipped)
        if progress is not None:
            progress(summary)
        if dry_run:
            store.check_writable()
            return summary
        store.open()
        store.remove_leftovers()
        try:
            if todo:
                team = place.team(job, network, workers, together)
                with closing(drive(team, Schedule(todo, together), sharing)) as outcomes:
                    _follow(outcomes, store, source.ids, summary, progress)
            if pack is not None:
                patiently(partial(store.pack_all, pack))
        finally:
            store.remove_leftovers()
        if can_index():
            patiently(partial(write_index, job.folder))
    return summary


def _follow(
    outcomes: Iterable[Outcome], store: Store, ids: Sequence[str], summary: Summary, progress: SummaryCallback | None
) -> None:
    start = time.monotonic()
    for outcome in outcomes:
        if outcome.state == "finished":
            summary.finished += 1
        else:
            summary.failed[ids[outcome.index]] = outcome.error
            if outcome.state == "killed":
                with store.claimed([ids[outcome.index]]):
                    patiently(partial(store.record_error, ids[outcome.index], outcome.error))
        summary.seconds = time.monotonic() - start
        if progress is not None:
            progress(summary)
