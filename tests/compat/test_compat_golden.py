"""The drop-in classes reproduce the saved results of the published ones."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backends import in_turns
from torch import Tensor, nn

from spade_fast.compat import SparseGPT, SparseGPTSuperFast, TrueOBS

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((GOLDEN / "manifest.json").read_text())["cases"]
}


def exact(layer: nn.Module, inputs: list[Tensor], call: dict[str, Any]) -> tuple[TrueOBS, Tensor | list[Tensor]]:
    solver = TrueOBS(layer, None, call.get("always_damp", 0))
    for inp in inputs:
        solver.add_batch(inp, None)
    kind = call["kind"]
    if kind == "nm":
        solver.nmprune(call["n"], call["m"])
        return solver, layer.weight.detach().flatten(1)
    if kind == "structured":
        return solver, solver.prune_struct(call["sparsities"], call["size"])
    if kind == "blocked":
        solver.prepare_blocked(call["size"])
        return solver, solver.prune_blocked(call["sparsities"])
    solver.prepare_unstr()
    if kind == "balanced":
        return solver, solver.prune_unstr_balanced(call["rem"])
    return solver, solver.prune_unstr(call["sparsities"])


def single(layer: nn.Module, inputs: list[Tensor], call: dict[str, Any]) -> tuple[SparseGPT, Tensor]:
    solver = SparseGPT(layer)
    for inp in inputs:
        solver.add_batch(inp, None)
    solver.fasterprune(call["sparsity"], call["prunen"], call["prunem"], call["blocksize"], call["percdamp"])
    return solver, layer.weight.detach().flatten(1)


def batch(layer: nn.Module, inputs: list[Tensor], call: dict[str, Any]) -> tuple[SparseGPTSuperFast, list[Tensor]]:
    solver = SparseGPTSuperFast(layer, call["samples"])
    for number, inp in enumerate(inputs, 1):
        solver.add_batch(inp, None)
        if number % call["batches_per_sample"] == 0:
            solver.inc_model_counter()
    layers = [copy.deepcopy(layer) for _ in range(call["samples"])]
    solver.fasterprune(call["sparsity"], layers, blocksize=call["blocksize"], percdamp=call["percdamp"])
    return solver, [pruned.weight.detach().flatten(1) for pruned in layers]


SOLVERS = {"TrueOBS": exact, "SparseGPT": single, "SparseGPTSuperFast": batch}


@in_turns(name=CASES)
def test_golden(name: str, backend: str) -> None:
    case = CASES[name]
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        golden = {key: torch.from_numpy(array) for key, array in arrays.items()}
    settings = dict(case["layer"])
    layer = getattr(nn, settings.pop("type"))(**settings)
    layer.weight.data = golden["weight"].clone()
    inputs = [golden[f"input{index}"] for index in range(case["batches"])]

    solver, result = SOLVERS[case["call"]["solver"]](layer, inputs, case["call"])

    pruned = torch.stack(result) if isinstance(result, list) else result
    assert pruned.shape == golden["pruned"].shape
    assert torch.equal(pruned == 0, golden["pruned"] == 0)
    largest = float(golden["weight"].abs().max())
    torch.testing.assert_close(pruned, golden["pruned"], rtol=0, atol=1e-3 * largest)
    if "hessian" in golden:
        torch.testing.assert_close(solver.H, golden["hessian"], rtol=1e-4, atol=1e-5 * float(golden["hessian"].max()))
    if "losses" in golden:
        torch.testing.assert_close(
            solver.Losses, golden["losses"], rtol=1e-3, atol=1e-5 * float(golden["losses"].max())
        )
