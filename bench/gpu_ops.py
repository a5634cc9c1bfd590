"""Times the operators on a GPU, and writes every figure to a JSON file.

    python bench/gpu_ops.py --json gpu.json            on a machine with a GPU
    python bench/gpu_ops.py --dry-run --json dry.json  without one: every contender runs once at a
                                                       small shape on the CPU, figures stay null
    python bench/gpu_ops.py --exercise                 each operator once, for compute-sanitizer

With --cpp FILE, bench_cuda's output (bench/cpp/bench_cuda.cu), the figures that both measured are
compared, and those more than 10% apart are named.

Inputs rotate through more memory than the L2 cache holds. All contenders of a row run in turns;
a figure is the median over rounds. "device" times are of a replayed CUDA graph, which holds one
call per input, so that the host's launches do not count; "eager" times are of the same loop run
from Python. In a loop of merges, too, each is launched early, behind the one before it, where the
chip can. The floor is a device-to-device copy, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tome_ext

sys.path.insert(0, str(Path(__file__).parent))
import stock

Inputs = tuple[torch.Tensor, ...]
Contender = Callable[..., object]

ROTATED_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
VIT_B = {"name": "ViT-B", "batch": 256, "tokens": 197, "channels": 768, "heads": 12, "r": 13}
VIT_L = {"name": "ViT-L@384", "batch": 64, "tokens": 577, "channels": 1024, "heads": 16, "r": 23}
CPP_TOLERANCE = 0.1  # of bench_cuda's figures against these
LARGE = (
    {"name": "B2 N4096", "batch": 2, "tokens": 4096, "dim": 320, "r": 2048},
    {"name": "B1 N16384", "batch": 1, "tokens": 16384, "dim": 320, "r": 8192},
)
ATTENTION = (
    *({"batch": 256, "heads": 12, "tokens": n, "dim": 64} for n in (197, 150, 80)),
    {"batch": 64, "heads": 16, "tokens": 577, "dim": 64},
    {"batch": 1, "heads": 12, "tokens": 197, "dim": 64},
)
DTYPE = torch.bfloat16


def nbytes(inputs: Inputs) -> int:
    """Bytes of the storages, not of the views: a packed qkv counts in full."""
    return sum(x.untyped_storage().nbytes() for x in inputs)


class Stopwatch:
    """Runs contenders over rotating inputs; without a GPU it runs each once and times nothing."""

    def __init__(self, dry: bool, rounds: int) -> None:
        self.dry = dry
        self.rounds = rounds
        self.device = "cpu" if dry else "cuda"

    def rotating(self, make: Callable[[], Inputs]) -> list[Inputs]:
        first = make()
        if self.dry:
            return [first]
        count = min(64, max(2, ROTATED_BYTES // max(1, nbytes(first)) + 1))
        return [first, *(make() for _ in range(count - 1))]

    def capture(self, run: Contender, inputs: list[Inputs]) -> Callable[[], object]:
        """One call per input as a CUDA graph."""
        if self.dry:
            return lambda: [run(*x) for x in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run(*inputs[0])
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for x in inputs:
                run(*x)
        return graph.replay

    def medians(
        self, loops: dict[str, Callable[[], object]], calls: int
    ) -> dict[str, float | None]:
        """Microseconds per call of each loop of `calls` calls, the loops taking turns."""
        if self.dry:
            for loop in loops.values():
                loop()
            return dict.fromkeys(loops)
        times: dict[str, list[float]] = {name: [] for name in loops}
        for turn in range(self.rounds + 3):
            for name, loop in loops.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                loop()
                end.record()
                end.synchronize()
                if turn >= 3:
                    times[name].append(1e3 * start.elapsed_time(end) / calls)
        return {name: statistics.median(values) for name, values in times.items()}

    def time(
        self, inputs: list[Inputs], device: dict[str, Contender], eager: dict[str, Contender]
    ) -> dict[str, float | None]:
        loops = {f"{name} device": self.capture(run, inputs) for name, run in device.items()}
        for name, run in eager.items():
            loops[f"{name} eager"] = lambda run=run: [run(*x) for x in inputs]
        return self.medians(loops, len(inputs))


def over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def packed_keys(shape: dict, device: str) -> torch.Tensor:
    """The key view (B, H, N, D) of a packed (B, N, 3, H, D) qkv tensor."""
    dim = shape["channels"] // shape["heads"]
    packed = torch.randn(
        shape["batch"], shape["tokens"], 3, shape["heads"], dim, device=device, dtype=DTYPE
    )
    return packed.permute(2, 0, 3, 1, 4)[1]


def copy_bandwidth(watch: Stopwatch) -> float | None:
    """Bytes read and written per microsecond by a copy of 512 MiB."""
    count = (512 << 20) if not watch.dry else 1 << 10
    source = torch.empty(count, dtype=torch.uint8, device=watch.device)
    target = torch.empty_like(source)
    times = watch.medians({"copy": lambda: target.copy_(source)}, 1)
    return over(2 * count, times["copy"])


def compiled(run: Contender, dry: bool) -> Contender:
    return run if dry else torch.compile(run, mode="max-autotune", fullgraph=True)


def layer_row(watch: Stopwatch, shape: dict, bandwidth: float | None) -> dict[str, object]:
    """match, merge and both of one layer; and merge with what lies around it in a block."""
    batch, tokens, channels, r = (shape[k] for k in ("batch", "tokens", "channels", "r"))
    dim = channels // shape["heads"]

    def make() -> Inputs:
        x = torch.randn(batch, tokens, channels, device=watch.device, dtype=DTYPE)
        keys = packed_keys(shape, watch.device)
        return keys, x, torch.ones(batch, tokens, device=watch.device)

    inputs = watch.rotating(make)
    plan = tome_ext.match(inputs[0][0], r, 1)
    vectors = [torch.randn(channels, device=watch.device, dtype=DTYPE) for _ in range(2)]
    scores = torch.rand(batch, tokens, device=watch.device)

    # For a branch stands the x half a turn away, as far from the cache as can be.
    half = len(inputs) // 2
    branches = {id(x): inputs[i - half][1] for i, (_, x, _) in enumerate(inputs)}

    def folded(keys: torch.Tensor, x: torch.Tensor, size: torch.Tensor) -> object:
        return plan.merge_add_norm(x, branches[id(x)], size, None, *vectors)

    def unfolded(keys: torch.Tensor, x: torch.Tensor, size: torch.Tensor) -> object:
        merged, new_size = plan.merge(x + branches[id(x)], size)
        return torch.nn.functional.layer_norm(merged, (channels,), *vectors), merged, new_size

    def sliced(keys: torch.Tensor, x: torch.Tensor, size: torch.Tensor) -> object:
        kept = (x + branches[id(x)])[:, : tokens - r]
        return torch.nn.functional.layer_norm(kept, (channels,), *vectors), kept

    def both(keys: torch.Tensor, x: torch.Tensor, size: torch.Tensor) -> object:
        return tome_ext.match(keys, r, 1).merge(x, size)

    def stock_both(keys: torch.Tensor, x: torch.Tensor, size: torch.Tensor) -> object:
        return stock.merge(x, size.to(x.dtype).unsqueeze(-1), stock.match(keys, r, 1))

    times = watch.time(
        inputs,
        {
            "match": lambda keys, x, size: tome_ext.match(keys, r, 1),
            "select": lambda keys, x, size: tome_ext.select(scores, tokens - r, 1),
            "merge": lambda keys, x, size: plan.merge(x, size),
            "unmerge": lambda keys, x, size: plan.unmerge(x[:, : tokens - r]),
            "both": both,
            "merge_add_norm": folded,
            "add, merge, norm": unfolded,
            "add, slice, norm": sliced,
        },
        {"both": both, "stock": stock_both, "compiled": compiled(stock_both, watch.dry)},
    )
    element = torch.finfo(DTYPE).bits // 8
    merge_bytes = batch * (2 * tokens - r) * channels * element
    folded_bytes = batch * (2 * tokens + 2 * (tokens - r)) * channels * element
    key_bytes = batch * tokens * shape["heads"] * dim * element
    return {
        "row": f"layer {shape['name']} B={batch}",
        "shape": shape,
        "us": times,
        "merge_of_copy_bandwidth": over(over(merge_bytes, times["merge device"]), bandwidth),
        "merge_add_norm_of_copy_bandwidth": over(
            over(folded_bytes, times["merge_add_norm device"]), bandwidth
        ),
        "unfolded_over_merge_add_norm": over(
            times["add, merge, norm device"], times["merge_add_norm device"]
        ),
        "sliced_over_merge_add_norm": over(
            times["add, slice, norm device"], times["merge_add_norm device"]
        ),
        "match_over_reading_keys": over(times["match device"], over(key_bytes, bandwidth)),
        "over_stock": over(times["stock eager"], times["both eager"]),
        "over_compiled": over(times["compiled eager"], times["both eager"]),
        "stock_over_device": over(times["stock eager"], times["both device"]),
    }


def extra_memory(run: Contender, inputs: Inputs) -> int:
    """Bytes above what was there before and what the call returns."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run(*inputs)
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak - kept


