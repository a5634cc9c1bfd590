"""Who takes part: the unpatched model, the ceiling, this package's patch, and peers."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._command import CommandError, Reduction
from ..patch.common.class_swap import Swapped, swap
from ..schedule import parse_keep_rate, tokens_after

__all__ = [
    "CEILING",
    "OURS",
    "UNPATCHED",
    "Peer",
    "count_tokens",
    "find_peers",
    "runner",
    "share_weights",
    "sliced",
]

UNPATCHED, CEILING, OURS = "unpatched", "ceiling", "tome_ext"
PUBLISHED = "tome"  # the import name of the published package


def share_weights(model: nn.Module) -> Any:
    """A deep copy of a model but for its weights, which it shares.

    So that contenders find in the caches what they would find if they ran alone.
    """
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


class SlicedBlock(Swapped):
    """``timm.models.vision_transformer.Block`` that drops its last tokens after attention."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), *args, **kwargs)))
        method, prefix, r, keep_rate = self._tome_reduction
        x = x[:, : tokens_after(method, x.shape[1], prefix, r, keep_rate)]
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def sliced(model: Any, reduction: Reduction) -> Any:
    """The ceiling: every block of the model keeps as many tokens as the patch would leave.

    Nothing else changes, attention is the model's own.
    """
    method, r, keep_rate = reduction.method, reduction.r, reduction.keep_rate
    depth = len(model.blocks)
    rates: Any = [None] * depth
    if keep_rate is not None:
        rates = parse_keep_rate(depth, keep_rate, method)
    for block, rate in zip(model.blocks, rates, strict=True):
        if r or rate not in (None, 1.0):
            swap(block, SlicedBlock, _tome_reduction=(method, model.num_prefix_tokens, r, rate))
    return model


# --- peers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """Another implementation: a function of a model and r that returns the patched model."""

    name: str
    patch: Callable[[Any, int], Any]


def find_peers(specs: tuple[str, ...]) -> list[Peer]:
    """The peers that were asked for, after the published package, where that is installed.

    Args:
        specs: each ``[NAME=]MODULE:FUNCTION``, where MODULE is a module's name or the path of a
            .py file; without a name it goes by the last part of the module's.

    Raises:
        CommandError: there is no such function, or two peers of one name.
    """
    peers: list[Peer] = []
    if importlib.util.find_spec(PUBLISHED) is not None:
        peers.append(Peer(PUBLISHED, _published))
    peers += [_parse(spec) for spec in specs]
    names = [UNPATCHED, CEILING, OURS]
    for peer in peers:
        if peer.name in names:
            raise CommandError(
                f"--peer: the name {peer.name!r} is taken, give another: NAME=MODULE:FUNCTION"
            )
        names.append(peer.name)
    return peers


def _published(model: Any, r: int) -> Any:
    published = importlib.import_module(PUBLISHED)
    published.patch.timm(model)
    model.r = r
    return model


def _parse(spec: str) -> Peer:
    name, _, target = spec.rpartition("=")
    module, _, function = target.rpartition(":")
    if not module or not function:
        raise CommandError(f"--peer: expected [NAME=]MODULE:FUNCTION, got {spec!r}")
    is_file = module.endswith(".py")
    load = _load_file if is_file else importlib.import_module
    try:
        found = getattr(load(module), function)
    except Exception as error:  # a module may raise anything when it is imported
        raise CommandError(
            f"--peer: can't import {function} from {module}: {type(error).__name__}: {error}"
        ) from None
    if not callable(found):
        raise CommandError(f"--peer: expected a function of (model, r), got {target} = {found!r}")
    return Peer(name or (Path(module).stem if is_file else module.rpartition(".")[2]), found)


def _load_file(file: str) -> Any:
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


# --- running ------------------------------------------------------------------------------------


def count_tokens(model: Any, x: Tensor) -> list[int]:
    """Per layer, with how many tokens the MLP works when the model runs on the images ``x``.

    Raises:
        ValueError: the model has no blocks with an MLP, or one was not called exactly once.
    """
    blocks = list(getattr(model, "blocks", []))
    if not blocks or any(not hasattr(block, "mlp") for block in blocks):
        raise ValueError(f"expected a model with blocks and an MLP in each, got {type(model)}")
    counts: list[list[int]] = [[] for _ in blocks]
    hooks = [
        block.mlp.register_forward_pre_hook(
            lambda _, inputs, found=found: found.append(inputs[0].shape[1])
        )
        for block, found in zip(blocks, counts, strict=True)
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(found) != 1 for found in counts):
        raise ValueError(
            "expected every block's MLP to be called once, got "
            f"{[len(found) for found in counts]} calls"
        )
    return [found[0] for found in counts]


def runner(model: Any, x: Tensor, mode: str) -> Callable[[], object]:
    """A function that runs the model on the images ``x`` in a mode: eager, compile or graphs."""
    if mode == "compile":
        model = torch.compile(model, fullgraph=True, dynamic=False)
    if mode == "graphs":
        return _capture(model, x)
    return lambda: model(x)


def _capture(model: Any, x: Tensor) -> Callable[[], object]:
    """Replays a CUDA graph of one forward."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on first use must not be captured
        for _ in range(2):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(x)
    return graph.replay
