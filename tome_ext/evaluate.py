"""``tome-ext eval``: how often a ViT is right about a folder of pictures.

Without a patch, and for every setting of it.

Needs timm, torchvision, pillow and tqdm (``pip install 'tome_ext[eval]'``), imported when it runs,
and the model's library.
Works in one process, or in many under ``torchrun``.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, get_worker_info

from . import _models
from ._command import CommandError, Reduction, check_patch, find_device, patched, say
from ._files import (
    UnreadableError,
    check_writable,
    list_pictures,
    natural_key,
    open_picture,
    read_progress,
    write_json,
)
from ._world import World
from .bench._cost import count_flops
from .patch.common.methods import MethodName
from .utils import info, synchronize

__all__ = ["Row", "Share", "run"]

# The paper's top-1 in per cent, by r. Its AugReg models are these of timm's; its DeiT and MAE
# models were trained with ToMe, and timm's were not.
PAPER = {
    "vit_small_patch16_224.augreg_in21k_ft_in1k": {0: 81.41, 13: 79.30},
    "vit_base_patch16_224.augreg_in21k_ft_in1k": {0: 84.57, 13: 82.60},
    "vit_large_patch16_224.augreg_in21k_ft_in1k": {0: 85.82, 7: 84.26},
    "vit_large_patch16_384.augreg_in21k_ft_in1k": {0: 86.92, 23: 86.14},
}
SPLITS = ("validation", "val", "valid", "eval", "evaluation")  # folders inside FOLDER, by rank
BETWEEN_WRITES = 10.0  # about how many seconds of pictures a process that is killed may lose


@dataclass(frozen=True)
class SmallerPicture:
    """The model without a patch, on pictures of so many pixels a side.

    Attributes:
        side: pixels.
        like: names of the rows that cost as much, as nearly as whole patches allow.
    """

    side: int
    like: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.side} px, as {', '.join(self.like)}"


Setting = Reduction | SmallerPicture | None  # None is the model without a patch


@dataclass(frozen=True)
class Row:
    """One line of the table, over the pictures of all processes."""

    method: MethodName | None  # None is the model without a patch
    r: int
    keep_rate: float | None
    threshold: float | None
    images: int
    top1: float  # per cent
    top5: float  # per cent
    lost: float  # points of top-1 that the unpatched model has more
    lost_error: float  # standard error of that: each picture is compared with itself
    images_per_second: float  # of all processes together, in the model: without loading
    paper: float | None  # top-1 in per cent, where the paper has this model and r
    smaller: SmallerPicture | None = None

    @property
    def reduction(self) -> Reduction:
        """What the model was patched with; of the model without a patch, nothing."""
        method = self.method or Reduction().method
        return Reduction(method, self.r, self.keep_rate, self.threshold)

    @property
    def name(self) -> str:
        """What the line begins with."""
        if self.smaller is not None:
            return str(self.smaller)
        return "unpatched" if self.method is None else self.reduction.row_name


def run(
    folder: Path,
    model_name: str,
    reductions: tuple[Reduction, ...],
    *,
    batch_size: int = 64,
    device_name: str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    limit: int | None = None,
    skip_unreadable: bool = False,
    smaller_pictures: bool = False,
    json_file: Path | None = None,
    resume: bool = False,
) -> list[Row]:
    """Print a table of accuracy and speed; returns its rows, in every process.

    The model without a patch comes first, which the others are compared with and which stands for
    r = 0. Under ``torchrun`` each process takes its share of the pictures, and the
    first one prints. What is counted is printed when the command is interrupted, too.

    Args:
        folder: pictures as FOLDER/CLASS/PICTURE, or with a split (FOLDER/val/CLASS/PICTURE).
            Classes are numbered in the order of their names.
        model_name: ``[LIBRARY:]NAME``; without a library it is timm's, with or without the tag of
            its weights.
        reductions: how to reduce tokens, a row for each.
        batch_size: pictures a forward pass.
        device_name: under ``torchrun``, "cuda" gives every process of a machine a GPU of its own.
        dtype: the model and its input are cast to it.
        workers: processes that read pictures, per process that evaluates; by default as many
            as it has cores.
        checkpoint: weights to use in place of the pretrained ones, for as many classes as the
            folder has.
        img_size: side of the input in pixels; the model's own by default.
        limit: only so many pictures, spread evenly over the folder.
        skip_unreadable: leave pictures out that can't be read, and name them, in place of an error.
        smaller_pictures: also, for every r and keep rate, the model without a patch on pictures of
            the size at which its operations are nearest.
        json_file: where to write the rows and what they were measured with, every few seconds.
        resume: go on from ``json_file``, if it is there.

    Raises:
        CommandError: a folder, model, checkpoint, device or file that is not there or can't be
            used; a picture that can't be read; NaN or infinite output.
        SystemExit: another process of ``torchrun`` has raised a CommandError before work began.
    """
    with World.join() as world:

        def prepare() -> tuple[torch.device, Share, _models.Model, dict[Setting, Any]]:
            if resume and json_file is None:
                raise CommandError("--resume goes on from a file of results: expected --json FILE")
            if json_file is not None and world.rank == 0:
                check_writable(json_file)
            device = find_device(world.device_name(device_name))
            share = Share.of(folder, world, limit)
            share.skip_unreadable = skip_unreadable
            if world.rank == 0:
                say(f"loading {model_name} ...")
            loaded = load_model(model_name, share, checkpoint, img_size)
            check_patch(loaded.module, reductions)
            model = loaded.module.to(device, dtype)
            models = dict.fromkeys([None, *(each for each in reductions if each.reduces)], model)
            if smaller_pictures:
                smaller, without = as_costly(loaded, models, model_name, share.classes, checkpoint)
                models |= smaller
                if without and world.rank == 0:
                    say(
                        "no smaller picture is as near to the operations of "
                        f"{', '.join(without)} as the whole"
                    )
            return device, share, loaded, models

        device, share, loaded, models = world.agree(prepare, lambda prepared: prepared[1].digest)
        name, config, settings = loaded.name, loaded.data, tuple(models)
        run_of = {  # what results must have in common to be added up
            "model": name,
            "weights": "pretrained" if checkpoint is None else str(checkpoint),
            "folder": str(share.root),
            "classes": len(share.classes),
            "pictures": share.total,
            "pictures_sha256": share.digest,
            "settings": [None if each is None else asdict(each) for each in settings],
            **config,
            "batch_size": batch_size,
            "dtype": str(dtype).removeprefix("torch."),
            "device": device.type,
            "skip_unreadable": skip_unreadable,
            "weights_sha256": None if json_file is None else _models.digest_of(loaded.module),
        }
        report = {
            **run_of,
            "processes": world.size,
            "threads": torch.get_num_threads(),
            # Of the process that writes them: asking starts CUDA on the first GPU.
            "versions": info() if json_file is not None and world.rank == 0 else {},
        }
        begin = Tally.none(len(settings))
        if resume and json_file is not None:
            begin = world.from_first(lambda: Tally.resumed(json_file, run_of, begin))
        share.skip(begin.done)
        if world.rank == 0:
            print(header(report), flush=True)
            if begin.done:
                print(f"resumed     after {begin.done} pictures", flush=True)
        as_published = checkpoint is None and is_imagenet(share) and loaded.own_size
        paper = PAPER.get(name, {}) if as_published else {}

        def write(tally: Tally) -> None:
            if json_file is not None and world.rank == 0:
                rows = rows_of(settings, tally, paper)
                write_json(json_file, {**report, **tally.content(share),
                                       "results": [asdict(row) for row in rows]})  # fmt: skip

        def show(tally: Tally) -> None:
            if world.rank == 0:
                print("\n" + table(rows_of(settings, tally, paper)))
                if tally.unreadable:
                    print(f"\nleft out, as they can't be read: {len(tally.unreadable)}")
                    print("\n".join(f"  {path}" for path in tally.unreadable))

        workers = world.cores if workers is None else workers
        batches = loader(share, config, batch_size, device, dtype, workers)
        counter = Counter(world, device, share, batch_size, settings, begin)
        try:
            counter.count(models, batches, write)
        except KeyboardInterrupt:
            seen = counter.seen()
            if world.rank == 0:
                again = "; the same command with --resume goes on" if json_file else ""
                say(f"\nstopped after {seen.done} of {share.total} pictures{again}")
            if seen.done > len(seen.unreadable):
                write(seen)
                show(seen)
            raise
        tally = counter.seen()
        if not tally.counts[0, 0]:
            raise CommandError(f"none of the {share.total} pictures in {share.root} can be read")
        show(tally)
    return rows_of(settings, tally, paper)


def as_costly(
    loaded: _models.Model,
    settings: Iterable[Setting],
    spec: str,
    classes: list[str],
    checkpoint: Path | None,
) -> tuple[dict[Setting, Any], list[str]]:
    """For every r and keep rate the size of picture that costs the model as much, and the model.

    Also the names of those for which no size is nearer than the whole picture.
    """
    _, height, width = loaded.shape
    if height != width:
        raise CommandError(
            f"--smaller-pictures: expected a model of square pictures, got {height} x {width}"
        )
    weight = next(loaded.module.parameters())
    known = {height: loaded.module}

    @torch.inference_mode()
    def operations(side: int, reduction: Reduction | None = None) -> int:
        if side not in known:
            known[side] = _models.smaller(loaded, spec, classes, checkpoint, side).to(weight)
        x = torch.zeros(1, 3, side, side, device=weight.device, dtype=weight.dtype)
        with patched(known[side], reduction):
            return count_flops(lambda: known[side](x))

    cost = functools.cache(operations)
    sides = range(loaded.patch[0], height + 1, loaded.patch[0])
    like: dict[int, list[str]] = {}
    for setting in settings:
        if isinstance(setting, Reduction) and setting.threshold is None:
            goal = operations(height, setting)
            # The first that costs as much, or the one before it.
            place = bisect.bisect_left(sides, goal, key=cost)
            near = sides[max(0, place - 1) : place + 1]
            side = min(near, key=lambda side: abs(cost(side) - goal))
            like.setdefault(side, []).append(setting.row_name)
    without = like.pop(height, [])
    return {
        SmallerPicture(side, tuple(names)): known[side] for side, names in like.items()
    }, without


def rows_of(settings: tuple[Setting, ...], tally: Tally, paper: dict[int, float]) -> list[Row]:
    """The lines of the table; ``tally`` has at least one picture."""
    rows = []
    for setting, (n, top1, top5, lost, won), time_taken in zip(
        settings, tally.counts.tolist(), tally.seconds.tolist(), strict=True
    ):
        reduction = setting if isinstance(setting, Reduction) else None
        smaller = setting if isinstance(setting, SmallerPicture) else None
        shown = reduction or Reduction()
        listed = smaller is None and shown == Reduction(r=shown.r)
        rows.append(
            Row(
                method=None if reduction is None else reduction.method,
                r=shown.r,
                keep_rate=shown.keep_rate,
                threshold=shown.threshold,
                images=n,
                top1=100 * top1 / n,
                top5=100 * top5 / n,
                lost=100 * (lost - won) / n,
                # Of a sum of n differences, each -1, 0 or 1.
                lost_error=100 * math.sqrt(lost + won - (lost - won) ** 2 / n) / n,
                images_per_second=n / time_taken,
                paper=paper.get(shown.r) if listed else None,
                smaller=smaller,
            )
        )
    return rows


# --- pictures -----------------------------------------------------------------------------------


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Turns a picture that can't be read, of a loader that is read inside, into a CommandError."""
    try:
        yield
    except UnreadableError as error:
        # From a worker it comes with a traceback, and the message is the last line of that.
        line = str(error).splitlines()[-1]
        name = f"{UnreadableError.__module__}.{UnreadableError.__qualname__}: "
        raise CommandError(line.removeprefix(name)) from None


