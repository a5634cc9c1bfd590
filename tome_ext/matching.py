"""Matching functions with the names and meanings of the published ToMe code, as drop-in.

They return a ``(merge, unmerge)`` pair of callables, and sizes have the shape (B, N, 1). Each is
a thin cover over a :class:`~tome_ext.MergePlan`, which new code should use directly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import FLOATS
from .ops import describe
from .plan import MergePlan, match
from .schedule import as_integer

__all__ = [
    "Merge",
    "Unmerge",
    "bipartite_soft_matching",
    "do_nothing",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "random_bipartite_soft_matching",
]

MODES = ("mean", "sum", "prod", "amax", "amin")
OPERATOR_MODES = ("mean", "sum", "amax")  # those of tome::merge


@dataclass(frozen=True)
class Merge:
    """Merges tokens by a plan: ``merge(x, mode)``."""

    plan: MergePlan

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Merge (B, N, C) tokens into (B, M, C), in x's dtype.

        Args:
            x: (B, N, C) of any dtype, bool and integers too; a plan of one image serves any B.
                float32, float16, bfloat16 and float64 are summed in float32 (float64).
            mode: "mean" (every member counts once, whatever its size; of integers it is rounded
                down), "sum", "prod", "amax" or "amin".

        Raises:
            ValueError: shape, device or mode are not as above, or torch has no such reduction of
                x's dtype, such as the mean of bools.
        """
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        plan = _plan_for(self.plan, x, self.plan.num_tokens, "N")
        if mode in OPERATOR_MODES and x.dtype in FLOATS:
            return plan.merge(x, reduce=mode)[0]
        # The sum behind a mean of narrow integers may not fit them.
        narrow = mode == "mean" and x.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
        wide = x.to(torch.int64) if narrow else x
        rows = wide.new_zeros(x.shape[0], plan.num_output_tokens, x.shape[2])
        index = plan.assign.to(torch.int64).unsqueeze(2).expand(x.shape)
        try:
            return rows.scatter_reduce(1, index, wide, mode, include_self=False).to(x.dtype)
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError(
                f"mode: expected one that torch.scatter_reduce knows for this dtype, got "
                f"{mode!r} of {describe(x)}: {error}"
            ) from error


@dataclass(frozen=True)
class Unmerge:
    """Copies merged tokens back to the tokens that made them: ``unmerge(x)``."""

    plan: MergePlan

    def __call__(self, x: Tensor) -> Tensor:
        """Copy (B, M, C) rows of any dtype back to (B, N, C); a plan of one image serves any B.

        Raises:
            ValueError: shape or device don't fit the plan.
        """
        plan = _plan_for(self.plan, x, self.plan.num_output_tokens, "M")
        if x.dtype in FLOATS:
            return plan.unmerge(x)
        index = plan.assign.to(torch.int64).unsqueeze(2)
        return x.gather(1, index.expand(-1, -1, x.shape[2]))


# What the functions below take and return: a pair of the above, or of those of other code.
Merging = Callable[..., Tensor]


def do_nothing(x: Tensor, mode: str | None = None) -> Tensor:
    """Return ``x``: what both callables of a pair are if nothing merges."""
    return x


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merging, Merging]:
    """Merge the r most similar pairs between even and odd tokens (arXiv 2210.09461, section 3).

    Args:
        metric: (B, N, D) or (B, H, N, D), as for :func:`tome_ext.match`.
        r: tokens to remove, cut to half of the tokens that may merge; r <= 0 keeps all. An integer
            of any kind, but no bool.
        class_token: the first token never merges.
        distill_token: nor does the second, a distillation token behind the class token.

    Returns:
        ``merge`` and ``unmerge``, a :class:`Merge` and an :class:`Unmerge` between N and M = N - r
        tokens, or :func:`tome_ext.matching.do_nothing` twice if no token is removed. Without a
        class token the rows are in the order of :func:`tome_ext.match` too, ascending within each
        set.

    Raises:
        ValueError: wrong rank or dtype, r not an integer; or a distillation token without a class
            token.
    """
    if distill_token and not class_token:
        raise ValueError(
            "distill_token: expected class_token=True with it, since the distillation token is "
            "the one behind the class token; got class_token=False"
        )
    r = _check(metric, "r", r)
    prefix = int(bool(class_token)) + int(bool(distill_token))
    r = min(r, (metric.shape[-2] - prefix) // 2)
    if r <= 0:
        return do_nothing, do_nothing
    return _pair(match(metric, r, prefix))


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merging, Merging]:
    """Keep every k-th token and merge all others into the kept one they are most similar to.

    The kept tokens are those at positions k - 1, 2k - 1, ..., in this order: N // k of them. A
    tail of N % k tokens merges like the rest. (The published code cuts it off, so that it comes
    back missing from ``unmerge``.)

    Args:
        metric: (B, N, D) or (B, H, N, D), as for :func:`tome_ext.match`.
        k: keep one token in k; k <= 1, or more than there are tokens, changes nothing. An integer
            of any kind, but no bool.

    Returns:
        As :func:`bipartite_soft_matching`.

    Raises:
        ValueError: wrong rank or dtype, or k not an integer.
    """
    k = _check(metric, "k", k)
    num_tokens = metric.shape[-2]
    if k <= 1 or num_tokens < k:
        return do_nothing, do_nothing
    targets = torch.arange(k - 1, num_tokens, k, dtype=torch.int32, device=metric.device)
    return _pair(match(metric.detach(), num_tokens, targets=targets))


