"""The operators in what ONNX has, so that any runtime can run the graph.

These forms are used nowhere else (see :mod:`tome_ext.onnx`); :mod:`tome_ext.reference` is the form
to read.

ONNX has no segmented sum, and its scatters with a reduction are missing from runtimes or wrong in
them. So rows are summed by a matrix of weights, and ranks are counted by comparisons, which settles
ties alike in every runtime. All of it is O(N^2) per image, as attention is.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from . import reference

__all__ = ["FORMS"]

SHORTEST = 1e-19  # what tokens are that cancel out; its square is still a float32

# What is known of tensors of the graph that is being made, so that fewer nodes do. By a plan's
# members, the output row of every token, and whether no row is empty. By sizes of which all are
# positive, their version then: what is changed later is not known any more.
_rows: MutableMapping[Tensor, tuple[Tensor, bool]] = WeakTensorKeyDictionary()
_positive: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _is_positive(size: Tensor) -> bool:
    """Whether all sizes are known to be positive."""
    return size in _positive and _positive[size] == _version(size)


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
    rows = rows / _length(rows).clamp_min(torch.finfo(work).tiny)
    # The tokens of even index (A) and those of odd index (B) behind the prefix; or the others of
    # targets, and these. All of them stand in this order: prefix, A, B.
    a: slice | Tensor = slice(prefix + prefix % 2, None, 2)
    b: slice | Tensor = slice(prefix + 1 - prefix % 2, None, 2)
    order = None
    if targets is not None:
        chosen = targets.to(torch.int64)
        kept = (index.unsqueeze(1) == chosen).any(1) | (index < prefix)
        others = (kept * num_tokens + index).argsort()[: num_tokens - prefix - chosen.shape[0]]
        a, b, order = others, chosen, torch.cat((index[:prefix], others, chosen))
    scores = _pick(rows, a) @ _pick(rows, b).mT
    num_a, num_b = scores.shape[1:]
    most: Any = torch.sym_min(num_a, num_b) if targets is None else num_a
    merged: Any = torch.sym_min(most, r)  # both of each image: numbers where all tokens are visible
    sees = None
    if weight is not None:
        sees_a, sees_b = (_pick(weight != 0, side) for side in (a, b))
        scores = torch.where(sees_a.unsqueeze(2) & sees_b.unsqueeze(1), scores, float("-inf"))
        in_a, in_b = (_count(sees).unsqueeze(1) for sees in (sees_a, sees_b))
        most = torch.minimum(in_a, in_b) if targets is None else torch.where(in_b > 0, in_a, 0)
        merged = most.clamp_max(r)
        if targets is not None:
            # All targets hidden: what does not fit the rows merges into the first one, which
            # stands.
            excess = r + in_a + in_b - num_a - num_b
            stands = (in_b == 0) & (excess > 0)
            merged = torch.where(in_b > 0, merged, torch.where(stands, excess + 1, 0))
            sees_b = sees_b | (stands & (index[:num_b] == 0))
        sees = sees_a, sees_b
    nearest = scores.argmax(2)  # ONNX promises the lowest index among equals
    best = scores.amax(2)
    found = None  # all
    if sees is not None:
        # Of those that find nothing, hidden ones are last; no similarity is as low as -2.
        best = best.clamp_min(-2.0)
        found = best > -2.0
    if size is not None or importance is not None:
        sizes = torch.ones_like(rows[..., 0]) if size is None else size
        cost = reference.merge_cost(
            best,
            _pick(sizes, a),
            _pick(sizes, b).gather(1, nearest),
            None if importance is None else _pick(importance, a),
        )
        best = -cost if found is None else torch.where(found, -cost, torch.finfo(work).min)
        threshold = None if threshold is None else (threshold - 1) / 2
    if threshold is not None:
        similar = best >= threshold if found is None else found & (best >= threshold)
        merged = _count(similar).unsqueeze(1).clamp_max(most).clamp_min(merged)
    if sees is not None:
        best = torch.where(sees[0], best, float("-inf"))
    stays = _rank(best) >= merged
    if sees is not None:
        stays = stays & sees[0]
    kept_a = num_a - merged if isinstance(merged, int) else None
    row = _grouped_rows(stays, nearest, num_b, prefix, kept_a, sees)
    # Where each token stands among prefix, A, B.
    if order is None:
        place = prefix + index % 2 * num_a + (index - prefix) // 2
        place = torch.where(index < prefix, index, place)
    else:
        place = order.argsort()
    row = row.index_select(1, place)
    return row.to(torch.int32), *_plan(row, num_tokens - r, full=kept_a is not None)


def _grouped_rows(
    stays: Tensor,
    nearest: Tensor,
    num_b: int,
    prefix: int,
    kept_a: int | None,
    sees: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """The output rows of tokens in the order prefix, A, B: (B, N) int64, -1 for hidden ones.

    Rows are in this order too: prefix, the A tokens that stay, the B tokens.

    Args:
        stays: (B, Na) bool, of A.
        nearest: (B, Na), which B token each joins if it does not stay.
        num_b: Nb.
        prefix: how many tokens are before A.
        kept_a: how many of A stay, if that is the same number in every image.
        sees: (B, Na) and (B, Nb) bool, what is visible; None means all.
    """
    num_a = stays.shape[1]
    index = torch.arange(prefix + num_a + num_b, device=stays.device)
    # Behind the prefix, from 1.
    row_a = stays.to(torch.int64).cumsum(1)
    after_a = row_a[:, -1:] if kept_a is None else kept_a
    if sees is None:
        row_b = after_a + 1 + index[:num_b]
        row_a = torch.where(stays, row_a, after_a + 1 + nearest)
    else:
        row_b = after_a + sees[1].to(torch.int64).cumsum(1)
        row_a = torch.where(stays, row_a, row_b.gather(1, nearest))
        row_a, row_b = (
            torch.where(seen, row, -prefix) for seen, row in zip(sees, (row_a, row_b), strict=True)
        )
    first = torch.cat((index[:prefix], torch.full_like(index[prefix:], prefix - 1)))
    if row_b.dim() == 1:  # of all images: padding takes fewer nodes than spreading it over them
        first = first + F.pad(row_b, (prefix + num_a, 0))
        return F.pad(row_a, (prefix, num_b)) + first
    return F.pad(torch.cat((row_a, row_b), 1), (prefix, 0)) + first


def select(
    scores: Tensor, keep: int, num_prefix_tokens: int = 0, fuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`tome_ext.select`."""
    num_tokens = scores.shape[1]
    prefix = min(num_prefix_tokens, num_tokens)
    kept = reference.cut_keep(num_tokens, keep, prefix)
    index = torch.arange(num_tokens, device=scores.device)
    # NaN comes last, behind -infinity; the prefix comes in no order.
    ranked = scores[:, prefix:].clamp_min(torch.finfo(scores.dtype).min)
    ranked = torch.where(ranked.isnan(), float("-inf"), ranked)
    stays = F.pad(_rank(ranked), (prefix, 0)) < kept - prefix
    stays = stays | (index < prefix)
    fuses = fuse and kept < num_tokens
    rows = stays.to(torch.int64).cumsum(1) - 1
    assign = torch.where(stays, rows, kept if fuses else -1).to(torch.int32)
    return assign, *plan(assign, kept + int(fuses))


