"""Standing in for the published project under its name."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

__all__ = ["install_as"]

# What the published project has below its name.
MODULES = ("", ".merge", ".utils", ".vis", ".patch", ".patch.timm", ".patch.mae", ".patch.swag")
HERE = "tome_ext.published"


def install_as(name: str = "tome") -> ModuleType:
    """Let ``import tome`` and ``from tome.merge import ...`` give this package.

    For code written for the published ToMe project, which then runs unchanged: the modules, names
    and signatures are that project's. Call it once, before such code is imported; again, it does
    nothing. It holds for this process; a process that is spawned has to call it too. An installed
    package of that name is not touched, but no longer found.

    >>> import tome_ext
    >>> tome_ext.install_as("tome")
    >>> from tome.patch.timm import apply_patch

    Args:
        name: what the published project is imported as, a top-level name.

    Returns:
        The module :mod:`tome_ext.published`, which ``import tome`` gives from here on.

    Raises:
        ValueError: ``name`` is not one name without dots, or this package's own.
        ImportError: another module of that name was imported before, whose functions code may hold
            already. Nothing is changed.
    """
    if not isinstance(name, str) or not name.isidentifier() or name == "tome_ext":
        raise ValueError(f"name: expected a top-level name such as 'tome', got {name!r}")
    modules = {name + rest: import_module(HERE + rest) for rest in MODULES}
    for imported, module in list(sys.modules.items()):
        taken = imported == name or imported.startswith(name + ".")
        if taken and module is not modules.get(imported):
            raise ImportError(
                f"{imported} was imported already, from {getattr(module, '__file__', None)}; call "
                f"tome_ext.install_as({name!r}) before anything imports {name}"
            )
    sys.modules.update(modules)
    return modules[name]
