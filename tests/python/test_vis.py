"""The picture of merged regions: colours, outlines, forms of input and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tome_ext import match
from tome_ext.matching import bipartite_soft_matching, merge_source
from tome_ext.vis import DROPPED_BRIGHTNESS, generate_colormap, make_visualization


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def array(img: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(img)


def source_of(assign: list[int], rows: int) -> torch.Tensor:
    """(rows, N) float, 1 where a token is in a row."""
    return torch.stack([torch.tensor(assign) == row for row in range(rows)]).float()


def test_groups_have_their_mean_color_inside_an_outline() -> None:
    img = picture(32, 16)
    assign = [0, 1, 1, 0, 0, 1, 2, 2]  # 4 x 2 patches of 8
    shown = array(make_visualization(img, torch.tensor(assign), 8, class_token=False))
    assert shown.shape == (16, 32, 3)
    labels = np.array(assign).reshape(2, 4).repeat(8, 0).repeat(8, 1)
    outline = []
    for group in range(3):
        mean = array(img)[labels == group].astype(float).mean(0).round()
        inside = np.zeros_like(labels, dtype=bool)
        for y in range(16):
            for x in range(32):
                near = labels[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
                inside[y, x] = 0 < y < 15 and 0 < x < 31 and (near == group).all()
        assert inside.any()
        assert (shown[inside] == mean).all()
        border = shown[(labels == group) & ~inside]
        assert (border == border[0]).all()  # one colour around every part of a group
        outline.append(tuple(border[0]))
    assert len(set(outline)) == 3


def test_outline_colors_are_far_apart_for_close_groups() -> None:
    shown = array(make_visualization(picture(64, 64), torch.arange(64), 8, class_token=False))
    colors = shown[::8, ::8].reshape(-1, 3).astype(int)  # the corner of every patch
    assert len(np.unique(colors, axis=0)) == 64
    assert np.abs(colors[1:] - colors[:-1]).sum(1).min() > 100


def test_colormap() -> None:
    colors = generate_colormap(64)
    assert len(colors) == 64
    assert all(len(color) == 3 and min(color) >= 0 and max(color) <= 1 for color in colors)
    assert generate_colormap(10) == colors[:10]
    assert generate_colormap(64, seed=1) != colors
    assert len({*colors, *generate_colormap(64, seed=1)}) == 128
    assert generate_colormap(0) == []
    img = Image.new("RGB", (32, 32), (0, 0, 0))
    shown = array(make_visualization(img, torch.arange(4), class_token=False))
    assert tuple(shown[0, 0]) == tuple(np.round(255 * np.array(colors[0])))
    with pytest.raises(ValueError, match="N: expected at least 0, got -1"):
        generate_colormap(-1)
    with pytest.raises(ValueError, match=r"N: expected an integer, got 2.5 \(float\)"):
        generate_colormap(2.5)  # type: ignore[arg-type]


def test_outline_grows_with_the_patch() -> None:
    assign = torch.tensor([0, 1])
    for patch, width in ((8, 1), (16, 1), (32, 2), (48, 3)):
        img = Image.new("RGB", (2 * patch, patch), (10, 20, 30))
        shown = array(make_visualization(img, assign, patch, class_token=False))
        plain = (shown == (10, 20, 30)).all(-1)
        assert plain.sum() == 2 * (patch - 2 * width) ** 2


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_all_forms_of_source_show_the_same(prefix: int) -> None:
    img = picture(48, 32)
    assign = list(range(prefix)) + [prefix + g for g in (0, 1, 0, 1, 2, 2)]
    rows = prefix + 3
    forms = [
        torch.tensor(assign),
        torch.tensor(assign, dtype=torch.int32).repeat(2, 1),
        source_of(assign, rows),
        source_of(assign, rows).repeat(3, 1, 1),
        source_of(assign, rows).bool(),
        source_of(assign, rows).to(torch.bfloat16),
    ]
    forms[1][1] = 0  # only the first image is shown
    shown = [array(make_visualization(img, s, num_prefix_tokens=prefix)) for s in forms]
    for other in shown[1:]:
        assert np.array_equal(shown[0], other)
    if prefix < 2:
        same = make_visualization(img, forms[0], class_token=bool(prefix))
        assert np.array_equal(shown[0], array(same))


def test_class_token_is_one_prefix_token_by_default() -> None:
    make_visualization(picture(32, 32), torch.arange(5))
    with pytest.raises(
        ValueError, match=r"expected 4 patch tokens .* after 1 prefix tokens, got 4"
    ):
        make_visualization(picture(32, 32), torch.arange(4))


def test_dropped_patches_are_dark_and_have_no_outline() -> None:
    img = picture(32, 16)
    for source in (torch.tensor([0, -1]), torch.tensor([[1.0, 0.0]])):
        shown = array(make_visualization(img, source, class_token=False))
        dark = (array(img)[:, 16:] * DROPPED_BRIGHTNESS).round()
        assert np.array_equal(shown[:, 16:], dark)
        assert (shown[1:-1, 1:15] == array(img)[:, :16].reshape(-1, 3).mean(0).round()).all()
    shown = array(make_visualization(img, torch.zeros(0, 2), class_token=False))
    assert np.array_equal(shown, (array(img) * DROPPED_BRIGHTNESS).round())


def test_gray_and_transparent_pictures() -> None:
    for mode in ("L", "RGBA", "P"):
        shown = make_visualization(picture(32, 32).convert(mode), torch.zeros(4).long(), 16, False)
        assert shown.mode == "RGB"


def test_source_of_a_plan() -> None:
    metric = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0))
    plan = match(metric, 6, 1)
    merge, _ = bipartite_soft_matching(metric, 6, class_token=True)
    source = merge_source(merge, metric)
    img = picture(64, 64)
    assert np.array_equal(
        array(make_visualization(img, plan.assign)), array(make_visualization(img, source))
    )


def test_errors_state_the_numbers() -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 16, got 40 x 32"):
        make_visualization(picture(40, 32), torch.arange(5))
    with pytest.raises(ValueError, match=r"\(3 x 2 patches of 16 in 48 x 32 pixels\).*got 10 tok"):
        make_visualization(picture(48, 32), torch.arange(10))
    with pytest.raises(ValueError, match=r"expected \(B, M, N\) float.*got \(5,\) float32"):
        make_visualization(picture(32, 32), torch.zeros(5))
    with pytest.raises(ValueError, match=r"assignment \(B, N\) int, got \(1, 2, 5\) int64"):
        make_visualization(picture(32, 32), torch.zeros(1, 2, 5).long())
