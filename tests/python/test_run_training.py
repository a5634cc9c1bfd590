"""Training a patched model: checkpointing, DropPath, fine-tuning, compiled and distributed steps.

That eager gradients are those of ToMe written out plainly is tested in test_patch_forward.py.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distributed_steps
import pytest
import torch
import torch.nn.functional as F
from models import DEPTH, RUN, VARIANTS, images, plain_tome, tiny
from timm.layers import DropPath, set_reentrant_ckpt, use_reentrant_ckpt
from torch import Tensor
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import tome_ext

R = 8


def gradients_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- gradient checkpointing ---------------------------------------------------------------------


@pytest.fixture
def timm_setting() -> Iterator[None]:
    """timm's kind of checkpointing is set back after the test."""
    before = use_reentrant_ckpt()
    yield
    set_reentrant_ckpt(before)


def by_timm(use_reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, x: Tensor) -> Tensor:
        set_reentrant_ckpt(use_reentrant)
        model.set_grad_checkpointing()
        y: Tensor = model(x)
        model.set_grad_checkpointing(False)
        return y

    return run


def by_block(use_reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, x: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(x))
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return model.forward_head(model.norm(x))

    return run


def by_segments(use_reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, x: Tensor) -> Tensor:
        x = model._pos_embed(model.patch_embed(x))
        x = checkpoint_sequential(list(model.blocks), 2, x, use_reentrant=use_reentrant)
        return model.forward_head(model.norm(x))

    return run


def by_one_block(model: Any, x: Tensor) -> Tensor:
    x = model._pos_embed(model.patch_embed(x))
    x = model.blocks[1](model.blocks[0](x))
    x = checkpoint(model.blocks[2], x, use_reentrant=False)
    return model.forward_head(model.norm(model.blocks[3](x)))


def as_a_whole(model: Any, x: Tensor) -> Tensor:
    return model.forward_head(checkpoint(model.forward_features, x, use_reentrant=False))


CHECKPOINTED = {
    "timm": by_timm(False),
    "timm, reentrant": by_timm(True),
    "each block": by_block(False),
    "each block, reentrant": by_block(True),
    "two segments": by_segments(False),
    "two segments, reentrant": by_segments(True),
    "one block": by_one_block,
    "all at once": as_a_whole,
}
CHECKPOINTED_MODELS = [*RUN, "unfused", "attention pool"]


@pytest.mark.usefixtures("timm_setting")
@pytest.mark.parametrize("variant", CHECKPOINTED_MODELS)
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_gives_the_same_gradients(name: str, variant: str) -> None:
    model = tiny(depth=4, **VARIANTS[variant])
    tome_ext.patch.timm(model.train(), r=R)
    inputs = [images(2, seed=1), images(2, seed=2), images(3, seed=3)]

    def gradients(run: Callable[[Any, Tensor], Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        model.zero_grad()
        # Several forwards before the first backward, which come in another order.
        losses = [run(model, x).square().sum() for x in inputs]
        assert model.tome.batch_size == 3
        for loss in (losses[1], losses[2], losses[0]):
            loss.backward()
        # The recomputations left the state of the last forward alone.
        assert model.tome.batch_size == 3
        assert model.tome.num_tokens == model.num_prefix_tokens + 64 - R * 4
        return losses, list(gradients_of(model).values())

    plain_losses, plain = gradients(lambda model, x: model(x))
    losses, grads = gradients(CHECKPOINTED[name])
    for want, got in zip(plain_losses + plain, losses + grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_checkpointing_with_a_forward_in_between() -> None:
    """An evaluation between forward and backward does not leak into the recomputation."""
    model = tome_ext.patch.timm(tiny(), r=R)
    model.set_grad_checkpointing()
    loss = model(images()).square().sum()
    with torch.no_grad():
        model(images(5, seed=9))
        model.r = R
    loss.backward()
    grads = gradients_of(model)
    model.zero_grad()
    model.set_grad_checkpointing(False)
    model(images()).square().sum().backward()
    for name, want in gradients_of(model).items():
        torch.testing.assert_close(grads[name], want, rtol=1e-5, atol=1e-6)


# --- DropPath and fine-tuning -------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN)
def test_drop_path_gives_the_gradients_of_plain_tome(name: str) -> None:
    """The same images skip the same branches, and merge by the keys of the branch they skip."""
    model = tiny(**VARIANTS[name]).double()
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.4), DropPath(0.4)
    twin = copy.deepcopy(model)
    tome_ext.patch.timm(model, r=R)
    x = images(6, dtype=torch.float64)
    dropped = 0
    for seed in range(3):
        evaluated = model.eval()(x)
        model.train(), twin.train()
        model.zero_grad(), twin.zero_grad()
        torch.manual_seed(seed)
        y = model(x)
        torch.manual_seed(seed)
        expected = plain_tome(twin, x, [R] * DEPTH)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        dropped += int(((y - evaluated).abs().amax(1) > 1e-6).sum())
        y.square().sum().backward()
        expected.square().sum().backward()
        want = gradients_of(twin)
        for key, got in gradients_of(model).items():
            torch.testing.assert_close(got, want[key], rtol=1e-9, atol=1e-9, msg=key)
    assert dropped > 9


@pytest.mark.parametrize("name", RUN)
def test_fine_tuning_lowers_the_loss(name: str) -> None:
    model = tome_ext.patch.timm(tiny(drop_path_rate=0.1, **VARIANTS[name]), r=R)
    x, labels = images(10), torch.arange(10) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss_in_eval() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(x), labels))

    before = loss_in_eval()
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
    assert loss_in_eval() < 0.5 * before
    # What was learnt is there without merging too.
    model.r = 0
    assert loss_in_eval() < 0.8 * before


