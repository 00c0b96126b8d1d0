"""The page of an explanation: its HTML, and what headless Chromium makes of it (screenshots in out/page)."""

from __future__ import annotations

import base64
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("captum")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from explaining import explain  # noqa: E402

from spade_fast.attribution.drawing import Column, overlay  # noqa: E402
from spade_fast.cli.explanation import solver_warnings  # noqa: E402
from spade_fast.cli.page import render  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor")

SCREENSHOTS = Path(__file__).parents[2] / "out" / "page"
CLASSES = ("ant", "bee", "cat")
METHODS = ("saliency", "gradcam")
HOSTILE = "<img src=x onerror=\"alert('&amp;')\">"
VOID = {"br", "img", "meta", "wbr"}
PHOTO = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


class Parsed(HTMLParser):
    """Elements in order as ``(tag, attributes, text with that of the elements inside)``; tags must balance."""

    def __init__(self, html):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.elements.append([tag, dict(attributes), ""])
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, *tags, style=None):
        wanted = [one for one in self.elements if not tags or one[0] in tags]
        return [one for one in wanted if style is None or style in one[1].get("class", "").split()]

    def texts(self, *tags, style=None):
        return [" ".join(text.split()) for _, _, text in self.all(*tags, style=style)]


def prediction(best, target=0):
    chances = {best: 0.6, **{other: 0.2 for other in range(3) if other != best}}
    top = [{"class": one, "name": CLASSES[one], "probability": chance} for one, chance in chances.items()]
    return {
        "target": {"class": target, "name": CLASSES[target], "probability": chances[target]},
        "top": top,
        "against": None,
    }


def layer(name, reached, error=0.1, note=""):
    return {"name": name, "shape": [4, 5], "reached": reached, "measured_error": error, "note": note}


def make_report(dense=0, exact=0, sparsegpt=0, target=0, layers=None, **settings):
    layers = [layer("body.0", 0.25), layer("body.1", 0.75)] if layers is None else layers
    return {
        "settings": {
            "image": "/photos/dog.jpg",
            "model": "demo",
            "methods": METHODS,
            "solvers": ["exact", "sparsegpt"],
            "draws": 1,
            "smooth": None,
            **settings,
        },
        "reading": ["The photo was turned upright."],
        "empty": [],
        "left_out": {"lime": "LIME cannot be used on <this>"},
        "preprocessing": {"resize": 256, "crop": [224, 224], "mean": [0.5, 0.5, 0.5]},
        "against": None,
        "noisy_probability": None if settings.get("smooth") is None else 0.25,
        "notes": ["demo returns <one> logit"],
        "versions": {"spade_fast": "0.1.0"},
        "seconds": {"load model": 1.25, "pictures": 0.5},
        "predictions": {
            "dense": prediction(dense, target),
            "exact": prediction(exact, target),
            "sparsegpt": prediction(sparsegpt, target),
        },
        "traces": {
            name: {
                "solver": name,
                "keep": None,
                "draw": 0,
                "auto": None,
                "layers": layers,
                "removed": 0.5,
                "network_sparsity": 0.125,
                "decision_kept": found == dense,
            }
            for name, found in (("exact", exact), ("sparsegpt", sparsegpt))
        },
    }


def make_auto(keep, error, score, kept=True):
    curve = [[0.01, 0.6, 0.2], [0.1, 0.5, 0.5], [0.3, 0.2, 0.8]]
    return {"keep": keep, "error": error, "dense": 0.6, "score": score, "kept": kept, "curve": curve}


