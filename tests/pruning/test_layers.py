"""The tables of docs/reference/layers.md: each row is run."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_fast import FallbackWarning, trace
from spade_fast.pruning.calibration import calibrate
from spade_fast.pruning.layers import find_layers
from spade_fast.pruning.solve import default_block

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*oneDNN")

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "layers.md").read_text()


def table(title: str) -> list[list[str]]:
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


class Uses(nn.Module):
    """Parameters and modules, and a function that uses them."""

    def __init__(
        self, use: Callable[..., object], shape: tuple[int, ...] = (), **parts: nn.Module | tuple[int, ...]
    ) -> None:
        super().__init__()
        if shape:
            self.w = nn.Parameter(torch.randn(shape))
        self.use = use
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(torch.randn(part)))

    def forward(self, *inputs: Tensor) -> object:
        return self.use(self, *inputs)


class Conv1D(nn.Module):
    """As in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.nf, self.weight = 8, nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    return model


def lora(model: Uses, x: Tensor) -> Tensor:
    return model.base(x) + model.lora_B(model.lora_A(x))


def experts(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Uses, Tensor], Tensor]:
    return lambda model, x: torch.stack([product(x, one) for one in model.w])


SIZES = {"inn": 6, "out": 8, "k": 3, "kd": 2, "kh": 3, "kw": 2, "hidden": 5, "proj": 2, "embed": 4, "kdim": 3}
ROWS, IMAGES, STEPS = torch.randn(20, 6), torch.randn(4, 6, 5, 5), torch.randn(7, 3, 6)
QUERY, OTHER = torch.randn(3, 5, 4), torch.randn(3, 2, 4)
# For each row: a network, the name of the weight in it, inputs, and sizes that differ from the usual ones.
PRUNED: dict[str, tuple[Callable[[], nn.Module], str, tuple[Tensor, ...], dict[str, int]]] = {
    "`nn.Linear`": (lambda: nn.Linear(6, 8), "weight", (ROWS,), {}),
    "transformers' `Conv1D`": (Conv1D, "weight", (ROWS,), {}),
    "`nn.Conv1d`": (lambda: nn.Conv1d(6, 8, 3, groups=2), "weight", (IMAGES[..., 0],), {"G": 2}),
    "`nn.Conv2d`": (lambda: nn.Conv2d(6, 8, (3, 2), groups=2), "weight", (IMAGES,), {"G": 2}),
    "`nn.Conv2d`, depthwise": (lambda: nn.Conv2d(6, 12, (3, 2), groups=6), "weight", (IMAGES,), {"out": 12}),
    "`nn.Conv3d`": (lambda: nn.Conv3d(6, 8, (2, 3, 2), groups=2), "weight", (torch.randn(2, 6, 4, 4, 4),), {"G": 2}),
    "`nn.ConvTranspose1d`": (lambda: nn.ConvTranspose1d(6, 8, 3, groups=2), "weight", (IMAGES[..., 0],), {"G": 2}),
    "`nn.ConvTranspose2d`": (lambda: nn.ConvTranspose2d(6, 8, (3, 2), groups=2), "weight", (IMAGES,), {"G": 2}),
    "`nn.ConvTranspose3d`": (
        lambda: nn.ConvTranspose3d(6, 8, (2, 3, 2), groups=2),
        "weight",
        (torch.randn(2, 6, 3, 3, 3),),
        {"G": 2},
    ),
    "`nn.LSTM`, `nn.LSTMCell`": (lambda: nn.LSTM(6, 5), "", (STEPS,), {}),
    "`nn.LSTM` with `proj_size`": (lambda: nn.LSTM(6, 5, proj_size=2), "", (STEPS,), {}),
    "`nn.GRU`, `nn.GRUCell`": (lambda: nn.GRU(6, 5), "", (STEPS,), {}),
    "`nn.RNN`, `nn.RNNCell`": (lambda: nn.RNN(6, 5), "", (STEPS,), {}),
    "`nn.MultiheadAttention` of one sequence": (lambda: nn.MultiheadAttention(4, 2), "", (QUERY,) * 3, {}),
    "`nn.MultiheadAttention` of several": (
        lambda: nn.MultiheadAttention(4, 2),
        "",
        (QUERY, *torch.randn(2, 2, 5, 4)),
        {},
    ),
    "`nn.MultiheadAttention` with `kdim`, `vdim`": (
        lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True),
        "",
        (QUERY, OTHER[..., :3], OTHER[..., :3]),
        {},
    ),
    "`nn.MultiheadAttention`": (lambda: nn.MultiheadAttention(4, 2), "", (QUERY,) * 3, {}),
    "a matrix in `F.linear`, `w @ x`, `einsum`": (
        lambda: Uses(lambda m, x: F.linear(x, m.w), (8, 6)),
        "w",
        (ROWS,),
        {},
    ),
    "a matrix in `x @ w`, `einsum`": (lambda: Uses(lambda m, x: x @ m.w, (6, 8)), "w", (ROWS,), {}),
    "experts, one by one or by `bmm`": (lambda: Uses(experts(F.linear), (3, 8, 6)), "w", (ROWS,), {"E": 3}),
    "experts, one by one or by `bmm`, inputs first": (
        lambda: Uses(experts(torch.matmul), (3, 6, 8)),
        "w",
        (ROWS,),
        {"E": 3},
    ),
    "experts that inputs choose by index": (
        lambda: Uses(lambda m, x: torch.einsum("boi,bi->bo", m.w[x[:, 0].abs().long()], x), (3, 8, 6)),
        "w",
        (ROWS.clamp(-2, 2),),
        {"E": 3},
    ),
    "a kernel in `F.conv2d`": (
        lambda: Uses(lambda m, x: F.conv2d(x, m.w, groups=2), (8, 3, 3, 2)),
        "w",
        (IMAGES,),
        {"G": 2},
    ),
    "a kernel in `w.flatten(1) @ F.unfold(x)`": (
        lambda: Uses(lambda m, x: m.w.flatten(1) @ F.unfold(x, (3, 2)), (8, 6, 3, 2)),
        "w",
        (IMAGES,),
        {},
    ),
    "a weight computed by `parametrize` or a hook": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        "weight",
        (ROWS,),
        {},
    ),
    "a weight used by several modules": (tied, "0", (ROWS,), {"out": 6}),
    "LoRA adapters": (
        lambda: Uses(lora, base=nn.Linear(6, 8), lora_A=nn.Linear(6, 2), lora_B=nn.Linear(2, 8)),
        "lora_A",
        (ROWS,),
        {"r": 2},
    ),
}


