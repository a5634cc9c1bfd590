"""Eager ways of running: grad modes, autocast, channels_last, CUDA graphs, and no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import DEPTH, RUN, VARIANTS, images, tiny
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import tome_ext

R = 8
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=RUN)
def model(request: pytest.FixtureRequest) -> Any:
    return tome_ext.patch.timm(tiny(**VARIANTS[request.param]), r=R)


# --- grad modes ---------------------------------------------------------------------------------


GRAD_MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("second", GRAD_MODES)
@pytest.mark.parametrize("first", GRAD_MODES)
def test_grad_modes_give_the_same_bits_in_any_order(model: Any, first: Any, second: Any) -> None:
    x = images(3)
    expected = model(x)
    want = model.tome
    with first():
        features = model.forward_features(x)
        model(images(5, seed=1))  # a forward in between
    with torch.inference_mode(features.is_inference()):
        assert torch.equal(model.forward_head(features), expected)
    with second():
        assert torch.equal(model(x), expected)
    assert torch.equal(model.tome.size, want.size)
    assert torch.equal(model.tome.plan.assign, want.plan.assign)
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_sizes_found_in_inference_mode_serve_outside(model: Any) -> None:
    with torch.inference_mode():
        model.forward_features(images())
    left = model.tome.num_tokens
    spread = model.tome.plan.unmerge(torch.randn(2, left, 4, requires_grad=True))
    spread.sum().backward()
    assert spread.shape == (2, model.num_prefix_tokens + 64, 4)
    assert (model.tome.size.sum(1) == spread.shape[1]).all()


# --- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_casts_neither_keys_nor_tokens(half: torch.dtype, dtype: torch.dtype) -> None:
    # Keys so alike that the half types choose other pairs: a cast would show.
    keys = (1 + 1e-3 * torch.randn(2, 4, 65, 16)).to(dtype)
    x = torch.randn(2, 65, 32).to(dtype)
    plan = tome_ext.match(keys, 20, 1)
    merged, size = plan.merge(x)
    spread = plan.unmerge(merged)
    if dtype not in HALVES:
        assert not torch.equal(tome_ext.match(keys.to(half), 20, 1).assign, plan.assign)
    with torch.autocast("cpu", half):
        again = tome_ext.match(keys, 20, 1)
        results = (*again, *again.merge(x), again.unmerge(merged))
    for got, want in zip(results, (*plan, merged, size, spread), strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("half", HALVES)
def test_autocast_chooses_pairs_by_the_keys_that_attention_sees(
    model: Any, half: torch.dtype
) -> None:
    """The keys come from Linear in the half type; the tokens stay float32, and so do sizes."""
    keys: list[Tensor] = []
    tokens: list[torch.dtype] = []
    for block in model.blocks:
        block.attn.qkv.register_forward_hook(
            lambda module, args, out: keys.append(out.unflatten(-1, (3, 4, 8))[:, :, 1])
        )
        block.register_forward_hook(lambda module, args, out: tokens.append(out.dtype))
    with torch.no_grad(), torch.autocast("cpu", half):
        y = model(images())
    want = model.tome
    assert [k.dtype for k in keys] == [half] * DEPTH
    assert tokens == [torch.float32] * DEPTH
    assert want.size.dtype == torch.float32
    for k, assign in zip(keys, want.assigns, strict=True):
        plan = tome_ext.match(k.transpose(1, 2), R, model.num_prefix_tokens)
        assert torch.equal(plan.assign, assign)
    assert y.isfinite().all()


def test_autocast_compiled(model: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images())
        want = model.tome
        got = compiled(images())
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert torch.equal(model.tome.size, want.size)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", [*RUN, "attention pool"])
def test_autocast_in_training(name: str, half: torch.dtype) -> None:
    model = tiny(unfused=True, **VARIANTS[name]).train()
    tome_ext.patch.timm(model, r=R)
    x = images(4)
    results = []
    for checkpointed in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointed)
        with torch.autocast("cpu", half):
            loss = model(x).float().square().mean()
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        assert plain.dtype == torch.float32
        assert plain.isfinite().all()
        torch.testing.assert_close(again, plain)
    # The same pairs as in float32 would give nearly the same loss; others do not change its scale.
    with torch.no_grad():
        exact = model(x).square().mean()
    assert 0.5 * exact < results[0][0] < 2 * exact


# --- memory format ------------------------------------------------------------------------------


def test_channels_last(model: Any) -> None:
    x = images(3)
    expected = model(x)
    want = model.tome
    layout = {"memory_format": torch.channels_last}
    for images_last, model_last in ((True, False), (True, True), (False, True)):
        patched = model.to(**layout) if model_last else model
        got = patched(x.to(**layout) if images_last else x)
        torch.testing.assert_close(got, expected)
        assert torch.equal(model.tome.plan.assign, want.plan.assign)
    got.sum().backward()
    assert model.patch_embed.proj.weight.grad.isfinite().all()


# --- nothing waits for the device ---------------------------------------------------------------


def test_nothing_reads_a_tensor_on_the_host(model: Any) -> None:
    """Fake tensors have no values: whatever asked for one would raise."""
    fake = FakeTensorMode()
    parameters = {name: fake.from_tensor(p) for name, p in model.named_parameters()}
    with fake:
        y = torch.func.functional_call(model, parameters, (fake.from_tensor(images(3)),))
        y.sum().backward()
        with pytest.raises(DataDependentOutputException):
            y.sum().item()
    assert y.shape == (3, 5)
    assert model.tome.size.shape == (3, model.num_prefix_tokens + 64 - R * DEPTH)
    assert tome_ext.info(model)["attention"] == f"blocks 0-{DEPTH - 1}: tome::attention"
    assert all(p.grad is not None for p in parameters.values())


@pytest.mark.cuda
def test_nothing_waits_for_the_gpu(model: Any) -> None:
    model.cuda()
    x = images(3, device="cuda")
    model(x).sum().backward()  # what only a first call does
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.r = 4
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- CUDA graphs --------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_model(model: Any, dtype: torch.dtype) -> None:
    check_capture(model, dtype)


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["guided", "evit", "topk"])
@pytest.mark.parametrize("inference", [False, True])
def test_captured_model_of_every_method(method: Any, inference: bool) -> None:
    model = tome_ext.patch.timm(tiny(), r=R, method=method, inference=inference)
    check_capture(model, torch.bfloat16)


@torch.no_grad()
def check_capture(model: Any, dtype: torch.dtype) -> None:
    model.cuda().to(dtype)
    static = images(2, device="cuda", dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(static)
    tokens = model.tome
    for seed in range(4):
        static.copy_(images(2, seed=seed))
        graph.replay()
        expected = model(static)
        torch.testing.assert_close(y, expected)
        # The tokens of the capture are those of the replay.
        assert torch.equal(tokens.plan.assign, model.tome.plan.assign)
        assert (tokens.size is None) == (model.tome.size is None)
        assert tokens.size is None or torch.equal(tokens.size, model.tome.size)
