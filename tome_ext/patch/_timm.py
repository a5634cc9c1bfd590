"""timm's Vision Transformers: where their blocks, q/k/v, residual and pooling are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..attention import log_size_bias
from ..reference import accumulate_dtype
from ..schedule import Schedule
from ._engine import AttentionKind, Engine, Step
from ._model import PatchedModel
from ._swap import Swapped, swap

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
    model: nn.Module, r: Schedule = 0, prop_attn: bool = True, trace_source: bool = False
) -> Any:
    """Patch a timm Vision Transformer, so that its blocks merge similar tokens.

    Each block removes up to ``r`` tokens between attention and MLP (Bolya et al., *Token Merging:
    Your ViT But Faster*, ICLR 2023; arXiv 2210.09461); the metric is the mean of the keys over
    heads. The model is changed in place: it keeps its parameters, hooks and ``state_dict``.
    With ``r=0`` it computes what it did before. ``model.r`` changes ``r`` later.

    ``forward_features`` returns the merged tokens (B, M, C); ``model.tome`` has their sizes and
    their plan. ``forward_intermediates`` and ``get_intermediate_layers`` return maps of the
    usual shape, in which merged tokens share their value. Average pooling and attention pooling
    weight tokens by size, as if over the original tokens.

    In blocks that merge, and in those behind them, no attention matrix is built, whatever
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
            paper finds it better for models trained with labels, worse for MAE off the shelf.
        trace_source: fill ``model._tome_info["source"]``, as code written for the published
            patch expects. New code uses ``model.tome.plan``, which is there in any case.

    Returns:
        The model. As a context manager it removes the patch at the end:
        ``with tome_ext.patch.timm(model, r=8): ...``.

    Raises:
        ValueError: the model or a block is of a kind that is not supported (the message names
            it), or ``r`` is wrong. Nothing is changed.
        ImportError: timm is not installed.
    """
    patched = isinstance(model, TimmModel)
    blocks = [] if patched else _check(model)
    engine = model._tome if isinstance(model, TimmModel) else _new_engine(model)
    engine.r = r  # refuses a wrong r before any module is touched
    engine.prop_attn = bool(prop_attn)
    engine.trace_source = bool(trace_source)
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
    try:
        from timm.layers import AttentionPoolLatent
        from timm.models.deit import VisionTransformerDistilled
        from timm.models.vision_transformer import Attention, Block, VisionTransformer
    except ImportError as error:
        raise ImportError("patch.timm needs timm >= 1.0.20: pip install timm") from error

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
        gate = getattr(self, "gate", None)
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
    if step.r > 0 and folds(block, x, attended):
        norm, scale = block.norm2, getattr(block.ls1, "gamma", None)
        return step.merge_add_norm(x, attended, scale, norm.weight, norm.bias, norm.eps)
    x = step.merge(x + block.drop_path1(block.ls1(attended)))
    return x, block.norm2(x)


def folds(block: Any, x: Tensor, attended: Tensor) -> bool:
    """Whether residual, merge and norm of a block are what ``tome::merge_add_norm`` computes.

    They are unless a module between attention and MLP does more than scale and LayerNorm: drops
    paths, is of another class, has hooks that must see its input or output; or autocast or several
    dtypes are at work, whose conversions are torch's to choose.
    """
    from timm.layers import DropPath, LayerNorm
    from timm.models.vision_transformer import LayerScale

    scale, drop, norm = block.ls1, block.drop_path1, block.norm2
    if type(norm) not in (nn.LayerNorm, LayerNorm) or len(norm.normalized_shape) != 1:
        return False
    if type(scale) not in (nn.Identity, LayerScale):
        return False
    dropping = type(drop) is DropPath and drop.training and drop.drop_prob > 0
    if dropping or type(drop) not in (nn.Identity, DropPath):
        return False
    if any(observed(module) for module in (scale, drop, norm)):
        return False
    device = x.device.type
    if device not in ops.kernel_devices or torch.is_autocast_enabled(device):
        return False
    parameters = (attended, getattr(scale, "gamma", None), norm.weight, norm.bias)
    return all(tensor is None or tensor.dtype == x.dtype for tensor in parameters)


def observed(module: Any) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


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
            bias = log_size_bias(size, x.dtype) if self._tome.prop_attn else None
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
        if self._tome.first_merge == self._tome.num_layers:
            return super().forward_intermediates(  # type: ignore[misc]
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt,
                intermediates_only, output_dict, **masks,
            )  # fmt: skip
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        from timm.models._features import feature_take_indices

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
        return AttentionKind(weight.device, weight.dtype, attn.head_dim, dropout_of(attn))

    def prune_intermediate_layers(self: Any, *args: Any, **kwargs: Any) -> list[int]:
        """As timm's; the layers that stay keep the number of tokens they remove."""
        kept = super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]
        self._tome.truncate(len(self.blocks))
        return kept
