"""How knowledge of tokens travels from block to block, and to the head.

It is recorded on the storage of the tokens that a block returns, where the next block finds it,
also when gradient checkpointing calls that block again during the backward pass, long after the
forward. And the last state of a forward is kept per thread, for hosts that replace the tensor
between two blocks, and to look at.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.proxy import Proxy, TraceError

from ..._torch import in_backward, record_on_storage, recorded_on_storage
from ...attention import unsupported
from ...ops import describe
from .block_call import attention_name
from .class_swap import Swapped
from .rules import Rules
from .token_state import RECORD, Tokens, recorded

__all__ = ["AttentionKind", "Reader", "TokenNorm", "Trail", "attention_kind"]

Reader = Literal["tokens", "mean", "grid"]

OWN_ATTENTION = "the model's own, as nothing has merged"
MOST_UNTOUCHED = 64


class TokenNorm(Swapped):
    """A tower's last norm, whose output are the tokens that came in."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not torch.compiler.is_compiling():
            tokens = recorded(x)
            if tokens is not None and tokens.fit(y):
                record_on_storage(y, RECORD, tokens)
        return y


class AttentionKind(NamedTuple):
    """What is known about a layer's attention before it runs."""

    device: str
    dtype: torch.dtype
    head_dim: int
    dropout_p: float


def attention_kind(attn: nn.Module, head_dim: int, dropout_p: float) -> AttentionKind:
    """Of an attention module; by its first parameter, or float32 on the CPU if it has none."""
    # A dynamically quantised module keeps no parameters, and computes in float32.
    weight = next((p for p in attn.parameters() if p.is_floating_point()), None)
    if weight is None:
        return AttentionKind("cpu", torch.float32, head_dim, dropout_p)
    return AttentionKind(weight.device.type, weight.dtype, head_dim, dropout_p)


