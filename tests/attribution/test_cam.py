"""Class activation maps of networks of tokens: which layer, and where its tokens are in the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("captum", reason="needs captum")

from captum.attr import LayerGradCam

from spade_fast.attribution.cam import GradCam, LayerCam, check_layout, last_feature_layer

IMAGE = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))


class Vit(nn.Module):
    """Two blocks on patches of 4 x 4 pixels, and tokens before and behind them; it reads one of these or the mean."""

    def __init__(self, before: int = 1, after: int = 0, pool: str = "token", embed: str = "conv") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed: nn.Module = nn.Conv2d(3, 8, 4, stride=4) if embed == "conv" else nn.Linear(48, 8)
        self.before, self.after = nn.Parameter(torch.randn(1, before, 8)), nn.Parameter(torch.randn(1, after, 8))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 12, activation="gelu", batch_first=True, norm_first=True) for _ in "ab"
        )
        self.norm, self.head, self.pool = nn.LayerNorm(8), nn.Linear(8, 5), pool

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.embed, nn.Linear):
            x = self.embed(F.unfold(x, 4, stride=4).transpose(1, 2))
        else:
            x = self.embed(x).flatten(2).transpose(1, 2)
        before, after = (one.expand(len(x), -1, -1) for one in (self.before, self.after))
        x = torch.cat([before, x, after], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.pool == "token" else x.mean(1))


def by_hand(model: nn.Module, layer: nn.Module, place: Callable[[Tensor], Tensor], kind: Any, image: Tensor) -> Tensor:
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: kept.append(output))
    score = model(image.clone().requires_grad_())[0, 2]
    hook.remove()
    (gradients,) = torch.autograd.grad(score, kept)
    maps, gradients = place(kept[0].detach()), place(gradients)
    weights = gradients.mean((2, 3), keepdim=True) if kind is GradCam else gradients.clamp(min=0)
    found = (weights * maps).sum(1, keepdim=True)
    return found if kind is GradCam else found.clamp(min=0)


def tokens(first: int, height: int, width: int) -> Callable[[Tensor], Tensor]:
    return lambda given: given[:, first : first + height * width].mT.unflatten(2, (height, width))


def torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision.models", reason="needs torchvision")
    model: nn.Module = models.VisionTransformer(
        16, 4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
    )
    nn.init.normal_(model.get_parameter("heads.head.weight"))  # torchvision starts it at zero
    return model


def timm_vit(**settings: Any) -> nn.Module:
    timm = pytest.importorskip("timm", reason="needs timm")
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    model: nn.Module = timm.models.VisionTransformer(**small, **settings)
    return model


def hugging_face(kind: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = getattr(transformers, f"{kind}Config")(image_size=16, patch_size=4, num_labels=5, **settings)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = getattr(transformers, f"{kind}ForImageClassification")(config)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x).logits
            return logits

    return Logits()


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "window_size": 2}

# How to make it, the layer, and its first token of a patch, with the grid.
NETWORKS: dict[str, tuple[Callable[[], Any], str, tuple[int, int, int]]] = {
    "torchvision": (torchvision_vit, "encoder.layers.encoder_layer_1.ln_1", (1, 4, 4)),
    "timm, registers": (lambda: timm_vit(reg_tokens=3, qk_norm=True), "blocks.1.norm1", (4, 4, 4)),
    "timm, mean": (lambda: timm_vit(global_pool="avg", class_token=False, fc_norm=False), "norm", (0, 4, 4)),
    "Hugging Face": (lambda: hugging_face("ViT", **VIT), "inner.vit.layers.1.layernorm_before", (1, 4, 4)),
    "Hugging Face, Swin": (lambda: hugging_face("Swin", **SWIN), "inner.swin.layernorm", (0, 2, 2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_libraries(name: str) -> None:
    torch.manual_seed(0)
    make, layer, place = NETWORKS[name]
    model, image = make().eval(), IMAGE[..., :16]
    chosen = last_feature_layer(model, image, 2)
    assert [name for name, module in model.named_modules() if module is chosen] == [layer]
    for kind in (GradCam, LayerCam):
        found = kind(model, chosen).attribute(image, target=2)
        expected = by_hand(model, chosen, tokens(*place), kind, image)
        scale = float(expected.abs().max())
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * scale) and (scale > 0 or kind is LayerCam)


@pytest.mark.parametrize(("before", "after"), [(1, 0), (3, 0), (1, 2)])
@pytest.mark.parametrize("kind", [GradCam, LayerCam])
def test_other_tokens_are_left_out(before: int, after: int, kind: Any) -> None:
    model = Vit(before, after).eval()
    layer = last_feature_layer(model, IMAGE, 2)
    assert layer is model.blocks[1].norm1
    found = kind(model, layer).attribute(IMAGE, target=2)
    assert found.shape == (1, 1, 4, 6)
    assert torch.allclose(found, by_hand(model, layer, tokens(before, 4, 6), kind, IMAGE), atol=1e-6)


def test_a_map_is_the_same_in_a_batch() -> None:
    model = Vit().eval()
    images = torch.cat([IMAGE, IMAGE.flip(-1)])
    found = GradCam(model, model.blocks[1].norm1).attribute(images, target=[2, 1])
    assert torch.allclose(found[:1], GradCam(model, model.blocks[1].norm1).attribute(IMAGE, target=2), atol=1e-6)


def test_the_last_norm_where_the_mean_is_read() -> None:
    model = Vit(0, 0, "mean").eval()
    assert last_feature_layer(model, IMAGE, 2) is model.norm


def test_tokens_whose_places_are_unknown() -> None:
    model = Vit(embed="linear").eval()
    with pytest.raises(ValueError, match="no layer whose output is a feature map"):
        last_feature_layer(model, IMAGE, 2)
    layer = model.blocks[1].norm1
    with pytest.raises(ValueError, match=r"GradCam needs .* got \[1, 25, 8\]: give reshape"):
        GradCam(model, layer).attribute(IMAGE, target=2)
    for kind in (GradCam, LayerCam):
        found = kind(model, layer, reshape=tokens(1, 4, 6)).attribute(IMAGE, target=2)
        assert torch.allclose(found, by_hand(model, layer, tokens(1, 4, 6), kind, IMAGE), atol=1e-6)


def test_reshape_overrides() -> None:
    model = Vit().eval()
    layer = model.blocks[1].norm1
    found = GradCam(model, layer, reshape=tokens(2, 2, 2)).attribute(IMAGE, target=2)
    assert torch.allclose(found, by_hand(model, layer, tokens(2, 2, 2), GradCam, IMAGE), atol=1e-6)


@pytest.mark.parametrize("kind", [GradCam, LayerCam])
def test_the_image_may_be_any_input(kind: Any) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned, self.head = nn.Identity(), nn.Linear(3, 4)

        def forward(self, table: Tensor, image: Tensor) -> Tensor:
            return self.head(self.turned(image.permute(0, 2, 3, 1)).mean((1, 2))) + table

    model, table, image = Both(), torch.rand(1, 4), torch.rand(1, 3, 5, 7)
    method = kind(model, model.turned)
    alone = kind(lambda image: model(table, image), model.turned).attribute(image, target=1)
    assert alone.shape == (1, 1, 5, 7)
    assert torch.equal(method.attribute((table, image), target=1), alone)
    assert torch.equal(method.attribute(table, target=1, additional_forward_args=image), alone)


def test_what_reshape_returns_is_checked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    for reshape, given in ((lambda _: None, "NoneType"), (lambda one: one.flatten(2), r"a .* tensor \[1, 4, 9\]")):
        with pytest.raises(ValueError, match=rf"reshape must return maps \[N, C, h, w\], got {given}"):
            GradCam(model, model[0], reshape=reshape).attribute(torch.rand(1, 3, 5, 5), target=1)


def test_tokens_that_are_shuffled_on_the_way() -> None:
    class Shuffled(Vit):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](self.embed(x).flatten(2).transpose(1, 2))
            return self.head(self.norm(self.blocks[1](x[:, torch.randperm(x.shape[1])])).mean(1))

    with pytest.raises(ValueError, match="'embed' are tokens, not feature maps"):
        last_feature_layer(Shuffled().eval(), IMAGE, 2)


def test_a_head_of_zeros_is_said() -> None:
    model = torchvision_vit().eval()
    model.get_parameter("heads.head.weight").data.zero_()
    with pytest.raises(ValueError, match="target depends on no tokens: all gradients are 0"):
        last_feature_layer(model, torch.rand(1, 3, 16, 16), 2)


def test_grad_cam_is_that_of_captum_on_maps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.LazyLinear(5)).eval()
    model(IMAGE)
    for settings in ({}, {"relu_attributions": True}, {"attribute_to_layer_input": True}):
        found = GradCam(model, model[2]).attribute(IMAGE, target=2, **settings)
        assert torch.allclose(found, LayerGradCam(model, model[2]).attribute(IMAGE, target=2, **settings), atol=1e-6)


def test_captums_grad_cam_on_tokens_is_refused_in_spade() -> None:
    model = Vit().eval()
    with pytest.raises(ValueError, match=r"got \[1, 25, 8\] of tokens: use spade_fast.attribution.GradCam"):
        check_layout(LayerGradCam(model, model.blocks[1].norm1), (IMAGE,))
    check_layout(GradCam(model, model.blocks[1].norm1), (IMAGE,))


@pytest.mark.parametrize(
    ("outputs", "found"), [(lambda x: (x, x * 2), "one with 2"), (lambda x: (x, (x, x)), "one with 2"), (dict, "dict")]
)
def test_layers_without_one_output_are_refused(outputs: Callable[..., Any], found: str) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return outputs(x=x) if outputs is dict else outputs(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.several = Several()

        def forward(self, x: Tensor) -> Tensor:
            outputs = self.several(x)
            return (outputs["x"] if isinstance(outputs, dict) else outputs[0]).flatten(1)

    model = Model()
    with pytest.raises(ValueError, match=f"LayerCam needs a layer with one output, got {found}"):
        LayerCam(model, model.several).attribute(IMAGE, target=2)
    assert not model.several._forward_hooks
