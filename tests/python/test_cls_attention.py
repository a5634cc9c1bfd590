"""tome::cls_attention against float64, the explicit form, the twin, and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import FLOATS, assert_error_within, assert_same_derivatives
from torch import Tensor

import tome_ext
from tome_ext import cls_attention, ops, reference

# (batch, heads, queries, keys, channels)
SHAPES = [
    (2, 12, 197, 197, 64),
    (1, 16, 150, 150, 80),
    (3, 6, 1, 577, 64),
    (1, 3, 5, 64, 72),
    (2, 1, 3, 33, 128),
    (2, 2, 9, 1, 7),
    (1, 2, 4, 30, 160),
]


def q_and_k(
    batch: int, heads: int, queries: int, keys: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Views of one packed (B, N, 3, H, D) tensor."""
    qkv = torch.randn(batch, max(queries, keys), 3, heads, dim).to(dtype)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q[:, :, :queries], k[:, :, :keys]


def explicit(q: Tensor, k: Tensor, size: Tensor | None, scale: float | None = None) -> Tensor:
    """The whole attention matrix, in the dtype of q, and of it the class token's row."""
    logits = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    if size is not None:
        logits = logits + size.to(q.dtype).log()[:, None, None, :]
    return logits.softmax(-1)[:, :, 0].mean(1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sized", [True, False])
def test_error_is_at_most_twice_that_of_stock(
    dtype: torch.dtype, shape: tuple[int, ...], sized: bool
) -> None:
    q, k = q_and_k(*shape, dtype=dtype)
    size = torch.randint(1, 9, (k.shape[0], k.shape[2])).float() if sized else None
    got = cls_attention(q, k, size)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = explicit(q.double(), k.double(), size)
    if dtype == torch.float64:  # `exact` has rounding errors of this size itself
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-13)
    else:
        assert_error_within(got, explicit(q, k, size).to(wide), exact, rms=True)
        assert_error_within(got, explicit(q, k, size).to(wide), exact, factor=4.0)
    torch.testing.assert_close(got.sum(1), torch.ones(k.shape[0], dtype=wide))
    torch.testing.assert_close(got, reference.cls_attention(q, k, size))
    # Only the first query counts, and it may be given alone.
    assert torch.equal(cls_attention(q[:, :, :1], k, size), got)
    assert torch.equal(cls_attention(q.contiguous(), k.contiguous(), size), got)


