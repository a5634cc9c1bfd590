"""``tome.patch.swag``: the patch of SWAG's Vision Transformers, as torchvision has them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ... import patch
from ...patch.registry import HOSTS

__all__ = ["apply_patch"]

OWN_CLASSES = ("ToMeAttention", "make_block_class", "make_encoder_class", "make_transformer_class")
INSTEAD = (
    "torchvision has SWAG's models with the same weights, such as vit_b_16(weights="
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1), which tome.patch.swag takes, or "
    "tome_ext.patch.torchvision"
)


def apply_patch(
    model: nn.Module, trace_source: bool = False, prop_attn: bool = True, **settings: Any
) -> Any:
    """:func:`tome_ext.patch.torchvision` with the published signature.

    Args:
        model: torchvision's ``VisionTransformer``. The SWAG repository's own class of the same
            name, whose tokens come before the batch, is refused.
        trace_source: fill ``model._tome_info["source"]``.
        prop_attn: attend in proportion to sizes.
        settings: further ones of :func:`tome_ext.patch.auto`, such as ``r`` or ``inference``.

    Returns:
        The model.

    Raises:
        ValueError: the model is not supported; the message names what to call.
    """
    if not HOSTS["torchvision"].owns(model):
        raise ValueError(
            f"model: expected torchvision's VisionTransformer, got {type(model).__module__}."
            f"{type(model).__qualname__}; {INSTEAD}"
        )
    return patch.torchvision(model, trace_source=trace_source, prop_attn=prop_attn, **settings)


def __getattr__(name: str) -> Any:
    if name in OWN_CLASSES:  # an AttributeError's message would not get through a from-import
        raise ImportError(f"tome.patch.swag has no {name} in tome_ext: {INSTEAD}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