def make_report_of_several(keeps=(0.9, 0.5), draws=2, **settings):
    """Report on automatic traces of two levels and draws, the last of which lost the decision and kept too little."""
    report = make_report(draws=draws, **settings)
    found = {keep: (error, score) for keep, error, score in ((0.9, 0.01, 0.6), (0.5, 0.1, 0.5))}
    single = report["traces"]
    report["traces"], report["predictions"] = {}, {"dense": report["predictions"]["dense"]}
    for solver, (draw, keep) in itertools.product(single, itertools.product(range(draws), keeps)):
        last, name = (draw, keep) == (draws - 1, keeps[-1]), f"{solver}-keep{keep}-draw{draw}"
        auto = make_auto(keep, *found[keep], kept=not last)
        layers = [{**one, "reached": one["reached"] * (1 - keep)} for one in single[solver]["layers"]]
        entry = {"keep": keep, "draw": draw, "auto": auto, "decision_kept": not last, "layers": layers}
        report["traces"][name] = {**single[solver], **entry}
        report["predictions"][name] = prediction(1 if last else 0)
    return report


def make_columns(names=("Dense network", "SPADE", "FastSPADE"), warnings=None):
    generator = np.random.default_rng(1)
    maps = {name: [generator.random((16, 16)) for _ in METHODS] for name in names}
    return [Column(name, [], one, (warnings or {}).get(name, ())) for name, one in maps.items()]


def make_page(report=None, columns=None):
    return render(report or make_report(), PHOTO, columns or make_columns())


def decoded(address):
    head, _, data = address.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        return np.array(picture)


# The HTML


def test_refers_to_nothing_outside():
    html = make_page()
    parsed = Parsed(html)
    assert not parsed.all("script", "link", "iframe", "object", "embed", "base", "form")
    for tag, attributes, _ in parsed.elements:
        assert not {"href", "srcset", "action", "poster", "background"} & set(attributes)
        assert "src" not in attributes or (tag == "img" and attributes["src"].startswith("data:image/"))
    assert "http:" not in html and "https:" not in html and "file:" not in html
    assert not re.search(r"url\(|@import", html)
    policy = {"http-equiv": "Content-Security-Policy"}
    policy["content"] = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert policy in [attributes for _, attributes, _ in parsed.all("meta")]
    assert "/photos" not in html, "a page to be sent does not say where the photo lay"


def test_assumptions_are_shown_beside_the_network():
    parsed = Parsed(make_page())
    (caption,) = [text for _, _, text in parsed.all("figcaption") if "Network:" in text]
    assert "demo returns <one> logit." in caption
    facts = [text for _, _, text in parsed.all("dd")]
    assert "224, 224" in facts and "0.5, 0.5, 0.5" in facts


def test_maps_of_zeros_are_said():
    report = {**make_report(), "empty": ["saliency"]}
    said = [text for text in Parsed(make_page(report)).texts("p", style="warning") if "zero everywhere" in text]
    assert said == ["Warning: maps of the dense network are zero everywhere: nothing changes “ant” (Saliency)."]
    assert "zero everywhere" not in make_page()


def test_methods_that_were_left_out_are_named():
    assert "Left out: LIME cannot be used on <this>." in Parsed(make_page()).texts("p", style="note")


def test_hostile_names(monkeypatch):
    monkeypatch.setattr("test_page.CLASSES", (HOSTILE, "bee", "cat"))
    layers = [layer(HOSTILE, 0.5), layer("x", 0, note=HOSTILE)]
    report = make_report(0, 1, layers=layers, image=HOSTILE, model=HOSTILE, layers_asked=[HOSTILE], shares={HOSTILE: 1})
    report["seconds"][HOSTILE] = report["versions"][HOSTILE] = 1.0
    parsed, plain = Parsed(make_page(report)), Parsed(make_page())
    assert len(parsed.all("img")) == len(plain.all("img"))
    assert not [name for _, attributes, _ in parsed.elements for name in attributes if name.startswith("on")]
    assert parsed.texts("h1") == [f"Why “{HOSTILE}”?"]
    assert (
        f"skipped: {HOSTILE}" in parsed.texts("td") and HOSTILE in parsed.texts("th") and HOSTILE in parsed.texts("dt")
    )
    assert f"{HOSTILE}: 1" in parsed.texts("dd") and HOSTILE in parsed.texts("dd")
    assert any(attributes["alt"].endswith(f"evidence for “{HOSTILE}”") for _, attributes, _ in parsed.all("img"))


