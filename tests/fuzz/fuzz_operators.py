"""Random calls of the public operators against NumPy in float64, and bad ones, which must raise.

    python tests/fuzz/fuzz_operators.py [--cases 15000] [--seed 0] [--case SEED]

Runs against the installed package, on the CPU, for each instruction set in turn, in processes of
their own: one that dies is reported with the seed of the case it was at. Every case has a seed;
``--case`` repeats one. Exits with 1 at the first case that fails.

A case draws an operator, shapes (empty ones too), dtypes, strides (padded, transposed, expanded),
values (ties, zeros, huge, NaN and infinity), threads and arguments. What it computes is compared
with an oracle that shares no code with the package, within what rounding may do. In one case out of
four an argument is then spoiled: the call must raise ValueError, RuntimeError or TypeError with a
message, and change none of its arguments.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import tome_ext as tome
from tome_ext import MergePlan

INSTRUCTION_SETS = (
    "portable",
    "avx2",
    "avx512",
    "avx512_bf16",
    "amx_bf16",
)  # what is missing falls back
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REFUSALS = (ValueError, RuntimeError, TypeError)

Rng = np.random.Generator
Array = np.ndarray


# --- rounding -----------------------------------------------------------------------------------


def roundoff(dtype: torch.dtype) -> float:
    """The relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def sum_roundoff(dtype: torch.dtype) -> float:
    """Of the dtype that sums are taken in: float32, or float64 for float64."""
    return 2.0**-53 if dtype == torch.float64 else 2.0**-24


def least(dtype: torch.dtype) -> float:
    """The absolute error of rounding to a subnormal number."""
    return {torch.float16: 2.0**-25, torch.float64: 1e-320}.get(dtype, 1e-40)


def near(got: torch.Tensor, want: Array, allowed: Array | float, what: str) -> None:
    """Compare a result with its oracle; what the dtype cannot hold is infinite."""
    assert tuple(got.shape) == want.shape, f"{what}: shape {tuple(got.shape)}, not {want.shape}"
    finfo = torch.finfo(got.dtype)
    overflows = np.abs(want) - allowed >= finfo.max * (1 + finfo.eps / 4)
    assert np.isinf(numbers(got)[overflows]).all(), f"{what}: no infinity where a sum overflows"
    off = np.abs(np.clip(numbers(got), finfo.min, finfo.max) - np.clip(want, finfo.min, finfo.max))
    off -= allowed
    assert not (np.isnan(off) | (off > 0)).any(), f"{what}: off by {np.nanmax(off):.3g} too much"


def numbers(x: torch.Tensor) -> Array:
    """A tensor's values in float64."""
    return x.detach().double().numpy().copy()


# --- inputs -------------------------------------------------------------------------------------


def one_in(rng: Rng, n: int) -> bool:
    """True once in n times."""
    return bool(rng.integers(n) == 0)


def count(rng: Rng, most: int) -> int:
    """Mostly small: what is odd happens around the widths of vectors and tiles."""
    return int(rng.integers(0, most + 1 if one_in(rng, 4) else min(most, 9) + 1))


def values(rng: Rng, shape: tuple[int, ...], wild: bool) -> Array:
    """Numbers of one kind; ``wild`` ones may be anything."""
    kind = rng.integers(5)
    x = rng.standard_normal(shape)
    if kind == 0:
        x = rng.integers(-2, 3, shape).astype(float)  # ties
    elif kind == 1:
        x *= 2.0 ** rng.integers(-12, 9)
    elif kind == 2:
        x[rng.random(shape) < 0.3] = 0.0
    if wild:
        special = np.array([np.nan, np.inf, -np.inf, -0.0, 6e4, -3e38, 1e-42, 1e-7])
        where = rng.random(shape) < 0.1
        x[where] = rng.choice(special, int(where.sum()))
    return x


def laid_out(rng: Rng, x: Array, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of these values, somewhere in memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(x)).to(dtype)
    kind = rng.integers(5)
    if kind == 0 and tensor.dim() > 1:  # rows with room between them, which holds NaN
        padded = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan")).to(dtype)
        padded[..., 1:-2] = tensor
        return padded[..., 1:-2]
    if kind == 1 and tensor.dim() > 2:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 2:
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    return tensor


