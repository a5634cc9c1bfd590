"""What all of timm's towers share: pools, feature maps, and the blocks of a plain ViT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.nn import functional as F

from ...attention import log_size_bias
from ..common.attention_seam import SizedAttention, SizedCall, weighted_mean
from ..common.block import BlockNames, TomeBlock
from ..common.block_call import BlockCall
from ..common.methods import Ranks
from ..common.module_calls import applied
from ..common.patched_model import PatchedModel
from ..common.token_state import recorded, taken_layers
from ..common.trail import AttentionKind, Trail, attention_kind

__all__ = [
    "BLOCK",
    "TimmAttention",
    "TimmBlock",
    "TimmModel",
    "TimmParallelScalingBlock",
    "TimmParallelThingsBlock",
    "TimmPostBlock",
    "as_maps",
    "asks_sizes",
    "attended",
    "dropout_of",
    "head_dim_of",
    "packed_qkv",
    "pooled",
    "pruned",
    "spread_intermediates",
    "unpacked",
]

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


# --- attention ------------------------------------------------------------------------------------


def dropout_of(attn: Any) -> float:
    """The probability with which timm drops an attention weight, in the module's present mode."""
    drop = attn.attn_drop
    dropping = attn if attn.fused_attn else drop
    return getattr(drop, "p", 0.0) if dropping.training else 0.0


def head_dim_of(attn: Any) -> int:
    """Channels of a head; not all attentions say so, nor did EvaAttention in older timm."""
    head_dim = getattr(attn, "head_dim", None)
    return attn.proj.in_features // attn.num_heads if head_dim is None else head_dim


def packed_qkv(attn: Any, x: Tensor) -> Tensor:
    """q, k and v side by side, (B, M, 3C) of x (B, M, C); their biases may be apart."""
    if getattr(attn, "q_bias", None) is None:
        out: Tensor = attn.qkv(x)
        return out
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if getattr(attn, "qkv_bias_separate", False):
        return attn.qkv(x) + bias
    return F.linear(x, attn.qkv.weight, bias)


