"""Checks an installed wheel under another torch or Python than the one that built it.

The operators, not the patches: a CPU torch and timm's torchvision may not go together. Run by
.ci/run, as ``python tests/second_torch.py``.
"""

from __future__ import annotations

import platform

import torch

import tome_ext
from tome_ext import _library, reference


def check(dtype: torch.dtype) -> None:
    """Every operator against its pure-torch twin, and torch's own checks of its registration."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 50, 16, generator=generator).to(dtype)
    x = torch.randn(2, 50, 24, generator=generator).to(dtype)
    size = torch.randint(1, 4, (2, 50), generator=generator).float()

    plan = tome_ext.match(keys, 12, 1)
    for got, want in zip(plan, reference.match(keys, 12, 1), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    weight = size * (torch.rand(2, 50, generator=generator) < 0.7)
    wanted = reference.match(keys, 12, 1, weight=weight)
    for got, want in zip(tome_ext.match(keys, 12, 1, weight=weight), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    for reduce in reference.REDUCTIONS:
        merged = plan.merge(x, size, reduce)
        wanted = reference.merge(x, size, plan.members, plan.offsets, reduce)
        for got, want in zip(merged, wanted, strict=True):
            torch.testing.assert_close(got, want)
    branch = torch.randn(2, 50, 24, generator=generator).to(dtype)
    vectors = torch.randn(3, 24, generator=generator).to(dtype).unbind()
    added = (x, branch, size, plan.members, plan.offsets, *vectors, 1e-5)
    wanted = reference.merge_add_norm(*added)
    for got, want in zip(torch.ops.tome.merge_add_norm(*added), wanted, strict=True):
        torch.testing.assert_close(got, want)
    rows = plan.merge(x, size)[0]
    torch.testing.assert_close(plan.unmerge(rows), reference.unmerge(rows, plan.assign))

    q, v = (torch.randn(2, 3, 50, 16, generator=generator).to(dtype) for _ in range(2))
    out, lse = torch.ops.tome.attention_forward(q, keys, v, size)
    wanted_out, wanted_lse = reference.attention_forward(q, keys, v, size)
    if dtype == torch.bfloat16:
        # With AVX512-BF16 the softmax weights are rounded before they meet v: half a unit in the
        # last place of each term. The rest is assert_close's own tolerance.
        terms = reference.attention_forward(q, keys, v.abs(), size)[0].float()
        allowed = torch.finfo(dtype).eps / 2 * terms + 1e-5 + 1.6e-2 * wanted_out.float().abs()
        assert ((out.float() - wanted_out.float()).abs() <= allowed).all()
    else:
        torch.testing.assert_close(out, wanted_out)
    torch.testing.assert_close(lse, wanted_lse)
    torch.testing.assert_close(torch.ops.tome.attention(q, keys, v, size), out)
    backward = (torch.randn(2, 3, 50, 16, generator=generator).to(dtype), q, keys, v, size)
    wanted = reference.attention_backward(*backward, out, lse)
    for got, want in zip(
        torch.ops.tome.attention_backward(*backward, out, lse), wanted, strict=True
    ):
        torch.testing.assert_close(got, want)
    scores = tome_ext.cls_attention(q, keys, size)
    torch.testing.assert_close(scores, reference.cls_attention(q, keys, size))

    ops, live = torch.ops.tome, x.clone().requires_grad_()
    torch.library.opcheck(ops.match.default, (keys, 12, 1))
    torch.library.opcheck(ops.match.default, (keys, 12, 1), {"weight": weight})
    torch.library.opcheck(ops.plan.default, (plan.assign, plan.num_output_tokens))
    torch.library.opcheck(ops.merge.default, (live, size, plan.members, plan.offsets))
    torch.library.opcheck(ops.merge_add_norm.default, (live, *added[1:]))
    torch.library.opcheck(ops.unmerge.default, (rows.detach().requires_grad_(), plan.assign))
    query = q.clone().requires_grad_()
    torch.library.opcheck(ops.attention.default, (query, keys, v, size))
    torch.library.opcheck(ops.attention_forward.default, (query, keys, v, size))
    torch.library.opcheck(ops.attention_backward.default, (*backward, out, lse))
    torch.library.opcheck(ops.cls_attention.default, (query, keys, size))


def check_errors() -> None:
    """An error of an operator that calls another keeps its text, under every torch."""
    q = torch.zeros(1, 1, 4, 8)
    try:
        torch.ops.tome.attention(q, q[:, :, :, :7], q)
    except (ValueError, RuntimeError) as error:  # the latter from torch 2.15 on
        if "k: expected (B, H, N, D) = (1, 1, N, 8) float32" not in str(error):
            raise
    else:
        raise AssertionError("expected an error of shapes that do not go together, got none")


def main() -> None:
    """Check all dtypes and print what was checked."""
    _library.require()
    check_errors()
    built = _library.build_info()["torch"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        check(dtype)
    print(f"built with torch {built} by {_library.build_info()['compiler']}, works under")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    print(f"CUDA library: {_library.cuda_status()}")


if __name__ == "__main__":
    main()
