"""The operators in what ONNX has, so that any runtime can run the graph.

These forms are used nowhere else (see :mod:`tome_ext.onnx`); :mod:`tome_ext.reference` is the form
to read.

ONNX has no segmented sum, and its scatters with a reduction are missing from runtimes or wrong in
them. So rows are summed by a matrix of weights, and ranks are counted by comparisons, which settles
ties alike in every runtime. All of it is O(N^2) per image, as attention is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reference

__all__ = ["FORMS"]


def match(
    metric: Tensor,
    r: int,
    num_prefix_tokens: int = 0,
    *,
    weight: Tensor | None = None,
    targets: Tensor | None = None,
    size: Tensor | None = None,
    importance: Tensor | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tome_ext.match`, for finite metrics whose squares neither overflow nor vanish."""
    batch, num_tokens, device = metric.shape[0], metric.shape[-2], metric.device
    prefix = min(num_prefix_tokens, num_tokens)
    merges = reference.may_merge(num_tokens, r, prefix, targets, threshold)
    r = reference.cut_r(num_tokens, r, prefix, targets)
    index = torch.arange(num_tokens, device=device)
    if not merges:
        assign = index.to(torch.int32).repeat(batch, 1)
        return assign, *plan(assign, num_tokens)
    work = reference.accumulate_dtype(metric.dtype)
    rows = metric.to(work) if metric.dim() == 3 else metric.to(work).mean(1)
    rows = F.normalize(rows, dim=2, eps=torch.finfo(work).tiny)
    # The tokens of even index (A) and those of odd index (B) behind the prefix; or the others of
    # targets, and these.
    a, b = index[prefix + prefix % 2 :: 2], index[prefix + 1 - prefix % 2 :: 2]
    if targets is not None:
        b = targets.to(torch.int64)
        kept = (index.unsqueeze(1) == b).any(1) | (index < prefix)
        a = (kept * num_tokens + index).argsort()[: num_tokens - prefix - b.shape[0]]
    scores = rows.index_select(1, a) @ rows.index_select(1, b).mT
    num_a = scores.shape[1]
    visible = torch.ones_like(rows[..., 0]) > 0 if weight is None else weight != 0
    sees_a, sees_b = (visible.index_select(1, of) for of in (a, b))
    scores = torch.where(sees_a.unsqueeze(2) & sees_b.unsqueeze(1), scores, float("-inf"))
    in_a, in_b = (_count(sees).unsqueeze(1) for sees in (sees_a, sees_b))
    most = torch.minimum(in_a, in_b) if targets is None else torch.where(in_b > 0, in_a, 0)
    merged = most.clamp_max(r)
    if targets is not None:
        # All targets hidden: what does not fit the rows merges into the first one, which stands.
        excess = r + in_a + in_b - num_a - b.shape[0]
        stands = (in_b == 0) & (excess > 0)
        merged = torch.where(in_b > 0, merged, torch.where(stands, excess + 1, 0))
        sees_b = sees_b | (stands & (index[: b.shape[0]] == 0))
    nearest = scores.argmax(2)  # ONNX promises the lowest index among equals
    # Of those that find nothing, hidden ones are last; no similarity is as low as -2.
    best = scores.amax(2).clamp_min(-2.0)
    found = best > -2.0
    if size is not None or importance is not None:
        sizes = torch.ones_like(rows[..., 0]) if size is None else size
        cost = reference.merge_cost(
            best,
            sizes.index_select(1, a),
            sizes.index_select(1, b).gather(1, nearest),
            None if importance is None else importance.index_select(1, a),
        )
        best = torch.where(found, -cost, torch.finfo(work).min)
        threshold = None if threshold is None else (threshold - 1) / 2
    if threshold is not None:
        near = _count(found & (best >= threshold)).unsqueeze(1)
        merged = torch.maximum(merged, torch.minimum(near, most))
    best = torch.where(sees_a, best, float("-inf"))
    mine, other = best.unsqueeze(2), best.unsqueeze(1)
    earlier = index[:num_a] < index[:num_a].unsqueeze(1)
    merges = _count((other > mine) | ((other == mine) & earlier)) < merged
    # Order of the output rows: prefix, the A tokens that stay, then the B tokens.
    stays = (sees_a & ~merges).to(torch.int64).cumsum(1)
    rows_of_a = prefix + stays - 1
    rows_of_b = prefix + stays[:, -1:] + sees_b.to(torch.int64).cumsum(1) - 1
    rows_of_a = torch.where(merges, rows_of_b.gather(1, nearest), rows_of_a)
    rows_of_a, rows_of_b = torch.where(sees_a, rows_of_a, -1), torch.where(sees_b, rows_of_b, -1)
    grouped = torch.cat((index[:prefix].expand(batch, -1), rows_of_a, rows_of_b), 1)
    place = torch.cat((index[:prefix], a, b)).argsort()
    assign = grouped.index_select(1, place).to(torch.int32)
    return assign, *plan(assign, num_tokens - r)


