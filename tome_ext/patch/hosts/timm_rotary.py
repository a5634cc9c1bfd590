"""timm's blocks with rotary positions: EVA-02, DINOv3, Perception Encoder, RoPE-ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from ..common.attention_seam import SizedAttention
from ..common.block_call import BlockCall
from .timm_parts import BLOCK, TimmBlock, attended, head_dim_of, packed_qkv, unpacked

__all__ = ["TimmRotaryAttention", "TimmRotaryBlock", "TimmRotaryPostBlock"]


def rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys (B, H, M, D), those behind the prefix turned by their positions."""
    prefix = attn.num_prefix_tokens
    # half is younger than the oldest timm supported.
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}
    turned = apply_rot_embed_cat(x[:, :, prefix:], rope, **half)
    return torch.cat((x[:, :, :prefix], turned), dim=2) if prefix else turned


def of_present(call: BlockCall, rope: Tensor, own: bool) -> Tensor:
    """A rotary table as the present tokens have it.

    Args:
        call: of the block.
        rope: (..., P, 2D), sines and cosines: (P, 2D), (H, P, 2D), (B, 1, P, 2D), (B, H, P, 2D).
        own: whether it is this block's own.

    Returns:
        As it came if nothing has merged; else (B, 1 or H, M - prefix, 2D).
    """
    table = rope
    if rope.dim() > 2:
        # Heads become channels: all sines, then all cosines.
        table = rope.unflatten(-1, (2, -1)).movedim(-4, -2).flatten(-3)
    sin, cos = table.chunk(2, dim=-1)
    halves = call.rotary((sin, cos), own)
    if halves is None:
        return rope
    heads = 1 if rope.dim() == 2 else rope.shape[-3]
    joined = torch.cat([half.unflatten(-1, (heads, -1)) for half in halves], dim=-1)
    return joined.transpose(1, 2)


class TimmRotaryAttention(SizedAttention):
    """``EvaAttention`` or ``AttentionRope`` that weights keys by size.

    Tokens are matched by their turned keys.
    """

    def _tome_attended(
        self: Any,
        call: BlockCall,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if self.qkv is not None:
            q, k, v = unpacked(self, packed_qkv(self, x))
        else:
            q, k, v = (
                project(x).unflatten(-1, (-1, head_dim_of(self))).transpose(1, 2)
                for project in (self.q_proj, self.k_proj, self.v_proj)
            )
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (rotated(self, y, rope).type_as(v) for y in (q, k))
        return attended(self, call, x, q, k, v, attn_mask, is_causal)


class TimmRotaryBlock(TimmBlock):
    """``timm.models.eva.EvaBlock`` that merges between attention and MLP.

    ``_tome_own_table`` says whether each block has a rotary table of its own, as in RoPE-mixed.
    """

    _tome_names = replace(BLOCK, scale1="gamma_1", scale2="gamma_2")
    _tome_own_table: bool = False

    def _tome_arguments(
        self, call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(("rope", "attn_mask", "is_causal"), args, strict=False)), **kwargs}
        if given.get("rope") is not None:
            given["rope"] = of_present(call, given["rope"], self._tome_own_table)
        return (), given


class TimmRotaryPostBlock(TimmRotaryBlock):
    """``timm.models.eva.EvaBlockPostNorm`` that merges between attention and MLP."""

    _tome_names = replace(BLOCK, order="post", scale1=None, scale2=None)
