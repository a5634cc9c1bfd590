"""The figures of a run, as numbers and as text."""

from __future__ import annotations

import csv
import io
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from .._command import Reduction
from ..patch.common.methods import MethodName
from ._contenders import CEILING, OURS, UNPATCHED
from .timing import ratio

__all__ = [
    "LABELS",
    "Cost",
    "Figures",
    "Row",
    "csv_text",
    "hardware",
    "heading",
    "how",
    "lines",
    "markdown",
    "summarize",
    "title",
]


RATIOS = (("speed_up", UNPATCHED), ("of_ceiling", CEILING))
AGREEMENT = 1.15  # at most this times: a ratio of two contenders, and that of their medians


@dataclass(frozen=True)
class Cost:
    """What a forward costs besides time.

    Attributes:
        tokens: per layer, how many its MLP works with.
        flops_per_image: of matrix products, convolutions and attention; a multiply-add is two.
        extra_memory: the most bytes held at once beyond weights and input, whole batch; None if it
            can't be told.
    """

    tokens: list[int]
    flops_per_image: int
    extra_memory: int | None


@dataclass(frozen=True)
class Figures:
    """One contender under one setting.

    Attributes:
        median_ms: milliseconds of a batch, the median over the rounds.
        p90_ms: nine of ten rounds were at least as fast.
        images_per_second: of the median.
        speed_up: time of the unpatched model over this one's, the median over the rounds.
        of_ceiling: time of the ceiling over this one's, the median over the rounds.
        flops_per_image: see :class:`Cost`.
        extra_memory: see :class:`Cost`.
        tokens_left: after the last merge, prefix tokens included.
        unsteady: those of the two ratios that contradict the medians beside them, by name, see
            :data:`AGREEMENT`.
    """

    median_ms: float
    p90_ms: float
    images_per_second: float
    speed_up: float
    of_ceiling: float
    flops_per_image: int
    extra_memory: int | None
    tokens_left: int
    unsteady: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One setting: its figures by contender, and the peers that could not take part, with why."""

    model: str
    image_size: tuple[int, int]
    dtype: str
    batch_size: int
    method: MethodName
    r: int
    keep_rate: float | None
    rounds: int
    contenders: dict[str, Figures]
    left_out: dict[str, str]

    @property
    def reduction(self) -> Reduction:
        """How tokens were reduced."""
        return Reduction(self.method, self.r, self.keep_rate)


def summarize(
    times: dict[str, list[float]], costs: dict[str, Cost], batch_size: int
) -> dict[str, Figures]:
    """The figures of contenders that took turns: milliseconds by name, one entry a round."""
    medians = {name: statistics.median(ms) for name, ms in times.items()}

    def agrees(name: str, over: str) -> bool:
        off = ratio(times, over, name) * medians[name] / medians[over]
        return 1 / AGREEMENT < off < AGREEMENT

    return {
        name: Figures(
            median_ms=medians[name],
            p90_ms=sorted(ms)[-(-9 * len(ms) // 10) - 1],
            images_per_second=1e3 * batch_size / medians[name],
            speed_up=ratio(times, UNPATCHED, name),
            of_ceiling=ratio(times, CEILING, name),
            flops_per_image=costs[name].flops_per_image,
            extra_memory=costs[name].extra_memory,
            tokens_left=costs[name].tokens[-1],
            unsteady=tuple(figure for figure, over in RATIOS if not agrees(name, over)),
        )
        for name, ms in times.items()
    }


# --- text ---------------------------------------------------------------------------------------

# Heading, width, and how a figure is shown; before them are the amount and the contender's name.
COLUMNS = (
    ("img/s", 8, lambda f: f"{f.images_per_second:.1f}"),
    ("ms", 8, lambda f: f"{f.median_ms:.4g}"),
    ("p90 ms", 8, lambda f: f"{f.p90_ms:.4g}"),
    ("speed-up", 8, lambda f: "?" if "speed_up" in f.unsteady else f"{f.speed_up:.2f}x"),
    ("of ceiling", 10, lambda f: "?" if "of_ceiling" in f.unsteady else f"{f.of_ceiling:.3f}"),
    ("GFLOP/img", 9, lambda f: f"{f.flops_per_image / 1e9:.2f}"),
    ("MiB", 7, lambda f: "-" if f.extra_memory is None else f"{f.extra_memory / 2**20:.1f}"),
    ("tokens", 6, lambda f: str(f.tokens_left)),
)
LABELS = {CEILING: "ceiling (sliced)", OURS: "tome_ext"}
NOTE = (
    "img/s, ms: medians, the contenders taking turns; ms and MiB of a whole batch, MiB at the peak "
    "beyond weights\nand input; ceiling: tokens sliced off instead; ?: the ratio contradicted the "
    "medians each time, as on a busy\nmachine"
)


def hardware(machine: dict[str, Any]) -> str:
    """The processor or GPU, and the number of threads."""
    count = machine["threads"]
    return f"{machine.get('gpu', machine['cpu'])}, {count} thread{'s' if count > 1 else ''}"


def how(settings: dict[str, Any]) -> str:
    """The mode, and whether backward was timed too."""
    training = ", forward and backward" if settings.get("train") else ""
    return f"{settings['mode']}{training}"


def title(row: Row) -> str:
    """What rows have in common that share a heading."""
    height, width = row.image_size
    method = "" if row.method == "tome" else f", {row.method}"
    return f"{row.model}, {height} x {width}, {row.dtype}, batch of {row.batch_size}{method}"


def heading(row: Row) -> str:
    """The names of the columns."""
    names = "".join(f"  {name:>{width}}" for name, width, _ in COLUMNS)
    return f"{'r' if row.keep_rate is None else 'keep':>4}  {'':16}{names}"


def lines(row: Row) -> list[str]:
    """A line for each contender of a row, and one for each peer that could not take part."""
    out: list[str] = []
    for name, figures in row.contenders.items():
        cells = "".join(f"  {show(figures):>{width}}" for _, width, show in COLUMNS)
        first = row.reduction.amount if not out else ""
        out.append(f"{first:>4}  {LABELS.get(name, name):16}{cells}")
    return out + [f"      {name}: left out, {reason}" for name, reason in row.left_out.items()]


def csv_text(rows: list[Row], machine: dict[str, Any], settings: dict[str, Any]) -> str:
    """A line for every contender of every row, with all of its figures and what they are of."""
    lines = [
        {
            "model": row.model,
            "height": row.image_size[0],
            "width": row.image_size[1],
            "dtype": row.dtype,
            "batch_size": row.batch_size,
            "method": row.method,
            "r": "" if row.keep_rate is not None else row.r,
            "keep_rate": "" if row.keep_rate is None else row.keep_rate,
            "rounds": row.rounds,
            "mode": settings["mode"],
            "train": settings["train"],
            "device": settings["device"],
            "machine": hardware(machine),
            "torch": machine["torch"],
            "contender": name,
            **asdict(figures),
            "unsteady": " ".join(figures.unsteady),
        }
        for row in rows
        for name, figures in row.contenders.items()
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def markdown(rows: list[Row], machine: dict[str, Any], settings: dict[str, Any]) -> str:
    """The tables as Markdown, below a line that says where they were measured."""
    out = [f"{hardware(machine)}; torch {machine['torch']}, {how(settings)}."]
    amount_name = "r" if rows[0].keep_rate is None else "keep rate"
    head = [amount_name, "", *(name for name, _, _ in COLUMNS)]
    for i, row in enumerate(rows):
        if i == 0 or title(row) != title(rows[i - 1]):
            ruler = ["---:", "---", *["---:"] * len(COLUMNS)]
            out += ["", f"{title(row)}:", "", _line(head), _line(ruler)]
        for name, figures in row.contenders.items():
            cells = [show(figures) for _, _, show in COLUMNS]
            out.append(_line([row.reduction.amount, LABELS.get(name, name), *cells]))
    return "\n".join([*out, "", " ".join(NOTE.split())]) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