def batch_of(rng: Rng, tensor: torch.Tensor) -> torch.Tensor:
    """Sometimes one image, expanded over the batch."""
    if tensor.shape[0] > 1 and one_in(rng, 8):
        return tensor[:1].expand(tensor.shape)
    return tensor


def tensor_of(rng: Rng, shape: tuple[int, ...], dtype: torch.dtype, wild: bool) -> torch.Tensor:
    """Random values, somewhere in memory."""
    return batch_of(rng, laid_out(rng, values(rng, shape, wild), dtype))


def sizes_of(rng: Rng, batch: int, tokens: int) -> torch.Tensor | None:
    """Whole numbers from 0, as merging makes them; None for ones."""
    if one_in(rng, 3):
        return None
    return laid_out(rng, rng.integers(0, 6, (batch, tokens)).astype(float), torch.float32)


def plan_of(rng: Rng, batch: int, tokens: int, rows: int) -> MergePlan:
    """Any plan: empty rows, dropped tokens."""
    assign = torch.from_numpy(rng.integers(-1, rows, (batch, tokens)))
    plan = MergePlan.from_assign(assign if one_in(rng, 2) else assign.int(), rows)
    check_plan(plan, rows)
    assert torch.equal(plan.assign.long(), assign)
    return plan


def check_plan(plan: MergePlan, rows: int) -> None:
    """Members and offsets are what the assignment says."""
    assign, members, offsets = (x.numpy() for x in plan)
    assert members.shape == assign.shape
    assert offsets.shape == (len(assign), rows + 1)
    for to, member, offset in zip(assign, members, offsets, strict=True):
        key = np.where(to < 0, rows, to)
        assert np.array_equal(member, np.argsort(key, kind="stable"))
        assert np.array_equal(offset, np.searchsorted(np.sort(key), np.arange(rows + 1)))


# --- calls, and what is wrong with them -----------------------------------------------------------

Arguments = dict[str, Any]
Spoil = Callable[[Arguments], Arguments]


def refused(rng: Rng, call: Callable[..., Any], given: Arguments, spoils: list[Spoil]) -> None:
    """Spoil an argument: the call must raise, and leave its arguments as they are."""
    spoiled = spoils[rng.integers(len(spoils))](dict(given))
    tensors = [x for x in spoiled.values() if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in tensors]
    try:
        result = call(**spoiled)
    except REFUSALS as error:
        message = str(error)
    else:
        shown = {k: tome.ops.describe(x) for k, x in spoiled.items()}
        raise AssertionError(f"not refused: {shown} gave {type(result).__name__}")
    assert message, "refused without a word"
    for x, was in zip(tensors, before, strict=True):
        assert torch.equal(x.nan_to_num(), was.nan_to_num()), "a refused call changed an argument"


def another(name: str, change: Callable[[Any], Any]) -> Spoil:
    """Replace one argument."""
    return lambda given: {**given, name: change(given[name])}


def constant(name: str, value: Any) -> Spoil:
    """Set one argument."""
    return lambda given: {**given, name: value}


def wider(x: torch.Tensor, dim: int) -> torch.Tensor:
    """One more along a dimension."""
    shape = list(x.shape)
    shape[dim] += 1
    return torch.zeros(shape, dtype=x.dtype)


def spoiled_plan(rng: Rng, plan: MergePlan) -> MergePlan | None:
    """A plan that points outside, or names a token twice; None if it has no token."""
    batch, tokens = plan.members.shape
    if batch == 0 or tokens == 0:
        return None
    b, n = rng.integers(batch), rng.integers(tokens)
    kind = rng.integers(4)
    if kind == 3:
        offsets = plan.offsets.clone()
        at = rng.integers(offsets.shape[1])
        offsets[b, at] = rng.choice([-1, tokens + 1, -(2**31), 2**31 - 1])
        return plan._replace(offsets=offsets)
    members = plan.members.clone()
    if kind == 2 and tokens > 1:
        members[b, n] = members[b, (n + 1) % tokens]
    else:
        members[b, n] = int(rng.choice([-1, tokens, -(2**31), 2**31 - 1]))
    return plan._replace(members=members)


# --- operators ------------------------------------------------------------------------------------


