"""Parameters outside linear modules: which products make layers of them, with which inputs, and what stays dense."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spade_fast import FallbackError, FallbackWarning, MemoryLimitError, Trace, trace, trace_batch, tune
from spade_fast.ops import reference
from spade_fast.pruning.calibration import Calibration, calibrate
from spade_fast.pruning.layers import find_layers

Use = Callable[[Tensor, Tensor], Tensor]


class Bare(nn.Module):
    def __init__(self, shape: tuple[int, ...], use: Use, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w, self.use = nn.Parameter(torch.randn(shape, dtype=dtype)), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(x, self.w)


def calibrated(model: nn.Module, *batches: Tensor, **options) -> Calibration:
    return calibrate(model, list(batches), find_layers(model)[0], **options)


def gram(*inputs: Tensor) -> Tensor:
    return torch.stack([reference.gram_linear(one.reshape(1, -1, one.shape[-1]))[0] for one in inputs])


def assert_close(given: Tensor, expected: Tensor) -> None:
    assert given.shape == expected.shape
    tolerance = 1e-5 if given.dtype == torch.float32 else 1e-12
    assert (given.double() - expected).abs().max() <= tolerance * expected.abs().max()


MATRICES: dict[str, tuple[tuple[int, int], Use]] = {
    "F.linear": ((5, 4), F.linear),
    "matmul": ((5, 4), lambda x, w: x @ w.T),
    "inputs first": ((4, 5), lambda x, w: x @ w),
    "square": ((4, 4), F.linear),
    "square, inputs first": ((4, 4), lambda x, w: x @ w),
    "from the left": ((5, 4), lambda x, w: w @ x.mT),
    "from the left, inputs first": ((4, 5), lambda x, w: w.T @ x.mT),
    "einsum": ((5, 4), lambda x, w: torch.einsum("bni,oi->bon", x, w)),
    "einsum, inputs first": ((4, 5), lambda x, w: torch.einsum("bni,io->bno", x, w)),
    "vectors": ((5, 4), lambda x, w: torch.stack([w @ one for one in x.flatten(0, 1)])),
    "addmm": ((4, 5), lambda x, w: torch.addmm(torch.ones(5), x.flatten(0, 1), w)),
    "convolution": ((5, 4), lambda x, w: F.conv1d(x.mT, w[..., None])),
    "twice": ((4, 4), lambda x, w: F.linear(x, w) + x.flip(0) @ w.T),
    "one output": ((1, 4), F.linear),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", MATRICES)
def test_matrices(name, frozen):
    shape, use = MATRICES[name]
    model, x = Bare(shape, use).requires_grad_(not frozen), torch.randn(3, 7, 4)
    expected = gram(x) * (2 if name == "twice" else 1)
    for inference in (False, True):
        with torch.inference_mode(inference):
            calibration = calibrated(model, x)
        assert not calibration.unsupported
        assert_close(calibration.grams["w"], expected)
    layer = calibration.layers["w"]
    assert (layer.groups, layer.rows, layer.columns) == (1, 20 // 4 if 5 in shape else shape[0], 4)
    output = torch.linalg.matrix_norm(model(x).detach().reshape(1, -1)) if name != "twice" else None
    matrix = layer.matrix(model.w.detach())
    if output is not None and name != "addmm":
        energy = (matrix @ calibration.grams["w"] * matrix).sum()
        assert torch.allclose(energy.sqrt(), output, rtol=1e-4)
    assert torch.equal(layer.restore(matrix), model.w)


def routed(x: Tensor, w: Tensor, product: Use) -> Tensor:
    """Each row of x takes the expert of its own number modulo 2."""
    return torch.cat([product(x[e::2], w[e]) for e in range(2)])


STACKS: dict[str, tuple[tuple[int, int, int], Use]] = {
    "expert by expert": ((3, 5, 4), lambda x, w: routed(x, w, F.linear)),
    "expert by expert, inputs first": ((3, 4, 5), lambda x, w: routed(x, w, lambda y, v: y @ v)),
    "expert by expert, from the left": ((3, 5, 4), lambda x, w: routed(x, w, lambda y, v: (v @ y.T).T)),
    "some at once": ((3, 5, 4), lambda x, w: torch.bmm(torch.stack([x[::2], x[1::2]]), w[:2].mT)),
    "vmap": ((3, 5, 4), lambda x, w: torch.vmap(F.linear)(torch.stack([x[::2], x[1::2]]), w[:2])),
    "square": ((3, 4, 4), lambda x, w: routed(x, w, F.linear)),
    "square, inputs first": ((3, 4, 4), lambda x, w: routed(x, w, lambda y, v: y @ v)),
}


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", STACKS)
def test_experts(name, precision):
    shape, use = STACKS[name]
    model, x = Bare(shape, use), torch.randn(8, 4)
    if precision == "bf16":
        x = x.bfloat16().float()
    calibration = calibrated(model, x, precision=precision)
    layer = calibration.layers["w"]
    assert layer.groups == 3 and layer.experts and layer.transposed == ("inputs first" in name)
    assert_close(calibration.grams["w"], gram(x[::2], x[1::2], x[:0]))
    assert torch.equal(layer.matrix(model.w)[1], model.w[1].mT if layer.transposed else model.w[1])


@pytest.mark.parametrize("name", ["bmm", "matmul", "einsum", "broadcast", "one after all"])
def test_all_experts_at_once(name):
    x = torch.randn(3, 7, 4)
    use: Use = {
        "bmm": lambda x, w: torch.bmm(x, w.mT),
        "matmul": lambda x, w: x @ w.mT,
        "einsum": lambda x, w: torch.einsum("eni,eoi->eno", x, w),
        "broadcast": lambda x, w: x[0] @ w.mT,
        "one after all": lambda x, w: F.linear(x[1], w[1]).sum() + F.linear(x[2], w.flatten(0, 1)[5:]),
    }[name]
    expected = gram(*(x[:1].expand(3, -1, -1) if name == "broadcast" else x))
    if name == "one after all":
        expected = gram(x[0] * 0, torch.cat([x[1], x[2]]), x[2])
    calibration = calibrated(Bare((3, 5, 4), use), x)
    assert_close(calibration.grams["w"], expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "name",
    ["index", "several at once", "several per row", "index_select", "negative", "two at once", "cast", "of half"],
)
def test_chosen_experts(name, transposed):
    """Each row takes copies of the experts that it chooses."""
    numbers, x = torch.tensor([2, 0, 2, 2, 0, 2, 2]), torch.randn(7, 4)
    equation = "bkio,bi->bko" if transposed else "bkoi,bi->bko"

    def use(x: Tensor, w: Tensor) -> Tensor:
        choices = torch.stack([numbers, torch.full_like(numbers, 2)], 1)
        if name == "several at once":
            return torch.einsum(equation, w[choices], x)
        if name == "several per row":
            return torch.einsum(equation, w[choices.flatten()][:, None], x.repeat_interleave(2, 0))
        if name == "two at once":
            first, second = w[choices[:, 0], None], w.index_select(0, choices[:, 1])[:, None]
            return torch.einsum(equation, first, x) + torch.einsum(equation, second, x)
        choose: dict[str, Callable[[], Tensor]] = {
            "index": lambda: w[numbers][:, None],
            "index_select": lambda: w.index_select(0, numbers)[:, None],
            "negative": lambda: w[numbers - 4][:, None],
            "cast": lambda: w.double()[numbers].to(x)[:, None].double().to(x),
            "of half": lambda: w[1:][(numbers - 1).clamp(min=0)][:, None],
        }
        return torch.einsum(equation, choose[name](), x)

    model = Bare((4, 4, 5) if transposed else (4, 5, 4), use)
    both = name in ("several at once", "several per row", "two at once")
    for inference in (False, True):
        with torch.inference_mode(inference):
            calibration = calibrated(model, x)
        if name == "several at once" and transposed:  # einsum copies them in another order
            assert calibration.unsupported == {"w": "its weight is used by aten.clone"}
            continue
        if name == "of half":
            assert calibration.unsupported == {"w": "its weight is used by aten.index"}
            continue
        second = x[numbers == 2]
        assert_close(
            calibration.grams["w"],
            gram(x[numbers == 0], x[:0], torch.cat([second, x]) if both else second, x[:0]),
        )
        assert calibration.layers["w"].transposed == transposed and not calibration.unsupported


def test_copies_are_not_kept():
    """Casts and chosen experts are followed as long as the network has them, and no longer."""
    copies: list[weakref.ref[torch.UntypedStorage]] = []

    def use(x: Tensor, w: Tensor) -> Tensor:
        for numbers in (slice(None), torch.tensor([1, 1, 0])):
            copy = w[numbers].double()
            copies.append(weakref.ref(copy.untyped_storage()))
            x = torch.bmm(x.double(), copy.mT)
            del copy
            assert copies[-1]() is None
        return x

    assert not calibrated(Bare((3, 4, 4), use), torch.randn(3, 7, 4), torch.randn(3, 7, 4)).unsupported
    assert len(copies) == 4


def test_linear_modules_with_a_stack_of_matrices():
    class Stack(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 5, bias=False)
            self.weight = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.mT

    model, x = nn.Sequential(Stack()), torch.randn(3, 7, 4)
    assert_close(calibrated(model, x).grams["0"], gram(*x))
    assert trace(model, x, sparsity=0.5, strict=True).layers == ("0",)


def test_grouped_products():
    if not hasattr(torch, "_grouped_mm"):
        return
    ends = torch.tensor([2, 2, 7], dtype=torch.int32)
    model = Bare((3, 16, 8), lambda x, w: torch._grouped_mm(x, w, offs=ends), torch.bfloat16)
    x = torch.randn(7, 16).bfloat16()
    assert_close(calibrated(model, x).grams["w"], gram(x[:2], x[:0], x[2:]))


def test_tensors_that_are_one_matrix():
    """Projections of attention heads, stored per head, and a linear layer with several dimensions of outputs."""
    x, heads = torch.randn(2, 6, 4), torch.randn(2, 6, 5, 3)
    outputs = Bare((5, 3, 4), lambda x, w: torch.einsum("bqi,hki->bqhk", x, w))
    assert_close(calibrated(outputs, x).grams["w"], gram(x))
    inputs = Bare((5, 3, 4), lambda x, w: torch.einsum("bqhk,hkd->bqd", x, w))
    calibration = calibrated(inputs, heads)
    assert_close(calibration.grams["w"], gram(heads.flatten(2)))
    assert not calibration.layers["w"].experts and calibration.layers["w"].transposed
    reshaped = Bare((4, 2, 3), lambda x, w: x @ w.flatten(1))
    assert_close(calibrated(reshaped, x).grams["w"], gram(x))


@pytest.mark.parametrize("transposed", [False, True])
def test_kernels(transposed):
    use = F.conv_transpose2d if transposed else F.conv2d
    model = Bare((4, 3, 3, 2), lambda x, w: use(x, w, stride=2, groups=2 if not transposed else 1))
    module = nn.ConvTranspose2d(4, 3, (3, 2), stride=2) if transposed else nn.Conv2d(6, 4, (3, 2), stride=2, groups=2)
    x = torch.randn(2, 4 if transposed else 6, 7, 6)
    calibration = calibrated(model, x)
    assert torch.equal(calibration.grams["w"], calibrated(module, x).grams["weight"])
    assert calibration.layers["w"].matrix(model.w).shape == find_layers(module)[0][0].matrix(module.weight).shape


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T


class Named(Tensor):
    """A subclass that leaves all functions as they are."""


def unfolded(x: Tensor) -> Tensor:
    return F.unfold(x.reshape(3, 7, 2, 2), (1, 2)).mT


def itself(x: Tensor) -> Tensor:
    return x


def both(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Multiply by two casts of a weight, both of which exist at the same time."""
    return F.linear(x.to(first), first).to(x) + F.linear(x.to(second), second).to(x)


