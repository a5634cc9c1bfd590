"""tome::match and tome::plan against loops, the pure-torch twin, and their stated rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import FLOATS, check_plan, match_plan

import tome_ext
from tome_ext import reference

# (batch, heads, tokens, dim, r, prefix)
SHAPES = [
    (2, 3, 197, 64, 16, 1),
    (1, 1, 198, 64, 8, 2),
    (3, 2, 64, 17, 100, 0),
    (2, 1, 51, 5, 7, 5),
    (1, 4, 257, 96, 20, 1),
    (4, 1, 12, 3, 2, 3),
]


def keys_without_near_ties(batch, heads, tokens, dim, r, prefix, dtype):
    """The key view (B, H, N, D) of a packed qkv tensor, and its plan by loops in float64."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        packed = torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype)
        metric = packed.permute(2, 0, 3, 1, 4)[1]
        expected, gap = match_plan(metric, r, prefix)
        if gap > 1e-6:
            return metric, expected
    raise AssertionError("no data free of near ties: is the oracle broken?")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_loops_and_twin(shape, dtype):
    _batch, _heads, tokens, _dim, r, prefix = shape
    metric, expected = keys_without_near_ties(*shape, dtype)
    plan = tome_ext.match(metric, r, prefix)
    assert plan.assign.tolist() == expected
    check_plan(*plan, tokens, plan.num_output_tokens)
    for ours, twin in zip(plan, reference.match(metric, r, prefix), strict=True):
        assert torch.equal(ours, twin)


