"""What every patched model has, whatever library it comes from."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..schedule import KeepRate, Method, Schedule
from ._engine import AttentionKind, Engine
from ._swap import Swapped, is_outermost, restore
from ._tokens import Tokens

__all__ = ["PatchedModel", "remove"]


class PatchedModel(Swapped):
    """Mixin of a patched model: its settings, what the last forward did, and its removal."""

    _tome: Engine

    @property
    def r(self) -> Schedule:
        """Tokens to remove per layer: an int, ``(r, inflection)`` or a list.

        Setting it takes effect with the next forward; see :func:`tome_ext.schedule.parse_r`.
        """
        return self._tome.r

    @r.setter
    def r(self, r: Schedule) -> None:
        self._tome.r = r

    @property
    def keep_rate(self) -> KeepRate | None:
        """Share of patch tokens that layers keep, a float or a list; None if ``r`` counts them.

        Setting it takes effect with the next forward and puts ``r`` aside, as setting ``r`` does
        with it; see :func:`tome_ext.schedule.parse_keep_rate`.
        """
        return self._tome.keep_rate

    @keep_rate.setter
    def keep_rate(self, keep_rate: KeepRate | None) -> None:
        self._tome.keep_rate = keep_rate

    @property
    def method(self) -> Method:
        """How tokens are reduced: "tome", "evit" or "topk"; patch again to change it."""
        return self._tome.settings.method

    @property
    def tome(self) -> Tokens | None:
        """The tokens that the last forward of this thread ended with; None before the first.

        ``model.tome.size`` are their sizes, and ``model.tome.plan.unmerge(features)`` spreads
        features (B, M, C) over the original tokens (B, N, C). Both are None if nothing merged; the
        sizes are None for the methods that prune, too.
        """
        return self._tome.current

    def _tome_attention(self, layer: int) -> AttentionKind:
        """What the host knows about a layer's attention before it runs."""
        raise NotImplementedError

    def _tome_report(self) -> dict[str, str]:
        """The model's lines of :func:`tome_ext.info`."""
        engine = self._tome
        spans: list[tuple[int, int, str]] = []
        for layer in range(engine.num_layers):
            what = engine.attention_of(layer, self._tome_attention(layer))
            first = spans.pop()[0] if spans and spans[-1][2] == what else layer
            spans.append((first, layer, what))
        rate = engine.keep_rate
        amount = {"r": str(engine.r)} if rate is None else {"keep rate": str(rate)}
        return {
            "model": f"{self._tome_base.__name__}, {engine.num_layers} blocks",
            "method": engine.settings.method,
            **amount,
            "proportional attention": "on" if engine.proportional else "off",
            "attention": "; ".join(
                f"{_blocks(first, last)}: {what}" for first, last, what in spans
            ),
        }

    @property
    def _tome_info(self) -> dict[str, Any]:
        return self._tome.info()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        # Nothing to do if the body has removed the patch itself.
        if isinstance(self, nn.Module) and isinstance(self, PatchedModel):
            remove(self)


def _blocks(first: int, last: int) -> str:
    return f"block {first}" if first == last else f"blocks {first}-{last}"


def remove(model: nn.Module) -> None:
    """Take a patch off a model: its modules are exactly what they were before.

    Args:
        model: a model that a function of :mod:`tome_ext.patch` has patched.

    Raises:
        ValueError: the model is not patched.
        RuntimeError: the ``forward`` of a module was replaced after patching, so that the module
            would go on calling the patched one; or its class was, as ``fully_shard`` does. Nothing
            is changed.
    """
    if not isinstance(model, PatchedModel):
        raise ValueError(f"model: expected a patched model, got {type(model).__name__}")
    assert isinstance(model, nn.Module)
    swapped = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Swapped)
    ]
    for name, module in swapped:
        if "forward" in vars(module):
            raise RuntimeError(
                f"{name or 'the model'} ({type(module).__name__}): its forward was replaced after "
                "patching; take that replacement off first"
            )
        if not is_outermost(module):
            raise RuntimeError(
                f"{name or 'the model'}: its class was changed after patching: expected "
                f"ToMe{module._tome_base.__name__}, got {type(module).__name__}; a sharded model "
                "keeps its patch, set r = 0 to switch merging off"
            )
    for _, module in swapped:
        restore(module)
