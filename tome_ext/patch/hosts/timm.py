"""timm's Vision Transformers: which are supported, and where their blocks, q/k/v and pools are.

Imports timm, so it is itself imported only when a model is patched, or a patched one unpickled.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionPoolLatent, DropPath, LayerNorm
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from ...attention import log_size_bias
from ..common.attention_seam import weighted_mean
from ..common.block import BlockNames, TomeBlock
from ..common.block_call import BlockCall
from ..common.class_swap import Swapped
from ..common.patched_model import PatchedModel, Tower
from ..common.refusals import check_blocks, check_not_sharded, class_name
from ..common.trail import AttentionKind, TokenNorm, Trail, attention_kind

__all__ = ["find_tower"]

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
BLOCK = BlockNames(
    norm1="norm1",
    attn="attn",
    norm2="norm2",
    mlp="mlp",
    scale1="ls1",
    scale2="ls2",
    drop1="drop_path1",
    drop2="drop_path2",
    scale_classes=(LayerScale,),
    drop_classes=(DropPath,),
    norm_classes=(nn.LayerNorm, LayerNorm),
)


def find_tower(model: Any) -> Tower:
    """What a timm model is made of; a ValueError that says what is not supported."""
    blocks = _check(model)
    return Tower(
        module=model,
        mixin=TimmModel,
        blocks=[(block, TimmBlock) for block in blocks],
        others=[
            *((block.attn, TimmAttention, {}) for block in blocks),
            *([(model.norm, TokenNorm, {})] if type(model.norm) is not nn.Identity else []),
        ],
        num_prefix_tokens=int(model.num_prefix_tokens),
        class_token=model.cls_token is not None,
        block_attributes={"_tome_names": BLOCK},
        info={
            "class_token": model.cls_token is not None,
            "distill_token": hasattr(model, "dist_token"),
        },
    )


def _check(model: Any) -> list[Any]:
    """The blocks of a model that can be patched."""
    name = class_name(model)
    if not isinstance(model, VisionTransformer):
        raise ValueError(f"model: expected {SUPPORTED}, got {name}")
    check_not_sharded(model)
    for method in TOKEN_METHODS:
        own = vars(VisionTransformer)[method], vars(VisionTransformerDistilled).get(method)
        if method in vars(model) or getattr(type(model), method) not in own:
            raise ValueError(
                f"model: expected {SUPPORTED}, got {name} with a {method} of its own, which may "
                "treat tokens in ways that do not know their sizes"
            )
    blocks: list[Any] = list(model.blocks)
    for layer, block in enumerate(blocks):
        found = f"{name} with a {type(block).__qualname__} as block {layer}"
        if type(block) is not Block:
            raise ValueError(f"model: expected {SUPPORTED}, got {found}")
        if type(block.attn) is not Attention:
            raise ValueError(
                f"model: expected {SUPPORTED}, got {found} with {type(block.attn).__qualname__}"
            )
        drop = block.attn.attn_drop
        if not block.attn.fused_attn and type(drop) not in (nn.Dropout, nn.Identity):
            raise ValueError(
                f"model: expected nn.Dropout or nn.Identity as attn_drop, got {found} with "
                f"{type(drop).__qualname__}, which would see the attention matrix that merging "
                "blocks do not build"
            )
    check_blocks(model, blocks, [block.attn for block in blocks])
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


def dropout_of(attn: Any) -> float:
    """The probability with which timm drops an attention weight, in the module's present mode."""
    dropping = attn if attn.fused_attn else attn.attn_drop
    return getattr(attn.attn_drop, "p", 0.0) if dropping.training else 0.0


