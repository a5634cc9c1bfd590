"""Where a merged token is: what becomes of rotary tables and of position ids."""

from __future__ import annotations

import torch
from torch import Tensor

from ...plan import MergePlan

__all__ = ["for_all_tokens", "of_grid", "of_length_1", "representatives"]


def of_grid(height: int, width: int, prefix: int, device: torch.device) -> Tensor:
    """Rows and columns (prefix + height * width, 2) of a grid of patches; 0 for the prefix."""
    patches = torch.cartesian_prod(
        torch.arange(height, device=device), torch.arange(width, device=device)
    )
    return torch.nn.functional.pad(patches, (0, 0, prefix, 0))


def for_all_tokens(table: Tensor, batch: int, prefix: int) -> Tensor:
    """A table (P, D) or (B, P, D) of patch tokens as (B, prefix + P, D), zeros for the prefix."""
    if prefix:
        table = torch.nn.functional.pad(table, (0, 0, prefix, 0))
    return table.expand(batch, -1, -1)


def of_length_1(table: Tensor) -> Tensor:
    """The means (B, M, D) of tables, whose halves are (cosines, sines), as rotations again."""
    pairs = table.unflatten(-1, (2, -1))
    length = torch.linalg.vector_norm(pairs, dim=-2, keepdim=True)
    tiny = torch.finfo(table.dtype).tiny  # rows that stand for no token are 0
    return (pairs / length.clamp_min(tiny)).flatten(-2)


def representatives(plan: MergePlan, coordinates: Tensor) -> Tensor:
    """Of each row's tokens the one nearest to their centroid, (B, M) int64; 0 for a row without.

    Args:
        plan: from N tokens to M rows.
        coordinates: (N, K) of the tokens.
    """
    batch, num_tokens = plan.assign.shape
    points = coordinates.to(torch.float32).expand(batch, -1, -1)
    centroids, _ = plan.merge(points)
    distance = (plan.unmerge(centroids) - points).square().sum(-1)
    rows = plan.assign.clamp_min(0).to(torch.int64)
    dropped = plan.assign < 0
    distance = distance.masked_fill(dropped, float("inf"))
    shape = (batch, plan.num_output_tokens)
    least = distance.new_full(shape, float("inf")).scatter_reduce(1, rows, distance, "amin")
    index = torch.arange(num_tokens, device=rows.device).expand(batch, -1)
    candidates = torch.where((distance <= least.gather(1, rows)) & ~dropped, index, num_tokens)
    nearest = index.new_full(shape, num_tokens).scatter_reduce(1, rows, candidates, "amin")
    return torch.where(nearest == num_tokens, 0, nearest)
