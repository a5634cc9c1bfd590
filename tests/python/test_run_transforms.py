"""torch.func and FX on patched models: the derivatives of autograd, or an error that says why."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.proxy import TraceError

import tome_ext


def make_model(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=64,
        depth=3,
        embed_dim=48,
        num_heads=3,
        num_classes=5,
        init_values=0.5,
    )
    return tome_ext.patch.auto(model.double().eval(), **options)


@pytest.fixture(params=[{"r": 3}, {"r": 3, "method": "topk"}, {"r": 3, "method": "evit"}], ids=str)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return make_model(**request.param)


def loss_of(model: torch.nn.Module, params: dict[str, torch.Tensor], images: torch.Tensor) -> Any:
    return functional_call(model, params, (images,)).logsumexp(1).sum()


def test_grad_is_that_of_autograd(model: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    params = dict(model.named_parameters())
    want = torch.autograd.grad(loss_of(model, params, images), params.values())
    got = grad(lambda p: loss_of(model, p, images))(params)
    for name, expected in zip(params, want, strict=True):
        torch.testing.assert_close(got[name], expected, rtol=1e-9, atol=1e-12)


def test_jacrev_is_that_of_autograd(model: torch.nn.Module) -> None:
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    want = torch.autograd.functional.jacobian(model, images)
    torch.testing.assert_close(jacrev(model)(images), want, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's own operators
def test_gradients_of_each_image(model: torch.nn.Module) -> None:
    images = torch.randn(3, 1, 3, 64, 64, dtype=torch.float64)
    params = {name: x.detach() for name, x in model.named_parameters()}
    each = vmap(grad(lambda p, x: loss_of(model, p, x)), in_dims=(None, 0))(params, images)
    for i in range(3):
        alone = grad(lambda p, x: loss_of(model, p, x))(params, images[i])
        for name, expected in alone.items():
            torch.testing.assert_close(each[name][i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("no_grad", [False, True])
def test_a_batch_of_batches(model: torch.nn.Module, no_grad: bool) -> None:
    images = torch.randn(3, 2, 3, 64, 64, dtype=torch.float64)
    with torch.set_grad_enabled(not no_grad):
        want = torch.stack([model(x) for x in images])
        torch.testing.assert_close(vmap(model)(images), want, rtol=1e-9, atol=1e-12)


def test_operators_by_themselves() -> None:
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    plan = tome_ext.match(x, 3)
    size = torch.randint(1, 4, (2, 9)).double()

    def every(x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        merged, new_size = plan.merge(x, size.float())
        total = plan.unmerge(merged).sum() + new_size.sum() + plan.merge(x, reduce="amax")[0].sum()
        rows, _, normed = plan.merge_add_norm(x, x.sin(), size.float(), x[0, 0], x[0, 1])
        q = x.unsqueeze(1)
        out = tome_ext.proportional_attention(q, q, q, size.float())
        scores = tome_ext.cls_attention(q, q, size.float())
        return total + (rows * normed).sum() + out.square().sum() + scores.square().sum()

    live = [x.clone().requires_grad_(), size.clone().requires_grad_()]
    want = torch.autograd.grad(every(*live), live)
    for got, expected in zip(grad(every, (0, 1))(x, size), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    # Forward mode: the same derivative, along one direction.
    along = torch.randn_like(x)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda x: every(x, size), (x,), (along,))
    torch.testing.assert_close(slope, (want[0] * along).sum(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_second_and_forward_derivatives_of_a_model(fused: bool) -> None:
    model: Any = make_model(r=[3])
    for block in model.blocks:
        block.attn.fused_attn = fused
    image, direction = torch.randn(2, 1, 3, 64, 64, dtype=torch.float64)

    def value(step: torch.Tensor) -> torch.Tensor:
        return model(image + step * direction).logsumexp(1).sum()

    zero = torch.zeros((), dtype=torch.float64)
    around = [value(zero + step).item() for step in (-1e-4, 0, 1e-4)]
    slope, bend = (around[2] - around[0]) / 2e-4, (around[2] - 2 * around[1] + around[0]) / 1e-8
    assert jvp(value, (zero,), (zero + 1,))[1].item() == pytest.approx(slope, rel=1e-5)
    assert hessian(value)(zero).item() == pytest.approx(bend, rel=1e-3)
    assert grad(grad(value))(zero).item() == pytest.approx(bend, rel=1e-3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "name", ["merge", "merge_add_norm", "unmerge", "attention_forward", "cls_attention"]
)
def test_operators_called_directly_keep_tangents(name: str) -> None:
    plan = tome_ext.match(torch.randn(2, 7, 3), 2, 1)
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    q, operators = x.unsqueeze(1), torch.ops.tome
    by = (None, plan.members, plan.offsets)
    function, x = {
        "merge": (lambda x: operators.merge(x, *by)[0], x),
        "merge_add_norm": (lambda x: operators.merge_add_norm(x, 2 * x, *by)[2], x),
        "unmerge": (lambda x: operators.unmerge(x, plan.assign), x[:, :5]),
        "attention_forward": (lambda q: operators.attention_forward(q, q, q)[0], q),
        "cls_attention": (lambda q: operators.cls_attention(q, q), q),
    }[name]
    want = torch.autograd.functional.jacobian(function, x)
    assert want.abs().max() > 0.01
    for transform in (jacfwd, jacrev):
        torch.testing.assert_close(transform(function)(x), want, rtol=1e-9, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    torch.testing.assert_close(tangent, want.flatten(-x.dim()).sum(-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("r", [0, 3])
def test_symbolic_tracing_fails_by_name(r: int) -> None:
    with pytest.raises(TraceError, match=r"torch\.fx\.symbolic_trace: .* use torch\.export"):
        torch.fx.symbolic_trace(make_model(r=r))
