"""torchvision's models for the host contract."""

from __future__ import annotations

from functools import partial
from typing import Any

from host_cases import Case, Inputs, loud
from models import GRID, images, paired_images
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer

DEPTH = 4


def _make(**options: Any) -> nn.Module:
    return loud(VisionTransformer(4 * GRID, 4, DEPTH, 2, 32, 64, num_classes=5, **options))


def _inputs(batch: int, seed: int) -> Inputs:
    return {"x": images(batch, seed=seed)}


def _paired(model: Any, inputs: Inputs) -> Inputs:
    model.encoder.pos_embedding.data.zero_()
    return {"x": paired_images(len(inputs["x"]), dtype=inputs["x"].dtype)}


def _logits(y: Tensor) -> Tensor:
    return y


def _case(name: str, **options: Any) -> Case:
    return Case(
        f"torchvision: {name}",
        partial(_make, **options),
        _inputs,
        _logits,
        GRID * GRID + 1,
        1,
        DEPTH,
        equal_tokens=_paired,
    )


CASES = [
    _case("plain"),
    _case("dropout, representation", dropout=0.2, attention_dropout=0.1, representation_size=8),
]
