"""Figures of pictures: the best, the median and the worst of several rows, and those of the first classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from studies.shared.cases import Case
from studies.shared.records import Records
from studies.visualization.judges import Judge
from studies.visualization.painting import PictureStudy

FIRST = 12  # classes of the second figure
SHOWN = ("dense", "auto", "fourier", "fourier auto")
_SIDE = "64"  # resolution at which the judge's probability of the class is the score


def chosen(study: PictureStudy, seen: Records, row: str, cases: Sequence[Case]) -> list[tuple[str, Case, float]]:
    """Return the cases of a row with the largest, the median and the smallest score, each with its name and score."""

    def score(case: Case) -> float:
        return seen[study.key(row, case)]["picture"][_SIDE]["probability"]

    ordered = sorted(cases, key=score, reverse=True)
    picked = (("best", ordered[0]), ("median", ordered[len(ordered) // 2]), ("worst", ordered[-1]))
    return [(name, case, score(case)) for name, case in picked]


def draw_chosen(study: PictureStudy, judge: Judge, seen: Records, file: Path, rows: Sequence[str] = SHOWN) -> None:
    """Draw the best, the median and the worst picture of each row, with its class and score.

    They are chosen among the classes of which all these rows have a picture that the judge has seen.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row in study.rows]
    known = [case for case in study.cases if judge.knows(case.target)]
    cases = [case for case in known if all(study.has(row, case) and study.key(row, case) in seen for row in rows)]
    figure = Figure(figsize=(2.6 * len(rows), 8.6), dpi=100, layout="constrained")
    grid = figure.subplots(3, len(rows), squeeze=False)
    for column, row in enumerate(rows):
        for axes, (name, case, score) in zip(grid[:, column], chosen(study, seen, row, cases), strict=True):
            axes.imshow(study.open(row, case)["picture"].permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            axes.set_xlabel(f"{name}: “{study.network.class_name(case.target)}”, {score:.0%}", fontsize=8)
        grid[0, column].set_title(study.rows[row].title, fontsize=9)
    figure.savefig(file)


def draw_first(study: PictureStudy, file: Path, rows: Sequence[str] = SHOWN[:2]) -> None:
    """Draw the pictures of the first classes, one row of the figure for each row; none is left out."""
    from matplotlib.figure import Figure

    cases = study.cases[:FIRST]
    figure = Figure(figsize=(1.7 * len(cases), 2.0 * len(rows)), dpi=80, layout="constrained")
    grid = figure.subplots(len(rows), len(cases), squeeze=False)
    for line, row in zip(grid, rows, strict=True):
        for axes, case in zip(line, cases, strict=True):
            axes.set(xticks=[], yticks=[])
            if study.file(row, case).is_file():  # pruning may have cut the class off
                axes.imshow(study.open(row, case)["picture"].permute(1, 2, 0).numpy())
        line[0].set_ylabel(study.rows[row].title, fontsize=9)
    for axes, case in zip(grid[0], cases, strict=True):
        axes.set_title(study.network.class_name(case.target), fontsize=9)
    figure.savefig(file)
