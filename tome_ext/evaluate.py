"""``tome-ext eval``: how often a ViT is right about a folder of pictures.

Without a patch, and for every setting of it.

Needs timm, torchvision, pillow and tqdm (``pip install 'tome_ext[eval]'``), imported when it runs,
and the model's library.
Works in one process, or in many under ``torchrun``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from . import _models
from ._command import CommandError, Reduction, check_patch, find_device, one_line, patched
from ._world import World
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
    images_per_second: float  # of all processes together, in the model: without loading
    paper: float | None  # top-1 in per cent, where the paper has this model and r

    @property
    def reduction(self) -> Reduction:
        """What the model was patched with; of the model without a patch, nothing."""
        method = self.method or Reduction().method
        return Reduction(method, self.r, self.keep_rate, self.threshold)

    @property
    def name(self) -> str:
        """What the line begins with."""
        return "unpatched" if self.method is None else self.reduction.row_name


def run(
    folder: Path,
    model_name: str,
    reductions: tuple[Reduction, ...],
    *,
    batch_size: int = 64,
    device_name: str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 4,
    checkpoint: Path | None = None,
    img_size: int | None = None,
    limit: int | None = None,
    json_file: Path | None = None,
) -> list[Row]:
    """Print a table of accuracy and speed; returns its rows, in every process.

    The model without a patch comes first, which the others are compared with and which stands for
    r = 0. Under ``torchrun`` each process takes its share of the pictures, and the
    first one prints.

    Args:
        folder: pictures as FOLDER/CLASS/PICTURE, or with a split (FOLDER/val/CLASS/PICTURE).
            timm's reader lists them: classes are numbered in the order of their names.
        model_name: ``[LIBRARY:]NAME``; without a library it is timm's, with or without the tag of
            its weights.
        reductions: how to reduce tokens, a row for each.
        batch_size: pictures a forward pass.
        device_name: under ``torchrun``, "cuda" gives every process of a machine a GPU of its own.
        dtype: the model and its input are cast to it.
        workers: processes that read pictures, per process that evaluates.
        checkpoint: weights to use in place of the pretrained ones, for as many classes as the
            folder has.
        img_size: side of the input in pixels; the model's own by default.
        limit: only so many pictures, spread evenly over the folder.
        json_file: where to write the rows and what they were measured with.

    Raises:
        CommandError: a folder, model, checkpoint, device or file that is not there or can't be
            used; a picture that can't be read (none is left out); NaN or infinite output.
        SystemExit: another process of ``torchrun`` has raised a CommandError before work began.
    """
    with World.join() as world:

        def prepare() -> tuple[torch.device, Share, _models.Model]:
            if json_file is not None and not json_file.parent.is_dir():
                raise CommandError(
                    f"can't write {json_file}: there is no folder {json_file.parent}"
                )
            device = find_device(world.device_name(device_name))
            share = Share.of(folder, world, limit)
            if world.rank == 0:
                print(f"loading {model_name} ...", file=sys.stderr, flush=True)
            loaded = load_model(model_name, share, checkpoint, img_size)
            check_patch(loaded.module, reductions)
            loaded.module.to(device, dtype)
            return device, share, loaded

        device, share, loaded = world.agree(prepare, lambda prepared: prepared[1].digest)
        model, name, config = loaded.module, loaded.name, loaded.data
        report = {
            "model": name,
            "weights": "pretrained" if checkpoint is None else str(checkpoint),
            "folder": str(share.root),
            "classes": len(share.classes),
            "pictures": share.total,
            **config,
            "batch_size": batch_size,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "processes": world.size,
            "threads": torch.get_num_threads(),
        }
        if world.rank == 0:
            print(header(report), flush=True)
        reducing = [each for each in reductions if each.reduces]
        settings = (None, *dict.fromkeys(reducing))
        batches = loader(share, config, batch_size, device, dtype, workers)
        counts, seconds = count(model, batches, len(share), settings, world.rank == 0)
        world.reduce(counts, seconds, device)

    as_published = checkpoint is None and is_imagenet(share) and loaded.own_size
    paper = PAPER.get(name, {}) if as_published else {}
    rows = []
    for setting, (n, top1, top5), time_taken in zip(
        settings, counts.tolist(), seconds.tolist(), strict=True
    ):
        shown = setting or Reduction()
        published = paper.get(shown.r) if shown == Reduction(r=shown.r) else None
        rows.append(
            Row(
                None if setting is None else setting.method,
                shown.r,
                shown.keep_rate,
                shown.threshold,
                n,
                100 * top1 / n,
                100 * top5 / n,
                n / time_taken,
                published,
            )
        )
    if world.rank == 0:
        print("\n" + table(rows))
        if json_file is not None:
            write_json(json_file, report, rows)
    return rows


# --- pictures -----------------------------------------------------------------------------------


class UnreadableError(Exception):
    """A picture that pillow can't read; raised in the processes that read pictures."""


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """Turns a picture that can't be read, of a loader that is read inside, into a CommandError."""
    try:
        yield
    except UnreadableError as error:
        # From a worker it comes with a traceback, and the message is the last line of that.
        line = str(error).splitlines()[-1]
        name = f"{__name__}.{UnreadableError.__qualname__}: "
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

    def __init__(
        self, root: Path, classes: list[str], samples: list[tuple[str, int]], world: World
    ) -> None:
        self.root = root
        self.classes = classes
        self.total = len(samples)
        self.samples = samples[world.rank :: world.size]
        listed = [(os.path.relpath(path, root), target) for path, target in samples]
        self.digest = hashlib.sha256(repr(listed).encode()).hexdigest()

    @classmethod
    def of(cls, folder: Path, world: World, limit: int | None, labelled: bool = True) -> Share:
        """List a folder with timm's reader; unless ``labelled``, pictures may lie in it itself."""
        from timm.data import create_dataset

        if not folder.is_dir():
            raise CommandError(f"there is no folder {folder}")
        try:
            reader = create_dataset("", str(folder), split="validation").reader
        except RuntimeError:
            raise CommandError(
                f"no pictures in {folder}; expected FOLDER/CLASS/PICTURE, each .png, .jpg or .jpeg"
            ) from None
        root = Path(reader.root)
        if labelled and "" in reader.class_to_idx:
            raise CommandError(
                f"pictures lie in {root} itself; expected them in a folder per class"
            )
        samples = reader.samples
        if limit is not None and limit < len(samples):
            # All classes get their part: the pictures are sorted by class.
            samples = [samples[i * len(samples) // limit] for i in range(limit)]
        return cls(root, list(reader.class_to_idx), samples, world)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        if get_worker_info() is not None:
            sys.excepthook = _unless_left_alone
        path, target = self.samples[index]
        try:
            with Image.open(path) as img:
                rgb = img.convert("RGB")
        except Exception as error:  # pillow's decoders raise many kinds
            raise UnreadableError(f"can't read the picture {path}: {one_line(error)}") from None
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


def count(
    model: Any,
    batches: Iterable[tuple[Tensor, Tensor]],
    number: int,
    settings: tuple[Reduction | None, ...],
    show: bool,
) -> tuple[Tensor, Tensor]:
    """Run every batch with every setting, one after the other, so each picture is read once.

    Returns:
        counts (len(settings), 3) int64: pictures, and those right in the first and among the first
        five answers; seconds (len(settings),) float64 in the model.

    Raises:
        CommandError: a picture that can't be read, or output that is not finite.
    """
    from tqdm import tqdm

    counts = torch.zeros(len(settings), 3, dtype=torch.int64)
    seconds = torch.zeros(len(settings), dtype=torch.float64)
    warm = False
    bar = tqdm(total=number, desc="evaluating", unit="img", disable=not show)
    with bar as progress, told_in_a_line():
        for x, target in batches:
            for i, setting in enumerate(settings):
                if not warm:
                    timed(model, x, setting)
                logits, time_taken = timed(model, x, setting)
                if not logits.isfinite().all():
                    raise CommandError(
                        f"{setting or 'unpatched'}: NaN or infinite output of the model in "
                        f"{str(x.dtype).removeprefix('torch.')}"
                    )
                seconds[i] += time_taken
                right = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
                top1, top5 = right[:, 0].sum().item(), right.sum().item()
                counts[i] += torch.tensor([len(x), top1, top5])
            warm = True
            progress.update(len(x))
    return counts, seconds


@torch.inference_mode()
def timed(model: Any, x: Tensor, reduction: Reduction | None) -> tuple[Tensor, float]:
    """The logits (B, classes), and the seconds it took; None is the model without a patch."""
    with patched(model, reduction):
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
        f"  {'images/s':>8}  {'speed-up':>8}" + ("  paper" if with_paper else "")
    ]
    for row in rows:
        line = (
            f"{row.name:>{width}}  {row.images:>7}  {row.top1:>6.2f}  {row.top5:>6.2f}"
            f"  {row.images_per_second:>8.1f}"
            f"  {row.images_per_second / rows[0].images_per_second:>7.2f}x"
        )
        lines.append(line + ("" if row.paper is None else f"  {row.paper:>5.2f}"))
    if with_paper:
        lines.append("\npaper: its top-1 for this model and r (arXiv 2210.09461)")
    return "\n".join(lines)


def write_json(path: Path, report: dict[str, Any], rows: list[Row]) -> None:
    """Write what was measured, with what, and the rows."""
    content = {**report, "versions": info(), "results": [asdict(row) for row in rows]}
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise CommandError(f"can't write {path}: {error.strerror or error}") from None
