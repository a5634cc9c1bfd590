"""Patched models as ONNX graphs, of standard operators and of native ones, run by OpenVINO."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import openvino
import pytest
import torch
from host_cases import Case, all_cases
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
from torch import Tensor
from torch.utils._pytree import tree_leaves

import tome_ext as tome
from tome_ext import _library

pytestmark = [pytest.mark.openvino, pytest.mark.slow]


def core(native: bool) -> openvino.Core:
    made = openvino.Core()
    if native:
        made.add_extension(tome.onnx.library("openvino"))
    return made


def compiled(model: Any, threads: int = 1, native: bool = True) -> Callable[..., list[Tensor]]:
    """OpenVINO's outputs of a graph or file, as a function of tensors, in float32."""
    engine = core(native)
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    read = engine.read_model(content, b"") if isinstance(content, bytes) else content
    if isinstance(content, Path):
        read = engine.read_model(content)
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    runs = engine.compile_model(read, "CPU", options)

    def run(*inputs: Tensor) -> list[Tensor]:
        found = runs([x.numpy() for x in inputs])
        return [torch.from_numpy(found[output].copy()) for output in runs.outputs]

    return run


@pytest.mark.parametrize("operators", ["standard", "openvino"])
@pytest.mark.parametrize("method", ["tome", "guided", "evit", "topk"])
def test_every_method_gives_its_logits_in_openvino(method: str, operators: str) -> None:
    model = tiny(**VARIANTS["registers, layer scale"], depth=2)
    tome.patch.timm(model, method=method, keep_rate=0.6).requires_grad_(False)
    proto = to_onnx(model, (images(2),), operators, dynamic_shapes=BATCH)
    run = compiled(proto, threads=2, native=operators != "standard")
    for batch in (1, 2, 5):
        x = images(batch, seed=batch)
        torch.testing.assert_close(run(x)[0], model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [case for case in all_cases() if case.name in HOSTS], ids=str)
def test_models_of_every_library_give_their_outputs_in_openvino(case: Case) -> None:
    model = tome.patch.auto(case.make().requires_grad_(False), [6, 0, 6])
    inputs, batch = case.inputs(2, 0), torch.export.Dim("batch")
    free = {name: {0: batch} for name in inputs}
    options = {"dynamic_shapes": free, "custom_translation_table": TRANSLATIONS}
    run = compiled(to_onnx(model, operators="openvino", kwargs=inputs, **options))
    for images_a_batch in (1, 3):
        inputs = case.inputs(images_a_batch, images_a_batch)
        expected = [y for y in tree_leaves(model(**inputs)) if isinstance(y, Tensor)]
        torch.testing.assert_close(run(*inputs.values()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("operators", ["standard", "native"])
def test_every_operator_of_a_forward_pass_goes_to_openvino(operators: str) -> None:
    model = EveryOperator().eval()
    batch = torch.export.Dim("batch", min=2)
    proto = to_onnx(model, (torch.randn(3, 30, 16),), operators, dynamic_shapes=({0: batch},))
    tokens = torch.randn(4, 30, 16)
    outputs = compiled(proto, native=operators == "native")(tokens)
    for output, expected in zip(outputs, model(tokens), strict=True):
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_native_operators_give_the_bits_of_the_torch_ones(tmp_path: Path) -> None:
    model, tokens = EveryArgument(torch.float32).eval(), torch.randn(4, 21, 16)
    size = torch.randint(4, (4, 21)).float()
    batch = torch.export.Dim("batch", min=2)
    proto = to_onnx(model, (tokens[:3], size[:3]), "native", dynamic_shapes=({0: batch},) * 2)
    # An OpenVINO file of the graph keeps its operators.
    path = tmp_path / "model.xml"
    openvino.save_model(core(True).read_model(proto.SerializeToString(), b""), path, False)
    for content, threads in ((proto, 1), (proto, 3), (path, 2)):
        found = compiled(content, threads)(tokens, size)
        for x, y in zip(found, model(tokens, size), strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)


def test_native_operators_refuse_what_does_not_go_together() -> None:
    inputs = [(FLOAT, 3), (FLOAT, 2), (INT32, 2), (INT32, 2)]
    # With one thread OpenVINO 2026.4 loses what a node throws.
    merge = compiled(node("Merge", inputs, [FLOAT, FLOAT]), threads=2)
    x, size = torch.randn(2, 6, 3), torch.ones(2, 6)
    members = torch.arange(6, dtype=torch.int32).repeat(2, 1)
    offsets = torch.tensor([[0, 2, 6]], dtype=torch.int32).repeat(2, 1)
    merged = merge(x, size, members, offsets)[0]
    torch.testing.assert_close(merged, torch.stack((x[:, :2].mean(1), x[:, 2:].mean(1)), 1))
    with pytest.raises(RuntimeError, match=r"Merge: size: expected \(2, 6\), got \(2, 5\)"):
        merge(x, size[:, :5], members, offsets)
    with pytest.raises(RuntimeError, match="Merge: members, offsets: expected a plan"):
        merge(x, size, members + 1, offsets)


def test_native_operators_refuse_attributes_that_mean_nothing() -> None:
    for name, value in (("num_prefix_tokens", -1), ("num_prefix_tokens", -100), ("r", 2**40)):
        with pytest.raises(RuntimeError, match=f"Match: {name}: expected"):
            compiled(node("Match", [(FLOAT, 3)], [INT32] * 3, **{name: value}))


def test_a_graph_of_native_operators_says_what_it_misses() -> None:
    proto = node("Match", [(FLOAT, 3)], [INT32] * 3, r=2)
    with pytest.raises(RuntimeError, match=r"tome_ext\.Match"):
        compiled(proto, native=False)


def test_a_library_for_another_release_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_library, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=r"which holds none; install tome_ext from source with"):
        tome.onnx.library("openvino")
    (tmp_path / "_openvino.abi3.so").write_bytes(b"\0libopenvino.so.1999\0")
    refusal = r"expected a library for libopenvino\.so\.\d+, which is installed, got one for .*1999"
    with pytest.raises(RuntimeError, match=refusal):
        tome.onnx.library("openvino")


@pytest.mark.compiler
def test_the_example_in_c_plus_plus_runs_a_model(tmp_path: Path) -> None:
    cmake = Path(openvino.__path__[0]) / "cmake"
    check_example("openvino", [f"-DOpenVINO_DIR={cmake}"], tmp_path)
