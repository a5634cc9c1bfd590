"""timm's models for the host contract; ``models.py`` has more of its plain Vision Transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from host_cases import Case, Inputs, loud
from models import DEPTH, GRID, VARIANTS, images, paired_images, tiny, without_positions
from timm.models import beit, eva, naflexvit, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

RELPOS = vision_transformer_relpos.VisionTransformerRelPos
BIASED = (beit.Beit, RELPOS)
TOKENS = GRID * GRID
LAYERS = 3
SMALL: dict[str, Any] = {
    "img_size": 4 * GRID,
    "patch_size": 4,
    "embed_dim": 32,
    "num_heads": 2,
    "depth": LAYERS,
    "num_classes": 5,
}


def _inputs(batch: int, seed: int) -> Inputs:
    return {"x": images(batch, seed=seed)}


def _paired_images(inputs: Inputs) -> Inputs:
    x = inputs["x"]
    return {"x": paired_images(len(x), dtype=x.dtype)}


def _paired(model: Any, inputs: Inputs) -> Inputs:
    without_positions(model)
    return _paired_images(inputs)


def _hidden(batch: int, seed: int, noise: float) -> Inputs:
    x = images(batch, seed=seed)
    x[..., 20:, :] += noise  # patches from row 5 on: tokens 41 and later
    shown = torch.ones(batch, 1, 1, TOKENS + 1, dtype=torch.bool)
    shown[..., 41:] = False
    return {"x": x, "attn_mask": shown}


def _logits(y: Tensor) -> Tensor:
    return y


def _plain(name: str) -> Case:
    options = VARIANTS[name]

    def make() -> nn.Module:
        return tiny(**options)

    model = make()
    prefix = model.num_prefix_tokens
    return Case(
        f"timm: {name}",
        make,
        _inputs,
        _logits,
        prefix + TOKENS,
        prefix,
        DEPTH,
        class_token=model.cls_token is not None,
        equal_tokens=_paired,
        hidden=_hidden if prefix == 1 else None,
    )


def _made(cls: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return loud(cls(**{**SMALL, **options}))


EVA_TAKES_MASKS = "attn_mask" in inspect.signature(eva.Eva.forward).parameters  # not the oldest's


def _case(
    name: str, cls: Callable[..., nn.Module], equal_tokens: Any = _paired, **options: Any
) -> Case:
    make = partial(_made, cls, options)
    model: Any = make()
    prefix = model.num_prefix_tokens
    return Case(
        f"timm: {name}",
        make,
        _inputs,
        _logits,
        prefix + TOKENS,
        prefix,
        LAYERS,
        class_token=model.cls_token is not None,
        equal_tokens=equal_tokens,
        hidden=_hidden if prefix == 1 and cls is eva.Eva and EVA_TAKES_MASKS else None,
        attention="does more than hide keys" if cls in BIASED else "tome::attention",
    )


# --- rotary positions: tokens that are paired share their row of the table -----------------------


def _paired_rotary(model: Any, inputs: Inputs) -> Inputs:
    if model.pos_embed is not None:
        without_positions(model)
    _pair_table(model, model.rope.get_embed())
    return _paired_images(inputs)


def _pair_table(model: Any, table: Tensor) -> None:
    """Give the model a table, (P, 2D) or (depth, H, P, 2D), whose rows are equal pair by pair."""
    table = table.detach().double().clone()
    table[..., 1::2, :] = table[..., ::2, :]
    pairs = table.unflatten(-1, (2, -1))  # made in float32, so not quite of length 1
    table = (pairs / pairs.square().sum(-2, keepdim=True).sqrt()).flatten(-2)
    model.rope.get_embed = lambda *_, **__: table


def _eva(name: str, **options: Any) -> Case:
    options = {"use_rot_pos_emb": True, **options}
    rotary = _paired_rotary if options["use_rot_pos_emb"] else _paired
    return _case(name, eva.Eva, rotary, **options)


EVA = [
    _eva("EVA, no rotation, avg", use_rot_pos_emb=False, init_values=0.5, qkv_bias=True),
    _eva(
        "EVA-02, SwiGLU, norm inside attention, avg",
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        ref_feat_shape=(4, 4),
    ),
    _eva(
        "DINOv3",
        global_pool="token",
        num_reg_tokens=4,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        rope_rotate_half=True,
        init_values=0.5,
        qkv_bias=False,
    ),
    _eva(
        "PE, attention pool",
        global_pool="map",
        attn_type="rope",
        use_pre_transformer_norm=True,
        rope_grid_indexing="xy",
    ),
    *(
        _eva("EVA, grouped queries", attn_type="rope", qkv_fused=False, qk_norm=True, **grouped)
        for grouped in [{"num_kv_heads": 1}]
        if grouped.keys() <= inspect.signature(eva.Eva).parameters.keys()  # younger than the oldest
    ),
    _eva(
        "RoPE mixed, no class token",
        class_token=False,
        attn_type="rope",
        rope_type="mixed",
        no_embed_class=True,
        use_abs_pos_emb=False,
        init_values=0.5,
    ),
    *(
        _eva("EVA post norm", use_post_norm=True, global_pool="token")
        for block in [eva.EvaBlockPostNorm]  # which older versions cannot make
        if "swiglu_align_to" in inspect.signature(block).parameters
    ),
]

# --- relative positions: tokens that are paired share their rows and columns ----------------------


def _paired_bias(model: Any, inputs: Inputs) -> Inputs:
    if getattr(model, "pos_embed", None) is not None:
        without_positions(model)
    for module in model.modules():
        index = getattr(module, "relative_position_index", None)
        if index is None:
            continue
        side = round(index.numel() ** 0.5)
        square, first = index.view(side, side), side - TOKENS
        square[first + 1 :: 2] = square[first::2].clone()
        square[:, first + 1 :: 2] = square[:, first::2].clone()
    return _paired_images(inputs)


BIAS = [
    _case("BEiT", beit.Beit, _paired_bias, use_rel_pos_bias=True, init_values=0.5),
    _case(
        "BEiT, shared, token",
        beit.Beit,
        _paired_bias,
        use_rel_pos_bias=True,
        use_shared_rel_pos_bias=True,
        global_pool="token",
    ),
    _case("relative positions, MLP", RELPOS, _paired_bias, class_token=True, qk_norm=True),
    _case(
        "relative positions, shared, post norm",
        RELPOS,
        _paired_bias,
        rel_pos_type="bias",
        shared_rel_pos=True,
        block_fn=vision_transformer_relpos.ResPostRelPosBlock,
    ),
]

# --- plain models of other blocks -----------------------------------------------------------------

VIT = vision_transformer.VisionTransformer
BLOCKS = [
    _case("post norm", VIT, block_fn=vision_transformer.ResPostBlock, init_values=0.5),
    _case(
        "parallel attentions",
        VIT,
        block_fn=vision_transformer.ParallelThingsBlock,
        init_values=0.5,
    ),
    _case(
        "attention beside MLP",
        VIT,
        block_fn=vision_transformer.ParallelScalingBlock,
        class_token=False,
        global_pool="avg",
        qk_norm=True,
    ),
]

# --- NaFlexVit ------------------------------------------------------------------------------------


def naflex(options: dict[str, Any]) -> nn.Module:
    settings = {
        "patch_size": 4,
        "embed_dim": 32,
        "num_heads": 2,
        "depth": LAYERS,
        "pos_embed_grid_size": (GRID, GRID),
        **options,
    }
    torch.manual_seed(0)
    return loud(naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**settings), num_classes=5))


def packed(batch: int, seed: int, noise: float = 0.0, total: int = TOKENS) -> Inputs:
    """Patches of pictures of 8 x 5, the rest of ``total`` tokens padded with ``noise``."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.full((batch, total, 48), noise)
    patches[:, :40] = torch.randn(batch, 40, 48, generator=generator)
    rows = torch.arange(total)
    valid = rows < 40
    coord = torch.stack((rows // 5, rows % 5), dim=1) * valid.unsqueeze(1)
    return {
        "x": patches,
        "patch_coord": coord.expand(batch, -1, -1),
        "patch_valid": valid.expand(batch, -1),
    }


def _paired_naflex(model: Any, inputs: Inputs) -> Inputs:
    if model.embeds.pos_embed is not None:
        model.embeds.pos_embed.data.zero_()
    if model.rope is not None:
        _pair_table(model, model.rope.get_embed(shape=(GRID, GRID)))
    return _paired_images(inputs)


def _flexible(name: str, **options: Any) -> Case:
    make = partial(naflex, options)
    model: Any = make()
    prefix = model.num_prefix_tokens
    return Case(
        f"timm: {name}",
        make,
        _inputs,
        _logits,
        prefix + TOKENS,
        prefix,
        LAYERS,
        class_token=model.has_class_token,
        equal_tokens=_paired_naflex,
        hidden=packed,
    )


FLEX = [
    _flexible("NaFlex, avg", class_token=True, global_pool="avg"),
    _flexible(
        "NaFlex, avgmax, prefix", reg_tokens=2, global_pool="avgmax", pool_include_prefix=True
    ),
    _flexible("NaFlex, attention pool", global_pool="map"),
    _flexible("NaFlex, rotary", rope_type="axial", class_token=True, global_pool="token"),
    _flexible("NaFlex, mixed", rope_type="mixed", pos_embed="none", global_pool="avg"),
]

CASES = [
    *(
        _plain(name)
        for name in ("plain", "registers, layer scale", "no class token, avg", "attention pool")
    ),
    *EVA,
    *BIAS,
    *BLOCKS,
    *FLEX,
]
