"""The options of the commands, as plain numbers, names and paths; without torch."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["parser"]

METHODS = ("tome", "guided", "evit", "topk")
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT = "(default: %(default)s)"
MODEL = "timm's NAME, or hf:NAME_OR_FOLDER, torchvision:NAME, open_clip:NAME[/WEIGHTS]"
METHOD = (
    "tome merges similar tokens; guided spares those that the class token attends to; evit fuses, "
    f"and topk drops, those that it attends to least {DEFAULT}"
)
KEEP_RATE = (
    "instead of --r: the share of patch tokens to keep in the layers after a quarter, a half and "
    "three quarters of the model (4, 7 and 10 of 12)"
)
THRESHOLD = (
    "instead of --r, with --method tome or guided: the cosine similarity from which on tokens merge"
)


class Parser(argparse.ArgumentParser):
    """Tells a mistake first, and the usage, which may be long, after it: that of its command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what this parser does not know is refused here, with its usage."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Tell a mistake and exit with 2."""
        print(f"{self.prog}: error: {message}\n", file=sys.stderr)
        self.print_usage(sys.stderr)
        raise SystemExit(2)


class Version(argparse.Action):
    """Prints what is installed, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"tome_ext {version('tome_ext')}")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    top = Parser(prog="tome-ext", description="Token merging and pruning for Vision Transformers.")
    top.add_argument(
        "--version", action=Version, nargs=0, help="show program's version number and exit"
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info",
        help="say what is installed, built and in use",
        description="Print versions, what the compiled library was built for, the instruction "
        "set it uses and the devices there are. Put this in a bug report.",
    )
    add_demo(commands)
    add_eval(commands)
    add_embed(commands)
    add_bench(commands)
    add_tune(commands)
    add_models(commands)
    return top


def add_models(commands: Any) -> None:
    """The options of ``tome-ext models``."""
    models = commands.add_parser(
        "models",
        help="list the models that are supported",
        description="List the models that the patch takes, of the libraries that are installed: "
        "how many tokens they have, an r to begin with, and the share of operations it saves.",
    )
    models.add_argument(
        "pattern", nargs="?", metavar="PATTERN",
        help="part of a name, or one with * and ?; LIBRARY:PATTERN for one library (default: all)",
    )  # fmt: skip
    models.add_argument("--json", action="store_true", help="print a list of objects instead")


def add_demo(commands: Any) -> None:
    """The options of ``tome-ext demo``."""
    demo = commands.add_parser(
        "demo",
        help="run a photograph through a ViT, with and without merging",
        description="Run a photograph through a Vision Transformer, with and without token "
        "merging. Prints a table (tokens left, images/s, speed-up, agreement of the features), "
        "writes a picture of the merged regions or kept patches, and prints the accuracy of a "
        "small trained model that comes with it. Needs: pip install 'tome_ext[demo]'",
    )
    demo.add_argument(
        "picture", nargs="?", type=Path, metavar="PICTURE",
        help="a photograph of your own (default: a cup of coffee)",
    )  # fmt: skip
    demo.add_argument(
        "--model", default="vit_small_patch16_224", metavar="NAME", help=f"{MODEL} {DEFAULT}"
    )
    add_reductions(demo)
    demo.add_argument(
        "--batch-size",
        type=at_least_one,
        default=8,
        metavar="B",
        help=f"images in a forward pass {DEFAULT}",
    )
    demo.add_argument(
        "--output", type=Path, default="tome_demo.png", metavar="FILE",
        help=f"where to write the picture {DEFAULT}",
    )  # fmt: skip
    add_device(demo)
    add_dtype(demo)


def add_eval(commands: Any) -> None:
    """The options of ``tome-ext eval``."""
    evaluate = commands.add_parser(
        "eval",
        help="measure the accuracy of a ViT on a folder of pictures, with and without merging",
        description="Measure top-1 and top-5 accuracy of a Vision Transformer on a folder of "
        "pictures, FOLDER/CLASS/PICTURE, without a patch and for every amount. Prints the paper's "
        "numbers beside it where it has them. Runs under torchrun too. Needs: pip install "
        "'tome_ext[eval]'",
    )
    evaluate.add_argument("folder", type=Path, metavar="FOLDER", help="a folder for each class")
    evaluate.add_argument("--model", required=True, metavar="NAME", help=MODEL)
    add_reductions(evaluate, thresholds=True)
    add_running(evaluate, batch_size=64)
    evaluate.add_argument(
        "--limit", type=at_least_one, metavar="N",
        help="only N pictures, spread evenly over the folder",
    )  # fmt: skip
    evaluate.add_argument(
        "--skip-unreadable", action="store_true",
        help="leave out pictures that can't be read, and name them (default: an error)",
    )  # fmt: skip
    evaluate.add_argument(
        "--smaller-pictures", action="store_true",
        help="for every r and keep rate also the model without a patch, on pictures so "
        "much smaller that it costs as much",
    )  # fmt: skip
    evaluate.add_argument(
        "--json", type=Path, metavar="FILE", help="write every figure here, as they come"
    )
    evaluate.add_argument(
        "--resume", action="store_true",
        help="go on from what the file of --json has of the same run, if it is there",
    )  # fmt: skip


def add_embed(commands: Any) -> None:
    """The options of ``tome-ext embed``."""
    embed = commands.add_parser(
        "embed",
        help="write the features of a folder of pictures into a Parquet file",
        description="Write the features of every picture of a folder into a Parquet file, with "
        "merging. The same command goes on where a run was stopped. Runs under torchrun too. "
        "Needs: pip install 'tome_ext[embed]'",
    )
    embed.add_argument(
        "folder", type=Path, metavar="FOLDER", help="pictures, in it or in folders of it"
    )
    embed.add_argument("--model", required=True, metavar="NAME", help=MODEL)
    embed.add_argument("--method", choices=METHODS, help=METHOD % {"default": "tome"})
    amount = embed.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--r", type=at_least_zero, metavar="R", help="tokens to remove in every block; 0 for none"
    )
    amount.add_argument("--keep-rate", type=only(keep_rates), metavar="RATE", help=KEEP_RATE)
    amount.add_argument(
        "--threshold", type=only(similarities), metavar="SIMILARITY", help=THRESHOLD
    )
    amount.add_argument(
        "--setting", type=Path, metavar="FILE",
        help="instead of --r and --method: what tome-ext tune has found",
    )  # fmt: skip
    embed.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the Parquet file to write"
    )
    add_running(embed, batch_size=64, checkpoint=False)
    embed.add_argument(
        "--skip-unreadable", action="store_true",
        help="leave out pictures that can't be read, and name them, in place of an error",
    )  # fmt: skip


def add_tune(commands: Any) -> None:
    """The options of ``tome-ext tune``."""
    tune = commands.add_parser(
        "tune",
        help="search how many tokens each layer of a ViT should remove, on a folder of pictures",
        description="Search how many tokens each layer should remove, so that the outputs on a "
        "folder of pictures stay as near as can be to those without merging. Half of the pictures "
        "choose, the other half says what it is worth beside the same number in every layer. "
        "Needs: pip install 'tome_ext[eval]'",
    )
    tune.add_argument(
        "folder", type=Path, metavar="FOLDER", help="pictures, in it or in a folder for each class"
    )
    tune.add_argument("--model", required=True, metavar="NAME", help=MODEL)
    tune.add_argument("--method", choices=METHODS, default="tome", help=METHOD)
    goal = tune.add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--flops", type=number, metavar="SHARE",
        help="at most this share of the model's operations, such as 0.6",
    )  # fmt: skip
    goal.add_argument(
        "--speed", type=number, metavar="TIMES",
        help="at least so many times as fast, measured here, such as 1.5",
    )  # fmt: skip
    tune.add_argument(
        "--seconds", type=seconds, default=600.0, metavar="S", help=f"how long to search {DEFAULT}"
    )
    tune.add_argument(
        "--pictures", type=at_least_one, metavar="N",
        help="only N pictures, spread evenly over the folder",
    )  # fmt: skip
    tune.add_argument(
        "--seed", type=at_least_zero, default=0, metavar="N",
        help=f"of which pictures choose, and of the order of the search {DEFAULT}",
    )  # fmt: skip
    tune.add_argument(
        "--output", type=Path, default="setting.json", metavar="FILE",
        help=f"where to write what was found {DEFAULT}",
    )  # fmt: skip
    tune.add_argument(
        "--state", type=Path, metavar="FILE",
        help="write every step here, and go on from it if it is there",
    )  # fmt: skip
    add_running(tune, batch_size=32)


def add_running(command: Any, batch_size: int, checkpoint: bool = True) -> None:
    """The options of commands that run a model on a folder of pictures."""
    if checkpoint:
        command.add_argument(
            "--checkpoint", type=Path, metavar="FILE",
            help="weights for as many classes as the folder has (default: pretrained ones)",
        )  # fmt: skip
    command.add_argument(
        "--batch-size", type=at_least_one, default=batch_size, metavar="B",
        help=f"images in a forward pass {DEFAULT}",
    )  # fmt: skip
    add_device(command)
    add_dtype(command)
    command.add_argument(
        "--workers", type=at_least_zero, metavar="W",
        help="processes that read pictures; 0 reads them between runs (default: one a core)",
    )  # fmt: skip
    add_img_size(command)


def add_device(command: Any) -> None:
    """Where to run."""
    command.add_argument("--device", default="cpu", help=f"cpu, cuda, cuda:1, mps, ... {DEFAULT}")


def add_dtype(command: Any) -> None:
    """One dtype to compute in."""
    command.add_argument(
        "--dtype", choices=DTYPES, default="float32", help=f"to compute in {DEFAULT}"
    )


def add_img_size(command: Any) -> None:
    """The side of square images."""
    command.add_argument(
        "--img-size", type=at_least_one, metavar="PIXELS",
        help="side of the images (default: what the model was made for)",
    )  # fmt: skip


def add_bench(commands: Any) -> None:
    """The options of ``tome-ext bench``."""
    bench = commands.add_parser(
        "bench",
        help="measure the speed of ViTs, with and without merging",
        description="Measure the speed of Vision Transformers: unpatched, with merging, and "
        "the ceiling of what merging can give (tokens sliced off instead), all taking turns; with "
        "the published package too, where it is installed. Options with commas measure every "
        "combination. Needs: pip install 'tome_ext[bench]'",
    )
    bench.add_argument(
        "--model", type=names, default="vit_small_patch16_224", metavar="NAME,NAME,...",
        help=f"{MODEL}; with * or ? all that match and can be patched {DEFAULT}",
    )  # fmt: skip
    add_reductions(bench)
    bench.add_argument(
        "--batch-size", type=batch_sizes, default="8", metavar="B,B,...",
        help=f"images in a forward pass {DEFAULT}",
    )  # fmt: skip
    bench.add_argument(
        "--dtype", type=dtypes, default="float32", metavar="DTYPE,...",
        help=f"to compute in: {', '.join(DTYPES)} {DEFAULT}",
    )  # fmt: skip
    add_device(bench)
    bench.add_argument(
        "--mode", choices=("eager", "compile", "graphs", "onnxruntime", "openvino"),
        default="eager", help="as written, with torch.compile(fullgraph=True), as one CUDA graph, "
        f"or everyone in an inference engine on the CPU {DEFAULT}",
    )  # fmt: skip
    bench.add_argument(
        "--train", action="store_true",
        help="time forward and backward of a model that trains, with --mode eager or compile",
    )  # fmt: skip
    add_img_size(bench)
    bench.add_argument(
        "--seconds", type=seconds, default=10.0, metavar="S",
        help=f"how long to time each combination; at least five rounds {DEFAULT}",
    )  # fmt: skip
    bench.add_argument(
        "--peer", action="append", default=[], metavar="[NAME=]MODULE:FUNCTION",
        help="measure another implementation too, for every r: a function that takes a model and r "
        "and returns the patched model; MODULE may be a .py file; may be given several times",
    )  # fmt: skip
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    bench.add_argument(
        "--csv", type=Path, metavar="FILE", help="write a line of figures for every contender here"
    )
    bench.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the printed tables here as Markdown"
    )
    bench.add_argument(
        "--chart", type=Path, metavar="FILE",
        help="draw speed against r or the keep rate here (.png, .svg or .pdf)",
    )  # fmt: skip


def add_reductions(command: Any, thresholds: bool = False) -> None:
    """The options that say how tokens are reduced; ``commands.reductions_of`` reads them.

    ``thresholds`` offers these, which mean nothing without a user's own pictures.
    """
    command.add_argument(
        "--method", type=methods, default="tome", metavar="METHOD,...", help=METHOD
    )
    amount = command.add_mutually_exclusive_group()
    amount.add_argument(
        "--r", type=r_list, default="0,4,8,13", metavar="R,R,...",
        help=f"tokens to remove in every block, a run for each number {DEFAULT}",
    )  # fmt: skip
    amount.add_argument(
        "--keep-rate", type=keep_rates, metavar="RATE,...",
        help=f"{KEEP_RATE}, a run for each number",
    )  # fmt: skip
    if thresholds:
        amount.add_argument(
            "--threshold", type=similarities, metavar="SIMILARITY,...",
            help=f"{THRESHOLD}, a run for each number; images of a batch with fewer tokens than "
            "others are padded, so smaller batches gain more",
        )  # fmt: skip


def methods(text: str) -> tuple[str, ...]:
    """Parse "tome,evit" for argparse."""
    found = names(text)
    if not set(found) <= set(METHODS):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(METHODS)}; got {text!r}")
    return found


def keep_rates(text: str) -> tuple[float, ...]:
    """Parse "0.5,0.7" for argparse; numbers given twice count once."""
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = (0.0,)
    if not all(0 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            "expected numbers above 0 and up to 1 with commas between, such as 0.5,0.7; "
            f"got {text!r}"
        )
    return values


def similarities(text: str) -> tuple[float, ...]:
    """Parse "0.8,0.9" for argparse; numbers given twice count once."""
    try:
        values = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        values = (2.0,)
    if not all(-math.inf < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            "expected cosine similarities of at most 1 with commas between, such as 0.8,0.9; "
            f"got {text!r}"
        )
    return values


def only(parse: Callable[[str], tuple[float, ...]]) -> Callable[[str], float]:
    """A parser of one number, of one that parses several."""

    def parse_one(text: str) -> float:
        values = parse(text)
        if len(values) != 1:
            raise argparse.ArgumentTypeError(f"expected one number, got {text!r}")
        return values[0]

    return parse_one


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


def at_least_zero(text: str) -> int:
    """Parse a number of 0 or more for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return int(text)


def batch_sizes(text: str) -> tuple[int, ...]:
    """Parse "1,8" for argparse; numbers given twice count once."""
    return tuple(dict.fromkeys(at_least_one(part.strip()) for part in text.split(",")))


def names(text: str) -> tuple[str, ...]:
    """Parse "a,b" for argparse; names given twice count once."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def dtypes(text: str) -> tuple[str, ...]:
    """Parse "float32,bfloat16" for argparse."""
    found = names(text)
    for name in found:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(DTYPES)}; got {name!r}")
    return found


def number(text: str) -> float:
    """Parse a number above 0 for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def seconds(text: str) -> float:
    """Parse a time for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds, got {text!r}")
    return value
