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

import contextlib
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..attention import OPERATOR, attend, cls_attention, key_mask, reduce_mask, unsupported
from ..ops import describe
from ..plan import MergePlan, match, select
from ..schedule import (
    METHODS,
    KeepRate,
    Method,
    Schedule,
    kept,
    parse_keep_rate,
    parse_r,
)

__all__ = ["AttentionKind", "Engine", "Settings", "Step", "Tokens"]

RECORD = "_tome"  # attribute of a storage: (engine, tokens)
NO_STORAGE = contextlib.suppress(NotImplementedError)  # a functorch or wrapper tensor has none
OWN_ATTENTION = "the model's own, as nothing has merged"
STOCK_ATTENTION = "scaled_dot_product_attention"


class AttentionKind(NamedTuple):
    """What is known about a layer's attention before it runs."""

    device: torch.device
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


class Tokens(NamedTuple):
    """What is known about the tokens before a layer. Immutable; holds no activations.

    Attributes:
        layer: the layer these tokens go into next.
        batch_size: B.
        num_tokens: M, how many tokens there are now.
        size: (B, M) float32, how many original tokens each stands for; None if all count as one:
            nothing was merged, or the method prunes.
        assigns: per layer passed, its (B, N) int32 assignment, or None if it reduced nothing.
        reduced: whether any layer reduced the tokens.
    """

    layer: int
    batch_size: int
    num_tokens: int
    size: Tensor | None
    assigns: tuple[Tensor | None, ...]
    reduced: bool

    @property
    def plan(self) -> MergePlan | None:
        """The plan from the original tokens to these; None if nothing was reduced."""
        return self.plan_after(self.layer)

    def plan_after(self, num_layers: int) -> MergePlan | None:
        """The plan from the original tokens to those after the first ``num_layers`` layers."""
        merges = [assign for assign in self.assigns[:num_layers] if assign is not None]
        if not merges:
            return None
        # Composed only when asked for, so that a forward that needs sizes only does not pay.
        total, *rest = merges
        for assign in rest:
            rows = assign.gather(1, total.clamp_min(0).to(torch.int64))
            total = torch.where(total < 0, -1, rows)
        later = [assign.shape[1] for assign in self.assigns[num_layers:] if assign is not None]
        return MergePlan.from_assign(total, later[0] if later else self.num_tokens)

    def fit(self, x: Tensor) -> bool:
        """Whether ``x`` (B, M, C) can be these tokens."""
        return x.shape[0] == self.batch_size and x.shape[1] == self.num_tokens


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
        fits = tokens is not None and tokens.layer == layer and tokens.fit(x)
        if not fits and (tokens is None or not tokens.reduced):
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