def fuzz_match(rng: Rng, wild: bool, spoil: bool) -> None:
    """Which tokens merge, into which."""
    dtype = DTYPES[rng.integers(4)]
    batch, heads, tokens, dim = (
        int(rng.integers(4)),
        int(rng.integers(4)),
        count(rng, 90),
        count(rng, 70),
    )
    shape = (batch, heads, tokens, dim) if heads else (batch, tokens, dim)
    metric = tensor_of(rng, shape, dtype, wild)
    prefix = tokens + 2 if one_in(rng, 10) else count(rng, 4)
    r = int(rng.integers(-2, tokens + 3))
    weight = sizes_of(rng, batch, tokens) if one_in(rng, 3) else None
    behind = np.arange(prefix, tokens)
    targets = None
    if one_in(rng, 3):
        targets = torch.from_numpy(behind[rng.random(len(behind)) < 0.4].astype(np.int32))
    given = {
        "metric": metric,
        "r": r,
        "num_prefix_tokens": prefix,
        "weight": weight,
        "targets": targets,
        "size": sizes_of(rng, batch, tokens) if one_in(rng, 3) else None,
        "importance": sizes_of(rng, batch, tokens) if one_in(rng, 4) else None,
        "threshold": float(rng.uniform(-1, 1)) if one_in(rng, 4) else None,
    }
    if spoil:
        spoils = [
            another("metric", lambda x: x[0] if x.dim() == 3 and len(x) else x[None, None]),
            another("metric", lambda x: x.int()),
            another("metric", lambda x: x.new_zeros(2, 0, 5, 3)),
            constant("metric", [[1.0]]),
            constant("num_prefix_tokens", -1),
            constant("r", "3"),
            constant("r", 1.5),
            constant("weight", torch.ones(batch, tokens + 1)),
            constant("weight", torch.ones(batch, tokens).half()),
            constant("weight", torch.ones(tokens)),
            constant("size", torch.ones(batch, tokens + 1)),
            constant("importance", torch.ones(batch, tokens).double()),
            constant("threshold", float("nan")),
            constant("threshold", "high"),
            constant("targets", torch.tensor([tokens], dtype=torch.int32)),
            constant("targets", torch.tensor([-1], dtype=torch.int32)),
            constant("targets", torch.zeros(1, 1, dtype=torch.int32)),
            constant("targets", torch.zeros(0, dtype=torch.int64)),
        ]
        refused(rng, tome.match, given, spoils)
        return
    plan = tome.match(**given)
    free = len(behind)
    most = free // 2 if targets is None else (free - len(targets)) * (len(targets) > 0)
    removed = max(0, min(r, most))
    rows = tokens - removed
    check_plan(plan, rows)
    assign = plan.assign.numpy()
    threshold = given["threshold"]
    if most == 0 or (removed == 0 and threshold is None):
        assert (assign == np.arange(tokens)).all()
        return
    hidden = np.zeros((batch, tokens), bool)
    if weight is not None:
        hidden[:, prefix:] = weight.numpy()[:, prefix:] == 0
    assert np.array_equal(assign < 0, hidden) or targets is not None
    assert (assign[:, :prefix] == np.arange(prefix)).all()
    if wild:
        return
    x = numbers(metric)
    x = x.mean(1) if x.ndim == 4 else x
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    x = np.divide(x, norm, out=np.zeros_like(x), where=norm > 0)
    in_b = (
        np.isin(np.arange(tokens), targets.numpy())
        if targets is not None
        else np.arange(tokens) % 2 == 1
    )
    in_b[:prefix] = False
    in_a = ~in_b
    in_a[:prefix] = False
    # Keys whose heads cancel are all rounding.
    largest = np.abs(numbers(metric)).max(initial=0)
    cancelled = max(1.0, largest / max(norm[norm > 0].min(initial=1), 1e-300))
    slack = 64 * (dim + 8) * sum_roundoff(dtype) * cancelled
    for b in range(batch):
        a, others = np.flatnonzero(in_a & ~hidden[b]), np.flatnonzero(in_b & ~hidden[b])
        if len(a) == 0 or len(others) == 0:
            continue
        score = x[b, a] @ x[b, others].T
        best = score.max(1)
        row_b = assign[b, others]
        merged = np.isin(assign[b, a], row_b)
        limit = min(len(a), len(others)) if targets is None else len(a)
        want = min(removed, limit)
        counted = targets is None or hidden[b].sum() == 0
        if counted and threshold is None:
            assert merged.sum() == want, f"{merged.sum()} merged, not {want}"
        for i in np.flatnonzero(merged):
            taken = score[i][row_b == assign[b, a[i]]].max()
            assert taken >= best[i] - slack, "merged into one that is less similar"
        size, importance = (
            np.ones(tokens) if given[name] is None else numbers(given[name])[b]
            for name in ("size", "importance")
        )
        by_cost = given["size"] is not None or given["importance"] is not None
        if by_cost:
            # The cost is of the pair, which is known where one token is by far the most similar.
            if len(others) > 1:
                second = np.sort(score, axis=1)[:, -2]
                if (best - second <= slack).any():
                    continue
            size_a, size_b = size[a], size[others[score.argmax(1)]]
            both = np.maximum(size_a + size_b, 1e-300)
            factor = size_a * size_b / both * importance[a]
            best, slack_here = -(1 - best) * factor, slack * factor.max(initial=1)
        else:
            slack_here = slack
        if merged.any() and not merged.all():
            assert best[merged].min() >= best[~merged].max() - slack_here, "others come before"
        if counted and threshold is not None:
            least = (threshold - 1) / 2 if by_cost else threshold
            surely, perhaps = ((best >= least + d).sum() for d in (slack_here, -slack_here))
            low, high = (max(want, min(int(near), limit)) for near in (surely, perhaps))
            assert low <= merged.sum() <= high, f"{merged.sum()} merged, not {low} to {high}"


