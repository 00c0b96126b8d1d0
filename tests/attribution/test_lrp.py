"""LRP's rules for transformers: by hand, conserved, and the same however attention is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("captum", reason="needs captum")

from spade_fast.attribution import relevance_rules
from spade_fast.attribution.lrp import LRP
from spade_fast.attribution.relevance_rules import RelevanceRules, run_with_rules

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor")


def randomised(model: nn.Module) -> nn.Module:
    """The network with random biases, scales and embeddings, which libraries start at zero or one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def relevance(model: Callable[..., Any], inputs: Tensor, target: Any = 1) -> Tensor:
    return LRP(model, epsilon=1e-12).attribute(inputs.clone(), target=target).detach()


# One block, by hand


class Block(nn.Module):
    """A transformer block with a head, as people write it."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out, self.up, self.down, self.head = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.act, self.attend = nn.GELU(), attend

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(self.act(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul((q @ k.transpose(-2, -1) / 2).softmax(-1), v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhqk,bhkd->bhqd", F.softmax(torch.einsum("bhqd,bhkd->bhqk", q * 0.5, k), dim=-1), v)


def by_hand(block: Block, x: Tensor, target: int) -> Tensor:
    """Relevance from layer to layer, as in the paper's propositions, for one sample ``[T, 8]``."""

    def linear(layer: nn.Linear, given: Tensor, relevance: Tensor) -> Tensor:
        products = layer.weight * given[..., None, :]
        return (products / layer(given)[..., None] * relevance[..., None]).sum(-2)

    def norm(layer: nn.LayerNorm, given: Tensor, relevance: Tensor) -> Tensor:
        """Scaling and 1/std pass relevance on; the bias and the mean are terms of sums."""
        output = layer(given)
        centred = given - given.mean(-1, keepdim=True)
        passed = relevance * (output - layer.bias) / output
        return given * (passed / centred - (passed / centred).mean(-1, keepdim=True))

    def add(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        return first / (first + second) * relevance, second / (first + second) * relevance

    def matmul(first: Tensor, second: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        terms = first[..., :, :, None] * second[..., None, :, :]
        shares = terms / (2 * (first @ second))[..., :, None, :] * relevance[..., :, None, :]
        return shares.sum(-1), shares.sum(-3)

    y = block.norm1(x)
    q, k, v = (layer(y).view(-1, 2, 4).transpose(0, 1) for layer in (block.query, block.key, block.value))
    scores = q @ k.mT / 2
    weights = scores.softmax(-1)
    mixed = (weights @ v).transpose(0, 1).flatten(1)
    attended = block.out(mixed)
    z = x + attended
    normed = block.norm2(z)
    up = block.up(normed)
    hidden = F.gelu(up)
    down = block.down(hidden)
    pooled = (z + down).mean(0)

    relevance = torch.zeros(3, dtype=x.dtype)
    relevance[target] = block.head(pooled)[target]
    relevance = linear(block.head, pooled, relevance)
    relevance = (z + down) / (len(x) * pooled) * relevance
    of_z, relevance = add(z, down, relevance)
    relevance = linear(block.down, hidden, relevance)
    relevance = linear(block.up, normed, relevance)  # GELU passes it on
    of_x, relevance = add(x, attended, of_z + norm(block.norm2, z, relevance))
    relevance = linear(block.out, mixed, relevance).view(-1, 2, 4).transpose(0, 1)
    of_weights, of_v = matmul(weights, v, relevance)
    of_scores = scores * (of_weights - weights * of_weights.sum(-1, keepdim=True))  # proposition 3.1
    of_q, of_k = matmul(q, k.mT, of_scores)
    given = zip((block.query, block.key, block.value), (of_q, of_k.mT, of_v), strict=True)
    of_y = sum(linear(layer, y, one.transpose(0, 1).flatten(1)) for layer, one in given)
    assert isinstance(of_y, Tensor)
    return of_x + norm(block.norm1, x, of_y)


@pytest.mark.parametrize("attend", [eager, by_einsum, F.scaled_dot_product_attention])
def test_attention_by_hand(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    block = randomised(Block(attend)).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.stack([by_hand(block, one, target) for one, target in zip(x, (2, 0), strict=True)])
    found = relevance(block, x, target=[2, 0])
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9 * float(expected.abs().max()))


def test_modules_of_torch_are_the_same_as_by_hand() -> None:
    """`nn.MultiheadAttention`, with its packed projections, and `nn.TransformerEncoderLayer` with its fast path."""
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, norm_first=True)
    model = randomised(nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3)))
    block = Block(eager)
    attention = layer.self_attn
    for part, one in enumerate((block.query, block.key, block.value)):
        one.weight.data = attention.in_proj_weight.data.chunk(3)[part]
        one.bias.data = attention.in_proj_bias.data.chunk(3)[part]
    block.out, block.norm1, block.norm2 = attention.out_proj, layer.norm1, layer.norm2
    block.up, block.down, block.head = layer.linear1, layer.linear2, nn.Identity()

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = block, model[2]

        def forward(self, x: Tensor) -> Tensor:
            y = block.norm1(x)
            q, k, v = (one(y).unflatten(-1, (2, 4)).transpose(1, 2) for one in (block.query, block.key, block.value))
            x = x + block.out(eager(q, k, v).transpose(1, 2).flatten(2))
            return self.head((x + block.down(block.act(block.up(block.norm2(x))))).flatten(1))

    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found, expected = relevance(model.double(), x), relevance(Whole().double().eval(), x)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    block, x = randomised(Block(F.scaled_dot_product_attention)), torch.randn(1, 5, 8)
    expected = relevance(block, x)
    found = relevance(block.to(dtype), x.to(dtype))
    assert found.dtype == dtype and torch.allclose(found.float(), expected, atol=0.1 * float(expected.abs().max()))


