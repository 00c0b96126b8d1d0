"""What every worker of a batch has to do: settings, checked against the network, and the hash that stands for both."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spade_fast._util.checks import check_device, check_names, integer
from spade_fast._util.errors import AssumptionWarning, InvalidTypeError, InvalidValueError
from spade_fast._util.extras import is_installed, require
from spade_fast._util.hashes import hash_tensors
from spade_fast._util.versions import versions_of
from spade_fast.attribution.methods import METHODS, Question, make_recipe
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.batch.samples import Photos, Source
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.named_targets import named_class, named_function, names_function
from spade_fast.inputs.networks import LoadedModel, load_model, predict
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.calibration import gram_bytes
from spade_fast.pruning.config import AUTO, PruneConfig
from spade_fast.pruning.ladders import LEVELS
from spade_fast.pruning.session import Session
from spade_fast.targets.target import Target


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
        What the results depend on, apart from the sample and the kind of machine: settings, hash of the network,
        versions.
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
    def config(self) -> PruneConfig:
        """What to prune."""
        return PruneConfig(**{field.name: self.facts[field.name] for field in fields(PruneConfig)})

    @property
    def setup(self) -> Setup:
        """Network, device and calibration images."""
        return Setup(**{field.name: self.facts[field.name] for field in fields(Setup)})

    @property
    def traces_per_sample(self) -> int:
        """Traces that are made of each sample: one per level and draw."""
        return len(self.config.keeps) * int(self.facts["draws"])

    @property
    def target(self) -> int | Target | None:
        """What is explained of every sample; None for the class that the dense network predicts."""
        given = self.facts["target"]
        return named_function(given) if isinstance(given, str) else given

    def load_model(self) -> LoadedModel:
        """Load the network of this job onto its device.

        Raises
        ------
        ValueError
            It is not the network with which the run began, or packages are of other versions; or another error of
            `spade_fast.load_model`.
        """
        for name, found in _versions(self.facts["methods"]).items():
            if self.facts.get(name) != found:
                raise InvalidValueError(f"{name} is {found} here, and {self.facts.get(name)} where the run began")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumptionWarning)  # given when the run began
            model = load_model(self.facts["model"])
        if hash_model(model) != self.facts["network"]:
            raise InvalidValueError(
                f"model {self.facts['model']!r} has other weights or preprocessing here than in the run"
            )
        model.module.to(self.facts["device"])
        return model


def make_job(
    source: Source,
    folder: Path,
    config: PruneConfig,
    setup: Setup,
    *,
    methods: Sequence[str] = (),
    target: int | str | None = None,
    draws: int = 1,
    threads: int = 1,
    here: bool = True,
) -> tuple[Job, LoadedModel]:
    """Check settings against the network; also return the network, on the CPU.

    Parameters
    ----------
    config
        What to prune.
    methods, target, draws, threads
        As in `spade_fast.batch.run`.
    here
        Whether the work is done on this machine, which then must have the device.

    Raises
    ------
    TypeError, ValueError, OSError, ImportError
        What `load_model`, `ImageAugmenter` and `spade_fast.trace` raise for their arguments; a function as sparsity, an
        unknown method, or several traces of a sample without methods; no such class or function as target, or one that
        has no effect; no such device.
    """
    integer("threads", threads, 1)
    integer("draws", draws, 1)
    if callable(config.sparsity):
        raise InvalidTypeError("the sparsity of a batch must be 'auto', a number or a mapping, got a function")
    if not methods and (len(config.keeps) > 1 or draws > 1):
        given = f"keep={', '.join(f'{share:g}' for share in config.keeps)} and draws={draws}"
        raise InvalidValueError(
            f"several shares to keep or draws make means of maps, which need methods: got {given}, and no methods"
        )
    if target is not None and not methods and config.sparsity != AUTO:
        raise InvalidValueError(f"a target is what sparsity={AUTO!r} keeps and methods explain: it has no effect here")
    if here:
        check_device(setup.device)
    if methods:
        check_names("method", methods, METHODS)
        require("captum", "explanations need")
    model = load_model(setup.model)
    classes = len(predict(model.module, model.black_image))  # raises what would fail with every sample
    if isinstance(target, str) and names_function(target):
        named_function(target)
    elif target is not None:
        target = named_class("target", target, model, classes)
    if isinstance(source, Photos):
        model.check_takes_photos()
    facts = {
        **asdict(setup),
        **config.record(),
        "methods": list(methods),
        "target": target,
        "draws": draws,
        "threads": threads,
        "network": hash_model(model),
        "preprocessing": model.preprocessing,
        "notes": list(model.notes),
        **_versions(methods),
    }
    _check_methods(methods, source, model)
    job = Job(source, folder.absolute(), facts)
    Session(model.module, job.config, None)  # checks layers and sparsities
    make_augmenter(job, model)
    return job, model


def _check_methods(methods: Sequence[str], source: Source, model: LoadedModel) -> None:
    """Raise ValueError if a method cannot be used on the network; inputs that are not photos may have any size."""
    if methods and isinstance(source, Photos):
        image = model.black_image
        question = Question(prepare_for_attribution(model.module, image), image, 0, model.black)
        for name in methods:
            make_recipe(name, question)


def _versions(methods: Sequence[str]) -> dict[str, str]:
    """Versions of the packages that results come from."""
    optional = [name for name in ("kornia", "PIL", *(["captum"] if methods else [])) if is_installed(name)]
    distributions = ["pillow" if name == "PIL" else name for name in optional]
    found = {**versions_of("spade_fast", *distributions), "torch": torch.__version__}
    return {f"version of {name}": version for name, version in found.items()}


def not_sendable(error: BaseException) -> TypeError:
    """Return the error for samples that cannot be pickled."""
    return InvalidTypeError(
        f"the samples cannot be sent to other processes ({error}): make them picklable, or use workers=0"
    )


def make_augmenter(job: Job, model: LoadedModel) -> ImageAugmenter:
    """Return what makes the calibration images of all samples; ImportError if a package for it is missing."""
    augmenter = job.setup.augmenter(model, job.facts["seed"])
    if augmenter.hue:
        require("kornia", "shifting hue needs")
    return augmenter


def bytes_per_sample(job: Job, model: LoadedModel) -> int:
    """Return the memory that another sample takes.

    It holds all Gram matrices, each layer solved at all levels, and the traces of earlier draws. Solving a layer takes
    its Gram matrices three times, and a dense weight per level.
    """
    session = Session(model.module, job.config, None)
    held, working = 0, [0]
    for layer in session.layers:
        weight, gram = layer.weight(model.module), gram_bytes(layer, model.module)
        levels = LEVELS if session.auto else [session.sparsity[layer.name]]
        held += gram + sum(_packed_bytes(weight, level) for level in levels)
        held += (job.facts["draws"] - 1) * len(job.config.keeps) * _packed_bytes(weight, levels[0])
        working.append(3 * gram + len(levels) * weight.nbytes)
    return held + max(working)


def _packed_bytes(weight: Tensor, sparsity: float) -> int:
    """Return the memory of a pruned weight: a bit for each element, and the values that survive."""
    return math.ceil(weight.numel() / 8 + (1 - sparsity) * weight.nbytes)


def model_bytes(model: LoadedModel) -> int:
    """Return the memory of a network's parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.module.state_dict().values())


def hash_model(model: LoadedModel) -> str:
    """Hash of parameters, buffers and preprocessing."""
    tensors = hash_tensors(model.module.state_dict().items())
    return hashlib.sha256(json.dumps([model.preprocessing, tensors], sort_keys=True).encode()).hexdigest()
