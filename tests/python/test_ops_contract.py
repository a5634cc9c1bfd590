"""What torch and its users rely on: opcheck, errors, determinism, every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import OPERATOR_ERROR

import tome_ext
from tome_ext import MergePlan, _library, ops, reference

OPS = torch.ops.tome


def samples():
    """Every operator with arguments of every kind."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        metric = torch.randn(2, 3, 21, 8).to(dtype)
        yield OPS.match.default, (metric, 4, 1)
        yield OPS.match.default, (metric[:, 0], 0, 0)
        yield OPS.match.default, (metric, 4, 1), {"weight": (torch.rand(2, 21) > 0.5).float()}
        targets = torch.tensor([2, 5, 6, 13, 20], dtype=torch.int32)
        yield OPS.match.default, (metric, 14, 1), {"targets": targets}
        tables = {"size": torch.rand(2, 21) + 1, "importance": torch.rand(2, 21)}
        yield OPS.match.default, (metric, 4, 1), tables
        yield OPS.match.default, (metric, 4, 1), {"threshold": 0.5}
        yield OPS.match.default, (metric, 0, 1), {**tables, "threshold": 0.5}
        plan = tome_ext.match(metric, 4, 1)
        yield OPS.plan.default, (plan.assign, plan.num_output_tokens)
        if dtype != torch.bfloat16:
            scores = torch.rand(2, 21).to(dtype)
            for fuse in (False, True):
                yield OPS.select.default, (scores, 9, 1, fuse)
        for grad in (False, True):
            size = (torch.rand(2, 21) + 0.5).requires_grad_(grad)
            x = torch.randn(2, 21, 6).to(dtype).requires_grad_(grad)
            rows = torch.randn(2, 17, 6).to(dtype).requires_grad_(grad)
            for reduce in reference.REDUCTIONS:
                yield OPS.merge.default, (x, size, plan.members, plan.offsets, reduce)
            yield OPS.merge.default, (x, None, plan.members, plan.offsets)
            yield OPS.merge_backward.default, (rows, size, plan.members, plan.offsets, "mean")
            yield OPS.merge_backward.default, (rows, None, plan.members, plan.offsets, "sum")
            yield OPS.unmerge.default, (rows, plan.assign)
        yield from attention_samples(dtype)


def attention_samples(dtype):
    for grad in (False, True):
        size = (torch.rand(2, 11) + 0.5).requires_grad_(grad)
        qkv = torch.randn(2, 11, 3, 2, 8).to(dtype)
        q, k, v = (x.detach().requires_grad_(grad) for x in qkv.permute(2, 0, 3, 1, 4))
        for args in ((q, k, v, size), (q, k, v), (q, k, v, size, 0.3)):
            yield OPS.attention_forward.default, args
        # Composite: what opcheck looks at is checked on attention_forward, which it calls.
        yield OPS.attention.default, (q, k, v, size)
        yield OPS.cls_attention.default, (q, k, size)
        yield OPS.cls_attention.default, (q[:, :, :1].detach(), k, None, 0.3)
    out, lse = (x.detach() for x in OPS.attention_forward(q, k, v, size))
    upstream = torch.randn(2, 2, 11, 8).to(dtype)
    for sizes in (size, None):
        for args in ((upstream, q, k, v, sizes), (upstream, q.detach(), k, v.detach(), sizes)):
            yield OPS.attention_backward.default, (*args, out, lse)


# Named by number: the tensors in the arguments are random.
@pytest.mark.parametrize(
    ("op", "args", "kwargs"),
    [
        pytest.param(op, args, *(kwargs or [{}]), id=f"{op}-{i}")
        for i, (op, args, *kwargs) in enumerate(samples())
    ],
)
def test_opcheck(op, args, kwargs):
    torch.library.opcheck(op, args, kwargs)


def test_deterministic_algorithms_change_nothing():
    x = torch.randn(2, 21, 6, requires_grad=True)
    plan = tome_ext.match(x.detach(), 5)
    expected = plan.merge(x)[0]
    torch.use_deterministic_algorithms(True)
    try:
        again = tome_ext.match(x.detach(), 5)
        merged, _ = again.merge(x)
        again.unmerge(merged).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(merged, expected)


