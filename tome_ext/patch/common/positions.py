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


def for_all_tokens(halves: tuple[Tensor, Tensor], batch: int, prefix: int) -> Tensor:
    """A table of patch tokens in one, (B, prefix + P, 2D), with zeros for the prefix.

    Args:
        halves: cosines and sines, (P, D) or (B, P, D) each.
    """
    table = torch.cat(halves, dim=-1)
    if prefix:
        table = torch.nn.functional.pad(table, (0, 0, prefix, 0))
    return table.expand(batch, -1, -1)


# Rotations all around the circle have a mean of length 0, whose direction is rounding: DINOv3's
# first frequency turns by half the circle within a quarter of the picture. Means shorter than this
# keep in proportion to their length, down to 0, which is the mean of what the tokens would be.
SHORT = 2.0**-6


def of_length_1(table: Tensor) -> tuple[Tensor, Tensor]:
    """The means (B, M, D) of tables, whose halves are (cosines, sines), as rotations again.

    Returns:
        Both halves (B, M, D / 2).
    """
    cos, sin = table.chunk(2, dim=-1)
    # Not torch.linalg.vector_norm, which takes a millisecond for 200 tokens on a CPU.
    inverse = torch.addcmul(cos * cos, sin, sin).clamp_min(SHORT * SHORT).rsqrt()
    return cos * inverse, sin * inverse


def representatives(plan: MergePlan, coordinates: Tensor) -> Tensor:
    """Of each row's tokens the one nearest to their centroid, (B, M) int64; 0 for a row without.

    Of several that are as near, the first.

    Args:
        plan: from N tokens to M rows.
        coordinates: (N, K) integers, of the tokens.
    """
    batch, num_tokens = plan.assign.shape
    points = coordinates.to(torch.int64).expand(batch, -1, -1)
    sums, counts = plan.merge(points.to(torch.float32), reduce="sum")
    spread = plan.unmerge(torch.cat((sums, counts.unsqueeze(2)), dim=2)).to(torch.int64)
    # Times the row's count, so that all is exact; with the index behind it no two are equal.
    away = (spread[..., -1:] * points - spread[..., :-1]).square() * num_tokens
    index = torch.arange(num_tokens, device=away.device).unsqueeze(1).expand(batch, -1, -1)
    # In one sum: OpenVINO 2026.4 takes an addition behind it into the sum, and gets batches wrong.
    order = torch.cat((away, index), dim=2).sum(2).argsort(1)
    nearest_first = MergePlan.from_assign(plan.assign.gather(1, order), plan.num_output_tokens)
    first = nearest_first.offsets[:, :-1].clamp_max(num_tokens - 1).to(torch.int64)
    nearest = order.gather(1, nearest_first.members.to(torch.int64).gather(1, first))
    return torch.where(counts > 0, nearest, 0)
