"""Models in inference engines on the CPU, with as many threads as torch has."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import onnx
from .._command import CommandError

__all__ = ["ENGINES", "check_engine", "engine_graph", "engine_runner", "graph_runner"]

# By engine, what it needs beside torch.
ENGINES: dict[str, tuple[str, ...]] = {
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
DTYPES = {"onnxruntime": ("float32",), "openvino": ("float32", "bfloat16")}


def check_engine(engine: Any, device: torch.device, dtypes: tuple[str, ...]) -> None:
    """Refuse what an engine is not measured with here, or what it needs and is not there.

    Raises:
        CommandError: the message says what was expected.
    """
    if device.type != "cpu":
        raise CommandError(f"--mode {engine}: expected --device cpu, got {device}")
    for dtype in dtypes:
        if dtype not in DTYPES[engine]:
            expected = " or ".join(DTYPES[engine])
            raise CommandError(f"--mode {engine}: expected --dtype {expected}, got {dtype}")
    missing = [name for name in ENGINES[engine] if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"--mode {engine} needs: pip install {' '.join(missing)}")
    try:
        onnx.library(engine)
    except RuntimeError as error:
        raise CommandError(f"--mode {engine}: {error}") from None


def engine_runner(
    engine: Any, model: Any, x: Tensor, operators: onnx.Operators = "native"
) -> Callable[[], object]:
    """A function that runs the model on the images ``x`` in an engine.

    In bfloat16, engines are given the float32 model and told to compute in bfloat16.
    """
    return graph_runner(engine, engine_graph(engine, model, x, operators), x)


def engine_graph(engine: Any, model: Any, x: Tensor, operators: onnx.Operators = "native") -> bytes:
    """The ONNX file of a model for as many images as ``x``, in float32."""
    if x.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    log = logging.getLogger("onnxscript")  # a warning for every sort that it does not fold
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        program = onnx.export(
            model, (x.float(),), operators=operators, engine=engine, verbose=False
        )
    finally:
        log.setLevel(level)
    return program.model_proto.SerializeToString()


def graph_runner(engine: Any, graph: bytes, x: Tensor) -> Callable[[], object]:
    """A function that runs a graph on the images ``x`` in an engine, in their dtype."""
    threads = torch.get_num_threads()
    if engine == "onnxruntime":
        return _in_onnxruntime(graph, x.float(), threads)
    precision = "f32" if x.dtype == torch.float32 else "bf16"
    return _in_openvino(graph, x.float(), threads, precision)


def _in_onnxruntime(graph: bytes, x: Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(onnx.library("onnxruntime"))
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _in_openvino(graph: bytes, x: Tensor, threads: int, precision: str) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    core.add_extension(onnx.library("openvino"))
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time, on all threads
    }
    request = core.compile_model(core.read_model(graph, b""), "CPU", options).create_infer_request()
    request.set_input_tensor(openvino.Tensor(x.numpy()))  # a copy, which lives as long as it
    return request.infer
