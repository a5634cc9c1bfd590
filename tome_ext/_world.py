"""The processes of ``torchrun`` that share a command's work."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ._command import CommandError

__all__ = ["World"]

T = TypeVar("T")

# A process may finish long before the slowest one; torchrun sees those that die.
LONGEST_WAIT = timedelta(days=1)


def _part() -> None:
    """Part with the other processes after an error, which has been told by now.

    Threads of gloo that free a tensor while Python ends abort the process (PyTorch's issue 190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class World:
    """The processes that share the work, and which of them this one is."""

    rank: int
    local_rank: int
    size: int

    @classmethod
    @contextmanager
    def join(cls) -> Iterator[World]:
        """Meet the other processes, if ``torchrun`` has started any; part with them at the end."""
        if "WORLD_SIZE" not in os.environ:
            yield cls(0, 0, 1)
            return
        # Messages go by gloo, counts by the library of their device.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
        # NCCL is not waited for: what it waits for may be gone.
        if backend == "gloo":
            atexit.register(_part)
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        yield cls(dist.get_rank(), local_rank, dist.get_world_size())
        # Not after an error: that would let the others go, and torchrun end this process, before
        # the error is told.
        dist.destroy_process_group()

    @property
    def hides_progress(self) -> bool | None:
        """Tqdm's ``disable``: bars are the first process's; None shows none in a pipe."""
        return None if self.rank == 0 else True

    @property
    def cores(self) -> int:
        """How many of this machine's cores each process may have, at least one."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.size > 1 else 1
        try:
            usable = len(os.sched_getaffinity(0))
        except AttributeError:  # not Linux
            usable = os.cpu_count() or 1
        return max(1, usable // here)

    def device_name(self, name: str) -> str:
        """The device of this process, where ``name`` was asked for."""
        if self.size == 1 or name == "cpu":
            return name
        if ":" in name:
            raise CommandError(
                f"expected a device without a number for {self.size} processes, got {name!r}"
            )
        return f"{name}:{self.local_rank}"

    def agree(self, prepare: Callable[[], T], digest: Callable[[T], str]) -> T:
        """Run ``prepare`` in every process; if it fails in one, all stop and that one says why.

        They stop, too, where the digests of what they have prepared differ.

        Raises:
            CommandError: in the process that says why.
            SystemExit: in the others.
        """
        problem: str | None = None
        mine = ""
        try:
            prepared = prepare()
            mine = digest(prepared)
        except CommandError as error:
            problem = str(error)
        found: list[tuple[str | None, str]] = [(problem, mine)] * self.size
        if self.size > 1:
            dist.all_gather_object(found, (problem, mine))
        speaker = next((rank for rank, (said, _) in enumerate(found) if said is not None), None)
        if speaker is None and len({other for _, other in found}) > 1:
            speaker = 0
            problem = "the processes see different pictures; expected the same folder in all"
        if speaker is None:
            return prepared
        if speaker == self.rank:
            raise CommandError(problem)
        with suppress(RuntimeError):
            dist.all_reduce(torch.zeros(1))  # which fails when the speaker has told it and is gone
        raise SystemExit(2)

    def reduce(self, counts: Tensor, seconds: Tensor, device: torch.device) -> None:
        """Over all processes, in place: the sum of the counts, the longest of the times."""
        if self.size == 1:
            return
        for values, how in ((counts, dist.ReduceOp.SUM), (seconds, dist.ReduceOp.MAX)):
            there = values.to(device if device.type == "cuda" else "cpu")
            try:
                dist.all_reduce(there, how)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise CommandError(f"another process is gone before the end: {reason}") from None
            values.copy_(there)

    def gather(self, value: T) -> list[T]:
        """What every process has, in all of them, by rank."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process, in all; if it fails, all stop.

        Raises:
            CommandError: in the first process.
            SystemExit: in the others.
        """
        made = self.agree(lambda: make() if self.rank == 0 else None, lambda _: "")
        first = self.gather(made)[0]
        assert first is not None  # of the first process
        return first
