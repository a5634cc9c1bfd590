"""Which models patch.timm takes, which it refuses, and that r=0 changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from models import DEPTH, VARIANTS, images, tiny
from timm.models import (
    beit,
    cait,
    crossvit,
    eva,
    hiera,
    mvitv2,
    naflexvit,
    pit,
    swin_transformer,
    vision_transformer,
    vision_transformer_sam,
    xcit,
)
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import Tensor, nn

import tome_ext

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2}


@pytest.fixture(params=VARIANTS)
def model(request: pytest.FixtureRequest) -> VisionTransformer:
    return tiny(**VARIANTS[request.param])


def test_r_0_is_the_unpatched_model_bit_for_bit(model: VisionTransformer) -> None:
    x = images()
    expected, features = model(x), model.forward_features(x)
    tome_ext.patch.timm(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(model.forward_features(x), features)


def test_r_0_is_the_unpatched_model_in_training(model: VisionTransformer) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    for block in model.blocks:
        block.drop_path1 = block.drop_path2 = vision_transformer.DropPath(0.4)
    model.train()
    twin = copy.deepcopy(model)
    tome_ext.patch.timm(model)
    x = images(4)
    outputs = []
    for each in (twin, model):
        torch.manual_seed(1)
        outputs.append(each(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, p), q in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_tokens_merge_and_none_is_lost(model: VisionTransformer) -> None:
    x = images(3)
    tokens = model.forward_features(x).shape[1]
    tome_ext.patch.timm(model, r=6)
    features = model.forward_features(x)
    left = tokens - 6 * len(model.blocks)
    assert features.shape[1] == model.tome.num_tokens == left
    assert features.isfinite().all()
    size = model.tome.size
    assert size.dtype == torch.float32
    assert size.shape == (3, left)
    assert (size.sum(1) == tokens).all()
    assert (size[:, : model.num_prefix_tokens] == 1).all()
    assert model.forward_head(features).isfinite().all()


def test_training_with_dropout_reaches_every_parameter(model: VisionTransformer) -> None:
    twin = copy.deepcopy(model)
    twin(images()).square().sum().backward()
    reached = {name for name, p in twin.named_parameters() if p.grad is not None}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    for block in model.blocks:
        block.drop_path1 = block.drop_path2 = vision_transformer.DropPath(0.1)
    tome_ext.patch.timm(model.train(), r=5)
    model(images(4)).square().sum().backward()
    for name, p in model.named_parameters():
        if name in reached:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().sum() > 0, name


def test_more_than_can_merge() -> None:
    model = tome_ext.patch.timm(tiny(), r=1000)
    assert model(images()).isfinite().all()
    # 64 patches: 32, 16 and 8 left, and the class token
    assert model.tome.num_tokens == 9
    model = tome_ext.patch.timm(tiny(class_token=False, global_pool="avg"), r=[32, 16, 8])
    model(images())
    assert model.tome.num_tokens == 8


def test_patch_dropout() -> None:
    model = tiny(patch_drop_rate=0.5).train()
    tome_ext.patch.timm(model, r=4)
    model(images())
    assert model.tome.num_tokens == 1 + 32 - 4 * DEPTH


def test_image_and_batch_size_may_change() -> None:
    model = tiny(dynamic_img_size=True)
    twin = copy.deepcopy(model)
    tome_ext.patch.timm(model, r=5)
    for batch, side in [(1, 32), (4, 48), (2, 16), (1, 32)]:
        x = images(batch, side)
        model.r = 5
        assert model(x).shape == (batch, 5)
        assert model.tome.num_tokens == max(1 + (side // 4) ** 2 - 5 * DEPTH, 4)
        model.r = 0
        assert torch.equal(model(x), twin(x))


def test_empty_batch() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg"), r=5)
    assert model(images(0)).shape == (0, 5)


class OwnFeatures(VisionTransformer):
    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward_features(x, *args, **kwargs)[:, 1:]


class OwnForward(VisionTransformer):
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)[:, 1:].mean(1)


class OwnPatchEmbedding(VisionTransformer):
    """Nothing after the embedding is changed, so this one is supported."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        return 2 * super()._pos_embed(x)


