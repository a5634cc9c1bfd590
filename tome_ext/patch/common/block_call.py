"""One call of one block: its attention, and what becomes of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention import OPERATOR, attend, key_mask, reduce_mask, visible_keys
from ...plan import MergePlan, compose
from . import positions
from .methods import AttentionInputs, Given, Ranks
from .token_state import Tokens, composed

__all__ = ["BlockCall", "attention_name"]

STOCK_ATTENTION = "scaled_dot_product_attention"


class BlockCall:
    """One call of one block.

    Attributes:
        tokens: what is known about the tokens that enter; after a merge, about those that leave.
        active: whether attention must be proportional or hand over its keys or scores, or masks
            and tables be reduced; if not, the module's own attention is right as it is.
        reduces: whether fewer tokens leave the block than enter it.
        size: (B, M) float32 for proportional attention; None if it is off or all are 1.
        ranks: what the block's plan is made of; None before attention.
        planned: ranks, and the plan made of them beside attention; None if none was.
        attention: what computed attention, in words; None before.
    """

    __slots__ = (
        "active",
        "amount",
        "attention",
        "method",
        "planned",
        "ranks",
        "reduces",
        "shown",
        "size",
        "tables",
        "tokens",
    )

    def __init__(self, tokens: Tokens) -> None:
        rules = tokens.rules
        rule = rules.layers[tokens.layer]
        self.tokens = tokens
        self.method = method = rules.method
        self.amount: int | None = None
        if rule.reduces:
            num_patches = tokens.num_tokens - rules.num_prefix_tokens
            if rule.threshold is None:
                self.amount = method.amount(num_patches, rule.r, rule.rate)
            elif num_patches > 1:
                self.amount = 0  # all that merge do so by the threshold
        self.reduces = self.amount is not None
        self.active = self.reduces or tokens.reduced
        size = tokens.size
        self.size = size if size is None or method.proportional else None
        self.ranks: Ranks | None = None
        self.planned: tuple[Ranks, MergePlan] | None = None
        # (B, M) float32, 0 where a mask hides a token, or a row is one that an image does not fill.
        self.shown: Tensor | None = None if rules.settings.threshold is None else size
        self.tables = tokens.tables
        self.attention: str | None = None

    # --- what travels with the tokens -----------------------------------------------------------

    def plan_so_far(self) -> MergePlan | None:
        """The plan from the original tokens to these; carried along from here on."""
        tokens = self.tokens
        if not tokens.reduced:
            return None
        if tokens.composed is None:
            self.tokens = tokens = tokens._replace(composed=composed(tokens.assigns))
        assert tokens.composed is not None
        return MergePlan.from_assign(tokens.composed, tokens.num_tokens)

    def rotary(
        self, table: tuple[Tensor, Tensor], own: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """The rotary table of the present tokens.

        A merged token's position is the mean over the original tokens it stands for, brought back
        to length 1.

        Args:
            table: cosines and sines, in either order, of the original patch tokens, those without
                the prefix: (P, D) or (B, P, D) each.
            own: the table is this layer's own, or learned; else one serves all layers of a forward.

        Returns:
            The same, (B, M - prefix, D) each; None if nothing has merged.
        """
        prefix = self.tokens.rules.num_prefix_tokens
        own = own or table[0].requires_grad
        batch = self.tokens.batch_size
        if not self.tokens.reduced:
            if self.reduces and not own:
                self.tables = (positions.for_all_tokens(table, batch, prefix),)
            return None
        if own:
            plan = self.plan_so_far()
            assert plan is not None
            carried = plan.merge(positions.for_all_tokens(table, batch, prefix))[0]
        else:
            if not self.tables:
                raise RuntimeError(
                    f"block {self.tokens.layer} was given a rotary table that the blocks before it "
                    "were not; expected one in every block"
                )
            carried = self.tables[0]
        first, second = positions.of_length_1(carried[:, prefix:])
        return first.to(table[0].dtype), second.to(table[0].dtype)

    def position_ids(self, coordinates: Tensor) -> Tensor | None:
        """Which original token each present token takes its position from.

        Args:
            coordinates: (N, K) of the original tokens, prefix included.

        Returns:
            (B, M) int64: of the tokens that a token stands for, the one nearest to their centroid;
            None if nothing has merged.
        """
        plan = self.plan_so_far()
        return None if plan is None else positions.representatives(plan, coordinates)

    def relative_bias(self, bias: Tensor, coordinates: Tensor) -> Tensor:
        """A bias of pairs of original tokens, for pairs of the present ones.

        A token takes the rows and columns of :meth:`position_ids`. The result is dense, B times as
        large as a bias that serves the whole batch, and keeps attention from being flash.

        Args:
            bias: (1, H, N, N), added to the logits.
            coordinates: (N, K), as there.

        Returns:
            (B, H, M, M); the bias as it came if nothing has merged.
        """
        ids = self.position_ids(coordinates)
        if ids is None:
            return bias
        return bias[0][:, ids.unsqueeze(2), ids.unsqueeze(1)].transpose(0, 1)

    def mask(self, q: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
        """The caller's mask over original tokens, carried to the present ones.

        ``q`` (B, H, M, D) are the queries. ``shown`` becomes which tokens it hides from all.
        Where tokens have merged, ``size`` is changed: to None where the returned mask contains the
        sizes, or to the visible sizes where the mask only hides keys, and none is returned.
        """
        if is_causal and attn_mask is not None:
            raise ValueError("expected attn_mask or is_causal, got both")
        plan = self.plan_so_far()
        num_tokens = q.shape[-2] if plan is None else plan.num_tokens
        if is_causal:
            attn_mask = q.new_ones(num_tokens, num_tokens, dtype=torch.bool).tril()
        assert attn_mask is not None
        batch = q.shape[0]
        keys = key_mask(attn_mask, batch, num_tokens)
        reduced = None
        if keys is None and plan is not None:
            self.size = None
            reduced = reduce_mask(attn_mask, plan, self.method.mask_reduction, q.dtype)
        if not is_causal:
            shown = visible_keys(attn_mask, batch, num_tokens) if keys is None else keys
            self.shown = shown.to(torch.float32)
            if plan is not None:
                by = "amax" if self.method.mask_reduction == "amax" else "sum"
                self.shown = plan.merge(self.shown.unsqueeze(-1), reduce=by)[0].squeeze(-1)
        if plan is None:
            return attn_mask
        if keys is None:
            return reduced
        if self.method.mask_reduction == "mean":
            weight = keys.to(torch.float32).unsqueeze(-1)
            self.size = plan.merge(weight, reduce="mean")[0].squeeze(-1)
        else:
            self.size = self.shown
        return None

    # --- attention ------------------------------------------------------------------------------

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
        """Attention of an active block, which weights keys by size.

        What it says of the tokens becomes what the block's plan is made of.

        Args:
            q: (B, H, M, D) queries.
            k: (B, H' M, D) keys, H' a divisor of H.
            v: values, as k.
            attn_mask: the caller's mask over the original tokens, broadcastable to (B, H, N, N).
            is_causal: the mask is the lower triangle over the original tokens.
            dropout_p: probability of dropping an attention weight.
            scale: factor of the logits; None means ``D ** -0.5``.
            metric: (B, H, M, D) in place of the keys as what tokens are matched by.
            bias: added to the logits, of the present tokens, broadcastable to (B, H, M, M); as
                from :meth:`relative_bias`. Not with ``attn_mask`` or ``is_causal``.

        Returns:
            (B, H, M, D).

        Raises:
            ValueError: more than one of mask, bias and ``is_causal`` are given, or the mask's shape
                is wrong.
        """
        if attn_mask is not None or is_causal:
            if bias is not None:
                raise ValueError("expected a mask or a bias, got both")
            attn_mask = self.mask(q, attn_mask, is_causal)
        elif bias is not None:
            attn_mask = bias.to(q.dtype)
        if k.shape[1] != q.shape[1]:  # grouped queries
            metric = k if metric is None else metric
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if not self.reduces:
            return self._attention(q, k, v, attn_mask, scale, dropout_p)
        by = k if metric is None else metric
        of = AttentionInputs(q, k, by, self.size, scale, attn_mask)
        beside = stream_beside(q)
        if beside is None:
            self.ranks = self.method.rank(of)
            return self._attention(q, k, v, attn_mask, scale, dropout_p)
        with torch.cuda.stream(beside):
            self.ranks = self.method.rank(of)
            if not self.method.compares_tokens:
                self.planned = self.ranks, self._plan_by(self.ranks, None, None, None)
        out = self._attention(q, k, v, attn_mask, scale, dropout_p)
        torch.cuda.current_stream(q.device).wait_stream(beside)
        return out

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        scale: float | None,
        dropout_p: float,
    ) -> Tensor:
        out, reason = attend(q, k, v, self.size, attn_mask, scale, dropout_p)
        self.attention = attention_name(reason)
        return out

    # --- merging --------------------------------------------------------------------------------

    @property
    def averages(self) -> bool:
        """Whether the block's rows are weighted means, which :meth:`merge_add_norm` computes.

        To be asked after attention.
        """
        return self.reduces and self.method.averages(self.ranks)

    def merge(self, x: Tensor, branch: Tensor | None) -> Tensor:
        """Reduce the tokens (B, M, C): merge or drop them as the method says.

        ``branch`` (B, M, C) is what attention has added to give ``x``; see :class:`Given`.
        """
        if not self.reduces:
            self.pass_on(x, self.tokens.size, None)
            return x
        plan, ranks = self._plan(x, branch, None)
        merged, size = self.method.merge(x, ranks, plan, self.tokens.size)
        self.pass_on(merged, size, plan)
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
        """Of a block that averages: as :meth:`merge`, of ``x + scale * branch``, and its LayerNorm.

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
        tokens = None
        if self.method.compares_tokens:
            tokens = x + branch if scale is None else torch.addcmul(x, branch, scale)
        plan, ranks = self._plan(tokens, branch, scale)
        del tokens
        size = self.method.weights(ranks, plan, self.tokens.size)
        x, size, normed = plan.merge_add_norm(
            x, branch, size, scale, weight, bias, eps, self.method.keeps_norms
        )
        self.pass_on(x, self.method.sizes(size), plan)
        return x, normed

    def _plan(
        self, x: Tensor | None, branch: Tensor | None, scale: Tensor | None
    ) -> tuple[MergePlan, Ranks]:
        """The plan of this block, and its ranks: those of attention, which it uses up, and more.

        ``x`` (B, M, C) are the tokens, if they have been added up; see :class:`Given`.
        """
        self.check_attended()
        ranks, self.ranks = self.ranks, None
        planned, self.planned = self.planned, None
        assert ranks is not None
        if planned is not None and planned[0] is ranks:  # not so where a block has several
            return planned[1], ranks
        return self._plan_by(ranks, x, branch, scale), ranks

    def _plan_by(
        self, ranks: Ranks, x: Tensor | None, branch: Tensor | None, scale: Tensor | None
    ) -> MergePlan:
        assert self.amount is not None
        rules = self.tokens.rules
        threshold = rules.layers[self.tokens.layer].threshold
        given = Given(x, branch, scale, self.tokens.size, self.shown, threshold)
        plan = self.method.plan(ranks, self.amount, rules.num_prefix_tokens, given)
        return plan if threshold is None else _trimmed(plan)

    def check_attended(self) -> None:
        """Refuse to go on if the attention of an active block did not come here."""
        if self.attention is None or (self.reduces and self.ranks is None):
            raise RuntimeError(
                f"attention of block {self.tokens.layer} handed over no keys: expected the patched "
                "attention module, it was replaced or bypassed after patching"
            )

    def pass_on(self, x: Tensor, size: Tensor | None, plan: MergePlan | None) -> None:
        """Say that ``x`` (B, M', C) of these sizes leave the block, after ``plan`` if any."""
        before = self.tokens
        assign = None if plan is None else plan.assign
        carried, total = self.tables, before.composed
        if plan is not None:
            if carried:
                # Means over the original tokens; so weights are their numbers, not the sizes, of
                # which a method that prunes has none.
                carried = plan.merge(carried[0], carried[1] if len(carried) > 1 else None)
            if total is not None:
                total = compose(total, plan.assign)
        shape = x.shape
        self.tokens = Tokens(
            before.layer + 1,
            shape[0],
            shape[1],
            size,
            (*before.assigns, assign),
            before.reduced or plan is not None,
            before.rules,
            before.owner,
            total,
            carried,
        )


def stream_beside(q: Tensor) -> torch.cuda.Stream | None:
    """A stream for what needs queries and keys alone, to run while attention does.

    Only while a CUDA graph is captured, which then has two branches: else the host's part takes
    longer than what it saves. And only where attention leaves multiprocessors free: where it does
    not, both branches take as long as one after the other (ViT-B on an H200: 4% of the model's time
    at B = 1, nothing at B = 256). The caller waits for it right behind attention, so that neither
    stream's memory is used again while the other reads it.

    Args:
        q: (B, H, M, D) queries, of which attention gives 64 to a block.

    Returns:
        A stream that waits for the current one; None if what would run on it belongs on that one.
    """
    if not q.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    if not torch.cuda.is_current_stream_capturing():
        return None
    blocks = q.shape[0] * q.shape[1] * ((q.shape[2] + 63) // 64)
    if blocks >= torch.cuda.get_device_properties(q.device).multi_processor_count:
        return None
    beside = torch.cuda.Stream(q.device)
    beside.wait_stream(torch.cuda.current_stream(q.device))
    return beside


def _trimmed(plan: MergePlan) -> MergePlan:
    """The plan with as many rows as the fullest image, where that may be asked.

    Raises:
        RuntimeError: this is being exported, or captured as a CUDA graph.
    """
    fixed = None
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        fixed = "an exported program"
    elif plan.assign.is_cuda and torch.cuda.is_current_stream_capturing():
        fixed = "a CUDA graph"
    if fixed is not None:
        raise RuntimeError(
            f"threshold: how many tokens are left depends on the pictures, and {fixed} is of one "
            "number; expected r or keep_rate"
        )
    if torch.compiler.is_dynamo_compiling():  # by name, as fullgraph=True makes an error of it
        torch._dynamo.graph_break("threshold: how many tokens are left depends on the pictures")
    return plan.trimmed()


def attention_name(reason: str | None) -> str:
    """What computes attention, given why it is not the operator."""
    return OPERATOR if reason is None else f"{STOCK_ATTENTION} ({reason})"
