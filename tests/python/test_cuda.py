"""The CUDA operators: against the CPU's results, repeated, captured, on other streams."""

from __future__ import annotations

import os
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

import tome_ext
from tome_ext import MergePlan, _library

OPERATORS = (
    *("match", "select", "plan", "merge", "merge_add_norm", "merge_backward", "unmerge"),
    *("attention_forward", "attention_backward", "cls_attention"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
on_gpu = pytest.mark.cuda


def test_every_operator_has_a_kernel_or_its_twin_on_cuda() -> None:
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tome::{name}", "CUDA"), name
        dump = torch._C._dispatch_dump(f"tome::{name}").splitlines()
        (line,) = (line for line in dump if line.startswith("CUDA:"))
        assert ("csrc/torch/cuda/ops_cuda.cpp" in line) == _library.cuda_loaded, line


def separated_keys(batch: int, heads: int, tokens: int, dim: int) -> Tensor:
    """(B, H, N, D) keys of which no two pairs are nearly equally alike.

    Every even token is an odd one turned by an angle of its own, so rounding changes no choice.
    """
    generator = torch.Generator().manual_seed(tokens)
    half = tokens // 2
    odd = torch.nn.functional.normalize(torch.randn(batch, half, dim, generator=generator), dim=-1)
    other = torch.randn(batch, half, dim, generator=generator)
    other = other - (other * odd).sum(-1, keepdim=True) * odd
    other = torch.nn.functional.normalize(other, dim=-1)
    order = torch.randperm(half, generator=generator)
    angle = (0.2 + 0.6 * order / half)[:, None]
    keys = torch.empty(batch, tokens, dim)
    keys[:, 1 : 2 * half : 2] = odd
    keys[:, 0 : 2 * half : 2] = odd * angle.cos() + other * angle.sin()
    if tokens % 2:
        keys[:, -1] = -odd[:, 0]
    # Heads that differ, with the mean above.
    spread = torch.randn(batch, heads, tokens, dim, generator=generator)
    return keys[:, None] + 0.1 * (spread - spread.mean(1, keepdim=True))


def shaped_like_qkv(keys: Tensor) -> Tensor:
    """The same keys as a strided view of a packed (B, N, 3, H, D) tensor."""
    batch, heads, tokens, dim = keys.shape
    packed = keys.new_zeros(batch, tokens, 3, heads, dim)
    packed[:, :, 1] = keys.transpose(1, 2)
    return packed.permute(2, 0, 3, 1, 4)[1]


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "dim", "r"),
    [(1, 12, 197, 64, 13), (3, 1, 64, 48, 32), (2, 2, 50, 33, 8), (4, 3, 577, 64, 23)],
)
def test_match_agrees_with_the_cpu(
    dtype: torch.dtype, batch: int, heads: int, tokens: int, dim: int, r: int
) -> None:
    keys = separated_keys(batch, heads, tokens, dim).to(dtype)
    want = tome_ext.match(keys, r, 1)
    for view in (keys.cuda(), shaped_like_qkv(keys.cuda())):
        got = tome_ext.match(view, r, 1)
        for mine, theirs in zip(got, want, strict=True):
            assert torch.equal(mine.cpu(), theirs)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "dim", "r"),
    [(5, 12, 197, 64, 13), (3, 1, 64, 48, 32), (4, 2, 50, 33, 8), (4, 3, 1200, 64, 400)],
)
def test_match_hides_what_the_cpu_hides(
    dtype: torch.dtype, batch: int, heads: int, tokens: int, dim: int, r: int
) -> None:
    keys = separated_keys(batch, heads, tokens, dim).to(dtype)
    weight = torch.ones(batch, tokens)
    weight[1, tokens // 3 :] = 0
    # Pairs of tokens, so that the nearest of those that are seen is still clear.
    weight[2] = (torch.rand(tokens // 2 + 1) > 0.5).repeat_interleave(2)[:tokens]
    keys[weight[:, None].expand(-1, heads, -1) == 0] = float("nan")
    got, want = (tome_ext.match(x, r, 1, weight=weight.to(x.device)) for x in (keys.cuda(), keys))
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "dim", "r"),
    [(5, 12, 197, 64, 13), (4, 2, 50, 33, 60), (4, 3, 1200, 64, 400)],
)
def test_match_merges_into_given_targets_as_the_cpu_does(
    dtype: torch.dtype, hidden: bool, batch: int, heads: int, tokens: int, dim: int, r: int
) -> None:
    keys = separated_keys(batch, heads, tokens, dim).to(dtype)
    # The odd tokens, whose neighbours are clear, but for a few that are now sources.
    targets = torch.arange(1, tokens, 2, dtype=torch.int32)
    targets = targets[torch.rand(len(targets)) > 0.1]
    weight = None
    if hidden:
        weight = torch.ones(batch, tokens)
        weight[1, tokens // 3 :] = 0
        weight[2] = 0
    got, want = (
        tome_ext.match(
            x,
            r,
            1,
            weight=None if weight is None else weight.to(x.device),
            targets=targets.to(x.device),
        )
        for x in (keys.cuda(), keys)
    )
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.cpu(), theirs)


@on_gpu
@pytest.mark.parametrize(("tokens", "r"), [(4096, 2048), (16384, 4096)])
def test_large_matches_are_as_good_as_the_cpus(tokens: int, r: int) -> None:
    keys = torch.randn(1, tokens, 64)
    unit = torch.nn.functional.normalize(keys[0].double(), dim=-1)

    def kept_likeness(plan: MergePlan) -> float:
        assign, members, offsets = (x[0].cpu().long() for x in plan)
        first = members[offsets[:-1]]
        odd_of_row = torch.where(first % 2 == 1, first, members[offsets[1:] - 1])
        return float((unit * unit[odd_of_row[assign]]).sum(-1)[::2].sum())

    got, want = tome_ext.match(keys.cuda(), r), tome_ext.match(keys, r)
    assert kept_likeness(got) == pytest.approx(kept_likeness(want), rel=1e-3)


def some_plan(batch: int = 3, tokens: int = 61, rows: int = 33) -> MergePlan:
    generator = torch.Generator().manual_seed(1)
    return MergePlan.from_assign(
        torch.randint(-1, rows, (batch, tokens), generator=generator), rows
    )


def to_gpu(plan: MergePlan) -> MergePlan:
    return MergePlan(*(x.cuda() for x in plan))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 197, 577, 5000])
