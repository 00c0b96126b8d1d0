"""Compares two saved runs and fails if any benchmark of ours became slower by more than the noise.

``python benchmarks/compare.py BASE NEW [--noise 0.25]``. Machines and their load differ, so plain times cannot be
compared. Instead, the time of the fastest call, which other programs disturb least, is multiplied by the rate at which
the same machine multiplied (or copied) matrices during the benchmark: the inverse of the share of the floor. The noise
of a benchmark is the interquartile range of its times and of that rate in both runs, at least ``--noise``. Calls of a
few milliseconds also depend on which memory the allocator has kept: confirm a verdict about them with a second run.
Runs on the CPU and on a GPU, or on different GPUs, are not compared.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from table import load

_OURS = "spade_fast"


def costs(saved: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Return, for each benchmark of ours, its cost (time by machine rate) and its relative spread."""
    return {
        f"{b['extra_info']['op']} {b['extra_info']['layer']}": (
            b["stats"]["min"] * b["extra_info"]["floor_rate"],
            b["stats"]["iqr"] / b["stats"]["median"] + b["extra_info"].get("floor_spread", 0.0),
        )
        for b in saved["benchmarks"]
        if b["extra_info"].get("implementation") == _OURS
    }


def devices(saved: dict[str, Any]) -> str:
    """Return the device of a run: ``cpu``, the name of a GPU, or ``""`` for an empty run."""
    return ", ".join({b["extra_info"].get("machine", {}).get("device", "cpu") for b in saved["benchmarks"]})


def compare(base: dict[str, Any], new: dict[str, Any], least_noise: float) -> tuple[list[str], list[str]]:
    """Return one line per benchmark, and the names of those that became slower by more than the noise."""
    before, after = costs(base), costs(new)
    lines, slower = [], []
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after:
            lines.append(f"missing   {name} (only in the saved run)")
            continue
        if name not in before:
            lines.append(f"new       {name} (not in the saved run)")
            continue
        (old_cost, old_spread), (new_cost, new_spread) = before[name], after[name]
        noise = max(least_noise, old_spread + new_spread)
        ratio = new_cost / old_cost
        if ratio > 1 + noise:
            slower.append(name)
        verdict = "SLOWER" if ratio > 1 + noise else "faster" if ratio < 1 / (1 + noise) else "same"
        lines.append(f"{verdict:9} {name}: {ratio:.2f} of the saved cost (noise {noise:.0%})")
    return lines, slower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="JSON of the saved run")
    parser.add_argument("new", help="JSON of the run to judge")
    parser.add_argument("--noise", type=float, default=0.25, help="relative change that always counts as noise")
    args = parser.parse_args()
    base, new = load(args.base), load(args.new)
    before, after = devices(base), devices(new)
    if before and after and before != after:
        sys.exit(f"runs of different devices cannot be compared: {args.base} is of {before}, {args.new} of {after}")
    lines, slower = compare(base, new, args.noise)
    print("\n".join(lines))
    if not costs(base).keys() & costs(new).keys():
        sys.exit("no benchmark is in both runs")
    if slower:
        sys.exit(f"slower beyond the noise: {', '.join(slower)}")


if __name__ == "__main__":
    main()
