"""What the commands share: the error that a user can mend, settings, devices, the hub."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import patch
from .patch.common.methods import MethodName

__all__ = [
    "CommandError",
    "Reduction",
    "check_patch",
    "find_device",
    "one_line",
    "out_of_memory",
    "patched",
    "prefer_cache_without_network",
    "say",
]

HUB_WAIT = 5.0  # seconds the hub gets to answer before a command goes on without it


class CommandError(Exception):
    """A mistake the user can mend; the message says how."""


@dataclass(frozen=True)
class Reduction:
    """One setting of a run: how, and how far, a model's tokens are reduced.

    Attributes:
        method: see :func:`tome_ext.patch.auto`.
        r: tokens to remove in every block, if the others are None.
        keep_rate: share of patch tokens that three layers keep.
        threshold: similarity from which on tokens merge in every block.
    """

    method: MethodName = "tome"
    r: int = 0
    keep_rate: float | None = None
    threshold: float | None = None

    def __str__(self) -> str:
        method = "" if self.method == "tome" else f"{self.method}, "
        return f"{method}{self.amount_name} = {self.amount}"

    @property
    def amount_name(self) -> str:
        """What the amount is: "r", "keep rate" or "threshold"."""
        if self.threshold is not None:
            return "threshold"
        return "r" if self.keep_rate is None else "keep rate"

    @property
    def amount(self) -> str:
        """The number by which the setting is known in tables."""
        share = self.keep_rate if self.threshold is None else self.threshold
        return str(self.r) if share is None else f"{share:g}"

    @property
    def reduces(self) -> bool:
        """Whether there is any amount."""
        return self.r > 0 or self.keep_rate is not None or self.threshold is not None

    @property
    def row_name(self) -> str:
        """The amount, and the method unless it is "tome"."""
        return self.amount if self.method == "tome" else f"{self.method} {self.amount}"

    def patch(self, model: Any, inference: bool = True) -> Any:
        """Patch a model so; see :func:`tome_ext.patch.auto` for what it raises."""
        return patch.auto(
            model, self.r, method=self.method, keep_rate=self.keep_rate, threshold=self.threshold,
            inference=inference,
        )  # fmt: skip


def check_patch(model: Any, reductions: Iterable[Reduction]) -> None:
    """Refuse a model that can't be patched so; it is not patched afterwards."""
    try:
        patch.auto(model)
        for reduction in reductions:
            reduction.patch(model)
        patch.remove(model)
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from None


def patched(model: Any, reduction: Reduction | None) -> AbstractContextManager[Any]:
    """The model with a setting, for a while; None leaves it as it is."""
    return nullcontext() if reduction is None else reduction.patch(model)


def find_device(name: str) -> torch.device:
    """The device of that name, if it is there and works."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"can't use the device {name!r}: {reason}") from None
    return device


def say(text: str) -> None:
    """A line about what is being done, on stderr."""
    print(text, file=sys.stderr, flush=True)


def one_line(error: Exception) -> str:
    """An error's message on one line of bearable length."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had: Python's, a GPU's, or torch's on the CPU,
    which is a plain RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "std::bad_alloc"))


def prefer_cache_without_network() -> str | None:
    """Ask the hub once, briefly. If it does not answer, use only files that are here already.

    Without this, every file is tried with half a minute of retries. Returns what went wrong.
    """
    try:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session
    except ImportError:
        return "huggingface_hub is not installed"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_WAIT)
    except Exception as error:  # of the HTTP library, which differs between versions of the hub's
        constants.HF_HUB_OFFLINE = True
        return f"{constants.ENDPOINT} does not answer, {type(error).__name__}"
    return None