@given(
    tokens=st.integers(1, 50),
    r=st.integers(-1, 20),
    prefix=st.integers(0, 4),
    threshold=st.sampled_from([-3.0, 0.0, 0.3, 0.6, 0.9, 2.0]),
    given=st.sampled_from([(), ("size",), ("size", "importance")]),
    hides=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_pairs_as_near_as_the_threshold_merge_too(tokens, r, prefix, threshold, given, hides, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(3, tokens, 6, generator=generator, dtype=torch.float64)
    tables = {name: torch.rand(3, tokens, generator=generator) + 0.5 for name in given}
    weight = (torch.rand(3, tokens, generator=generator) < 0.8).float() if hides else None
    plan = tome_ext.match(metric, r, prefix, weight=weight, threshold=threshold, **tables)
    for ours, twin in zip(
        plan,
        reference.match(metric, r, prefix, weight=weight, threshold=threshold, **tables),
        strict=True,
    ):
        assert torch.equal(ours, twin)
    # Of each image by itself: what match does for the number of pairs that are so near.
    rows = torch.nn.functional.normalize(metric, dim=2)
    for image in range(3):
        seen = [n for n in range(prefix, tokens) if weight is None or weight[image, n] != 0]
        a, b = ([n for n in seen if n % 2 == side] for side in (0, 1))
        near = 0
        for i in a if b else ():
            scores = rows[image, b] @ rows[image, i]
            best, j = scores.max(), b[int(scores.argmax())]
            if tables:
                of = {name: table[image] for name, table in tables.items()}
                both = of["size"][i] * of["size"][j] / (of["size"][i] + of["size"][j])
                cost = (1 - best) * both * (of["importance"][i] if "importance" in of else 1)
                near += bool(cost <= (1 - threshold) / 2)
            else:
                near += bool(best >= threshold)
        most = max(r, min(near, len(a), len(b)))
        alone = {name: table[image : image + 1] for name, table in tables.items()}
        hidden = None if weight is None else weight[image : image + 1]
        want = tome_ext.match(metric[image : image + 1], most, prefix, weight=hidden, **alone)
        if most <= 0:  # then match leaves all where they are, and a threshold puts A before B
            continue
        assert plan.assign[image].tolist() == want.assign[0].tolist()
    trimmed = plan.trimmed()
    assert trimmed.num_output_tokens == max(int(plan.assign.max()) + 1, 0)
    assert torch.equal(trimmed.assign, plan.assign)
    check_plan(*trimmed, tokens, trimmed.num_output_tokens)
    x = torch.randn(3, tokens, 5, generator=generator)
    whole, sizes = plan.merge(x)
    for full, part in zip((whole, sizes), trimmed.merge(x), strict=True):
        assert torch.equal(full[:, : part.shape[1]], part)
        assert not full[:, part.shape[1] :].any()


@pytest.mark.parametrize("match", [tome_ext.match, reference.match, tome_ext.ops.match])
def test_a_threshold_that_is_no_number_is_refused(match):
    with pytest.raises(ValueError, match="threshold: expected a number, got nan"):
        match(torch.ones(1, 9, 4), 1, threshold=float("nan"))
    with pytest.raises(ValueError, match="threshold: expected a number, got 'high'"):
        tome_ext.match(torch.ones(1, 9, 4), 1, threshold="high")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_threshold_never_merges_what_may_not(dtype):
    metric = torch.full((2, 9, 4), float("nan"), dtype=dtype)
    for threshold in (-1.0, -1e300):
        plan = tome_ext.match(metric, 0, 1, threshold=threshold)
        assert plan.assign.tolist() == [[0, 5, 1, 6, 2, 7, 3, 8, 4]] * 2
    targets = torch.zeros(0, dtype=torch.int32)
    plan = tome_ext.match(torch.ones(2, 9, 4, dtype=dtype), 0, 1, targets=targets, threshold=0.0)
    assert plan.assign.tolist() == [list(range(9))] * 2


def test_a_plan_of_no_images_or_rows_is_trimmed_to_itself():
    empty = tome_ext.match(torch.ones(0, 9, 4), 0, 1, threshold=0.5)
    assert empty.trimmed().num_output_tokens == empty.num_output_tokens == 9
    dropped = tome_ext.MergePlan.from_assign(torch.full((2, 5), -1), 3)
    assert dropped.trimmed().num_output_tokens == 0


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 70),
    dim=st.integers(1, 40),
    r=st.integers(-2, 60),
    prefix=st.integers(0, 6),
    heads=st.integers(0, 3),
    seed=st.integers(0, 2**16),
)
def test_plan_invariants(batch, tokens, dim, r, prefix, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, dim) if heads else (batch, tokens, dim)
    # Small integers: many exact ties, zero rows among them.
    metric = torch.randint(-1, 2, shape, generator=generator).float()
    plan = tome_ext.match(metric, r, prefix)
    removed = max(0, min(r, max(0, tokens - prefix) // 2))
    assert plan.num_output_tokens == tokens - removed
    check_plan(*plan, tokens, tokens - removed)
    for assign in plan.assign.tolist():
        assert assign[:prefix] == list(range(min(prefix, tokens)))
        if removed:
            assert assign.count(-1) == 0
            rows_of_prefix = [n for n in range(tokens) if assign[n] < prefix]
            assert rows_of_prefix == list(range(prefix))  # nothing joined a prefix token
            odd = [assign[n] for n in range(prefix, tokens) if n % 2 == 1]
            assert odd == list(range(tokens - removed - len(odd), tokens - removed))
        else:
            assert assign == list(range(tokens))
    for ours, twin in zip(plan, reference.match(metric, r, prefix), strict=True):
        assert ours.shape == twin.shape


def test_ties_go_to_the_lower_index_both_times():
    # All tokens alike: every A token chooses B token 1, and the first r of A are merged.
    plan = tome_ext.match(torch.ones(1, 10, 4), 3)
    assert plan.assign.tolist() == [[2, 2, 2, 3, 2, 4, 0, 5, 1, 6]]
    # Two B tokens alike, the rest different: the lower of the two is chosen.
    metric = torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0], [0, 1], [1, 0]])[None]
    assert tome_ext.match(metric, 1).assign[0, 0] == tome_ext.match(metric, 1).assign[0, 3]


def test_ties_hold_across_every_tile_edge():
    """Equal tokens score equally wherever they lie, so rank by index alone decides."""
    for tokens in (3, 17, 34, 66, 130, 700):
        plan = tome_ext.match(torch.ones(1, tokens, 7), tokens // 3)
        removed = tokens // 3
        merged = [n for n in range(0, tokens, 2) if plan.assign[0, n] == plan.assign[0, 1]]
        assert merged == list(range(0, 2 * removed, 2)), tokens


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_vectors_have_similarity_zero(dtype):
    metric = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1]]).to(dtype)[None]
    # Token 0 scores 0 with both of B; token 2 scores -1 and 0: both choose at 0; ties go low.
    assert tome_ext.match(metric, 1).assign.tolist() == [[1, 1, 0, 2]]
    assert tome_ext.match(metric, 2).assign.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_token_does_not_touch_the_others(dtype, bad):
    metric = torch.randn(1, 60, 16).to(dtype)
    clean = reference.match_sets(
        metric, torch.arange(0, 60, 2)[None], torch.arange(1, 60, 2)[None], 30
    )[0]
    for token in (10, 11):
        spoiled = metric.clone()
        spoiled[0, token, 3] = bad
        plan = tome_ext.match(spoiled, 20)
        check_plan(*plan, 60, 40)
        alone = (plan.assign[0] == plan.assign[0, token]).sum()
        assert alone == 1, "a bad token joins nobody and nobody joins it"
        full = tome_ext.match(spoiled, 29 if token == 10 else 30)
        for n in range(0, 60, 2):
            if n != token and clean[n] != token:
                assert full.assign[0, n] == full.assign[0, clean[n]]


