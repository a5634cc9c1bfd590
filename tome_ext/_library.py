"""Finds and loads the compiled libraries, and explains itself when it cannot.

``_C`` holds the operator schemas and the CPU kernels, ``_C_cuda`` the CUDA kernels; the second is
loaded only under a torch that was built with CUDA. Neither is a Python module: they register
operators with torch when loaded. Importing ``tome_ext`` never fails because of them; the first
operator call does, with the reason.

Whether a GPU can run the CUDA kernels is asked when an operator first meets a tensor there, not on
import, which must not start CUDA. Each GPU that cannot runs plain PyTorch operators, after a
warning that says why and what to do.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch

from ._version import __version__

__all__ = [
    "build_info",
    "cuda_loaded",
    "cuda_status",
    "explain_obstacle",
    "gpu_obstacle",
    "load_error",
    "missing",
    "require",
    "tell_of_plain",
]

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
# Whether the CUDA kernels are registered.
cuda_loaded = load_error is None and torch.version.cuda is not None and _cuda_error is None
# What ``_cuda_obstacle`` of csrc/torch/cuda says where plain operators are asked for.
SWITCHED_OFF = "TOME_CUDA_KERNELS=0"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # as isa.h has them
switched_off = os.environ.get("TOME_CUDA_KERNELS") == "0"
_told: set[object] = set()


def _check_isa(asked: str | None) -> None:
    """Refuse a TOME_ISA that names nothing, and warn of one that this machine lacks.

    Raises:
        ValueError: there is no instruction set of that name.
    """
    if asked is None or load_error is not None:
        return
    if asked not in INSTRUCTION_SETS:
        raise ValueError(f"TOME_ISA: expected one of {', '.join(INSTRUCTION_SETS)}, got {asked!r}")
    used = build_info()["isa"]
    if used != asked:
        warnings.warn(
            f"TOME_ISA={asked}: this machine lacks it, and {used} is used",
            RuntimeWarning,
            stacklevel=2,
        )


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
    if switched_off:
        return f"not used: {SWITCHED_OFF} is set"
    status = f"loaded, built for {_cuda_build_info()['archs']}"
    obstacles = {i: gpu_obstacle(i) for i in _gpus_of_a_kind()}
    found = {i: why for i, why in obstacles.items() if why is not None}
    if found and len(found) == len(obstacles):
        return f"not used: {next(iter(found.values()))}"
    return "; ".join([status, *(f"not used on cuda:{i}: {why}" for i, why in found.items())])


def _cuda_build_info() -> dict[str, str]:
    info: dict[str, str] = json.loads(torch.ops.tome._cuda_build_info())
    return info


def _gpus_of_a_kind() -> list[int]:
    """The first visible GPU of each compute capability: a question starts CUDA where it asks."""
    if not torch.cuda.is_available():
        return []
    first: dict[tuple[int, int], int] = {}
    for i in range(torch.cuda.device_count()):
        first.setdefault(torch.cuda.get_device_capability(i), i)
    return list(first.values())


def explain_obstacle(
    obstacle: str, built: dict[str, str], capability: tuple[int, int], torch_cuda: str
) -> str | None:
    """What keeps a GPU from running the kernels, and what to do, in words; None if nothing does.

    Args:
        obstacle: the name of a CUDA error, ``TOME_CUDA_KERNELS=0``, or "" for nothing.
        built: with which CUDA and for which archs the library is built.
        capability: of the GPU.
        torch_cuda: the CUDA version of torch.
    """
    if not obstacle:
        return None
    if obstacle == SWITCHED_OFF:
        return f"{SWITCHED_OFF} is set"
    arch = "{}.{}".format(*capability)
    rebuild = f"build tome_ext with TOME_CUDA=1 TORCH_CUDA_ARCH_LIST={arch}"
    if obstacle == "cudaErrorInsufficientDriver":
        return (
            f"its CUDA kernels are built with CUDA {built['cuda']}, for which the driver is too "
            f"old (torch has {torch_cuda}); update the driver, or build tome_ext with "
            f"TOME_CUDA=1 and a toolkit of CUDA {torch_cuda.split('.')[0]}"
        )
    if obstacle in ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"):
        return f"its CUDA kernels are built for {built['archs']}, not for {arch}; {rebuild}"
    return (
        f"the driver cannot translate its CUDA kernels, built for {built['archs']}, to {arch} "
        f"({obstacle}); update the driver, or {rebuild}"
    )


def gpu_obstacle(index: int) -> str | None:
    """Why this GPU runs plain PyTorch operators, and what to do, in words; None if it does not."""
    capability = torch.cuda.get_device_capability(index)
    if not cuda_loaded:
        arch = "{}.{}".format(*capability)
        return (
            f"its CUDA kernels are {cuda_status()}; build tome_ext with TOME_CUDA=1 "
            f"TORCH_CUDA_ARCH_LIST={arch}"
        )
    obstacle = torch.ops.tome._cuda_obstacle(index)
    return explain_obstacle(obstacle, _cuda_build_info(), capability, str(torch.version.cuda))


def tell_of_plain(device: torch.device) -> bool:
    """Warn, once for each reason, that a GPU runs plain PyTorch operators.

    Not where that was asked for, nor under a torch for which there are no CUDA kernels to build.

    Returns:
        Whether the device is new here.
    """
    if device in _told:
        return False
    _told.add(device)
    if torch.version.cuda is None or switched_off:
        return True
    why = gpu_obstacle(device.index)
    if why is not None and why not in _told:
        _told.add(why)
        warnings.warn(
            f"tome_ext runs plain PyTorch operators, which are slow, on {device} "
            f"({torch.cuda.get_device_name(device)}): {why}",
            RuntimeWarning,
            stacklevel=2,
        )
    return True


def require() -> None:
    """Raise :func:`missing` unless the operators are there."""
    if load_error is not None:
        raise missing()


def missing() -> ImportError:
    """An error that says what is missing and what to do; only if the operators are not there."""
    return ImportError(
        f"the operators of tome_ext {__version__} are not available.\n"
        f"  expected: a compiled library for {BUILT_FOR}\n"
        f"  found:    torch {torch.__version__}, and {load_error}\n"
        "  to do:    if you are in the source folder, run from another one, so that the installed "
        "package is imported; else install it again, with `pip install --force-reinstall "
        "--no-deps .` in a clone, or a wheel that was built for this machine"
    )


_check_isa(os.environ.get("TOME_ISA"))