def plan(assign: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """As :func:`tome_ext.reference.plan`."""
    return _plan(assign, num_rows, full=False)


def _plan(row: Tensor, num_rows: int, full: bool) -> tuple[Tensor, Tensor]:
    """Of the output row of every token, (B, N), or -1; ``full`` says that no row is empty."""
    last = torch.where(row < 0, num_rows, row).to(torch.int64)
    num_tokens = row.shape[1]
    # No two keys are equal, so it does not matter how a runtime's sort breaks ties.
    keys = last * num_tokens + torch.arange(num_tokens, device=row.device)
    members = keys.argsort(dim=1).to(torch.int32)
    bounds = torch.arange(num_rows + 1, device=row.device).unsqueeze(1)
    offsets = _count(last.unsqueeze(1) < bounds).to(torch.int32)
    _rows[members] = row, full
    return members, offsets


def _row_of_token(members: Tensor, offsets: Tensor) -> tuple[Tensor, bool]:
    """The output row of every token, (B, N), of a dropped one none; and whether no row is empty.

    Of a plan that was made in the same graph, what it was made of: nothing is left of the plan.
    """
    if members in _rows:
        return _rows[members]
    places = torch.arange(members.shape[1], device=members.device).unsqueeze(1)
    row = _count(offsets[:, 1:].unsqueeze(1) <= places)
    return row.gather(1, members.argsort(dim=1)), False


def _count(x: Tensor) -> Tensor:
    """How many entries of the last dimension are True."""
    return x.to(torch.int64).sum(-1)


def _rank(scores: Tensor) -> Tensor:
    """How many of (B, N) scores are higher than each, or equal and earlier."""
    index = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores.unsqueeze(2), scores.unsqueeze(1)
    earlier = index < index.unsqueeze(1)
    return _count((other > mine) | (earlier & (other == mine)))


def _pick(x: Tensor, which: slice | Tensor) -> Tensor:
    """Some tokens of (B, N, ...)."""
    return x[:, which] if isinstance(which, slice) else x.index_select(1, which)


def _length(x: Tensor) -> Tensor:
    """Of tokens (B, N, C): (B, N, 1)."""
    return torch.linalg.vector_norm(x, dim=2, keepdim=True)


def merge(
    x: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """As :meth:`tome_ext.MergePlan.merge`, for finite tokens.

    A token with NaN or infinity reaches every row of its image in means and sums, as 0 times it is
    NaN. "amax" looks at (B, M, N, C) values: it is for few channels, as a mask of keys has.
    """
    work = reference.accumulate_dtype(x.dtype)
    if reduce == "amax":
        _, new_size = _weights(size, members, offsets, work, "sum")
        is_in = _is_in(members, offsets)[0].unsqueeze(3)
        largest = torch.where(is_in, x.to(work).unsqueeze(1), float("-inf")).amax(2)
        return torch.where(is_in.to(work).sum(2) > 0, largest, 0.0).to(x.dtype), new_size
    weight, new_size = _weights(size, members, offsets, work, reduce)
    return (weight @ x.to(work)).to(x.dtype), new_size


def _is_in(members: Tensor, offsets: Tensor) -> tuple[Tensor, bool]:
    """Which tokens each row is made of, (B, M, N) bool, and whether no row is empty."""
    row, full = _row_of_token(members, offsets)
    rows = torch.arange(offsets.shape[1] - 1, device=row.device).unsqueeze(1)
    return row.unsqueeze(1) == rows, full


def _weights(
    size: Tensor | None, members: Tensor, offsets: Tensor, work: torch.dtype, reduce: str
) -> tuple[Tensor, Tensor]:
    """What each token counts in each row, (B, M, N), and the rows' sizes, (B, M) float32."""
    is_in, full = _is_in(members, offsets)
    weight = is_in.to(work)
    if size is not None:
        weight = torch.where(is_in, size.to(work).unsqueeze(1), 0.0)
    total = weight.sum(2, keepdim=True)
    new_size = total.squeeze(2).to(torch.float32)
    positive = full and (size is None or _is_positive(size))
    if positive:
        _positive[new_size] = _version(new_size)
    if reduce == "sum":
        return weight, new_size
    divisor = total
    if not positive:
        # A mean over sizes that sum to 0 is even. A row without members stays 0.
        even = is_in.to(work)
        weight = torch.where(total == 0, even, weight)
        divisor = torch.where(total == 0, even.sum(2, keepdim=True).clamp_min(1), total)
    # Divided first: a row of one token is then a copy.
    return weight / divisor, new_size


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
    work = reference.accumulate_dtype(x.dtype)
    x = x + (branch if scale is None else scale * branch)
    wide = x.to(work)
    shares, new_size = _weights(size, members, offsets, work, "mean")
    merged = shares @ wide
    if keep_norms:
        # Of no length where tokens cancel out, which stays so.
        merged = merged * ((shares @ _length(wide)) / _length(merged).clamp_min(SHORTEST))
    merged = merged.to(x.dtype)
    return merged, new_size, F.layer_norm(merged, merged.shape[-1:], weight, bias, eps)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, C) of x (B, N, C) by index (B, K), as one Gather over all images."""
    batch, num_rows, channels = x.shape
    first = torch.arange(batch, device=x.device).unsqueeze(1) * num_rows
    flat = (index.to(torch.int64) + first).flatten()
    return x.reshape(-1, channels).index_select(0, flat).reshape(batch, -1, channels)


def unmerge(x: Tensor, assign: Tensor) -> Tensor:
    """As :meth:`tome_ext.MergePlan.unmerge`."""
    return torch.where((assign >= 0).unsqueeze(2), _take(x, assign.clamp_min(0)), 0.0)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`tome_ext.reference.attention_forward`, with products in the dtype of q."""
    logits, seen = _logits(q, k, size, scale)
    out, lse = logits.softmax(3).to(v.dtype) @ v, logits.logsumexp(3)
    if seen is None:
        return out, lse
    return torch.where(seen, out, 0.0), torch.where(seen.squeeze(3), lse, 0.0)


def cls_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """As :func:`tome_ext.cls_attention`."""
    work = reference.accumulate_dtype(q.dtype)
    logits, seen = _logits(q[:, :, :1].to(work), k.to(work), size, scale)
    weights = logits.softmax(3)
    weights = weights if seen is None else torch.where(seen, weights, 0.0)
    return weights.mean(1).squeeze(1)


def _logits(
    q: Tensor, k: Tensor, size: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """(B, H, M, N) with log(size) added; and which images show a key, (B, 1, 1, 1) or None: all."""
    work = reference.accumulate_dtype(q.dtype)
    scale = reference.default_scale(q) if scale is None else scale
    logits = ((q * scale) @ k.mT).to(work)
    if size is None:
        return logits, None
    bias, seen = size.to(work).log(), None
    if not _is_positive(size):
        # Not -inf, of which a row that hides every key would be NaN.
        bias = torch.where(size > 0, bias, torch.finfo(work).min)
        seen = (size > 0).any(1).view(-1, 1, 1, 1)
    return logits + bias.view(-1, 1, 1, bias.shape[1]), seen


# By operator, what stands for it in ONNX. The operators of gradients have no place there.
FORMS: dict[str, Callable[..., Any]] = {
    "match": match,
    "select": select,
    "plan": plan,
    "merge": merge,
    "merge_add_norm": merge_add_norm,
    "unmerge": unmerge,
    "attention_forward": attention_forward,
    "cls_attention": cls_attention,
}
