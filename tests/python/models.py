"""Tiny timm models, and ToMe's forward written out plainly, for the tests of the patches."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import RmsNorm, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from tome_ext import reference

DEPTH = 3
GRID = 8  # patches per side

# One model per feature of the block, the token sequence or the head. "gated", "unfused" and
# "distilled" are not options of the constructor; `tiny` builds them.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "depth 1": {"depth": 1},
    "layer scale": {"init_values": 0.5},
    "registers, layer scale": {"reg_tokens": 4, "init_values": 0.5},
    "no class token, avg": {"class_token": False, "global_pool": "avg"},
    "class token, avg": {"global_pool": "avg"},
    "avg with prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "avgmax": {"global_pool": "avgmax", "reg_tokens": 2},
    "max": {"global_pool": "max"},
    "no pooling": {"global_pool": ""},
    "attention pool": {"class_token": False, "global_pool": "map"},
    "attention pool after registers": {"reg_tokens": 3, "global_pool": "map"},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 1},
    "pre norm, as CLIP": {"pre_norm": True},
    "q/k norm": {"qk_norm": True},
    "scaled norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "rms norm, SwiGLU": {"norm_layer": RmsNorm, "mlp_layer": SwiGLUPacked},
    "no q/k/v bias": {"qkv_bias": False},
    "dynamic image size": {"dynamic_img_size": True},
    "unfused": {"unfused": True},
    "unfused, q/k norm, registers": {"unfused": True, "qk_norm": True, "reg_tokens": 2},
    "distilled": {"distilled": True},
}

if "gated" in inspect.signature(Attention).parameters:  # not in the oldest timm
    VARIANTS["gated"] = {"gated": True}

# The models that every way of running is tested with.
RUN = ["plain", "registers, layer scale", "no class token, avg"]


def tiny(
    gated: bool = False, unfused: bool = False, distilled: bool = False, **options: Any
) -> VisionTransformer:
    """A VisionTransformer of 64 patches with weights large enough for attention to matter."""
    torch.manual_seed(0)
    settings = {
        "img_size": 4 * GRID,
        "patch_size": 4,
        "embed_dim": 32,
        "num_heads": 4,
        "depth": DEPTH,
        "num_classes": 5,
        **options,
    }
    model = (VisionTransformerDistilled if distilled else VisionTransformer)(**settings)
    for block in model.blocks:
        if gated:
            block.attn = Attention(32, num_heads=4, qkv_bias=True, gated=True)
        if unfused:
            block.attn.fused_attn = False
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def images(batch: int = 2, side: int = 4 * GRID, seed: int = 0, **options: Any) -> Tensor:
    """Random images (batch, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, side, side, generator=generator).to(**options)


