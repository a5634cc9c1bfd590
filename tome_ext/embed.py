"""``tome-ext embed``: the features of a folder of pictures, in one Parquet file.

Needs timm, torchvision, pillow, tqdm and pyarrow (``pip install 'tome_ext[embed]'``), imported when
it runs, and the model's library. Works in one process, or in many under ``torchrun``.

The list of pictures is cut into parts of :data:`PART` batches. Each is a file in FILE.parts as soon
as it is done, whichever process did it, so that a run that was stopped goes on with any number of
processes. In the end the parts become one file, the same as if it had not been stopped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _models, patch
from ._command import CommandError, Reduction, find_device, one_line, say
from ._files import (
    UnreadableError,
    check_writable,
    list_pictures,
    open_picture,
    read_progress,
    replacing,
    write_json,
)
from ._version import __version__
from ._world import World
from .evaluate import Share, loader
from .setting import Setting
from .utils import synchronize

__all__ = ["Summary", "run"]

PART = 16  # batches
ROWS = 16384  # of a row group of the file, at least
PLAN = "plan.json"
PARQUET = b"PAR1"  # with which such a file begins and ends


@dataclass(frozen=True)
class Summary:
    """What a run has done.

    Attributes:
        rows: of the file, one for each picture that could be read.
        width: C, numbers of a feature.
        unreadable: pictures without a row, by their paths in the folder.
        embedded: pictures of this run, in all processes; fewer than rows if it went on.
        seconds: that took, in the slowest process.
        model_seconds: of these in the model.
    """

    rows: int
    width: int
    unreadable: list[str]
    embedded: int
    seconds: float
    model_seconds: float


def run(
    folder: Path,
    model_name: str,
    reduction: Reduction | Path,
    out: Path,
    *,
    batch_size: int = 64,
    device_name: str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int | None = None,
    img_size: int | None = None,
    skip_unreadable: bool = False,
) -> Summary | None:
    """Write a row for every picture: ``path`` in the folder, and ``feature``, C numbers of float32.

    Rows are in the order of the paths, numbers in them by value. The schema's metadata say under
    ``tome_ext`` what made the file. A run that was stopped goes on.

    Args:
        folder: pictures in it or in folders of it, .png, .jpg or .jpeg.
        model_name: ``[LIBRARY:]NAME``, with pretrained weights, or a folder of weights:
            ``hf:FOLDER``, ``local-dir:FOLDER`` for timm.
        reduction: how to reduce tokens, or the file of a :class:`tome_ext.Setting`.
        out: the Parquet file. Until it is complete, what is done is in ``out``.parts.
        batch_size: pictures a forward pass.
        device_name: under ``torchrun``, "cuda" gives every process of a machine a GPU of its own.
        dtype: the model and its input are cast to it.
        workers: processes that read pictures, per process that embeds; one a core by default.
        img_size: side of the input in pixels; the model's own by default.
        skip_unreadable: leave out pictures that can't be read, in place of an error.

    Returns:
        What was done; in processes other than the first, None.

    Raises:
        CommandError: a folder, model, setting, device or file that is not there or can't be used;
            ``out`` is there, or its parts are of another run; a picture that can't be read; NaN or
            infinite features.
        SystemExit: another process of ``torchrun`` has raised a CommandError before work began.
    """
    with World.join() as world:

        def prepare() -> Job:
            device = find_device(world.device_name(device_name))
            share = all_of(folder)
            parts = folder_of_parts(out)
            if world.rank == 0:
                say(f"loading {model_name} ...")
            loaded = load_model(model_name, img_size)
            plan = {
                "tome_ext": __version__,
                "model": loaded.name,
                **json.loads(json.dumps(loaded.data)),  # as they are read again: lists, not tuples
                "weights": _models.digest_of(loaded.module),
                "reduction": patch_model(loaded.module, reduction),
                "dtype": str(dtype).removeprefix("torch."),
                "batch_size": batch_size,
                "pictures": len(share),
                "list": share.digest,
            }
            loaded.module.to(device, dtype)
            return Job(device, loaded, share, parts, plan, left_of(parts, plan))

        job = world.agree(prepare, Job.digest)
        if world.rank == 0:
            done = job.count - len(job.left)
            before = f", {done} of {job.count} parts done" if done else ""
            say(f"{len(job.share)} pictures{before}")
        try:
            job.parts.mkdir(exist_ok=True)
            if world.rank == 0:
                write_json(job.parts / PLAN, job.plan)
            readers = world.cores if workers is None else workers
            counts, seconds = embed(job, world, readers, skip_unreadable)
            world.reduce(counts, seconds, job.device)
            if world.rank > 0:
                return None
            rows, width, unreadable = join(job, out)
        except OSError as error:
            raise CommandError(f"can't write {error.filename or out}: {one_line(error)}") from None
        except KeyboardInterrupt:
            if world.rank == 0:
                say(f"\nstopped; the same command goes on from {job.parts}")
            raise
    summary = Summary(rows, width, unreadable, int(counts[0]), *seconds.tolist())
    tell(summary, out)
    return summary


# --- what there is to do ------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What a run has to do, the same in all processes but for the device.

    Attributes:
        device: of the model.
        model: patched.
        share: all pictures.
        parts: the folder of what is done.
        plan: what makes the features what they are.
        left: numbers of the parts that are not done.
    """

    device: torch.device
    model: _models.Model
    share: Share
    parts: Path
    plan: dict[str, Any]
    left: list[int]

    def digest(self) -> str:
        """What must be the same in all processes."""
        return json.dumps([self.plan, self.left])

    @property
    def size(self) -> int:
        """Pictures in a part, but for the last one."""
        return PART * int(self.plan["batch_size"])

    @property
    def count(self) -> int:
        """How many parts there are."""
        return -(-len(self.share) // self.size)

    def samples(self, part: int) -> list[tuple[str, int]]:
        """The pictures of a part."""
        return self.share.samples[part * self.size : (part + 1) * self.size]

    def file(self, part: int) -> Path:
        """Where a part is, once it is done."""
        return file_of(self.parts, part)


def all_of(folder: Path) -> Share:
    """All pictures in a folder and below it."""
    paths = list_pictures(folder)
    if not paths:
        raise CommandError(
            f"no pictures in {folder}; expected .png, .jpg or .jpeg in it or in folders of it"
        )
    return Share(folder, [], [(path, 0) for path in paths], World(0, 0, 1))


def file_of(parts: Path, part: int) -> Path:
    """The file of a part."""
    return parts / f"{part:07}.parquet"


def load_model(name: str, img_size: int | None) -> _models.Model:
    """A model that returns features of pictures, with its weights."""
    model = _models.features(name, pretrained=True, img_size=img_size)
    if model.missing is not None:
        raise CommandError(
            f"can't load pretrained weights of {name!r} ({model.missing}); weights of your own are "
            "named hf:FOLDER, or local-dir:FOLDER for timm"
        )
    if len(model.shape) != 3:
        raise CommandError(f"{name} takes videos, and embed reads pictures")
    return model


def patch_model(model: nn.Module, reduction: Reduction | Path) -> str:
    """Patch a model for good; returns how, in words."""
    try:
        if isinstance(reduction, Path):
            setting = Setting.load(reduction)
            patch.auto(model, setting=setting, inference=True)
            options = "".join(f", {name}={value}" for name, value in setting.options.items())
            return f"{setting.method}, r = {setting.r}{options}"
        if reduction.reduces:
            reduction.patch(model)
        return str(reduction)
    except (ValueError, ImportError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"can't read {reduction}: {error.strerror or error}") from None


def folder_of_parts(out: Path) -> Path:
    """The folder beside the file, where there is none yet, and where one can be made."""
    if out.exists():
        raise CommandError(f"{out} is there already; remove it, or name another file with --out")
    check_writable(out)
    parts = out.with_name(out.name + ".parts")
    if parts.exists() and not parts.is_dir():
        raise CommandError(f"can't write into {parts}: it is no folder")
    return parts


def is_whole(file: Path) -> bool:
    """Whether a file is there to its end, which a machine that lost power may not have written."""
    if not file.is_file():
        return False
    with file.open("rb") as content:
        content.seek(0, os.SEEK_END)
        if content.tell() < len(PARQUET):
            return False
        content.seek(-len(PARQUET), os.SEEK_END)
        return content.read() == PARQUET


def left_of(parts: Path, plan: dict[str, Any]) -> list[int]:
    """The parts that are not done, if those that are done are of the same plan."""
    count = -(-plan["pictures"] // (PART * plan["batch_size"]))
    left = [part for part in range(count) if not is_whole(file_of(parts, part))]
    file = parts / PLAN
    if len(left) == count or not file.exists():
        return list(range(count))
    read_progress(file, plan)
    return left


# --- doing it -----------------------------------------------------------------------------------


def why_unreadable(path: str) -> str:
    """Why a picture can't be read, found out by trying again."""
    try:
        open_picture(path)
    except UnreadableError as error:
        return str(error)
    return f"can't read the picture {path}: it could not be read at first, and then could"


def embed(job: Job, world: World, workers: int, skip: bool) -> tuple[Tensor, Tensor]:
    """Do this process's share of the parts.

    Returns:
        counts (1,) int64: pictures; seconds (2,) float64: all it took, and in the model.
    """
    from tqdm import tqdm

    mine = job.left[world.rank :: world.size]
    samples = [sample for part in mine for sample in job.samples(part)]
    dtype = getattr(torch, job.plan["dtype"])
    pictures = Share(job.share.root, job.share.classes, samples, World(0, 0, 1))
    pictures.skip_unreadable = True  # which errors end a run is said here, not by a reader
    size = job.plan["batch_size"]
    batches = iter(loader(pictures, job.model.data, size, job.device, dtype, workers))
    begin, in_model = time.perf_counter(), 0.0
    with tqdm(
        total=len(samples), desc="embedding", unit="img", disable=world.hides_progress
    ) as progress:
        for part in mine:
            features: list[Tensor] = []
            readable: list[bool] = []
            while len(readable) < len(job.samples(part)):
                x, classes = next(batches)
                for i in (classes < 0).nonzero().flatten().tolist():
                    reason = why_unreadable(job.samples(part)[len(readable) + i][0])
                    if not skip:
                        raise CommandError(reason)
                    tqdm.write(f"skipped: {reason}", file=sys.stderr)
                found, seconds = forward(job.model, x)
                features.append(found)
                readable += (classes >= 0).tolist()
                in_model += seconds
                progress.update(len(x))
            write_part(job, part, torch.cat(features), readable)
    taken = torch.tensor([time.perf_counter() - begin, in_model], dtype=torch.float64)
    return torch.tensor([len(samples)]), taken


@torch.inference_mode()
def forward(model: _models.Model, x: Tensor) -> tuple[Tensor, float]:
    """Features (B, C) float32 on the CPU, and the seconds that the model took."""
    start = time.perf_counter()
    features = model.module(x)
    synchronize(x.device)
    seconds = time.perf_counter() - start
    if features.ndim != 2 or len(features) != len(x):
        raise CommandError(
            f"{model.name}: expected features ({len(x)}, C), got {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        dtype = str(x.dtype).removeprefix("torch.")
        raise CommandError(f"NaN or infinite features of {model.name} in {dtype}")
    return features.float().cpu(), seconds


# --- files --------------------------------------------------------------------------------------


def write_part(job: Job, part: int, features: Tensor, readable: list[bool]) -> None:
    """Write the features (n, C) of a part's n pictures, those that were readable."""
    import pyarrow as pa
    from pyarrow import parquet

    names = [name_of(path, job.share.root) for path, _ in job.samples(part)]
    kept = [name for name, good in zip(names, readable, strict=True) if good]
    lost = [name for name, good in zip(names, readable, strict=True) if not good]
    width = features.shape[1]
    numbers = features[torch.tensor(readable)].flatten().numpy()
    rows = pa.FixedSizeListArray.from_arrays(pa.array(numbers), width)
    schema = schema_of(width, {"unreadable": json.dumps(lost)})
    # Opened here: pyarrow takes no name that is not UTF-8.
    with replacing(job.file(part)) as unfinished, unfinished.open("wb") as sink:
        parquet.write_table(pa.table([kept, rows], schema), sink, use_dictionary=False)


def join(job: Job, out: Path) -> tuple[int, int, list[str]]:
    """Make the parts one file, and remove them; returns its rows, their width, and who has none."""
    from pyarrow import concat_tables, parquet

    files = [job.file(part) for part in range(job.count)]
    missing = sum(not file.exists() for file in files)
    if missing:
        raise CommandError(
            f"{missing} of {job.count} parts are not in {job.parts}; expected all processes to "
            "write to the same folder"
        )
    schemas = []
    for file in files:
        with file.open("rb") as source:
            schemas.append(parquet.read_schema(source))
    unreadable = [name for each in schemas for name in json.loads(each.metadata[b"unreadable"])]
    width = schemas[0].field("feature").type.list_size
    schema = schema_of(width, {"tome_ext": json.dumps({**job.plan, "unreadable": unreadable})})
    rows, waiting = 0, []
    with (
        replacing(out) as unfinished,
        unfinished.open("wb") as sink,
        parquet.ParquetWriter(sink, schema, use_dictionary=False) as writer,
    ):
        for file in files:
            with file.open("rb") as source:
                waiting.append(parquet.ParquetFile(source).read().replace_schema_metadata())
            if file is files[-1] or sum(map(len, waiting)) >= ROWS:
                table = concat_tables(waiting).combine_chunks()
                writer.write_table(table.cast(schema), row_group_size=len(table) or None)
                rows += len(table)
                waiting.clear()
    shutil.rmtree(job.parts)
    return rows, width, unreadable


def schema_of(width: int, metadata: dict[str, str]) -> Any:
    """What columns a file has, and what it says of them."""
    import pyarrow as pa

    feature = pa.list_(pa.float32(), width)
    return pa.schema([("path", pa.string()), ("feature", feature)], metadata)


def name_of(path: str, root: Path) -> str:
    """A picture's path in the folder as text, whatever bytes it is made of."""
    return os.fsencode(os.path.relpath(path, root)).decode("utf-8", "backslashreplace")


def tell(summary: Summary, out: Path) -> None:
    """Print what was done."""
    print(f"{out}: {summary.rows} features of {summary.width} numbers")
    if summary.embedded:
        print(
            f"{summary.embedded} pictures in {summary.seconds:.1f} s: "
            f"{summary.embedded / summary.seconds:.1f} images/s; "
            f"{summary.embedded / summary.model_seconds:.1f} in the model alone"
        )
    if summary.unreadable:
        print(
            f"{len(summary.unreadable)} could not be read and have no row; the metadata name them"
        )
