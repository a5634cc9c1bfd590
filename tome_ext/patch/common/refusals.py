"""What no library's model may be: refused for every host alike, before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from .class_swap import has_own_forward

__all__ = [
    "check_blocks",
    "check_bool",
    "check_classes",
    "check_not_sharded",
    "check_own_methods",
    "class_name",
]


def check_bool(value: object, name: str) -> None:
    """Refuse a setting that is not a bool: any text would count as True, "no" too."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r} ({type(value).__name__})")


def class_name(module: nn.Module) -> str:
    """A module's class with its module, as errors name it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_not_sharded(model: nn.Module) -> None:
    """Refuse a model that fully_shard has changed already."""
    if any(base.__name__ == "FSDPModule" for base in type(model).__mro__):
        raise ValueError(
            f"model: expected a model that is not sharded yet, got {class_name(model)}; patch "
            "first, then call fully_shard"
        )


def check_own_methods(
    model: nn.Module, owners: type | Sequence[type], methods: Sequence[str], supported: str
) -> None:
    """Refuse a model that replaces one of ``methods`` of the class ``owners``, or of all of these.

    Such a method may pool, split or reshape tokens. ``supported`` says what is expected.
    """
    owners = [owners] if isinstance(owners, type) else owners
    for method in methods:
        known = [vars(owner)[method] for owner in owners if method in vars(owner)]
        if known and (method in vars(model) or getattr(type(model), method) not in known):
            raise ValueError(
                f"model: expected {supported}, got {class_name(model)} with a {method} of its own, "
                "which may treat tokens in ways that do not know their sizes"
            )


def check_classes(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    attentions: Sequence[nn.Module],
    block_classes: Collection[type],
    attention_classes: Collection[type],
    supported: str,
) -> None:
    """Refuse models with a block or an attention that is not of one of these very classes."""
    for layer, (block, attn) in enumerate(zip(blocks, attentions, strict=True)):
        found = f"{class_name(model)} with a {type(block).__qualname__} as block {layer}"
        if type(block) not in block_classes:
            hint = _hint(block, block_classes)
            raise ValueError(f"model: expected {supported}, got {found}{hint}")
        if type(attn) not in attention_classes:
            hint = _hint(attn, attention_classes)
            raise ValueError(
                f"model: expected {supported}, got {found} with {type(attn).__qualname__}{hint}"
            )


def _hint(module: nn.Module, classes: Collection[type]) -> str:
    """What to do about a module that only wraps one of the expected classes, as PEFT's do."""
    if any(type(part) in classes for part in module.modules()):
        return f": {class_name(module)} wraps one; patch the model first, then let it be wrapped"
    return ""


def check_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module]
) -> None:
    """Refuse models without blocks, blocks used twice, and forwards that were replaced."""
    name = class_name(model)
    if not blocks:
        raise ValueError(f"model: expected at least one block, got {name} with none")
    for layer, (block, attn) in enumerate(zip(blocks, attentions, strict=True)):
        found = f"{name} with a {type(block).__qualname__} as block {layer}"
        if has_own_forward(block) or has_own_forward(attn):
            raise ValueError(f"model: got {found}, whose forward or whose attention's is replaced")
        if any(block is other for other in blocks[:layer]):
            raise ValueError(f"model: expected blocks of their own, got {found}, which came before")
