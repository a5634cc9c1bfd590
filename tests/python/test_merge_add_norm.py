"""tome::merge_add_norm against its composed form, the twin, and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    FLOATS,
    assert_error_within,
    assert_same_derivatives,
    differentiable_merge,
    merge_rows,
    stock_merge,
)

import tome_ext
from tome_ext import MergePlan, reference

OP = torch.ops.tome.merge_add_norm.default
# In float64 the stock form is what "exact" is computed by; the twin and gradcheck hold that dtype.
NARROW = tuple(dtype for dtype in FLOATS if dtype != torch.float64)


def spread_plan(batch, tokens, rows):
    """An assignment that drops nothing and leaves no row empty."""
    assign = torch.stack([torch.randperm(tokens) % rows for _ in range(batch)])
    return MergePlan.from_assign(assign, rows)


def inputs(batch, tokens, channels, dtype, mean=0.0):
    """x, branch and scale, weight, bias."""
    x = (torch.randn(batch, tokens, channels) + mean).to(dtype)
    branch = torch.randn(batch, tokens, channels).to(dtype)
    return x, branch, *(torch.randn(channels).to(dtype) for _ in range(3))


def exact_form(plan, x, branch, size, scale, weight, bias, eps=1e-6, keep_norms=False):
    """Merged rows, sizes and norms of the merged rows by their definition, in float64."""
    x, branch, scale, weight, bias = (
        None if t is None else t.double() for t in (x, branch, scale, weight, bias)
    )
    added = x + (branch if scale is None else scale * branch)
    merged, total = merge_rows(added, size, plan.assign, plan.num_output_tokens, "mean")
    if keep_norms:
        lengths = added.norm(dim=2, keepdim=True)
        lengths, _ = merge_rows(lengths, size, plan.assign, plan.num_output_tokens, "mean")
        merged = merged * (lengths / merged.norm(dim=2, keepdim=True)).nan_to_num(1.0, 1.0)
    return merged, total, F.layer_norm(merged, merged.shape[-1:], weight, bias, eps)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    ("channels", "mean"),
    [(2, 0.0), (7, 0.0), (8, 0.0), (17, 0.0), (33, 0.0), (64, 50.0), (129, 50.0), (768, 0.0)],
)
def test_error_is_at_most_twice_that_of_stock(dtype, channels, mean):
    plan = spread_plan(2, 40, 27)
    x, branch, scale, weight, bias = inputs(2, 40, channels, dtype, mean)
    size = torch.randint(1, 5, (2, 40)).float()
    for sizes, gamma, keep in ((size, scale, False), (None, None, False), (size, scale, True)):
        settings = {"eps": 1e-6, "keep_norms": keep}
        given = (x, branch, sizes, gamma, weight, bias)
        exact, total, exact_normed = exact_form(plan, *given, **settings)
        added = x + (branch if gamma is None else gamma * branch)
        stock = stock_merge(added, sizes, plan.assign, 27, "mean")
        if keep:
            lengths = added.norm(dim=2, keepdim=True)
            lengths = stock_merge(lengths, sizes, plan.assign, 27, "mean")
            stock = stock * (lengths / stock.norm(dim=2, keepdim=True))
        stock_normed = F.layer_norm(stock, (channels,), weight, bias, 1e-6)
        merged, new_size, normed = plan.merge_add_norm(*given, **settings)
        assert_error_within(merged, stock, exact)
        assert_error_within(normed, stock_normed, exact_normed)
        assert new_size.dtype == torch.float32
        assert torch.equal(new_size.double(), total)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_norm_is_of_the_merged_tokens_as_stored(dtype):
    plan = spread_plan(2, 40, 27)
    x, branch, scale, weight, bias = inputs(2, 40, 100, dtype, mean=20.0)
    merged, _, normed = plan.merge_add_norm(x, branch, None, scale, weight, bias, 1e-5)
    exact = F.layer_norm(merged.double(), (100,), weight.double(), bias.double(), 1e-5)
    assert_error_within(normed, F.layer_norm(merged, (100,), weight, bias, 1e-5), exact)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 30),
    rows=st.integers(0, 12),
    channels=st.integers(0, 20),
    given_vectors=st.tuples(*[st.booleans()] * 4),
    keep_norms=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_plan_agrees_with_the_twin(
    batch, tokens, rows, channels, given_vectors, keep_norms, seed
):
    generator = torch.Generator().manual_seed(seed)
    # Rows of every member count, empty ones and dropped tokens among them.
    assign = torch.randint(-1, max(rows, 0), (batch, tokens), generator=generator)
    plan = MergePlan.from_assign(assign, rows)
    x, branch, *vectors = inputs(batch, tokens, channels, torch.float64)
    # Fractions, and zeros: sizes may be any weights.
    size = torch.rand(batch, tokens) * torch.randint(0, 3, (batch, tokens))
    scale, weight, bias, size = (
        t if keep else None for t, keep in zip((*vectors, size), given_vectors, strict=True)
    )
    got = plan.merge_add_norm(x, branch, size, scale, weight, bias, 1e-3, keep_norms)
    twin = reference.merge_add_norm(
        x, branch, size, plan.members, plan.offsets, scale, weight, bias, 1e-3, keep_norms
    )
    # Tokens that all but cancel out are stretched, and their rounding with them.
    close = {"rtol": 1e-9, "atol": 1e-9} if keep_norms else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got[0], twin[0], **close)
    torch.testing.assert_close(got[1], twin[1])
    torch.testing.assert_close(got[2], twin[2], rtol=1e-9, atol=1e-9)
    exact, _, exact_normed = exact_form(
        plan, x, branch, size, scale, weight, bias, 1e-3, keep_norms
    )
    torch.testing.assert_close(got[0], exact, **close)
    if channels > 0:
        torch.testing.assert_close(got[2], exact_normed, rtol=1e-9, atol=1e-9)


def test_rows_without_members_and_without_size():
    plan = MergePlan.from_assign(torch.tensor([[0, 0, -1]]), 2)
    x = torch.tensor([[[1.0, 3.0], [3.0, 9.0], [5.0, 5.0]]])
    bias = torch.tensor([0.5, -2.0])
    merged, size, normed = plan.merge_add_norm(x, x, torch.zeros(1, 3), bias=bias)
    assert merged.tolist() == [[[4.0, 12.0], [0.0, 0.0]]]
    assert size.tolist() == [[0.0, 0.0]]
    assert torch.equal(normed[0, 1], bias)
    assert normed.isfinite().all()


def test_kept_norms():
    # {(3, 4), (0, 5)}: lengths 5 and 5, mean (1.5, 4.5); tokens that cancel out; one token.
    plan = MergePlan.from_assign(torch.tensor([[0, 0, 1, 1, 2]]), 3)
    x = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [2.0, 1.0], [-2.0, -1.0], [7.0, 7.0]]])
    merged, size, normed = plan.merge_add_norm(x, torch.zeros_like(x), keep_norms=True)
    stretched = torch.tensor([1.5, 4.5]) * 5 / 22.5**0.5
    torch.testing.assert_close(merged[0], torch.stack([stretched, torch.zeros(2), x[0, 4]]))
    assert torch.equal(merged[0, 2], x[0, 4])
    assert size.tolist() == [[2.0, 2.0, 1.0]]
    assert normed.isfinite().all()
    # By size, and by merge, to the bit.
    size = torch.tensor([[1.0, 3.0, 1.0, 1.0, 2.0]])
    x[0, 0] *= 2
    by_size, _, _ = plan.merge_add_norm(x, torch.zeros_like(x), size, keep_norms=True)
    torch.testing.assert_close(by_size[0, 0].norm(), torch.tensor((10 + 3 * 5) / 4))
    assert torch.equal(plan.merge(x, size, keep_norms=True)[0], by_size)
    with pytest.raises(ValueError, match="keep_norms: expected reduce='mean' with it, got 'sum'"):
        plan.merge(x, size, "sum", keep_norms=True)


def test_strided_inputs():
    plan = spread_plan(2, 30, 11)
    x, branch, scale, weight, bias = inputs(2, 30, 24, torch.float32)
    size = torch.rand(2, 30) + 0.5
    expected = plan.merge_add_norm(x, branch, size, scale, weight, bias)
    views = {
        "sliced channels": lambda t: torch.cat([t, t], 2)[..., :24],
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "every second": lambda t: t.repeat_interleave(2, 1)[:, ::2],
        "contiguous": lambda t: t,
    }
    apart = [torch.stack([t, t], 1)[:, 0] for t in (scale, weight, bias)]
    apart_size = torch.stack([size, size], 2)[..., 0]
    for first, of_x in views.items():
        for second, of_branch in views.items():
            got = plan.merge_add_norm(of_x(x), of_branch(branch), apart_size, *apart)
            for g, e in zip(got, expected, strict=True):
                assert torch.equal(g, e), (first, second)


@pytest.mark.parametrize("keep_norms", [False, True])
def test_bitwise_repeatable_and_independent_of_batch_and_threads(keep_norms):
    args = inputs(4, 197, 100, torch.bfloat16)
    size = torch.rand(4, 197) + 0.5
    plan = tome_ext.match(args[0], 60, 1)
    args = (*args, 1e-6, keep_norms)
    expected = plan.merge_add_norm(*args[:2], size, *args[2:])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            again = plan.merge_add_norm(*args[:2], size, *args[2:])
            assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))
    finally:
        torch.set_num_threads(before)
    for image in range(4):
        one = slice(image, image + 1)
        alone = MergePlan(*(t[one] for t in plan)).merge_add_norm(
            args[0][one], args[1][one], size[one], *args[2:]
        )
        assert all(torch.equal(a, e[one]) for a, e in zip(alone, expected, strict=True))


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_norms", [False, True])
@pytest.mark.parametrize("given_vectors", [(1, 1, 1), (1, 0, 1), (0, 1, 0), (0, 0, 0)])
def test_gradients(given_vectors, keep_norms):
    # Dropped tokens; rows of no, one and more members.
    assign = torch.tensor([[0, 0, 1, -1, 3, 3, 3], [2, 1, 2, 0, -1, 4, 0]])
    plan = MergePlan.from_assign(assign, 5)
    x, branch, *vectors = inputs(2, 7, 3, torch.float64)
    kept = [v for v, keep in zip(vectors, given_vectors, strict=True) if keep]
    size = torch.randint(1, 4, (2, 7)).float()

    def both(x, branch, *kept):
        left = iter(kept)
        scale, weight, bias = (next(left) if keep else None for keep in given_vectors)
        return plan.merge_add_norm(x, branch, size, scale, weight, bias, 0.1, keep_norms)[::2]

    args = [t.requires_grad_() for t in (x, branch, *kept)]
    assert torch.autograd.gradcheck(both, args)
    assert torch.autograd.gradgradcheck(both, args)


@pytest.mark.parametrize("keep_norms", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_gradients_equal_the_composed_form(dtype, keep_norms):
    plan = spread_plan(3, 50, 20)
    size = torch.randint(1, 4, (3, 50)).float()
    tensors = inputs(3, 50, 33, dtype)
    upstream = [torch.randn(3, 20, 33).to(dtype) for _ in range(2)]

    def fused(x, branch, scale, weight, bias):
        return plan.merge_add_norm(x, branch, size, scale, weight, bias, keep_norms=keep_norms)[::2]

    def composed(x, branch, scale, weight, bias):
        added = x + scale * branch
        merged, _ = plan.merge(added, size)
        if keep_norms:
            length, _ = plan.merge(added.norm(dim=2, keepdim=True), size)
            merged = merged * (length / merged.norm(dim=2, keepdim=True))
        return merged, F.layer_norm(merged, (33,), weight, bias, 1e-6)

    def twin(x, branch, scale, weight, bias):
        return reference.merge_add_norm(
            x, branch, size, plan.members, plan.offsets, scale, weight, bias, 1e-6, keep_norms
        )[::2]

    def grads_of(form, args, upstream):
        live = [t.clone().requires_grad_() for t in args]
        return torch.autograd.grad(form(*live), live, upstream)

    exact = grads_of(composed, [t.double() for t in tensors], [u.double() for u in upstream])
    stock = grads_of(composed, tensors, upstream)
    for got, beside, want in zip(grads_of(fused, tensors, upstream), stock, exact, strict=True):
        assert_error_within(got, beside, want)
    for got, beside, want in zip(grads_of(twin, tensors, upstream), stock, exact, strict=True):
        assert_error_within(got, beside, want)


@pytest.mark.parametrize("keep_norms", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
def test_learned_sizes_get_their_gradient(scaled, keep_norms):
    plan = spread_plan(2, 9, 5)
    x, branch, scale, weight, bias = inputs(2, 9, 6, torch.float64)
    given = (x, branch, torch.randint(1, 5, (2, 9)).float(), weight, bias)
    given = (*given, scale) if scaled else given

    def exact(x, branch, size, weight, bias, scale=None):
        added = x + (branch if scale is None else scale * branch)
        merged, total = differentiable_merge(added, size, plan.assign, 5)
        if keep_norms:
            lengths = added.norm(dim=2, keepdim=True)
            length, _ = differentiable_merge(lengths, size, plan.assign, 5)
            merged = merged * (length / merged.norm(dim=2, keepdim=True))
        return merged, total, F.layer_norm(merged, (6,), weight, bias, 1e-6)

    def run(x, branch, size, weight, bias, scale=None):
        return plan.merge_add_norm(x, branch, size, scale, weight, bias, keep_norms=keep_norms)

    assert_same_derivatives(run, exact, given, rtol=1e-3, atol=1e-3)


def test_only_what_needs_a_gradient_gets_one():
    plan = spread_plan(1, 6, 3)
    x, branch, scale, weight, bias = inputs(1, 6, 4, torch.float32)
    scale.requires_grad_()
    merged, size, normed = plan.merge_add_norm(x, branch, None, scale, weight, bias)
    assert merged.requires_grad
    assert normed.requires_grad
    assert not size.requires_grad
    normed.sum().backward()
    assert scale.grad is not None
    assert all(t.grad is None for t in (x, branch, weight, bias))


# --- what torch and its users rely on -----------------------------------------------------------


@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck(dtype, grad):
    plan = spread_plan(2, 12, 7)
    x, branch, *vectors = (t.requires_grad_(grad) for t in inputs(2, 12, 6, dtype))
    size = torch.rand(2, 12) + 0.5
    torch.library.opcheck(OP, (x, branch, size, plan.members, plan.offsets, *vectors, 1e-5))
    torch.library.opcheck(OP, (x, branch, None, plan.members, plan.offsets))
    torch.library.opcheck(OP, (x, branch, size, plan.members, plan.offsets, *vectors, 1e-5, True))


def test_shapes_and_dtypes_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        plan = tome_ext.match(torch.empty(2, 197, 64), 16, 1)
        x = torch.empty(2, 197, 768, dtype=torch.bfloat16)
        merged, size, normed = plan.merge_add_norm(x, x)
    for tokens in (merged, normed):
        assert (tokens.shape, tokens.dtype) == ((2, 181, 768), torch.bfloat16)
    assert (size.shape, size.dtype) == ((2, 181), torch.float32)


@pytest.mark.compiler
def test_compiles():
    x, branch, scale, weight, bias = (t.requires_grad_() for t in inputs(2, 21, 16, torch.float64))

    def block(x, branch):
        plan = tome_ext.match(x.detach(), 5, 1)
        merged, size, normed = plan.merge_add_norm(x, branch.sin(), None, scale, weight, bias)
        return merged + normed * 2, size

    want, want_size = block(x, branch)
    grads = torch.autograd.grad(want.square().sum(), (x, branch, scale))
    got, size = torch.compile(block, fullgraph=True)(x, branch)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(size, want_size)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), (x, branch, scale)), grads)


def test_autocast_changes_nothing():
    plan = spread_plan(2, 21, 9)
    args = inputs(2, 21, 16, torch.float32)
    expected = plan.merge_add_norm(*args[:2], None, *args[2:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = plan.merge_add_norm(*args[:2], None, *args[2:])
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


X = torch.randn(2, 9, 4)
V = torch.randn(4)
PLAN = tome_ext.match(X, 3)


@pytest.mark.parametrize(
    ("call", "expected", "got"),
    [
        (lambda: PLAN.merge_add_norm(X[0], X[0]), "x: expected (B, N, C)", "(9, 4) float32"),
        (lambda: PLAN.merge_add_norm(X.int(), X.int()), "x: expected float32", "(2, 9, 4) int32"),
        (
            lambda: PLAN.merge_add_norm(X[:, :8], X[:, :8]),
            "x: expected (B, N, C) = (2, 9, C) as in the plan",
            "(2, 8, 4) float32",
        ),
        (
            lambda: PLAN.merge_add_norm(X, X[:, :8]),
            "branch: expected the shape and dtype of x, (2, 9, 4) float32",
            "(2, 8, 4) float32",
        ),
        (lambda: PLAN.merge_add_norm(X, X.half()), "branch: expected", "(2, 9, 4) float16"),
        (
            lambda: PLAN.merge_add_norm(X, X, torch.ones(2, 8)),
            "size: expected (2, N = 9) float32",
            "(2, 8) float32",
        ),
        (
            lambda: PLAN.merge_add_norm(X, X, scale=V[:3]),
            "scale: expected (C = 4,) float32",
            "(3,) float32",
        ),
        (
            lambda: PLAN.merge_add_norm(X, X, weight=V.bfloat16()),
            "weight: expected (C = 4,) float32 as x is",
            "(4,) bfloat16",
        ),
        (
            lambda: PLAN.merge_add_norm(X, X, bias=V[None]),
            "bias: expected (C = 4,) float32",
            "(1, 4) float32",
        ),
        (lambda: PLAN.merge_add_norm(X, X, eps=-1e-6), "eps: expected a number >= 0", "-1e-06"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, expected, got):
    with pytest.raises(ValueError, match=": expected") as error:
        call()
    assert expected in str(error.value)
    assert got in str(error.value)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            PLAN._replace(members=PLAN.members * 0),
            r"expected every token once in members, got token 0 again at members\[0, 1\]$",
        ),
        (
            PLAN._replace(offsets=PLAN.offsets + 4),
            r"expected offsets that start at 0, .* got offsets\[0, 0\] = 4$",
        ),
    ],
)
def test_a_plan_that_points_outside_is_refused(plan, message):
    with pytest.raises(RuntimeError, match="merge_add_norm: " + message):
        plan.merge_add_norm(X, X)
