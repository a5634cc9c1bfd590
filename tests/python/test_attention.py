"""tome::attention and its gradient against float64, stock attention, the twin, and autograd."""

from __future__ import annotations

import pytest
import torch
from attention_cases import (
    SIZE,
    K,
    Q,
    V,
    assert_accurate,
    exact_attention,
    leaves,
    packed,
    sizes,
    stock_attention,
)
from hypothesis import given
from hypothesis import strategies as st
from oracle import FLOATS, OPERATOR_ERROR, assert_same_derivatives
from torch import Tensor

import tome_ext
from tome_ext import ops, reference
from tome_ext.attention import attend

HALVES = (torch.float16, torch.bfloat16)
# (batch, heads, queries, keys, channels): of real models, around block edges, and M != N.
SHAPES = [
    (8, 3, 197, 197, 64),
    (4, 4, 150, 150, 80),
    (3, 2, 80, 80, 32),
    (2, 2, 577, 577, 72),
    (4, 2, 65, 33, 96),
    (8, 6, 7, 129, 128),
    (8, 6, 1, 50, 64),
    (4, 2, 64, 1, 40),
    (8, 2, 31, 17, 7),
    (4, 2, 20, 30, 160),
]


# --- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sized", [True, False])
def test_error_is_at_most_twice_that_of_stock(
    dtype: torch.dtype, shape: tuple[int, ...], sized: bool
) -> None:
    q, k, v = packed(*shape, dtype=dtype)
    size = sizes(k.shape[0], k.shape[2]) if sized else None
    out, lse = ops.attention_forward(q, k, v, size)
    assert_accurate(out, stock_attention(q, k, v, size), exact_attention(q, k, v, size))
    logits = (q.double() @ k.double().mT) / q.shape[-1] ** 0.5
    if size is not None:
        logits = logits + size.double().log()[:, None, None, :]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert lse.dtype == wide
    torch.testing.assert_close(lse, logits.logsumexp(-1).to(wide), rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.ops.tome.attention(q, k, v, size), out)


@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 3),
    queries=st.integers(0, 40),
    keys=st.integers(0, 40),
    dim=st.integers(1, 40),
    sized=st.booleans(),
    scale=st.sampled_from([None, 0.3, -0.7, 0.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_definition_and_the_twin(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    sized: bool,
    scale: float | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    q, k, v = packed(batch, heads, queries, keys, dim, torch.float64)
    # Fractions, and zeros, now and then for all keys of an image: sizes may be any weights.
    size = torch.rand(batch, keys) * torch.randint(0, 3, (batch, keys)) if sized else None
    if size is not None and seed % 3 == 0:
        size[:1] = 0
    got = ops.attention_forward(q, k, v, size, scale)
    twin = reference.attention_forward(q, k, v, size, scale)
    exact = exact_attention(q, k, v, size, scale)
    torch.testing.assert_close(got[0], exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got, twin, rtol=1e-9, atol=1e-9)
    grad = torch.randn(q.shape, dtype=torch.float64)
    args = (grad, q, k, v, size, *twin, scale)
    got_grads, twin_grads = ops.attention_backward(*args), reference.attention_backward(*args)
    torch.testing.assert_close(got_grads, twin_grads, rtol=1e-9, atol=1e-9)
    outputs = zip((*got, *got_grads), (*twin, *twin_grads), strict=True)
    assert all(one.stride() == other.stride() for one, other in outputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_outputs_are_laid_out_for_the_projection(dtype: torch.dtype) -> None:
    q, k, v = leaves(*packed(2, 3, 20, 30, 16, dtype))
    out, lse = ops.attention_forward(q, k, v, sizes(2, 30))
    assert out.transpose(1, 2).is_contiguous()
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    assert lse.is_contiguous()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(grad.dtype == dtype for grad in grads)
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


def test_strided_inputs() -> None:
    q, k, v = packed(2, 3, 20, 20, 16)
    size = sizes(2, 20)
    expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), size)
    assert torch.equal(ops.attention(q, k, v, size), expected)
    for spread in (
        lambda x: torch.stack([x, x], -1)[..., 0],  # the last dimension strided
        lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
    ):
        assert torch.equal(ops.attention(spread(q), spread(k), spread(v), size), expected)
    strided_size = torch.stack([size, size], 2)[..., 0]
    assert torch.equal(ops.attention(q, k, v, strided_size), expected)
    one_image = [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]
    assert torch.equal(
        ops.attention(*one_image), ops.attention(*(x[:1] for x in one_image))[[0, 0]]
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_size_0_hides_keys_and_a_row_without_keys_is_0(dtype: torch.dtype) -> None:
    q, k, v = packed(3, 2, 9, 40, 24, dtype)
    size = sizes(3, 40)
    size[0, 5:] = 0
    size[1, ::2] = 0
    size[2] = 0
    spoiled_k, spoiled_v = k.clone(), v.clone()
    for image in range(3):
        spoiled_k[image, :, size[image] == 0] = 100.0
        spoiled_v[image, :, size[image] == 0] = -100.0
    out, lse = ops.attention_forward(q, k, v, size)
    assert torch.equal(ops.attention(q, spoiled_k, spoiled_v, size), out)
    for image in range(2):
        seen = size[image] > 0
        one = slice(image, image + 1)
        alone = ops.attention(q[one], k[one][:, :, seen], v[one][:, :, seen], size[one][:, seen])
        torch.testing.assert_close(out[one], alone)
    assert not out[2].any()
    assert not lse[2].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 5, 6, 8), (2, 2, 0, 6, 8), (2, 2, 5, 0, 8)])
