"""What setup.py tells nvcc."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[2]
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
AMPERE = "-gencode=arch=compute_80,code=sm_80"


@pytest.fixture
def arch_flags(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    monkeypatch.setenv("TOME_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["arch_flags"]


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("9.0", [HOPPER]),
        ("9.0a", [HOPPER]),
        ("8.0;9.0", [AMPERE, HOPPER]),
        ("8.0 9.0;", [AMPERE, HOPPER]),
        ("9.0;9.0a", [HOPPER]),
        # Newer chips can translate PTX of 9.0, and not that of 9.0a.
        ("9.0+PTX", [HOPPER, "-gencode=arch=compute_90,code=compute_90"]),
        (
            "12.0+PTX",
            [
                "-gencode=arch=compute_120,code=sm_120",
                "-gencode=arch=compute_120,code=compute_120",
            ],
        ),
        ("8.0;Hopper", []),  # torch's names: left to torch
        ("", []),
    ],
)
def test_archs_as_nvcc_is_told_them(
    arch_flags: Callable[[str], list[str]], archs: str, flags: list[str]
) -> None:
    assert arch_flags(archs) == flags
