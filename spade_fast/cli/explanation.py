"""The report of an explanation: the content of ``report.json`` about its networks, and the warnings drawn from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spade_fast._util.text import listed
from spade_fast.attribution.methods import METHODS
from spade_fast.cli.columns import ExplainedTrace
from spade_fast.cli.trace_photo import lost_decision
from spade_fast.inputs.networks import LoadedModel
from spade_fast.pruning.config import SOLVERS, PruneConfig
from spade_fast.pruning.goals import LEAST_WITH_NOISE
from spade_fast.targets.class_names import class_label


@dataclass(frozen=True)
class Explanation:
    """The files written (the page last), the seconds by stage, and the content of the JSON report."""

    files: list[Path]
    seconds: dict[str, float]
    report: dict[str, Any]

    def predictions(self) -> list[str]:
        """Return lines: what each network predicts and how much a trace lacks, and which levels are the same trace."""
        titles = {name: trace_title(one, self.report["traces"]) for name, one in self.report["traces"].items()}
        width = max(map(len, ("dense", *titles.values())))
        lines = []
        for name, prediction in self.report["predictions"].items():
            best, target = prediction["top"][0], prediction["target"]
            line = f"{titles.get(name, name):>{width}}: {best['name']} {best['probability']:.1%}"
            if best["class"] != target["class"]:
                line += f", {target['name']} {target['probability']:.1%}"
            if prediction["against"] is not None:
                line += f", {explained(self.report)} {prediction['against']:.1%}"
            if name in titles:
                one = self.report["traces"][name]
                found = "" if one["auto"] is None else f"λ {one['auto']['error']:.3g}, "
                line += f" ({found}{one['removed']:.0%} removed)"
            lines.append(line)
        for solver in self.report["settings"]["solvers"]:
            lines += equal_levels(solver, self.report)
        return lines

    def warnings(self) -> list[str]:
        """Return what to know of methods left out, of noise that destroys the class, and of decisions lost."""
        sentences = [f"left out: {reason}" for reason in self.report["left_out"].values()]
        sentences += empty_maps(self.report) + noise_warnings(self.report)
        for solver in self.report["settings"]["solvers"]:
            sentences += _on_decisions(solver, traces_of(solver, self.report), self.report["predictions"])
            sentences += _on_the_other_class(solver, self.report)
        return sentences


def empty_maps(report: Mapping[str, Any]) -> list[str]:
    """Name the methods whose maps of the dense network are zero everywhere."""
    names = listed([METHODS[method].title for method in report["empty"]])
    target = report["predictions"]["dense"]["target"]["name"]
    return [f"maps of the dense network are zero everywhere: nothing changes “{target}” ({names})"] if names else []


def noise_warnings(report: Mapping[str, Any]) -> list[str]:
    """Say whether the noise of SmoothGrad leaves the dense network next to nothing of the class."""
    noisy, target = report["noisy_probability"], report["predictions"]["dense"]["target"]
    if noisy is None or noisy >= LEAST_WITH_NOISE * target["probability"]:
        return []
    return [
        f"the noise of SmoothGrad destroys “{target['name']}”: on noisy copies of the photo the dense network's "
        f"probability is {noisy:.1%}, not {target['probability']:.1%}; SmoothGrad maps do not explain the prediction"
    ]


def solver_warnings(solver: str, report: Mapping[str, Any]) -> list[str]:
    """Say which of a solver's traces lost the decision, and which kept less than was asked."""
    own = traces_of(solver, report)
    return [
        *_on_decisions(solver, own, report["predictions"]),
        *_on_the_other_class(solver, report),
        *_on_levels(solver, own, explained(report)),
    ]


def explained(report: Mapping[str, Any]) -> str:
    """Return what automatic sparsity keeps the probability of: the class, or the class against the other."""
    name, other = report["predictions"]["dense"]["target"]["name"], report["against"]
    return f"“{name}”" if other is None else f"“{name}” against “{other['name']}”"


def equal_levels(solver: str, report: Mapping[str, Any]) -> list[str]:
    """Say which shares to keep led to the same trace of a solver."""
    keeps: dict[tuple[int, tuple[float, ...]], list[Any]] = {}
    for one in traces_of(solver, report).values():
        reached = tuple(layer["reached"] for layer in one["layers"])
        keeps.setdefault((one["draw"], reached), []).append(one["keep"])
    draws = report["settings"]["draws"]
    equal = Counter(", ".join(f"{keep:g}" for keep in shares) for shares in keeps.values() if len(shares) > 1)
    return [
        f"{SOLVERS[solver]} makes the same trace for keep {shares}" + (f" in {count} of {draws} draws" * (draws > 1))
        for shares, count in equal.items()
    ]