def test_outputs_keep_dtype_and_device_under_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        plan = tome_ext.match(torch.empty(2, 3, 197, 64, dtype=torch.bfloat16), 16, 1)
        merged, size = plan.merge(torch.empty(2, 197, 768, dtype=torch.bfloat16))
        assert (merged.shape, merged.dtype) == ((2, 181, 768), torch.bfloat16)
        assert (size.shape, size.dtype) == ((2, 181), torch.float32)
        assert plan.unmerge(merged).shape == (2, 197, 768)
        qkv = torch.empty(3, 2, 3, 181, 64, dtype=torch.bfloat16)
        for out in (OPS.attention(*qkv, size), OPS.attention_forward(*qkv, size)[0]):
            assert (out.shape, out.dtype) == ((2, 3, 181, 64), torch.bfloat16)
            assert out.transpose(1, 2).is_contiguous()
        scores = tome_ext.cls_attention(*qkv[:2], size)
        assert (scores.shape, scores.dtype) == ((2, 181), torch.float32)
    meta = tome_ext.match(torch.empty(2, 9, 4, device="meta"), 2)
    assert meta.num_output_tokens == 7


def test_devices_without_kernels_run_the_twin():
    attention = ("attention_forward", "attention_backward", "cls_attention")
    tokens = ("match", "select", "plan", "merge", "merge_add_norm", "merge_backward", "unmerge")
    for name in (*tokens, *attention):
        for key in ops.FALLBACK_KEYS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tome::{name}", key)


X = torch.randn(2, 9, 4)
PLAN = tome_ext.match(X, 3)
INT = torch.zeros(2, 9, dtype=torch.int32)
Q, K = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 9, 8)
OUT, LSE = OPS.attention_forward(Q, K, K)
ROWS = torch.randn(2, 6, 4)
SIZE = torch.ones(2, 9)
MEMBERS, OFFSETS = PLAN[1:]


