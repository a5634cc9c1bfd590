"""What the patch adds to every block where kernels take no time: one image, a very small model.

    python bench/overhead.py [--json out.json] [--threads 1] [--seconds 10]

Microseconds per block, medians, of one model in four forms that take turns, in a new order every
round: unpatched, patched with r=0, sliced (the ceiling: tokens dropped instead of merged) and
patched with r. With 17 tokens of 64 channels nearly all of it is Python and the dispatcher. The
overhead is the median of the differences of one round: of patched with r=0 over unpatched, and of
patched with r over the ceiling. It should stay below the time of the unpatched block itself.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from timing import Contender, describe_machine, interleave, write_json
from timm.models.vision_transformer import VisionTransformer

import tome_ext
from tome_ext._command import Reduction
from tome_ext.bench._contenders import share_weights, sliced

R = 1
DEPTH = 12
MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def contenders() -> dict[str, Contender]:
    """The forms of the model by name, each to be called without arguments."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, patch_size=16, embed_dim=64, num_heads=2, depth=DEPTH, num_classes=0
    ).eval()
    x = torch.randn(1, 3, 64, 64)
    forms = {
        "unpatched": model,
        "r=0": tome_ext.patch.timm(share_weights(model)),
        "ceiling": sliced(share_weights(model), Reduction(r=R)),
        "patched": tome_ext.patch.timm(share_weights(model), r=R),
    }
    return {name: lambda form=form: form(x) for name, form in forms.items()}


def measure(mode: str, seconds: float) -> dict[str, object]:
    """One row: microseconds per block of every form, and the two overheads."""
    with MODES[mode]():
        times = interleave(contenders(), seconds, warm_up=20)
    blocks = {name: [1e3 * ms / DEPTH for ms in values] for name, values in times.items()}

    def added(by: str, to: str) -> float:
        return statistics.median(a - b for a, b in zip(blocks[by], blocks[to], strict=True))

    return {
        "mode": mode,
        **{name: statistics.median(values) for name, values in blocks.items()},
        "overhead r=0": added("r=0", "unpatched"),
        "overhead": added("patched", "ceiling"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="per mode")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(mode, arguments.seconds) for mode in MODES]
    print("| us per block | " + " | ".join(list(rows[0])[1:]) + " |")
    print("| --- |" + " ---: |" * (len(rows[0]) - 1))
    for row in rows:
        mode, *figures = row.values()
        print(f"| {mode} | " + " | ".join(f"{figure:.1f}" for figure in figures) + " |")
    if arguments.json is not None:
        write_json(arguments.json, describe_machine(), rows)


if __name__ == "__main__":
    main()
