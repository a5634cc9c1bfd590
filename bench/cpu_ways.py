"""Every way to run a ViT on a CPU, unmerged and merged, all taking turns in one process.

    python bench/cpu_ways.py [--json out.json] [--model vit_small_patch16_224] [--r 13]

Eager PyTorch, ``torch.compile``, the same with frozen weights, ONNX Runtime and OpenVINO; where an
engine runs a merged model, with this package's operators and with standard ones. float32, and
bfloat16 where the way has it. Weights are random, on which speed does not depend. Before anything
is timed, every way's answer is compared with eager float32.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import timm
import torch
from timing import describe_machine, interleave, ratio, write_json
from torch import Tensor

from tome_ext._command import Reduction
from tome_ext.bench._contenders import share_weights
from tome_ext.bench._engines import engine_runner

Run = Callable[[], Any]
# tables.py has their titles.
WAYS = (
    *("eager", "compile", "freezing"),
    *("onnxruntime", "onnxruntime standard", "openvino", "openvino standard"),
)
# 1 - cosine of the logits with those of eager float32: rounding, and pairs that it ranks anew.
FARTHEST = {"float32": 1e-4, "bfloat16": 0.05}


def runner(way: str, model: Any, x: Tensor) -> Run:
    engine, _, standard = way.partition(" ")
    if engine in ("onnxruntime", "openvino"):
        return engine_runner(engine, model, x, "standard" if standard else "native")
    if way == "eager":
        return lambda: model(x)
    options = {"freezing": True} if way == "freezing" else {}
    compiled = torch.compile(model, fullgraph=True, dynamic=False, options=options)
    return lambda: compiled(x)


def logits(out: Any) -> np.ndarray:
    """What a run returned, as (B, classes) float32."""
    if isinstance(out, Tensor):
        return out.float().numpy()
    return np.asarray(out[0] if isinstance(out, list) else next(iter(out.values())))


def farthest(found: np.ndarray, expected: np.ndarray) -> float:
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float((1 - (found * expected).sum(1) / lengths).max())


def measure(name: str, dtype: str, batch_size: int, r: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each way: images/s unmerged and merged, and the ratios of one round."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = timm.create_model(name).eval().requires_grad_(False)
    x = torch.randn(batch_size, *model.default_cfg["input_size"])
    merged = Reduction(r=r).patch(share_weights(model))
    expected = {False: logits(model(x)), True: logits(merged(x))}
    model, merged, x = (each.to(getattr(torch, dtype)) for each in (model, merged, x))
    runs: dict[str, Run] = {}
    for way in WAYS:
        if dtype != "float32" and way.startswith("onnxruntime"):
            continue  # its CPU kernels are of float32
        for merges in (False, True):
            if "standard" in way and not merges:
                continue
            run = runner(way, merged if merges else share_weights(model), x)
            away = farthest(logits(run()), expected[merges])
            if away > FARTHEST[dtype]:
                raise RuntimeError(f"{way}, {dtype}, merged={merges}: 1 - cosine is {away:.2g}")
            runs[f"{way}, merged" if merges else way] = run
    times = interleave(runs, seconds)
    rows = []
    for way in WAYS:
        own = f"{way}, merged"
        if own not in times:
            continue
        plain = way.removesuffix(" standard")
        rows.append(
            {
                "model": name,
                "r": r,
                "dtype": dtype,
                "batch_size": batch_size,
                "way": way,
                "unmerged": 1e3 * batch_size / statistics.median(times[plain]),
                "merged": 1e3 * batch_size / statistics.median(times[own]),
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
    parser.add_argument("--seconds", type=float, default=60, help="for each dtype and batch size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    machine["onnxruntime"], machine["openvino"] = onnxruntime.__version__, openvino.__version__
    rows = []
    with torch.inference_mode():
        for dtype in ("float32", "bfloat16"):
            for batch_size in (1, 8):
                rows += measure(arguments.model, dtype, batch_size, arguments.r, arguments.seconds)
                if arguments.json is not None:
                    write_json(arguments.json, machine, rows)


if __name__ == "__main__":
    main()
