"""Token merging in stock PyTorch operators: what this package is measured against.

Matching and merging in the usual formulation: normalise, matmul, max, argsort, gather,
scatter_reduce, cat. It materialises the score matrix and sorts it. Proportional attention in every
form stock operators allow. ``patch`` puts them together in a timm model, as the paper describes it:

    tome-ext bench --peer bench/stock.py:patch
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """(B, H, N, D) proportional attention with the matrix of all pairs, as ToMe published it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    scores = scores + size.log()[:, None, None].to(q.dtype)
    return scores.softmax(dim=-1) @ v


def masked_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """The sizes as a float mask, which keeps SDPA from the flash kernel on GPUs.

    The memory-efficient kernel wants rows of a multiple of 8 entries, so the mask is a slice of a
    longer one.
    """
    batch, num_tokens = size.shape
    mask = q.new_empty(batch, 1, 1, (num_tokens + 7) // 8 * 8)[..., :num_tokens]
    mask.copy_(size.log()[:, None, None])
    mask = mask.expand(-1, q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def rank_1_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    """One more channel that carries the bias: q' = [q, 1 / scale], k' = [k, log size].

    No mask, so flash. The channels are padded to a multiple of 8; log(size) is rounded to the
    dtype of the keys.
    """
    dim = q.shape[-1]
    scale = dim**-0.5
    room = (0, 8 - dim % 8)
    q, k, v = F.pad(q, room), F.pad(k, room), F.pad(v, room)
    q[..., dim] = 1 / scale
    k[..., dim] = size.log()[:, None].to(k.dtype)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[..., :dim]


def flex_attention() -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention with the bias as a score function, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()  # each shape is compiled for itself, and torch counts them
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
        bias = size.log()
        return compiled(q, k, v, score_mod=lambda score, b, h, m, n: score + bias[b, n])

    return run


class MergingBlocks(nn.Sequential):
    """The blocks of a timm Vision Transformer, each merging r tokens between attention and MLP."""

    def __init__(
        self, blocks: list[Any], r: int, num_prefix_tokens: int, attention: Attention
    ) -> None:
        super().__init__(*blocks)
        self.r = r
        self.attention = attention
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        size = None  # (B, N, 1), all 1 before the first merge
        for block in self:
            attended, keys = attend(block.attn, block.norm1(x), size, self.attention)
            x = x + block.drop_path1(block.ls1(attended))
            r = min(self.r, (x.shape[1] - self.num_prefix_tokens) // 2)
            if r > 0:
                size = x.new_ones(*x.shape[:2], 1) if size is None else size
                x, size = merge(x, size, match(keys, r, self.num_prefix_tokens))
            x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        return x


def attend(
    attn: Any, x: Tensor, size: Tensor | None, attention: Attention
) -> tuple[Tensor, Tensor]:
    """timm's attention with proportional attention; also returns its keys (B, H, N, D)."""
    batch, num_tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if size is None:
        x = F.scaled_dot_product_attention(q, k, v)
    else:
        x = attention(q, k, v, size.squeeze(-1))
    x = attn.norm(x.transpose(1, 2).reshape(batch, num_tokens, -1))
    return attn.proj_drop(attn.proj(x)), k


def patch(model: Any, r: int, attention: Attention = masked_attention) -> Any:
    """A timm VisionTransformer of plain blocks that merges r tokens in every block.

    ``attention`` takes q, k, v and sizes. SDPA with log(size) as a float mask is the fastest of the
    stock forms on the CPU; ToMe was published with ``explicit_attention``.
    """
    if any(getattr(block.attn, "gate", None) is not None for block in model.blocks):
        raise ValueError("model: expected attention without a gate")
    if model.num_prefix_tokens > 1:  # `merge` would not keep a second one in its place
        raise ValueError(f"model: expected at most a class token, got {model.num_prefix_tokens}")
    model.blocks = MergingBlocks(list(model.blocks), r, model.num_prefix_tokens, attention)
    return model
