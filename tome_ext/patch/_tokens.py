"""What is known about the tokens on their way through a model's layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..plan import MergePlan

__all__ = ["Tokens"]


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
        shape = x.shape  # asked for once: each question makes a new torch.Size
        return shape[0] == self.batch_size and shape[1] == self.num_tokens
