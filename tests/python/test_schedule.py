"""Spelling out r."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tome_ext.schedule import parse_keep_rate, parse_r, parse_threshold


def test_one_number_is_for_every_layer() -> None:
    assert parse_r(4, 13) == [13, 13, 13, 13]
    assert parse_r(4, 0) == [0, 0, 0, 0]
    assert parse_r(0, 5) == []


def test_inflection() -> None:
    assert parse_r(5, (8, 0)) == [8, 8, 8, 8, 8]
    assert parse_r(5, (8, -1)) == [16, 12, 8, 4, 0]
    assert parse_r(5, (8, 1.0)) == [0, 4, 8, 12, 16]
    assert parse_r(5, (8, 0.5)) == [4, 6, 8, 10, 12]
    assert parse_r(1, (8, -1)) == [8]


def test_numbers_between_are_cut() -> None:
    # 10 to 0 in three steps of 3 1/3
    assert parse_r(4, (5, -1)) == [10, 6, 3, 0]


def test_list_is_per_layer_and_filled_with_zeros() -> None:
    assert parse_r(4, [3, 1]) == [3, 1, 0, 0]
    assert parse_r(3, (3, 2, 1)) == [3, 2, 1]
    assert parse_r(2, []) == [0, 0]


@pytest.mark.parametrize("kind", [np.int64, np.int8, np.uint16, torch.tensor])
def test_integers_and_numbers_of_any_kind(kind: Any) -> None:
    for r in (kind(8), [kind(8)] * 5, (kind(8), 0)):
        counts = parse_r(5, r)
        assert counts == [8] * 5
        assert all(type(count) is int for count in counts)
    for number in (np.float16, np.float32, np.float64):
        assert parse_r(5, (kind(8), number(-1))) == [16, 12, 8, 4, 0]
        assert parse_keep_rate(12, number(0.75)) == parse_keep_rate(12, 0.75)


@given(st.integers(1, 60), st.integers(0, 100), st.floats(-1, 1))
def test_linear_schedules_remove_about_r_per_layer(layers: int, r: int, inflection: float) -> None:
    counts = parse_r(layers, (r, inflection))
    assert len(counts) == layers
    assert all(0 <= count <= 2 * r for count in counts)
    assert r * layers - layers <= sum(counts) <= r * layers
    rising = sorted(counts, reverse=inflection < 0)
    assert counts == rising


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (-1, "expected an integer >= 0, got -1"),
        (1.5, r"got 1.5 \(float\)"),
        (True, r"got True \(bool\)"),
        (np.bool_(True), r"expected an integer >= 0, got .*True"),
        (torch.tensor(True), r"expected an integer >= 0, got tensor\(True\)"),
        (torch.tensor(1.5), r"expected an integer >= 0, got tensor\(1.5"),
        (np.float32(2), r"expected an integer >= 0, got .*2.0"),
        (np.array([4, 4, 4]), r"expected an integer >= 0, got array"),
        ("8", r"got '8' \(str\)"),
        (None, r"got None \(NoneType\)"),
        ([4, -1], r"r\[1\]: expected an integer >= 0, got -1"),
        ([4, 2.0], r"r\[1\].*got 2.0 \(float\)"),
        ((-2, 0), "got -2"),
        ((8, "falling"), r"a number as inflection, got 'falling' \(str\)"),
        ((8, True), r"got True \(bool\)"),
        ((8, 2), r"inflection in \[-1, 1\], got 2"),
        ((8, float("nan")), "got nan"),
        ([1, 1, 1, 1], "at most 3 entries, one per layer, got 4"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(r: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_r(3, r)  # type: ignore[arg-type]


# --- threshold ----------------------------------------------------------------------------------


def test_a_threshold_is_for_every_layer() -> None:
    assert parse_threshold(3, 0.9) == [0.9] * 3
    assert parse_threshold(3, np.float32(0.5)) == [0.5] * 3
    assert parse_threshold(4, [0.9, None, 1]) == [0.9, None, 1.0, None]
    assert parse_threshold(2, -5) == [-5.0, -5.0]


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (90, "threshold: expected a cosine similarity of at most 1, got 90"),
        (float("nan"), "of at most 1, got nan"),
        (-float("inf"), "of at most 1, got -inf"),
        ("0.9", r"threshold: expected a number, got '0.9' \(str\)"),
        (True, r"expected a number, got True \(bool\)"),
        ([0.9, 1.5], r"threshold\[1\]: expected a cosine similarity of at most 1, got 1.5"),
        ([0.9] * 5, "threshold: expected at most 4 entries, one per layer, got 5"),
    ],
)
def test_wrong_thresholds_are_refused(threshold: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_threshold(4, threshold)  # type: ignore[arg-type]


# --- keep_rate ----------------------------------------------------------------------------------


def test_a_rate_is_for_evits_layers() -> None:
    rates = parse_keep_rate(12, 0.7)
    assert [layer for layer, rate in enumerate(rates, 1) if rate == 0.7] == [4, 7, 10]
    assert set(rates) == {0.7, 1.0}
    assert [layer for layer, rate in enumerate(parse_keep_rate(24, 0.5), 1) if rate < 1] == [
        7,
        13,
        19,
    ]
    assert parse_keep_rate(1, 0.5) == [0.5]
    assert parse_keep_rate(0, 0.5) == []


def test_rates_in_a_list_are_per_layer_and_filled_with_one() -> None:
    assert parse_keep_rate(4, [0.9, 1]) == [0.9, 1.0, 1.0, 1.0]
    assert parse_keep_rate(2, (0.9, 0.1)) == [0.9, 0.1]


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (0, r"keep_rate: expected a share of the tokens in \(0, 1\], got 0"),
        (1.2, r"in \(0, 1\], got 1.2"),
        (float("nan"), r"in \(0, 1\], got nan"),
        ("0.7", r"keep_rate: expected a number, got '0.7' \(str\)"),
        (True, r"expected a number, got True \(bool\)"),
        ([0.5, -1.0], r"keep_rate\[1\]: expected a share"),
        ([0.5] * 5, "at most 4 entries, one per layer, got 5"),
    ],
)
def test_wrong_rates_are_refused(rate: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_keep_rate(4, rate)  # type: ignore[arg-type]
