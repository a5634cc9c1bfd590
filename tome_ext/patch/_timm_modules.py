"""timm's Vision Transformers: where their blocks, q/k/v, residual and pooling are.

Imports timm, so it is itself imported only when a model is patched, or a patched one unpickled.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, LayerNorm
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from .. import ops
from ..attention import autocasts, log_size_bias
from ..reference import accumulate_dtype
from ._engine import AttentionKind
from ._model import PatchedModel
from ._step import Step
from ._swap import Swapped

__all__ = ["TimmAttention", "TimmBlock", "TimmModel"]

# Modules between attention and MLP whose forward ``tome::merge_add_norm`` computes.
SCALES = (nn.Identity, LayerScale)
DROPS = (nn.Identity, DropPath)
NORMS = (nn.LayerNorm, LayerNorm)


def dropout_of(attn: Any) -> float:
    """The probability with which timm drops an attention weight, in the module's present mode."""
    dropping = attn if attn.fused_attn else attn.attn_drop
    return getattr(attn.attn_drop, "p", 0.0) if dropping.training else 0.0


class TimmAttention(Swapped):
    """``timm.layers.Attention`` that weights keys by size and hands over its keys."""

    # Without ``tome`` (a direct call, or nothing to do in this block) it is timm's own.
    def forward(
        self: Any,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        tome: Step | None = None,
    ) -> Tensor:
        if tome is None or not tome.active:
            # is_causal is younger than the oldest timm supported.
            causal = {"is_causal": True} if is_causal else {}
            return super().forward(x, attn_mask=attn_mask, **causal)  # type: ignore[misc]
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
        x = tome.attend(q, k, v, attn_mask, is_causal, dropout_of(self), scale)
        x = self.norm(x.transpose(1, 2).flatten(2))
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))


class TimmBlock(Swapped):
    """``timm.models.vision_transformer.Block`` that merges between attention and MLP."""

    def forward(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        step = self._tome.enter(self._tome_layer, x)
        attended = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal, tome=step)
        x, normed = merged_and_normed(self, step, x, attended)
        del attended  # or its memory would be held until the MLP is done
        return step.leave(x + self.drop_path2(self.ls2(self.mlp(normed))))


def merged_and_normed(block: Any, step: Step, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
    """What lies between attention and MLP: the merged tokens (B, M, C), and their norm."""
    modules = block._modules  # nn.Module's own lookup takes microseconds for each
    scale, drop, norm = modules["ls1"], modules["drop_path1"], modules["norm2"]
    if step.averages and folds(scale, drop, norm):
        gamma = scale.gamma if type(scale) is LayerScale else None
        weight, bias = norm.weight, norm.bias
        if fit(x, attended, gamma, weight, bias):
            return step.merge_add_norm(x, attended, gamma, weight, bias, norm.eps)
    x = step.merge(x + drop(scale(attended)))
    return x, norm(x)


def folds(scale: nn.Module, drop: Any, norm: Any) -> bool:
    """Whether modules between attention and MLP do what ``tome::merge_add_norm`` does.

    They do unless one drops paths, is of another class or has hooks, which must see its input or
    output.
    """
    if type(scale) not in SCALES or type(drop) not in DROPS or type(norm) not in NORMS:
        return False
    if len(norm.normalized_shape) != 1 or observed(scale) or observed(drop) or observed(norm):
        return False
    return type(drop) is nn.Identity or not drop.training or drop.drop_prob == 0


def observed(module: Any) -> bool:
    """Whether calling the module does more than its class's forward."""
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def fit(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors may go to a kernel as they are.

    Not if autocast or several dtypes are at work, whose conversions are torch's to choose.
    """
    if ops.device_kind(x) not in ops.kernel_devices or autocasts(x):
        return False
    dtype = x.dtype
    for other in others:  # noqa: SIM110  (a generator takes as long as all the rest)
        if other is not None and other.dtype != dtype:
            return False
    return True


class TimmModel(PatchedModel):
    """``timm.models.VisionTransformer`` whose pooling and feature maps know of merged tokens."""

    def forward_features(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
        self._tome.attach(x)
        return x

    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        size = self._tome.size_of(x)
        kind = self.global_pool if pool_type is None else pool_type
        if size is None or (self.attn_pool is None and kind not in ("avg", "avgmax")):
            return super().pool(x, pool_type)  # type: ignore[misc]
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        x, size = x[:, first:], size[:, first:]
        if self.attn_pool is not None:
            bias = log_size_bias(size, x.dtype) if self._tome.proportional else None
            return self.attn_pool(x, attn_mask=bias)
        work = accumulate_dtype(x.dtype)
        weight = size.to(work) / size.sum(1, keepdim=True, dtype=work)
        mean = (x * weight.unsqueeze(-1)).sum(1).to(x.dtype)
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
        if self._tome.first_layer == self._tome.num_layers:
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
        layers = sorted(set(feature_take_indices(len(self.blocks), indices)[0]))
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
        self._tome.attach(final)
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

    def _tome_attention(self: Any, layer: int) -> AttentionKind:
        attn = self.blocks[layer].attn
        weight = next(attn.parameters())
        return AttentionKind(weight.device.type, weight.dtype, attn.head_dim, dropout_of(attn))

    def prune_intermediate_layers(self: Any, *args: Any, **kwargs: Any) -> list[int]:
        """As timm's; the layers that stay keep the number of tokens they remove."""
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self._tome.truncate(len(self.blocks))
        return kept
