"""What a user holds: settings, what the last forward did, removal. And how a model is patched.

The user's model (``model.r``, ``model.tome``) and the tower whose tokens merge can be different
modules, as in CLIP. Both are of classes that derive from :class:`PatchedModel`, and share a trail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ...schedule import KeepRate, Schedule, Threshold
from .block import TomeBlock
from .class_swap import Swapped, has_own_forward, is_outermost, restore, swap
from .methods import MethodName
from .published_info import PublishedInfo, change_settings
from .rules import Settings, make_rules
from .token_state import Tokens
from .trail import Reader, Trail

__all__ = ["PatchedModel", "Tower", "find", "patch_model", "remove"]


@dataclass
class Tower:
    """What a host says of a model it can patch.

    Attributes:
        module: the module that returns the tokens.
        mixin: the class that it gets, ``module_attributes`` its attributes (``_tome...``).
        blocks: its blocks in order, each with the class that it gets.
        others: further modules, their classes and attributes (``_tome...``) of their own.
        num_prefix_tokens: leading tokens that never merge.
        class_token: whether the first of them is a class token.
        block_attributes: attributes (``_tome...``) of every block.
        info: further entries of ``_tome_info``, for code written for the published patch.
        reader: what reads the tokens that the tower returns; see :class:`Trail`.
    """

    module: nn.Module
    mixin: type[PatchedModel]
    blocks: list[tuple[nn.Module, type[TomeBlock]]]
    num_prefix_tokens: int
    class_token: bool
    others: list[tuple[nn.Module, type[Swapped], dict[str, Any]]] = field(default_factory=list)
    block_attributes: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    reader: Reader = "tokens"
    module_attributes: dict[str, Any] = field(default_factory=dict)


class PatchedModel(Swapped):
    """A patched model, or the tower inside one."""

    _tome: Trail
    _tome_class_token: bool
    _tome_extra_info: dict[str, Any]
    _tome_part: bool  # whether it is the tower of another patched model

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        trail: Trail = self._tome
        trail.add_holder(self)
        if trail.origin is None:
            return
        # A part that was copied before this was known to be copied, too, has the old trail.
        origin = trail.origin()
        for module in self.modules():
            if isinstance(module, Swapped) and module._tome is origin:
                module._tome = trail
                if isinstance(module, TomeBlock):
                    trail.hold(module, module._tome_layer)

    @property
    def r(self) -> Schedule:
        """Tokens to remove per layer: an int, ``(r, inflection)`` or a list.

        Setting it takes effect with the next forward; see :func:`tome_ext.schedule.parse_r`. A
        wrapper around the model has no such setting: see :func:`tome_ext.patch.find`.
        """
        return self._tome.rules.settings.r

    @r.setter
    def r(self, r: Schedule) -> None:
        change_settings(self._tome, r=r, keep_rate=None, threshold=None)

    @property
    def keep_rate(self) -> KeepRate | None:
        """Share of patch tokens that layers keep, a float or a list; None if that is not given.

        Setting it takes effect with the next forward and puts ``r`` and ``threshold`` aside, as
        setting these does with it; see :func:`tome_ext.schedule.parse_keep_rate`.
        """
        return self._tome.rules.settings.keep_rate

    @keep_rate.setter
    def keep_rate(self, keep_rate: KeepRate | None) -> None:
        change_settings(self._tome, r=0, keep_rate=keep_rate, threshold=None)

    @property
    def threshold(self) -> Threshold | None:
        """Similarity from which on tokens merge, a float or a list; None if that is not given.

        Setting it takes effect with the next forward and puts ``r`` and ``keep_rate`` aside; see
        :func:`tome_ext.schedule.parse_threshold`.
        """
        return self._tome.rules.settings.threshold

    @threshold.setter
    def threshold(self, threshold: Threshold | None) -> None:
        change_settings(self._tome, r=0, keep_rate=None, threshold=threshold)

    @property
    def method(self) -> MethodName:
        """How tokens are reduced, such as "tome"; patch again to change it."""
        return self._tome.rules.method.name

    @property
    def tome(self) -> Tokens | None:
        """The tokens that the last forward of this thread ended with; None before the first.

        ``model.tome.size`` are their sizes, and ``model.tome.unmerge(features)`` spreads features
        (B, M, C) over the original tokens (B, N, C); ``model.tome.plan`` is the plan that does so.
        Sizes and plan are None if nothing merged; the sizes are None for the methods that prune,
        too. With a threshold, rows of size 0 are those that an image does not fill.
        """
        return self._tome.current

    def _tome_report(self) -> dict[str, str]:
        """The model's lines of :func:`tome_ext.info`."""
        trail = self._tome
        rules = trail.rules
        spans: list[tuple[int, int, str]] = []
        for layer, block in enumerate(_blocks(self)):
            what = trail.attention_of(layer, block._tome_attention_kind())
            first = spans.pop()[0] if spans and spans[-1][2] == what else layer
            spans.append((first, layer, what))
        amounts = {"keep rate": self.keep_rate, "threshold": self.threshold}
        amount = {name: str(given) for name, given in amounts.items() if given is not None}
        return {
            "model": f"{self._tome_base.__name__}, {len(rules.layers)} blocks",
            "method": rules.method.name,
            **(amount or {"r": str(self.r)}),
            "proportional attention": "on" if rules.method.proportional else "off",
            "attention": "; ".join(f"{_name(first, last)}: {what}" for first, last, what in spans),
        }

    @property
    def _tome_info(self) -> PublishedInfo:
        """What the published patch keeps in ``model._tome_info``."""
        return PublishedInfo(self, self._tome, self._tome_extra_info)

    @_tome_info.setter
    def _tome_info(self, info: object) -> None:
        raise AttributeError(
            "_tome_info: a patched model makes it by itself; change model.r, or patch again with "
            "other settings: tome_ext.patch.auto(model, r, prop_attn, trace_source)"
        )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: object) -> None:
        # Nothing to do if the body has removed the patch itself.
        if isinstance(self, nn.Module) and isinstance(self, PatchedModel):
            remove(self)


