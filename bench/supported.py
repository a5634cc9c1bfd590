"""Writes the tables of supported models, in docs/models.md and README.md, from what patches say.

    python bench/supported.py [--check]

``--check`` changes nothing and fails if the table is stale. `tome-ext models` reads the same
source, ``FAMILIES`` of each module in ``tome_ext/patch/hosts``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from tables import put_table

from tome_ext.patch.registry import HOSTS

NAMES = {"timm": "timm", "transformers": "Transformers", "torchvision": "torchvision"}
NAMES["open_clip"] = "OpenCLIP"


def libraries() -> Iterator[tuple[str, Any]]:
    """Each library's name and families."""
    for name, host in HOSTS.items():
        assert isinstance(host.module, str)
        yield NAMES[name], import_module(host.module).FAMILIES


def table() -> str:
    """A line for each family, in Markdown."""
    lines = ["| library | models | to know |", "| --- | --- | --- |"]
    for library, families in libraries():
        lines += [f"| {library} | {family.name} | {family.notes} |" for family in families]
    return "\n".join(lines)


def short_table() -> str:
    """A line for each library."""
    lines = ["| library | models |", "| --- | --- |"]
    for library, families in libraries():
        parts = (part for family in families for part in family.name.split(", "))
        names = dict.fromkeys(part for part in parts if part != "...")
        lines.append(f"| {library} | {', '.join(names)} |")
    return "\n".join(lines)


def main() -> int:
    stale = put_table("docs/models.md", "supported", table(), "the patches")
    stale |= put_table("README.md", "supported_short", short_table(), "the patches")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
