"""The published ToMe project's modules, names and signatures, on tome_ext.

:func:`tome_ext.install_as` gives this package the published project's name, so that code written
for that project runs unchanged. What the published project does not have is tome_ext's own:
``tome.match`` is :func:`tome_ext.match`. ``docs/migration.md`` says what is different.
"""

from __future__ import annotations

from typing import Any

from . import merge, patch, utils, vis

__all__ = ["make_visualization", "merge", "patch", "utils"]


def __getattr__(name: str) -> Any:
    if name == "make_visualization":  # which needs Pillow and NumPy
        return vis.make_visualization
    import tome_ext

    try:
        return getattr(tome_ext, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
