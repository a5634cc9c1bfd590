"""How a layer reduces its tokens: one class per method, its settings as fields.

A method ranks tokens by what attention computes, makes a plan from the ranks, and merges by it. Add
one by adding a class here, and to :data:`METHODS` and :data:`MethodName`; the command's names are
in ``tome_ext_cli/options.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ...attention import cls_attention
from ...plan import MergePlan, match, select
from .refusals import check_bool

__all__ = [
    "METHODS",
    "AttentionInputs",
    "EViT",
    "Given",
    "Guided",
    "Method",
    "MethodName",
    "Ranks",
    "ToMe",
    "TopK",
    "make_method",
]

MethodName = Literal["tome", "guided", "evit", "topk"]

# How Guided counts the class token's attention: to this power, and under a threshold, where it is
# over its mean, as at least so much. Else tokens without attention would merge whatever they are.
IMPORTANCE_POWER = 0.75
LEAST_IMPORTANCE = 0.5


class AttentionInputs(NamedTuple):
    """What a layer's attention is computed from.

    Attributes:
        q: (B, H, M, D) queries.
        k: (B, H, M, D) keys.
        metric: (B, H, M, D), what tokens are compared by: the keys, or what a host has in their
            place.
        size: (B, M) float32 for proportional attention; None if it is off or all are 1.
        scale: factor of the logits; None means ``D ** -0.5``.
        mask: of the present tokens, broadcastable to (B, H, M, M); None if there is none.
    """

    q: Tensor
    k: Tensor
    metric: Tensor
    size: Tensor | None
    scale: float | None
    mask: Tensor | None

    def cls_attention(self) -> Tensor:
        """The class token's attention to each token, (B, M); see :func:`tome_ext.cls_attention`."""
        return cls_attention(self.q, self.k, self.size, self.scale, self.mask)


class Ranks(NamedTuple):
    """What attention says of a layer's tokens.

    Attributes:
        metric: (B, H, M, D), as there; None for a method that compares nothing by it.
        scores: (B, M), the class token's attention to each, float32 or float64; None for a method
            that does not ask for it.
    """

    metric: Tensor | None
    scores: Tensor | None


class Given(NamedTuple):
    """What else a layer knows of its tokens when it makes its plan.

    Attributes:
        x: (B, M, C), the tokens after attention; None where they are added up while they merge,
            unless :attr:`Method.compares_tokens`.
        branch: (B, M, C), what attention has added to them, before ``scale``; None in blocks that
            add it together with the MLP's.
        scale: (C,), by which that was multiplied; None if it was not.
        size: (B, M) float32, how many original tokens each stands for; None if all are 1.
        shown: (B, M) float32, 0 for tokens that a mask hides, and for rows that an image with
            fewer tokens than others does not fill; None if there are none.
        threshold: the similarity from which on tokens merge, in addition to the amount.
    """

    x: Tensor | None
    branch: Tensor | None
    scale: Tensor | None
    size: Tensor | None
    shown: Tensor | None
    threshold: float | None = None


