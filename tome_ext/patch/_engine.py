"""What every patched model shares: tokens' sizes on their way through the layers.

Nothing here knows a model library. A host's adapter calls, in each block::

    step = engine.enter(layer, x)       # what is known about these tokens
    ... attention: its own if not step.active, else step.attend(q, k, v, ...) ...
    x = step.merge(x)                   # between attention and MLP; where the host's residual
    ... MLP ...                         # and norm allow it, step.merge_add_norm does all three
    return step.leave(x)

State travels in two ways. It is recorded on the storage of the tokens that a block returns, where
the next block finds it, also when gradient checkpointing calls that block again during the backward
pass, long after the forward. And the last state of a forward is kept per thread, for hosts that
replace the tensor between two blocks, for pooling, and to look at.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import unsupported
from ..ops import describe
from ..schedule import (
    METHODS,
    KeepRate,
    Method,
    Schedule,
    kept,
    parse_keep_rate,
    parse_r,
)
from ._step import Step, attention_name
from ._tokens import Tokens

__all__ = ["AttentionKind", "Engine", "Settings"]

RECORD = "_tome"  # attribute of a storage: (engine, tokens)
OWN_ATTENTION = "the model's own, as nothing has merged"


class AttentionKind(NamedTuple):
    """What is known about a layer's attention before it runs."""

    device: str
    dtype: torch.dtype
    head_dim: int
    dropout_p: float


class Settings(NamedTuple):
    """How a patched model reduces its tokens; the arguments of a patch, which explains them."""

    method: Method = "tome"
    prop_attn: bool = True
    trace_source: bool = False
    normalize_fused: bool = False
    fused_weight_grad: bool = False


