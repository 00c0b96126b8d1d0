"""Networks of torchvision, timm and transformers, with the preprocessing that these packages state for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from spade_fast._util.checks import nearest
from spade_fast._util.errors import InputError, InvalidValueError, MissingExtraError
from spade_fast._util.extras import extra_for
from spade_fast._util.text import first_line, listed
from spade_fast.inputs.checkpoints import load_weights
from spade_fast.inputs.networks import LoadedModel, assumed, imagenet_class_names

if TYPE_CHECKING:
    from PIL.Image import Image

# Sides of the photos on which a preprocessing is compared with that of its package.
_PROBES = ((300, 200), (200, 300))
# What an image processor of transformers says about geometry and the order of channels.
_GEOMETRY = ("do_resize", "size", "do_center_crop", "crop_size", "crop_pct", "do_pad", "do_flip_channel_order")


def library_network(name: str) -> LoadedModel:
    """Load the network that ``torchvision:...``, ``timm:...`` or ``hf:...`` names (`spade_fast.load_model`)."""
    library, _, rest = name.partition(":")
    if library == "hf":
        return hugging_face_network(name, rest)
    load = torchvision_network if library == "torchvision" else timm_network
    return load(name, *rest.split(":", 1))


def torchvision_network(name: str, architecture: str, weights: str = "DEFAULT") -> LoadedModel:
    """Make a classifier of torchvision with weights that it downloads, those of a file, or random ones (``none``).

    Without torchvision's weights, the preprocessing is that of its default ones.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError(
            "torchvision models need torchvision: pip install torchvision "
            f"(the release that matches torch {torch.__version__})"
        ) from error
    classifiers = models.list_models(module=models)
    if architecture not in classifiers:
        near = nearest(architecture, classifiers)
        hint = f": did you mean {near[0]!r}? It" if near else "; it"
        raise InvalidValueError(f"torchvision has no classifier {architecture!r}{hint} has {', '.join(classifiers)}")
    choices = models.get_model_weights(architecture)
    is_own = weights == "none" or bool(Path(weights).suffix)
    if not is_own and weights not in choices.__members__:
        raise InvalidValueError(
            f"torchvision has no weights {weights!r} for {architecture}; it has {', '.join(choices.__members__)}"
        )
    choice = choices["DEFAULT" if is_own else weights]
    try:
        with _same_random_weights():
            module = models.get_model(architecture, weights=None if is_own else choice)
    except OSError as error:
        raise InputError(
            f"torchvision cannot download the weights of {architecture} ({error}): give a file as "
            f"torchvision:{architecture}:FILE.pth, or none for random weights"
        ) from error
    transform = choice.transforms()
    loaded = LoadedModel(
        name,
        module,
        tuple(transform.mean),
        tuple(transform.std),
        transform.resize_size[0],
        transform.crop_size[0],
        transform.interpolation.value,
        imagenet_class_names() if is_own else tuple(choice.meta["categories"]),
    )
    if not is_own or weights == "none":
        return loaded
    load_weights(module, Path(weights))
    return assumed(loaded)


def timm_network(name: str, architecture: str, weights: str = "") -> LoadedModel:
    """Make a network of timm with the weights that timm downloads, those of a file, or random ones (``none``)."""
    with extra_for("timm networks need"):
        import timm
        from timm.data import infer_imagenet_subset, resolve_model_data_config
    if not timm.is_model(architecture):
        close = ", ".join(nearest(architecture, timm.list_models()))
        raise InvalidValueError(f"timm has no network {architecture!r}" + (f"; it has {close}" if close else ""))
    try:
        with _same_random_weights():
            module = timm.create_model(architecture, pretrained=not weights)
    except OSError as error:
        raise InputError(
            f"timm cannot download the weights of {architecture} ({first_line(error)}): give a file as "
            f"timm:{architecture}:FILE, or none for random weights"
        ) from error
    except RuntimeError as error:
        raise InvalidValueError(f"timm cannot make {architecture}: {first_line(error)}") from error
    names = imagenet_class_names() if infer_imagenet_subset(module) == "imagenet-1k" else ()
    loaded = timm_preprocessing(name, resolve_model_data_config(module))
    loaded = replace(loaded, module=module, class_names=names)
    if weights in ("", "none"):
        return loaded
    load_weights(module, Path(weights))
    return assumed(loaded)


def timm_preprocessing(name: str, config: Mapping[str, Any]) -> LoadedModel:
    """Return a model without a network that has the preprocessing of a data configuration of timm."""
    from timm.data import create_transform

    height, width = config["input_size"][1:]
    mean, std = tuple(config["mean"]), tuple(config["std"])
    enlarged = int(height / config["crop_pct"]), int(width / config["crop_pct"])
    transform = create_transform(**config, is_training=False)
    return _matching(
        _geometry(name, (height, width), mean, std, config["interpolation"]),
        [enlarged] if config["crop_mode"] == "squash" else [enlarged[0]],
        lambda photo: transform(photo)[None],
        ", ".join(f"{key}={config[key]}" for key in ("input_size", "crop_pct", "crop_mode")),
    )


