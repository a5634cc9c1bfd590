"""Inputs for the tests of attention, and the same attention computed in other ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from oracle import assert_error_within
from torch import Tensor

from tome_ext.attention import log_size_bias

# (B, H, N, D) and (B, N), for errors and wherever the values do not matter.
Q, K, V = torch.randn(3, 2, 3, 5, 8)
SIZE = torch.ones(2, 5)


def packed(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as views of one packed (B, N, 3, H, D) tensor, as a projection gives them."""
    tokens = max(queries, keys)
    qkv = torch.randn(batch, tokens, 3, heads, dim).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]


def sizes(batch: int, keys: int) -> Tensor:
    return torch.randint(1, 9, (batch, keys)).float()


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None = None
) -> Tensor:
    """The definition, in float64; 0 for queries that see no key."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = ((q.double() @ k.double().mT) * scale).exp()
    if size is not None:
        weights = weights * size.double()[:, None, None, :]
    total = weights.sum(-1, keepdim=True)
    return (weights @ v.double()) / torch.where(total == 0, 1.0, total)


def stock_attention(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None) -> Tensor:
    mask = None if size is None else log_size_bias(size, q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def assert_accurate(result: Tensor, stock: Tensor, exact: Tensor, rms: bool = False) -> None:
    if result.dtype == torch.float64:  # `exact` has rounding errors of this size itself
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11)
    elif rms:
        assert_error_within(result, stock, exact, rms=True)
        assert_error_within(result, stock, exact, factor=4.0)
    else:
        assert_error_within(result, stock, exact)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)
