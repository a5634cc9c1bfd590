"""``tome-ext tune``: search the best schedule of a model on a folder of pictures."""

from __future__ import annotations

from pathlib import Path

import torch

from . import _models
from ._command import CommandError, check_patch, find_device, say
from ._files import check_writable
from ._world import World
from .evaluate import Share, loader, told_in_a_line
from .patch.common.methods import MethodName
from .setting import Figures, Setting
from .tuning import tune

__all__ = ["run"]


def run(
    folder: Path,
    model_name: str,
    *,
    flops: float | None = None,
    speed: float | None = None,
    method: MethodName = "tome",
    seconds: float = 600.0,
    seed: int = 0,
    pictures: int | None = None,
    batch_size: int = 32,
    device_name: str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    output: Path = Path("setting.json"),
    state: Path | None = None,
) -> Setting:
    """Search, print a table, write the setting; returns it.

    With pretrained weights the model's pooled features are compared, with a checkpoint its logits.
    See :func:`tome_ext.tune` and :func:`tome_ext.evaluate.run` for the arguments; ``pictures`` is
    how many to take of the folder.

    Raises:
        CommandError: a folder, model, weights, device, goal or file that is not there or can't be
            used; a picture that can't be read; fewer than eight.
    """
    for path in (output, state):
        if path is not None:
            check_writable(path)
    device = find_device(device_name)
    alone = World(0, 0, 1)
    workers = alone.cores if workers is None else workers
    share = Share.of(folder, alone, pictures, labelled=checkpoint is not None)
    say(f"loading {model_name} ...")
    if checkpoint is not None:
        model = _models.logits(model_name, share.classes, checkpoint, img_size)
    else:
        model = _models.features(model_name, pretrained=True, img_size=img_size)
        if model.missing is not None:
            raise CommandError(
                f"can't load pretrained weights of {model_name!r} ({model.missing}); give weights "
                "of your own with --checkpoint FILE"
            )
    check_patch(model.module, ())
    say(f"reading {len(share)} pictures ...")
    with told_in_a_line():
        read = loader(share, model.data, batch_size, torch.device("cpu"), torch.float32, workers)
        batches = [x for x, _ in read]
    say(f"searching for {seconds:g} s ...")
    try:
        setting = tune(
            model.module.to(device, dtype),
            batches,
            flops=flops,
            speed=speed,
            method=method,
            seconds=seconds,
            seed=seed,
            batch_size=batch_size,
            state=state,
        )
        setting.save(output)
    except ValueError as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"can't use {error.filename}: {error.strerror or error}") from None
    except KeyboardInterrupt:
        if state is None:
            say("\nstopped; nothing is kept without --state FILE")
        else:
            say(f"\nstopped; the same command goes on from {state}")
        raise
    print(table(setting))
    print(f"\n{setting.verdict}")
    print(f"\nTo use {output}:\n\n    import tome_ext")
    print(f'    tome_ext.patch.auto(model, setting="{output}")')
    return setting


def table(setting: Setting) -> str:
    """The constant and the found schedule, on the reporting half, as text."""
    report = setting.report
    speeds = report.constant_speed, report.found_speed
    with_speed = None not in speeds
    lines = [
        f"deviation (1 - cosine) on {report.pictures} pictures that the search has not seen",
        "",
        f"{'':<8}  {'FLOPs':>6}" + (f"  {'speed':>6}" if with_speed else "")
        + f"  {'mean':>9}  {'median':>9}  {'95%':>9}  r",
    ]  # fmt: skip

    def line(name: str, r: list[int], flops: float, speed: float | None, figures: Figures) -> str:
        values = figures.mean, figures.median, figures.percentile_95
        return (
            f"{name:<8}  {flops:>6.3f}"
            + ("" if speed is None else f"  {speed:>5.2f}x")
            + "".join(f"  {value:>9.3g}" for value in values)
            + f"  {','.join(map(str, r))}"
        )

    constant = report.constant, report.constant_flops, speeds[0], report.constant_deviation
    found = report.found, report.found_flops, speeds[1], report.found_deviation
    return "\n".join([*lines, line("constant", *constant), line("found", *found)])
