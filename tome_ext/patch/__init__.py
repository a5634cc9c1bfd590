"""Patches that make models of other libraries merge tokens.

``_engine``, ``_swap`` and ``_model`` are common and know no library; each library has one adapter
(``_timm``: which models it takes; ``_timm_modules``: where their blocks, q/k/v and residual are). A
library is imported only when its patch is called.
"""

from __future__ import annotations

from ._model import remove
from ._timm import timm
from ._tokens import Tokens

__all__ = ["Tokens", "remove", "timm"]
