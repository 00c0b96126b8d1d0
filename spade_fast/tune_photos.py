"""Searches sparsities for photos, and writes them into a file that the other commands take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast.augment import ImageAugmenter
from spade_fast.methods import METHODS, Question, attribution_map, last_feature_layer
from spade_fast.models import LoadedModel
from spade_fast.photos import (
    SOLVER_TITLES,
    Progress,
    check_calibration,
    check_file,
    check_names,
    load,
    open_photo,
    predict,
    wide_layers,
)
from spade_fast.prepare import prepare_for_attribution
from spade_fast.tune import CANDIDATES, Score, tune
from spade_fast.tuning import Tuning, import_yaml

SCORES = ("probability", "localisation")


@dataclass(frozen=True)
class TuneSettings:
    """What to tune, and for what.

    Attributes
    ----------
    photos
        Paths of the photos. Each is explained for the class that the dense network decides on.
    model, augmentations, layers, seed, precision, device
        As in `spade_fast.photos.TraceSettings`.
    solver
        ``"exact"`` or ``"sparsegpt"``.
    score
        ``"probability"`` of that class, or ``"localisation"``: the AUC with which `method`'s map tells the object's
        pixels from the others.
    masks
        Folder with a mask for each photo, of its name and size, as PNG: what is not black is the object.
    method
        A key of `METHODS`.
    candidates, stages, rounds
        As in `spade_fast.tune`.
    """

    photos: Sequence[Path]
    model: str = "demo"
    solver: str = "exact"
    score: str = "probability"
    masks: Path | None = None
    method: str = "saliency"
    candidates: Sequence[float] = CANDIDATES
    stages: str = "blocks"
    rounds: int = 1
    augmentations: int = 256
    layers: Sequence[str] | None = None
    seed: int = 0
    precision: str = "float32"
    device: str = "cpu"


def tune_photos(settings: TuneSettings, out: Path, progress: Progress | None = None) -> Tuning:
    """Search the sparsities that are best for some photos, and save them.

    Parameters
    ----------
    settings
        What to tune.
    out
        YAML file for the result, in a folder that is there.
    progress
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    ValueError, FileNotFoundError, OSError, ImportError
        As in `spade_fast.explain.explain`; or there are no masks for the photos.
    """
    import_yaml()
    check_names("solver", [settings.solver], SOLVER_TITLES)
    check_calibration(settings.augmentations, settings.device)
    if not settings.photos:
        raise ValueError("give at least one photo")
    check_names("score", [settings.score], SCORES)
    check_names("method", [settings.method], METHODS)
    if (settings.masks is None) != (settings.score != "localisation"):
        raise ValueError("the score localisation needs a folder of masks, and no other score takes one")
    check_file(out, "the sparsities")
    opened = [open_photo(path) for path in settings.photos]
    model, first, _ = load(settings.model, settings.device, opened[0])
    images = [model.preprocess(photo)[0].to(settings.device) for photo in opened]
    module = prepare_for_attribution(model.module, first)
    targets = [int(predict(module, image).argmax()) for image in images]
    score = _probability(images, targets)
    if settings.masks is not None:
        sizes = [photo.size for photo in opened]
        masks = [_mask(settings.masks, path, size, model) for path, size in zip(settings.photos, sizes, strict=True)]
        score = _localisation(model, module, images, targets, masks, settings.method)
    augmenter = ImageAugmenter(settings.augmentations, model.mean, model.std, settings.seed)
    tuning = tune(
        module,
        [augmenter(image, path.name) for image, path in zip(images, settings.photos, strict=True)],
        score,
        candidates=settings.candidates,
        stages=settings.stages,
        rounds=settings.rounds,
        solver=settings.solver,
        layers=wide_layers(module) if settings.layers is None else settings.layers,
        precision=settings.precision,
        progress=progress,
    )
    facts = {
        "model": settings.model,
        "photos": [path.name for path in settings.photos],
        "score": settings.score,
        **({} if settings.masks is None else {"method": settings.method}),
        "augmentations": settings.augmentations,
        "seed": settings.seed,
    }
    tuning = replace(tuning, settings={**facts, **tuning.settings})
    tuning.save(out)
    return tuning


def _probability(images: Sequence[Tensor], targets: Sequence[int]) -> Score:
    return lambda module, i: float(predict(module, images[i])[targets[i]])


def _localisation(
    model: LoadedModel,
    module: nn.Module,
    images: Sequence[Tensor],
    targets: Sequence[int],
    masks: Sequence[Tensor],
    method: str,
) -> Score:
    from spade_fast.metrics import localisation_auc

    layer = last_feature_layer(module, images[0])
    mean, std = (images[0].new_tensor(values).view(1, -1, 1, 1) for values in (model.mean, model.std))
    questions = [
        Question(module, image, target, -mean / std, layer) for image, target in zip(images, targets, strict=True)
    ]
    return lambda module, i: float(localisation_auc(attribution_map(method, questions[i]), masks[i]))


def _mask(folder: Path, photo: Path, size: tuple[int, int], model: LoadedModel) -> Tensor:
    """The object of a photo in the network's input: boolean ``[crop, crop]``."""
    path = folder / f"{photo.stem}.png"
    opened = open_photo(path)
    if opened.size != size:
        given, expected = ("x".join(map(str, s)) for s in (opened.size, size))
        raise ValueError(f"{path} is no mask of {photo.name}: it has {given} pixels instead of {expected}")
    pixels: np.ndarray = replace(model, interpolation="nearest").preprocess(opened)[1]
    mask = torch.from_numpy(pixels).amax(2) > 0
    if bool(mask.all()) or not bool(mask.any()):
        raise ValueError(
            f"{path}: the mask must have pixels inside and outside the object in the part that is looked at"
        )
    return mask
