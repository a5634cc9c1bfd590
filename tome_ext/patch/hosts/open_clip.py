"""OpenCLIP's image towers: its own Vision Transformer, and timm's inside its ``TimmModel``."""

from __future__ import annotations

from typing import Any

from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.timm_model import TimmModel
from open_clip.transformer import (
    Attention,
    AttentionalPooler,
    CustomResidualAttentionBlock,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    ResidualAttentionBlock,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.attention_seam import (
    SizedAttention,
    SizedCall,
    TomeMultiheadAttention,
    check_multihead,
    heads_of,
    shown,
    weighted_mean,
)
from ..common.block import BlockNames, TomeBlock
from ..common.block_call import BlockCall
from ..common.class_swap import Swapped
from ..common.patched_model import PatchedModel, Tower
from ..common.refusals import (
    check_blocks,
    check_classes,
    check_not_sharded,
    check_own_methods,
    class_name,
)
from ..common.token_state import taken_layers
from ..common.trail import AttentionKind, Trail, attention_kind
from ..registry import Family

__all__ = ["FAMILIES", "find_tower"]

FAMILIES = (
    Family(
        "CLIP, MetaCLIP, DFN, ...",
        ("VisionTransformer", "ResidualAttentionBlock", "torch.nn.MultiheadAttention"),
        "as CLIP, CustomTextCLIP or the tower alone; class token, average or attention pooling",
    ),
    Family(
        "CLIP with more norms",
        ("VisionTransformer", "CustomResidualAttentionBlock", "Attention"),
        "q/k norm, norms in and after attention, scaled heads; not scaled cosine attention",
    ),
    Family("CoCa", ("CoCa", "VisionTransformer"), "the text decoder gets the pooled tokens"),
    Family(
        "SigLIP, EVA-CLIP, ...", ("TimmModel",), "its trunk must be a model that patch.timm takes"
    ),
)
SUPPORTED = (
    "open_clip's CLIP, CustomTextCLIP or CoCa, or its image tower, which is a VisionTransformer "
    "whose blocks are all ResidualAttentionBlock with nn.MultiheadAttention, or all "
    "CustomResidualAttentionBlock with Attention, or a TimmModel"
)
NAMES = BlockNames(
    norm1="ln_1",
    attn="attn",
    norm2="ln_2",
    mlp="mlp",
    scale1="ls_1",
    scale2="ls_2",
    scale_classes=(LayerScale,),
    norm_classes=(nn.LayerNorm, LayerNorm, LayerNormFp32),
)


class OpenClipBlock(TomeBlock):
    """``open_clip.transformer.ResidualAttentionBlock`` that merges inside."""

    _tome_names = NAMES

    def _tome_attention_kind(self: Any) -> AttentionKind:
        attn = self.attn
        return attention_kind(attn, attn.head_dim, attn.dropout if attn.training else 0.0)

    def _tome_attend(
        self, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        mask = kwargs.get("attn_mask", args[2] if len(args) > 2 else None)
        mask = mask if mask is None else mask.to(x.dtype)  # as open_clip does it
        return super()._tome_attend(call, x, (x, x), {"need_weights": False, "attn_mask": mask})


class OpenClipCustomBlock(TomeBlock):
    """``open_clip.transformer.CustomResidualAttentionBlock`` that merges inside."""

    _tome_names = NAMES

    def _tome_attention_kind(self: Any) -> AttentionKind:
        attn = self.attn
        dropout = attn.attn_drop.p if attn.training else 0.0
        return attention_kind(attn, attn.head_dim, dropout)

    def _tome_attend(
        self: Any, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        out: Tensor = self.ln_attn(super()._tome_attend(call, x, args, kwargs))
        return out


class OpenClipAttention(SizedAttention):
    """``open_clip.transformer.Attention`` that weights keys by size."""

    def _tome_attended(
        self: Any, call: BlockCall, x: Tensor, attn_mask: Tensor | None = None
    ) -> Tensor:
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (heads_of(y, self.num_heads) for y in packed.chunk(3, dim=-1))
        q, k = self.ln_q(q), self.ln_k(k)
        mask = shown(attn_mask, None, self.num_heads, q.dtype)
        y = call.attend(q, k, v, mask, dropout_p=self.attn_drop.p if self.training else 0.0)
        if self.head_scale is not None:
            y = y * self.head_scale
        y = self.ln_inner(y.transpose(1, 2).flatten(2))
        out: Tensor = self.out_drop(self.out_proj(y))
        return out


class OpenClipTransformer(Swapped):
    """``open_clip.transformer.Transformer`` of an image tower."""

    _tome: Trail

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._tome.finish(super().forward(x, *args, **kwargs))  # type: ignore[misc]

    def forward_intermediates(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """As open_clip's; every intermediate is spread over the original tokens."""
        x, taken = super().forward_intermediates(  # type: ignore[misc]
            x, attn_mask, indices, stop_early
        )
        if self._tome.rules.idle:
            return x, taken
        tokens = self._tome.current
        layers = taken_layers(len(self.resblocks), indices)
        spread = [tokens.unmerge(y, layer + 1) for layer, y in zip(layers, taken, strict=True)]
        return self._tome.finish(x), spread

    def prune_intermediate_layers(self: Any, *args: Any, **kwargs: Any) -> list[int]:
        """As open_clip's; the layers that stay keep the number of tokens they remove."""
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self._tome.rules = self._tome.rules.truncated(len(self.resblocks))
        return kept


class OpenClipPooler(Swapped):
    """``open_clip.transformer.AttentionalPooler`` that counts tokens by size."""

    _tome: Trail

    def forward(self: Any, x: Tensor, size: Tensor | None = None) -> Tensor:
        if size is None:
            out: Tensor = super().forward(x)  # type: ignore[misc]
            return out
        query = self.ln_q(self.query).unsqueeze(0).expand(x.shape[0], -1, -1)
        k = self.ln_k(x)
        call = SizedCall(size)
        pooled: Tensor = self._tome.within(call, self.attn, query, k, k, need_weights=False)[0]
        return pooled


class OpenClipTower(PatchedModel):
    """``open_clip.transformer.VisionTransformer`` whose pools know of merged tokens."""

    def _pool(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        size = self._tome.size_of(x)
        if size is None:
            return super()._pool(x)  # type: ignore[misc]
        if self.attn_pool is None:
            x = x if self.final_ln_after_pool else self.ln_post(x)
            if self.pool_type == "avg":
                pooled, tokens = weighted_mean(x[:, 1:], size[:, 1:]), x[:, 1:]
            else:
                pooled, tokens = self._global_pool(x)
            return self.ln_post(pooled) if self.final_ln_after_pool else pooled, tokens
        if not self._tome.rules.method.proportional:
            size = None
        if self.attn_pool_contrastive is None:
            # What comes out are the pool's own queries, which count as one each.
            return self._global_pool(self.ln_post(self.attn_pool(x, size)))
        x = self.ln_post(x)
        tokens = self.attn_pool(x, size)
        if self.attn_pool_type == "parallel":
            return self.attn_pool_contrastive(x, size), tokens
        return self.attn_pool_contrastive(tokens), tokens


BLOCKS: dict[type, type[TomeBlock]] = {
    ResidualAttentionBlock: OpenClipBlock,
    CustomResidualAttentionBlock: OpenClipCustomBlock,
}


def find_tower(model: Any) -> Tower:
    """What a model is made of; a ValueError that names what is wrong if it is not supported."""
    tower = model.visual if isinstance(model, (CLIP, CustomTextCLIP, CoCa)) else model
    if isinstance(tower, TimmModel):
        from . import timm

        return timm.find_tower(tower.trunk)
    name = class_name(tower)
    if not isinstance(tower, VisionTransformer) or type(tower.transformer) is not Transformer:
        raise ValueError(f"model: expected {SUPPORTED}, got {name}")
    check_not_sharded(tower)
    methods = ("forward", "forward_intermediates", "_pool", "_global_pool")
    check_own_methods(tower, VisionTransformer, methods, SUPPORTED)
    if not tower.transformer.batch_first:
        raise ValueError(f"model: expected a transformer with batch_first, got {name} without")
    blocks: list[Any] = list(tower.transformer.resblocks)
    attentions = [getattr(block, "attn", block) for block in blocks]
    kinds = {nn.MultiheadAttention, Attention}
    check_classes(tower, blocks, attentions, BLOCKS, kinds, SUPPORTED)
    check_blocks(tower, blocks, attentions)
    others: list[tuple[nn.Module, type[Swapped], dict[str, Any]]] = []
    for attn in attentions:
        if isinstance(attn, Attention):
            if attn.logit_scale is not None:
                raise ValueError(f"model: got {name} with scaled cosine attention; expected none")
            others.append((attn, OpenClipAttention, {}))
        else:
            check_multihead(attn)
            others.append((attn, TomeMultiheadAttention, {}))
    for pool in (tower.attn_pool, getattr(tower, "attn_pool_contrastive", None)):
        if pool is not None:
            if type(pool) is not AttentionalPooler:
                raise ValueError(f"model: expected AttentionalPooler, got {class_name(pool)}")
            check_multihead(pool.attn)
            if not pool.attn.batch_first:
                raise ValueError(f"model: got {name} with a pool without batch_first; expected one")
            others.append((pool, OpenClipPooler, {}))
            others.append((pool.attn, TomeMultiheadAttention, {}))
    others.append((tower.transformer, OpenClipTransformer, {}))
    return Tower(
        module=tower,
        mixin=OpenClipTower,
        blocks=[(block, BLOCKS[type(block)]) for block in blocks],
        others=others,
        num_prefix_tokens=1,
        class_token=True,
    )
