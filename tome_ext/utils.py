"""Timing a model, and saying what is installed."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from importlib import metadata

import torch
from torch import nn

from . import _library, ops
from ._version import __version__
from .patch.common.patched_model import find
from .schedule import parse_r

__all__ = ["benchmark", "info", "parse_r"]


def benchmark(
    model: nn.Module,
    device: torch.device | str | int = 0,
    input_size: tuple[int, ...] = (3, 224, 224),
    batch_size: int = 64,
    runs: int = 40,
    throw_out: float = 0.25,
    use_fp16: bool = False,
    verbose: bool = False,
) -> float:
    """Time forward passes of a model on random pictures.

    Args:
        model: moved to ``device``; runs in eval mode, and is put back in its mode afterwards.
        device: where to run; a number means that CUDA device.
        input_size: (channels, height, width) of one picture.
        batch_size: pictures a run.
        runs: forward passes, all told.
        throw_out: share of the runs, in [0, 1), that only warm up and are not counted.
        use_fp16: run under float16 autocast.
        verbose: show progress and print the result.

    Returns:
        Pictures per second over the runs that count.

    Raises:
        ValueError: no run is left to count, or batch_size < 1.
        RuntimeError: the device is not there.
    """
    warm_up = int(runs * throw_out)
    if not 0 <= throw_out < 1 or runs < 1:
        raise ValueError(
            f"expected runs >= 1 and throw_out in [0, 1), got runs={runs}, throw_out={throw_out}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"device: expected one of {torch.cuda.device_count()} CUDA devices, got {device}; "
            'pass device="cpu" to run on the CPU'
        )
    was_training = model.training
    model.eval().to(device)
    x = torch.rand(batch_size, *input_size, device=device)
    start = time.perf_counter()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.float16, enabled=use_fp16):
            for run in _progress(runs, verbose):
                if run == warm_up:
                    synchronize(device)
                    start = time.perf_counter()
                model(x)
            synchronize(device)
    finally:
        model.train(was_training)
    throughput = (runs - warm_up) * batch_size / (time.perf_counter() - start)
    if verbose:
        print(f"Throughput: {throughput:.2f} im/s")
    return throughput


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given; nothing to do on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _progress(runs: int, verbose: bool) -> Iterable[int]:
    if not verbose:
        return range(runs)
    from tqdm import tqdm

    progress: Iterable[int] = tqdm(range(runs), desc="Benchmarking")
    return progress


def info(model: nn.Module | None = None) -> dict[str, str]:
    """What is installed, built and in use, by name; for bug reports and ``tome-ext info``.

    Works when the compiled library is missing or broken, and then says why.

    Args:
        model: a patched model, or a wrapper of one (compiled, parallel, PEFT's), to be described
            too. "attention" says, block by block, what computes
            attention: ``tome::attention``, the model's own code (where nothing has merged), or
            ``scaled_dot_product_attention`` and in parentheses why. That is what the last forward
            did (but for one under ``torch.compile``); before the first, what its weights' device
            and dtype, its mode and its settings lead to.

    Returns:
        A dict of lines of text.

    Raises:
        ValueError: the model is not patched, or more than one inside it is.
    """
    patched = None if model is None else find(model)
    built = _library.build_info()
    devices = [f"cpu ({platform.machine()})"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            devices.append(f"cuda:{i} ({torch.cuda.get_device_name(i)}, sm_{major}{minor})")
    elif torch.accelerator.is_available():
        devices.append(str(torch.accelerator.current_accelerator()))
    cuda = _library.cuda_status()
    kernels = [x for x in ops.kernel_devices if x != "cuda" or cuda.startswith("loaded")]
    return {
        "tome_ext": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda or "none",
        "timm": _version_of("timm"),
        "transformers": _version_of("transformers"),
        "library": "loaded" if _library.load_error is None else _library.load_error,
        "cuda library": cuda,
        "built against torch": str(built.get("torch", "unknown")),
        "compiler": str(built.get("compiler", "unknown")),
        "instruction set": str(built.get("isa", "unknown")),
        "attention kernels": ", ".join(kernels) or "none",
        "threads": str(torch.get_num_threads()),
        "devices": ", ".join(devices),
        **({} if patched is None else patched._tome_report()),
    }


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
