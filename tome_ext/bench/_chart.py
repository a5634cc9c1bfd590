"""Speed against r or keep rate as a picture: a panel per batch size.

A row of panels has one model, dtype and method.
"""

from __future__ import annotations

from typing import Any

from ._contenders import CEILING, OURS, UNPATCHED
from ._rows import LABELS, Row, hardware, how, title

__all__ = ["draw"]

PANEL = 4.6, 3.6  # inches
COLORS = {UNPATCHED: "#777777", CEILING: "#222222", OURS: "#d1495b"}
PEER_COLORS = ("#2e86ab", "#e8a33d", "#5b8e55", "#8661c1")
INK, FAINT = "#222222", "#666666"


def draw(rows: list[Row], machine: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Draw the speed-up of every contender, as the table has it."""
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((r.model, r.image_size, r.dtype, r.method) for r in rows))
    batches = list(dict.fromkeys(row.batch_size for row in rows))
    peers = list(dict.fromkeys(name for row in rows for name in row.contenders))
    peers = [name for name in peers if name not in COLORS]
    colors = COLORS | {p: PEER_COLORS[i % len(PEER_COLORS)] for i, p in enumerate(peers)}

    size = max(PANEL[0] * len(batches), 6.4), PANEL[1] * len(groups) + 0.9  # legend and note
    figure: Any = Figure(figsize=size, dpi=150, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    panels = figure.subplots(len(groups), len(batches), squeeze=False, sharey=True)
    for group, line in zip(groups, panels, strict=True):
        for batch, axes in zip(batches, line, strict=True):
            key = (*group, batch)
            shown = [
                row
                for row in rows
                if (row.model, row.image_size, row.dtype, row.method, row.batch_size) == key
            ]
            panel(axes, sorted(shown, key=amount), colors)
            name, _, rest = title(shown[0]).partition(", ")
            axes.set_title(f"{name}\n{rest}", size=9.5)
    # One scale, so that panels compare.
    panels[0][0].set_ylim(bottom=0, top=1.08 * max(axes.dataLim.y1 for axes in panels.flat))
    figure.legend(
        *panels[0][0].get_legend_handles_labels(),
        loc="outside upper center", ncols=len(colors), frameon=False, fontsize=9.5,
    )  # fmt: skip
    note = (
        f"{hardware(machine)}, {how(settings)}, torch {machine['torch']}, "
        f"tome_ext {machine['tome_ext']}\n"
        "Medians, the contenders taking turns. Ceiling: tokens sliced off instead."
    )
    if any("speed_up" in figures.unsteady for row in rows for figures in row.contenders.values()):
        note += " Points left out: unsteady times."
    figure.supxlabel(note, size=7.5, color=FAINT)
    return figure


def amount(row: Row) -> float:
    """What a row is drawn over."""
    return row.r if row.keep_rate is None else row.keep_rate


def panel(axes: Any, rows: list[Row], colors: dict[str, str]) -> None:
    """One batch size of one model."""
    axes.axhline(1, color=colors[UNPATCHED], linestyle="--", linewidth=1.3, label=UNPATCHED)
    for name, color in colors.items():
        points = [
            (amount(row), row.contenders[name].speed_up)
            for row in rows
            if name in row.contenders and "speed_up" not in row.contenders[name].unsteady
        ]
        if name == UNPATCHED:
            continue
        ceiling = name == CEILING
        axes.plot(
            [x for x, _ in points],
            [times for _, times in points],
            color=color,
            label=LABELS.get(name, name),
            linewidth=1.3 if ceiling else 2,
            linestyle=":" if ceiling else "-",
            marker="_" if ceiling else "o",
            markersize=10 if ceiling else 4.5,
            zorder=4 if name == OURS else 3,
        )
    axes.set_xticks(sorted({amount(row) for row in rows}))
    by_rate = rows[0].keep_rate is not None
    axes.set_xlabel("keep rate" if by_rate else "r, tokens removed in every block", size=9)
    axes.set_ylabel("speed-up", size=9)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.margins(x=0.06)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8.5, labelleft=True, color=FAINT, labelcolor=INK)
    axes.spines[:].set_color("#bbbbbb")
    axes.spines["right"].set_visible(False)
    axes.spines["top"].set_visible(False)
