"""Patching timm's Vision Transformers: which models are supported."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..schedule import KeepRate, Method, Schedule
from ._engine import Engine, Settings
from ._swap import swap

__all__ = ["timm"]

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
)
SUPPORTED = (
    "timm's VisionTransformer or VisionTransformerDistilled whose blocks are all "
    "vision_transformer.Block with Attention"
)


def timm(
    model: nn.Module,
    r: Schedule = 0,
    prop_attn: bool = True,
    trace_source: bool = False,
    *,
    method: Method = "tome",
    keep_rate: KeepRate | None = None,
    normalize_fused: bool = False,
    fused_weight_grad: bool = False,
) -> Any:
    """Patch a timm Vision Transformer, so that its blocks go on with fewer tokens.

    Each block reduces its tokens between attention and MLP, by one of three methods:

    - "tome" merges similar tokens (Bolya et al., *Token Merging: Your ViT But Faster*, ICLR 2023;
      arXiv 2210.09461); the metric is the mean of the keys over heads.
    - "topk" keeps the patch tokens that the class token attends to most, on average over heads, and
      drops the others. Those that stay keep their order.
    - "evit" does so too, but fuses the others into one token, at the end: the sum of their
      features, weighted by the class token's attention (Liang et al., *Not All Patches are What You
      Need*, ICLR 2022; arXiv 2202.07800). In later blocks it is a patch token like any other.

    The model is changed in place: it keeps its parameters, hooks and ``state_dict``. With ``r=0``
    it computes what it did before. ``model.r`` and ``model.keep_rate`` change later how many tokens
    go.

    ``forward_features`` returns the merged tokens (B, M, C); ``model.tome`` has their sizes and
    their plan. ``forward_intermediates`` and ``get_intermediate_layers`` return maps of the
    usual shape, in which merged tokens share their value and dropped ones are 0. Average pooling
    and attention pooling weight merged tokens by size, as if over the original tokens; after
    pruning they are over the tokens that are left.

    In blocks that reduce tokens, and in those behind them, no attention matrix is built, whatever
    ``fused_attn`` says: ``torch.ops.tome.attention`` computes attention, or
    ``F.scaled_dot_product_attention`` where that cannot (attention dropout while training, masks
    that do more than hide keys); ``tome_ext.info(model)`` says which and why. Hooks on
    ``attn_drop``, which would see the matrix, do not run there.

    Args:
        model: a :class:`timm.models.VisionTransformer` or ``VisionTransformerDistilled`` whose
            blocks are all ``vision_transformer.Block`` with ``Attention`` (vit, deit, deit3,
            dinov2, siglip, clip, so150m, ...). If it is patched already, its settings are
            replaced.
        r: tokens to remove per layer: an int, ``(r, inflection)`` or a list; see
            :func:`tome_ext.schedule.parse_r`.
        prop_attn: add log(size) of each key token to the logits (proportional attention). The
            paper finds it better for models trained with labels, worse for MAE off the shelf. Only
            "tome" has sizes.
        trace_source: fill ``model._tome_info["source"]``, as code written for the published
            patch expects. New code uses ``model.tome.plan``, which is there in any case.
        method: "tome", "evit" or "topk", as above. The latter two need a class token.
        keep_rate: instead of ``r``, the share of patch tokens to keep, rounded up: a float for the
            layers after a quarter, a half and three quarters of the model (4, 7 and 10 of 12), or a
            list with one per layer; see :func:`tome_ext.schedule.parse_keep_rate`. EViT's fused
            token comes on top, whereas ``r`` counts it: there r + 1 tokens become one.
        normalize_fused: of "evit", divide the weights by their sum, so that the fused token is a
            mean. Published models are trained without.
        fused_weight_grad: of "evit", let gradients flow through the weights, as the published code
            does in training. Costs a pass over the tokens in each block that fuses.

    Returns:
        The model. As a context manager it removes the patch at the end:
        ``with tome_ext.patch.timm(model, r=8): ...``.

    Raises:
        ValueError: the model or a block is of a kind that is not supported (the message names
            it), or a setting is wrong. Nothing is changed.
        ImportError: timm is not installed.
    """
    try:
        from ._timm_modules import TimmAttention, TimmBlock, TimmModel
    except ImportError as error:
        raise ImportError("patch.timm needs timm >= 1.0.20: pip install timm") from error
    patched = isinstance(model, TimmModel)
    blocks = [] if patched else _check(model)
    engine = model._tome if isinstance(model, TimmModel) else _new_engine(model)
    settings = Settings(
        method, bool(prop_attn), bool(trace_source), bool(normalize_fused), bool(fused_weight_grad)
    )
    if method in ("evit", "topk") and not engine.extra_info["class_token"]:
        raise ValueError(
            f"method: {method!r} ranks tokens by the class token's attention, and this "
            "model has no class token; expected one that has, or method='tome'"
        )
    engine.configure(settings, r, keep_rate)  # refuses before any module is touched
    for layer, block in enumerate(blocks):
        swap(block.attn, TimmAttention)
        swap(block, TimmBlock, _tome=engine, _tome_layer=layer)
    if not patched:
        swap(model, TimmModel, _tome=engine)
    return model


def _new_engine(model: Any) -> Engine:
    info = {
        "class_token": model.cls_token is not None,
        "distill_token": hasattr(model, "dist_token"),
    }
    return Engine(len(model.blocks), int(model.num_prefix_tokens), info)


def _check(model: Any) -> list[Any]:
    """The blocks of a model that can be patched; a ValueError that names what is wrong if not."""
    from timm.layers import AttentionPoolLatent
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model: expected {SUPPORTED}, got {name}")
    if any(base.__name__ == "FSDPModule" for base in type(model).__mro__):
        raise ValueError(
            f"model: expected a model that is not sharded yet, got {name}; patch first, then call "
            "fully_shard"
        )
    for method in TOKEN_METHODS:
        own = vars(VisionTransformer)[method], vars(VisionTransformerDistilled).get(method)
        if method in vars(model) or getattr(type(model), method) not in own:
            raise ValueError(
                f"model: expected {SUPPORTED}, got {name} with a {method} of its own, which may "
                "treat tokens in ways that do not know their sizes"
            )
    if len(model.blocks) == 0:
        raise ValueError(f"model: expected at least one block, got {name} with none")
    blocks = list(model.blocks)
    for layer, block in enumerate(blocks):
        found = f"{name} with a {type(block).__qualname__} as block {layer}"
        if type(block) is not Block:
            raise ValueError(f"model: expected {SUPPORTED}, got {found}")
        if type(block.attn) is not Attention:
            raise ValueError(
                f"model: expected {SUPPORTED}, got {found} with {type(block.attn).__qualname__}"
            )
        if "forward" in vars(block) or "forward" in vars(block.attn):
            raise ValueError(f"model: got {found}, whose forward or whose attention's is replaced")
        drop = block.attn.attn_drop
        if not block.attn.fused_attn and type(drop) not in (nn.Dropout, nn.Identity):
            raise ValueError(
                f"model: expected nn.Dropout or nn.Identity as attn_drop, got {found} with "
                f"{type(drop).__qualname__}, which would see the attention matrix that merging "
                "blocks do not build"
            )
        if any(block is other for other in blocks[:layer]):
            raise ValueError(f"model: expected blocks of their own, got {found}, which came before")
    pool: Any = model.attn_pool
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
    return blocks