def test_indices_stay_valid_when_everything_is_bad():
    for value in (float("nan"), float("inf")):
        plan = tome_ext.match(torch.full((2, 9, 4), value), 4)
        check_plan(*plan, 9, 5)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-20, 1e18, 1e30])
def test_scale_of_the_metric_does_not_matter(scale):
    metric = torch.randn(1, 40, 8)
    plain = tome_ext.match(metric, 10)
    scaled = tome_ext.match(metric.double() * scale, 10)
    assert torch.equal(plain.assign, scaled.assign)
    if 1e-30 < scale < 1e30:  # where float32 holds the values themselves without loss
        assert torch.equal(plain.assign, tome_ext.match(metric * scale, 10).assign)
    assert torch.equal(
        tome_ext.match(metric * scale, 10).assign, reference.match(metric * scale, 10)[0]
    )


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("r", [-1, 0, 1, 9])
def test_tiny_inputs(tokens, prefix, r):
    plan = tome_ext.match(torch.randn(2, tokens, 4), r, prefix)
    twin = reference.match(
        torch.zeros(2, tokens, 4) if tokens == 0 else torch.ones(2, tokens, 4), r, prefix
    )
    assert plan.num_output_tokens == tokens - max(0, min(r, max(0, tokens - prefix) // 2))
    assert [tuple(x.shape) for x in plan] == [tuple(x.shape) for x in twin]
    check_plan(*plan, tokens, plan.num_output_tokens)


def test_empty_batch_and_zero_dim():
    check_plan(*tome_ext.match(torch.randn(0, 9, 4), 3), 9, 6)
    check_plan(*tome_ext.match(torch.randn(2, 9, 0), 3), 9, 6)


def test_strides_do_not_matter():
    metric = torch.randn(2, 3, 50, 12)
    plan = tome_ext.match(metric, 9, 1)
    views = {
        "transposed": metric.transpose(1, 2).contiguous().transpose(1, 2),
        "last dimension strided": metric.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded batch": metric[:1].expand(2, -1, -1, -1),
        "sliced": torch.cat([metric, metric], 3)[..., :12],
    }
    for name, view in views.items():
        expected = tome_ext.match(view.contiguous(), 9, 1)
        assert torch.equal(tome_ext.match(view, 9, 1).assign, expected.assign), name
        if name != "expanded batch":
            assert torch.equal(expected.assign, plan.assign), name


def test_an_image_does_not_depend_on_its_batch():
    metric = torch.randn(5, 2, 197, 64)
    together = tome_ext.match(metric, 30, 1)
    for image in range(5):
        alone = tome_ext.match(metric[image : image + 1], 30, 1)
        assert all(torch.equal(t[image], a[0]) for t, a in zip(together, alone, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_do_not_change_the_result(threads):
    metric = torch.randn(3, 1, 801, 48)
    expected = tome_ext.match(metric, 300, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for batch in (1, 3):
            plan = tome_ext.match(metric[:batch], 300, 1)
            assert torch.equal(plan.assign, expected.assign[:batch])
    finally:
        torch.set_num_threads(before)


def test_large_metric_in_chunks_agrees_with_twin():
    # 2,048 columns of 320 do not fit one packed chunk: maxima are joined across chunks.
    metric = torch.randn(1, 4096, 320)
    plan = tome_ext.match(metric, 2048)
    twin = reference.match(metric.double(), 2048)
    assert (plan.assign != twin[0]).float().mean() < 1e-3  # near ties in float32


def test_half_types_are_scored_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        metric = torch.randn(2, 197, 64).to(dtype)
        assert torch.equal(
            tome_ext.match(metric, 40, 1).assign, tome_ext.match(metric.float(), 40, 1).assign
        )


def hide(metric: torch.Tensor, weight: torch.Tensor, prefix: int, seed: int) -> torch.Tensor:
    """The metric with something else in its hidden tokens: NaN, or random numbers."""
    hidden = weight == 0
    hidden[:, :prefix] = False
    hidden = hidden[..., None] if metric.dim() == 3 else hidden[:, None, :, None]
    other = torch.randn(metric.shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(hidden, float("nan") if seed % 2 else other.to(metric.dtype), metric)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 40),
    r=st.integers(-2, 30),
    prefix=st.integers(0, 4),
    heads=st.integers(0, 2),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**16),
)
def test_hidden_tokens_take_no_part(batch, tokens, r, prefix, heads, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, 7) if heads else (batch, tokens, 7)
    metric = torch.randn(shape, generator=generator).to(dtype)
    seen = torch.rand(batch, tokens, generator=generator) < density
    weight = torch.where(seen, torch.randint(1, 5, (batch, tokens), generator=generator), 0).float()
    plan = tome_ext.match(metric, r, prefix, weight=weight)
    removed = max(0, min(r, max(0, tokens - prefix) // 2))
    check_plan(*plan, tokens, tokens - removed)
    for ours, twin in zip(plan, reference.match(metric, r, prefix, weight=weight), strict=True):
        assert torch.equal(ours, twin)
    expected, gap = match_plan(metric, r, prefix, weight)
    if gap > 1e-5:
        assert plan.assign.tolist() == expected
    # What hidden tokens hold changes nothing, however it comes.
    strange = hide(metric, weight, prefix, seed)
    wide = torch.stack((weight, weight), 2)[..., 0]
    for ours, other in zip(plan, tome_ext.match(strange, r, prefix, weight=wide), strict=True):
        assert torch.equal(ours, other)
    # No size is lost, and rows are of one kind.
    ones = torch.ones(batch, tokens, 1)
    merged, size = plan.merge(ones, weight)
    assert torch.equal(size.sum(1), weight.sum(1))
    if removed:
        alive = (plan.offsets.diff(dim=1) > 0)[:, prefix:]
        assert torch.equal(size[:, prefix:] > 0, alive)
        assert torch.equal(alive, alive.sort(dim=1, descending=True)[0])  # empty ones last
        assert torch.equal(plan.unmerge(merged)[:, prefix:, 0] > 0, weight[:, prefix:] > 0)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 40),
    r=st.integers(-2, 30),
    prefix=st.integers(0, 4),
    heads=st.integers(0, 2),
    given=st.sampled_from([("size",), ("importance",), ("size", "importance")]),
    density=st.sampled_from([0.4, 1.0]),
    with_targets=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**16),
)
def test_pairs_rank_by_what_merging_them_costs(
    batch, tokens, r, prefix, heads, given, density, with_targets, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, 7) if heads else (batch, tokens, 7)
    metric = torch.randn(shape, generator=generator).to(dtype)
    tables = {
        "size": torch.randint(1, 9, (batch, tokens), generator=generator).float(),
        "importance": torch.rand(batch, tokens, generator=generator) + 0.01,
    }
    options = {name: tables[name] for name in given}
    if density < 1:
        options["weight"] = (torch.rand(batch, tokens, generator=generator) < density).float()
    elif with_targets:
        options["targets"] = torch.arange(tokens, dtype=torch.int32)[prefix::3]
    plan = tome_ext.match(metric, r, prefix, **options)
    for ours, twin in zip(plan, reference.match(metric, r, prefix, **options), strict=True):
        assert torch.equal(ours, twin)
    targets = options.pop("targets", None)
    targets = None if targets is None else targets.tolist()
    expected, gap = match_plan(metric, r, prefix, targets=targets, **options)
    if gap > 1e-5:
        assert plan.assign.tolist() == expected


def test_costs_of_equal_sizes_rank_as_similarities_do():
    metric = torch.randn(3, 2, 80, 16, dtype=torch.float64)
    plan = tome_ext.match(metric, 20, 1)
    for size in (torch.ones(3, 80), torch.full((3, 80), 7.0)):
        assert torch.equal(tome_ext.match(metric, 20, 1, size=size).assign, plan.assign)
    # Large tokens stay, and those of no importance go.
    size = torch.ones(3, 80)
    size[:, 2::4] = 1e6
    size[:, 3::2] = 1e6
    joined = tome_ext.match(metric, 20, 1, size=size).assign
    assert (joined[:, 2::4].sort(1)[0].diff(dim=1) > 0).all()  # rows of their own, in order
    importance = torch.ones(3, 80)
    importance[:, 4:44:2] = 0
    rows = tome_ext.match(metric, 20, 1, importance=importance).assign
    staying = [n for n in range(1, 80) if n % 2 == 0 and not 4 <= n < 44]
    assert (rows[:, staying] == torch.arange(1, 1 + len(staying), dtype=torch.int32)).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_numbers_may_be_sizes_and_importance(dtype):
    metric = torch.randn(2, 60, 8).to(dtype)
    metric[0, 5] = float("nan")
    strange = torch.tensor([0.0, 1.0, -1.0, 1e-38, 3e38, float("inf"), float("nan")])
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        size, importance = strange[torch.randint(0, 7, (2, 2, 60), generator=generator)]
        for options in ({"size": size}, {"importance": importance, "size": size}):
            plan = tome_ext.match(metric, 13, 1, **options)
            check_plan(*plan, 60, 47)
            for ours, twin in zip(plan, reference.match(metric, 13, 1, **options), strict=True):
                assert torch.equal(ours, twin)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_that_hides_nothing_changes_nothing(shape, dtype):
    batch, heads, tokens, dim, r, prefix = shape
    metric = torch.randn(batch, heads, tokens, dim).to(dtype)
    weight = torch.rand(batch, tokens) + 0.5
    weight[:, :prefix] = 0  # no prefix is hidden
    for ours, other in zip(
        tome_ext.match(metric, r, prefix, weight=weight),
        tome_ext.match(metric, r, prefix),
        strict=True,
    ):
        assert torch.equal(ours, other)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(1, 40),
    r=st.integers(-2, 40),
    prefix=st.integers(0, 4),
    heads=st.integers(0, 2),
    spread=st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]),
    density=st.sampled_from([None, 0.0, 0.3, 0.8]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**16),
)
def test_targets_are_what_others_merge_into(
    batch, tokens, r, prefix, heads, spread, density, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, tokens, 7) if heads else (batch, tokens, 7)
    metric = torch.randn(shape, generator=generator).to(dtype)
    chosen = torch.rand(tokens, generator=generator) < spread
    targets = chosen.nonzero().flatten()
    targets = targets[targets >= prefix].to(torch.int32)
    weight = None
    if density is not None:
        weight = (torch.rand(batch, tokens, generator=generator) < density).float()
    plan = tome_ext.match(metric, r, prefix, weight=weight, targets=targets)
    others = max(0, tokens - prefix) - len(targets)
    removed = max(0, min(r, others)) if len(targets) else 0
    check_plan(*plan, tokens, tokens - removed)
    twin = reference.match(metric, r, prefix, weight=weight, targets=targets)
    for ours, theirs in zip(plan, twin, strict=True):
        assert torch.equal(ours, theirs)
    if weight is None:
        _, size = plan.merge(torch.ones(batch, tokens, 1))
        assert (size.sum(1) == tokens).all()
        assert ((size > 1).sum(1) <= len(targets)).all()
    else:
        strange = hide(metric, weight, prefix, seed)
        other = tome_ext.match(strange, r, prefix, weight=weight, targets=targets)
        for ours, theirs in zip(plan, other, strict=True):
            assert torch.equal(ours, theirs)
        # However few targets are seen, no size is lost.
        _, size = plan.merge(torch.ones(batch, tokens, 1), weight)
        assert torch.equal(size.sum(1), weight.sum(1))
        if batch and not (weight[:, targets.long()].sum(1) > 0).all():
            return  # the oracle knows no such images
    expected, gap = match_plan(metric, r, prefix, weight, targets.tolist())
    if gap > 1e-5:
        assert plan.assign.tolist() == expected


