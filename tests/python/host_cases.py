"""Small models of every library that the patches support, for the host contract.

A library's cases are in ``host_cases_<library>.py``, in a list ``CASES``; each is a small random
model without downloads, with weights large enough for attention to matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Case", "all_cases", "loud"]

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model, and what can be asked of it.

    Attributes:
        name: unique; begins with the library.
        make: the model in eval mode, float32, the same each time.
        inputs: keyword arguments of a forward for a batch of that size and a seed; the pictures
            first.
        output: what a user reads from what the model returns: one tensor (B, ...) that does not
            depend on the number of tokens left.
        num_tokens: N, prefix included.
        num_prefix_tokens: how many of them never merge.
        depth: number of blocks.
        class_token: whether methods that rank by it apply.
        equal_tokens: changes model and inputs (``equal_tokens(model, inputs)``, in place, returns
            the inputs) so that tokens behind the prefix are equal in pairs that matching finds, at
            equal positions; None if the model has no such form.
        hidden: inputs with a padding mask: ``hidden(batch, seed, noise)`` changes nothing but
            hidden pixels with ``noise``; None if the model takes no mask.
        implementations: names for ``set_attn_implementation`` that the model has.
        exports: whether torch.export takes the unpatched model.
        options: keyword arguments of the patch.
        attention: what ``info`` says of attention once tokens have merged.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Inputs]
    output: Callable[[Any], Tensor]
    num_tokens: int
    num_prefix_tokens: int
    depth: int
    class_token: bool = True
    equal_tokens: Callable[[nn.Module, Inputs], Inputs] | None = None
    hidden: Callable[[int, int, float], Inputs] | None = None
    implementations: tuple[str, ...] = ()
    exports: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    attention: str = "tome::attention"

    def __str__(self) -> str:
        return self.name


def loud(model: nn.Module) -> nn.Module:
    """The model with random weights, the same each time and large enough to matter; eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return model.eval()


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with floating tensors in another dtype."""
    return {
        key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for key, x in inputs.items()
    }


def all_cases() -> list[Case]:
    """The cases of every library."""
    from importlib import import_module

    libraries = ("timm", "transformers", "torchvision", "open_clip")
    return [case for library in libraries for case in import_module(f"host_cases_{library}").CASES]
