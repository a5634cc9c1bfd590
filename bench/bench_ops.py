"""Times match, merge and unmerge on the CPU beside stock PyTorch and the copy floor.

    python bench/bench_ops.py [--json out.json] [--threads 2] [--seconds 1.5] [--only merge]

All contenders of a row run interleaved in one process; each figure is a median. A ratio is the
median of the ratios of neighbouring runs, so that what slows the machine slows both sides.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import tome_ext

sys.path.insert(0, str(Path(__file__).parent))
import stock
from timing import describe_machine, interleave, ratio, write_json


def packed_keys(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """The key view (B, H, N, D) of a packed (B, N, 3, H, D) qkv tensor."""
    return torch.randn(batch, tokens, 3, heads, dim).to(dtype).permute(2, 0, 3, 1, 4)[1]


def bench_merge(batch: int, tokens: int, channels: int, r: int, dtype: torch.dtype, s: float):
    x = torch.randn(batch, tokens, channels).to(dtype)
    keys = torch.randn(batch, tokens, 64)
    plan = tome_ext.match(keys, r, 1)
    pairs = stock.match(keys, r, 1)
    size = torch.randint(1, 4, (batch, tokens)).float()
    size3 = size.to(dtype).unsqueeze(-1)
    times = interleave(
        {
            "tome": lambda: plan.merge(x, size),
            "clone": lambda: x.clone(),
            "stock": lambda: stock.merge(x, size3, pairs),
        },
        s,
    )
    return times, {
        "of_clone": ratio(times, "tome", "clone"),
        "over_stock": ratio(times, "stock", "tome"),
    }


def bench_unmerge(batch: int, tokens: int, channels: int, r: int, dtype: torch.dtype, s: float):
    keys = torch.randn(batch, tokens, 64)
    plan = tome_ext.match(keys, r, 1)
    pairs = stock.match(keys, r, 1)
    merged = torch.randn(batch, plan.num_output_tokens, channels).to(dtype)
    full = torch.randn(batch, tokens, channels).to(dtype)
    times = interleave(
        {
            "tome": lambda: plan.unmerge(merged),
            "clone": lambda: full.clone(),
            "stock": lambda: stock.unmerge(merged, pairs),
        },
        s,
    )
    return times, {
        "of_clone": ratio(times, "tome", "clone"),
        "over_stock": ratio(times, "stock", "tome"),
    }


def bench_match(
    batch: int, heads: int, tokens: int, dim: int, r: int, dtype: torch.dtype, s: float
):
    if heads > 1:
        keys = packed_keys(batch, heads, tokens, dim, dtype)
        metric = keys.mean(1)
    else:
        keys = metric = torch.randn(batch, tokens, dim).to(dtype)
    prefix = 1 if heads > 1 else 0
    a, b = metric[:, ::2].contiguous(), metric[:, 1::2].transpose(1, 2).contiguous()
    times = interleave(
        {
            "tome": lambda: tome_ext.match(keys, r, prefix),
            "matmul": lambda: torch.bmm(a, b),
            "stock": lambda: stock.match(keys, r, prefix),
        },
        s,
    )
    return times, {
        "over_stock": ratio(times, "stock", "tome"),
        "of_matmul": ratio(times, "tome", "matmul"),
    }


LARGE = {"batch": 2, "heads": 1, "tokens": 4096, "dim": 320, "r": 2048}


def resident_peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def print_peak(name: str) -> None:
    """Bytes by which one large match raises the peak of a process that did nothing else."""
    run = {"tome": tome_ext.match, "stock": stock.match}[name]
    torch.set_num_threads(2)
    run(torch.randn(2, 64, LARGE["dim"]), 8)  # what is loaded on first use is not its memory
    keys = torch.randn(LARGE["batch"], LARGE["tokens"], LARGE["dim"])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over (Linux)
    before = resident_peak()
    result = run(keys, LARGE["r"])
    print(resident_peak() - before)
    del result


def peak_of(name: str) -> int:
    run = [sys.executable, __file__, "--peak-of", name]
    return int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)


SHAPES = [(batch, tokens) for tokens in (197, 577) for batch in (1, 8, 64)]
CHANNELS = {197: (768, 12, 16), 577: (1024, 16, 23)}  # C, heads, r


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="per row")
    parser.add_argument("--only", choices=("merge", "match", "unmerge", "large"))
    parser.add_argument("--peak-of", choices=("tome", "stock"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        return print_peak(args.peak_of)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows: list[dict[str, object]] = []
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}")
    print(f"{'':42}{'tome':>9}{'floor':>9}{'stock':>9}   {'tome/floor':>10} {'stock/tome':>10}")

    def report(name: str, shape: str, dtype: torch.dtype, result) -> None:
        times, ratios = result
        floor = "clone" if "clone" in times else "matmul"
        medians = {k: statistics.median(v) for k, v in times.items()}
        rows.append({"op": name, "shape": shape, "dtype": str(dtype)[6:], "ms": medians, **ratios})
        label = f"{name} {shape} {str(dtype)[6:]}"
        print(
            f"{label:42}{medians['tome']:9.3f}{medians[floor]:9.3f}{medians['stock']:9.3f}   "
            f"{ratios[f'of_{floor}']:10.2f} {ratios['over_stock']:10.1f}",
            flush=True,
        )

    with torch.inference_mode():
        for name in ("merge", "unmerge", "match"):
            if args.only not in (None, name):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for batch, tokens in SHAPES:
                    channels, heads, r = CHANNELS[tokens]
                    if name == "match":
                        result = bench_match(batch, heads, tokens, 64, r, dtype, args.seconds)
                        shape = f"B={batch} H={heads} N={tokens} D=64 r={r}"
                    else:
                        bench = bench_merge if name == "merge" else bench_unmerge
                        result = bench(batch, tokens, channels, r, dtype, args.seconds)
                        shape = f"B={batch} N={tokens} C={channels} r={r}"
                    report(name, shape, dtype, result)
        if args.only in (None, "large"):
            result = bench_match(**LARGE, dtype=torch.float32, s=2 * args.seconds)
            report("match", "B=2 N=4096 D=320 r=2048", torch.float32, result)
            ours, theirs = peak_of("tome"), peak_of("stock")
            rows[-1]["extra_bytes"] = {"tome": ours, "stock": theirs}
            print(
                f"  extra memory: {ours / 2**20:.1f} MiB, stock {theirs / 2**20:.1f} MiB "
                f"({100 * ours / theirs:.1f}%)"
            )
    if args.json:
        write_json(args.json, machine, rows)


if __name__ == "__main__":
    main()
