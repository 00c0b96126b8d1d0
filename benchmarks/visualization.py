"""Feature visualisation against Horama, the MACO of its authors: time, and how strongly the pictures excite the class.

``measure`` writes ``visualization.json``, ``report`` makes the table of ``visualization.md`` from that alone. Horama
(``pip install horama einops``) looks for its table of magnitudes in the working folder before it downloads it; it gets
the package's table, so that both have the same, and the range of the network's colours, which it does not know.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import THREADS, machine
from torch import Tensor

from spade_fast import Feature, visualize
from spade_fast._util.modes import evaluation_mode
from spade_fast.attribution.visualization.natural_images import magnitudes
from spade_fast.attribution.visualization.parametrizations import Maco
from spade_fast.inputs.networks import LoadedModel, load_model

RESULTS = Path(__file__).parent / "results"
CLASSES = {"bullmastiff": 243, "monarch": 323, "lion": 291, "teapot": 849, "volcano": 980, "goldfish": 1}
STEPS, VIEWS = 128, 4
_SIDE = 280  # of pictures of which the network sees 224 pixels
_HORAMA_SIDE = 1280  # Horama's default
_HORAMA_BOX = (0.2, 0.25)  # its default, which gives views of .25 to .30 of the picture's side
_SEED = 0
Drawn = tuple[Tensor, float]  # a picture as colours between 0 and 1, and the seconds it took


def measure() -> None:
    """Draw all classes with all implementations in turn."""
    torch.set_num_threads(THREADS)
    network = load_model("demo")
    network.module.requires_grad_(False)
    rows: list[dict[str, Any]] = []
    for name, target in CLASSES.items():
        for which, draw in _implementations().items():
            picture, seconds = draw(network, target)
            rows.append({"class": name, "which": which, "seconds": seconds, **_judged(network, picture, target)})
            print(rows[-1])
    content = {"steps": STEPS, "views": VIEWS, "machine": machine(), "rows": rows}
    (RESULTS / "visualization.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def report() -> None:
    """Write the table."""
    content = json.loads((RESULTS / "visualization.json").read_text(encoding="utf-8"))
    rows = content["rows"]
    ours = {row["class"]: row["seconds"] for row in rows if row["which"] == "spade_fast, maco"}
    lines = [
        f"# Feature visualisation, {content['steps']} steps of {content['views']} views",
        "",
        f"EfficientNet-Lite0, {len(ours)} classes, {THREADS} threads; medians. Logit and probability: the network's,",
        "for the whole picture at its resolution, and reduced to 64 pixels.",
        "",
        "| | seconds | ratio to ours | logit | probability | at 64 pixels |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for which in dict.fromkeys(row["which"] for row in rows):
        own = [row for row in rows if row["which"] == which]
        ratio = statistics.median(row["seconds"] / ours[row["class"]] for row in own)
        middle = {key: statistics.median(row[key] for row in own) for key in ("seconds", "logit", "full", "small")}
        lines.append(
            f"| {which} | {middle['seconds']:.1f} | {ratio:.2f} | {middle['logit']:.1f} | {middle['full']:.2f} | "
            f"{middle['small']:.2f} |"
        )
    (RESULTS / "visualization.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _implementations() -> dict[str, Callable[[LoadedModel, int], Drawn]]:
    found: dict[str, Callable[[LoadedModel, int], Drawn]] = {
        f"spade_fast, {method}": lambda network, target, method=method: _ours(network, target, method)
        for method in ("maco", "fourier")
    }
    if importlib.util.find_spec("horama") is None:
        print("horama is missing: pip install horama einops")
        return found
    sides = {"views of our sizes": (_SIDE, box_of(*Maco.views.zoom)), "its own views": (_HORAMA_SIDE, _HORAMA_BOX)}
    for name, (side, box) in sides.items():
        found[f"Horama, maco, {name}"] = lambda network, target, side=side, box=box: _horama(network, target, side, box)
    return found


def box_of(low: float, high: float) -> tuple[float, float]:
    """Return Horama's ``box_size`` for views with sides from `low` to `high`.

    It draws sides as ``u * (box[1] - box[0]) + box[1]`` with `u` between 0 and 1: from the second number upwards.
    """
    return 2 * low - high, low


def colour_range(network: LoadedModel) -> tuple[float, float]:
    """Return the least and the largest value of the network's input."""
    pairs = list(zip(network.mean, network.std, strict=True))
    return min((0 - mean) / std for mean, std in pairs), max((1 - mean) / std for mean, std in pairs)


def _ours(network: LoadedModel, target: int, method: str) -> Drawn:
    begin = time.perf_counter()
    made = visualize(
        network.module,
        Feature(target),
        method=method,
        size=(_SIDE, _SIDE),
        view=network.size,
        mean=network.mean,
        std=network.std,
        steps=STEPS,
        views=VIEWS,
        seed=_SEED,
    )
    return made.pictures[0], time.perf_counter() - begin


def _horama(network: LoadedModel, target: int, side: int, box: tuple[float, float]) -> Drawn:
    import horama

    with _horama_table(side), evaluation_mode(network.module), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        begin = time.perf_counter()
        picture, _ = horama.maco(
            lambda images: network.module(images)[:, target].mean(),
            total_steps=STEPS,
            image_size=side,
            model_input_size=network.size[0],
            crops_per_iteration=VIEWS,
            box_size=box,
            values_range=colour_range(network),
            device="cpu",
        )
        seconds = time.perf_counter() - begin
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (network.mean, network.std))
    return (picture.detach() * std + mean).clamp(0, 1), seconds


@contextlib.contextmanager
def _horama_table(side: int) -> Iterator[None]:
    """Work in a folder that has a table of magnitudes."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "spectrum_decorrelated.npy", magnitudes(3, (side, side)).numpy())
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@torch.no_grad()
def _judged(network: LoadedModel, picture: Tensor, target: int) -> dict[str, float]:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (network.mean, network.std))
    found = {}
    with evaluation_mode(network.module):
        for name, side in (("full", None), ("small", (64, 64))):
            shown = picture[None] if side is None else _resized(picture[None], side)
            scores = network.module((_resized(shown, network.size) - mean) / std)[0]
            found[name] = float(scores.softmax(0)[target])
            if side is None:
                found["logit"] = float(scores[target])
    return found


def _resized(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(pictures, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["measure", "report"])
    {"measure": measure, "report": report}[parser.parse_args().step]()
