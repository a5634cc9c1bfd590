"""One call of one block: its attention, and what becomes of its tokens.

Nothing here knows a model library; :mod:`._engine` says how a host uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention import OPERATOR, attend, cls_attention, key_mask, reduce_mask
from ..plan import MergePlan, match, select
from ._tokens import Tokens

if TYPE_CHECKING:
    from ._engine import Engine

__all__ = ["Step", "attention_name"]

STOCK_ATTENTION = "scaled_dot_product_attention"


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

    __slots__ = ("active", "engine", "keep", "r", "ranking", "reduces", "size", "tokens")

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
            return k.detach() if k.requires_grad else k
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
        shape = x.shape
        self.tokens = Tokens(before.layer + 1, shape[0], shape[1], size, assigns, reduced)

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
