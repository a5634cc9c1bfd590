"""The trained model that comes with ``tome_ext``: a small ViT that reads handwritten digits.

``tome-ext demo`` shows accuracy with it, on a machine without network too.
``bench/train_digits.py`` trains it and writes its file. Needs timm and numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ._command import Reduction, patched

__all__ = ["FILE", "R_VALUES", "Digits", "Row", "load", "make_model", "measure", "save", "table"]

FILE = Path(__file__).parent / "assets" / "digits.npz"
R_VALUES = (2, 4, 8)  # tokens to remove in every block, of the 65, that are shown
WEIGHTS = "weights/"  # what the names of the weights begin with, in the file


@dataclass(frozen=True)
class Digits:
    """The trained model, in eval mode, and the pictures that it was not trained on.

    Attributes:
        model: takes (B, 1, 8, 8) float32, returns logits (B, 10).
        x: the pictures, (497, 1, 8, 8) float32 in [-1, 1].
        y: the digits on them, (497,) int64.
    """

    model: Any
    x: Tensor
    y: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Digits:
        """The same on a device, with weights and pictures of a dtype; the model is moved itself."""
        return Digits(self.model.to(device, dtype), self.x.to(device, dtype), self.y.to(device))


@dataclass(frozen=True)
class Row:
    """One line of the table; ``reduction`` is None for the model without a patch."""

    reduction: Reduction | None
    tokens: int  # left after the last block, the class token included
    right: int  # pictures whose digit has the largest logit
    pictures: int
    agreement: float  # mean cosine similarity with the logits of the model without a patch

    @property
    def accuracy(self) -> float:
        """The share of pictures that it is right about."""
        return self.right / self.pictures


def make_model() -> Any:
    """A timm ViT with a token for each of 8 x 8 pixels and a class token, its weights random."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=8, patch_size=1, in_chans=1, num_classes=10,
        embed_dim=48, depth=6, num_heads=3, mlp_ratio=2,
    )  # fmt: skip


def to_input(pictures: np.ndarray) -> Tensor:
    """(n, 8, 8) of 0 to 16, as scikit-learn has them, as input (n, 1, 8, 8) float32 in [-1, 1]."""
    return torch.from_numpy(pictures.astype(np.float32)).unsqueeze(1) / 8 - 1


def save(model: Any, pictures: np.ndarray, labels: np.ndarray, file: Path = FILE) -> None:
    """Write a model of :func:`make_model` as float16, and (n, 8, 8) pictures with (n,) digits."""
    weights = {WEIGHTS + name: value.half().numpy() for name, value in model.state_dict().items()}
    arrays = {"pictures": pictures.astype(np.uint8), "labels": labels.astype(np.uint8), **weights}
    np.savez_compressed(file, **arrays)


def load(file: Path = FILE) -> Digits:
    """Read what :func:`save` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        state = {
            name.removeprefix(WEIGHTS): torch.from_numpy(arrays[name]).float()
            for name in arrays.files
            if name.startswith(WEIGHTS)
        }
        x = to_input(arrays["pictures"])
        y = torch.from_numpy(arrays["labels"].astype(np.int64))
    model = make_model()
    model.load_state_dict(state)
    return Digits(model.eval().requires_grad_(False), x, y)


@torch.inference_mode()
def measure(digits: Digits, reductions: tuple[Reduction, ...]) -> list[Row]:
    """Read the pictures without a patch, then with every setting; a row for each."""
    model, x, y = digits.model, digits.x, digits.y
    rows: list[Row] = []
    plain: Tensor | None = None
    for setting in (None, *reductions):
        with patched(model, setting):
            logits = model(x).cpu().double()
            plan = None if setting is None else model.tome.plan
        plain = logits if plain is None else plain
        left = 1 + x[0].numel() if plan is None else plan.num_output_tokens
        right = int((logits.argmax(1) == y.cpu()).sum())
        agreement = F.cosine_similarity(logits, plain, dim=1).mean().item()
        rows.append(Row(setting, left, right, len(x), agreement))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as text; the first one is what the others are compared with."""
    amount = next((row.reduction.amount_name for row in rows if row.reduction is not None), "r")
    lines = [f"{amount:>9}  {'tokens left':>11}  {'accuracy':>8}  {'change':>7}  {'agreement':>9}"]
    for row in rows:
        name = "unpatched" if row.reduction is None else row.reduction.row_name
        change = row.accuracy - rows[0].accuracy
        lines.append(
            f"{name:>9}  {row.tokens:>11}  {row.accuracy:>8.3f}  {change:>+7.3f}"
            f"  {row.agreement:>9.4f}"
        )
    return "\n".join(lines)
