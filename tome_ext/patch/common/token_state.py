"""What is known about the tokens on their way through a model's layers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..._torch import record_on_storage, recorded_on_storage
from ...ops import describe
from ...plan import MergePlan, compose
from .rules import Rules

__all__ = ["Tokens", "recorded", "taken_layers"]

RECORD = "_tome"  # attribute of a storage: the Tokens that it holds


class Tokens(NamedTuple):
    """What is known about the tokens before a layer. Immutable; holds no activations.

    Attributes:
        layer: the layer these tokens go into next.
        batch_size: B, how many images.
        num_tokens: M, how many tokens there are now.
        size: (B, M) float32, how many original tokens each stands for; None if all count as one:
            nothing was merged, or the method prunes.
        assigns: per layer passed, its (B, N) int32 assignment, or None if it reduced nothing.
        reduced: whether any layer reduced the tokens.
        rules: what every layer of this forward does.
        owner: the patched model's trail; compared, never read.
        composed: (B, N) int32, from the original tokens to these, once a mask or table has asked
            for it; then it is carried along.
        tables: the table that travels with the tokens, (B, M, D), if there is one; and once they
            have merged, of how many original tokens each is the mean, (B, M) float32.
        after: what these are after a layer that leaves them as they are, where that is known.
    """

    layer: int
    batch_size: int
    num_tokens: int
    size: Tensor | None
    assigns: tuple[Tensor | None, ...]
    reduced: bool
    rules: Rules
    owner: object
    composed: Tensor | None = None
    tables: tuple[Tensor, ...] = ()
    after: Tokens | None = None

    def __repr__(self) -> str:
        return (
            f"Tokens(layer={self.layer}, batch_size={self.batch_size}, "
            f"num_tokens={self.num_tokens}, size={'None' if self.size is None else '(B, M)'})"
        )

    @property
    def plan(self) -> MergePlan | None:
        """The plan from the original tokens to these; None if nothing was reduced."""
        return self.plan_after(self.layer)

    def plan_after(self, num_layers: int) -> MergePlan | None:
        """The plan from the original tokens to those after the first ``num_layers`` layers."""
        total = self.composed if num_layers == self.layer else None
        total = composed(self.assigns[:num_layers]) if total is None else total
        if total is None:
            return None
        later = [assign.shape[1] for assign in self.assigns[num_layers:] if assign is not None]
        return MergePlan.from_assign(total, later[0] if later else self.num_tokens)

    def unmerge(self, x: Tensor, num_layers: int | None = None) -> Tensor:
        """Spread features over the original tokens.

        Args:
            x: (B, M, C), of the tokens after the first ``num_layers`` layers, such as an entry of
                ``hidden_states``.
            num_layers: None means all layers passed.

        Returns:
            (B, N, C); merged tokens share their value, dropped ones are 0.

        Raises:
            ValueError: x does not have as many tokens as there were.
        """
        plan = self.plan_after(self.layer if num_layers is None else num_layers)
        if plan is None:
            return x
        if x.shape[1] != plan.num_output_tokens:
            raise ValueError(
                f"x: expected {plan.num_output_tokens} tokens, those after "
                f"{self.layer if num_layers is None else num_layers} layers, got {describe(x)}"
            )
        return plan.unmerge(x)

    def attach(self, x: Tensor) -> Tensor:
        """Say that ``x`` (B, M, C) are these tokens, where the patch cannot know.

        A head that averages over tokens looks for their sizes on the tensor that the tower
        returned. One made from it (a clone, a cast, an output of a compiled function) has none:
        ``model.forward_head(model.tome.attach(features))``.

        Returns:
            ``x`` itself.

        Raises:
            ValueError: batch or number of tokens are others.
        """
        if not self.fit(x):
            raise ValueError(
                f"x: expected ({self.batch_size}, {self.num_tokens}, C), got {describe(x)}"
            )
        record_on_storage(x, RECORD, self)
        return x

    def fit(self, x: Tensor) -> bool:
        """Whether ``x`` (B, M, C) can be these tokens."""
        shape = x.shape  # asked for once: each question makes a new torch.Size
        return shape[0] == self.batch_size and shape[1] == self.num_tokens


def composed(assigns: tuple[Tensor | None, ...]) -> Tensor | None:
    """One assignment (B, N) out of those of several layers; None if no layer reduced anything."""
    total: Tensor | None = None
    for assign in assigns:
        if assign is not None:
            total = assign if total is None else compose(total, assign)
    return total


def recorded(x: Tensor) -> Tokens | None:
    """What was recorded on the storage of ``x``, if anything."""
    tokens: Tokens | None = recorded_on_storage(x, RECORD)
    return tokens


def taken_layers(num_layers: int, indices: int | list[int] | None) -> list[int]:
    """The layers whose tokens a forward_intermediates takes, in the order it returns them."""
    if indices is None:
        return list(range(num_layers))
    if isinstance(indices, int):
        return list(range(num_layers - indices, num_layers))
    return sorted({index % num_layers for index in indices})
