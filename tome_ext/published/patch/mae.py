"""``tome.patch.mae``: the patch of models of the MAE project (He et al., CVPR 2022).

The classes import timm, so they are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ...schedule import Schedule

if TYPE_CHECKING:
    from ..mae_classes import make_tome_class
    from ..timm_classes import ToMeAttention, ToMeBlock

__all__ = ["ToMeAttention", "ToMeBlock", "apply_patch", "make_tome_class"]


def apply_patch(
    model: nn.Module,
    trace_source: bool = False,
    prop_attn: bool = False,
    *,
    r: Schedule = 0,
    inference: bool = False,
) -> Any:
    """Patch a Vision Transformer of MAE: sizes count in its average pool, not in its attention.

    Args:
        model: of a class as the MAE project's, which derives from timm's ``VisionTransformer``,
            has a bool ``global_pool`` and pools in ``forward_features``; or any model of timm.
        trace_source: fill ``model._tome_info["source"]``.
        prop_attn: attend in proportion to sizes; the paper finds MAE models off the shelf better
            without.
        r: tokens to remove per layer, as ``model.r`` later.
        inference: as in :func:`tome_ext.patch.auto`.

    Returns:
        The model.

    Raises:
        ValueError: as :func:`tome_ext.patch.timm`.
    """
    from ..mae_classes import patch_mae

    return patch_mae(model, r, prop_attn, trace_source, inference)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .. import mae_classes, timm_classes

    return getattr(mae_classes if name == "make_tome_class" else timm_classes, name)
