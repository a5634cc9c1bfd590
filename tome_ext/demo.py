"""``tome-ext demo``: a photograph through a ViT, with and without fewer tokens.

Then pictures of digits through a small ViT that comes with the package: it is trained, so that
there is an accuracy to show wherever the demo runs.

Needs timm, the model's library, pillow and tqdm (``pip install 'tome_ext[demo]'``), imported when
it runs.
"""

from __future__ import annotations

import shlex
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import _digits, _models
from ._command import CommandError, Reduction, check_patch, find_device, patched, say
from ._files import UnreadableError, check_writable, open_picture
from .plan import MergePlan
from .utils import synchronize
from .vis import make_visualization

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Row", "run"]

PHOTO = Path(__file__).parent / "assets" / "coffee.jpg"
TIMING_BUDGET = 30.0  # seconds for all timed rounds together
FEWEST_ROUNDS, MOST_ROUNDS = 3, 15
PANEL_PIXELS = 448  # about how wide one panel of the picture is
PANELS_A_ROW = 4


@dataclass(frozen=True)
class Row:
    """One line of the table; ``reduction`` is None for the model without a patch."""

    reduction: Reduction | None
    tokens: int  # left after the last block, prefix tokens included
    images_per_second: float  # median over the rounds
    agreement: float  # mean cosine similarity with the features of the model without a patch


