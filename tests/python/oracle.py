"""Test oracles: plain loops for plans and merges, and the one tolerance rule of the test suite."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What wrong arguments raise where an operator is called by its name in torch.ops, without the
# function of tome_ext: torch 2.15 makes a RuntimeError of every error of C++ but its own.
OPERATOR_ERROR = RuntimeError if torch.__version__ >= (2, 15) else ValueError


def assert_error_within(
    result: Tensor, stock: Tensor, exact: Tensor, factor: float = 2.0, rms: bool = False
) -> None:
    """The tolerance rule: at most twice the error of the stock computation in the same dtype.

    Both errors are maxima against the float64 result ``exact``, or root mean squares: of sums of
    hundreds of terms in float32 the largest error is a matter of chance, from one seed to the next
    by a factor of two. One rounding of the largest value to the dtype is always allowed: a stock
    result that happens to be exact proves nothing.
    """
    assert result.dtype == stock.dtype, f"{result.dtype} against stock in {stock.dtype}"
    assert result.shape == exact.shape, f"{tuple(result.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return

    def error_of(x: Tensor) -> float:
        difference = x.double() - exact
        return (difference.square().mean().sqrt() if rms else difference.abs().max()).item()

    error, allowed = error_of(result), factor * error_of(stock)
    rounding = torch.finfo(result.dtype).eps * exact.abs().max().item()
    if rms:
        rounding *= 0.3  # of a rounding of half an eps, evenly spread
    assert error <= allowed + rounding, f"error {error:.3g}, allowed {allowed:.3g} + {rounding:.3g}"


def check_plan(
    assign: Tensor, members: Tensor, offsets: Tensor, num_tokens: int, num_rows: int
) -> None:
    """Every invariant of a merge plan, row by row."""
    assert assign.dtype == members.dtype == offsets.dtype == torch.int32
    batch = assign.shape[0]
    assert assign.shape == members.shape == (batch, num_tokens)
    assert offsets.shape == (batch, num_rows + 1)
    for to, member, offset in zip(assign.tolist(), members.tolist(), offsets.tolist(), strict=True):
        assert sorted(member) == list(range(num_tokens))
        assert offset[0] == 0
        for row in range(num_rows):
            group = member[offset[row] : offset[row + 1]]
            assert group == sorted(group)
            assert group == [n for n in range(num_tokens) if to[n] == row]
        dropped = member[offset[-1] :]
        assert dropped == [n for n in range(num_tokens) if to[n] == -1]


def match_plan(
    metric: Tensor,
    r: int,
    prefix: int,
    weight: Tensor | None = None,
    targets: list[int] | None = None,
    size: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[list[list[int]], float]:
    """Bipartite soft matching by loops in float64; tokens of weight 0 take no part.

    With ``size`` or ``importance`` the pairs that merge are those of the least cost.

    ``targets`` are what others merge into, None means the odd positions. An image of which all are
    hidden must have room for its other tokens.

    Returns the assignment of every image, and the smallest gap between a choice made and the best
    one refused: where it is below rounding, another choice would have been as right.
    """
    rows = metric.double()
    rows = rows.mean(1) if rows.dim() == 4 else rows
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    num_tokens = rows.shape[1]
    behind = range(prefix, num_tokens)
    odd = [n for n in behind if n % 2 == 1] if targets is None else targets
    r = max(0, min(r, len(behind) // 2 if targets is None else len(behind) - len(odd)))
    r = r if odd else 0
    assigns, gap = [], float("inf")
    for number, image in enumerate(rows):
        if r == 0:
            assigns.append(list(range(num_tokens)))
            continue
        seen = [weight is None or weight[number, n] != 0 for n in range(num_tokens)]
        a = [n for n in behind if n not in odd and seen[n]]
        b = [n for n in odd if seen[n]]
        merged = min(r, len(a), len(b) if targets is None or not b else num_tokens)
        assert b or len(a) + prefix <= num_tokens - r
        if merged == 0:
            order = [*range(prefix), *a, *b]
            assigns.append([order.index(n) if n in order else -1 for n in range(num_tokens)])
            continue
        scores = image[a] @ image[b].T
        best = []
        for i, row in enumerate(scores.tolist()):
            j = max(range(len(b)), key=lambda j: (row[j], -j))
            best.append((row[j], i, j))
            others = [s for k, s in enumerate(row) if k != j]
            gap = min([gap] + [row[j] - s for s in others])
        if size is not None or importance is not None:
            best = [
                (-_merge_cost(score, number, a[i], b[j], size, importance), i, j)
                for score, i, j in best
            ]
        ranked = sorted(best, key=lambda entry: (-entry[0], entry[1]))
        if merged < len(ranked):
            gap = min(gap, ranked[merged - 1][0] - ranked[merged][0])
        joins = {a[i]: b[j] for _, i, j in ranked[:merged]}
        order = list(range(prefix)) + [n for n in a if n not in joins] + b
        row_of = {n: row for row, n in enumerate(order)}
        assigns.append([row_of.get(joins.get(n, n), -1) for n in range(num_tokens)])
    return assigns, gap


def _merge_cost(
    similarity: float,
    image: int,
    a: int,
    b: int,
    size: Tensor | None,
    importance: Tensor | None,
) -> float:
    size_a, size_b = (1.0 if size is None else size[image, n].item() for n in (a, b))
    factor = 1.0 if importance is None else importance[image, a].item()
    return (1 - similarity) * size_a * size_b / (size_a + size_b) * factor


def merge_rows(
    x: Tensor, size: Tensor | None, assign: Tensor, num_rows: int, reduce: str
) -> tuple[Tensor, Tensor]:
    """Merge by loops in float64."""
    x = x.double()
    size = torch.ones(x.shape[:2]) if size is None else size
    out = torch.zeros(x.shape[0], num_rows, x.shape[2], dtype=torch.float64)
    total = torch.zeros(x.shape[0], num_rows, dtype=torch.float64)
    for b in range(x.shape[0]):
        for row in range(num_rows):
            group = (assign[b] == row).nonzero().flatten()
            total[b, row] = size[b, group].double().sum()
            if len(group) == 0:
                continue
            weight = size[b, group].double().unsqueeze(1)
            if reduce == "amax":
                out[b, row] = x[b, group].amax(0)
            elif reduce == "sum":
                out[b, row] = (weight * x[b, group]).sum(0)
            elif weight.sum() == 0:
                out[b, row] = x[b, group].mean(0)
            else:
                out[b, row] = (weight * x[b, group]).sum(0) / weight.sum()
    return out, total


def stock_merge(
    x: Tensor, size: Tensor | None, assign: Tensor, num_rows: int, reduce: str
) -> Tensor:
    """Merge by stock operators in x's own dtype."""
    size = torch.ones(x.shape[:2]) if size is None else size
    index = assign.long().unsqueeze(-1).expand_as(x)
    weight = size.to(x.dtype).unsqueeze(-1)
    out = x.new_zeros(x.shape[0], num_rows, x.shape[2])
    if reduce == "amax":
        return out.scatter_reduce(1, index, x, "amax", include_self=False)
    out = out.scatter_add(1, index, x * weight)
    if reduce == "sum":
        return out
    total = weight.new_zeros(x.shape[0], num_rows, 1).scatter_add(1, index[..., :1], weight)
    return out / total


