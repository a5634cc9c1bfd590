"""Vision towers of Hugging Face's Transformers: finding one in a model, and what it is made of.

Imports transformers, so it is itself imported only when a model is patched, or a patched one
unpickled.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from ..common.attention_seam import TomeMultiheadAttention, check_multihead
from ..common.block import BlockNames
from ..common.class_swap import Swapped
from ..common.patched_model import Tower
from ..common.refusals import check_blocks, check_not_sharded, class_name
from ..common.trail import Reader
from .transformers_families import FAMILIES, REFUSED, TowerFamily
from .transformers_parts import ProbePool

__all__ = ["FAMILIES", "find_tower"]

_BY_MODULE = {family.module: family for family in FAMILIES}
_WRAPPERS = ("TimmWrapperModel", "TimmWrapperForImageClassification")


def find_tower(model: Any) -> Tower:
    """What a model of Transformers is made of; a ValueError that says why if it is unsupported."""
    check_not_sharded(model)
    found = list(_towers(model, "", []))
    if not found:
        raise ValueError(_unsupported(model))
    if len(found) > 1:
        names = ", ".join(name for name, *_ in found)
        raise ValueError(
            f"model: expected one vision tower, got {class_name(model)} with several ({names}); "
            "patch them one by one"
        )
    _, module, around = found[0]
    reader = _reader(around)
    family = family_of(module)
    if family is None:
        from . import timm

        tower = timm.find_tower(module.timm_model)
        tower.reader = reader
        return tower
    return _tower(model, module, family, reader)


def family_of(module: Any) -> TowerFamily | None:
    """The family that has the module as a tower; of a subclass only if its forward is the same."""
    base: Any
    for base in type(module).__mro__:
        family = _BY_MODULE.get(base.__module__)
        if family is not None and base.__name__ in family.towers:
            return family if type(module).forward is base.forward else None
    return None


def _towers(
    module: Any, name: str, around: list[nn.Module]
) -> Iterator[tuple[str, Any, list[nn.Module]]]:
    """The outermost towers in a module: name, tower, and the models of Transformers around it."""
    if family_of(module) is not None or type(module).__name__ in _WRAPPERS:
        yield name or "the model", module, around
        return
    if isinstance(module, PreTrainedModel):
        around = [*around, module]
    for child, part in module.named_children():
        yield from _towers(part, f"{name}.{child}" if name else child, around)


def _reader(around: list[nn.Module]) -> Reader:
    """What reads the tokens of a tower that is inside those models."""
    if not around:
        return "tokens"
    if len(around) == 1:
        base: Any
        for base in type(around[0]).__mro__:
            family = _BY_MODULE.get(base.__module__)
            if family is not None and base.__name__ in family.heads:
                own = type(around[0]).forward is base.forward
                return family.heads[base.__name__] if own else "grid"
        if type(around[0]).__name__ in _WRAPPERS:
            return "tokens"
    return "grid"


def _unsupported(model: Any) -> str:
    """The error for a model without a tower that can be patched."""
    known = ", ".join(family.name for family in FAMILIES)
    why = ""
    for module in model.modules():
        parts = type(module).__module__.split(".")
        if parts[:2] == ["transformers", "models"] and len(parts) > 2 and parts[2] in REFUSED:
            why = f"; {parts[2]} is not supported: {REFUSED[parts[2]]}"
            break
    return (
        f"model: expected a vision tower of {known}, or a model with one inside, got "
        f"{class_name(model)}{why}"
    )


def _tower(model: Any, module: Any, family: TowerFamily, reader: Reader) -> Tower:
    name = class_name(module)
    path = next(
        family.towers[base.__name__]
        for base in type(module).__mro__
        if base.__module__ == family.module and base.__name__ in family.towers
    )
    try:
        blocks: list[Any] = list(module.get_submodule(path))
    except AttributeError as error:
        raise ValueError(
            f"model: expected blocks in {path} of {name}, got transformers "
            f"{transformers.__version__}, which has none there: {error}"
        ) from error
    attentions: list[Any] = []
    for layer, block in enumerate(blocks):
        attn = [
            (path, part)
            for path, part in block.named_modules()
            if (type(part).__module__, type(part).__name__) == (family.module, family.attention)
        ]
        if (type(block).__module__, type(block).__name__) != (family.module, family.layer):
            raise ValueError(
                f"model: expected {family.layer} as blocks of {name}, got "
                f"{class_name(block)} as block {layer}"
            )
        if len(attn) != 1 or "config" not in vars(attn[0][1]):
            raise ValueError(
                f"model: expected one {family.attention} in block {layer} of {name}, got "
                f"{len(attn)} with a config; transformers is {transformers.__version__}"
            )
        attentions.append(attn[0])
    check_blocks(module, blocks, [attn for _, attn in attentions])
    if family.package == "ijepa" and module.pooler is not None:
        raise ValueError(
            f"model: got {name} with a pooler, which reads the first patch, wherever it merges; "
            "expected add_pooling_layer=False"
        )
    prefix = family.prefix + getattr(module.config, "num_register_tokens", 0)
    names = block_names(blocks[0], family.names)
    pools: list[tuple[nn.Module, type[Swapped], dict[str, Any]]] = [
        (part, family.pools[type(part).__name__], {})
        for part in model.modules()
        if type(part).__module__ == family.module and type(part).__name__ in family.pools
    ]
    for part, mixin, _ in list(pools):
        if mixin is ProbePool:
            inner: Any = part.attention
            check_multihead(inner)
            pools.append((inner, TomeMultiheadAttention, {}))
    return Tower(
        module=module,
        mixin=family.tower_mixin,
        module_attributes={"_tome_mask": mask_argument(module, family)},
        blocks=[(block, family.layer_mixin) for block in blocks],
        others=[*((attn, family.attention_mixin, {}) for _, attn in attentions), *pools],
        num_prefix_tokens=prefix,
        class_token=family.prefix > 0,
        block_attributes={"_tome_names": names, "_tome_attention": attentions[0][0]},
        info={"distill_token": family.prefix > 1},
        reader=reader,
    )


def mask_argument(module: Any, family: TowerFamily) -> tuple[str, int] | None:
    """The tower's padding mask: name and place among its arguments."""
    if family.mask is None:
        return None
    return family.mask, list(inspect.signature(module.forward).parameters).index(family.mask)


def block_names(block: Any, names: dict[str, Any]) -> BlockNames:
    """A family's names, with the classes of a block's parts that do what their name says."""

    def classes(suffix: str, *parts: str) -> tuple[type, ...]:
        modules = {type(block._modules.get(names.get(part))) for part in parts}
        return tuple(cls for cls in modules if cls.__name__.endswith(suffix))

    return BlockNames(
        **names,
        scale_classes=classes("LayerScale", "scale1"),
        drop_classes=classes("DropPath", "drop1"),
    )
