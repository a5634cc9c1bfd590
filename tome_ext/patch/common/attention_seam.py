"""Where a library's attention is reached: what the common ways of computing it share.

Attention that has q, k and v in hand calls :meth:`BlockCall.attend`. ``nn.MultiheadAttention`` is
here, which is a block's self-attention or a pool's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention import proportional_attention
from ...reference import accumulate_dtype
from .block_call import BlockCall
from .class_swap import Swapped
from .refusals import class_name
from .trail import Trail

__all__ = [
    "SizedAttention",
    "SizedCall",
    "TomeMultiheadAttention",
    "check_multihead",
    "heads_of",
    "shown",
    "weighted_mean",
]


def heads_of(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) as (B, H, N, C / H), a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class SizedAttention(Swapped):
    """Attention that weights keys by size within a block's call, and else is the model's own.

    A class of it says in ``_tome_attended`` how it makes q, k and v, and what of the call's output.
    """

    _tome: Trail

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call: BlockCall | None = self._tome.call
        if call is None:  # a direct call, or nothing to do in this block
            out: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        return self._tome_attended(call, x, *args, **kwargs)


def _projections(attn: nn.MultiheadAttention) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Weights and biases of q, k and v."""
    biases = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
    if attn._qkv_same_embed_dim:
        return attn.in_proj_weight.chunk(3), biases
    return (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight), biases


def check_multihead(attn: Any) -> None:
    """Refuse what is no nn.MultiheadAttention, or one whose keys are not all tokens."""
    if (
        not isinstance(attn, nn.MultiheadAttention)
        or type(attn).forward is not nn.MultiheadAttention.forward
    ):
        raise ValueError(
            f"model: expected an nn.MultiheadAttention, got {class_name(attn)} in its place; if "
            "that is an adapter, add it after the patch"
        )
    if attn.bias_k is not None or attn.bias_v is not None or attn.add_zero_attn:
        raise ValueError(
            "model: got an nn.MultiheadAttention with keys of its own; expected one without "
            "add_bias_kv and add_zero_attn"
        )


class TomeMultiheadAttention(Swapped):
    """``nn.MultiheadAttention`` that weights keys by size: of a block, or of a pool of tokens."""

    _tome: Trail

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        call: Any = self._tome.call
        if call is None:
            out: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
                query,
                key,
                value,
                key_padding_mask,
                need_weights is not False,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
            return out
        if need_weights:
            raise ValueError(
                "need_weights: expected False where tokens have merged, got True: no attention "
                "matrix is built there; set r = 0 for the weights"
            )
        x = query if self.batch_first else query.transpose(0, 1)
        if self._qkv_same_embed_dim and query is key and key is value:
            packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
            q, k, v = packed.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            weights, biases = _projections(self)
            each = (query, key, value)
            q, k, v = (
                heads_of(
                    F.linear(y if self.batch_first else y.transpose(0, 1), w, b), self.num_heads
                )
                for y, w, b in zip(each, weights, biases, strict=True)
            )
        dropout = self.dropout if self.training else 0.0
        # is_causal only says what the mask is, which has to be there.
        mask = shown(attn_mask, key_padding_mask, self.num_heads, q.dtype)
        y = call.attend(q, k, v, mask, dropout_p=dropout)
        # As nn.MultiheadAttention does it, which never calls the module.
        y = F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return y if self.batch_first else y.transpose(0, 1), None


def shown(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """The masks of nn.MultiheadAttention as one of ``F.scaled_dot_product_attention``.

    Bool masks of the former say what is hidden, those of the latter what is shown.

    Args:
        attn_mask: (N, N) or (B * H, N, N), bool or float.
        key_padding_mask: (B, N), bool or float.
        num_heads: H.
        dtype: of the queries.
    """
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, num_heads)) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if all(mask.dtype == torch.bool for mask in masks):
        masks = [~mask for mask in masks]
        return masks[0] & masks[-1] if masks else None
    floats = [
        torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
        if mask.dtype == torch.bool
        else mask
        for mask in masks
    ]
    return floats[0] if len(floats) == 1 else floats[0] + floats[1]


class SizedCall:
    """Stands for a block's call in attention that only counts its keys, as behind the tower.

    Attributes:
        size: (B, M) float32, how often each key counts; None for all once.
    """

    __slots__ = ("size",)

    def __init__(self, size: Tensor | None) -> None:
        self.size = size

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`BlockCall.attend`, neither causal nor biased; the mask is over these tokens."""
        assert not is_causal
        assert bias is None
        return proportional_attention(q, k, v, self.size, attn_mask, scale, dropout_p)


def weighted_mean(x: Tensor, size: Tensor) -> Tensor:
    """The mean (B, C) of tokens x (B, M, C) over the original tokens that they stand for."""
    work = accumulate_dtype(x.dtype)
    weight = size.to(work) / size.sum(1, keepdim=True, dtype=work)
    return (x * weight.unsqueeze(-1)).sum(1).to(x.dtype)
