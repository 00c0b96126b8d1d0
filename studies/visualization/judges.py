"""Networks look at pictures that were not optimised for them: which class they see, and which pictures are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast.inputs.networks import LoadedModel
from studies.shared.cases import normalise

SIDES: Mapping[str, int | None] = {"full": None, "96": 96, "64": 64, "48": 48}  # resolutions of a square, in pixels
FEATURE_SIDES = {name: SIDES[name] for name in ("full", "64")}  # those at which features are compared


@dataclass(frozen=True)
class Judge:
    """A network that looks at pictures.

    Attributes
    ----------
    network
        The network.
    classes
        Its class for a class of the network that pictures show; None if the classes are the same.
    layer
        Name of the module whose output, averaged over positions, tells what a picture is like; None for what the last
        linear layer takes.
    """

    network: LoadedModel
    classes: Mapping[int, int] | None = None
    layer: str | None = None

    def knows(self, target: int) -> bool:
        """Tell whether it has a class."""
        return self.classes is None or target in self.classes

    def own(self, target: int) -> int:
        """Return its own index of a class."""
        return target if self.classes is None else self.classes[target]

    def sees(self, pictures: Tensor, side: int | None = None) -> Tensor:
        """Return its input for pictures ``[N, 3, H, W]``, reduced to `side` before they are enlarged to its own size.

        The photos of its training were squares that filled its input, as these pictures do.
        """
        if side is not None:
            pictures = resized(pictures, (side, side))
        return normalise(self.network, resized(pictures, self.network.size))


def resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Return pictures ``[N, 3, H, W]`` in another size."""
    if pictures.shape[-2:] == size:
        return pictures
    return F.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def rank_of(found: Tensor, target: int) -> int:
    """Return how many other classes have at least the probability of one, of probabilities ``[classes]``."""
    return int((found >= found[target]).sum()) - 1


@torch.no_grad()
def verdicts(judge: Judge, picture: Tensor, target: int) -> dict[str, dict[str, float]]:
    """Return the rank and probability of a class in a picture ``[3, H, W]`` at each resolution of `SIDES`."""
    seen = torch.cat([judge.sees(picture[None], side) for side in SIDES.values()])
    found = judge.network.module(seen).softmax(1)
    own = judge.own(target)
    return {
        side: {"rank": rank_of(one, own), "probability": float(one[own])}
        for side, one in zip(SIDES, found, strict=True)
    }


@torch.no_grad()
def features(judge: Judge, pictures: Tensor, side: int | None = None) -> Tensor:
    """Return what pictures ``[N, 3, H, W]``, reduced to `side`, are like to the judge ``[N, F]``."""
    module, taken = judge.network.module, []
    if judge.layer is None:
        last = [one for one in module.modules() if isinstance(one, nn.Linear)][-1]
        handle = last.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    else:
        read = module.get_submodule(judge.layer)
        handle = read.register_forward_hook(lambda *given: taken.append(given[-1].flatten(2).mean(2)))
    try:
        for picture in pictures.split(1):
            judge.network.module(judge.sees(picture, side))
    finally:
        handle.remove()
    return torch.cat(taken)


def features_of_each(judge: Judge, pictures: Sequence[Tensor | None], side: int | None) -> list[Tensor | None]:
    """Return the features ``[F]`` of each picture ``[3, H, W]``; None where there is no picture."""
    return [None if one is None else features(judge, one[None], side)[0] for one in pictures]


def likeness(feature: Tensor, examples: Tensor) -> float:
    """Return the mean cosine of an image's features ``[F]`` with those of examples ``[N, F]``."""
    return float(F.cosine_similarity(feature[None], examples).mean())