@pytest.mark.parametrize("fuse", [False, True])
def test_select_agrees_with_the_cpu(dtype: torch.dtype, tokens: int, fuse: bool) -> None:
    for batch in (1, 3, 256):
        scores = torch.rand(batch, tokens, dtype=dtype)
        tied = (scores * 3).floor()
        tied[:, ::7] = float("nan")
        for x in (scores, tied, torch.rand(batch, tokens + 3, dtype=dtype)[:, :tokens]):
            for keep in (0, tokens // 2, tokens):
                expected = tome_ext.select(x, keep, 1, fuse)
                for found, wanted in zip(
                    tome_ext.select(x.cuda(), keep, 1, fuse), expected, strict=True
                ):
                    assert torch.equal(found.cpu(), wanted)


@on_gpu
def test_plan_agrees_with_the_cpu() -> None:
    for batch, tokens, rows in ((1, 1, 1), (3, 61, 33), (2, 20000, 12000), (2, 0, 4), (2, 5, 0)):
        generator = torch.Generator().manual_seed(rows)
        assign = torch.randint(-1, max(rows, 1), (batch, tokens), generator=generator)
        assign = assign.clamp(max=rows - 1)
        got = MergePlan.from_assign(assign.cuda(), rows)
        for mine, theirs in zip(got, MergePlan.from_assign(assign, rows), strict=True):
            assert torch.equal(mine.cpu(), theirs)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["mean", "sum", "amax"])
