"""``TrueOBS`` on every kind of layer, its corner cases and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compat_layers import LAYERS, make, matrices, outputs_by_row, tap_order
from torch import Tensor, nn

from spade_fast.compat import TrueOBS
from spade_fast.compat.problem import _unit_lower
from spade_fast.ops import reference

CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def collected(layer: nn.Module, x: Tensor, **settings: object) -> TrueOBS:
    solver = TrueOBS(layer, **settings)
    for part in x.chunk(2):
        solver.add_batch(part, None)
    return solver


def stacked(solver: TrueOBS) -> Tensor:
    """The Hessian ``[groups, columns, columns]`` from which the solver starts."""
    return solver.H.float().double().reshape(-1, solver.columns, solver.columns)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_hessian_gives_the_size_of_the_outputs(name: str) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    weight = matrices(layer)
    assert (solver.rows, solver.columns) == (weight.shape[0] * weight.shape[1], weight.shape[2])
    assert solver.H.shape == (weight.shape[:1] if weight.shape[0] > 1 else ()) + (solver.columns,) * 2
    assert solver.H.dtype == torch.float64
    assert solver.nsamples == x.shape[0]
    power = ((weight @ stacked(solver)) * weight).sum(2).flatten()
    expected = 2 / x.shape[0] * outputs_by_row(layer, x).square().sum(1)
    torch.testing.assert_close(power, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("blocked", [False, True])
def test_paths_and_weights_agree_with_the_oracle(name: str, blocked: bool) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    before = layer.weight.detach().clone()
    block = 1 if not blocked else 3 if solver.columns % 2 else 2
    order_of_columns = tap_order(layer) if blocked else torch.arange(solver.columns)
    weight = matrices(layer)[:, :, order_of_columns]
    hessian = stacked(solver)[:, order_of_columns][:, :, order_of_columns]
    order, losses = reference.obs_path(weight, torch.linalg.inv(hessian), block)

    sparsities = [0, 0.4, 0.95, 1]
    if blocked:
        solver.prepare_blocked(block)
        results = solver.prune_blocked(sparsities)
    else:
        solver.prepare_unstr()
        results = solver.prune_unstr(sparsities)

    assert solver.Losses.shape == (solver.rows, solver.columns // block + 1)
    assert (solver.Losses[:, 0] == 0).all()
    torch.testing.assert_close(solver.Losses[:, 1:].double(), losses.flatten(0, 1), **CLOSE)
    ranked = losses.flatten().argsort() // losses.shape[2]
    for sparsity, result in zip(sparsities, results, strict=True):
        removals = ranked[: -int(-losses.numel() * sparsity // 1)]
        counts = torch.bincount(removals, minlength=solver.rows).reshape(weight.shape[:2])
        expected = reference.obs_solution(weight, hessian, torch.empty(0), order, counts, block)
        expected = expected[:, :, order_of_columns.argsort()].flatten(0, 1)
        assert torch.equal(result == 0, expected == 0)
        torch.testing.assert_close(result.double(), expected, **CLOSE)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", LAYERS)
def test_nmprune_writes_the_layer(name: str) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    order_of_columns = tap_order(layer)
    weight = matrices(layer)[:, :, order_of_columns]
    hessian = stacked(solver)[:, order_of_columns][:, :, order_of_columns]
    m = 3 if solver.columns % 4 else 4
    order, _ = reference.nm_path(weight, torch.linalg.inv(hessian), 2, m)
    counts = torch.full(weight.shape[:2], order.shape[2])
    expected = reference.obs_solution(weight, hessian, torch.empty(0), order, counts)
    kept_aside = layer.weight.data
    copy = kept_aside.clone()
    solver.nmprune(2, m)
    torch.testing.assert_close(matrices(layer)[:, :, order_of_columns], expected, **CLOSE)
    assert torch.equal(kept_aside, copy)


@pytest.mark.parametrize("name", ["linear", "conv", "grouped", "depthwise", "conv1d"])
@pytest.mark.parametrize("blocked", [False, True])
def test_traces_are_the_replayed_path(name: str, blocked: bool) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    block = solver.columns // 3 if blocked else 1
    columns = tap_order(layer) if blocked else torch.arange(solver.columns)
    weight, hessian = matrices(layer)[:, :, columns], stacked(solver)[:, columns][:, :, columns]
    order, _ = reference.obs_path(weight, torch.linalg.inv(hessian), block)
    if blocked:
        solver.prepare_blocked(block, parallel=3)
    else:
        solver.prepare_unstr(parallel=3)

    assert len(solver.Traces) == -(-solver.rows // 3)
    whole = torch.cat(list(solver.Traces), 1)
    assert whole.shape == (solver.columns // block + 1, solver.rows, solver.columns)
    for count in range(len(whole)):
        counts = torch.full(weight.shape[:2], count)
        expected = reference.obs_solution(weight, hessian, torch.empty(0), order, counts, block).flatten(0, 1)
        assert torch.equal(whole[count][:, columns] == 0, expected == 0)
        torch.testing.assert_close(whole[count][:, columns].double(), expected, **CLOSE)
    torch.testing.assert_close(solver.Traces[-1], whole[:, (len(solver.Traces) - 1) * 3 :])
    torch.testing.assert_close(torch.cat(solver.Traces[:2], 1), whole[:, :6])
    with pytest.raises(IndexError):
        solver.Traces[len(solver.Traces)]


def test_traces_of_an_indefinite_matrix() -> None:
    lower = _unit_lower(torch.tensor([[2.0, 1, 0], [1, -1, 3], [0, 3, 1]], dtype=torch.float64))
    assert torch.equal(lower, lower.tril()) and (lower.diagonal() == 1).all()
    d = torch.diag(torch.tensor([2.0, -1.5, 7], dtype=torch.float64))
    torch.testing.assert_close(lower @ d @ lower.mT, torch.tensor([[2.0, 1, 0], [1, -1, 3], [0, 3, 1]]).double())


@pytest.mark.parametrize("name", ["linear", "grouped"])
@pytest.mark.parametrize("size", [1, 3])
def test_prune_struct(name: str, size: int) -> None:
    layer, x = make(name)
    solver = collected(layer, x)
    groups = solver.columns // size
    results = solver.prune_struct([0, 0.5, 1, 0.25], size)
    weight, hessian = matrices(layer), stacked(solver)
    torch.testing.assert_close(results[0], weight.flatten(0, 1).float())
    for result, gone in zip(results[1:], [-(-groups // 2) + 1, groups, -(-groups // 4) + 1], strict=True):
        result = result.reshape(weight.shape).double()
        empty = (result == 0).all(1).unflatten(1, (groups, size))
        assert torch.equal(empty.all(2), empty.any(2))
        assert (empty.all(2).sum(1) == gone).all()
        for w, fitted, h in zip(weight, result, hessian, strict=True):
            kept = (fitted != 0).any(0)
            torch.testing.assert_close(
                (h @ (fitted - w).mT)[kept], torch.zeros(int(kept.sum()), len(w)).double(), **CLOSE
            )


def test_prune_struct_takes_the_cheapest_group_first() -> None:
    layer, x = make("linear")
    solver = collected(layer, x)
    weight, hessian = matrices(layer)[0], stacked(solver)[0]
    costs = []
    for group in range(4):
        kept = [j for j in range(12) if j // 3 != group]
        fitted = torch.zeros_like(weight)
        fitted[:, kept] = torch.linalg.solve(hessian[kept][:, kept], hessian[kept] @ weight.mT).mT
        costs.append(float(((fitted - weight) @ hessian * (fitted - weight)).sum()))
    solver._matrix.write(weight)
    result = solver.prune_struct([1e-9], 3)[0]
    first_two = (result == 0).all(0).unflatten(0, (4, 3)).all(1)
    assert first_two[costs.index(min(costs))] and first_two.sum() == 2


def test_balanced() -> None:
    layer, x = make("linear")
    solver = collected(layer, x)
    solver.prepare_unstr()
    for rem in (0, 5, 12):
        result = solver.prune_unstr_balanced(rem)
        assert ((result != 0).sum(1) == rem).all()
        torch.testing.assert_close(result, solver.Traces[0][12 - rem], **CLOSE)


def test_rows_with_zeros_escape_the_damping_of_a_singular_hessian(tmp_path: Path) -> None:
    """Five samples for twelve columns: rows with four weights left have a regular Hessian, the others get H + I."""
    layer = nn.Linear(12, 4, bias=False)
    layer.weight.data[1, 4:] = 0
    layer.weight.data[3, 2:10] = 0
    solver = collected(layer, torch.randn(5, 12), log_file=str(tmp_path / "log"))
    solver.H[range(12), range(12)] -= 1e-3  # below zero, so that rounding does not matter
    solver.H[:4, :4] += 0.1 * torch.eye(4)
    solver.H[10:, 10:] += 0.1 * torch.eye(2)
    weight, hessian = matrices(layer), stacked(solver)
    solver.prepare_unstr()
    assert "not positive definite" in (tmp_path / "log").read_text()
    results = solver.prune_unstr_balanced(3)
    for row in range(4):
        zero = weight[0, row] == 0
        own = hessian[0] + (0 if row in (1, 3) else 1) * torch.eye(12)
        own[zero] = 0
        own[:, zero] = 0
        own[zero, zero] = 1
        order, losses = reference.obs_path(weight[:, row : row + 1], torch.linalg.inv(own)[None])
        torch.testing.assert_close(solver.Losses[row, 1:].double(), losses[0, 0], **CLOSE)
        expected = reference.obs_solution(
            weight[:, row : row + 1], own[None], torch.empty(0), order, torch.tensor([[9]])
        )
        torch.testing.assert_close(results[row].double(), expected[0, 0], **CLOSE)
        torch.testing.assert_close(solver.Traces[0][9, row].double(), expected[0, 0], **CLOSE)


def test_log_file(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    solver = TrueOBS(nn.Linear(6, 2), str(log))
    assert "rows=2, columns=6" in log.read_text()
    solver.H -= torch.eye(6) / 2
    solver.prepare_unstr()
    assert len(log.read_text().splitlines()) == 2
    with pytest.raises(FileNotFoundError):
        TrueOBS(nn.Linear(6, 2), str(tmp_path / "missing" / "log.txt"))


def test_hopeless_hessian_names_the_layer() -> None:
    solver = TrueOBS(nn.Linear(6, 2))
    solver.H -= 5 * torch.eye(6)
    with pytest.raises(torch.linalg.LinAlgError, match=r"Linear layer with weight \(2, 6\).*always_damp"):
        solver.prepare_unstr()


@pytest.mark.parametrize("kind", ["unstructured", "blocked", "nm"])
def test_hessians_that_are_definite_by_rounding_alone_are_solved(kind: str) -> None:
    """23 inputs for 24 columns: about half of these Hessians pass float32 Cholesky and need no H + I."""
    for _ in range(20):
        layer = nn.Linear(24, 4, bias=False)
        solver = TrueOBS(layer)
        solver.add_batch(torch.randn(23, 24), None)
        if kind == "nm":
            solver.nmprune()
            result = layer.weight.detach()
        elif kind == "blocked":
            solver.prepare_blocked(4)
            result = solver.prune_blocked([0.5])[0]
        else:
            solver.prepare_unstr()
            result = solver.prune_unstr([0.5])[0]
        assert result.isfinite().all() and (result == 0).sum() == result.numel() // 2


def test_nearly_singular_blocks_are_solved() -> None:
    layer = nn.Linear(12, 3, bias=False)
    x = torch.randn(200, 6)
    x = torch.cat([x, x + 1e-3 * torch.randn(200, 6)], 1)[:, [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]]
    solver = collected(layer, x)
    solver.prepare_blocked(4)
    half, nothing = solver.prune_blocked([0.5, 1])
    assert half.isfinite().all() and not nothing.any()
    assert ((half == 0).unflatten(1, (3, 4)).all(2).sum()) == 5
    assert solver.Traces[0].isfinite().all()


@pytest.mark.parametrize(
    "name", ["linear tokens", "transformers Conv1D", "conv", "depthwise multiplier", "conv1d same"]
)
def test_resolve_finds_the_weights_behind_the_outputs(name: str) -> None:
    layer, x = make(name)
    solver = TrueOBS(layer)
    true = layer.weight.detach().clone()
    for part in x.chunk(2):
        solver.add_batch(part, layer(part), resolve=True)
    nn.init.zeros_(layer.weight)
    assert solver.resolvemat.dtype == torch.float64
    solver.resolve()
    torch.testing.assert_close(layer.weight.detach(), true, rtol=1e-3, atol=1e-3)


def test_mask_selects_tokens() -> None:
    layer, _ = make("linear")
    x, mask = torch.randn(4, 5, 12), torch.rand(4, 5) < 0.5
    masked, plain = TrueOBS(layer), TrueOBS(layer)
    masked.set_mask(mask)
    masked.add_batch(x, layer(x), resolve=True)
    plain.add_batch(x * mask[:, :, None], layer(x) * mask[:, :, None], resolve=True)
    assert masked.nsamples == plain.nsamples == 4
    torch.testing.assert_close(masked.H, plain.H)
    torch.testing.assert_close(masked.resolvemat, plain.resolvemat)
    with pytest.raises(ValueError, match=r"mask \(4, 5\)"):
        masked.add_batch(x[:3], None)


def test_dead_columns_and_always_damp() -> None:
    layer, x = make("linear")
    x[:, 3] = 0
    solver = collected(layer, x, always_damp=0.5)
    solver.prepare_unstr()
    pruned = solver.prune_unstr([0.5])[0]
    assert (pruned[:, 3] == 0).all()
    hessian = stacked(solver)[0]
    hessian[3, 3] = 1
    hessian += 0.5 * hessian.diagonal().mean() * torch.eye(12)
    weight = matrices(layer)
    weight[:, :, 3] = 0
    _, losses = reference.obs_path(weight, torch.linalg.inv(hessian)[None])
    torch.testing.assert_close(solver.Losses[:, 1:].double(), losses[0], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = make("conv")
    expected = collected(layer, x.to(dtype).float())
    layer.to(dtype)
    solver = collected(layer, x.to(dtype))
    torch.testing.assert_close(solver.H, expected.H, rtol=1e-4, atol=1e-4)
    solver.nmprune(2, 4)
    assert layer.weight.dtype == dtype
    assert (layer.weight == 0).float().mean() == 0.5
    solver.prepare_unstr()
    assert solver.prune_unstr([0.5])[0].dtype == torch.promote_types(dtype, torch.float32)


def test_free() -> None:
    solver = collected(*make("linear"))
    solver.prepare_unstr()
    solver.free()
    assert solver.H is None and solver.Losses is None and solver.Traces is None
    for use in (
        solver.prepare_unstr,
        lambda: solver.prune_unstr([0.5]),
        lambda: solver.add_batch(torch.ones(2, 12), None),
    ):
        with pytest.raises(RuntimeError):
            use()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.prune_unstr([0.5]), RuntimeError, "prepare_unstr"),
        (lambda s: s.prune_blocked([0.5]), RuntimeError, "prepare_blocked"),
        (lambda s: s.prune_unstr_balanced(3), RuntimeError, "prepare_unstr"),
        (lambda s: s.resolve(), RuntimeError, "resolve=True"),
        (lambda s: s.prepare_blocked(5), ValueError, "size must divide the 12 columns"),
        (lambda s: s.prepare_unstr(parallel=0), ValueError, "parallel"),
        (lambda s: s.prune_struct([0.5], 0), ValueError, "size"),
        (lambda s: s.prune_struct([1.5]), ValueError, "between 0 and 1, got 1.5"),
        (lambda s: s.nmprune(2, 5), ValueError, "m must divide"),
        (lambda s: s.nmprune(5, 4), ValueError, "n must be between 1 and m"),
        (lambda s: (s.prepare_unstr(), s.prune_unstr([0.5, -0.1])), ValueError, "got -0.1"),
        (lambda s: (s.prepare_unstr(), s.prune_unstr([float("nan")])), ValueError, "got nan"),
        (lambda s: (s.prepare_unstr(), s.prune_unstr_balanced(13)), ValueError, "between 0 and 12"),
        (lambda s: (s.prepare_blocked(2), s.prune_unstr_balanced(3)), RuntimeError, "needs prepare_unstr"),
        (lambda s: s.add_batch(torch.ones(3, 11), None), ValueError, r"\[..., 12\], got \(3, 11\)"),
        (lambda s: s.add_batch(torch.ones(0, 12), None), ValueError, r"got \(0, 12\)"),
        (lambda s: s.add_batch(torch.ones(3, 12).long(), None), TypeError, "int64"),
        (lambda s: s.add_batch(torch.full((3, 12), float("nan")), None), ValueError, "NaN"),
        (lambda s: s.add_batch(torch.ones(3, 12), None, resolve=True), ValueError, "output"),
        (lambda s: s.add_batch(torch.ones(3, 12), torch.ones(2, 8), resolve=True), ValueError, r"\(2, 8\)"),
    ],
)
def test_errors(call: Callable[[TrueOBS], object], error: type[Exception], message: str) -> None:
    solver = collected(*make("linear"))
    before = solver.H.clone(), solver.nsamples
    with pytest.raises(error, match=message):
        call(solver)
    assert torch.equal(solver.H, before[0]) and solver.nsamples == before[1]


def test_bad_weights_hessians_and_layers() -> None:
    solver = collected(*make("linear"))
    solver.H[0, 1] = float("inf")
    with pytest.raises(ValueError, match="Hessian of the Linear"):
        solver.prepare_unstr()
    layer, x = make("linear")
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite weights"):
        collected(layer, x).prepare_unstr()
    with pytest.raises(RuntimeError, match="add_batch"):
        TrueOBS(nn.Linear(3, 2)).prepare_unstr()
    with pytest.raises(ValueError, match=r"\[N, 8, H, W\], got \(6, 7, 9, 10\)"):
        TrueOBS(make("grouped")[0]).add_batch(torch.ones(6, 7, 9, 10), None)
    for unsupported in (nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 3, 3), nn.ReLU()):
        with pytest.raises(TypeError, match=type(unsupported).__name__):
            TrueOBS(unsupported)
