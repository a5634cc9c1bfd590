"""timm's models for the host contract; ``models.py`` has more of its plain Vision Transformers."""

from __future__ import annotations

from typing import Any

from host_cases import Case, Inputs
from models import DEPTH, GRID, VARIANTS, images, paired_images, tiny, without_positions
from torch import Tensor, nn

TOKENS = GRID * GRID


def _inputs(batch: int, seed: int) -> Inputs:
    return {"x": images(batch, seed=seed)}


def _paired(model: Any, inputs: Inputs) -> Inputs:
    without_positions(model)
    x = inputs["x"]
    return {"x": paired_images(len(x), dtype=x.dtype)}


def _hidden(batch: int, seed: int, noise: float) -> Inputs:
    import torch

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


CASES = [
    _plain(name)
    for name in ("plain", "registers, layer scale", "no class token, avg", "attention pool")
]
