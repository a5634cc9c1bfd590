"""The operators as nodes of their own in an ONNX graph, which ``csrc/engines`` runs.

One node each, of the domain ``tome_ext``: a runtime needs the library that
:func:`tome_ext.onnx.library` names. Nodes take queries, keys and metrics as (B, N, H, D), as linear
layers write them; ``csrc/engines/operators.cpp`` has the list of inputs and attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _onnx_standard, reference

__all__ = ["FORMS"]

DOMAIN = "tome_ext"
VERSION = 1
MOST = 2**31 - 1  # that an attribute may be; there are fewer tokens
REDUCTIONS = ("mean", "sum", "amax")  # in the order of tome::Reduce


def _node(
    name: str,
    inputs: Sequence[Tensor | None],
    outputs: Sequence[tuple[torch.dtype, Sequence[Any]]],
    **attributes: int | float | None,
) -> tuple[Tensor, ...]:
    """A node with outputs of these dtypes and shapes. Attributes of None are left out."""
    last = max(i for i, x in enumerate(inputs) if x is not None)
    return tuple(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{name}",
            inputs[: last + 1],
            {key: value for key, value in attributes.items() if value is not None},
            dtypes=[dtype for dtype, _ in outputs],
            shapes=[shape for _, shape in outputs],
            version=VERSION,
        )
    )


def _by_tokens(x: Tensor) -> Tensor:
    """(B, H, N, D) as (B, N, H, D)."""
    return x.transpose(1, 2)


def _plan_of(batch: Any, num_tokens: Any, rows: Any) -> list[tuple[torch.dtype, Sequence[Any]]]:
    tokens = (batch, num_tokens)
    return [(torch.int32, shape) for shape in (tokens, tokens, (batch, rows + 1))]


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
) -> tuple[Tensor, ...]:
    batch, num_tokens = metric.shape[0], metric.shape[-2]
    prefix = min(num_prefix_tokens, num_tokens)
    return _node(
        "Match",
        (metric if metric.dim() == 3 else _by_tokens(metric), weight, targets, size, importance),
        _plan_of(batch, num_tokens, num_tokens - reference.cut_r(num_tokens, r, prefix, targets)),
        r=max(min(r, MOST), -MOST),
        num_prefix_tokens=min(num_prefix_tokens, MOST),
        threshold=None if threshold == math.inf else threshold,
    )


def select(
    scores: Tensor, keep: int, num_prefix_tokens: int = 0, fuse: bool = False
) -> tuple[Tensor, ...]:
    batch, num_tokens = scores.shape
    kept = reference.cut_keep(num_tokens, keep, min(num_prefix_tokens, num_tokens))
    return _node(
        "Select",
        (scores,),
        _plan_of(batch, num_tokens, kept + int(fuse and kept < num_tokens)),
        keep=min(keep, MOST),
        num_prefix_tokens=min(num_prefix_tokens, MOST),
        fuse=int(fuse),
    )


def plan(assign: Tensor, num_rows: int) -> tuple[Tensor, ...]:
    batch, num_tokens = assign.shape
    outputs = _plan_of(batch, num_tokens, num_rows)[1:]
    return _node("Plan", (assign,), outputs, num_rows=num_rows)


def merge(
    x: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> tuple[Tensor, ...]:
    sizes = (x.shape[0], offsets.shape[1] - 1)
    outputs = [(x.dtype, (*sizes, x.shape[2])), (torch.float32, sizes)]
    return _node("Merge", (x, size, members, offsets), outputs, reduce=REDUCTIONS.index(reduce))


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
) -> tuple[Tensor, ...]:
    sizes = (x.shape[0], offsets.shape[1] - 1)
    merged = (x.dtype, (*sizes, x.shape[2]))
    return _node(
        "MergeAddNorm",
        (x, branch, size, members, offsets, scale, weight, bias),
        [merged, (torch.float32, sizes), merged],
        eps=eps,
        keep_norms=int(keep_norms),
    )


def unmerge(x: Tensor, assign: Tensor) -> Tensor:
    (tokens,) = _node("Unmerge", (x, assign), [(x.dtype, (*assign.shape, x.shape[2]))])
    return tokens


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    by_tokens = _by_tokens(q), _by_tokens(k), _by_tokens(v), size
    (out,) = _node("ProportionalAttention", by_tokens, [(q.dtype, by_tokens[0].shape)], scale=scale)
    # Nothing in a model reads the second output, so that no node is left of its standard form.
    lse = _onnx_standard.attention_forward(q, k, v, size, scale)[1]
    return _by_tokens(out), lse


def cls_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    outputs = [(reference.accumulate_dtype(q.dtype), (k.shape[0], k.shape[2]))]
    # Of the first query, which is all that is read.
    (scores,) = _node(
        "ClsAttention", (_by_tokens(q[:, :, :1]), _by_tokens(k), size), outputs, scale=scale
    )
    return scores


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
