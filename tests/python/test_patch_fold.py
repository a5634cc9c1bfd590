"""Residual, merge and norm in one operator: when a patched block uses it, and that it may."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import VARIANTS, images, tiny
from timm.layers import DropPath, LayerNorm
from timm.layers.norm import LayerNormFp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import tome_ext

FOLDED, PLAIN = "tome.merge_add_norm.default", "tome.merge.default"


class Calls(TorchDispatchMode):
    """Counts the calls of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] = self.count.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def count(model: Any, x: Tensor) -> tuple[int, int]:
    """How many blocks of a forward fold their neighbours into the merge, and how many do not."""
    with Calls() as calls, torch.enable_grad():
        model(x)
    return calls.count.get(FOLDED, 0), calls.count.get(PLAIN, 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_fold_what_they_may_and_compute_the_same(name: str) -> None:
    model = tiny(**VARIANTS[name]).double()
    tome_ext.patch.timm(model, r=[9, 0, 7][: len(model.blocks)])
    x = images(dtype=torch.float64)
    merging = sum(r > 0 for r in model._tome_info["r"])
    norms = {type(block.norm2) for block in model.blocks}
    folds = norms <= {nn.LayerNorm, LayerNorm}
    assert folds == (name != "rms norm, SwiGLU")
    assert count(model, x) == ((merging, 0) if folds else (0, merging))
    expected = model(x)
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda module, args, output: None)
    assert count(model, x) == (0, merging)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def observe_norm(block: Any) -> None:
    block.norm2.register_forward_hook(lambda module, args, output: output)


def observe_norm_input(block: Any) -> None:
    block.norm2.register_forward_pre_hook(lambda module, args: None)


def observe_scale(block: Any) -> None:
    block.ls1.register_forward_hook(lambda module, args, output: output)


def observe_gradient(block: Any) -> None:
    block.drop_path1.register_full_backward_hook(lambda module, grads, outputs: None)


def other_norm(block: Any) -> None:
    block.norm2 = LayerNormFp32(32)


def other_forward(block: Any) -> None:
    own = block.norm2.forward
    block.norm2.forward = lambda x: 2 * own(x)


def other_scale(block: Any) -> None:
    block.ls1 = nn.Linear(32, 32)


def dropping(block: Any) -> None:
    block.drop_path1 = DropPath(0.5).train()


def norm_over_two_dimensions(block: Any) -> None:
    # 65 - 9 tokens: what follows the merge is a norm over tokens and channels.
    block.norm2 = nn.LayerNorm((56, 32))


def parametrized(block: Any) -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(block.norm2, "weight", Twice())