def test_empty_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v = leaves(*packed(*shape, dtype=dtype))
    for size in (None, torch.ones(k.shape[0], k.shape[2])):
        out, lse = ops.attention_forward(q, k, v, size)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert not out.any()
        assert not lse.any()
        for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


def test_huge_logits_and_sizes_stay_finite() -> None:
    q, k, v = packed(2, 2, 30, 50, 64)
    size = torch.rand(2, 50).mul(60).sub(30).pow(21).abs()  # from 0 to 1e31
    for scale in (100.0, -100.0, 1e-30):
        out = ops.attention(q, k, v, size, scale)
        assert out.isfinite().all()
        logits = (q.double() @ k.double().mT) * scale + size.double().log()[:, None, None, :]
        # float32 logits of this height are themselves good to 1e-3 only.
        torch.testing.assert_close(out.double(), logits.softmax(-1) @ v.double(), rtol=0, atol=1e-2)


def test_nan_stays_in_its_query_and_image() -> None:
    q, k, v = packed(3, 2, 20, 20, 16)
    expected = ops.attention(q, k, v)
    q, k = q.clone(), k.clone()
    q[0, 1, 4, 3] = float("nan")
    k[2, 0, 7, 2] = float("nan")
    out = ops.attention(q, k, v)
    spoiled = torch.zeros(3, 2, 20, dtype=torch.bool)
    spoiled[0, 1, 4] = True
    spoiled[2, 0] = True
    assert torch.equal(out.isnan().any(-1), spoiled)
    assert torch.equal(out[~spoiled], expected[~spoiled])


def test_bitwise_repeatable_and_independent_of_batch_and_threads() -> None:
    q, k, v = leaves(*packed(4, 3, 150, 197, 64, torch.bfloat16))
    size = sizes(4, 197)
    upstream = torch.randn(q.shape).bfloat16()

    def run(images: slice = slice(None)) -> tuple[Tensor, ...]:
        out = ops.attention(q[images], k[images], v[images], size[images])
        grads = torch.autograd.grad(out, (q, k, v), upstream[images])
        return out, *(grad[images] for grad in grads)

    expected = run()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert all(torch.equal(a, e) for a, e in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)
    for image in range(4):
        one = slice(image, image + 1)
        assert all(torch.equal(a, e[one]) for a, e in zip(run(one), expected, strict=True))


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] > 1], ids=str)
@pytest.mark.parametrize("sized", [True, False])
def test_error_of_gradients_is_at_most_twice_that_of_stock(
    dtype: torch.dtype, shape: tuple[int, ...], sized: bool
) -> None:
    inputs = packed(*shape, dtype=dtype)
    size = sizes(shape[0], shape[3]) if sized else None
    upstream = torch.randn(inputs[0].shape).to(dtype)

    def grads(attention, dtype: torch.dtype) -> tuple[Tensor, ...]:
        live = leaves(*(x.to(dtype) for x in inputs))
        return torch.autograd.grad(attention(*live, size), live, upstream.to(dtype))

    exact = grads(exact_attention, torch.float64)
    stock = grads(stock_attention, dtype)
    for got, other, want in zip(grads(ops.attention, dtype), stock, exact, strict=True):
        assert_accurate(got, other, want, rms=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_one_key(dtype: torch.dtype) -> None:
    """Its weight is 1 whatever the logit is, so only v has a gradient."""
    q, k, v = leaves(*packed(2, 2, 5, 1, 8, dtype))
    upstream = torch.randn(q.shape).to(dtype)
    grads = torch.autograd.grad(
        ops.attention(q, k, v, torch.full((2, 1), 3.0)), (q, k, v), upstream
    )
    noise = 8 * torch.finfo(dtype).eps
    for grad in grads[:2]:
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=noise)
    torch.testing.assert_close(grads[2], upstream.sum(2, keepdim=True))