def hugging_face_network(name: str, location: str) -> LoadedModel:
    """Load an image classifier and its image processor from a folder, or from the Hugging Face hub."""
    with extra_for("networks of Hugging Face need"):
        from transformers import AutoImageProcessor, AutoModelForImageClassification
    try:
        processor = AutoImageProcessor.from_pretrained(location)
        module, loading = AutoModelForImageClassification.from_pretrained(location, output_loading_info=True)
    except OSError as error:
        what = "not an image classifier" if Path(location).is_dir() else "not a folder, nor in reach on the hub"
        raise InputError(f"transformers cannot load {location!r}, {what}: {first_line(error)}") from error
    except (ValueError, KeyError, RuntimeError) as error:
        raise InvalidValueError(f"transformers cannot load {location!r}: {first_line(error)}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InvalidValueError(f"{name} has no weights for {listed(missing)}: is it a trained classifier?")
    if module.config.problem_type not in (None, "single_label_classification"):
        raise InvalidValueError(
            f"{name} is trained for {module.config.problem_type}; only classifiers with one class per photo can be used"
        )
    labels = module.config.id2label
    return replace(
        _processor_preprocessing(name, processor),
        module=module,
        class_names=tuple(labels[index] for index in sorted(labels)),
    )


def _processor_preprocessing(name: str, processor: Any) -> LoadedModel:
    """Return a model without a network that has the preprocessing of an image processor of transformers."""
    from PIL.Image import Resampling

    if hasattr(processor, "data_config"):  # a network of timm in transformers' form
        return timm_preprocessing(name, processor.data_config)

    def transform(photo: Image) -> Tensor:
        return processor(photo, return_tensors="pt")["pixel_values"]

    facts = {key: value for key, value in processor.to_dict().items() if key in _GEOMETRY and value}
    stated = ", ".join([type(processor).__name__, *(f"{key}={value}" for key, value in facts.items())])
    try:
        black, white = (transform(_plain(colour)) for colour in (0, 255))
    except Exception as error:  # processors that make something other than images fail in any way
        raise _not_mapped(name, stated) from error
    if black.dim() != 4 or black.shape[:2] != (1, 3):
        raise _not_mapped(name, stated)
    height, width = black.shape[2:]
    # Rescaling and normalisation are one linear function of a colour, of which these are two values.
    black, white = (image.double().mean((0, 2, 3)) for image in (black, white))
    std = tuple(round(value, 6) for value in (1 / (white - black)).tolist())
    mean = tuple(round(value, 6) for value in (-black / (white - black)).tolist())
    size = processor.size or {}
    resizes: list[int | tuple[int, int]] = [(height, width), height]
    if size.get("height") and size.get("width"):
        resizes.append((size["height"], size["width"]))
    if edge := size.get("shortest_edge"):
        shares = getattr(processor, "crop_pct", None) or 1, 224 / 256
        resizes += [edge, *(int(edge / share) for share in shares)]
    interpolation = Resampling(int(processor.resample)).name.lower()
    return _matching(_geometry(name, (height, width), mean, std, interpolation), resizes, transform, stated)


@contextmanager
def _same_random_weights() -> Iterator[None]:
    """Seed torch during a ``with`` block: workers, and commands with traces, must load the same network again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _geometry(
    name: str, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...], interpolation: str
) -> LoadedModel:
    """Return a model without a network that only resizes photos, to the size of its input."""
    crop = size[0] if size[0] == size[1] else size
    return LoadedModel(name, torch.nn.Identity(), mean, std, size, crop, interpolation)


def _matching(
    model: LoadedModel, resizes: Sequence[int | tuple[int, int]], transform: Callable[[Image], Tensor], stated: str
) -> LoadedModel:
    """Return the model with that one of `resizes` with which it agrees with a function from photos to inputs.

    Raises
    ------
    ValueError
        None agrees; `stated` is what the package says.
    """
    found: list[tuple[float, LoadedModel]] = []
    for resize in dict.fromkeys(resizes):
        with suppress(InvalidValueError):  # smaller than the crop
            changed = replace(model, resize=resize)
            found.append((max(_difference(changed, transform, _ramp(*sides)) for sides in _PROBES), changed))
    difference, best = min(found, key=lambda one: one[0], default=(np.inf, model))
    # One pixel in position and two levels of colour are matters of rounding.
    if difference > 1 / min(model.size) + 2 / 255:
        raise _not_mapped(model.name, stated)
    return best


def _difference(loaded: LoadedModel, transform: Callable[[Image], Tensor], photo: Image) -> float:
    """Return the largest difference of two preprocessings on a photo, in colours of 0 to 1."""
    ours, theirs = loaded.preprocess(photo)[0], transform(photo)
    if ours.shape != theirs.shape:
        return np.inf
    return float(((ours - theirs).abs() * torch.tensor(loaded.std).view(1, -1, 1, 1)).max())


def _ramp(width: int, height: int) -> Image:
    """Return a photo whose colours tell the position."""
    from PIL import Image

    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], 2).round().astype(np.uint8))


def _plain(colour: int) -> Image:
    from PIL import Image

    return Image.new("RGB", (64, 64), (colour,) * 3)


def _not_mapped(name: str, what: str) -> InvalidValueError:
    return InvalidValueError(
        f"the preprocessing of {name} cannot be expressed by a LoadedModel ({what}): load it in a function of your own "
        "that returns a LoadedModel, and give that as module:callable"
    )
