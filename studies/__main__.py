"""Do traces make better explanations? One command per study; studies/README.md describes them.

Measurements are kept in ``out/studies``; an interrupted run resumes from them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from studies import insertion, localisation, mosaics, settings, triggers
from studies.networks.lite import efficientnet_lite
from studies.pictures import draw_cases, draw_classes, draw_settings
from studies.shared.measure import measure
from studies.shared.photos import CONSOLE
from studies.shared.report import RESULTS, share_of_tuning, summarise, tables, write
from studies.spectrum import write_spectrum
from studies.trojan.implant import CHECKS
from studies.visualization import breeds, facets, forced_choice, recognition
from studies.visualization.comparing import Comparison, comparison_tables
from studies.visualization.figure import draw_chosen, draw_first
from studies.visualization.judges import Judge


class Painted(str, Enum):
    """Networks whose pictures are made."""

    lite0 = "lite0"
    lite1 = "lite1"


app = typer.Typer(add_completion=False, help=__doc__)
Workers = Annotated[int, typer.Option(help="Processes, of one thread each.")]
Stages = Annotated[int | None, typer.Option(help="Measure and report only the first stages.")]
Network = Annotated[Painted, typer.Argument(help="The network whose pictures are made.")]


@app.command()
def trojan(workers: Workers = 2, stages: Stages = None) -> None:
    """Which maps find the trigger of a trojan?"""
    study, records = measure(localisation.study, workers, stages)
    summary = summarise(study, records)
    checks = json.loads(CHECKS.read_text(encoding="utf-8"))
    share = share_of_tuning(summary, "fast auto", "fast tuned")
    sentence = f"Without labels, automatic sparsity has {share:.0f} % of the gain of tuning with masks.\n"
    parts = [*tables(summary), sentence]
    content = {"trojan": checks, "automatic, share of tuned": share, **summary}
    path = write("trojan", "Which maps find the trigger of a trojan?", parts, content)
    if stages is None:
        draw_cases(study, records)
        draw_classes(study)
    CONSOLE.print(f"{path}")


@app.command(name="settings")
def run_settings(workers: Workers = 2, stages: Stages = None) -> None:
    """Which settings make traces localise, one at a time, on other photos?"""
    study, records = measure(settings.study, workers, stages)
    summary = summarise(study, records)
    path = write("trojan_study", "What makes traces localise?", tables(summary), summary)
    draw_settings(summary, RESULTS / "trojan_study.png")
    CONSOLE.print(f"{path}")


@app.command(name="triggers")
def run_triggers(workers: Workers = 2, stages: Stages = None) -> None:
    """Two triggers in one photo: do the maps of two classes differ?"""
    study, records = measure(triggers.study, workers, stages)
    summary = summarise(study, records)
    parts = {part: summarise(of_part, records) for part, of_part in triggers.by_probability(study).items()}
    texts = [*tables(summary), *(text for of_part in parts.values() for text in tables(of_part))]
    path = write("triggers", "Two triggers in one photo", texts, {**summary, "by probability": parts})
    CONSOLE.print(f"{path}")


@app.command(name="mosaics")
def run_mosaics(workers: Workers = 2, stages: Stages = None) -> None:
    """The grid pointing game."""
    study, records = measure(mosaics.study, workers, stages)
    summary = summarise(study, records)
    path = write("mosaics", "The grid pointing game", tables(summary), summary)
    CONSOLE.print(f"{path}")


@app.command(name="insertion")
def run_insertion(workers: Workers = 2, stages: Stages = None) -> None:
    """Insertion and deletion on networks as they were published."""
    summaries = {}
    for which in insertion.NETWORKS:
        study, records = measure(insertion.STUDIES[which], workers, stages)
        summaries[which] = summarise(study, records)
    parts = [table for summary in summaries.values() for table in tables(summary)]
    path = write("insertion", "Insertion and deletion", parts, summaries)
    CONSOLE.print(f"{path}")


@app.command(name="recognition")
def run_recognition(network: Network = Painted.lite0, workers: Workers = 2, stages: Stages = None) -> None:
    """Do other networks recognise pictures of classes, on dense networks, traces and controls?"""
    study, _ = measure(recognition.STUDIES[network.value], workers, stages)
    judge = Judge(efficientnet_lite(2))
    name, title = f"recognition_{network.value}", f"Are pictures of classes of {study.network.name} recognised?"
    path = _write_comparisons(name, title, recognition.ABOUT, recognition.comparisons(study, judge))
    draw_chosen(study, judge, recognition.look(study, judge), RESULTS / f"{name}.jpg")
    draw_first(study, RESULTS / f"{name}_first.jpg")
    CONSOLE.print(f"{path} and pictures beside it")


@app.command(name="breeds")
def run_breeds(workers: Workers = 2) -> None:
    """Does a network of another family recognise pictures of breeds of dogs?"""
    found = []
    for which in breeds.NETWORKS:
        study, _ = measure(breeds.STUDIES[which], workers)
        for judge in breeds.judges_of(which):
            found += recognition.comparisons(study, judge, breeds.COMPARISONS)
    about = f"{breeds.ABOUT}\n{recognition.ABOUT}"
    CONSOLE.print(f"{_write_comparisons('breeds', 'Are pictures of breeds of dogs recognised?', about, found)}")


@app.command(name="facets")
def run_facets(workers: Workers = 2) -> None:
    """A class with two causes: do pictures on traces show the cause that is in the photo?"""
    measure(facets.stand_ins, workers)
    study, _ = measure(facets.study, workers)
    found = facets.compare(study, Judge(efficientnet_lite(2)), facets.images_of_classes())
    title = "Which cause of a class does a picture show?"
    CONSOLE.print(f"{_write_comparisons('facets', title, facets.ABOUT, found)}")


@app.command(name="choice")
def run_choice(network: Network = Painted.lite0, workers: Workers = 2, stages: Stages = None) -> None:
    """Which of two crops excites a unit? A network tells from the unit's picture, in place of people."""
    study, _ = measure(forced_choice.STUDIES[network.value], workers, stages)
    found = forced_choice.compare(study, Judge(efficientnet_lite(2), layer=forced_choice.JUDGED_LAYER))
    title = f"Which crop excites the unit of {study.network.name}?"
    CONSOLE.print(f"{_write_comparisons(f'choice_{network.value}', title, forced_choice.ABOUT, [found])}")


def _write_comparisons(name: str, title: str, about: str, found: Sequence[Comparison]) -> Path:
    summaries = [one.summary() for one in found]
    texts = [about, *(text for summary in summaries for text in comparison_tables(summary))]
    return write(name, title, texts, {"comparisons": summaries})


@app.command()
def spectrum() -> None:
    """Measure the spectrum of natural images that feature visualisation uses."""
    CONSOLE.print(f"{write_spectrum()}")


if __name__ == "__main__":
    app()
