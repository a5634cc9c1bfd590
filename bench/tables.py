"""Writes the tables of the README and docs/ from the JSON that benchmarks left in bench/results/.

python bench/tables.py          # rewrite them
python bench/tables.py --check  # fail if one is not what the JSON says
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TITLES = {
    "merge": ("merge, mean with sizes", "clone of x", "of_clone"),
    "unmerge": ("unmerge", "clone of its output", "of_clone"),
    "match": ("match, with the mean over heads", "matmul of the scores alone", "of_matmul"),
}


def row(entry: dict[str, Any]) -> str:
    ms = entry["ms"]
    _, _, ratio = TITLES[entry["op"]]
    floor = ms["clone" if "clone" in ms else "matmul"]
    return (
        f"| {entry['shape']} | {entry['dtype']} | {ms['tome']:.3g} | {floor:.3g} | "
        f"{entry[ratio]:.2f} | {ms['stock']:.3g} | {entry['over_stock']:.1f}x |"
    )


def machine_line(result: dict[str, Any], figures: str = "milliseconds, medians") -> str:
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels, "
        f"torch {machine['torch']}; {figures}."
    )


def ops_table(result: dict[str, Any]) -> str:
    lines = [machine_line(result)]
    for op, (title, floor, _) in TITLES.items():
        lines += [
            "",
            f"| {title} | dtype | tome | {floor} | tome / that | stock | stock / tome |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [row(entry) for entry in result["rows"] if entry["op"] == op]
    (large,) = (entry for entry in result["rows"] if "extra_bytes" in entry)
    ours, stock = (large["extra_bytes"][name] / 2**20 for name in ("tome", "stock"))
    lines += [
        "",
        f"The large match ({large['shape']}) takes {ours:.1f} MiB of extra memory where stock "
        f"takes {stock:.0f} MiB ({100 * ours / stock:.1f}%).",
    ]
    return "\n".join(lines)


def attention_table(result: dict[str, Any]) -> str:
    """Forward, backward and class token beside what users call today, for the README."""
    lines = [
        machine_line(result),
        "",
        "| attention | dtype | forward | SDPA, mask | SDPA, no sizes | explicit | backward | "
        "SDPA, mask | cls_attention | explicit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {(entry["op"], entry["shape"], entry["dtype"]): entry for entry in result["rows"]}
    for (op, shape, dtype), forward in rows.items():
        if op != "attention":
            continue
        backward = rows["attention_backward", shape, dtype]
        cls = rows["cls_attention", shape, dtype]
        cells = [
            shape,
            dtype,
            f"{forward['ms']['tome']:.3g}",
            *(f"{forward['over'][name]:.2f}x" for name in ("masked", "unbiased", "explicit")),
            f"{backward['ms']['tome']:.3g}",
            f"{backward['over']['masked']:.2f}x",
            f"{cls['ms']['tome']:.3g}",
            f"{cls['over']['explicit']:.1f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def alternatives_table(result: dict[str, Any]) -> str:
    """Every stock form of proportional attention: time over ours, and error."""
    forms = {
        "masked": "SDPA, float mask",
        "rank_1": "rank-1, SDPA",
        "flex": "FlexAttention",
        "explicit": "explicit",
    }
    lines = [
        machine_line(result),
        "",
        f"| attention | dtype | tome | {' | '.join(forms.values())} |",
        f"| --- | --- | ---: | {' | '.join('---:' for _ in forms)} |",
    ]
    for entry in result["rows"]:
        if entry["op"] != "attention":
            continue
        error = entry["error"]
        cells = [f"{entry['over'][name]:.2f}x, {error[name]:.1e}" for name in forms]
        ours = f"{entry['ms']['tome']:.3g} ms, {error['tome']:.1e}"
        lines.append(f"| {entry['shape']} | {entry['dtype']} | {ours} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models_table(result: dict[str, Any]) -> str:
    """Whole models: images/s, and how near to the ceiling; of `tome-ext bench --json`."""
    rows = result["rows"]
    ours = ("unpatched", "ceiling", "tome_ext")
    peers = list(dict.fromkeys(n for entry in rows for n in entry["contenders"] if n not in ours))
    heads = ["unpatched", "ceiling", "tome_ext", "speed-up", "of the ceiling"]
    heads += [f"{peer}, of the ceiling" for peer in peers]
    lines = [
        machine_line(result, f"images/s, medians, {result['settings']['mode']}"),
        "",
        f"| model | method | dtype | B | {' | '.join(heads)} |",
        f"| --- | --- | --- | ---: |{' ---: |' * len(heads)}",
    ]
    for entry in rows:
        figures, rate = entry["contenders"], entry["keep_rate"]
        amount = f"r = {entry['r']}" if rate is None else f"keep rate {rate:g}"
        cells = [
            entry["model"],
            f"{entry['method']}, {amount}",
            entry["dtype"],
            str(entry["batch_size"]),
            *(f"{figures[name]['images_per_second']:.3g}" for name in ours),
            f"{figures['tome_ext']['speed_up']:.2f}x",
            f"{figures['tome_ext']['of_ceiling']:.3f}",
            *(f"{figures[n]['of_ceiling']:.3f}" if n in figures else "-" for n in peers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# Where each table stands, and the figures it is made from.
TABLES = [
    ("README.md", "models_cpu", "models_cpu.json", models_table),
    ("README.md", "ops_cpu", "ops_cpu.json", ops_table),
    ("README.md", "attention_cpu", "attention_cpu.json", attention_table),
    ("docs/benchmarking.md", "models_cpu_compile", "models_cpu_compile.json", models_table),
    ("docs/benchmarking.md", "models_cpu_avx2", "models_cpu_avx2.json", models_table),
    ("docs/attention.md", "alternatives_cpu", "attention_cpu.json", alternatives_table),
]


def main() -> int:
    stale = False
    for document, name, figures, make in TABLES:
        path = ROOT / document
        old = path.read_text()
        table = make(json.loads((ROOT / "bench/results" / figures).read_text()))
        new, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}{table}\n{found[2]}",
            old,
            flags=re.DOTALL,
        )
        if count != 1:
            raise SystemExit(f"{document}: expected one block <!-- {name} --> ... <!-- end -->")
        if new != old and "--check" in sys.argv:
            print(f"{document}: table {name} is not that of bench/results/; run this script")
            stale = True
        elif new != old:
            path.write_text(new)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
