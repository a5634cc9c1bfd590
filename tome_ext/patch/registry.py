"""Which library a model comes from, and which of its modules is the tower whose tokens merge."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import nn

from .common.patched_model import Tower
from .common.refusals import class_name

__all__ = ["HOSTS", "Family", "Host", "find_tower", "register"]


@dataclass(frozen=True)
class Family:
    """Models that a host takes, for people to read; each host's module has a tuple ``FAMILIES``.

    Attributes:
        name: what the models are known as.
        classes: the library's classes: that of the model first, then its blocks' and attentions'.
        notes: what users should know of it; may be empty.
    """

    name: str
    classes: tuple[str, ...]
    notes: str = ""


@dataclass(frozen=True)
class Host:
    """One model library.

    Attributes:
        name: of the function in :mod:`tome_ext.patch`, and the prefix of the commands' models.
        package: the top-level package that its classes live in.
        module: the module with ``find_tower(model) -> Tower``, which imports the library; or that
            function itself.
        requirement: what to install, for errors.
    """

    name: str
    package: str
    module: str | Callable[[nn.Module], Tower]
    requirement: str

    def owns(self, model: nn.Module) -> bool:
        """Whether the class of ``model``, or one it derives from, comes from this library."""
        # Not by a base that is no module: wrappers of other libraries mix in such of Transformers'.
        return any(
            base.__module__.split(".")[0] == self.package and issubclass(base, nn.Module)
            for base in type(model).__mro__
        )

    def find_tower(self, model: nn.Module) -> Tower:
        """What ``model`` is made of.

        Raises:
            ValueError: it is not supported; the message names it.
            ImportError: the library is not installed, or too old.
        """
        if callable(self.module):
            return self.module(model)
        try:
            module: Any = import_module(self.module)
        except ImportError as error:
            raise ImportError(
                f"patch.{self.name} needs {self.requirement} "
                f"(pip install {self.requirement.split()[0]}): {error}"
            ) from error
        tower: Tower = module.find_tower(model)
        return tower


#: The libraries that :func:`tome_ext.patch.auto` knows, by name.
HOSTS: dict[str, Host] = {
    "timm": Host("timm", "timm", "tome_ext.patch.hosts.timm", "timm >= 1.0.20"),
    "torchvision": Host(
        "torchvision", "torchvision", "tome_ext.patch.hosts.torchvision", "torchvision >= 0.25"
    ),
    "open_clip": Host(
        "open_clip", "open_clip", "tome_ext.patch.hosts.open_clip", "open_clip_torch >= 3.0"
    ),
    "transformers": Host(
        "transformers", "transformers", "tome_ext.patch.hosts.transformers", "transformers >= 5.18"
    ),
}


def register(host: Host) -> None:
    """Make :func:`tome_ext.patch.auto` know another library.

    Raises:
        ValueError: there is a host of that name already.
    """
    if host.name in HOSTS:
        raise ValueError(f"host: expected a new name, got {host.name!r}, which is there already")
    HOSTS[host.name] = host


def find_tower(model: nn.Module) -> Tower:
    """Find the library of a model, or of the one supported module inside it.

    Raises:
        ValueError: no library knows the model, or more than one of its modules can be patched.
    """
    owner = next((host for host in HOSTS.values() if host.owns(model)), None)
    if owner is None:
        return _inside(model, None)
    try:
        return owner.find_tower(model)
    except ValueError as error:
        # It may be a wrapper that was written with the library, around a model of another.
        return _inside(model, error)


def _inside(model: nn.Module, refusal: ValueError | None) -> Tower:
    """The one tower among the modules of a model; else ``refusal``, or an error of its own."""
    found: list[tuple[str, Tower]] = []
    refused: list[str] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen or module is model:
            continue
        owners = [host for host in HOSTS.values() if host.owns(module)]
        if not owners:
            continue
        try:
            found.append((name, owners[0].find_tower(module)))
        except ValueError as error:
            refused.append(f"{name}: {error}")
            continue
        seen.update(id(part) for part in module.modules())
    if len(found) == 1:
        return found[0][1]
    if refusal is not None:
        raise refusal
    if found:
        names = ", ".join(name for name, _ in found)
        raise ValueError(
            f"model: expected one tower, got {class_name(model)} with several ({names}); patch "
            "them one by one"
        )
    known, why = ", ".join(sorted(HOSTS)), f"; {refused[0]}" if refused else ""
    raise ValueError(
        f"model: expected a model of {known}, or one with one inside, got {class_name(model)}{why}"
    )
