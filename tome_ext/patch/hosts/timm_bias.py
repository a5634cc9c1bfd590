"""timm's blocks with a bias by relative positions: BEiT and VisionTransformerRelPos.

Such a bias (1, H, N, N) is over the original tokens. A merged token takes its rows and columns from
the one of its tokens that is nearest to their centroid. Each layer behind the first merge gathers a
(B, H, M, M) bias of its own, which keeps attention from the operator and from flash: M tokens of H
heads cost 4 H M^2 bytes per image. So these models gain less than others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..common.attention_seam import SizedAttention, weighted_mean
from ..common.block_call import BlockCall
from ..common.positions import of_grid
from .timm_parts import BLOCK, TimmBlock, TimmModel, attended, packed_qkv, unpacked

__all__ = [
    "TimmBeitAttention",
    "TimmBeitBlock",
    "TimmBiasModel",
    "TimmRelPosAttention",
    "TimmRelPosBlock",
    "TimmRelPosPostBlock",
]


def of_present(call: BlockCall, bias: Tensor | None, window: Any) -> Tensor | None:
    """The bias of the present tokens, (B or 1, H, M, M).

    Args:
        call: of the block.
        bias: (1, H, N, N) of the original tokens, or (H, N, N).
        window: the module that made it; its ``window_size`` is the grid of the patches.
    """
    if bias is None:
        return None
    if bias.dim() == 3:
        bias = bias.unsqueeze(0)
    height, width = window.window_size
    prefix = call.tokens.rules.num_prefix_tokens
    return call.relative_bias(bias, of_grid(height, width, prefix, bias.device))


class TimmBeitAttention(SizedAttention):
    """``timm.models.beit.Attention`` that weights keys by size.

    ``_tome_windows`` holds the module that makes the bias of all layers, if there is one.
    """

    _tome_windows: tuple[Any, ...] = ()

    def _tome_attended(
        self: Any, call: BlockCall, x: Tensor, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        window, bias = self, None
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias()
        if shared_rel_pos_bias is not None:
            window = self._tome_windows[0]
            bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
        q, k, v = unpacked(self, packed_qkv(self, x))
        return attended(self, call, x, q, k, v, bias=of_present(call, bias, window))


class TimmRelPosAttention(SizedAttention):
    """``RelPosAttention`` of timm that weights keys by size; as :class:`TimmBeitAttention`."""

    _tome_windows: tuple[Any, ...] = ()

    def _tome_attended(
        self: Any, call: BlockCall, x: Tensor, shared_rel_pos: Tensor | None = None
    ) -> Tensor:
        window = self.rel_pos if self.rel_pos is not None else self._tome_windows[0]
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        q, k, v = unpacked(self, self.qkv(x))
        return attended(self, call, x, q, k, v, bias=of_present(call, bias, window))


class TimmBeitBlock(TimmBlock):
    """``timm.models.beit.Block`` that merges between attention and MLP."""

    _tome_names = replace(BLOCK, scale1="gamma_1", scale2="gamma_2")


class TimmRelPosBlock(TimmBlock):
    """``RelPosBlock`` that merges between attention and MLP."""


class TimmRelPosPostBlock(TimmBlock):
    """``ResPostRelPosBlock`` that merges between attention and MLP."""

    _tome_names = replace(BLOCK, order="post", scale1=None, scale2=None)


class TimmBiasModel(TimmModel):
    """``Beit`` or ``VisionTransformerRelPos``, whose heads average tokens by themselves."""

    def _tome_asks(self: Any, x: Tensor) -> bool:
        return bool(self.global_pool == "avg")

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        size = self._tome.size_of(x) if self._tome_asks(x) else None
        if size is None:
            return super().forward_head(x, pre_logits)  # type: ignore[misc]
        first = self.num_prefix_tokens
        x = self.head_drop(self.fc_norm(weighted_mean(x[:, first:], size[:, first:])))
        return x if pre_logits else self.head(x)
