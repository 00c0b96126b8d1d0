"""What every worker of a batch has to do: settings, checked against the network, and the hash that stands for both."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from spade_fast._util.checks import integer
from spade_fast.attribution.methods import METHODS
from spade_fast.batch.samples import Source
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.networks import LoadedModel, load_model
from spade_fast.inputs.photo import (
    AUGMENTATIONS,
    SOLVER_TITLES,
    check_calibration,
    check_names,
    chosen_layers,
    chosen_sparsity,
)
from spade_fast.pruning.calibration import gram_bytes
from spade_fast.pruning.session import Run, library_version


@dataclass(frozen=True)
class BatchSettings:
    """How to trace each sample.

    Attributes
    ----------
    model, sparsity, augmentations, layers, seed, precision, device
        As in `spade_fast.inputs.photo.TraceSettings`. ``"cuda"`` gives each worker on a machine a GPU of its own.
    solver
        ``"exact"`` or ``"sparsegpt"``.
    methods
        Keys of `METHODS`: each sample is explained too, on the dense network and on its trace, for the class that the
        dense network decides on.
    threads
        Processor threads of a worker. The network's outputs differ in their last bits between numbers of threads, so
        this is a setting of the results, and the number of workers is none.
    """

    model: str = "demo"
    solver: str = "exact"
    sparsity: float | Mapping[str, float] | None = None
    augmentations: int = AUGMENTATIONS
    layers: Sequence[str] | None = None
    seed: int = 0
    precision: str = "float32"
    device: str = "cpu"
    methods: Sequence[str] = ()
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """What a worker needs, to be sent to it.

    Attributes
    ----------
    source
        The samples.
    folder
        Where the results go; the same for all workers.
    facts
        What the results depend on, besides sample and kind of machine: settings, hash of the network, versions.
    pack
        Finished samples that a worker moves into a zip file; 0 for none.
    """

    source: Source
    folder: Path
    facts: dict[str, Any]
    pack: int = 0

    @property
    def hash(self) -> str:
        """Hash of the facts."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for `trace_batch`."""
        return {name: self.facts[name] for name in ("solver", "sparsity", "layers", "precision", "seed")}

    def load_model(self) -> LoadedModel:
        """Load the network of this job onto its device.

        Raises
        ------
        ValueError
            It is not the network with which the run began, or packages are of other versions; or another error of
            `spade_fast.inputs.networks.load_model`.
        """
        for name, found in _versions(self.facts["methods"]).items():
            if self.facts.get(name) != found:
                raise ValueError(f"{name} is {found} here, and {self.facts.get(name)} where the run began")
        model = load_model(self.facts["model"])
        if hash_model(model) != self.facts["network"]:
            raise ValueError(f"model {self.facts['model']!r} has other weights or preprocessing here than in the run")
        model.module.to(self.facts["device"])
        return model


def make_job(source: Source, folder: Path, settings: BatchSettings, *, here: bool = True) -> tuple[Job, LoadedModel]:
    """Check settings against the network; also return the network, on the CPU.

    Parameters
    ----------
    here
        Whether the work is done on this machine, which then must have the device.

    Raises
    ------
    TypeError, ValueError, OSError, ImportError
        What `load_model`, `ImageAugmenter` and `spade_fast.trace` raise for their arguments; an unknown solver or
        method; no such device.
    """
    check_names("solver", [settings.solver], SOLVER_TITLES)
    integer("threads", settings.threads, 1)
    check_calibration(settings.augmentations, settings.device if here else "cpu")
    if settings.methods:
        check_names("method", settings.methods, METHODS)
        if importlib.util.find_spec("captum") is None:
            raise ImportError("explanations need captum: pip install 'spade_fast[captum]'")
    model = load_model(settings.model)
    sparsity = chosen_sparsity(settings.sparsity, settings.solver)
    facts = {
        **asdict(settings),
        "sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else float(sparsity),
        "layers": chosen_layers(settings.layers, settings.sparsity, model.module),
        "methods": list(settings.methods),
        "network": hash_model(model),
        **_versions(settings.methods),
    }
    job = Job(source, folder.absolute(), facts)
    checked(job, model)
    make_augmenter(job, model)
    return job, model


def _versions(methods: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that results come from."""
    found = {"version of spade_fast": library_version(), "version of torch": torch.__version__}
    for name in ("kornia", "pillow", *(["captum"] if methods else [])):
        with suppress(PackageNotFoundError):
            found[f"version of {name}"] = version(name)
    return found


def not_sendable(error: BaseException) -> TypeError:
    """Return the error for samples that cannot be pickled."""
    return TypeError(f"the samples cannot be sent to other processes ({error}): make them picklable, or use workers=0")


def checked(job: Job, model: LoadedModel) -> Run:
    """Check the arguments of `trace_batch`, and return what it would prune."""
    others: dict[str, Any] = {"block": None, "damping": 0.01, "memory_limit": None, "strict": False, "progress": None}
    return Run(model.module, **job.options, **others)


def make_augmenter(job: Job, model: LoadedModel) -> ImageAugmenter:
    """Return what makes the calibration images of all samples; importing what it needs."""
    augmenter = ImageAugmenter(job.facts["augmentations"], model.mean, model.std, job.facts["seed"])
    if importlib.util.find_spec("kornia") is None:
        raise ImportError("shifting hue needs kornia: pip install 'spade_fast[image]'")
    return augmenter


def bytes_a_sample(job: Job, model: LoadedModel) -> int:
    """Return the memory that one sample more takes: all Gram matrices, and those of the largest layer thrice."""
    sizes = [gram_bytes(layer, model.module) for layer in checked(job, model).layers]
    return sum(sizes) + 3 * max(sizes, default=0)


def model_bytes(model: LoadedModel) -> int:
    """Return the memory of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.module.state_dict().values())


def hash_model(model: LoadedModel) -> str:
    """Hash of parameters, buffers and preprocessing."""
    digest = hashlib.sha256()
    preprocessing = [list(model.mean), list(model.std), model.resize, model.crop, model.interpolation]
    digest.update(json.dumps(preprocessing).encode())
    for name, tensor in sorted(model.module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
