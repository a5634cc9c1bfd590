"""Measures operators and whole models on a GPU; appends a line of JSON as soon as it has a figure.

    python bench/gpu_figures.py --out figures.jsonl [--rows NAME,...] [--seconds N]
    python bench/gpu_figures.py --list         the rows, the most important first
    ... --dry-run       on the CPU: tiny shapes, everything runs once, figures null

Each row runs in a process of its own, forked from one that has imported torch and touched no GPU:
a row that hangs or loses its context takes nothing with it and waits for no import.

A figure is the median time of a call in microseconds. Contenders of a row take turns. They run as
CUDA graphs that hold at least a millisecond of calls, so that neither the host nor the graph's own
launch counts; "how" says which could not be captured and ran from Python. Inputs rotate through
more memory than the L2 cache holds, but for a batch of 1, whose inputs a model has just written.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
from gpu_report import NO_TIME

Inputs = tuple[Any, ...]
Contender = Callable[..., object]

DTYPE = torch.bfloat16
ROTATED_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
GRAPH_US = 1500.0  # about what a graph holds; its launch takes some 10 us
MOST_CALLS = 1000
KILL_SECONDS = 5  # for a row to be gone after SIGKILL
LAYERS = {
    "vit_b": {"batch": 256, "tokens": 197, "channels": 768, "heads": 12, "r": 13},
    "vit_l384": {"batch": 64, "tokens": 577, "channels": 1024, "heads": 16, "r": 23},
    "single": {"batch": 1, "tokens": 197, "channels": 768, "heads": 12, "r": 13},
}
ATTENTION = {
    "b256_n197": {"batch": 256, "heads": 12, "tokens": 197, "dim": 64},
    "b256_n150": {"batch": 256, "heads": 12, "tokens": 150, "dim": 64},
    "b256_n80": {"batch": 256, "heads": 12, "tokens": 80, "dim": 64},
    "b64_n577": {"batch": 64, "heads": 16, "tokens": 577, "dim": 64},
    "single": {"batch": 1, "heads": 12, "tokens": 197, "dim": 64},
}
MODELS = {
    "vit_b": {"name": "vit_base_patch16_224", "r": 13, "batch": 256},
    "vit_l": {"name": "vit_large_patch16_224", "r": 7, "batch": 256},
    "vit_l384": {"name": "vit_large_patch16_384", "r": 23, "batch": 64},
    "vit_b_single": {"name": "vit_base_patch16_224", "r": 13, "batch": 1},
}
LARGE = {
    "n4096": {"batch": 2, "tokens": 4096, "dim": 320, "r": 2048},
    "n16384": {"batch": 1, "tokens": 16384, "dim": 320, "r": 8192},
}


class Watch:
    """Times contenders side by side; on a dry run it runs each once and times nothing."""

    def __init__(self, dry: bool, emit: Callable[[dict[str, Any]], None]) -> None:
        self.dry = dry
        self.emit = emit  # adds to the row of this process
        self.device = "cpu" if dry else "cuda"

    def rotating(self, make: Callable[[], Inputs], hot: bool = False) -> list[Inputs]:
        """As many inputs as the L2 cache does not hold; 4 if they are to be found there."""
        first = make()
        if self.dry:
            return [first]
        size = sum(x.untyped_storage().nbytes() for x in first if torch.is_tensor(x))
        count = 4 if hot else min(64, max(2, ROTATED_BYTES // max(1, size) + 1))
        return [first, *(make() for _ in range(count - 1))]

    def times(
        self,
        contenders: dict[str, Contender],
        inputs: list[Inputs],
        rounds: int = 21,
        graphs: bool = True,
    ) -> dict[str, Any]:
        """The row's part: "us" of each, "how" it ran, and "refused" with the reason of those that
        did not."""
        how: dict[str, str] = {}
        refused: dict[str, str] = {}
        loops: dict[str, tuple[Callable[[], object], int]] = {}
        for name, run in contenders.items():
            try:
                run(*inputs[0])
                if self.dry:
                    loops[name], how[name] = (lambda: None, 1), "dry"
                    continue
                calls = self._calls(run, inputs)
                turn = list(itertools.islice(itertools.cycle(inputs), calls))
            except Exception as error:  # a rival may lack a kernel for this shape, or memory
                refused[name] = first_line(error)
                continue
            loops[name] = (lambda run=run, turn=turn: run_all(run, turn), calls)
            how[name] = "eager"
            if graphs:
                try:
                    loops[name] = self._graph(run, inputs, calls)
                    how[name] = "graph"
                except Exception as error:
                    refused[f"{name} as a graph"] = first_line(error)
        if self.dry:
            return {"us": dict.fromkeys(loops), "how": how, "refused": refused}
        taken: dict[str, list[float]] = {name: [] for name in loops}
        for turn_number in range(rounds + 2):
            for name, (loop, calls) in loops.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                loop()
                end.record()
                end.synchronize()
                if turn_number >= 2:
                    taken[name].append(1e3 * start.elapsed_time(end) / calls)
        us = {name: round(statistics.median(values), 3) for name, values in taken.items()}
        return {"us": us, "how": how, "refused": refused}

    def _calls(self, run: Contender, inputs: list[Inputs]) -> int:
        """How many calls make up a loop, by a first estimate."""
        for _ in range(2):
            run(*inputs[-1])
        one = elapsed_us(lambda: run_all(run, inputs[:4])) / len(inputs[:4])
        if one > GRAPH_US:
            return 1  # a whole model
        return max(len(inputs), min(MOST_CALLS, round(GRAPH_US / one) + 1))

    def _graph(
        self, run: Contender, inputs: list[Inputs], calls: int
    ) -> tuple[Callable[[], object], int]:
        """A graph that is long enough, and its number of calls."""
        while True:
            replay = capture(run, list(itertools.islice(itertools.cycle(inputs), calls)))
            replay()
            took = elapsed_us(replay)
            if took >= 0.7 * GRAPH_US or calls >= MOST_CALLS:
                return replay, calls
            # Launches from Python had made a call look long.
            calls = min(MOST_CALLS, round(1.2 * calls * GRAPH_US / max(took, 1.0)) + 1)


def run_all(run: Contender, turn: list[Inputs]) -> None:
    """Each call's result is dropped at once, as a model drops it."""
    for x in turn:
        run(*x)


