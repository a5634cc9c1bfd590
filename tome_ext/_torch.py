"""The private names of torch that this package uses, behind one door.

Each has a public stand-in for the day it is gone, which is slower or knows less; its docstring says
what is lost.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import module as _module

__all__ = [
    "any_autocast",
    "below_autograd",
    "hooks_on_all_modules",
    "in_backward",
    "in_transform",
    "record_on_storage",
    "recorded_on_storage",
    "version_of",
    "without_autocast",
]

_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)
_functorch_level = getattr(
    getattr(torch._C, "_functorch", None), "maybe_current_level", lambda: None
)

# What is asked in every block is torch's function itself: a wrapper of it would take longer.

# Whether autocast may be on for some device; a tenth of the time of asking for one. Without torch's
# name for it: always, and the device has to be asked.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
# A context, for no_grad, in which operators skip the autograd layer. That layer is written in
# Python for operators outside torch, and takes 5 to 10 us a call: lost without torch's name.
below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", nullcontext
)
# Whether hooks are registered that run for every module. Without torch's name for it: always, so
# that no module call is left out.
hooks_on_all_modules: Callable[[], bool] = getattr(_module, "_has_any_global_hook", lambda: True)


def in_backward() -> bool:
    """Whether this thread runs a backward pass, whose forwards are recomputations.

    Without torch's name for it: never, so that a checkpoint's recomputation may merge by settings
    made after its forward, and leaves its tokens as ``model.tome``.
    """
    return _graph_task() != -1


def in_transform() -> bool:
    """Whether derivatives are asked for in a way that operators outside torch cannot follow.

    Without torch's names for it: never, so that they raise torch's own error.
    """
    level = getattr(forward_ad, "_current_level", -1)
    return level >= 0 or _functorch_level() is not None


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context in which no operator is cast; where torch's name is gone, on one device only."""
    if hasattr(torch._C, "_DisableAutocast"):
        return torch._C._DisableAutocast()
    return torch.autocast(device_type, enabled=False)


def version_of(x: Tensor) -> int | None:
    """How often x was changed in place; None where torch does not count, as in inference_mode."""
    return None if x.is_inference() else getattr(x, "_version", None)


def record_on_storage(x: Tensor, name: str, value: object) -> bool:
    """Hang a value on the storage of ``x``, which views and detached tensors share.

    Returns whether it could be: tensors of functorch and wrappers have no storage.
    """
    try:
        setattr(x.untyped_storage(), name, value)
    except NotImplementedError:
        return False
    return True


def recorded_on_storage(x: Tensor, name: str) -> Any:
    """What :func:`record_on_storage` has hung there, or None."""
    try:
        return getattr(x.untyped_storage(), name, None)
    except NotImplementedError:
        return None