def traces_of(solver: str, report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the entries of a solver's traces."""
    return {name: one for name, one in report["traces"].items() if one["solver"] == solver}


def trace_title(one: Mapping[str, Any], traces: Mapping[str, Mapping[str, Any]]) -> str:
    """Name a trace of the report by its solver and what tells it from the others: ``"SPADE, keep 0.5, draw 1"``."""
    parts = [SOLVERS[one["solver"]]]
    for what in ("keep", "draw"):
        if len({other[what] for other in traces.values()}) > 1:
            parts.append(f"{what} {one[what]:g}")
    return ", ".join(parts)


def report_prediction(model: LoadedModel, scores: Tensor, target: int, against: int | None) -> dict[str, Any]:
    """Return the explained class, its probability among it and the other one, and the five most probable classes."""
    best = scores.sort(descending=True, stable=True)  # the first of equal ones, as argmax
    return {
        "target": {"class": target, "name": model.class_name(target), "probability": float(scores[target])},
        "top": [
            {"class": index, "name": model.class_name(index), "probability": probability}
            for probability, index in zip(best.values[:5].tolist(), best.indices[:5].tolist(), strict=True)
        ],
        "against": None if against is None else float(scores[target] / (scores[target] + scores[against])),
    }


def report_trace(one: ExplainedTrace, config: PruneConfig) -> dict[str, Any]:
    """Return the entry of a trace: how its sparsity was given or found, and its layers."""
    return {
        "file": f"trace-{one.name}.safetensors",
        "solver": one.solver,
        "sparsity": config.record()["sparsity"],
        "keep": one.keep,
        "draw": one.draw,
        "auto": one.trace.header.get("auto"),
        "removed": one.removed,
        "network_sparsity": one.trace.network_sparsity,
        "decision_kept": not one.lost,
        "layers": [asdict(layer) for layer in one.trace.reports],
    }


def _on_decisions(
    solver: str, own: Mapping[str, Mapping[str, Any]], predictions: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    labels = {name: class_label(one["top"][0]["class"], one["top"][0]["name"]) for name, one in predictions.items()}
    title, before = SOLVERS[solver], labels["dense"]
    lost = [labels[name] for name, one in own.items() if not one["decision_kept"]]
    if not lost:
        return []
    if len(own) == 1:
        return [f"{lost_decision(title, before, *lost)}; its maps do not explain the prediction"]
    after = listed(list(dict.fromkeys(lost)), 5)
    return [
        f"{len(lost)} of {len(own)} {title} traces lost the decision: they predict {after} instead of {before}; the "
        "mean maps contain theirs, which do not explain the prediction"
    ]


def _on_the_other_class(solver: str, report: Mapping[str, Any]) -> list[str]:
    """Say whether traces prefer the other one of two classes than the dense network does."""
    predictions, own = report["predictions"], traces_of(solver, report)
    dense = predictions["dense"]["against"]
    turned = [name for name in own if dense is not None and (predictions[name]["against"] < 0.5) != (dense < 0.5)]
    if not turned:
        return []
    number = "" if len(own) == 1 else f"{len(turned)} of {len(own)} "
    plural = "traces decide" if len(own) > 1 else "decides"
    return [
        f"{number}{SOLVERS[solver]} {plural} {explained(report)} the other way round than the dense network; its maps "
        "do not explain why"
    ]


def _on_levels(solver: str, own: Mapping[str, Mapping[str, Any]], target: str) -> list[str]:
    less = [one for one in own.values() if one["auto"] is not None and not one["auto"]["kept"]]
    if not less:
        return []
    title, auto = SOLVERS[solver], less[0]["auto"]
    if len(own) > 1:
        which = "; ".join(trace_title(one, own).removeprefix(f"{title}, ") for one in less)
        return [
            f"{len(less)} of {len(own)} {title} traces keep less than asked for, but are the mildest tried: {which}"
        ]
    share = auto["score"] / auto["dense"]
    where = "on noisy copies of the photo" if share >= auto["keep"] else f"only {share:.1%}"
    return [
        f"{title} keeps less than {100 * auto['keep']:g}% of the dense network's probability of {target}, {where}, but "
        "is the mildest trace tried"
    ]
