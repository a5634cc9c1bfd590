"""Patched models as ONNX graphs, of standard operators and of native ones, run by ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from host_cases import Case, all_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VARIANTS, images, tiny
from onnx_graphs import (
    BATCH,
    FLOAT,
    HOSTS,
    INT32,
    TRANSLATIONS,
    EveryArgument,
    EveryOperator,
    check_example,
    node,
    to_onnx,
)
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import tome_ext as tome
from tome_ext import _digits, _onnx_standard, reference

NAMES = ("plain", "registers, layer scale", "class token, avg")


def patched(name: str, depth: int = 2) -> Any:
    return tome.patch.timm(tiny(**VARIANTS[name], depth=depth), r=9).requires_grad_(False)


def session(proto: onnx.ModelProto, threads: int = 1) -> Callable[..., list[Tensor]]:
    """ONNX Runtime's outputs of a graph, as a function of tensors."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if "tome_ext" in {opset.domain for opset in proto.opset_import}:
        options.register_custom_ops_library(tome.onnx.library("onnxruntime"))
    runtime = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in runtime.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in runtime.run(None, feed)]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("operators", ["standard", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model_gives_its_logits_in_onnx_runtime(name: str, operators: str) -> None:
    model = patched(name)
    proto = to_onnx(model, (images(2),), operators, dynamic_shapes=BATCH)
    run = session(proto)
    for batch in (1, 2, 5):
        x = images(batch, seed=batch)
        torch.testing.assert_close(run(x)[0], model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("operators", ["standard", "native"])
@pytest.mark.parametrize("method", ["guided", "evit", "topk"])
def test_every_method_gives_its_logits_in_onnx_runtime(method: str, operators: str) -> None:
    model = tome.patch.timm(tiny(depth=2), method=method, keep_rate=0.6).requires_grad_(False)
    proto = to_onnx(model, (images(2),), operators, dynamic_shapes=BATCH)
    run = session(proto)
    for batch in (1, 3):
        x = images(batch, seed=batch)
        torch.testing.assert_close(run(x)[0], model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("r", "operators"),
    [(0, "standard"), ([6, 0, 6], "standard"), ([6, 0, 6], "native")],
    ids=["r0", "merging", "native"],
)
@pytest.mark.parametrize("case", [case for case in all_cases() if case.name in HOSTS], ids=str)
def test_models_of_every_library_give_their_outputs_in_onnx_runtime(
    case: Case, r: Any, operators: str
) -> None:
    model = tome.patch.auto(case.make().requires_grad_(False), r)
    inputs, batch = case.inputs(2, 0), torch.export.Dim("batch")
    free = {name: {0: batch} for name in inputs}
    proto = to_onnx(
        model,
        operators=operators,
        kwargs=inputs,
        dynamic_shapes=free,
        custom_translation_table=TRANSLATIONS,
    )
    run = session(proto)
    for images_a_batch in (1, 3):
        inputs = case.inputs(images_a_batch, images_a_batch)
        found = run(*inputs.values())
        expected = [y for y in tree_leaves(model(**inputs)) if isinstance(y, Tensor)]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_the_cases_of_every_library_are_there() -> None:
    assert set(HOSTS) <= {case.name for case in all_cases()}


@pytest.mark.slow
def test_an_exported_program_can_be_taken_to_onnx() -> None:
    model = patched("plain", depth=1)
    program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    proto = to_onnx(program)
    # The program itself keeps its operators, in this process and after this export.
    for kept in (program, program.run_decompositions()):
        assert "tome.match.default" in {str(node.target) for node in kept.graph.nodes}
    x = images(3)
    torch.testing.assert_close(session(proto)(x)[0], model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("operators", ["standard", "native"])
def test_every_operator_of_a_forward_pass_goes_to_onnx(operators: str) -> None:
    model = EveryOperator().eval()
    batch = torch.export.Dim("batch", min=2)
    proto = to_onnx(model, (torch.randn(3, 30, 16),), operators, dynamic_shapes=({0: batch},))
    tokens = torch.randn(4, 30, 16)
    outputs = session(proto)(tokens)
    for output, expected in zip(outputs, model(tokens), strict=True):
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_standard_operators_are_few() -> None:
    """More nodes for each block than unmerged: docs/running/onnx.md."""

    def nodes(model: Any) -> int:
        return len(to_onnx(model, (images(2),), dynamic_shapes=BATCH).graph.node)

    plain = nodes(tiny(depth=2))
    model = tome.patch.timm(tiny(depth=2), r=4)
    program = torch.export.export(model, (images(2),), dynamic_shapes=BATCH)
    assert nodes(program) <= plain + 2 * 30
    assert nodes(model) <= plain + 2 * 30
    tome.patch.timm(model, r=4, method="guided")
    assert nodes(model) <= plain + 2 * 75


class Match(nn.Module):
    def forward(self, metric: Tensor) -> tuple[Tensor, ...]:
        return tuple(tome.match(metric, 6, num_prefix_tokens=1))


@pytest.mark.parametrize("operators", ["standard", "native"])
def test_equal_similarities_are_ordered_alike_in_onnx_runtime(operators: str) -> None:
    # Tokens along a few axes: every similarity is exactly 0 or 1.
    metric = torch.eye(4)[torch.randint(4, (8, 25))] * 2.0
    run = session(to_onnx(Match().eval(), (metric[:2],), operators, dynamic_shapes=BATCH))
    assert_plans_equal(run(metric), tome.match(metric, 6, num_prefix_tokens=1))


class MatchVisible(nn.Module):
    def forward(self, metric: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        grid = torch.arange(2, 25, 3, dtype=torch.int32)
        return (
            *tome.match(metric, 9, num_prefix_tokens=1, weight=weight),
            *tome.match(metric, 14, num_prefix_tokens=1, weight=weight, targets=grid),
            *tome.match(metric, 11, num_prefix_tokens=1, targets=grid),
            *tome.match(metric, 9, num_prefix_tokens=1, size=weight + 1, importance=weight),
        )


@pytest.mark.parametrize("operators", ["standard", "native"])
def test_hidden_tokens_take_no_part_in_onnx_runtime(operators: str) -> None:
    metric, weight = torch.randn(5, 25, 6), torch.randint(3, (5, 25)).float()
    weight[0], weight[1, 1::2], weight[2, 7:] = 0, 0, 0
    example, batch = (metric[:2], weight[:2]), torch.export.Dim("batch", min=2)
    free = ({0: batch}, {0: batch})
    proto = to_onnx(MatchVisible().eval(), example, operators, dynamic_shapes=free)
    assert_plans_equal(session(proto)(metric, weight), MatchVisible()(metric, weight))


def test_largest_of_each_group() -> None:
    class Largest(nn.Module):
        def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            plan = tome.match(tokens, 3)
            plan = tome.MergePlan.from_assign(plan.assign, 12)  # with rows that have no member
            return *plan.merge(tokens, reduce="amax"), plan.assign

    batch = torch.export.Dim("batch", min=2)
    proto = to_onnx(Largest().eval(), (torch.randn(2, 12, 4),), dynamic_shapes=({0: batch},))
    tokens = torch.randn(5, 12, 4)
    for found, expected in zip(session(proto)(tokens), Largest()(tokens), strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("operators", ["standard", "native"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_evit_with_a_mask(kind: str, operators: str) -> None:
    model = tome.patch.timm(tiny(depth=2), method="evit", keep_rate=0.6).requires_grad_(False)
    x = images(2)
    shown = torch.ones(2, 1, 1, model.pos_embed.shape[1], dtype=torch.bool)
    shown[0, ..., 2:5] = shown[1, ..., 7:] = False
    mask = shown if kind == "bool" else torch.zeros(shown.shape).masked_fill(~shown, -3.0)
    assert not torch.allclose(model(x), model(x, attn_mask=mask), atol=1e-3)
    proto = to_onnx(
        model, (x,), operators, kwargs={"attn_mask": mask}, custom_translation_table=TRANSLATIONS
    )
    torch.testing.assert_close(
        session(proto)(x, mask)[0], model(x, attn_mask=mask), atol=1e-4, rtol=1e-4
    )


# --- native operators -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_native_operators_give_the_bits_of_the_torch_ones(dtype: torch.dtype) -> None:
    model, tokens = EveryArgument(dtype).eval(), torch.randn(4, 21, 16)
    size = torch.randint(4, (4, 21)).float()
    batch = torch.export.Dim("batch", min=2)
    proto = to_onnx(model, (tokens[:3], size[:3]), "native", dynamic_shapes=({0: batch},) * 2)
    names = {
        "".join(word.title() for word in name.removesuffix("_forward").split("_"))
        for name in _onnx_standard.FORMS
    }
    names = names - {"Attention"} | {"ProportionalAttention"}  # quantisers know another Attention
    assert {node.op_type for node in proto.graph.node if node.domain == "tome_ext"} == names
    expected = model(tokens, size)
    for threads in (1, 3):
        found = session(proto, threads)(tokens, size)
        for x, y in zip(found, expected, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def test_a_merged_model_can_be_quantised(tmp_path: Path) -> None:
    """Its matrix products; merging and attention stay as they are, and the answers nearly so."""
    digits = _digits.load()
    model = tome.patch.auto(digits.model, r=4)
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    onnx.save(to_onnx(model, [digits.x[:2]], "native", dynamic_shapes=BATCH), whole)
    quantize_dynamic(whole, small, weight_type=QuantType.QInt8)
    proto = onnx.load(small)
    kinds = Counter(node.op_type for node in proto.graph.node)
    assert kinds["MatMulInteger"] == 4 * 6 + 1  # of each block, and the head
    assert kinds["Match"] == kinds["MergeAddNorm"] == kinds["ProportionalAttention"] == 6
    (logits,) = session(proto)(digits.x)
    with torch.no_grad():
        expected = model(digits.x)
    assert F.cosine_similarity(logits, expected).mean() > 0.999
    right = (logits.argmax(1) == digits.y).float().mean()
    assert right > (expected.argmax(1) == digits.y).float().mean() - 0.01


@pytest.mark.slow
def test_the_example_in_c_plus_plus_runs_a_model(tmp_path: Path) -> None:
    """With the library of ONNX Runtime's Python package, laid out as a release is."""
    (built,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    (tmp_path / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / "lib" / name).symlink_to(built)
    header = Path(__file__).parents[1] / "onnxruntime_header"
    (tmp_path / "include").symlink_to(header)
    check_example("onnxruntime", [f"-DORT_ROOT={tmp_path}"], tmp_path)


def test_native_operators_refuse_what_does_not_go_together() -> None:
    merge = session(node("Merge", [(FLOAT, 3), (FLOAT, 2), (INT32, 2), (INT32, 2)], [FLOAT, FLOAT]))
    x, size = torch.randn(2, 6, 3), torch.ones(2, 6)
    members = torch.arange(6, dtype=torch.int32).repeat(2, 1)
    offsets = torch.tensor([[0, 2, 6]], dtype=torch.int32).repeat(2, 1)
    merged, new_size = merge(x, size, members, offsets)
    torch.testing.assert_close(merged, torch.stack((x[:, :2].mean(1), x[:, 2:].mean(1)), 1))
    assert new_size.tolist() == [[2, 4], [2, 4]]
    refused = [
        ((x, size[:, :5], members, offsets), r"Merge: size: expected \(2, 6\), got \(2, 5\)"),
        ((x, size, members[:1], offsets), r"Merge: members: expected \(2, 6\), got \(1, 6\)"),
        ((x, size, members + 1, offsets), "Merge: members, offsets: expected a plan"),
        ((x, size, members, offsets + 3), "Merge: members, offsets: expected a plan"),
    ]
    for inputs, message in refused:
        with pytest.raises(Exception, match=message):
            merge(*inputs)


def test_native_operators_refuse_attributes_that_mean_nothing() -> None:
    x = torch.randn(2, 8, 4)
    for name, value in (("num_prefix_tokens", -1), ("num_prefix_tokens", -100), ("r", 2**40)):
        match = session(node("Match", [(FLOAT, 3)], [INT32] * 3, **{name: value}))
        with pytest.raises(Exception, match=f"Match: {name}: expected"):
            match(x)
    for wrong in (2.0, "two"):
        with pytest.raises(Exception, match="Match: r: expected an integer"):
            session(node("Match", [(FLOAT, 3)], [INT32] * 3, r=wrong))


def test_a_graph_of_native_operators_says_what_it_misses() -> None:
    proto = node("Match", [(FLOAT, 3)], [INT32] * 3, r=2)
    with pytest.raises(Exception, match="tome_ext"):
        onnxruntime.InferenceSession(proto.SerializeToString())


def test_wrong_engines_operators_and_exporters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"engine: expected one of .*, got 'tensorrt'"):
        tome.onnx.library("tensorrt")  # type: ignore[arg-type]
    model = Match().eval()
    with pytest.raises(ValueError, match="operators: expected 'standard' or 'native', got 'fast'"):
        tome.onnx.export(model, (images(1),), operators="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"engine: expected one of .*, got 'tensorrt'"):
        tome.onnx.export(model, (images(1),), engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dynamo: expected True"):
        tome.onnx.export(model, (images(1),), dynamo=False)


# --- the forms against the operators' twins, in torch -------------------------------------------


def assert_plans_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_there_is_a_form_for_every_operator_but_those_of_gradients() -> None:
    found = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("tome::") for name in found if name.startswith("tome::")}
    names = {name for name in names if not name.startswith("_") and "backward" not in name}
    assert set(_onnx_standard.FORMS) == names - {"attention"}  # which is attention_forward


@settings(max_examples=60)
@given(st.integers(0, 12), st.integers(0, 4), st.integers(-1, 8), st.booleans(), st.integers(0, 99))
def test_match_form_equals_the_twin(n: int, prefix: int, r: int, ties: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, 3, n, 4, generator=generator)
    if ties:
        metric = torch.eye(4)[torch.randint(3, (2, n), generator=generator)]
        metric[:, n // 2 :: 5] = 0.0
    weight = torch.randint(3, (2, n), generator=generator).float()
    some = torch.rand(n, generator=generator) < 0.4
    targets = (some & (torch.arange(n) >= prefix)).nonzero().flatten().to(torch.int32)
    for weights in (None, weight, torch.zeros(2, n)):
        for chosen in (None, targets):
            for size, importance in ((None, None), (weight + 1, None), (weight, weight)):
                for threshold in (None, 0.3, -2.0):
                    options = {
                        "weight": weights,
                        "targets": chosen,
                        "size": size,
                        "importance": importance,
                        "threshold": threshold,
                    }
                    assert_plans_equal(
                        _onnx_standard.match(metric, r, prefix, **options),
                        reference.match(metric, r, prefix, **options),
                    )


@settings(max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(["none", "ones and more", "with zeros"]),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 99),
)
def test_plan_and_merge_forms_equal_the_twins(
    n: int, rows: int, sizes: str, reduce: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    assign = torch.randint(-1, rows, (3, n), generator=generator, dtype=torch.int32)
    plan = _onnx_standard.plan(assign, rows)
    assert_plans_equal(plan, reference.plan(assign, rows))
    x = torch.randn(3, n, 4, generator=generator).to(dtype)
    size = None
    if sizes != "none":
        lowest = 0 if sizes == "with zeros" else 1
        size = torch.randint(lowest, 4, (3, n), generator=generator).float()
    expected = reference.merge(x, size, *plan, reduce)
    copies = [part.clone() for part in plan]  # of which it is not known what they were made of
    for parts in (plan, copies):
        torch.testing.assert_close(_onnx_standard.merge(x, size, *parts, reduce), expected)
    scale, weight, bias = torch.randn(3, 4, generator=generator).to(dtype)
    for keeps in (False, True):
        found, expected_all = (
            form.merge_add_norm(x, x.flip(1), size, *plan, scale, weight, bias, 1e-5, keeps)
            for form in (_onnx_standard, reference)
        )
        # In half precision the twin normalises what it has not rounded yet.
        close = {"atol": 0.1, "rtol": 0.05} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(found, expected_all, **close)
    rows_of_tokens = (form.unmerge(expected[0], assign) for form in (_onnx_standard, reference))
    assert torch.equal(*rows_of_tokens)


def test_a_row_of_one_token_is_a_copy() -> None:
    x, size = torch.randn(2, 20, 8), torch.randint(1, 50, (2, 20)).float()
    plan = tome.match(x, 4)
    merged, _ = _onnx_standard.merge(x, size, plan.members, plan.offsets)
    single = plan.offsets.diff(dim=1) == 1
    expected, _ = plan.merge(x, size)
    assert torch.equal(merged[single], expected[single])


@pytest.mark.parametrize("sizes", ["none", "some", "all hidden"])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_attention_form_equals_the_twin(sizes: str, scale: float | None) -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 8)
    size = {"none": None, "some": torch.arange(7.0).repeat(2, 1)}.get(sizes, torch.zeros(2, 7))
    for name, inputs in (("attention_forward", (q, k, v)), ("cls_attention", (q, k))):
        found, expected = (
            getattr(form, name)(*inputs, size, scale) for form in (_onnx_standard, reference)
        )
        torch.testing.assert_close(found, expected)


def test_sizes_that_have_changed_are_not_taken_for_positive() -> None:
    tokens, q = torch.randn(2, 9, 4), torch.randn(2, 1, 6, 4)
    _, *plan = _onnx_standard.match(tokens, 3)
    _, size = _onnx_standard.merge(tokens, None, *plan)
    for _ in range(2):
        found, expected = (
            form.attention_forward(q, q, q, size) for form in (_onnx_standard, reference)
        )
        torch.testing.assert_close(found, expected)
        size[0, 2:] = size[1] = 0