def unpacked(attn: Any, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, H, M, D), views of (B, M, 3C); q and k normed where the module does so."""
    batch_size, num_tokens, channels = qkv.shape
    heads = attn.num_heads
    qkv = qkv.reshape(batch_size, num_tokens, 3, heads, channels // (3 * heads))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    modules = attn._modules
    return applied(modules.get("q_norm"), q), applied(modules.get("k_norm"), k), v


def attended(
    attn: Any,
    call: BlockCall | SizedCall,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """What an attention module makes of its input x (B, M, C), given q, k and v."""
    modules = attn._modules
    gate = modules.get("gate")  # younger than the oldest timm supported
    if gate is not None:
        gate = gate(x).sigmoid()
    # The attention matrix is never built: without fused attention the numbers are the same, but
    # attn_drop is not called. With it, timm ignores the module's scale.
    scale = None if attn.fused_attn else attn.scale
    y = call.attend(q, k, v, attn_mask, is_causal, dropout_of(attn), scale, bias=bias)
    y = y.transpose(1, 2).flatten(2)
    y = applied(modules.get("norm"), y)
    if gate is not None:
        y = y * gate
    return applied(modules["proj_drop"], modules["proj"](y))


class TimmAttention(SizedAttention):
    """``timm.layers.Attention`` that weights keys by size and hands over its keys."""

    def _tome_attended(
        self: Any,
        call: BlockCall,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        q, k, v = unpacked(self, self._modules["qkv"](x))
        return attended(self, call, x, q, k, v, attn_mask, is_causal)


# --- blocks ---------------------------------------------------------------------------------------


class TimmBlock(TomeBlock):
    """``timm.models.vision_transformer.Block`` that merges between attention and MLP."""

    _tome_names = BLOCK

    @staticmethod
    def _tome_attentions(block: Any) -> list[Any]:
        """The attention modules of an unpatched block."""
        return [block.attn]

    def _tome_attention_kind(self: Any) -> AttentionKind:
        attn = self.attn
        return attention_kind(attn, head_dim_of(attn), dropout_of(attn))


class TimmPostBlock(TimmBlock):
    """``timm.models.vision_transformer.ResPostBlock`` that merges inside."""

    _tome_names = replace(BLOCK, order="post", scale1=None, scale2=None)


class TimmParallelThingsBlock(TimmBlock):
    """``ParallelThingsBlock``: several attentions side by side, then several MLPs.

    Merges between the two, by the keys of all attentions.
    """

    _tome_names = BlockNames("", "", "", "", order="own")

    @staticmethod
    def _tome_attentions(block: Any) -> list[Any]:
        return [branch.attn for branch in block.attns]

    def _tome_attention_kind(self: Any) -> AttentionKind:
        attn = self.attns[0].attn
        return attention_kind(attn, attn.head_dim, dropout_of(attn))

    def _tome_reduce(
        self: Any, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        trail: Trail = self._tome
        branches: list[Tensor] = []
        ranks: list[Ranks] = []
        for part in self.attns:
            y = trail.within(call, part.attn, part.norm(x), *args, **kwargs)
            branches.append(part.drop_path(part.ls(y)))
            if call.ranks is not None:
                ranks.append(call.ranks)
        # More heads, over which matching and the class token's attention take the mean.
        metrics = [each.metric for each in ranks if each.metric is not None]
        scores = [each.scores for each in ranks if each.scores is not None]
        if ranks:
            call.ranks = Ranks(
                torch.cat(metrics, dim=1) if metrics else None,
                torch.stack(scores).mean(0) if scores else None,
            )
        branch = torch.stack(branches).sum(dim=0)
        x = call.merge(x + branch, branch)
        return x + torch.stack([part(x) for part in self.ffns]).sum(dim=0)


class TimmParallelScalingBlock(TimmBlock):
    """``ParallelScalingBlock``: attention and MLP side by side, so that it merges at its end."""

    _tome_names = BlockNames("", "", "", "", order="own")

    @staticmethod
    def _tome_attentions(block: Any) -> list[Any]:
        return []

    def _tome_attention_kind(self: Any) -> AttentionKind:
        return attention_kind(self, self.head_dim, dropout_of(self))

    def _tome_stay(
        self: Any, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        given = {**dict(zip(("attn_mask", "is_causal"), args, strict=False)), **kwargs}
        hidden, q, k, v = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        q, k, v = (y.unflatten(-1, (self.num_heads, self.head_dim)) for y in (q, k, v))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))
        scale = None if self.fused_attn else self.scale
        y = call.attend(
            q,
            k,
            v,
            given.get("attn_mask"),
            given.get("is_causal", False),
            dropout_of(self),
            scale,
        )
        y = y.transpose(1, 2).flatten(2)
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if getattr(self, "out_proj", None) is not None:
            y = self.out_proj(torch.cat((y, hidden), dim=-1))
        else:
            y = self.attn_out_proj(y) + self.mlp_out_proj(hidden)
        out: Tensor = x + self.drop_path(self.ls(y))
        return out

    def _tome_reduce(
        self: Any, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        return call.merge(self._tome_stay(call, x, args, kwargs), None)


# --- models ---------------------------------------------------------------------------------------


class TimmModel(PatchedModel):
    """A timm model whose pooling and feature maps know of merged tokens."""

    def forward_features(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        return self._tome.finish(x, sized=self._tome_asks(x))

    def _tome_asks(self: Any, x: Tensor) -> bool:
        """Whether the model's head asks for the sizes of its tokens x (B, M, C)."""
        return asks_sizes(self, self.global_pool, x)

    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        kind = self.global_pool if pool_type is None else pool_type
        size = self._tome.size_of(x) if asks_sizes(self, kind, x) else None
        if size is None:
            return super().pool(x, pool_type)  # type: ignore[misc]
        # Eva has no such setting: its attention pool takes the prefix, its averages do not.
        with_prefix = getattr(self, "pool_include_prefix", self.attn_pool is not None)
        first = 0 if with_prefix else self.num_prefix_tokens
        x, size = x[:, first:], size[:, first:]
        if self.attn_pool is not None:
            counted = self._tome.rules.method.proportional
            return self.attn_pool(x, attn_mask=log_size_bias(size, x.dtype) if counted else None)
        return pooled(x, size, kind)

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
            if output_dict:  # which not all models know
                masks["output_dict"] = True
            return super().forward_intermediates(  # type: ignore[misc]
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt,
                intermediates_only, **masks,
            )  # fmt: skip
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        prefix = self.num_prefix_tokens
        # timm's loop, asked for plain token sequences and then finished here.
        final, taken = super().forward_intermediates(  # type: ignore[misc]
            x, indices, prefix > 0, norm, stop_early, "NLC", **masks
        )
        tokens = [torch.cat((y[1], y[0]), dim=1) if prefix else y for y in taken]
        prefixes, maps = spread_intermediates(self, tokens, indices)
        if output_fmt == "NCHW":
            maps = as_maps(maps, *self.patch_embed.dynamic_feat_size(x.shape[-2:]))
        final = self._tome.finish(final, sized=self._tome_asks(final))
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
        return pruned(self, super().prune_intermediate_layers(*args, **kwargs))  # type: ignore[misc]


def asks_sizes(model: Any, kind: str, x: Tensor) -> bool:
    """Whether a pool of x (B, M, C) of that kind, or by attention, is another by the sizes."""
    if model.attn_pool is not None or kind in ("avg", "avgmax"):
        return True
    if kind != "max":
        return False
    # A maximum has to know of rows that are no tokens.
    tokens = None if torch.compiler.is_compiling() else recorded(x)
    rules = model._tome.rules if tokens is None else tokens.rules
    return rules.settings.threshold is not None


def pooled(x: Tensor, size: Tensor, kind: str) -> Tensor:
    """Tokens (B, M, C) by "avg", "avgmax" or "max"; rows of size (B, M) 0 are none."""
    if kind == "avg":
        return weighted_mean(x, size)
    none = (size == 0).unsqueeze(2)
    highest = x.masked_fill(none, torch.finfo(x.dtype).min).amax(1)
    return highest if kind == "max" else 0.5 * (highest + weighted_mean(x, size))


def pruned(model: Any, kept: list[int]) -> list[int]:
    """``kept`` as it is, after the last layers of ``model`` are gone."""
    model._tome.rules = model._tome.rules.truncated(len(model.blocks))
    return kept


def spread_intermediates(
    model: Any, tokens: list[Tensor], indices: int | list[int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Prefix and patches of tokens (B, M, C) after the layers ``indices``, all tokens of each."""
    prefix = model.num_prefix_tokens
    layers = taken_layers(len(model.blocks), indices)
    current = model._tome.current
    tokens = [current.unmerge(y, layer + 1) for layer, y in zip(layers, tokens, strict=True)]
    return [y[:, :prefix] for y in tokens], [y[:, prefix:] for y in tokens]


def as_maps(maps: list[Tensor], height: int, width: int) -> list[Tensor]:
    """Patches (B, N, C) as (B, C, height, width)."""
    return [y.reshape(y.shape[0], height, width, -1).permute(0, 3, 1, 2).contiguous() for y in maps]
