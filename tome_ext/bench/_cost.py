"""What a forward pass costs besides time: operations and memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops", "extra_memory", "live_bytes"]


def count_flops(run: Callable[[], object]) -> int:
    """Floating point operations of matrix products, convolutions and attention in a run.

    As ``torch.utils.flop_counter`` counts them, with the formulas of :mod:`tome_ext._flops`.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def extra_memory(run: Callable[[], object], device: torch.device, compiled: bool) -> int | None:
    """The most bytes that a run takes at once, beyond what was there before it.

    That is weights and input before, activations and output beyond. On CUDA it is what torch's
    allocator has given out. Elsewhere it is the tensors that live between operators, so that the
    scratch memory of a kernel does not count; of compiled code, whose tensors are nobody's to see,
    that can't be told: None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    return None if compiled else live_bytes(run)


def live_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors, made during a run, that live at once between its operators."""
    tracker = _LiveBytes()
    with tracker:
        run()
    return tracker.peak


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator makes until it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        # By address. Storages that were there before are held, so that none can take their place.
        self.before: dict[int, torch.UntypedStorage] = {}
        self.made: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # the operators that this one is made of, as FlopCounterMode does
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self.made:
                self.before[storage._cdata] = storage
        out = func(*args, **kwargs)
        for storage in _storages(out):
            address = storage._cdata
            if address not in self.before and address not in self.made:
                self.made[address] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._forget, address)
        self.peak = max(self.peak, self.live)
        return out

    def _forget(self, address: int) -> None:
        self.live -= self.made.pop(address)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor))
