"""Peak memory of an exact solve of a 1000 x 2048 layer, measured in a process of its own (Linux).

Run with ``python benchmarks/peak_memory.py``. Prints the peak, the resident memory after the imports, and the
difference.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from spade_fast.compat import TrueOBS


def resident(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (highest so far) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--columns", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    before = resident("VmRSS")
    solver = TrueOBS(nn.Linear(args.columns, args.rows, bias=False))
    for _ in range(8):
        solver.add_batch(torch.randn(args.columns // 4, args.columns), None)
    solver.prepare_unstr()
    solver.prune_unstr([0.95])
    peak = resident("VmHWM")
    layer = f"{args.rows} x {args.columns}"
    print(f"exact solve {layer}: peak {peak:.0f} MB, after imports {before:.0f} MB, {peak - before:.0f} MB more")


if __name__ == "__main__":
    main()