@pytest.mark.parametrize(
    ("call", "expected", "got"),
    [
        (lambda: tome_ext.match(X[0], 1), "(B, N, D) or (B, H, N, D)", "(9, 4) float32"),
        (lambda: tome_ext.match(INT[..., None], 1), "float32, float16", "(2, 9, 1) int32"),
        (lambda: tome_ext.match(X, 1, -1), "num_prefix_tokens: expected a number >= 0", "-1"),
        (lambda: tome_ext.match(X[:, None][:, :0], 1), "at least one head", "(2, 0, 9, 4)"),
        (lambda: tome_ext.select(X, 1), "(B, N) float32 or float64", "(2, 9, 4) float32"),
        (lambda: tome_ext.select(X[..., 0].half(), 1), "float32 or float64", "(2, 9) float16"),
        (lambda: tome_ext.select(X[..., 0], -1), "keep: expected a number >= 0", "-1"),
        (lambda: tome_ext.select(X[..., 0], 1, -2), "num_prefix_tokens: expected a number", "-2"),
        (lambda: PLAN.merge(X[0]), "x: expected (B, N, C)", "(9, 4) float32"),
        (lambda: PLAN.merge(X[:, :8]), "x: expected (B, N, C) = (2, 9, C) as in", "(2, 8, 4)"),
        (lambda: PLAN.merge(X[:1]), "x: expected (B, N, C) = (2, 9, C)", "(1, 9, 4) float32"),
        (lambda: PLAN._replace(offsets=OFFSETS[:1]).merge(X), "offsets: expected (2, M", "(1, 7)"),
        (lambda: PLAN.merge(X, torch.ones(2, 8)), "size: expected (2, N = 9) float32", "(2, 8)"),
        (lambda: PLAN.merge(X, torch.ones(2, 9).half()), "float32", "(2, 9) float16"),
        (lambda: PLAN.merge(X, None, "max"), "'mean', 'sum' or 'amax'", "'max'"),
        (lambda: PLAN.merge(X.int()), "float32, float16", "(2, 9, 4) int32"),
        (lambda: PLAN.unmerge(X[0]), "x: expected (B, M, C)", "(9, 4) float32"),
        (lambda: PLAN.unmerge(X[:1, :6]), "x: expected (B, M, C) = (2, M, C)", "(1, 6, 4)"),
        (lambda: PLAN.unmerge(X), "x: expected (B, M, C) = (2, 6, C) as in the plan", "(2, 9, 4)"),
        (lambda: PLAN.unmerge(X[:, :5]), "x: expected (B, M, C) = (2, 6, C)", "(2, 5, 4)"),
        (lambda: PLAN.then(PLAN), "following: expected a plan of (B, N) = (2, 6)", "(2, 9)"),
        (lambda: tome_ext.match(X, True), "r: expected an integer", "True (bool)"),
        (lambda: tome_ext.match(X, np.bool_(True)), "r: expected an integer", "True"),
        (lambda: tome_ext.match(X, torch.tensor(True)), "r: expected an integer", "tensor(True)"),
        (lambda: tome_ext.match(X, 1, 0.5), "num_prefix_tokens: expected an integer", "0.5"),
        (lambda: tome_ext.select(X[..., 0], 1.0), "keep: expected an integer", "1.0 (float)"),
        (lambda: tome_ext.select(X[..., 0], 1, fuse="no"), "fuse: expected True or False", "'no'"),
        (lambda: MergePlan.from_assign(INT, None), "num_output_tokens: expected an int", "None"),
        (lambda: tome_ext.proportional_attention(Q, K, K, dropout_p=-1), "from 0 to 1", "-1"),
        (lambda: MergePlan.from_assign(X, 3), "(B, N) int32 or int64", "(2, 9, 4) float32"),
        (lambda: MergePlan.from_assign(INT, -1), "num_rows: expected a number >= 0", "-1"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(call, expected, got):
    with pytest.raises(ValueError, match=": expected") as error:
        call()
    assert expected in str(error.value)
    assert got in str(error.value)
    assert str(error.value).count("\n") == 0
    assert ".cpp" not in str(error.value)


def test_numbers_of_any_size_are_cut():
    """As r is to the number of tokens: no number is too large, and none turns into another."""
    for huge in (2**31 - 1, 2**31, 2**62, 2**63 - 1, 2**63, 2**100):
        assert tome_ext.match(X, huge).num_output_tokens == 5
        assert tome_ext.match(X, huge, 1).num_output_tokens == 5
        assert tome_ext.match(X, -huge).num_output_tokens == 9
        assert tome_ext.match(X, 3, huge).num_output_tokens == 9
        targets = torch.tensor([4], dtype=torch.int32)
        assert tome_ext.match(X, huge, 2, targets=targets).num_output_tokens == 3
        assert tome_ext.select(X[..., 0], huge).num_output_tokens == 9
        assert tome_ext.select(X[..., 0], 2, huge, True).num_output_tokens == 9
        with pytest.raises(ValueError, match="expected"):
            MergePlan.from_assign(INT, huge)
    most = 2**63 - 1
    for name, args in (("match", (X, most, most)), ("select", (X[..., 0], most, most))):
        plan = getattr(OPS, name)(*args)
        for got, want in zip(plan, getattr(reference, name)(*args), strict=True):
            assert torch.equal(got, want)
        assert plan[2].shape == (2, 10)


def test_integers_of_any_kind():
    assert tome_ext.match(X, np.int64(3), np.uint8(1)).num_output_tokens == 6
    assert tome_ext.match(X, torch.tensor(3)).num_output_tokens == 6
    assert tome_ext.select(X[..., 0], np.int32(3)).num_output_tokens == 3


NO_ROWS = OFFSETS[:, :0]

# Calls that the kernels refuse: the operator and its arguments.
BAD_CALLS = [
    ("match", X[0], 1),
    ("match", X[None, None], 1),
    ("match", INT[..., None], 1),
    ("match", X[:, None][:, :0], 1),
    ("match", X, 1, -1),
    ("match", X, 1, {"weight": SIZE[:, :8]}),
    ("match", X, 1, {"weight": SIZE[:1]}),
    ("match", X[:, None], 1, {"weight": SIZE[0]}),
    ("match", X, 0, {"weight": SIZE.half()}),
    ("match", X, 1, {"weight": SIZE.bool()}),
    ("match", X, 1, {"size": SIZE[:, :8]}),
    ("match", X, 1, {"size": SIZE.double()}),
    ("match", X[:, None], 1, {"importance": SIZE[0]}),
    ("match", X, 1, {"importance": SIZE.half()}),
    ("match", X, 1, {"targets": INT}),
    ("match", X, 0, {"targets": INT[0].long()}),
    ("match", X, 1, 5, {"targets": torch.arange(4, 9, dtype=torch.int32)}),
    ("match", X, 1, 20, {"targets": INT[0, :1]}),
    ("select", X, 1),
    ("select", X[..., 0].half(), 1),
    ("select", X[..., 0], -1),
    ("select", X[..., 0], 1, -2),
    ("plan", X, 3),
    ("plan", X[..., 0], 3),
    ("plan", INT.long(), 3),
    ("plan", INT, -1),
    ("plan", INT, 2**31 - 1),
    ("merge", X[0], None, MEMBERS, OFFSETS),
    ("merge", X.int(), None, MEMBERS, OFFSETS),
    ("merge", X[:1], None, MEMBERS, OFFSETS),
    ("merge", X[:, :8], None, MEMBERS, OFFSETS),
    ("merge", X, None, MEMBERS.long(), OFFSETS),
    ("merge", X, None, MEMBERS, OFFSETS.long()),
    ("merge", X, None, MEMBERS, OFFSETS[:1]),
    ("merge", X, None, MEMBERS, OFFSETS[0]),
    ("merge", X, None, MEMBERS, NO_ROWS),
    ("merge", X, SIZE[:, :8], MEMBERS, OFFSETS),
    ("merge", X, SIZE[0], MEMBERS, OFFSETS),
    ("merge", X, SIZE.half(), MEMBERS, OFFSETS),
    ("merge", X, None, MEMBERS, OFFSETS, "max"),
    ("merge_add_norm", X[0], X[0], None, MEMBERS, OFFSETS),
    ("merge_add_norm", X, X[:, :8], None, MEMBERS, OFFSETS),
    ("merge_add_norm", X, X.double(), None, MEMBERS, OFFSETS),
    ("merge_add_norm", X, X, SIZE[:1], MEMBERS, OFFSETS),
    ("merge_add_norm", X, X, None, MEMBERS, OFFSETS, X[0, 0, :3]),
    ("merge_add_norm", X, X, None, MEMBERS, OFFSETS, None, X[0, 0].double()),
    ("merge_add_norm", X, X, None, MEMBERS, OFFSETS, None, None, X[0]),
    ("merge_add_norm", X, X, None, MEMBERS, OFFSETS, None, None, None, -1.0),
    ("merge_backward", ROWS[0], None, MEMBERS, OFFSETS),
    ("merge_backward", ROWS.int(), None, MEMBERS, OFFSETS),
    ("merge_backward", X, None, MEMBERS, OFFSETS),
    ("merge_backward", ROWS, SIZE[:, :8], MEMBERS, OFFSETS),
    ("merge_backward", ROWS, None, MEMBERS, NO_ROWS),
    ("merge_backward", ROWS, None, MEMBERS, OFFSETS, "amax"),
    ("merge_backward", ROWS, None, MEMBERS, OFFSETS, "max"),
    ("unmerge", ROWS[0], INT),
    ("unmerge", ROWS.int(), INT),
    ("unmerge", ROWS[:1], INT),
    ("unmerge", ROWS, INT.long()),
    ("unmerge", ROWS, INT[0]),
    ("attention_forward", Q[0], K, K),
    ("attention_forward", Q.int(), K.int(), K.int()),
    ("attention_forward", Q, K[:1], K[:1]),
    ("attention_forward", Q, K[:, :2], K[:, :2]),
    ("attention_forward", Q, K[..., :7], K[..., :7]),
    ("attention_forward", Q, K.double(), K.double()),
    ("attention_forward", Q, K, K[:, :, :8]),
    ("attention_forward", Q, K, K.half()),
    ("attention_forward", Q, K, K[0]),
    ("attention_forward", Q, K, K, SIZE[:, :8]),
    ("attention_forward", Q, K, K, SIZE.double()),
    ("attention", Q, K, K, SIZE[:1]),
    ("attention_backward", K, Q, K, K, None, OUT, LSE),
    ("attention_backward", OUT, Q, K, K[:, :, :8], None, OUT, LSE),
    ("attention_backward", OUT, Q, K, K, SIZE[:, :8], OUT, LSE),
    ("attention_backward", OUT, Q, K, K, None, OUT.half(), LSE),
    ("attention_backward", OUT, Q, K, K, None, OUT, LSE[..., 0]),
    ("attention_backward", OUT, Q, K, K, None, OUT, LSE.double()),
    ("cls_attention", Q[0], K),
    ("cls_attention", Q.int(), K.int()),
    ("cls_attention", Q, K[..., :7]),
    ("cls_attention", Q[:, :, :0], K),
    ("cls_attention", Q[:, :0], K[:, :0]),
    ("cls_attention", Q, K, SIZE[:, :8]),
]


def error_of(call, args, kwargs, kind=ValueError):
    with pytest.raises(kind, match=": expected ") as error:
        call(*args, **kwargs)
    assert type(error.value) is kind
    return str(error.value)


@pytest.mark.parametrize(
    "bad", [pytest.param(bad, id=f"{bad[0]}-{i}") for i, bad in enumerate(BAD_CALLS)]
)
def test_fakes_and_twins_refuse_what_the_kernels_refuse(bad):
    """In the same words: a program that traces is one that runs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    name, *args = bad
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    kind = ValueError if name == "attention" else OPERATOR_ERROR  # written in Python
    refused = error_of(getattr(OPS, name), args, kwargs, kind)
    assert error_of(getattr(reference, name), args, kwargs) == refused
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in args]
    meta_kwargs = {k: x.to("meta") for k, x in kwargs.items()}
    assert error_of(getattr(OPS, name), meta, meta_kwargs) == refused
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
    fake_kwargs = {k: mode.from_tensor(x) for k, x in kwargs.items()}
    with mode:
        assert error_of(getattr(OPS, name), fake, fake_kwargs) == refused


def test_fakes_refuse_two_devices():
    for name, args in (
        ("merge", (X.to("meta"), None, *PLAN[1:])),
        ("unmerge", (ROWS.to("meta"), INT)),
        ("attention_forward", (Q.to("meta"), K, K)),
    ):
        with pytest.raises(ValueError, match=r"expected one device, got \w on meta and \w+ on cpu"):
            getattr(reference, name)(*args)


def spoiled(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PLAN._replace(members=spoiled(PLAN.members, (1, 2), 9)), "got members[1, 2] = 9"),
        (PLAN._replace(members=spoiled(PLAN.members, (0, 0), -1)), "got members[0, 0] = -1"),
        (PLAN._replace(members=INT), "got token 0 again at members[0, 1]"),
        (PLAN._replace(offsets=spoiled(PLAN.offsets, (1, 0), 1)), "got offsets[1, 0] = 1"),
        (PLAN._replace(offsets=spoiled(PLAN.offsets, (1, 3), 10)), "got offsets[1, 3] = 10"),
        (PLAN._replace(offsets=spoiled(PLAN.offsets, (0, 2), 0)), "got offsets[0, 2] = 0"),
    ],
)
def test_a_plan_that_points_outside_is_refused(plan, message):
    with pytest.raises(RuntimeError, match="merge: expected") as error:
        plan.merge(X)
    assert str(error.value).endswith(message)
    with pytest.raises(RuntimeError):
        OPS.merge_backward(X[:, :6], None, plan.members, plan.offsets)


@pytest.mark.parametrize("value", [-2, 6, 2**31 - 1, -(2**31)])
def test_an_assignment_that_points_outside_is_refused(value):
    assign = spoiled(PLAN.assign, (1, 4), value)
    for call in (lambda: OPS.unmerge(X[:, :6], assign), lambda: MergePlan.from_assign(assign, 6)):
        with pytest.raises(RuntimeError) as error:
            call()
        assert f"got assign[1, 4] = {value}" in str(error.value)


def test_non_integer_r_is_refused():
    for r in (1.5, "3", None):
        with pytest.raises(ValueError, match="r: expected an integer, got"):
            tome_ext.match(X, r)


HEADS = X[None]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("metric", lambda wrong: tome_ext.match(wrong, 1)),
        ("scores", lambda wrong: tome_ext.select(wrong, 1)),
        ("assign", lambda wrong: MergePlan.from_assign(wrong, 1)),
        ("x", PLAN.merge),
        ("members", lambda wrong: PLAN._replace(members=wrong).merge(X)),
        ("branch", lambda wrong: PLAN.merge_add_norm(X, wrong)),
        ("x", PLAN.unmerge),
        ("v", lambda wrong: tome_ext.proportional_attention(HEADS, HEADS, wrong)),
        ("k", lambda wrong: tome_ext.cls_attention(HEADS, wrong)),
    ],
)
@pytest.mark.parametrize("wrong", [None, [1.0], 3], ids=str)
def test_what_is_no_tensor_is_refused(name, call, wrong):
    with pytest.raises(ValueError) as error:
        call(wrong)
    assert str(error.value).startswith(f"{name}: expected a tensor, got {wrong!r}")
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(
    "dtype", ["int8", "int16", "int32", "int64", "uint8", "bool", "complex64", "complex128"]
)
def test_an_unsupported_dtype_is_named(dtype):
    with pytest.raises(ValueError, match=rf"got \(.*\) {dtype}$"):
        tome_ext.match(X.to(getattr(torch, dtype)), 1)


INSTRUCTION_SETS = _library.INSTRUCTION_SETS
# All other tests use the machine's best.
LOWER_SETS = INSTRUCTION_SETS[: max(1, INSTRUCTION_SETS.index(_library.build_info()["isa"]))]


@pytest.mark.parametrize("isa", LOWER_SETS)
def test_every_instruction_set(isa):
    """The operators' tests once more with a lower instruction set.

    Without those that compare derivatives with differences, which take half the time: the C++ tests
    and the fuzzer hold the gradients of every instruction set to an oracle.
    """
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + [str(here / f"test_{name}.py") for name in ("match", "select", "merge", "merge_add_norm")]
        + [str(here / f"test_{name}.py") for name in ("attention", "cls_attention")]
        + ["-k", "not (compiles or opcheck or gradcheck or test_gradients or second_derivatives)"],
        env={**os.environ, "TOME_ISA": isa},
        cwd=here,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
