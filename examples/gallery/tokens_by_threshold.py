"""
As many tokens as a picture needs
=================================

With ``threshold`` in place of ``r`` each picture merges what is similar enough, and keeps as many
tokens as it has that differ. Here is how many the 497 digits keep that the model was not trained
on, and those that keep the fewest and the most.
"""

import matplotlib.pyplot as plt
import torch
from PIL import Image

import tome_ext as tome
from tome_ext import _digits

PIXEL = 16  # pixels of the drawing for one of the digit's

digits = _digits.load()
model = digits.model
tome.patch.timm(model, threshold=0.9)
with torch.inference_mode():
    right = (model(digits.x).argmax(1) == digits.y).float().mean().item()
kept = (model.tome.size > 0).sum(1)  # rows of size 0 only fill the batch up
assign = model.tome.plan.assign

# %%
# One number for all layers, another number of tokens for every picture.

figure, ax = plt.subplots(figsize=(7, 3), layout="constrained")
ax.hist(kept, bins=range(int(kept.min()), int(kept.max()) + 2), color="#4c72b0", align="left")
ax.set_xlabel("tokens left of 65, after six layers")
ax.set_ylabel("digits")
ax.set_title(
    f"threshold = 0.9: {kept.float().mean():.1f} tokens on average, {right:.1%} read right"
)
plt.show()

# %%
# The five digits with the fewest tokens, and the five with the most.

order = kept.argsort(stable=True)
figure, axes = plt.subplots(2, 5, figsize=(7, 3.4), layout="constrained")
for ax, i in zip(axes.flat, torch.cat([order[:5], order[-5:]]).tolist(), strict=True):
    pixels = ((1 - digits.x[i, 0]) * 127.5).to(torch.uint8)
    shown = Image.fromarray(pixels.numpy()).resize((8 * PIXEL,) * 2, Image.Resampling.NEAREST)
    ax.imshow(tome.make_visualization(shown, assign[i], PIXEL))
    ax.set_title(f"{kept[i]} tokens", fontsize=9)
    ax.set(xticks=[], yticks=[])
plt.show()
