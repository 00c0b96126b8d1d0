"""The arguments of `visualize`, checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from spade_fast._util.checks import check_names, finite_floats, integer, number
from spade_fast._util.errors import InvalidTypeError, InvalidValueError
from spade_fast.attribution.visualization.features import Feature
from spade_fast.attribution.visualization.parametrizations import PARAMETRIZATIONS
from spade_fast.targets.target import Target, function_target


def features_of(given: Any) -> list[Feature | Target]:
    features = list(given) if isinstance(given, Iterable) else [given]
    if not features or not all(isinstance(one, Feature) or callable(one) for one in features):
        raise InvalidTypeError(f"feature must be a Feature, a target function or a sequence of them, got {given!r}")
    return [one if isinstance(one, Feature) else function_target(one) for one in features]


def sides(name: str, given: Any) -> tuple[int, int]:
    if not isinstance(given, tuple | list):
        raise InvalidTypeError(f"{name} must be a height and a width, got {given!r}")
    if len(given) != 2:
        raise InvalidValueError(f"{name} must be a height and a width, got {given!r}")
    return integer(name, given[0], 1), integer(name, given[1], 1)


def check_settings(count: int, method: str, steps: int, views: int, learning_rate: float | None, seed: int) -> None:
    check_names("method", [method], PARAMETRIZATIONS)
    integer("count", count, 1)
    integer("steps", steps, 0)
    integer("views", views, 1)
    if not 0 <= integer("seed", seed) < 1 << 63:
        raise InvalidValueError(f"seed must lie between 0 and 2**63 - 1, got {seed}")
    if learning_rate is not None and number("learning_rate", learning_rate, 0.0) == 0:
        raise InvalidValueError("learning_rate must be above 0, got 0")


def photo_of_size(start: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    photo = finite_floats("start", start, "channels, height, width").float().cpu()
    if len(photo) != channels:
        raise InvalidValueError(f"start must have {channels} channels, got {list(photo.shape)}")
    if float(photo.min()) < 0 or float(photo.max()) > 1:
        raise InvalidValueError("start must have colours between 0 and 1")
    if photo.shape[1:] == size:
        return photo
    return F.interpolate(photo[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