# Functions

X = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
WEIGHT = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SCALE = torch.linspace(0.5, 2, 8, dtype=torch.float64)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def llama_norm(x: Tensor) -> Tensor:
    variance = x.to(torch.float64).pow(2).mean(-1, keepdim=True)
    return SCALE * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def layer_norm_by_hand(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (gelu_new, lambda x: F.gelu(x, approximate="tanh")),
        (lambda x: x * torch.sigmoid(x), F.silu),
        (lambda x: x.clone().mul_(x.sigmoid()), F.silu),
        (lambda x: x / (1 + torch.exp(-x)), F.silu),
        (lambda x: x * x, torch.square),
        (lambda x: F.silu(x + 0, inplace=True), F.silu),
        (llama_norm, lambda x: F.rms_norm(x, (8,), SCALE, 1e-6)),
        (lambda x: x / x.norm(dim=-1, keepdim=True), lambda x: F.normalize(x, dim=-1)),
        (lambda x: x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp_min(1e-12), lambda x: F.normalize(x, dim=-1)),
        (layer_norm_by_hand, lambda x: F.layer_norm(x, (8,))),
        (lambda x: (x - x.mean(-1, True)) / x.std(-1, False, True), lambda x: F.layer_norm(x, (8,), eps=0.0)),
        (lambda x: F.group_norm(x.mT, 1).mT, lambda x: F.layer_norm(x, (3, 8))),
        (lambda x: F.instance_norm(x), lambda x: F.layer_norm(x, (8,))),
        (lambda x: F.glu(torch.cat([x, x.flip(-1)], -1)), lambda x: x * x.flip(-1).sigmoid()),
        (lambda x: torch.addmm(SCALE, x[0], WEIGHT)[None], lambda x: F.linear(x[:1], WEIGHT.T, SCALE)),
    ],
)
def test_a_function_of_several_calls_has_the_rule_of_one(
    function: Callable[[Tensor], Tensor], same: Callable[[Tensor], Tensor]
) -> None:
    outputs = [function(X), same(X)]
    assert torch.allclose(*outputs)
    weights = torch.linspace(-1, 1, outputs[0].numel(), dtype=torch.float64).view_as(outputs[0])
    found, expected = (
        relevance(lambda x, of=of: (of(x) * weights).flatten(1).sum(1), X, target=None) for of in (function, same)
    )
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert found.abs().max() > 0.1


