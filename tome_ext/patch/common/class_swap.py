"""Changing what a module does without changing the module: its class is swapped, and back.

A swapped module keeps its parameters, buffers, hooks, name in the model and ``state_dict`` keys;
only ``module.__class__`` becomes a subclass made of a mixin and the module's own class. The
subclass has the name of that class: libraries look modules up by it, and write it into files.
Pickle and ``deepcopy`` rebuild the subclass from its two parts.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, ClassVar

from torch import nn

__all__ = ["Swapped", "has_own_forward", "is_outermost", "restore", "swap"]

PREFIX = "_tome"  # of every attribute that a swap adds to a module
KEPT = ("_old_forward", "forward")  # attributes of a module that may hold its class's forward

_classes: dict[tuple[type, type], type] = {}


class Swapped:
    """Base of all mixins; tells swapped modules from others."""

    _tome_mixin: ClassVar[type]
    _tome_base: ClassVar[type]

    _tome: Any  # the trail of the patched tower, which all of its swapped modules share

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not is_outermost(self):
            return super().__reduce_ex__(protocol)  # what was put on top must see to itself
        # The subclass exists only at run time, so it cannot be pickled by name.
        state = super().__reduce_ex__(protocol)[2]
        return _rebuild, (self._tome_mixin, self._tome_base), state


def _new(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``type(module)(...)`` makes is a module of the class as it was, without a patch.

    Without arguments it is an empty one to be filled, as copies are made.
    """
    if args or kwargs:
        return cls._tome_base(*args, **kwargs)
    return nn.Module.__new__(cls)


def _swapped_class(mixin: type, base: type) -> type:
    made = _classes.get((mixin, base))
    if made is None:
        made = type(
            base.__name__,
            (mixin, base),
            {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
                "_tome_mixin": mixin,
                "_tome_base": base,
                "__new__": _new,
            },
        )
        _classes[mixin, base] = made
    return made


def _rebuild(mixin: type, base: type) -> Any:
    made: Any = _swapped_class(mixin, base)
    return made.__new__(made)


def swap(module: nn.Module, mixin: type[Swapped], **attributes: object) -> None:
    """Put ``mixin`` in front of the module's class and set attributes, each named ``_tome...``."""
    before = type(module)
    module.__class__ = _swapped_class(mixin, before)
    for name, value in attributes.items():
        setattr(module, name, value)
    _rebind(module, before)


def has_own_forward(module: Any) -> bool:
    """Whether calling the module runs another forward than its class's.

    Hooks as those of accelerate, which keep the forward they replaced in ``_old_forward``, run it.
    """
    own = vars(module)
    if "forward" not in own:
        return False
    return not any(_is_forward(own.get(name), module, type(module)) for name in KEPT)


def _is_forward(method: Any, module: nn.Module, owner: Any) -> bool:
    return (
        isinstance(method, MethodType)
        and method.__self__ is module
        and method.__func__ is owner.forward
    )


def _rebind(module: Any, before: type) -> None:
    """After a swap: where others keep the module's forward, let it be that of the class now."""
    for name in KEPT:
        if _is_forward(vars(module).get(name), module, before):
            setattr(module, name, MethodType(type(module).forward, module))


def is_outermost(module: Swapped) -> bool:
    """Whether nobody else has changed the module's class since, as FSDP2 does."""
    return type(module) is _classes.get((module._tome_mixin, module._tome_base))


def restore(module: Swapped) -> None:
    """Undo :func:`swap`: the module's own class, and no attribute of ours."""
    for name in [name for name in vars(module) if name.startswith(PREFIX)]:
        delattr(module, name)
    before = type(module)
    module.__class__ = module._tome_base
    _rebind(module, before)
