"""What a user sets, and what each layer does by it: frozen, so that a forward keeps to one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..._checks import INT32_MAX
from ...schedule import (
    KeepRate,
    Schedule,
    Threshold,
    parse_keep_rate,
    parse_r,
    parse_threshold,
)
from .methods import Method, ToMe
from .refusals import check_bool

__all__ = ["LayerRule", "Rules", "Settings", "make_rules"]


@dataclass(frozen=True)
class Settings:
    """The arguments of a patch, which explains them; the amounts as they were given.

    Attributes:
        for_tokens: how many tokens ``r`` was found for, if it was; see :class:`tome_ext.Setting`.

    Raises:
        ValueError: one that says yes or no is something else.
    """

    method: Method = field(default_factory=ToMe)
    r: Schedule = 0
    keep_rate: KeepRate | None = None
    threshold: Threshold | None = None
    trace_source: bool = False
    restore_tokens: bool = False
    inference: bool = False
    for_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("trace_source", "restore_tokens", "inference"):
            check_bool(getattr(self, name), name)


class LayerRule(NamedTuple):
    """What one layer does: remove ``r`` tokens, keep a share of them, or merge similar ones.

    Attributes:
        reduces: whether it reduces tokens, if it has enough of them.
        r: tokens to remove, if the others are None.
        rate: share of patch tokens to keep.
        threshold: similarity from which on tokens merge.
    """

    reduces: bool
    r: int
    rate: float | None = None
    threshold: float | None = None


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
        settings = self.settings
        if settings.keep_rate is not None:
            settings = replace(settings, keep_rate=[rule.rate or 1.0 for rule in layers])
        elif settings.threshold is not None:
            settings = replace(settings, threshold=[rule.threshold for rule in layers])
        else:
            settings = replace(settings, r=[rule.r for rule in layers])
        return _rules(settings, self.num_prefix_tokens, layers)


def make_rules(settings: Settings, num_layers: int, num_prefix_tokens: int) -> Rules:
    """Spell out settings.

    Raises:
        ValueError: one is wrong, or more than one of ``r``, ``keep_rate`` and ``threshold`` is
            given.
    """
    schedule = parse_r(num_layers, settings.r)
    amounts = {
        "r": settings.r if any(schedule) else None,
        "keep_rate": settings.keep_rate,
        "threshold": settings.threshold,
    }
    given = [f"{name}={value!r}" for name, value in amounts.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"expected one of r, keep_rate and threshold, got {', '.join(given)}")
    if settings.keep_rate is not None:
        rates = parse_keep_rate(num_layers, settings.keep_rate)
        settings.method.check_rates(rates)
        layers = tuple(LayerRule(rate < 1, 0, rate) for rate in rates)
    elif settings.threshold is not None:
        settings.method.check_threshold()
        thresholds = parse_threshold(num_layers, settings.threshold)
        layers = tuple(LayerRule(least is not None, 0, None, least) for least in thresholds)
    else:
        # More tokens than there can be are as many as an operator takes, which cuts them.
        layers = tuple(LayerRule(r > 0, min(r, INT32_MAX)) for r in schedule)
    # Lists are the caller's, who may change them.
    lists: dict[str, Any] = {
        name: list(value) for name, value in vars(settings).items() if isinstance(value, list)
    }
    own = replace(settings, **lists)
    return _rules(own, num_prefix_tokens, layers)


def _rules(settings: Settings, num_prefix_tokens: int, layers: tuple[LayerRule, ...]) -> Rules:
    reducing = (layer for layer, rule in enumerate(layers) if rule.reduces)
    first = next(reducing, len(layers))
    idle = first == len(layers)
    return Rules(settings, settings.method, num_prefix_tokens, layers, first, idle)