def test_pictures():
    images = [attributes for _, attributes, _ in Parsed(make_page()).all("img")]
    assert all(one["alt"] for one in images)
    found = {one["alt"].partition(":")[0]: decoded(one["src"]) for one in images}
    assert np.abs(found.pop("The photo dog.jpg as the network sees it") - PHOTO.astype(float)).mean() < 10
    columns = make_columns()
    other = np.abs(overlay(PHOTO, columns[0].maps[0]) - overlay(PHOTO, columns[0].maps[1])).mean()
    for column in columns:
        for one, method in zip(column.maps, ("Saliency", "Grad-CAM"), strict=True):
            error = np.abs(found.pop(f"{method} map of {column.heading}") / 255 - overlay(PHOTO, one)).mean()
            assert error < 0.03 < other / 3
    assert list(found) == ["Colour scale from black, no evidence, to bright yellow, strongest evidence"]


@pytest.mark.parametrize(
    ("decisions", "target", "warned"),
    [
        ((0, 0, 0), 0, []),
        ((0, 1, 0), 0, ["SPADE"]),
        ((0, 0, 2), 0, ["FastSPADE"]),
        ((0, 1, 2), 0, ["SPADE", "FastSPADE"]),
        ((1, 1, 1), 0, []),
        ((1, 0, 1), 0, ["SPADE"]),
    ],
)
def test_warning_where_the_decision_is_lost(decisions, target, warned):
    parsed = Parsed(make_page(make_report(*decisions, target)))
    names = dict(zip(("Dense network", "SPADE", "FastSPADE"), decisions, strict=True))
    for text, (title, best) in zip(parsed.texts("article"), names.items(), strict=True):
        best_class, first = (f"“{CLASSES[one]}” ({one})" for one in (best, decisions[0]))
        lost = f"it predicts {best_class} instead of {first}"
        assert text.startswith(title) and ("Warning:" in text) == (title in warned) == (lost in text)
        assert (f"redicts “{CLASSES[best]}”" in text.replace(lost, "")) == (title not in warned)
    aside = "the maps nevertheless show the evidence for “ant”"
    assert (aside in parsed.texts("article")[0]) == (decisions[0] != target)


def test_warnings_stand_in_the_heads_of_columns():
    warnings = {"SPADE": ["lost the decision", "kept less than asked"]}
    parsed = Parsed(make_page(columns=make_columns(warnings=warnings)))
    assert parsed.texts("th")[:3] == ["Dense network", "SPADE lost the decision kept less than asked", "FastSPADE"]
    marked = [attributes["data-heading"] for _, attributes, _ in parsed.all("td") if "data-heading" in attributes]
    assert marked == 2 * ["Dense network", "SPADE: lost the decision: kept less than asked", "FastSPADE"]


def test_several_traces():
    parsed = Parsed(make_page(make_report_of_several()))
    assert parsed.texts("h3") == ["Dense network", "SPADE: 4 traces", "FastSPADE: 4 traces"]
    rows = [text for text in parsed.texts("tr") if text.startswith("keep ")]
    assert len(rows) == 8 and rows[0] == "keep 0.9, draw 0 60.0% 50.0%"
    warnings = parsed.texts("p", style="warning")
    assert len(warnings) == 4 and "1 of 4 SPADE traces lost the decision: they predict “bee”" in warnings[0]
    less = "1 of 4 SPADE traces keep less than asked for, but are the mildest tried: keep 0.5, draw 1."
    assert warnings[1] == f"Warning: {less}"
    notes = parsed.texts("p", style="note")
    assert any("mean over its traces" in note for note in notes) and any("those of draw 0" in note for note in notes)
    first = ["SPADE, keep 0.9, draw 0", "FastSPADE, keep 0.9, draw 0"]
    assert parsed.texts("caption")[:5] == [*first, "Dense network", *first]
    single = Parsed(make_page())
    assert not any("mean over" in note or "draw 0" in note for note in single.texts("p", style="note"))


