"""OpenCLIP's models for the host contract."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from host_cases import Case, Inputs, loud
from models import GRID, images, paired_images
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

DEPTH = 4
TOKENS = GRID * GRID + 1
VISION = {"layers": DEPTH, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 4 * GRID}
TEXT = {"context_length": 6, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}


def _tower(**options: Any) -> nn.Module:
    # As wide as the tower: with two attention pools open_clip takes no other.
    return loud(VisionTransformer(4 * GRID, 4, 32, DEPTH, 2, 2.0, output_dim=32, **options))


def _dual(cls: type[nn.Module], **options: Any) -> nn.Module:
    return loud(cls(embed_dim=16, vision_cfg={**VISION, **options}, text_cfg=TEXT))


def _coca() -> nn.Module:
    pool = {"attentional_pool": True, "attn_pooler_queries": 8, "attn_pooler_heads": 2}
    return loud(
        CoCa(
            16,
            multimodal_cfg={**TEXT, "width": 16},
            text_cfg={**TEXT, "embed_cls": True, "output_tokens": True},
            vision_cfg={**VISION, **pool, "output_tokens": True},
        )
    )


def _timm() -> nn.Module:
    tower = {"timm_model_name": "test_vit", "timm_pool": "avg", "image_size": 160}
    return loud(CustomTextCLIP(embed_dim=16, vision_cfg=tower, text_cfg=TEXT))


def _images(batch: int, seed: int) -> Inputs:
    return {"x": images(batch, seed=seed)}


def _pair(batch: int, seed: int, side: int = 4 * GRID) -> Inputs:
    text = torch.randint(1, 15, (batch, 6), generator=torch.Generator().manual_seed(seed))
    return {"image": images(batch, side, seed=seed), "text": text}


def _paired(model: Any, inputs: Inputs) -> Inputs:
    tower = getattr(model, "visual", model)
    tower.positional_embedding.data.zero_()
    name = next(iter(inputs))
    x = inputs[name]
    return {**inputs, name: paired_images(len(x), dtype=x.dtype)}


def _pooled(y: Any) -> Tensor:
    """What a tower pooled, or a dual model says of the image."""
    if isinstance(y, dict):
        return torch.cat((y["image_features"], y["logits"].flatten(1)), dim=1)
    return y if isinstance(y, Tensor) else y[0]


def _case(name: str, **options: Any) -> Case:
    return Case(
        f"open_clip: {name}",
        partial(_tower, **options),
        _images,
        _pooled,
        TOKENS,
        1,
        DEPTH,
        equal_tokens=_paired,
    )


def _whole(name: str, make: Any) -> Case:
    return Case(f"open_clip: {name}", make, _pair, _pooled, TOKENS, 1, DEPTH, equal_tokens=_paired)


ATTENTION_POOL = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}

CASES = [
    _case("average pool, tokens", pool_type="avg", output_tokens=True, ls_init_value=0.5),
    _case("average pool before norm", pool_type="avg", final_ln_after_pool=True),
    _case("attention pools", **{**ATTENTION_POOL, "attentional_pool": "parallel"}),
    _case(
        "more norms",
        ls_init_value=0.5,
        qk_norm=True,
        scale_heads=True,
        scale_attn_inner=True,
        scale_attn=True,
        scale_fc=True,
    ),
    _whole("CLIP", partial(_dual, CLIP)),
    _whole("CoCa", _coca),
    Case(
        "open_clip: timm inside",
        _timm,
        partial(_pair, side=160),
        _pooled,
        101,
        1,
        6,
    ),
]
