"""Times proportional attention on the CPU beside every form that stock PyTorch allows.

    python bench/bench_attention.py [--json out.json] [--threads 2] [--seconds 2] [--no-flex]

All contenders of a row run interleaved in one process, as in bench_ops.py; each figure is a median,
a ratio the median of the ratios of neighbouring runs. Errors are the largest difference from the
same attention in float64, for values of about 1.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import stock
import torch
import torch.nn.functional as F
from timing import Contender, describe_machine, interleave, ratio, write_json

from tome_ext import ops

DIM = 64
SHAPES = [(1, 12, 197), (8, 12, 197), (8, 12, 150), (8, 12, 80), (4, 16, 577)]
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make(batch: int, heads: int, num_tokens: int, dtype: torch.dtype) -> Inputs:
    """q, k, v (B, H, N, D) of a packed (B, N, 3, H, D) tensor, and sizes (B, N)."""
    qkv = torch.randn(batch, num_tokens, 3, heads, DIM).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v, torch.randint(1, 5, (batch, num_tokens)).float()


def ready(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) as the projection behind it takes it: a copy where heads lie outside."""
    return x.transpose(1, 2).flatten(2)


def error(run, q, k, v, size) -> float:
    exact = stock.explicit_attention(*(x.double() for x in (q, k, v, size)))
    return float((run(q, k, v, size).double() - exact).abs().max())


def bench_forward(inputs: Inputs, flex, seconds: float):
    forms = {
        "tome": lambda q, k, v, size: ops.attention_forward(q, k, v, size)[0],
        "masked": stock.masked_attention,
        "rank_1": stock.rank_1_attention,
        "explicit": stock.explicit_attention,
        **({"flex": flex} if flex else {}),
    }

    def contender(run) -> Contender:
        return lambda: ready(run(*inputs))

    contenders = {name: contender(run) for name, run in forms.items()}
    q, k, v, _ = inputs
    contenders["unbiased"] = lambda: ready(F.scaled_dot_product_attention(q, k, v))
    times = interleave(contenders, seconds)
    return times, {name: error(run, *inputs) for name, run in forms.items()}


def bench_backward(inputs: Inputs, seconds: float):
    q, k, v, size = inputs
    out, lse = ops.attention_forward(q, k, v, size)
    grad = torch.randn_like(out)
    mask = size.log().to(q.dtype)[:, None, None]
    aten = torch.ops.aten
    stock_out, stock_lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
    contenders = {
        "tome": lambda: ops.attention_backward(grad, q, k, v, size, out, lse),
        "masked": lambda: aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, stock_out, stock_lse, 0.0, False, attn_mask=mask
        ),
    }
    return interleave(contenders, seconds), None


def bench_cls(inputs: Inputs, seconds: float):
    q, k, _, _ = inputs
    contenders = {
        "tome": lambda: ops.cls_attention(q, k),
        "explicit": lambda: (q[:, :, :1] * DIM**-0.5 @ k.transpose(-2, -1)).softmax(-1).mean(1),
    }
    return interleave(contenders, seconds), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}; ms, medians")
    rows: list[dict[str, object]] = []

    def report(op: str, shape: str, dtype: torch.dtype, result) -> None:
        times, errors = result
        medians = {name: statistics.median(ms) for name, ms in times.items()}
        over = {name: ratio(times, name, "tome") for name in times if name != "tome"}
        row = {"op": op, "shape": shape, "dtype": str(dtype)[6:], "ms": medians, "over": over}
        rows.append(row | ({"error": errors} if errors else {}))
        others = "  ".join(f"{name} {by:.2f}x" for name, by in over.items())
        print(
            f"{op:22} {shape:20} {str(dtype)[6:]:9} {medians['tome']:8.3f}   {others}", flush=True
        )
        if errors:
            print("  errors: " + "  ".join(f"{name} {e:.1e}" for name, e in errors.items()))

    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for batch, heads, num_tokens in SHAPES:
                inputs = make(batch, heads, num_tokens, dtype)
                shape = f"B={batch} H={heads} N={num_tokens} D={DIM}"
                flex = None if args.no_flex else stock.flex_attention()
                report("attention", shape, dtype, bench_forward(inputs, flex, args.seconds))
                report("attention_backward", shape, dtype, bench_backward(inputs, args.seconds))
                report("cls_attention", shape, dtype, bench_cls(inputs, args.seconds / 4))
    if args.json:
        write_json(args.json, machine, rows)


if __name__ == "__main__":
    main()
