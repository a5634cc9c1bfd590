"""What single hosts do beyond the contract: masks, intermediate features, refusals."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from host_cases import all_cases, cast, loud
from host_cases_timm import naflex, packed
from models import GRID, images, tiny
from open_clip.model import CLIP
from open_clip.transformer import VisionTransformer
from timm.models import beit, eva, vision_transformer_relpos
from torch import Tensor, nn
from torchvision.models import swin_t, vision_transformer

import tome_ext
from tome_ext.patch.common.block_call import BlockCall

TOKENS = GRID * GRID + 1


def clip(**options: Any) -> Any:
    options = {"output_dim": 16, **options}
    return loud(VisionTransformer(4 * GRID, 4, 32, 3, 2, 2.0, **options))


def test_restored_tokens_pool_alike_when_compiled() -> None:
    for model in (tiny(global_pool="avg"), clip(pool_type="avg")):
        expected = tome_ext.patch.auto(model, r=5)(images())
        tome_ext.patch.auto(model, r=5, restore_tokens=True)
        with torch.no_grad():
            torch.testing.assert_close(model(images()), expected)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(images()), expected)


# --- nn.MultiheadAttention ------------------------------------------------------------------------


def masks() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(TOKENS, TOKENS, generator=generator) < 0.3
    hidden[:, 0] = False
    per_head = torch.rand(2 * 2, TOKENS, TOKENS, generator=generator) < 0.3
    per_head[..., 0] = False
    padding = torch.rand(2, TOKENS, generator=generator) < 0.3
    padding[:, 0] = False
    added = torch.randn(TOKENS, TOKENS, generator=generator, dtype=torch.float64)
    return {
        "bool": {"attn_mask": hidden},
        "bool per head": {"attn_mask": per_head},
        "float": {"attn_mask": added},
        "padding": {"key_padding_mask": padding},
        "bool and padding": {"attn_mask": hidden, "key_padding_mask": padding},
        "float and padding": {"attn_mask": added, "key_padding_mask": padding},
    }


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_reads_masks_as_torch_does(name: str, batch_first: bool) -> None:
    model: Any = loud(vision_transformer.VisionTransformer(32, 4, 2, 2, 16, 16)).double()
    attn = model.encoder.layers[0].self_attention
    attn.batch_first = batch_first
    x = torch.randn(2, TOKENS, 16, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    expected = copy.deepcopy(attn)(x, x, x, need_weights=False, **masks()[name])[0]
    tome_ext.patch.torchvision(model, r=4, method="topk")
    trail = model._tome
    call = BlockCall(trail.enter(0, x if batch_first else x.transpose(0, 1)))
    y, weights = trail.within(call, attn, x, x, x, need_weights=False, **masks()[name])
    assert call.ranks is not None
    assert weights is None
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="need_weights: expected False where tokens have merged"):
        trail.within(call, attn, x, x, x, need_weights=True)


# --- OpenCLIP ----------------------------------------------------------------------------------

ASKED: list[dict[str, Any]] = [
    {},
    {"indices": 2},
    {"indices": [0, -1], "output_fmt": "NLC", "output_extra_tokens": True},
    {"indices": [1], "stop_early": True, "intermediates_only": True},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_open_clip_intermediates_are_over_the_original_tokens(asked: dict[str, Any]) -> None:
    model = clip()
    expected = model.forward_intermediates(images(), **asked)
    tome_ext.patch.open_clip(model)
    for r in (0, 6):
        model.r = r
        got = model.forward_intermediates(images(), **asked)
        assert got.keys() == expected.keys()
        for key, value in got.items():
            for y, like in zip(value, expected[key], strict=True):
                assert torch.equal(y, like) if r == 0 else y.shape == like.shape
    if "image_features" in got:
        assert torch.equal(got["image_features"], model(images()))


def test_open_clip_pruned_layers_keep_their_numbers() -> None:
    model = tome_ext.patch.open_clip(clip(), r=[4, 2, 1])
    model.prune_intermediate_layers([0, 1])
    assert model.r == [4, 2]
    model(images())
    assert model.tome.num_tokens == TOKENS - 6


def test_open_clip_dual_model_leaves_the_text_tower_alone() -> None:
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 32}
    text = {"context_length": 6, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    model: Any = loud(CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))
    tokens = torch.ones(2, 6, dtype=torch.long)
    expected = model.encode_text(tokens)
    tome_ext.patch.auto(model, r=5)
    assert torch.equal(model.encode_text(tokens), expected)
    model.encode_image(images())
    assert model.tome.num_tokens == model.visual.tome.num_tokens == TOKENS - 10
    with pytest.raises(ValueError, match="got its tower"):
        tome_ext.patch.remove(model.visual)


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax", "map"])
@pytest.mark.parametrize("rope", ["", "axial", "mixed"])
def test_naflex_padding_changes_nothing(pool: str, rope: str) -> None:
    options = {"global_pool": pool, "class_token": True, "rope_type": rope}
    model = tome_ext.patch.timm(naflex(options).double(), r=6)
    alone, padded = (cast(packed(2, 0, 1.0, total), torch.float64) for total in (40, 64))
    expected = model(**alone)
    assert model.tome.num_tokens == 41 - 18
    torch.testing.assert_close(model(**padded), expected, rtol=0, atol=1e-10)
    model.r = 0
    torch.testing.assert_close(model(**padded), model(**alone), rtol=0, atol=1e-10)


@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
@pytest.mark.parametrize(
    ("family", "as_dict"),  # only NaFlexVit has output_dict
    [("Eva", False), ("NaFlex", False), ("NaFlex", True), ("BEiT", False)],
)
def test_timm_intermediates_are_over_the_original_tokens(
    family: str, as_dict: bool, fmt: str
) -> None:
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 3}
    model: Any = {
        "Eva": lambda: loud(eva.Eva(**size, use_rot_pos_emb=True)),
        "NaFlex": lambda: naflex({"class_token": True}),
        "BEiT": lambda: loud(beit.Beit(**size, use_rel_pos_bias=True)),
    }[family]()
    asked = {"indices": [0, -1], "return_prefix_tokens": True, "output_fmt": fmt}
    if as_dict:
        asked["output_dict"] = True
    expected = model.forward_intermediates(images(), **asked)
    tome_ext.patch.timm(model)
    for r in (0, 6):
        model.r = r
        got = model.forward_intermediates(images(), **asked)
        for y, like in zip(flat(got), flat(expected), strict=True):
            assert torch.equal(y, like) if r == 0 else y.shape[0] == like.shape[0]
    maps = got["image_intermediates"] if as_dict else got[1]
    final = got["image_features"] if as_dict else got[0]
    assert final.shape[1] == 65 - 18
    for y in maps:
        patches = y if as_dict else y[0]
        assert patches.shape[1:] == ((32, 8, 8) if fmt == "NCHW" else (64, 32))


def test_intermediates_of_relative_positions_without_a_class_token() -> None:
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 3}
    model: Any = loud(vision_transformer_relpos.VisionTransformerRelPos(**size))
    expected = model.forward_intermediates(images(), [0, 2])[1]
    tome_ext.patch.timm(model)
    for r in (0, 6):
        model.r = r
        maps = model.forward_intermediates(images(), [0, 2])[1]
        assert [y.shape for y in maps] == [y.shape for y in expected]
        assert r > 0 or all(map(torch.equal, maps, expected))


def test_every_supported_class_of_timm_is_in_a_family() -> None:
    from tome_ext.patch.hosts import timm as host

    named = {name.rpartition(".")[2] for family in host.FAMILIES for name in family.classes}
    for form in host.FORMS:
        assert {part.__qualname__ for part in (*form.owners, *form.blocks)} <= named
        assert {part.__qualname__ for part in form.attentions} <= named


def flat(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    return [y for part in (x.values() if isinstance(x, dict) else x) for y in flat(part)]


def test_naflex_says_which_merged_tokens_are_valid() -> None:
    model = tome_ext.patch.timm(naflex({"class_token": True}), r=6)
    inputs = packed(2, 0)
    out = model.forward_features(inputs.pop("x"), **inputs)
    assert out["patch_valid"].shape == (2, 64 - 18)
    assert (out["patch_valid"].sum(1) == 40 - 18).all()
    assert model.forward_head(**out).isfinite().all()


def test_training_drops_patches_of_rotary_models() -> None:
    for kind in ("cat", "mixed"):
        model: Any = eva.Eva(
            32, 4, embed_dim=32, depth=3, num_heads=2, use_rot_pos_emb=True, rope_type=kind,
            patch_drop_rate=0.5, num_classes=5,
        )  # fmt: skip
        tome_ext.patch.timm(loud(model).train(), r=4)
        model.set_grad_checkpointing()
        model(images()).square().sum().backward()
        assert model.tome.num_tokens == 33 - 12
        for name, p in model.named_parameters():
            assert p.grad is None or p.grad.isfinite().all(), name


@pytest.mark.parametrize("name", ["torchvision: plain", "open_clip: CLIP"])
def test_adapters_of_whole_attention_modules_come_after_the_patch(name: str) -> None:
    case = next(case for case in all_cases() if case.name == name)
    targets = ["self_attention"] if name.startswith("torchvision") else ["attn"]
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    with pytest.raises(
        ValueError,
        match=r"as block 0 with MultiheadAttention: peft\..* wraps one; patch the model first",
    ):
        tome_ext.patch.auto(peft.get_peft_model(case.make(), config), r=4)
    inputs = case.inputs(2, 0)
    model: Any = peft.get_peft_model(tome_ext.patch.auto(case.make(), r=4), config).eval()
    y = case.output(model(**inputs))
    assert tome_ext.patch.find(model).tome.num_tokens == case.num_tokens - 4 * case.depth
    torch.testing.assert_close(case.output(model.merge_and_unload()(**inputs)), y)


@pytest.mark.parametrize("kind", ["parallel", "cascade", True])
def test_what_watches_an_attention_pool_sees_it_where_tokens_have_merged(kind: Any) -> None:
    options = {"attn_pooler_queries": 4, "attn_pooler_heads": 2, "output_dim": 32}
    model = clip(attentional_pool=kind, **options)
    tome_ext.patch.auto(model, r=5)
    seen: list[nn.Module] = []
    model.attn_pool.attn.register_forward_hook(lambda module, *_: seen.append(module))
    y = model(images())
    assert seen == [model.attn_pool.attn]
    config = peft.LoraConfig(target_modules=r"attn_pool.*\.attn", r=2, init_lora_weights=False)
    assert not torch.allclose(peft.get_peft_model(model, config).eval()(images()), y, atol=1e-3)


# --- refusals -------------------------------------------------------------------------------------


class OwnPool(VisionTransformer):
    def _pool(self, x: Tensor) -> Any:
        return x.mean(1), x


def own_pool() -> nn.Module:
    return OwnPool(32, 4, 32, 2, 2, 2.0, output_dim=16)


def sequence_first() -> nn.Module:
    model = clip()
    model.transformer.batch_first = False
    return model


def extra_keys() -> nn.Module:
    model = clip()
    model.transformer.resblocks[1].attn = nn.MultiheadAttention(32, 2, add_zero_attn=True)
    return model


def resnet() -> nn.Module:
    vision = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64}
    text = {"context_length": 6, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    return CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)


def own_forward() -> nn.Module:
    model = vision_transformer.VisionTransformer(32, 8, 2, 2, 16, 16)
    model.forward = model.forward
    return model


def replaced_attention() -> nn.Module:
    model: Any = vision_transformer.VisionTransformer(32, 8, 2, 2, 16, 16)
    model.encoder.layers[1].self_attention = nn.Identity()
    return model


REFUSED = {
    "CLIP with a ResNet": (resnet, "got open_clip.modified_resnet.ModifiedResNet"),
    "CLIP's pool replaced": (own_pool, "OwnPool with a _pool of its own"),
    "CLIP, tokens first": (sequence_first, "batch_first"),
    "scaled cosine": (lambda: clip(scaled_cosine_attn=True), "scaled cosine attention"),
    "keys of its own": (extra_keys, "add_zero_attn"),
    "Swin of torchvision": (swin_t, "SwinTransformer"),
    "torchvision's forward replaced": (own_forward, "with a forward of its own"),
    "torchvision's attention replaced": (replaced_attention, "as block 1 with Identity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name_and_untouched(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        tome_ext.patch.auto(model, r=2)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before