class Trail:
    """State of one patched tower, shared by its modules.

    Attributes:
        rules: what forwards that begin from now on do; replaced as a whole.
        reader: what reads the tower's tokens: "tokens", the user or what knows of sizes; "mean", a
            mean over all of them; "grid", what needs every original token at its place.
        local: what each thread keeps: ``call``, of the block whose attention runs now; ``runs``,
            whether the forward of a tower with pools does; the tokens that its last ``forward``,
            ``recomputation`` and ``export`` ended with; and ``returned``, while compiling, with the
            tensor that ``finish`` has returned last, which stays until the next one.
        used: per layer, by what its last call computed attention; None if not called since the
            rules were made.
        blocks: weak references to the tower's blocks, which each block makes when it is copied.
        holders: weak references to the tower and the model that was patched, likewise.
        origin: a weak reference to the trail that this is a copy of; None if it is none.
    """

    def __init__(self, rules: Rules, reader: Reader = "tokens") -> None:
        self.local = threading.local()  # a subclass would be read wrongly by Dynamo
        self.reader = reader
        self.rules = rules
        self.blocks: list[weakref.ref[Any] | None] = [None] * len(rules.layers)
        self.holders: list[weakref.ref[Any]] = []
        self.origin: weakref.ref[Trail] | None = None

    @property
    def rules(self) -> Rules:
        return self._rules

    @rules.setter
    def rules(self, rules: Rules) -> None:
        self._rules = rules
        self.used: list[str | None] = [None] * len(rules.layers)
        # Tokens that no layer has reduced, which are all alike: by layer, batch size and number.
        # With the rules that they are for, so that both are read at once.
        self._untouched: tuple[Rules, dict[tuple[int, int, int], Tokens]] = (rules, {})

    def __getstate__(self) -> dict[str, Any]:
        # What forwards left belongs to this object, not to copies.
        return {"rules": self._rules, "reader": self.reader}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any]) -> Trail:
        # A part that is copied without its tower, as PEFT does with modules_to_save, stays a part
        # of it: settings and tokens are the tower's. deepcopy knows what it is copying by its id.
        holders = [holder for ref in self.holders if (holder := ref()) is not None]
        if holders and not any(id(holder) in memo for holder in holders):
            return self
        copied = Trail(self._rules, self.reader)
        copied.origin = weakref.ref(self)
        return copied

    def add_holder(self, model: Any) -> None:
        """Say that ``model`` is the tower, or the model that was patched, or a copy of either."""
        self.holders = [ref for ref in self.holders if ref() is not None]
        self.holders.append(weakref.ref(model))

    def hold(self, block: Any, layer: int) -> None:
        """Say that ``block`` is number ``layer``; the first one is, as long as it lives."""
        held = self.blocks[layer]
        if held is None or held() is None:
            self.blocks[layer] = weakref.ref(block)

    def following(self, layer: int, block: object) -> Any:
        """The block behind ``block``, number ``layer``; None if it is the last or not known.

        Not known to replicas of a block, which share this trail but not their weights.
        """
        mine = self.blocks[layer]
        if mine is None or mine() is not block or layer + 1 == len(self._rules.layers):
            return None
        after = self.blocks[layer + 1]
        return None if after is None else after()

    # --- tokens ---------------------------------------------------------------------------------

    @property
    def current(self) -> Tokens | None:
        """The tokens after the last block that ran in this thread; None before the first."""
        return getattr(self.local, _slot(), None)

    def forget(self) -> None:
        """Forget the tokens of this thread's last forward."""
        setattr(self.local, _slot(), None)
        setattr(self.local, _returned(), None)

    @property
    def call(self) -> Any:
        """The call of a block whose attention this thread runs; None outside of one.

        A :class:`BlockCall`, or what a pool puts here that has its ``attend``.
        """
        return getattr(self.local, "call", None)

    def within(self, call: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``run(*args, **kwargs)``, in which attention finds ``call``."""
        self.local.call = call
        try:
            return run(*args, **kwargs)
        finally:
            self.local.call = None

    def enter(self, layer: int, x: Tensor) -> Tokens:
        """Begin a block: what is known about its tokens ``x`` (B, M, C)."""
        if layer == 0:
            return self._first(x)
        if torch.compiler.is_compiling():
            return self._unrecorded(layer, x, None)
        tokens: Tokens | None = recorded_on_storage(x, RECORD)
        if tokens is not None and tokens.owner is self and tokens.layer == layer and tokens.fit(x):
            return tokens
        return self._unrecorded(layer, x, tokens)

    def leave(self, tokens: Tokens, x: Tensor, attention: str | None = None) -> None:
        """End a block, which returns ``x`` (B, M, C): these tokens. ``attention`` is what computed
        its attention, if that was not the model's own."""
        if torch.compiler.is_compiling():
            # A trace for export, whose tensors hold no data, may not disturb what the last forward
            # left. torch.compile writes real tensors there.
            if torch.compiler.is_dynamo_compiling():
                self.local.forward = tokens
            else:
                self.local.export = tokens
            return
        if in_backward():  # nor may a recomputation
            self.local.recomputation = tokens
        else:
            self.local.forward = tokens
        self.used[tokens.layer - 1] = attention
        record_on_storage(x, RECORD, tokens)

    def pass_by(self, tokens: Tokens, x: Tensor) -> None:
        """End a block that leaves all its tokens, none of which was ever merged, as they are."""
        after = tokens.after
        shape = x.shape
        if after is None or shape[0] != after.batch_size or shape[1] != after.num_tokens:
            after = self._fresh(tokens.layer + 1, shape[0], shape[1], tokens.rules)
        self.leave(after, x)

    def restores(self, rules: Rules) -> bool:
        """Whether all that the tower returns is spread over the original tokens."""
        return rules.settings.restore_tokens or self.reader == "grid"

    def finish(self, x: Tensor, restore: bool = False, sized: bool = True) -> Tensor:
        """The tokens x (B, M, C) that a tower returns, after its last norm.

        Spread over the original tokens if the user wants them so, or what reads them needs it, or
        with ``restore``; else what is known of the last block's tokens is said of them. A mean over
        tokens, each as often as it counts, is one weighted by size; so a mean's reader gets the
        tokens of methods that prune as they are. ``sized`` says that a head may ask for sizes.
        """
        tokens = self.current
        if tokens is None or not tokens.fit(x):
            return x
        restore = restore or self.restores(tokens.rules)
        if self.reader == "mean" and tokens.size is not None:
            restore = True
        if restore and tokens.reduced:
            x = tokens.unmerge(x)
            tokens = tokens._replace(num_tokens=x.shape[1], size=None, assigns=(), reduced=False)
        if not torch.compiler.is_compiling():
            record_on_storage(x, RECORD, tokens)
        elif sized:
            setattr(self.local, _returned(), (x, tokens))
        return x

    def merged(self, x: Tensor) -> Tokens | None:
        """For modules that the tower's forward calls after its blocks: what ``x`` (B, M, C) are.

        None if nothing was reduced.

        Raises:
            RuntimeError: they are called by others, and it is not known what ``x`` are.
        """
        runs = getattr(self.local, "runs", False)
        tokens = None if runs and torch.compiler.is_compiling() else self._known(x)
        if runs and tokens is None:
            tokens = self.current
        tokens = self._fitting(tokens, x)
        return tokens if tokens is not None and tokens.reduced else None

    def same(self, x: Tensor, y: Tensor) -> None:
        """Say that ``y`` (B, M, C), made of ``x`` outside of the tower, are the same tokens."""
        tokens = self._known(x)
        if tokens is None:
            return
        if torch.compiler.is_compiling():
            setattr(self.local, _returned(), (y, tokens))
        else:
            record_on_storage(y, RECORD, tokens)

    def size_of(self, x: Tensor) -> Tensor | None:
        """Sizes (B, M) of the tokens ``x`` (B, M, C) that a forward returned; None for all 1.

        Raises:
            RuntimeError: it is not known what ``x`` are.
        """
        tokens = self._fitting(self._known(x), x)
        return None if tokens is None else tokens.size

    def _known(self, x: Tensor) -> Tokens | None:
        """What the tokens ``x`` are that a tower has returned.

        While compiling, nothing can be recorded on a tensor: known is the one that this tower has
        returned last. Of others torch.compile asks in between, when they are tensors again.
        """
        if not torch.compiler.is_compiling():
            repeated = x.shape[0] > 1 and x.stride(0) == 0  # one image's, expanded
            return None if repeated else recorded(x)
        last: tuple[Tensor, Tokens] | None = getattr(self.local, _returned(), None)
        if last is not None and last[0] is x:
            return last[1]
        before = self.current
        if self._rules.idle and (before is None or not before.reduced):
            return None  # nothing merges, nor has in the last forward
        return _recorded_between(x) if torch.compiler.is_dynamo_compiling() else None

    def _fitting(self, tokens: Tokens | None, x: Tensor) -> Tokens | None:
        """``tokens``, if ``x`` can be these; None if it can only be such as count once each.

        Raises:
            RuntimeError: neither.
        """
        if tokens is not None and tokens.fit(x):
            return tokens
        if self._rules.idle or not self._rules.method.sized:
            return None
        last = self.current
        found = "none" if last is None else f"{(last.batch_size, last.num_tokens)}"
        raise RuntimeError(
            "the sizes of these tokens are not known: expected what this model's tower returned, "
            f"(batch, tokens) of this thread's last forward = {found}, got {describe(x)}; if x was "
            "made from that (a clone, a cast, the output of a compiled function), say so with "
            "x = model.tome.attach(x), where model.tome is read right after that forward"
        )

    def _fresh(self, layer: int, batch_size: int, num_tokens: int, rules: Rules) -> Tokens:
        """Tokens before a layer that no layer has reduced."""

        def made(at: int, after: Tokens | None = None) -> Tokens:
            return Tokens(
                *(at, batch_size, num_tokens, None, (None,) * at, False, rules, self), after=after
            )

        # While tracing these may be symbols, which cannot be looked up.
        symbols = type(batch_size) is not int or type(num_tokens) is not int
        if symbols or torch.compiler.is_compiling():
            return made(layer)
        made_for, known = self._untouched
        tokens = known.get((layer, batch_size, num_tokens)) if made_for is rules else None
        if tokens is not None:
            return tokens
        wanted = rules.settings.for_tokens
        if layer == 0 and wanted not in (None, num_tokens):
            warnings.warn(
                f"the setting of this patch was found for {wanted} tokens, and this model has "
                f"{num_tokens}: its schedule may be far from the best here",
                stacklevel=2,
            )
        # With those before all layers behind, so that each block finds the next one's.
        tokens = made(len(rules.layers))
        for at in range(len(rules.layers) - 1, layer - 1, -1):
            tokens = made(at, tokens)
        if made_for is rules:
            if len(known) >= MOST_UNTOUCHED:
                known.clear()
            known[layer, batch_size, num_tokens] = tokens
        return tokens

    def _first(self, x: Any) -> Tokens:
        if isinstance(x, Proxy):
            raise TraceError(
                "a patched model cannot be traced by torch.fx.symbolic_trace: how many tokens "
                "merge depends on shapes, which it does not know; use torch.export.export or "
                "torch.compile, or take the patch off with tome_ext.patch.remove(model)"
            )
        if torch.compiler.is_compiling():
            return self._fresh(0, x.shape[0], x.shape[1], self._rules)
        if in_backward():
            # The rules may have changed since the forward that this repeats.
            tokens = recorded(x)
            if tokens is not None and tokens.owner is self and tokens.layer == 0:
                return tokens
        tokens = self._fresh(0, x.shape[0], x.shape[1], self._rules)
        if torch.is_grad_enabled() or x.requires_grad:
            record_on_storage(x, RECORD, tokens)
        return tokens

    def _unrecorded(self, layer: int, x: Tensor, tokens: Tokens | None) -> Tokens:
        """The tokens ``x`` before a layer, which were not recorded as such, but as ``tokens``."""
        if tokens is not None and tokens.owner is not self:
            tokens = None
        if tokens is None or not tokens.reduced:
            # As no layer before this one reduces tokens, any block may be the first to be called.
            if layer <= self._rules.first_layer:
                return self._fresh(layer, x.shape[0], x.shape[1], self._rules)
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

    # --- report ---------------------------------------------------------------------------------

    def attention_of(self, layer: int, kind: AttentionKind) -> str:
        """What computes a layer's attention: what did in its last call, else what will."""
        used = self.used[layer]
        if used is not None:
            return used
        if layer < self._rules.first_layer:
            return OWN_ATTENTION
        sizes = self._rules.method.proportional and layer > self._rules.first_layer
        return attention_name(unsupported(*kind, sized=sizes))


@torch.compiler.disable(
    reason="these are not the tokens that this model's tower has returned last, and what others "
    "are is recorded on tensors, which a graph cannot read: expected a head right behind its own "
    "tower, or torch.compile without fullgraph of what model.tome.attach was told before"
)
def _recorded_between(x: Tensor) -> Tokens | None:
    """:func:`recorded`, of a tensor that a graph was given or has returned."""
    return recorded(x)


def _returned() -> str:
    """Where :meth:`Trail.finish` puts what it returns while compiling; an export's are fake."""
    return f"{_slot()}_returned"


def _slot() -> str:
    """Where :meth:`Trail.leave` puts the tokens now."""
    if torch.compiler.is_compiling():
        return "forward" if torch.compiler.is_dynamo_compiling() else "export"
    return "recomputation" if in_backward() else "forward"
