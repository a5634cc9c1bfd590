"""Train the small ViT that comes with tome_ext, and write its file.

    python bench/train_digits.py [--epochs 100] [--output tome_ext/assets/digits.npz]

It reads scikit-learn's handwritten digits, a token for each of 8 x 8 pixels; 1,300 pictures are to
train on. The file has its weights, and the 497 other pictures, which `tome-ext demo` shows accuracy
on. It takes five minutes on one core, which is all that it uses.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from tome_ext import _digits
from tome_ext._command import Reduction

SEED = 0
TRAIN = 1300  # pictures
BATCH = 64
PEAK_RATE, WEIGHT_DECAY, SMOOTHING = 3e-3, 0.05, 0.1
POSITION_STD = 0.5
SHIFT = 1  # pixels at most, in each direction
NOISE = 0.1  # standard deviation at most, of values in [-1, 1]
FILE = Path(__file__).parents[1] / "tome_ext" / "assets" / "digits.npz"

Split = tuple[np.ndarray, np.ndarray]


def split() -> tuple[Split, Split]:
    """Pictures (n, 8, 8) of 0 to 16 and digits (n,): to train on, and the others."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(SEED)).numpy()
    train, test = order[:TRAIN], order[TRAIN:]
    return (data.images[train], data.target[train]), (data.images[test], data.target[test])


def augmented(x: Tensor) -> Tensor:
    """Pictures (B, 1, 8, 8), each shifted, with a background of -1, and with noise."""
    n, side = len(x), x.shape[-1]
    wide = F.pad(x, [SHIFT] * 4, value=-1)
    top, left = torch.randint(0, 2 * SHIFT + 1, (2, n, 1, 1))
    rows, columns = top + torch.arange(side).view(-1, 1), left + torch.arange(side)
    shifted = wide[torch.arange(n).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)
    return shifted + NOISE * torch.rand(n, 1, 1, 1) * torch.randn_like(x)


def train(x: Tensor, y: Tensor, epochs: int) -> Any:
    """The trained model, in eval mode."""
    torch.manual_seed(SEED)
    model = _digits.make_model()
    # timm's deviation of 0.02, of weights and positions, is for wide models; this learns sooner.
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
    torch.nn.init.normal_(model.pos_embed, std=POSITION_STD)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=WEIGHT_DECAY)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps, pct_start=0.1)
    start = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for i in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(augmented(x[i])), y[i], label_smoothing=SMOOTHING)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(i)
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(x):.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    """Train, write the file, and print what the model in the file does."""
    parser = argparse.ArgumentParser(description="Train the model of digits.npz.")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--output", type=Path, default=FILE, metavar="FILE")
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error(f"--epochs: expected a number of at least 1, got {args.epochs}")
    if not args.output.parent.is_dir():
        parser.error(f"--output: there is no folder {args.output.parent}")
    torch.set_num_threads(1)
    (pictures, labels), held_out = split()
    model = train(_digits.to_input(pictures), torch.from_numpy(labels), args.epochs)
    _digits.save(model, *held_out, args.output)
    digits = _digits.load(args.output)  # what was written, not what was trained: float16
    shown = [Reduction(method, r=r) for method in ("tome", "guided") for r in _digits.R_VALUES]
    print(_digits.table(_digits.measure(digits, tuple(shown))))
    print(f"{args.output}: {args.output.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
