"""tome::merge, merge_backward and unmerge against loops, the twin, and autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    FLOATS,
    assert_error_within,
    assert_same_derivatives,
    differentiable_merge,
    merge_rows,
    stock_merge,
)

import tome_ext
from tome_ext import MergePlan, reference

REDUCTIONS = ("mean", "sum", "amax")
# Channels around every vector width, and those of real models.
CHANNELS = (1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 768)


def random_plan(batch, tokens, rows, seed=0):
    """Any assignment: rows of every member count, empty ones and dropped tokens among them."""
    generator = torch.Generator().manual_seed(seed)
    assign = torch.randint(-1, rows, (batch, tokens), generator=generator)
    return MergePlan.from_assign(assign, rows)


def full_plan(batch, tokens, rows):
    """An assignment that drops nothing and leaves no row empty."""
    assign = torch.stack([torch.randperm(tokens) % rows for _ in range(batch)])
    return MergePlan.from_assign(assign, rows)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_error_is_at_most_twice_that_of_stock(dtype, reduce, channels):
    plan = full_plan(2, 40, 13)
    x = torch.randn(2, 40, channels).to(dtype)
    size = torch.randint(1, 5, (2, 40)).float()
    for sizes in (size, None):
        exact, total = merge_rows(x, sizes, plan.assign, 13, reduce)
        stock = stock_merge(x, sizes, plan.assign, 13, reduce)
        merged, new_size = plan.merge(x, sizes, reduce)
        assert_error_within(merged, stock, exact)
        assert new_size.dtype == torch.float32
        assert torch.equal(new_size.double(), total)


@given(
    batch=st.integers(0, 3),
    tokens=st.integers(0, 30),
    rows=st.integers(0, 12),
    channels=st.integers(0, 20),
    reduce=st.sampled_from(REDUCTIONS),
    sized=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_plan_agrees_with_loops_and_twin(batch, tokens, rows, channels, reduce, sized, seed):
    plan = random_plan(batch, tokens, rows, seed)
    x = torch.randn(batch, tokens, channels, dtype=torch.float64)
    # Fractions, and zeros: sizes may be any weights.
    size = torch.rand(batch, tokens) * torch.randint(0, 3, (batch, tokens)) if sized else None
    exact, total = merge_rows(x, size, plan.assign, rows, reduce)
    merged, new_size = plan.merge(x, size, reduce)
    torch.testing.assert_close(merged, exact, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_size.double(), total, rtol=1e-6, atol=0)
    twin, twin_size = reference.merge(x, size, plan.members, plan.offsets, reduce)
    torch.testing.assert_close(merged, twin, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_size, twin_size)
    assert torch.equal(plan.unmerge(merged), reference.unmerge(merged, plan.assign))
    if reduce != "amax":
        args = (size, plan.members, plan.offsets, reduce)
        torch.testing.assert_close(
            torch.ops.tome.merge_backward(merged, *args), reference.merge_backward(merged, *args)
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_single_members_and_unmerge_are_copies(dtype):
    x = torch.randn(2, 30, 37).to(dtype)
    size = torch.rand(2, 30) * 7
    plan = MergePlan.from_assign(torch.stack([torch.randperm(30) for _ in range(2)]), 30)
    for reduce in ("mean", "amax"):
        merged, new_size = plan.merge(x, size, reduce)
        assert torch.equal(plan.unmerge(merged), x)
        assert torch.equal(plan.unmerge(new_size.unsqueeze(-1)).squeeze(-1), size)


def test_sizes_count_past_what_half_types_hold():
    plan = MergePlan.from_assign(torch.zeros(1, 1000, dtype=torch.int32), 1)
    for dtype in (torch.bfloat16, torch.float16):
        merged, size = plan.merge(torch.ones(1, 1000, 8, dtype=dtype))
        assert size.item() == 1000
        assert torch.equal(merged, torch.ones(1, 1, 8, dtype=dtype))


def test_rows_of_total_size_zero_stay_finite():
    plan = MergePlan.from_assign(torch.tensor([[0, 0, 1, 1]]), 2)
    x = torch.tensor([[[1.0], [3.0], [5.0], [7.0]]], requires_grad=True)
    merged, size = plan.merge(x, torch.tensor([[0.0, 0.0, 1.0, 3.0]]))
    assert merged.flatten().tolist() == [2.0, 6.5]
    assert size.flatten().tolist() == [0.0, 4.0]
    merged.sum().backward()
    assert x.grad.flatten().tolist() == [0.5, 0.5, 0.25, 0.75]


def test_amax_keeps_nan():
    plan = MergePlan.from_assign(torch.tensor([[0, 0, 1, 1]]), 2)
    nan = float("nan")
    x = torch.tensor([[[nan, 1.0], [3.0, nan], [5.0, 1.0], [7.0, 0.0]]])
    merged, _ = plan.merge(x, reduce="amax")
    assert merged[0, 0].isnan().all()
    assert merged[0, 1].tolist() == [7.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_rounding_of_special_values(dtype):
    """Infinity, the largest value, subnormals and NaN survive a trip through the kernels."""
    finfo = torch.finfo(dtype)
    values = [0.0, -0.0, finfo.max, finfo.min, finfo.smallest_normal, finfo.smallest_normal / 4]
    values += [float("inf"), -float("inf"), float("nan"), 1 + finfo.eps]
    x = torch.tensor(values, dtype=dtype).repeat(1, 2, 5)
    plan = MergePlan.from_assign(torch.zeros(1, 2, dtype=torch.int32), 1)
    merged, _ = plan.merge(x, torch.full((1, 2), 0.5))  # halves, so that no sum overflows
    torch.testing.assert_close(merged, x[:, :1], rtol=0, atol=0, equal_nan=True)


def test_strided_inputs():
    plan = full_plan(2, 30, 11)
    x = torch.randn(2, 30, 24)
    size = torch.rand(2, 30) + 0.5
    expected, _ = plan.merge(x, size)
    views = {
        "sliced channels": torch.cat([x, x], 2)[..., :24],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last dimension strided": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second": x.repeat_interleave(2, 1)[:, ::2],
    }
    for name, view in views.items():
        assert not view.is_contiguous()
        assert torch.equal(plan.merge(view, size)[0], expected), name
    strided_size = torch.stack([size, size], 2)[..., 0]
    assert torch.equal(plan.merge(x, strided_size)[0], expected)
    rows = torch.randn(2, 11, 48)[..., ::2]
    assert torch.equal(plan.unmerge(rows), plan.unmerge(rows.contiguous()))


def test_gradients():
    plan = full_plan(2, 9, 4)
    loose = random_plan(2, 9, 4, seed=3)
    size = torch.randint(1, 4, (2, 9)).float()
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    for p in (plan, loose):
        for reduce in REDUCTIONS:
            assert torch.autograd.gradcheck(lambda x, p=p, r=reduce: p.merge(x, size, r)[0], x)
        for reduce in ("mean", "sum"):
            assert torch.autograd.gradgradcheck(
                lambda x, p=p, r=reduce: p.merge(x, size, r)[0].pow(2), x
            )
        rows = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(p.unmerge, rows)
        assert torch.autograd.gradgradcheck(lambda x, p=p: p.unmerge(x).pow(2), rows)


def test_amax_gradient_is_shared_by_equal_members():
    plan = MergePlan.from_assign(torch.tensor([[0, 0, 0]]), 1)
    x = torch.tensor([[[2.0], [2.0], [1.0]]], requires_grad=True)
    plan.merge(x, reduce="amax")[0].sum().backward()
    assert x.grad.flatten().tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_equal_the_twin(dtype):
    plan = full_plan(3, 50, 20)
    size = torch.randint(1, 4, (3, 50)).float()
    upstream = torch.randn(3, 20, 33).to(dtype)
    grads = []
    for merge in (plan.merge, lambda x, s: reference.merge(x, s, plan.members, plan.offsets)):
        x = torch.randn(3, 50, 33, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        merge(x, size)[0].backward(upstream)
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("zeros", [False, True])
def test_learned_sizes_get_their_gradient(reduce, zeros):
    """Twice: of x and of sizes, from the rows and from the new sizes."""
    size = torch.randint(1, 5, (2, 9)).float()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    for plan in (full_plan(2, 9, 4), random_plan(2, 9, 4, seed=3)):
        if zeros:  # whole rows, whose mean is even then
            size = torch.where(plan.assign == 1, 0.0, size)
        assert_same_derivatives(
            lambda x, size, p=plan: p.merge(x, size, reduce),
            lambda x, size, p=plan: differentiable_merge(x, size, p.assign, 4, reduce),
            (x, size),
            rtol=1e-4,  # sizes and their gradients are float32
            atol=1e-4,
        )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_only_sizes_may_need_a_gradient(dtype):
    plan = random_plan(2, 9, 4, seed=3)
    x = torch.randn(2, 9, 3).to(dtype)
    x[plan.assign < 0] = float("nan")  # dropped
    size = torch.rand(2, 9, requires_grad=True)
    merged, new_size = plan.merge(x, size)
    (got,) = torch.autograd.grad(merged.sum(), size, retain_graph=True)
    known = size.detach().clone().requires_grad_()
    exact, _ = differentiable_merge(x.nan_to_num(), known, plan.assign, 4)
    (want,) = torch.autograd.grad(exact.sum(), known)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0, atol=64 * torch.finfo(dtype).eps + 1e-6)
    (of_sizes,) = torch.autograd.grad(new_size.sum(), size)
    assert torch.equal(of_sizes, (plan.assign >= 0).float())
    _, of_amax = plan.merge(x, size, "amax")
    assert torch.equal(torch.autograd.grad(of_amax.sum(), size)[0], of_sizes)


def test_more_members_than_float32_counts():
    tokens = 2**24 + 6
    plan = MergePlan.from_assign(torch.zeros(1, tokens, dtype=torch.int32), 1)
    ones = torch.ones(1, tokens, 1)
    for merge in (torch.ops.tome.merge, reference.merge):
        merged, size = merge(ones, ones[..., 0], plan.members, plan.offsets, "sum")
        assert merged.item() == size.item() == tokens


def test_a_plan_that_is_rewritten_meanwhile_leads_nowhere(run_python):
    """In a process of its own, which an access outside the tensors would end."""
    program = """