def random_bipartite_soft_matching(
    metric: Tensor, r: int, generator: torch.Generator | None = None
) -> tuple[Merging, Merging]:
    """Merge r random tokens, each into the most similar of the tokens that were not drawn.

    A baseline to compare with: the paper's ablation finds it worse than alternating sets.

    Args:
        metric: (B, N, D) or (B, H, N, D), as for :func:`tome_ext.match`.
        r: tokens to remove, cut to N - 1; r <= 0 keeps all. An integer of any kind, but no bool.
        generator: the source of randomness, on metric's device; None means torch's default.

    Returns:
        As :func:`bipartite_soft_matching`, the rows in the order of the tokens that were not drawn.

    Raises:
        ValueError: wrong rank or dtype, or r not an integer.
    """
    r = _check(metric, "r", r)
    batch, num_tokens = metric.shape[0], metric.shape[-2]
    r = min(r, num_tokens - 1)
    if r <= 0:
        return do_nothing, do_nothing
    drawn = torch.rand(batch, num_tokens, device=metric.device, generator=generator).argsort(1)
    # Every image has targets of its own: with the drawn tokens first, they are where those of all
    # others are.
    order = torch.cat((drawn[:, :r].sort(1)[0], drawn[:, r:].sort(1)[0]), 1)
    index = order[..., None] if metric.dim() == 3 else order[:, None, :, None]
    sorted_metric = metric.detach().gather(-2, index.expand(metric.shape))
    targets = torch.arange(r, num_tokens, dtype=torch.int32, device=metric.device)
    plan = match(sorted_metric, r, targets=targets)
    assign = torch.empty_like(plan.assign).scatter_(1, order, plan.assign)
    return _pair(MergePlan.from_assign(assign, num_tokens - r))


def merge_wavg(merge: Merging, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge by the average weighted with token sizes.

    Args:
        merge: as the matching functions of this module return it, or any ``merge(x, mode)`` that
            knows the mode "sum".
        x: (B, N, C).
        size: (B, N, 1), or (1, N, 1) for all images, how many original tokens each token stands
            for; None means 1.

    Returns:
        The merged tokens (B, M, C), in x's dtype if that is floating point, and their sizes
        (B, M, 1), in the dtype of ``size``, or in x's if there is none, so that code that adds
        their logarithm to attention stays in its dtype. float16 holds sizes up to 2048 exactly,
        bfloat16 up to 256; :meth:`MergePlan.merge` keeps them in float32.

    Raises:
        ValueError: shape or device of x or size are not as above.
    """
    if size is not None and (size.dim() != 3 or size.shape[2] != 1):
        raise ValueError(f"size: expected (B, N, 1), got {describe(size)}")
    if merge is do_nothing:
        return x, torch.ones_like(x[..., :1]) if size is None else size
    if isinstance(merge, Merge) and x.dtype in FLOATS:
        plan = _plan_for(merge.plan, x, merge.plan.num_tokens, "N")
        dtype = x.dtype if size is None else size.dtype
        if size is not None:
            size = _size_of(size, x)
        merged, total = plan.merge(x, size)
        return merged, total.to(dtype).unsqueeze(2)
    size = torch.ones_like(x[..., :1]) if size is None else size
    total = merge(size, mode="sum")
    return merge(x * size, mode="sum") / total, total


def merge_source(merge: Merging, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Keep track of which original tokens make each row.

    Args:
        merge: as the matching functions of this module return it, or any ``merge(x, mode)`` that
            knows the mode "amax".
        x: (B, N, C), the tokens that are merged; only their number and device are used.
        source: (B, N, N0), 1 where an original token is part of a token; None if x holds the
            original tokens themselves.

    Returns:
        (B, M, N0), 1 where an original token is part of a row, in the dtype of ``source``, or
        float32 if there is none.

    Raises:
        ValueError: x or source don't fit the plan.
    """
    if isinstance(merge, Merge):
        plan = _plan_for(merge.plan, x, merge.plan.num_tokens, "N")
        if source is None:
            rows = torch.arange(plan.num_output_tokens, device=x.device)
            return (plan.assign.unsqueeze(1) == rows.unsqueeze(1)).float()
    elif source is None:
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def _pair(plan: MergePlan) -> tuple[Merge, Unmerge]:
    return Merge(plan), Unmerge(plan)


def _plan_for(plan: MergePlan, x: Tensor, num_tokens: int, letter: str) -> MergePlan:
    """The plan for a batch x (B, num_tokens, C), which may be the plan of one image."""
    batch = plan.assign.shape[0]
    if x.dim() != 3 or x.shape[1] != num_tokens or batch not in (1, x.shape[0]):
        given = f"B = {batch} and {letter}" if batch != 1 else letter
        raise ValueError(
            f"x: expected (B, {letter}, C) with {given} = {num_tokens} as in the plan, "
            f"got {describe(x)}"
        )
    if x.device != plan.assign.device:
        raise ValueError(f"x: expected {plan.assign.device}, as the plan, got {describe(x)}")
    if x.shape[0] == batch:
        return plan
    return MergePlan(*(table.expand(x.shape[0], -1).contiguous() for table in plan))


def _size_of(size: Tensor, x: Tensor) -> Tensor:
    """Sizes (B, N, 1) or (1, N, 1) of x (B, N, C) as (B, N) float32."""
    batch, num_tokens = x.shape[:2]
    if size.shape[0] not in (1, batch) or size.shape[1] != num_tokens or size.device != x.device:
        raise ValueError(
            f"size: expected (B, N, 1) = {(batch, num_tokens, 1)} on {x.device}, got "
            f"{describe(size)}"
        )
    return size.squeeze(2).expand(batch, -1).float().contiguous()


def _check(metric: Tensor, name: str, value: Any) -> int:
    if metric.dim() not in (3, 4) or not metric.is_floating_point():
        raise ValueError(
            f"metric: expected (B, N, D) or (B, H, N, D) floating point, got {describe(metric)}"
        )
    return as_integer(value, name)
