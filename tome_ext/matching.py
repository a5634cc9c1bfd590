"""Matching functions with the names and meanings of the published ToMe code, as drop-in.

They return a ``(merge, unmerge)`` pair of callables, and sizes have the shape (B, N, 1). Each is
a thin cover over a :class:`~tome_ext.MergePlan`, which new code should use directly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import describe
from .plan import MergePlan, match

__all__ = [
    "Merge",
    "Unmerge",
    "bipartite_soft_matching",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "random_bipartite_soft_matching",
]


@dataclass(frozen=True)
class Merge:
    """Merges tokens by a plan: ``merge(x, mode)``."""

    plan: MergePlan

    def __call__(self, x: Tensor, mode: str = "mean") -> Tensor:
        """Merge (B, N, C) tokens into (B, M, C), in x's dtype.

        Args:
            x: (B, N, C) float32, float16, bfloat16 or float64.
            mode: "mean" (every member counts once, whatever its size), "sum" or "amax".

        Raises:
            ValueError: shape, dtype, device or mode are not as above.
        """
        return self.plan.merge(x, reduce=mode)[0]


@dataclass(frozen=True)
class Unmerge:
    """Copies merged tokens back to the tokens that made them: ``unmerge(x)``."""

    plan: MergePlan

    def __call__(self, x: Tensor) -> Tensor:
        """Copy (B, M, C) rows back to (B, N, C).

        Raises:
            ValueError: shape, dtype or device don't fit the plan.
        """
        return self.plan.unmerge(x)


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merge, Unmerge]:
    """Merge the r most similar pairs between even and odd tokens (arXiv 2210.09461, section 3).

    Args:
        metric: (B, N, D) or (B, H, N, D), as for :func:`tome_ext.match`.
        r: tokens to remove, cut to half of the tokens that may merge; r <= 0 keeps all.
        class_token: the first token never merges.
        distill_token: nor does the second, a distillation token behind the class token.

    Returns:
        ``merge`` and ``unmerge``, between N and M = N - r tokens. Without a class token the rows
        are in the order of :func:`tome_ext.match` too: ascending within each set.

    Raises:
        ValueError: as :func:`tome_ext.match`; or a distillation token without a class token.
    """
    if distill_token and not class_token:
        raise ValueError(
            "distill_token: expected class_token=True with it, since the distillation token is "
            "the one behind the class token; got class_token=False"
        )
    return _pair(match(metric, r, int(class_token) + int(distill_token)))


def kth_bipartite_soft_matching(metric: Tensor, k: int) -> tuple[Merge, Unmerge]:
    """Keep every k-th token and merge all others into the kept one they are most similar to.

    The kept tokens are those at positions k - 1, 2k - 1, ..., in this order: N // k of them. A
    tail of N % k tokens merges like the rest. (The published code cuts it off, so that it comes
    back missing from ``unmerge``.)

    Args:
        metric: (B, N, D) or (B, H, N, D), as for :func:`tome_ext.match`.
        k: keep one token in k; k <= 1, or more than there are tokens, changes nothing.

    Raises:
        ValueError: wrong rank or dtype, or k not an integer.
    """
    _check(metric, "k", k)
    num_tokens = metric.shape[-2]
    if k <= 1 or num_tokens < k:
        return _pair(match(metric, 0))
    targets = torch.arange(k - 1, num_tokens, k, dtype=torch.int32, device=metric.device)
    return _pair(match(metric.detach(), num_tokens, targets=targets))


def random_bipartite_soft_matching(
    metric: Tensor, r: int, generator: torch.Generator | None = None
) -> tuple[Merge, Unmerge]:
    """Merge r random tokens, each into the most similar of the tokens that were not drawn.

    A baseline to compare with: the paper's ablation finds it worse than alternating sets.

    Args:
        metric: (B, N, D) or (B, H, N, D), as for :func:`tome_ext.match`.
        r: tokens to remove, cut to N - 1; r <= 0 keeps all.
        generator: the source of randomness, on metric's device; None means torch's default.

    Returns:
        ``merge`` and ``unmerge``, between N and M = N - r tokens, the rows in the order of the
        tokens that were not drawn.

    Raises:
        ValueError: wrong rank or dtype, or r not an integer.
    """
    _check(metric, "r", r)
    batch, num_tokens = metric.shape[0], metric.shape[-2]
    r = min(r, num_tokens - 1)
    if r <= 0:
        return _pair(match(metric, 0))
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


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge by the average weighted with token sizes.

    Args:
        merge: as the matching functions of this module return it.
        x: (B, N, C) float32, float16, bfloat16 or float64.
        size: (B, N, 1) float32, how many original tokens each token stands for; None means 1.

    Returns:
        The merged tokens (B, M, C) in x's dtype and their sizes (B, M, 1) float32.

    Raises:
        ValueError: shape, dtype or device of x or size are not as above.
    """
    if size is not None:
        if size.dim() != 3 or size.shape[2] != 1:
            raise ValueError(f"size: expected (B, N, 1), got {describe(size)}")
        size = size.squeeze(2).float()
    merged, total = merge.plan.merge(x, size)
    return merged, total.unsqueeze(2)


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Keep track of which original tokens make each row.

    Args:
        merge: as the matching functions of this module return it.
        x: (B, N, C), the tokens that are merged; only their number and device are used.
        source: (B, N, N0) float, 1 where an original token is part of a token; None if x holds
            the original tokens themselves.

    Returns:
        (B, M, N0) float, 1 where an original token is part of a row.

    Raises:
        ValueError: x or source don't fit the plan.
    """
    plan = merge.plan
    if x.dim() != 3 or x.shape[:2] != plan.assign.shape:
        raise ValueError(
            f"x: expected (B, N, C) with (B, N) = {tuple(plan.assign.shape)} as in the plan, "
            f"got {describe(x)}"
        )
    if source is None:
        rows = torch.arange(plan.num_output_tokens, device=x.device)
        return (plan.assign.unsqueeze(1) == rows.unsqueeze(1)).float()
    return plan.merge(source, reduce="amax")[0]


def _pair(plan: MergePlan) -> tuple[Merge, Unmerge]:
    return Merge(plan), Unmerge(plan)


def _check(metric: Tensor, name: str, value: int) -> None:
    if metric.dim() not in (3, 4) or not metric.is_floating_point():
        raise ValueError(
            f"metric: expected (B, N, D) or (B, H, N, D) floating point, got {describe(metric)}"
        )
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected an integer, got {describe(value)}")
