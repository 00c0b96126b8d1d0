"""The notebook runs with small numbers, and what is kept in it comes from one whole run of the same cells.

``python tests/test_notebook.py`` (``make notebook``) is that run.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "spade.ipynb"
ROWS = [
    "Dense network",
    "SmoothGrad",
    "Automatic trace",
    "Mean of two traces",
    "... and SmoothGrad",
    "SmoothGrad on a trace",
    "Control: another's traces",
    "Control: centre first",
]


def execute(folder):
    """Run the notebook from its file; raises the error of a cell."""
    notebook = nbformat.read(NOTEBOOK, 4)
    settings = {"timeout": 600, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources={"metadata": {"path": folder}}, **settings).execute()
    notebook.metadata.language_info = {"name": "python"}  # without the version
    return notebook


def code_cells(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def text(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def kinds(cell):
    """What a cell showed, without its numbers."""
    return [output.get("name") or sorted(output.data) for output in cell.outputs]


@pytest.fixture(scope="module")
def kept():
    return nbformat.read(NOTEBOOK, 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its cells, run with small numbers in an empty folder."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPADE_FAST_NOTEBOOK", "quick")
        notebook = execute(folder)
    assert not list(folder.iterdir())
    return code_cells(notebook)


def test_decision(run):
    assert re.match(r" *69\.\d% +Bullmastiff\n", text(run["predict"]))
    removed, kept, dense = map(float, re.findall(r"([\d.]+)%", text(run["trace"])))
    assert 30 < removed < 90 and 69 < dense < 70 and kept >= 0.9 * dense
    rows = re.findall(r"^(automatic|\d\d% everywhere) +(\d+)% +([\d.]+)% +(kept|LOST)", text(run["kept"]), re.M)
    assert [row[0] for row in rows] == ["automatic", "40% everywhere", "60% everywhere", "80% everywhere"]
    assert [float(row[1]) for row in rows] == [removed, 40, 60, 80]
    assert float(rows[0][2]) == kept
    assert (rows[0][3], rows[1][3], rows[-1][3]) == ("kept", "kept", "LOST")


def test_the_mean_is_over_two_levels(run):
    levels = re.findall(r"^keep=([\d.]+): P=([\d.]+)%, (\d+)% removed", text(run["maps"]), re.M)
    (keep, more, mild), (half, less, sparse) = [map(float, level) for level in levels]
    assert (keep, half) == (0.9, 0.5)
    assert more >= less >= 0.5 * 69 and mild <= sparse
    assert str(more) in text(run["trace"])  # the first is the automatic trace


def test_insertion(run):
    rows = re.findall(r"^(.{25}) +([\d.]+)   (.*)$", text(run["scores"]), re.M)
    assert [row[0].rstrip() for row in rows] == ROWS
    areas = {row[0].rstrip(): float(row[1]) for row in rows}
    for name, _, differences in rows:
        found = re.findall(r"([+-][\d.]+) \[ *([+-][\d.]+), *([+-][\d.]+)\] +(\d)/2", differences)
        baselines = [one for one in ("Dense network", "SmoothGrad") if one != name.rstrip()]
        assert len(found) == len(baselines)
        for (difference, low, high, above), baseline in zip(found, baselines, strict=True):
            assert float(difference) == pytest.approx(areas[name.rstrip()] - areas[baseline], abs=0.11)
            assert float(low) <= float(difference) <= float(high)
            assert int(above) < 2 or float(low) >= 0  # of two photos, the interval starts at the lower
    assert all(0 < area < 100 for area in areas.values())
    decisions = re.findall(r"^keep=(0\.[95]) .* decision kept on (\d) of 2 photos", text(run["scores"]), re.M)
    assert decisions[0] == ("0.9", "2") and decisions[1][0] == "0.5"


@pytest.mark.parametrize("name", ["predict", "trace", "maps", "insertion", "feature"])
def test_figures(run, kept, name):
    for cell in (run[name], code_cells(kept)[name]):
        (figure,) = (output.data for output in cell.outputs if output.output_type == "display_data")
        assert len(figure["image/jpeg"]) > 10_000


def test_kept_outputs_belong_to_these_cells(run, kept):
    cells = code_cells(kept)
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    assert {name: kinds(cell) for name, cell in cells.items()} == {name: kinds(cell) for name, cell in run.items()}
    assert {output.output_type for cell in cells.values() for output in cell.outputs} == {"stream", "display_data"}
    assert "stderr" not in [kind for cell in cells.values() for kind in kinds(cell)]
    # With the numbers of readers, not with the small ones.
    photos = re.search(r"PHOTOS = 2 if QUICK else (\d+)", cells["numbers"].source).group(1)
    assert f"n = {photos} photos" in text(cells["scores"])


def test_kept_notebook_is_small_and_says_nothing_of_its_machine(kept):
    assert NOTEBOOK.stat().st_size < 1_500_000
    assert kept.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in kept.cells:
        assert cell.metadata == {}  # no times of execution
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text")})
            assert set(data) <= {"image/jpeg", "text/plain"}
            assert not re.search(r"(^|[\s'\"(=])(/|~/|[A-Za-z]:\\)\w|Warning|\r", data["text/plain"])


if __name__ == "__main__":
    nbformat.write(execute(NOTEBOOK.parent), NOTEBOOK)
