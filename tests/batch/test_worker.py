"""A worker: means over traces, samples whose score cannot be kept, and a network that runs out of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("captum")
pytest.importorskip("kornia")
pytest.importorskip("typer")
pytest.importorskip("PIL.Image")

from batches import contents, make_photos, run_small, settings, small_job
from typer.testing import CliRunner

from spade_fast import trace
from spade_fast.attribution import Question, attribution_map
from spade_fast.attribution.maps import mean_map
from spade_fast.batch import Results, run, worker
from spade_fast.batch.results import read_report
from spade_fast.batch.store import Store
from spade_fast.batch.worker import Worker
from spade_fast.cli.app import app
from spade_fast.inputs import load_model, open_photo
from spade_fast.inputs.setup import Setup
from spade_fast.pruning.session import Session
from spade_fast.targets import class_against, class_score


def test_maps_are_means_over_levels_and_draws(small, tmp_path):
    make_photos(tmp_path / "photos", 1)
    options = settings(small, sparsity="auto", keep=(0.5, 0.995), draws=2, layers=["*"], solver="sparsegpt")
    assert run(tmp_path / "photos", tmp_path / "out", **options, methods=["saliency", "gradcam"], workers=0).finished
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loaded = load_model(small)
    image = loaded.preprocess(open_photo(tmp_path / "photos/00.png"))[0]
    augmenter = Setup(small, augmentations=6).augmenter(loaded, 0)
    traces = [
        trace(loaded.module, augmenter(image, name), inputs=image, keep=keep, solver="sparsegpt", sample_id=name)
        for name in ("00.png", "00.png/draw1")
        for keep in (0.995, 0.5)
    ]
    found = []
    for made in traces:
        with made.applied(loaded.module):
            question = Question(loaded.module, image, made.decision.class_before, loaded.black)
            found.append({name: attribution_map(name, question) for name in ("saliency", "gradcam")})
    torch.set_num_threads(threads)
    results = Results(tmp_path / "out")
    maps, stored = results.maps("00.png"), results["00.png"]
    for name in ("saliency", "gradcam"):
        torch.testing.assert_close(maps[f"trace.{name}"], mean_map([each[name] for each in found]))
    assert all(torch.equal(stored.weight(name), traces[0].weight(name)) for name in traces[0].layers)
    assert replace(stored.auto, curve=()) == replace(traces[0].auto, curve=())
    assert stored.sample_id == "00.png" and stored.decision == traces[0].decision
    assert len({float(each["saliency"].sum()) for each in found}) == 4, "four different traces"
    report = read_report(tmp_path / "out/reports/00.png.json")
    assert [each["id"] for each in report["traces"]] == [made.sample_id for made in traces]
    assert [each["error_limit"] for each in report["traces"]] == [made.auto.error for made in traces]
    assert [each["sparsity"] for each in report["traces"]] == [made.sparsity for made in traces]
    assert stored.header["traces"] == 4
    assert stored.header["traces_lost"] == sum(not made.decision.kept for made in traces)


def test_samples_share_a_compiled_network(small, tmp_path, monkeypatch):
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graphs.append(graph) or graph)
    make_photos(tmp_path / "photos", 2)
    for name, options in {"eager": (), "compiled": ("--compile",)}.items():
        arguments = ["batch", tmp_path / "photos", "--out", tmp_path / name, "--model", small, "--sparsity", 0.5]
        arguments += ["--augmentations", 6, "--workers", 0, "--samples-per-solve", 1, *options]
        assert CliRunner().invoke(app, [str(argument) for argument in arguments]).exit_code == 0
    assert len(graphs) == 1
    eager, compiled = Results(tmp_path / "eager"), Results(tmp_path / "compiled")
    for name in ("00.png", "01.png"):
        assert compiled[name].header["settings"]["compile"] and not eager[name].header["settings"]["compile"]
        assert all(torch.equal(eager[name].mask(layer), compiled[name].mask(layer)) for layer in eager[name].layers)


def test_draws_of_a_given_sparsity(small, tmp_path):
    make_photos(tmp_path / "photos", 1)
    options = settings(small, methods=["saliency"])
    run(tmp_path / "photos", tmp_path / "one", **options, workers=0)
    run(tmp_path / "photos", tmp_path / "two", **options, draws=2, workers=0)
    one, two = Results(tmp_path / "one"), Results(tmp_path / "two")
    assert torch.equal(one["00.png"].weight("2"), two["00.png"].weight("2"))
    assert two["00.png"].header["traces"] == 2 and two["00.png"].auto is None
    assert float(two.maps("00.png")["trace.saliency"].sum()) == pytest.approx(1)
    assert float(one.maps("00.png")["trace.saliency"].sum()) != pytest.approx(1)


def test_a_sample_whose_score_no_sparsity_keeps(small, tmp_path):
    make_photos(tmp_path / "photos", 3)
    options = settings(small, sparsity="auto", keep=1, solver="sparsegpt")
    assert run(tmp_path / "photos", tmp_path / "out", **options, workers=0).finished == 3
    kept = {name: made.auto.kept for name, made in Results(tmp_path / "out").items()}
    assert kept == {"00.png": False, "01.png": False, "sub/02.png": True}
    (warning,) = read_report(tmp_path / "out/reports/00.png.json")["warnings"]
    assert warning.startswith("00.png: error limit ") and warning.endswith("less than the 100% asked for")
    assert read_report(tmp_path / "out/reports/sub%2F02.png.json")["warnings"] == []
    failed = run(tmp_path / "photos", tmp_path / "strict", **options, strict=True, workers=0).failed
    assert sorted(failed) == ["00.png", "01.png"] and "kept less than asked for: sample '00.png'" in failed["00.png"]


def test_a_sample_without_a_dense_score_is_not_traced(small, tmp_path, monkeypatch):
    groups, right = [], worker.traces_by_level

    def traces_by_level(session, data, ids, goals):
        groups.append(list(ids))
        return right(session, data, ids, goals)

    def predict(module, image):
        if float(image.mean()) == images[1].mean():
            raise ValueError("the model returns NaN or infinite logits in torch.float32")
        return right_predict(module, image)

    images = [torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    right_predict = worker.predict
    monkeypatch.setattr(worker, "traces_by_level", traces_by_level)
    monkeypatch.setattr(worker, "predict", predict)
    summary = run(images, tmp_path / "out", **settings(small, sparsity="auto"), workers=0, samples_per_solve=3)
    assert summary.failed == {"1": "ValueError: the model returns NaN or infinite logits in torch.float32"}
    assert summary.finished == 2 and groups == [["0", "2"]]


def test_the_dense_network_runs_no_more_than_needed(small, tmp_path, monkeypatch):
    make_photos(tmp_path / "photos", 1)
    job, network = small_job(tmp_path / "photos", tmp_path / "out", small, sparsity="auto")
    Store(job).open()
    dense, weights = [], [one.detach().clone() for one in network.module.parameters()]

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        dense.append(len(inputs[0]) == 1 and all(map(torch.equal, module.parameters(), weights)))

    network.module.register_forward_pre_hook(count)
    assert [outcome.state for outcome in Worker(job, 1, network).run([0])] == ["finished"]
    assert sum(dense) == 2, "once for its prediction, once for the score to keep"


def test_samples_that_fit_alone_are_traced_alone(small, tmp_path, monkeypatch):
    """On a CPU torch says that memory has run out with a RuntimeError."""
    make_photos(tmp_path / "photos", 5)
    run_small(tmp_path / "photos", tmp_path / "undisturbed", small)
    together, right = [], Session.calibrated

    def calibrated(self, plan, chunk, samples, ids):
        together.append(len(chunk))
        return right(self, plan, chunk, samples, ids)

    def greedy(module: torch.nn.Module, inputs: object) -> None:
        if together and together[-1] > 1:
            torch.empty(2**50)

    job, network = small_job(tmp_path / "photos", tmp_path / "out", small)
    Store(job).open()
    network.module.register_forward_pre_hook(greedy)
    monkeypatch.setattr(Session, "calibrated", calibrated)
    outcomes = list(Worker(job, 5, network).run(range(5)))
    assert [(outcome.state, outcome.error) for outcome in outcomes] == [("finished", "")] * 5
    assert together == [5, 2, 1, 1, 1, 1, 1]
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(("target", "asked"), [("dog", class_score(3)), ("small_network:rather", class_against(3, 0))])
def test_what_is_explained_of_every_sample(small, tmp_path, target, asked):
    make_photos(tmp_path / "photos", 1)
    options = settings(small, sparsity="auto", methods=["saliency"], solver="sparsegpt", target=target)
    assert run(tmp_path / "photos", tmp_path / "out", **options, workers=0).finished
    results, loaded = Results(tmp_path / "out"), load_model(small)
    image = loaded.preprocess(open_photo(tmp_path / "photos/00.png"))[0]
    with torch.no_grad():
        stored, kept = results["00.png"], float(asked.kept(loaded.module(image)))
    assert stored.target == str(asked) and stored.auto.dense == pytest.approx(kept, rel=1e-4)
    expected = attribution_map("saliency", Question(loaded.module, image, asked, loaded.black))
    torch.testing.assert_close(results.maps("00.png")["dense.saliency"], expected, rtol=1e-3, atol=1e-6)


def test_bad_targets(small, tmp_path):
    make_photos(tmp_path / "photos", 1)
    for target, message in (
        ("dig", r"no class 'dig': did you mean 'dog' \(3\)"),
        (4, "target must be a class from 0 to 3, got 4"),
        ("small_network:absent", "target 'small_network:absent' cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            run_small(tmp_path / "photos", tmp_path / "out", small, sparsity="auto", target=target)
    with pytest.raises(ValueError, match="a target is what sparsity='auto' keeps and methods explain"):
        run_small(tmp_path / "photos", tmp_path / "out", small, sparsity=0.5, target=1)
