"""The drop-in matching functions against their published meanings, worked out independently."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tome_ext
from tome_ext.matching import (
    Merge,
    bipartite_soft_matching,
    do_nothing,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)


def random_metric(batch: int = 2, tokens: int = 12, channels: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))


def members(merge: Merge, image: int) -> list[list[int]]:
    """Which tokens make each row, seen from outside: by merging one-hot vectors."""
    batch, tokens = merge.plan.assign.shape
    rows = merge(torch.eye(tokens).repeat(batch, 1, 1), mode="amax")[image]
    return [row.nonzero().flatten().tolist() for row in rows]


def nearest(metric: Tensor, token: int, targets: list[int]) -> int:
    scores = torch.cosine_similarity(metric[token].double(), metric[targets].double(), dim=-1)
    return targets[int(scores.argmax())]


@pytest.mark.parametrize(
    ("class_token", "distill_token"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("tokens", [12, 13])
def test_bipartite_merges_the_most_similar_pairs(
    class_token: bool, distill_token: bool, tokens: int
) -> None:
    metric, r = random_metric(tokens=tokens), 3
    merge, _ = bipartite_soft_matching(metric, r, class_token, distill_token)
    prefix = class_token + distill_token
    for image in range(metric.shape[0]):
        evens = [n for n in range(tokens) if n % 2 == 0 and n >= prefix]
        odds = [n for n in range(tokens) if n % 2 == 1 and n >= prefix]
        unit = torch.nn.functional.normalize(metric[image].double(), dim=-1)
        best = {a: float((unit[a] @ unit[odds].T).max()) for a in evens}
        gone = sorted(evens, key=lambda a: -best[a])[:r]
        groups = {n: [n] for n in [*range(prefix), *[a for a in evens if a not in gone], *odds]}
        for a in gone:
            groups[nearest(metric[image], a, odds)].append(a)
        assert members(merge, image) == [sorted(g) for g in groups.values()]


def test_bipartite_is_the_plan_of_match() -> None:
    metric = random_metric(tokens=15)
    merge, unmerge = bipartite_soft_matching(metric, 4, class_token=True)
    for mine, theirs in zip(merge.plan, tome_ext.match(metric, 4, 1), strict=True):
        assert torch.equal(mine, theirs)
    assert unmerge.plan is merge.plan


def test_metric_may_have_heads() -> None:
    metric = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(1))
    for matching, argument in ((bipartite_soft_matching, 3), (kth_bipartite_soft_matching, 3)):
        heads, mean = matching(metric, argument)[0], matching(metric.mean(1), argument)[0]
        assert torch.equal(heads.plan.assign, mean.plan.assign)


@pytest.mark.parametrize(("tokens", "k"), [(12, 2), (12, 3), (13, 3), (14, 3), (5, 5), (4, 2)])
def test_kth_keeps_every_kth_token(tokens: int, k: int) -> None:
    metric = random_metric(tokens=tokens)
    merge, unmerge = kth_bipartite_soft_matching(metric, k)
    x = torch.randn(2, tokens, 4)
    assert merge(x).shape == (2, tokens // k, 4)
    assert unmerge(merge(x)).shape == x.shape
    for image in range(2):
        kept = list(range(k - 1, tokens, k))
        groups = {n: [n] for n in kept}
        for n in set(range(tokens)) - set(kept):
            groups[nearest(metric[image], n, kept)].append(n)
        assert members(merge, image) == [sorted(groups[n]) for n in kept]


@pytest.mark.parametrize("r", [1, 5, 11])
def test_random_merges_what_it_draws_into_the_nearest_of_the_rest(r: int) -> None:
    metric = random_metric(batch=4)
    merge, _ = random_bipartite_soft_matching(metric, r, torch.Generator().manual_seed(3))
    drawn = torch.rand(4, 12, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :r]
    for image in range(4):
        gone = drawn[image].tolist()
        groups = {n: [n] for n in range(12) if n not in gone}
        for n in gone:
            groups[nearest(metric[image], n, list(groups))].append(n)
        assert members(merge, image) == [sorted(g) for g in groups.values()]


def test_random_draws_anew_and_repeats_with_a_generator() -> None:
    metric = random_metric(batch=1, tokens=64)
    first, second = (random_bipartite_soft_matching(metric, 20)[0].plan.assign for _ in range(2))
    assert not torch.equal(first, second)
    first, second = (
        random_bipartite_soft_matching(metric, 20, torch.Generator().manual_seed(7))[0].plan.assign
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_random_leaves_one_token_at_least() -> None:
    merge, _ = random_bipartite_soft_matching(random_metric(tokens=6), 100)
    assert members(merge, 0) == [list(range(6))]


@pytest.mark.parametrize(
    ("matching", "argument"),
    [
        (bipartite_soft_matching, 0),
        (bipartite_soft_matching, -3),
        (kth_bipartite_soft_matching, 1),
        (kth_bipartite_soft_matching, 0),
        (kth_bipartite_soft_matching, 13),
        (random_bipartite_soft_matching, 0),
        (random_bipartite_soft_matching, -1),
    ],
)
def test_nothing_to_merge_is_the_identity(matching: Any, argument: int) -> None:
    merge, unmerge = matching(random_metric(), argument)
    assert merge is do_nothing
    assert unmerge is do_nothing
    x = torch.randn(2, 12, 4)
    assert merge(x, mode="sum") is x
    assert unmerge(x) is x
    merged, size = merge_wavg(merge, x)
    assert torch.equal(merged, x)
    assert torch.equal(size, torch.ones(2, 12, 1))
    sizes = torch.rand(2, 12, 1)
    assert merge_wavg(merge, x, sizes)[1] is sizes
    assert torch.equal(merge_source(merge, x), torch.eye(12).repeat(2, 1, 1))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.uint8,
        torch.bool,
    ],
)
@pytest.mark.parametrize("mode", ["mean", "sum", "prod", "amax", "amin"])
def test_merge_modes_and_unmerge(mode: str, dtype: torch.dtype) -> None:
    merge, unmerge = bipartite_soft_matching(random_metric(), 4, class_token=True)
    x = torch.randn(2, 12, 5).mul(3).to(dtype)
    if dtype == torch.uint8:
        x = torch.randint(200, 256, x.shape).to(dtype)  # sums are beyond it
    if (mode, dtype) == ("mean", torch.bool):
        with pytest.raises(ValueError, match=r"mode: expected one .*got 'mean' of .* bool"):
            merge(x, mode=mode)
        return
    merged = merge(x, mode=mode)
    back = unmerge(merged)
    assert merged.dtype == back.dtype == dtype
    for image in range(2):
        for row, tokens in enumerate(members(merge, image)):
            group = x[image, tokens]
            if mode == "mean":
                total = group.sum(0)
                want = total / len(tokens) if dtype.is_floating_point else total // len(tokens)
            else:
                want = getattr(group, mode)(0)
            torch.testing.assert_close(merged[image, row], want.to(dtype))
            assert torch.equal(back[image, tokens], merged[image, row].expand(len(tokens), -1))


@pytest.mark.parametrize("mode", ["prod", "amin"])
def test_gradient_of_modes_without_an_operator(mode: str) -> None:
    merge, _ = bipartite_soft_matching(random_metric(), 4, class_token=True)
    x = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: merge(x, mode=mode), x)


@pytest.mark.parametrize(
    "matching",
    [bipartite_soft_matching, kth_bipartite_soft_matching, random_bipartite_soft_matching],
)
def test_plan_of_one_image_serves_a_batch(matching: Any) -> None:
    merge, unmerge = matching(random_metric(batch=1), 4)
    x, size = torch.randn(3, 12, 5), torch.rand(3, 12, 1) + 1
    merged, total = merge_wavg(merge, x, size)
    shared = merge_wavg(merge, x, size[:1])
    source = merge_source(merge, x)
    back, ints = unmerge(merged), unmerge(merge((9 * x).long(), mode="amin"))
    for image in range(3):
        one = slice(image, image + 1)
        alone = merge_wavg(merge, x[one], size[one])
        assert torch.equal(merged[one], alone[0])
        assert torch.equal(total[one], alone[1])
        assert torch.equal(shared[0][one], merge_wavg(merge, x[one], size[:1])[0])
        assert torch.equal(source[one], merge_source(merge, x[one]))
        assert torch.equal(back[one], unmerge(alone[0]))
        assert torch.equal(ints[one], unmerge(merge((9 * x[one]).long(), mode="amin")))


INTEGERS = [np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor(3, dtype=torch.int32)]


@pytest.mark.parametrize("number", INTEGERS)
@pytest.mark.parametrize(
    "matching",
    [bipartite_soft_matching, kth_bipartite_soft_matching, random_bipartite_soft_matching],
)
def test_integers_of_any_kind(matching: Any, number: Any) -> None:
    metric = random_metric()
    torch.manual_seed(1)
    merge, _ = matching(metric, number)
    torch.manual_seed(1)
    assert torch.equal(merge.plan.assign, matching(metric, 3)[0].plan.assign)


def test_wavg_weighs_with_sizes_over_several_merges() -> None:
    """Two merges in turn, by sizes, are the plain average over the original tokens."""
    x = torch.randn(2, 16, 5)
    first, _ = bipartite_soft_matching(random_metric(tokens=16), 5)
    once, size = merge_wavg(first, x)
    assert size.shape == (2, 11, 1)
    assert size.dtype == torch.float32
    second, _ = bipartite_soft_matching(random_metric(tokens=11, seed=1), 4)
    twice, size = merge_wavg(second, once, size)
    source = merge_source(second, once, merge_source(first, x))
    assert source.shape == (2, 7, 16)
    assert torch.equal(source.sum(1), torch.ones(2, 16))
    assert torch.equal(source.sum(2, keepdim=True), size)
    torch.testing.assert_close(twice, source @ x / size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_wavg_keeps_the_dtype_of_tokens_and_of_sizes(dtype: torch.dtype) -> None:
    merge, _ = bipartite_soft_matching(random_metric(tokens=16), 5)
    x = torch.randn(2, 16, 5).to(dtype)
    merged, size = merge_wavg(merge, x)
    assert merged.dtype == size.dtype == dtype
    again, _ = bipartite_soft_matching(random_metric(tokens=11), 3)
    twice, sizes = merge_wavg(again, merged, size)
    assert twice.dtype == sizes.dtype == dtype
    wide = merge_wavg(again, merged, size.float())
    assert wide[1].dtype == torch.float32
    assert torch.equal(wide[0], twice)


def test_tokens_of_integers_are_averaged_as_floats() -> None:
    merge, _ = bipartite_soft_matching(random_metric(), 4)
    x = torch.randint(0, 9, (2, 12, 3))
    merged, size = merge_wavg(merge, x)
    want, sizes = merge_wavg(merge, x.float())
    assert size.dtype == torch.int64
    assert torch.equal(size.float(), sizes)
    torch.testing.assert_close(merged, want)


def test_merging_of_other_code() -> None:
    """Wrapped merges, or ones that another library made."""
    merge, _ = bipartite_soft_matching(random_metric(), 4)
    x, size = torch.randn(2, 12, 3), torch.rand(2, 12, 1) + 1

    def other(x: Tensor, mode: str = "mean") -> Tensor:
        return merge(x, mode)

    for given in (None, size):
        for got, want in zip(merge_wavg(other, x, given), merge_wavg(merge, x, given), strict=True):
            torch.testing.assert_close(got, want)
    assert torch.equal(merge_source(other, x), merge_source(merge, x))
    source = merge_source(merge, x)
    then, _ = bipartite_soft_matching(random_metric(tokens=8), 2)
    assert torch.equal(merge_source(then, merge(x), source.long()), merge_source(
        then, merge(x), source).long())  # fmt: skip


def test_gradient_reaches_every_token_but_not_the_metric() -> None:
    metric = random_metric().requires_grad_()
    x = torch.randn(2, 12, 4, requires_grad=True)
    for merge, _ in (
        bipartite_soft_matching(metric, 4),
        kth_bipartite_soft_matching(metric, 3),
        random_bipartite_soft_matching(metric, 4),
    ):
        (grad,) = torch.autograd.grad(merge(x, mode="sum").sum(), x)
        assert torch.equal(grad, torch.ones_like(x))
    assert metric.grad is None


def test_signatures_are_the_published_ones() -> None:
    def parameters(function: Any) -> list[tuple[str, Any]]:
        values = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in values]

    no = inspect.Parameter.empty
    assert parameters(bipartite_soft_matching) == [
        ("metric", no), ("r", no), ("class_token", False), ("distill_token", False)
    ]  # fmt: skip
    assert parameters(kth_bipartite_soft_matching) == [("metric", no), ("k", no)]
    assert parameters(random_bipartite_soft_matching)[:2] == [("metric", no), ("r", no)]
    assert parameters(merge_wavg) == [("merge", no), ("x", no), ("size", None)]
    assert parameters(merge_source) == [("merge", no), ("x", no), ("source", None)]


def test_merge_can_be_copied_and_does_not_change() -> None:
    merge, _ = bipartite_soft_matching(random_metric(), 4)
    assert torch.equal(copy.deepcopy(merge).plan.assign, merge.plan.assign)
    with pytest.raises(AttributeError):
        merge.plan = merge.plan  # type: ignore[misc]


@pytest.mark.parametrize(
    "matching",
    [bipartite_soft_matching, kth_bipartite_soft_matching, random_bipartite_soft_matching],
)
def test_bad_metric_or_number(matching: Any) -> None:
    with pytest.raises(ValueError, match=r"metric: expected \(B, N, D\).*got \(12, 8\) float32"):
        matching(torch.randn(12, 8), 2)
    with pytest.raises(ValueError, match=r"metric: expected .* floating point, got .* int64"):
        matching(torch.zeros(2, 12, 8, dtype=torch.int64), 2)
    for value in (2.0, "2", True, np.float32(2), torch.tensor(2.0), torch.tensor(True), None):
        with pytest.raises(ValueError, match="expected an integer, got"):
            matching(random_metric(), value)


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="distill_token: expected class_token=True"):
        bipartite_soft_matching(random_metric(), 2, distill_token=True)
    merge, unmerge = bipartite_soft_matching(random_metric(), 2)
    with pytest.raises(ValueError, match=r"size: expected \(B, N, 1\), got \(2, 12\)"):
        merge_wavg(merge, torch.randn(2, 12, 4), torch.ones(2, 12))
    for call in (merge, lambda x: merge_wavg(merge, x), lambda x: merge_source(merge, x)):
        for shape in ((2, 11, 4), (3, 12, 4), (1, 12, 4), (2, 12), (2, 1, 12, 4)):
            with pytest.raises(ValueError, match=r"x: expected \(B, N, C\) with B = 2 and N = 12"):
                call(torch.randn(shape))
    with pytest.raises(ValueError, match=r"x: expected \(B, M, C\) with B = 2 and M = 10 as in"):
        unmerge(torch.randn(2, 12, 4))
    with pytest.raises(ValueError, match=r"size: expected \(B, N, 1\) = \(2, 12, 1\) on cpu"):
        merge_wavg(merge, torch.randn(2, 12, 4), torch.ones(2, 11, 1))
    with pytest.raises(ValueError, match=r"mode: expected one of .*got 'median'"):
        merge(torch.randn(2, 12, 4), "median")
    one, _ = bipartite_soft_matching(random_metric(batch=1), 2)
    with pytest.raises(ValueError, match=r"with N = 12 as in the plan, got \(5, 10, 4\)"):
        one(torch.randn(5, 10, 4))
