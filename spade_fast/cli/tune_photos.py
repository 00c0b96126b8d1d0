"""Searches for a sparsity on photos and saves it to a file that the other commands accept."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util.checks import check_names
from spade_fast._util.errors import InvalidValueError, MissingFileError
from spade_fast._util.extras import require
from spade_fast._util.files import check_file
from spade_fast._util.progress import Progress, no_progress
from spade_fast.attribution.methods import METHODS, Question, attribution_map, make_recipe
from spade_fast.attribution.metrics import auc, deletion_curve, insertion_curve, localisation_auc
from spade_fast.attribution.prepare import prepare_for_attribution
from spade_fast.cli.trace_photo import seen
from spade_fast.inputs.networks import LoadedModel, predict
from spade_fast.inputs.photo import read_mask, read_photo
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.config import AUTO, PruneConfig
from spade_fast.pruning.dense_weights import count_weights
from spade_fast.pruning.layers import find_layers
from spade_fast.pruning.stages import check_stages
from spade_fast.pruning.tuning import check_rounds, checked_candidates, tune
from spade_fast.pruning.tuning_result import Tuning
from spade_fast.pruning.tuning_samples import TraceScore

if TYPE_CHECKING:
    from PIL.Image import Image

SCORES = ("insertion", "deletion", "localisation", "sparsity")


def tune_photos(
    photos: Sequence[Path],
    out: Path,
    config: PruneConfig,
    setup: Setup,
    *,
    score: str = "insertion",
    masks: Path | None = None,
    method: str = "saliency",
    candidates: Sequence[float] | None = None,
    stages: str = AUTO,
    rounds: int = 1,
    progress: Progress = no_progress,
) -> Tuning:
    """Search for the sparsity with the best mean score on some photos that keeps their classes, and save it.

    Parameters
    ----------
    photos
        Paths of the photos. The scores refer to the class that the dense network predicts for each.
    out
        YAML file for the result, in an existing folder.
    config
        What to prune. Its sparsity is not used; its `keep` is the mean share of the classes' probabilities that the
        traces keep.
    setup
        Network, device and number of calibration images.
    score
        ``"insertion"``: the mean of the dense network's insertion curve, in which the pixels of the blurred photo are
        replaced by the true ones in the order of importance given by `method` on the trace. ``"deletion"``: one minus
        the mean of its deletion curve, in which pixels are blurred in that order. ``"localisation"``: the AUC of the
        method's map as a classifier of the object's pixels. ``"sparsity"``: the share of zeros in the tuned layers.
    masks
        Folder with one PNG mask per photo, of the same name, and of the same size once both are upright. The object is
        where the mask is visible and not black, in whatever mode: label masks may have 16 bits.
    method
        A key of `METHODS`; the score ``"sparsity"`` does not use it.
    candidates, stages, rounds
        As in `spade_fast.tune`.
    progress
        Called as ``progress(stage, done, total)``.

    Raises
    ------
    UserError
        As in `spade_fast.cli.explain.explain_photo`; or a mask is missing or does not fit its photo.
    """
    require("yaml", "sparsity files need")
    if not photos:
        raise InvalidValueError("give at least one photo")
    check_names("score", [score], SCORES)
    check_names("method", [method], METHODS)
    check_stages(stages)
    checked_candidates(candidates, stages)
    check_rounds(rounds, stages)
    if score == "localisation" and masks is None:
        raise InvalidValueError("the score localisation needs a folder of masks")
    if score != "localisation" and masks is not None:
        raise InvalidValueError(f"masks are used with the score localisation only, got score {score!r}")
    if masks is not None and not masks.is_dir():
        raise MissingFileError(f"no such folder of masks: {masks}")
    check_file(out, "the sparsity")
    opened = [read_photo(path) for path in photos]
    drawn = [] if masks is None else [_mask(masks, path, one.image) for path, one in zip(photos, opened, strict=True)]
    model = setup.load_model()
    images = [seen(photo, path, model)[0].to(setup.device) for photo, path in zip(opened, photos, strict=True)]
    module = prepare_for_attribution(model.module, images[0])
    targets = [int(predict(module, image).argmax()) for image in images]
    questions = [
        Question(module, image, target, model.black.to(image)) for image, target in zip(images, targets, strict=True)
    ]
    scored: TraceScore | None = None
    if score != "sparsity":
        make_recipe(method, questions[0])  # fails if the method cannot be used on the network
        if masks is None:
            scored = _perturbation(score, copy.deepcopy(module), method, questions)
        else:
            scored = _localisation(method, questions, [_seen(*one, model) for one in drawn])
    augmenter = setup.augmenter(model, config.seed)
    options = config.options()
    del options["sparsity"]
    tuning = tune(
        module,
        [augmenter(image, path.name) for image, path in zip(images, photos, strict=True)],
        scored,
        inputs=images,
        candidates=candidates,
        stages=stages,
        rounds=rounds,
        progress=progress,
        **options,
    )
    facts = {
        **asdict(setup),
        "photos": [path.name for path in photos],
        "score": score,
        **({} if score == "sparsity" else {"method": method}),
        **_pruned_shares(tuning, module),
    }
    tuning = replace(tuning, settings={**facts, **tuning.settings})
    tuning.save(out)
    return tuning


def _perturbation(kind: str, dense: nn.Module, method: str, questions: Sequence[Question]) -> TraceScore:
    def score(module: nn.Module, i: int) -> float:
        image, target = questions[i].image, questions[i].target
        found = attribution_map(method, questions[i])[None].to(image.device)
        if kind == "insertion":
            return float(auc(insertion_curve(dense, image, found, target)))
        return 1 - float(auc(deletion_curve(dense, image, found, target)))

    return score


def _localisation(method: str, questions: Sequence[Question], masks: Sequence[Tensor]) -> TraceScore:
    return lambda module, i: float(localisation_auc(attribution_map(method, questions[i])[None], masks[i][None]))


def _pruned_shares(tuning: Tuning, module: nn.Module) -> dict[str, float]:
    """Return the shares of the network's weights that lie in pruned layers, and that are removed."""
    every = count_weights(module)
    layers = {layer.name: layer.numel for layer in find_layers(module, tuning.options.get("layers"))[0]}
    sparsity = tuning.sparsity
    if isinstance(sparsity, str):
        (chosen,) = (trial for trial in tuning.history if trial.candidate == tuning.options["keep"])
        sparsity = dict.fromkeys(layers, chosen.sparsity)
    sizes = {name: size for name, size in layers.items() if sparsity.get(name)}
    removed = sum(sparsity[name] * size for name, size in sizes.items())
    return {"share_in_pruned_layers": sum(sizes.values()) / every, "share_removed": removed / every}


def _mask(folder: Path, path: Path, photo: Image) -> tuple[Path, Image]:
    """Return the path and the mask of a photo."""
    mask = folder / f"{path.stem}.png"
    opened = read_mask(mask)
    if opened.size != photo.size:
        given, expected = ("x".join(map(str, size)) for size in (opened.size, photo.size))
        raise InvalidValueError(f"{mask} is not a mask of {path.name}: its size is {given} instead of {expected}")
    return mask, opened


def _seen(path: Path, opened: Image, model: LoadedModel) -> Tensor:
    """Return where the object of a mask is in the network's input: Tensor ``[H, W]``, bool."""
    pixels: np.ndarray = replace(model, interpolation="nearest").preprocess(opened)[1]
    mask = torch.from_numpy(pixels).amax(2) > 0
    if bool(mask.all()) or not bool(mask.any()):
        raise InvalidValueError(
            f"{path}: the part of the mask that the network sees must have pixels both inside and outside the object"
        )
    return mask
