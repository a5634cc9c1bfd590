"""Proportional attention: a merged token counts as often as the tokens it stands for.

ToMe, section 3 (arXiv 2210.09461): ``softmax(q k^T * scale + log(size))``, with the size of each
key token. Nothing here knows a model library.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import _checks, ops
from ._torch import any_autocast, in_transform
from .ops import describe, device_kind, expect_tensors
from .plan import MergePlan
from .reference import accumulate_dtype, log_size, without_hidden

__all__ = [
    "OPERATOR",
    "attend",
    "attention_bias",
    "autocasts",
    "cls_attention",
    "key_mask",
    "log_size_bias",
    "proportional_attention",
    "reduce_mask",
    "unsupported",
    "visible_keys",
]

OPERATOR = "tome::attention"
UNLIKE = "q, k and v that differ in batch, heads or channels"
MAX_CUDA_HEAD_DIM = 128  # kMaxCudaHeadDim of tome_core/cuda.h


def unsupported(
    kind: str,
    dtype: torch.dtype,
    head_dim: int,
    dropout_p: float = 0.0,
    sized: bool = True,
) -> str | None:
    """Why ``tome::attention`` does not serve such attention, in words; None if it does.

    ``kind`` is the type of the device.
    """
    if not sized and kind != "cpu":
        # There stock attention is flash. On the CPU it is slower; docs/operators.md has figures.
        return "without sizes it is the same"
    if dropout_p > 0:
        return f"attention dropout of {dropout_p:g}"
    if kind not in ops.kernel_devices:
        return f"no kernel for {kind}"
    if dtype not in _checks.FLOATS or (kind == "cuda" and dtype == torch.float64):
        return f"no kernel for {str(dtype).removeprefix('torch.')} on {kind}"
    if kind == "cuda" and head_dim > MAX_CUDA_HEAD_DIM:
        return f"heads of {head_dim} channels, more than {MAX_CUDA_HEAD_DIM}"
    return None


def _in_transform() -> bool:
    return not torch.compiler.is_compiling() and in_transform()


def _operator_serves(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, attn_mask: Tensor | None, dropout_p: float
) -> str | None:
    """Why stock attention is called instead of ``tome::attention``, in words; None if it is not."""
    if attn_mask is not None:
        return "a mask that does more than hide keys"
    if _in_transform():
        return "forward-mode derivatives or torch.func"
    like_q, like_k = q.shape, k.shape  # asked for once: each question makes a new torch.Size
    if len(like_q) != 4 or like_k != v.shape:
        return UNLIKE
    if like_q != like_k and (like_q[:2] != like_k[:2] or like_q[3] != like_k[3]):
        return UNLIKE
    return unsupported(device_kind(q), q.dtype, like_q[3], dropout_p, size is not None)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    if not any_autocast():
        return False
    device = device_kind(x)
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast gives them to stock attention: in its dtype, but for float64."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check(size: Tensor | None, **tensors: Tensor) -> None:
    """Refuse several dtypes or devices, shapes that don't go together, sizes of other keys."""

    def got() -> str:
        return ", ".join(f"{name} {describe(x)}" for name, x in tensors.items())

    dtype, device = tensors["q"].dtype, tensors["q"].device
    for x in tensors.values():
        if x.dtype != dtype or x.device != device:
            raise ValueError(f"expected one dtype and one device, got {got()}")
    v = tensors.get("v")
    if v is not None:
        q, k = tensors["q"], tensors["k"]
        together = min(q.dim(), k.dim(), v.dim()) >= 2 and q.shape[-1] == k.shape[-1]
        if not together or k.shape[-2] != v.shape[-2]:
            raise ValueError(
                f"q, k, v: expected (B, H, M, D), (B, H, N, D) and (B, H, N, D'), got {got()}"
            )
    if size is None:
        return
    keys = tensors["k"].shape[0], tensors["k"].shape[-2]
    if size.shape != keys:
        raise ValueError(f"size: expected {keys}, one per key token, got {describe(size)}")
    if size.device != device or not size.is_floating_point():
        raise ValueError(f"size: expected float32 on {device}, got {describe(size)}")