def large_row(watch: Stopwatch, shape: dict) -> dict[str, object]:
    """A match of many tokens."""
    batch, tokens, dim, r = (shape[k] for k in ("batch", "tokens", "dim", "r"))
    inputs = watch.rotating(
        lambda: (torch.randn(batch, tokens, dim, device=watch.device, dtype=DTYPE),)
    )

    def run(keys: torch.Tensor) -> object:
        return tome_ext.match(keys, r)

    def run_stock(keys: torch.Tensor) -> object:
        return stock.match(keys, r)

    times = watch.time(inputs, {"match": run}, {"match": run, "stock": run_stock})
    scores = batch * (tokens // 2) ** 2 * torch.finfo(DTYPE).bits // 8
    extra = None if watch.dry else extra_memory(run, inputs[0])
    return {
        "row": f"large {shape['name']} D={dim}",
        "shape": shape,
        "us": times,
        "over_stock": over(times["stock eager"], times["match eager"]),
        "extra_of_score_matrix": over(extra, scores),
    }


def compare_with_cpp(rows: list[dict], cpp: dict[str, dict[str, float | None]]) -> list[str] | None:
    """Add bench_cuda's figures to the rows of their names.

    Returns those that disagree, or None if there was nothing to compare.
    """
    apart, compared = [], False
    for row in rows:
        row["cpp_us"] = cpp.get(row["row"], {})
        row["cpp_over_python"] = {}
        for name, us in row["cpp_us"].items():
            ratio = row["cpp_over_python"][name] = over(us, row["us"][name])
            compared |= ratio is not None
            if ratio is not None and abs(ratio - 1) > CPP_TOLERANCE:
                apart.append(f"{row['row']}: {name}")
    return apart if compared else None


def sdpa(backend: SDPBackend, run: Contender) -> Contender:
    """A contender held to one backend of SDPA."""

    def held(*inputs: torch.Tensor) -> object:
        with sdpa_kernel(backend):
            return run(*inputs)

    return held


def attention_row(watch: Stopwatch, shape: dict) -> dict[str, object]:
    """Proportional attention, its gradient and the class token's, beside every stock form."""
    batch, heads, tokens, dim = (shape[k] for k in ("batch", "heads", "tokens", "dim"))

    def make() -> Inputs:
        packed = torch.randn(batch, tokens, 3, heads, dim, device=watch.device, dtype=DTYPE)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v, torch.randint(1, 5, (batch, tokens), device=watch.device).float()

    def unbiased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor) -> object:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def ours(*inputs: torch.Tensor) -> torch.Tensor:
        return tome_ext.ops.attention_forward(*inputs)[0]

    def class_token(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: torch.Tensor):
        return tome_ext.ops.cls_attention(q, k, size)

    forms: dict[str, Contender] = {
        "tome": ours,
        "explicit": stock.explicit_attention,
        "unbiased": unbiased,
        "masked": stock.masked_attention,
        "rank_1": stock.rank_1_attention,
        "cls_attention": class_token,
    }
    if not watch.dry:
        forms |= {
            "unbiased": sdpa(SDPBackend.FLASH_ATTENTION, unbiased),
            "masked": sdpa(SDPBackend.EFFICIENT_ATTENTION, stock.masked_attention),
            "masked_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, stock.masked_attention),
            "rank_1": sdpa(SDPBackend.FLASH_ATTENTION, stock.rank_1_attention),
            "flex": stock.flex_attention(),
        }
    inputs = watch.rotating(make)
    forms, refused = usable(forms, inputs[0])
    times = watch.time(inputs, forms, {})

    def training(run: Contender) -> Contender:
        def step(*inputs: torch.Tensor) -> object:
            q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
            return torch.autograd.grad(run(q, k, v, inputs[3]), (q, k, v), torch.ones_like(q))

        return step

    with torch.inference_mode(False):
        trained = [tuple(x.clone() for x in some) for some in inputs[:4]]
        steps = {"tome step": training(ours), "masked step": training(stock.masked_attention)}
        times |= watch.time(trained, {}, steps)

    exact = stock.explicit_attention(*(x[:1].double() for x in inputs[0]))
    error = {
        name: float((run(*(x[:1] for x in inputs[0])).double() - exact).abs().max())
        for name, run in forms.items()
        if name not in ("unbiased", "cls_attention") and not watch.dry
    }
    return {
        "row": f"attention B={batch} H={heads} N={tokens} D={dim}",
        "shape": shape,
        "us": times,
        "error": error,
        "refused": refused,
        "tome_over_unbiased": over(times["tome device"], times.get("unbiased device")),
        "masked_over_tome": over(times.get("masked device"), times["tome device"]),
        "explicit_over_tome": over(times["explicit device"], times["tome device"]),
        "masked_step_over_tome": over(times["masked step eager"], times["tome step eager"]),
        "extra_bytes": None if watch.dry else extra_memory(ours, inputs[0]),
    }


