"""The rows of a study's tables: which networks' maps are compared, and by which rule their weights are chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from studies.shared.ladders import Calibration

GRADIENTS = ("saliency", "input-x-gradient", "guided-backprop")
EIGHT = ("saliency", "input-x-gradient", "deeplift", "lrp", "guided-backprop", "guided-gradcam", "gradcam", "layercam")
EQUAL = 0.5  # the sparsity of the comparison at equal sparsity
KEEPS = (0.9, 0.5)  # the shares of the dense network's score that the traces of a two-level mean keep
DEFAULT = Calibration()
NOISE = 0.2  # of SmoothGrad, as a share of the image's range


@dataclass(frozen=True)
class Weights:
    """Which weights the network has; the dense ones, if nothing is given.

    Attributes
    ----------
    kind
        ``"sparsegpt"`` or ``"exact"`` (a trace), ``"magnitude"``, ``"random"``, ``"pathway"`` (which silences neurons
        instead), or ``""``.
    sparsity
        One share of weights to remove from each layer, or pairs of a layer's name and its share.
    keep
        Instead of a sparsity: the share of the dense network's score to keep.
    whose
        The image for which the ladder is made: ``"own"``, or one of the study's others.
    goal
        What is to be kept: the probability of the ``"case"``'s class in its image, that of its ``"rival"``, or that of
        the class of the image for which the ladder is made (``"theirs"``), in that image.
    calibration
        How the ladder is made.
    """

    kind: str = ""
    sparsity: float | tuple[tuple[str, float], ...] | None = None
    keep: float | None = None
    whose: str = "own"
    goal: str = "case"
    calibration: Calibration = DEFAULT


DENSE = Weights()


@dataclass(frozen=True)
class Source:
    """Maps of a network: plain, or by SmoothGrad of ``"magnitudes"`` (the package's) or ``"signed"`` attributions."""

    weights: Weights = DENSE
    smooth: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a table: a kind of map.

    Attributes
    ----------
    title
        Name in the tables.
    groups
        Whose maps are averaged: each group's maps first, then the groups' means. Maps are divided by their sums before.
    methods
        The attribution methods.
    plain
        Instead of groups, the name of a map without a network.
    """

    title: str
    groups: tuple[tuple[Source, ...], ...] = ()
    methods: tuple[str, ...] = GRADIENTS
    plain: str = ""

    def sources(self) -> Iterator[Source]:
        """Yield all sources, group by group."""
        for group in self.groups:
            yield from group


Rows = Mapping[str, Row]
SMOOTH = Source(DENSE, smooth="magnitudes")
SIGNED = Source(DENSE, smooth="signed")


def row(title: str, *sources: Source, methods: tuple[str, ...] = GRADIENTS) -> Row:
    """Return the row of the mean of sources."""
    return Row(title, (sources,), methods)


def fixed(kind: str, sparsity: float | Mapping[str, float], calibration: Calibration = DEFAULT) -> Source:
    """Return a network with given sparsities."""
    pairs = tuple(sparsity.items()) if isinstance(sparsity, Mapping) else sparsity
    return Source(Weights(kind, sparsity=pairs, calibration=calibration))


def kept(
    kind: str, keep: float, *, whose: str = "own", goal: str = "case", calibration: Calibration = DEFAULT
) -> Source:
    """Return a network pruned as far as it keeps a share of the dense network's score."""
    return Source(Weights(kind, None, keep, whose, goal, calibration))


def two_levels(
    kind: str, *, whose: str = "own", goal: str = "case", calibration: Calibration = DEFAULT
) -> tuple[Source, ...]:
    """Return the networks of a two-level mean."""
    return tuple(kept(kind, keep, whose=whose, goal=goal, calibration=calibration) for keep in KEEPS)


def draws(kind: str, count: int, images: int) -> tuple[Source, ...]:
    """Return the networks of a two-level mean over several draws of calibration images."""
    calibrations = [Calibration(images=images, draw=draw) for draw in range(count)]
    return tuple(source for each in calibrations for source in two_levels(kind, calibration=each))


def smoothed(*sources: Source) -> tuple[Source, ...]:
    """Return the same networks for SmoothGrad: calibrated with its noise."""
    return tuple(
        Source(replace(one.weights, calibration=replace(one.weights.calibration, noise=NOISE)), smooth="magnitudes")
        for one in sources
    )
