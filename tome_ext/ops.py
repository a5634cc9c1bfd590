"""``torch.ops.tome``: calling, fake kernels, autograd, and the fallback for other devices.

The schemas live in ``csrc/torch/schema.cpp``; the contract of each operator is in the docstrings
of :func:`tome_ext.match`, :class:`tome_ext.MergePlan`, :func:`tome_ext.proportional_attention` and
:func:`tome_ext.cls_attention`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch.compiler import is_compiling

from . import _flops, _library, onnx, reference
from ._torch import below_autograd, in_transform, without_autocast

__all__ = [
    "attention",
    "attention_backward",
    "attention_forward",
    "cls_attention",
    "describe",
    "device_kind",
    "expect_tensors",
    "match",
    "merge",
    "merge_add_norm",
    "merge_backward",
    "plan",
    "select",
    "unmerge",
]

# The operators that have kernels, a twin in tome_ext/reference.py and so a fake kernel.
NAMES = (
    "match",
    "select",
    "plan",
    "merge",
    "merge_add_norm",
    "merge_backward",
    "unmerge",
    "attention_forward",
    "attention_backward",
    "cls_attention",
)
# Devices that run the plain PyTorch form. CUDA joins them when its library is not loaded.
FALLBACK_KEYS = ("MPS", "XPU", "PrivateUse1")
# Device types that have kernels of their own, once they are registered. CUDA leaves them when it
# turns out that its GPUs cannot run the kernels.
kernel_devices: tuple[str, ...] = ()


def describe(x: object) -> str:
    """A value as error messages show it: shape, dtype and device of a tensor."""
    if isinstance(x, Tensor):
        return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
    return f"{x!r} ({type(x).__name__})"


def expect_tensors(**given: object) -> None:
    """Refuse anything else.

    Raises:
        ValueError: one is not a tensor.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {describe(value)}")


def device_kind(x: Tensor) -> str:
    """The type of a tensor's device: "cpu", "cuda" or another."""
    # Between the matrix products of a block, where caches are cold, x.device.type takes 20 us.
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


# --- calling ------------------------------------------------------------------------------------