@dataclass(frozen=True)
class Method:
    """What every method says and does.

    Attributes:
        name: as users give it.
        needs_class_token: whether it ranks tokens by the class token's attention alone.
        sized: whether tokens have sizes: how many original tokens each stands for.
        fuses: whether those that a layer does not keep become one more token.
        compares_tokens: whether the plan is made of the tokens themselves.
        keeps_norms: whether merged tokens are as long as those that make them; see
            :meth:`tome_ext.MergePlan.merge`.
        proportional: whether attention counts a token as often as its size.
    """

    name: ClassVar[MethodName]
    needs_class_token: ClassVar[bool] = True
    compares_tokens: ClassVar[bool] = False
    keeps_norms: ClassVar[bool] = False
    sized: ClassVar[bool] = False
    fuses: ClassVar[bool] = False
    # How a mask's columns are reduced to those of merged keys; see reduce_mask.
    mask_reduction: ClassVar[str] = "mean"

    @property
    def proportional(self) -> bool:
        return False

    def of_model(self, class_token: bool) -> Method:
        """The method as a model takes it that has a class token, or has none.

        Raises:
            ValueError: it has none, and the method needs one.
        """
        if self.needs_class_token and not class_token:
            raise ValueError(
                f"method: {self.name!r} ranks tokens by the class token's attention, and this "
                "model has no class token; expected one that has, or method='tome' or 'guided'"
            )
        return self

    def check_rates(self, rates: Sequence[float]) -> None:
        """Refuse shares to keep, one for each layer, that the method cannot reach.

        Raises:
            ValueError: one is too small; the message says why.
        """

    def check_threshold(self) -> None:
        """Refuse that tokens merge from a similarity on.

        Raises:
            ValueError: the method does not go by similarity, or nothing would hide the rows that
                images with fewer tokens than others have to spare.
        """
        raise ValueError(
            "threshold: expected method='tome' or 'guided', which merge what is similar, got "
            f"{self.name!r}"
        )

    def kept(self, num_patches: int, r: int, keep_rate: float | None) -> int:
        """How many patch tokens of a layer are left, a fused one not counted.

        Args:
            num_patches: n, its tokens without the prefix.
            r: tokens to remove, if ``keep_rate`` is None.
            keep_rate: share of the n tokens to keep, rounded up.

        Returns:
            At least 1, if there are any, and at most n.
        """
        if keep_rate is not None:
            keep = math.ceil(keep_rate * num_patches)
        else:
            # A fused token comes back, so that r are removed.
            keep = num_patches - r - int(self.fuses and r > 0)
        return min(max(keep, 1), num_patches)

    def tokens_after(
        self, num_tokens: int, num_prefix_tokens: int, r: int, keep_rate: float | None
    ) -> int:
        """How many of a layer's ``num_tokens`` are left, with the prefix and a fused one.

        ``num_prefix_tokens`` of them are no patches and stay; the others are as in :meth:`kept`.
        """
        num_patches = num_tokens - num_prefix_tokens
        keep = self.kept(num_patches, r, keep_rate)
        return num_prefix_tokens + keep + int(self.fuses and keep < num_patches)

    def amount(self, num_patches: int, r: int, keep_rate: float | None) -> int | None:
        """What :meth:`plan` is asked for in a layer; None if the layer leaves all its tokens.

        Arguments are as in :meth:`kept`. For methods that prune it is the number of patch tokens to
        keep.
        """
        keep = self.kept(num_patches, r, keep_rate)
        return keep if keep < num_patches else None

    def rank(self, of: AttentionInputs) -> Ranks:
        """What attention gives for the plan."""
        of = of._replace(q=_detached(of.q), k=_detached(of.k))
        return Ranks(None, of.cls_attention())

    def plan(self, ranks: Ranks, amount: int, prefix: int, given: Given) -> MergePlan:
        """The plan of a layer, whose first ``prefix`` tokens stay."""
        raise NotImplementedError

    def averages(self, ranks: Ranks | None) -> bool:
        """Whether output rows are weighted means, by :meth:`weights`."""
        return True

    def weights(self, ranks: Ranks, plan: MergePlan, size: Tensor | None) -> Tensor | None:
        """The weights (B, M) of tokens in those means; None for all 1."""
        return size

    def merge(
        self, x: Tensor, ranks: Ranks, plan: MergePlan, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens x (B, M, C) reduced, and their sizes where the method has any."""
        weights = self.weights(ranks, plan, size)
        merged, new_size = plan.merge(x, weights, keep_norms=self.keeps_norms)
        return merged, self.sizes(new_size)

    def sizes(self, size: Tensor) -> Tensor | None:
        """The sizes (B, M) that a merge gave, if they mean anything: pruning counts all once."""
        return None


@dataclass(frozen=True)
class ToMe(Method):
    """Merge similar tokens (Bolya et al., ICLR 2023; arXiv 2210.09461)."""

    prop_attn: bool = True

    name: ClassVar[MethodName] = "tome"
    needs_class_token: ClassVar[bool] = False
    sized: ClassVar[bool] = True

    @property
    def proportional(self) -> bool:
        return self.prop_attn

    @property
    def mask_reduction(self) -> str:  # type: ignore[override]
        return "sum" if self.prop_attn else "mean"

    def rank(self, of: AttentionInputs) -> Ranks:
        return Ranks(_detached(of.metric), None)

    def check_rates(self, rates: Sequence[float]) -> None:
        least = min(rates, default=1.0)
        if least < 0.5:
            raise ValueError(
                f"keep_rate: expected at least 0.5, as {self.name} merges at most half of a "
                f"layer's tokens, got {least!r} in layer {rates.index(least)}"
            )

    def check_threshold(self) -> None:
        if not self.prop_attn:
            raise ValueError(
                "threshold: expected prop_attn=True with it, since it is by their sizes that "
                "attention passes over rows that an image does not fill, got False"
            )

    def kept(self, num_patches: int, r: int, keep_rate: float | None) -> int:
        return max(super().kept(num_patches, r, keep_rate), (num_patches + 1) // 2)

    def amount(self, num_patches: int, r: int, keep_rate: float | None) -> int | None:
        """How many tokens to remove, which match cuts."""
        if num_patches < 2:
            return None
        if keep_rate is not None:
            r = num_patches - self.kept(num_patches, r, keep_rate)
        return r if r > 0 else None

    def plan(self, ranks: Ranks, amount: int, prefix: int, given: Given) -> MergePlan:
        assert ranks.metric is not None
        return match(ranks.metric, amount, prefix, weight=given.shown, threshold=given.threshold)

    def sizes(self, size: Tensor) -> Tensor | None:
        return size


@dataclass(frozen=True)
class Guided(ToMe):
    """As ToMe, but merge what the answer depends on least, and keep norms.

    Tokens are compared, not keys, and of the pairs found those merge that cost least: what a merge
    adds to the squared error (the criterion of Ward, JASA 1963), times the class token's attention
    to the token that goes. ToMe merges the most similar pairs whatever they weigh. Powers from 0.5
    to 1 do about as well. Means are shorter than what they are made of: they are stretched to its
    mean length. docs/fidelity.md has the figures.

    Attributes:
        class_token: whether the model has one; without, nothing but sizes guides.
    """

    class_token: bool = True

    name: ClassVar[MethodName] = "guided"
    compares_tokens: ClassVar[bool] = True
    keeps_norms: ClassVar[bool] = True

    def rank(self, of: AttentionInputs) -> Ranks:
        if not self.class_token:
            return Ranks(None, None)
        ranks = Method.rank(self, of)
        scores = ranks.scores
        if of.mask is None or scores is None:
            return ranks
        # A mask may leave the class token nothing but itself to attend to: then nothing guides.
        guides = scores[:, 1:].amax(1, keepdim=True) > 0
        return Ranks(None, torch.where(guides, scores, 1.0))

    def of_model(self, class_token: bool) -> Method:
        return replace(self, class_token=class_token)

    def plan(self, ranks: Ranks, amount: int, prefix: int, given: Given) -> MergePlan:
        assert given.x is not None
        importance = None
        if ranks.scores is not None:
            scores = ranks.scores.to(torch.float32)
            if given.threshold is None:
                importance = scores**IMPORTANCE_POWER
            else:
                relative = _over_mean(scores, prefix, given.shown)
                importance = (relative**IMPORTANCE_POWER).clamp_min(LEAST_IMPORTANCE)
        return match(
            _detached(given.x),
            amount,
            prefix,
            weight=given.shown,
            size=given.size,
            importance=importance,
            threshold=given.threshold,
        )


@dataclass(frozen=True)
class TopK(Method):
    """Keep the tokens that the class token attends to most, and drop the others."""

    name: ClassVar[MethodName] = "topk"

    def plan(self, ranks: Ranks, amount: int, prefix: int, given: Given) -> MergePlan:
        assert ranks.scores is not None
        return select(ranks.scores.detach(), amount, prefix)


@dataclass(frozen=True)
class EViT(Method):
    """As TopK, but fuse the others (Liang et al., ICLR 2022; arXiv 2202.07800)."""

    normalize_fused: bool = False
    fused_weight_grad: bool = False

    name: ClassVar[MethodName] = "evit"
    fuses: ClassVar[bool] = True
    # The fused token is one key: hidden only if all its tokens are.
    mask_reduction: ClassVar[str] = "amax"

    def rank(self, of: AttentionInputs) -> Ranks:
        if not self.fused_weight_grad:
            return super().rank(of)
        return Ranks(None, of.cls_attention())

    def plan(self, ranks: Ranks, amount: int, prefix: int, given: Given) -> MergePlan:
        assert ranks.scores is not None
        return select(ranks.scores.detach(), amount, prefix, fuse=True)

    def averages(self, ranks: Ranks | None) -> bool:
        return self.normalize_fused and not _wide(ranks)

    def weights(self, ranks: Ranks, plan: MergePlan, size: Tensor | None) -> Tensor | None:
        """1, or the score of a token that becomes part of the last row."""
        assert ranks.scores is not None
        return torch.where(plan.assign == plan.num_output_tokens - 1, ranks.scores, 1.0)

    def merge(
        self, x: Tensor, ranks: Ranks, plan: MergePlan, size: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        weights = self.weights(ranks, plan, size)
        assert weights is not None
        if _wide(ranks):
            if self.normalize_fused:
                weights = _normalized(weights, plan)
            return plan.merge(x * weights.unsqueeze(-1), reduce="sum")[0].to(x.dtype), None
        return plan.merge(x, weights, "mean" if self.normalize_fused else "sum")[0], None


def _over_mean(scores: Tensor, prefix: int, shown: Tensor | None) -> Tensor:
    """Scores (B, M) over the mean of those of patch tokens that are shown, which have 0 if not.

    1 where the class token attends to none of them.
    """
    patches = scores[:, prefix:]
    total = patches.sum(1, keepdim=True)
    if shown is None:
        mean = total / patches.shape[1]
    else:
        mean = total / (shown[:, prefix:] != 0).sum(1, keepdim=True).clamp_min(1)
    return torch.where(mean > 0, scores / mean, 1.0)


def _detached(x: Tensor) -> Tensor:
    # A trace may be checked with gradients and without, and must be the same.
    return x.detach() if x.requires_grad or torch.jit.is_tracing() else x


def _wide(ranks: Ranks | None) -> bool:
    """Whether the weights are for torch to multiply by: the operators take float32 ones."""
    return ranks is not None and ranks.scores is not None and ranks.scores.dtype != torch.float32


def _normalized(weights: Tensor, plan: MergePlan) -> Tensor:
    """EViT's weights (B, N), divided so that those of the fused token sum to 1.

    As :meth:`MergePlan.merge` does it for a mean: evenly if they are all 0.
    """
    fused = plan.assign == plan.num_output_tokens - 1
    total = torch.where(fused, weights, 0.0).sum(1, keepdim=True)
    none = total == 0
    weights = torch.where(none, 1.0 / fused.sum(1, keepdim=True), weights / total.where(~none, 1.0))
    return torch.where(fused, weights, 1.0)


METHODS: dict[str, type[Method]] = {method.name: method for method in (ToMe, Guided, EViT, TopK)}


def make_method(name: str, **settings: object) -> Method:
    """The method of that name, with those of the settings that are its own.

    Raises:
        ValueError: there is no such method, or a setting is not a bool, of another method too.
    """
    for key, value in settings.items():
        check_bool(value, key)
    if name not in list(METHODS):  # which compares, so that any value may come
        raise ValueError(f"method: expected one of {tuple(METHODS)}, got {name!r}")
    method = METHODS[name]
    own = {field.name for field in fields(method)}
    return method(**{key: value for key, value in settings.items() if key in own})