def _unless_left_alone(kind: Any, error: BaseException, trace: Any) -> None:
    """What a process that reads pictures prints of an error that nobody catches.

    Nothing if it lost who it reads for: a thread of its own, which hands pictures over, prints a
    traceback when that process is stopped in the midst of it.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


class Share(Dataset[tuple[Any, int]]):
    """The pictures of one process, in a form that ``timm.data.create_loader`` takes.

    timm's own ``ImageDataset`` goes on with the next picture when it can't read one.
    """

    transform: Callable[[Any], Any]  # set by create_loader
    skip_unreadable = False  # give black for a picture that can't be read, in place of an error

    def __init__(
        self, root: Path, classes: list[str], samples: list[tuple[str, int]], world: World
    ) -> None:
        self.root = root
        self.classes = classes
        self.world = world
        self.all = samples
        self.total = len(samples)
        listed = [(os.path.relpath(path, root), target) for path, target in samples]
        self.digest = hashlib.sha256(repr(listed).encode()).hexdigest()
        self.skip(0)

    def skip(self, done: int) -> None:
        """Leave out the first ``done`` pictures of all, which are counted already."""
        self.samples = self.all[done + self.world.rank :: self.world.size]

    @classmethod
    def of(cls, folder: Path, world: World, limit: int | None, labelled: bool = True) -> Share:
        """List a folder, or the split in it; unless ``labelled``, pictures may lie in it itself.

        Its classes are the names of the folders that pictures lie in, numbered as timm does.
        """
        root = next((folder / name for name in SPLITS if (folder / name).is_dir()), folder)
        paths = list_pictures(root)
        if not paths:
            raise CommandError(
                f"no pictures in {folder}; expected FOLDER/CLASS/PICTURE, each .png, .jpg or .jpeg"
            )
        names = [Path(path).parent for path in paths]
        if labelled and root in names:
            raise CommandError(
                f"pictures lie in {root} itself; expected them in a folder per class"
            )
        classes = sorted({name.name for name in names}, key=lambda name: (natural_key(name), name))
        number = {name: i for i, name in enumerate(classes)}
        samples = [(path, number[name.name]) for path, name in zip(paths, names, strict=True)]
        if limit is not None and limit < len(samples):
            # All classes get their part: the pictures are sorted by class.
            samples = [samples[i * len(samples) // limit] for i in range(limit)]
        return cls(root, classes, samples, world)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """The picture, transformed, and its class; of one that is skipped -1 - index."""
        if get_worker_info() is not None:
            sys.excepthook = _unless_left_alone
        path, target = self.samples[index]
        try:
            rgb = open_picture(path)
        except UnreadableError:
            if not self.skip_unreadable:
                raise
            from PIL import Image

            return self.transform(Image.new("RGB", (8, 8))), -1 - index
        return self.transform(rgb), target


def is_imagenet(share: Share) -> bool:
    """Whether the classes are those of ImageNet-1k, by their WordNet numbers."""
    from timm.data import ImageNetInfo

    return share.classes == list(ImageNetInfo("imagenet-1k").label_names())


def loader(
    share: Share,
    config: dict[str, Any],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    workers: int,
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of normalised pictures and their classes on the device, as timm's validate does."""
    from timm.data import create_loader

    if len(share) == 0:  # fewer pictures than processes
        return []
    dataset: Any = share  # of no class of timm's, but with all that is asked of one
    batches: Iterable[tuple[Tensor, Tensor]] = create_loader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        persistent_workers=False,
        pin_memory=device.type == "cuda",
        device=device,
        img_dtype=dtype,
        **config,
    )
    return batches