def paired_images(batch: int = 2, **options: Any) -> Tensor:
    """Images whose horizontal neighbours among the patches are equal, pair by pair."""
    half = images(batch, **options).unflatten(3, (GRID, 4))[:, :, :, : GRID // 2]
    return half.repeat_interleave(2, dim=3).flatten(3)


def without_positions(model: VisionTransformer) -> VisionTransformer:
    """The model without position embeddings, so that equal patches are equal tokens."""
    with torch.no_grad():
        model.pos_embed.zero_()
    return model


def plain_tome(
    model: VisionTransformer,
    x: Tensor,
    schedule: Sequence[int],
    guided: bool = False,
    threshold: float | None = None,
) -> Tensor:
    """ToMe as the paper describes it, in explicit PyTorch, on an unpatched float64 model.

    With ``guided`` the tokens are compared, the pairs merge that cost least, as the class token
    sees it if there is one, and norms are kept. With a ``threshold``, of one image, more than the
    schedule says merge where they are so similar. Covers plain attention, LayerScale, DropPath,
    register tokens, and the "token" and "avg" heads.
    """
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    size = x.new_ones(x.shape[:2])
    for block, r in zip(model.blocks, schedule, strict=True):
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + size.log()[:, None, None, :]
        matrix = scores.softmax(-1)
        attended = (matrix @ v).transpose(1, 2).flatten(2)
        x = x + block.drop_path1(block.ls1(attn.proj(attended)))
        if guided:
            importance = None
            if model.has_class_token:
                importance = matrix[:, :, 0].mean(1).detach().float()
                if threshold is not None:
                    importance = importance / importance[:, prefix:].mean()
                importance = importance**0.75
                if threshold is not None:
                    importance = importance.clamp_min(0.5)
            assign, _, offsets = reference.match(
                x.detach(), r, prefix, size=size.float(), importance=importance,
                threshold=threshold,
            )  # fmt: skip
        else:
            assign, _, offsets = reference.match(k.detach(), r, prefix, threshold=threshold)
        rows = offsets.shape[1] - 1 if threshold is None else int(assign.max()) + 1
        groups = nn.functional.one_hot(assign.long(), rows).to(x).mT  # (B, M, N)
        weighted = groups @ (size.unsqueeze(-1) * x)
        lengths = groups @ (size.unsqueeze(-1) * x.norm(dim=2, keepdim=True))
        size = (groups @ size.unsqueeze(-1)).squeeze(-1)
        x = weighted / size.unsqueeze(-1)
        if guided:
            x = lengths * x / weighted.norm(dim=2, keepdim=True)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    x = model.norm(x)
    if model.global_pool == "token":
        x = x[:, 0]
    else:
        x, size = x[:, prefix:], size[:, prefix:]
        x = (x * size.unsqueeze(-1)).sum(1) / size.sum(1, keepdim=True)
    return model.head(model.fc_norm(x))


def plain_pruning(
    model: VisionTransformer,
    x: Tensor,
    keeps: Sequence[int],
    fuse: bool = False,
    normalize: bool = False,
    weight_grad: bool = False,
    shown: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Top-K, or with ``fuse`` EViT, as its paper describes it, on an unpatched float64 model.

    Args:
        model: as for :func:`plain_tome`, with a class token and any head.
        x: images.
        keeps: per layer, how many patch tokens it keeps.
        fuse: make the others one token, weighted by the class token's attention.
        normalize: divide those weights by their sum.
        weight_grad: let gradients through them.
        shown: (B, N) bool, whether tokens may be attended.

    Returns:
        The logits, and the tokens (B, M, C) after every block.
    """
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    shown = torch.ones_like(x[..., 0], dtype=torch.bool) if shown is None else shown
    after = []
    for block, keep in zip(model.blocks, keeps, strict=True):
        attn = block.attn
        qkv = attn.qkv(block.norm1(x)).unflatten(-1, (3, attn.num_heads, -1))
        q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        q, k = attn.q_norm(q), attn.k_norm(k)
        logits = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~shown[:, None, None], -torch.inf)
        matrix = logits.softmax(-1)
        x = x + block.drop_path1(block.ls1(attn.proj((matrix @ v).transpose(1, 2).flatten(2))))
        scores = matrix[:, :, 0, prefix:].mean(1)
        scores = scores if weight_grad else scores.detach()
        patches = x[:, prefix:]
        if keep < patches.shape[1]:
            best = scores.topk(keep).indices.sort(1).values
            kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
            rows = [x[:, :prefix], patches[kept].unflatten(0, (len(x), keep))]
            seen = [shown[:, :prefix], shown[:, prefix:][kept].unflatten(0, (len(x), keep))]
            if fuse:
                weights = scores.masked_fill(kept, 0.0)
                if normalize:
                    weights = weights / weights.sum(1, keepdim=True)
                rows.append((weights.unsqueeze(2) * patches).sum(1, keepdim=True))
                seen.append((shown[:, prefix:] & ~kept).any(1, keepdim=True))
            x, shown = torch.cat(rows, 1), torch.cat(seen, 1)
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
        after.append(x)
    return model.forward_head(model.norm(x)), after
