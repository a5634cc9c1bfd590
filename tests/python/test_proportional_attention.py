"""proportional_attention: what the operator serves, masks, autocast, other derivatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SIZE, K, Q, V, exact_attention, leaves, packed, sizes
from oracle import FLOATS
from torch import Tensor

import tome_ext
from tome_ext import ops, proportional_attention
from tome_ext.attention import attend, key_mask, unsupported

HALVES = (torch.float16, torch.bfloat16)


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
    assert reason(q, k, v, size.clone().requires_grad_()) is None
    assert attend(q, k, v, size, dropout_p=0.1)[1] == "attention dropout of 0.1"


def test_what_the_kernels_support() -> None:
    assert all(unsupported("cpu", dtype, 200) is None for dtype in FLOATS)
    assert unsupported("mps", torch.float32, 64) == "no kernel for mps"
    assert unsupported("cpu", torch.float8_e4m3fn, 64) == "no kernel for float8_e4m3fn on cpu"
    assert unsupported("cpu", torch.float32, 64, 0.1) == "attention dropout of 0.1"
    assert unsupported("cpu", torch.float32, 64, sized=False) is None
    assert unsupported("cuda", torch.float16, 64, sized=False) == "without sizes it is the same"
    if "cuda" in ops.kernel_devices:
        assert unsupported("cuda", torch.float16, 128) is None
        assert unsupported("cuda", torch.float64, 64) == "no kernel for float64 on cuda"
        assert unsupported("cuda", torch.float32, 136) == "heads of 136 channels, more than 128"
    else:
        assert unsupported("cuda", torch.float16, 128) == "no kernel for cuda"


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
        (lambda: proportional_attention(Q, K[..., :7], V), r"q, k, v: .* got .* k \(2, 3, 5, 7\)"),
        (lambda: proportional_attention(Q, K, V[:, :, :4]), r"q, k, v: .* got .* v \(2, 3, 4, 8\)"),
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


def test_derivatives_of_other_kinds_are_those_of_stock_attention() -> None:
    """Operators outside torch know reverse mode only, and would give tangents of 0 silently."""
    torch.manual_seed(2)
    q, k, v = packed(1, 2, 6, 6, 8, torch.float64)
    size = sizes(1, 6)

    def ours(x: Tensor) -> Tensor:
        return proportional_attention(x, k, v, size)

    def exact(x: Tensor) -> Tensor:
        return exact_attention(x, k, v, size)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        tangent = torch.randn_like(q)
        torch.testing.assert_close(
            torch.func.jvp(ours, (q,), (tangent,)), torch.func.jvp(exact, (q,), (tangent,))
        )
        got = torch.func.grad(lambda x: ours(x).square().sum())(q)
        torch.testing.assert_close(got, torch.func.grad(lambda x: exact(x).square().sum())(q))
    assert attend(q, k, v, size)[1] is None
