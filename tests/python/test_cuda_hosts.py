"""Patched models of every library on a GPU: as on the CPU, and in the dtypes they are run in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_cases import Case, Inputs, all_cases, cast
from torch import Tensor, nn

import tome_ext

pytestmark = pytest.mark.cuda
CASES = all_cases()
PAIRED = [case for case in CASES if case.equal_tokens is not None]
RANKED = [case for case in CASES if case.class_token]


def on_gpu(inputs: Inputs) -> Inputs:
    return {key: x.cuda() if isinstance(x, Tensor) else x for key, x in inputs.items()}


def run(case: Case, model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return case.output(model(**inputs))


def check_gpu_agrees(case: Case, **options: Any) -> None:
    """In float64, where rounding changes no choice: another one would change far more than what
    rotary tables differ by, which libraries make in float32 on the device."""
    model = tome_ext.patch.auto(case.make().double(), **{**case.options, **options})
    inputs = cast(case.inputs(2, 0), torch.float64)
    expected = run(case, model, inputs)
    sizes = model.tome.size
    y = run(case, model.cuda(), on_gpu(inputs))
    scale = expected.abs().max().item()
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=1e-5 * scale)
    assert (sizes is None) == (model.tome.size is None)
    assert sizes is None or torch.equal(model.tome.size.cpu(), sizes)


@pytest.mark.parametrize("method", ["tome", "guided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_merged_as_on_the_cpu(case: Case, method: str) -> None:
    check_gpu_agrees(case, r=4, method=method)


@pytest.mark.parametrize("method", ["tome", "guided"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_a_threshold_as_on_the_cpu(case: Case, method: str) -> None:
    check_gpu_agrees(case, method=method, threshold=0.3)


@pytest.mark.parametrize("method", ["evit", "topk"])
@pytest.mark.parametrize("case", RANKED, ids=str)
def test_pruned_as_on_the_cpu(case: Case, method: str) -> None:
    check_gpu_agrees(case, r=4, method=method)


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_merging_equal_tokens_changes_nothing_in_float32(case: Case) -> None:
    assert case.equal_tokens is not None
    model = case.make().cuda()
    inputs = on_gpu(case.equal_tokens(model, case.inputs(2, 0)))
    expected = run(case, model, inputs)
    r = [(case.num_tokens - case.num_prefix_tokens) // 2]
    tome_ext.patch.auto(model, **{"r": r, **case.options})
    y = run(case, model, inputs)
    assert model.tome.num_tokens < case.num_tokens
    scale = expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_16_bit_inference(case: Case, dtype: torch.dtype) -> None:
    """Tokens and images are counted right; what a batch gives, each image gives alone, nearly."""
    model = case.make().cuda().to(dtype)
    inputs = on_gpu(cast(case.inputs(2, 0), dtype))
    plain = run(case, model, inputs)
    tome_ext.patch.auto(model, **{"r": 4, "inference": True, **case.options})
    y = run(case, model, inputs)
    assert y.dtype == plain.dtype
    assert y.isfinite().all() or not plain.isfinite().all()
    assert model.tome.num_tokens == case.num_tokens - 4 * case.depth
    assert (model.tome.size.sum(1) == case.num_tokens).all()
    model.r = 0
    assert torch.equal(run(case, model, inputs), plain)
