"""EViT and Top-K in a patched model: against the papers written out plainly, and every setting."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from models import DEPTH, GRID, VARIANTS, images, plain_pruning, tiny
from PIL import Image
from torch import Tensor, nn

import tome_ext
from tome_ext import vis
from tome_ext.bench._contenders import sliced
from tome_ext.patch.common.methods import (
    METHODS,
    AttentionInputs,
    Given,
    Method,
    Ranks,
    make_method,
)

PATCHES = GRID * GRID
PRUNING = ("evit", "topk")
# How tokens are counted, and how many of the 64 patch tokens are kept by layer.
AMOUNTS: dict[str, tuple[dict[str, Any], dict[str, list[int]]]] = {
    "r": ({"r": 9}, {"topk": [55, 46, 37], "evit": [54, 45, 36]}),
    "a rate": ({"keep_rate": 0.7}, {"topk": [45, 32, 23], "evit": [45, 33, 24]}),
    "rates": ({"keep_rate": [1.0, 0.5, 0.9]}, {"topk": [64, 32, 29], "evit": [64, 32, 30]}),
}
# Twins know these; the class token's attention is what differs between them.
MODELS = ("plain", "registers, layer scale", "class token, avg", "distilled", "q/k norm", "unfused")


def blocks_of(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The logits, and the tokens after every block."""
    after: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, y: after.append(y)) for block in model.blocks
    ]
    logits = model(x, **options)
    for hook in hooks:
        hook.remove()
    return logits, after


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize(
    ("method", "normalize"), [("topk", False), ("evit", False), ("evit", True)], ids=str
)
def test_every_layer_equals_the_papers(
    name: str, amount: str, method: str, normalize: bool
) -> None:
    model, x = tiny(**VARIANTS[name]).double(), images(dtype=torch.float64)
    setting, keeps = AMOUNTS[amount]
    fuse = method == "evit"
    expected, layers = plain_pruning(model, x, keeps[method], fuse, normalize)
    tome_ext.patch.timm(model, method=method, normalize_fused=normalize, **setting)
    logits, found = blocks_of(model, x)
    for mine, wanted in zip(found, layers, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    # In float32 by the kernels, whose rounding may not change a choice on these images.
    logits = model.float()(x.float())
    torch.testing.assert_close(logits, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("method", PRUNING)
def test_gradients_equal_the_papers(method: str, normalize: bool, weight_grad: bool) -> None:
    model, x = tiny(init_values=0.5).double(), images(dtype=torch.float64)
    keeps = AMOUNTS["rates"][1][method]
    plain_pruning(model, x, keeps, method == "evit", normalize, weight_grad)[
        0
    ].square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    tome_ext.patch.timm(
        model,
        method=method,
        keep_rate=[1.0, 0.5, 0.9],
        normalize_fused=normalize,
        fused_weight_grad=weight_grad,
    )
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-9)
    double = {name: p.grad.float() for name, p in model.named_parameters()}
    model.zero_grad()
    model.float()(x.float()).square().sum().backward()
    for name, p in model.named_parameters():
        scale = float(double[name].abs().max())
        torch.testing.assert_close(p.grad, double[name], rtol=0, atol=1e-3 * scale + 1e-5)


def test_gradients_through_the_weights_differ() -> None:
    """Or the test above would show nothing about them."""
    x, grads = images(), []
    for weight_grad in (False, True):
        model = tome_ext.patch.timm(
            tiny(), keep_rate=0.5, method="evit", fused_weight_grad=weight_grad
        )
        model(x).square().sum().backward()
        grads.append(model.blocks[0].attn.qkv.weight.grad)
    assert (grads[0] - grads[1]).abs().max() > 1e-3 * grads[0].abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_folding_residual_and_norm_in_changes_nothing(method: str) -> None:
    x = images()
    model = tome_ext.patch.timm(
        tiny(init_values=0.5), keep_rate=0.6, method=method, normalize_fused=True
    )
    expected = model(x)
    for block in model.blocks:  # an observed module is called by itself
        block.norm2.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_rate_of_tome_is_the_r_that_leaves_as_many() -> None:
    model, x = tiny(), images()
    by_rate = tome_ext.patch.timm(model, keep_rate=0.7)(x)
    left = [model.tome.plan_after(layer + 1).num_output_tokens for layer in range(3)]
    assert left == [1 + 45, 1 + 32, 1 + 23]
    model.r = [19, 13, 9]
    assert torch.equal(model(x), by_rate)


# --- what is done by a setting -------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_r_and_keep_rate_put_each_other_aside(method: str) -> None:
    model, x = tiny(), images()
    expected = model(x)
    tome_ext.patch.timm(model, method=method)
    assert model.method == method
    assert (model.r, model.keep_rate) == (0, None)
    assert torch.equal(model(x), expected)
    model.keep_rate = 0.7
    assert (model.r, model.keep_rate) == (0, 0.7)
    by_rate = model(x)
    assert model.tome.num_tokens == (25 if method == "evit" else 23) + 1
    model.r = 4
    assert (model.r, model.keep_rate) == (4, None)
    model(x)
    assert model.tome.num_tokens == 1 + PATCHES - 3 * 4
    model.keep_rate = 0.7
    assert torch.equal(model(x), by_rate)
    model.keep_rate = None
    assert torch.equal(model(x), expected)
    report = tome_ext.info(model)
    assert (report["method"], report["r"], report.get("keep rate")) == (method, "0", None)
    tome_ext.patch.remove(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("amount", [{"r": 1000}, {"keep_rate": [1e-9] * DEPTH}])
def test_at_least_one_patch_token_stays(method: str, amount: dict[str, Any]) -> None:
    model = tome_ext.patch.timm(tiny(), method=method, **amount)
    assert model(images()).isfinite().all()
    assert model.tome.num_tokens == (3 if method == "evit" else 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "prune"},
            r"method: expected one of \('tome', 'guided', 'evit', 'topk'\), got 'prune'",
        ),
        (
            {"r": 3, "keep_rate": 0.7},
            "expected one of r, keep_rate and threshold, got r=3, keep_rate=0.7",
        ),
        ({"r": 3, "threshold": 0.9}, "got r=3, threshold=0.9"),
        ({"keep_rate": 0.8, "threshold": 0.9}, "got keep_rate=0.8, threshold=0.9"),
        ({"threshold": 0.9, "method": "topk"}, "expected method='tome' or 'guided', .* 'topk'"),
        ({"threshold": 0.9, "prop_attn": False}, "threshold: expected prop_attn=True with it"),
        ({"threshold": 1.5}, "threshold: expected a cosine similarity of at most 1, got 1.5"),
        ({"threshold": [0.5] * 9}, "threshold: expected at most 3 entries"),
        ({"keep_rate": 0.3}, "expected at least 0.5, as tome merges at most half"),
        ({"keep_rate": [0.8, 0.4]}, "half of a layer's tokens, got 0.4 in layer 1"),
        ({"keep_rate": 0.0, "method": "topk"}, r"share of the tokens in \(0, 1\], got 0.0"),
        ({"keep_rate": [0.5] * 9, "method": "evit"}, "at most 3 entries"),
        ({"prop_attn": "no"}, r"prop_attn: expected True or False, got 'no' \(str\)"),
        ({"prop_attn": 1}, "prop_attn: expected True or False, got 1"),
        ({"trace_source": "false"}, "trace_source: expected True or False, got 'false'"),
        ({"restore_tokens": None}, "restore_tokens: expected True or False, got None"),
        ({"inference": 0}, "inference: expected True or False, got 0"),
        ({"method": "evit", "normalize_fused": []}, "normalize_fused: expected True or False"),
        ({"fused_weight_grad": "0"}, "fused_weight_grad: expected True or False, got '0'"),
        ({"method": ["tome"]}, r"method: expected one of .* got \['tome'\]"),
        ({"r": True}, "r: expected an integer"),
        ({"r": (3, "1")}, "expected .* a number as inflection"),
        ({"r": -1}, "r: expected an integer >= 0, got -1"),
        ({"r": float("nan")}, "r: expected an integer"),
        ({"keep_rate": float("nan")}, r"share of the tokens in \(0, 1\], got nan"),
        ({"keep_rate": "0.7"}, "keep_rate: expected a number, got '0.7'"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(
    settings: dict[str, Any], message: str
) -> None:
    model = tiny()
    with pytest.raises(ValueError, match=message):
        tome_ext.patch.timm(model, **settings)
    assert type(model) is type(tiny())
    tome_ext.patch.timm(model, method="evit", keep_rate=0.7, normalize_fused=True)
    expected = model(images())
    with pytest.raises(ValueError, match=message):
        tome_ext.patch.timm(model, **settings)
    assert (model.method, model.keep_rate) == ("evit", 0.7)
    assert torch.equal(model(images()), expected)
    with pytest.raises(ValueError, match="share of the tokens"):
        model.keep_rate = 7
    assert torch.equal(model(images()), expected)


def test_tokens_of_a_layer() -> None:
    tome, evit, topk = (make_method(name) for name in ("tome", "evit", "topk"))
    # DeiT at EViT's default: 196 patches, of which ceil(0.7 * 196) stay, and the fused token.
    assert evit.kept(196, 0, 0.7) == 138
    assert evit.tokens_after(197, 1, 0, 0.7) == 140
    assert topk.tokens_after(197, 1, 0, 0.7) == 139
    assert tome.tokens_after(197, 1, 0, 0.7) == 139
    # With r all remove as many.
    for method in (tome, evit, topk):
        assert method.tokens_after(197, 1, 13, None) == 184
        assert method.tokens_after(197, 1, 0, None) == 197
    # As many as there are.
    assert tome.tokens_after(12, 1, 50, None) == 7
    assert topk.tokens_after(12, 1, 50, None) == 2
    assert evit.tokens_after(12, 1, 50, None) == 3
    assert evit.tokens_after(1, 1, 50, None) == 1
    assert topk.tokens_after(5, 1, 0, 1.0) == 5


class Front(Method):
    """A method of one's own: keep the patch tokens that come first."""

    name = "front"  # type: ignore[assignment]
    needs_class_token = False

    def rank(self, of: AttentionInputs) -> Ranks:
        k = of.k
        first = -torch.arange(k.shape[2], device=k.device).expand(k.shape[0], -1).float()
        return Ranks(None, first)

    def plan(self, ranks: Ranks, amount: int, prefix: int, given: Given) -> Any:
        assert ranks.scores is not None
        return tome_ext.select(ranks.scores, amount, prefix)


@pytest.mark.parametrize("amount", [{"r": 9}, {"keep_rate": [1.0, 0.3]}], ids=str)
def test_a_method_of_ones_own_is_one_class(
    amount: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "front", Front)
    model, x = tiny(), images()
    ceiling = sliced(copy.deepcopy(model), tome_ext._command.Reduction("front", **amount))
    tome_ext.patch.timm(model, method="front", **amount)
    # Dropping all but the first tokens is what slicing does.
    torch.testing.assert_close(model(x), ceiling(x), rtol=1e-4, atol=1e-4)
    left = 65 - 9 * DEPTH if "r" in amount else 1 + 20
    assert model.tome.num_tokens == left
    assert model.method == "front"


@pytest.mark.parametrize("method", PRUNING)
def test_models_without_a_class_token_are_refused(method: str) -> None:
    model = tiny(**VARIANTS["no class token, avg"])
    message = "this model has no class token; expected one that has, or method='tome' or 'guided'"
    with pytest.raises(ValueError, match=message):
        tome_ext.patch.timm(model, method=method, r=3)
    assert type(model).__name__ == "VisionTransformer"
    tome_ext.patch.timm(model, r=3)


@pytest.mark.parametrize("method", ["guided", *PRUNING])
def test_copies_keep_the_method(method: str) -> None:
    x = images()
    model = tome_ext.patch.timm(tiny(), method=method, keep_rate=0.7, normalize_fused=True)
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert (copied.method, copied.keep_rate) == (method, 0.7)
        assert torch.equal(copied(x), expected)
    model.prune_intermediate_layers(2)
    assert model.keep_rate is not None
    assert model.forward_features(x).shape[1] == model.tome.num_tokens


# --- what is left of dropped tokens --------------------------------------------------------------


def test_dropped_tokens_are_nowhere() -> None:
    model, x = tiny(), images()
    tome_ext.patch.timm(model, method="topk", keep_rate=0.5)
    features = model.forward_features(x)
    plan = model.tome.plan
    assert model.tome.size is None
    dropped = plan.assign < 0
    assert dropped.sum(1).tolist() == [PATCHES - 8] * 2
    assert not dropped[:, 0].any()
    spread = plan.unmerge(features)
    assert (spread[dropped] == 0).all()
    assert torch.equal(spread[~dropped].unflatten(0, (2, -1)), features)
    maps = model.forward_intermediates(x, indices=1, intermediates_only=True)[0]
    zero = (maps == 0).all(1).flatten(1)
    assert torch.equal(zero, dropped[:, 1:])
    # Of a white picture they are dark.
    white = Image.new("RGB", (4 * GRID, 4 * GRID), "white")
    shown = np.array(vis.make_visualization(white, plan.assign[:1], patch_size=4))
    brightest = torch.from_numpy(shown).amax(2).unfold(0, 4, 4).unfold(1, 4, 4).amax((2, 3))
    assert torch.equal(brightest < 100, dropped[0, 1:].view(GRID, GRID))


def test_any_tokens_may_be_pooled_after_pruning() -> None:
    """They count once, so nothing need be known about them."""
    model = tiny(global_pool="avg")
    tokens = torch.randn(2, 11, 32)
    expected = model.forward_head(tokens)
    tome_ext.patch.timm(model, method="topk", r=9)
    assert torch.equal(model.forward_head(tokens), expected)


def test_fused_tokens_share_their_value() -> None:
    model = tome_ext.patch.timm(tiny(reg_tokens=2), method="evit", keep_rate=0.5)
    features = model.forward_features(images())
    plan = model.tome.plan
    assert (plan.assign >= 0).all()
    # Each layer's fused token is a patch token to the next: kept by itself, or fused again.
    last = plan.assign == model.tome.num_tokens - 1
    assert (last.sum(1) > 1).all()
    spread = plan.unmerge(features)
    assert torch.equal(spread[last], features[:, -1:].expand(-1, PATCHES + 3, -1)[last])


# --- masks, and ways of running -------------------------------------------------------------------


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("method", PRUNING)
def test_hidden_keys_have_no_score(method: str, boolean: bool) -> None:
    model, x = tiny().double(), images(dtype=torch.float64)
    shown = torch.ones(2, 1 + PATCHES, dtype=torch.bool)
    shown[0, 20:50], shown[1, 40:] = False, False
    keeps = AMOUNTS["rates"][1][method]
    expected, _ = plain_pruning(model, x, keeps, method == "evit", shown=shown)
    tome_ext.patch.timm(model, method=method, keep_rate=[1.0, 0.5, 0.9])
    mask = shown[:, None, None]
    if not boolean:
        mask = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(model(x, attn_mask=mask), expected, rtol=0, atol=1e-9)


def test_a_mask_by_head_counts_for_the_class_token() -> None:
    model, x = tiny(), images()
    tome_ext.patch.timm(model, method="topk", keep_rate=[0.5])
    mask = torch.zeros(2, 4, 1 + PATCHES, 1 + PATCHES)
    model(x)
    plain = model.tome.plan.assign
    model(x, attn_mask=mask)
    assert torch.equal(model.tome.plan.assign, plain)
    mask[:, :2, 0, 1:10] = 50.0  # half the class token's heads look at these tokens
    model(x, attn_mask=mask)
    assert (model.tome.plan.assign[:, 1:10] >= 0).all()
    assert (plain[:, 1:10] < 0).any()


@pytest.mark.parametrize("method", PRUNING)
def test_a_learned_mask_gets_its_gradient(method: str) -> None:
    """As it would from attention over the tokens that are left."""
    model, x = tiny().double(), images(dtype=torch.float64)
    shape = 1, 1, 1, 1 + PATCHES
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tome_ext.patch.timm(model, method=method, keep_rate=[0.5])

    def loss(mask: Tensor) -> Tensor:
        return model(x, attn_mask=mask).square().sum()

    mask.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(mask), mask)
    step = 1e-6 * torch.randn(
        shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    with torch.no_grad():
        found = (loss(mask + step) - loss(mask - step)) / 2
    torch.testing.assert_close(found, (gradient * step).sum(), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", PRUNING)
@pytest.mark.parametrize("options", [{}, {"fused_weight_grad": True}, {"normalize_fused": True}])
def test_half_precision_and_autocast(
    method: str, dtype: torch.dtype, options: dict[str, bool]
) -> None:
    model = tome_ext.patch.timm(tiny(), method=method, keep_rate=0.7, **options)
    expected = model(images())
    with torch.autocast("cpu", dtype):
        cast = model(images())
    with torch.inference_mode():
        half = model.to(dtype)(images(dtype=dtype))
    for y in (cast, half):
        assert y.dtype == dtype
        # Near ties may keep other tokens in half precision, so only the scale is compared.
        assert (y - expected).abs().max() < 0.5 * expected.abs().max()


@pytest.mark.parametrize("options", [{}, {"fused_weight_grad": True, "normalize_fused": True}])
def test_nothing_but_hidden_tokens_to_fuse_is_finite(options: dict[str, bool]) -> None:
    model = tome_ext.patch.timm(tiny(), method="evit", r=20, **options)
    mask = torch.ones(1, 1, 1, 1 + PATCHES, dtype=torch.bool)
    mask[..., 3:] = False
    y = model(images(), attn_mask=mask)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", PRUNING)
def test_compiled_training_is_one_graph(method: str) -> None:
    model = tiny(depth=2)
    tome_ext.patch.timm(model, method=method, keep_rate=0.6, fused_weight_grad=True)
    x = images()
    expected = model(x)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(images(seed=3))


@pytest.mark.parametrize("method", PRUNING)
def test_checkpointing_changes_nothing(method: str) -> None:
    x, grads = images(), []
    for checkpointing in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(checkpointing)
        tome_ext.patch.timm(model, method=method, keep_rate=0.6)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)
