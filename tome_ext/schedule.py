"""How many tokens each layer removes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

__all__ = [
    "KeepRate",
    "Schedule",
    "Threshold",
    "as_integer",
    "as_real",
    "parse_keep_rate",
    "parse_r",
    "parse_threshold",
]

# What ``r`` may be: one number, (number, inflection), or a list with one number per layer.
Schedule = int | tuple[int, float] | Sequence[int]
# What ``keep_rate`` may be: one number, or a list with one number per layer.
KeepRate = float | Sequence[float]
# What ``threshold`` may be: one number, or a list with one number or None per layer.
Threshold = float | Sequence[float | None]


def parse_r(num_layers: int, r: Schedule) -> list[int]:
    """Spell out ``r`` as one number of tokens per layer (ToMe, appendix; arXiv 2210.09461).

    Args:
        num_layers: number of layers of the model.
        r: one of

            - an int: every layer removes ``r`` tokens;
            - a tuple ``(r, inflection)``: the number changes linearly from
              ``int(r * (1 - inflection))`` at the first layer to ``2 * r`` minus that at the last,
              each cut to an integer. 0 is constant, -1 falls from 2r to 0, 1 rises from 0 to 2r.
              The sum over layers stays about ``r * num_layers``;
            - a list with one int per layer; a shorter one is filled up with zeros. (A tuple of two
              ints is read as ``(r, inflection)``: give such a schedule as a list.)

            An int is of any kind that has ``__index__``, of NumPy or a tensor of one among them,
            but no bool; an inflection is any real number.

    Returns:
        ``num_layers`` ints, each >= 0.

    Raises:
        ValueError: ``r`` is negative or not an integer, the inflection is not a number in
            [-1, 1], or the list is longer than the model. The message says what came.
    """
    if isinstance(r, tuple) and len(r) == 2:
        return _linear(num_layers, _count(r[0], "r"), r[1])
    if isinstance(r, list | tuple):
        _check_length(r, num_layers, "r")
        counts = [_count(value, f"r[{layer}]") for layer, value in enumerate(r)]
        return counts + [0] * (num_layers - len(counts))
    return [_count(r, "r")] * num_layers


def parse_keep_rate(num_layers: int, keep_rate: KeepRate) -> list[float]:
    """Spell out ``keep_rate`` as one share of patch tokens per layer.

    Args:
        num_layers: number of layers of the model.
        keep_rate: one of

            - a float in (0, 1]: the share that three layers keep, those after a quarter, a half and
              three quarters of the model, which are layers 4, 7 and 10 of 12, EViT's choice (Liang
              et al., ICLR 2022; arXiv 2202.07800);
            - a list with one float in (0, 1] per layer; a shorter one is filled up with 1.

    Returns:
        ``num_layers`` floats; 1 where a layer keeps all.

    Raises:
        ValueError: a value is not a number or outside its range, or the list is longer than the
            model. The message says what came.
    """
    if isinstance(keep_rate, list | tuple):
        _check_length(keep_rate, num_layers, "keep_rate")
        rates = [_rate(value, f"keep_rate[{layer}]") for layer, value in enumerate(keep_rate)]
        return rates + [1.0] * (num_layers - len(rates))
    rate = _rate(keep_rate, "keep_rate")
    layers = {num_layers * quarters // 4 for quarters in (1, 2, 3)}
    return [rate if layer in layers else 1.0 for layer in range(num_layers)]


def parse_threshold(num_layers: int, threshold: Threshold) -> list[float | None]:
    """Spell out ``threshold`` as one similarity per layer, from which on its tokens merge.

    Args:
        num_layers: number of layers of the model.
        threshold: one of

            - a number of at most 1, which goes for every layer;
            - a list with such a number, or None, per layer; a shorter one is filled up with None.

    Returns:
        ``num_layers`` numbers; None where a layer merges nothing.

    Raises:
        ValueError: a value is not a number or outside its range, or the list is longer than the
            model. The message says what came.
    """
    if isinstance(threshold, list | tuple):
        _check_length(threshold, num_layers, "threshold")
        found = [
            None if value is None else _similarity(value, f"threshold[{layer}]")
            for layer, value in enumerate(threshold)
        ]
        return found + [None] * (num_layers - len(found))
    return [_similarity(threshold, "threshold")] * num_layers


def _check_length(values: Sequence[object], num_layers: int, name: str) -> None:
    if len(values) > num_layers:
        raise ValueError(
            f"{name}: expected at most {num_layers} entries, one per layer, got {len(values)}"
        )


def _similarity(value: object, name: str) -> float:
    similarity = as_real(value, name, "a number")
    if not -math.inf < similarity <= 1:
        raise ValueError(f"{name}: expected a cosine similarity of at most 1, got {value!r}")
    return similarity


def _rate(value: object, name: str) -> float:
    rate = as_real(value, name, "a number")
    if not 0 < rate <= 1:
        raise ValueError(f"{name}: expected a share of the tokens in (0, 1], got {value!r}")
    return rate


def _linear(num_layers: int, r: int, inflection: float) -> list[int]:
    inflection = as_real(inflection, "r", "(r, inflection) with a number as inflection")
    if not -1 <= inflection <= 1:
        raise ValueError(f"r: expected an inflection in [-1, 1], got {inflection!r}")
    first = int(r * (1 - inflection))
    last = 2 * r - first
    if num_layers == 1:
        return [r]
    step = (last - first) / max(num_layers - 1, 1)
    return [int(first + step * layer) for layer in range(num_layers)]


def as_real(value: Any, name: str, expected: str) -> float:
    """A real number of any kind, but no bool, as Python's.

    Raises:
        ValueError: it is none.
    """
    # NumPy's floats are real numbers too, and not all are floats.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")
    return float(value)


def as_integer(value: Any, name: str, expected: str = "an integer") -> int:
    """An integer of any kind, of NumPy or a tensor of one among them, as Python's.

    Raises:
        ValueError: it is none, or a bool.
    """
    if type(value) is int:
        return value
    dtype = str(getattr(value, "dtype", None))
    # Bools of older versions of NumPy and torch count as integers otherwise.
    if not isinstance(value, bool) and dtype not in ("bool", "torch.bool"):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise ValueError(f"{name}: expected {expected}, got {value!r} ({type(value).__name__})")


def _count(value: object, name: str) -> int:
    count = as_integer(value, name, "an integer >= 0")
    if count < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {count}")
    return count
