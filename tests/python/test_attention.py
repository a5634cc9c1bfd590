"""tome::attention and its gradient against float64, stock attention, the twin, and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import FLOATS, assert_error_within
from torch import Tensor

import tome_ext
from tome_ext import ops, proportional_attention, reference
from tome_ext.attention import attend, key_mask, log_size_bias, unsupported

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


def test_second_derivatives_are_refused() -> None:
    q, k, v = leaves(*packed(1, 1, 3, 3, 4))
    out = ops.attention(q, k, v, sizes(1, 3))
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    (again,) = torch.autograd.grad(ops.attention(q, k, v).square().sum(), q)
    assert again.shape == grad.shape
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


# --- errors -------------------------------------------------------------------------------------

Q, K, V = torch.randn(3, 2, 3, 5, 8)
SIZE = torch.ones(2, 5)


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
    with pytest.raises((RuntimeError, ValueError)) as error:
        call()
    assert expected in str(error.value)
    assert got in str(error.value)


# --- proportional_attention ---------------------------------------------------------------------


def reason(*args, **options) -> str | None:
    """Why the operator did not serve; checks the result on the way."""
    out, why = attend(*args, **options)
    assert torch.equal(proportional_attention(*args, **options), out)
    return why


def test_operator_serves_where_it_can_and_stock_attention_elsewhere() -> None:
    torch.manual_seed(1)
    q, k, v = packed(2, 3, 9, 9, 8)
    size = sizes(2, 9)
    keys_only = torch.rand(2, 1, 1, 9) > 0.3
    pairs = torch.rand(9, 9) > 0.3
    assert reason(q, k, v, size) is None
    assert reason(q, k, v, size, scale=0.2) is None
    assert reason(q[:, :, :4], k, v, size) is None
    assert reason(q, k, v, size, keys_only) is None
    assert reason(q, k, v, None, keys_only[:1]) is None
    assert reason(q, k, v) is None
    assert "mask" in (reason(q, k, v, size, pairs) or "")
    assert "mask" in (reason(q, k, v, size, torch.randn(2, 1, 1, 9)) or "")
    assert "channels" in (reason(q, k, v[..., :5], size) or "")
    assert "gradient" in (reason(q, k, v, size.clone().requires_grad_()) or "")
    assert attend(q, k, v, size, dropout_p=0.1)[1] == "attention dropout of 0.1"


def test_what_the_kernels_support() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert all(unsupported(cpu, dtype, 200) is None for dtype in FLOATS)
    assert unsupported(torch.device("mps"), torch.float32, 64) == "no kernel for mps"
    assert unsupported(cpu, torch.float8_e4m3fn, 64) == "no kernel for float8_e4m3fn on cpu"
    assert unsupported(cpu, torch.float32, 64, 0.1) == "attention dropout of 0.1"
    assert unsupported(cpu, torch.float32, 64, sized=False) is None
    assert unsupported(cuda, torch.float16, 64, sized=False) == "without sizes it is the same"
    if "cuda" in ops.kernel_devices:
        assert unsupported(cuda, torch.float16, 128) is None
        assert unsupported(cuda, torch.float64, 64) == "no kernel for float64 on cuda"
        assert unsupported(cuda, torch.float32, 136) == "heads of 136 channels, more than 128"
    else:
        assert unsupported(cuda, torch.float16, 128) == "no kernel for cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 1, 9), (1, 1, 1, 9), (1, 9), (9,), (2, 1, 1, 1)])
def test_masks_that_hide_keys_are_those_of_stock_attention(
    dtype: torch.dtype, sized: bool, shape: tuple[int, ...]
) -> None:
    q, k, v = packed(2, 3, 6, 9, 8, dtype)
    size = sizes(2, 9) if sized else None
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    bias = torch.zeros(shape).masked_fill(~mask, float("-inf"))
    bias = bias.reshape((1,) * (4 - bias.dim()) + bias.shape)
    if size is not None:
        bias = bias + size.log()[:, None, None, :]
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), bias.double())
    out, why = attend(q, k, v, size, mask)
    assert why is None
    torch.testing.assert_close(
        out.double(), expected, rtol=0, atol=4e-2 if dtype in HALVES else 1e-6
    )


def test_only_masks_that_hide_keys_are_taken_as_such() -> None:
    for shape in ((2, 1, 1, 9), (1, 1, 1, 9), (9,), (1, 9), (1, 1, 1, 1)):
        shown = key_mask(torch.ones(shape, dtype=torch.bool), 2, 9)
        assert shown is not None
        assert shown.shape == (2, 9)
    for shape in ((9, 9), (2, 1, 9, 9), (1, 3, 1, 9), (2, 1, 9, 1), (3, 1, 1, 9), (8,), (1,) * 5):
        assert key_mask(torch.ones(shape, dtype=torch.bool), 2, 9) is None
    assert key_mask(torch.ones(9), 2, 9) is None
    assert key_mask(None, 2, 9) is None


def test_dropout_drops_weights() -> None:
    q, k, v = packed(2, 3, 50, 50, 8)
    size = sizes(2, 50)
    kept = [proportional_attention(q, k, v, size, dropout_p=0.3) for _ in range(200)]
    assert not torch.equal(kept[0], kept[1])
    mean = torch.stack(kept).mean(0)
    assert (mean - proportional_attention(q, k, v, size)).abs().mean() < 0.02


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_autocast_is_that_of_stock_attention(half: torch.dtype) -> None:
    """q and k come out of a norm in float32 while v comes out of a projection in half precision."""
    q, k, v = packed(2, 3, 9, 9, 8)
    size = sizes(2, 9)
    expected = proportional_attention(q.to(half), k.to(half), v.to(half), size)
    cls = tome_ext.cls_attention(q.to(half), k.to(half), size)
    live = leaves(q, k, v)
    with torch.autocast("cpu", half):
        assert torch.equal(proportional_attention(q, k, v.to(half), size), expected)
        assert torch.equal(tome_ext.cls_attention(q, k.to(half), size), cls)
        out = proportional_attention(*live, size)
        assert out.dtype == half
        doubles = [x.double() for x in (q, k, v)]
        assert proportional_attention(*doubles, size).dtype == torch.float64
        stock = F.scaled_dot_product_attention(q, k, v.to(half), torch.zeros(9, 9))
        assert stock.dtype == half
    out.float().sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in live)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proportional_attention(Q, K, V.half(), SIZE), r"v \(2, 3, 5, 8\) float16"),
        (lambda: proportional_attention(Q, K.double(), V), r"expected one dtype .* got q"),
        (lambda: proportional_attention(Q, K, V.to("meta")), "one device.* on meta"),
        (lambda: proportional_attention(Q, K, V, SIZE[:, :3]), r"size: expected \(2, 5\)"),
        (
            lambda: proportional_attention(Q, K, V, SIZE.int()),
            "expected float32 on cpu, got .*int32",
        ),
        (lambda: proportional_attention(Q, K, V, SIZE.to("meta")), "got .* on meta"),
    ],
)
def test_wrong_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sizes_of_any_floating_dtype() -> None:
    expected = proportional_attention(Q, K, V, 3 * SIZE)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(proportional_attention(Q, K, V, (3 * SIZE).to(dtype)), expected)


def test_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 1 + torch.arange(10.0).reshape(2, 5)
    expected = proportional_attention(Q, K, V, size)
    cls = tome_ext.cls_attention(Q, K, size)
    monkeypatch.setattr(ops, "kernel_devices", ())
    out, why = attend(Q, K, V, size)
    assert why == "no kernel for cpu"
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(tome_ext.cls_attention(Q, K, size), cls)


def test_compiles_as_one_graph_for_all_lengths() -> None:
    torch.compiler.reset()

    def step(qkv: Tensor, size: Tensor | None, mask: Tensor | None) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return proportional_attention(q, k, v, size, mask).transpose(1, 2).flatten(2)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in ((2, 50), (3, 41)):
        size = sizes(batch, tokens)
        mask = torch.rand(batch, 1, 1, tokens) > 0.2
        for args in ((size, None), (size, mask), (None, mask)):
            qkv = torch.randn(batch, tokens, 3, 2, 16, requires_grad=True)
            expected = step(qkv, *args)
            (want,) = torch.autograd.grad(expected.square().sum(), qkv)
            out = compiled(qkv, *args)
            torch.testing.assert_close(out, expected)
            (grad,) = torch.autograd.grad(out.square().sum(), qkv)
            torch.testing.assert_close(grad, want)


def test_compiles_under_autocast() -> None:
    torch.compiler.reset()
    q, k, v = packed(2, 2, 9, 9, 8)
    size = sizes(2, 9)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return proportional_attention(q, k, v.bfloat16(), size)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), step(q, k, v))