def value_of(formula: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Compute a cell such as ``(out, in / G, k)``."""
    code = re.sub(r"\bin\b", "inn", formula).replace("/", "//")
    found = eval(code.replace(")", ",)") if code.endswith(")") else f"({code},)", {}, dict(sizes))
    return tuple(found)


@pytest.mark.parametrize("row", table("What is pruned"), ids=lambda row: f"{row[0]} {row[1]}")
def test_what_is_pruned(row):
    title, weight, shape, groups, rows, columns, block = row
    make, name, inputs, own = PRUNED[title]
    model = make()
    name = name or weight.strip("`")
    assert name == weight.strip("`") or weight == "the parameter" or name in ("0", "w")
    found, _ = find_layers(model)
    layer = calibrate(model, [inputs], found).layers[name]
    sizes = {**SIZES, **own}
    kernel = value_of(columns, sizes)
    assert layer.shape == value_of(shape, sizes) and (layer.groups,) == value_of(groups, sizes)
    assert (layer.rows,) == value_of(rows, sizes) and layer.columns == math.prod(kernel) and layer.kernel == kernel[:-1]
    assert (default_block(layer, "exact"),) == value_of(block, sizes)
    numbers = torch.arange(layer.numel).reshape(layer.shape)
    assert layer.matrix(numbers).flatten()[-1] == layer.numel - 1 and torch.equal(
        layer.restore(layer.matrix(numbers)), numbers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        made = trace(model, [inputs], sparsity=0.5, layers=[name])
    assert made.layers == (name,)


class Doubled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.stored = self._parameters.pop("weight")
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stored * 2, self.bias)


class Integers(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.float(), self.bias)


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.register_buffer("weight", self._parameters.pop("weight").detach())


class Expanded(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.weight = nn.Parameter(torch.randn(1, 6).expand(6, 6))


def head_of(embedding: nn.Module) -> nn.Module:
    def use(model: Uses, x: Tensor) -> Tensor:
        return model.head(model.embedding(x.abs().long()))

    model = Uses(use, embedding=embedding, head=nn.Linear(6, 9, bias=False))
    if isinstance(embedding, nn.Embedding) and embedding.num_embeddings == 9:
        model.head.weight = embedding.weight
    return model


def positions(model: Uses, x: Tensor) -> Tensor:
    return torch.cat([model.w.expand(len(x), -1), x + model.w]) @ torch.ones(6, 2)


def biases(model: Uses, x: Tensor) -> Tensor:
    y = F.linear(x, torch.ones(6, 6), model.w[0])[:, None]
    return model.attention(y, y, y)[0]


INDEX = torch.tensor([1, 2])
DENSE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "`nn.Embedding`, `nn.EmbeddingBag`": (lambda: head_of(nn.Embedding(11, 6)), "embedding"),
    "an embedding tied to the output layer": (lambda: head_of(nn.Embedding(9, 6)), "head"),
    "a table that is indexed": (lambda: Uses(lambda m, x: x + m.w[INDEX].sum(0), (4, 6)), "w"),
    "`nn.Bilinear`": (lambda: Uses(lambda m, x: m.part(x, x), part=nn.Bilinear(6, 6, 6)), "part"),
    "norms of several dimensions": (lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.LayerNorm((2, 3))), "1"),
    "a matrix that is scaled before its product": (lambda: Uses(lambda m, x: F.linear(x, m.w * 2), (6, 6)), "w"),
    "a matrix that is standardised before its product": (
        lambda: Uses(lambda m, x: F.linear(x, m.w - m.w.mean(1, keepdim=True)), (6, 6)),
        "w",
    ),
    "a matrix to which something is added before its product": (
        lambda: Uses(lambda m, x: F.linear(x, m.w + m.b @ m.a), (6, 6), a=(2, 6), b=(6, 2)),
        "w",
    ),
    "matrices that are joined before their product": (
        lambda: Uses(lambda m, x: F.linear(x, torch.cat([m.w, m.v])), (6, 6), v=(2, 6)),
        "w",
    ),
    "a matrix used both ways round": (lambda: Uses(lambda m, x: x @ m.w @ m.w.T, (6, 6)), "w"),
    "a part of a matrix": (lambda: Uses(lambda m, x: F.linear(x, m.w[:2]), (6, 6)), "w"),
    "constant inputs of other layers, such as queries": (
        lambda: Uses(lambda m, x: x + m.head(m.w).sum(0), (4, 6), head=nn.Linear(6, 6)),
        "w",
    ),
    "integers and 8-bit types": (Integers, "weight"),
    "complex numbers": (
        lambda: Uses(lambda m, x: m.part(x + 0j).real, part=nn.Linear(6, 6, dtype=torch.complex64)),
        "part",
    ),
    "expanded weights": (Expanded, "weight"),
    "weights of layers that are buffers": (Frozen, "weight"),
    "quantised modules": (
        lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 6)), {nn.Linear}, torch.qint8),
        "0",
    ),
    "weights computed in other ways": (Doubled, "weight"),
    "what is called `bias` or `..._bias`": (
        lambda: Uses(lambda m, x: x + m.w_bias[x[:, 0].long() % 3], w_bias=(3, 6)),
        "w_bias",
    ),
    "scales such as `[C, 1, 1]`": (lambda: Uses(lambda m, x: (x[..., None, None] * m.w)[..., 0, 0], (6, 1, 1)), "w"),
    "position embeddings, class tokens": (lambda: Uses(positions, (1, 6)), "w"),
    "biases, also of experts or attention (`bias_k`)": (
        lambda: Uses(biases, (3, 6), attention=nn.MultiheadAttention(6, 2, add_bias_kv=True, add_zero_attn=True)),
        "w",
    ),
}


@pytest.mark.parametrize("row", table("What stays dense"), ids=lambda row: row[0])
def test_what_stays_dense(row):
    title, note = row
    make, name = DENSE[title]
    model = nn.Sequential(nn.Linear(6, 6), make())
    made_name = f"1.{name}" if name != "weight" else "1"
    if not note:
        made = trace(model, torch.randn(30, 6), sparsity=0.5, strict=True)
        assert made_name not in [report.name for report in made.reports]
        return
    with pytest.warns(FallbackWarning, match=re.escape(f"{made_name} ({note})")):
        made = trace(model, torch.randn(30, 6), sparsity=0.5)
    assert {report.name: report.note for report in made.reports}[made_name] == note and "0" in made.layers


def test_every_row_is_run():
    assert {row[0] for row in table("What is pruned")} == set(PRUNED)
    assert {row[0] for row in table("What stays dense")} == set(DENSE)
