"""``torch.ops.tome``: calling, fake kernels, autograd, and the fallback for other devices.

The schemas live in ``csrc/torch/schema.cpp``; the contract of each operator is in the docstrings
of :func:`tome_ext.match`, :class:`tome_ext.MergePlan`, :func:`tome_ext.proportional_attention` and
:func:`tome_ext.cls_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _library, _onnx, reference
from ._torch import below_autograd, without_autocast

__all__ = [
    "attention",
    "attention_backward",
    "attention_forward",
    "cls_attention",
    "describe",
    "device_kind",
    "match",
    "merge",
    "merge_add_norm",
    "merge_backward",
    "plan",
    "select",
    "unmerge",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
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


def device_kind(x: Tensor) -> str:
    """The type of a tensor's device: "cpu", "cuda" or another."""
    # Between the matrix products of a block, where caches are cold, x.device.type takes 20 us.
    return "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type


# --- calling ------------------------------------------------------------------------------------


def _operator(name: str, differentiable: bool = False) -> Callable[..., Any]:
    if _library.load_error is None:
        # The overload itself: looking it up through its name costs a microsecond in every call.
        overload: Callable[..., Any] = getattr(torch.ops.tome, name).default
        if not differentiable:
            return overload

        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                return overload(*args, **kwargs)
            if torch.is_inference_mode_enabled():  # has left the autograd layer already
                return overload(*args, **kwargs)
            with below_autograd():
                return overload(*args, **kwargs)

        return call

    def missing(*args: object, **kwargs: object) -> None:
        _library.require()

    return missing


# (metric, r, num_prefix_tokens=0) -> assign (B, N), members (B, N), offsets (B, M + 1), all int32
match: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator("match")
# (scores, keep, num_prefix_tokens=0, fuse=False) -> as match
select: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator("select")
# (assign, num_rows) -> members (B, N), offsets (B, M + 1)
plan: Callable[..., tuple[Tensor, Tensor]] = _operator("plan")
# (x, size, members, offsets, reduce="mean") -> tokens (B, M, C), sizes (B, M) float32
merge: Callable[..., tuple[Tensor, Tensor]] = _operator("merge", differentiable=True)
# (x, branch, size, members, offsets, scale=None, weight=None, bias=None, eps=1e-6) ->
# tokens (B, M, C), sizes (B, M) float32, norms of the tokens (B, M, C)
merge_add_norm: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    "merge_add_norm", differentiable=True
)
# (grad, size, members, offsets, reduce="mean") -> gradients of the tokens (B, N, C)
merge_backward: Callable[..., Tensor] = _operator("merge_backward", differentiable=True)
# (x, assign) -> tokens (B, N, C)
unmerge: Callable[..., Tensor] = _operator("unmerge", differentiable=True)
# (q, k, v, size=None, scale=None) -> out (B, H, M, D), lse (B, H, M) float32 (float64 for float64)
attention_forward: Callable[..., tuple[Tensor, Tensor]] = _operator(
    "attention_forward", differentiable=True
)