@pytest.mark.parametrize(
    "function",
    [
        F.gelu,
        torch.sigmoid,
        lambda x: x * x.roll(1, -1),
        lambda x: x * x.mean(-1, keepdim=True).sigmoid(),
        lambda x: x[..., :4].sigmoid() * F.silu(x[..., 4:]),
        lambda x: torch.einsum("btc,bsc,bsd->btd", x, x.tanh(), x.roll(1, -1)),
        lambda x: torch.bmm(x, x.mT),
        lambda x: torch.addmm(x[0], x[0] @ WEIGHT, WEIGHT),
        lambda x: torch.maximum(x, x.roll(1, -1)) + x.amax(-1, keepdim=True) + x.topk(2).values.sum(-1, keepdim=True),
        lambda x: F.normalize(x, dim=-1) @ F.normalize(x.roll(1, 1), dim=-1).mT,
        lambda x: x.lerp(x.roll(1, -1), 0.3),
        lambda x: F.grid_sample(x[None], torch.full((1, 2, 2, 2), 0.3, dtype=x.dtype), align_corners=True),
        llama_norm,
        layer_norm_by_hand,
        lambda x: x.var(-1),
        lambda x: x.std(-1, correction=0),
        lambda x: F.scaled_dot_product_attention(torch.ones(2, 4, 8).double(), torch.ones(2, 3, 8).double(), x),
    ],
)
def test_relevance_is_conserved(function: Callable[[Tensor], Tensor]) -> None:
    """By functions without terms that do not depend on the inputs."""
    weights = torch.linspace(-1, 2, function(X).numel(), dtype=torch.float64)
    output = float(function(X).flatten() @ weights)
    found = float(relevance(lambda x: (function(x).flatten() @ weights).view(1), X, target=None).sum())
    assert abs(found - output) < 1e-6 * abs(output)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x / x.sum(-1, keepdim=True), "div"),
        (lambda x: x ** x.roll(1, -1), "pow"),
        (lambda x: F.log_softmax(x, -1), "log_softmax"),
        (lambda x: x.lerp(x.roll(1, -1), x.sigmoid()), "lerp"),
        (lambda x: F.grid_sample(x[None], x[:1, :, :2].unsqueeze(1), align_corners=True), "grid_sample"),
        (lambda x: x.abs().cumprod(-1), "cumprod"),
        (lambda x: F.batch_norm(x, None, None, training=True), "batch_norm"),
        (lambda x: nn.LSTM(8, 8).double()(x)[0], "lstm"),
        (lambda x: torch.complex(x, x).abs(), "abs"),
    ],
)
def test_functions_without_a_rule_are_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x).flatten(1)

    with pytest.raises(ValueError, match=rf"LRP has no rule for {name}, called at .*test_lrp\.py:\d+$"):
        relevance(Model(), X)
    with pytest.raises(ValueError, match=f"LRP has no rule for {name}"):
        LRP(Model()).check(X)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_functions_out_of_sight_are_refused() -> None:
    with pytest.raises(ValueError, match="custom autograd function Doubled cannot be given another gradient"):
        relevance(lambda x: Doubled.apply(x).flatten(1), X)
    with pytest.raises(ValueError, match=r"function Tanh, scripted or in torch.vmap, cannot be given another gradient"):
        relevance(lambda x: torch.vmap(torch.tanh)(x).flatten(1), X)


def test_what_does_not_depend_on_the_inputs_needs_no_rule() -> None:
    def model(x: Tensor) -> Tensor:
        order = x.detach().cumprod(-1).argsort(-1)
        weight = F.log_softmax(nn.Parameter(WEIGHT), -1)
        return (x.gather(-1, order) @ weight).flatten(1)

    output = float(model(X)[:, 1].sum().detach())
    assert abs(float(relevance(model, X).sum()) - output) < 1e-6 * abs(output)


