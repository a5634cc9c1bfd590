"""How the CPU benchmarks time contenders side by side, and what they write beside the figures."""

from __future__ import annotations

import json
from pathlib import Path

from tome_ext.bench.timing import Contender, describe_machine, interleave, ratio

__all__ = ["Contender", "describe_machine", "interleave", "ratio", "write_json"]


def write_json(path: Path, machine: dict[str, object], rows: list[dict[str, object]]) -> None:
    """The form that tables.py reads."""
    path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