import threading, torch, tome_ext
plan = tome_ext.match(torch.randn(2, 400, 8), 150)
x, rows = torch.randn(2, 400, 8), torch.randn(2, 250, 8)
good = [t.clone() for t in plan]
stop = threading.Event()
def rewrite():
    while not stop.is_set():
        for tensor, values in zip(plan, good):
            tensor.fill_(2**31 - 1)
            tensor.copy_(values)
writer = threading.Thread(target=rewrite)
writer.start()
done = refused = 0
for _ in range(2000):
    for run in (lambda: plan.merge(x), lambda: plan.unmerge(rows),
                lambda: torch.ops.tome.plan(plan.assign, 250)):
        try:
            run()
            done += 1
        except RuntimeError as error:
            assert "expected" in str(error), error
            refused += 1
stop.set()
writer.join()
print(done + refused)
"""
    run = run_python(program)
    assert (run.returncode, run.stdout) == (0, "6000\n"), run.stderr[-2000:]


def test_forked_processes_merge(run_python):
    """As workers of a data loader do, after their parent has used all its threads."""
    program = """
import os, torch, tome_ext
from torch.utils.data import DataLoader, Dataset
torch.set_num_threads(2)
x = torch.randn(8, 197, 64)
def merged():
    plan = tome_ext.match(x, 60, 1)
    q = x.unsqueeze(1)
    return plan.merge(x)[0], tome_ext.proportional_attention(q, q, q, torch.ones(8, 197))
expected = merged()
class Merged(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return all(map(torch.equal, merged(), expected))
loader = DataLoader(Merged(), num_workers=2, multiprocessing_context="fork", timeout=60)
assert all(bool(right) for right in loader)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # torch's own threads do not live on in a fork
    os._exit(0 if all(map(torch.equal, merged(), expected)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    run = run_python(program, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]


def test_given_sizes_have_no_gradient():
    plan = full_plan(1, 6, 3)
    x = torch.randn(1, 6, 2, requires_grad=True)
    merged, size = plan.merge(x, torch.ones(1, 6))
    assert merged.requires_grad
    assert not size.requires_grad


def test_bitwise_repeatable_and_independent_of_batch_and_threads():
    x = torch.randn(4, 197, 100).bfloat16()
    size = torch.rand(4, 197) + 0.5
    plan = tome_ext.match(x, 60, 1)
    expected = plan.merge(x, size)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for _ in range(5):
                again = plan.merge(x, size)
                assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))
    finally:
        torch.set_num_threads(before)
    for image in range(4):
        one = slice(image, image + 1)
        alone, _ = MergePlan(*(t[one] for t in plan)).merge(x[one], size[one])
        assert torch.equal(alone, expected[0][one])
