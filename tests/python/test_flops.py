"""Floating point operations, as torch's counter counts them."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import tome_ext
from tome_ext import ops


def flops(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def test_every_operator_has_a_formula() -> None:
    for name in ops.NAMES:
        assert getattr(torch.ops.tome, name) in flop_registry


def test_operators_count_their_products() -> None:
    q = torch.randn(2, 3, 10, 8, requires_grad=True)
    size = torch.ones(2, 10)
    attention = 2 * 2 * 2 * 3 * 10 * 10 * 8  # two products
    assert flops(lambda: torch.ops.tome.attention(q, q, q, size)) == attention
    assert flops(lambda: F.scaled_dot_product_attention(q, q, q)) == attention
    for function in (torch.ops.tome.attention, F.scaled_dot_product_attention):
        with_gradient = flops(lambda f=function: f(q, q, q).sum().backward())
        assert with_gradient == attention + attention // 2 * 5  # that of scores is made anew
    assert flops(lambda: torch.ops.tome.match(q[:, :, :9], 2)) == 2 * 2 * 5 * 4 * 8
    assert flops(lambda: torch.ops.tome.match(q[:, :, :9], 2, 1)) == 2 * 2 * 4 * 4 * 8
    assert flops(lambda: torch.ops.tome.match(q, 0)) == 0
    targets = torch.tensor([2, 5, 7], dtype=torch.int32)
    assert flops(lambda: tome_ext.match(q.detach(), 2, 1, targets=targets)) == 2 * 2 * 6 * 3 * 8
    assert flops(lambda: torch.ops.tome.cls_attention(q, q)) == 2 * 2 * 3 * 10 * 8
    plan = tome_ext.match(q.detach(), 2)
    x = torch.randn(2, 10, 8)
    assert flops(lambda: plan.unmerge(plan.merge_add_norm(x, x)[0])) == 0


@pytest.mark.parametrize("method", ["tome", "guided", "topk", "evit"])
@pytest.mark.parametrize("r", [0, 1, 5])
def test_a_patched_model_counts_what_it_computes(method: str, r: int) -> None:
    """By the numbers of tokens: nothing is lost, attention least of all."""
    depth, dim, heads = 3, 64, 4
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=depth, embed_dim=dim, num_heads=heads
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    whole = flops(lambda: model(images))
    tome_ext.patch.auto(model, r, method=method)
    want = 2 * 16 * (3 * 16 * 16) * dim + 2 * dim * 1000
    tokens = 17
    for _ in range(depth):
        left = max(tokens - r, 1 + -(-(tokens - 1) // 2)) if method in ("tome", "guided") else None
        left = left or max(tokens - r, 3 if method == "evit" else 2)
        left = min(left, tokens)
        want += 2 * tokens * dim * 4 * dim + 4 * tokens * tokens * dim + 2 * left * dim * 8 * dim
        if left < tokens:
            patches = tokens - 1
            pairs = (patches // 2) * (patches - patches // 2)
            scores = {"tome": pairs * (dim // heads), "guided": pairs * dim + tokens * dim}
            want += 2 * scores.get(method, tokens * dim)
        tokens = left
    assert flops(lambda: model(images)) == 2 * want
    assert r > 0 or 2 * want == whole


def test_a_counter_that_is_looked_for_first_or_loaded_again(run_python: Any) -> None:
    run = run_python("""
import importlib, importlib.util, sys, tome_ext, torch
assert importlib.util.find_spec("torch.utils.flop_counter") is not None
import torch.utils.flop_counter as counter
print(torch.ops.tome.match in counter.flop_registry)
importlib.reload(counter)
print(torch.ops.tome.match in counter.flop_registry)
""")
    assert (run.returncode, run.stdout) == (0, "True\nTrue\n"), run.stderr[-2000:]


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "tome_ext"])
def test_imports_in_any_order(run_python: Any, first: str) -> None:
    second = {"tome_ext": "torch.utils.flop_counter"}.get(first, "tome_ext")
    program = f"""
import sys, {first}
assert {first!r} != "tome_ext" or "torch.utils.flop_counter" not in sys.modules
import {second}
import torch
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 1, 4, 8)
with FlopCounterMode(display=False) as counter:
    torch.ops.tome.attention(q, q, q)
print(counter.get_total_flops())
"""
    run = run_python(program)
    assert (run.returncode, run.stdout) == (0, "512\n"), run.stderr[-2000:]
