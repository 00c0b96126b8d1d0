"""Searches sparsities for photos, and writes them into a file that the other commands take."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast.attribution.maps import attribution_map
from spade_fast.attribution.methods import METHODS, Question
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.inputs.augment import ImageAugmenter
from spade_fast.inputs.networks import LoadedModel
from spade_fast.inputs.photo import (
    AUGMENTATIONS,
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
from spade_fast.pruning.tuning import CANDIDATES, Score, tune
from spade_fast.pruning.tuning_result import Tuning, import_yaml

SCORES = ("probability", "deletion", "localisation")


@dataclass(frozen=True)
class TuneSettings:
    """What to tune, and for what.

    Attributes
    ----------
    photos
        Paths of the photos. Each is explained for the class that the dense network decides on.
    model, augmentations, layers, seed, precision, device
        As in `spade_fast.inputs.photo.TraceSettings`.
    solver
        ``"exact"`` or ``"sparsegpt"``.
    score
        ``"probability"`` of that class; ``"deletion"``: how far below 1 the dense network's probability of it is on
        average while pixels are blurred, those first that `method`'s map says are important; or ``"localisation"``: the
        AUC with which that map tells the object's pixels from the others.
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
    augmentations: int = AUGMENTATIONS
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
        As in `spade_fast.cli.explain.explain`; or there are no masks for the photos.
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
    if settings.score == "probability":
        score = _probability(images, targets)
    else:
        score = _score_of_maps(settings, opened, model, module, images, targets)
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
        **({} if settings.score == "probability" else {"method": settings.method}),
        "augmentations": settings.augmentations,
        "seed": settings.seed,
    }
    tuning = replace(tuning, settings={**facts, **tuning.settings})
    tuning.save(out)
    return tuning


def _probability(images: Sequence[Tensor], targets: Sequence[int]) -> Score:
    return lambda module, i: float(predict(module, images[i])[targets[i]])


def _score_of_maps(
    settings: TuneSettings,
    opened: Sequence[Any],
    model: LoadedModel,
    module: nn.Module,
    images: Sequence[Tensor],
    targets: Sequence[int],
) -> Score:
    mean, std = (images[0].new_tensor(values).view(1, -1, 1, 1) for values in (model.mean, model.std))
    asked = zip(images, targets, strict=True)
    questions = [Question(module, image, target, -mean / std) for image, target in asked]
    if settings.masks is None:
        return _deletion(copy.deepcopy(module), settings.method, questions)
    photos = zip(settings.photos, opened, strict=True)
    masks = [_mask(settings.masks, path, photo.size, model) for path, photo in photos]
    return _localisation(settings.method, questions, masks)


def _deletion(dense: nn.Module, method: str, questions: Sequence[Question]) -> Score:
    from spade_fast.attribution.metrics import auc, deletion_curve

    def score(module: nn.Module, i: int) -> float:
        found = attribution_map(method, questions[i])
        image = questions[i].image
        return 1 - float(auc(deletion_curve(dense, image, found[None].to(image.device), questions[i].target)))

    return score


def _localisation(method: str, questions: Sequence[Question], masks: Sequence[Tensor]) -> Score:
    from spade_fast.attribution.metrics import localisation_auc

    return lambda module, i: float(localisation_auc(attribution_map(method, questions[i])[None], masks[i][None]))


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