def twin(name: str) -> Callable[..., Any]:
    """The operator in plain PyTorch (:mod:`tome_ext.reference`)."""
    plain: Callable[..., Any] = getattr(reference, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        # Kernels compute in the precision they promise, under autocast too.
        with without_autocast(args[0].device.type):
            return plain(*args, **kwargs)

    return call


P = ParamSpec("P")
R = TypeVar("R")


def _operator(stub: Callable[P, R]) -> Callable[P, R]:
    """The operator of that name; the stub itself, which says what is missing, if there is none.

    In the transforms of ``torch.func``, and with forward-mode derivatives, it is the twin: they
    take apart what is made of torch's operators, and nothing else.
    """
    if _library.load_error is not None:
        return stub
    # The overload itself: looking it up through its name costs a microsecond in every call.
    overload = cast("Callable[P, R]", getattr(torch.ops.tome, stub.__name__).default)
    names = inspect.signature(stub)
    tensors = [name for name, value in names.parameters.items() if value.annotation == "Tensor"]
    plain: Callable[P, R] = twin(stub.__name__)
    differentiable = stub.__name__ not in ("match", "select", "plan")

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_compiling():
            return overload(*args, **kwargs)
        try:
            if in_transform():
                return plain(*args, **kwargs)
            if not differentiable or is_grad_enabled() or is_inference_mode_enabled():
                return overload(*args, **kwargs)  # inference mode has left the autograd layer
            with below_autograd():
                return overload(*args, **kwargs)
        except (RuntimeError, AttributeError) as error:
            # What torch says of None is about its own source; from 2.15 on it makes a RuntimeError
            # of every error of ours.
            given = names.bind(*args, **kwargs).arguments
            try:
                expect_tensors(**{name: given[name] for name in tensors})
                if re.match(rf"({'|'.join(names.parameters)})( and \w+)?: expected ", str(error)):
                    raise ValueError(str(error))
            except ValueError as wrong:
                raise wrong from None
            raise

    return call


@_operator
def match(
    metric: Tensor,
    r: int,
    num_prefix_tokens: int = 0,
    *,
    weight: Tensor | None = None,
    targets: Tensor | None = None,
    size: Tensor | None = None,
    importance: Tensor | None = None,
    threshold: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Assign (B, N), members (B, N), offsets (B, M + 1), all int32."""
    raise _library.missing()


@_operator
def select(
    scores: Tensor, keep: int, num_prefix_tokens: int = 0, fuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``match``."""
    raise _library.missing()


@_operator
def plan(assign: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Members (B, N), offsets (B, M + 1), both int32."""
    raise _library.missing()


@_operator
def merge(
    x: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Tokens (B, M, C), sizes (B, M) float32."""
    raise _library.missing()


@_operator
def merge_add_norm(
    x: Tensor,
    branch: Tensor,
    size: Tensor | None,
    members: Tensor,
    offsets: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    keep_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, M, C), sizes (B, M) float32, norms of the tokens (B, M, C)."""
    raise _library.missing()


@_operator
def merge_backward(
    grad: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> Tensor:
    """Gradients of the tokens (B, N, C)."""
    raise _library.missing()


@_operator
def unmerge(x: Tensor, assign: Tensor) -> Tensor:
    """Tokens (B, N, C)."""
    raise _library.missing()


@_operator
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Out (B, H, M, D), lse (B, H, M) float32 (float64 for float64)."""
    raise _library.missing()


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The first output of ``attention_forward``, out (B, H, M, D)."""
    return attention_forward(q, k, v, size, scale)[0]


@_operator
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    raise _library.missing()


@_operator
def cls_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Scores (B, N) float32 (float64 for float64)."""
    raise _library.missing()


# --- autograd -----------------------------------------------------------------------------------

# merge ("mean", "sum") and merge_backward are adjoint to each other for fixed sizes, so each is
# the other's derivative in x, to any order. unmerge is the adjoint of the unweighted sum. Gradients
# are written in operators that are differentiable in turn, ours and torch's.


def _wants(ctx: Any, index: int) -> bool:
    """Whether an argument needs a gradient; trailing ones that a caller left out do not count."""
    needs = ctx.needs_input_grad
    return index < len(needs) and bool(needs[index])


def _size_gradient(
    x: Tensor,
    grad: Tensor,
    merged: Tensor,
    new_size: Tensor,
    members: Tensor,
    offsets: Tensor,
    reduce: str,
) -> Tensor:
    """The gradient (B, N) in the sizes of a merge of x (B, N, C), from that in its rows (B, M, C).

    A row is ``sum(size * x)``, over ``sum(size)`` for "mean": so a token pulls the mean towards
    itself. Where all sizes of a row are 0, the mean is even, and their gradient 0.
    """
    dtype = reference.accumulate_dtype(x.dtype)

    def spread(rows: Tensor) -> Tensor:
        return merge_backward(rows.contiguous(), None, members, offsets, "sum")

    x, grad = x.to(dtype), spread(grad.to(dtype))
    if reduce == "mean":
        total = spread(new_size.unsqueeze(-1)).to(dtype)
        none = total == 0  # or the token is dropped
        x = torch.where(none, 0.0, x - spread(merged.to(dtype))) / torch.where(none, 1.0, total)
    else:
        x = torch.where(spread(torch.ones_like(new_size).unsqueeze(-1)) == 0, 0.0, x)
    return (grad * x).sum(-1).to(torch.float32)


def _spread_sizes(grad: Tensor, members: Tensor, offsets: Tensor) -> Tensor:
    """The gradient (B, N) in sizes, from that in their sums (B, M)."""
    rows = grad.unsqueeze(-1).contiguous()
    return merge_backward(rows, None, members, offsets, "sum").squeeze(-1)


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, size, members, offsets, reduce = inputs
    ctx.reduce = reduce
    sized = _wants(ctx, 1)
    saved = (x, *output) if reduce == "amax" or sized else (None, None, None)
    ctx.save_for_backward(size, members, offsets, *saved)
    if not sized:
        ctx.mark_non_differentiable(output[1])


def _merge_backward(ctx: Any, grad: Tensor, grad_size: Tensor) -> tuple[Tensor | None, ...]:
    size, members, offsets, x, merged, new_size = ctx.saved_tensors
    grad = grad.contiguous()
    grad_x = sizes = None
    if _wants(ctx, 1):
        sizes = _spread_sizes(grad_size, members, offsets)
        if ctx.reduce != "amax":
            plan = (members, offsets, ctx.reduce)
            sizes = sizes + _size_gradient(x, grad, merged, new_size, *plan)
    if _wants(ctx, 0) and ctx.reduce != "amax":
        grad_x = merge_backward(grad, size, members, offsets, ctx.reduce)
    elif _wants(ctx, 0):
        # As torch.amax: the gradient is shared evenly by the members that attain the maximum.
        wins = x.detach() == merge_backward(merged.detach(), None, members, offsets, "sum")
        wins = wins.to(grad.dtype)
        count, _ = merge(wins, None, members, offsets, "sum")
        share = grad / count.clamp_min(1)
        grad_x = wins * merge_backward(share, None, members, offsets, "sum")
    return grad_x, sizes, None, None, None


def _stretch_gradient(
    tokens: Tensor, grad: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Of rows that keep norms: the gradient (B, M, C) in their means, and that of the lengths.

    A row is ``length * mean / |mean|``, where length is the mean of those of its tokens (B, N, C).

    Returns:
        The gradient in the means; the means (B, M, C); and of the lengths (B, M, 1) their gradient,
        themselves, and those of the tokens (B, N, 1).
    """
    mean, _ = merge(tokens, size, members, offsets)
    lengths = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    length, _ = merge(lengths, size, members, offsets)
    factor, stretched = reference.stretch(mean, length, offsets)
    along = mean / torch.where(stretched, torch.linalg.vector_norm(mean, dim=-1, keepdim=True), 1.0)
    pull = (grad * along).sum(-1, keepdim=True)
    grad_mean = torch.where(stretched, factor * (grad - along * pull), grad)
    return grad_mean, mean, (torch.where(stretched, pull, 0.0), length, lengths)


def _merge_add_norm_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, branch, size, members, offsets, scale, weight, bias, ctx.eps, ctx.keep_norms = inputs
    # The sums before the merge are linear: without norms to keep, only the gradients of scale and
    # of sizes read what was added.
    sized = _wants(ctx, 2)
    added = branch if sized or ctx.keep_norms or _wants(ctx, 5) else None
    sums = (x, output[1]) if sized or ctx.keep_norms else (None, None)
    ctx.save_for_backward(output[0], added, size, members, offsets, scale, weight, bias, *sums)
    if not sized:
        ctx.mark_non_differentiable(output[1])


def _merge_add_norm_backward(
    ctx: Any, grad: Tensor, grad_size: Tensor, grad_normed: Tensor
) -> tuple[Tensor | None, ...]:
    merged, added, size, members, offsets, scale, weight, bias, x, new_size = ctx.saved_tensors
    channels = merged.shape[-1:]
    with torch.no_grad():
        _, mean, rstd = torch.ops.aten.native_layer_norm(merged, channels, weight, bias, ctx.eps)
    grad_merged, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.contiguous(),
        merged,
        channels,
        mean,
        rstd,
        weight,
        bias,
        [True, weight is not None, bias is not None],
    )
    if weight is None and bias is not None:  # torch's second derivative would leave it out
        grad_bias = grad_normed.sum((0, 1))
    grad = grad + grad_merged
    if x is not None:
        dtype = reference.accumulate_dtype(x.dtype)
        x = x.to(dtype) + (added.to(dtype) if scale is None else added.to(dtype) * scale.to(dtype))
    lengths = None
    if ctx.keep_norms:
        narrow, grad = grad.dtype, grad.to(dtype)
        grad, merged, lengths = _stretch_gradient(x, grad, size, members, offsets)
    grad_x = merge_backward(grad, size, members, offsets, "mean")
    if lengths is not None:
        unit = x / torch.where(lengths[2] == 0, 1.0, lengths[2])
        grad_x = grad_x + merge_backward(lengths[0], size, members, offsets, "mean") * unit
        grad_x = grad_x.to(narrow)
    grad_branch = grad_x if scale is None else grad_x * scale
    grad_scale = (grad_x * added).sum((0, 1)) if _wants(ctx, 5) else None
    sizes = None
    if _wants(ctx, 2):
        sizes = _spread_sizes(grad_size, members, offsets)
        sizes = sizes + _size_gradient(x, grad, merged, new_size, members, offsets, "mean")
        if lengths is not None:
            pull, length, of_tokens = lengths
            plan = (members, offsets, "mean")
            sizes = sizes + _size_gradient(of_tokens, pull, length, new_size, *plan)
    return grad_x, grad_branch, sizes, None, None, grad_scale, grad_weight, grad_bias, None, None


def _merge_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, size, members, offsets, ctx.reduce = inputs
    rows = grad if _wants(ctx, 1) else None
    ctx.save_for_backward(size, members, offsets, rows)


def _merge_backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    size, members, offsets, rows = ctx.saved_tensors
    back, new_size = merge(grad.contiguous(), size, members, offsets, ctx.reduce)
    sizes = None
    if _wants(ctx, 1):  # both are the same product of x and rows, weighted by size
        sizes = _size_gradient(grad, rows, back, new_size, members, offsets, ctx.reduce)
    return back, sizes, None, None, None


def _unmerge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, assign = inputs
    ctx.num_rows = x.shape[1]
    ctx.save_for_backward(assign)


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (assign,) = ctx.saved_tensors
    members, offsets = plan(assign, ctx.num_rows)
    grad_x, _ = merge(grad.contiguous(), None, members, offsets, "sum")
    return grad_x, None


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, size, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, size, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, size, out, lse = ctx.saved_tensors
    sizes = None
    if _wants(ctx, 3):
        # Sums over a column of the matrix of weights, which is written for them.
        *_, grad_logits = twin("attention_gradients")(grad, q, k, v, size, ctx.scale)
        sizes = _log_size_gradient(grad_logits.sum((1, 2)), size)
    return *attention_backward(grad, q, k, v, size, out, lse, ctx.scale), sizes, None


def _log_size_gradient(grad: Tensor, size: Tensor) -> Tensor:
    """The gradient in sizes, from that in their logarithms; 0 for a size of 0: it stays hidden."""
    hidden = size == 0
    return torch.where(hidden, 0.0, grad / torch.where(hidden, 1.0, size)).to(torch.float32)


def _attention_backward_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    grad, q, k, v, size, _, _, ctx.scale = inputs
    ctx.save_for_backward(grad, q, k, v, size)


def _attention_backward_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    # Of the same gradients in torch's operators, which write the matrix of weights, and which are
    # differentiable in turn. What the forward wrote is made anew from q, k, v and size, so that all
    # of the derivative is theirs.
    needs = ctx.needs_input_grad[: len(ctx.saved_tensors)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: what one of the inputs was made of leads to none of the others.
        inputs = [
            x.view_as(x) if needed else x
            for x, needed in zip(ctx.saved_tensors, needs, strict=True)
        ]
        wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed]
        grads = twin("attention_gradients")(*inputs, ctx.scale)[:3]
        found = iter(torch.autograd.grad(grads, wanted, upstream, create_graph=create_graph))
    return *(next(found) if needed else None for needed in needs), None, None, None


def _cls_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, size, ctx.scale = inputs
    ctx.save_for_backward(q, k, size)


def _cls_attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # In torch's operators; memory is that of k, times a constant.
    q, k, size = ctx.saved_tensors
    scale = reference.default_scale(q) if ctx.scale is None else ctx.scale
    k = reference.without_hidden(k, size)
    weights = reference.cls_weights(q, k, size, scale)
    wide = grad.unsqueeze(1) / q.shape[1]
    grad_logits = weights * (wide - (weights * wide).sum(-1, keepdim=True))  # (B, H, N)
    sizes = _log_size_gradient(grad_logits.sum(1), size) if _wants(ctx, 2) else None
    grad_logits = grad_logits * scale
    first = (grad_logits.unsqueeze(2) @ k.to(grad_logits.dtype)).to(q.dtype)  # (B, H, 1, D)
    grad_q = torch.nn.functional.pad(first, (0, 0, 0, q.shape[2] - 1))
    grad_k = grad_logits.unsqueeze(-1) * q[:, :, :1].to(grad_logits.dtype)
    return grad_q, grad_k.to(k.dtype), sizes, None


# --- registration -------------------------------------------------------------------------------


def _fake(name: str) -> Callable[..., Any]:
    """The twin's checks and shapes: what the operator refuses, tracing refuses."""
    plain: Callable[..., Any] = getattr(reference, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        with reference.shapes_only():
            return plain(*args, **kwargs)

    return call


def _on_gpu(name: str) -> Callable[..., Any]:
    """The twin for a GPU that cannot run the kernels, or for which there are none."""
    plain = twin(name)

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _library.tell_of_plain(x.device):
            _leave_kernels(x.device)
        return plain(x, *args, **kwargs)

    return call


def _leave_kernels(device: torch.device) -> None:
    """Take CUDA out of ``kernel_devices``, unless other GPUs may run the kernels.

    Callers that ask then choose torch's own operators, attention above all, before ours.
    """
    global kernel_devices
    if "cuda" not in kernel_devices:
        return
    mine = torch.cuda.get_device_capability(device)
    others = range(torch.cuda.device_count())
    if all(torch.cuda.get_device_capability(i) == mine for i in others):
        kernel_devices = tuple(kind for kind in kernel_devices if kind != "cuda")


def _register() -> None:
    global kernel_devices
    runs_cuda = _library.cuda_loaded and not _library.switched_off
    kernel_devices = ("cpu", "cuda") if runs_cuda else ("cpu",)
    for name in NAMES:
        torch.library.register_fake(f"tome::{name}", _fake(name))
        for key in FALLBACK_KEYS:
            torch.library.impl(f"tome::{name}", key, twin(name))
        if not _library.cuda_loaded:
            torch.library.impl(f"tome::{name}", "CUDA", _on_gpu(name))
        # What the CUDA library calls on a GPU that cannot run its kernels.
        torch.library.impl(f"tome::_plain_{name}", "CompositeExplicitAutograd", _on_gpu(name))
    torch.library.impl("tome::attention", "CompositeImplicitAutograd", attention)
    onnx.register()
    _flops.register()
    register_autograd = functools.partial(torch.library.register_autograd, lib=_derivatives)
    register_autograd("tome::merge", _merge_backward, setup_context=_merge_setup)
    register_autograd(
        "tome::merge_add_norm", _merge_add_norm_backward, setup_context=_merge_add_norm_setup
    )
    register_autograd(
        "tome::merge_backward", _merge_backward_backward, setup_context=_merge_backward_setup
    )
    register_autograd("tome::unmerge", _unmerge_backward, setup_context=_unmerge_setup)
    register_autograd(
        "tome::attention_forward", _attention_backward, setup_context=_attention_setup
    )
    register_autograd(
        "tome::attention_backward",
        _attention_backward_backward,
        setup_context=_attention_backward_setup,
    )
    register_autograd(
        "tome::cls_attention", _cls_attention_backward, setup_context=_cls_attention_setup
    )


class _Derivatives(torch.library.Library):
    """Registers autograd kernels that are the twin where torch's cannot follow: see _operator.

    A kernel made by torch would leave tangents out, without a word.
    """

    def impl(self, op_name: str, fn: Any, dispatch_key: str = "", **options: Any) -> None:
        plain = twin(op_name)

        def call(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            if in_transform() and not is_compiling():
                return plain(*args, **kwargs)
            return fn(keyset, *args, **kwargs)

        super().impl(op_name, call, dispatch_key, **options)


if __name__.rpartition(".")[0] != _library.__name__.rpartition(".")[0]:
    # sys.modules["tome"] = tome_ext: every operator would be registered once more.
    raise ImportError(
        f"{__name__}: tome_ext stands in sys.modules under another name, by which its modules "
        'cannot be imported; expected tome_ext.install_as("tome")'
    )
if _library.load_error is None:
    _derivatives = _Derivatives("tome", "FRAGMENT")  # what it has registered lives as long as it
    _register()
