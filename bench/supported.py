"""Writes README's table of supported models from what the patches say of themselves.

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

README = Path(__file__).resolve().parents[1] / "README.md"
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


def main() -> int:
    old = README.read_text()
    block = r"(<!-- supported -->\n).*?(<!-- end -->)"
    new, count = re.subn(block, lambda found: f"{found[1]}{table()}\n{found[2]}", old, flags=re.S)
    if count != 1:
        raise SystemExit("README.md: expected one block <!-- supported --> ... <!-- end -->")
    if new != old and "--check" in sys.argv:
        print("README.md: the table of supported models is stale; run this script")
        return 1
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
