"""What merging costs in answers: a trained ViT, real pictures, every method at equal operations.

    python bench/fidelity.py --data FOLDER --json bench/results/fidelity.json
    python bench/fidelity.py --json FILE --chart docs/images/fidelity.png    # draws what is there

The model is CLIP's ViT-B/16; bench/fidelity_data.py says what is fetched into FOLDER (300 MB), with
which licences. One half of every set of pictures is for choosing (``--tune``), and for nearest
neighbours and linear probes to learn from, without merging; the figures are of the other half. A
picture's deviation is 1 - cosine of its embedding to that of the model as it is. Beside the methods
stands what a sceptic asks for: a smaller picture, merging at random, leaving out the last tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from fidelity_data import SIDE, SOURCES, TOWER, Pictures, clip_tower, load
from torch import Tensor

import tome_ext
from tome_ext._command import Reduction, find_device
from tome_ext.bench._contenders import share_weights, sliced
from tome_ext.bench._cost import count_flops
from tome_ext.bench.timing import describe_machine, interleave, ratio
from tome_ext.patch.common.methods import METHODS, AttentionInputs, Method, MethodName, Ranks, ToMe

R_VALUES = (4, 8, 12, 16)
# Schedules are searched for: of a method, for the operations of an r.
TUNED: tuple[tuple[MethodName, int], ...] = (
    ("tome", 12), ("guided", 8), ("guided", 12), ("guided", 16),
)  # fmt: skip
# From which similarity on a method merges.
THRESHOLDS: dict[MethodName, tuple[float, ...]] = {
    "tome": (0.95, 0.9, 0.85, 0.8),
    "guided": (0.95, 0.9, 0.85, 0.8, 0.75),
}
BATCHES = (1, 4, 16)  # whose images share the number of rows of the fullest
SIDES = (208, 192, 176, 160)  # of smaller pictures, pixels
RIDGES = np.logspace(-4, 2, 25)
NAMES = {
    "none": "unmerged",
    "tome": "ToMe",
    "guided": "guided",
    "tuned tome": "ToMe, tuned",
    "tuned guided": "guided, tuned",
    "near tome": "ToMe, by threshold",
    "near guided": "guided, by threshold",
    "evit": "EViT",
    "topk": "Top-K",
    "small": "a smaller picture",
    "random": "merged at random",
    "sliced": "left out",
}
COLORS = {
    "tome": "#d1495b",
    "guided": "#6a4c93",
    "tuned tome": "#7d1128",
    "tuned guided": "#3b1f5c",
    "near tome": "#d1495b",
    "near guided": "#6a4c93",
    "evit": "#2e86ab",
    "topk": "#e8a33d",
    "small": "#3f7d20",
    "random": "#8a8a8a",
    "sliced": "#bdbdbd",
}
MARKS = {"tuned": ("-", "*", 11), "near": ("--", "D", 4)}  # line, marker and its size
INK, FAINT = "#222222", "#666666"


@dataclass(frozen=True)
class RandomMerging(ToMe):
    """As many merges as ToMe makes, of tokens that have nothing to do with each other."""

    name: ClassVar[MethodName] = cast("MethodName", "random")

    def rank(self, of: AttentionInputs) -> Ranks:
        k = of.k
        generator = torch.Generator(k.device).manual_seed(k.shape[2])
        noise = torch.randn(k.shape[0], 1, *k.shape[2:], generator=generator, device=k.device)
        return Ranks(noise, None)


def patch_by(method: type[Method], model: Any, r: int) -> Any:
    """The model patched with a method that users can't ask for."""
    METHODS[method.name] = method
    try:
        return Reduction(method.name, r=r).patch(model)
    finally:
        del METHODS[method.name]


@dataclass(frozen=True)
class Contender:
    """A way to spend fewer operations.

    Attributes:
        kind: of ``NAMES``.
        amount: how far it goes, in words.
        make: the model of it, of a copy that shares the weights.
        side: of the pictures it takes.
        threshold: whether pictures have numbers of tokens of their own.
    """

    kind: str
    amount: str
    make: Callable[[Any], Any]
    side: int = SIDE
    threshold: bool = False