# --- a compiled step ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUN)
def test_compiled_step_gives_the_gradients_of_plain_tome(name: str) -> None:
    torch.compiler.reset()
    model = tiny(depth=2, **VARIANTS[name]).double().train()
    twin = copy.deepcopy(model)
    tome_ext.patch.timm(model, r=R)

    # Inductor's own split into forward and backward, without its code generation.
    @torch.compile(fullgraph=True, backend="aot_eager_decomp_partition")
    def loss_of(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x), labels)

    labels = torch.tensor([0, 3, 4])
    for seed in range(2):
        x = images(3, seed=seed, dtype=torch.float64)
        model.zero_grad(), twin.zero_grad()
        loss = loss_of(x, labels)
        loss.backward()
        expected = F.cross_entropy(plain_tome(twin, x, [R] * 2), labels)
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        want, got = gradients_of(twin), gradients_of(model)
        assert list(got) == list(want)
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.compiler
@pytest.mark.slow
def test_step_compiled_by_inductor() -> None:
    torch.compiler.reset()
    model = tome_ext.patch.timm(tiny(depth=2, **VARIANTS[RUN[2]]), r=R).train()
    model(images()).square().sum().backward()
    expected = gradients_of(model)
    model.zero_grad()
    torch.compile(model, fullgraph=True)(images()).square().sum().backward()
    for name, got in gradients_of(model).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_compiled_step_with_checkpointing() -> None:
    """In one graph where torch is told that sizes need not be noted again when recomputing."""
    model = tome_ext.patch.timm(tiny(depth=2, **VARIANTS[RUN[2]]), r=R).train()
    model(images()).square().sum().backward()
    expected = gradients_of(model)
    model.set_grad_checkpointing()
    for fullgraph in (False, True):
        torch.compiler.reset()
        model.zero_grad()
        compiled = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
        with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=fullgraph):
            compiled(images()).square().sum().backward()
        for name, got in gradients_of(model).items():
            torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert model.tome.num_tokens == 64 - R * 2


# --- two processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What distributed_steps.py wrote, run once for all tests."""
    output = tmp_path_factory.mktemp("distributed") / "steps.pt"
    script = Path(distributed_steps.__file__)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(script), str(output)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(output)


@pytest.mark.parametrize(("name", "form"), distributed_steps.STEPS)
def test_two_processes_get_the_gradients_of_the_whole_batch(
    name: str, form: str, two_processes: Any
) -> None:
    model = tome_ext.patch.timm(tiny(**VARIANTS[name]), r=distributed_steps.R).train()
    distributed_steps.loss_of(model, images(distributed_steps.BATCH)).backward()
    want, got = gradients_of(model), two_processes["gradients"][name, form]
    assert list(got) == list(want)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6, msg=key)


def test_after_sharding_the_patch_is_neither_put_on_nor_taken_off(two_processes: Any) -> None:
    """fully_shard changes the modules' classes, as the patch does, and must come second."""
    patch, patch_changed_nothing = two_processes["refusals"]["patch"]
    assert "FSDPVisionTransformer; patch first, then call fully_shard" in patch
    remove, remove_changed_nothing = two_processes["refusals"]["remove"]
    assert "made of VisionTransformer, got FSDPVisionTransformer" in remove
    assert patch_changed_nothing
    assert remove_changed_nothing
