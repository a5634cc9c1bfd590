"""Who takes part: the unpatched model, the ceiling, this package's patch, and peers."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._command import CommandError, Reduction
from ..patch.common.class_swap import Swapped, swap
from ..patch.common.methods import Ranks, make_method
from ..patch.common.rules import Rules, Settings, make_rules
from ..patch.registry import find_tower
from ._engines import ENGINES, engine_runner

__all__ = [
    "CEILING",
    "OURS",
    "STANDARD",
    "UNPATCHED",
    "Peer",
    "ceiling",
    "count_tokens",
    "counted_in",
    "find_peers",
    "runner",
    "share_weights",
    "sliced",
]

UNPATCHED, CEILING, OURS = "unpatched", "ceiling", "tome_ext"
STANDARD = "standard ONNX"  # ours without its own operators, in an engine
PUBLISHED = "tome"  # the import name of the published package


def share_weights(model: nn.Module) -> Any:
    """A deep copy of a model but for its weights, which it shares.

    So that contenders find in the caches what they would find if they ran alone.
    """
    weights = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


# --- the ceiling --------------------------------------------------------------------------------


class SlicedTokens(NamedTuple):
    """What a host's block asks about its tokens, of :class:`..patch.common.token_state.Tokens`."""

    layer: int
    reduced: bool
    rules: Rules


class SlicedCall:
    """What a host's block asks of a call, answered by slicing: the first tokens are those left.

    Stands in for :class:`..patch.common.block_call.BlockCall`, one for each block.
    """

    averages = False  # or the patch's own kernels would add and normalise

    def __init__(self, layer: int, rules: Rules) -> None:
        self.tokens = SlicedTokens(layer, layer > rules.first_layer, rules)
        rule = rules.layers[layer]
        self.amount = rules.num_prefix_tokens, rule.r, rule.rate
        self.reduces = rule.reduces
        self.num_tokens = 0  # of the forward that runs
        self.ranks = Ranks(None, None)  # of nothing: tokens are not matched

    def merge(self, x: Tensor, branch: Tensor | None) -> Tensor:
        if not self.reduces:
            return x
        return x[:, : self.tokens.rules.method.tokens_after(x.shape[1], *self.amount)]

    def check_attended(self) -> None:
        """Attention has nothing to hand over."""

    def plan_so_far(self) -> None:
        """There is no plan: positions are those of as many tokens as there are."""

    def rotary(
        self, table: tuple[Tensor, Tensor], own: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        if not self.tokens.reduced:
            return None
        num_patches = self.num_tokens - self.tokens.rules.num_prefix_tokens
        first, second = (half[..., :num_patches, :] for half in table)
        return (first, second) if first.dim() > 2 else (first.unsqueeze(0), second.unsqueeze(0))

    def position_ids(self, coordinates: Tensor) -> Tensor | None:
        if not self.tokens.reduced:
            return None
        return torch.arange(self.num_tokens, device=coordinates.device).unsqueeze(0)

    def relative_bias(self, bias: Tensor, coordinates: Tensor) -> Tensor:
        return bias[..., : self.num_tokens, : self.num_tokens]

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
        metric: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        mask = bias
        if attn_mask is not None:
            rows = attn_mask.shape[-2] if attn_mask.shape[-2] == 1 else self.num_tokens
            mask = attn_mask[..., :rows, : self.num_tokens]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )


class SlicedTrail:
    """What blocks and attentions of a sliced model share, in place of the patch's trail.

    Attentions that find no call are those of the model: ``own`` keeps it from them.
    """

    def __init__(self, rules: Rules, own: bool) -> None:
        self.rules = rules
        self.own = own
        self.call: SlicedCall | None = None

    def within(self, call: SlicedCall, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.call = None if self.own else call
        try:
            return run(*args, **kwargs)
        finally:
            self.call = None

    def following(self, layer: int, block: object) -> None:
        """No block may leave its norm to the next."""


class SlicedBlock(Swapped):
    """A block of any library that drops its last tokens after attention.

    Comes before the host's own mixin, which knows how to call the block's parts.
    """

    _tome_call: SlicedCall

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = self._tome_call
        call.num_tokens = x.shape[1]
        args, kwargs = self._tome_arguments(call, args, kwargs)
        return self._tome_reduce(call, x, args, kwargs)

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # a copy of the host's block enters itself in its trail


@functools.cache
def _sliced_class(mixin: Any) -> type[Swapped]:
    return type(f"Sliced{mixin.__name__}", (SlicedBlock, mixin), {})


def sliced(model: Any, reduction: Reduction, own_attention: bool = True) -> Any:
    """The ceiling: every block of the model keeps as many tokens as the patch would leave.

    Nothing else changes, attention is the model's own; or, without ``own_attention``, the same
    projections around ``F.scaled_dot_product_attention``.
    """
    if reduction.threshold is not None:
        raise ValueError(
            "reduction: expected r or keep_rate, by which all images keep as many tokens, got "
            f"{reduction}"
        )
    tower = find_tower(model)
    settings = Settings(make_method(reduction.method), reduction.r, reduction.keep_rate)
    rules = make_rules(settings, len(tower.blocks), tower.num_prefix_tokens)
    trail = SlicedTrail(rules, own_attention)
    cut = tower.blocks[rules.first_layer :]
    if not own_attention:
        inside = {id(part) for block, _ in cut for part in block.modules()}
        for module, mixin, attributes in tower.others:
            if id(module) in inside:
                swap(module, mixin, _tome=trail, **attributes)
    for layer, (block, mixin) in enumerate(cut, rules.first_layer):
        held = {"_tome": trail, "_tome_layer": layer, "_tome_call": SlicedCall(layer, rules)}
        made: Any = mixin
        swap(block, _sliced_class(made), **held, **tower.block_attributes)
    return model


def ceiling(model: Any, reduction: Reduction, x: Tensor) -> Any:
    """:func:`sliced` of a copy of the model that shares its weights.

    With the model's own attention, unless that takes all tokens only: those with a bias for each
    pair of positions keep it inside.
    """
    made = sliced(share_weights(model), reduction)
    try:
        made(x[:1])
    except Exception:  # of any operator, about shapes
        made = sliced(share_weights(model), reduction, own_attention=False)
    return made


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
    names = [UNPATCHED, CEILING, OURS, STANDARD]
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


class Counted(NamedTuple):
    """Where a block's tokens are counted: what enters its MLP, or leaves the block without one."""

    name: str
    enters: bool


def counted_in(model: nn.Module) -> list[Counted]:
    """Where the tokens of each block are counted, by names that the model's copies have too."""
    names = {id(module): name for name, module in model.named_modules()}
    tower = find_tower(model)
    found = []
    for block, mixin in tower.blocks:
        parts = tower.block_attributes.get("_tome_names") or mixin._tome_names
        mlp = block._modules.get(parts.mlp)
        found.append(Counted(names[id(block if mlp is None else mlp)], mlp is not None))
    return found


def count_tokens(model: Any, x: Tensor, places: list[Counted]) -> list[int]:
    """Per block, with how many tokens its MLP works when the model runs on the images ``x``.

    Args:
        model: patched or not.
        x: images.
        places: from :func:`counted_in` of the unpatched model.

    Raises:
        ValueError: the model has no such modules, or one was not called exactly once.
    """
    counts: list[list[int]] = [[] for _ in places]
    hooks = []
    try:
        for place, found in zip(places, counts, strict=True):
            try:
                module = model.get_submodule(place.name)
            except AttributeError as error:
                raise ValueError(f"expected the unpatched model's modules: {error}") from None
            if place.enters:
                hooks.append(module.register_forward_pre_hook(_enters(found)))
            else:
                hooks.append(module.register_forward_hook(_leaves(found)))
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


def _enters(found: list[int]) -> Callable[[Any, Any], None]:
    return lambda _, inputs: found.append(inputs[0].shape[1])


def _leaves(found: list[int]) -> Callable[[Any, Any, Any], None]:
    return lambda _, inputs, out: found.append((out[0] if isinstance(out, tuple) else out).shape[1])


def runner(model: Any, x: Tensor, mode: str, train: bool = False) -> Callable[[], object]:
    """A function that runs the model on the images ``x`` in a mode, as Options names them.

    To ``train``, it returns the gradients of all weights that the answer depends on.
    """
    if mode in ENGINES:
        return engine_runner(mode, model, x)
    if mode == "compile":
        model = torch.compile(model, fullgraph=True, dynamic=False)
    if mode == "graphs":
        return _capture(model, x)
    if train:
        return lambda: _gradients(model, x)
    return lambda: model(x)


def _gradients(model: Any, x: Tensor) -> object:
    loss = model(x).float().square().mean()
    return torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)


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
