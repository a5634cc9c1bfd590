"""What a search has found: settings of a patch and what is known of them, as a small JSON file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .schedule import parse_r

__all__ = ["Figures", "Report", "Setting", "write_text"]

FORMAT = "tome_ext setting"
VERSION = 1


@dataclass(frozen=True)
class Figures:
    """How far outputs are from those of the unmerged model: 1 - cosine, over pictures."""

    mean: float
    median: float
    percentile_95: float


@dataclass(frozen=True)
class Report:
    """What the reporting half of the pictures says, none of which the search has seen.

    Attributes:
        pictures: how many there are in that half.
        found: the schedule that the search found; ``constant`` the one it is compared with: as
            near to the same number in every layer as the same limit allows.
        found_deviation: of the found schedule; ``constant_deviation`` of the constant one.
        found_flops: operations over those of the unmerged model; ``constant_flops`` likewise.
        found_speed: measured speed over that of the unmerged model, ``constant_speed`` likewise;
            None if the goal was no speed.
        ratio: mean deviation of the found schedule over that of the constant one.
        low: of a 95% interval of the ratio, by bootstrap over pictures; ``high`` likewise.
        better: whether the interval is below 1, so that the found schedule may be called better.
    """

    pictures: int
    found: list[int]
    constant: list[int]
    found_deviation: Figures
    constant_deviation: Figures
    found_flops: float
    constant_flops: float
    found_speed: float | None
    constant_speed: float | None
    ratio: float
    low: float
    high: float
    better: bool


@dataclass(frozen=True)
class Setting:
    """A schedule for one model, which ``tome_ext.patch.auto(model, setting=...)`` takes.

    Attributes:
        method: "tome", "guided", "evit" or "topk".
        r: tokens to remove, a number for each layer.
        options: further arguments of :func:`tome_ext.patch.auto` that the method has, all bools.
        model: the class of the model it was made for.
        layers: of that model.
        tokens: that enter its first layer, those that never merge among them.
        image_size: height and width in pixels.
        goal: ``{"flops": 0.6}``, at most so many operations, or ``{"speed": 1.5}``, at least so
            fast: both over the unmerged model's.
        flops: operations of this schedule, over the unmerged model's.
        speed: measured speed over the unmerged model's; None if the goal was no speed.
        report: what it was compared with, and the figures.
        versions: of what made it.
    """

    method: str
    r: list[int]
    options: dict[str, bool]
    model: str
    layers: int
    tokens: int
    image_size: list[int]
    goal: dict[str, float]
    flops: float
    speed: float | None
    report: Report
    versions: dict[str, str]

    @property
    def verdict(self) -> str:
        """What the pictures show, in a sentence."""
        report = self.report
        interval = f"95% interval {report.low:.2f} to {report.high:.2f}"
        if report.better:
            return (
                f"On {report.pictures} pictures that the search did not see, the found schedule "
                f"deviates {report.ratio:.2f} times as much as the constant one ({interval})."
            )
        if report.found == report.constant:
            return "The search found nothing better than the constant schedule, which is kept."
        return (
            f"{report.pictures} pictures that the search did not see do not show that the found "
            f"schedule is better than the constant one: it deviates {report.ratio:.2f} times as "
            f"much ({interval}), so the constant schedule is kept. More pictures may show more."
        )

    def save(self, path: str | Path) -> None:
        """Write it as JSON.

        Raises:
            OSError: the file can't be written.
        """
        write_text(Path(path), json.dumps(self._content(), indent=2) + "\n")

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> Setting:
        """Read what :meth:`save` has written.

        Raises:
            OSError: the file can't be read.
            ValueError: it is something else; the message says what was expected and what came.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:  # of JSON, or no text at all
            raise ValueError(f"{path}: expected JSON, got {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"{path}: expected a file of format {FORMAT!r}, got {found!r}")
        if content.get("version") != VERSION:
            raise ValueError(
                f"{path}: expected version {VERSION}, got {content.get('version')!r}; it may be "
                "of a newer tome_ext"
            )
        body = {key: value for key, value in content.items() if key not in ("format", "version")}
        setting: Setting = _read(cls, body, str(path))
        setting._check(str(path))
        return setting

    def _check(self, where: str) -> None:
        """Refuse a method that there is not, and numbers that contradict each other."""
        from .patch.common.methods import METHODS, make_method

        try:
            make_method(self.method, **self.options)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        own = [field.name for field in fields(METHODS[self.method])]
        if any(name not in own for name in self.options):
            raise ValueError(
                f"{where}: options: expected some of {own} for {self.method}, "
                f"got {list(self.options)}"
            )
        if len(self.r) != self.layers:
            raise ValueError(
                f"{where}: r: expected {self.layers} numbers, one per layer, got {len(self.r)}"
            )
        try:
            parse_r(self.layers, self.r)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, float) or _whole(value)


def _of(kind: Any, entry: Any) -> Any:
    def check(value: object) -> bool:
        entries = value.values() if isinstance(value, dict) else value
        return isinstance(value, kind) and all(entry(each) for each in entries)  # type: ignore[attr-defined]

    return check


def _text(value: object) -> bool:
    return isinstance(value, str)


def _yes_or_no(value: object) -> bool:
    return isinstance(value, bool)


# By the annotation of a field: what it says in errors, and what is one.
KINDS: dict[str, tuple[str, Any]] = {
    "int": ("an integer", _whole),
    "float": ("a number", _number),
    "float | None": ("a number or null", lambda value: value is None or _number(value)),
    "str": ("a text", _text),
    "bool": ("true or false", _yes_or_no),
    "list[int]": ("a list of integers", _of(list, _whole)),
    "dict[str, bool]": ("an object of true and false", _of(dict, _yes_or_no)),
    "dict[str, float]": ("an object of numbers", _of(dict, _number)),
    "dict[str, str]": ("an object of texts", _of(dict, _text)),
}


def _read(cls: Any, content: object, where: str) -> Any:
    """A dataclass from the object that ``asdict`` made of it."""
    names = [field.name for field in fields(cls)]
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {content!r}")
    missing = [name for name in names if name not in content]
    unknown = [name for name in content if name not in names]
    if missing or unknown:
        what = f"{', '.join(missing)} missing" if missing else f"unknown {', '.join(unknown)}"
        raise ValueError(f"{where}: expected the entries {', '.join(names)}; got {what}")
    values = {}
    for field in fields(cls):
        value, at = content[field.name], f"{where}: {field.name}"
        inner = {"Report": Report, "Figures": Figures}.get(str(field.type))
        if inner is not None:
            values[field.name] = _read(inner, value, at)
            continue
        expected, is_one = KINDS[str(field.type)]
        if not is_one(value):
            raise ValueError(f"{at}: expected {expected}, got {value!r}")
        values[field.name] = value
    return cls(**values)
