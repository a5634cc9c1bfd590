"""``tome.patch.timm``: the patch of timm's Vision Transformers, and classes to build on.

The classes import timm, so they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ... import patch

if TYPE_CHECKING:
    from ..timm_classes import ToMeAttention, ToMeBlock, make_tome_class

__all__ = ["ToMeAttention", "ToMeBlock", "apply_patch", "make_tome_class"]


def apply_patch(
    model: nn.Module, trace_source: bool = False, prop_attn: bool = True, **settings: Any
) -> Any:
    """:func:`tome_ext.patch.timm` with the published signature; merges once ``model.r`` is set.

    Args:
        model: as there.
        trace_source: fill ``model._tome_info["source"]``.
        prop_attn: attend in proportion to sizes.
        settings: further ones of :func:`tome_ext.patch.auto`, such as ``r`` or ``inference``.

    Returns:
        The model.

    Raises:
        ValueError: as there.
    """
    return patch.timm(model, trace_source=trace_source, prop_attn=prop_attn, **settings)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import timm_classes

    return getattr(timm_classes, name)
