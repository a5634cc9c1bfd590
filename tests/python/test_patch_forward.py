"""What a patched model computes: against ToMe written out plainly, pooling, masks, feature maps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import DEPTH, GRID, VARIANTS, images, paired_images, plain_tome, tiny, without_positions
from torch import Tensor

import tome_ext
from tome_ext.attention import log_size_bias, proportional_attention, reduce_mask
from tome_ext.plan import MergePlan

ORACLE = [
    "plain",
    "unfused",
    "pre norm, as CLIP",
    "registers, layer scale",
    "class token, avg",
    "no class token, avg",
]


@pytest.mark.parametrize("r", [[8, 8, 8], [20, 0, 7], [0, 0, 5], [100, 100, 100]])
@pytest.mark.parametrize("name", ORACLE)
@pytest.mark.parametrize("method", ["tome", "guided"])
def test_outputs_and_gradients_are_those_of_plain_tome(
    name: str, method: Any, r: list[int]
) -> None:
    model = tiny(**VARIANTS[name]).double()
    twin = copy.deepcopy(model)
    x = images(3, dtype=torch.float64)
    expected = plain_tome(twin, x, r, method == "guided")
    tome_ext.patch.timm(model, r=r, method=method)
    y = model(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    expected.square().sum().backward()
    y.square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_one_image_does_not_depend_on_its_batch() -> None:
    model = tome_ext.patch.timm(tiny().double(), r=8)
    x = images(4, dtype=torch.float64)
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), alone, rtol=0, atol=1e-12)


# Merging tokens that are equal changes nothing: attention counts them, averages are theirs.
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "dynamic image size"])
def test_merging_equal_tokens_changes_nothing(name: str) -> None:
    options = dict(VARIANTS[name])
    model = without_positions(tiny(**options).double())
    x = paired_images(dtype=torch.float64)
    expected, features = model(x), model.forward_features(x)
    tome_ext.patch.timm(model, r=[GRID * GRID // 2])
    y = model(x)
    kept = model.tome.plan.unmerge(model.forward_features(x))
    assert model.tome.num_tokens == model.num_prefix_tokens + GRID * GRID // 2
    torch.testing.assert_close(kept, features, rtol=0, atol=1e-10)
    if name != "no pooling":
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)


def test_without_proportional_attention_equal_tokens_count_once() -> None:
    model = without_positions(tiny().double())
    x = paired_images(dtype=torch.float64)
    expected = model(x)
    tome_ext.patch.timm(model, r=[GRID * GRID // 2], prop_attn=False)
    assert (model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_half_precision(dtype: torch.dtype, pool: str) -> None:
    model = tiny(global_pool=pool)
    tome_ext.patch.timm(model, r=8)
    expected = model(images())
    with torch.inference_mode():
        y = model.to(dtype)(images(dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()
    assert model.tome.size.dtype == torch.float32
    # Near ties may merge other tokens in half precision, so only the scale is compared.
    assert (y - expected).abs().max() < 0.5 * expected.abs().max()


# --- pooling ------------------------------------------------------------------------------------


def test_average_pooling_is_over_the_original_tokens() -> None:
    model = tiny(global_pool="avg", fc_norm=False, num_classes=0).double()
    tome_ext.patch.timm(model, r=9)
    x = images(dtype=torch.float64)
    features = model.forward_features(x)
    spread = model.tome.plan.unmerge(features)
    torch.testing.assert_close(model(x), spread[:, 1:].mean(1))
    torch.testing.assert_close(model.pool(features, "avg"), spread[:, 1:].mean(1))
    both = 0.5 * (spread[:, 1:].mean(1) + spread[:, 1:].amax(1))
    torch.testing.assert_close(model.pool(features, "avgmax"), both)
    assert torch.equal(model.pool(features, "token"), features[:, 0])
    assert torch.equal(model.pool(features, "max"), features[:, 1:].amax(1))
    model.pool_include_prefix = True
    torch.testing.assert_close(model.pool(features), spread.mean(1))


def test_attention_pool_counts_merged_tokens() -> None:
    model = tiny(class_token=False, global_pool="map").double()
    tome_ext.patch.timm(model, r=9)
    features = model.forward_features(images(dtype=torch.float64))
    spread = model.tome.plan.unmerge(features)
    torch.testing.assert_close(model.pool(features), model.attn_pool(spread))
    tome_ext.patch.timm(model, r=9, prop_attn=False)
    torch.testing.assert_close(model.pool(features), model.attn_pool(features))


def test_head_knows_which_forward_its_tokens_come_from() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg").double(), r=9)
    a, b = images(seed=1, dtype=torch.float64), images(seed=2, dtype=torch.float64)
    of_a, of_b = model.forward_features(a), model.forward_features(b)
    assert torch.equal(model.forward_head(of_a), model(a))
    assert torch.equal(model.forward_head(of_b), model(b))


def test_head_refuses_tokens_of_unknown_size() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg"), r=9)
    with pytest.raises(RuntimeError, match="sizes of these tokens are not known"):
        model.forward_head(torch.randn(2, 38, 32))
    features = model.forward_features(images())
    with pytest.raises(RuntimeError, match=r"\(2, 38\), got \(2, 65, 32\) float32"):
        model.forward_head(torch.randn(2, 65, 32))
    with pytest.raises(RuntimeError, match="sizes of these tokens are not known"):
        model.forward_head(features[:, :-1])
    model.r = 0
    assert model.forward_head(torch.randn(2, 65, 32)).shape == (2, 5)


# --- masks --------------------------------------------------------------------------------------


def masks_for_pairs(prefix: int, kind: str) -> dict[str, Any]:
    """Masks over the tokens of `paired_images` that treat both tokens of a pair alike."""
    tokens = prefix + GRID * GRID
    generator = torch.Generator().manual_seed(3)
    shape = {
        "keys": (2, 1, 1, tokens),
        "matrix": (tokens, tokens),
        "per image": (2, 1, tokens, tokens),
        "per head": (1, 4, tokens, tokens),
        "full": (2, 4, tokens, tokens),
        "queries": (2, 1, tokens, 1),
    }[kind]
    mask = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = torch.arange(tokens)
    own[prefix:] = prefix + (own[prefix:] - prefix) // 2 * 2
    if shape[-1] > 1:
        mask = mask[..., own]
    if shape[-2] > 1:
        mask = mask[..., own, :]
    return {"attn_mask": mask}


def of_shown(model: Any, x: Tensor, mask: Tensor) -> Tensor:
    """The unpatched model's logits, pooled over the tokens that a mask (B, 1, 1, N) shows."""
    with torch.no_grad():
        schedule, model.r = model.r, 0
        features = model.forward_features(x, attn_mask=mask)
        model.r = schedule
        shown = mask[:, 0, 0, :, None].to(features)
        return model.head(model.fc_norm((features * shown).sum(1) / shown.sum(1)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("kind", ["keys", "matrix", "per image", "per head", "full", "queries"])
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}])
def test_masks_follow_the_tokens(
    fused: bool, boolean: bool, kind: str, options: dict[str, Any]
) -> None:
    model = without_positions(tiny(unfused=not fused, **options).double())
    x = paired_images(dtype=torch.float64)
    masks = masks_for_pairs(model.num_prefix_tokens, kind)
    if boolean:
        masks["attn_mask"] = masks["attn_mask"] > -0.5
        if kind == "queries":
            masks["attn_mask"][:] = True  # a query that sees nothing has no defined output
    expected = model(x, **masks)
    tome_ext.patch.timm(model)
    assert torch.equal(model(x, **masks), expected)
    model.r = [GRID * GRID // 2]
    if kind == "keys" and boolean and model.global_pool == "avg":
        # Hidden tokens are dropped, where the unpatched model goes on averaging over them.
        expected = of_shown(model, x, masks["attn_mask"])
    torch.testing.assert_close(model(x, **masks), expected, rtol=0, atol=1e-10)
    tome_ext.patch.timm(model, r=[GRID * GRID // 2], prop_attn=False)
    assert model(x, **masks).isfinite().all()


@pytest.mark.parametrize("fused", [True, False])
def test_is_causal_is_the_lower_triangle(fused: bool) -> None:
    model = tiny(unfused=not fused).double()
    x = images(dtype=torch.float64)
    expected = model(x, is_causal=True)
    tome_ext.patch.timm(model)
    assert torch.equal(model(x, is_causal=True), expected)
    model.r = 7
    triangle = torch.ones(65, 65, dtype=torch.bool).tril()
    y = model(x, is_causal=True)
    torch.testing.assert_close(y, model(x, attn_mask=triangle), rtol=0, atol=1e-12)
    assert not torch.allclose(y, model(x))
    with pytest.raises(ValueError, match="got both"):
        model(x, attn_mask=triangle, is_causal=True)


def test_padding_never_reaches_the_class_token() -> None:
    model = tome_ext.patch.timm(tiny(depth=1).double(), r=0)
    x = images(dtype=torch.float64)
    keep = torch.ones(2, 1, 1, 65, dtype=torch.bool)
    keep[..., 40:] = False
    other = x.clone()
    other[..., 20:, :] = 5.0  # patches from row 5 on: tokens 41 and later
    model.r = [0]
    torch.testing.assert_close(model(x, attn_mask=keep), model(other, attn_mask=keep))


@pytest.mark.parametrize("shape", [(64, 64), (3, 1, 65, 65), (1, 1, 1, 1, 65), (2, 65, 66)])
def test_wrong_mask_is_refused(shape: tuple[int, ...]) -> None:
    plan = tome_ext.match(torch.randn(2, 65, 8), 10, 1)
    with pytest.raises(ValueError, match=r"broadcasts to .* = \(2, H, 65, 65\)"):
        reduce_mask(torch.zeros(shape), plan, "sum", torch.float32)


@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("boolean", [True, False])
def test_reduce_mask_is_the_mean_over_queries_of_the_sum_over_keys(
    proportional: bool, boolean: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    assign = torch.stack([torch.randperm(9, generator=generator) % 4 for _ in range(2)])
    plan = MergePlan.from_assign(assign, 4)
    mask = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)
    mask = mask > 0 if boolean else mask.masked_fill(mask < -1, float("-inf"))
    weight = mask.double() if boolean else (mask - mask.amax(-1, keepdim=True)).exp()
    groups = F.one_hot(assign, 4).double()  # (B, N, M)
    mean = groups / groups.sum(1, keepdim=True)
    keys = groups if proportional else mean
    expected = torch.einsum("bqm,bhqk,bkn->bhmn", mean, weight, keys).log()
    got = reduce_mask(mask, plan, "sum" if proportional else "mean", torch.float64)
    torch.testing.assert_close(got, expected)


def test_mask_of_zeros_is_proportional_attention() -> None:
    plan = tome_ext.match(torch.randn(2, 33, 8), 12, 1)
    size = plan.offsets.diff(dim=1).float()
    zeros = reduce_mask(torch.zeros(33, 33), plan, "sum", torch.float64)
    torch.testing.assert_close(zeros, log_size_bias(size, torch.float64).expand(2, 1, 21, 21))
    assert not reduce_mask(torch.zeros(33, 33), plan, "mean", torch.float32).any()


def test_huge_masks_neither_overflow_nor_spoil_gradients() -> None:
    plan = tome_ext.match(torch.randn(1, 9, 4), 3, 1)
    mask = torch.full((9, 9), -1e30)
    mask[:, :5] = 1e30
    mask[:, 8] = float("-inf")
    mask.requires_grad_()
    reduced = reduce_mask(mask, plan, "sum", torch.float32)
    assert (reduced < float("inf")).all()
    assert not reduced.isnan().any()
    reduced.softmax(-1).square().sum().backward()
    assert mask.grad.isfinite().all()


def test_masks_work_from_any_block_on() -> None:
    """A mask that only later blocks get is still one over the original tokens."""
    model = without_positions(tiny().double())
    x = paired_images(dtype=torch.float64)
    mask = masks_for_pairs(1, "full")["attn_mask"]

    def run() -> Tensor:
        tokens = model._pos_embed(model.patch_embed(x))
        tokens = model.blocks[1](model.blocks[0](tokens))
        return model.norm(model.blocks[2](tokens, attn_mask=mask))[:, 0]

    expected = run()
    tome_ext.patch.timm(model, r=[32])
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-10)


# --- proportional attention ---------------------------------------------------------------------


def test_proportional_attention_counts_a_key_as_often_as_its_size() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (2, 6), generator=generator).float()
    got = proportional_attention(q, k, v, size, scale=0.3)
    for image in range(2):
        repeats = size[image].long()
        keys, values = (y[image].repeat_interleave(repeats, dim=1) for y in (k, v))
        expected = F.scaled_dot_product_attention(q[image], keys, values, scale=0.3)
        torch.testing.assert_close(got[image], expected)
    plain = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(proportional_attention(q, k, v), plain)


def test_size_0_hides_a_key() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    size = torch.tensor([[1.0, 1, 0, 1, 0]])
    seen = torch.tensor([0, 1, 3])
    expected = F.scaled_dot_product_attention(q, k[:, :, seen], v[:, :, seen])
    torch.testing.assert_close(proportional_attention(q, k, v, size), expected)


def test_masks_of_both_kinds_agree() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    size = torch.tensor([[1.0, 3, 2, 1, 4]]).expand(2, -1)
    allowed = torch.rand(2, 1, 5, 5) > 0.3
    allowed[..., 0] = True
    bias = torch.zeros(allowed.shape).masked_fill(~allowed, float("-inf"))
    one = proportional_attention(q, k, v, size, allowed)
    torch.testing.assert_close(proportional_attention(q, k, v, size, bias), one)


def test_wrong_size_is_refused() -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    with pytest.raises(ValueError, match=r"expected \(2, 5\), one per key token, got \(2, 6\)"):
        proportional_attention(q, k, v, torch.ones(2, 6))


# --- feature maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "registers, layer scale", "no class token, avg"])
@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_feature_maps_have_the_unpatched_shapes_and_values(name: str, fmt: str) -> None:
    model = without_positions(tiny(**VARIANTS[name]).double())
    x = paired_images(dtype=torch.float64)
    calls: list[dict[str, Any]] = [
        {},
        {"indices": 2},
        {"indices": [0, 2], "norm": True},
        {"indices": [0], "stop_early": True},
        {"return_prefix_tokens": True},
        {"output_dict": True, "return_prefix_tokens": True},
        {"output_dict": True, "intermediates_only": True},
    ]

    def flat(call: dict[str, Any]) -> list[Any]:
        out = model.forward_intermediates(x, output_fmt=fmt, **call)
        # The last features are left out: they stay merged, as forward_features returns them.
        if isinstance(out, dict):
            out.pop("image_features", None)
            return [out[key] for key in sorted(out)]
        return [list(item) if isinstance(item, tuple) else item for item in out[1]]

    expected = [flat(call) for call in calls]
    tome_ext.patch.timm(model, r=[GRID * GRID // 2])
    for call, want in zip(calls, expected, strict=True):
        torch.testing.assert_close(flat(call), want, rtol=0, atol=1e-10)


def test_every_feature_map_is_spread_by_its_own_layers_plan() -> None:
    model = tiny()
    tome_ext.patch.timm(model, r=[10, 0, 12])
    x = images()
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    final, maps = model.forward_intermediates(x, output_fmt="NLC")
    assert [out.shape[1] for out in outputs] == [55, 55, 43]
    for layer, (out, got) in enumerate(zip(outputs, maps, strict=True)):
        plan = model.tome.plan_after(layer + 1)
        assert plan.num_output_tokens == out.shape[1]
        assert torch.equal(plan.unmerge(out)[:, 1:], got)
        # Averaging over each group gives back the group's token.
        torch.testing.assert_close(plan.merge(plan.unmerge(out))[0], out)
    torch.testing.assert_close(model.forward_head(final), model(x))


def test_get_intermediate_layers() -> None:
    model = tome_ext.patch.timm(tiny(), r=10)
    got = model.get_intermediate_layers(images(), n=2, reshape=True, return_prefix_tokens=True)
    assert [(y.shape, prefix.shape) for y, prefix in got] == [((2, 32, 8, 8), (2, 1, 32))] * 2


def test_feature_maps_with_masks_and_changed_image_size() -> None:
    model = tome_ext.patch.timm(tiny(dynamic_img_size=True), r=10)
    x = images(1, 48)
    (got,) = model.forward_intermediates(
        x, 1, intermediates_only=True, attn_mask=torch.ones(145, 145, dtype=torch.bool)
    )
    assert got.shape == (1, 32, 12, 12)
    with pytest.raises(ValueError, match="expected 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@pytest.mark.parametrize("r", [9, (9, -1), [9, 5, 3]])
def test_pruned_model_merges_as_before_in_the_layers_that_stay(r: Any) -> None:
    model = tome_ext.patch.timm(tiny(), r=r)
    x = images()
    before = model.forward_intermediates(x, [1], intermediates_only=True)
    schedule = model._tome_info["r"]
    assert model.prune_intermediate_layers([1]) == [1]
    assert model._tome_info["r"] == schedule[:2]
    assert torch.equal(model.forward_intermediates(x, [1])[1][0], before[0])
    assert model(x).shape[1] == 65 - sum(schedule[:2])
    model.r = [4, 4]
    with pytest.raises(ValueError, match="at most 2 entries"):
        model.r = [4] * DEPTH
    tome_ext.patch.remove(model)
    assert len(model.blocks) == 2


# --- what a forward leaves ----------------------------------------------------------------------


def test_info_for_code_written_for_the_published_patch() -> None:
    model = tiny(distilled=True)
    tome_ext.patch.timm(model, r=8, trace_source=True)
    info = model._tome_info
    assert info == {
        "r": [8] * DEPTH,
        "size": None,
        "source": None,
        "trace_source": True,
        "prop_attn": True,
        "class_token": True,
        "distill_token": True,
    }
    model(images())
    info = model._tome_info
    left = 66 - 8 * DEPTH
    assert info["size"].shape == (2, left, 1)
    assert info["source"].shape == (2, left, 66)
    assert (info["source"].sum(1) == 1).all()
    assert torch.equal(info["source"].sum(2, keepdim=True), info["size"])
    tome_ext.patch.timm(model, r=8)
    assert model._tome_info["source"] is None
    with pytest.raises(AttributeError):
        model._tome_info = {}


def test_state_of_the_last_forward() -> None:
    model = tome_ext.patch.timm(tiny(), r=0)
    assert model.tome is None
    model(images())
    assert model.tome.size is None
    assert model.tome.plan is None
    model.r = [5, 0, 6]
    model(images())
    plan = model.tome.plan
    assert (plan.num_tokens, plan.num_output_tokens) == (65, 54)
    assert torch.equal(plan.offsets.diff(dim=1).float(), model.tome.size)
    assert model.tome.plan_after(0) is None
    assert model.tome.plan_after(1).num_output_tokens == 60
