"""Token merging in stock PyTorch operators: what the operators are measured against.

The usual formulation: normalise, matmul, max, argsort, gather, scatter_reduce, cat. It materialises
the score matrix and sorts it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Apply = Callable[[Tensor], Tensor]


def scores(metric: Tensor) -> Tensor:
    """(B, Na, Nb) cosine similarities of the even tokens of (B, N, D) with the odd ones."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    return metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)


def match(keys: Tensor, r: int, num_prefix_tokens: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of (B, N, D) or (B, H, N, D) keys: src (B, r), dst (B, r), kept (B, Na - r)."""
    metric = keys.mean(1) if keys.dim() == 4 else keys
    score = scores(metric)
    if num_prefix_tokens:
        score[:, : (num_prefix_tokens + 1) // 2] = float("-inf")
        score[:, :, : num_prefix_tokens // 2] = float("-inf")
    best, nearest = score.max(dim=2)
    order = best.argsort(dim=1, descending=True)
    src = order[:, :r]
    kept = order[:, r:].sort(dim=1)[0]
    return src, nearest.gather(1, src), kept


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _sum(x: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    src, dst, kept = pairs
    a, b = x[:, ::2], x[:, 1::2]
    index = dst.unsqueeze(-1).expand(-1, -1, x.shape[-1])
    merged = b.scatter_reduce(1, index, _rows(a, src), "sum")
    return torch.cat([_rows(a, kept), merged], dim=1)


def merge(x: Tensor, size: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Weighted merge of (B, N, C) with sizes (B, N, 1)."""
    total = _sum(size, pairs)
    return _sum(x * size, pairs) / total, total


def unmerge(x: Tensor, pairs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """(B, M, C) back to (B, M + r, C)."""
    src, dst, kept = pairs
    a, b = x[:, : kept.shape[1]], x[:, kept.shape[1] :]
    out = x.new_empty(x.shape[0], x.shape[1] + src.shape[1], x.shape[2])
    out[:, 1::2] = b
    out[:, ::2].scatter_(1, kept.unsqueeze(-1).expand_as(a), a)
    moved = _rows(b, dst)
    out[:, ::2].scatter_(1, src.unsqueeze(-1).expand_as(moved), moved)
    return out
