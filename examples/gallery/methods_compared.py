"""
How far each method moves the answers
=====================================

The small trained ViT again, by each of the four methods: how far its logits are from those of the
unmerged model (1 - cosine, the mean over 497 digits that it was not trained on), and how many
digits it still reads right. Another model says something else: docs/fidelity.md has a large one,
and ``tome-ext eval`` measures yours.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import tome_ext as tome
from tome_ext import _digits

R = (2, 4, 8)

digits = _digits.load()
model = digits.model
with torch.inference_mode():
    unmerged = model(digits.x)
unmerged_right = (unmerged.argmax(1) == digits.y).float().mean().item()

figure, (deviation, accuracy) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for method, marker in zip(("tome", "guided", "evit", "topk"), "osv^", strict=True):
    moved, right = [], []
    with tome.patch.timm(model, method=method) as fast, torch.inference_mode():
        for fast.r in R:
            logits = fast(digits.x)
            moved.append(1 - F.cosine_similarity(logits, unmerged).mean().item())
            right.append((logits.argmax(1) == digits.y).float().mean().item())
    deviation.plot(R, moved, marker=marker, label=method)
    accuracy.plot(R, right, marker=marker, label=method)

deviation.set_yscale("log")
deviation.set_ylabel("1 - cosine of the logits")
accuracy.axhline(unmerged_right, color="gray", linestyle=":", label="unmerged")
accuracy.set_ylabel("read right")
for ax in (deviation, accuracy):
    ax.set_xlabel("r, tokens removed in each of six layers, of 65")
accuracy.legend()
plt.show()
