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
METHODS = ("Saliency", "Guided Grad-CAM", "Grad-CAM")


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
    assert "Trace(sample_id='0', 23 layers, sparsity=0.6000)" in text(run["trace"])
    rows = re.findall(r"^ +(\d+)% +([\d.]+)% +(kept|LOST): ", text(run["kept"]), re.M)
    assert [row[0] for row in rows] == ["40", "60", "80"]
    assert (rows[0][2], rows[-1][2]) == ("kept", "LOST")
    assert float(rows[0][1]) > 50 and float(rows[-1][1]) < 10


def test_mosaics(run):
    rows = re.findall(r"^(.+?)  +(Dense network|FastSPADE, \d+% removed) +([\d.]+)", text(run["scores"]), re.M)
    networks = ["Dense network", "FastSPADE, 30% removed", "FastSPADE, 60% removed"]
    assert [row[:2] for row in rows] == [(method, network) for method in METHODS for network in networks]
    scores = [float(row[2]) for row in rows]
    assert all(0 <= score <= 1 for score in scores)
    # The class that is asked for is seen: a cell that is not the class's would get less than chance from a CAM.
    assert all(score > 0.5 for score, (method, _, _) in zip(scores, rows, strict=True) if method != "Saliency")
    assert re.findall(r"decision on (\d) of 1 mosaics", text(run["scores"]))


def test_tuning(run):
    before, after = map(float, re.search(r"score ([\d.]+) -> ([\d.]+)", text(run["tune"])).groups())
    same = float(re.search(r"same share of each layer instead: ([\d.]+)", text(run["tune"])).group(1))
    assert before < after <= 1 and 0 <= same <= 1


@pytest.mark.parametrize("name", ["predict", "maps", "mosaics", "feature"])
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
    mosaics = int(re.search(r"MOSAICS = 1 if QUICK else (\d+)", cells["numbers"].source).group(1))
    assert f"mean of {4 * mosaics} questions" in text(cells["scores"])


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
