"""ONNX graphs for the tests of engines: how they are made, and models that use every operator."""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from models import images, tiny
from onnxscript import opset18
from torch import Tensor, nn

import tome_ext as tome

BATCH = ({0: torch.export.Dim("batch")},)
# Of each way that a library reaches attention, carries positions or pools, one; by the names of
# the host contract.
HOSTS = (
    "timm: DINOv3",
    "timm: EVA-02, SwiGLU, norm inside attention, avg",
    "timm: BEiT",
    "transformers: ViT",
    "transformers: DINOv2",
    "transformers: DINOv3",
    "transformers: CLIP",
    "transformers: SigLIP",
    "transformers: SigLIP 2",
    "transformers: V-JEPA 2",
    "transformers: BEiT",
    "torchvision: plain",
    "open_clip: CLIP",
    "open_clip: attention pools",
)


def all_true(x: Any) -> Any:
    """``aten::_is_all_true``, which torch.onnx does not know and SigLIP 2 of Transformers checks
    its shapes by, unpatched too."""
    return opset18.Cast(opset18.ReduceMin(opset18.Cast(x, to=INT32), keepdims=0), to=BOOL)


FLOAT, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
BOOL = onnx.TensorProto.BOOL
TRANSLATIONS = {torch.ops.aten._is_all_true.default: all_true}


def to_onnx(
    model: Any, inputs: Sequence[Tensor] = (), operators: Any = "standard", **options: Any
) -> onnx.ModelProto:
    """The checked graph of a module or an exported program; "openvino" is native, for it."""
    options["verbose"] = False
    if operators == "standard":  # what a user has who knows of torch only
        program = torch.onnx.export(model, tuple(inputs), dynamo=True, **options)
    else:
        engine = "openvino" if operators == "openvino" else "onnxruntime"
        program = tome.onnx.export(
            model, tuple(inputs), operators="native", engine=engine, **options
        )
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    assert_nodes(proto, operators)
    return proto


def assert_nodes(proto: onnx.ModelProto, operators: str) -> None:
    """Only ONNX's own operators, and no scatter; or native ones beside them."""
    domains = {opset.domain for opset in proto.opset_import}
    assert domains == ({""} if operators == "standard" else {"", "tome_ext"})
    assert len(proto.functions) == 0
    for node in proto.graph.node:
        assert node.domain in domains
        assert not node.op_type.startswith("Scatter"), node
        reductions = [attribute for attribute in node.attribute if attribute.name == "reduction"]
        assert reductions == [], node


def node(
    name: str, inputs: Sequence[tuple[int, int]], outputs: Sequence[int], **attributes: Any
) -> onnx.ModelProto:
    """A graph of one native node: inputs as (dtype, rank), outputs as dtypes."""
    made = onnx.helper.make_node(
        name,
        [f"x{i}" for i in range(len(inputs))],
        [f"y{i}" for i in range(len(outputs))],
        domain="tome_ext",
        **attributes,
    )
    declared = [
        onnx.helper.make_tensor_value_info(f"x{i}", dtype, [None] * rank)
        for i, (dtype, rank) in enumerate(inputs)
    ]
    results = [
        onnx.helper.make_tensor_value_info(f"y{i}", dtype, None) for i, dtype in enumerate(outputs)
    ]
    graph = onnx.helper.make_graph([made], "graph", declared, results)
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("tome_ext", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)


EXAMPLES = Path(__file__).parents[2] / "examples"


def check_example(engine: Any, settings: Sequence[str], folder: Path) -> None:
    """Build the program of ``examples/`` for an engine in a folder, and hold its logits against
    PyTorch's."""
    name, build = f"{engine}_cpp", folder / "build"
    options = [*settings, "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    subprocess.run(["cmake", "-S", EXAMPLES / name, "-B", build, *options], check=True)
    subprocess.run(["cmake", "--build", build], check=True)
    graph, file = folder / "model.onnx", folder / "images.bin"
    model = tome.patch.timm(tiny(depth=2), r=9).requires_grad_(False)
    export = runpy.run_path(str(EXAMPLES / "export_onnx.py"))["export"]
    expected = export(model, images(3), graph, file, engine)

    def run(batch: int, library: str = tome.onnx.library(engine)) -> Any:
        command = [build / name, graph, library, file, str(batch)]
        return subprocess.run(command, capture_output=True, text=True)

    for batch in (3, 1):
        done = run(batch)
        assert done.returncode == 0, done.stderr
        lines = [[float(x) for x in line.split()] for line in done.stdout.splitlines()]
        torch.testing.assert_close(torch.tensor(lines), expected[:batch, :5], atol=1e-4, rtol=1e-4)
    for failed, message in ((run(9), "images.bin: expected"), (run(3, "no.so"), "no.so")):
        assert failed.returncode == 1
        assert message in failed.stderr


class EveryOperator(nn.Module):
    """What a model of one's own may call: plans, merges, unmerge, attention, scores."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        first = tome.match(tokens, 5)
        total, size = first.merge(tokens, reduce="sum")
        second = tome.match(total, 7, num_prefix_tokens=2)
        merged, size = second.merge(total, size)
        plan = first.then(second)
        heads = merged.unflatten(2, (4, 4)).transpose(1, 2)
        # A size of 0 hides a token; the last image hides all.
        last = torch.arange(size.shape[0]).unsqueeze(1) == size.shape[0] - 1
        shown = torch.where(last | (size >= 3), 0.0, size)
        attended = tome.proportional_attention(heads, heads, heads, shown, scale=0.3)
        scores = tome.cls_attention(heads, heads, shown)
        kept = tome.select(scores, 9, num_prefix_tokens=1, fuse=True)
        fused, _ = kept.merge(merged, scores, reduce="sum")
        return plan.assign, plan.unmerge(merged), size, attended, scores, fused


class EveryArgument(nn.Module):
    """Every operator with all that it may be given, in a dtype of its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, tokens: Tensor, size: Tensor) -> list[Tensor]:
        x = tokens.to(self.dtype)
        heads = x.unflatten(2, (2, 8)).transpose(1, 2)
        plan = tome.match(heads, 6, 1, weight=size, size=size, importance=size + 1, threshold=0.5)
        fused = plan.merge_add_norm(x, x.flip(1), size, x[0, 0], x[0, 1], x[0, 2], 1e-5, True)
        largest, _ = plan.merge(x, reduce="amax")
        out = tome.proportional_attention(heads, heads, heads, size, scale=0.5)
        scores = tome.cls_attention(heads, heads, size, scale=0.5)  # float32 in a graph
        kept = tome.select(scores, 5, 2, fuse=True)
        # What no number can stand for: without any logits, and as much as may merge.
        even = tome.proportional_attention(heads, heads, heads, size, scale=0.0)
        most = tome.match(x, 0, 1, threshold=float("-inf")).assign
        shown = plan.merge(x, size)[0], plan.unmerge(largest), out, even, scores, largest, *fused
        floats = [y.to(torch.float32) for y in shown]
        all_of_it = plan.then(tome.match(largest, 3))
        regrouped = tome.MergePlan.from_assign(all_of_it.assign, all_of_it.num_output_tokens)
        return [*plan, *kept, *regrouped, most, *floats]
