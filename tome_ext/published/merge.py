"""``tome.merge``: see :mod:`tome_ext.matching`."""

from __future__ import annotations

from ..matching import (
    bipartite_soft_matching,
    do_nothing,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)

__all__ = [
    "bipartite_soft_matching",
    "do_nothing",
    "kth_bipartite_soft_matching",
    "merge_source",
    "merge_wavg",
    "random_bipartite_soft_matching",
]
