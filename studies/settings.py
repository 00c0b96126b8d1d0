"""Which settings make traces localise: one is changed at a time, on photos that are not reported on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.layers import find_layers
from studies.localisation import predicts
from studies.shared.ladders import POINTWISE, Calibration
from studies.shared.measure import Study
from studies.shared.photos import tuning_photos
from studies.shared.rows import DENSE, Row, Source, fixed, kept, row, two_levels
from studies.shared.scores import localisation
from studies.trojan.images import trojan_cases
from studies.trojan.implant import trojaned_network

METHODS = ("saliency", "input-x-gradient", "guided-backprop", "deeplift", "lrp")
SPARSITIES = (0.3, 0.5, 0.7, 0.85)
_PHOTOS = 10


@dataclass(frozen=True)
class Setting:
    """An answer to a question, and the networks whose maps it gives."""

    question: str
    answer: str
    sources: tuple[Source, ...]


def study() -> Study:
    """Set up the study: one trigger in each of the photos."""
    network = trojaned_network()
    cases = trojan_cases(network, tuning_photos()[:_PHOTOS], each=1)
    return Study(
        name="settings",
        title="Localisation AUC, %, of the trigger, with one setting changed at a time",
        network=network,
        cases=[case for case in cases if predicts(network, case.image, case.target)],
        stages=[{"dense": row("dense network", Source(DENSE), methods=METHODS), **_rows(network)}],
        score=localisation,
        metric="auc",
    )


def _rows(network: LoadedModel) -> dict[str, Row]:
    return {
        f"{one.question}: {one.answer}": Row(f"{one.question}: {one.answer}", (one.sources,), METHODS)
        for one in settings(network)
    }


def settings(network: LoadedModel) -> Iterator[Setting]:
    """Yield all settings, question by question."""
    for kind in ("sparsegpt", "exact"):
        for sparsity in SPARSITIES:
            yield Setting(f"sparsity, {kind}", f"{sparsity:.0%}", (fixed(kind, sparsity),))
    for keep in (0.98, 0.9, 0.7, 0.5, 0.3):
        yield Setting("share kept", f"{keep:.0%}", (kept("sparsegpt", keep),))
    yield Setting("mean over shares kept", "90 and 50 %", two_levels("sparsegpt"))
    yield Setting(
        "mean over shares kept", "90, 70, 50 and 30 %", tuple(kept("sparsegpt", keep) for keep in (0.9, 0.7, 0.5, 0.3))
    )
    for images in (8, 16, 64):
        yield _two("crops", str(images), images=images)
    for low in (0.08, 0.2, 0.5):
        yield _two("crops of at least this share of the image", f"{low:.0%}", scale=(low, 1.0))
    for noise in (0.0, 0.1, 0.2):
        yield _two("noise on the crops", f"{noise:.0%} of the range", noise=noise)
    for damping in (0.01, 0.1):
        yield _two("damping", f"{damping:g}", damping=damping)
    every = find_layers(network.module)[0]
    groups = {
        "1x1": POINTWISE,
        "100 columns and more": tuple(layer.name for layer in every if layer.columns >= 100),
        "all": tuple(layer.name for layer in every),
    }
    for name, layers in groups.items():
        yield _two("layers", name, layers=layers)


def _two(question: str, answer: str, **changes: object) -> Setting:
    return Setting(question, answer, two_levels("sparsegpt", calibration=replace(Calibration(), **changes)))
