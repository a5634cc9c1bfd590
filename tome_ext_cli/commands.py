"""What each command does with its options, and how it tells of what went wrong."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from tome_ext import _library
from tome_ext._command import CommandError, Reduction, one_line, out_of_memory
from tome_ext.utils import info

from . import options

__all__ = ["run"]

DTYPES = {name: getattr(torch, name) for name in options.DTYPES}
# What a command needs besides the library of its model, by import name.
DEMO_PACKAGES = ("PIL", "numpy", "timm", "tqdm")
EVAL_PACKAGES = ("PIL", "numpy", "timm", "torchvision", "tqdm")
EMBED_PACKAGES = (*EVAL_PACKAGES, "pyarrow")
CHART_PACKAGES = ("matplotlib",)  # of bench --chart
BENCH_PACKAGES = ("tqdm",)


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was asked for; returns its exit code.

    That is 0, or 2 for what the user can mend, told in a line on stderr.
    """
    try:
        COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # of `tome-ext models | head`
        # Python flushes once more at the end, and would tell of it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, ImportError) as error:  # of a missing library or package
        print(f"tome-ext: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"tome-ext: error: out of memory: {one_line(error)}", file=sys.stderr)
        return 2


def reductions_of(arguments: argparse.Namespace) -> tuple[Reduction, ...]:
    """Every method with every amount."""
    name, amounts = "r", arguments.r
    for other in ("keep_rate", "threshold"):
        if getattr(arguments, other, None) is not None:
            name, amounts = other, getattr(arguments, other)
    pairs = itertools.product(arguments.method, amounts)
    return tuple(Reduction(method, **{name: amount}) for method, amount in pairs)


def running_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``options.add_running`` asks for, as keywords of what the commands call."""
    return {
        "batch_size": arguments.batch_size,
        "device_name": arguments.device,
        "dtype": DTYPES[arguments.dtype],
        "workers": arguments.workers,
        "img_size": arguments.img_size,
    }


def run_info(arguments: argparse.Namespace) -> None:
    """Print what is installed as a table."""
    rows = info()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def check_installed(command: str, packages: tuple[str, ...], extra: str | None = None) -> None:
    """Refuse to start without the library or a package, before anything is loaded.

    ``extra`` is what pip knows the packages by, if not by the command's name.
    """
    _library.require()
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise CommandError(
            f"tome-ext {command} needs {', '.join(missing)}: "
            f"pip install 'tome_ext[{extra or command}]'"
        )


def run_demo(arguments: argparse.Namespace) -> None:
    """Run the demo."""
    check_installed("demo", DEMO_PACKAGES)
    from tome_ext import demo

    demo.run(
        arguments.picture,
        arguments.model,
        reductions_of(arguments),
        arguments.batch_size,
        arguments.output,
        arguments.device,
        DTYPES[arguments.dtype],
    )


def run_eval(arguments: argparse.Namespace) -> None:
    """Run the evaluation."""
    check_installed("eval", EVAL_PACKAGES)
    from tome_ext import evaluate

    evaluate.run(
        arguments.folder,
        arguments.model,
        reductions_of(arguments),
        **running_of(arguments),
        checkpoint=arguments.checkpoint,
        limit=arguments.limit,
        skip_unreadable=arguments.skip_unreadable,
        smaller_pictures=arguments.smaller_pictures,
        json_file=arguments.json,
        resume=arguments.resume,
    )


def run_embed(arguments: argparse.Namespace) -> None:
    """Write the features."""
    check_installed("embed", EMBED_PACKAGES)
    from tome_ext import embed

    if arguments.setting is not None and arguments.method is not None:
        raise CommandError("--setting: the file says which method; expected no --method beside it")
    reduction = Reduction(
        arguments.method or "tome", arguments.r or 0, arguments.keep_rate, arguments.threshold
    )
    embed.run(
        arguments.folder,
        arguments.model,
        arguments.setting or reduction,
        arguments.out,
        **running_of(arguments),
        skip_unreadable=arguments.skip_unreadable,
    )


def run_tune(arguments: argparse.Namespace) -> None:
    """Run the search."""
    check_installed("tune", EVAL_PACKAGES, "eval")
    from tome_ext import _tune_folder

    _tune_folder.run(
        arguments.folder,
        arguments.model,
        flops=arguments.flops,
        speed=arguments.speed,
        method=arguments.method,
        seconds=arguments.seconds,
        seed=arguments.seed,
        pictures=arguments.pictures,
        **running_of(arguments),
        checkpoint=arguments.checkpoint,
        output=arguments.output,
        state=arguments.state,
    )


def run_bench(arguments: argparse.Namespace) -> None:
    """Run the benchmark."""
    drawing = () if arguments.chart is None else CHART_PACKAGES
    check_installed("bench", BENCH_PACKAGES + drawing)
    from tome_ext import bench

    bench.run(
        bench.Options(
            models=arguments.model,
            reductions=reductions_of(arguments),
            batch_sizes=arguments.batch_size,
            dtypes=arguments.dtype,
            device=arguments.device,
            mode=arguments.mode,
            train=arguments.train,
            image_size=arguments.img_size,
            seconds=arguments.seconds,
            peers=tuple(arguments.peer),
            json=arguments.json,
            csv=arguments.csv,
            markdown=arguments.markdown,
            chart=arguments.chart,
        )
    )


def run_models(arguments: argparse.Namespace) -> None:
    """List the supported models."""
    from tome_ext import _supported

    _supported.run(arguments.pattern, arguments.json)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "info": run_info,
    "demo": run_demo,
    "eval": run_eval,
    "embed": run_embed,
    "bench": run_bench,
    "tune": run_tune,
    "models": run_models,
}
