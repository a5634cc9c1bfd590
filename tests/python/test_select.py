"""tome_ext.select: keeping the tokens of the highest scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tome_ext
from tome_ext import MergePlan, _onnx_standard, reference

NAN, INF = math.nan, math.inf


def by_definition(scores: Tensor, keep: int, prefix: int, fuse: bool) -> MergePlan:
    """The plan by sorting Python's numbers."""
    assigns = []
    for row in scores.tolist():
        prefix = min(prefix, len(row))
        order = sorted(
            range(prefix, len(row)),
            key=lambda n: (math.isnan(row[n]), -row[n] if row[n] == row[n] else 0, n),
        )
        stay = sorted([*range(prefix), *order[:keep]])
        fused = len(stay) if fuse and len(stay) < len(row) else -1
        assigns.append([stay.index(n) if n in stay else fused for n in range(len(row))])
        rows = len(stay) + (fused >= 0)
    return MergePlan.from_assign(
        torch.tensor(assigns, dtype=torch.int32).reshape(scores.shape), rows
    )


def assert_equal(found: MergePlan | tuple[Tensor, ...], expected: MergePlan) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.int32
        assert torch.equal(x, y)


@given(
    tokens=st.integers(0, 40),
    keep=st.integers(0, 45),
    prefix=st.integers(0, 5),
    fuse=st.booleans(),
    kind=st.sampled_from(["distinct", "tied", "special"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_any_scores_agree_with_the_definition(
    tokens: int, keep: int, prefix: int, fuse: bool, kind: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if kind == "distinct":
        scores = torch.randn(3, tokens, generator=generator, dtype=dtype)
    else:
        values = [0.0, 0.5, 1.0] if kind == "tied" else [NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0]
        picks = torch.randint(len(values), (3, tokens), generator=generator)
        scores = torch.tensor(values, dtype=dtype)[picks]
    expected = by_definition(scores, keep, prefix, fuse)
    assert_equal(tome_ext.select(scores, keep, prefix, fuse), expected)
    assert_equal(reference.select(scores, keep, prefix, fuse), expected)
    assert_equal(_onnx_standard.select(scores, keep, prefix, fuse), expected)


def test_rows_are_prefix_kept_and_fused() -> None:
    scores = torch.tensor([[9.0, 0.1, 0.4, 0.2, 0.3], [0.0, 0.3, 0.1, 0.3, 0.3]])
    plan = tome_ext.select(scores, keep=2, num_prefix_tokens=1, fuse=True)
    assert plan.assign.tolist() == [[0, 3, 1, 3, 2], [0, 1, 3, 2, 3]]
    assert plan.members.tolist() == [[0, 2, 4, 1, 3], [0, 1, 3, 2, 4]]
    assert plan.offsets.tolist() == [[0, 1, 2, 3, 5]] * 2
    dropped = tome_ext.select(scores, keep=2, num_prefix_tokens=1)
    assert dropped.assign.tolist() == [[0, -1, 1, -1, 2], [0, 1, -1, 2, -1]]
    assert dropped.members.tolist() == plan.members.tolist()  # dropped ones at the end
    assert dropped.offsets.tolist() == [[0, 1, 2, 3]] * 2


def test_what_is_kept_is_copied_and_what_is_dropped_is_zero() -> None:
    x, scores = torch.randn(2, 20, 6), torch.rand(2, 20)
    plan = tome_ext.select(scores, 7, 1)
    kept, _ = plan.merge(x)
    index = scores[:, 1:].topk(7).indices.sort(1).values + 1
    assert torch.equal(kept[:, :1], x[:, :1])
    assert torch.equal(kept[:, 1:], x.gather(1, index.unsqueeze(2).expand(-1, -1, 6)))
    spread = plan.unmerge(kept)
    dropped = plan.assign < 0
    assert torch.equal(spread[~dropped], x[~dropped])
    assert (spread[dropped] == 0).all()


def test_evits_tokens_are_a_merge_with_the_scores_as_weights() -> None:
    x, scores = torch.randn(2, 20, 6), torch.rand(2, 20)
    plan = tome_ext.select(scores, 7, 1, fuse=True)
    fused = plan.assign == 8
    assert fused.sum(1).tolist() == [12, 12]
    weights = torch.where(fused, scores, 1.0)
    got, _ = plan.merge(x, weights, reduce="sum")
    expected = torch.stack([scores[b, fused[b]] @ x[b, fused[b]] for b in range(2)])
    torch.testing.assert_close(got[:, 8], expected)
    assert torch.equal(got[:, :8], tome_ext.select(scores, 7, 1).merge(x)[0])


@pytest.mark.parametrize("tokens", [197, 577, 4100])
def test_many_tokens_and_images(tokens: int) -> None:
    scores = torch.rand(20, tokens)
    for fuse in (False, True):
        expected = reference.select(scores, tokens // 3, 1, fuse)
        assert_equal(tome_ext.select(scores, tokens // 3, 1, fuse), MergePlan(*expected))


def test_any_strides() -> None:
    wide = torch.rand(6, 90)
    expected = tome_ext.select(wide[::2, :30].contiguous(), 11, 1, True)
    assert_equal(tome_ext.select(wide[::2, :30], 11, 1, True), expected)
    spread = torch.empty(30, 3).T.copy_(wide[::2, :30])
    assert_equal(tome_ext.select(spread, 11, 1, True), expected)
    row = wide[:1, :30].expand(4, 30)
    assert_equal(tome_ext.select(row, 11), tome_ext.select(row.contiguous(), 11))


def test_no_images() -> None:
    plan = tome_ext.select(torch.empty(0, 9), 4, 1, fuse=True)
    assert plan.assign.shape == (0, 9)
    assert plan.offsets.shape == (0, 7)


def test_fake_shapes_and_meta() -> None:
    plan = tome_ext.select(torch.empty(2, 197, device="meta"), 137, 1, fuse=True)
    assert plan.num_output_tokens == 139
    assert tome_ext.select(torch.empty(2, 9, device="meta"), 20, 1, True).num_output_tokens == 9


def test_compiles_with_a_dynamic_batch_and_no_gradient() -> None:
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def run(x: Tensor, scores: Tensor) -> Tensor:
        return tome_ext.select(scores, 5, 1).merge(x)[0]

    for batch in (2, 3):
        x = torch.randn(batch, 12, 4, requires_grad=True)
        scores = torch.rand(batch, 12, requires_grad=True)
        run(x, scores).sum().backward()
        assert scores.grad is None
        assert x.grad is not None
        assert torch.equal(x.grad.sum(), torch.tensor(batch * 6 * 4.0))