class Step:
    """One call of one block.

    Attributes:
        active: whether attention must be proportional or hand over its keys or scores, or masks
            be reduced; if not, the module's own attention is right as it is.
        reduces: whether fewer tokens leave the block than enter it.
        size: (B, M) float32 for proportional attention; None if it is off or all are 1.
        ranking: what the block's plan is made of: the keys (B, H, M, D) of attention, or the
            class token's attention (B, M).
    """

    def __init__(self, engine: Engine, tokens: Tokens) -> None:
        self.engine = engine
        self.tokens = tokens
        self.ranking: Tensor | None = None
        self.reduces = False
        num_patches = tokens.num_tokens - engine.num_prefix_tokens
        if engine.reducing[tokens.layer] and num_patches >= 2:
            if engine.settings.method == "tome" and engine.rates is None:
                self.r = engine.schedule[tokens.layer]  # which match cuts
                self.reduces = True
            else:
                self.keep = engine.kept(tokens.layer, num_patches)
                self.r = num_patches - self.keep
                self.reduces = self.r > 0
        self.active = self.reduces or tokens.reduced
        self.size = tokens.size if engine.proportional else None

    @property
    def averages(self) -> bool:
        """Whether the block's rows are weighted means, which :meth:`merge_add_norm` computes.

        To be asked after attention.
        """
        settings = self.engine.settings
        if settings.method != "evit" or not self.reduces:
            return self.reduces
        return settings.normalize_fused and not self.differentiable

    @property
    def differentiable(self) -> bool:
        """Whether EViT's weights are for torch to multiply by.

        The operators take float32 weights, and give them no gradient.
        """
        wide = self.ranking is not None and self.ranking.dtype != torch.float32
        return wide or self.engine.settings.fused_weight_grad

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of an active block, which weights keys by size.

        Its keys, or the class token's attention, become what the block's plan is made of.

        Args:
            q: (B, H, M, D) queries; k and v alike.
            k: keys.
            v: values.
            attn_mask: the caller's mask over the original tokens, broadcastable to (B, H, N, N).
            is_causal: the mask is the lower triangle over the original tokens.
            dropout_p: probability of dropping an attention weight.
            scale: factor of the logits; None means ``D ** -0.5``.

        Returns:
            (B, H, M, D).

        Raises:
            ValueError: both a mask and ``is_causal`` are given, or the mask's shape is wrong.
        """
        if attn_mask is not None or is_causal:
            attn_mask = self.mask(q, attn_mask, is_causal)
        if self.reduces:
            self.ranking = self.rank(q, k, attn_mask, scale)
        out, reason = attend(q, k, v, self.size, attn_mask, scale, dropout_p)
        if not torch.compiler.is_compiling():
            self.engine.attention[self.tokens.layer] = attention_name(reason)
        return out

    def rank(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, scale: float | None) -> Tensor:
        """What the block's plan is made of; ``attn_mask`` is over the present tokens."""
        settings = self.engine.settings
        if settings.method == "tome":
            return k.detach()
        if not settings.fused_weight_grad:
            q, k = q.detach(), k.detach()
        return cls_attention(q, k, self.size, scale, attn_mask)

    def mask(self, q: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
        """The caller's mask over original tokens, carried to the present ones.

        ``q`` (B, H, M, D) are the queries. Where tokens have merged, ``size`` is changed: to None
        where the returned mask contains the sizes, or to the visible sizes where the mask only
        hides keys, and none is returned.
        """
        if is_causal and attn_mask is not None:
            raise ValueError("expected attn_mask or is_causal, got both")
        plan = self.tokens.plan
        if is_causal:
            num_tokens = q.shape[-2] if plan is None else plan.num_tokens
            attn_mask = q.new_ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        if plan is None or attn_mask is None:
            return attn_mask
        reduce = "sum" if self.engine.proportional else "mean"
        if self.engine.settings.method == "evit":
            reduce = "amax"  # the fused token is one key, with nothing of the hidden ones in it
        shown = key_mask(attn_mask, *plan.assign.shape)
        if shown is None:
            self.size = None
            return reduce_mask(attn_mask, plan, reduce, q.dtype)
        weight = shown.to(torch.float32).unsqueeze(-1)
        self.size = plan.merge(weight, reduce=reduce)[0].squeeze(-1)
        return None

    def merge(self, x: Tensor) -> Tensor:
        """Reduce the tokens (B, M, C): merge or drop them as the method says."""
        if not self.reduces:
            self._passed(x, self.tokens.size, None)
            return x
        if self.engine.settings.method == "evit":
            return self._fuse(x)
        plan = self._plan()
        merged, size = plan.merge(x, self.tokens.size)
        self._passed(merged, size, plan)
        return merged

    def merge_add_norm(
        self,
        x: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        """Of a block that averages: :meth:`merge` of ``x + scale * branch``, and its LayerNorm.

        Args:
            x: (B, M, C) tokens before attention.
            branch: (B, M, C) output of attention.
            scale: (C,) LayerScale of the branch, or None.
            weight: (C,) of the LayerNorm, or None.
            bias: (C,) of the LayerNorm, or None.
            eps: of the LayerNorm.

        Returns:
            Both (B, M', C).
        """
        scores, plan = self.ranking, self._plan()
        size = self.tokens.size
        if self.engine.settings.method == "evit":
            size = fusing_weights(scores, plan)
        x, size, normed = plan.merge_add_norm(x, branch, size, scale, weight, bias, eps)
        self._passed(x, size, plan)
        return x, normed

    def _fuse(self, x: Tensor) -> Tensor:
        normalize, differentiable = self.engine.settings.normalize_fused, self.differentiable
        scores, plan = self.ranking, self._plan()
        weights = fusing_weights(scores, plan)
        if differentiable:
            if normalize:
                weights = normalized_weights(weights, plan)
            merged = plan.merge(x * weights.unsqueeze(-1), reduce="sum")[0].to(x.dtype)
        else:
            reduce = "mean" if normalize else "sum"
            merged = plan.merge(x, weights, reduce)[0]
        self._passed(merged, None, plan)
        return merged

    def _plan(self) -> MergePlan:
        """The plan of this block, which uses up what attention handed over."""
        layer, engine = self.tokens.layer, self.engine
        if self.ranking is None:
            raise RuntimeError(
                f"attention of block {layer} handed over no keys: expected the patched attention "
                "module, it was replaced or bypassed after patching"
            )
        ranking, self.ranking = self.ranking, None
        method, prefix = engine.settings.method, engine.num_prefix_tokens
        if method == "tome":
            return match(ranking, self.r, prefix)
        return select(ranking.detach(), self.keep, prefix, fuse=method == "evit")

    def _passed(self, x: Tensor, size: Tensor | None, plan: MergePlan | None) -> None:
        before = self.tokens
        assigns = (*before.assigns, None if plan is None else plan.assign)
        reduced = before.reduced or plan is not None
        if self.engine.settings.method != "tome":
            size = None  # pruned models count every token once
        self.tokens = Tokens(before.layer + 1, x.shape[0], x.shape[1], size, assigns, reduced)

    def leave(self, x: Tensor) -> Tensor:
        """End the block, which returns ``x``."""
        self.engine.leave(self.tokens, x)
        return x


def fusing_weights(scores: Tensor | None, plan: MergePlan) -> Tensor:
    """EViT's weights (B, N) of tokens: 1, or the score of one that becomes part of the last row."""
    assert scores is not None  # or there were no plan
    return torch.where(plan.assign == plan.num_output_tokens - 1, scores, 1.0)


def normalized_weights(weights: Tensor, plan: MergePlan) -> Tensor:
    """EViT's weights (B, N), divided so that those of the fused token sum to 1.

    As :meth:`MergePlan.merge` does it for a mean: evenly if they are all 0.
    """
    fused = plan.assign == plan.num_output_tokens - 1
    total = torch.where(fused, weights, 0.0).sum(1, keepdim=True)
    none = total == 0
    weights = torch.where(none, 1.0 / fused.sum(1, keepdim=True), weights / total.where(~none, 1.0))
    return torch.where(fused, weights, 1.0)


def attention_name(reason: str | None) -> str:
    """What computes attention, given why it is not the operator."""
    return OPERATOR if reason is None else f"{STOCK_ATTENTION} ({reason})"


def _slot() -> str:
    # Neither a recomputation during the backward pass nor a trace for export, whose tensors hold no
    # data, may disturb what the last forward left. torch.compile writes real tensors there.
    if torch.compiler.is_compiling():
        return "forward" if torch.compiler.is_dynamo_compiling() else "export"
    return "forward" if torch._C._current_graph_task_id() == -1 else "recomputation"


def _record(x: Tensor, engine: Engine, tokens: Tokens) -> None:
    # An attribute of the storage lives as long as the storage, and detached views share it, so
    # both kinds of gradient checkpointing keep it with the tokens they save.
    with NO_STORAGE:
        setattr(x.untyped_storage(), RECORD, (engine, tokens))
