"""Importing the scripts of bench/, which is no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

__all__ = ["BENCH", "load"]

BENCH = Path(__file__).parents[2] / "bench"


def load(name: str) -> ModuleType:
    """The script bench/NAME.py, with those that it imports."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as change:
        change.syspath_prepend(str(BENCH))
        change.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
    return module
