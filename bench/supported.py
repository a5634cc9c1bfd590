"""Writes the tables of supported models, in docs/models.md and README.md, from what patches say.

    python bench/supported.py [--check]

``--check`` changes nothing and fails if the table is stale. `tome-ext models` reads the same
source, ``FAMILIES`` of each module in ``tome_ext/patch/hosts``.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

from tome_ext.patch.registry import HOSTS

ROOT = Path(__file__).resolve().parents[1]
NAMES = {"timm": "timm", "transformers": "Transformers", "torchvision": "torchvision"}
NAMES["open_clip"] = "OpenCLIP"


def table() -> str:
    """The table, in Markdown."""
    lines = ["| library | models | to know |", "| --- | --- | --- |"]
    for name, host in HOSTS.items():
        assert isinstance(host.module, str)
        for family in import_module(host.module).FAMILIES:
            lines.append(f"| {NAMES[name]} | {family.name} | {family.notes} |")
    return "\n".join(lines)


def short_table() -> str:
    """A line for each library."""
    lines = ["| library | models |", "| --- | --- |"]
    for name, host in HOSTS.items():
        assert isinstance(host.module, str)
        families = (family.name for family in import_module(host.module).FAMILIES)
        names = dict.fromkeys(
            part for family in families for part in family.split(", ") if part != "..."
        )
        lines.append(f"| {NAMES[name]} | {', '.join(names)} |")
    return "\n".join(lines)


def main() -> int:
    stale = False
    for document, name, new_table in (
        ("docs/models.md", "supported", table()),
        ("README.md", "supported_short", short_table()),
    ):
        path = ROOT / document
        old = path.read_text()
        block = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        new, count = re.subn(
            block, lambda found, text=new_table: f"{found[1]}{text}\n{found[2]}", old, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{document}: expected one block <!-- {name} --> ... <!-- end -->")
        if new != old and "--check" in sys.argv:
            print(f"{document}: the table of supported models is stale; run this script")
            stale = True
        elif new != old:
            path.write_text(new)
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