def differentiable_merge(x, size, assign, rows, reduce="mean"):
    """:func:`merge_rows` for "mean" and "sum" by products with a matrix, in float64."""
    of_row = (assign.unsqueeze(1) == torch.arange(rows, device=x.device)[:, None]).double()
    total = of_row @ size.double().unsqueeze(-1)
    sums = of_row @ (size.double().unsqueeze(-1) * x.double())
    if reduce == "sum":
        return sums, total.squeeze(-1)
    count = of_row.sum(-1, keepdim=True)
    even = (of_row @ x.double()) / count.clamp_min(1)
    none = total == 0
    return torch.where(none, even, sums / torch.where(none, 1.0, total)), total.squeeze(-1)


def assert_same_derivatives(run, exact, inputs, rtol, atol):
    """The gradients of a loss of both functions' outputs, and those of a loss of the gradients."""
    first = [torch.randn(out.shape).double() for out in exact(*inputs)]
    second = [torch.randn(x.shape).double() for x in inputs]
    found = []
    for function in (run, exact):
        live = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*live)
        loss = sum((out.double().square() * w).sum() for out, w in zip(outputs, first, strict=True))
        grads = torch.autograd.grad(loss, live, create_graph=True)
        again = sum((g.double().square() * w).sum() for g, w in zip(grads, second, strict=True))
        found.append((*grads, *torch.autograd.grad(again, live)))
    for got, want in zip(*found, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)
