"""Measuring every setting of a run, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _models, _supported
from .._command import (
    CommandError,
    Reduction,
    check_patch,
    find_device,
    one_line,
    out_of_memory,
)
from .._files import check_writable, replacing, write_json
from . import _chart, _rows
from ._contenders import (
    CEILING,
    OURS,
    STANDARD,
    UNPATCHED,
    Peer,
    ceiling,
    count_tokens,
    counted_in,
    find_peers,
    runner,
    share_weights,
)
from ._cost import count_flops, extra_memory
from ._engines import ENGINES, check_engine, engine_runner
from ._rows import Cost, Row
from .timing import describe_machine, interleave

__all__ = ["Options", "run"]

WARM_UP = 2  # rounds, after the forwards that count tokens and operations
FEWEST_ROUNDS = 5
MOST_TRIES = 3  # to find times whose ratios agree with them


@dataclass(frozen=True)
class Options:
    """What to measure: every combination of models, dtypes, batch sizes and reductions.

    Attributes:
        models: names, ``[LIBRARY:]NAME``; without a library they are timm's. With * or ? all
            that match and can be patched.
        reductions: how, and how far, tokens are reduced.
        batch_sizes: images a forward.
        dtypes: names of torch dtypes.
        device: where to run.
        mode: "eager"; "compile", ``torch.compile(model, fullgraph=True)``; "graphs", one CUDA
            graph of the whole forward; or an engine, "onnxruntime" or "openvino", in which
            everyone runs.
        train: time a forward in training mode and the gradients of all weights, of a loss of all
            outputs, without an optimizer; "eager" and "compile" can. Operations are the forward's.
        image_size: pixels a side; None means what each model was made for.
        seconds: how long to time each combination, all contenders together; at least five rounds.
        peers: further implementations, ``[NAME=]MODULE:FUNCTION`` each; they take r.
        json: where to write every figure; None for nowhere.
        csv: where to write a line for every contender of every combination.
        markdown: where to write the tables, for a document.
        chart: where to draw speed against the amount, as .png, .svg or .pdf; None for nowhere.
    """

    models: tuple[str, ...]
    reductions: tuple[Reduction, ...]
    batch_sizes: tuple[int, ...] = (8,)
    dtypes: tuple[str, ...] = ("float32",)
    device: str = "cpu"
    mode: str = "eager"
    train: bool = False
    image_size: int | None = None
    seconds: float = 10.0
    peers: tuple[str, ...] = ()
    json: Path | None = None
    csv: Path | None = None
    markdown: Path | None = None
    chart: Path | None = None


def run(options: Options) -> list[Row]:
    """Measure, print a table, and write what the options ask for.

    Raises:
        CommandError: a model, device, peer, mode or file that is not there or can't be used.
    """
    from tqdm import tqdm

    device = find_device(options.device)
    options = replace(options, models=_supported.expand(options.models))
    check(options, device)
    peers = [] if options.mode in ENGINES else find_peers(options.peers)
    machine = describe_machine(device)
    settings = {
        "device": str(device),
        "mode": options.mode,
        "train": options.train,
        "seconds": options.seconds,
        "weights": "random",
        "peers": list(options.peers),
    }
    print(f"running on  {_rows.hardware(machine)}")
    print(f"mode        {_rows.how(settings)}")
    print("weights     random; speed does not depend on them", flush=True)

    rows: list[Row] = []
    per_model = len(options.batch_sizes) * len(options.reductions)
    bar = tqdm(
        total=len(options.models) * len(options.dtypes) * per_model,
        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining} {desc}",
        leave=False,
        disable=None,  # into a pipe
    )
    with bar, on_device(device):
        for name, dtype in itertools.product(options.models, options.dtypes):
            model = _models.features(name, img_size=options.image_size, head=True)
            model.module.to(device, getattr(torch, dtype))
            # Methods one after the other, each with its batch sizes and amounts.
            by_method = itertools.groupby(options.reductions, lambda each: each.method)
            for batch_size, reduction in [
                pair
                for _, group in by_method
                for pair in itertools.product(options.batch_sizes, list(group))
            ]:
                bar.set_description_str(f"{name} {dtype} B={batch_size} {reduction}")
                done = len(rows)

                def show(share: float, done: int = done) -> None:
                    bar.update(done + share - bar.n)

                x = model.images(batch_size)
                figures, left_out, rounds = measure(
                    model.module,
                    x,
                    reduction,
                    options.mode,
                    options.seconds,
                    peers,
                    show,
                    options.train,
                )
                amount = reduction.method, reduction.r, reduction.keep_rate
                size = model.shape[-2], model.shape[-1]
                row = Row(name, size, dtype, batch_size, *amount, rounds, figures, left_out)
                if not rows or _rows.title(row) != _rows.title(rows[-1]):
                    bar.write(f"\n{_rows.title(row)}\n{_rows.heading(row)}")
                bar.write("\n".join(_rows.lines(row)))
                rows.append(row)
                write(options, machine, settings, rows)  # every row: a long run may be stopped
    print(f"\n{_rows.NOTE}")
    if options.chart is not None:
        drawn = _chart.draw(rows, machine, settings)
        with replacing(options.chart) as part:
            drawn.savefig(part, format=options.chart.suffix[1:].lower())
        print(f"\nThe chart: {options.chart}")
    return rows


def write(
    options: Options, machine: dict[str, Any], settings: dict[str, Any], rows: list[Row]
) -> None:
    """Write what was measured so far to the files that were asked for."""
    if options.json is not None:
        content = {"machine": machine, "settings": settings, "rows": [asdict(row) for row in rows]}
        write_json(options.json, content)
    if options.csv is not None:
        with replacing(options.csv) as part:
            part.write_text(_rows.csv_text(rows, machine, settings), encoding="utf-8")
    if options.markdown is not None:
        with replacing(options.markdown) as part:
            part.write_text(_rows.markdown(rows, machine, settings), encoding="utf-8")


def check(options: Options, device: torch.device) -> None:
    """Refuse what can't be measured, before anything is."""
    if options.mode in ENGINES:
        check_engine(options.mode, device, options.dtypes)
        if options.peers:
            raise CommandError(f"--mode {options.mode}: expected no --peer, got {options.peers[0]}")
    if options.train and options.mode not in ("eager", "compile"):
        raise CommandError(f"--train: expected --mode eager or compile, got {options.mode}")
    if options.mode == "graphs" and device.type != "cuda":
        raise CommandError(f"graphs are CUDA graphs: expected --device cuda, got {device}")
    for path in (options.json, options.csv, options.markdown, options.chart):
        if path is not None:
            check_writable(path)
    chart = options.chart
    if chart is not None and chart.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise CommandError(f"can't write {chart}: name it .png, .svg or .pdf")
    for name in options.models:
        _models.split(name)
    for name in options.models:
        model = _models.features(name, img_size=options.image_size, head=True)
        check_patch(model.module, options.reductions)
        _models.layout(model)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Streams and events are of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def measure(
    model: Any,
    x: Tensor,
    reduction: Reduction,
    mode: str,
    seconds: float,
    peers: list[Peer],
    on_progress: Callable[[float], object] | None = None,
    train: bool = False,
) -> tuple[dict[str, _rows.Figures], dict[str, str], int]:
    """Time all contenders on the images ``x``, forward or, to ``train``, backward too.

    Returns:
        The figures by contender; by name why a peer was left out; the number of rounds.

    Raises:
        RuntimeError: the ceiling and the patched model don't have the same tokens in every layer.
        CommandError: out of memory.
    """
    if mode == "compile":
        torch._dynamo.reset()  # every setting is compiled for itself, and torch counts them
    runs: dict[str, Callable[[], object]] = {}
    costs: dict[str, Cost] = {}
    left_out: dict[str, str] = {}
    places = counted_in(model)
    model = share_weights(model).train(train).requires_grad_(train)

    seen = mode in ("eager", "graphs")  # what lives between operators

    def enter(name: str, contender: Any, made: Callable[[], object] | None = None) -> None:
        tokens = count_tokens(contender, x, places)
        if CEILING in costs and tokens != costs[CEILING].tokens:
            raise RuntimeError(
                f"tokens by layer: expected those of the ceiling, {costs[CEILING].tokens}, "
                f"got {tokens} in {name}"
            )
        flops = count_flops(lambda: contender(x)) // len(x)
        run = runner(contender, x, mode, train) if made is None else made
        run()  # what fails, fails here; and it compiles
        measured = runner(contender, x, "eager", train) if seen else run
        memory = extra_memory(measured, x.device, compiled=not seen)
        runs[name], costs[name] = run, Cost(tokens, flops, memory)

    try:
        with torch.enable_grad() if train else torch.inference_mode():
            enter(UNPATCHED, share_weights(model))
            enter(CEILING, ceiling(model, reduction, x))
            ours = reduction.patch(share_weights(model), inference=not train)
            enter(OURS, ours)
            if mode in ENGINES:
                enter(STANDARD, ours, engine_runner(mode, ours, x, "standard"))
            for peer in peers:
                if reduction.keep_rate is not None:
                    left_out[peer.name] = "it takes r, not a keep rate"
                    continue
                try:
                    enter(peer.name, peer.patch(share_weights(model), reduction.r))
                except Exception as error:  # one that does not know this model may raise any
                    left_out[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())
            for _ in range(MOST_TRIES):
                times = interleave(runs, seconds, x.device, WARM_UP, FEWEST_ROUNDS, on_progress)
                figures = _rows.summarize(times, costs, len(x))
                if not any(each.unsteady for each in figures.values()):
                    break
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise CommandError(f"a batch of {len(x)} does not fit: {one_line(error)}") from None
    return figures, left_out, len(times[OURS])