class TimmAttention(Swapped):
    """``timm.layers.Attention`` that weights keys by size and hands over its keys."""

    _tome: Trail

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        call: BlockCall | None = self._tome.call
        if call is None:  # a direct call, or nothing to do in this block
            # is_causal is younger than the oldest timm supported.
            causal = {"is_causal": True} if is_causal else {}
            out: Tensor = super().forward(x, attn_mask=attn_mask, **causal)  # type: ignore[misc]
            return out
        batch, num_tokens, _ = x.shape
        gate = self._modules.get("gate")  # younger than the oldest timm supported
        if gate is not None:
            gate = gate(x).sigmoid()
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        # The attention matrix is never built: without fused attention the numbers are the same, but
        # attn_drop is not called. With it, timm ignores self.scale.
        scale = None if self.fused_attn else self.scale
        x = call.attend(q, k, v, attn_mask, is_causal, dropout_of(self), scale)
        x = self.norm(x.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        out = self.proj_drop(self.proj(x))
        return out


class TimmBlock(TomeBlock):
    """``timm.models.vision_transformer.Block`` that merges between attention and MLP."""

    def _tome_attention_kind(self: Any) -> AttentionKind:
        return attention_kind(self.attn, self.attn.head_dim, dropout_of(self.attn))


def taken_layers(num_layers: int, indices: int | list[int] | None) -> list[int]:
    """The layers whose tokens timm's forward_intermediates takes, in the order it returns them."""
    if indices is None:
        return list(range(num_layers))
    if isinstance(indices, int):
        return list(range(num_layers - indices, num_layers))
    return sorted({index % num_layers for index in indices})


class TimmModel(PatchedModel):
    """``timm.models.VisionTransformer`` whose pooling and feature maps know of merged tokens."""

    def forward_features(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        return self._tome.finish(x)

    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        kind = self.global_pool if pool_type is None else pool_type
        counts = self.attn_pool is not None or kind in ("avg", "avgmax")
        size = self._tome.size_of(x) if counts else None
        if size is None:
            return super().pool(x, pool_type)  # type: ignore[misc]
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        x, size = x[:, first:], size[:, first:]
        if self.attn_pool is not None:
            counted = self._tome.rules.method.proportional
            return self.attn_pool(x, attn_mask=log_size_bias(size, x.dtype) if counted else None)
        mean = weighted_mean(x, size)
        return mean if kind == "avg" else 0.5 * (x.amax(1) + mean)

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **masks: Any,
    ) -> Any:
        """As timm's; every intermediate is spread over the original tokens."""
        if self._tome.rules.idle:
            return super().forward_intermediates(  # type: ignore[misc]
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt,
                intermediates_only, output_dict, **masks,
            )  # fmt: skip
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        prefix = self.num_prefix_tokens
        # timm's loop, asked for plain token sequences and then finished here.
        final, taken = super().forward_intermediates(  # type: ignore[misc]
            x, indices, True, norm, stop_early, "NLC", **masks
        )
        layers = taken_layers(len(self.blocks), indices)
        maps, prefixes = [], []
        for layer, item in zip(layers, taken, strict=True):
            tokens = torch.cat((item[1], item[0]), dim=1) if prefix else item
            plan = self._tome.current.plan_after(layer + 1)
            if plan is not None:
                tokens = plan.unmerge(tokens)
            prefixes.append(tokens[:, :prefix])
            maps.append(tokens[:, prefix:])
        if output_fmt == "NCHW":
            height, width = self.patch_embed.dynamic_feat_size(x.shape[-2:])
            maps = [
                y.reshape(y.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous()
                for y in maps
            ]
        final = self._tome.finish(final)
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": maps}
            if prefix and return_prefix_tokens:
                result["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                result["image_features"] = final
            return result
        out: list[Any] = maps
        if prefix and return_prefix_tokens:
            out = list(zip(maps, prefixes, strict=True))
        return out if intermediates_only else (final, out)

    def prune_intermediate_layers(self: Any, *args: Any, **kwargs: Any) -> list[int]:
        """As timm's; the layers that stay keep the number of tokens they remove."""
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self._tome.rules = self._tome.rules.truncated(len(self.blocks))
        return kept
