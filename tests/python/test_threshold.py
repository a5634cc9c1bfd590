"""Patched models that merge what is similar, in place of a number: ``threshold``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models import DEPTH, VARIANTS, images, plain_tome, tiny

import tome_ext


def kept(model: Any) -> list[int]:
    """How many tokens each image of the last forward has at its end."""
    counts: list[int] = (model.tome.size > 0).sum(1).tolist()
    return counts


@pytest.mark.parametrize("method", ["tome", "guided"])
@pytest.mark.parametrize("name", ["plain", "registers, layer scale", "no class token, avg"])
def test_one_image_is_plain_tome_by_threshold(name: str, method: str) -> None:
    model = tiny(**VARIANTS[name]).double()
    counts = set()
    for seed in range(4):
        x = images(1, seed=seed, dtype=torch.float64)
        for threshold in (0.6, 0.75):
            expected = plain_tome(model, x, [0] * DEPTH, method == "guided", threshold)
            with tome_ext.patch.timm(model, method=method, threshold=threshold):
                torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
                counts.add((threshold, *kept(model)))
    assert len(counts) > 3  # another number of tokens for another picture


@pytest.mark.parametrize("name", ["max", "avgmax", "attention pool", "no class token, avg"])
def test_pools_pass_over_rows_that_an_image_does_not_fill(name: str) -> None:
    model, x = tiny(**VARIANTS[name]).double(), images(6, dtype=torch.float64)
    tome_ext.patch.timm(model, threshold=0.7)
    together = model(x)
    assert len(set(kept(model))) > 1
    for image in range(6):
        alone = model(x[image : image + 1])
        torch.testing.assert_close(alone, together[image : image + 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_those_of_each_image_alone(train: bool) -> None:
    grads = []
    x = images(4, dtype=torch.float64)
    for parts in ([x], x.split(1)):
        model = tome_ext.patch.timm(tiny().double().train(train), threshold=0.7)
        for part in parts:
            model(part).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for together, alone in zip(*grads, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


def test_checkpointing_changes_nothing() -> None:
    x, grads = images(4), []
    for checkpointing in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(checkpointing)
        tome_ext.patch.timm(model, threshold=0.7)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_padding_and_thresholds_hide_each_other_not() -> None:
    """A mask that hides tokens, and rows that an image does not fill."""
    model, x = tiny().double(), images(4, dtype=torch.float64)
    shown = torch.rand(4, 1, 1, 65, generator=torch.Generator().manual_seed(0)) < 0.8
    shown[..., 0] = True
    tome_ext.patch.timm(model, threshold=0.7)
    together = model(x, attn_mask=shown)
    assert len(set(kept(model))) > 1
    for image in range(4):
        alone = model(x[image : image + 1], attn_mask=shown[image : image + 1])
        torch.testing.assert_close(alone, together[image : image + 1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["tome", "guided"])
def test_masks_of_pairs_leave_no_nan(method: Any, causal: bool) -> None:
    model, x = tiny().double(), images(4, dtype=torch.float64)
    pairs = torch.randn(1, 4, 65, 65, generator=torch.Generator().manual_seed(0)).double()
    options: dict[str, Any] = {"is_causal": True} if causal else {"attn_mask": pairs}
    tome_ext.patch.timm(model, method=method, threshold=0.7)
    together = model(x, **options)
    assert len(set(kept(model))) > 1
    assert together.isfinite().all()
    for image in range(4):
        alone = model(x[image : image + 1], **options)
        torch.testing.assert_close(alone, together[image : image + 1], rtol=0, atol=1e-10)


def test_a_class_token_that_sees_no_patch_guides_nothing() -> None:
    model, x = tiny(depth=1).double(), images(dtype=torch.float64)
    sees = torch.ones(1, 1, 65, 65, dtype=torch.bool)
    sees[..., 0, 1:] = False
    tome_ext.patch.timm(model, method="guided", threshold=0.999)
    model(x, attn_mask=sees)
    assert kept(model) == [65, 65]
    # With a number in its place, what is similar merges, and not what comes first.
    model.r = 8
    model(x, attn_mask=sees)
    guided = model.tome.plan.assign
    without = copy.deepcopy(model)
    without._tome.rules = without._tome.rules._replace(
        method=without._tome.rules.method.of_model(class_token=False)
    )
    without(x, attn_mask=sees)
    assert torch.equal(without.tome.plan.assign, guided)


def test_a_pool_goes_by_the_forward_that_its_tokens_come_from() -> None:
    model, x = tiny(**VARIANTS["max"]).double(), images(6, dtype=torch.float64)
    tome_ext.patch.timm(model, threshold=0.7)
    tokens = model.forward_features(x)
    expected = model.forward_head(tokens)
    model.r = 4
    assert torch.equal(model.forward_head(tokens), expected)


def test_what_never_merges_and_what_always_does() -> None:
    model, x = tiny(), images()
    expected = model(x)
    tome_ext.patch.timm(model, threshold=1.0)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert model.tome.num_tokens == 65
    model.threshold = -2.0
    model(x)
    assert model.tome.num_tokens == 1 + 64 // 2**DEPTH
    assert kept(model) == [1 + 64 // 2**DEPTH] * 2
    model.threshold = [None, -2.0]
    model(x)
    assert model.tome.num_tokens == 1 + 32
    assert model.tome.assigns[0] is None
    assert model.tome.assigns[2] is None


def test_setting_one_amount_puts_the_others_aside() -> None:
    model, x = tiny(), images()
    tome_ext.patch.timm(model, threshold=0.7)
    by_threshold = model(x)
    assert (model.r, model.keep_rate, model.threshold) == (0, None, 0.7)
    report = tome_ext.info(model)
    assert report["threshold"] == "0.7"
    assert "r" not in report
    model.r = 4
    assert (model.r, model.keep_rate, model.threshold) == (4, None, None)
    model.threshold = 0.7
    model.keep_rate = 0.8
    assert (model.r, model.keep_rate, model.threshold) == (0, 0.8, None)
    model.threshold = 0.7
    assert torch.equal(model(x), by_threshold)
    model._tome_info["r"] = 3
    assert (model.r, model.threshold) == (3, None)
    model.threshold = 0.7
    with pytest.raises(ValueError, match="threshold: expected prop_attn=True"):
        model._tome_info["prop_attn"] = False
    assert torch.equal(model(x), by_threshold)
    with pytest.raises(ValueError, match="threshold: expected method='tome' or 'guided'"):
        tome_ext.patch.timm(model, method="evit", threshold=0.7)
    assert torch.equal(model(x), by_threshold)


def test_pruned_models_and_copies_keep_it() -> None:
    model = tome_ext.patch.timm(tiny(), threshold=[0.5, None, 0.9])
    model.prune_intermediate_layers([1])
    assert model.threshold == [0.5, None]
    model(images())
    assert model.tome.layer == 2


def test_feature_maps_are_whole() -> None:
    model, x = tiny().double(), images(4, dtype=torch.float64)
    tome_ext.patch.timm(model, threshold=0.7)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert len(set(kept(model))) > 1
    for image in range(4):
        alone = model.forward_intermediates(x[image : image + 1], intermediates_only=True)
        for part, whole in zip(alone, maps, strict=True):
            assert whole.shape == (4, 32, 8, 8)
            torch.testing.assert_close(part, whole[image : image + 1], rtol=0, atol=1e-10)


def test_an_export_is_refused() -> None:
    model = tome_ext.patch.timm(tiny(), threshold=0.7)
    with pytest.raises(Exception, match="threshold: how many tokens are left depends on"):
        torch.export.export(model, (images(),))
    with (
        pytest.warns(torch.jit.TracerWarning),
        pytest.raises(RuntimeError, match="threshold: how many tokens are left depends on"),
    ):
        torch.jit.trace(model, (images(),))


def test_a_compiled_model_breaks_its_graph_and_answers_right() -> None:
    model, x = tiny(depth=2).double(), images(3, dtype=torch.float64)
    tome_ext.patch.timm(model, threshold=0.7)
    expected = model(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="threshold: how many tokens are left depends on"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)
    other = images(3, seed=5, dtype=torch.float64)
    torch.testing.assert_close(compiled(other), model(other), rtol=0, atol=1e-12)
