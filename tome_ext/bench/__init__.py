"""``tome-ext bench``: how fast a model runs, with and without merging.

Beside the unpatched model stands the ceiling, the same model with tokens sliced off where others
are merged: what merging would give if it were free. ``docs/benchmarking.md`` says how to read it.
"""

from __future__ import annotations

from ._run import Options, run

__all__ = ["Options", "run"]
