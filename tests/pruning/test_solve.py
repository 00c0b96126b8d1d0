"""One layer's solution against the oracle's path, exact counts, damping ladder, dead columns, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import running_on
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spade_fast import ops
from spade_fast.ops import reference
from spade_fast.pruning import solve as solvers
from spade_fast.pruning import solve_once
from spade_fast.pruning.counts import count_zeros, removal_counts, smallest
from spade_fast.pruning.layers import Layer, find_layers
from spade_fast.pruning.solve import check_block, default_block, solve_layer, solve_sparsities
from spade_fast.pruning.solve_once import Problem


@pytest.fixture(params=["cpu", pytest.param("as on a GPU", marks=pytest.mark.emulated)], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs all tests also with emulated CUDA kernels and no look at values before a layer is done."""
    if request.param == "cpu":
        yield request.param
        return
    monkeypatch.setattr(solvers, "_reading_is_free", lambda device: False)
    monkeypatch.setattr(solve_once, "_takes_factor_of_hessian", lambda *given: False)
    with running_on("emulated"):
        yield request.param


def layer_of(module: nn.Module) -> Layer:
    return find_layers(module)[0][0]


def problem(layer: Layer, samples: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Weight [G, R, K] and Gram matrices [S, G, K, K] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    columns = layer.columns
    weight = torch.randn(layer.groups, layer.rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(samples, layer.groups, 3 * columns + 4, columns, generator=generator, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, -1) + 0.3
    return weight.to(dtype), (x.mT @ x).to(dtype)


def solve(layer: Layer, weight: Tensor, grams: Tensor, **options):
    return solve_layer(layer, weight, grams, **{"solver": "exact", "sparsity": 0.5, **options})


def relative_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    def energy(w: Tensor) -> Tensor:
        return (w @ gram * w).sum()

    return math.sqrt(energy(weight - pruned) / energy(weight))


def exact_oracle(layer: Layer, weight: Tensor, gram: Tensor, removed: int, block: int, damping: float) -> Tensor:
    """Rank all losses of the layer together; each row loses the first of its path."""
    damped = gram + damping * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(layer.columns)
    inverse = torch.linalg.inv(damped)
    order, losses = reference.obs_path(weight, inverse, block)
    ranked = sorted((float(loss), i) for i, loss in enumerate(losses.flatten()))[: removed // block]
    counts = torch.zeros(losses.shape[:2], dtype=torch.int64)
    for _, i in ranked:
        counts.view(-1)[i // losses.shape[2]] += 1
    return reference.obs_solution(weight, damped, inverse, order, counts, block)


LAYERS = {
    "linear": nn.Linear(13, 9),
    "conv": nn.Conv2d(3, 5, 3),
    "pointwise": nn.Conv2d(11, 6, 1),
    "depthwise": nn.Conv2d(7, 14, 3, groups=7),
    "grouped": nn.Conv2d(4, 6, (2, 3), groups=2),
    "one row": nn.Conv1d(3, 1, 5),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("unstructured", [False, True])
@pytest.mark.parametrize("sparsity", [0.1, 0.55, 0.93])
def test_exact_agrees_with_the_oracle(name, unstructured, sparsity):
    layer = layer_of(LAYERS[name])
    weight, grams = problem(layer)
    block = 1 if unstructured else default_block(layer, "exact")
    assert block == {"conv": 9, "grouped": 6, "one row": 5}.get(name, 1) or unstructured
    before = grams.clone()
    pruned, (report,) = solve(layer, weight, grams, sparsity=sparsity, block=block if unstructured else None)
    assert torch.equal(grams, before)
    removed = round(sparsity * layer.numel / block) * block
    expected = exact_oracle(layer, weight, grams[0], removed, block, 0.01)
    assert torch.equal(pruned[0] == 0, expected == 0)
    assert torch.allclose(pruned[0], expected, rtol=1e-8, atol=1e-9)
    assert report.removed == removed == int((pruned == 0).sum())
    assert math.isclose(report.reached, removed / layer.numel) and report.sparsity == sparsity
    assert (report.retries, report.dead_columns, report.note) == (0, 0, "")
    if removed in (0, layer.numel):
        return
    assert math.isclose(report.measured_error, relative_error(weight, pruned[0], grams[0]), rel_tol=1e-6)
    # The losses hold the energy of the damping too.
    damped = grams[0] + 0.01 * grams[0].diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(layer.columns)
    change = weight - pruned[0]
    energy = (change @ damped * change).sum() / (weight @ grams[0] * weight).sum()
    assert math.isclose(report.predicted_error, math.sqrt(energy), rel_tol=1e-6)
    assert report.damping == 0.01


def sparsegpt_oracle(layer: Layer, weight: Tensor, gram: Tensor, counts: Tensor, mask_block: int) -> Tensor:
    """Columns in natural order: through the shape (channel, kh, kw)."""
    channels = layer.columns // layer.taps

    def natural(matrix: Tensor) -> Tensor:
        return matrix.unflatten(-1, (layer.taps, channels)).transpose(-1, -2).flatten(-2)

    gram = natural(natural(gram).mT)
    factor, info = reference.inverse_cholesky(gram, 0.01 * gram.diagonal(dim1=1, dim2=2).mean(1))
    assert not info.any()
    pruned, _ = reference.sparsegpt(natural(weight), factor, counts, mask_block)
    return pruned.unflatten(-1, (channels, layer.taps)).transpose(-1, -2).flatten(-2)


# Layers of so many columns that SparseGPT does without the inverse Hessian.
WIDE = {
    "wide linear": nn.Linear(140, 9),
    "wide conv": nn.Conv2d(16, 8, 3),
    "wide grouped": nn.Conv2d(80, 4, 3, groups=2),
}


@pytest.mark.parametrize("name", [*LAYERS, *WIDE])
@pytest.mark.parametrize("sparsity", [0.1, 0.55, 0.93])
def test_sparsegpt_agrees_with_the_oracle(name, sparsity, device, monkeypatch):
    layer = layer_of((LAYERS | WIDE)[name])
    monkeypatch.setattr(ops, "inverse_cholesky" if name in WIDE and device == "cpu" else "reverse_cholesky", None)
    weight, grams = problem(layer)
    pruned, (report,) = solve(layer, weight, grams, sparsity=sparsity, solver="sparsegpt")
    mask_block = layer.columns if layer.rows < 8 else layer.taps
    assert report.block == mask_block
    removed = round(sparsity * layer.numel)
    sizes = torch.full((layer.groups * layer.columns // mask_block,), layer.rows * mask_block)
    counts = removal_counts(removed, sizes, torch.zeros_like(sizes)).reshape(layer.groups, -1)
    expected = sparsegpt_oracle(layer, weight, grams[0], counts, mask_block)
    assert torch.equal(pruned[0] == 0, expected == 0)
    assert torch.allclose(pruned[0], expected, rtol=1e-8, atol=1e-9)
    assert report.removed == removed == int((pruned == 0).sum())
    assert math.isclose(report.measured_error, relative_error(weight, pruned[0], grams[0]), rel_tol=1e-6)


def test_sparsegpt_mask_blocks_of_many_rows_are_the_taps_of_one_channel():
    layer = layer_of(nn.Conv2d(3, 16, (2, 3)))
    weight, grams = problem(layer)
    pruned, (report,) = solve(layer, weight, grams, solver="sparsegpt")
    assert report.block == 6
    zeros = layer.restore(pruned[0]) == 0
    assert zeros.sum((0, 2, 3)).tolist() == [48, 48, 48]
    assert (solve(layer, weight, grams, solver="sparsegpt", block=1)[0][0] == 0).sum((0, 1)).tolist() == [8] * 18


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    channels=st.integers(1, 4),
    groups=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    sparsity=st.floats(0, 1),
    solver=st.sampled_from(["exact", "sparsegpt"]),
    unstructured=st.booleans(),
    dead=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_exactly_the_requested_number_goes(rows, channels, groups, kernel, sparsity, solver, unstructured, dead, seed):
    layer = layer_of(nn.Conv2d(channels * groups, rows * groups, kernel, groups=groups))
    weight, grams = problem(layer, seed=seed, dtype=torch.float32)
    columns = torch.randperm(layer.columns, generator=torch.Generator().manual_seed(seed))[:dead]
    grams[0, 0, columns] = 0
    grams[0, 0, :, columns] = 0
    block = 1 if unstructured else None
    pruned, (report,) = solve(layer, weight, grams, sparsity=sparsity, solver=solver, block=block)
    step = report.block if solver == "exact" else 1
    assert int((pruned == 0).sum()) == report.removed == round(sparsity * layer.numel / step) * step
    assert report.dead_columns == len(columns)
    assert torch.isfinite(pruned).all()
    if report.removed == 0:
        assert torch.equal(pruned[0], weight)
    # What survives at a dead column has no effect and stays as it was.
    kept = pruned[0, 0][:, columns]
    assert torch.equal(kept[kept != 0], weight[0][:, columns][kept != 0])


def test_dead_columns_go_first():
    layer = layer_of(nn.Linear(10, 6))
    weight, grams = problem(layer)
    dead = torch.tensor([2, 3, 7])
    grams[:, :, dead] = 0
    grams[..., dead] = 0
    pruned, (report,) = solve(layer, weight, grams, sparsity=0.3)
    assert torch.equal(pruned[0, 0] == 0, torch.isin(torch.arange(10), dead).expand(6, 10))
    assert report.measured_error == 0 and report.dead_columns == 3
    alive = torch.isin(torch.arange(10), dead, invert=True)
    assert torch.equal(pruned[0, 0][:, alive], weight[0][:, alive])
    # They change neither the damping nor the choice among the others.
    small = layer_of(nn.Linear(7, 6))
    alone, _ = solve(small, weight[..., alive], grams[..., alive, :][..., alive].clone(), sparsity=21 / 42)
    both, _ = solve(layer, weight, grams, sparsity=39 / 60)
    assert torch.allclose(both[0, 0][:, alive], alone[0, 0], rtol=1e-9, atol=1e-12)
    pruned, (report,) = solve(layer, weight, torch.zeros_like(grams), sparsity=0.5)
    assert int((pruned == 0).sum()) == 30 and report.measured_error == report.predicted_error == 0


def test_scale_of_the_inputs_changes_nothing():
    layer = layer_of(nn.Conv2d(3, 4, 3))
    weight, grams = problem(layer, dtype=torch.float32)
    for solver in ("exact", "sparsegpt"):
        pruned, (report,) = solve(layer, weight, grams, solver=solver)
        scaled, (other,) = solve(layer, weight, grams * 2.0**-40, solver=solver)
        assert torch.allclose(pruned, scaled, rtol=1e-4, atol=1e-5) and torch.equal(pruned == 0, scaled == 0)
        assert math.isclose(report.measured_error, other.measured_error, rel_tol=1e-4)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("chunked", [False, True])
def test_samples_together_are_as_alone(solver, chunked, monkeypatch):
    layer = layer_of(nn.Conv2d(4, 6, 3, groups=2))
    weight, grams = problem(layer, samples=5, dtype=torch.float32)
    grams[2, 1] = 0  # its own dead columns
    grams[3] *= 1e6
    if chunked:
        monkeypatch.setattr(solvers, "_working_bytes", lambda device: 8 * grams[0].nbytes)
    together, reports = solve(layer, weight, grams, solver=solver)
    for s in range(5):
        alone, (report,) = solve(layer, weight, grams[s : s + 1].clone(), solver=solver)
        assert torch.equal(alone[0] == 0, together[s] == 0)
        assert torch.allclose(alone[0], together[s], rtol=1e-4, atol=1e-5)
        assert report.dead_columns == reports[s].dead_columns == (18 if s == 2 else 0)
        assert math.isclose(report.measured_error, reports[s].measured_error, rel_tol=1e-3, abs_tol=1e-6)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("name", LAYERS)
def test_several_sparsities_are_as_one_by_one(name, solver, monkeypatch):
    layer = layer_of(LAYERS[name])
    weight, grams = problem(layer, samples=2)
    grams[1, :, :, 2] = grams[1, :, 2] = 0
    calls: list[str] = []
    for op in ("inverse_cholesky", "obs_path", "obs_solution"):
        native = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *given, _op=native, _name=op: calls.append(_name) or _op(*given))
    shares = [0.9, 0.0, 0.3, 1.0, 0.6]
    together = solve_sparsities(layer, weight, grams, solver=solver, sparsities=shares)
    path = ["obs_path", "obs_solution"] if solver == "exact" else []
    assert calls == ["inverse_cholesky", *path]
    for share, (pruned, reports) in zip(shares, together, strict=True):
        alone, others = solve(layer, weight, grams, solver=solver, sparsity=share)
        assert torch.equal(pruned == 0, alone == 0) and torch.allclose(pruned, alone, rtol=1e-9, atol=1e-12)
        for report, other in zip(reports, others, strict=True):
            assert (report.sparsity, report.removed, report.damping) == (share, other.removed, other.damping)
            assert math.isclose(report.measured_error, other.measured_error, rel_tol=1e-6, abs_tol=1e-9)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_all_or_nothing(solver):
    layer = layer_of(nn.Linear(6, 4))
    weight, grams = problem(layer)
    pruned, (report,) = solve(layer, weight, grams, sparsity=1.0, solver=solver)
    assert not pruned.any() and report.reached == 1
    assert math.isclose(report.measured_error, 1) and math.isclose(report.predicted_error, 1)
    pruned, (report,) = solve(layer, weight, grams, sparsity=0.02, solver=solver)
    assert torch.equal(pruned[0], weight) and report.removed == 0 and report.measured_error == 0


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_damping_ladder_for_the_failing_problem_alone(solver):
    layer = layer_of(nn.Conv2d(6, 12, (2, 2), groups=3))
    weight, grams = problem(layer, samples=2)
    good = grams.clone()
    scale = grams[1, 2].diagonal().mean()
    grams[1, 2] -= 0.03 * scale * torch.eye(layer.columns) + torch.linalg.eigvalsh(grams[1, 2])[0] * torch.eye(8)
    pruned, (first, second) = solve(layer, weight, grams, solver=solver, damping=0.0)
    assert (first.damping, first.retries) == (0, 0)
    # 1e-6, 1e-5, ..., 0.01 are too little.
    assert math.isclose(second.damping, 0.1) and second.retries == 6
    assert int((pruned[1] == 0).sum()) == second.removed
    reference_run, _ = solve(layer, weight, good[:1], solver=solver, damping=0.0)
    assert torch.allclose(pruned[:1], reference_run, rtol=1e-9)
    _, (_, third) = solve(layer, weight, grams, solver=solver, damping=0.005)
    assert math.isclose(third.damping, 0.05) and third.retries == 1
    _, (_, fourth) = solve(layer, weight, grams, solver=solver, damping=0.2)
    assert fourth.damping == 0.2 and fourth.retries == 0


def test_ladder_ends_at_one():
    layer = layer_of(nn.Linear(5, 3))
    weight, _ = problem(layer)

    def lacking(damping: float) -> Tensor:
        """A matrix of diagonal 1 whose smallest eigenvalue is `-damping`."""
        return ((1 + damping) * torch.ones(5, 5) - damping * torch.eye(5)).double()[None, None]

    for damping, used, retries in ((0.0, 1.0, 7), (0.02, 1.0, 2), (0.1, 1.0, 1), (0.4, 0.4, 0), (3.0, 3.0, 0)):
        _, (report,) = solve(layer, weight, lacking(0.3), damping=damping)
        assert math.isclose(report.damping, used) and report.retries == retries
    for damping in (0.0, 0.3, 1.2):
        with pytest.raises(torch.linalg.LinAlgError, match=r"layer 'weight'.*not positive definite"):
            solve(layer, weight, lacking(1.5), damping=damping)


def test_rank_deficient_without_damping():
    layer = layer_of(nn.Linear(20, 8))
    x = torch.randn(6, 20)
    pruned, (report,) = solve(layer, torch.randn(1, 8, 20), (x.T @ x)[None, None], damping=0.0, sparsity=0.4)
    assert int((pruned == 0).sum()) == 64 and torch.isfinite(pruned).all()
    assert report.retries > 0 and report.damping > 0
    assert report.measured_error < 0.05


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("module", [nn.Linear(12, 9), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(2, 9, 2)])
def test_weights_already_zero_count(solver, module):
    layer = layer_of(module)
    weight, grams = problem(layer)
    dead = torch.arange(layer.columns) < 3
    grams[0, 0, dead] = 0
    grams[0, 0][:, dead] = 0
    weight[0, :, 1] = 0  # zero and dead
    weight[-1, :, -1] = 0
    zeros = int((weight == 0).sum())
    for removed in (1, zeros - 1, zeros, zeros + 1, layer.numel // 2, layer.numel - 1):
        pruned, (report,) = solve(layer, weight, grams, sparsity=removed / layer.numel, solver=solver, block=1)
        assert report.removed == removed and int((pruned == 0).sum()) == max(removed, zeros)
        if removed <= zeros:
            assert torch.equal(pruned[0], weight)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("share", [0.05, 0.4])
@pytest.mark.parametrize("name", LAYERS)
def test_zeros_stay_zero(name, share, solver):
    layer = layer_of(LAYERS[name])
    weight, grams = problem(layer, samples=2, seed=3)
    grams[1, 0, 1] = grams[1, 0, :, 1] = 0
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < share] = 0
    zero = weight == 0
    for sparsity in (0.2, 0.5, 0.9):
        for block in (None, 1):
            pruned, reports = solve(layer, weight, grams, solver=solver, sparsity=sparsity, block=block)
            assert not pruned[:, zero].any()
            step = reports[0].block if solver == "exact" else 1
            removed = round(sparsity * layer.numel / step) * step
            for sample, report in zip(pruned, reports, strict=True):
                count = int((sample == 0).sum())
                assert max(removed - step + 1, int(zero.sum())) <= count <= max(removed, int(zero.sum()))
                assert math.isclose(report.reached, count / layer.numel)


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_two_of_four_stays_two_of_four(solver):
    layer = layer_of(nn.Linear(64, 32))
    weight, grams = problem(layer, dtype=torch.float32)
    groups = weight.view(1, 32, 16, 4)
    groups.scatter_(3, groups.abs().argsort(3)[..., :2], 0)
    pruned, (report,) = solve(layer, weight, grams, solver=solver, sparsity=0.6)
    assert ((pruned == 0).view(1, 32, 16, 4).sum(3) >= 2).all()
    assert int((pruned == 0).sum()) == report.removed == round(0.6 * 2048)


def test_exact_blocks_beside_zeros_are_optimal_for_their_mask():
    layer = layer_of(nn.Conv2d(3, 5, 3))
    weight, grams = problem(layer)
    weight[:, :, ::5] = 0
    pruned, (report,) = solve(layer, weight, grams, sparsity=0.6)
    damped = grams[0] + 0.01 * grams[0].diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(layer.columns)
    gone = pruned[0] == 0
    order = gone.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
    expected = reference.obs_solution(weight, damped, damped, order, gone.sum(2))
    assert torch.allclose(pruned[0], expected, rtol=1e-8, atol=1e-9)
    change = weight - pruned[0]
    energy = (change @ damped * change).sum() / (weight @ grams[0] * weight).sum()
    assert math.isclose(report.predicted_error, math.sqrt(energy), rel_tol=1e-6)


def test_exact_is_no_worse_than_sparsegpt_than_magnitude():
    layer = layer_of(nn.Linear(40, 16))
    weight, grams = problem(layer)
    errors = [solve(layer, weight, grams, solver=s, damping=1e-6)[1][0].measured_error for s in ("exact", "sparsegpt")]
    magnitude = weight.clone()
    magnitude[smallest(weight.abs(), 320)] = 0
    assert errors[0] < errors[1] < relative_error(weight, magnitude, grams[0])


@given(data=st.data(), sizes=st.lists(st.integers(0, 12), min_size=1, max_size=20))
def test_removal_counts(data, sizes):
    zeros = [data.draw(st.integers(0, size)) if data.draw(st.booleans()) else 0 for size in sizes]
    total = data.draw(st.integers(0, sum(sizes)))
    counts = removal_counts(total, torch.tensor(sizes), torch.tensor(zeros)).tolist()
    assert sum(counts) == total and all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    if sum(zeros) >= total:
        assert all(count <= zero for count, zero in zip(counts, zeros, strict=True))
    else:
        assert all(count >= zero for count, zero in zip(counts, zeros, strict=True))
        free = [i for i in range(len(sizes)) if counts[i] > zeros[i]]
        share = sum(counts[i] for i in free) / max(1, sum(sizes[i] for i in free))
        assert all(abs(counts[i] - sizes[i] * share) < 2 for i in free)
    if not any(zeros):
        assert all(
            abs(count - size * total / max(1, sum(sizes))) <= 1 for count, size in zip(counts, sizes, strict=True)
        )


@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=30), data=st.data())
def test_smallest_takes_the_first_of_equals(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = sorted(range(len(values)), key=lambda i: (values[i], i))[:count]
    chosen = smallest(torch.tensor([values], dtype=torch.float32), count)[0]
    assert sorted(expected) == chosen.nonzero().flatten().tolist()


def test_blocks():
    conv, linear = layer_of(nn.Conv2d(4, 8, 3)), layer_of(nn.Linear(10, 8))
    check_block(conv, 12)
    with pytest.raises(ValueError, match=r"block 9 does not divide the 10 columns of layer 'weight'"):
        check_block(linear, 9)
    weight, grams = problem(conv)
    pruned, (report,) = solve(conv, weight, grams, block=4, sparsity=0.3)
    blocks = (pruned[0, 0].unflatten(1, (-1, 4)) == 0).sum(2)
    assert set(blocks.flatten().tolist()) == {0, 4} and report.removed == round(0.3 * 288 / 4) * 4
    with pytest.raises(ValueError, match=r"block 5"):
        solve(conv, weight, grams, block=5)
    assert default_block(layer_of(nn.Conv2d(4, 4, 3, groups=4)), "exact") == 1
    assert default_block(layer_of(nn.Conv2d(64, 64, 3, groups=4)), "sparsegpt") == 9


@pytest.mark.parametrize("failure", ["raises", "overflows"])
def test_unstable_solutions_get_more_damping(failure, monkeypatch):
    layer = layer_of(nn.Linear(6, 4))
    weight, grams = problem(layer, samples=3)
    expected = [solve(layer, weight, grams[s : s + 1], damping=d)[0] for s, d in enumerate((0.001, 0.1, 0.001))]
    limit = 1.05 * grams[1, 0].diagonal()

    def solution(weight: Tensor, hessian: Tensor, *rest) -> Tensor:
        if bool(((hessian.diagonal(dim1=1, dim2=2) < limit) & (hessian[:, :1, 1] == grams[1, :, 0, 1])).any()):
            if failure == "raises":
                raise torch.linalg.LinAlgError("not positive definite")
            return weight * math.inf
        return native(weight, hessian, *rest)

    native = ops.obs_solution
    monkeypatch.setattr(ops, "obs_solution", solution)
    before = grams.clone()
    pruned, reports = solve(layer, weight, grams, damping=0.001)
    assert torch.equal(grams, before)
    assert torch.allclose(pruned, torch.cat(expected))
    assert [report.damping for report in reports] == [0.001, 0.1, 0.001]
    assert [report.retries for report in reports] == [0, 2, 0]
    limit = limit + math.inf
    with pytest.raises(torch.linalg.LinAlgError, match=r"layer 'weight'"):
        solve(layer, weight, grams, damping=0.001)


def test_a_sparsity_without_solution_alone_gets_more_damping(monkeypatch):
    layer = layer_of(nn.Linear(6, 4))
    weight, grams = problem(layer, samples=2)
    ceiling = 1.05 * grams[1, 0].diagonal()
    paths = []

    def solution(weight: Tensor, hessian: Tensor, hinv: Tensor, order: Tensor, counts: Tensor, block: int) -> Tensor:
        little_damping = (hessian.diagonal(dim1=1, dim2=2) < ceiling) & (hessian[:, :1, 1] == grams[1, :, 0, 1])
        if counts.max() > 5 and bool(little_damping.any()):
            raise torch.linalg.LinAlgError("not positive definite")
        return native(weight, hessian, hinv, order, counts, block)

    native, path = ops.obs_solution, ops.obs_path
    expected = [
        torch.cat([solve(layer, weight, grams[s : s + 1], sparsity=p, damping=d)[0] for s, d in enumerate(dampings)])
        for p, dampings in ((0.25, (0.001, 0.001)), (0.95, (0.001, 0.1)), (0.5, (0.001, 0.001)))
    ]
    monkeypatch.setattr(ops, "obs_solution", solution)
    monkeypatch.setattr(ops, "obs_path", lambda *given: paths.append(1) or path(*given))
    solved = solve_sparsities(layer, weight, grams, solver="exact", sparsities=[0.25, 0.95, 0.5], damping=0.001)
    for (pruned, _), weights in zip(solved, expected, strict=True):
        assert torch.allclose(pruned, weights)
    assert [[report.damping for report in reports] for _, reports in solved] == [[0.001] * 2, [0.001, 0.1], [0.001] * 2]
    assert len(paths) == 1 + 1 + 3  # both, the first sample again, the second with each damping


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("leaf", [True, False])
def test_weights_and_hessians_may_require_grad(solver, leaf):
    layer = layer_of(nn.Conv2d(4, 6, 3, groups=2))
    weight, grams = problem(layer, samples=2)
    options = {"solver": solver, "sparsities": [0.0, 0.5, 1.0]}
    expected = solve_sparsities(layer, weight, grams.clone(), **options)
    before = grams.clone()
    weight, grams = weight.requires_grad_(), grams.requires_grad_()
    if not leaf:
        weight, grams = weight * 1, grams * 1
    found = solve_sparsities(layer, weight, grams, **options)
    for (pruned, reports), (right, said) in zip(found, expected, strict=True):
        assert not pruned.requires_grad and torch.equal(pruned, right)
        assert [report.measured_error for report in reports] == [report.measured_error for report in said]
    once = Problem(layer, weight, solver, default_block(layer, solver), count_zeros(weight))
    for solution in solve_once.solve_once(once, grams, [layer.numel // 2], 0.01, read=True):
        assert not solution.pruned.requires_grad and torch.equal(solution.pruned, expected[1][0])
    assert weight.requires_grad and grams.requires_grad and torch.equal(grams, before)


class _Looks(TorchDispatchMode):
    """Counts the ops that would make a GPU hand values to the host."""

    _WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in self._WAIT or by_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_looked_at_before_a_layer_is_done(name, solver, monkeypatch):
    monkeypatch.setattr(solvers, "_reading_is_free", lambda device: False)
    layer = layer_of(LAYERS[name])
    weight, grams = problem(layer, samples=2)
    zeros = solvers.count_zeros(weight)
    look = solvers._read
    looks = _Looks()

    def when_done(*arguments: Any) -> Any:
        looks.__exit__(None, None, None)
        return look(*arguments)

    monkeypatch.setattr(solvers, "_read", when_done)
    monkeypatch.setattr(
        "spade_fast.pruning.counts.removal_counts", lambda total, sizes, zeros: sizes // 2
    )  # on the host
    looks.__enter__()
    solve(layer, weight, grams, solver=solver, zeros=zeros)
    assert looks.seen == []
