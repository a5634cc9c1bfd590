"""What a user sets, and what each layer does by it: frozen, so that a forward keeps to one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..._checks import INT32_MAX
from ...schedule import KeepRate, Schedule, parse_keep_rate, parse_r
from .methods import Method, ToMe
from .refusals import check_bool

__all__ = ["LayerRule", "Rules", "Settings", "make_rules"]


@dataclass(frozen=True)
class Settings:
    """The arguments of a patch, which explains them; ``r`` or ``keep_rate`` as they were given.

    Attributes:
        for_tokens: how many tokens ``r`` was found for, if it was; see :class:`tome_ext.Setting`.

    Raises:
        ValueError: one that says yes or no is something else.
    """

    method: Method = field(default_factory=ToMe)
    r: Schedule = 0
    keep_rate: KeepRate | None = None
    trace_source: bool = False
    restore_tokens: bool = False
    inference: bool = False
    for_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("trace_source", "restore_tokens", "inference"):
            check_bool(getattr(self, name), name)


class LayerRule(NamedTuple):
    """What one layer does: remove ``r`` tokens, or keep a share of its patch tokens.

    Attributes:
        reduces: whether it reduces tokens, if it has enough of them.
        r: tokens to remove, if ``rate`` is None.
        rate: share of patch tokens to keep.
    """

    reduces: bool
    r: int
    rate: float | None


class Rules(NamedTuple):
    """The settings, spelled out per layer.

    Attributes:
        settings: what they were made from.
        method: how layers reduce tokens.
        num_prefix_tokens: leading tokens that never merge.
        layers: one rule for each layer.
        first_layer: the first that reduces tokens; the number of layers if none does.
        idle: whether none does. No property: torch.compile of torch 2.10 does not see through one.
    """

    settings: Settings
    method: Method
    num_prefix_tokens: int
    layers: tuple[LayerRule, ...]
    first_layer: int
    idle: bool

    def truncated(self, num_layers: int) -> Rules:
        """For a model that dropped its last layers: those that stay keep their numbers."""
        layers = self.layers[:num_layers]
        by_rate = self.settings.keep_rate is not None
        settings = replace(
            self.settings,
            r=0 if by_rate else [rule.r for rule in layers],
            keep_rate=[rule.rate or 1.0 for rule in layers] if by_rate else None,
        )
        return _rules(settings, self.num_prefix_tokens, layers)


def make_rules(settings: Settings, num_layers: int, num_prefix_tokens: int) -> Rules:
    """Spell out settings.

    Raises:
        ValueError: one is wrong, or both ``r`` and ``keep_rate`` are given.
    """
    schedule = parse_r(num_layers, settings.r)
    if settings.keep_rate is None:
        # More tokens than there can be are as many as an operator takes, which cuts them.
        layers = tuple(LayerRule(r > 0, min(r, INT32_MAX), None) for r in schedule)
    else:
        if any(schedule):
            raise ValueError(
                f"expected r or keep_rate, got r={settings.r!r}, keep_rate={settings.keep_rate!r}"
            )
        rates = parse_keep_rate(num_layers, settings.keep_rate)
        settings.method.check_rates(rates)
        layers = tuple(LayerRule(rate < 1, 0, rate) for rate in rates)
    # Lists are the caller's, who may change them.
    own = replace(
        settings,
        r=list(settings.r) if isinstance(settings.r, list) else settings.r,
        keep_rate=list(settings.keep_rate)
        if isinstance(settings.keep_rate, list)
        else settings.keep_rate,
    )
    return _rules(own, num_prefix_tokens, layers)


def _rules(settings: Settings, num_prefix_tokens: int, layers: tuple[LayerRule, ...]) -> Rules:
    reducing = (layer for layer, rule in enumerate(layers) if rule.reduces)
    first = next(reducing, len(layers))
    idle = first == len(layers)
    return Rules(settings, settings.method, num_prefix_tokens, layers, first, idle)