@pytest.mark.parametrize("channels", [1, 37, 64, 768, 1100])
def test_merge_and_unmerge_agree_with_the_cpu(
    dtype: torch.dtype, reduce: str, channels: int
) -> None:
    plan, size = some_plan(), torch.randint(1, 5, (3, 61)).float()
    x = torch.randn(3, 61, channels + 1).to(dtype)[..., 1:]  # rows that no vector fits
    for tokens in (x, x.contiguous()):
        want, want_size = plan.merge(tokens, size, reduce)
        on_device = torch.empty_strided(
            tokens.shape, tokens.stride(), dtype=dtype, device="cuda"
        ).copy_(tokens)
        got, got_size = to_gpu(plan).merge(on_device, size.cuda(), reduce)
        torch.testing.assert_close(got.cpu(), want)
        assert torch.equal(got_size.cpu(), want_size)
        assert torch.equal(to_gpu(plan).unmerge(got).cpu(), plan.unmerge(got.cpu()))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 37, 64, 384, 768, 1024, 1280, 2056])
@pytest.mark.parametrize("scaled", [False, True])
def test_merge_add_norm_agrees_with_the_cpu(
    dtype: torch.dtype, channels: int, scaled: bool
) -> None:
    plan, size = some_plan(), torch.randint(0, 5, (3, 61)).float()
    x, branch = (torch.randn(3, 61, channels + 1).to(dtype)[..., 1:] for _ in range(2))
    scale, weight, bias = (torch.randn(channels).to(dtype) for _ in range(3))
    vectors = (scale, weight, bias) if scaled else (None, None, None)
    on_gpu_vectors = [None if v is None else v.cuda() for v in vectors]
    for tokens in ((x, branch), (x.contiguous(), branch.contiguous())):  # no vector fits; one does
        want, want_size, want_normed = plan.merge_add_norm(*tokens, size, *vectors)
        on_device = [
            torch.empty_strided(t.shape, t.stride(), dtype=dtype, device="cuda").copy_(t)
            for t in tokens
        ]
        got, got_size, got_normed = to_gpu(plan).merge_add_norm(
            *on_device, size.cuda(), *on_gpu_vectors
        )
        torch.testing.assert_close(got.cpu(), want)
        assert torch.equal(got_size.cpu(), want_size)
        # The norm of what was stored, of which the CPU's may be one rounding away.
        exact = torch.nn.functional.layer_norm(
            got.cpu().double(),
            (channels,),
            *(None if v is None else v.double() for v in vectors[1:]),
            eps=1e-6,
        )
        torch.testing.assert_close(got_normed.cpu(), exact.to(dtype), atol=1e-4, rtol=2e-2)
        if dtype in (torch.float32, torch.float64) and channels > 1:
            torch.testing.assert_close(got_normed.cpu(), want_normed, atol=1e-4, rtol=1e-4)


@on_gpu
def test_gradients() -> None:
    plan, size = to_gpu(some_plan(2, 9, 4)), torch.rand(2, 9, device="cuda") + 0.5
    x = torch.randn(2, 9, 5, device="cuda", dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 4, 5, device="cuda", dtype=torch.float64, requires_grad=True)
    for reduce in ("mean", "sum"):
        assert torch.autograd.gradcheck(lambda t, how=reduce: plan.merge(t, size, how)[0], (x,))
    assert torch.autograd.gradcheck(plan.unmerge, (y,))
    branch = torch.randn_like(x).requires_grad_()
    vectors = [torch.randn_like(x[0, 0]).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *t: plan.merge_add_norm(*t[:2], size, *t[2:])[::2], (x, branch, *vectors)
    )


