"""timm's NaFlexVit: pictures of several sizes in one batch, padded to the same number of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...attention import log_size_bias
from ..common.patched_model import PatchedModel
from .timm_parts import as_maps, asks_sizes, pooled, pruned, spread_intermediates

__all__ = ["TimmNaFlexModel"]


class TimmNaFlexModel(PatchedModel):
    """``NaFlexVit`` whose padding neither merges nor counts, and whose pools know of merged tokens.

    Where tokens have merged, ``patch_valid`` of what forward_features returns is over the merged
    tokens, as ``patches`` are.
    """

    def _forward_embeds(
        self: Any, x: Tensor, patch_coord: Any, patch_valid: Any, attn_mask: Any
    ) -> dict[str, Any]:
        out: dict[str, Any] = super()._forward_embeds(  # type: ignore[misc]
            x, patch_coord, patch_valid, attn_mask
        )
        valid = out["patch_valid"]
        if attn_mask is None and valid is not None and not self._tome.rules.idle:
            # timm's mask hides the queries of padding, too, of which nobody asks: one that hides
            # its keys is enough, and tome::attention takes it.
            out["attn_mask"] = self._tome_shown(valid)[:, None, None]
        return out

    def _tome_shown(self: Any, patch_valid: Tensor) -> Tensor:
        """``patch_valid`` (B, P) as bool (B, prefix + P)."""
        return F.pad(patch_valid.bool(), (self.num_prefix_tokens, 0), value=True)

    def forward_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().forward_features(*args, **kwargs)  # type: ignore[misc]
        if not isinstance(out, dict):
            return self._tome.finish(out)
        tokens = self._tome.current
        merged = tokens.reduced and not tokens.rules.settings.restore_tokens
        if merged and out["patch_valid"] is not None:
            shown = self._tome_shown(out["patch_valid"]).to(torch.float32).unsqueeze(-1)
            count = tokens.plan.merge(shown, reduce="sum")[0].squeeze(-1)
            out["patch_valid"] = count[:, self.num_prefix_tokens :] > 0
        out["patches"] = self._tome.finish(out["patches"])
        return out

    def _pool(
        self: Any, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None
    ) -> Tensor:
        kind = self.global_pool if pool_type is None else pool_type
        size = self._tome.size_of(x) if asks_sizes(self, kind, x) else None
        if size is None:
            return super()._pool(x, pool_type, patch_valid)  # type: ignore[misc]
        valid = None if patch_valid is None else self._tome_shown(patch_valid)
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        x, size = x[:, first:], size[:, first:]
        if valid is not None:
            valid = valid[:, first:]
            size = torch.where(valid, size, 0.0)
        if self.attn_pool is not None:
            if not self._tome.rules.method.proportional:
                size = None if valid is None else valid.to(torch.float32)
            mask = None if size is None else log_size_bias(size, x.dtype)
            return self.attn_pool(x, attn_mask=mask)
        return pooled(x, size, kind)

    def forward_intermediates(
        self: Any,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        **inputs: Any,
    ) -> Any:
        """As timm's; every intermediate is spread over the original tokens."""
        batch = isinstance(x, dict)
        if self._tome.rules.idle or (batch and output_fmt != "NLC"):
            return super().forward_intermediates(  # type: ignore[misc]
                x, indices, return_prefix_tokens, norm, stop_early, output_fmt,
                intermediates_only, output_dict, **inputs,
            )  # fmt: skip
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', got {output_fmt!r}")
        result: dict[str, Any] = super().forward_intermediates(  # type: ignore[misc]
            x, indices, True, norm, stop_early, "NLC", False, True, **inputs
        )
        taken = result["image_intermediates"]
        prefixes = result.pop("image_intermediates_prefix", None)
        if prefixes is not None:
            taken = [torch.cat(pair, dim=1) for pair in zip(prefixes, taken, strict=True)]
        prefixes, maps = spread_intermediates(self, taken, indices)
        if output_fmt == "NCHW":
            maps = as_maps(maps, *self.embeds.dynamic_feat_size(x.shape[-2:]))
        result["image_intermediates"] = maps
        result["image_features"] = self._tome.finish(result["image_features"])
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            if with_prefix:
                result["image_intermediates_prefix"] = prefixes
            if intermediates_only:
                del result["image_features"]
            return result
        out: list[Any] = list(zip(maps, prefixes, strict=True)) if with_prefix else maps
        return out if intermediates_only else (result["image_features"], out)

    def prune_intermediate_layers(self: Any, *args: Any, **kwargs: Any) -> list[int]:
        """As timm's; the layers that stay keep the number of tokens they remove."""
        return pruned(self, super().prune_intermediate_layers(*args, **kwargs))  # type: ignore[misc]