def replaced_attention() -> VisionTransformer:
    model = tiny()
    model.blocks[1].attn = vision_transformer.DiffAttention(32, num_heads=4)
    return model


def replaced_parallel_attention() -> VisionTransformer:
    model: Any = VisionTransformer(block_fn=vision_transformer.ParallelThingsBlock, **SMALL)
    model.blocks[1].attns[1].attn = vision_transformer.DiffAttention(32, num_heads=2)
    return model


def eva_with_a_plain_block() -> nn.Module:
    model = eva.Eva(**SMALL)
    model.blocks[1] = vision_transformer.Block(32, num_heads=2)
    return model


def eva_with_a_plain_attention() -> nn.Module:
    model: Any = eva.Eva(**SMALL)
    model.blocks[0].attn = vision_transformer.Attention(32, num_heads=2)
    return model


def beit_with_a_plain_block() -> nn.Module:
    model = beit.Beit(**SMALL)
    model.blocks[0] = vision_transformer.Block(32, num_heads=2)
    return model


class OwnEva(eva.Eva):
    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward_features(x, *args, **kwargs)[:, 1:]


class OwnNaFlex(naflexvit.NaFlexVit):
    def _pool(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.mean(1)


def own_naflex() -> nn.Module:
    return OwnNaFlex(naflexvit.NaFlexVitCfg(embed_dim=32, depth=1, num_heads=2))


def deepseek() -> nn.Module:
    module = pytest.importorskip("timm.models.deepseek_vit")  # younger than the oldest timm
    return module.DeepseekVitEncoder(28, embed_dim=32, depth=1, num_heads=2, global_pool="avg")


def replaced_forward() -> VisionTransformer:
    model = tiny()
    own = model.blocks[2].forward
    model.blocks[2].forward = lambda *args, **kwargs: own(*args, **kwargs)
    return model


def replaced_pool() -> VisionTransformer:
    model = tiny()
    model.pool = MethodType(VisionTransformer.pool, model)
    return model


def shared_block() -> VisionTransformer:
    model = tiny()
    model.blocks[2] = model.blocks[0]
    return model


def positions_in_pool() -> VisionTransformer:
    model = tiny(class_token=False, global_pool="map")
    pool = vision_transformer.AttentionPoolLatent(32, pos_embed="abs", feat_size=64)
    model.attn_pool = pool
    return model


def with_blocks(block: type[nn.Module]) -> Callable[[], VisionTransformer]:
    return lambda: VisionTransformer(block_fn=block, **SMALL)


def mvit() -> nn.Module:
    config = mvitv2.MultiScaleVitCfg((1, 1, 1, 1), embed_dim=(16, 32, 64, 128), num_heads=1)
    return mvitv2.MultiScaleVit(config, img_size=64)


# Younger than the oldest timm: there is nothing to refuse there.
REFUSED_YOUNG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "DiffParallelScalingBlock": (
        lambda: with_blocks(vision_transformer.DiffParallelScalingBlock)(),
        "DiffParallelScalingBlock as block 0",
    ),
    "parallel attentions of another class": (
        replaced_parallel_attention,
        "ParallelThingsBlock as block 1 with DiffAttention",
    ),
    "DiffAttention": (replaced_attention, "block 1 with DiffAttention"),
    "PRR pool": (lambda: tiny(global_pool="prr"), "AttentionPoolPrr"),
}

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    **(REFUSED_YOUNG if hasattr(vision_transformer, "DiffParallelScalingBlock") else {}),
    "EVA with a plain block": (eva_with_a_plain_block, "Eva with a Block as block 1"),
    "EVA with a plain attention": (eva_with_a_plain_attention, "block 0 with Attention"),
    "own forward_features of EVA": (lambda: OwnEva(**SMALL), "OwnEva with a forward_features"),
    "own _pool of NaFlexViT": (own_naflex, "OwnNaFlex with a _pool of its own"),
    "BEiT with a plain block": (beit_with_a_plain_block, "Beit with a Block as block 0"),
    "CaiT": (lambda: cait.Cait(**SMALL), "expected one of timm's VisionT.*Cait: its talking heads"),
    "XCiT": (lambda: xcit.Xcit(**SMALL), "Xcit: it attends over channels"),
    "SAM": (
        lambda: vision_transformer_sam.VisionTransformerSAM(**SMALL),
        "VisionTransformerSAM: it attends within windows",
    ),
    "deepseek_vit": (deepseek, "DeepseekVitEncoder: it returns a grid"),
    "Hiera": (
        lambda: hiera.Hiera((32, 32), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
        "Hiera",
    ),
    "MViTv2": (mvit, "MultiScaleVit"),
    "Swin": (
        lambda: swin_transformer.SwinTransformer(32, 4, embed_dim=16, depths=(1,), num_heads=(1,)),
        "SwinTransformer: it attends within windows",
    ),
    "PiT": (
        lambda: pit.PoolingVisionTransformer(32, 8, 4, "overlap", (16,), (1,), (1,), 2),
        "PoolingVisionTransformer",
    ),
    "CrossViT": (
        lambda: crossvit.CrossVit(
            48,
            1.0,
            (12, 16),
            embed_dim=(16, 32),
            depth=((1, 1, 0),),
            num_heads=(2, 2),
            mlp_ratio=(2, 2, 1),
        ),
        "CrossVit",
    ),
    "attention pool with positions": (positions_in_pool, "position embeddings"),
    "own forward_features": (lambda: OwnFeatures(**SMALL), "OwnFeatures with a forward_features"),
    "own forward": (lambda: OwnForward(**SMALL), "OwnForward with a forward of its own"),
    "forward of a block replaced": (replaced_forward, "block 2, whose forward"),
    "method of the model replaced": (replaced_pool, "with a pool of its own"),
    "the same block twice": (shared_block, "as block 2, which came before"),
    "no blocks": (lambda: VisionTransformer(**{**SMALL, "depth": 0}), "with none"),
    "not from timm": (lambda: nn.Linear(3, 3), "Linear"),
    "around a model": (lambda: nn.Sequential(tiny()), "Sequential"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_are_refused_by_name_and_untouched(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        tome_ext.patch.timm(model, r=2)
    assert [(type(module), dict(vars(module))) for module in model.modules()] == before


def test_subclass_that_leaves_the_tokens_alone_is_supported() -> None:
    model = OwnPatchEmbedding(**SMALL).eval()
    x = images()
    expected = model(x)
    tome_ext.patch.timm(model)
    assert torch.equal(model(x), expected)
    model.r = 3
    model(x)
    assert model.tome.num_tokens == 17 - 6


def test_convolutional_stem_is_supported() -> None:
    def embed(**options: Any) -> nn.Module:
        stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 2, 2))
        return HybridEmbed(stem, **options)

    model = VisionTransformer(**{**SMALL, "patch_size": 1}, embed_layer=embed).eval()
    x = images()
    expected = model(x)
    tome_ext.patch.timm(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("r", [-1, 2.5, True, [1] * (DEPTH + 1), (4, 7)])
def test_wrong_r_changes_nothing(r: Any) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="expected"):
        tome_ext.patch.timm(model, r=r)
    assert type(model) is VisionTransformer
    tome_ext.patch.timm(model, r=3, prop_attn=False)
    with pytest.raises(ValueError, match="expected"):
        model.r = r
    with pytest.raises(ValueError, match="expected"):
        tome_ext.patch.timm(model, r=r)
    assert model.r == 3
    assert model._tome_info["r"] == [3] * DEPTH
    assert model._tome_info["prop_attn"] is False


def test_timm_is_imported_only_when_its_patch_is_called(run_python: Any) -> None:
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import torch, tome_ext\n"
        "try: tome_ext.patch.timm(torch.nn.Linear(2, 2))\n"
        "except ImportError as error: assert 'pip install timm' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr
