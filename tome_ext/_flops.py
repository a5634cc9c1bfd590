"""What the operators count in ``torch.utils.flop_counter.FlopCounterMode``.

As torch counts its own: floating point operations of matrix products, of which a multiply-add is
two. Attention counts as ``F.scaled_dot_product_attention`` does, and ``match`` its scores, although
most of them are never kept. What reads and writes, such as merging, norms and softmax, counts
nothing there or here; its operators are registered all the same, so that none is overlooked.

Torch has no formula for its own attention on the CPU before 2.15. There it gets one, or a model
would count more with merging than without.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

import torch

__all__ = ["register"]

COUNTER = "torch.utils.flop_counter"

# Formulas take the shapes of tensors in place of tensors.
Shape = Any

NOTHING = ("select", "plan", "merge", "merge_add_norm", "merge_backward", "unmerge")


def register() -> None:
    """Tell torch's counter the formulas, as soon as somebody imports it.

    Not before: it imports Triton, which takes longer than all of this package.
    """
    if COUNTER in sys.modules:
        _register()
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the counter as Python does, and has the formulas registered whenever it has run."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas = {
        torch.ops.tome.match: _match,
        torch.ops.tome.attention_forward: _attention,
        torch.ops.tome.attention_backward: _attention_backward,
        torch.ops.tome.cls_attention: _cls_attention,
        **{getattr(torch.ops.tome, name): _nothing for name in NOTHING},
    }
    of_torch = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    }
    for name, formula in of_torch.items():
        operator = getattr(torch.ops.aten, name, None)
        if operator is not None and operator not in flop_registry:
            formulas[operator] = formula
    for operator, formula in formulas.items():
        registered: Any = register_flop_formula(operator)
        registered(formula)


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


def _match(
    metric: Shape,
    r: int,
    num_prefix_tokens: int = 0,
    *args: Any,
    targets: Shape | None = None,
    threshold: float | None = None,
    **kwargs: Any,
) -> int:
    batch, num_tokens, dim = metric[0], metric[-2], metric[-1]
    free = max(num_tokens - num_prefix_tokens, 0)
    b = free // 2 if targets is None else targets[0]
    a = free - b
    return 0 if (r <= 0 and threshold is None) or b == 0 else 2 * batch * a * b * dim


def _attention(q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(q, k, v))


def _attention_backward(
    grad: Shape, q: Shape, k: Shape, v: Shape, *args: Any, **kwargs: Any
) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return int(sdpa_backward_flop_count(grad, q, k, v))


def _cls_attention(q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    batch, heads, num_tokens, dim = k
    return 2 * int(batch * heads * num_tokens * dim)
