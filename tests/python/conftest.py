"""What every Python test relies on: an installed package with its library, seeds, and GPU rules."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch

import tome_ext
from tome_ext import _library

collect_ignore = [] if sys.platform == "linux" else ["test_stopped.py"]
if find_spec("openvino") is None:
    collect_ignore.append("test_run_openvino.py")

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_sessionstart() -> None:
    """The tests are of the installed package; a source folder without a library is none."""
    if _library.load_error is None:
        return
    raise pytest.UsageError(
        f"the tests need tome_ext with its compiled library, and the one imported, from "
        f"{_library.FOLDER}, has none: {_library.load_error}\n"
        "Install it with `pip install '.[test]'` and run `pytest` (not `python -m pytest`, which "
        "imports from the folder it runs in)."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked with what is not here, unless TOME_REQUIRE_<MARK>=1."""
    marks = {
        "cuda": missing_for_cuda,
        "openvino": missing_for_openvino,
        "compiler": missing_for_compiler,
    }
    for mark, missing_for in marks.items():
        missing = missing_for()
        if missing is None:
            continue
        if os.environ.get(f"TOME_REQUIRE_{mark.upper()}") == "1":
            raise pytest.UsageError(f"TOME_REQUIRE_{mark.upper()}=1, but {missing}")
        needed = [item for item in items if item.get_closest_marker(mark)]
        if needed:
            items[:] = [item for item in items if item not in needed]
            config.hook.pytest_deselected(items=needed)


def missing_for_cuda() -> str | None:
    """Why tests on a GPU cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    status = _library.cuda_status()
    return None if status.startswith("loaded") else f"the CUDA library is {status}"


def missing_for_openvino() -> str | None:
    """Why tests with OpenVINO cannot run here; None if they can."""
    if find_spec("openvino") is None:
        return "openvino is not installed"
    try:
        tome_ext.onnx.library("openvino")
    except RuntimeError as error:
        return str(error)
    return None


def missing_for_compiler() -> str | None:
    """Why tests that compile C++ cannot run here; None if they can."""
    wanted = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    return None if any(map(shutil.which, wanted)) else f"PATH has none of {', '.join(wanted)}"


def pytest_report_header() -> list[str]:
    """Which package and library are tested, and which files are of what is not installed."""
    tested = (
        f"tome_ext {tome_ext.__version__} from {_library.FOLDER}: "
        f"{_library.build_info()}, CUDA {_library.cuda_status()}"
    )
    return [tested, *(f"left out: {name}" for name in collect_ignore)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a process of its own, in a folder of its own.

    ``python -c`` imports from the folder it runs in, and a source folder has no library.
    """

    def run(code: str, *argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            **options,
        )

    return run


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without network or downloaded weights."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nonexistent")
