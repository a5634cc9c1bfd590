"""Timing contenders side by side, for ``tome-ext bench`` and for the scripts in ``bench/``."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .. import _library
from .._version import __version__
from ..utils import synchronize

__all__ = ["Contender", "describe_machine", "interleave", "ratio"]

Contender = Callable[[], object]
Times = dict[str, list[float]]


def interleave(
    contenders: dict[str, Contender],
    seconds: float,
    device: torch.device | None = None,
    warm_up: int = 3,
    fewest: int = 15,
    on_progress: Callable[[float], object] | None = None,
) -> Times:
    """Milliseconds of every run, the contenders taking turns.

    In a new order every round: who runs right after the one that leaves the caches full of other
    tensors would otherwise always be the same.

    Args:
        contenders: by name, what to time.
        seconds: how long to go on.
        device: where they run; None means the CPU. On CUDA the time is that between two events.
        warm_up: rounds that are not counted.
        fewest: rounds to make, however long they take.
        on_progress: called after every round with the share of the work that is done.

    Returns:
        By name the time of every round; entry i of each list is of the same round.
    """
    device = device or torch.device("cpu")
    clock = _clock(device)
    shuffle = random.Random(0).shuffle
    order = list(contenders.items())
    for _ in range(warm_up):
        for run in contenders.values():
            run()
    synchronize(device)
    times: Times = {name: [] for name in contenders}
    start = time.perf_counter()
    rounds, done = 0, 0.0
    while done < 1:
        shuffle(order)
        for name, run in order:
            times[name].append(clock(run))
        rounds += 1
        done = min(rounds / fewest, (time.perf_counter() - start) / max(seconds, 1e-9), 1)
        if on_progress is not None:
            on_progress(done)
    return times


def _clock(device: torch.device) -> Callable[[Contender], float]:
    """A function that says how many milliseconds a run took."""

    def by_host(run: Contender) -> float:
        start = time.perf_counter()
        run()
        synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    def by_events(run: Contender) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    return by_events if device.type == "cuda" else by_host


def ratio(times: Times, over: str, under: str) -> float:
    """The median of the ratios of two contenders, each of one round.

    What slows the machine for a while slows both, and does not count.
    """
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def cpu_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name where the system tells it, else its architecture.

    With its family and model: virtual machines call processors alike that differ twofold in speed.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    pairs = [line.partition(":") for line in reversed(lines)]  # so that the first one counts
    told = {key.strip(): value.strip() for key, _, value in pairs}
    if "model name" not in told:
        return platform.processor() or platform.machine()
    if "cpu family" not in told:
        return told["model name"]
    return f"{told['model name']} (family {told['cpu family']}, model {told['model']})"


def describe_machine(device: torch.device | None = None) -> dict[str, object]:
    """What the figures depend on besides the code."""
    gpu = device is not None and device.type == "cuda"
    return {
        "cpu": cpu_name(),
        **({"gpu": torch.cuda.get_device_name(device)} if gpu else {}),
        "threads": torch.get_num_threads(),
        "isa": _library.build_info()["isa"],
        "torch": torch.__version__,
        "tome_ext": __version__,
    }
