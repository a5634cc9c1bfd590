"""Proportional attention: a merged token counts as often as the tokens it stands for.

ToMe, section 3 (arXiv 2210.09461): ``softmax(q k^T * scale + log(size))``, with the size of each
key token. Nothing here knows a model library.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import describe
from .plan import MergePlan
from .reference import accumulate_dtype

__all__ = ["attention_bias", "log_size_bias", "proportional_attention", "reduce_mask"]


def log_size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias that proportional attention adds to the logits.

    Args:
        size: (B, N) float32, how many original tokens each key token stands for, >= 0.
        dtype: dtype of the bias, that of the queries.

    Returns:
        (B, 1, 1, N), the natural logarithm of the sizes; a size of 0 gives -inf, which hides that
        token from every query.
    """
    return size.to(accumulate_dtype(dtype)).log().to(dtype)[:, None, None, :]


def attention_bias(
    size: Tensor | None, attn_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """One mask out of sizes and a mask, in the form ``F.scaled_dot_product_attention`` takes.

    Args:
        size: (B, N) float32, or None for no proportional attention.
        attn_mask: bool (True may be attended) or float (added to the logits), broadcastable to
            (B, H, N, N), or None.
        dtype: dtype of the queries.

    Returns:
        The mask, broadcastable to (B, H, N, N); None if both are None.
    """
    if size is None:
        return attn_mask
    bias = log_size_bias(size, dtype)
    if attn_mask is None:
        return bias
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, bias, float("-inf"))
    return bias + attn_mask


def proportional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention in which a key token of size s weighs as much as s equal tokens.

    ``softmax(q k^T * scale + log(size) + attn_mask) v`` (ToMe, section 3; arXiv 2210.09461). With
    ``size`` None it is ``F.scaled_dot_product_attention``.

    Args:
        q: (B, H, M, D) queries.
        k: (B, H, N, D) keys.
        v: (B, H, N, D') values, all of one floating dtype.
        size: (B, N) float32, how many original tokens each key token stands for; 0 hides a token.
        attn_mask: bool (True may be attended) or float (added to the logits), broadcastable to
            (B, H, M, N).
        scale: factor of the logits; None means ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight (the caller passes 0 in eval mode).

    Returns:
        (B, H, M, D') in q's dtype.

    Raises:
        ValueError: ``size`` does not have the shape (B, N) of the keys.
    """
    if size is not None and size.shape != (k.shape[0], k.shape[-2]):
        raise ValueError(
            f"size: expected {(k.shape[0], k.shape[-2])}, one per key token, got {describe(size)}"
        )
    bias = attention_bias(size, attn_mask, q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)


def reduce_mask(
    attn_mask: Tensor, plan: MergePlan, proportional: bool, dtype: torch.dtype
) -> Tensor:
    """Carry an attention mask over original tokens to merged tokens.

    A mask multiplies the weight of a key by ``exp(mask)`` (1 or 0 for a bool mask). A merged query
    stands for the mean of its tokens, a merged key for the sum of its tokens (or for their mean
    where attention is not proportional), so the multipliers are averaged and summed in the same
    way. A constant per query row changes nothing in softmax; it is taken out first, against
    overflow. With a mask of zeros the result is ``log(size)``.

    Args:
        attn_mask: bool or float, broadcastable to (B, H, N, N) over the plan's N input tokens.
        plan: from the original tokens to the present M.
        proportional: sum over the keys of a group; False takes their mean.
        dtype: dtype of the result, that of the queries.

    Returns:
        The additive mask, (B, H or 1, M or 1, M). Sizes are already in it if ``proportional``.

    Raises:
        ValueError: the mask does not broadcast to (B, H, N, N).
    """
    batch, num_tokens = plan.assign.shape
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if (
        len(shape) != 4
        or shape[0] not in (1, batch)
        or shape[2] not in (1, num_tokens)
        or shape[3] not in (1, num_tokens)
    ):
        raise ValueError(
            "attn_mask: expected a shape that broadcasts to (batch, heads, tokens, tokens) = "
            f"({batch}, H, {num_tokens}, {num_tokens}), the original tokens, "
            f"got {describe(attn_mask)}"
        )
    heads, queries = shape[1:3]
    mask = attn_mask.reshape(shape).expand(batch, heads, queries, num_tokens)
    work = accumulate_dtype(dtype)
    if mask.dtype == torch.bool:
        weight = mask.to(work)
    else:
        mask = mask.to(work)
        peak = mask.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(work).min)
        weight = (mask - peak).exp()
    # merge takes (B, tokens, channels): all heads and queries are the channels of a key.
    weight = weight.permute(0, 3, 1, 2).reshape(batch, num_tokens, heads * queries)
    weight, _ = plan.merge(weight, reduce="sum" if proportional else "mean")
    keys = plan.num_output_tokens
    weight = weight.reshape(batch, keys, heads, queries)
    if queries == num_tokens:
        weight = weight.permute(0, 3, 2, 1).reshape(batch, num_tokens, heads * keys)
        weight, _ = plan.merge(weight)
        weight = weight.reshape(batch, keys, heads, keys).transpose(1, 2)
    else:
        weight = weight.permute(0, 2, 3, 1)
    # log of a replaced 1, not of 0, so that a learned mask gets no NaN gradient.
    seen = weight > 0
    return torch.where(seen, torch.where(seen, weight, 1.0).log(), float("-inf")).to(dtype)
