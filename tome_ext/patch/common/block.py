"""The block of any library: residual, merge and norm by the names of its modules.

A block that reduces nothing runs its own forward; one that does is driven from here.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import ops
from ..._torch import (
    hooks_on_all_modules,
    record_on_storage,
    recorded_on_storage,
    version_of,
)
from ...attention import autocasts
from .block_call import BlockCall
from .class_swap import Swapped
from .module_calls import applied, observed
from .trail import AttentionKind, Trail

__all__ = ["BlockNames", "TomeBlock"]


@dataclass(frozen=True)
class BlockNames:
    """What a class of blocks calls its parts, and in which order they work.

    A part named None, or that a block does not have, does nothing.

    Attributes:
        norm1, attn, norm2, mlp: modules.
        dropout1, dropout2: modules that drop features of a branch before it is scaled.
        scale1, scale2: modules or parameters that multiply a branch (LayerScale).
        drop1, drop2: modules that drop a scaled branch, or features of it, while training.
        scale_vector: attribute of the scale modules that holds their vector.
        order: "pre" for ``x + branch(norm(x))``, "post" for ``x + norm(branch(x))``, "own" for
            blocks that have their own ``_tome_reduce``.
        scale_classes: classes of scale modules that do nothing but multiply.
        drop_classes: classes of drop modules that do nothing unless they train and drop.
        norm_classes: classes of norms that compute ``F.layer_norm``.
    """

    norm1: str
    attn: str
    norm2: str
    mlp: str
    dropout1: str | None = None
    dropout2: str | None = None
    scale1: str | None = None
    scale2: str | None = None
    drop1: str | None = None
    drop2: str | None = None
    scale_vector: str = "gamma"
    order: Literal["pre", "post", "own"] = "pre"
    scale_classes: tuple[type, ...] = ()
    drop_classes: tuple[type, ...] = ()
    norm_classes: tuple[type, ...] = (nn.LayerNorm,)


class TomeBlock(Swapped):
    """A transformer block that reduces its tokens between attention and MLP.

    Attributes of an instance: ``_tome`` is the tower's trail, ``_tome_layer`` the block's number,
    ``_tome_names`` what its parts are called. Of a class: ``_tome_drives`` says that its own
    forward serves only where no tokens have merged yet.
    """

    _tome_drives: ClassVar[bool] = False

    _tome: Trail
    _tome_layer: int
    _tome_names: BlockNames

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        trail: Trail = self._tome
        tokens = trail.enter(self._tome_layer, x)
        if not (tokens.reduced or tokens.rules.layers[tokens.layer].reduces):
            out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            trail.pass_by(tokens, out[0] if isinstance(out, tuple) else out)
            return out
        call = BlockCall(tokens)
        if not call.active:
            out = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        else:
            args, kwargs = self._tome_arguments(call, args, kwargs)
            if call.reduces or self._tome_drives:
                out = self._tome_reduce(call, x, args, kwargs)
            else:
                out = self._tome_stay(call, x, args, kwargs)
                call.check_attended()
        y = out[0] if isinstance(out, tuple) else out
        if call.tokens.layer == self._tome_layer:
            call.pass_on(y, call.tokens.size, None)
        trail.leave(call.tokens, y, call.attention)
        return out

    def __setstate__(self: Any, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._tome.hold(self, self._tome_layer)

    def _tome_attention_kind(self) -> AttentionKind:
        """What is known about the block's attention before it runs."""
        raise NotImplementedError

    def _tome_arguments(
        self, call: BlockCall, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's further arguments, with what is per token carried to the present tokens."""
        return args, kwargs

    def _tome_attend(
        self: Any, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The output of the block's attention for x (B, M, C)."""
        out = self._tome.within(call, self._modules[self._tome_names.attn], x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _tome_stay(
        self: Any, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block's forward where all tokens stay, some of which have merged before."""
        own = super().forward  # type: ignore[misc]
        return self._tome.within(call, own, x, *args, **kwargs)

    def _tome_mlp(self: Any, normed: Tensor) -> Tensor:
        """The output of the block's MLP for normed tokens (B, M, C), without the residual."""
        return self._modules[self._tome_names.mlp](normed)

    def _tome_reduce(
        self: Any, call: BlockCall, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block's forward, with a merge between attention and MLP."""
        names: BlockNames = self._tome_names
        modules = self._modules  # nn.Module's own lookup takes microseconds for each
        if names.order == "post":
            attended = modules[names.norm1](self._tome_attend(call, x, args, kwargs))
            attended = finished(self, names.dropout1, names.scale1, names.drop1, attended)
            x = call.merge(x + attended, attended)
            branch = modules[names.norm2](self._tome_mlp(x))
        else:
            inference = call.tokens.rules.settings.inference and not torch.is_grad_enabled()
            norm = modules[names.norm1]
            normed = take_norm(x, norm) if inference else None
            if normed is None:
                normed = norm(x)
            attended = self._tome_attend(call, normed, args, kwargs)
            x, normed = merged_and_normed(self, names, call, x, attended)
            del attended  # or its memory would be held until the MLP is done
            branch = self._tome_mlp(normed)
            del normed
            if inference:
                out = added_and_normed(self, names, call, x, branch)
                if out is not None:
                    return out
        return x + finished(self, names.dropout2, names.scale2, names.drop2, branch)


def finished(
    block: Any, dropout: str | None, scale: str | None, drop: str | None, branch: Tensor
) -> Tensor:
    """A branch's output, scaled and dropped."""
    modules = block._modules
    if dropout is not None:
        branch = applied(modules.get(dropout), branch)
    if scale is not None:
        module = modules.get(scale)
        if module is not None:
            branch = applied(module, branch)
        else:
            vector = getattr(block, scale, None)
            branch = branch if vector is None else vector * branch
    if drop is not None:
        branch = applied(modules.get(drop), branch)
    return branch


# What the end of a block and the beginning of the next can do in one pass: x + scale * branch, and
# the next block's norm of it. The norm waits on the storage of x, so that it goes with x.

MOST_IDENTITIES = 64
_identities: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}
# Attribute of a storage: (weak reference to x, its version, the norm of x, whose norm that is).
NORM = "_tome_norm"


def added_and_normed(
    block: Any, names: BlockNames, call: BlockCall, x: Tensor, branch: Tensor
) -> Tensor | None:
    """The block's output, whose norm is left for the following block; None if that may not be.

    Only where the user has said that no gradients will be wanted: a checkpointed block is called
    again without the one before it, and must find the same norm to the bit, or ties turn.
    """
    # torch.compile fuses them itself, and a traced program may run with gradients.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    following = block._tome.following(block._tome_layer, block)
    tokens = call.tokens  # which have left the merge
    if following is None or not tokens.rules.layers[tokens.layer].reduces:
        return None
    next_names: BlockNames = following._tome_names
    if next_names.order != "pre":
        return None
    norm = following._modules[next_names.norm1]
    if (
        not is_plain_norm(next_names, norm)
        or observed(block)
        or observed(following)
        or hooks_on_all_modules()
    ):
        return None
    plain, vector = plain_branch(block, names, names.dropout2, names.scale2, names.drop2)
    weight, bias = norm.weight, norm.bias
    if not plain or not fit(x, branch, vector, weight, bias):
        return None
    members, offsets = identity_plan(x.shape[0], x.shape[1], x.device)
    x, _, normed = ops.merge_add_norm(
        x, branch, None, members, offsets, vector, weight, bias, norm.eps
    )
    record_on_storage(x, NORM, (weakref.ref(x), version_of(x), normed, weakref.ref(norm)))
    return x


def identity_plan(batch: int, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Members and offsets of the plan that leaves tokens (batch, num_tokens, C) as they are."""
    key = (batch, num_tokens, device)
    plan = _identities.get(key)
    if plan is None:
        offsets = torch.arange(num_tokens + 1, dtype=torch.int32, device=device)
        plan = offsets[:-1].repeat(batch, 1), offsets.repeat(batch, 1)
        # A graph that is being captured fills its tensors when it runs, and not before; fake
        # tensors are of a subclass.
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if type(offsets) is Tensor and not capturing:
            if len(_identities) == MOST_IDENTITIES:
                _identities.clear()
            _identities[key] = plan
    return plan


def take_norm(x: Tensor, norm: nn.Module | None) -> Tensor | None:
    """What ``norm`` makes of x, if the block before has left it, once.

    The block that runs may not be the one that was to follow: a copy has a norm of its own.
    """
    if torch.compiler.is_compiling():
        return None
    left = recorded_on_storage(x, NORM)
    if left is None:
        return None
    record_on_storage(x, NORM, None)
    same, version, normed, whose = left
    return normed if same() is x and version == version_of(x) and whose() is norm else None


def merged_and_normed(
    block: Any, names: BlockNames, call: BlockCall, x: Tensor, attended: Tensor
) -> tuple[Tensor, Tensor]:
    """What lies between attention and MLP: the merged tokens (B, M, C), and their norm."""
    norm = block._modules[names.norm2]
    if call.averages and is_plain_norm(names, norm):
        plain, vector = plain_branch(block, names, names.dropout1, names.scale1, names.drop1)
        if plain and not hooks_on_all_modules():
            weight, bias = norm.weight, norm.bias
            if fit(x, attended, vector, weight, bias):
                return call.merge_add_norm(x, attended, vector, weight, bias, norm.eps)
    attended = finished(block, names.dropout1, names.scale1, names.drop1, attended)
    x = call.merge(x + attended, attended)
    return x, norm(x)


# Whether modules between attention and MLP do what ``tome::merge_add_norm`` does. They do unless
# one drops, is of another class or has hooks, which must see its input or output.


def is_plain_norm(names: BlockNames, norm: Any) -> bool:
    """Whether the norm computes a LayerNorm over channels, and nothing else."""
    return (
        type(norm) in names.norm_classes and len(norm.normalized_shape) == 1 and not observed(norm)
    )


def plain_branch(
    block: Any, names: BlockNames, dropout: str | None, scale: str | None, drop: str | None
) -> tuple[bool, Tensor | None]:
    """Whether :func:`finished` only multiplies, and by which vector if there is one."""
    if drop is not None and drops(block, drop, names):
        return False, None
    if dropout is not None and drops(block, dropout, names):
        return False, None
    return plain_scale(block, scale, names)


def plain_scale(block: Any, name: str | None, names: BlockNames) -> tuple[bool, Tensor | None]:
    """Whether the scale of that name only multiplies, and its vector if there is one."""
    if name is None:
        return True, None
    scale = block._modules.get(name)
    if scale is None:
        vector = getattr(block, name, None)
        if isinstance(vector, Tensor):
            return True, vector
        return vector is None or vector == 1, None
    if observed(scale):
        return False, None
    if type(scale) is nn.Identity:
        return True, None
    if type(scale) in names.scale_classes:
        return True, getattr(scale, names.scale_vector)
    return False, None


def drops(block: Any, name: str, names: BlockNames) -> bool:
    """Whether the drop module of that name may change the branch, or has hooks that see it."""
    drop = block._modules.get(name)
    if drop is None:
        return False
    if observed(drop):
        return True
    if type(drop) is nn.Identity:
        return False
    if type(drop) is nn.Dropout:
        return drop.training and drop.p > 0
    if type(drop) not in names.drop_classes:
        return True
    return bool(drop.training and drop.drop_prob)


def fit(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors may go to a kernel as they are.

    Not if autocast or several dtypes are at work, whose conversions are torch's to choose.
    """
    if ops.device_kind(x) not in ops.kernel_devices or autocasts(x):
        return False
    dtype = x.dtype
    for other in others:  # noqa: SIM110  (a generator takes as long as all the rest)
        if other is not None and other.dtype != dtype:
            return False
    return True