@pytest.mark.parametrize(("draws", "said"), [(1, ""), (2, " in 1 of 2 draws")])
def test_levels_that_are_the_same_trace_are_said(draws, said):
    report = make_report_of_several(draws=draws)
    assert "the same trace" not in make_page(report)
    report["traces"]["exact-keep0.5-draw0"]["layers"] = report["traces"]["exact-keep0.9-draw0"]["layers"]
    notes = [note for note in Parsed(make_page(report)).texts("p", style="note") if "the same trace" in note]
    assert notes == [f"SPADE makes the same trace for keep 0.9, 0.5{said}."]


@pytest.mark.parametrize(("score", "said"), [(0.3, "only 50.0%"), (0.59, "on noisy copies of the photo")])
def test_a_trace_that_keeps_less_than_asked(score, said):
    report = make_report()
    report["traces"]["exact"]["auto"] = make_auto(0.9, 0.01, score, kept=False)
    (warning,) = Parsed(make_page(report)).texts("p", style="warning")
    assert f"SPADE keeps less than 90% of the dense network's probability of “ant”, {said}" in warning


def test_curve_of_automatic_sparsity():
    assert not Parsed(make_page()).all("svg") and "λ" not in make_page()
    parsed = Parsed(make_page(make_report_of_several()))
    assert len(parsed.all("svg")) == 2 and len(parsed.all("circle", style="trial")) == 2 * 3
    assert len(parsed.all("circle", style="chosen")) == 2 * 2
    identifiers = {attributes.get("id"): text for _, attributes, text in parsed.all("title", "desc")}
    for _, attributes, _ in parsed.all("svg"):
        title, description = attributes["aria-labelledby"].split()
        assert attributes["role"] == "img" and "Probability of “ant” by λ" in identifiers[title]
        assert "3 trials" in identifiers[description] and "λ 0.1 with 50.0% to keep 50%" in identifiers[description]
    assert any("λ: largest relative output error allowed in a layer" in note for note in parsed.texts("p"))
    (caption, _) = [text for text in parsed.texts("figcaption") if "λ" in text]
    assert "keep 0.9: λ 0.01, probability 60.0%" in caption and "keep 0.5: λ 0.1, probability 50.0%" in caption


def test_rows_without_smoothgrad_are_marked():
    report = make_report(smooth={"noise": 0.2, "copies": 16})
    parsed = Parsed(make_page(report))
    assert parsed.texts("th")[3:5] == ["Saliency", "Grad-CAM (plain)"]
    (note,) = [text for text in parsed.texts("p") if "SmoothGrad" in text]
    assert "16 copies" in note and "plain" in note and "probability of “ant” is 25.0%" in note
    assert not parsed.texts("p", style="warning")
    report["noisy_probability"] = 0.02
    (warning,) = Parsed(make_page(report)).texts("p", style="warning")
    assert "the noise of SmoothGrad destroys “ant”" in warning and "is 2.0%, not 60.0%" in warning


def test_layers():
    layers = [layer("a", 0.0, 0.0), layer("b", 0.5, 2.5), layer("c", 0.5, note="no inputs")]
    parsed = Parsed(make_page(make_report(layers=layers)))
    rows = [text for text in parsed.texts("tr") if re.match("[abc] ", text)]
    assert rows == 2 * ["a 0.0% 0.0%", "b 50.0% 250.0%", "c skipped: no inputs"]
    tables = parsed.elements.index(parsed.all("table", style="layers")[0])
    styles = [
        attributes["style"]
        for _, attributes, _ in parsed.elements[tables:]
        if "bar" in attributes.get("class", "").split()
    ]
    assert styles[:4] == ["width: 0.00%", "width: 0.00%", "width: 50.00%", "width: 100.00%"]
    assert "50.0% of the weights in 2 layers removed, 12.5% of the network" in parsed.texts("article")[1]
    only = make_page(make_report(layers=[layer("c", 0.5, note="no inputs")]))
    assert "No layer pruned. Still predicts “ant”." in Parsed(only).texts("article")[1]


