"""MAE's Vision Transformers: a subclass of timm's that pools in ``forward_features``."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from ..patch.common.attention_seam import weighted_mean
from ..patch.common.methods import ToMe
from ..patch.common.patched_model import PatchedModel, Tower, patch_model
from ..patch.common.rules import Settings
from ..patch.hosts.timm import Form, find_tower, tower_of
from ..patch.hosts.timm_parts import TimmAttention, TimmBlock
from ..schedule import Schedule
from . import timm_classes

__all__ = ["make_tome_class", "patch_mae"]


class MaeModel(PatchedModel):
    """MAE's ``VisionTransformer``, whose average pool counts tokens by size."""

    def forward_features(self: Any, x: Tensor, **masks: Any) -> Tensor:
        x = run_blocks(self, x, masks)
        return pooled(self, x, self._tome.size_of(x) if self.global_pool else None)


class MaeModelWithHead(MaeModel):
    """One whose head is timm's, which since MAE was written pools and normalises once more."""

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(x)
        out: Tensor = x if pre_logits else self.head(x)
        return out


def run_blocks(model: Any, x: Tensor, masks: dict[str, Any]) -> Tensor:
    """Images (B, 3, H, W) to the tokens (B, M, C) behind the last block, the class token first.

    ``masks`` are what timm's forward passes on: none, for MAE's blocks take none.
    """
    for name, mask in masks.items():
        if mask is not None and mask is not False:
            raise ValueError(f"{name}: expected none, as the blocks of MAE's models take no mask")
    x = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        x = block(x)
    return x


def pooled(model: Any, x: Tensor, size: Tensor | None) -> Tensor:
    """What MAE makes of tokens (B, M, C): the normed class token (B, C), or their normed mean.

    ``size`` (B, M) is None where all count once.
    """
    if not model.global_pool:
        features: Tensor = model.norm(x)[:, 0]
        return features
    patches = x[:, 1:]
    mean = patches.mean(1) if size is None else weighted_mean(patches, size[:, 1:])
    features = model.fc_norm(mean)
    return features


def is_mae(model: Any) -> bool:
    """Whether a model is what MAE made of timm's, as far as its attributes tell."""
    if not isinstance(model, VisionTransformer):
        return False
    pool: object = model.global_pool  # of timm's own a string
    return (
        type(model).forward_features is not VisionTransformer.forward_features
        and isinstance(pool, bool)
        and model.num_prefix_tokens == 1
        and model.cls_token is not None
    )


def find_mae(model: Any) -> Tower:
    """What such a model is made of; a ValueError that says what is not supported."""
    own_head = type(model).forward_head is not VisionTransformer.forward_head
    owners = [owner for owner in type(model).__mro__ if issubclass(owner, VisionTransformer)]
    form = Form(
        tuple(reversed(owners)),
        MaeModel if own_head else MaeModelWithHead,
        {Block: TimmBlock},
        {Attention: TimmAttention},
    )
    return tower_of(model, form)


def patch_mae(
    model: nn.Module,
    r: Schedule = 0,
    prop_attn: bool = False,
    trace_source: bool = False,
    inference: bool = False,
) -> Any:
    """See :func:`tome_ext.published.patch.mae.apply_patch`."""
    settings = Settings(
        ToMe(bool(prop_attn)), r, trace_source=bool(trace_source), inference=bool(inference)
    )
    return patch_model(model, find_mae if is_mae(model) else find_tower, settings)


def make_tome_class(transformer_class: type) -> type:
    """As that of ``tome.patch.timm``, for MAE's class: pools by ``_tome_info["size"]``."""
    base: Any = timm_classes.make_tome_class(transformer_class)

    class ToMeVisionTransformer(base):
        def forward_features(self, x: Tensor, **masks: Any) -> Tensor:
            x = run_blocks(self, x, masks)
            size = self._tome_info["size"]
            return pooled(self, x, None if size is None else size.squeeze(-1))

    return ToMeVisionTransformer