def _blocks(model: Any) -> list[TomeBlock]:
    blocks = [
        module
        for module in model.modules()
        if isinstance(module, TomeBlock) and module._tome is model._tome
    ]
    return sorted(blocks, key=lambda block: block._tome_layer)


def _name(first: int, last: int) -> str:
    return f"block {first}" if first == last else f"blocks {first}-{last}"


def find(model: nn.Module) -> Any:
    """The patched model in a wrapper: where ``r``, ``keep_rate`` and ``tome`` are.

    PEFT's models, ``DataParallel`` and ``DistributedDataParallel`` keep attributes that are set on
    them to themselves, so that ``wrapper.r = 8`` does nothing; ``find(wrapper).r = 8`` does.

    Args:
        model: a patched model, or a module with one inside.

    Returns:
        The patched model; ``model`` itself if it is one.

    Raises:
        ValueError: there is none inside, or more than one.
    """
    if isinstance(model, PatchedModel):
        return model
    found = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, PatchedModel) and not part._tome_part
    }
    if not found:
        inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper says nothing
        raise ValueError(f"model: expected a patched model, got {type(inner).__name__}")
    if len(found) > 1:
        raise ValueError(
            f"model: expected one patched model, got {type(model).__name__} with several "
            f"({', '.join(found)}); ask for each by itself"
        )
    return next(iter(found.values()))


def patch_model(
    model: nn.Module, find_tower: Callable[[nn.Module], Tower], settings: Settings
) -> Any:
    """Patch a model, or give a patched one other settings.

    Args:
        model: what the user holds.
        find_tower: a host's; raises ValueError for a model that it does not support.
        settings: see :func:`tome_ext.patch.auto`.

    Returns:
        The model.

    Raises:
        ValueError: from ``find_tower``, or a setting is wrong. Nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {model!r}")
    if isinstance(model, PatchedModel):
        trail = model._tome
        settings = _of_model(settings, model._tome_class_token)
        trail.rules = make_rules(settings, len(trail.rules.layers), trail.rules.num_prefix_tokens)
        return model
    for name, module in model.named_modules():
        if isinstance(module, Swapped):
            raise ValueError(
                f"model: {name} ({type(module).__name__}) in it is patched already; remove that "
                "patch first, or set r on the model that was patched: tome_ext.patch.find(model).r"
            )
    tower = find_tower(model)
    settings = _of_model(settings, tower.class_token)
    _check_names(model)
    _check_names(tower.module)
    rules = make_rules(settings, len(tower.blocks), tower.num_prefix_tokens)
    trail = Trail(rules, tower.reader)
    held = {
        "_tome": trail,
        "_tome_class_token": tower.class_token,
        "_tome_extra_info": {
            "class_token": tower.class_token,
            "distill_token": False,
            **tower.info,
        },
    }
    # Everything has been checked: from here on nothing may fail.
    for module, mixin, attributes in tower.others:
        swap(module, mixin, _tome=trail, **attributes)
    for layer, (block, block_mixin) in enumerate(tower.blocks):
        swap(block, block_mixin, _tome=trail, _tome_layer=layer, **tower.block_attributes)
        trail.hold(block, layer)
    trail.add_holder(tower.module)
    trail.add_holder(model)
    part = tower.module is not model
    swap(tower.module, tower.mixin, _tome_part=part, **held, **tower.module_attributes)
    if tower.module is not model:
        swap(model, PatchedModel, _tome_part=False, **held)
    return model


def _check_names(module: nn.Module) -> None:
    """Refuse a module that has something of its own by a name that a patched model needs."""
    for name in ("r", "keep_rate", "threshold", "method", "tome"):
        if hasattr(module, name):
            raise ValueError(
                f"model: expected a module without {name!r}, which a patched model has, got "
                f"{type(module).__name__} with one of its own; patch the model inside it"
            )


def _of_model(settings: Settings, class_token: bool) -> Settings:
    return replace(settings, method=settings.method.of_model(class_token))


def remove(model: nn.Module) -> None:
    """Take a patch off a model: its modules are exactly what they were before.

    Args:
        model: a model that a function of :mod:`tome_ext.patch` has patched.

    Raises:
        ValueError: the model is not patched, or is the tower of a larger patched model.
        RuntimeError: the ``forward`` of a module was replaced after patching, so that the module
            would go on calling the patched one; or its class was, as ``fully_shard`` does. Nothing
            is changed.
    """
    if not isinstance(model, PatchedModel):
        raise ValueError(f"model: expected a patched model, got {type(model).__name__}")
    assert isinstance(model, nn.Module)
    if model._tome_part:
        raise ValueError(
            f"model: expected the model that was patched, got its tower, {type(model).__name__}"
        )
    swapped = [
        (name, module) for name, module in model.named_modules() if isinstance(module, Swapped)
    ]
    for name, module in swapped:
        if has_own_forward(module):
            raise RuntimeError(
                f"{name or 'the model'} ({type(module).__name__}): its forward was replaced after "
                "patching; take that replacement off first"
            )
        if not is_outermost(module):
            raise RuntimeError(
                f"{name or 'the model'}: its class was changed after patching: expected the one "
                f"that the patch made of {module._tome_base.__name__}, got "
                f"{type(module).__name__}; a sharded model keeps its patch, set r = 0 to switch "
                "merging off"
            )
    for _, module in swapped:
        restore(module)