def elapsed_us(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def capture(run: Contender, turn: list[Inputs]) -> Callable[[], object]:
    """The calls as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on first use must not be captured
        run(*turn[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all(run, turn)
    return graph.replay


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]}"


# --- rows ----------------------------------------------------------------------------------------


def ceilings_row(watch: Watch, _: dict) -> None:
    """What the machine can do: copies of large and middle-sized buffers, and a matrix product."""
    big, middle = (1 << 14, 1 << 12) if watch.dry else (1 << 30, 75 << 20)
    side = 64 if watch.dry else 8192
    rates: dict[str, float | None] = {}
    for label, size in (("1 GiB", big), ("75 MiB", middle)):

        def make(size: int = size) -> Inputs:
            source = torch.ones(size // 4, device=watch.device)
            return source, torch.empty_like(source)

        part = watch.times(
            {
                "copy_": lambda source, target: target.copy_(source),
                "neg": lambda source, target: torch.neg(source, out=target),  # a plain kernel
            },
            watch.rotating(make),
        )
        for name, us in part["us"].items():
            rates[f"{name} {label}"] = None if us is None else round(2 * size / us / 1e6, 4)
    a = torch.randn(side, side, device=watch.device, dtype=DTYPE)
    us = watch.times({"matmul": lambda: a @ a}, [()])["us"]["matmul"]
    watch.emit(
        {
            "copy_tb_per_s": rates,
            "matmul_tflops": None if us is None else round(2 * side**3 / us / 1e6, 1),
        }
    )


def packed_qkv(shape: dict, device: str) -> tuple[torch.Tensor, ...]:
    """Views q, k, v (B, H, N, D) of a packed (B, N, 3, H, D) tensor, as a model has them."""
    dim = shape.get("dim") or shape["channels"] // shape["heads"]
    packed = torch.randn(
        shape["batch"], shape["tokens"], 3, shape["heads"], dim, device=device, dtype=DTYPE
    )
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def layer_contenders(shape: dict) -> tuple[dict[str, Contender], dict[str, Contender], dict]:
    """Ours and the stock formulations of what a layer does, and the bytes of each."""
    import stock

    import tome_ext

    batch, tokens, channels, r = (shape[k] for k in ("batch", "tokens", "channels", "r"))
    rows = tokens - r
    device = shape["device"]
    keys = packed_qkv(shape, device)[1]
    plan = tome_ext.match(keys, r, 1)
    pairs = stock.match(keys, r, 1)
    weight, bias = (torch.randn(channels, device=device, dtype=DTYPE) for _ in range(2))
    scores = torch.rand(batch, tokens, device=device)
    importance = torch.rand(batch, tokens, device=device)

    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (channels,), weight, bias, 1e-6)

    def stock_both(k: Any, x: Any, branch: Any, size: Any) -> object:
        return stock.merge(x, size.to(DTYPE).unsqueeze(-1), stock.match(k, r, 1))

    def stock_folded(k: Any, x: Any, branch: Any, size: Any) -> object:
        merged, total = stock.merge(x + branch, size.to(DTYPE).unsqueeze(-1), pairs)
        return norm(merged), merged, total

    def sliced(k: Any, x: Any, branch: Any, size: Any) -> object:
        kept = (x + branch)[:, :rows]
        return norm(kept), kept

    ours = {
        "merge": lambda k, x, branch, size: plan.merge(x, size),
        "match": lambda k, x, branch, size: tome_ext.match(k, r, 1),
        "both": lambda k, x, branch, size: tome_ext.match(k, r, 1).merge(x, size),
        "merge_add_norm": lambda k, x, branch, size: plan.merge_add_norm(
            x, branch, size, None, weight, bias
        ),
        "unmerge": lambda k, x, branch, size: plan.unmerge(x[:, :rows]),
        "select": lambda k, x, branch, size: tome_ext.select(scores, rows, 1),
        "guided match": lambda k, x, branch, size: tome_ext.match(
            x, r, 1, size=size, importance=importance
        ),
        "merge_add_norm, norms kept": lambda k, x, branch, size: plan.merge_add_norm(
            x, branch, size, None, weight, bias, keep_norms=True
        ),
    }
    stocks = {
        "stock match": lambda k, x, branch, size: stock.match(k, r, 1),
        "stock merge": lambda k, x, branch, size: stock.merge(
            x, size.to(DTYPE).unsqueeze(-1), pairs
        ),
        "stock both": stock_both,
        "stock add, merge, norm": stock_folded,
        "stock unmerge": lambda k, x, branch, size: stock.unmerge(x[:, :rows], pairs),
        "add, slice, norm": sliced,
    }
    row = batch * channels * torch.finfo(DTYPE).bits // 8
    traffic = {
        "match": tokens * row,
        "guided match": tokens * row,
        "merge": (tokens + rows) * row,
        "merge_add_norm": 2 * (tokens + rows) * row,
        "merge_add_norm, norms kept": 2 * (tokens + rows) * row,
        "unmerge": (tokens + rows) * row,
    }
    return ours, stocks, traffic


def layer_inputs(watch: Watch, shape: dict) -> list[Inputs]:
    def make() -> Inputs:
        size = (shape["batch"], shape["tokens"], shape["channels"])
        x, branch = (torch.randn(size, device=watch.device, dtype=DTYPE) for _ in range(2))
        sizes = torch.randint(1, 5, size[:2], device=watch.device).float()
        return packed_qkv(shape, watch.device)[1], x, branch, sizes

    return watch.rotating(make, hot=shape["batch"] == 1)


def layer_row(watch: Watch, shape: dict) -> None:
    """match, merge and what surrounds them, beside stock operators run one by one."""
    shape = {**shape, "device": watch.device}
    ours, stocks, traffic = layer_contenders(shape)
    part = watch.times({**ours, **stocks}, layer_inputs(watch, shape))
    watch.emit({**part, "bytes": traffic})


def compiled_layer_row(watch: Watch, shape: dict) -> None:
    """The same against stock operators through torch.compile."""
    shape = {**shape, "device": watch.device}
    ours, stocks, traffic = layer_contenders(shape)
    names = ("stock both", "stock add, merge, norm", "add, slice, norm")
    compiled = {
        f"compiled {name}": stocks[name] if watch.dry else torch.compile(stocks[name])
        for name in names
    }
    ours = {name: ours[name] for name in ("both", "merge_add_norm")}
    part = watch.times({**ours, **compiled}, layer_inputs(watch, shape))
    watch.emit({**part, "bytes": traffic})


def held(backend: SDPBackend, run: Contender) -> Contender:
    """A contender held to one backend of SDPA."""

    def call(*inputs: Any) -> object:
        with sdpa_kernel(backend):
            return run(*inputs)

    return call


def attention_row(watch: Watch, shape: dict) -> None:
    """Attention with sizes, beside what SDPA has without them and with them as a mask."""
    import stock

    import tome_ext

    def make() -> Inputs:
        size = torch.randint(1, 5, (shape["batch"], shape["tokens"]), device=watch.device)
        return *packed_qkv(shape, watch.device), size.float()

    def plain(q: Any, k: Any, v: Any, size: Any) -> object:
        return F.scaled_dot_product_attention(q, k, v)

    masked = stock.masked_attention
    forms: dict[str, Contender] = {
        "tome": lambda q, k, v, size: tome_ext.ops.attention_forward(q, k, v, size),
        "flash": held(SDPBackend.FLASH_ATTENTION, plain),
        "cudnn": held(SDPBackend.CUDNN_ATTENTION, plain),
        "efficient": held(SDPBackend.EFFICIENT_ATTENTION, plain),
        "default": plain,
        "efficient, mask": held(SDPBackend.EFFICIENT_ATTENTION, masked),
        "cudnn, mask": held(SDPBackend.CUDNN_ATTENTION, masked),
        "default, mask": masked,
        "flash, rank 1": held(SDPBackend.FLASH_ATTENTION, stock.rank_1_attention),
        "explicit": stock.explicit_attention,
        "cls_attention": lambda q, k, v, size: tome_ext.ops.cls_attention(q, k, size),
    }
    part = watch.times(forms, watch.rotating(make, hot=shape["batch"] == 1))
    watch.emit({**part, "flops": attention_flops(shape)})


def attention_flops(shape: dict) -> int:
    return 4 * shape["batch"] * shape["heads"] * shape["tokens"] ** 2 * shape["dim"]


def stock_backward(name: str, q: Any, k: Any, v: Any, bias: Any, grad: Any) -> Contender:
    """The gradient of one of SDPA's kernels, called with what its forward saved.

    Through autograd it could not be captured: there it runs on the stream of the forward. Arguments
    go by the names in the schemas, whose order changes between versions of torch.
    """
    forward = getattr(torch.ops.aten, name).default
    backward = getattr(torch.ops.aten, name + "_backward").default
    given = {
        "query": q,
        "key": k,
        "value": v,
        "attn_bias": bias,
        "compute_log_sumexp": True,
        "dropout_p": 0.0,
        "is_causal": False,
        "return_debug_mask": False,
        "grad_out": grad,
        "grad_out_": grad,
        "grad_input_mask": [True, True, True, False],
    }
    accepted = {a.name for a in forward._schema.arguments}
    saved = forward(**{key: value for key, value in given.items() if key in accepted})
    given |= dict(zip((r.name for r in forward._schema.returns), saved, strict=True))
    given["out"] = given.get("output")
    given.setdefault("logsumexp", given.get("log_sumexp"))
    given.setdefault("philox_seed", given.get("rng_state"))
    given.setdefault("philox_offset", given.get("unused"))
    wanted = [a for a in backward._schema.arguments if a.name != "scale"]
    arguments = {a.name: given[a.name] for a in wanted}
    return lambda: backward(**arguments)


def backward_row(watch: Watch, shape: dict) -> None:
    """The gradient of attention with sizes, beside those of SDPA's kernels, graph against graph."""
    import tome_ext

    q, k, v = packed_qkv(shape, watch.device)
    size = torch.randint(1, 5, (shape["batch"], shape["tokens"]), device=watch.device).float()
    out, lse = tome_ext.ops.attention_forward(q, k, v, size)
    grad = torch.randn_like(out)
    refused: dict[str, str] = {}
    contenders: dict[str, Contender] = {
        "tome": lambda: tome_ext.ops.attention_backward(grad, q, k, v, size, out, lse)
    }
    tokens = shape["tokens"]
    padded = q.new_zeros(shape["batch"], 1, 1, (tokens + 7) // 8 * 8)[..., :tokens]
    padded.copy_(size.log()[:, None, None])
    mask = padded.expand(-1, shape["heads"], tokens, -1)
    for name, kernel, bias in (
        ("flash", "flash", None),
        ("cudnn", "cudnn", None),
        ("efficient", "efficient", None),
        ("efficient, mask", "efficient", mask),
        ("cudnn, mask", "cudnn", mask),
    ):
        try:
            contenders[name] = stock_backward(
                f"_scaled_dot_product_{kernel}_attention", q, k, v, bias, grad
            )
        except Exception as error:  # not on this device, or not this shape
            refused[name] = first_line(error)
    part = watch.times(contenders, [()])
    part["refused"] |= refused
    watch.emit({**part, "flops": attention_flops(shape) * 5 // 2})


def models_of(watch: Watch, shape: dict) -> tuple[dict[str, Any], torch.Tensor]:
    """The models of a row, which share their weights, and images."""
    import stock
    import timm

    from tome_ext import patch
    from tome_ext._command import Reduction
    from tome_ext.bench._contenders import find_peers, share_weights, sliced

    small = {"depth": 2, "embed_dim": 48, "num_heads": 3} if watch.dry else {}
    # Random weights are drawn where they will be, and are ordinary tensors, as loaded ones are.
    with torch.inference_mode(False), torch.device(watch.device):
        model = timm.create_model(shape["name"], **small)
        model = model.eval().requires_grad_(False).to(watch.device, DTYPE)
    side = model.patch_embed.img_size[0]
    batch = 1 if watch.dry else shape["batch"]
    images = torch.randn(batch, 3, side, side, device=watch.device, dtype=DTYPE)
    r = shape["r"]
    models = {
        "unmerged": model,
        "ceiling": sliced(share_weights(model), Reduction(method="tome", r=r, keep_rate=None)),
        "tome": share_weights(model),
        "guided": share_weights(model),
        "stock": stock.patch(share_weights(model), r),
        "published": stock.patch(share_weights(model), r, stock.explicit_attention),
    }
    patch.timm(models["tome"], r=r, inference=True)
    patch.timm(models["guided"], r=r, method="guided", inference=True)
    for peer in find_peers(()):  # the published package, where it is installed
        models["published package"] = peer.patch(share_weights(model), r)
    return models, images


def forwards(models: dict[str, Any]) -> dict[str, Contender]:
    runs: dict[str, Contender] = {name: lambda x, m=m: m(x) for name, m in models.items()}
    runs["unmerged, flash"] = held(SDPBackend.FLASH_ATTENTION, runs["unmerged"])
    return runs


def model_row(watch: Watch, shape: dict) -> None:
    """A whole model unmerged, with tokens sliced off (the ceiling), and merging in three ways."""
    models, images = models_of(watch, shape)
    runs = forwards(models)
    for mode in ("graph", "eager"):
        part = watch.times(runs, [(images,)], rounds=7, graphs=mode == "graph")
        watch.emit({mode: part})
        gc.collect()
        if not watch.dry:
            torch.cuda.empty_cache()


def compiled_model_row(watch: Watch, shape: dict) -> None:
    """The same through torch.compile in its default mode, which fuses and keeps the host's part.

    Not max-autotune: its choices of matrix products take minutes a model, on every contender.
    """
    from tome_ext.bench._contenders import share_weights

    models, images = models_of(watch, shape)
    chosen = ("unmerged", "ceiling", "tome")
    compiled = {
        name: models[name] if watch.dry else torch.compile(models[name], dynamic=False)
        for name in chosen
    }
    runs = forwards(compiled)
    if not watch.dry:  # what is compiled keeps the backend that it was compiled with
        again = torch.compile(share_weights(models["unmerged"]), dynamic=False)
        runs["unmerged, flash"] = held(SDPBackend.FLASH_ATTENTION, lambda x: again(x))
    for mode in ("graph", "eager"):
        part = watch.times(runs, [(images,)], rounds=7, graphs=mode == "graph")
        watch.emit({mode: part})


def large_row(watch: Watch, shape: dict) -> None:
    """A match of many tokens."""
    import stock

    import tome_ext

    size = (shape["batch"], shape["tokens"], shape["dim"])
    inputs = watch.rotating(lambda: (torch.randn(size, device=watch.device, dtype=DTYPE),))
    contenders = {
        "match": lambda keys: tome_ext.match(keys, shape["r"]),
        "stock match": lambda keys: stock.match(keys, shape["r"]),
    }
    watch.emit(watch.times(contenders, inputs, rounds=7))


Row = tuple[Callable[[Watch, dict], None], dict]


def all_rows() -> dict[str, Row]:
    """The most important first; those of torch.compile, which takes minutes, only by name."""
    rows: dict[str, Row] = {"ceilings": (ceilings_row, {})}
    for kind, name in (
        ("layer", "vit_b"),
        ("attention", "b256_n197"),
        ("model", "vit_b"),
        ("attention", "b64_n577"),
        ("layer", "vit_l384"),
        ("attention", "b256_n150"),
        ("attention", "b256_n80"),
        ("backward", "b256_n197"),
        ("backward", "b64_n577"),
        ("model", "vit_b_single"),
        ("model", "vit_l384"),
        ("model", "vit_l"),
        ("layer", "single"),
        ("attention", "single"),
        ("large", "n4096"),
        ("large", "n16384"),
        ("compiled_layer", "vit_b"),
        ("compiled_model", "vit_b"),
        ("compiled_layer", "vit_l384"),
        ("compiled_model", "vit_l384"),
        ("compiled_model", "vit_l"),
        ("compiled_model", "vit_b_single"),
    ):
        run, shapes = {
            "layer": (layer_row, LAYERS),
            "compiled_layer": (compiled_layer_row, LAYERS),
            "attention": (attention_row, ATTENTION),
            "backward": (backward_row, ATTENTION),
            "model": (model_row, MODELS),
            "compiled_model": (compiled_model_row, MODELS),
            "large": (large_row, LARGE),
        }[kind]
        rows[f"{kind}:{name}"] = (run, shapes[name])
    return rows


def chosen_rows(names: str | None) -> dict[str, Row]:
    """``names``: rows, or "figures" and "compiled" for all of a kind."""
    rows = all_rows()
    kinds = {
        "figures": [name for name in rows if not name.startswith("compiled")],
        "compiled": [name for name in rows if name.startswith("compiled")],
    }
    chosen = []
    for name in (names or "figures").split(","):
        chosen += kinds.get(name, [name])
    unknown = [name for name in chosen if name not in rows]
    if unknown:
        raise SystemExit(f"gpu_figures.py: no row is named {unknown[0]}; see --list")
    return {name: rows[name] for name in chosen}


def tiny(shape: dict) -> dict:
    """A shape for a dry run."""
    small = {"batch": 2, "heads": 3, "tokens": 33, "dim": 32, "channels": 96, "r": 5}
    return {key: small.get(key, value) for key, value in shape.items()}


# --- processes -----------------------------------------------------------------------------------


class Appender:
    """Appends lines to a file that survive whatever happens next."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(json.dumps(line)[:400], flush=True)


@contextmanager
def forked() -> Iterator[int]:
    """Forks; the child runs the body and never leaves it."""
    pid = os.fork()
    if pid:
        yield pid
        return
    status = 1
    try:
        yield 0
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_row(name: str, row: Row, dry: bool, append: Appender) -> None:
    """In the child: the row's lines, or its error."""
    run, shape = row
    began = time.monotonic()

    def emit(part: dict[str, Any]) -> None:
        seconds = round(time.monotonic() - began, 1)
        append({"row": name, "shape": shape, **part, "seconds": seconds})

    try:
        torch.manual_seed(0)
        # torch.compile would guard against tensors made in inference mode and those that are not.
        mode = torch.no_grad if name.startswith("compiled") else torch.inference_mode
        with mode():
            run(Watch(dry, emit), tiny(shape) if dry and "name" not in shape else shape)
    except Exception as error:
        traceback.print_exc()
        append({"row": name, "error": first_line(error)})


def ended(pid: int, seconds: float) -> int | None:
    """A child's exit status; None if it still runs after so long."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.02)


def trouble_of(pid: int, left: float, row_seconds: float) -> str | None:
    """What became of a row's child; None if it ended well."""
    limit = min(left, row_seconds)
    code = ended(pid, limit)
    if code is not None:
        return None if code == 0 else f"the process ended with {code}"
    os.kill(pid, signal.SIGKILL)
    if ended(pid, KILL_SECONDS) is None:  # stuck in the driver, beside all that follows
        return f"stopped after {limit:.0f} s, but it lives on; what follows was not alone"
    return NO_TIME if left < row_seconds else f"stopped after {limit:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the rows here")
    parser.add_argument("--rows", help='names, "figures" (default) or "compiled"')
    parser.add_argument("--seconds", type=float, default=1e4, help="for all rows together")
    parser.add_argument("--row-seconds", type=float, default=60, help="for one row")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no figures")
    parser.add_argument("--list", action="store_true", help="print the rows' names")
    args = parser.parse_args()
    rows = chosen_rows(args.rows)
    if args.list:
        print("\n".join(all_rows()))
        return
    if args.out is None:
        parser.error("--out FILE is needed")
    append = Appender(args.out.resolve())
    end = time.monotonic() + args.seconds
    import timm  # noqa: F401  (here, once for all rows; tome_ext may look at the GPU, and waits)

    torch.set_num_threads(1) if args.dry_run else None
    for name, row in rows.items():
        left = end - time.monotonic()
        if left < 3:
            append({"row": name, "error": NO_TIME})
            continue
        with forked() as pid:
            if pid == 0:
                run_row(name, row, args.dry_run, append)
        trouble = trouble_of(pid, left, args.row_seconds)
        if trouble is not None:
            append({"row": name, "error": trouble})


if __name__ == "__main__":
    main()
