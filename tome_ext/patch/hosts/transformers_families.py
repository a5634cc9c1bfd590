"""Which vision towers of Transformers are supported, and what their parts are called, as data.

A family whose blocks are like another's is one entry of :data:`FAMILIES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..common.class_swap import Swapped
from ..common.trail import Reader
from .transformers_parts import (
    BeitLayer,
    BeitTower,
    BiasedAttention,
    ClassPool,
    CrossPoolLayer,
    Layer,
    MaskedAttention,
    MeanPool,
    PoolLayer,
    ProbePool,
    RotaryLayer,
    TomeAttention,
    TransformersTower,
    VideoMAELayer,
    VJEPA2Encoder,
    VJEPA2Layer,
    VJEPA2Tower,
)

__all__ = ["FAMILIES", "REFUSED", "TowerFamily"]


@dataclass(frozen=True)
class TowerFamily:
    """Models of one module of ``transformers.models`` whose towers are built alike.

    Attributes:
        name: for people.
        package: the module of ``transformers.models``.
        towers: classes that return tokens, each with the path to its blocks.
        layer: class of the blocks, ``attention`` of the module in them that calls the
            AttentionInterface.
        names: what a block calls its parts; see :class:`BlockNames`.
        prefix: number of tokens before the patches; registers are counted from the config.
        heads: classes around a tower, each with what reads the tower's tokens; around those not
            listed, tokens and hidden states come back at full length.
        pools: classes that read all tokens, each with what they become.
        mask: the towers' argument that is a padding mask (B, N).
        notes: for people.
    """

    name: str
    package: str
    towers: dict[str, str]
    layer: str
    attention: str
    names: dict[str, str]
    prefix: int = 1
    heads: dict[str, Reader] = field(default_factory=dict)
    pools: dict[str, type[Swapped]] = field(default_factory=dict)
    mask: str | None = None
    layer_mixin: type[Layer] = Layer
    attention_mixin: type[TomeAttention] = MaskedAttention
    tower_mixin: type[TransformersTower] = TransformersTower
    notes: str = ""

    @property
    def module(self) -> str:
        """The module that its classes live in."""
        return f"transformers.models.{self.package}.modeling_{self.package}"


VIT = {
    "norm1": "layernorm_before",
    "attn": "attention",
    "norm2": "layernorm_after",
    "mlp": "mlp",
    "drop1": "dropout",
    "drop2": "dropout",
}
DINO = {
    "norm1": "norm1",
    "attn": "attention",
    "norm2": "norm2",
    "mlp": "mlp",
    "scale1": "layer_scale1",
    "scale2": "layer_scale2",
    "drop1": "drop_path",
    "drop2": "drop_path",
    "scale_vector": "lambda1",
}
CLIP = {"norm1": "layer_norm1", "attn": "self_attn", "norm2": "layer_norm2", "mlp": "mlp"}


def _vit(name: str, package: str, cls: str, **options: Any) -> TowerFamily:
    return TowerFamily(
        name, package, {f"{cls}Model": "layers"}, f"{cls}Layer", f"{cls}Attention", VIT,
        mask="attention_mask", **options,
    )  # fmt: skip


def _dino(name: str, package: str, cls: str, path: str, **options: Any) -> TowerFamily:
    return TowerFamily(
        name, package, {f"{cls}Model": f"{path}.layer", f"{cls}Encoder": "layer"},
        f"{cls}Layer", f"{cls}Attention", DINO,
        notes="backbones and what is built on them get every state at full length", **options,
    )  # fmt: skip


def _clip(name: str, package: str, cls: str, **options: Any) -> TowerFamily:
    return TowerFamily(
        name, package, {f"{cls}VisionModel": "encoder.layers"}, f"{cls}EncoderLayer",
        f"{cls}Attention", CLIP, **options,
    )  # fmt: skip


FAMILIES: tuple[TowerFamily, ...] = (
    _vit("ViT", "vit", "ViT", heads={"ViTForImageClassification": "tokens"}),
    _vit(
        "DeiT",
        "deit",
        "DeiT",
        prefix=2,
        heads={
            "DeiTForImageClassification": "tokens",
            "DeiTForImageClassificationWithTeacher": "tokens",
        },
    ),
    _vit("ViT-MSN", "vit_msn", "ViTMSN", heads={"ViTMSNForImageClassification": "tokens"}),
    _vit("ViT-MAE", "vit_mae", "ViTMAE", notes="its decoder gets tokens at full length"),
    _vit("I-JEPA", "ijepa", "IJepa", prefix=0, heads={"IJepaForImageClassification": "mean"}),
    _dino(
        "DINOv2",
        "dinov2",
        "Dinov2",
        "encoder",
        mask="attention_mask",
        heads={"Dinov2ForImageClassification": "mean"},
    ),
    _dino(
        "DINOv2 with registers",
        "dinov2_with_registers",
        "Dinov2WithRegisters",
        "encoder",
        mask="attention_mask",
        heads={"Dinov2WithRegistersForImageClassification": "mean"},
    ),
    _dino("DINOv3", "dinov3_vit", "DINOv3ViT", "model", layer_mixin=RotaryLayer),
    _clip(
        "CLIP",
        "clip",
        "CLIP",
        heads={
            "CLIPModel": "tokens",
            "CLIPVisionModelWithProjection": "tokens",
            "CLIPForImageClassification": "mean",
        },
    ),
    _clip(
        "MetaCLIP 2",
        "metaclip_2",
        "MetaClip2",
        heads={
            "MetaClip2Model": "tokens",
            "MetaClip2VisionModelWithProjection": "tokens",
            "MetaClip2ForImageClassification": "mean",
        },
    ),
    _clip(
        "SigLIP",
        "siglip",
        "Siglip",
        prefix=0,
        heads={"SiglipModel": "tokens", "SiglipForImageClassification": "mean"},
        pools={"SiglipMultiheadAttentionPoolingHead": ProbePool},
    ),
    _clip(
        "SigLIP 2",
        "siglip2",
        "Siglip2",
        prefix=0,
        mask="pixel_attention_mask",
        heads={"Siglip2Model": "tokens", "Siglip2ForImageClassification": "mean"},
        pools={"Siglip2MultiheadAttentionPoolingHead": ProbePool},
        notes="padding neither merges nor counts",
    ),
    TowerFamily(
        "AIMv2",
        "aimv2",
        {"Aimv2VisionModel": "encoder.layers"},
        "Aimv2EncoderLayer",
        "Aimv2Attention",
        {"norm1": "rms_norm1", "attn": "attention", "norm2": "rms_norm2", "mlp": "ffn"},
        prefix=0,
        heads={"Aimv2Model": "tokens"},
        pools={"Aimv2AttentionPoolingHead": ClassPool},
    ),
    TowerFamily(
        "VideoMAE",
        "videomae",
        {"VideoMAEModel": "encoder.layer"},
        "VideoMAELayer",
        "VideoMAESelfAttention",
        {
            "norm1": "layernorm_before",
            "attn": "attention",
            "norm2": "layernorm_after",
            "mlp": "intermediate",
        },
        prefix=0,
        heads={"VideoMAEForVideoClassification": "mean"},
        layer_mixin=VideoMAELayer,
        attention_mixin=TomeAttention,
    ),
    TowerFamily(
        "V-JEPA 2",
        "vjepa2",
        {"VJEPA2Model": "encoder.layer"},
        "VJEPA2Layer",
        "VJEPA2RopeAttention",
        {
            "norm1": "norm1",
            "attn": "attention",
            "norm2": "norm2",
            "mlp": "mlp",
            "drop1": "drop_path",
            "drop2": "drop_path",
        },
        prefix=0,
        heads={"VJEPA2ForVideoClassification": "tokens"},
        pools={
            "VJEPA2Encoder": VJEPA2Encoder,
            "VJEPA2PoolerSelfAttentionLayer": PoolLayer,
            "VJEPA2PoolerCrossAttentionLayer": CrossPoolLayer,
            "VJEPA2PoolerSelfAttention": TomeAttention,
            "VJEPA2PoolerCrossAttention": TomeAttention,
        },
        layer_mixin=VJEPA2Layer,
        attention_mixin=TomeAttention,
        tower_mixin=VJEPA2Tower,
        notes="its predictor is not patched, and gets tokens at full length",
    ),
    TowerFamily(
        "BEiT",
        "beit",
        {"BeitModel": "layers"},
        "BeitLayer",
        "BeitAttention",
        {
            "norm1": "layernorm_before",
            "attn": "attention",
            "norm2": "layernorm_after",
            "mlp": "mlp",
            "dropout1": "dropout",
            "dropout2": "dropout",
            "scale1": "lambda_1",
            "scale2": "lambda_2",
            "drop1": "drop_path",
            "drop2": "drop_path",
        },
        heads={"BeitForImageClassification": "tokens"},
        pools={"BeitPooler": MeanPool},
        layer_mixin=BeitLayer,
        attention_mixin=BiasedAttention,
        tower_mixin=BeitTower,
        notes="its relative-position bias becomes one per image, and keeps attention from flash",
    ),
    TowerFamily(
        "InternVL",
        "internvl",
        {"InternVLVisionModel": "encoder.layer"},
        "InternVLVisionLayer",
        "InternVLVisionAttention",
        {
            "norm1": "layernorm_before",
            "attn": "attention",
            "norm2": "layernorm_after",
            "mlp": "mlp",
            "dropout2": "dropout",
            "scale1": "lambda_1",
            "scale2": "lambda_2",
        },
        attention_mixin=TomeAttention,
    ),
)

PACKED = (
    "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe",
    "qwen3_omni_moe", "glm4v", "glm4v_moe", "kimi_k25",
)  # fmt: skip
# Modules of transformers.models whose towers are not supported, and why.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("swin", "swinv2", "swin2sr", "donut"), "it attends within shifted windows"),
    **dict.fromkeys(("hiera", "sam2", "edgetam"), "it attends within windows, and pools between"),
    **dict.fromkeys(("sam", "sam_hq", "vitdet", "sam3"), "its tokens stay a grid"),
    **dict.fromkeys(
        PACKED, "it packs images into one sequence, and joins its tokens in groups of 2 x 2"
    ),
    **dict.fromkeys(("pixtral", "mistral3"), "it packs images into one sequence"),
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext", "resnet"), "it has no tokens"),
    "data2vec": "its attention does not go through the AttentionInterface",
    "mllama": "its tokens are tiled and padded",
    "gemma4": "it pools tokens by their places",
}