@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 4),
    queries=st.integers(1, 3),
    keys=st.integers(0, 40),
    dim=st.integers(1, 40),
    sized=st.booleans(),
    scale=st.sampled_from([None, 0.3, -0.7, 0.0]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_agrees_with_the_twin(
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
    q, k = q_and_k(batch, heads, queries, keys, dim, torch.float64)
    size = torch.rand(batch, keys) * torch.randint(0, 3, (batch, keys)) if sized else None
    got = cls_attention(q, k, size, scale)
    assert got.is_contiguous()
    torch.testing.assert_close(
        got, reference.cls_attention(q, k, size, scale), rtol=1e-9, atol=1e-9
    )


def test_is_the_class_tokens_row_of_attention() -> None:
    """Attention over values that are unit vectors returns its weights."""
    q, k = q_and_k(2, 3, 16, 16, 16, torch.float64)
    size = torch.randint(1, 5, (2, 16)).float()
    unit = torch.eye(16, dtype=torch.float64).expand(2, 3, 16, 16)
    rows = ops.attention(q, k, unit, size)
    torch.testing.assert_close(cls_attention(q, k, size), rows[:, :, 0].mean(1))


def test_hidden_keys_get_0() -> None:
    q, k = q_and_k(3, 2, 4, 30, 8, torch.float32)
    size = torch.ones(3, 30)
    size[0, 10:] = 0
    size[1] = 0
    got = cls_attention(q, k, size)
    assert not got[0, 10:].any()
    assert not got[1].any()
    torch.testing.assert_close(got[:1, :10], cls_attention(q[:1], k[:1, :, :10]))


@pytest.mark.parametrize("shape", [(0, 2, 1, 6, 8), (2, 2, 1, 0, 8)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    q, k = (x.detach().requires_grad_() for x in q_and_k(*shape, dtype=torch.float32))
    got = cls_attention(q, k)
    assert got.shape == (shape[0], shape[3])
    got.sum().backward()
    assert not q.grad.any()
    assert not k.grad.any()


def test_strided_inputs() -> None:
    q, k = q_and_k(2, 3, 5, 20, 16, torch.float32)
    size = torch.rand(2, 20) + 0.5
    expected = cls_attention(q, k, size)
    for spread in (
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
        lambda x: x.mT.contiguous().mT,
    ):
        assert torch.equal(cls_attention(spread(q), spread(k), size), expected)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("scale", [None, -0.8])
def test_gradients(sized: bool, scale: float | None) -> None:
    q, k = (x.clone().requires_grad_() for x in q_and_k(3, 2, 3, 6, 4, torch.float64))
    size = torch.randint(1, 5, (3, 6)).float() if sized else None
    if size is not None:
        size[0, 2:4] = 0
        size[1] = 0
    assert torch.autograd.gradcheck(lambda q, k: cls_attention(q, k, size, scale), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: cls_attention(q, k, size, scale), (q, k))


@pytest.mark.parametrize("scale", [None, -0.8])
def test_learned_sizes_get_their_gradient(scale: float | None) -> None:
    inputs = (*q_and_k(3, 2, 3, 6, 4, torch.float64), torch.randint(1, 5, (3, 6)).float())

    def exact(q: Tensor, k: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        weights = ((q[:, :, :1].double() @ k.double().mT) * (scale or 0.5)).exp()
        weights = weights * size.double()[:, None, None, :]
        return ((weights / weights.sum(-1, keepdim=True)).mean(1).squeeze(1),)

    assert_same_derivatives(
        lambda *x: (cls_attention(*x, scale=scale),), exact, inputs, rtol=1e-4, atol=1e-4
    )
    inputs[2][:, ::2] = 0
    size = inputs[2].requires_grad_()
    (grad,) = torch.autograd.grad(cls_attention(*inputs[:2], size, scale).square().sum(), size)
    assert grad.isfinite().all()
    assert not grad[size == 0].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_hidden_keys_hold_changes_nothing(dtype: torch.dtype, bad: float) -> None:
    q, k = q_and_k(3, 2, 3, 40, 12, dtype)
    size = torch.randint(0, 3, (3, 40)).float()
    size[1] = 0
    spoiled = torch.where((size == 0)[:, None, :, None], torch.tensor(bad, dtype=dtype), k)
    found = []
    for keys in (k, spoiled):
        live = [x.detach().clone().requires_grad_() for x in (q, keys)]
        out = cls_attention(*live, size)
        found.append((out, *torch.autograd.grad(out.square().sum(), live)))
        found[-1] += (reference.cls_attention(q, keys, size),)
    for clean, got in zip(*found, strict=True):
        assert torch.equal(clean, got)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_have_the_inputs_dtype(dtype: torch.dtype) -> None:
    inputs = q_and_k(2, 3, 5, 20, 16, dtype)
    upstream = torch.randn(2, 20)
    grads = []
    for kind in (dtype, torch.float64):
        q, k = (x.to(kind).requires_grad_() for x in inputs)
        out = cls_attention(q, k) if kind == dtype else explicit(q, k, None)
        grads.append(torch.autograd.grad(out, (q, k), upstream.to(out.dtype)))
    for got, want in zip(*grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, want.to(dtype))


def test_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(cls_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 50), (3, 41)):
        q, k = q_and_k(batch, 2, tokens, tokens, 16, torch.float32)
        k = k.clone().requires_grad_()
        size = torch.rand(batch, tokens)
        expected = cls_attention(q, k, size)
        (want,) = torch.autograd.grad(expected.square().sum(), k)
        out = compiled(q, k, size)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.square().sum(), k)[0], want)


Q, K = torch.randn(2, 2, 3, 5, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f(Q[0], K), r"q.*: expected \(B, H, M, D\).*\(3, 5, 8\) float32"),
        (lambda f: f(Q, K[:1]), r"expected .*\(1, 3, 5, 8\) float32"),
        (lambda f: f(Q, K[..., :4]), r"expected .*\(2, 3, 5, 4\) float32"),
        (lambda f: f(Q, K.half()), r"expected .*\(2, 3, 5, 8\) float16"),
        (lambda f: f(Q[:, :, :0], K), r"at least one.*\(2, 3, 0, 8\) float32"),
        (lambda f: f(Q[:, :0], K[:, :0]), r"at least one.*\(2, 0, 5, 8\) float32"),
        (lambda f: f(Q, K, torch.ones(2, 4)), r"size: expected .*\(2, 4\) float32"),
    ],
)
@pytest.mark.parametrize("function", [tome_ext.cls_attention, ops.cls_attention])
def test_wrong_arguments_are_refused(function, call, message: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(function)
