"""Small networks with random weights of the kinds that people use, one for each row of docs/reference/networks.md."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

CLASSES = 5


class Reading(nn.Module):
    """A network of one tensor that returns one tensor, made of a network that takes and returns something else."""

    def __init__(self, network: nn.Module, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.read = network, read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.network, x)


@dataclass(frozen=True)
class Architecture:
    """A network and a question about it.

    Attributes
    ----------
    make
        Makes the network.
    shape
        Of one input, without the batch.
    target
        Where the number that is explained is in the output.
    layer
        The layer of Grad-CAM; None for `last_feature_layer`.
    reshape
        Makes maps of that layer's output, which are not images.
    layers
        Patterns of the layers that are pruned; None for all.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = (3, 32, 32)
    target: int | tuple[int, ...] = 1
    layer: str | None = None
    reshape: Callable[[Tensor], Tensor] | None = None
    layers: tuple[str, ...] | None = None


def models() -> Any:
    return pytest.importorskip("torchvision.models", reason="needs torchvision")


# torchvision


def resnet() -> nn.Module:
    return models().ResNet(models().resnet.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=4)


def vgg() -> nn.Module:
    with torch.device("meta"):  # its two largest layers, which are replaced, have 120 million weights
        model = models().VGG(nn.Identity(), num_classes=CLASSES)
    model.features = models().vgg.make_layers([8, "M", 8, "M", 16])
    model.avgpool = nn.AdaptiveAvgPool2d(2)
    model.classifier[0], model.classifier[3] = nn.Linear(64, 16), nn.Linear(16, 16)
    model.classifier[6] = nn.Linear(16, CLASSES)
    return model


def densenet() -> nn.Module:
    return models().DenseNet(4, (2, 2), 8, num_classes=CLASSES)


def convnext() -> nn.Module:
    block = models().convnext.CNBlockConfig
    return models().ConvNeXt([block(8, 16, 1), block(16, None, 1)], num_classes=CLASSES)


def swin() -> nn.Module:
    return models().SwinTransformer([4, 4], 8, [2, 1], [1, 2], [2, 2], num_classes=CLASSES)


def vit() -> nn.Module:
    model = models().VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=CLASSES)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero
    return model


def mobilenet() -> nn.Module:
    block = partial(models().mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    blocks = [block(8, 3, 8, 8, True, "RE", 2, 1), block(8, 5, 16, 8, True, "HS", 1, 1)]
    return models().MobileNetV3(blocks, 16, num_classes=CLASSES)


def efficientnet() -> nn.Module:
    block = partial(models().efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    return models().EfficientNet(
        [block(1, 3, 1, 8, 8, 1), block(4, 5, 2, 8, 8, 2)], dropout=0.2, num_classes=CLASSES, last_channel=16
    )


def inception() -> nn.Module:
    return models().Inception3(num_classes=CLASSES, aux_logits=False, init_weights=False)


def googlenet() -> nn.Module:
    return models().GoogLeNet(num_classes=CLASSES, aux_logits=False, init_weights=False)


def regnet() -> nn.Module:
    blocks = models().regnet.BlockParams.from_init_params(4, 8, 8, 2, 8, se_ratio=0.25)
    return models().RegNet(blocks, num_classes=CLASSES, stem_width=8)


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(first=nn.Conv2d(3, 8, 3, 2, 1), act=nn.ReLU(), last=nn.Conv2d(8, 8, 3, 2, 1), end=nn.ReLU())
    )


def deeplabv3() -> nn.Module:
    segmentation = models().segmentation.deeplabv3
    backbone = models()._utils.IntermediateLayerGetter(convolutions(), {"end": "out"})
    model = segmentation.DeepLabV3(backbone, segmentation.DeepLabHead(8, CLASSES, (1, 2)))
    return Reading(model, lambda network, x: network(x)["out"])


def fasterrcnn() -> nn.Module:
    detection = models().detection
    backbone = convolutions()
    backbone.out_channels = 8
    pool = pytest.importorskip("torchvision.ops", reason="needs torchvision").MultiScaleRoIAlign(["0"], 2, 2)
    model = detection.FasterRCNN(
        backbone,
        min_size=32,
        max_size=32,
        rpn_anchor_generator=detection.rpn.AnchorGenerator(((8, 16),), ((1.0,),)),
        box_roi_pool=pool,
        box_head=detection.faster_rcnn.TwoMLPHead(32, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
        rpn_post_nms_top_n_test=4,
        box_score_thresh=0.0,
    )
    return Reading(model, lambda network, x: torch.stack([one["scores"][:1] for one in network(list(x))]))


def swin_video() -> nn.Module:
    return models().video.SwinTransformer3d([2, 4, 4], 8, [1, 1], [1, 2], [2, 2, 2], num_classes=CLASSES)


# timm


def timm_model(name: str, **options: Any) -> nn.Module:
    return pytest.importorskip("timm", reason="needs timm").create_model(name, num_classes=CLASSES, **options)


SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def mixer() -> nn.Module:
    nets = pytest.importorskip("timm.models.mlp_mixer", reason="needs timm")
    model = nets.MlpMixer(CLASSES, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)
    nn.init.normal_(model.head.weight)  # timm starts it at zero
    return model


def coatnet() -> nn.Module:
    maxxvit = pytest.importorskip("timm.models.maxxvit", reason="needs timm")
    transformer = maxxvit.MaxxVitTransformerCfg(dim_head=8, rel_pos_type="bias")
    config = maxxvit.MaxxVitCfg(
        (8, 16), (1, 1), ("C", "T"), 8, conv_cfg=maxxvit.MaxxVitConvCfg(), transformer_cfg=transformer
    )
    return maxxvit.MaxxVit(config, img_size=32, num_classes=CLASSES)


def nfnet() -> nn.Module:
    nets = pytest.importorskip("timm.models.nfnet", reason="needs timm")
    config = nets.NfCfg((1, 1), (16, 16), stem_type="3x3", stem_chs=8, group_size=8, num_features=16)
    return nets.NormFreeNet(config, num_classes=CLASSES)


# Hugging Face. Networks of words get their embeddings.


def hugging_face(name: str, config: str, read: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    network = getattr(transformers, name)(getattr(transformers, config)(**options))
    inputs = "pixel_values" if read == "image" else "inputs_embeds"
    last = (slice(None), -1) if read == "word" else ()
    return Reading(network, lambda network, x: network(**{inputs: x}).logits[last])


def bert() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hugging_face(
        "BertForSequenceClassification", "BertConfig", "text", num_labels=CLASSES, intermediate_size=32, **sizes
    )


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return hugging_face("GPT2LMHeadModel", "GPT2Config", "word", bos_token_id=0, eos_token_id=0, **sizes)


def llama() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hugging_face("LlamaForCausalLM", "LlamaConfig", "word", intermediate_size=32, num_key_value_heads=1, **sizes)


def mixtral() -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2, "num_key_value_heads": 1}
    return hugging_face("MixtralForCausalLM", "MixtralConfig", "word", intermediate_size=32, **sizes, **experts)


def hf_vit() -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hugging_face(
        "ViTForImageClassification", "ViTConfig", "image", num_labels=CLASSES, intermediate_size=32, **sizes
    )


# Others


class Tagger(nn.Module):
    """Tags each word, given as its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.lstm(x)[0]))


class UNet(nn.Module):
    """Two levels, with a skip connection between encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.pool = (
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.MaxPool2d(2),
        )
        self.bottom = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.last = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = self.down(x)
        below = self.up(self.bottom(self.pool(across)))
        return self.head(self.last(torch.cat([across, below], 1)))


def volumes() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 8, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


def waveforms() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(1, 8, 9, stride=4), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 5, dilation=2), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, CLASSES)),
    )


