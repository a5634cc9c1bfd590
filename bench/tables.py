"""Writes the README's tables from the JSON that the benchmarks left in bench/results/.

python bench/readme_tables.py          # rewrite README.md
python bench/readme_tables.py --check  # fail if README.md is not what the JSON says
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


def ops_table(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels, "
        f"torch {machine['torch']}; milliseconds, medians.",
    ]
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


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    table = ops_table(json.loads((ROOT / "bench/results/ops_cpu.json").read_text()))
    new, count = re.subn(
        r"(<!-- ops_cpu -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        old,
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit("README.md: expected one block <!-- ops_cpu --> ... <!-- end -->")
    if "--check" in sys.argv:
        if new != old:
            print("README.md: its tables are not those of bench/results/; run this script")
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
