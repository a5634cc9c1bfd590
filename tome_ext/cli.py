"""The ``tome-ext`` command."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from . import _library
from ._version import __version__
from .utils import info

__all__ = ["main"]

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
DEMO_PACKAGES = ("numpy", "PIL", "timm", "tqdm")  # by import name


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, or 2 for a mistake, told in a line on stderr."""
    arguments = parser().parse_args(argv)
    try:
        return run_info() if arguments.command == "info" else run_demo(arguments)
    except ImportError as error:  # the compiled library is missing, and the error says what to do
        return fail(str(error))
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    top = argparse.ArgumentParser(
        prog="tome-ext", description="Token merging for Vision Transformers (arXiv 2210.09461)."
    )
    top.add_argument("--version", action="version", version=f"tome_ext {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info",
        help="say what is installed, built and in use",
        description="Print versions, what the compiled library was built for, the instruction "
        "set it uses and the devices there are. Put this in a bug report.",
    )
    demo = commands.add_parser(
        "demo",
        help="run a photograph through a timm ViT, with and without merging",
        description="Run a photograph through a timm Vision Transformer, with and without token "
        "merging. Prints a table (tokens left, images/s, speed-up, agreement of the features) and "
        "writes a picture of the merged regions. Needs: pip install 'tome_ext[demo]'",
    )
    default = "(default: %(default)s)"
    demo.add_argument(
        "picture", nargs="?", type=Path, metavar="PICTURE",
        help="a photograph of your own (default: a cup of coffee)",
    )  # fmt: skip
    demo.add_argument(
        "--model", default="vit_small_patch16_224", help=f"name of a timm model {default}"
    )
    demo.add_argument(
        "--r", type=r_list, default="0,4,8,13", metavar="R,R,...",
        help=f"tokens to merge in every block, a run for each number {default}",
    )  # fmt: skip
    demo.add_argument(
        "--batch-size", type=at_least_one, default=8, metavar="B", help=f"images a run {default}"
    )
    demo.add_argument(
        "--output", type=Path, default="tome_demo.png", metavar="FILE",
        help=f"where to write the picture {default}",
    )  # fmt: skip
    demo.add_argument("--device", default="cpu", help=f"cpu, cuda, cuda:1, mps, ... {default}")
    demo.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help=f"to compute in {default}"
    )
    return top


def r_list(text: str) -> tuple[int, ...]:
    """Parse "0,4,8" for argparse; numbers given twice count once."""
    try:
        values = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        values = (-1,)
    if min(values) < 0:
        raise argparse.ArgumentTypeError(
            f"expected numbers of at least 0 with commas between, such as 0,4,8; got {text!r}"
        )
    return values


def at_least_one(text: str) -> int:
    """Parse a positive number for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def run_info() -> int:
    """Print what is installed as a table."""
    rows = info()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo; a mistake becomes one line."""
    _library.require()  # before anything is loaded
    missing = [name for name in DEMO_PACKAGES if find_spec(name) is None]
    if missing:
        return fail(f"the demo needs {', '.join(missing)}: pip install 'tome_ext[demo]'")
    from . import demo

    try:
        demo.run(
            arguments.picture,
            arguments.model,
            arguments.r,
            arguments.batch_size,
            arguments.output,
            arguments.device,
            DTYPES[arguments.dtype],
        )
    except demo.DemoError as error:
        return fail(str(error))
    return 0


def fail(message: str) -> int:
    """Say what went wrong; returns the exit code for it."""
    print(f"tome-ext: error: {message}", file=sys.stderr)
    return 2
