"""By which keys a rotary ViT should match its tokens: as they are, or turned by their positions.

    python bench/rotary_metric.py [--seeds 5] [--json out.json]

Trains a small rotary ViT on scikit-learn's handwritten digits for every seed (64 patches; less than
a minute each), then merges with it off the shelf, matching tokens by turned keys, which is what
attention compares, and by keys before they are turned, which know nothing of places. Prints, for
each r, the accuracy on pictures that were not trained on, and how far the logits move: the mean of
1 - cosine with those of the unmerged model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from timing import describe_machine, write_json
from timm.models.eva import Eva
from torch import Tensor

import tome_ext
from tome_ext.patch.common.block_call import BlockCall
from tome_ext.patch.hosts import timm_rotary

SCHEDULES = (4, 8, 12)  # tokens to remove in each of four blocks, of 65
EPOCHS, BATCH = 30, 64


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pictures (n, 1, 16, 16) in [-1, 1] and labels (n,): 1300 to train on, 497 to test on."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    x = F.interpolate(x, scale_factor=2, mode="bilinear")
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1300], order[1300:]
    return (x[train], y[train]), (x[test], y[test])


def train(x: Tensor, y: Tensor, seed: int) -> Any:
    """A trained rotary ViT without other position embeddings, in eval mode."""
    torch.manual_seed(seed)
    model = Eva(
        img_size=16, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=4, num_heads=3,
        mlp_ratio=2, use_abs_pos_emb=False, use_rot_pos_emb=True,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for i in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@contextmanager
def by_keys_before_they_turn() -> Iterator[None]:
    """The patch of timm's rotary blocks, matching tokens by keys that are not turned yet."""
    turn, attend = timm_rotary.rotated, BlockCall.attend
    seen: list[Tensor] = []  # queries, then keys

    def rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
        seen.append(x)
        return turn(attn, x, rope)

    def attend_by(self: BlockCall, *args: Any, **kwargs: Any) -> Tensor:
        keys = seen[-1]
        seen.clear()
        return attend(self, *args, **{**kwargs, "metric": keys})

    timm_rotary.rotated, BlockCall.attend = rotated, attend_by  # type: ignore[method-assign]
    try:
        yield
    finally:
        timm_rotary.rotated, BlockCall.attend = turn, attend  # type: ignore[method-assign]


@torch.no_grad()
def judge(model: Any, x: Tensor, y: Tensor, expected: Tensor) -> dict[str, float]:
    """Accuracy in per cent, and the mean of 1 - cosine of the logits with those expected."""
    logits = model(x)
    return {
        "accuracy": 100 * (logits.argmax(1) == y).double().mean().item(),
        "deviation": (1 - F.cosine_similarity(logits, expected, dim=1)).mean().item(),
    }


def rows_of(seed: int) -> list[dict[str, Any]]:
    """What one training gives: a row for the unmerged model and for each r and metric."""
    (x, y), (held_x, held_y) = digits()
    model = train(x, y, seed)
    with torch.no_grad():
        expected = model(held_x)
    unmerged = judge(model, held_x, held_y, expected)
    rows: list[dict[str, Any]] = [{"seed": seed, "r": 0, "metric": "unmerged", **unmerged}]
    with tome_ext.patch.timm(model):
        for r in SCHEDULES:
            model.r = r
            rows.append({"seed": seed, "r": r, "metric": "turned keys"})
            rows[-1] |= judge(model, held_x, held_y, expected)
            with by_keys_before_they_turn():
                rows.append({"seed": seed, "r": r, "metric": "keys before they turn"})
                rows[-1] |= judge(model, held_x, held_y, expected)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small for more
    rows = [row for seed in range(arguments.seeds) for row in rows_of(seed)]
    print("| r | metric | accuracy, % | deviation of the logits |")
    print("| ---: | --- | ---: | ---: |")
    for r, metric in dict.fromkeys((row["r"], row["metric"]) for row in rows):
        same = [row for row in rows if (row["r"], row["metric"]) == (r, metric)]
        accuracy = statistics.mean(row["accuracy"] for row in same)
        deviation = statistics.mean(row["deviation"] for row in same)
        print(f"| {r} | {metric} | {accuracy:.1f} | {deviation:.4f} |")
    if arguments.json is not None:
        write_json(arguments.json, describe_machine(), rows)


if __name__ == "__main__":
    main()
