"""White-box tests of tome_core through its pybind11 bindings. Run by ctest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import _tome_core as core
import numpy as np
import pytest

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def available() -> list[str]:
    """The instruction sets of this machine: more than the fastest, where that is not the last."""
    before, found = core.active_isa(), []
    for level in LEVELS:
        try:
            core.set_isa(level)
        except ValueError:
            break
        found.append(level)
    core.set_isa(before)
    return found


AVAILABLE = available()


@pytest.fixture(params=AVAILABLE)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine has, in use."""
    before = core.active_isa()
    core.set_isa(request.param)
    yield request.param
    core.set_isa(before)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def active_isa_with(level: str) -> str:
    code = "import _tome_core; print(_tome_core.active_isa())"
    env = {**os.environ, "TOME_ISA": level}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    return run.stdout.decode().strip()


def match_in_numpy(metric: np.ndarray, r: int, prefix: int) -> np.ndarray:
    """The assignment of one image, (N, D) float64, by the method's description."""
    unit = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
    tokens = np.arange(len(metric))
    a, b = (tokens[(tokens >= prefix) & (tokens % 2 == side)] for side in (0, 1))
    scores = unit[a] @ unit[b].T
    merged = np.argsort(-scores.max(1), kind="stable")[:r]
    joins = tokens.copy()
    joins[a[merged]] = b[scores.argmax(1)[merged]]
    stay = tokens[joins == tokens]
    order = sorted(stay, key=lambda n: (n >= prefix and 1 + n % 2, n))
    row = np.empty(len(metric), np.int32)
    row[order] = np.arange(len(order))
    return row[joins]


# --- which instruction set runs -----------------------------------------------------------------


def test_set_isa_changes_what_runs(isa: str) -> None:
    assert core.active_isa() == isa


def test_environment_chooses_the_level() -> None:
    for level in AVAILABLE:
        assert active_isa_with(level) == level


def test_environment_cannot_ask_for_what_is_not_there() -> None:
    for level in (*LEVELS[len(AVAILABLE) :], "sse9", ""):
        assert active_isa_with(level) == core.best_isa()


def test_set_isa_refuses_what_is_not_there() -> None:
    before = core.active_isa()
    for level in LEVELS[len(AVAILABLE) :]:
        with pytest.raises(ValueError, match=f"lacks {level}"):
            core.set_isa(level)
    expected = "expected portable, avx2, avx512, avx512_bf16 or amx_bf16, got sse9"
    with pytest.raises(ValueError, match=expected):
        core.set_isa("sse9")
    assert core.active_isa() == before


# --- the operators on numpy arrays --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_match_agrees_with_numpy(isa: str, dtype: type) -> None:
    keys = normal(2, 3, 65, 32).astype(dtype)
    for threads in (1, 3):
        assign, _, offsets = core.match(keys, 20, 1, threads=threads)
        for image in range(2):
            want = match_in_numpy(keys[image].astype(np.float64).mean(0), 20, 1)
            np.testing.assert_array_equal(assign[image], want)
        np.testing.assert_array_equal(offsets[:, -1], [65, 65])


def test_match_reads_bfloat16_and_views(isa: str) -> None:
    qkv = (normal(2, 50, 3, 4, 16).view(np.uint32) >> 16).astype(np.uint16)
    keys = qkv[:, :, 1].transpose(0, 2, 1, 3)  # (B, H, N, D), strided
    wide = (qkv.astype(np.uint32) << 16).view(np.float32)[:, :, 1].transpose(0, 2, 1, 3)
    for got, want in zip(core.match(keys, 10, 1), core.match(wide, 10, 1), strict=True):
        np.testing.assert_array_equal(got, want)


def test_merge_and_unmerge_agree_with_numpy(isa: str) -> None:
    x = normal(2, 30, 20)
    size = np.arange(1, 61, dtype=np.float32).reshape(2, 30)
    assign = np.random.default_rng(1).integers(-1, 12, (2, 30)).astype(np.int32)
    members, offsets = core.plan(assign, 12)
    out, out_size = core.merge(x, members, offsets, size, threads=2)
    for image in range(2):
        for row in range(12):
            chosen = assign[image] == row
            weight = size[image, chosen]
            assert out_size[image, row] == weight.sum()
            want = weight @ x[image, chosen] / max(weight.sum(), 1)
            np.testing.assert_allclose(out[image, row], want, rtol=1e-5, atol=1e-6)
    back = core.unmerge(out, assign)
    image = np.arange(2)[:, None]
    want = np.where(assign[..., None] >= 0, out[image, assign], 0)
    np.testing.assert_array_equal(back, want)


def test_merge_backward_is_the_adjoint(isa: str) -> None:
    x, grad = normal(1, 30, 8), normal(1, 12, 8, seed=1)
    members, offsets = core.plan(np.arange(30, dtype=np.int32)[None] % 12, 12)
    for reduce in ("mean", "sum"):
        merged, _ = core.merge(x, members, offsets, reduce=reduce)
        spread = core.merge_backward(grad, members, offsets, reduce=reduce)
        np.testing.assert_allclose((merged * grad).sum(), (x * spread).sum(), rtol=1e-4)


def test_refusals_say_where() -> None:
    x = normal(1, 3, 2)
    members, offsets = core.plan(np.array([[0, 1, 1]], np.int32), 2)
    with pytest.raises(ValueError, match="assign out of range: image 0, index 2, value 2"):
        core.plan(np.array([[0, 1, 2]], np.int32), 2)
    with pytest.raises(ValueError, match="member out of range: image 0, index 1, value 3"):
        core.merge(x, np.array([[0, 3, 2]], np.int32), offsets)
    with pytest.raises(ValueError, match=r"members: expected shape \[1, 3\], got \(1, 2\)"):
        core.merge(x, members[:, :2], offsets)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        core.match(normal(1, 4, 6)[..., ::2], 1)


# --- sizes at which a path switches -------------------------------------------------------------


def test_rows_per_task_fills_a_task() -> None:
    assert core.rows_per_task(core.BYTES_PER_TASK) == 1
    assert core.rows_per_task(core.BYTES_PER_TASK // 2) == 2
    assert core.rows_per_task(core.BYTES_PER_TASK * 10) == 1
    assert core.rows_per_task(0) == core.BYTES_PER_TASK


def test_columns_per_chunk_are_whole_panels_that_fit() -> None:
    for dim in (1, 3, 64, 320, 4096, 10**7):
        for panel in (8, 16, 32):
            columns = core.columns_per_chunk(dim, 4, panel)
            assert columns % panel == 0
            assert columns >= panel
            assert columns == panel or columns * dim * 4 <= core.PACKED_BYTES


def test_result_does_not_depend_on_how_set_b_is_packed(isa: str) -> None:
    # Just below, at and just above the number of columns that are packed at a time.
    dim = 1024
    columns = core.columns_per_chunk(dim, 4, 16)
    for tokens in (2 * columns - 2, 2 * columns, 2 * columns + 2, 4 * columns + 2):
        metric = normal(1, tokens, dim)
        assign, _, _ = core.match(metric, 17)
        want = match_in_numpy(metric[0].astype(np.float64), 17, 0)
        np.testing.assert_array_equal(assign[0], want)


def test_result_does_not_depend_on_splitting_an_image(isa: str) -> None:
    metric = normal(1, 600, 64)
    assert core.split_image(1, 3, 300 * 300 * 64)
    assert not core.split_image(1, 1, 300 * 300 * 64)
    for alone, split in zip(
        core.match(metric, 99, 1), core.match(metric, 99, 1, threads=3), strict=True
    ):
        np.testing.assert_array_equal(alone, split)