def contenders(tuned: list[dict[str, Any]]) -> list[Contender]:
    """All of them, the unmerged model first."""
    found = [Contender("none", "", lambda model: model)]
    for r in R_VALUES:
        amount = f"r = {r}"
        for method in METHODS:
            reduction = Reduction(cast("MethodName", method), r=r)
            found.append(Contender(method, amount, reduction.patch))
        cut = Reduction("tome", r=r)
        found.append(Contender("random", amount, lambda m, r=r: patch_by(RandomMerging, m, r)))
        found.append(Contender("sliced", amount, lambda m, cut=cut: sliced(m, cut)))
    for near, values in THRESHOLDS.items():
        for value in values:
            make = Reduction(near, threshold=value).patch
            found.append(Contender(f"near {near}", f"threshold = {value}", make, threshold=True))
    rate = Reduction("evit", keep_rate=0.7)
    found.append(Contender("evit", "keep rate 0.7", rate.patch))
    for side in SIDES:
        found.append(Contender("small", f"{side} px", lambda m, s=side: resized(m, s), side))
    for setting in tuned:
        # Whether or not the pictures that `tune` reported on were enough to show that it is better.
        r, method = setting["report"]["found"], setting["method"]
        make = Reduction(method, r=r).patch
        found.append(Contender(f"tuned {method}", f"r = {r}", make))
    return found


def resized(model: Any, side: int) -> Any:
    """The model for pictures of another size, its positions interpolated."""
    model.set_input_size(img_size=side)
    return model


# --- measuring ----------------------------------------------------------------------------------


def embed(model: Any, x: Tensor, batch_size: int, device: torch.device) -> np.ndarray:
    """Embeddings (n, 512) of length 1, float64."""
    found = [model(part.to(device)).double().cpu() for part in x.split(batch_size)]
    return F.normalize(torch.cat(found), dim=1).numpy()


def deviations(found: np.ndarray, plain: np.ndarray) -> np.ndarray:
    """1 - cosine (n,) of embeddings (n, C) of length 1."""
    return (1 - (found * plain).sum(1)).clip(0)


def deviation_figures(far: np.ndarray) -> dict[str, float]:
    """Mean, median, 95th percentile, and the worst picture's."""
    return {
        "mean": float(far.mean()),
        "median": float(np.median(far)),
        "p95": float(np.quantile(far, 0.95)),
        "worst": float(far.max()),
    }


