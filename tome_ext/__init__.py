"""Token merging for Vision Transformers (ToMe, arXiv 2210.09461): operators and model patches.

>>> import tome_ext as tome
>>> tome.patch.timm(model)
>>> model.r = 13
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import onnx, ops, patch, reference, utils
from ._install import install_as
from ._version import __version__
from .attention import cls_attention, proportional_attention
from .matching import (
    bipartite_soft_matching,
    kth_bipartite_soft_matching,
    merge_source,
    merge_wavg,
    random_bipartite_soft_matching,
)
from .plan import MergePlan, match, select
from .schedule import parse_r
from .setting import Setting
from .utils import info

if TYPE_CHECKING:
    from . import vis
    from .tuning import tune
    from .vis import make_visualization

__all__ = [
    "MergePlan",
    "Setting",
    "__version__",
    "bipartite_soft_matching",
    "cls_attention",
    "info",
    "install_as",
    "kth_bipartite_soft_matching",
    "make_visualization",
    "match",
    "merge_source",
    "merge_wavg",
    "onnx",
    "ops",
    "parse_r",
    "patch",
    "proportional_attention",
    "random_bipartite_soft_matching",
    "reference",
    "select",
    "tune",
    "utils",
    "vis",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    # The search needs torch's counter of operations, which takes long to import.
    if name == "tune":
        return import_module(".tuning", __name__).tune
    # Drawing needs Pillow and NumPy, which the rest does not.
    if name in ("vis", "make_visualization"):
        vis = import_module(".vis", __name__)
        return vis if name == "vis" else vis.make_visualization
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