def test_outline():
    parsed = Parsed(make_page())
    assert parsed.all("html")[0][1] == {"lang": "en"} and parsed.texts("title")[0] == "Why “ant”? dog.jpg"
    levels = [int(tag[1]) for tag, _, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {attributes.get("scope") for _, attributes, _ in parsed.all("th")} == {"col", "row", "rowgroup"}
    names = {attributes["aria-labelledby"] for _, attributes, _ in parsed.all("section")}
    assert names <= {attributes.get("id") for _, attributes, _ in parsed.all("h2")}
    assert "1.75" in parsed.texts("tfoot")[0]


# In Chromium

FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars"""

LOOK = """
const shown = [...document.querySelectorAll('body *')].filter(e => e.checkVisibility());
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = colour => rgb(colour).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = e => {
  const colour = getComputedStyle(e).backgroundColor;
  return rgb(colour)[3] === 0 ? ground(e.parentElement) : colour;
};
const contrast = (a, b) => {
  const [dark, bright] = [light(a), light(b)].sort((x, y) => x - y);
  return (bright + 0.05) / (dark + 0.05);
};
const written = shown.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
const share = bar => bar.getBoundingClientRect().width / bar.parentElement.getBoundingClientRect().width;
return {
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  outside: shown.filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 200)),
  images: [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
  headings: [...document.querySelectorAll('h1, h2, h3')].map(h => [h.innerText, h.checkVisibility()]),
  warnings: [...document.querySelectorAll('.warning')].map(w => [w.innerText, w.checkVisibility()]),
  contrasts: written.map(e => [e.outerHTML.slice(0, 80), contrast(getComputedStyle(e).color, ground(e))]),
  bars: shown.filter(e => e.matches('.bar')).map(e => contrast(ground(e), ground(e.parentElement))),
  layers: [...document.querySelectorAll('.layers')].map(table => [...table.tBodies[0].rows].map(
    row => [row.cells[0].textContent, ...[...row.querySelectorAll('.bar')].map(share)])),
  plots: [...document.querySelectorAll('svg.plot')].map(plot => plot.getBoundingClientRect().width),
  resources: performance.getEntriesByType('resource').map(r => r.name),
};
"""


# Where elements begin, in pixels from the top of the page.
PLACES = """
return [...document.querySelectorAll(arguments[0])].map(one => Math.round(one.getBoundingClientRect().top + scrollY));
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; the test is skipped without it, or fails under SPADE_FAST_REQUIRE_BROWSER=1."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver and importlib.util.find_spec("selenium")):
        missing = "needs Debian's packages chromium and chromium-driver, and selenium from PyPI"
        if os.environ.get("SPADE_FAST_REQUIRE_BROWSER") == "1":
            pytest.fail(f"SPADE_FAST_REQUIRE_BROWSER=1, but this {missing}", pytrace=False)
        pytest.skip(missing)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


