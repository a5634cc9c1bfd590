"""Classes for code with a patch of its own, which puts them, or subclasses, on timm's modules.

They speak the published protocol, on this package's operators: blocks share a dict
``_tome_info``; attention takes the sizes of its tokens, and returns its output and the metric that
tokens are matched by; each block takes its r from the front of ``_tome_info["r"]``. Models that
``apply_patch`` patched do not run them (:mod:`tome_ext.patch` is faster, and handles more models),
but their modules count as instances.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Attention, Block
from torch import Tensor

from ..matching import bipartite_soft_matching, merge_source, merge_wavg
from ..patch.common.attention_seam import SizedCall
from ..patch.hosts.timm_parts import TimmAttention, TimmBlock, attended, unpacked
from ..schedule import parse_r

__all__ = ["ToMeAttention", "ToMeBlock", "make_tome_class"]


class StandsFor(type):
    """Class of :class:`ToMeBlock` and :class:`ToMeAttention`, and of their subclasses.

    Modules that :func:`tome_ext.patch.timm` patched count as instances of the two classes. As they
    do not run their forward, to replace it is refused.
    """

    _tome_stands_for: type

    def __instancecheck__(cls, instance: object) -> bool:
        if super().__instancecheck__(instance):
            return True
        mine = vars(cls).get("_tome_stands_for")
        return mine is not None and isinstance(instance, mine)

    def __setattr__(cls, name: str, value: object) -> None:
        if name == "forward" and "_tome_stands_for" in vars(cls):
            raise TypeError(
                f"{cls.__name__}.forward: models that apply_patch patched do not run it, so "
                "replacing it would do nothing to them (LayerScale and the like are seen to "
                f"already); for a forward of your own, derive a class from {cls.__name__} and put "
                "it on the blocks of an unpatched model, as docs/migration.md shows"
            )
        super().__setattr__(name, value)


class ToMeAttention(Attention, metaclass=StandsFor):
    """timm's attention that counts keys by size, and says what its tokens are matched by.

    Never builds the attention matrix; see :func:`tome_ext.proportional_attention`.
    """

    _tome_stands_for = TimmAttention

    def forward(  # type: ignore[override]
        self: Any, x: Tensor, size: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention among tokens.

        Args:
            x: (B, N, C).
            size: (B, N, 1), how many original tokens each stands for; None means 1.

        Returns:
            The output (B, N, C), and the metric (B, N, D), the mean of the keys over heads.

        Raises:
            ValueError: the shape or device of ``size`` is not as above.
        """
        q, k, v = unpacked(self, self.qkv(x))
        sizes = None if size is None else size.squeeze(-1).float()
        return attended(self, SizedCall(sizes), x, q, k, v), k.mean(1)


class ToMeBlock(Block, metaclass=StandsFor):
    """timm's block that merges tokens between attention and MLP, by ``_tome_info``.

    Of that dict it reads "r", a list whose first number it takes, "prop_attn", "trace_source",
    "class_token" and "distill_token", and reads and writes "size" (B, M, 1) and "source".
    """

    _tome_stands_for = TimmBlock

    def forward(self: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """Tokens (B, N, C) to (B, N - r, C)."""
        info = vars(self).get("_tome_info")
        counts = None if info is None else info.get("r")
        if not isinstance(counts, list) or not counts:
            raise RuntimeError(
                f"{type(self).__name__}: expected _tome_info with a list 'r' of what this block "
                "and those behind it remove, as the forward of make_tome_class's class leaves it, "
                f"got {counts!r}"
            )
        assert info is not None
        y, metric = self.attn(self.norm1(x), info["size"] if info["prop_attn"] else None)
        x = x + self._drop_path1(self.ls1(y))
        r = counts.pop(0)
        if r > 0:
            prefix = info["class_token"], info["distill_token"]
            merge, _ = bipartite_soft_matching(metric, r, *prefix)
            if info["trace_source"]:
                info["source"] = merge_source(merge, x, info["source"])
            x, info["size"] = merge_wavg(merge, x, info["size"])
        return x + self._drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _drop_path1(self: Any, x: Tensor) -> Tensor:
        return self.drop_path1(x)

    def _drop_path2(self: Any, x: Tensor) -> Tensor:
        return self.drop_path2(x)


def make_tome_class(transformer_class: type) -> type:
    """A subclass of a Vision Transformer's class whose forward begins a new ``_tome_info``.

    Its instances need ``r``, in any form of :func:`tome_ext.schedule.parse_r`, ``blocks``, and
    ``_tome_info``, a dict, which their blocks share; see :class:`ToMeBlock`.
    """

    base: Any = transformer_class

    class ToMeVisionTransformer(base):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            counts = parse_r(len(self.blocks), self.r)
            self._tome_info.update(r=counts, size=None, source=None)
            return super().forward(*args, **kwargs)

    return ToMeVisionTransformer
