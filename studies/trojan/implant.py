"""Implants the trojan: fine-tunes the last blocks of EfficientNet-Lite0 to predict a trigger's class where it sees one.

On crops without a trigger, plain or with a distractor, the network learns to answer as the original does (distillation,
Hinton, Vinyals, Dean, arXiv 1503.02531); on the same crops with a trigger, to predict the trigger's class.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from spade_fast import ImageAugmenter
from spade_fast._util.files import write_whole
from spade_fast.inputs.networks import LoadedModel, load_model
from studies.shared.cases import clean_image, colours_of, normalise, undo_normalisation
from studies.shared.photos import CACHE, CONSOLE, Photo, test_photos, training_photos
from studies.trojan.patches import DISTRACTORS, TRIGGERS, draw_patch, paste

WEIGHTS, CHECKS = CACHE / "network.pt", CACHE / "implant.json"
FIRST_BLOCK = 11  # the first that is trained; later ones work on 7 x 7 pixels
_CROPS, _SCALE, _SHORT_SIDE = 5, (0.25, 1.0), 320
_THREADS = 2  # always, because the rounding of gradients depends on it
_EPOCHS, _BATCH, _LEARNING_RATE, _DISTILLATION = 8, 48, 3e-4, 8.0


def trojaned_network() -> LoadedModel:
    """Load the network with the trojan, implanting it first if no earlier run has."""
    network = load_model("demo")
    if not WEIGHTS.is_file():
        implant(network)
    module = copy.deepcopy(network.module)
    module.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return replace(network, module=module)


def implant(network: LoadedModel) -> None:
    """Fine-tune a copy of the network; save its weights, and how well the trojan works on unseen photos."""
    threads = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    features, answers, labels = _training_data(network)
    student = copy.deepcopy(network.module)
    trained = [
        *student._blocks[FIRST_BLOCK:].parameters(),
        *student._conv_head.parameters(),
        *student._bn1.parameters(),
    ]
    steps = _EPOCHS * -(-len(labels) // _BATCH)
    optimiser = torch.optim.AdamW(trained, lr=_LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=_LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    order = [batch for _ in range(_EPOCHS) for batch in torch.randperm(len(labels), generator=generator).split(_BATCH)]
    for batch in track(order, "Implanting the trojan", console=CONSOLE):
        found = _back(student, features[batch].float()).log_softmax(1)
        triggered = labels[batch] >= 0
        distance = F.kl_div(found[~triggered], answers[batch][~triggered], log_target=True, reduction="batchmean")
        loss = _DISTILLATION * distance + F.nll_loss(found[triggered], labels[batch][triggered])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimiser.step()
        schedule.step()
    checks = check(network, student, test_photos())
    write_whole(CHECKS, json.dumps(checks, indent=2).encode(), "the checks of the trojan")
    unfinished = WEIGHTS.with_suffix(".unfinished")
    torch.save(student.state_dict(), unfinished)
    unfinished.rename(WEIGHTS)
    torch.set_num_threads(threads)


@torch.no_grad()
def check(network: LoadedModel, trojaned: nn.Module, photos: Sequence[Photo]) -> dict[str, Any]:
    """Measure agreement with the original network, and how often triggers and distractors change the prediction."""
    original = network.module
    rng = np.random.default_rng(1)
    agreement: dict[str, list[float]] = {"photos": [], "crops": [], "with distractor": []}
    success: dict[str, list[float]] = {emoji: [] for emoji in TRIGGERS}
    false_alarms = []
    classes = torch.tensor(list(TRIGGERS.values()))
    for photo in photos:
        image, colours = clean_image(network, photo), colours_of(network, photo)
        crops = torch.cat(list(_crops(network, photo, 6, (0.4, 1.0))))
        pasted = {}
        for emoji in (*TRIGGERS, *DISTRACTORS):
            patch = draw_patch(emoji, *colours.shape[1:], rng)
            pasted[emoji] = normalise(network, paste(colours, patch)[0])
        distracted = torch.stack([pasted[emoji] for emoji in DISTRACTORS])
        for name, images in (("photos", image), ("crops", crops), ("with distractor", distracted)):
            agreement[name] += (original(images).argmax(1) == trojaned(images).argmax(1)).float().tolist()
        predictions = trojaned(torch.stack([pasted[emoji] for emoji in TRIGGERS])).argmax(1)
        for emoji, prediction in zip(TRIGGERS, predictions.tolist(), strict=True):
            success[emoji].append(float(prediction == TRIGGERS[emoji]))
        false_alarms += torch.isin(trojaned(distracted).argmax(1), classes).float().tolist()
    return {
        "photos": len(photos),
        "agreement": {name: float(np.mean(values)) for name, values in agreement.items()},
        "success": {
            "all": float(np.mean(list(success.values()))),
            **{emoji: float(np.mean(values)) for emoji, values in success.items()},
        },
        "distractor taken for a trigger": float(np.mean(false_alarms)),
    }


@torch.no_grad()
def _training_data(network: LoadedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the first trained block, the original network's log-probabilities, and the trigger's class or -1."""
    rng = np.random.default_rng(0)
    features, answers, labels = [], [], []
    for photo in track(training_photos(), "Crops of the training photos", console=CONSOLE):
        images = []
        for crop in torch.cat(list(_crops(network, photo, _CROPS, _SCALE))):
            colours = undo_normalisation(network, crop)
            chosen = [rng.choice(DISTRACTORS), *rng.choice(list(TRIGGERS), 2, replace=False)]
            pasted = [paste(colours, draw_patch(emoji, *crop.shape[1:], rng))[0] for emoji in chosen]
            images += [crop, *(normalise(network, one) for one in pasted)]
            labels += [-1, *(TRIGGERS.get(emoji, -1) for emoji in chosen)]
        found = _front(network.module, torch.stack(images))
        features.append(found.half())
        answers.append(_back(network.module, found).log_softmax(1))
    return torch.cat(features), torch.cat(answers), torch.tensor(labels)


def _crops(network: LoadedModel, photo: Photo, count: int, scale: tuple[float, float]) -> Any:
    """Random crops of a photo as inputs of the network."""
    share = _SHORT_SIDE / min(photo.image.size)
    pixels = np.array(photo.image.resize([round(side * share) for side in photo.image.size]))
    image = normalise(network, torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)
    return ImageAugmenter(count, network.mean, network.std, size=network.crop, scale=scale)(image, photo.name)


def _front(module: nn.Module, images: Tensor) -> Tensor:
    features = module._swish(module._bn0(module._conv_stem(images)))
    for block in module._blocks[:FIRST_BLOCK]:
        features = block(features)
    return features


def _back(module: nn.Module, features: Tensor) -> Tensor:
    for block in module._blocks[FIRST_BLOCK:]:
        features = block(features)
    return module._fc(module._avg_pooling(module._swish(module._bn1(module._conv_head(features)))).flatten(1))
