"""The tolerance rule itself: it must fail when it should."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_error_within


def test_twice_the_stock_error_passes_and_more_fails():
    exact = torch.tensor([1.0, 100.0], dtype=torch.float64)
    stock = (exact + 0.1).float()
    assert_error_within((exact - 0.19).float(), stock, exact)
    with pytest.raises(AssertionError, match=r"error 0\.3"):
        assert_error_within((exact + 0.3).float(), stock, exact)


def test_one_rounding_is_allowed_where_stock_is_exact():
    exact = torch.tensor([1.0], dtype=torch.float64)
    assert_error_within(torch.tensor([1 + 2**-8]).bfloat16(), exact.bfloat16(), exact)
    with pytest.raises(AssertionError):
        assert_error_within(torch.tensor([1 + 2**-6]).bfloat16(), exact.bfloat16(), exact)


def test_other_dtype_or_shape_fails():
    exact = torch.ones(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="against stock in"):
        assert_error_within(torch.ones(2), torch.ones(2).half(), exact)
    with pytest.raises(AssertionError, match="expected"):
        assert_error_within(torch.ones(3), torch.ones(3), exact)
