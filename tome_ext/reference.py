"""The operators in plain PyTorch: what the kernels must compute, for any device.

Each operator's function takes, refuses and returns what ``torch.ops.tome.<name>`` does. The tests
hold the kernels against these, and devices without kernels of their own (MPS, XPU, ...) run them.
They are written to be read: nothing here is tuned, ``match`` writes the whole score matrix and
``attention`` the whole attention matrix.

Under :func:`shapes_only` an operator's function ends where its arguments are checked and the shapes
of its outputs known: torch's fake kernels are these functions too.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checks import accumulate_dtype

__all__ = [
    "REDUCTIONS",
    "attention",
    "attention_backward",
    "attention_forward",
    "attention_gradients",
    "cls_attention",
    "cut_keep",
    "cut_r",
    "log_size",
    "match",
    "match_sets",
    "may_merge",
    "merge",
    "merge_add_norm",
    "merge_backward",
    "plan",
    "select",
    "shapes_only",
    "unit_rows",
    "unmerge",
    "without_hidden",
]

REDUCTIONS = ("mean", "sum", "amax")


class _Mode(threading.local):
    shapes_only = False


_mode = _Mode()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Operators check their arguments and return uninitialised outputs."""
    before, _mode.shapes_only = _mode.shapes_only, True
    try:
        yield
    finally:
        _mode.shapes_only = before


