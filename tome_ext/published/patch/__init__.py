"""``tome.patch``: functions by the names of the modules that they come from.

So it is in the published project: ``tome.patch.timm(model)`` calls, and ``from tome.patch.timm
import apply_patch`` imports. What that project does not have is tome_ext's own:
``tome.patch.remove`` is :func:`tome_ext.patch.remove`.
"""

from __future__ import annotations

from typing import Any

from .mae import apply_patch as mae
from .swag import apply_patch as swag
from .timm import apply_patch as timm

__all__ = ["mae", "swag", "timm"]


def __getattr__(name: str) -> Any:
    from ... import patch

    try:
        return getattr(patch, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
