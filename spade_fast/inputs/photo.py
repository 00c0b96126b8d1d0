"""Photos and networks by name: what the commands load, and the trace of one photo."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util.files import check_device
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.networks import LoadedModel, load_model
from spade_fast.pruning.layers import find_layers
from spade_fast.pruning.traces import Trace
from spade_fast.pruning.tracing import trace

Progress = Callable[[str, int, int], None]

SOLVER_TITLES = {"exact": "SPADE", "sparsegpt": "FastSPADE"}
# Traces of the demo network kept its decision on photos of the demo package up to about these sparsities, if its narrow
# layers (depthwise ones above all, where an output has 9 or 25 weights) were left alone.
DEFAULT_SPARSITY = {"exact": 0.8, "sparsegpt": 0.6}
LEAST_COLUMNS = 100
# More did not help localisation (docs/evidence.md): 16 to 512 gave the same within the noise.
AUGMENTATIONS = 64


@dataclass(frozen=True)
class TraceSettings:
    """What to trace, and how.

    Attributes
    ----------
    image
        Path of a photo.
    model
        Name for `load_model`.
    sparsity
        Share of weights to remove, or a mapping of layer names or patterns to shares; None for the solver's own
        default.
    augmentations
        Number of calibration images.
    layers
        Name patterns of the layers to prune; None for those that a mapping of sparsities names, or else for those with
        at least `LEAST_COLUMNS` weights an output.
    seed
        Of the augmentations.
    precision
        Of the calibration: ``"float32"`` or ``"bf16"``.
    device
        Where to compute, as torch names it: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
    """

    image: Path
    model: str = "demo"
    sparsity: float | Mapping[str, float] | None = None
    augmentations: int = AUGMENTATIONS
    layers: Sequence[str] | None = None
    seed: int = 0
    precision: str = "float32"
    device: str = "cpu"


def trace_photo(settings: TraceSettings, solver: str, out: Path, progress: Progress | None = None) -> Trace:
    """Prune a network for one photo, and save the trace.

    Parameters
    ----------
    settings
        What to trace.
    solver
        ``"exact"`` or ``"sparsegpt"``.
    out
        File for the trace, in a folder that is there.
    progress
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    ValueError, FileNotFoundError, OSError, ImportError
        As in `spade_fast.cli.explain.explain`.
    """
    check_settings(settings, [solver])
    check_file(out, "the trace")
    photo = open_photo(settings.image)
    model, image, _ = load(settings.model, settings.device, photo)
    predict(model.module, image)
    made = trace_image(settings, solver, model, model.module, image, progress or no_progress)
    made.save(out)
    return made


def check_settings(settings: TraceSettings, solvers: Sequence[str]) -> None:
    """Raise ValueError for an unknown solver, a wrong sparsity, or what `check_calibration` refuses."""
    check_names("solver", solvers, SOLVER_TITLES)
    if isinstance(settings.sparsity, float | int) and not 0 <= settings.sparsity <= 1:
        raise ValueError(f"sparsity must lie between 0 and 1, got {settings.sparsity}")
    check_calibration(settings.augmentations, settings.device)


def check_calibration(augmentations: int, device: str) -> None:
    """Raise ValueError for too few augmentations, or a device that is not there."""
    if augmentations < 1:
        raise ValueError(f"augmentations must be at least 1, got {augmentations}")
    check_device(device)


def check_names(kind: str, names: Sequence[str], allowed: Iterable[str]) -> None:
    """Raise ValueError if there are no names, or one that is not allowed."""
    if not names:
        raise ValueError(f"give at least one {kind}: {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise ValueError(f"unknown {kind} {name!r}: allowed are {', '.join(allowed)}")


def check_file(out: Path, what: str) -> None:
    """Raise OSError if a file to be written later cannot be there."""
    if not out.parent.is_dir() or out.is_dir():
        why = f"{out} is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise OSError(f"cannot write {what}: {why}")


def open_photo(path: Path) -> Any:
    """Open an image file as an RGB `PIL.Image.Image`.

    Raises
    ------
    FileNotFoundError, OSError
        No such file, or it cannot be read.
    ValueError
        Not an image, or a damaged or huge one.
    ImportError
        Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("photos need Pillow: pip install 'spade_fast[cli]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"no such image file: {path}")
    contents = path.read_bytes()
    try:
        with Image.open(io.BytesIO(contents)) as photo:
            if photo.mode.startswith("I;16"):  # of which convert would cut off all above 255
                return Image.fromarray((np.asarray(photo) // 257).astype(np.uint8)).convert("RGB")
            return photo.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"not an image file, or a damaged one: {path}") from error


def load(name: str, device: str, photo: Any) -> tuple[LoadedModel, Tensor, np.ndarray]:
    """Load a network and prepare a photo on the device; also the photo's pixels as they are drawn."""
    model = load_model(name)
    model.module.to(device)
    image, pixels = model.preprocess(photo)
    return model, image.to(device), pixels


def no_progress(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def trace_image(
    settings: TraceSettings, solver: str, model: LoadedModel, module: nn.Module, image: Tensor, progress: Progress
) -> Trace:
    """Trace a network for its input made from the photo."""
    augmenter = ImageAugmenter(settings.augmentations, model.mean, model.std, settings.seed)
    return trace(
        module,
        augmenter(image, settings.image.name),
        sparsity=chosen_sparsity(settings.sparsity, solver),
        solver=solver,
        layers=chosen_layers(settings.layers, settings.sparsity, module),
        precision=settings.precision,
        sample_id=settings.image.name,
        seed=settings.seed,
        progress=progress,
    )


def chosen_layers(
    layers: Sequence[str] | None, sparsity: float | Mapping[str, float] | None, model: nn.Module
) -> list[str] | None:
    """Return the patterns of the layers to prune, of what was asked for; None for all."""
    if layers is not None:
        return list(layers)
    return None if isinstance(sparsity, Mapping) else wide_layers(model)


def wide_layers(model: nn.Module) -> list[str] | None:
    """Return the layers with at least `LEAST_COLUMNS` weights an output; None if there are none."""
    return [layer.name for layer in find_layers(model)[0] if layer.columns >= LEAST_COLUMNS] or None


def chosen_sparsity(sparsity: float | Mapping[str, float] | None, solver: str) -> float | Mapping[str, float]:
    """Return the sparsity that was asked for, or the solver's default."""
    return DEFAULT_SPARSITY[solver] if sparsity is None else sparsity


def predict(model: nn.Module, image: Tensor) -> Tensor:
    """Return the probabilities of the classes for one image, ``[classes]`` on the CPU; ValueError for other models."""
    with torch.no_grad():
        output = model(image)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1:
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"the model must return one row of logits for one image, got {given}")
    return output.softmax(1)[0].cpu()
