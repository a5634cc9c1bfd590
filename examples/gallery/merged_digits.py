"""
Which pixels of a digit merge
=============================

The small trained ViT that comes with the package has a token for every pixel of a digit. Each
group of merged pixels is painted in its mean colour, with an outline of its own. The background,
which is much the same everywhere, goes first; most pixels of a stroke stay by themselves up to
``r = 4``.
"""

import matplotlib.pyplot as plt
import torch
from PIL import Image

import tome_ext as tome
from tome_ext import _digits

PIXEL = 16  # pixels of the drawing for one of the digit's

digits = _digits.load()
model, images = digits.model, digits.x[:6]
tome.patch.timm(model)


def picture(image: torch.Tensor) -> Image.Image:
    """A digit (1, 8, 8) in [-1, 1], enlarged."""
    pixels = ((1 - image[0]) * 127.5).to(torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((8 * PIXEL, 8 * PIXEL), Image.Resampling.NEAREST)


# %%
# ``r`` tokens merge in each of six layers; of 65, 41 are left with ``r = 4`` and 17 with ``r = 8``.

R = (0, 4, 8)
figure, axes = plt.subplots(len(R), len(images), figsize=(9, 4.8), layout="constrained")
for r, row in zip(R, axes, strict=True):
    model.r = r
    with torch.inference_mode():
        answers = model(images).argmax(1)
    plan = model.tome.plan  # None where nothing merged
    for i, ax in enumerate(row):
        shown = picture(images[i])
        if plan is not None:
            shown = tome.make_visualization(shown, plan.assign[i], PIXEL)
        ax.imshow(shown, cmap="gray")
        ax.set_title(f"read as {answers[i]}", fontsize=9)
        ax.set(xticks=[], yticks=[])
    row[0].set_ylabel(f"r = {r}\n{model.tome.num_tokens} tokens")
plt.show()
