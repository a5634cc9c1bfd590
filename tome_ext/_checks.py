"""Argument checks of the operators, with the words of ``csrc/torch``.

The twins of :mod:`tome_ext.reference` make them, and so do the fake kernels, which are the twins
without their arithmetic. What needs a look at values is checked by the kernels only.

A check raises ValueError, as the compiled operators do. Shapes may hold SymInts: each condition
is given to ``torch._check_value`` by itself, which can also put it off until sizes are known.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "INT32_MAX",
    "accumulate_dtype",
    "channels",
    "describe",
    "expect",
    "floating",
    "has_shape",
    "heads",
    "key_sizes",
    "merging",
    "name_of",
    "one_device",
    "plan_tensor",
    "planned",
    "prefix",
    "row_sums",
    "same_as",
    "table",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INT32_MAX = 2**31 - 1


def name_of(dtype: torch.dtype) -> str:
    """ "float32" """
    return str(dtype).removeprefix("torch.")


def describe(x: Tensor) -> str:
    """ "(2, 197, 64) float32" """
    return f"{tuple(x.shape)} {name_of(x.dtype)}"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect(
    conditions: bool | Sequence[bool | torch.SymBool], name: str, expected: str, got: object
) -> None:
    """Raise ValueError "name: expected ..., got ..." unless every condition holds.

    Conditions behind one that is False are not looked at, but they have been computed.
    """
    for condition in [conditions] if isinstance(conditions, bool) else conditions:
        torch._check_value(condition, lambda: f"{name}: expected {expected}, got {got}")


def has_shape(x: Tensor, *shape: int | None) -> list[bool | torch.SymBool]:
    """Conditions: the rank, and every size that is not None."""
    if x.dim() != len(shape):
        return [False]
    return [
        size == wanted for size, wanted in zip(x.shape, shape, strict=True) if wanted is not None
    ]


def floating(x: Tensor, name: str) -> None:
    """A dtype that the kernels take."""
    expect(x.dtype in FLOATS, name, "float32, float16, bfloat16 or float64", describe(x))


def one_device(x: Tensor, name: str, other: Tensor | None, other_name: str) -> None:
    """Both tensors on one device."""
    if other is not None and x.device != other.device:
        got = f"{name} on {x.device.type} and {other_name} on {other.device.type}"
        expect(False, f"{name} and {other_name}", "one device", got)


def table(
    x: Tensor, name: str, batch: int, columns: int | None, columns_name: str, dtype: torch.dtype
) -> None:
    """(batch, columns) of the dtype; None accepts any number of columns."""
    wanted = columns_name if columns is None else f"{columns_name} = {columns}"
    fits = [x.dtype == dtype, *has_shape(x, batch, columns)]
    expect(fits, name, f"({batch}, {wanted}) {name_of(dtype)}", describe(x))


def same_as(x: Tensor, name: str, of: Tensor, of_name: str) -> None:
    """The shape, dtype and device of another tensor."""
    fits = [x.dtype == of.dtype, *has_shape(x, *of.shape)]
    expect(fits, name, f"the shape and dtype of {of_name}, {describe(of)}", describe(x))
    one_device(of, of_name, x, name)


def prefix(num_prefix_tokens: int) -> None:
    """A number of prefix tokens."""
    expect(num_prefix_tokens >= 0, "num_prefix_tokens", "a number >= 0", num_prefix_tokens)


def plan_tensor(x: Tensor, name: str) -> None:
    """(B, N) int32."""
    expect(x.dim() == 2 and x.dtype == torch.int32, name, "(B, N) int32", describe(x))


def planned(x: Tensor, name: str, batch: int, count_name: str, count: int | None) -> None:
    """(batch, count, channels) as a plan has them; None accepts any count."""
    shown = count_name if count is None else count
    wanted = f"(B, {count_name}, C) = ({batch}, {shown}, C) as in the plan"
    expect(has_shape(x, batch, count, None), name, wanted, describe(x))


def merging(
    x: Tensor, name: str, rows: bool, size: Tensor | None, members: Tensor, offsets: Tensor
) -> None:
    """Tokens, or with ``rows`` the rows of a plan, and its tensors."""
    expect(x.dim() == 3, name, "(B, N, C)", describe(x))
    floating(x, name)
    plan_tensor(members, "members")
    table(offsets, "offsets", members.shape[0], None, "M + 1", torch.int32)
    expect([offsets.shape[1] > 0], "offsets", "at least one column", describe(offsets))
    if rows:
        planned(x, name, members.shape[0], "M", offsets.shape[1] - 1)
    else:
        planned(x, name, members.shape[0], "N", members.shape[1])
    one_device(x, name, members, "members")
    one_device(x, name, offsets, "offsets")
    if size is not None:
        table(size, "size", x.shape[0], members.shape[1], "N", torch.float32)
        one_device(x, name, size, "size")


def channels(v: Tensor | None, name: str, x: Tensor) -> None:
    """(C,) of x's dtype."""
    if v is None:
        return
    fits = [v.dtype == x.dtype, *has_shape(v, x.shape[2])]
    expect(fits, name, f"(C = {x.shape[2]},) {name_of(x.dtype)} as x is", describe(v))
    one_device(x, "x", v, name)


def heads(q: Tensor, k: Tensor) -> None:
    """Queries and keys, alike but for the number of tokens."""
    expect(q.dim() == 4, "q", "(B, H, M, D)", describe(q))
    floating(q, "q")
    batch, num_heads, _, dim = q.shape
    fits = [k.dtype == q.dtype, *has_shape(k, batch, num_heads, None, dim)]
    wanted = f"(B, H, N, D) = ({batch}, {num_heads}, N, {dim}) {name_of(q.dtype)} as q is"
    expect(fits, "k", wanted, describe(k))
    one_device(q, "q", k, "k")


def row_sums(lse: Tensor, q: Tensor) -> None:
    """What attention says of each query's row of weights."""
    dtype = accumulate_dtype(q.dtype)
    batch, num_heads, rows, _ = q.shape
    fits = [lse.dtype == dtype, *has_shape(lse, batch, num_heads, rows)]
    wanted = f"(B, H, M) = ({batch}, {num_heads}, {rows}) {name_of(dtype)}"
    expect(fits, "lse", wanted, describe(lse))
    one_device(q, "q", lse, "lse")


def key_sizes(k: Tensor, size: Tensor | None) -> None:
    """A size for each key."""
    if size is not None:
        table(size, "size", k.shape[0], k.shape[2], "N", torch.float32)
        one_device(k, "k", size, "size")