# Networks, with what biases absorb counted


class Counting(RelevanceRules):
    """Counts what the bias of softmax's Taylor decomposition absorbs, as the gradient of a parameter that is one."""

    one = nn.Parameter(torch.ones(()))

    def _softmax(self, call: Any, dependent: list[Tensor]) -> Any:
        output, given = super()._softmax(call, dependent), dependent[0].detach()
        weights = output.detach()
        kept = torch.where(weights > 0, given, 0)  # masks are minus infinity
        bias = weights - weights * (kept - (weights * kept).sum(-1, keepdim=True))
        return output + bias * (self.one - 1)

    def _attention(self, call: Any, dependent: list[Tensor]) -> Any:
        q, k, v = call.args[:3]
        mask, causal, scale = call.argument(3, "attn_mask"), call.argument(5, "is_causal"), call.argument(6, "scale")
        with self:
            scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if causal:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            if mask is not None:
                scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
            return scores.softmax(-1) @ v


TERMS = (
    *("bias", "class_token", "cls_token", "reg_token", "token_type"),
    *("pos_embed", "pos_embedding", "position_embeddings", "wpe.weight"),
)


def balance(model: nn.Module, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[float, float, float]:
    """The output, the relevance of the inputs, and what all terms absorb that do not depend on the inputs."""
    inputs = inputs.requires_grad_()
    terms = [value for name, value in model.named_parameters() if any(one in name for one in TERMS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relevance_rules, "RelevanceRules", Counting)
        output = run_with_rules(forward, (inputs,), 1e-9)[0, 1]
    leaves = [inputs, *terms, Counting.one]
    gradients = torch.autograd.grad(output, leaves, allow_unused=True)
    parts = [0.0 if of is None else float((one * of).sum().detach()) for one, of in zip(leaves, gradients, strict=True)]
    return float(output.detach()), parts[0], sum(parts[1:])


def torchvision_vit() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    model = models.VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)
    return model, model, torch.rand(1, 3, 16, 16)


def timm_vit() -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    timm = pytest.importorskip("timm", reason="needs timm")
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = timm.models.VisionTransformer(**settings, init_values=0.1, reg_tokens=2, qk_norm=True)
    return model, model, torch.rand(1, 3, 16, 16)


def hugging_face(kind: str, attention: str) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    small = {"vocab_size": 20, "attn_implementation": attention}
    hidden = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**small, **hidden, num_labels=3))
        return model, lambda x: model(inputs_embeds=x).logits, torch.randn(1, 5, 16)
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, n_embd=16, n_layer=2, n_head=2))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **hidden, num_key_value_heads=1))
    return model, lambda x: model(inputs_embeds=x).logits[:, -1], torch.randn(1, 5, 16)


def small_network(name: str, attention: str = "eager") -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    torch.manual_seed(0)
    own = {"torchvision": torchvision_vit, "timm": timm_vit}
    model, forward, inputs = own[name]() if name in own else hugging_face(name, attention)
    randomised(model).double()
    return model, forward, inputs.double()


@pytest.mark.parametrize("name", ["torchvision", "timm", "bert", "gpt2", "llama"])
def test_relevance_of_transformers_is_conserved(name: str) -> None:
    model, forward, inputs = small_network(name)
    output, of_inputs, absorbed = balance(model, forward, inputs)
    assert abs(of_inputs + absorbed - output) < 1e-3 * abs(output)
    assert abs(of_inputs) > 1e-3 * abs(output) and abs(absorbed) > 1e-3 * abs(output)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_eager_and_fused_attention_have_the_same_relevance(name: str) -> None:
    found = []
    for attention in ("eager", "sdpa"):
        _, forward, inputs = small_network(name, attention)
        found.append(relevance(forward, inputs))
    # Hugging Face's softmax is in float32 where it is written out.
    assert torch.allclose(*found, rtol=1e-4, atol=1e-5 * float(found[0].abs().max()))