def select(
    scores: Tensor, keep: int, num_prefix_tokens: int = 0, fuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tome_ext.select`."""
    num_tokens = scores.shape[1]
    prefix = min(num_prefix_tokens, num_tokens)
    kept = reference.cut_keep(num_tokens, keep, prefix)
    index = torch.arange(num_tokens, device=scores.device)
    mine, other = scores.unsqueeze(2), scores.unsqueeze(1)
    nan, other_nan = mine.isnan(), other.isnan()
    earlier = index < index.unsqueeze(1)
    above = (other > mine) | (nan & ~other_nan)
    alike = (other == mine) | (nan & other_nan)
    # The prefix counts in no rank.
    rank = _count((above | (alike & earlier)) & (index >= prefix))
    stays = (index < prefix) | (rank < kept - prefix)
    fuses = fuse and kept < num_tokens
    rows = stays.to(torch.int64).cumsum(1) - 1
    assign = torch.where(stays, rows, kept if fuses else -1).to(torch.int32)
    return assign, *plan(assign, kept + int(fuses))


def plan(assign: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """As :func:`tome_ext.reference.plan`."""
    row = torch.where(assign < 0, num_rows, assign).to(torch.int64)
    num_tokens = row.shape[1]
    # No two keys are equal, so it does not matter how a runtime's sort breaks ties.
    keys = row * num_tokens + torch.arange(num_tokens, device=row.device)
    members = keys.argsort(dim=1)
    bounds = torch.arange(num_rows + 1, device=row.device).unsqueeze(1)
    offsets = _count(row.unsqueeze(1) < bounds)
    return members.to(torch.int32), offsets.to(torch.int32)


def _count(x: Tensor) -> Tensor:
    """How many entries of the last dimension are True."""
    return x.to(torch.int64).sum(-1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, C) of x (B, N, C) by index (B, K), as one Gather over all images."""
    batch, num_rows, channels = x.shape
    first = torch.arange(batch, device=x.device).unsqueeze(1) * num_rows
    flat = (index.to(torch.int64) + first).flatten()
    return x.reshape(-1, channels).index_select(0, flat).reshape(batch, -1, channels)


def merge(
    x: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """As :meth:`tome_ext.MergePlan.merge`, for finite tokens and not for "amax".

    A token with NaN or infinity reaches every row of its image, as 0 times it is NaN.
    """
    if reduce not in ("mean", "sum"):
        raise NotImplementedError(
            f'reduce: expected "mean" or "sum" in a model exported to ONNX, got {reduce!r}'
        )
    work = reference.accumulate_dtype(x.dtype)
    places = torch.arange(members.shape[1], device=x.device)
    begun = offsets.unsqueeze(2) <= places
    weight = (begun[:, :-1] & ~begun[:, 1:]).to(work)  # (B, M, N): 1 where a row has that place
    count = total = weight.sum(2, keepdim=True)
    if size is not None:
        sized = weight * size.to(work).gather(1, members.to(torch.int64)).unsqueeze(1)
        total = sized.sum(2, keepdim=True)
        # A mean over sizes that sum to 0 is even.
        weight = torch.where(total == 0, weight, sized) if reduce == "mean" else sized
    if reduce == "mean":
        divisor = torch.where(total == 0, count, total)
        # Divided first: a row of one token is then a copy. A row without members stays 0.
        weight = weight / torch.where(divisor == 0, 1.0, divisor)
    merged = weight @ _take(x, members).to(work)
    return merged.to(x.dtype), total.squeeze(2).to(torch.float32)


def merge_add_norm(
    x: Tensor,
    branch: Tensor,
    size: Tensor | None,
    members: Tensor,
    offsets: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    keep_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :meth:`tome_ext.MergePlan.merge_add_norm`, for finite tokens."""
    x = x + (branch if scale is None else scale * branch)
    if keep_norms:
        work = reference.accumulate_dtype(x.dtype)
        # One more channel: lengths are merged as tokens are.
        wide = x.to(work)
        wide = torch.cat((wide, _length(wide)), 2)
        merged, new_size = merge(wide, size, members, offsets)
        merged, length = merged[..., :-1], merged[..., -1:]
        own = _length(merged)
        merged = merged * torch.where(own > 0, length / torch.where(own > 0, own, 1.0), 1.0)
        merged = merged.to(x.dtype)
    else:
        merged, new_size = merge(x, size, members, offsets)
    return merged, new_size, F.layer_norm(merged, merged.shape[-1:], weight, bias, eps)


def _length(x: Tensor) -> Tensor:
    """Of tokens (B, N, C): (B, N, 1)."""
    return x.square().sum(2, keepdim=True).sqrt()


def unmerge(x: Tensor, assign: Tensor) -> Tensor:
    """As :meth:`tome_ext.MergePlan.unmerge`."""
    return torch.where((assign >= 0).unsqueeze(2), _take(x, assign.clamp_min(0)), 0.0)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`tome_ext.reference.attention_forward`, with products in the dtype of q."""
    work = reference.accumulate_dtype(q.dtype)
    scale = reference.default_scale(q) if scale is None else scale
    logits = ((q * scale) @ k.mT).to(work)
    if size is not None:
        # Not -inf, of which a row that hides every key would be NaN.
        bias = torch.where(size > 0, size.to(work).log(), torch.finfo(work).min)
        logits = logits + bias[:, None, None, :]
    out, lse = logits.softmax(3).to(v.dtype) @ v, logits.logsumexp(3)
    if size is None:
        return out, lse
    seen = (size > 0).any(1)[:, None, None]
    return torch.where(seen.unsqueeze(3), out, 0.0), torch.where(seen, lse, 0.0)


# By operator, what stands for it in ONNX. The operators of gradients have no place there.
FORMS: dict[str, Callable[..., Any]] = {
    "match": match,
    "select": select,
    "plan": plan,
    "merge": merge,
    "merge_add_norm": merge_add_norm,
    "unmerge": unmerge,
    "attention_forward": attention_forward,
    "cls_attention": reference.cls_attention,
}