def fuzz_select(rng: Rng, wild: bool, spoil: bool) -> None:
    """The tokens of the highest scores."""
    batch, tokens = int(rng.integers(4)), count(rng, 90)
    dtype = torch.float64 if one_in(rng, 2) else torch.float32
    scores = tensor_of(rng, (batch, tokens), dtype, wild)
    prefix = tokens + 2 if one_in(rng, 10) else count(rng, 4)
    given = {
        "scores": scores,
        "keep": count(rng, 95),
        "num_prefix_tokens": prefix,
        "fuse": one_in(rng, 2),
    }
    if spoil:
        spoils = [
            another("scores", lambda x: x[None]),
            another("scores", lambda x: x.half()),
            constant("keep", -1),
            constant("keep", "all"),
            constant("num_prefix_tokens", -1),
        ]
        refused(rng, tome.select, given, spoils)
        return
    plan = tome.select(**given)
    prefix = min(prefix, tokens)
    kept = prefix + min(given["keep"], tokens - prefix)
    fused = given["fuse"] and kept < tokens
    check_plan(plan, kept + fused)
    for b, row in enumerate(numbers(scores)):
        behind = row[prefix:]
        order = np.lexsort(
            (np.arange(len(behind)), np.where(np.isnan(behind), 0, -behind), np.isnan(behind))
        )
        stays = np.zeros(tokens, bool)
        stays[:prefix] = True
        stays[prefix + order[: kept - prefix]] = True
        want = np.where(stays, np.cumsum(stays) - 1, kept if fused else -1)
        assert np.array_equal(plan.assign[b].numpy(), want)


def merged_rows(
    x: Array, size: Array | None, plan: MergePlan, reduce: str, dtype: torch.dtype
) -> tuple[Array, Array, Array]:
    """Rows, how far each may be off, and sizes."""
    batch, tokens, channels = x.shape
    rows = plan.num_output_tokens
    out, allowed = np.zeros((batch, rows, channels)), np.zeros((batch, rows, channels))
    totals = np.zeros((batch, rows))
    size = np.ones((batch, tokens)) if size is None else size
    assign = plan.assign.numpy()
    for b in range(batch):
        for m in range(rows):
            members = np.flatnonzero(assign[b] == m)
            totals[b, m] = size[b, members].sum()
            if len(members) == 0:
                continue
            group, weight = x[b, members], size[b, members, None]
            if reduce == "amax":
                out[b, m] = group.max(0)
                continue
            even = reduce == "mean" and (len(members) == 1 or totals[b, m] == 0)
            weight = np.ones_like(weight) if even else weight
            divisor = weight.sum() if reduce == "mean" else 1.0
            out[b, m] = (weight * group).sum(0) / divisor
            terms = (weight * np.abs(group)).sum(0) / divisor
            allowed[b, m] = (
                1.01 * roundoff(dtype) * np.abs(out[b, m])
                + (len(members) + 4) * sum_roundoff(dtype) * terms
                + least(dtype)
            )
    return out, allowed, totals