def _new_plan(like: Tensor, num_tokens: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    assign = like.new_empty((like.shape[0], num_tokens), dtype=torch.int32)
    return assign, torch.empty_like(assign), assign.new_empty((like.shape[0], rows + 1))


def _new_heads_inside(like: Tensor) -> Tensor:
    """(B, H, N, D) laid out as (B, N, H, D), which the next projection reads without a copy."""
    batch, heads, tokens, dim = like.shape
    return like.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


def cut_r(num_tokens: int, r: int, num_prefix_tokens: int, targets: Tensor | None = None) -> Any:
    """How many tokens a match removes: ``min(r, (num_tokens - prefix) // 2)``, at least 0.

    With targets, up to all others, if there is a target.
    """
    # torch.sym_max/min rather than max/min: the token count may be a SymInt under torch.compile.
    free = torch.sym_max(num_tokens - num_prefix_tokens, 0)
    if targets is not None:
        others = free - targets.shape[0] if targets.shape[0] > 0 else 0
        return torch.sym_max(torch.sym_min(r, others), 0)
    return torch.sym_max(torch.sym_min(r, free // 2), 0)


def may_merge(
    num_tokens: int,
    r: int,
    num_prefix_tokens: int,
    targets: Tensor | None = None,
    threshold: float | None = None,
) -> Any:
    """Whether any image may have a plan that is not the identity."""
    r = r if threshold is None or threshold == math.inf else num_tokens
    return cut_r(num_tokens, r, num_prefix_tokens, targets) > 0


def cut_keep(num_tokens: int, keep: int, num_prefix_tokens: int) -> Any:
    """How many tokens a selection keeps, prefix included: all if there are no others."""
    prefix = torch.sym_min(num_prefix_tokens, num_tokens)
    return prefix + torch.sym_min(torch.sym_max(keep, 0), num_tokens - prefix)


def unit_rows(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise the rows of a metric.

    Args:
        metric: (B, N, D), or (B, H, N, D) to be averaged over heads.

    Returns:
        The rows at length 1, (B, N, D) in the accumulate dtype, a zero row staying zero; and
        (B, N) bool, False where a row holds NaN or infinity (such a row is returned as zeros).
    """
    metric = metric.to(accumulate_dtype(metric.dtype))
    if metric.dim() == 4:
        metric = metric.mean(1)
    finite = metric.isfinite().all(-1)
    metric = torch.where(finite.unsqueeze(-1), metric, 0.0)
    if metric.shape[-1] == 0:
        return metric, finite
    # By the largest entry first, so that neither the squares overflow nor tiny rows vanish.
    metric = metric / metric.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
    norm = metric.norm(dim=-1, keepdim=True)
    return torch.where(norm > 0, metric / norm, 0.0), finite


def merge_cost(
    similarity: Tensor, size_a: Tensor, size_b: Tensor, importance: Tensor | None
) -> Tensor:
    """What merging pairs costs by Ward's criterion; see :func:`tome_ext.match`.

    Args:
        similarity: (B, Na), of each token of set A to that of set B it is most similar to.
        size_a: (B, Na), its size.
        size_b: (B, Na), the other's.
        importance: (B, Na), its own, or None.

    Returns:
        (B, Na), finite and not negative whatever comes.
    """
    size_a, size_b = (size.to(similarity.dtype) for size in (size_a, size_b))
    least = size_a / (size_a + size_b) * size_b
    if importance is not None:
        least = least * importance.to(similarity.dtype)
    cost = (1.0 - similarity) * least
    return torch.where(cost > 0, cost, 0.0).clamp_max(torch.finfo(torch.float32).max)


def match_sets(
    metric: Tensor,
    a: Tensor,
    b: Tensor,
    r: int | Tensor,
    visible: Tensor | None = None,
    size: Tensor | None = None,
    importance: Tensor | None = None,
    threshold: float | None = None,
    most: Tensor | None = None,
) -> Tensor:
    """Match the tokens of set A to set B and return which B token each A token joins.

    Args:
        metric: (B, N, D) or (B, H, N, D).
        a: (B, Na) int64, the tokens that may be merged away.
        b: (B, Nb) int64, the tokens they may be merged into.
        r: how many of A are merged, 0 <= r <= Na; or (B, 1), how many of each image.
        visible: (B, N) bool, the tokens that take part, r of set A or more; None means all.
        size: (B, N), for ranking by cost; None means 1 each.
        importance: (B, N), as size; None for both means ranking by similarity.
        threshold: merge further pairs at least so similar; see :func:`tome_ext.match`.
        most: (B, 1), how many of each image may merge by it.

    Returns:
        (B, N) int64: for every token the token it joins, itself if it stays.
    """
    rows, finite = unit_rows(metric)
    batch, num_tokens = finite.shape
    own = torch.arange(num_tokens, device=metric.device).expand(batch, -1)
    if a.shape[1] == 0 or b.shape[1] == 0:
        return own.clone()
    visible = torch.ones_like(finite) if visible is None else visible
    usable = finite & visible
    at, bt = (x.unsqueeze(-1).expand(-1, -1, rows.shape[-1]) for x in (a, b))
    scores = rows.gather(1, at) @ rows.gather(1, bt).transpose(1, 2)
    pairs = usable.gather(1, a).unsqueeze(2) & usable.gather(1, b).unsqueeze(1)
    scores = torch.where(pairs, scores, float("-inf"))
    best = scores.amax(2)
    # The lowest index among equals: argmax and a stable sort do not promise it on every device.
    # Where nothing may be chosen, that is the first one that is visible.
    highest = (scores == best.unsqueeze(2)) & visible.gather(1, b).unsqueeze(1)
    nearest = highest.to(torch.int8).argmax(2)
    if size is not None or importance is not None:
        sizes = metric.new_ones(batch, num_tokens) if size is None else size
        cost = merge_cost(
            best,
            sizes.gather(1, a),
            sizes.gather(1, b.gather(1, nearest)),
            None if importance is None else importance.gather(1, a),
        )
        best = torch.where(best.isfinite(), -cost, best)
        threshold = None if threshold is None else (threshold - 1) / 2
    if threshold is not None:
        assert most is not None
        near = (best >= best.new_tensor(threshold)) & best.isfinite()
        r = torch.minimum(near.sum(1, keepdim=True), most).clamp_min(r)
    order = best.sort(dim=1, descending=True, stable=True)[1]
    hidden = ~visible.gather(1, a)
    order = order.gather(1, hidden.gather(1, order).sort(dim=1, stable=True)[1])
    merges = order.argsort(dim=1) < r
    return own.scatter(1, a, torch.where(merges, b.gather(1, nearest), a))


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
    """Bipartite soft matching (ToMe, section 3). See :func:`tome_ext.match` for the contract."""
    shown = _checks.describe(metric)
    ranks = metric.dim() in (3, 4)
    _checks.expect(ranks, "metric", "(B, N, D) or (B, H, N, D)", shown)
    _checks.floating(metric, "metric")
    has_heads = [metric.dim() == 3 or metric.shape[1] > 0]
    _checks.expect(has_heads, "metric", "at least one head", shown)
    _checks.prefix(num_prefix_tokens)
    batch, num_tokens, device = metric.shape[0], metric.shape[-2], metric.device
    for name, table in (("weight", weight), ("size", size), ("importance", importance)):
        if table is not None:
            _checks.table(table, name, batch, num_tokens, "N", torch.float32)
            _checks.one_device(metric, "metric", table, name)
    if targets is not None:
        fits = targets.dim() == 1 and targets.dtype == torch.int32
        _checks.expect(fits, "targets", "(T,) int32", _checks.describe(targets))
        others = torch.sym_max(num_tokens - num_prefix_tokens, 0) - targets.shape[0]
        most = "at most as many as tokens behind the prefix"
        _checks.expect([others >= 0], "targets", most, _checks.describe(targets))
        _checks.one_device(metric, "metric", targets, "targets")
    if threshold is not None:
        _checks.expect(threshold == threshold, "threshold", "a number", threshold)
    merges = may_merge(num_tokens, r, num_prefix_tokens, targets, threshold)
    r = cut_r(num_tokens, r, num_prefix_tokens, targets)
    if _mode.shapes_only:
        return _new_plan(metric, num_tokens, num_tokens - r)
    index = torch.arange(num_tokens, device=device)
    if not merges:
        return (index.to(torch.int32).repeat(batch, 1), *_group(index.repeat(batch, 1), num_tokens))
    is_prefix = index < num_prefix_tokens
    is_b = index % 2 == 1 if targets is None else torch.isin(index, targets)
    a, b = (index[(is_b == side) & ~is_prefix].expand(batch, -1) for side in (False, True))
    visible = torch.ones(batch, num_tokens, dtype=torch.bool, device=device)
    if weight is not None:
        visible = (weight != 0) | is_prefix
    in_a, in_b = (visible.gather(1, of).sum(1, keepdim=True) for of in (a, b))
    limit = torch.minimum(in_a, in_b) if targets is None else torch.where(in_b > 0, in_a, 0)
    merged = limit.clamp_max(r)
    if targets is not None:
        # All targets hidden: what does not fit the rows merges into the first one, which stands.
        excess = (r + in_a + in_b - a.shape[1] - b.shape[1] + 1).clamp_min(1)
        stands = (in_b == 0) & (excess > 1)
        merged = torch.where(in_b > 0, merged, torch.where(stands, excess, 0))
    joins = match_sets(metric, a, b, merged, visible, size, importance, threshold, limit)
    if targets is not None:
        visible = visible | (stands & (index == b[:, :1]))
    # Order of the output rows: prefix, the A tokens that stay, then the B tokens.
    stays = (joins == index) & visible
    group = torch.where(is_prefix, 0, 1 + is_b.to(torch.int64))
    place = torch.where(stays, group * num_tokens + index, 3 * num_tokens)
    rank = place.argsort(dim=1).argsort(dim=1)  # a staying token's output row
    assign = torch.where(visible, rank.gather(1, joins), -1)
    return (assign.to(torch.int32), *_group(assign, num_tokens - r))


def select(
    scores: Tensor, keep: int, num_prefix_tokens: int = 0, fuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the highest scores. See :func:`tome_ext.select` for the contract."""
    fits = scores.dim() == 2 and scores.dtype in (torch.float32, torch.float64)
    _checks.expect(fits, "scores", "(B, N) float32 or float64", _checks.describe(scores))
    _checks.expect(keep >= 0, "keep", "a number >= 0", keep)
    _checks.prefix(num_prefix_tokens)
    batch, num_tokens = scores.shape
    kept = cut_keep(num_tokens, keep, num_prefix_tokens)
    if _mode.shapes_only:
        return _new_plan(scores, num_tokens, kept + int(fuse and kept < num_tokens))
    prefix = min(num_prefix_tokens, num_tokens)
    patches = scores[:, prefix:]
    ranked = torch.where(patches.isnan(), float("-inf"), patches)
    order = ranked.sort(dim=1, descending=True, stable=True)[1]
    # Stable again: NaN goes behind -infinity, and nothing else moves.
    order = order.gather(1, patches.gather(1, order).isnan().sort(dim=1, stable=True)[1])
    stays = torch.ones(batch, num_tokens, dtype=torch.bool, device=scores.device)
    stays = stays.scatter(1, prefix + order[:, kept - prefix :], False)
    fuses = fuse and kept < num_tokens
    assign = torch.where(stays, stays.cumsum(1) - 1, kept if fuses else -1)
    return (assign.to(torch.int32), *_group(assign, kept + int(fuses)))


def plan(assign: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Group tokens by output row.

    Args:
        assign: (B, N) int32, the output row of every token, -1 for a dropped one.
        num_rows: M, the number of output rows.

    Returns:
        members (B, N) int32, the tokens grouped by output row, ascending within a row, dropped
        ones last; offsets (B, M + 1) int32, where each row's members begin.
    """
    _checks.plan_tensor(assign, "assign")
    in_range = 0 <= num_rows < _checks.INT32_MAX
    _checks.expect(in_range, "num_rows", "a number >= 0 and < 2^31 - 1", num_rows)
    if _mode.shapes_only:
        return _new_plan(assign, assign.shape[1], num_rows)[1:]
    return _group(assign, num_rows)


def _group(assign: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    assign = assign.to(torch.int64)
    dropped_last = torch.where(assign < 0, num_rows, assign)
    members = dropped_last.sort(dim=1, stable=True)[1]
    bounds = torch.arange(num_rows + 1, device=assign.device).expand(assign.shape[0], -1)
    offsets = torch.searchsorted(dropped_last.sort(dim=1)[0], bounds.contiguous())
    return members.to(torch.int32), offsets.to(torch.int32)


def row_of_token(members: Tensor, offsets: Tensor) -> Tensor:
    """The inverse of :func:`plan`: (B, N) int64, the output row of every token, -1 if dropped."""
    slots = torch.arange(members.shape[1], device=members.device).expand(members.shape)
    row = torch.searchsorted(offsets[:, 1:].contiguous(), slots.to(torch.int32), right=True)
    row = torch.where(row < offsets.shape[1] - 1, row, -1)
    return torch.empty_like(row).scatter_(1, members.to(torch.int64), row)


def _scatter(values: Tensor, row: Tensor, num_rows: int, reduce: str) -> Tensor:
    """Reduce (B, N, C) values into (B, M, C) rows; tokens with row -1 go nowhere."""
    batch, _, channels = values.shape
    out = values.new_zeros(batch, num_rows + 1, channels)
    index = torch.where(row < 0, num_rows, row).unsqueeze(-1).expand(values.shape)
    return out.scatter_reduce(1, index, values, reduce, include_self=False)[:, :num_rows]


def _weights(
    size: Tensor | None, members: Tensor, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sizes before (B, N) and after (B, M) a merge, in the dtype sums are taken in."""
    size = torch.ones(members.shape, device=members.device) if size is None else size
    size = size.to(dtype)
    row = row_of_token(members, offsets)
    return size, _scatter(size.unsqueeze(-1), row, offsets.shape[1] - 1, "sum").squeeze(-1)


def _divisor(size: Tensor, total: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, N) and their sums per row (B, M) of a mean: even where the sizes sum to 0."""
    weight = torch.where(total.gather(1, row.clamp_min(0)) == 0, 1.0, size)
    divisor = _scatter(weight.unsqueeze(-1), row, total.shape[1], "sum").squeeze(-1)
    return weight, torch.where(divisor == 0, 1.0, divisor)  # a row without members is 0 / 1


def _sum_dtype(x: Tensor) -> torch.dtype:
    """What tokens x (B, N, C) are summed in: float64 where float32 would stop counting ones."""
    return torch.float64 if x.shape[1] > 2**24 else accumulate_dtype(x.dtype)


def _check_reduce(reduce: str) -> None:
    _checks.expect(reduce in REDUCTIONS, "reduce", "'mean', 'sum' or 'amax'", f"'{reduce}'")


def merge(
    x: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Merge (B, N, C) tokens into (B, M, C). See :meth:`tome_ext.MergePlan.merge`."""
    _checks.merging(x, "x", False, size, members, offsets)
    _check_reduce(reduce)
    if _mode.shapes_only:
        merged = x.new_empty((x.shape[0], offsets.shape[1] - 1, x.shape[2]))
        return merged, x.new_empty(merged.shape[:2], dtype=torch.float32)
    if offsets.shape[1] == 1:
        return x.new_zeros(x.shape[0], 0, x.shape[2]), offsets.new_zeros(
            x.shape[0], 0, dtype=torch.float32
        )
    dtype = _sum_dtype(x)
    row = row_of_token(members, offsets)
    size, total = _weights(size, members, offsets, dtype)
    new_size, num_rows = total.to(torch.float32), total.shape[1]
    if reduce == "amax":
        return _scatter(x, row, num_rows, "amax"), new_size
    weight, divisor = _divisor(size, total, row) if reduce == "mean" else (size, None)
    merged = _scatter(x.to(dtype) * weight.unsqueeze(-1), row, num_rows, "sum")
    if divisor is None:
        return merged.to(x.dtype), new_size
    # Divided last, as the kernels do; a row of one token is a copy.
    merged = (merged / divisor.unsqueeze(-1)).to(x.dtype)
    single = (offsets.diff(dim=1) == 1).unsqueeze(-1)
    return torch.where(single, _scatter(x, row, num_rows, "sum"), merged), new_size


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
    """Residual sum, merge, norm. See :meth:`tome_ext.MergePlan.merge_add_norm`."""
    _checks.merging(x, "x", False, size, members, offsets)
    _checks.same_as(branch, "branch", x, "x")
    for name, vector in (("scale", scale), ("weight", weight), ("bias", bias)):
        _checks.channels(vector, name, x)
    _checks.expect(eps >= 0, "eps", "a number >= 0", f"{eps:g}")
    if _mode.shapes_only:
        merged, new_size = merge(x, size, members, offsets)
        return merged, new_size, torch.empty_like(merged)
    dtype = accumulate_dtype(x.dtype)
    added = branch.to(dtype) if scale is None else branch.to(dtype) * scale.to(dtype)
    sums = x.to(dtype) + added
    merged, new_size = merge(sums, size, members, offsets)
    if keep_norms:
        lengths = torch.linalg.vector_norm(sums, dim=-1, keepdim=True)
        length, _ = merge(lengths, size, members, offsets)
        merged = merged * stretch(merged, length, offsets)[0]
    merged = merged.to(x.dtype)
    rows = merged.to(dtype)  # the norm is of the tokens as they are stored
    rows = rows - rows.mean(-1, keepdim=True)
    normed = rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = normed if weight is None else normed * weight.to(dtype)
    normed = normed if bias is None else normed + bias.to(dtype)
    return merged, new_size, normed.to(x.dtype)


def stretch(merged: Tensor, length: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """By what merged rows (B, M, C) are multiplied to have a length (B, M, 1), and where that is.

    Returns:
        The factor (B, M, 1), which is 1 for rows of one token or none, and where it is not finite,
        as of tokens that cancel out; and (B, M, 1) bool, false there.
    """
    own = torch.linalg.vector_norm(merged, dim=-1, keepdim=True)
    stretched = (offsets.diff(dim=1) > 1).unsqueeze(-1) & (own > 0)
    factor = length / torch.where(own > 0, own, 1.0)
    stretched = stretched & factor.isfinite()
    return torch.where(stretched, factor, 1.0), stretched


def merge_backward(
    grad: Tensor,
    size: Tensor | None,
    members: Tensor,
    offsets: Tensor,
    reduce: str = "mean",
) -> Tensor:
    """The adjoint of ``merge`` in x for "mean" and "sum": (B, M, C) gradients to (B, N, C)."""
    _checks.merging(grad, "grad", True, size, members, offsets)
    _check_reduce(reduce)
    _checks.expect(reduce != "amax", "reduce", "'mean' or 'sum' in merge_backward", "'amax'")
    if _mode.shapes_only:
        return grad.new_empty((grad.shape[0], members.shape[1], grad.shape[2]))
    row = row_of_token(members, offsets)
    if offsets.shape[1] == 1:
        return grad.new_zeros(grad.shape[0], members.shape[1], grad.shape[2])
    dtype = accumulate_dtype(grad.dtype)
    weight, total = _weights(size, members, offsets, dtype)
    if reduce == "mean":
        weight, divisor = _divisor(weight, total, row)
        weight = weight / divisor.gather(1, row.clamp_min(0))
    spread = _spread(grad.to(dtype), row)
    return (spread * weight.unsqueeze(-1)).to(grad.dtype)


def unmerge(x: Tensor, assign: Tensor) -> Tensor:
    """Copy (B, M, C) rows back to the (B, N, C) tokens that made them; dropped tokens get 0."""
    _checks.expect(x.dim() == 3, "x", "(B, M, C)", _checks.describe(x))
    _checks.floating(x, "x")
    _checks.plan_tensor(assign, "assign")
    _checks.planned(x, "x", assign.shape[0], "M", None)
    _checks.one_device(x, "x", assign, "assign")
    if _mode.shapes_only:
        return x.new_empty((x.shape[0], assign.shape[1], x.shape[2]))
    return _spread(x, assign)


def _spread(x: Tensor, assign: Tensor) -> Tensor:
    if x.shape[1] == 0:
        return x.new_zeros(x.shape[0], assign.shape[1], x.shape[2])
    index = assign.to(torch.int64)
    out = x.gather(1, index.clamp_min(0).unsqueeze(-1).expand(-1, -1, x.shape[2]))
    return torch.where((index >= 0).unsqueeze(-1), out, 0.0)


def default_scale(q: Tensor) -> float:
    """``D ** -0.5``; 1 for heads without channels, whose logits are 0 at any scale."""
    return max(q.shape[-1], 1) ** -0.5


def without_hidden(x: Tensor, size: Tensor | None) -> Tensor:
    """Keys or values (B, H, N, D) with zeros where a size (B, N) is 0.

    The weight of such a key is 0, but 0 times NaN or infinity would be NaN in every output.
    """
    return x if size is None else torch.where((size == 0)[:, None, :, None], 0.0, x)


def log_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The logarithms (B, N) of sizes; -inf for 0, which has no gradient instead of a NaN."""
    hidden = size == 0
    return torch.where(hidden, float("-inf"), torch.where(hidden, 1.0, size).to(dtype).log())


def _logits(q: Tensor, k: Tensor, size: Tensor | None, scale: float) -> Tensor:
    """``scale * q k^T + log(size)`` (B, H, M, N) in the accumulate dtype; -inf hides a key."""
    work = accumulate_dtype(q.dtype)
    logits = (q.to(work) @ without_hidden(k, size).to(work).transpose(2, 3)) * scale
    return logits if size is None else logits + log_size(size, work)[:, None, None, :]


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of weights, and the logarithms of their sums; both 0 where all keys are hidden.

    Safe to differentiate in such rows too, which ``logsumexp`` is not.
    """
    if logits.shape[-1] == 0:
        return logits, logits.new_zeros(logits.shape[:-1])
    peak = logits.detach().amax(-1, keepdim=True)
    peak = torch.where(peak == float("-inf"), 0.0, peak)
    weights = (logits - peak).exp()
    total = weights.sum(-1, keepdim=True)
    total = torch.where(total == 0, 1.0, total)
    return weights / total, (peak + total.log()).squeeze(-1)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> None:
    _checks.heads(q, k)
    _checks.same_as(v, "v", k, "k")
    _checks.key_sizes(k, size)


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Proportional attention (B, H, M, D). See :func:`tome_ext.proportional_attention`."""
    return attention_forward(q, k, v, size, scale)[0]


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + log(size)) v``, a row at a time.

    Args:
        q: (B, H, M, D).
        k: (B, H, N, D).
        v: (B, H, N, D).
        size: (B, N) float32 >= 0, or None for ones; 0 hides a key.
        scale: None means ``D ** -0.5``.

    Returns:
        out (B, H, M, D) in q's dtype, a view of a contiguous (B, M, H, D); lse (B, H, M) in the
        accumulate dtype, the natural logarithm of each row's sum of exponentials. Both are 0 in
        rows whose keys are all hidden.
    """
    _check_attention(q, k, v, size)
    if _mode.shapes_only:
        return _new_heads_inside(q), q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))
    scale = default_scale(q) if scale is None else scale
    weights, lse = _softmax(_logits(q, k, size, scale))
    out = weights @ without_hidden(v, size).to(weights.dtype)
    return _new_heads_inside(q).copy_(out), lse.contiguous()


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in q, k and v from the gradient (B, H, M, D) in ``attention_forward``'s out.

    Each is laid out as ``attention_forward``'s out.
    """
    _check_attention(q, k, v, size)
    _checks.same_as(grad, "grad", q, "q")
    _checks.same_as(out, "out", q, "q")
    _checks.row_sums(lse, q)
    new_grads = (_new_heads_inside(q), _new_heads_inside(k), _new_heads_inside(v))
    if _mode.shapes_only:
        return new_grads
    scale = default_scale(q) if scale is None else scale
    weights = (_logits(q, k, size, scale) - lse.unsqueeze(-1)).exp()
    # The derivative of softmax: sum(weights * grad_weights) of a row is its sum(grad * out).
    row = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(-1, keepdim=True)
    grads = _gradients(grad, q, k, v, size, scale, weights, row)
    for new, values in zip(new_grads, grads, strict=False):
        new.copy_(values)
    return new_grads


def attention_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``attention_backward``, and that in the logits (B, H, M, N).

    For those that need the matrix, or further derivatives: all is made of torch's operators.
    """
    scale = default_scale(q) if scale is None else scale
    weights, _ = _softmax(_logits(q, k, size, scale))
    values = without_hidden(v, size).to(weights.dtype)
    row = (grad.to(weights.dtype) * (weights @ values)).sum(-1, keepdim=True)
    *grads, grad_logits = _gradients(grad, q, k, v, size, scale, weights, row)
    grad_q, grad_k, grad_v = (new.to(q.dtype) for new in grads)
    return grad_q, grad_k, grad_v, grad_logits


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    scale: float,
    weights: Tensor,
    row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v and the logits, from the weights and each row's sum of weights * grad_weights."""
    work = weights.dtype
    k, v = without_hidden(k, size), without_hidden(v, size)
    grad, q, k, v = (x.to(work) for x in (grad, q, k, v))
    grad_logits = weights * (grad @ v.transpose(2, 3) - row)
    return (
        (grad_logits @ k) * scale,
        (grad_logits.transpose(2, 3) @ q) * scale,
        weights.transpose(2, 3) @ grad,
        grad_logits,
    )


def cls_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of the first query token (B, N). See :func:`tome_ext.cls_attention`."""
    _checks.heads(q, k)
    some = [q.shape[1] > 0, q.shape[2] > 0]
    _checks.expect(some, "q", "at least one head and one token", _checks.describe(q))
    _checks.key_sizes(k, size)
    if _mode.shapes_only:
        return k.new_empty((k.shape[0], k.shape[2]), dtype=accumulate_dtype(k.dtype))
    scale = default_scale(q) if scale is None else scale
    return cls_weights(q, k, size, scale).mean(1)


def masked_cls_attention(
    q: Tensor, k: Tensor, size: Tensor | None, scale: float | None, attn_mask: Tensor
) -> Tensor:
    """:func:`cls_attention` with a mask, bool or added to the logits, for (B, H, 1, N)."""
    scale = default_scale(q) if scale is None else scale
    return cls_weights(q, k, size, scale, attn_mask).mean(1)


def cls_weights(
    q: Tensor, k: Tensor, size: Tensor | None, scale: float, attn_mask: Tensor | None = None
) -> Tensor:
    """The rows (B, H, N) that ``cls_attention`` averages over heads."""
    logits = _logits(q[:, :, :1], k, size, scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = torch.where(attn_mask, logits, float("-inf"))
    elif attn_mask is not None:
        logits = logits + attn_mask
    return _softmax(logits)[0].squeeze(2)