# --- model --------------------------------------------------------------------------------------


def load_model(
    name: str, share: Share, checkpoint: Path | None, img_size: int | None
) -> _models.Model:
    """A model that has the folder's classes and returns logits."""
    model = _models.logits(name, share.classes, checkpoint, img_size)
    if model.classes != len(share.classes):
        raise CommandError(
            f"{name!r} has {model.classes} classes, but {share.root} has {len(share.classes)}; for "
            "a model fine-tuned on these, give its weights with --checkpoint FILE"
        )
    return model


# --- counting -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """What is counted of the first ``done`` pictures.

    Attributes:
        done: pictures, those that can't be read among them.
        counts: (settings, 5) int64: pictures; right in the first, and among the first five answers;
            wrong where the unpatched model is right, and the other way round.
        seconds: (settings,) float64 in the model.
        unreadable: paths of pictures that were left out.
    """

    done: int
    counts: Tensor
    seconds: Tensor
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def none(cls, settings: int) -> Tally:
        """Nothing yet."""
        return cls(0, torch.zeros(settings, 5, dtype=torch.int64), torch.zeros(settings).double())

    @classmethod
    def resumed(cls, file: Path, run_of: dict[str, Any], otherwise: Tally) -> Tally:
        """What an earlier run has counted, if the file is there."""
        if not file.exists():
            return otherwise
        found = read_progress(file, run_of)
        try:
            counts = torch.tensor(found["counts"], dtype=torch.int64)
            seconds = torch.tensor(found["seconds"], dtype=torch.float64)
            done, unreadable = int(found["done"]), list(found["unreadable"])
        except (KeyError, TypeError, ValueError):
            raise CommandError(f"can't resume from {file}: it holds no counts") from None
        if counts.shape != otherwise.counts.shape or seconds.shape != otherwise.seconds.shape:
            raise CommandError(f"can't resume from {file}: it holds counts of other settings")
        return cls(done, counts, seconds, unreadable)

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(
            self.done + other.done,
            self.counts + other.counts,
            self.seconds + other.seconds,
            self.unreadable + other.unreadable,
        )

    def content(self, share: Share) -> dict[str, Any]:
        """For the file of results."""
        return {
            "complete": self.done == share.total,
            "done": self.done,
            "counts": self.counts.tolist(),
            "seconds": self.seconds.tolist(),
            "unreadable": self.unreadable,
        }


class Counter:
    """Runs pictures with every setting, and counts; processes add up what they have now and then.

    Process i of n takes pictures i, i + n, ... of those left, so after every batch a beginning of
    the list is done, from which any number of processes can go on.
    """

    def __init__(
        self,
        world: World,
        device: torch.device,
        share: Share,
        batch_size: int,
        settings: tuple[Setting, ...],
        begin: Tally,
    ) -> None:
        self.world, self.device, self.share = world, device, share
        self.step = batch_size * world.size  # pictures of all processes in a batch of each
        self.settings = settings
        self.begin = begin
        self.own = Tally.none(len(settings))  # of this process since it began
        self.agreed = begin  # of all processes, at the last time that they met

    def seen(self) -> Tally:
        """What is known here to be counted."""
        return self.begin.plus(self.own) if self.world.size == 1 else self.agreed

    def count(
        self,
        models: dict[Setting, Any],
        batches: Iterable[tuple[Tensor, Tensor]],
        write: Callable[[Tally], None],
    ) -> None:
        """Run every batch with every setting, so each picture is read once.

        The settings take turns in a new order for every batch, as in ``tome-ext bench``: readers
        are busiest just after a batch has come, and should not slow the same one each time.

        Raises:
            CommandError: a picture that can't be read, or output that is not finite.
        """
        from tqdm import tqdm

        left = self.share.total - self.begin.done
        rounds = -(-left // self.step)
        order = list(range(len(self.settings)))
        shuffle = random.Random(0).shuffle
        own = iter(batches)
        pace = 1
        bar = tqdm(
            total=self.share.total,
            initial=self.begin.done,
            desc="evaluating",
            unit="img",
            disable=self.world.hides_progress,
        )
        with bar as progress, told_in_a_line():
            for turn in range(1, rounds + 1):
                batch = next(own, None)  # a process may have one less than others
                done = min(turn * self.step, left) - self.own.done
                start = time.perf_counter()
                if batch is None:
                    self.own = self.own.plus(Tally(done, *_zeros(self.own)))
                else:
                    shuffle(order)
                    self.own = self.own.plus(self._batch(models, *batch, order, done, turn == 1))
                if turn == 1:
                    taken = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
                    self.world.reduce(torch.zeros(1, dtype=torch.int64), taken, self.device)
                    pace = max(1, round(BETWEEN_WRITES / taken.item()))
                if turn % pace == 0 or turn == rounds:
                    self._meet()
                    write(self.agreed)
                progress.update(done)

    def _meet(self) -> None:
        counts, seconds = self.own.counts.clone(), self.own.seconds.clone()
        self.world.reduce(counts, seconds, self.device)
        unreadable = [path for paths in self.world.gather(self.own.unreadable) for path in paths]
        self.agreed = self.begin.plus(Tally(self.own.done, counts, seconds, unreadable))

    def _batch(
        self,
        models: dict[Setting, Any],
        x: Tensor,
        target: Tensor,
        order: list[int],
        done: int,
        warm_up: bool,
    ) -> Tally:
        counts, seconds = _zeros(self.own)
        unreadable = [self.share.samples[-1 - i][0] for i in target.tolist() if i < 0]
        if unreadable:
            x, target = x[target >= 0], target[target >= 0]
        if len(x) == 0:
            return Tally(done, counts, seconds, unreadable)
        right = torch.zeros(len(self.settings), 2, len(x), dtype=torch.int64)
        answers: dict[int, Tensor] = {}
        for i in order:
            setting = self.settings[i]
            for _ in range(2 if warm_up else 1):
                answers[i], seconds[i] = timed(models[setting], x, setting)
        for i, setting in enumerate(self.settings):
            if not answers[i].isfinite().all():
                raise CommandError(
                    f"{setting or 'unpatched'}: NaN or infinite output of the model in "
                    f"{str(x.dtype).removeprefix('torch.')}"
                )
            hits = answers[i].topk(min(5, answers[i].shape[1])).indices == target[:, None]
            right[i] = torch.stack([hits[:, 0], hits.any(1)])
        change = right[0, 0] - right[:, 0]  # 1 where only the unpatched model is right
        counts[:, 0] = len(x)
        counts[:, 1:3] = right.sum(2)
        counts[:, 3], counts[:, 4] = (change > 0).sum(1), (change < 0).sum(1)
        return Tally(done, counts, seconds, unreadable)


def _zeros(like: Tally) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(like.counts), torch.zeros_like(like.seconds)


@torch.inference_mode()
def timed(model: Any, x: Tensor, setting: Setting) -> tuple[Tensor, float]:
    """The logits (B, classes), and the seconds it took, without making pictures smaller."""
    if isinstance(setting, SmallerPicture):
        size = setting.side, setting.side
        x = F.interpolate(x.float(), size, mode="bicubic", antialias=True).to(x.dtype)
    with patched(model, setting if isinstance(setting, Reduction) else None):
        synchronize(x.device)
        start = time.perf_counter()
        logits = model(x)
        synchronize(x.device)
        return logits, time.perf_counter() - start


# --- output -------------------------------------------------------------------------------------


def header(report: dict[str, Any]) -> str:
    """What is measured, as text."""
    _, height, width = report["input_size"]
    weights = report["weights"]
    return "\n".join(
        [
            f"folder      {report['folder']}: {report['pictures']} pictures, "
            f"{report['classes']} classes",
            f"model       {report['model']}, "
            + (f"{weights} weights" if weights == "pretrained" else f"weights of {weights}"),
            f"input       {width} x {height} pixels, {report['crop_mode']} crop of "
            f"{report['crop_pct']:g}, {report['interpolation']}",
            f"running on  {report['device']} in {report['dtype']}, "
            + (f"{report['processes']} processes, each " if report["processes"] > 1 else "")
            + f"{report['threads']} threads",
        ]
    )


def table(rows: list[Row]) -> str:
    """The rows as text, with a column for the paper if it has any of them."""
    with_paper = any(row.paper is not None for row in rows)
    amounts = {row.reduction.amount_name for row in rows if row.method is not None}
    width = max(9, *(len(row.name) for row in rows))
    lines = [
        f"{amounts.pop() if amounts else 'r':>{width}}  {'images':>7}  {'top-1':>6}  {'top-5':>6}"
        f"  {'lost':>12}  {'images/s':>8}  {'speed-up':>8}" + ("  paper" if with_paper else "")
    ]
    for row in rows:
        lost = "-" if row is rows[0] else f"{row.lost:.2f} ±{row.lost_error:.2f}"
        line = (
            f"{row.name:>{width}}  {row.images:>7}  {row.top1:>6.2f}  {row.top5:>6.2f}"
            f"  {lost:>12}  {row.images_per_second:>8.1f}"
            f"  {row.images_per_second / rows[0].images_per_second:>7.2f}x"
        )
        lines.append(line + ("" if row.paper is None else f"  {row.paper:>5.2f}"))
    if len(rows) > 1:
        lines.append("\nlost: points of top-1 below the unpatched model, ± standard error")
    if with_paper:
        lines.append("\npaper: its top-1 for this model and r (arXiv 2210.09461)")
    return "\n".join(lines)
