"""What the commands share: the error that a user can mend, and devices and models by name."""

from __future__ import annotations

import difflib
from typing import Any

import torch

__all__ = ["CommandError", "check_model_name", "create_model", "find_device"]


class CommandError(Exception):
    """A mistake the user can mend; the message says how."""


def find_device(name: str) -> torch.device:
    """The device of that name, if it is there and works."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"can't use the device {name!r}: {reason}") from None
    return device


def check_model_name(name: str) -> None:
    """Refuse a name that timm does not know; it alone knows those with a scheme, ``hf-hub:...``."""
    import timm

    if ":" not in name and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise CommandError(f"timm has no model {name!r}{hint}")


def create_model(name: str, **options: Any) -> Any:
    """A timm model with random weights, the same each time."""
    import timm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return timm.create_model(name, pretrained=False, **options)
        except Exception as error:  # timm and the models raise all kinds
            raise CommandError(f"timm can't make the model {name!r}: {error}") from None