class Engine:
    """Settings and state of one patched model, shared by its modules.

    Args:
        num_layers: number of blocks.
        num_prefix_tokens: leading tokens that never merge.
        info: further entries of ``_tome_info``, for code written for the published patch.
    """

    def __init__(self, num_layers: int, num_prefix_tokens: int, info: dict[str, Any]) -> None:
        self.num_layers = num_layers
        self.num_prefix_tokens = num_prefix_tokens
        self.extra_info = info
        self.local = threading.local()
        self.configure(Settings(), r=0)

    def configure(
        self, settings: Settings, r: Schedule = 0, keep_rate: KeepRate | None = None
    ) -> None:
        """Replace all settings.

        Raises:
            ValueError: one is wrong, or both ``r`` and ``keep_rate`` are given. Nothing is changed.
        """
        if settings.method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {settings.method!r}")
        schedule, rates = parse_r(self.num_layers, r), None
        if keep_rate is not None:
            if any(schedule):
                raise ValueError(f"expected r or keep_rate, got r={r!r}, keep_rate={keep_rate!r}")
            rates = tuple(parse_keep_rate(self.num_layers, keep_rate, settings.method))
        self.settings = settings
        # Sizes count in attention only where tokens stand for others in equal shares.
        self.proportional = settings.method == "tome" and settings.prop_attn
        self.schedule, self.rates = tuple(schedule), rates
        self._r = list(r) if isinstance(r, list) else r
        self._keep_rate = list(keep_rate) if isinstance(keep_rate, list) else keep_rate
        self._find_first_layer()

    @property
    def r(self) -> Schedule:
        """Tokens to remove per layer, as it was given; see :func:`tome_ext.schedule.parse_r`."""
        return self._r

    @r.setter
    def r(self, r: Schedule) -> None:
        self.configure(self.settings, r)

    @property
    def keep_rate(self) -> KeepRate | None:
        """Share of tokens that layers keep, as it was given; None if ``r`` counts them."""
        return self._keep_rate

    @keep_rate.setter
    def keep_rate(self, keep_rate: KeepRate | None) -> None:
        self.configure(self.settings, 0, keep_rate)

    def kept(self, layer: int, num_patches: int) -> int:
        """How many of its patch tokens a layer leaves, EViT's fused token not counted."""
        rate = None if self.rates is None else self.rates[layer]
        return kept(self.settings.method, num_patches, self.schedule[layer], rate)

    def truncate(self, num_layers: int) -> None:
        """Follow a model that dropped its last layers: the layers that stay keep their numbers."""
        self.num_layers = num_layers
        self.schedule = self.schedule[:num_layers]
        self._r = list(self.schedule)
        if self.rates is not None:
            self.rates = self.rates[:num_layers]
            self._keep_rate = list(self.rates)
        self._find_first_layer()

    def _find_first_layer(self) -> None:
        # Per layer, whether it reduces tokens, if it has enough of them.
        if self.rates is None:
            self.reducing = tuple(r > 0 for r in self.schedule)
        else:
            self.reducing = tuple(rate < 1 for rate in self.rates)
        numbered = (layer for layer, reduces in enumerate(self.reducing) if reduces)
        self.first_layer = next(numbered, self.num_layers)
        # Per layer, by what its last call computed attention; None if not called since.
        self.attention: list[str | None] = [None] * self.num_layers

    def __getstate__(self) -> dict[str, Any]:
        # What forwards left belongs to this object, not to copies.
        left = ("local", "attention")
        return {name: value for name, value in vars(self).items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.local = threading.local()
        self._find_first_layer()

    # --- state ----------------------------------------------------------------------------------

    @property
    def current(self) -> Tokens | None:
        """The tokens after the last block that ran in this thread; None before the first."""
        return getattr(self.local, _slot(), None)

    def enter(self, layer: int, x: Tensor) -> Step:
        """Begin a block: find what is known about its tokens ``x`` (B, M, C)."""
        return Step(self, self._fresh(0, x) if layer == 0 else self._find(layer, x))

    def leave(self, tokens: Tokens, x: Tensor) -> None:
        """End a block: ``tokens`` is what is known about ``x``, which it returns."""
        setattr(self.local, _slot(), tokens)
        if not torch.compiler.is_compiling():
            _record(x, self, tokens)

    def attach(self, x: Tensor) -> None:
        """Say that ``x`` (B, M, C) are the tokens of the last block, say after a final norm."""
        tokens = self.current
        if not torch.compiler.is_compiling() and tokens is not None and tokens.fit(x):
            _record(x, self, tokens)

    def size_of(self, x: Tensor) -> Tensor | None:
        """Sizes (B, M) of the tokens ``x`` (B, M, C) that a forward returned; None for all 1.

        Raises:
            RuntimeError: ``x`` does not come from this thread's last forward.
        """
        tokens = self._recorded(x)
        if tokens is None:
            tokens = self.current
        if tokens is not None and tokens.fit(x):
            return tokens.size
        if self.first_layer == self.num_layers or self.settings.method != "tome":
            return None
        last = None if tokens is None else (tokens.batch_size, tokens.num_tokens)
        raise RuntimeError(
            "the sizes of these tokens are not known: expected the tokens of this thread's last "
            f"forward (batch, tokens) = {last}, got {describe(x)}; call the model's head on what "
            "forward_features returned"
        )

    def _fresh(self, layer: int, x: Tensor) -> Tokens:
        return Tokens(layer, x.shape[0], x.shape[1], None, (None,) * layer, False)

    def _find(self, layer: int, x: Tensor) -> Tokens:
        tokens = self._recorded(x)
        if tokens is not None and tokens.layer == layer and tokens.fit(x):
            return tokens
        if tokens is None or not tokens.reduced:
            # As no layer before this one reduces tokens, any block may be the first to be called.
            if layer <= self.first_layer:
                return self._fresh(layer, x)
            tokens = self.current if tokens is None else tokens
        if tokens is None or tokens.layer != layer or not tokens.fit(x):
            found = (
                "none"
                if tokens is None
                else (f"{(tokens.batch_size, tokens.num_tokens)} for block {tokens.layer}")
            )
            raise RuntimeError(
                f"block {layer} was called without the blocks before it, so the sizes of its "
                f"tokens are not known: expected what block {layer - 1} returned, got "
                f"{describe(x)}; tokens known to this thread: {found}"
            )
        return tokens

    def _recorded(self, x: Tensor) -> Tokens | None:
        if torch.compiler.is_compiling():
            return None
        try:
            engine, tokens = getattr(x.untyped_storage(), RECORD, (None, None))
        except NotImplementedError:  # a functorch or wrapper tensor has no storage
            return None
        return tokens if engine is self else None

    def attention_of(self, layer: int, kind: AttentionKind) -> str:
        """What computes a layer's attention: what did in its last call, else what will."""
        used = self.attention[layer]
        if used is not None:
            return used
        if layer < self.first_layer:
            return OWN_ATTENTION
        sizes = self.proportional and layer > self.first_layer
        return attention_name(unsupported(*kind, sized=sizes))

    def info(self) -> dict[str, Any]:
        """What the published patch keeps in ``model._tome_info``; sizes as (B, M, 1)."""
        tokens = self.current
        size = None if tokens is None or tokens.size is None else tokens.size.unsqueeze(-1)
        plan = tokens.plan if self.settings.trace_source and tokens is not None else None
        source = None
        if plan is not None:
            rows = torch.arange(plan.num_output_tokens, device=plan.assign.device)
            source = (plan.assign.unsqueeze(1) == rows[:, None]).to(torch.float32)
        return {
            "r": list(self.schedule),
            "size": size,
            "source": source,
            "trace_source": self.settings.trace_source,
            "prop_attn": self.settings.prop_attn,
            **self.extra_info,
        }


def _slot() -> str:
    # Neither a recomputation during the backward pass nor a trace for export, whose tensors hold no
    # data, may disturb what the last forward left. torch.compile writes real tensors there.
    if torch.compiler.is_compiling():
        return "forward" if torch.compiler.is_dynamo_compiling() else "export"
    return "forward" if torch._C._current_graph_task_id() == -1 else "recomputation"


def _record(x: Tensor, engine: Engine, tokens: Tokens) -> None:
    # An attribute of the storage lives as long as the storage, and detached views share it, so
    # both kinds of gradient checkpointing keep it with the tokens they save.
    try:  # noqa: SIM105  (contextlib.suppress takes as long as all the rest)
        setattr(x.untyped_storage(), RECORD, (engine, tokens))
    except NotImplementedError:  # a functorch or wrapper tensor has no storage
        pass
