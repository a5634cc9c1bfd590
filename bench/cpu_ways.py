"""Every way to run a ViT on a CPU, unmerged and merged, all taking turns.

    python bench/cpu_ways.py [--json out.json] [--model vit_small_patch16_224] [--r 13]
                             [--preload /usr/lib/x86_64-linux-gnu/libjemalloc.so.2 ...]

Eager PyTorch, also with other allocators; ``torch.compile``, the same with frozen weights; ONNX
Runtime and OpenVINO; where an engine runs a merged model, with this package's operators and with
standard ones. float32; bfloat16 and int8 where the way has it. Weights are random, on which speed
does not depend. Before anything is timed, every way's answer is compared with eager float32.

An allocator needs a process of its own, which runs when it is asked to: it takes its turn too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from onnxruntime import quantization
from timing import describe_machine, interleave, ratio, write_json
from torch import Tensor

from tome_ext._command import Reduction
from tome_ext.bench._contenders import share_weights
from tome_ext.bench._engines import engine_graph, graph_runner

Run = Callable[[], Any]
# By dtype; tables.py has their titles. ONNX Runtime's CPU kernels are not of bfloat16. Its static
# quantiser, whose graphs OpenVINO multiplies in int8, runs the model, and knows standard operators.
TORCH_WAYS = ("eager", "compile", "freezing")
WAYS = {
    "float32": (
        *TORCH_WAYS,
        *("onnxruntime", "onnxruntime standard", "openvino", "openvino standard"),
    ),
    "bfloat16": (*TORCH_WAYS, "openvino", "openvino standard"),
    "int8": ("onnxruntime", "openvino standard"),
}
ALL_WAYS = list(WAYS["float32"])
# glibc gives large blocks back to the system, which clears them again for the next one.
KEEPS_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}
# 1 - cosine of the logits with those of eager float32: rounding, and pairs that it ranks anew.
FARTHEST = {"float32": 1e-4, "bfloat16": 0.05, "int8": 0.1}
BATCH_SIZES = (1, 8)
CALIBRATION = 8  # images


# --- models and graphs ---------------------------------------------------------------------------


class Models:
    """A model of random weights, unmerged and merged, in every form that a way runs."""

    def __init__(self, name: str, r: int) -> None:
        torch.manual_seed(0)
        self.plain = timm.create_model(name).eval().requires_grad_(False)
        self.merged = Reduction(r=r).patch(share_weights(self.plain))
        self.size = self.plain.default_cfg["input_size"]
        self.graphs: dict[tuple[Any, ...], bytes] = {}

    def images(self, count: int) -> Tensor:
        return torch.randn(count, *self.size, generator=torch.Generator().manual_seed(1))

    def model(self, merges: bool, dtype: torch.dtype) -> Any:
        return share_weights(self.merged if merges else self.plain).to(dtype)

    def graph(self, engine: str, operators: Any, merges: bool, dtype: str, count: int) -> bytes:
        """For a number of images; made once, and quantised once."""
        key = engine, operators, merges, count
        if key not in self.graphs:
            model = self.merged if merges else self.plain
            self.graphs[key] = engine_graph(engine, model, self.images(count), operators)
        if dtype != "int8":
            return self.graphs[key]
        quantised = (*key, "int8")
        if quantised not in self.graphs:
            images = self.images(CALIBRATION).split(count)
            calibrates = engine == "openvino"
            self.graphs[quantised] = int8(self.graphs[key], images if calibrates else None)
        return self.graphs[quantised]


class Calibration(quantization.CalibrationDataReader):
    def __init__(self, name: str, images: tuple[Tensor, ...]) -> None:
        self.feeds = iter([{name: x.numpy()} for x in images])

    def get_next(self) -> Any:
        return next(self.feeds, None)


def int8(graph: bytes, images: tuple[Tensor, ...] | None) -> bytes:
    """A graph whose linear layers are of int8: with ranges from images, or found as it runs."""
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder, "whole.onnx"), Path(folder, "small.onnx")
        whole.write_bytes(graph)
        signed = quantization.QuantType.QInt8
        proto = quantization.quant_utils.onnx.load(whole)
        weights = {tensor.name for tensor in proto.graph.initializer}
        linear = [
            node.name
            for node in proto.graph.node
            if node.op_type in ("MatMul", "Gemm") and weights.intersection(node.input)
        ]
        options: Any = {"nodes_to_quantize": linear, "weight_type": signed, "per_channel": True}
        if images is None:
            quantization.quantize_dynamic(whole, small, **options)
        else:
            reader = Calibration(proto.graph.input[0].name, images)
            quantization.quantize_static(whole, small, reader, **options)
        return small.read_bytes()


# --- ways ----------------------------------------------------------------------------------------


def runner(way: str, models: Models, merges: bool, dtype: str, count: int) -> Run:
    x = models.images(count).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    engine, _, standard = way.partition(" ")
    if engine in ("onnxruntime", "openvino"):
        operators = "standard" if standard else "native"
        return graph_runner(engine, models.graph(engine, operators, merges, dtype, count), x)
    model = models.model(merges, x.dtype)
    if way == "eager":
        return lambda: model(x)
    options = {"freezing": True} if way == "freezing" else {}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options=options)
    return lambda: compiled(x)


@contextmanager
def elsewhere(environment: dict[str, str], arguments: list[str]) -> Iterator[tuple[Run, Run]]:
    """Eager runs, unmerged and merged, in a process that has another environment."""
    with subprocess.Popen(
        [sys.executable, __file__, "--serve", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(merges: bool) -> None:
            process.stdin.write(f"{int(merges)}\n")
            if process.stdout.readline() != "done\n":
                raise RuntimeError(f"the process with {environment} has ended")

        yield lambda: ask(False), lambda: ask(True)
        process.stdin.close()  # which ends it


def serve(models: Models, dtype: str, count: int) -> None:
    """The other side of :func:`elsewhere`."""
    runs = [runner("eager", models, merges, dtype, count) for merges in (False, True)]
    for line in sys.stdin:
        runs[int(line)]()
        print("done", flush=True)


# --- measuring -----------------------------------------------------------------------------------


def logits(out: Any) -> np.ndarray:
    """What a run returned, as (B, classes) float32."""
    if isinstance(out, Tensor):
        return out.float().numpy()
    return np.asarray(out[0] if isinstance(out, list) else next(iter(out.values())))


def farthest(found: np.ndarray, expected: np.ndarray) -> float:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float((1 - (found * expected).sum(1) / lengths).max())


def measure(models: Models, dtype: str, count: int, arguments: Any) -> list[dict[str, Any]]:
    """A row for each way: images/s unmerged and merged, and the ratios of one round.

    The ratio over eager is over eager of the same dtype; of float32 for int8.
    """
    torch._dynamo.reset()
    expected = {
        merges: logits(runner("eager", models, merges, "float32", count)())
        for merges in (False, True)
    }
    runs: dict[str, Run] = {}
    ways = [way for way in WAYS[dtype] if way in arguments.ways]
    if "eager" not in ways:
        runs["eager"] = runner("eager", models, False, "float32", count)
    for way in ways:
        for merges in (False, True):
            if not merges and way.removesuffix(" standard") in runs:
                continue  # it has no operators of ours
            run = runner(way, models, merges, dtype, count)
            away = farthest(logits(run()), expected[merges])
            if away > FARTHEST[dtype]:
                raise RuntimeError(f"{way}, {dtype}, merged={merges}: 1 - cosine is {away:.2g}")
            runs[f"{way}, merged" if merges else way] = run
    with ExitStack() as processes:
        if "eager" in ways:
            allocators = {"eager glibc": KEEPS_MEMORY}
            for library in arguments.preload:
                name = library.name.split(".")[0].removeprefix("lib").removesuffix("_minimal")
                allocators[f"eager {name}"] = {"LD_PRELOAD": str(library)}
            given = ["--model", arguments.model, "--r", arguments.r, "--threads", arguments.threads]
            given += ["--dtype", dtype, "--batch-size", count]
            for way, environment in allocators.items():
                ways.insert(ways.index("eager") + 1, way)
                both = processes.enter_context(elsewhere(environment, [str(x) for x in given]))
                runs[way], runs[f"{way}, merged"] = both
        times = interleave(runs, arguments.seconds, warm_up=1, fewest=arguments.rounds)
    rows = []
    for way in ways:
        own = f"{way}, merged"
        plain = way if way in times else way.removesuffix(" standard")
        rows.append(
            {
                "model": arguments.model,
                "r": arguments.r,
                "dtype": dtype,
                "batch_size": count,
                "way": way,
                "unmerged": 1e3 * count / statistics.median(times[plain]),
                "merged": 1e3 * count / statistics.median(times[own]),
                "speed_up": ratio(times, plain, own),
                "over_eager": ratio(times, "eager", own),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--r", type=int, default=13)
    parser.add_argument("--seconds", type=float, default=35, help="for each dtype and batch size")
    parser.add_argument("--rounds", type=int, default=9, help="of all ways, at least")
    parser.add_argument("--ways", nargs="+", choices=ALL_WAYS, default=ALL_WAYS, help="only these")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--preload", type=Path, nargs="*", default=[], help="allocators to measure")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for library in arguments.preload:
        if not library.is_file():
            parser.error(f"--preload: expected a library's file, got {library}")
    torch.set_num_threads(arguments.threads)
    models = Models(arguments.model, arguments.r)
    with torch.inference_mode():
        if arguments.serve:
            return serve(models, arguments.dtype, arguments.batch_size)
        machine = describe_machine()
        machine["onnxruntime"], machine["openvino"] = onnxruntime.__version__, openvino.__version__
        rows = []
        for dtype in WAYS:
            for count in BATCH_SIZES:
                rows += measure(models, dtype, count, arguments)
                if arguments.json is not None:
                    write_json(arguments.json, machine, rows)


if __name__ == "__main__":
    main()