def test_where_all_targets_are_hidden_what_does_not_fit_joins_the_first():
    x, weight = torch.randn(2, 9, 4), torch.ones(2, 9)
    targets = torch.tensor([4, 6], dtype=torch.int32)
    weight[0, [4, 6]] = 0
    weight[1, [1, 2, 3, 4, 5, 6]] = 0
    plan = tome_ext.match(x, 6, 1, weight=weight, targets=targets)  # 9 - 6 = 3 rows
    # 7 are seen for 2 rows beside that of token 4: 5 of them join it.
    assert plan.assign[0].tolist() == [0, 2, 2, 2, 2, 2, -1, 2, 1]
    assert plan.merge(x, weight)[1][0].tolist() == [1, 1, 5]
    # Here they fit.
    assert plan.assign[1].tolist() == [0, -1, -1, -1, -1, -1, -1, 1, 2]


def test_odd_positions_as_targets_change_nothing():
    metric = torch.randn(2, 3, 31, 8)
    for prefix in (0, 1, 2):
        first = prefix + 1 - prefix % 2
        odd = torch.arange(first, 31, 2, dtype=torch.int32)
        expected = tome_ext.match(metric, 9, prefix)
        for ours, theirs in zip(
            tome_ext.match(metric, 9, prefix, targets=odd), expected, strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [[3, 3], [5, 4], [0, 4], [-1], [4, 12], [2**31 - 1], [-(2**31)]])
