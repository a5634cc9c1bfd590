"""How the CPU benchmarks time contenders side by side, and what they write beside the figures."""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import tome_ext

Contender = Callable[[], object]


def interleave(contenders: dict[str, Contender], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every run, the contenders taking turns.

    In a new order every round: who runs right after the one that leaves the caches full of other
    tensors would otherwise always be the same.
    """
    shuffle = random.Random(0).shuffle
    order = list(contenders.items())
    for _ in range(3):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times[next(iter(times))]) < 15:
        shuffle(order)
        for name, run in order:
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine() -> dict[str, object]:
    """What the figures depend on besides the code."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": tome_ext._library.build_info()["isa"],
        "torch": torch.__version__,
        "tome_ext": tome_ext.__version__,
    }


def write_json(path: Path, machine: dict[str, object], rows: list[dict[str, object]]) -> None:
    """The form that tables.py reads."""
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