def show(browser, page, width):
    """Open a page with all its parts unfolded."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")


def screenshot(browser, path):
    """Save a picture of the whole page, and return its pixels."""
    taken = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(base64.b64decode(taken["data"]))
    with Image.open(path) as picture:
        return np.array(picture.convert("RGB")).astype(int)


def requested(browser):
    """Addresses that pages asked for; on a busy machine the browser is still loading pages of its own (chrome://)."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in messages if one["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("chrome")]


def is_alone(page, browser):
    """Whether a page was asked for, and nothing outside it; pages of the browser's own may load images before it."""
    urls = requested(browser)
    return page.as_uri() in urls and all(url == page.as_uri() or url.startswith("data:") for url in urls)


@pytest.mark.parametrize("width", [1280, 400])
def test_explanation_as_rendered(small, photo, tmp_path, browser, width):
    sparsity = {"0": 0.25, "2": 0.5, "6": 0.0}
    options = {"methods": ("saliency", "gradcam"), "augmentations": 6, "sparsity": sparsity}
    explanation = explain(photo, small, tmp_path / "out", **options)
    page = explanation.files[-1]
    assert page.name == explanation.report["page"] == "index.html"
    show(browser, page, width)
    screenshot(browser, SCREENSHOTS / f"explanation-{width}.png")
    seen = browser.execute_script(LOOK)
    check(seen)
    assert len(seen["images"]) == 2 + 2 * 3 and seen["headings"][0] == ["Why “cat”?", True]
    traces = explanation.report["traces"].values()
    for trace, rows in zip(traces, seen["layers"], strict=True):
        for one, (name, removed, error) in zip(trace["layers"], rows, strict=True):
            assert name == one["name"] and abs(removed - one["reached"]) < 0.01
            assert abs(error - min(1, one["measured_error"])) < 0.01
    assert is_alone(page, browser)


@pytest.mark.parametrize("width", [1280, 400])
def test_awkward_page_as_rendered(tmp_path, monkeypatch, browser, width):
    monkeypatch.setattr("test_page.CLASSES", (HOSTILE, "b" * 90, "cat"))
    layers = [layer("backbone" + ".encoder_block" * 12, 0.9, 3.0), layer("x" * 90, 0, note="y" * 90)]
    report = make_report_of_several(layers=layers, image="z" * 90, sparsity={"w" * 90: 0.5})
    names = ("Dense network", "Dense network, SmoothGrad", "SPADE, SmoothGrad", "Mean of SPADE and SmoothGrad")
    columns = make_columns(names, {names[2]: ["1 of 4 traces lost the decision"]})
    (tmp_path / "page.html").write_text(make_page(report, columns), encoding="utf-8")
    show(browser, tmp_path / "page.html", width)
    screenshot(browser, SCREENSHOTS / f"awkward-{width}.png")
    seen = browser.execute_script(LOOK)
    check(seen)
    assert len(seen["warnings"]) == 4 and all(visible for _, visible in seen["warnings"])
    assert "do not explain the prediction" in seen["warnings"][0][0]
    assert len(seen["plots"]) == 2 and all(250 < plot < width for plot in seen["plots"])


@pytest.mark.parametrize("width", [1280, 400])
def test_other_pages_as_rendered(small, photo, tmp_path, browser, width):
    pytest.importorskip("kornia")
    from spade_fast.batch import run
    from spade_fast.cli.drawings import Drawing
    from spade_fast.cli.feature_pictures import draw_features
    from spade_fast.cli.gallery import Gallery
    from spade_fast.inputs.setup import Setup

    photo.rename(photo.with_name("z" * 90 + ".png"))
    methods = ("saliency", "gradcam", "layercam")
    run(tmp_path, tmp_path / "batch", model=small, sparsity=1.0, augmentations=4, workers=0, methods=methods)
    traces = list(tmp_path.glob("batch/traces/*"))
    for page in (
        Gallery(tmp_path / "batch").write(),
        draw_features([1, 2], traces, tmp_path / "x", Setup(small), Drawing(steps=1, count=2))[-1],
    ):
        show(browser, page, width)
        screenshot(browser, SCREENSHOTS / f"{page.parent.name}-{width}.png")
        seen = browser.execute_script(LOOK)
        check_layout(seen)
        assert seen["images"] and len(seen["contrasts"]) > 5 and seen["bars"] == []
        assert is_alone(page, browser)


@pytest.mark.parametrize("width", [1280, 390])
def test_units_as_rendered(small, photo, tmp_path, browser, width):
    """With long names, a photo to start with, and empty cells; several pictures of a unit are of full size."""
    pytest.importorskip("kornia")
    from spade_fast.cli.drawings import Drawing
    from spade_fast.cli.unit_pictures import draw_units
    from spade_fast.inputs.setup import Setup
    from spade_fast.pruning.config import PruneConfig

    photos = [photo.rename(tmp_path / f"{'z' * 90}.png"), tmp_path / "other.png"]
    Image.fromarray(PHOTO).save(photos[1])
    setup = Setup(small, augmentations=4)
    pages = (
        ("units", "auto:2", "0", 0.5, Drawing(steps=1, start=photos[0])),
        ("several", "auto:1", "0", 0.5, Drawing(steps=1, count=3)),
        ("cut", "3", None, {"2": 1.0}, Drawing(steps=1)),
    )
    for name, units, layer, sparsity, drawing in pages:
        config = PruneConfig(sparsity=sparsity, solver="sparsegpt", seed=0)
        page = draw_units(photos, units, tmp_path / name, config, setup, drawing, layer=layer)[-1]
        show(browser, page, width)
        screenshot(browser, SCREENSHOTS / f"{name}-{width}.png")
        seen = browser.execute_script(LOOK)
        check_layout(seen)
        assert len(seen["headings"]) > 5 and is_alone(page, browser)
        assert all(contrast >= 3 for contrast in seen["bars"])
        places = browser.execute_script(PLACES, ".unit figure")
        columns = 5 if name == "units" else 4
        rows, features = len(set(places)), len(places) // columns
        assert len(places) == columns * features
        assert rows == len(places) if name == "several" else (rows == features) == (width == 1280)
        if name == "several":
            pictures = ".unit .set:not(.small) img"
            sides = browser.execute_script(f"return [...document.querySelectorAll('{pictures}')].map(i => i.width)")
            assert len(sides) == 9 and min(sides) >= 280
            assert len(set(browser.execute_script(PLACES, pictures))) == (3 if width == 1280 else 9)
    missing = browser.execute_script("return [...document.querySelectorAll('.missing')].map(m => m.innerText)")
    assert missing == 2 * ["not drawn: cut off by this trace"]


def check(seen):
    """What must hold for every explanation."""
    check_layout(seen)
    assert len(seen["contrasts"]) > 30 and seen["bars"] and min(seen["bars"]) >= 3


def check_layout(seen):
    """What must hold for every page."""
    assert seen["overflow"] <= 0 and seen["outside"] == []
    assert all(complete and natural > 0 and width > 50 for complete, natural, width in seen["images"])
    assert all(text and visible for text, visible in seen["headings"])
    assert [one for one in seen["contrasts"] if one[1] < 4.5] == []
    assert all(name.startswith("data:") for name in seen["resources"])


def test_nothing_is_fetched_even_if_a_page_asks(tmp_path, browser):
    page = tmp_path / "page.html"
    page.write_text(make_page(), encoding="utf-8")
    show(browser, page, 1280)
    assert browser.get_log("browser") == []
    assert {url.partition(":")[0] for url in requested(browser) if url != page.as_uri()} == {"data"}
    outside = '<img src="other.png"><script>document.title = "changed"</script>'
    page.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{outside}"), encoding="utf-8")
    show(browser, page, 1280)
    assert sum("Content Security Policy" in entry["message"] for entry in browser.get_log("browser")) == 2
    assert browser.title == "Why “ant”? dog.jpg"


@pytest.mark.parametrize("eyes", ["none", "protanopia", "deuteranopia", "tritanopia", "achromatopsia"])
def test_bars_differ_to_all_eyes(tmp_path, browser, eyes):
    (tmp_path / "page.html").write_text(make_page(), encoding="utf-8")
    show(browser, tmp_path / "page.html", 1280)
    browser.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": eyes})
    pixels = screenshot(browser, tmp_path / "page.png")
    browser.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": "none"})
    middle = "const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
    keys = browser.find_elements("css selector", ".key")
    share, error = (pixels[int(y), int(x)] for x, y in (browser.execute_script(middle, key) for key in keys))
    assert np.abs(share - error).max() >= 20


@pytest.mark.parametrize("share", [0.4, 0.6])
def test_a_trace_that_prefers_the_other_class_is_said(share):
    report = make_report()
    report["against"] = {"class": 2, "name": "cat"}
    for name, one in report["predictions"].items():
        one["against"] = 0.7 if name == "dense" else share
    (said,) = solver_warnings("exact", report) or [""]
    assert said.startswith("SPADE decides “ant” against “cat” the other way round") == (share < 0.5)