@pytest.mark.parametrize("size", ["none", "some", "zeros", "all hidden"])
@pytest.mark.parametrize("scale", [None, -0.8])
def test_gradcheck(size: str, scale: float | None) -> None:
    q, k, v = leaves(*packed(2, 2, 5, 7, 3, torch.float64))
    weights = None if size == "none" else sizes(2, 7)
    if weights is not None and size == "zeros":
        weights[:, ::3] = 0
    if weights is not None and size == "all hidden":
        weights[1] = 0
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, weights, scale), (q, k, v))
    grads = torch.autograd.grad(ops.attention(q, k, v, weights, scale).sum(), (q, k, v))
    if size == "all hidden":
        assert not any(grad[1].any() for grad in grads)


def test_gradients_of_some_inputs_only() -> None:
    q, k, v = packed(2, 2, 9, 9, 8)
    every = leaves(q, k, v)
    expected = torch.autograd.grad(ops.attention(*every).square().sum(), every)
    for index in range(3):
        some = [q, k, v]
        some[index] = every[index]
        (grad,) = torch.autograd.grad(ops.attention(*some).square().sum(), every[index])
        assert torch.equal(grad, expected[index])


def test_packed_qkv_gets_one_gradient() -> None:
    qkv = torch.randn(2, 9, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    size = sizes(2, 9)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    (got,) = torch.autograd.grad(ops.attention(q, k, v, size).square().sum(), qkv)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    (want,) = torch.autograd.grad(exact_attention(q, k, v, size).square().sum(), qkv)
    torch.testing.assert_close(got, want)


def test_lse_has_no_gradient() -> None:
    q, k, v = leaves(*packed(1, 1, 3, 3, 4))
    out, lse = ops.attention_forward(q, k, v)
    assert out.requires_grad
    assert not lse.requires_grad


def spoiled_hidden(size: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Keys or values that hold NaN and infinities where a size is 0."""
    hidden = (size == 0)[:, None, :, None]
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")])
    return tuple(torch.where(hidden, bad[i % 3].to(x.dtype), x) for i, x in enumerate(tensors))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_hidden_tokens_hold_changes_nothing(dtype: torch.dtype) -> None:
    q, k, v = packed(3, 2, 20, 45, 12, dtype)
    size = sizes(3, 45)
    size[:, ::3] = 0
    size[1] = 0
    bad = spoiled_hidden(size, k, v)
    upstream = torch.randn(q.shape).to(dtype)
    found = []
    for keys, values in ((k, v), bad):
        live = leaves(q, keys, values)
        out = ops.attention(*live, size)
        found.append((out, *torch.autograd.grad(out, live, upstream)))
        out, lse = reference.attention_forward(q, keys, values, size)
        args = (upstream, q, keys, values, size, out, lse)
        found[-1] += (out, lse, *reference.attention_backward(*args))
        # By stock attention, since the mask says more than which keys are hidden.
        mask = torch.zeros(20, 45, dtype=dtype)
        out, why = attend(q, keys, values, size, mask)
        assert why is not None
        # A row without any visible key is NaN there, or 0: that is stock attention's.
        found[-1] += (out[[0, 2]],)
    for clean, spoiled in zip(*found, strict=True):
        assert torch.equal(clean, spoiled)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("scale", [None, -0.8])
def test_learned_sizes_get_their_gradient(zeros: bool, scale: float | None) -> None:
    inputs = (*packed(2, 2, 5, 7, 3, torch.float64), sizes(2, 7))
    if zeros:
        inputs[3][:, ::3] = 0
        inputs[3][1] = 0

    def exact(q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        # A hidden key stays hidden: its size has no gradient.
        return (exact_attention(q, k, v, torch.where(size == 0, 0.0, size), scale),)

    for attention in (ops.attention, tome_ext.proportional_attention):
        assert_same_derivatives(
            lambda *x, f=attention: (f(*x, scale=scale),), exact, inputs, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_of_sizes_alone(dtype: torch.dtype) -> None:
    q, k, v = packed(2, 3, 20, 20, 16, dtype)
    size = torch.rand(2, 20).add(0.5).requires_grad_()
    (got,) = torch.autograd.grad(ops.attention(q, k, v, size).float().square().sum(), size)
    (want,) = torch.autograd.grad(exact_attention(q, k, v, size).square().sum(), size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.parametrize("size", ["none", "some", "zeros", "all hidden"])
def test_second_derivatives(size: str) -> None:
    q, k, v = leaves(*packed(2, 2, 4, 5, 3, torch.float64))
    weights = None if size == "none" else sizes(2, 5)
    if weights is not None and size == "zeros":
        weights[:, ::3] = 0
    if weights is not None and size == "all hidden":
        weights[1] = 0
    assert torch.autograd.gradgradcheck(lambda *x: ops.attention(*x, weights, 0.7), (q, k, v))
    # Of one input alone.
    q, v = q.detach(), v.detach()
    assert torch.autograd.gradgradcheck(lambda k: ops.attention(q, k, v, weights), k)


def test_third_derivatives() -> None:
    inputs = (*packed(1, 2, 3, 4, 2, torch.float64), sizes(1, 4))
    found = []
    for attention in (ops.attention, exact_attention):
        live = leaves(*inputs[:3])
        out = attention(*live, inputs[3]).pow(3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(out, live, create_graph=True)
            out = sum(grad.pow(2).sum() for grad in grads)
        found.append(grads)
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives_in_half_precision_have_its_dtype() -> None:
    q, k, v = leaves(*packed(2, 2, 9, 9, 8, torch.bfloat16))
    (grad,) = torch.autograd.grad(ops.attention(q, k, v).sum(), q, create_graph=True)
    for x in torch.autograd.grad(grad.square().sum(), (q, k, v)):
        assert x.dtype == torch.bfloat16
        assert x.isfinite().all()


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "expected", "got"),
    [
        (lambda: ops.attention(Q[0], K, V), "q: expected (B, H, M, D)", "(3, 5, 8) float32"),
        (lambda: ops.attention(Q.int(), K.int(), V.int()), "float32, float16", "int32"),
        (lambda: ops.attention(Q, K[:1], V), "k: expected", "(1, 3, 5, 8) float32"),
        (lambda: ops.attention(Q, K[:, :2], V), "k: expected", "(2, 2, 5, 8) float32"),
        (lambda: ops.attention(Q, K[..., :7], V), "k: expected", "(2, 3, 5, 7) float32"),
        (lambda: ops.attention(Q, K.half(), V), "k: expected", "(2, 3, 5, 8) float16"),
        (lambda: ops.attention(Q, K, V[:, :, :4]), "v: expected", "(2, 3, 4, 8) float32"),
        (lambda: ops.attention(Q, K, V.double()), "v: expected", "(2, 3, 5, 8) float64"),
        (lambda: ops.attention(Q, K, V, SIZE[:, :4]), "size: expected", "(2, 4) float32"),
        (lambda: ops.attention(Q, K, V, SIZE.half()), "size: expected", "(2, 5) float16"),
        (
            lambda: ops.attention_backward(Q[:1], Q, K, V, None, Q, Q[..., 0]),
            "grad: expected",
            "(1, 3, 5, 8) float32",
        ),
        (
            lambda: ops.attention_backward(Q, Q, K, V, None, Q[:1], Q[..., 0]),
            "out: expected",
            "(1, 3, 5, 8) float32",
        ),
        (
            lambda: ops.attention_backward(Q, Q, K, V, None, Q, Q[..., 0].double()),
            "lse: expected",
            "(2, 3, 5) float64",
        ),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, expected: str, got: str) -> None:
    with pytest.raises(ValueError, match=": expected") as error:
        call()
    assert expected in str(error.value)
    assert got in str(error.value)


def test_errors_pass_through_the_operator_unchanged(capfd: pytest.CaptureFixture[str]) -> None:
    # torch.ops.tome.attention calls another operator; between C++ functions torch would print the
    # error and keep its text to itself.
    operators = torch.ops.tome
    of_kind = ((operators.attention_forward, OPERATOR_ERROR), (operators.attention, ValueError))
    for operator, kind in of_kind:
        with pytest.raises(kind, match="v: expected") as error:
            operator(Q, K, V[:, :, :4])
        assert str(error.value) == (
            "v: expected the shape and dtype of k, (2, 3, 5, 8) float32, got (2, 3, 4, 8) float32"
        )
    assert capfd.readouterr().err == ""