def key_mask(attn_mask: Tensor, batch: int, num_keys: int) -> Tensor | None:
    """The keys that a mask shows, if that is all it says.

    Args:
        attn_mask: a mask broadcastable to (B, H, M, N).
        batch: B.
        num_keys: N.

    Returns:
        (B, N) bool, True for the keys that every query may see; None if the mask is not bool, or
        differs between heads or queries.
    """
    if attn_mask.dtype != torch.bool or attn_mask.dim() > 4:
        return None
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if shape[0] not in (1, batch) or shape[1:3] != (1, 1) or shape[3] not in (1, num_keys):
        return None
    return attn_mask.reshape(shape[0], shape[3]).expand(batch, num_keys)


def visible_keys(attn_mask: Tensor, batch: int, num_keys: int) -> Tensor:
    """The keys that a mask shows to at least one query of one head.

    Args:
        attn_mask: bool or float, broadcastable to (B, H, M, N).
        batch: B.
        num_keys: N.

    Returns:
        (B, N) bool. A float mask hides what it takes below half of its dtype's least value, as
        libraries write it in place of -infinity.
    """
    if attn_mask.dtype != torch.bool:
        attn_mask = attn_mask > torch.finfo(attn_mask.dtype).min / 2
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    return attn_mask.reshape(shape).any(2).any(1).expand(batch, num_keys)


def log_size_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias that proportional attention adds to the logits.

    Args:
        size: (B, N) float32, how many original tokens each key token stands for, >= 0.
        dtype: dtype of the bias, that of the queries.

    Returns:
        (B, 1, 1, N), the natural logarithm of the sizes; a size of 0 gives -inf, which hides that
        token from every query.
    """
    return log_size(size, accumulate_dtype(dtype)).to(dtype)[:, None, None, :]


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

    ``softmax(q k^T * scale + log(size) + attn_mask) v`` (ToMe, section 3; arXiv 2210.09461),
    without ever writing the (M, N) matrix: by ``torch.ops.tome.attention``, which adds log(size)
    in float32 to float32 logits. ``F.scaled_dot_product_attention``, with log(size) in the mask,
    serves where that operator cannot: with dropout, with a mask that does more than hide keys,
    where v has other channels than q, in the transforms of ``torch.func``, on a CUDA device with
    float64 or more than 128 channels, and on devices without a kernel; and without sizes on other
    devices than the CPU, where stock attention is flash. Under autocast, q, k and v are cast as for
    stock attention.

    Args:
        q: (B, H, M, D) queries.
        k: (B, H, N, D) keys.
        v: (B, H, N, D') values, all of one floating dtype. Views of one packed qkv tensor are read
            in place, as any with a contiguous last dimension.
        size: (B, N) float32, how many original tokens each key token stands for. 0 hides a token:
            its weight is 0, and what its key and value hold, NaN too, changes nothing.
        attn_mask: bool (True may be attended) or float (added to the logits), broadcastable to
            (B, H, M, N). A bool mask that is the same for all heads and queries costs nothing.
        scale: factor of the logits; None means ``D ** -0.5``.
        dropout_p: probability of dropping an attention weight (the caller passes 0 in eval mode).

    Returns:
        (B, H, M, D') in q's dtype, laid out so that ``.transpose(1, 2).flatten(2)`` is a view where
        the operator serves. A query that may see no key gets zeros. Differentiable to any order
        in q, k, v and size; the gradient in sizes and second derivatives write the (M, N) matrix.
        A size of 0 gets the gradient 0.

    Raises:
        ValueError: q, k and v differ in dtype or device, or in channels or tokens that must be
            alike; ``size`` does not have the shape (B, N) of the keys, a floating dtype and their
            device; or ``dropout_p`` is not from 0 to 1. Nothing is computed. Batches and heads that
            do not broadcast get stock attention's error.
    """
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected a probability from 0 to 1, got {dropout_p!r}")
    expect_tensors(q=q, k=k, v=v)
    q, k, v = _cast_for_autocast(q, k, v)
    _check(size, q=q, k=k, v=v)
    return attend(q, k, v, size, attn_mask, scale, dropout_p)[0]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None = None,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, str | None]:
    """:func:`proportional_attention`, and why it was not ``tome::attention``; None if it was.

    For arguments that are known to be right, as inside a patched model: those of wrong shapes or
    dtypes get the error of whichever operator is called.
    """
    q, k, v = _cast_for_autocast(q, k, v)
    if attn_mask is not None:
        shown = key_mask(attn_mask, k.shape[0], k.shape[-2])
        if shown is not None:
            size = shown.to(torch.float32) if size is None else torch.where(shown, size, 0.0)
            attn_mask = None
    reason = _operator_serves(q, k, v, size, attn_mask, dropout_p)
    if reason is None:
        if size is not None and size.dtype != torch.float32:
            size = size.to(torch.float32)
        return ops.attention_forward(q, k, v, size, scale)[0], None
    bias = attention_bias(size, attn_mask, q.dtype)
    if k.dim() == v.dim() == 4:
        k, v = without_hidden(k, size), without_hidden(v, size)
    # Of stock attention, only the plain form has derivatives of every kind.
    transformed = not is_compiling() and in_transform()
    with sdpa_kernel(SDPBackend.MATH) if transformed else nullcontext():
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale
        )
    return out, reason