def as_row(tokens: Tensor) -> Tensor:
    """Positions of a sequence ``[N, T, C]`` as a map ``[N, C, 1, T]``."""
    return tokens.mT[:, :, None]


def as_frames(features: Tensor) -> Tensor:
    """Features ``[N, T, H, W, C]`` as a map of the frames, one below the other."""
    return features.flatten(1, 2).movedim(-1, 1)


def as_slices(volume: Tensor) -> Tensor:
    """A volume ``[N, C, D, H, W]`` as a map of its slices, one below the other."""
    return volume.flatten(2, 3)


WORDS = (6, 16)
ARCHITECTURES = {
    "`torchvision` ResNet": Architecture(resnet),
    "`torchvision` VGG": Architecture(vgg),
    "`torchvision` DenseNet": Architecture(densenet),
    "`torchvision` ConvNeXt": Architecture(convnext),
    "`torchvision` Swin": Architecture(swin),
    "`torchvision` ViT": Architecture(vit),
    "`torchvision` MobileNetV3": Architecture(mobilenet),
    "`torchvision` EfficientNet": Architecture(efficientnet),
    "`torchvision` Inception v3": Architecture(inception, (3, 75, 75), layers=("Conv2d_*", "Mixed_5b.*")),
    "`torchvision` GoogLeNet": Architecture(googlenet, layers=("conv*", "inception3a.*")),
    "`torchvision` RegNet": Architecture(regnet),
    "`torchvision` DeepLabV3": Architecture(deeplabv3, target=(1, 16, 16)),
    "`torchvision` Faster R-CNN": Architecture(fasterrcnn, target=0, layer="network.backbone.end"),
    "`torchvision` Swin of videos": Architecture(swin_video, (3, 4, 32, 32), layer="norm", reshape=as_frames),
    "`timm` ViT": Architecture(partial(timm_model, "vit_tiny_patch16_224", **SMALL)),
    "`timm` DeiT, distilled": Architecture(partial(timm_model, "deit_tiny_distilled_patch16_224", **SMALL)),
    "`timm` Mixer": Architecture(mixer),
    "`timm` CoAtNet": Architecture(coatnet),
    "`timm` EVA-02": Architecture(partial(timm_model, "eva02_tiny_patch14_224", **SMALL)),
    "`timm` NFNet": Architecture(nfnet),
    "`timm` BEiT": Architecture(partial(timm_model, "beit_base_patch16_224", **SMALL)),
    "`transformers` BERT": Architecture(bert, WORDS, layer="network.bert.encoder.layer.0.output", reshape=as_row),
    "`transformers` GPT-2": Architecture(gpt2, WORDS, layer="network.transformer.h.1.ln_1", reshape=as_row),
    "`transformers` Llama": Architecture(llama, WORDS, layer="network.model.layers.1.input_layernorm", reshape=as_row),
    "`transformers` Mixtral": Architecture(
        mixtral, WORDS, layer="network.model.layers.1.input_layernorm", reshape=as_row
    ),
    "`transformers` ViT": Architecture(hf_vit),
    "LSTM that tags words": Architecture(Tagger, (6, 8), target=(2, 1), layer="norm", reshape=as_row),
    "U-Net": Architecture(UNet, target=(1, 16, 16)),
    "CNN of volumes": Architecture(volumes, (1, 8, 8, 8), layer="5", reshape=as_slices),
    "CNN of waveforms": Architecture(waveforms, (1, 200), layer="4", reshape=lambda maps: maps[:, :, None]),
}
