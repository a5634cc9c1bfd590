"""How a layer reduces its tokens: one class per method, its settings as fields.

A method ranks tokens by what attention computes, makes a plan from the ranks, and merges by it. Add
one by adding a class here and its name to :data:`METHODS` of :mod:`tome_ext.schedule`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...attention import cls_attention
from ...plan import MergePlan, match, select
from ...schedule import METHODS, kept
from ...schedule import Method as Name
from .refusals import check_bool

__all__ = ["EViT", "Method", "ToMe", "TopK", "make_method"]


@dataclass(frozen=True)
class Method:
    """What every method says and does.

    Attributes:
        name: as users give it.
        needs_class_token: whether it ranks tokens by the class token's attention.
        sized: whether tokens have sizes: how many original tokens each stands for.
        proportional: whether attention counts a token as often as its size.
    """

    name: ClassVar[Name]
    needs_class_token: ClassVar[bool] = True
    sized: ClassVar[bool] = False
    # How a mask's columns are reduced to those of merged keys; see reduce_mask.
    mask_reduction: ClassVar[str] = "mean"

    @property
    def proportional(self) -> bool:
        return False

    def amount(self, num_patches: int, r: int, keep_rate: float | None) -> int | None:
        """What :meth:`plan` is asked for in a layer; None if the layer leaves all its tokens.

        ``r`` and ``keep_rate`` are as in :func:`tome_ext.schedule.kept`. For methods that prune it
        is the number of patch tokens to keep.
        """
        keep = kept(self.name, num_patches, r, keep_rate)
        return keep if keep < num_patches else None

    def rank(
        self, q: Tensor, k: Tensor, size: Tensor | None, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        """What the plan is made of, from q and k (B, H, M, D)."""
        return cls_attention(q.detach(), k.detach(), size, scale, mask)

    def plan(self, ranks: Tensor, amount: int, prefix: int, shown: Tensor | None) -> MergePlan:
        """The plan of a layer, whose first ``prefix`` tokens stay.

        ``shown`` (B, M) is 0 for tokens that a mask hides; None if it hides none.
        """
        raise NotImplementedError

    def averages(self, ranks: Tensor | None) -> bool:
        """Whether output rows are weighted means, by :meth:`weights`."""
        return True

    def weights(self, ranks: Tensor, plan: MergePlan, size: Tensor | None) -> Tensor | None:
        """The weights (B, M) of tokens in those means; None for all 1."""
        return size

    def merge(
        self, x: Tensor, ranks: Tensor, plan: MergePlan, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens x (B, M, C) reduced, and their sizes where the method has any."""
        merged, new_size = plan.merge(x, self.weights(ranks, plan, size))
        return merged, self.sizes(new_size)

    def sizes(self, size: Tensor) -> Tensor | None:
        """The sizes (B, M) that a merge gave, if they mean anything: pruning counts all once."""
        return None


@dataclass(frozen=True)
class ToMe(Method):
    """Merge similar tokens (Bolya et al., ICLR 2023; arXiv 2210.09461); ranks are keys."""

    prop_attn: bool = True

    name: ClassVar[Name] = "tome"
    needs_class_token: ClassVar[bool] = False
    sized: ClassVar[bool] = True

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    @property
    def mask_reduction(self) -> str:  # type: ignore[override]
        return "sum" if self.prop_attn else "mean"

    def rank(
        self, q: Tensor, k: Tensor, size: Tensor | None, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        # A trace may be checked with gradients and without, and must be the same.
        return k.detach() if k.requires_grad or torch.jit.is_tracing() else k

    def amount(self, num_patches: int, r: int, keep_rate: float | None) -> int | None:
        """How many tokens to remove, which match cuts."""
        if num_patches < 2:
            return None
        if keep_rate is not None:
            r = num_patches - kept(self.name, num_patches, r, keep_rate)
        return r if r > 0 else None

    def plan(self, ranks: Tensor, amount: int, prefix: int, shown: Tensor | None) -> MergePlan:
        if shown is None:
            return match(ranks, amount, prefix)
        return match(ranks, amount, prefix, weight=shown)

    def sizes(self, size: Tensor) -> Tensor | None:
        return size


@dataclass(frozen=True)
class TopK(Method):
    """Keep the tokens that the class token attends to most, and drop the others."""

    name: ClassVar[Name] = "topk"

    def plan(self, ranks: Tensor, amount: int, prefix: int, shown: Tensor | None) -> MergePlan:
        return select(ranks.detach(), amount, prefix)


@dataclass(frozen=True)
class EViT(Method):
    """As TopK, but fuse the others (Liang et al., ICLR 2022; arXiv 2202.07800)."""

    normalize_fused: bool = False
    fused_weight_grad: bool = False

    name: ClassVar[Name] = "evit"
    # The fused token is one key: hidden only if all its tokens are.
    mask_reduction: ClassVar[str] = "amax"

    def rank(
        self, q: Tensor, k: Tensor, size: Tensor | None, scale: float | None, mask: Tensor | None
    ) -> Tensor:
        if not self.fused_weight_grad:
            return super().rank(q, k, size, scale, mask)
        return cls_attention(q, k, size, scale, mask)

    def plan(self, ranks: Tensor, amount: int, prefix: int, shown: Tensor | None) -> MergePlan:
        return select(ranks.detach(), amount, prefix, fuse=True)

    def averages(self, ranks: Tensor | None) -> bool:
        return self.normalize_fused and not _wide(ranks)

    def weights(self, ranks: Tensor, plan: MergePlan, size: Tensor | None) -> Tensor | None:
        """1, or the score of a token that becomes part of the last row."""
        return torch.where(plan.assign == plan.num_output_tokens - 1, ranks, 1.0)

    def merge(
        self, x: Tensor, ranks: Tensor, plan: MergePlan, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        weights = self.weights(ranks, plan, size)
        assert weights is not None
        if _wide(ranks):
            if self.normalize_fused:
                weights = _normalized(weights, plan)
            return plan.merge(x * weights.unsqueeze(-1), reduce="sum")[0].to(x.dtype), None
        return plan.merge(x, weights, "mean" if self.normalize_fused else "sum")[0], None


def _wide(ranks: Tensor | None) -> bool:
    """Whether the weights are for torch to multiply by: the operators take float32 ones."""
    return ranks is not None and ranks.dtype != torch.float32


def _normalized(weights: Tensor, plan: MergePlan) -> Tensor:
    """EViT's weights (B, N), divided so that those of the fused token sum to 1.

    As :meth:`MergePlan.merge` does it for a mean: evenly if they are all 0.
    """
    fused = plan.assign == plan.num_output_tokens - 1
    total = torch.where(fused, weights, 0.0).sum(1, keepdim=True)
    none = total == 0
    weights = torch.where(none, 1.0 / fused.sum(1, keepdim=True), weights / total.where(~none, 1.0))
    return torch.where(fused, weights, 1.0)


def make_method(
    name: str, prop_attn: bool, normalize_fused: bool, fused_weight_grad: bool
) -> Method:
    """The method of that name with the settings that are its own.

    Raises:
        ValueError: there is no such method, or a setting is not a bool, of another method too.
    """
    check_bool(prop_attn, "prop_attn")
    check_bool(normalize_fused, "normalize_fused")
    check_bool(fused_weight_grad, "fused_weight_grad")
    if name == ToMe.name:
        return ToMe(prop_attn)
    if name == EViT.name:
        return EViT(normalize_fused, fused_weight_grad)
    if name == TopK.name:
        return TopK()
    raise ValueError(f"method: expected one of {METHODS}, got {name!r}")
