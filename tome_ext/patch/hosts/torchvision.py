"""torchvision's Vision Transformers, SWAG's weights among them, which are of the same class."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer

from ..common.attention_seam import TomeMultiheadAttention, check_multihead
from ..common.block import BlockNames, TomeBlock
from ..common.block_call import BlockCall
from ..common.class_swap import Swapped
from ..common.patched_model import PatchedModel, Tower
from ..common.refusals import (
    check_blocks,
    check_classes,
    check_not_sharded,
    check_own_methods,
    class_name,
)
from ..common.trail import AttentionKind, Trail, attention_kind
from ..registry import Family

__all__ = ["FAMILIES", "find_tower"]

FAMILIES = (
    Family(
        "ViT, SWAG",
        ("VisionTransformer", "EncoderBlock", "torch.nn.MultiheadAttention"),
        "made for any `image_size`; torchvision itself refuses pictures of another",
    ),
)
SUPPORTED = "torchvision's VisionTransformer whose blocks are all EncoderBlock"


class TorchvisionBlock(TomeBlock):
    """``torchvision.models.vision_transformer.EncoderBlock`` that merges inside."""

    _tome_names = BlockNames("ln_1", "self_attention", "ln_2", "mlp", drop1="dropout")

    def _tome_attention_kind(self: Any) -> AttentionKind:
        attn = self.self_attention
        return attention_kind(attn, attn.head_dim, attn.dropout if attn.training else 0.0)

    def _tome_attend(
        self, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return super()._tome_attend(call, x, (x, x), {"need_weights": False})


class TorchvisionEncoder(Swapped):
    """``torchvision.models.vision_transformer.Encoder``, which returns the tokens."""

    _tome: Trail

    def forward(self: Any, input: Tensor) -> Tensor:  # noqa: A002  (torchvision's name)
        x = super().forward(input)  # type: ignore[misc]
        return self._tome.finish(x, sized=False)  # the head reads the class token


def find_tower(model: Any) -> Tower:
    """What a model is made of; a ValueError that names what is wrong if it is not supported."""
    name = class_name(model)
    if not isinstance(model, VisionTransformer) or type(model.encoder) is not Encoder:
        raise ValueError(f"model: expected {SUPPORTED}, got {name}")
    check_not_sharded(model)
    check_own_methods(model, VisionTransformer, ("forward",), SUPPORTED)
    blocks: list[Any] = list(model.encoder.layers)
    attentions = [getattr(block, "self_attention", block) for block in blocks]
    check_classes(model, blocks, attentions, {EncoderBlock}, {nn.MultiheadAttention}, SUPPORTED)
    check_blocks(model, blocks, attentions)
    for attn in attentions:
        check_multihead(attn)
    return Tower(
        module=model,
        mixin=PatchedModel,
        blocks=[(block, TorchvisionBlock) for block in blocks],
        others=[
            *((attn, TomeMultiheadAttention, {}) for attn in attentions),
            (model.encoder, TorchvisionEncoder, {}),
        ],
        num_prefix_tokens=1,
        class_token=True,
    )
