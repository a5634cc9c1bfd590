"""How near to the unpatched model each method stays, against what a forward costs.

python bench/methods_chart.py --json bench/results/methods.json --chart docs/images/methods.png
python bench/methods_chart.py --chart mine.png --model vit_base_patch16_224 PICTURE PICTURE ...

Agreement is the mean cosine similarity of the pooled features with those of the unpatched model,
over crops of photographs. Takes timm's pretrained weights; where they can't be had, random ones,
and the picture says so.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tome_ext import demo
from tome_ext._command import Reduction, check_patch
from tome_ext._models import layout
from tome_ext.bench._cost import count_flops
from tome_ext.patch.common.methods import METHODS

COLORS = {"tome": "#d1495b", "evit": "#2e86ab", "topk": "#e8a33d"}
NAMES = {"tome": "ToMe", "evit": "EViT", "topk": "Top-K"}
INK, FAINT = "#222222", "#666666"
R_VALUES = (2, 4, 6, 8, 10, 12, 14, 16)
KEEP_RATES = (0.9, 0.8, 0.7, 0.6, 0.5)
PANELS = {
    "r": "r tokens fewer in every block",
    "keep rate": "a share kept in layers 4, 7 and 10 of 12",
}
CROPS = 8  # of each photograph


def main() -> None:
    """Measure, and write what is asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("pictures", nargs="*", type=Path, default=[demo.PHOTO], metavar="PICTURE")
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument("--json", type=Path, metavar="FILE")
    options.add_argument("--chart", type=Path, metavar="FILE")
    arguments = options.parse_args()

    loaded = demo.load_model(arguments.model)
    frame = demo.Frame.of(loaded, layout(loaded))
    crops = [
        crop
        for picture in arguments.pictures
        for crop in frame.crops(demo.open_photo(picture), CROPS)
    ]
    x = torch.stack([frame.to_tensor(crop) for crop in crops])
    result = {
        "model": arguments.model,
        "weights": "random" if loaded.missing else "pretrained",
        "photographs": len(arguments.pictures),
        "crops": len(crops),
        **measure(loaded.module, x),
    }
    for row in result["rows"]:
        amount = f"{row['amount_name']} {row['amount']}"
        print(f"{row['method']:5} {amount:14} {row['gflops']:6.2f} GFLOP  {row['agreement']:.6f}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.chart is not None:
        draw(result).savefig(arguments.chart)


@torch.inference_mode()
def measure(model: Any, x: Tensor) -> dict[str, Any]:
    """The cost of the unpatched model, and cost and agreement of every setting."""
    expected = model(x).double()
    whole = count_flops(lambda: model(x[:1])) / 1e9
    reductions = [Reduction(method, r=r) for method in METHODS for r in R_VALUES]
    reductions += [Reduction(method, keep_rate=k) for method in METHODS for k in KEEP_RATES]
    check_patch(model, reductions)
    rows = []
    for reduction in reductions:
        with reduction.patch(model):
            agreement = F.cosine_similarity(model(x).double(), expected, dim=1).mean().item()
            gflops = count_flops(lambda: model(x[:1])) / 1e9
        rows.append(
            {
                "method": reduction.method,
                "amount_name": reduction.amount_name,
                "amount": reduction.amount,
                "gflops": gflops,
                "agreement": agreement,
            }
        )
    return {"gflops": whole, "rows": rows}


def draw(result: dict[str, Any]) -> Any:
    """A panel for each way of saying how much, a line for each method."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9.6, 4.4), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (amount_name, title) in zip(panels, PANELS.items(), strict=True):
        for method, color in COLORS.items():
            rows = [
                row
                for row in result["rows"]
                if (row["method"], row["amount_name"]) == (method, amount_name)
            ]
            axes.plot(
                [row["gflops"] for row in rows],
                [row["agreement"] for row in rows],
                color=color, marker="o", markersize=4, linewidth=1.8, label=NAMES[method],
            )  # fmt: skip
            ends = (rows[0], rows[-1]) if method == "tome" else ()
            for row in ends:
                axes.annotate(
                    f"{amount_name} {row['amount']}",
                    (row["gflops"], row["agreement"]),
                    xytext=(0, 7), textcoords="offset points", ha="center",
                    fontsize=7.5, color=FAINT,
                )  # fmt: skip
        axes.plot([result["gflops"]], [1.0], "s", color=INK, markersize=5, label="unpatched")
        axes.set_title(title, size=10)
        axes.set_xlabel("GFLOP per image", size=9)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(y=0.12)
        axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
        axes.spines[:].set_color("#bbbbbb")
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="y", useOffset=False)
    panels[0].set_ylabel("agreement of the features", size=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center", ncols=4, frameon=False, fontsize=9.5,
    )  # fmt: skip
    count = result["photographs"]
    photographs = "a photograph" if count == 1 else f"{count} photographs"
    figure.supxlabel(
        f"{result['model']}, {result['weights']} weights; {result['crops']} crops of "
        f"{photographs}; agreement: mean cosine similarity with the unpatched model's",
        size=7.5, color=FAINT,
    )  # fmt: skip
    return figure


if __name__ == "__main__":
    main()
