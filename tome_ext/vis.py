"""Shows which patches of a picture were merged, as in the figures of arXiv 2210.09461."""

from __future__ import annotations

import colorsys
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .ops import describe
from .schedule import as_integer

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["generate_colormap", "make_visualization"]

OUTLINE_SHARE = 16  # an outline is 1/16 of a patch wide: 1 pixel for the usual patch of 16
DROPPED_BRIGHTNESS = 0.15
GOLDEN_RATIO = 0.6180339887498949
SEED_HUE = 0.1373  # not a multiple of what lies between two colours of one map

Labels = NDArray[np.int64]
Pixels = NDArray[np.float64]


def make_visualization(
    img: Image.Image,
    source: Tensor,
    patch_size: int = 16,
    class_token: bool = True,
    *,
    num_prefix_tokens: int | None = None,
) -> Image.Image:
    """Paint every group of merged patches in its mean colour, with an outline around it.

    Each group has an outline colour of its own, so that parts that don't touch can be told to
    belong together. Patches whose token was dropped show the picture darkened.

    Args:
        img: the picture, with sides that are multiples of ``patch_size``; need not be square.
        source: which of the N original tokens make each of M tokens: (B, M, N) or (M, N) float or
            bool, nonzero where token n is part of row m (as ``model._tome_info["source"]``); or
            an assignment (B, N) or (N,) int, the row of every token, -1 for a dropped one (as
            ``plan.assign``). Of a batch the first image is shown.
        patch_size: side of a patch, in pixels of ``img``.
        class_token: the first token is not a patch.
        num_prefix_tokens: how many of the first tokens are not patches; replaces ``class_token``.

    Returns:
        An RGB picture of the size of ``img``.

    Raises:
        ValueError: wrong rank or dtype; sides not a multiple of the patch; a number of tokens
            other than the picture has patches.
    """
    from PIL import Image

    prefix = int(class_token) if num_prefix_tokens is None else num_prefix_tokens
    width, height = img.size
    if patch_size < 1 or width % patch_size or height % patch_size:
        raise ValueError(
            f"img: expected sides that are multiples of the patch size {patch_size}, "
            f"got {width} x {height}"
        )
    rows, columns = height // patch_size, width // patch_size
    assign = _first_assign(source)
    if prefix < 0 or assign.size - prefix != rows * columns:
        raise ValueError(
            f"source: expected {rows * columns} patch tokens ({columns} x {rows} patches of "
            f"{patch_size} in {width} x {height} pixels) after {prefix} prefix tokens, got "
            f"{assign.size} tokens in all"
        )
    patches = _compact(assign[prefix:]).reshape(rows, columns)
    labels = patches.repeat(patch_size, 0).repeat(patch_size, 1)
    pixels = np.asarray(img.convert("RGB"), dtype=np.float64)

    num_groups = int(patches.max(initial=-1)) + 1
    painted = np.where(
        labels[..., None] < 0,
        pixels * DROPPED_BRIGHTNESS,
        np.append(_mean_colors(pixels, labels, num_groups), np.zeros((1, 3)), 0)[labels],
    )
    edge = _edges(labels, max(1, round(patch_size / OUTLINE_SHARE))) & (labels >= 0)
    painted[edge] = 255 * np.array(generate_colormap(num_groups)).reshape(-1, 3)[labels[edge]]
    return Image.fromarray(painted.round().astype(np.uint8), "RGB")


def generate_colormap(N: int, seed: int = 0) -> list[tuple[float, float, float]]:  # noqa: N803
    """Colours for outlines, of which those with close numbers differ most.

    Args:
        N: how many. (The published project's name for it.)
        seed: another one turns all hues.

    Returns:
        N tuples (red, green, blue), each in [0, 1]: hues a golden ratio apart. The first ones of a
        longer list are those of a shorter.

    Raises:
        ValueError: N or seed is not an integer, or N < 0.
    """
    num_colors, turn = as_integer(N, "N"), as_integer(seed, "seed") * SEED_HUE
    if num_colors < 0:
        raise ValueError(f"N: expected at least 0, got {num_colors}")
    return [
        colorsys.hsv_to_rgb(
            (0.08 + turn + i * GOLDEN_RATIO) % 1, (0.85, 0.6)[i % 2], (1.0, 0.9)[i // 2 % 2]
        )
        for i in range(num_colors)
    ]


def _first_assign(source: Tensor) -> Labels:
    """The row of every token of the first image, -1 for a dropped one, from either form."""
    integer = not (source.is_floating_point() or source.dtype == torch.bool)
    if source.dim() == (2 if integer else 3) and source.shape[0] > 0:
        source = source[0]
    if source.dim() != (1 if integer else 2) or source.is_complex():
        raise ValueError(
            "source: expected (B, M, N) float or bool, or an assignment (B, N) int, "
            f"got {describe(source)}"
        )
    source = source.detach().cpu()
    if not integer:
        part = source != 0
        if part.shape[0] == 0:
            return np.full(part.shape[1], -1, dtype=np.int64)
        source = torch.where(part.any(0), part.to(torch.uint8).argmax(0), -1)
    return source.to(torch.int64).numpy()


def _compact(assign: Labels) -> Labels:
    """Number the groups 0, 1, ... in the order of their first patch; dropped ones stay -1."""
    groups, first, label = np.unique(assign, return_index=True, return_inverse=True)
    order = np.where(groups < 0, -1, first)
    rank = order.argsort().argsort() - int((groups < 0).sum())
    return np.where(assign < 0, -1, rank[label])


def _mean_colors(pixels: Pixels, labels: Labels, num_groups: int) -> Pixels:
    """(num_groups, 3), the mean of the pixels of every group."""
    shown = labels >= 0
    flat = labels[shown]
    count = np.bincount(flat, minlength=num_groups)
    sums = [np.bincount(flat, pixels[..., c][shown], minlength=num_groups) for c in range(3)]
    return np.stack(sums, 1) / np.maximum(count, 1)[:, None]


def _edges(labels: Labels, width: int) -> NDArray[np.bool_]:
    """True for pixels with another group, or the end of the picture, at most ``width`` away."""
    padded = np.pad(labels, width, constant_values=-2)
    low = _slide(np.minimum, padded, 2 * width + 1)
    high = _slide(np.maximum, padded, 2 * width + 1)
    return np.not_equal(low, high)


def _slide(combine: np.ufunc, labels: Labels, length: int) -> Labels:
    """Combine every ``length`` x ``length`` window, one direction after the other."""
    for axis in (0, 1):
        places = np.arange(labels.shape[axis] - length + 1)
        labels = combine.reduce([labels.take(places + shift, axis) for shift in range(length)])
    return labels
