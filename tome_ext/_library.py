"""Finds and loads the compiled libraries, and explains itself when it cannot.

``_C`` holds the operator schemas and the CPU kernels, ``_C_cuda`` the CUDA kernels; the second is
loaded only under a torch that was built with CUDA. Neither is a Python module: they register
operators with torch when loaded. Importing ``tome_ext`` never fails because of them; the first
operator call does, with the reason.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ._version import __version__

__all__ = ["build_info", "cuda_status", "load_error", "require"]

FOLDER = Path(__file__).parent
BUILT_FOR = "Python >= 3.10 and torch >= 2.10"


def _load(stem: str) -> str | None:
    """Load one library; returns None on success, else what went wrong."""
    files = sorted(FOLDER.glob(f"{stem}.*so")) + sorted(FOLDER.glob(f"{stem}.*pyd"))
    if not files:
        return f"no {stem} library lies in {FOLDER}"
    try:
        torch.ops.load_library(str(files[0]))
    except (OSError, RuntimeError) as error:
        return f"{files[0].name} does not load: {error}"
    return None


load_error = _load("_C")
_cuda_error = None
if load_error is None and torch.version.cuda is not None:
    _cuda_error = _load("_C_cuda")


def build_info() -> dict[str, object]:
    """What ``_C`` was built for and runs on: version, torch, compiler, instruction set."""
    if load_error is not None:
        return {}
    info: dict[str, object] = json.loads(torch.ops.tome._build_info())
    return info


def cuda_status() -> str:
    """One line about the CUDA library: loaded, not applicable, or why not."""
    if torch.version.cuda is None:
        return "not loaded: this torch is built without CUDA"
    if load_error is not None:
        return "not loaded: the CPU library did not load"
    if _cuda_error is not None:
        return f"not loaded: {_cuda_error}"
    archs = json.loads(torch.ops.tome._cuda_build_info())["archs"]
    return f"loaded, built for {archs}"


def require() -> None:
    """Raise an error that says what is missing and what to do, if the operators are not there."""
    if load_error is None:
        return
    raise ImportError(
        f"the operators of tome_ext {__version__} are not available.\n"
        f"  expected: a compiled library for {BUILT_FOR}\n"
        f"  found:    torch {torch.__version__}, and {load_error}\n"
        "  to do:    reinstall with `pip install --force-reinstall tome_ext` (or `pip install .` "
        "in a clone); if you are in the source folder, run from another one, so that the "
        "installed package is imported"
    )