def fit_probe(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression on the labels; its strength by the squared error when one is left out.

    Returns weights (C + 1, K) and the K kinds.
    """
    kinds = np.unique(labels)
    y = (labels[:, None] == kinds).astype(float)
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    errors = []
    for ridge in RIDGES:
        shrunk = s**2 / (s**2 + ridge)
        fitted = u @ (shrunk[:, None] * (u.T @ y))
        leverage = (u**2 * shrunk).sum(1)
        errors.append((((y - fitted) / (1 - leverage)[:, None]) ** 2).sum())
    ridge = RIDGES[int(np.argmin(errors))]
    weights = vt.T @ ((s / (s**2 + ridge))[:, None] * (u.T @ y))
    return weights, kinds


class Answers:
    """What a set's labels say of embeddings: nearest neighbours and a linear probe.

    Both learn from the choosing half as the unmerged model sees it, which is how merging is used
    in a system that is there already.
    """

    def __init__(self, pictures: Pictures, plain: np.ndarray) -> None:
        assert pictures.labels is not None
        self.known, self.kinds = plain[pictures.chooses], pictures.labels[pictures.chooses]
        self.right = pictures.labels[~pictures.chooses]
        self.weights, self.classes = fit_probe(self.known, self.kinds)
        self.plain = self.by_each(plain[~pictures.chooses])

    def by_each(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """The kinds that each way of answering gives embeddings (n, C)."""
        scores = np.concatenate([x, np.ones((len(x), 1))], 1) @ self.weights
        nearest = (x @ self.known.T).argmax(1)
        return {"probe": self.classes[scores.argmax(1)], "neighbour": self.kinds[nearest]}

    def figures(self, x: np.ndarray) -> dict[str, dict[str, float]]:
        """Accuracy, how often the unmerged model answers the same, and the standard error of the
        difference of the two accuracies.
        """
        found = {}
        for name, given in self.by_each(x).items():
            right, before = given == self.right, self.plain[name] == self.right
            changed = right.astype(float) - before
            found[name] = {
                "accuracy": float(right.mean()),
                "same": float((given == self.plain[name]).mean()),
                "error": float(changed.std() / len(changed) ** 0.5),
            }
        return found


def measure(options: argparse.Namespace) -> None:
    """Everything but the chart, into ``options.json``, row by row.

    What is there already, of the same pictures on the same machine, is not measured again.
    """
    device = find_device(options.device)
    model = clip_tower(options.data).to(device)
    sets = load(options.data, options.most)
    # Those to report on, which every contender sees; those to choose by, the unmerged model only.
    report = {name: pictures.tensor(~pictures.chooses) for name, pictures in sets.items()}
    choose = {name: pictures.tensor(pictures.chooses) for name, pictures in sets.items()}
    result: dict[str, Any] = {
        "model": TOWER,
        "sources": [source.package for source in SOURCES],
        "dtype": "float32",
        "pictures": {name: int((~p.chooses).sum()) for name, p in sets.items()},
        "choosing": {name: int(p.chooses.sum()) for name, p in sets.items()},
        "machine": describe_machine(device),
        "batch": options.batch_size,
    }
    before: dict[str, Any] = {"tuned": [], "rows": []}
    if options.json.exists():
        found = json.loads(options.json.read_text())
        if result.items() <= found.items():
            before = found
    result["tuned"], result["padding"] = before["tuned"], before.get("padding", [])
    if options.tune:
        there = {(setting["method"], setting["as_r"]): setting for setting in before["tuned"]}
        result["tuned"] = [
            there.get((method, r)) or tune(model, choose, method, r, options, device)
            for method, r in TUNED
        ]
    known = {(row["kind"], row["amount"]): row for row in before["rows"]}

    plain = {name: embed(model, part, options.batch_size, device) for name, part in report.items()}
    answers = {}
    for name, pictures in sets.items():
        if pictures.labels is not None:
            both = np.empty((len(pictures.images), plain[name].shape[1]))
            both[~pictures.chooses] = plain[name]
            both[pictures.chooses] = embed(model, choose[name], options.batch_size, device)
            answers[name] = Answers(pictures, both)

    def row_of(contender: Contender) -> dict[str, Any]:
        made = contender.make(share_weights(model))
        x = report
        if contender.side != SIDE:
            x = {name: p.tensor(~p.chooses, contender.side) for name, p in sets.items()}
        one = next(iter(x.values()))[:1].to(device)
        found: dict[str, np.ndarray] = {}

        def run(batch_size: int) -> None:
            for name, part in x.items():
                found[name] = embed(made, part, batch_size, device)

        if contender.threshold:  # each picture has operations of its own
            flops = count_flops(lambda: run(1)) / sum(len(part) for part in x.values())
        else:
            run(options.batch_size)
            flops = count_flops(lambda: made(one))
        far = {name: deviations(found[name], plain[name]) for name in sets}
        far["all"] = np.concatenate(list(far.values()))
        return {
            "kind": contender.kind,
            "name": NAMES[contender.kind],
            "amount": contender.amount,
            "gflops": flops / 1e9,
            "deviation": {name: deviation_figures(d) for name, d in far.items()},
            "answers": {name: judge.figures(found[name]) for name, judge in answers.items()},
        }

    every = contenders(result["tuned"])
    result["rows"] = []
    for contender in every:
        row = known.get((contender.kind, contender.amount)) or row_of(contender)
        result["rows"].append(row)
        show(row)
        write(options.json, result)
    if options.speed:
        shown = torch.cat(list(report.values()))
        shown = shown[torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))]
        measure_speed(model, every, result["rows"], shown, options, device)
        result["padding"] = result["padding"] or measure_padding(
            model, every, shown, options, device
        )
    write(options.json, result)


def write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1) + "\n")


def tune(
    model: Any,
    choose: dict[str, Tensor],
    method: MethodName,
    r: int,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """What ``tome_ext.tune`` finds on pictures to choose by, for the operations of ToMe's r."""
    x = next(iter(choose.values()))[:1].to(device)
    whole = count_flops(lambda: model(x))
    merged = Reduction("tome", r=r).patch(share_weights(model))
    share = count_flops(lambda: merged(x)) / whole
    each = options.tune_pictures // len(choose)
    pictures = torch.cat([part[:: max(1, len(part) // each)][:each] for part in choose.values()])
    setting = tome_ext.tune(
        model, pictures.to(device), flops=share, method=method, seconds=options.tune,
        batch_size=options.batch_size,
    )  # fmt: skip
    print(f"{method}, for the operations of r = {r}: {setting.verdict}", flush=True)
    return {**asdict(setting), "as_r": r, "seconds": options.tune, "verdict": setting.verdict}


def measure_speed(
    model: Any,
    every: list[Contender],
    rows: list[dict[str, Any]],
    pictures: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """How many times as fast as the unmerged model each is, all taking turns."""
    shape = (options.batch_size, 3)
    x = torch.randn(*shape, SIDE, SIDE, device=device)
    runs: dict[str, Callable[[], object]] = {"plain": lambda: model(x)}
    for i, contender in enumerate(every):
        if contender.kind == "none":
            rows[i]["speed"] = 1.0
        elif contender.kind not in ("random", "sliced") and "speed" not in rows[i]:
            made = contender.make(share_weights(model))
            y = torch.randn(*shape, contender.side, contender.side, device=device)
            runs[str(i)] = lambda made=made, y=y: made(y)
            if contender.threshold:
                runs[str(i)] = in_turn(made, pictures, options.batch_size, device)
    times = interleave(runs, options.speed, device, warm_up=1, fewest=5)
    for name in runs:
        if name != "plain":
            rows[int(name)]["speed"] = ratio(times, "plain", name)


def in_turn(
    model: Any, pictures: Tensor, batch_size: int, device: torch.device
) -> Callable[[], object]:
    """Runs the model on the first batch of pictures, then on the second, and so on without end."""
    whole = len(pictures) // batch_size * batch_size
    batches = itertools.cycle(pictures[:whole].to(device).split(batch_size))
    return lambda: model(next(batches))


def measure_padding(
    model: Any,
    every: list[Contender],
    pictures: Tensor,
    options: argparse.Namespace,
    device: torch.device,
) -> list[dict[str, Any]]:
    """What a batch leaves of the speed of thresholds: its images have as many rows as the fullest.

    In each round all get the same pictures; speeds are over the unmerged model with that batch
    size.
    """
    made = {(each.kind, each.amount): each for each in every if each.threshold}
    made |= {(each.kind, each.amount): each for each in every if each.kind == "tome"}
    rows = []
    for batch_size in BATCHES:
        runs = {"plain": in_turn(model, pictures, batch_size, device)}
        for i, contender in enumerate(made.values()):
            fast = contender.make(share_weights(model))
            runs[str(i)] = in_turn(fast, pictures, batch_size, device)
        times = interleave(runs, options.speed / len(BATCHES), device, warm_up=1, fewest=5)
        rows += [
            {
                "batch": batch_size,
                "kind": kind,
                "name": NAMES[kind],
                "amount": amount,
                "speed": sum(times["plain"]) / sum(times[str(i)]),
            }
            for i, (kind, amount) in enumerate(made)
        ]
    return rows


def show(row: dict[str, Any]) -> None:
    figures = row["deviation"]["all"]
    print(
        f"{row['kind']:7} {row['amount'][:24]:24} {row['gflops']:6.2f} GFLOP  "
        f"mean {figures['mean']:.5f}  median {figures['median']:.5f}  95% {figures['p95']:.5f}",
        flush=True,
    )


# --- drawing ------------------------------------------------------------------------------------


def draw(result: dict[str, Any]) -> Any:
    """Deviation against operations, a line for each kind; mean and 95th percentile."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9.6, 4.8), dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    whole = result["rows"][0]["gflops"]
    titles = {"mean": "mean over the pictures", "p95": "95 of 100 pictures are nearer"}
    panels = figure.subplots(1, len(titles), sharey=True)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for kind, color in COLORS.items():
            rows = [row for row in result["rows"] if row["kind"] == kind]
            line = [row for row in rows if not row["amount"].startswith("keep")]
            at = [row["gflops"] / whole for row in line]
            style, marker, size = MARKS.get(kind.partition(" ")[0], ("-", "o", 4))
            axes.plot(
                at, [row["deviation"]["all"][key] for row in line],
                color=color, linewidth=1.8, linestyle=style if len(line) > 1 else "",
                marker=marker, markersize=size,
                label=NAMES[kind],
            )  # fmt: skip
            for row in line if kind in ("tome", "small") else ():
                axes.annotate(
                    row["amount"], (row["gflops"] / whole, row["deviation"]["all"][key]),
                    xytext=(4, 5) if kind == "tome" else (-4, -11), textcoords="offset points",
                    ha="left" if kind == "tome" else "right", fontsize=7, color=color,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(title, size=10)
        axes.set_xlabel("operations, over those without merging", size=9)
        axes.grid(color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.06, y=0.1)
        axes.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
        axes.spines[:].set_color("#bbbbbb")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("1 - cosine to the unmerged embedding", size=9)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center", ncols=-(-len(COLORS) // 2), frameon=False, fontsize=9,
    )  # fmt: skip
    count = sum(result["pictures"].values())
    figure.supxlabel(f"CLIP ViT-B/16, {count} pictures nothing was chosen by", size=8, color=FAINT)
    return figure


def main() -> None:
    """Measure, draw, or both."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, metavar="FOLDER", help="measure; files go here")
    options.add_argument("--json", type=Path, metavar="FILE", required=True)
    options.add_argument("--chart", type=Path, metavar="FILE")
    options.add_argument("--most", type=int, metavar="N", help="pictures of a set (default: all)")
    options.add_argument("--device", default="cpu")
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--speed", type=float, default=0, metavar="SECONDS", help="measure it too")
    options.add_argument("--tune", type=float, default=0, metavar="SECONDS", help="search so long")
    options.add_argument("--tune-pictures", type=int, default=96, metavar="N")
    given = options.parse_args()
    if given.data is not None:
        with torch.inference_mode():
            measure(given)
    if given.chart is not None:
        draw(json.loads(given.json.read_text())).savefig(given.chart)


if __name__ == "__main__":
    sys.exit(main())