def cls_attention(
    q: Tensor,
    k: Tensor,
    size: Tensor | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """How much the class token attends to each token, without the attention matrix.

    ``softmax(q[:, :, 0] k^T * scale + log(size))`` averaged over heads, in one pass over the keys:
    the score by which EViT (arXiv 2202.07800) and other pruning methods rank tokens.

    Args:
        q: (B, H, M, D) queries, M >= 1, of which only the first token's is read.
        k: (B, H, N, D) keys, of q's dtype: float32, float16, bfloat16 or float64. Any strides with
            a contiguous last dimension (others are copied), so views of a packed qkv tensor are
            read in place.
        size: (B, N) float32, how many original tokens each key token stands for; 0 hides a token.
            None means 1.
        scale: factor of the logits; None means ``D ** -0.5``.
        attn_mask: bool (True may be attended) or float (added to the logits), broadcastable to
            (B, H, M, N), of which the first query's row counts. One that hides the same keys from
            all heads costs nothing.

    Returns:
        (B, N) float32 (float64 for float64): every row sums to 1, or is 0 if all keys are hidden.
        Differentiable in q, k and size; a size of 0 gets the gradient 0.

    Raises:
        ValueError: wrong rank, shapes that do not go together, no query, several dtypes or
            devices. Nothing is computed.
    """
    expect_tensors(q=q, k=k)
    q, k = _cast_for_autocast(q, k)
    if q.dim() != 4 or k.dim() != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q, k: expected (B, H, M, D) and (B, H, N, D), got q {describe(q)} and k {describe(k)}"
        )
    if q.shape[1] == 0 or q.shape[2] == 0:
        raise ValueError(f"q: expected at least one head and one query, got {describe(q)}")
    _check(size, q=q, k=k)
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.dim() < 2 else attn_mask[..., :1, :]
        shown = key_mask(attn_mask, k.shape[0], k.shape[-2])
        if shown is None:
            return ops.twin("masked_cls_attention")(q, k, size, scale, attn_mask)
        size = shown.to(torch.float32) if size is None else torch.where(shown, size, 0.0)
    if size is not None:
        size = size.to(torch.float32)
    # Its kernels take heads of any size.
    if unsupported(device_kind(q), q.dtype, head_dim=1) is not None:
        return ops.twin("cls_attention")(q, k, size, scale)
    return ops.cls_attention(q, k, size, scale)


def reduce_mask(attn_mask: Tensor, plan: MergePlan, reduce: str, dtype: torch.dtype) -> Tensor:
    """Carry an attention mask over original tokens to merged tokens.

    A mask multiplies the weight of a key by ``exp(mask)`` (1 or 0 for a bool mask). A merged query
    stands for the mean of its tokens, a merged key for the sum of its tokens (or for what
    ``reduce`` says), so the multipliers are averaged and summed in the same way. A constant per
    query row changes nothing in softmax; it is taken out first, against overflow. With a mask of
    zeros the result is ``log(size)`` for a sum.

    Args:
        attn_mask: bool or float, broadcastable to (B, H, N, N) over the plan's N input tokens.
        plan: from the original tokens to the present M.
        reduce: of the keys of a group: "sum", where attention is proportional; "mean"; or "amax",
            with which a group is hidden only if all its tokens are.
        dtype: dtype of the result, that of the queries.

    Returns:
        The additive mask, (B, H or 1, M or 1, M). Sizes are already in a "sum".

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
    weight, _ = plan.merge(weight, reduce=reduce)
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