def test_targets_out_of_range_or_order_are_refused(bad):
    index = next(i for i, n in enumerate(bad) if n < max([1, *(b + 1 for b in bad[:i])]) or n > 11)
    expected = (
        r"match: expected ascending targets behind the prefix, below N = 12, got "
        rf"targets\[{index}\] = {bad[index]}$"
    )
    for r in (0, 3):
        with pytest.raises(RuntimeError, match=expected):
            tome_ext.match(
                torch.randn(2, 12, 4), r, 1, targets=torch.tensor(bad, dtype=torch.int32)
            )


def test_compiles_with_weights_and_targets_into_one_graph():
    def merge(x, weight, targets):
        plan = tome_ext.match(x, 6, 1, weight=weight)
        x, weight = plan.merge(x, weight)
        return tome_ext.match(x, 4, 1, weight=weight, targets=targets).merge(x, weight)

    compiled = torch.compile(merge, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((3, 20), (2, 31)):
        x, weight = torch.randn(batch, tokens, 8), (torch.rand(batch, tokens) > 0.4).float()
        targets = torch.arange(2, 14, tokens // 5, dtype=torch.int32)
        for ours, expected in zip(
            compiled(x, weight, targets), merge(x, weight, targets), strict=True
        ):
            assert torch.equal(ours, expected)


@given(
    lengths=st.lists(st.integers(2, 24), min_size=1, max_size=4),
    r=st.integers(1, 14),
    prefix=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_padded_images_have_the_plans_they_have_alone(lengths, r, prefix, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = 24
    metric = torch.randn(len(lengths), tokens, 6, generator=generator)
    weight = (torch.arange(tokens) < torch.tensor(lengths)[:, None]).float()
    padded = tome_ext.match(metric, r, prefix, weight=weight)
    for image, length in enumerate(lengths):
        alone = tome_ext.match(metric[image : image + 1, :length], r, prefix)
        assert torch.equal(padded.assign[image, :length], alone.assign[0])
        assert (padded.assign[image, length:] == -1).all()
        filled = padded.offsets[image].clamp_max(length).unique()
        assert torch.equal(filled, alone.offsets[0])


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 40),
    rows=st.integers(0, 20),
    seed=st.integers(0, 2**16),
)
def test_plan_from_any_assignment(batch, tokens, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    assign = torch.randint(-1, max(rows, 0), (batch, tokens), generator=generator)
    plan = tome_ext.MergePlan.from_assign(assign, rows)
    check_plan(*plan, tokens, rows)
    for ours, twin in zip(plan[1:], reference.plan(plan.assign, rows), strict=True):
        assert torch.equal(ours, twin)
    assert torch.equal(reference.row_of_token(plan.members, plan.offsets), assign)


def test_then_composes():
    x = torch.randn(2, 41, 6, dtype=torch.float64)
    first = tome_ext.match(x, 9, 1)
    once, size = first.merge(x)
    second = tome_ext.match(once, 7, 1)
    twice, size = second.merge(once, size)
    direct, direct_size = first.then(second).merge(x)
    torch.testing.assert_close(direct, twice)
    assert torch.equal(direct_size, size)
    elsewhere = tome_ext.MergePlan(*(part.to("meta") for part in second))
    with pytest.raises(ValueError, match=r"following: expected a plan on cpu, .*, got meta"):
        first.then(elsewhere)
