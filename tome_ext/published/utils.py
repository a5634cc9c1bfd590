"""``tome.utils``: see :mod:`tome_ext.utils`."""

from __future__ import annotations

from ..utils import benchmark, parse_r

__all__ = ["benchmark", "parse_r"]