def plan_spoils(rng: Rng, given: Arguments) -> list[Spoil]:
    """What is wrong with a plan, in arguments that have a ``self``."""
    plan = given["self"]
    spoils = [
        constant("self", plan._replace(members=plan.members.long(), assign=plan.assign.long())),
        constant(
            "self", MergePlan(wider(plan.assign, 0), wider(plan.members, 0), wider(plan.offsets, 0))
        ),
    ]
    bad = spoiled_plan(rng, plan)
    return spoils if bad is None else [*spoils, constant("self", bad), constant("self", bad)]


def fuzz_merge(rng: Rng, wild: bool, spoil: bool) -> None:
    """Rows of tokens, their gradient, and back."""
    dtype = DTYPES[rng.integers(4)]
    batch, tokens, rows, channels = (
        int(rng.integers(4)),
        count(rng, 60),
        count(rng, 60),
        count(rng, 200),
    )
    plan = plan_of(rng, batch, tokens, rows)
    x = tensor_of(rng, (batch, tokens, channels), dtype, wild)
    size = sizes_of(rng, batch, tokens)
    reduce = ("mean", "sum", "amax")[rng.integers(3)]
    given = {"self": plan, "x": x, "size": size, "reduce": reduce}
    if spoil:
        spoils = plan_spoils(rng, given) + [
            another("x", lambda x: x.int()),
            another("x", lambda x: x[..., 0] if x.shape[-1] else x[None]),
            another("x", lambda x: wider(x, 1)),
            constant("size", torch.ones(batch, tokens + 1)),
            constant("size", torch.ones(batch, tokens, 2)),
            constant("reduce", "max"),
            constant("reduce", None),
            constant("x", None),
        ]
        refused(rng, MergePlan.merge, given, spoils)
        return
    leaf = x.detach().clone().requires_grad_(reduce != "amax" and one_in(rng, 2))
    out, out_size = plan.merge(leaf if leaf.requires_grad else x, size, reduce)
    assert (out.dtype, out_size.dtype) == (dtype, torch.float32)
    if wild:
        return
    weights = None if size is None else numbers(size)
    want, allowed, totals = merged_rows(numbers(x), weights, plan, reduce, dtype)
    near(out, want, allowed, f"merge by {reduce}")
    near(out_size, totals, 0.0, "sizes")
    if leaf.requires_grad:
        grad = laid_out(rng, values(rng, (batch, rows, channels), False), dtype)
        (got,) = torch.autograd.grad(out, leaf, grad)
        unit = numbers(torch.ones(batch, tokens))
        weights = unit if weights is None else weights
        back, rounding = np.zeros(x.shape), np.zeros(x.shape)
        for b, n in np.ndindex(batch, tokens):
            m = plan.assign[b, n].item()
            if m < 0:
                continue
            members = np.flatnonzero(plan.assign[b].numpy() == m)
            share = weights[b, n]
            if reduce == "mean":
                total = weights[b, members].sum()
                share = 1 / len(members) if len(members) == 1 or total == 0 else share / total
            back[b, n] = share * numbers(grad)[b, m]
            rounding[b, n] = np.abs(back[b, n]) * (roundoff(dtype) + 4 * sum_roundoff(dtype)) * 1.01
        near(got, back, rounding + least(dtype), "gradient of merge")


def stretched(
    x: Array, size: Array | None, plan: MergePlan, rows: Array, allowed: Array, dtype: torch.dtype
) -> tuple[Array, Array]:
    """Rows that keep the norms of their tokens x, and how far each may be off."""
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    length, _, _ = merged_rows(lengths, size, plan, "mean", torch.float64)
    own, error = (np.linalg.norm(each, axis=-1, keepdims=True) for each in (rows, allowed))
    several = (np.diff(plan.offsets.numpy(), axis=1) > 1)[..., None]
    factor = np.where(several & (own > 0), length / np.where(own > 0, own, 1), 1)
    terms = x.shape[1] + x.shape[2] / 4 + 16
    relative = terms * sum_roundoff(dtype) + 2 * error / np.where(own > 0, own, 1)
    rows = rows * factor
    off = factor * allowed + np.abs(rows) * np.where(several, relative + roundoff(dtype), 0)
    # Of a mean that is next to nothing, its rounding may be all that there is.
    vague = several & (4 * error >= own)
    return rows, np.where(vague, np.inf, off)