def attention(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The first output of ``attention_forward``, out (B, H, M, D)."""
    return attention_forward(q, k, v, size, scale)[0]


# (grad, q, k, v, size, out, lse, scale=None) -> gradients of q, k and v
attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    "attention_backward", differentiable=True
)
# (q, k, size=None, scale=None) -> (B, N) float32 (float64 for float64)
cls_attention: Callable[..., Tensor] = _operator("cls_attention", differentiable=True)


# --- registration -------------------------------------------------------------------------------


def _fake_match(
    metric: Tensor, r: int, num_prefix_tokens: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(metric.dim() in (3, 4), lambda: f"metric: got {describe(metric)}")
    num_tokens = metric.shape[-2]
    rows = num_tokens - reference.cut_r(num_tokens, r, num_prefix_tokens)
    return _new_plan(metric, num_tokens, rows)


def _fake_select(
    scores: Tensor, keep: int, num_prefix_tokens: int = 0, fuse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(scores.dim() == 2, lambda: f"scores: expected (B, N), got {describe(scores)}")
    num_tokens = scores.shape[1]
    kept = reference.cut_keep(num_tokens, keep, num_prefix_tokens)
    return _new_plan(scores, num_tokens, kept + int(fuse and kept < num_tokens))


def _new_plan(like: Tensor, num_tokens: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    def new(length: int) -> Tensor:
        return like.new_empty((like.shape[0], length), dtype=torch.int32)

    return new(num_tokens), new(num_tokens), new(rows + 1)


def _fake_plan(assign: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    batch, num_tokens = assign.shape
    return (
        assign.new_empty((batch, num_tokens), dtype=torch.int32),
        assign.new_empty((batch, num_rows + 1), dtype=torch.int32),
    )


def _fake_merge(
    x: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    batch, rows = x.shape[0], offsets.shape[1] - 1
    return (
        x.new_empty((batch, rows, x.shape[2])),
        x.new_empty((batch, rows), dtype=torch.float32),
    )


def _fake_merge_add_norm(
    x: Tensor,
    branch: Tensor,
    size: Tensor | None,
    members: Tensor,
    offsets: Tensor,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    merged, new_size = _fake_merge(x, size, members, offsets)
    return merged, new_size, torch.empty_like(merged)


def _fake_merge_backward(
    grad: Tensor, size: Tensor | None, members: Tensor, offsets: Tensor, reduce: str = "mean"
) -> Tensor:
    return grad.new_empty((grad.shape[0], members.shape[1], grad.shape[2]))


def _fake_unmerge(x: Tensor, assign: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], assign.shape[1], x.shape[2]))


def _new_heads_inside(like: Tensor) -> Tensor:
    batch, heads, tokens, dim = like.shape
    return like.new_empty((batch, tokens, heads, dim)).transpose(1, 2)


def _fake_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, size: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    torch._check(q.dim() == 4, lambda: f"q: expected (B, H, M, D), got {describe(q)}")
    lse = q.new_empty(q.shape[:3], dtype=reference.accumulate_dtype(q.dtype))
    return _new_heads_inside(q), lse


def _fake_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    size: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_heads_inside(q), _new_heads_inside(k), _new_heads_inside(v)


def _fake_cls_attention(
    q: Tensor, k: Tensor, size: Tensor | None = None, scale: float | None = None
) -> Tensor:
    torch._check(k.dim() == 4, lambda: f"k: expected (B, H, N, D), got {describe(k)}")
    dtype = reference.accumulate_dtype(k.dtype)
    return k.new_empty((k.shape[0], k.shape[2]), dtype=dtype)


# merge ("mean", "sum") and merge_backward are adjoint to each other for fixed sizes, so each is
# the other's derivative, to any order. unmerge is the adjoint of the unweighted sum.


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, size, members, offsets, reduce = inputs
    ctx.reduce = reduce
    saved = (x, output[0]) if reduce == "amax" else (None, None)
    ctx.save_for_backward(size, members, offsets, *saved)
    ctx.mark_non_differentiable(output[1])


def _merge_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    size, members, offsets, x, merged = ctx.saved_tensors
    grad = grad.contiguous()
    if ctx.reduce != "amax":
        grad_x = merge_backward(grad, size, members, offsets, ctx.reduce)
        return grad_x, None, None, None, None
    # As torch.amax: the gradient is shared evenly by the members that attain the maximum.
    wins = (x.detach() == merge_backward(merged.detach(), None, members, offsets, "sum")).to(
        grad.dtype
    )
    count, _ = merge(wins, None, members, offsets, "sum")
    share = grad / count.clamp_min(1)
    return wins * merge_backward(share, None, members, offsets, "sum"), None, None, None, None


def _merge_add_norm_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, branch, size, members, offsets, scale, weight, bias, ctx.eps = inputs
    # The sums before the merge are linear: only the gradient of scale reads what was added.
    added = branch if scale is not None and scale.requires_grad else None
    ctx.save_for_backward(output[0], added, size, members, offsets, scale, weight, bias)
    ctx.mark_non_differentiable(output[1])


def _merge_add_norm_backward(
    ctx: Any, grad: Tensor, _: Tensor | None, grad_normed: Tensor
) -> tuple[Tensor | None, ...]:
    # merge_backward and torch's operators, all differentiable in turn.
    merged, added, size, members, offsets, scale, weight, bias = ctx.saved_tensors
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
    grad_x = merge_backward(grad + grad_merged, size, members, offsets, "mean")
    grad_branch = grad_x if scale is None else grad_x * scale
    grad_scale = None if added is None else (grad_x * added).sum((0, 1))
    return grad_x, grad_branch, None, None, None, grad_scale, grad_weight, grad_bias, None


def _merge_backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, size, members, offsets, ctx.reduce = inputs
    ctx.save_for_backward(size, members, offsets)


def _merge_backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    size, members, offsets = ctx.saved_tensors
    back, _ = merge(grad.contiguous(), size, members, offsets, ctx.reduce)
    return back, None, None, None, None


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
    return *attention_backward(grad, q, k, v, size, out, lse, ctx.scale), None, None


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # As torch's own fused attention. Without this, second derivatives would be silently 0.
    raise NotImplementedError(
        "tome::attention has no second derivative: expected at most one backward through it, got "
        "a backward through its gradient (create_graph=True); compute attention with "
        "F.scaled_dot_product_attention under "
        "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) and the mask log(size) instead"
    )


def _cls_attention_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, size, ctx.scale = inputs
    ctx.save_for_backward(q, k, size)


def _cls_attention_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # In torch's operators, which are differentiable in turn; memory is that of k, times a constant.
    q, k, size = ctx.saved_tensors
    scale = reference.default_scale(q) if ctx.scale is None else ctx.scale
    weights = reference.cls_weights(q, k, size, scale)
    wide = grad.unsqueeze(1) / q.shape[1]
    grad_logits = weights * (wide - (weights * wide).sum(-1, keepdim=True)) * scale  # (B, H, N)
    first = (grad_logits.unsqueeze(2) @ k.to(grad_logits.dtype)).to(q.dtype)  # (B, H, 1, D)
    grad_q = torch.nn.functional.pad(first, (0, 0, 0, q.shape[2] - 1))
    grad_k = grad_logits.unsqueeze(-1) * q[:, :, :1].to(grad_logits.dtype)
    return grad_q, grad_k.to(k.dtype), None, None


def twin(name: str) -> Callable[..., Any]:
    """The operator in plain PyTorch (:mod:`tome_ext.reference`)."""
    plain: Callable[..., Any] = getattr(reference, name)

    def call(*args: Any) -> Any:
        # Kernels compute in the precision they promise, under autocast too.
        with without_autocast(args[0].device.type):
            return plain(*args)

    return call


def _on_gpu(name: str) -> Callable[..., Any]:
    """The twin for a GPU that cannot run the kernels, or for which there are none."""
    plain = twin(name)

    def call(x: Tensor, *args: Any) -> Any:
        if _library.tell_of_plain(x.device):
            _leave_kernels(x.device)
        return plain(x, *args)

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
    fakes: dict[str, Callable[..., Any]] = {
        "match": _fake_match,
        "select": _fake_select,
        "plan": _fake_plan,
        "merge": _fake_merge,
        "merge_add_norm": _fake_merge_add_norm,
        "merge_backward": _fake_merge_backward,
        "unmerge": _fake_unmerge,
        "attention_forward": _fake_attention_forward,
        "attention_backward": _fake_attention_backward,
        "cls_attention": _fake_cls_attention,
    }
    runs_cuda = _library.cuda_loaded and not _library.switched_off
    kernel_devices = ("cpu", "cuda") if runs_cuda else ("cpu",)
    for name, fake in fakes.items():
        torch.library.register_fake(f"tome::{name}", fake)
        for key in FALLBACK_KEYS:
            torch.library.impl(f"tome::{name}", key, twin(name))
        if not _library.cuda_loaded:
            torch.library.impl(f"tome::{name}", "CUDA", _on_gpu(name))
        # What the CUDA library calls on a GPU that cannot run its kernels.
        torch.library.impl(f"tome::_plain_{name}", "CompositeExplicitAutograd", _on_gpu(name))
    torch.library.impl("tome::attention", "CompositeImplicitAutograd", attention)
    _onnx.register()
    register_autograd = torch.library.register_autograd
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
    register_autograd("tome::attention_backward", _no_second_derivative, setup_context=_no_setup)
    register_autograd(
        "tome::cls_attention", _cls_attention_backward, setup_context=_cls_attention_setup
    )


if _library.load_error is None:
    _register()
