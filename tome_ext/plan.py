"""The merge plan: which tokens become which output row. Every method lowers to this one form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._checks import INT32_MAX
from .schedule import as_integer, as_real

__all__ = ["MergePlan", "compose", "match", "select"]


class MergePlan(NamedTuple):
    """Which of N input tokens make each of M output rows, for every image of a batch.

    Immutable; a plain tuple of three int32 tensors, so it passes through ``torch.compile``,
    ``torch.export`` and pytree functions.

    Attributes:
        assign: (B, N) int32, the output row of every input token, -1 for a dropped one.
        members: (B, N) int32, input tokens grouped by output row, ascending within each row,
            dropped ones at the end.
        offsets: (B, M + 1) int32, where each output row's members begin in ``members``.
    """

    assign: Tensor
    members: Tensor
    offsets: Tensor

    @classmethod
    def from_assign(cls, assign: Tensor, num_output_tokens: int) -> MergePlan:
        """Build the plan that sends token ``n`` of image ``b`` to row ``assign[b, n]``.

        Args:
            assign: (B, N) int32 or int64, each entry -1 (drop) or in [0, num_output_tokens).
            num_output_tokens: M, the number of output rows.

        Raises:
            ValueError: ``assign`` has the wrong rank or dtype, or ``num_output_tokens`` is not an
                integer from 0 to 2^31 - 2.
            RuntimeError: an entry points outside the output (checked on the CPU only: looking at
                it from the host would stall a GPU, where such a token counts as dropped).
        """
        ops.expect_tensors(assign=assign)
        if assign.dim() != 2 or assign.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"assign: expected (B, N) int32 or int64, got {ops.describe(assign)}")
        num_output_tokens = _count(num_output_tokens, "num_output_tokens")
        return cls._of_rows(assign, num_output_tokens)

    @classmethod
    def _of_rows(cls, assign: Tensor, rows: int) -> MergePlan:
        """:meth:`from_assign` of what is known to be right."""
        own = assign.to(torch.int32).contiguous()
        return cls(own, *ops.plan(own, rows))

    @property
    def num_tokens(self) -> int:
        """N, the number of input tokens."""
        return self.assign.shape[1]

    @property
    def num_output_tokens(self) -> int:
        """M, the number of output rows."""
        return self.offsets.shape[1] - 1

    def merge(
        self,
        x: Tensor,
        size: Tensor | None = None,
        reduce: str = "mean",
        keep_norms: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Merge tokens.

        Args:
            x: (B, N, C) float32, float16, bfloat16 or float64.
            size: (B, N) float32, how many original tokens each token stands for; None means 1.
                Differentiable: learned sizes get the gradient of rows and of new sizes.
            reduce: "mean" for ``sum(size * x) / sum(size)``, "sum" for ``sum(size * x)``,
                "amax" for the elementwise maximum.
            keep_norms: multiply every "mean" row of several tokens, so that it is as long as they
                are in the mean, by size; means of what differs are shorter. Rows for which that
                factor is not finite, as of tokens that cancel out, stay as they are.

        Returns:
            The rows (B, M, C), in x's dtype, summed in float32 (float64 for float64); and their
            sizes (B, M), always float32. A "mean" row of one token is that token unchanged; rows
            whose sizes sum to 0 (padding) are averaged evenly; rows without members are 0.

        Raises:
            ValueError: shapes, dtypes, devices or ``reduce`` are not as above, or norms are to be
                kept by another ``reduce`` than "mean"; on CUDA also more than 2^24 tokens that are
                not float64, which float32 sums would not count.
            RuntimeError: the plan's indices point outside the tensors (checked on the CPU).
        """
        if not keep_norms:
            return ops.merge(x, size, self.members, self.offsets, reduce)
        if reduce != "mean":
            raise ValueError(f"keep_norms: expected reduce='mean' with it, got {reduce!r}")
        ops.expect_tensors(x=x)
        merged, new_size, _ = ops.merge_add_norm(
            x, torch.zeros_like(x), size, self.members, self.offsets, keep_norms=True
        )
        return merged, new_size

    def merge_add_norm(
        self,
        x: Tensor,
        branch: Tensor,
        size: Tensor | None = None,
        scale: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        keep_norms: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add a branch to its residual, merge the tokens and normalise them, in one pass.

        What a transformer block does between two of its branches, each step of which would read
        and write every token::

            merged, new_size = plan.merge(x + scale * branch, size, keep_norms=keep_norms)
            normed = F.layer_norm(merged, (C,), weight, bias, eps)

        Differentiable in x, branch, size, scale, weight and bias, twice.

        Args:
            x: (B, N, C) float32, float16, bfloat16 or float64; any strides with a contiguous last
                dimension (others are copied).
            branch: (B, N, C) of x's dtype, the output of the block's branch; any such strides.
            size: (B, N) float32, how many original tokens each token stands for; None means 1.
            scale: (C,) of x's dtype, the branch's factor per channel (LayerScale's gamma); None
                means 1.
            weight: (C,) of x's dtype, the norm's weight; None means 1.
            bias: (C,) of x's dtype, the norm's bias; None means 0.
            eps: >= 0, added to the variance over a token's channels.
            keep_norms: as in :meth:`merge`.

        Returns:
            The rows (B, M, C) in x's dtype, made of the sums as :meth:`merge` does by "mean";
            their sizes (B, M) float32; and the rows normalised over their channels (B, M, C), in
            x's dtype. Sums, means and variances are taken in float32 (float64 for float64); the
            rows are rounded to x's dtype once, and the norm is of the rounded ones. A row without
            members is 0, and its norm the bias.

        Raises:
            ValueError: shapes, dtypes, devices or eps are not as above; on CUDA also as in
                :meth:`merge`.
            RuntimeError: the plan's indices point outside the tensors (checked on the CPU).
        """
        return ops.merge_add_norm(
            x, branch, size, self.members, self.offsets, scale, weight, bias, eps, keep_norms
        )

    def unmerge(self, x: Tensor) -> Tensor:
        """Copy every row back to the tokens that made it: (B, M, C) to (B, N, C); dropped get 0.

        Raises:
            ValueError: x is not (B, M, C) of the plan's B and M, of a dtype that :meth:`merge`
                takes, on the plan's device.
            RuntimeError: the plan's indices point outside x (checked on the CPU).
        """
        ops.expect_tensors(x=x)
        rows = self.offsets.shape[1] - 1
        if x.dim() == 3 and x.shape[1] != rows:  # which the operator cannot know
            batch = self.assign.shape[0]
            raise ValueError(
                f"x: expected (B, M, C) = ({batch}, {rows}, C) as in the plan, got "
                f"{ops.describe(x)}"
            )
        return ops.unmerge(x, self.assign)

    def trimmed(self) -> MergePlan:
        """This plan without the rows at its end that are empty in every image.

        How many these are is read from the tensors, which waits for a GPU, and breaks the graph of
        ``torch.compile``.
        """
        offsets = self.offsets
        if offsets.shape[0] == 0:
            return self
        rows = int((offsets < offsets[:, -1:]).sum(1).max())
        return MergePlan(self.assign, self.members, offsets[:, : rows + 1].contiguous())

    def then(self, following: MergePlan) -> MergePlan:
        """The plan that does this one and then ``following``, from N tokens to its rows.

        Raises:
            ValueError: ``following`` is not of this plan's B, with its M as N, or on another
                device.
        """
        wanted, got = (self.assign.shape[0], self.num_output_tokens), following.assign.shape
        if got != wanted:
            raise ValueError(
                f"following: expected a plan of (B, N) = {wanted} tokens, this one's rows, got one "
                f"of {tuple(got)}"
            )
        here, there = self.assign.device, following.assign.device
        if here != there:
            raise ValueError(f"following: expected a plan on {here}, as this one, got {there}")
        assign = compose(self.assign, following.assign)
        return MergePlan._of_rows(assign, following.num_output_tokens)


def compose(first: Tensor, then: Tensor) -> Tensor:
    """The assignment (B, N) that does ``first`` (B, N) and then ``then`` (B, M)."""
    if then.shape[1] == 0:  # every token was dropped
        return first
    rows = then.gather(1, first.clamp_min(0).to(torch.int64))
    return torch.where(first < 0, -1, rows)


def _count(value: Any, name: str) -> Any:
    """An integer as the operators take it: cut to what numbers of tokens can be."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        value = as_integer(value, name)
    if -INT32_MAX <= value <= INT32_MAX:
        return value
    return INT32_MAX if value > 0 else -INT32_MAX


def match(
    metric: Tensor,
    r: int,
    num_prefix_tokens: int = 0,
    *,
    weight: Tensor | None = None,
    targets: Tensor | None = None,
    size: Tensor | None = None,
    importance: Tensor | None = None,
    threshold: float | None = None,
) -> MergePlan:
    """Bipartite soft matching (Bolya et al., ICLR 2023, section 3; arXiv 2210.09461).

    The tokens after the prefix are split by position into A (even) and B (odd); each A token
    looks at its most similar B token by cosine similarity; the r A tokens with the highest such
    similarity are merged into theirs. Ties go to the lower index, both times.

    With ``targets``, B is these tokens and A all others behind the prefix.

    With ``size`` or ``importance``, each A token looks at the same B token, but the r that merge
    are those whose merging costs least, in place of the most similar ones: ``(1 - similarity) *
    size_a * size_b / (size_a + size_b) * importance_a``. Without the last factor that is half of
    what the merge adds to the sum of squared distances between tokens and their rows, for tokens
    of length 1: the criterion of Ward, *Hierarchical grouping to optimize an objective function*,
    JASA 1963.

    With ``threshold``, an image also merges all other pairs of at least this similarity, as far as
    r could be; so each image merges another number of tokens. The plan has N - r rows all the same:
    those that an image has left at its end are empty, of size 0, which attention hides, and
    :meth:`MergePlan.trimmed` takes off what is empty in all images. With ``size`` or ``importance``
    it is the cost that decides: pairs merge that cost no more than two tokens of size and
    importance 1 of this similarity, ``(1 - threshold) / 2``.

    Tokens of weight 0 (padding, masked ones) are hidden, the prefix excepted: they are neither
    merged nor merged into, what they hold changes nothing, and they are dropped, so that
    ``plan.merge(x, weight)`` loses no size. For each image r is cut to its visible tokens of A and,
    without ``targets``, of B; the rows that it has left at the end stay empty, of size 0, which
    attention hides. So an image that is padded at its end has the plan that it has alone, with rows
    to spare. Only if all ``targets`` of an image are hidden may its other visible tokens be more
    than the rows: then as many of them as must, the first ones, merge into the first target, whose
    row counts what is visible.

    Args:
        metric: (B, N, D), or (B, H, N, D) which is averaged over heads; float32, float16,
            bfloat16 or float64; any strides with a contiguous last dimension (others are copied),
            so the keys of a packed qkv tensor are read in place. Computed in float32 (float64).
            A zero vector has similarity 0 to everything; one with NaN or infinity is never
            chosen while another can be.
        r: tokens to remove, cut to ``(N - num_prefix_tokens) // 2``, or with ``targets`` to the
            number of tokens behind the prefix that are none, 0 without any; r <= 0 keeps all. Any
            integer, however large.
        num_prefix_tokens: leading tokens (class, distillation, registers) that never merge.
        weight: (B, N) float32, 0 for tokens that take no part, any other value for the others:
            the sizes of the tokens serve. None means that all take part.
        targets: (T,) int32, the tokens that others merge into, ascending, each from
            num_prefix_tokens to N - 1: those of a grid or a stride. None means the odd positions.
        size: (B, N) float32, how many original tokens each one stands for; None means 1 each.
        importance: (B, N) float32, not negative, what a change of each token counts, such as the
            class token's attention; None means 1 each. A cost that is not a number counts as 0.
        threshold: the cosine similarity from which on pairs merge, in addition to r; above 1 none
            does, and None means that r alone says how many.

    Returns:
        A plan with N - r output rows: prefix tokens, the visible A tokens that stay ascending, the
        visible B tokens ascending, then empty rows. Where nothing can merge, by r and threshold or
        the number of tokens, the identity, of hidden tokens too.

    Raises:
        ValueError: wrong rank, shape, dtype or device, r or num_prefix_tokens not an integer, the
            latter negative, more targets than tokens behind the prefix, a threshold that is NaN.
        RuntimeError: targets out of order or range, on the CPU (on a GPU, where a look at them
            would stall it, such targets give some other plan, but reach nothing outside the
            tokens).
    """
    r, prefix = _count(r, "r"), _count(num_prefix_tokens, "num_prefix_tokens")
    if threshold is not None:
        threshold = as_real(threshold, "threshold", "a number")
    made = ops.match(
        metric, r, prefix, weight=weight, targets=targets, size=size, importance=importance,
        threshold=threshold,
    )  # fmt: skip
    return MergePlan(*made)


def select(scores: Tensor, keep: int, num_prefix_tokens: int = 0, fuse: bool = False) -> MergePlan:
    """Keep the tokens of the highest scores, and drop the others or make them one row.

    Top-K drops them. EViT (Liang et al., ICLR 2022; arXiv 2202.07800) fuses them: with ``weights``
    (B, N) that are 1 for kept tokens and the score for the others, its tokens are
    ``plan.merge(x, weights, reduce="sum")``. Scores come from :func:`tome_ext.cls_attention`.

    Ties go to the lower index. NaN ranks below everything, also below -infinity.

    Args:
        scores: (B, N) float32 or float64; any strides with a contiguous last dimension (others are
            copied). Those of prefix tokens are not looked at.
        keep: how many of the N - num_prefix_tokens other tokens to keep, >= 0; cut to their number.
        num_prefix_tokens: leading tokens (class, distillation, registers), which are always kept.
        fuse: make the others one row, the last, instead of dropping them.

    Returns:
        A plan whose rows are the prefix tokens, the tokens kept in their order, and with ``fuse``
        one of all others, if there are any. Not differentiable.

    Raises:
        ValueError: wrong rank or dtype, ``keep`` or ``num_prefix_tokens`` negative or not an
            integer, ``fuse`` not a bool.
    """
    keep, prefix = _count(keep, "keep"), _count(num_prefix_tokens, "num_prefix_tokens")
    if not isinstance(fuse, bool):
        raise ValueError(f"fuse: expected True or False, got {ops.describe(fuse)}")
    return MergePlan(*ops.select(scores, keep, prefix, fuse))