def fuzz_merge_add_norm(rng: Rng, wild: bool, spoil: bool) -> None:
    """The sum of a block, merged and normalised."""
    dtype = DTYPES[rng.integers(4)]
    batch, tokens, rows, channels = (
        int(rng.integers(4)),
        count(rng, 40),
        count(rng, 40),
        count(rng, 200),
    )
    plan = plan_of(rng, batch, tokens, rows)
    shape = (batch, tokens, channels)
    x, branch = tensor_of(rng, shape, dtype, wild), tensor_of(rng, shape, dtype, wild)
    size = sizes_of(rng, batch, tokens)
    scale, weight, bias = (
        tensor_of(rng, (channels,), dtype, wild) if one_in(rng, 2) else None for _ in range(3)
    )
    given = {"self": plan, "x": x, "branch": branch, "size": size, "scale": scale, "weight": weight}
    given |= {"bias": bias, "eps": float(rng.choice([1e-6, 1e-5, 1.0]))}
    given["keep_norms"] = one_in(rng, 2)
    if spoil:
        spoils = plan_spoils(rng, given) + [
            another("x", lambda x: x.int()),
            another("branch", lambda x: x.double() if x.dtype != torch.float64 else x.float()),
            another("branch", lambda x: wider(x, 2)),
            constant("scale", torch.ones(channels + 1, dtype=dtype)),
            constant("weight", torch.ones(1, channels, dtype=dtype)),
            constant("bias", torch.ones(channels, dtype=torch.int32)),
            constant("eps", -1.0),
            constant("eps", "small"),
            constant("size", torch.ones(batch + 1, tokens)),
        ]
        refused(rng, MergePlan.merge_add_norm, given, spoils)
        return
    out, out_size, normed = MergePlan.merge_add_norm(**given)
    if wild:
        return
    factor = np.ones(channels) if scale is None else numbers(scale)
    added = numbers(branch) * factor
    weights = None if size is None else numbers(size)
    want, allowed, totals = merged_rows(numbers(x) + added, weights, plan, "mean", dtype)
    magnitude, _, _ = merged_rows(np.abs(numbers(x)) + np.abs(added), weights, plan, "mean", dtype)
    allowed += (tokens + 6) * sum_roundoff(dtype) * magnitude
    if given["keep_norms"]:
        want, allowed = stretched(numbers(x) + added, weights, plan, want, allowed, dtype)
    near(out, want, allowed, "merge_add_norm")
    near(out_size, totals, 0.0, "sizes")
    if channels == 0:
        return
    finite = out.isfinite().all(-1)  # where the sum overflows, the norm is NaN
    stored, normed, unit = numbers(out[finite]), normed[finite], sum_roundoff(dtype)
    chain = channels / 4 + 16
    centred = stored - stored.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + given["eps"])
    mean_error = chain * unit * np.abs(stored).mean(-1, keepdims=True)
    scale_error = chain * unit + (mean_error * inverse) ** 2 / 2
    gain = np.ones(channels) if weight is None else numbers(weight)
    shift = np.zeros(channels) if bias is None else numbers(bias)
    norm = centred * inverse * gain + shift
    allowed = (
        inverse
        * np.abs(gain)
        * (mean_error + (np.abs(centred) + mean_error) * (scale_error + 6 * unit))
    )
    allowed += 2 * unit * np.abs(shift) + (roundoff(dtype) + unit) * np.abs(norm) + least(dtype)
    near(normed, norm, allowed, "norm")


def fuzz_unmerge(rng: Rng, wild: bool, spoil: bool) -> None:
    """Rows copied back, and two plans as one."""
    dtype = DTYPES[rng.integers(4)]
    batch, tokens, rows, channels = (
        int(rng.integers(4)),
        count(rng, 60),
        count(rng, 60),
        count(rng, 100),
    )
    plan = plan_of(rng, batch, tokens, rows)
    x = tensor_of(rng, (batch, rows, channels), dtype, wild)
    if spoil:
        spoils: list[Spoil] = [
            another("x", lambda x: x.int()),
            another("x", lambda x: x[..., 0] if x.shape[-1] else x[None]),
            another("x", lambda x: wider(x, 0)),
            another("self", lambda plan: plan._replace(assign=plan.assign.long())),
        ]
        if batch and tokens:
            wrong = int(rng.choice([-2, rows, 2**31 - 1, -(2**31)]))
            spoils.append(
                another(
                    "self", lambda plan: plan._replace(assign=torch.full_like(plan.assign, wrong))
                )
            )
            bad = torch.full((batch, tokens), wrong, dtype=torch.int32)
            refused(
                rng,
                MergePlan.from_assign,
                {"assign": bad, "num_output_tokens": rows},
                [lambda x: x],
            )
        refused(rng, MergePlan.unmerge, {"self": plan, "x": x}, spoils)
        return
    assign = plan.assign.numpy()
    want = np.zeros((batch, tokens, channels))
    for b, n in zip(*np.nonzero(assign >= 0), strict=True):
        want[b, n] = numbers(x)[b, assign[b, n]]
    got = numbers(plan.unmerge(x))
    assert np.array_equal(got, want, equal_nan=True), "unmerge"
    following = plan_of(rng, batch, rows, count(rng, 30))
    both = plan.then(following)
    check_plan(both, following.num_output_tokens)
    for b in range(batch):
        to = np.append(following.assign[b].numpy(), -1)
        assert np.array_equal(both.assign[b].numpy(), to[assign[b]]), "then"