def run(
    picture: Path | None,
    model_name: str,
    reductions: tuple[Reduction, ...],
    batch_size: int = 8,
    output: Path = Path("tome_demo.png"),
    device_name: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[Row]:
    """Print a table of speed and agreement, and write the picture of merged regions.

    Then print a table of the accuracy of a small trained model, and what to do next. The rows
    returned are those of the first table; without pretrained weights it shows no agreement.

    Raises:
        CommandError: a picture, model, device or output folder that is not there or can't be used.
    """
    photo = open_photo(picture or PHOTO)
    device = find_device(device_name)
    check_output(output)
    loaded = load_model(model_name)
    missing, model = loaded.missing, loaded.module
    check_patch(model, reductions)
    weights = "random weights" if missing else "pretrained weights"
    layout = _models.layout(loaded)
    model = model.to(device, dtype)
    frame = Frame.of(loaded, layout)
    x = torch.stack([frame.to_tensor(crop) for crop in frame.crops(photo, batch_size)])
    if len(loaded.shape) == 4:  # a video that stands still
        x = x.unsqueeze(1).expand(-1, loaded.shape[0], -1, -1, -1)
    x = x.to(device, dtype)

    print(f"photograph  {picture or 'a cup of coffee, which comes with tome_ext'}")
    print(f"model       {loaded.name}, {weights}")
    print(f"input       {batch_size} crops of {frame.width} x {frame.height} pixels")
    print(f"running on  {device} in {str(dtype).removeprefix('torch.')}, ", end="")
    print(f"{torch.get_num_threads()} threads", flush=True)
    if missing:
        print(
            f"\nPretrained weights can't be had ({missing}).\n"
            "The network is untrained: it has no answers to agree with, and its picture says\n"
            "little about a trained one. Speed and the number of tokens are those of the trained\n"
            "one. The second table is of a network that is trained."
        )
    rows, merged = measure(model, x, reductions, layout.tokens)
    print("\n" + table(rows, trained=not missing))
    if layout.grid is None:
        print(
            f"\nNo picture: the {layout.tokens - layout.prefix} patches of {loaded.name} are no "
            "grid of one photograph"
        )
    else:
        try:
            figure(photo, frame, merged, f"{loaded.name}, {weights}").save(output)
        except OSError as error:
            raise CommandError(f"can't write {output}: {error.strerror or error}") from None
        print(f"\nThe photograph with its merged regions after the last block: {output}")
    print("\n" + read_digits(reductions, device, dtype))
    print("\n" + next_steps(model_name, reductions, device_name, dtype))
    return rows


def open_photo(path: Path) -> Image.Image:
    """Read a picture file as RGB."""
    try:
        return open_picture(path, upright=True)
    except UnreadableError as error:
        raise CommandError(str(error)) from None


def check_output(path: Path) -> None:
    """Refuse a place that the picture can't be written to, before the work is done."""
    from PIL import Image

    check_writable(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise CommandError(f"can't write {path}: name it .png, .jpg or the like")


# --- model --------------------------------------------------------------------------------------


def load_model(name: str) -> _models.Model:
    """A model that returns pooled features, pretrained if its weights can be had."""
    _models.split(name)  # a wrong name is told before anything is loaded
    say(f"loading {name} ...")
    return _models.features(name, pretrained=True)


# --- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """How a model wants its pictures; ``grid`` is the rows and columns of their patches."""

    width: int
    height: int
    grid: tuple[int, int]
    prefix: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, model: _models.Model, layout: _models.Layout) -> Frame:
        """That of a model; without a grid its patches are in one row."""
        height, width = model.shape[-2:]
        grid = layout.grid or (1, layout.tokens - layout.prefix)
        return cls(width, height, grid, layout.prefix, model.data["mean"], model.data["std"])

    @property
    def patches(self) -> int:
        """How many patches a picture has."""
        return self.grid[0] * self.grid[1]

    def box(self, photo: Image.Image, scale: float = 1.0) -> tuple[float, float, float, float]:
        """The largest centred box of the frame's shape, times scale: left, top, right, bottom."""
        unit = scale * min(photo.width / self.width, photo.height / self.height)
        w, h = unit * self.width, unit * self.height
        left, top = (photo.width - w) / 2, (photo.height - h) / 2
        return left, top, left + w, top + h

    def crop(self, photo: Image.Image, scale: float = 1.0, zoom: int = 1) -> Image.Image:
        """The centre of a photograph, resized to ``zoom`` times the frame."""
        from PIL import Image

        return photo.resize(
            (self.width * zoom, self.height * zoom),
            Image.Resampling.BICUBIC,
            box=self.box(photo, scale),
        )

    def crops(self, photo: Image.Image, number: int) -> list[Image.Image]:
        """The centre crop, then slightly closer ones, so that a batch is not one image copied."""
        return [self.crop(photo, 1 - 0.3 * i / number) for i in range(number)]

    def to_tensor(self, crop: Image.Image) -> Tensor:
        """(3, height, width) float32, normalised as the model was trained."""
        pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std


def figure(
    photo: Image.Image, frame: Frame, merged: dict[Reduction, MergePlan | None], note: str
) -> Image.Image:
    """The photograph, and beside it what is left for every setting that reduced anything."""
    from PIL import Image, ImageDraw, ImageFont

    zoom = max(1, round(PANEL_PIXELS / frame.width))
    rows, columns = frame.grid
    patch = max(1, round(frame.width * zoom / columns))
    sharp = frame.crop(photo, zoom=zoom)
    if sharp.size != (columns * patch, rows * patch):  # the model leaves pixels at the edge out
        sharp = sharp.resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    panels = [(sharp, "photograph", f"{frame.patches} patches")]
    for reduction, plan in merged.items():
        if plan is not None:
            shown = make_visualization(sharp, plan.assign, patch, num_prefix_tokens=frame.prefix)
            left = plan.num_output_tokens - frame.prefix
            parts = "patches" if (plan.assign < 0).any() else "regions"
            panels.append((shown, str(reduction), f"{left} {parts}"))

    unit = max(1, sharp.width // 32)  # every distance follows the size of a panel
    big, small = (ImageFont.load_default(size=s * unit) for s in (2, 1.4))
    across = min(len(panels), PANELS_A_ROW)
    step_x, step_y = sharp.width + unit, sharp.height + 4 * unit
    lines = -(-len(panels) // across)
    size = (across * step_x + unit, lines * step_y + 3 * unit)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for i, (panel, title, detail) in enumerate(panels):
        left, top = unit + i % across * step_x, unit + i // across * step_y
        canvas.paste(panel, (left, top))
        baseline = top + sharp.height + 2.5 * unit
        draw.text((left, baseline), title, "black", big, anchor="ls")
        draw.text((left + sharp.width, baseline), detail, "#555555", big, anchor="rs")
    draw.text((unit, size[1] - unit), note, "#888888", small, anchor="ls")
    return canvas


# --- measuring ----------------------------------------------------------------------------------


def measure(
    model: Any, x: Tensor, reductions: tuple[Reduction, ...], num_tokens: int
) -> tuple[list[Row], dict[Reduction, MergePlan | None]]:
    """Run the model without a patch and with every setting.

    Returns the rows of the table, and by setting the plan from all tokens to those after the last
    block, None where nothing was reduced.
    """
    from tqdm import tqdm

    settings = [None, *reductions]
    features: dict[Reduction | None, Tensor] = {}
    merged: dict[Reduction, MergePlan | None] = {}
    start = time.perf_counter()
    # Also the warm-up, and what tells how many timed rounds there is time for.
    for setting in tqdm(settings, desc="comparing features", leave=False, disable=None):
        with torch.inference_mode(), patched(model, setting):
            features[setting] = model(x).double()
            if setting is not None:
                merged[setting] = model.tome.plan
    rounds = round(TIMING_BUDGET / (time.perf_counter() - start))
    rounds = min(max(rounds, FEWEST_ROUNDS), MOST_ROUNDS)
    times: dict[Reduction | None, list[float]] = {setting: [] for setting in settings}
    # One after the other in every round, so that a machine that slows down slows all of them.
    for setting in tqdm(settings * rounds, desc="timing", leave=False, disable=None):
        times[setting].append(timed(model, x, setting))

    rows = []
    for setting in settings:
        plan = None if setting is None else merged[setting]
        rate = len(x) / statistics.median(times[setting])
        agreement = F.cosine_similarity(features[setting], features[None], dim=1).mean().item()
        left = num_tokens if plan is None else plan.num_output_tokens
        rows.append(Row(setting, left, rate, agreement))
    return rows, merged


@torch.inference_mode()
def timed(model: nn.Module, x: Tensor, reduction: Reduction | None) -> float:
    """Seconds of one forward pass."""
    with patched(model, reduction):
        synchronize(x.device)
        start = time.perf_counter()
        model(x)
        synchronize(x.device)
        return time.perf_counter() - start


def table(rows: list[Row], trained: bool = True) -> str:
    """The rows as text; the first one is what speed-up is measured against.

    The agreement of a network that is not trained means nothing, and is left out.
    """
    amount = next((row.reduction.amount_name for row in rows if row.reduction is not None), "r")
    lines = [
        f"{amount:>9}  {'tokens left':>11}  {'images/s':>8}  {'speed-up':>8}  {'agreement':>9}"
    ]
    for row in rows:
        name = "unpatched" if row.reduction is None else row.reduction.row_name
        speed_up = row.images_per_second / rows[0].images_per_second
        agreement = f"{row.agreement:.4f}" if trained else "-"
        lines.append(
            f"{name:>9}  {row.tokens:>11}  {row.images_per_second:>8.1f}  {speed_up:>7.2f}x"
            f"  {agreement:>9}"
        )
    lines.append(
        "\nagreement: mean cosine similarity of the output features with the unpatched ones"
        if trained
        else "\nagreement: none of random weights; see the second table"
    )
    return "\n".join(lines)


# --- the model that is trained, and what comes next ---------------------------------------------


def read_digits(reductions: tuple[Reduction, ...], device: torch.device, dtype: torch.dtype) -> str:
    """The table of the model that reads digits, with the methods and keep rates asked for.

    It has fewer tokens and blocks than the models that ``--r`` is meant for, so r is its own.
    """
    methods = dict.fromkeys(each.method for each in reductions)
    own = tuple(Reduction(method, r=r) for method in methods for r in _digits.R_VALUES)
    rates = tuple(each for each in reductions if each.keep_rate is not None)
    digits = _digits.load().to(device, dtype)
    rows = _digits.measure(digits, rates or own)
    return (
        f"A trained model: a small ViT, part of tome_ext, on {rows[0].pictures} handwritten digits "
        "new to it\n\n"
        f"{_digits.table(rows)}\n\n"
        "agreement: mean cosine similarity of the logits with the unpatched ones"
    )


def next_steps(
    model_name: str, reductions: tuple[Reduction, ...], device_name: str, dtype: torch.dtype
) -> str:
    """The lines that patch a model of the user's own, and the commands to run next."""
    reducing = [each for each in reductions if each.reduces] or reductions
    same = [each for each in reducing if each.method == reducing[0].method]
    chosen = same[len(same) // 2]  # neither the least nor the most
    arguments = f"{chosen.amount_name.replace(' ', '_')}={chosen.amount}"
    if chosen.method != "tome":
        arguments = f'method="{chosen.method}", {arguments}'

    options = f"--model {shlex.quote(model_name)}"
    if device_name != "cpu":
        options += f" --device {device_name}"
    if dtype != torch.float32:
        options += f" --dtype {str(dtype).removeprefix('torch.')}"
    methods = ",".join(dict.fromkeys(each.method for each in reductions))
    amounts = ",".join(dict.fromkeys(each.amount for each in reductions))
    every = "" if methods == "tome" else f" --method {methods}"
    one = "" if chosen.method == "tome" else f" --method {chosen.method}"
    amount = chosen.amount_name.replace(" ", "-")
    return (
        "In your code, for your model:\n\n"
        "    import tome_ext\n"
        f"    tome_ext.patch.auto(model, {arguments})\n\n"
        "Next, its speed beside the most there can be, and the best r of each block for your "
        "pictures:\n\n"
        f"    tome-ext bench {options}{every} --{amount} {amounts}\n"
        f"    tome-ext tune FOLDER {options}{one} --flops 0.6"
    )