CHANGES: list[Callable[[Any], None]] = [
    observe_norm,
    observe_norm_input,
    observe_scale,
    observe_gradient,
    other_norm,
    other_forward,
    other_scale,
    dropping,
    norm_over_two_dimensions,
    parametrized,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_module_that_does_more_is_called(change: Callable[[Any], None]) -> None:
    model = tome_ext.patch.timm(tiny(init_values=0.5), r=[9])
    change(model.blocks[0])
    assert count(model, images()) == (0, 1)


def test_a_block_in_training_folds_unless_it_drops_paths() -> None:
    model = tome_ext.patch.timm(tiny(drop_path_rate=0.2), r=8).train()
    # The rate grows with depth from 0: the first block never drops.
    assert count(model, images()) == (1, 2)
    assert count(model.eval(), images()) == (3, 0)


def test_autocast_chooses_the_dtypes() -> None:
    model = tome_ext.patch.timm(tiny(), r=8)
    with torch.autocast("cpu", torch.bfloat16):
        assert count(model, images()) == (0, 3)


def test_a_hook_sees_the_norm_it_would_see_unpatched() -> None:
    model = tiny(init_values=0.5).double()
    tome_ext.patch.timm(model, r=8)
    x = images(dtype=torch.float64)
    expected = model(x)
    seen: list[Tensor] = []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert [tuple(output.shape) for output in seen] == [(2, 57, 32), (2, 49, 32), (2, 41, 32)]


# --- the end of a block and the next one's norm --------------------------------------------------


def norms(model: Any, x: Tensor) -> int:
    """How many norms a forward without gradients computes on their own."""
    with Calls() as calls, torch.no_grad():
        model(x)
    return calls.count.get("aten.native_layer_norm.default", 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_for_inference_leave_the_next_norm_and_compute_the_same(
    name: str, mode: Callable[[], Any]
) -> None:
    model = tiny(**VARIANTS[name]).double()
    tome_ext.patch.timm(model, r=[9, 4, 7][: len(model.blocks)], inference=True)
    x = images(dtype=torch.float64)
    expected = model(x)
    with mode():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
        assert torch.equal(model(x), model(x))


def test_how_many_norms_are_left() -> None:
    model, x = tiny(), images()
    every = norms(model, x)
    assert every == 2 * 3 + 1
    tome_ext.patch.timm(model, r=[9, 4, 7])
    assert norms(model, x) == 3 + 1
    tome_ext.patch.timm(model, r=[9, 4, 7], inference=True)
    assert norms(model, x) == 2  # the first block's, and that behind the last
    # A block that reduces nothing runs its own forward, and so does the one before it.
    model.r = [9, 0, 7]
    assert norms(model, x) == 1 + 2 + 1 + 1
    model.r = 8
    with torch.enable_grad(), Calls() as calls:
        model(x)
    assert calls.count["aten.native_layer_norm.default"] == 3 + 1


def observe_block(model: Any) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: None)


def observe_next(model: Any) -> None:
    model.blocks[1].register_forward_pre_hook(lambda module, args: None)


def observe_next_norm(model: Any) -> None:
    model.blocks[1].norm1.register_forward_hook(lambda module, args, output: None)


def scale_differently(model: Any) -> None:
    model.blocks[0].ls2 = nn.Linear(32, 32)


def norm_differently(model: Any) -> None:
    model.blocks[1].norm1 = LayerNormFp32(32)


@pytest.mark.parametrize(
    ("change", "alone"),
    [
        (observe_block, 1),
        (observe_next, 2),  # on either side of the block
        (observe_next_norm, 1),
        (scale_differently, 1),
        (norm_differently, 1),
    ],
)
def test_blocks_do_not_leave_a_norm_that_someone_else_must_see(
    change: Callable[[Any], None], alone: int
) -> None:
    model = tome_ext.patch.timm(tiny(init_values=0.5), r=8, inference=True)
    assert norms(model, images()) == 2
    change(model)
    assert norms(model, images()) == 2 + alone


def test_tokens_that_are_replaced_between_blocks_are_normed_anew() -> None:
    model = tome_ext.patch.timm(tiny().double(), r=8, inference=True)
    tokens = images(dtype=torch.float64)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(tokens))
        after = model.blocks[0](x)
        other = 2 * after
        model.blocks[0](x)
        replaced = model.blocks[1](model.tome.attach(other))
    with torch.enable_grad():
        model.blocks[0](x)
        expected = model.blocks[1](model.tome.attach(other.clone()))
    torch.testing.assert_close(replaced, expected, rtol=0, atol=1e-12)


def test_tokens_changed_in_place_are_normed_anew() -> None:
    model = tome_ext.patch.timm(tiny().double(), r=8, inference=True)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images(dtype=torch.float64)))
        after = model.blocks[0](x)
        tokens = model.tome
        expected = model.blocks[1](tokens.attach(2 * after))
        after.mul_(2)
        torch.testing.assert_close(model.blocks[1](after), expected, rtol=0, atol=1e-12)


def test_gradients_reach_a_norm_that_the_block_before_has_computed() -> None:
    model = tome_ext.patch.timm(tiny().double(), r=8, inference=True)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images(dtype=torch.float64)))
        x = model.blocks[0](x)
    model.blocks[1](x).square().sum().backward()
    assert model.blocks[1].norm1.weight.grad.abs().sum() > 0


def test_fake_tensors_leave_nothing_behind() -> None:
    model = tome_ext.patch.timm(tiny(), r=7, inference=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model(mode.from_tensor(images(5)))
    assert norms(model, images(5)) == 2


def test_copies_leave_norms_as_their_original_does() -> None:
    model = tome_ext.patch.timm(tiny(), r=8, inference=True)
    assert norms(copy.deepcopy(model), images()) == 2
    assert norms(pickle.loads(pickle.dumps(model)), images()) == 2
    replica = model.blocks[0]._replicate_for_data_parallel()
    with Calls() as calls, torch.no_grad():
        replica(torch.randn(2, 65, 32))
    assert calls.count["tome.merge_add_norm.default"] == 1
