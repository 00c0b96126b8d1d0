"""What the tests of batches share: photos, small runs, and everything in a folder that must not vary."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from spade_fast.batch import Summary, run
from spade_fast.batch.job import Job, make_job
from spade_fast.batch.samples import find_samples
from spade_fast.batch.store import Store
from spade_fast.inputs import LoadedModel
from spade_fast.inputs.setup import Setup
from spade_fast.pruning import PruneConfig


def make_photos(folder: Path, count: int) -> list[str]:
    """Write photos of noise, one in three in a subfolder, and return their ids, sorted."""
    from PIL import Image

    names = [f"{'sub/' if i % 3 == 2 else ''}{i:02}.png" for i in range(count)]
    (folder / "sub").mkdir(parents=True)
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return sorted(names)


def settings(model: str, **changes: Any) -> dict[str, Any]:
    """Arguments of a run that takes little time."""
    return {"model": model, "sparsity": 0.5, "augmentations": 6, **changes}


def small_job(
    samples: Any, out: Path, model: str, *, methods: Sequence[str] = (), draws: int = 1, **changes: Any
) -> tuple[Job, LoadedModel]:
    """Make the job of such a run."""
    config = PruneConfig(**{"sparsity": 0.5, "seed": 0, **changes})
    return make_job(find_samples(samples), out, config, Setup(model, augmentations=6), methods=methods, draws=draws)


def run_small(samples: Any, out: Path, model: str, **options: Any) -> Summary:
    """Run a small batch in this process, unless told otherwise."""
    return run(samples, out, **settings(model, **{"workers": 0, **options}))


@contextmanager
def claimed_by_another(job: Job, sample_id: str) -> Iterator[None]:
    """Let another process have a sample during a ``with`` block."""
    reader, writer = os.pipe()
    holding, release = os.pipe()
    child = os.fork()
    if child == 0:
        with Store(job).claimed([sample_id]) as free:
            os.write(writer, bytes(free))
            os.read(holding, 1)
            os._exit(0)
    assert os.read(reader, 1) == b"\1"
    yield
    os.write(release, b"x")
    os.waitpid(child, 0)


def contents(out: Path) -> dict[str, bytes]:
    """The bytes of all results, packed or not."""
    files = [*out.glob("traces/*"), *out.glob("maps/*")]
    found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    for path in out.glob("packs/[!.]*.zip"):
        with ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.startswith("reports/")]
            found.update({name: archive.read(name) for name in names})
    return found


def no_leftovers(out: Path) -> bool:
    """Whether there are no temporary files."""
    return not list(out.rglob("*.tmp"))
