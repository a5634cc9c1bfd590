"""timm's Vision Transformers: which are supported, and what their blocks and attentions become.

Imports timm, so it is itself imported only when a model is patched, or a patched one unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timm.layers import AttentionPoolLatent, AttentionRope
from timm.models import beit, vision_transformer_relpos
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from ..common.class_swap import Swapped
from ..common.patched_model import PatchedModel, Tower
from ..common.refusals import (
    check_blocks,
    check_not_sharded,
    check_own_methods,
    class_name,
)
from ..common.trail import TokenNorm
from ..registry import Family
from .timm_bias import (
    TimmBeitAttention,
    TimmBeitBlock,
    TimmBiasModel,
    TimmRelPosAttention,
    TimmRelPosBlock,
    TimmRelPosPostBlock,
)
from .timm_naflex import TimmNaFlexModel
from .timm_parts import (
    TimmAttention,
    TimmBlock,
    TimmModel,
    TimmParallelScalingBlock,
    TimmParallelThingsBlock,
    TimmPostBlock,
)
from .timm_rotary import TimmRotaryAttention, TimmRotaryBlock, TimmRotaryPostBlock

__all__ = ["FAMILIES", "Form", "find_tower", "tower_of"]

FAMILIES = (
    Family(
        "ViT, DeiT, DeiT III, AugReg, DINO, DINOv2, CLIP, SigLIP, SigLIP 2, SO150M, ...",
        ("VisionTransformer", "Block", "ResPostBlock", "Attention"),
        "class token, registers, average and attention pooling",
    ),
    Family("DeiT distilled", ("VisionTransformerDistilled", "Block", "Attention")),
    Family(
        "parallel ViT",
        ("VisionTransformer", "ParallelThingsBlock", "ParallelScalingBlock", "Attention"),
        "ParallelScalingBlock merges at its end, after its MLP",
    ),
    Family(
        "EVA, EVA-02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens2, ...",
        ("Eva", "EvaBlock", "EvaBlockPostNorm", "EvaAttention", "AttentionRope"),
        "a merged token's rotary position is the mean of its tokens' own",
    ),
    Family(
        "NaFlexViT, RADIO",
        ("NaFlexVit", "Block", "EvaBlock", "Attention", "EvaAttention", "AttentionRope"),
        "padding neither merges nor counts",
    ),
    Family(
        "BEiT, BEiT v2",
        ("Beit", "beit.Block", "beit.Attention"),
        "attention is not flash behind the first merge, because of its bias: little to gain",
    ),
    Family(
        "ViT with relative positions",
        ("VisionTransformerRelPos", "RelPosBlock", "ResPostRelPosBlock", "RelPosAttention"),
        "as BEiT",
    ),
)
# What timm's other models do that merging cannot follow, by the module of their class.
OTHERS = {
    "cait": "its talking heads mix the heads of an attention matrix that merging does not build",
    "crossvit": "it attends across two branches",
    "deepseek_vit": "it returns a grid of tokens",
    "gemma4_vit": "it pools a grid of tokens",
    "hiera": "it attends within units of a grid",
    "levit": "its blocks work on a grid",
    "mvitv2": "its blocks pool a grid",
    "pit": "its stages pool a grid",
    "qwen3_vit": "it returns a grid of tokens",
    "swin_transformer": "it attends within windows of a grid",
    "swin_transformer_v2": "it attends within windows of a grid",
    "vision_transformer_sam": "it attends within windows of a grid",
    "xcit": "it attends over channels",
}
# Methods that say how tokens get from the image to the output. A class that overrides one of them
# may pool, split or reshape tokens in ways that know nothing of sizes.
TOKEN_METHODS = (
    "forward",
    "forward_features",
    "forward_head",
    "forward_intermediates",
    "get_intermediate_layers",
    "pool",
    "prune_intermediate_layers",
    "_forward_embeds",
    "_pool",
)


@dataclass(frozen=True)
class Form:
    """A class of models, and what its parts become.

    Attributes:
        owners: the class, and subclasses of it whose methods are known.
        mixin: what the model gets.
        blocks, attentions: by their classes, what they get.
    """

    owners: tuple[type, ...]
    mixin: type[PatchedModel]
    blocks: dict[type, type[TimmBlock]]
    attentions: dict[type, type[Swapped]]

    @property
    def supported(self) -> str:
        """What is expected of a model, in words."""
        models, blocks, attentions = (
            " or ".join(part.__qualname__ for part in parts)
            for parts in (self.owners, self.blocks, self.attentions)
        )
        return f"timm's {models} whose blocks are all {blocks} with {attentions}"


ROTARY: dict[type, type[Swapped]] = {
    EvaAttention: TimmRotaryAttention,
    AttentionRope: TimmRotaryAttention,
}
FORMS = (
    Form(
        (VisionTransformer, VisionTransformerDistilled),
        TimmModel,
        {
            Block: TimmBlock,
            ResPostBlock: TimmPostBlock,
            ParallelThingsBlock: TimmParallelThingsBlock,
            ParallelScalingBlock: TimmParallelScalingBlock,
        },
        {Attention: TimmAttention},
    ),
    Form(
        (Eva,),
        TimmModel,
        {EvaBlock: TimmRotaryBlock, EvaBlockPostNorm: TimmRotaryPostBlock},
        ROTARY,
    ),
    Form(
        (NaFlexVit,),
        TimmNaFlexModel,
        {Block: TimmBlock, EvaBlock: TimmRotaryBlock},
        {Attention: TimmAttention, **ROTARY},
    ),
    Form(
        (beit.Beit,),
        TimmBiasModel,
        {beit.Block: TimmBeitBlock},
        {beit.Attention: TimmBeitAttention},
    ),
    Form(
        (VisionTransformerRelPos,),
        TimmBiasModel,
        {
            vision_transformer_relpos.RelPosBlock: TimmRelPosBlock,
            vision_transformer_relpos.ResPostRelPosBlock: TimmRelPosPostBlock,
        },
        {vision_transformer_relpos.RelPosAttention: TimmRelPosAttention},
    ),
)


def find_tower(model: Any) -> Tower:
    """What a timm model is made of; a ValueError that says what is not supported."""
    form = next((form for form in FORMS if isinstance(model, form.owners[0])), None)
    if form is None:
        families = ", ".join(each.owners[0].__name__ for each in FORMS)
        why = OTHERS.get(type(model).__module__.rpartition(".")[2])
        raise ValueError(
            f"model: expected one of timm's {families}, got {class_name(model)}"
            + (f": {why}" if why is not None else "")
        )
    return tower_of(model, form)


def tower_of(model: Any, form: Form) -> Tower:
    """What a model of this form is made of; a ValueError that says what is not supported."""
    blocks, attentions = _check(model, form)
    class_token = getattr(model, "has_class_token", None)
    if class_token is None:
        class_token = model.cls_token is not None
    own_table = getattr(model, "rope_mixed", False) or getattr(model, "rope_is_mixed", False)
    # Modules that make a bias for all layers; in a tuple, or they would become parts of attention.
    windows = (getattr(model, "rel_pos_bias", None), getattr(model, "shared_rel_pos", None))
    windows = tuple(window for window in windows if window is not None)
    further = {"_tome_windows": windows} if windows else {}
    norm: Any = getattr(model, "norm", None)  # MAE's models may have none
    return Tower(
        module=model,
        mixin=form.mixin,
        blocks=[(block, form.blocks[type(block)]) for block in blocks],
        others=[
            *((attn, form.attentions[type(attn)], further) for attn in attentions),
            *([(norm, TokenNorm, {})] if type(norm) not in (nn.Identity, type(None)) else []),
        ],
        num_prefix_tokens=int(model.num_prefix_tokens),
        class_token=bool(class_token),
        block_attributes={"_tome_own_table": True} if own_table else {},
        info={"distill_token": hasattr(model, "dist_token")},
    )


def _check(model: Any, form: Form) -> tuple[list[Any], list[Any]]:
    """Blocks and attentions of a model that can be patched."""
    name, supported = class_name(model), form.supported
    check_not_sharded(model)
    check_own_methods(model, form.owners, TOKEN_METHODS, supported)
    blocks: list[Any] = list(model.blocks)
    inside: list[list[Any]] = []
    for layer, block in enumerate(blocks):
        found = f"{name} with a {type(block).__qualname__} as block {layer}"
        if type(block) not in form.blocks:
            raise ValueError(f"model: expected {supported}, got {found}")
        attentions = form.blocks[type(block)]._tome_attentions(block)
        for attn in attentions:
            if type(attn) not in form.attentions:
                raise ValueError(
                    f"model: expected {supported}, got {found} with {type(attn).__qualname__}"
                )
        inside.append(attentions or [block])
        for attn in inside[-1]:
            drop = attn.attn_drop
            if not attn.fused_attn and type(drop) not in (nn.Dropout, nn.Identity):
                raise ValueError(
                    f"model: expected nn.Dropout or nn.Identity as attn_drop, got {found} with "
                    f"{type(drop).__qualname__}, which would see the attention matrix that merging "
                    "blocks do not build"
                )
    for place in range(max(map(len, inside), default=1)):
        check_blocks(model, blocks, [parts[min(place, len(parts) - 1)] for parts in inside])
    pool: Any = getattr(model, "attn_pool", None)
    if pool is not None and type(pool) is not AttentionPoolLatent:
        raise ValueError(
            f"model: expected AttentionPoolLatent as attention pool, got {name} with "
            f"{type(pool).__qualname__}"
        )
    if pool is not None and pool.pos_embed is not None:
        raise ValueError(
            f"model: got {name} whose attention pool adds position embeddings, which merged "
            "tokens do not have"
        )
    return blocks, [attn for parts in inside for attn in parts if type(attn) in form.attentions]
