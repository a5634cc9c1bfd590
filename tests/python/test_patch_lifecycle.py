"""A patched model over its life: removal, copies, threads, tracing."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import DEPTH, images, tiny
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

import tome_ext

KINDS: list[dict[str, Any]] = [
    {},
    {"global_pool": "avg"},
    {"global_pool": "map"},
    {"distilled": True},
]


def snapshot(model: nn.Module) -> list[tuple[type, list[str]]]:
    return [(type(module), list(vars(module))) for module in model.modules()]


# --- removal and settings -----------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS)
def test_remove_restores_the_model_exactly(options: dict[str, Any]) -> None:
    model = tiny(**options)
    before, expected = snapshot(model), model(images())
    tome_ext.patch.timm(model, r=8)
    assert not torch.equal(model(images()), expected)
    tome_ext.patch.remove(model)
    assert snapshot(model) == before
    assert torch.equal(model(images()), expected)
    with pytest.raises(ValueError, match=f"expected a patched model, got {type(model).__name__}"):
        tome_ext.patch.remove(model)


def test_patched_model_is_still_of_its_own_type() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    assert isinstance(model, VisionTransformer)
    assert all(isinstance(block, Block) for block in model.blocks)
    assert all(isinstance(block.attn, Attention) for block in model.blocks)
    assert type(tiny().blocks[0]) is Block


def test_another_model_of_the_patched_class_is_not_patched() -> None:
    model: Any = tome_ext.patch.timm(tiny(), r=9)
    block, attn = model.blocks[0], model.blocks[0].attn
    for made, part in (
        (type(model)(img_size=32, patch_size=4, embed_dim=32, num_heads=4, depth=3), model),
        (type(block)(dim=32, num_heads=4), block),
        (type(attn)(32, num_heads=4), attn),
    ):
        assert type(made) is type(part)._tome_base
    student = type(model)(img_size=32, patch_size=4, embed_dim=32, num_heads=4, depth=3)
    expected = student(images())
    with tome_ext.patch.timm(student):
        assert torch.equal(student(images()), expected)


def test_as_context_manager() -> None:
    model = tiny()
    before = snapshot(model)
    with tome_ext.patch.timm(model, r=8) as patched:
        assert patched is model
        model(images())
        assert model.tome.num_tokens == 65 - 8 * DEPTH
    assert snapshot(model) == before
    with pytest.raises(KeyError), tome_ext.patch.timm(model, r=8):
        raise KeyError
    assert snapshot(model) == before
    with tome_ext.patch.timm(model, r=8):
        tome_ext.patch.remove(model)
    assert snapshot(model) == before


def test_patching_again_replaces_the_settings() -> None:
    model = tome_ext.patch.timm(tiny(), r=8, trace_source=True)
    patched = snapshot(model)
    assert tome_ext.patch.timm(model, r=(4, -1), prop_attn=False) is model
    assert snapshot(model) == patched
    assert model.r == (4, -1)
    info = model._tome_info
    assert (info["r"], info["prop_attn"], info["trace_source"]) == ([8, 4, 0], False, False)
    tome_ext.patch.remove(model)
    assert type(model) is VisionTransformer


def test_remove_refuses_while_a_forward_is_replaced() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    own = model.blocks[1].forward
    model.blocks[1].forward = lambda *args, **kwargs: own(*args, **kwargs)
    patched = snapshot(model)
    with pytest.raises(RuntimeError, match=r"blocks\.1 .*take that replacement off first"):
        tome_ext.patch.remove(model)
    assert snapshot(model) == patched


def test_a_class_put_on_top_is_not_lost() -> None:
    """Such as that of FSDP2, whose hooks would stay behind without it."""
    model = tome_ext.patch.timm(tiny(), r=8)
    block = model.blocks[1]
    block.__class__ = type("Sharded", (type(block),), {})
    patched = snapshot(model)
    with pytest.raises(RuntimeError, match=r"blocks\.1: .* made of Block, got Sharded"):
        tome_ext.patch.remove(model)
    assert snapshot(model) == patched
    with pytest.raises(pickle.PicklingError, match="Sharded"):
        pickle.dumps(model)


def test_hooks_keep_working() -> None:
    model = tiny()
    seen: list[tuple[int, ...]] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        assert isinstance(out, Tensor)
        assert len(args) == 1
        seen.append(tuple(out.shape))

    model.blocks[0].attn.register_forward_hook(hook)
    model.blocks[1].register_forward_hook(hook)
    tome_ext.patch.timm(model, r=8)
    model(images())
    tome_ext.patch.remove(model)
    model(images())
    assert seen == [(2, 65, 32), (2, 49, 32), (2, 65, 32), (2, 65, 32)]


def test_hooks_may_replace_the_tokens_between_blocks() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    expected = model(images())
    model.blocks[0].register_forward_hook(lambda module, args, out: out.clone())
    assert torch.equal(model(images()), expected)


def test_unfused_attention_still_drops_attention_weights() -> None:
    model = tome_ext.patch.timm(tiny(unfused=True), r=8)
    for block in model.blocks:
        block.attn.attn_drop.p = 0.5
    assert torch.equal(model(images()), model(images()))
    model.train()
    assert not torch.equal(model(images()), model(images()))


# --- copies -------------------------------------------------------------------------------------


def by_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("options", KINDS)
def test_copies_are_patched_and_independent(
    options: dict[str, Any], duplicate: Callable[[nn.Module], Any]
) -> None:
    model = tiny(**options)
    tome_ext.patch.timm(model, r=8)
    expected = model(images())
    twin = duplicate(model)
    assert type(twin) is type(model)
    assert twin.tome is None
    assert torch.equal(twin(images()), expected)
    twin.r = 0
    assert model.r == 8
    assert torch.equal(model(images()), expected)
    tome_ext.patch.remove(twin)
    assert snapshot(twin) == snapshot(tiny(**options))
    assert torch.equal(model(images()), expected)


def test_state_dict_round_trips() -> None:
    plain, patched = tiny(), tome_ext.patch.timm(tiny(), r=8)
    assert list(plain.state_dict()) == list(patched.state_dict())
    other = tome_ext.patch.timm(tiny(), r=8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other(images()), patched(images()))
    plain.load_state_dict(patched.state_dict())


def test_no_activation_outlives_the_forward() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    kept: list[weakref.ref[Any]] = []

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        kept.append(weakref.ref(out.untyped_storage()))

    for block in model.blocks:
        for module in (block, block.attn, block.attn.qkv):
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(images())
    gc.collect()
    assert len(kept) == 3 * DEPTH
    assert all(reference() is None for reference in kept)
    assert model.tome.size is not None


# --- several forwards at once -------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_threads_do_not_mix(pool: str) -> None:
    model = tome_ext.patch.timm(tiny(global_pool=pool, dynamic_img_size=True), r=8)
    inputs = [images(1 + i % 3, 32 + 8 * (i % 2), seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    barrier = threading.Barrier(len(inputs))
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(15):
                    barrier.wait(timeout=60)
                    y = model(inputs[index])
                    if not torch.equal(y, expected[index]):
                        wrong.append((index, (y - expected[index]).abs().max()))
                    if model.tome.size.shape[0] != len(inputs[index]):
                        wrong.append((index, model.tome))
        except Exception as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_models_taking_turns() -> None:
    one, two = tiny(), tiny(depth=3, reg_tokens=2)
    tome_ext.patch.timm(one, r=8)
    tome_ext.patch.timm(two, r=3)
    x = images()
    expected = one.forward_features(x), two.forward_features(x)
    a, b = (model._pos_embed(model.patch_embed(x)) for model in (one, two))
    for block_of_one, block_of_two in zip(one.blocks, two.blocks, strict=True):
        a, b = block_of_one(a), block_of_two(b)
    assert torch.equal(one.norm(a), expected[0])
    assert torch.equal(two.norm(b), expected[1])


def test_one_model_with_two_batches_taking_turns() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg"), r=8)
    inputs = [images(2, seed=1), images(2, seed=2)]
    expected = [model(x) for x in inputs]
    tokens = [model._pos_embed(model.patch_embed(x)) for x in inputs]
    for block in model.blocks:
        tokens = [block(x) for x in tokens]
    # This model has its norm after pooling, so these are the features.
    for x, y in zip(tokens, expected, strict=True):
        assert torch.equal(model.forward_head(x), y)


def test_a_block_without_those_before_it_is_refused() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    x = torch.randn(2, 65, 32)
    with pytest.raises(RuntimeError, match="block 2 was called without the blocks before it"):
        model.blocks[2](x)
    after_first = model.blocks[0](x)
    with pytest.raises(RuntimeError, match=r"expected what block 1 returned.*for block 1"):
        model.blocks[2](after_first)
    with pytest.raises(RuntimeError, match=r"got \(2, 40, 32\)"):
        model.blocks[1](after_first[:, :40])
    with pytest.raises(RuntimeError, match=r"got \(1, 57, 32\)"):
        model.blocks[1](after_first[:1])
    # The failures disturb nothing.
    assert model.blocks[1](after_first).shape == (2, 49, 32)


def test_blocks_before_the_first_merge_may_be_called_alone() -> None:
    model = tiny()
    x = torch.randn(2, 30, 32)
    expected = model.blocks[1](x)
    tome_ext.patch.timm(model, r=[0, 5, 5])
    assert model.blocks[1](x).shape == (2, 25, 32)
    assert model.blocks[0](x).shape == (2, 30, 32)
    model.r = 0
    assert torch.equal(model.blocks[1](x), expected)
    assert model.blocks[2](model.blocks[0](x)).shape == (2, 30, 32)


def test_a_replaced_attention_is_noticed() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)

    class Other(nn.Module):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return x

    model.blocks[1].attn = Other()
    with pytest.raises(RuntimeError, match="attention of block 1 handed over no keys"):
        model(images())


# --- tracing ------------------------------------------------------------------------------------


def test_export() -> None:
    model = tome_ext.patch.timm(tiny(global_pool="avg"), r=8)
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images(seed=1)), model(images(seed=1)))