def softmax(q: Array, k: Array, size: Array | None, scale: float) -> tuple[Array, Array]:
    """Weights (B, H, M, N), and of the largest logit what rounding works on (B, H, M, 1)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_size = np.zeros(k.shape[:1] + k.shape[2:3]) if size is None else np.log(size)
        log_size = log_size[:, None, None]
        logits = scale * q @ k.swapaxes(-1, -2) + log_size
        terms = abs(scale) * np.abs(q) @ np.abs(k).swapaxes(-1, -2) + np.abs(log_size)
        top = logits.max(-1, keepdims=True, initial=-np.inf)
        weights = np.where(
            np.isneginf(logits), 0.0, np.exp(logits - np.where(np.isneginf(top), 0.0, top))
        )
        total = weights.sum(-1, keepdims=True)
        weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    largest = np.where(np.isinf(log_size), 0.0, terms).max(-1, keepdims=True, initial=0.0)
    return weights, largest


def fuzz_attention(rng: Rng, wild: bool, spoil: bool) -> None:
    """Attention with sizes, its gradients, and the class token's scores."""
    dtype = DTYPES[rng.integers(4)]
    batch, heads = int(rng.integers(4)), int(rng.integers(1, 4))
    queries, keys, dim = count(rng, 70), count(rng, 70), count(rng, 70)
    q = tensor_of(rng, (batch, heads, queries, dim), dtype, wild)
    k, v = (tensor_of(rng, (batch, heads, keys, dim), dtype, wild) for _ in range(2))
    size = sizes_of(rng, batch, keys)
    scale = None if one_in(rng, 2) else float(rng.normal())
    given = {"q": q, "k": k, "v": v, "size": size, "scale": scale}
    scores_of = one_in(rng, 3)
    if scores_of:
        del given["v"]
    call = tome.cls_attention if scores_of else tome.proportional_attention
    if spoil:
        spoils = [
            another("k", lambda x: x.double() if x.dtype != torch.float64 else x.float()),
            constant("size", torch.ones(batch, keys + 1)),
            constant("size", torch.ones(batch, keys, dtype=torch.int32)),
            constant("size", torch.ones(keys)),
            constant("scale", "large"),
        ]
        if (
            scores_of or min(batch, queries, keys, dim) > 0
        ):  # stock attention looks at no empty ones
            spoils.append(another("k", lambda x: wider(x, 3)))
            if heads > 1:  # and broadcasts one head
                spoils.append(another("k", lambda x: wider(x, 1)))
        refused(rng, call, given, spoils)
        return
    factor = max(1, dim) ** -0.5 if scale is None else scale
    unit = sum_roundoff(dtype)
    if scores_of:
        if queries == 0:
            refused(rng, call, given, [lambda x: x])
            return
        scores = call(**given)
        if wild:
            return
        sizes = None if size is None else numbers(size)
        p, largest = softmax(numbers(q)[:, :, :1], numbers(k), sizes, factor)
        logit = (dim + 8) * unit * largest
        error = (p * (2 * logit + (keys + heads + 16) * unit)).mean(1)[:, 0]
        near(scores, p.mean(1)[:, 0], error + 1e-37, "cls_attention")
        return
    live = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with_grad = one_in(rng, 3)
    out = call(*live, size, scale=scale) if with_grad else call(**given)
    assert out.dtype == dtype
    if wild:
        return
    sizes = None if size is None else numbers(size)
    p, largest = softmax(numbers(q), numbers(k), sizes, factor)
    logit = (dim + 8) * unit * largest
    each = roundoff(dtype) + 2 * logit + (keys + 8) * unit
    low = 2.0**-25 if dtype == torch.float16 else 0.0
    want, spread = p @ numbers(v), p @ np.abs(numbers(v))
    top = p.max(-1, keepdims=True, initial=0.0)
    lost = low * top * np.abs(numbers(v)).sum(2, keepdims=True)
    near(
        out, want, spread * each + lost + roundoff(dtype) * np.abs(want) + 1e-30 + low, "attention"
    )
    # Gradients, where rounding does not yet decide: not of half formats and enormous logits.
    if not with_grad or dtype in (torch.float16, torch.bfloat16) or largest.max(initial=0) > 1e4:
        return
    grad = values(rng, (batch, heads, queries, dim), False)
    got = torch.autograd.grad(out, live, torch.from_numpy(grad).to(dtype))
    grad = numbers(torch.from_numpy(grad).to(dtype))
    grad_p = grad @ numbers(v).swapaxes(-1, -2)
    size_p = np.abs(grad) @ np.abs(numbers(v)).swapaxes(-1, -2)
    score = factor * p * (grad_p - (p * grad_p).sum(-1, keepdims=True))
    score_size = abs(factor) * p * (size_p + (p * size_p).sum(-1, keepdims=True))
    each = 4 * logit.max(initial=0) + 4 * (keys + queries + dim + 16) * unit
    wanted = (score @ numbers(k), score.swapaxes(-1, -2) @ numbers(q), p.swapaxes(-1, -2) @ grad)
    spreads = (
        score_size @ np.abs(numbers(k)),
        score_size.swapaxes(-1, -2) @ np.abs(numbers(q)),
        p.swapaxes(-1, -2) @ np.abs(grad),
    )
    for name, result, want, spread in zip("qkv", got, wanted, spreads, strict=True):
        near(
            result,
            want,
            each * spread + roundoff(dtype) * np.abs(want) + 1e-30,
            f"gradient of {name}",
        )


OPERATORS = (fuzz_match, fuzz_select, fuzz_merge, fuzz_merge_add_norm, fuzz_unmerge, fuzz_attention)


# --- running --------------------------------------------------------------------------------------


def run_case(seed: int) -> str:
    """Run one case; returns what it was of."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(int(rng.integers(1, 4)))
    operator = OPERATORS[rng.integers(len(OPERATORS))]
    spoil = one_in(rng, 4)
    operator(rng, one_in(rng, 3), spoil)
    return operator.__name__.removeprefix("fuzz_") + (" refused" if spoil else "")


def work(first: int, cases: int, place: Path) -> int:
    """Run cases, writing down which one runs."""
    done: Counter[str] = Counter()
    handle = os.open(place, os.O_WRONLY | os.O_CREAT)
    for seed in range(first, first + cases):
        os.pwrite(handle, b"%-20d" % seed, 0)
        done[run_case(seed)] += 1
    shown = ", ".join(f"{number} of {name}" for name, number in sorted(done.items()))
    print(f"{cases} cases: {shown}", flush=True)
    return 0


def main() -> int:
    """Run everything, one process for each instruction set; 1 if one fails or dies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases",
        type=int,
        default=15_000,
        metavar="N",
        help="of each instruction set (default: 15000, 15 seconds)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default: 0)")
    parser.add_argument("--case", type=int, metavar="SEED", help="run this case alone, here")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        return work(given.seed, given.cases, given.worker)
    if given.case is not None:
        print(run_case(given.case))
        return 0
    with TemporaryDirectory() as folder:
        for i, isa in enumerate(INSTRUCTION_SETS):
            place = Path(folder, isa)
            first = given.seed + i * 10**9
            command = [sys.executable, "-X", "faulthandler", __file__, "--worker", str(place)]
            command += ["--seed", str(first), "--cases", str(given.cases)]
            print(f"{isa}: ", end="", flush=True)
            code = subprocess.run(command, env={**os.environ, "TOME_ISA": isa}).returncode
            if code != 0:
                seed = place.read_text().strip() if place.exists() else "none yet"
                how = f"died of {signal.Signals(-code).name}" if code < 0 else "failed"
                print(f"{how} at case {seed}: TOME_ISA={isa} python {__file__} --case {seed}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
