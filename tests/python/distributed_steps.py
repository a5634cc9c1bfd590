"""One training step in every distributed form; test_run_training.py runs it under torchrun.

    torchrun --standalone --nproc-per-node 2 distributed_steps.py OUTPUT

Each process takes its share of the batch. The first one writes to OUTPUT, with torch.save, the
whole gradients by (model, form) and parameter, and the errors met on purpose.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import RUN, VARIANTS, images, tiny
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tome_ext

R = 8
BATCH = 4


def ddp(model: Any) -> nn.Module:
    return DistributedDataParallel(tome_ext.patch.timm(model, r=R))


def ddp_patched_last(model: Any) -> nn.Module:
    wrapped = DistributedDataParallel(model)
    tome_ext.patch.timm(wrapped.module, r=R)
    return wrapped


def ddp_checkpointed(model: Any) -> nn.Module:
    model.set_grad_checkpointing()
    return ddp(model)


def ddp_compiled(model: Any) -> nn.Module:
    tome_ext.patch.timm(model, r=R)
    model.compile(fullgraph=True, backend="aot_eager")
    return DistributedDataParallel(model)


def fsdp(model: Any) -> nn.Module:
    tome_ext.patch.timm(model, r=R)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def fsdp_checkpointed(model: Any) -> nn.Module:
    model.set_grad_checkpointing()
    return fsdp(model)


def fsdp_compiled(model: Any) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="aot_eager")
    return fsdp(model)


EVERYWHERE = {"DDP": ddp, "DDP, patched last": ddp_patched_last, "FSDP2": fsdp}
CHECKPOINTED = {
    "DDP, checkpointed": ddp_checkpointed,
    "FSDP2, checkpointed": fsdp_checkpointed,
}
COMPILED = {"DDP, compiled": ddp_compiled, "FSDP2, compiled blocks": fsdp_compiled}
STEPS: dict[tuple[str, str], Callable[[Any], nn.Module]] = {
    **{(name, form): wrap for name in RUN for form, wrap in EVERYWHERE.items()},
    **{(RUN[0], form): wrap for form, wrap in CHECKPOINTED.items()},
    **{(RUN[1], form): wrap for form, wrap in COMPILED.items()},
}


def loss_of(model: Any, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


def gradients(wrapped: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of every parameter after two steps' backward passes."""
    share = images(BATCH).chunk(dist.get_world_size())[dist.get_rank()]
    for _ in range(2):
        wrapped.zero_grad()
        loss_of(wrapped, share).backward()
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def refusals() -> dict[str, tuple[str, bool]]:
    """What is said about patching and removing after sharding, and whether nothing was changed."""
    found = {}
    sharded, patched = tiny(), fsdp(tiny())
    fully_shard(sharded)
    for what, model, call in (
        ("patch", sharded, tome_ext.patch.timm),
        ("remove", patched, tome_ext.patch.remove),
    ):
        before = [(type(module), list(vars(module))) for module in model.modules()]
        try:
            call(model)
        except (ValueError, RuntimeError) as error:
            same = before == [(type(module), list(vars(module))) for module in model.modules()]
            found[what] = (str(error), same)
    return found


def main(output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = {}
    for (name, form), wrap in STEPS.items():
        torch.compiler.reset()
        model = tiny(**VARIANTS[name]).train()
        results[name, form] = gradients(wrap(model), model)
    messages = refusals()
    if dist.get_rank() == 0:
        torch.save({"gradients": results, "refusals": messages}, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