def nested(x: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.as_nested_tensor([x[0, :5], *x.flatten(0, 1)[5:].split(8)], layout=layout)


# Of each use: what makes the parameter of a matrix [out, in], and what the matrix is multiplied by.
UNUSUAL: dict[str, tuple[Callable[[Tensor], Tensor], Use, Callable[[Tensor], Tensor]]] = {
    "patches": (lambda w: w.reshape(5, 7, 1, 2), lambda x, w: w.flatten(1) @ unfolded(x).mT, unfolded),
    "vmap": (itself, lambda x, w: torch.vmap(F.linear, (0, None))(x, w), itself),
    "einsum of three": (
        lambda w: w,
        lambda x, w: torch.einsum("bni,oi,o->bno", x, w, torch.ones(5).to(x)),
        lambda x: x,
    ),
    "tensordot": (lambda w: w.T, lambda x, w: torch.tensordot(x, w, 1), itself),
    "inner": (itself, torch.inner, itself),
    "autograd function": (itself, lambda x, w: Product.apply(x, w), itself),
    "checkpoint": (itself, lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False), itself),
    "two casts at once": (
        itself,
        lambda x, w: both(x, w.float(), w.float()),
        lambda x: torch.cat([x, x]).float().double(),
    ),
    "casts to two types": (
        itself,
        lambda x, w: both(x, w.float(), w.bfloat16()),
        lambda x: torch.cat([x.float(), x.bfloat16()]).double(),
    ),
    "cast of a cast": (
        itself,
        lambda x, w: (lambda cast: both(x, cast, cast.double()))(w.float()),
        lambda x: torch.cat([x.float(), x]),
    ),
    "cast": (itself, lambda x, w: F.linear(x.float(), w.float()), lambda x: x.float().double()),
    "multi_dot": (itself, lambda x, w: torch.linalg.multi_dot([torch.eye(21).to(x), x.flatten(0, 1), w.T]), itself),
    "sparse inputs": (itself, lambda x, w: x.flatten(0, 1).to_sparse() @ w.T, itself),
    "compressed inputs": (itself, lambda x, w: F.linear(x.flatten(0, 1).to_sparse_csr(), w), itself),
    "sparse inputs, from the left": (itself, lambda x, w: w @ x.flatten(0, 1).to_sparse().T, itself),
    "a view of another type": (itself, lambda x, w: F.linear(x, w.view(torch.int64).view(torch.float64)), itself),
    "inputs of another class": (itself, lambda x, w: F.linear(x.as_subclass(Named), w).as_subclass(Tensor), itself),
    "a scaled product and another": (
        itself,
        lambda x, w: torch.addmm(x[0] @ w.T, x[1], w.T, alpha=3),
        lambda x: torch.cat([x[0], 3 * x[1]]),
    ),
    "nested inputs": (itself, lambda x, w: F.linear(nested(x, torch.jagged), w).values(), itself),
    "linear and convolution": (
        lambda w: w[..., None, None],
        lambda x, w: F.linear(x, w[..., 0, 0]).sum() + F.conv2d(x.mT[..., None], w),
        lambda x: torch.cat([x, x]),
    ),
    "every second column": (lambda w: w.repeat_interleave(2, 1)[:, ::2], F.linear, itself),
    "another order in memory": (lambda w: w.T.contiguous().T, F.linear, itself),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_uses_are_pruned_as_the_linear_layer_of_their_inputs(name):
    stored, use, inputs = UNUSUAL[name]
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    columns = inputs(x)
    linear = nn.Linear(columns.shape[-1], 5, bias=False, dtype=torch.float64)
    model = Bare((1,), use)
    model.w = nn.Parameter(stored(linear.weight.detach().clone()))
    assert_close(calibrated(model, x).grams["w"].flatten(0, 1), gram(columns)[0])
    found, expected = (trace(one, given, sparsity=0.5) for one, given in ((model, x), (linear, columns)))
    pruned = stored(expected.weight("weight"))
    assert torch.equal(found.weight("w") == 0, pruned == 0)
    assert torch.allclose(found.weight("w"), pruned, rtol=1e-6, atol=1e-7)


OTHERWISE: dict[str, tuple[tuple[int, ...], Use, str]] = {
    "scaled": ((5, 4), lambda x, w: F.linear(x, w * 2), "mul"),
    "both ways round": ((4, 4), lambda x, w: F.linear(x, w) + x @ w, "mm"),
    "part": ((5, 4), lambda x, w: F.linear(x, w[:2]), "mm"),
    "looked up": ((5, 4), lambda x, w: F.linear(x, w) + w[torch.tensor([1, 2, 3])].sum(), "index"),
    "looked up in bags": ((5, 4), lambda x, w: F.embedding_bag(x.abs().long(), w), "_embedding_bag"),
    "standardised": ((5, 4), lambda x, w: F.linear(x, w - w.mean(1, keepdim=True)), "mean"),
    "complex": ((5, 4, 2), lambda x, w: F.linear(x + 0j, torch.view_as_complex(w)).real, "mm"),
    "cast to complex": ((5, 4), lambda x, w: F.linear(x + 0j, w.to(torch.complex64)).real, "_to_copy"),
    "cast to integers": ((5, 4), lambda x, w: F.linear(x, w.int().to(x)), "_to_copy"),
    "nested": ((5, 4), lambda x, w: F.linear(nested(x[None], torch.strided), w).to_padded_tensor(0.0), "linear"),
    "chain": ((4, 4), lambda x, w: torch.linalg.multi_dot([x, w, w]), "mm"),
    "a kernel and a matrix": (
        (5, 2, 2),
        lambda x, w: F.conv1d(x[:, None].expand(-1, 2, -1), w).mT @ w.flatten(1),
        "mm",
    ),
    "attention of several sequences": (
        (12, 4),
        lambda x, w: F.multi_head_attention_forward(
            *(x[:3], x, x, 4, 2, w, None, None, None, False, 0.0, torch.eye(4), None)
        )[0],
        "mm",
    ),
    "experts looked up by a mask": (
        (9, 5, 4),
        lambda x, w: torch.bmm(x[x[:, 0] > 0, None], w[x[:, 0] > 0].mT),
        "index",
    ),
    "copies of experts, scaled": ((9, 5, 4), lambda x, w: torch.bmm(w[x[:, 0].long()] * 2, x[..., None]), "mul"),
    "copied in another order": ((5, 3, 4), lambda x, w: torch.einsum("qd,hkd->qhk", x, w.mT.contiguous().mT), "clone"),
    "two ways of one stack": ((3, 5, 4), lambda x, w: F.linear(x, w.flatten(0, 1)).sum() + F.linear(x, w[1]), "mm"),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_uses_stay_dense_and_say_so(name):
    shape, use, function = OTHERWISE[name]
    model, x = nn.Sequential(nn.Linear(4, 4), Bare(shape, use)), torch.randn(9, 4)
    with pytest.warns(FallbackWarning, match=rf"cannot be pruned: 1\.w \(its weight is used by aten\.{function}\)"):
        made = trace(model, x, sparsity=0.5)
    assert made.layers == ("0",) and [report.name for report in made.reports] == ["0", "1.w"]
    with pytest.raises(FallbackError, match=r"1\.w"):
        trace(model, x, sparsity=0.5, strict=True)


class Positions(nn.Module):
    """Parameters that are added, joined or not used at all, and biases of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.token, self.idle = (nn.Parameter(torch.randn(1, 3, 4)) for _ in range(3))
        self.weights, self.biases = nn.Parameter(torch.randn(2, 4, 4)), nn.Parameter(torch.randn(2, 4))
        self.queries, self.head = nn.Parameter(torch.randn(6, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x + self.positions], 1)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x = F.linear(x, weight, bias)
        return x + self.head(self.queries)


def test_a_weight_that_is_added_to_a_product_is_not_a_factor():
    """Even if the product has a factor of the same shape and memory order."""

    class Sum(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch.addmm(self.weight, torch.ones(4, 4), torch.ones(4, 4).T))

    assert calibrated(Sum(4, 4), torch.randn(9, 4)).unsupported == {"weight": "its weight is used by aten.addmm"}


def test_vectors_are_scales_or_matrices():
    x = torch.randn(9, 4)
    scale = Bare((1, 4), lambda x, w: x * w)
    matrix = Bare((1, 4), F.linear)
    first = Bare((1, 4), lambda x, w: F.linear(x * w, w))
    last = Bare((1, 4), lambda x, w: F.linear(x, w) * w)
    assert not calibrated(scale, x).unsupported and not calibrated(scale, x).grams
    assert_close(calibrated(matrix, x).grams["w"], gram(x))
    assert calibrated(first, x).unsupported == {"w": "its weight is used by aten.mm"}
    assert calibrated(last, x).unsupported == {"w": "its weight is used by aten.mul"}
    assert not calibrated(first, x).grams and not calibrated(last, x).grams


def test_functions_of_functions():
    if not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        return
    model = Bare((4, 4), lambda x, w: flex_attention(*[(x @ w)[None, None]] * 3)[0, 0])
    branches = Bare((4, 4), lambda x, w: torch.cond(x.sum() > 0, torch.mm, lambda x, w: -x @ w, (x, w)))
    x = torch.randn(9, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are not compiled
        assert_close(calibrated(model, x).grams["w"], gram(x))
        assert calibrated(branches, x).unsupported == {"w": "its weight is used by cond"}


def test_biases_are_no_layers_and_inputs_no_weights():
    model, x = Positions(), torch.randn(5, 3, 4)
    calibration = calibrated(model, x)
    assert set(calibration.grams) == {"weights", "head"} and not calibration.unreached
    assert list(calibration.unsupported) == ["queries"]
    assert_close(calibration.grams["head"], gram(model.queries.detach()))
    with pytest.warns(FallbackWarning, match=r"pruned: queries \([^,]*\)$"):
        made = trace(model, x, sparsity=0.5)
    assert [report.name for report in made.reports] == ["weights", "queries", "head"]
    assert trace(model, x, sparsity=0.5, layers=["weights", "head"], strict=True).layers == ("weights", "head")


class Experts(nn.Module):
    """Sends each row to the expert whose number it starts with."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6, 9))
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        numbers, x = x[:, 0].long(), x[:, 1:]
        outputs = x.new_zeros(len(x), 9 if self.transposed else 6)
        for e in numbers.unique().tolist():
            w = self.w[e]
            outputs[numbers == e] = x[numbers == e] @ (w if self.transposed else w.T)
        return outputs


def rows(*experts: int, columns: int) -> Tensor:
    x = torch.randn(60, columns + 1)
    x[:, 0] = torch.tensor(experts).repeat(60)[:60]
    return x


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("solver", ["exact", "sparsegpt"])
def test_experts_are_pruned_like_groups_and_others_stay_dense(solver, transposed, tmp_path):
    torch.manual_seed(0)
    model, columns = Experts(transposed), 6 if transposed else 9
    samples = [rows(0, 2, columns=columns), rows(0, 1, 2, 3, columns=columns), rows(0, 2, columns=columns)]
    with pytest.warns(FallbackWarning, match=r"did not reach them: w \(2 of 4 experts\)$"):
        made = trace_batch(model, samples, sparsity=0.5, solver=solver)
    before = model.w.detach().clone()
    for one, x, reached in zip(made, samples, ([0, 2], [0, 1, 2, 3], [0, 2]), strict=True):
        (report,) = one.reports
        pruned = one.weight("w")
        assert report.shape == (4, 6, 9) and not report.note
        assert report.reached == len(reached) / 8 and report.removed == len(reached) * 27
        assert torch.equal((pruned != before).flatten(1).any(1).nonzero().flatten(), torch.tensor(reached))
        with torch.no_grad():
            dense = model(x)
            with one.applied(model):
                error = (model(x) - dense).norm() / dense.norm()
        assert abs(float(error) - report.measured_error) < 1e-4 and torch.equal(model.w, before)
        (own,) = trace_batch(model, [x], sparsity=0.5, solver=solver) if len(reached) == 4 else [one]
        assert torch.equal(own.weight("w"), pruned)
    made[0].save(tmp_path / "trace")
    assert torch.equal(Trace.load(tmp_path / "trace").weight("w"), made[0].weight("w"))
    linears = nn.ModuleList(nn.Linear(columns, 54 // columns, bias=False) for _ in range(2))
    if solver == "sparsegpt":  # each expert loses the same share, as layers of their own do
        for linear, e in zip(linears, (0, 2), strict=True):
            linear.weight.data = before[e].T if transposed else before[e]
            alone = trace(linear, samples[0][samples[0][:, 0] == e, 1:], sparsity=0.5, solver=solver).weight("weight")
            assert torch.allclose(alone.T if transposed else alone, made[0].weight("w")[e], atol=1e-5)


def test_strict_refuses_experts_that_no_input_reaches():
    model = Experts(False)
    with pytest.raises(FallbackError, match=r"did not reach them: w \(2 of 4 experts\); only strict=False allows this"):
        trace(model, rows(0, 2, columns=9), sparsity=0.5, strict=True)
    assert trace(model, rows(0, 1, 2, 3, columns=9), sparsity=0.5, strict=True).layers == ("w",)


def test_automatic_sparsity_and_tuning():
    torch.manual_seed(0)
    model = nn.Sequential(Experts(False), nn.Linear(6, 3))
    x = rows(0, 2, columns=9)
    with pytest.warns(FallbackWarning, match="2 of 4 experts"):
        made = trace(model, x, inputs=x[:1], keep=0.5)
    assert made.auto is not None and made.layers and (made.weight("0.w")[1] == model[0].w[1]).all()
    with pytest.warns(FallbackWarning, match="2 of 4 experts"):
        tuning = tune(model, [x], lambda network, i: 0.0, candidates=[0.5], stages="layers")
    assert set(tuning.sparsity) == {"0.w", "1"}


def test_a_use_by_some_samples_only():
    model = Bare((4, 4), lambda x, w: F.linear(x, w) if x.mean() > 0 else x @ w)
    x = torch.randn(20, 4)
    with pytest.warns(FallbackWarning, match="in another way than for other samples"):
        first, second = trace_batch(model, [x.abs(), -x.abs()], sparsity=0.5)
    assert first.layers == ("w",) and not second.layers and "another way" in second.reports[0].note
    idle = Bare((4, 4), lambda x, w: F.linear(x, w) if x.mean() > 0 else x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = trace_batch(idle, [x.abs(), -x.abs()], sparsity=0.5)
    assert first.layers == ("w",) and not second.reports


def test_limits():
    model, x = Bare((40, 2), lambda x, w: x @ w), torch.randn(9, 40)
    with pytest.raises(MemoryLimitError, match=r"parameter 'w' .* 6400 bytes .* memory_limit of 1000 bytes"):
        trace(model, x, sparsity=0.5, memory_limit=1000)
    with pytest.raises(ValueError, match="block 3 does not divide the 40 columns of layer 'w'"):
        trace(model, x, sparsity=0.5, block=3)


def test_parametrised_parameters():
    class Doubled(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    model, x = Bare((3, 5, 4), lambda x, w: routed(x, w, F.linear)), torch.randn(20, 4)
    nn.utils.parametrize.register_parametrization(model, "w", Doubled())
    with pytest.warns(FallbackWarning, match="1 of 3 experts"):
        made = trace(model, x, sparsity=0.5)
    assert made.layers == ("w",)
    with made.applied(model):
        assert torch.equal(model.w, made.weight("w"))
