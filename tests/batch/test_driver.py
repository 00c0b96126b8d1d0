"""Batches in one process: what the samples are, the folder, failures, and the command."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from batches import claimed_by_another, contents, make_photos, no_leftovers, run_small, settings, small_job  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from spade_fast._util.sigterm import exit_on_sigterm  # noqa: E402
from spade_fast.batch import OutputError, run, worker  # noqa: E402
from spade_fast.batch.locks import Claims  # noqa: E402
from spade_fast.batch.memory import count_workers, free_bytes, samples_together  # noqa: E402
from spade_fast.batch.results import read_header  # noqa: E402
from spade_fast.batch.samples import Items, file_name, find_samples  # noqa: E402
from spade_fast.batch.schedule import Schedule, Starts  # noqa: E402
from spade_fast.batch.store import Store  # noqa: E402
from spade_fast.batch.worker import Outcome, Worker, patiently  # noqa: E402
from spade_fast.cli.app import app  # noqa: E402
from spade_fast.cli.trace_photo import trace_photo  # noqa: E402
from spade_fast.inputs.networks import load_model  # noqa: E402
from spade_fast.inputs.photo import open_photo  # noqa: E402
from spade_fast.inputs.setup import Setup  # noqa: E402
from spade_fast.pruning import PruneConfig  # noqa: E402
from spade_fast.pruning.traces import Trace  # noqa: E402


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_photos(tmp_path / "photos", 5)
    return tmp_path / "photos"


# Samples


def test_inputs(photos, tmp_path):
    ids = ["00.png", "01.png", "03.png", "04.png", "sub/02.png"]
    (photos / "notes.txt").write_text("no photo")
    assert find_samples(photos).ids == find_samples(f"{photos}/**/*.png").ids == ids
    assert find_samples(f"{photos}/*/*.png").ids == ids[-1:] and find_samples(photos / "00.png").ids == ids[:1]
    (tmp_path / "list.csv").write_text("id,path,label\na/1,photos/00.png,3\nb,photos/sub/02.png,4\n")
    listed = find_samples(tmp_path / "list.csv")
    assert listed.ids == ["a/1", "b"] and listed.paths == [str(photos / "00.png"), str(photos / "sub/02.png")]
    (tmp_path / "plain.csv").write_text("path\nphotos/00.png\n")
    assert find_samples(tmp_path / "plain.csv").ids == ["photos/00.png"]


def test_datasets(small, photos):
    loaded = load_model(small)
    image = Image.open(photos / "00.png")
    tensor = loaded.preprocess(image)[0]
    items = find_samples([image, (tensor[0], 3), "photo", tensor[0, 0], (tensor[0] * 255).byte()] + [image] * 6)
    assert isinstance(items, Items) and items.ids == [str(index) for index in range(11)]
    assert torch.equal(items.load(0, loaded), tensor) and torch.equal(items.load(1, loaded), tensor)
    for index in (2, 3, 4):
        with pytest.raises(TypeError, match="the dataset must give"):
            items.load(index, loaded)
    Path(sys.path[0], "small_data.py").write_text(f"def data(): return [{str(photos / '00.png')!r}] * 3")
    assert find_samples("small_data:data").ids == ["0", "1", "2"]


def test_photos_of_16_bits(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(open_photo(tmp_path / "deep.png"))
    assert (pixels == (values // 257)[:, :, None]).all()


def test_links_in_folders(photos, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/far.png").write_bytes((photos / "00.png").read_bytes())
    (photos / "linked").symlink_to(tmp_path / "elsewhere")
    (photos / "loop").symlink_to(photos)
    (photos / "nothing.png").symlink_to(tmp_path / "gone.png")
    found = find_samples(photos)
    assert found.ids == ["00.png", "01.png", "03.png", "04.png", "linked/far.png", "nothing.png", "sub/02.png"]
    assert found.size(0) == (photos / "00.png").stat().st_size and found.size(5) is None
    (photos / "sub/02.png").unlink()
    (photos / "sub").rmdir()
    (photos / "sub").touch()
    assert found.size(6) is None


def test_ids_do_not_depend_on_the_order_of_folders(photos, monkeypatch):
    (photos / "also").symlink_to(photos / "sub")
    walk = os.walk

    def backwards(*arguments, **options):
        for place, folders, files in walk(*arguments, **options):
            folders.sort(reverse=True)
            yield place, folders, files

    monkeypatch.setattr(os, "walk", backwards)
    assert find_samples(photos).ids[-1] == "also/02.png"


def failing_data():
    raise RuntimeError("no such split")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("latin.csv", ValueError, "latin.csv is not a list of comma-separated values in UTF-8"),
        ("long.csv", ValueError, "long.csv is not a list of comma-separated values"),
        ("test_driver:failing_data", ValueError, "test_driver:failing_data failed with RuntimeError: no such split"),
        ("absent", FileNotFoundError, "no such file or folder: absent"),
        ("absent/*.png", FileNotFoundError, "no file matches"),
        ("empty", FileNotFoundError, "no images in folder empty"),
        ("columns.csv", ValueError, "must have a column 'path', got 'file'"),
        ("none.csv", ValueError, "no samples"),
        ("hole.csv", ValueError, "no path or no id in row 2"),
        ("twice.csv", ValueError, "1 occur more than once, the first is 'a'"),
        (5, TypeError, "got int"),
        ("no_such_module:data", ValueError, "no_such_module:data is neither a file nor a function"),
        ("json:data", ValueError, "json:data is neither a file nor a function"),
        ("../a:b", FileNotFoundError, "no such file or folder"),
        ([], ValueError, "no samples"),
    ],
)
def test_bad_inputs(tmp_path, monkeypatch, given, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "columns.csv").write_text("file\na\n")
    (tmp_path / "none.csv").write_text("path\n")
    (tmp_path / "hole.csv").write_text("id,path\na,b\nc,\n")
    (tmp_path / "twice.csv").write_text("id,path\na,b\na,c\n")
    (tmp_path / "latin.csv").write_bytes(b"path\n\xe9.png\n")
    (tmp_path / "long.csv").write_text(f"path\n{'x' * 200_000}\n")
    with pytest.raises(error, match=message):
        find_samples(given)


def test_ids_stay_in_the_folder(small, photos, tmp_path):
    ids = ["../../up", "/etc/passwd", "..", ".", ".hidden", "a/b", "a%2Fb", "x" * 400, "x" * 401, "Ω\n", "con:*?"]
    names = [file_name(name) for name in ids]
    assert len(set(names)) == len(ids)
    assert all(len(name) <= 200 and "/" not in name and name[0] != "." and name.isascii() for name in names)
    lines = [f'"{name}",photos/00.png' for name in ids]
    (tmp_path / "list.csv").write_text("\n".join(["id,path", *lines]), encoding="utf-8")
    before = {path for path in tmp_path.rglob("*") if "out" not in path.parts}
    assert run_small(tmp_path / "list.csv", tmp_path / "out", small).finished == len(ids)
    assert {path for path in tmp_path.rglob("*") if "out" not in path.parts} == before
    made = [Trace.load(path) for path in (tmp_path / "out/traces").iterdir()]
    assert sorted(trace.sample_id for trace in made) == sorted(ids)


# Results


def test_traces_are_those_of_the_trace_command(small, photos, tmp_path):
    summary = run_small(photos, tmp_path / "out", small)
    assert (summary.total, summary.before, summary.finished, summary.left, summary.failed) == (5, 0, 5, 0, {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config, setup = PruneConfig(sparsity=0.5, seed=0), Setup(small, augmentations=6)
    alone = trace_photo(photos / "00.png", tmp_path / "alone.safetensors", config, setup)
    torch.set_num_threads(threads)
    made = Trace.load(tmp_path / "out/traces/00.png.safetensors")
    assert made.layers == alone.layers and made.header["settings"] == alone.header["settings"]
    assert all(torch.equal(made.weight(name), alone.weight(name)) for name in made.layers)
    model = load_model(small).module
    assert made.decision.class_before in range(4) and made.header["sparsity"] == made.sparsity
    with made.applied(model):
        pass
    report = json.loads((tmp_path / "out/reports/sub%2F02.png.json").read_text())
    assert report["id"] == "sub/02.png" and set(report["seconds"]) >= {"load", "augment", "solve", "explain"}


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_results_depend_on_neither_order_nor_group(small, photos, tmp_path, solver):
    options = settings(small, solver=solver, methods=["saliency", "gradcam"], layers=["*"])
    run(photos, tmp_path / "together", **options, workers=0, samples_per_solve=5)
    (tmp_path / "list.csv").write_text(
        "path,id\n" + "".join(f"photos/{name},{name}\n" for name in ("04.png", "00.png"))
    )
    run(tmp_path / "list.csv", tmp_path / "two", **options, workers=0, samples_per_solve=1)
    every, two = contents(tmp_path / "together"), contents(tmp_path / "two")
    assert len(every) == 10 and len(two) == 4 and all(every[name] == two[name] for name in two)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_automatic_results_depend_on_neither_group_nor_interruption(small, photos, tmp_path, monkeypatch, solver):
    options = settings(small, solver=solver, layers=["*"], sparsity="auto", keep=(0.99, 0.5), draws=2)
    options.update(methods=["saliency"], workers=0)
    run(photos, tmp_path / "alone", **options, samples_per_solve=1)
    expected = contents(tmp_path / "alone")
    stopped = [0, 3]  # calls, draw by draw, before the run is killed: in the second draw of the second group
    right = worker.traces_by_level

    def traces_by_level(*arguments):
        stopped[0] += 1
        if stopped[0] > stopped[1]:
            raise KeyboardInterrupt
        return right(*arguments)

    monkeypatch.setattr(worker, "traces_by_level", traces_by_level)
    out = tmp_path / "together"
    with pytest.raises(KeyboardInterrupt):
        run(photos, out, **options, samples_per_solve=3)
    found = contents(out)
    assert len(found) == 6 and all(expected[name] == content for name, content in found.items())
    monkeypatch.undo()
    summary = run(photos, out, **options, samples_per_solve=3)
    assert (summary.before, summary.finished, summary.traces_per_sample) == (3, 2, 4)
    assert contents(out) == expected and no_leftovers(out)


def test_a_repeated_run_does_the_rest(small, photos, tmp_path):
    out = tmp_path / "out"
    run_small(photos, out, small)
    before = contents(out)
    (out / "traces/01.png.safetensors").unlink()
    cut = out / "traces/03.png.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    (out / "traces/.04.png.safetensors.0123abcd.tmp").write_bytes(b"half")
    kept = (out / "traces/00.png.safetensors").stat().st_mtime_ns
    summary = run_small(photos, out, small)
    assert (summary.before, summary.finished) == (3, 2)
    assert contents(out) == before and no_leftovers(out)
    assert (out / "traces/00.png.safetensors").stat().st_mtime_ns == kept
    assert run_small(photos, out, small).finished == 0


def test_other_settings_do_not_mix(small, photos, tmp_path):
    out = tmp_path / "out"
    run_small(photos, out, small)
    others = {"augmentations": 7, "solver": "sparsegpt", "seed": 1, "threads": 2, "methods": ["saliency"]}
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"results of another run .{name}.*choose another folder"):
            run(photos, out, **settings(small, **{name: value}))
    script = Path(sys.path[0], "small_network.py")
    script.write_text(script.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    del sys.modules["small_network"]
    with pytest.raises(ValueError, match="network"):
        run_small(photos, out, small)
    other = tmp_path / "other"
    run_small(photos / "00.png", other, small)
    (other / "traces/00.png.safetensors").rename(other / "traces/01.png.safetensors")
    (other / "traces/01.png.safetensors").write_bytes((out / "traces/01.png.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"01.png.safetensors was made by a run of other settings"):
        run_small(photos / "01.png", other, small)


def test_other_samples_under_the_same_id(small, photos, tmp_path):
    for out, pack in ((tmp_path / "single", None), (tmp_path / "packed", 2)):
        run_small(photos, out, small, pack=pack)
        photo = photos / "01.png"
        before = photo.read_bytes()
        photo.write_bytes(before + b"more")
        with pytest.raises(ValueError, match=rf"sample '01.png' is a file of {len(before) + 4} bytes now, and was one"):
            run_small(photos, out, small)
        photo.unlink()
        photo.write_bytes(before)
        assert run_small(photos, out, small).before == 5
    traces = tmp_path / "single/traces"
    made = (traces / "01.png.safetensors").read_bytes()
    (traces / "01.png.safetensors").write_bytes((traces / "00.png.safetensors").read_bytes())
    assert run_small(photos, tmp_path / "single", small).finished == 1
    assert (traces / "01.png.safetensors").read_bytes() == made


def test_a_longer_dataset_continues(small, tmp_path):
    images = [torch.rand(3, 16, 16) for _ in range(11)]
    assert run_small(images[:9], tmp_path / "out", small).finished == 9
    summary = run_small(images, tmp_path / "out", small)
    assert (summary.before, summary.finished) == (9, 2)


def test_batches_of_a_version_without_automatic_sparsity(small, photos, tmp_path):
    run_small(photos, tmp_path / "out", small)
    path = tmp_path / "out/run.json"
    old = json.loads(path.read_text())
    del old["settings"]["keep"], old["settings"]["draws"]
    path.write_text(json.dumps({**old, "hash": "0"}))
    result = invoke(photos, "--model", small, "--augmentations", 6, "--workers", 0, "--out", tmp_path / "out")
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and 'out holds results of another run (sparsity 0.5 there, "auto" now; ' in line
    assert "keep null there, 0.9 now" in line and "draws null there, 1 now" in line and "choose another folder" in line


def test_lost_maps_are_made_again(small, photos, tmp_path):
    options = settings(small, methods=["saliency"])
    run(photos, tmp_path / "out", **options, workers=0)
    (tmp_path / "out/maps/00.png.safetensors").unlink()
    assert run(photos, tmp_path / "out", **options, workers=0).finished == 1


def test_other_folders_are_refused(small, photos, tmp_path):
    with pytest.raises(ValueError, match="not empty, and not the folder of a batch"):
        run_small(photos, photos, small)
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"run.json is missing or damaged"):
        run_small(photos, out, small)
    with pytest.raises(OutputError):
        run_small(photos, "/proc/out", small)


def test_a_worker_refuses_another_network(small, photos, tmp_path):
    job, _ = small_job(photos, tmp_path / "out", small)
    for name, message in (("network", "other weights or preprocessing"), ("version of pillow", "pillow is .* and 0 ")):
        with pytest.raises(ValueError, match=message):
            Worker(replace(job, facts={**job.facts, name: "0"}), 1)


# Failures


def test_unreadable_samples_are_recorded(small, photos, tmp_path):
    (photos / "cut.png").write_bytes((photos / "00.png").read_bytes()[:200])
    (photos / "text.jpg").write_text("no photo")
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    out = tmp_path / "out"
    summary = run_small(photos, out, small)
    assert summary.finished == 5 and sorted(summary.failed) == ["broken.png", "cut.png", "text.jpg"]
    assert all("not an image file, or damaged" in error for error in summary.failed.values())
    record = json.loads((out / "errors/cut.png.json").read_text())
    assert record["id"] == "cut.png" and record["error"] == summary.failed["cut.png"]
    (photos / "cut.png").write_bytes((photos / "00.png").read_bytes())
    again = run_small(photos, out, small)
    assert again.finished == 1 and sorted(again.failed) == ["broken.png", "text.jpg"]
    assert not (out / "errors/cut.png.json").exists()


def failing(monkeypatch, fail):
    """Let the solver raise what `fail` returns for the sample ids; return the groups it was asked for."""
    groups, right = [], worker.traces_by_level

    def traces_by_level(session, data, ids, goals):
        groups.append(len(data))
        error = fail(ids)
        if error is not None:
            raise error
        return right(session, data, ids, goals)

    monkeypatch.setattr(worker, "traces_by_level", traces_by_level)
    monkeypatch.setattr(worker, "_PAUSES", (0.0, 0.0))
    return groups


def test_a_singular_sample_fails_alone(small, photos, tmp_path, monkeypatch):
    error = torch.linalg.LinAlgError("layer '2': not positive definite")
    groups = failing(monkeypatch, lambda ids: error if "01.png" in ids else None)
    summary = run_small(photos, tmp_path / "out", small, samples_per_solve=5)
    assert summary.failed == {"01.png": "LinAlgError: layer '2': not positive definite"} and summary.finished == 4
    assert groups == [5, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("error", [MemoryError("x"), RuntimeError("[enforce] DefaultCPUAllocator: can't allocate")])
def test_out_of_memory_halves_the_samples_per_solve(small, photos, tmp_path, monkeypatch, error):
    run_small(photos, tmp_path / "undisturbed", small)
    groups = failing(monkeypatch, lambda ids: error if len(ids) > 2 or "03.png" in ids else None)
    summary = run_small(photos, tmp_path / "out", small, samples_per_solve=5)
    assert groups == [5, 2, 2, 1, 1, 1, 1] and sorted(summary.failed) == ["03.png"]
    expected = contents(tmp_path / "undisturbed")
    del expected["traces/03.png.safetensors"]
    assert contents(tmp_path / "out") == expected


class Forgetful(list):
    """Images of which one can be loaded at the second attempt only."""

    tries = 0

    def __getitem__(self, index):
        self.tries += index == 1
        if index == 1 and self.tries == 1:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index))


def test_out_of_memory_around_the_solver(small, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_PAUSES", (0.0, 0.0))
    right, tries = worker.attribution_map, []

    def attribution_map(*arguments):
        tries.append(arguments)
        if len(tries) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(*arguments)

    monkeypatch.setattr(worker, "attribution_map", attribution_map)
    images = Forgetful([None] * 3)
    summary = run(images, tmp_path / "out", **settings(small, methods=["saliency"]), workers=0)
    assert summary.finished == 3 and images.tries == 2 and len(tries) == 3 * 2 + 2


def test_a_lost_device_ends_the_run(small, photos, tmp_path, monkeypatch):
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    groups = failing(monkeypatch, lambda ids: error if "01.png" in ids else None)
    with pytest.raises(ChildProcessError, match="RuntimeError: CUDA error: an illegal memory access"):
        run_small(photos, tmp_path / "out", small, samples_per_solve=1)
    assert groups == [1, 1] and not list((tmp_path / "out/errors").iterdir())


def test_errors_of_finished_samples_are_removed(small, photos, tmp_path):
    run_small(photos, tmp_path / "out", small)
    (tmp_path / "out/errors/00.png.json").write_text("{}")
    (tmp_path / "out/.index.parquet.0123abcd.tmp").touch()
    run_small(photos, tmp_path / "out", small)
    assert not list((tmp_path / "out/errors").iterdir()) and no_leftovers(tmp_path / "out")


def test_writing_is_tried_again(small, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_PAUSES", (0.0, 0.0))
    run_small(photos, tmp_path / "undisturbed", small)
    failures = [OSError(errno.EIO, "io"), MemoryError("x")]

    def once(right, failure):
        def action(*arguments):
            if failure in failures:
                failures.remove(failure)
                raise failure
            return right(*arguments)

        return action

    monkeypatch.setattr(Store, "record", once(Store.record, failures[0]))
    monkeypatch.setattr(Trace, "save", once(Trace.save, failures[1]))
    assert run_small(photos, tmp_path / "out", small).finished == 5 and not failures
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_a_sample_too_large_to_write_fails_alone(small, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_PAUSES", (0.0, 0.0))
    save = Trace.save

    def limited(made, path):
        if made.sample_id == "01.png":
            raise MemoryError("too large")
        save(made, path)

    monkeypatch.setattr(Trace, "save", limited)
    summary = run_small(photos, tmp_path / "out", small)
    assert summary.failed == {"01.png": "MemoryError: too large"} and summary.finished == 4


def test_temporary_errors_are_tried_again(monkeypatch):
    monkeypatch.setattr(worker, "_PAUSES", (0.0, 0.0))
    errors = [OSError(errno.EIO, "io"), OSError(errno.ESTALE, "stale")]
    assert patiently(lambda: "read" if not errors else (_ for _ in ()).throw(errors.pop())) == "read"
    tries = []

    def fail(number):
        tries.append(number)
        raise OSError(number, "again")

    for number, count in ((errno.EIO, 3), (errno.EACCES, 1)):
        tries.clear()
        with pytest.raises(OSError, match="again"):
            patiently(lambda number=number: fail(number))
        assert len(tries) == count


def test_a_missing_package_ends_the_run(small, photos, tmp_path, monkeypatch):
    failing(monkeypatch, lambda ids: ImportError("no kornia"))
    with pytest.raises(ImportError, match="no kornia"):
        run_small(photos, tmp_path / "out", small)


def test_all_files_are_written_under_claims(small, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["spade_fast.batch.driver"], "can_index", lambda: False)
    written, replace_file = Counter(), os.replace

    def watched(temporary, path):
        path = Path(path)
        child = os.fork()
        if child == 0:
            with Claims(tmp_path / "out").of([path.name.removesuffix(path.suffix)]) as (free,):
                os._exit(free)
        claimed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        written[path.parent.name, claimed] += 1
        replace_file(temporary, path)

    monkeypatch.setattr(os, "replace", watched)
    (photos / "bad.png").touch()
    run(photos, tmp_path / "out", **settings(small, methods=["saliency"]), workers=0)
    samples = {("traces", True): 5, ("maps", True): 5, ("reports", True): 5, ("errors", True): 1}
    assert written == {**samples, ("out", False): 1}, "run.json has a lock of its own"


def test_claims(small, photos, tmp_path):
    job, model = small_job(photos, tmp_path / "out", small)
    store = Store(job)
    store.open()
    leftover = store.trace_path("00.png").with_name(".00.png.safetensors.0123abcd.tmp")
    leftover.touch()
    with claimed_by_another(job, "00.png"):
        outcomes = list(Worker(job, 2, model).run([0, 1]))
        assert outcomes == [Outcome(0, "busy"), Outcome(1, "finished")]
        store.remove_leftovers()
        assert leftover.exists()
    store.remove_leftovers()
    assert not leftover.exists()
    outcomes = list(Worker(job, 2, model).run([0, 1]))
    assert sorted((outcome.index, outcome.state) for outcome in outcomes) == [(0, "finished"), (1, "finished")]
    assert read_header(store.trace_path("00.png"))["header"]["run"] == job.hash


def test_starts():
    starts = Starts(2)
    assert not any(starts.failed(place, "x") for place in (0, 1, 1, 0))
    starts.began(1)
    assert starts.failed(0, "x") and not starts.failed(1, "x") and not starts.failed(1, "x")
    with pytest.raises(ChildProcessError, match="the last was started 3 times, and ended with exit code 7"):
        starts.failed(1, "exit code 7")


def test_schedule(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("spade_fast.batch.schedule.time.monotonic", lambda: now[0])
    schedule = Schedule(range(7), 4)
    assert schedule.task() == [0, 1, 2, 3]
    assert schedule.take(Outcome(0, "finished")) and not schedule.take(Outcome(1, "busy"))
    assert schedule.died([2, 3], "x") == [] and schedule.task() == [4, 5], "smaller groups after a death"
    for index in (4, 5):
        assert schedule.take(Outcome(index, "finished"))
    assert [schedule.task() for _ in range(4)] == [[6], [2], [3], []], "those of a dead worker one by one"
    assert schedule.died([2], "x") == [] and schedule.task() == [2]
    assert schedule.died([2], "exit code 7") == [
        Outcome(2, "killed", "killed its worker 2 times, last with exit code 7")
    ]
    now[0] = 2.0
    assert schedule.task() == [1] and not schedule.done
    for index in (1, 3, 6):
        schedule.take(Outcome(index, "failed", "x"))
    assert schedule.done and schedule.task() == []


def test_memory():
    assert samples_together(9, "cpu", 10, 50) == 2 and samples_together(9, "cpu", 10, 0) == 1
    assert [samples_together(threads, "cpu", 0, 10**9) for threads in (1, 4, 9)] == [1, 4, 8]
    assert samples_together(1, "cuda", 0, 10**9) == 8 and free_bytes("cpu") > 10**7
    assert count_workers(10**6, "cpu", 0, 10**12) == count_workers(1, "cpu", 10**9, 10**9) == 1
    assert count_workers(1, "cpu", 0, 10**12) == len(os.sched_getaffinity(0))


def test_limits_of_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr("spade_fast.batch.memory._CGROUP", tmp_path)
    free = free_bytes("cpu")
    for name, text in (("max", "3000000\n"), ("current", "2500000\n"), ("stat", "anon 5\ninactive_file 400000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes("cpu") == 900_000 < free
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu") > 10**7


# Command line


def invoke(*arguments):
    return CliRunner().invoke(app, ["batch", *map(str, arguments)])


def test_command(small, photos, tmp_path):
    options = ["--model", small, "--augmentations", 6, "--workers", 0, "--out", tmp_path / "out"]
    result = invoke(photos, *options, "--dry-run")
    assert result.exit_code == 0, result.output
    assert result.stdout == "5 samples, 0 finished, 5 to do (workers: 0, samples per solve: 1)\n"
    assert not (tmp_path / "out").exists()
    result = invoke(photos, *options)
    assert result.exit_code == 0, result.output
    assert result.stderr == "5 samples, 0 finished, 5 to do (workers: 0, samples per solve: 1)\n"
    assert "5 samples: 5 finished (0 in earlier runs), 0 failed" in result.stdout
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out")
    (photos / "bad.png").write_text("x")
    result = invoke(photos, *options)
    assert result.exit_code == 1 and "6 samples: 5 finished (5 in earlier runs), 1 failed" in result.stdout
    assert "  bad.png: not an image file" in result.stdout
    means = ["--methods", "saliency", "--keep", ".9,.5", "--draws", 3, "--dry-run"]
    result = invoke(photos, *options[:-1], tmp_path / "mean", *means)
    assert result.stdout.endswith("(workers: 0, samples per solve: 1, traces per sample: 6)\n"), result.output
    assert "resumes it" in CliRunner().invoke(app, ["batch", "--help"]).stdout


def test_a_dry_run_sees_that_nothing_can_be_written(small, photos, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = invoke(photos, "--model", small, "--augmentations", 4, "--out", small_disk / "out", "--dry-run")
    assert result.exit_code == 2 and f"{small_disk}" in result.stderr


def test_a_dry_run_sees_that_the_output_is_a_file(small, photos, tmp_path):
    (tmp_path / "out").touch()
    result = invoke(photos, "--model", small, "--augmentations", 4, "--out", tmp_path / "out", "--dry-run")
    assert result.exit_code == 2 and "it is not a folder that can be written" in result.stderr


def test_unforeseen_errors_end_with_2(small, photos, tmp_path, monkeypatch):
    failing(monkeypatch, lambda ids: None)
    monkeypatch.setattr(worker, "make_augmenter", lambda *_: 1 // 0)
    result = invoke(photos, "--model", small, "--out", tmp_path / "out", "--workers", 0)
    assert result.exit_code == 2 and "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"INPUT": "absent"}, "no such file or folder: absent"),
        ({"--model": "magic"}, "unknown model 'magic'"),
        ({"--solver": "both"}, "unknown solver 'both'"),
        ({"--sparsity": "2"}, "sparsity must lie between 0 and 1"),
        ({"--layers": "body.*"}, "body."),
        ({"--methods": "magic"}, "unknown method 'magic'"),
        ({"--methods": "GradCAM"}, "unknown method 'GradCAM': did you mean 'gradcam'?"),
        ({"--methods": "saliency,gradcam", "--model": "small_network:norm"}, "Grad-CAM cannot be used on Sequential"),
        ({"--engine": "Ray"}, "unknown engine 'Ray': did you mean 'ray'?"),
        ({"--augmentations": "0"}, "augmentations must be at least 1"),
        ({"--device": "gpu"}, "device 'gpu' cannot be used"),
        ({"--precision": "half"}, "unknown precision"),
        ({"--workers": "-1"}, "workers must be at least 0, got -1"),
        ({"--samples-per-solve": "0"}, "samples_per_solve must be at least 1, got 0"),
        ({"--engine": "magic"}, "unknown engine 'magic': choose from local, ray"),
        ({"--address": "auto"}, "engine 'local' has no address"),
        ({"--threads": "0"}, "threads must be at least 1, got 0"),
        ({"--draws": "0", "--methods": "saliency"}, "draws must be at least 1, got 0"),
        ({"--draws": "2"}, "which need methods: got keep=0.9 and draws=2, and no methods"),
        ({"--keep": ".9,.5"}, "which need methods: got keep=0.9, 0.5 and draws=1, and no methods"),
        ({"--keep": "90"}, "keep must be above 0 and at most 1, got 90.0: did you mean 0.9?"),
        ({"--out": "photos"}, "photos is not empty"),
        ({"--out": "/proc/out"}, "/proc/out"),
    ],
)
def test_bad_input_is_one_line(small, photos, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    before = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    options = {"--model": small, "--augmentations": "4", "--out": "out", **changes}
    result = invoke(options.pop("INPUT", "photos"), *(part for option in options.items() for part in option))
    assert result.exit_code == 2 and result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if "error:" in line]) == 1 and message in result.stderr
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


def test_sigterm_raises_in_the_main_thread():
    threads = threading.active_count()
    with pytest.raises(SystemExit) as stopped, exit_on_sigterm():
        os.kill(os.getpid(), 15)
    assert stopped.value.code == 143 and threading.active_count() <= threads + 1
