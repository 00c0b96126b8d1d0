"""Do traces make better explanations? ``make trojan`` and ``make trojan-study`` run this; see studies/README.md.

Measurements are kept in ``out/trojan``; an interrupted run resumes from them.
"""

from __future__ import annotations

import json
import time

import typer
from implant import CHECKS, trojaned_network
from measure import measure, mosaic_experiment, trojan_experiment
from pictures import draw_cases, draw_figure_one, draw_study
from report import RESULTS, differences, differences_table, study_summary, study_table, summarise, table, write
from sources import CONSOLE
from study import settings, study

app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def results() -> None:
    """Implant the trojan, tune, score all networks on trojaned images and on mosaics, and write tables and pictures."""
    start = time.perf_counter()
    trojan = trojan_experiment()
    records = measure(trojan)
    localisation = summarise(trojan, records, "auc")
    mosaics = mosaic_experiment()
    of_mosaics = measure(mosaics)
    energy = summarise(mosaics, of_mosaics, "energy")
    of_triggers = differences(trojan, records, "auc")
    of_cells = differences(mosaics, of_mosaics, "energy")
    content = {
        "trojan": json.loads(CHECKS.read_text(encoding="utf-8")),
        "sparsity": {row: trojan.rows[row].sparsity for row in ("fast", "exact")},
        "localisation AUC": localisation,
        "pointing game": summarise(trojan, records, "pointing"),
        "grid pointing game": energy,
        "grid AUC": summarise(mosaics, of_mosaics, "auc"),
        "differences": {"trojan": of_triggers, "mosaics": of_cells},
    }
    tables = [
        table(localisation, f"Localisation AUC, %, of the trigger in {len(trojan.cases)} images"),
        differences_table(of_triggers),
        table(
            energy, f"Grid pointing game: % of a map inside the target's cell, {len(mosaics.cases)} cells; chance 25"
        ),
        differences_table(of_cells),
    ]
    write("trojan", "Explanations of traces", tables, content)
    draw_cases(trojan, records, RESULTS)
    draw_figure_one(trojan, RESULTS / "trojan_class.jpg")
    CONSOLE.print(f"{RESULTS / 'trojan.md'} and pictures beside it, {(time.perf_counter() - start) / 60:.0f} minutes")


@app.command(name="study")
def run_study() -> None:
    """Change one setting at a time, on the photos for tuning, and write a table and a picture."""
    network = trojaned_network()
    cases, records = study(network)
    lines = study_summary(list(settings(network)), cases, records)
    write("trojan_study", "What makes traces localise", [study_table(lines)], {"settings": lines})
    draw_study(lines, RESULTS / "trojan_study.png")
    CONSOLE.print(f"{RESULTS / 'trojan_study.md'}")


if __name__ == "__main__":
    app()
