"""``tome.vis``: see :mod:`tome_ext.vis`, which is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..vis import generate_colormap, make_visualization

__all__ = ["generate_colormap", "make_visualization"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import vis

    return getattr(vis, name)