def layer(keys: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    plan = tome_ext.match(keys, 13, 1)
    merged, size = plan.merge(x)
    folded = plan.merge_add_norm(x, plan.unmerge(merged), size=None, weight=x[0, 0], bias=x[0, 1])
    return (*plan, merged, size, plan.unmerge(merged), *folded)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    keys = torch.randn(2, 12, 197, 64, device="cuda", generator=generator).bfloat16()
    return keys, torch.randn(2, 197, 768, device="cuda", generator=generator).bfloat16()


@on_gpu
def test_a_thousand_repeats_are_bitwise_equal() -> None:
    keys, x = inputs()
    first = layer(keys, x)
    for _ in range(1000):
        again = layer(keys, x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_gpu
def test_graph_capture_and_replay() -> None:
    keys, x = inputs()
    layer(keys, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(keys, x)
    for seed in (1, 2, 3):
        new_keys, new_x = inputs(seed)
        keys.copy_(new_keys)
        x.copy_(new_x)
        graph.replay()
        want = layer(new_keys, new_x)
        assert all(torch.equal(a, b) for a, b in zip(captured, want, strict=True))


# On chips of 9.0 and later merge is launched while the kernel before it still runs. The tests below
# give it every kind of neighbour: what it reads was just written, what it writes just read.


def chain(keys: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layers back to back, each of which takes memory that the ones before have just given back."""
    size = torch.ones(x.shape[:2], device=x.device)
    scale = x.new_full(x.shape[2:], -0.5)  # halves what was doubled
    for _ in range(6):
        plan = tome_ext.match(keys[:, :, : x.shape[1]], 14)
        x, size = plan.merge(x * 1.0, size * 1.0)  # behind kernels of torch's
        plan = tome_ext.match(keys[:, :, : x.shape[1]], 2)
        x, size = plan.merge(x, size)  # behind match
        x, _ = plan.merge(plan.unmerge(x))  # behind unmerge
        x, size, _ = tome_ext.match(keys[:, :, : x.shape[1]], 2).merge_add_norm(x, x, size)
        plan = tome_ext.match(keys[:, :, : x.shape[1]], 2)
        x, size, normed = plan.merge_add_norm(x, x, size, scale)
    return x, size, normed


@on_gpu
def test_chains_of_overlapping_kernels_agree_with_the_cpu() -> None:
    keys, x = separated_keys(2, 3, 198, 64), torch.randn(2, 198, 768)
    want = chain(keys, x)
    keys, x = keys.cuda(), x.cuda()
    first = chain(keys, x)
    assert torch.equal(first[1].cpu(), want[1])
    torch.testing.assert_close(first[0].cpu(), want[0], rtol=1e-5, atol=1e-5)
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(chain(keys, x), first, strict=True))


@on_gpu
def test_graph_of_match_and_merge_agrees_with_the_cpu() -> None:
    keys = shaped_like_qkv(separated_keys(2, 3, 197, 64).cuda())
    x, size = torch.zeros(2, 197, 64, device="cuda"), torch.zeros(2, 197, device="cuda")

    def run() -> tuple[Tensor, ...]:
        plan = tome_ext.match(keys, 40, 1)
        return (*plan, *plan.merge(x, size))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        # Whole numbers, so that every sum is exact.
        new_x = torch.randint(-50, 50, x.shape, generator=generator).float()
        new_size = torch.randint(1, 5, size.shape, generator=generator).float()
        x.copy_(new_x)
        size.copy_(new_size)
        graph.replay()
        plan = MergePlan(*(part.cpu() for part in captured[:3]))
        want = tome_ext.match(keys.cpu(), 40, 1)
        assert all(torch.equal(a, b) for a, b in zip(plan, want, strict=True))
        merged, merged_size = want.merge(new_x, new_size)
        torch.testing.assert_close(captured[3].cpu(), merged)
        assert torch.equal(captured[4].cpu(), merged_size)


@on_gpu
def test_merge_behind_a_copy_in_a_graph() -> None:
    # A copy is no kernel, nor is the wait for another stream: there is nothing to overlap with.
    plan, source = to_gpu(some_plan()), torch.randn(3, 61, 40, device="cuda")
    x, side = torch.zeros_like(source), torch.cuda.Stream()
    plan.merge(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(source)
        merged, _ = plan.merge(x, reduce="sum")
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            doubled = 2 * x
        again, _ = plan.merge(x, reduce="sum")
        torch.cuda.current_stream().wait_stream(side)
        of_doubled, _ = plan.merge(doubled, reduce="sum")
    for seed in range(20):
        source.copy_(torch.randn(3, 61, 40, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        want, _ = plan.merge(source.clone(), reduce="sum")
        assert torch.equal(merged, want)
        assert torch.equal(again, want)
        assert torch.equal(of_doubled, 2 * want)


@on_gpu
def test_merge_behind_an_event_of_another_stream() -> None:
    # match lets the next kernel begin early, but the next one waits for another stream first.
    keys = separated_keys(2, 3, 197, 64)
    plan = tome_ext.match(keys, 40, 1)
    keys = keys.cuda()
    generator = torch.Generator().manual_seed(0)
    sources = torch.randint(-50, 50, (20, 2, 197, 64), generator=generator).float()
    on_device = sources.cuda()
    x, main, side = torch.zeros_like(on_device[0]), torch.cuda.current_stream(), torch.cuda.Stream()
    got = []
    for source in on_device:
        side.wait_stream(main)  # x is still read by the merge before
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000)  # so that the copy is late
            x.copy_(source)
            written = side.record_event()
        found = tome_ext.match(keys, 40, 1)
        main.wait_event(written)
        got.append(found.merge(x, reduce="sum")[0])
    for merged, source in zip(got, sources, strict=True):  # whole numbers: every sum is exact
        assert torch.equal(merged.cpu(), plan.merge(source, reduce="sum")[0])


# In a process of its own, in which no kernel has been started yet.
COLD = """
import sys
import threading

import torch

import tome_ext
from tome_ext import MergePlan, _library, reference

ops = torch.ops.tome
generator = torch.Generator(device="cuda").manual_seed(0)


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", generator=generator).to(dtype)


def same(got, want):
    assert len(got) == len(want)
    for x, y in zip(got, want):
        assert torch.equal(x, y)


def capture(run):
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        for x in captured:
            x.zero_()
        graph.replay()
        same(captured, run())


def match():
    keys = random(2, 12, 197, 64)
    capture(lambda: tuple(tome_ext.match(keys, 13, 1)))


def merge_add_norm():
    plan = MergePlan(*(part.cuda() for part in tome_ext.match(torch.randn(2, 197, 64), 13, 1)))
    x, branch, scale = random(2, 197, 768), random(2, 197, 768), random(768)
    capture(lambda: tuple(plan.merge_add_norm(x, branch, None, scale)))


def attention():
    q, k, v, grad = (random(2, 12, 197, 64) for _ in range(4))
    size = torch.ones(2, 197, device="cuda")

    def run():
        out, lse = ops.attention_forward(q, k, v, size)
        return out, lse, *ops.attention_backward(grad, q, k, v, size, out, lse)

    capture(run)


def threads():
    # Two shapes that take different amounts of shared memory.
    keys = [random(2, 12, 197, 64), random(1, 2, 577, 256)]
    heads = [random(4, 12, 197, 64), random(2, 16, 3000, 64)]
    torch.cuda.synchronize()
    barrier, results = threading.Barrier(2), {}

    def run(which):
        return *ops.match(keys[which], 40, 1), ops.cls_attention(heads[which], heads[which])

    def work(which):
        with torch.cuda.stream(torch.cuda.Stream()):
            barrier.wait()
            results[which] = [run(which) for _ in range(200)]
            torch.cuda.current_stream().synchronize()

    both = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert sorted(results) == [0, 1], "a thread failed"
    for which, found in results.items():
        want = run(which)
        for got in found:
            same(got, want)


def plain():
    # With TOME_CUDA_KERNELS=0: every operator is its twin, behind the kernels' own checks.
    assert _library.cuda_status() == "not used: TOME_CUDA_KERNELS=0 is set", _library.cuda_status()
    keys, x, branch = random(2, 3, 50, 64), random(2, 50, 24), random(2, 50, 24)
    vectors, size = random(3, 24).unbind(), torch.ones(2, 50, device="cuda")
    plan = ops.match(keys, 12, 1)
    members, offsets = plan[1:]
    rows = ops.merge(x, size, members, offsets, "mean")[0]
    q, k, v, grad = (random(2, 3, 50, 16) for _ in range(4))
    forward = ops.attention_forward(q, k, v, size, None)
    calls = {
        "match": (keys, 12, 1),
        "select": (torch.rand(2, 50, device="cuda"), 20, 1, True),
        "plan": (plan[0], 38),
        "merge": (x, size, members, offsets, "mean"),
        "merge_add_norm": (x, branch, size, members, offsets, *vectors, 1e-5),
        "merge_backward": (rows, size, members, offsets, "sum"),
        "unmerge": (rows, plan[0]),
        "attention_forward": (q, k, v, size, None),
        "attention_backward": (grad, q, k, v, size, *forward, None),
        "cls_attention": (q, k, size, 0.3),
    }
    for name, arguments in calls.items():
        got, want = getattr(ops, name)(*arguments), getattr(reference, name)(*arguments)
        same(*((y,) if isinstance(y, torch.Tensor) else tuple(y) for y in (got, want)))
    live = q.clone().requires_grad_()
    ops.attention(live, k, v, size).sum().backward()
    assert live.grad.isfinite().all()
    try:
        ops.match(x[0], 12, 1)
    except ValueError as error:
        assert "metric: expected" in str(error), error
    else:
        raise AssertionError("no error")


locals()[sys.argv[1]]()
print("DONE")
"""


@on_gpu
@pytest.mark.parametrize("case", ["match", "merge_add_norm", "attention", "threads", "plain"])
def test_in_a_cold_process(run_python: Any, case: str) -> None:
    env = {**os.environ, "PYTHONWARNINGS": "error:tome_ext runs plain:RuntimeWarning"}
    if case == "plain":
        env["TOME_CUDA_KERNELS"] = "0"
    run = run_python(COLD, case, env=env, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "DONE\n"


@on_gpu
def test_float64_sums_sizes_in_float64() -> None:
    plan, size = some_plan(), torch.rand(3, 61) + 0.5
    x = torch.randn(3, 61, 8, dtype=torch.float64)
    for reduce in ("mean", "sum"):
        want, want_size = plan.merge(x, size, reduce)
        got, got_size = to_gpu(plan).merge(x.cuda(), size.cuda(), reduce)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-14, atol=1e-14)
        assert torch.equal(got_size.cpu(), want_size)


@on_gpu
def test_side_streams() -> None:
    wanted = [layer(*inputs(seed)) for seed in range(4)]
    streams = [torch.cuda.Stream() for _ in wanted]
    prepared = [inputs(seed) for seed in range(4)]
    torch.cuda.synchronize()
    got = []
    for stream, (keys, x) in zip(streams, prepared, strict=True):
        with torch.cuda.stream(stream):
            got.append([layer(keys, x) for _ in range(20)][-1])
    torch.cuda.synchronize()
    for mine, theirs in zip(got, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@on_gpu
@pytest.mark.parametrize("value", [-(2**31), -1, 61, 2**31 - 1])
def test_what_points_outside_is_skipped(value: int) -> None:
    plan = to_gpu(some_plan())
    for tensor in plan:
        tensor[:, 3] = value
    x = torch.randn(3, 61, 40, device="cuda")
    merged, _ = plan.merge(x)
    plan.merge_add_norm(x, x)
    plan.unmerge(merged)
    MergePlan.from_assign(plan.assign, 33)
    torch.ops.tome.merge_backward(merged, None, plan.members, plan.offsets, "mean")
    torch.cuda.synchronize()


@on_gpu
def test_errors_are_the_cpus() -> None:
    with pytest.raises(oracle.OPERATOR_ERROR, match="metric: expected"):
        torch.ops.tome.match(torch.zeros(3, device="cuda"), 1, 0)
    plan = some_plan()
    with pytest.raises(oracle.OPERATOR_ERROR, match="expected one device"):
        torch.ops.tome.merge(
            torch.zeros(3, 61, 4, device="cuda"), None, plan.members, plan.offsets, "mean"
        )


@on_gpu
def test_more_tokens_than_float32_counts_are_refused() -> None:
    tokens = 2**24 + 1
    plan = MergePlan.from_assign(torch.zeros(1, tokens, dtype=torch.int32, device="cuda"), 1)
    x = torch.ones(1, tokens, 1, device="cuda")
    with pytest.raises(ValueError, match=r"expected at most 2\^24 .* got 16777217"):
        plan.merge(x)
    assert plan.merge(x.double(), reduce="sum")[0].item() == tokens


@on_gpu
def test_plans_are_plans() -> None:
    keys, _ = inputs()
    plan = tome_ext.match(keys, 50, 1)
    oracle.check_plan(*(x.cpu() for x in plan), plan.num_tokens, plan.num_output_tokens)


# --- attention ----------------------------------------------------------------------------------

# Of the largest element: roundings of the result and, in half types, of the softmax weights.
ATTENTION_ERROR = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
HEADS = [(2, 12, 197, 64), (1, 3, 577, 64), (3, 2, 50, 72), (1, 1, 33, 17), (2, 2, 80, 128)]


def packed_qkv(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Views (B, H, N, D) of a packed (B, N, 3, H, D) tensor."""
    generator = torch.Generator().manual_seed(tokens)
    packed = torch.randn(batch, tokens, 3, heads, dim, generator=generator).to(dtype)
    return list(packed.permute(2, 0, 3, 1, 4).unbind(0))


def sizes_with_zeros(batch: int, tokens: int) -> Tensor:
    size = torch.randint(0, 5, (batch, tokens), generator=torch.Generator().manual_seed(1)).float()
    size[-1] = 0 if batch > 1 else size[-1]  # an image with nothing to see
    return size


def assert_close_to_largest(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    want = want.double()
    error = (got.cpu().double() - want).abs().max()
    assert error <= ATTENTION_ERROR[dtype] * max(1.0, float(want.abs().max()))


@on_gpu
@pytest.mark.parametrize("dtype", ATTENTION_ERROR)
@pytest.mark.parametrize("shape", HEADS)
@pytest.mark.parametrize("sized", [False, True])
def test_attention_and_its_gradient_agree_with_the_cpu(
    dtype: torch.dtype, shape: tuple[int, int, int, int], sized: bool
) -> None:
    batch, heads, tokens, dim = shape
    size = sizes_with_zeros(batch, tokens) if sized else None
    grad = torch.randn(batch, heads, tokens, dim).to(dtype)
    results = []
    for device, work in (("cpu", torch.float64), ("cuda", dtype)):
        q, k, v = (x.to(device, work).requires_grad_() for x in packed_qkv(*shape, dtype))
        out = torch.ops.tome.attention(q, k, v, None if size is None else size.to(device))
        grads = torch.autograd.grad(out, (q, k, v), grad.to(device, work))
        results.append((out.detach(), *grads))
    for want, got in zip(*results, strict=True):
        assert got.dtype == dtype
        assert_close_to_largest(got, want, dtype)


@on_gpu
@pytest.mark.parametrize("dtype", ATTENTION_ERROR)
@pytest.mark.parametrize("shape", [*HEADS, (1, 2, 5000, 64), (64, 3, 20, 64)])
def test_cls_attention_agrees_with_the_cpu(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    q, k, _ = packed_qkv(*shape, dtype)
    size = sizes_with_zeros(shape[0], shape[2])
    want = tome_ext.cls_attention(q.double(), k.double(), size)
    got = tome_ext.cls_attention(q.cuda(), k.cuda(), size.cuda())
    torch.testing.assert_close(got.cpu().double(), want, atol=1e-6, rtol=1e-4)


@on_gpu
def test_attention_reads_views_in_place_and_gives_the_same_bits() -> None:
    q, k, v = (x.cuda() for x in packed_qkv(4, 12, 197, 64, torch.bfloat16))
    packed = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 2)
    views = packed.permute(2, 0, 3, 1, 4).unbind(0)
    size = torch.ones(4, 197, device="cuda")
    out, lse = torch.ops.tome.attention_forward(q.contiguous(), k.contiguous(), v.contiguous())
    for _ in range(100):
        again, lse_again = torch.ops.tome.attention_forward(*views, size)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)
    gradients = torch.ops.tome.attention_backward(out, *views, size, out, lse)
    for _ in range(20):
        again = torch.ops.tome.attention_backward(out, *views, size, out, lse)
        assert all(torch.equal(x, y) for x, y in zip(again, gradients, strict=True))


@on_gpu
def test_attention_is_captured_and_replayed() -> None:
    q, k, v = (x.cuda() for x in packed_qkv(2, 12, 197, 64, torch.bfloat16))
    size = torch.ones(2, 197, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.ops.tome.attention(q, k, v, size)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.tome.attention(q, k, v, size)
        scores = torch.ops.tome.cls_attention(q, k, size)
    for seed in range(3):
        torch.manual_seed(seed)
        q.normal_()
        size.random_(1, 5)
        graph.replay()
        assert torch.equal(out, torch.ops.tome.attention(q, k, v, size))
        assert torch.equal(scores, torch.ops.tome.cls_attention(q, k, size))


@on_gpu
def test_hopper_runs_kernels_of_its_own() -> None:
    q, k, v = (
        torch.randn(1, 2, 40, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        tome_ext.ops.attention(q, k, v).sum().backward()
        torch.cuda.synchronize()
    names = " ".join(event.name for event in profile.events())
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert ("attention_resident_kernel" in names) == hopper
    assert ("attention_backward_hopper_kernel" in names) == hopper


@on_gpu
def test_attention_takes_no_memory_that_grows_with_pairs() -> None:
    q, k, v = (x.cuda() for x in packed_qkv(1, 4, 4096, 64, torch.bfloat16))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = torch.ops.tome.attention_forward(q, k, v)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= out.nbytes + lse.nbytes + 4096  # the allocator's rounding


@on_gpu
@pytest.mark.parametrize("dtype", ATTENTION_ERROR)
def test_nan_is_not_taken_for_hidden_keys(dtype: torch.dtype) -> None:
    q, k, v = (x.cuda() for x in packed_qkv(1, 1, 20, 64, dtype))
    q[0, 0, 3, 5] = float("nan")
    out, lse = torch.ops.tome.attention_forward(q, k, v)
    rows = torch.arange(20, device="cuda") == 3
    assert torch.equal(out.isnan().all(-1)[0, 0], rows)
    assert torch.equal(lse.isnan()[0, 0], rows)


@on_gpu
@pytest.mark.parametrize("dtype", ATTENTION_ERROR)
@pytest.mark.parametrize("dim", [17, 32, 64, 72, 96, 128])
@pytest.mark.parametrize("tokens", [50, 197, 300])
def test_what_hidden_keys_hold_changes_nothing(dtype: torch.dtype, dim: int, tokens: int) -> None:
    q, k, v = (x.cuda() for x in packed_qkv(3, 2, tokens, dim, dtype))
    size = torch.ones(3, tokens, device="cuda")
    size[0, 1::3] = 0
    size[0, : max(0, min(130, tokens - 60))] = 0  # whole tiles
    size[1] = 0  # rows without a visible key
    size[2, -1] = 0
    values = torch.tensor([float("nan"), float("inf"), float("-inf")], device="cuda", dtype=dtype)
    filled = values[torch.arange(tokens, device="cuda") % 3].view(1, 1, -1, 1)
    hidden = (size == 0).view(3, 1, -1, 1)
    results = []
    for keys, held in ((k, v), (k.where(~hidden, filled), v.where(~hidden, -filled))):
        inputs = [x.detach().requires_grad_() for x in (q, keys, held)]
        out = torch.ops.tome.attention(*inputs, size)
        grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
        scores = torch.ops.tome.cls_attention(q, keys, size)
        results.append((out.detach(), scores, *grads))
    for want, got in zip(*results, strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)
    for grad in results[1][3:]:
        assert (grad.transpose(1, 2)[size == 0] == 0).all()


@on_gpu
def test_attention_names_what_its_kernels_do_not_take(capfd: pytest.CaptureFixture[str]) -> None:
    wide = torch.zeros(1, 1, 4, 136, device="cuda")
    with pytest.raises(ValueError, match="at most 128 channels"):
        torch.ops.tome.attention(wide, wide, wide)
    double = torch.zeros(1, 1, 4, 8, device="cuda", dtype=torch.float64)
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16 on CUDA"):
        torch.ops.tome.attention(double, double, double)
    assert capfd.readouterr().err == "", "torch prints errors that pass through its C interface"
    # The public function serves both, through stock attention.
    size = torch.ones(1, 4, device="cuda")
    for x in (wide, double):
        assert tome_ext.proportional_attention(x, x, x, size).shape == x.shape