def usable(
    forms: dict[str, Contender], inputs: Inputs
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders that this torch and GPU run, and what the others said."""
    works, refused = {}, {}
    for name, run in forms.items():
        try:
            run(*inputs)
            works[name] = run
        except RuntimeError as error:
            if name in ("tome", "cls_attention"):
                raise
            refused[name] = str(error).splitlines()[0]
    return works, refused


def exercise(device: str) -> None:
    """Each operator at small shapes and every dtype, for compute-sanitizer to watch."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for heads, tokens, dim, channels in ((2, 50, 64, 64), (1, 33, 20, 37)):
            keys = torch.randn(2, heads, tokens, dim, device=device).to(dtype)
            x = torch.randn(2, tokens, channels, device=device).to(dtype).requires_grad_()
            plan = tome_ext.match(keys, 8, 1)
            merged, _ = plan.merge(x, torch.ones(2, tokens, device=device))
            plan.unmerge(merged).sum().backward()
            _, _, normed = plan.merge_add_norm(x, x, None, *torch.randn(3, channels).to(x))
            normed.sum().backward()
            tome_ext.MergePlan.from_assign(plan.assign, plan.num_output_tokens)
            if dtype in (torch.float32, torch.float64):
                for fuse in (False, True):
                    tome_ext.select(x.detach()[..., 0].contiguous(), 20, 1, fuse)
            if device == "cuda" and dtype == torch.float64:
                continue  # attention has no such kernel
            q = torch.randn_like(keys).requires_grad_()
            size = torch.arange(2.0 * tokens, device=device).view(2, tokens)  # one hidden key
            tome_ext.ops.attention(q, keys, keys, size).sum().backward()
            tome_ext.ops.cls_attention(q, keys, size)
    tome_ext.match(torch.randn(1, 3000, 32, device=device, dtype=DTYPE), 700)
    if device == "cuda":
        torch.cuda.synchronize()


def about(dry: bool) -> dict[str, object]:
    """The machine and the versions."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    info: dict[str, object] = {
        "dry_run": dry,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit,
        "tome_ext": tome_ext.__version__,
        "library": tome_ext._library.cuda_status(),
    }
    if not dry:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        info["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        info["device"] = torch.cuda.get_device_name()
    return info


def print_table(report: dict) -> None:
    """Every ratio and time, a line each."""
    for row in report["rows"]:
        print(row["row"])
        ratios = {f"C++ / {name}": x for name, x in row.get("cpp_over_python", {}).items()}
        for name, value in [*row["us"].items(), *row.items(), *ratios.items()]:
            if value is None:
                print(f"  {name:28} not yet measured")
            elif isinstance(value, float):
                print(f"  {name:28} {value:10.3f}{' us' if name in row['us'] else ''}")
    for name in report["cpp_apart"] or []:
        print(f"C++ and Python are more than {CPP_TOLERANCE:.0%} apart: {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--cpp", type=Path, help="compare with what bench_cuda printed")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, no figures")
    parser.add_argument("--exercise", action="store_true", help="each operator once, then stop")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no GPU; use --dry-run without one")
    torch.manual_seed(0)
    if args.exercise:
        return exercise("cpu" if args.dry_run else "cuda")
    watch = Stopwatch(args.dry_run, args.rounds)
    layers, large = [VIT_B, VIT_L, {**VIT_B, "batch": 1}, {**VIT_L, "batch": 1}], list(LARGE)
    attention = list(ATTENTION)
    if args.dry_run:
        layers = [{**shape, "batch": 1} for shape in layers[:2]]
        large = [{**shape, "tokens": 256, "r": 100} for shape in large[:1]]
        attention = [{**attention[0], "batch": 1}]
    with torch.inference_mode():
        bandwidth = copy_bandwidth(watch)
        rows = [layer_row(watch, shape, bandwidth) for shape in layers]
        rows += [large_row(watch, shape) for shape in large]
        rows += [attention_row(watch, shape) for shape in attention]
    apart = compare_with_cpp(rows, json.loads(args.cpp.read_text())) if args.cpp else None
    report = {
        **about(args.dry_run),
        "copy_bandwidth_gb_per_s": over(bandwidth, 1e3),
        "cpp_apart": apart,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


if __name__ == "__main__":
    main()
