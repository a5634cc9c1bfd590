"""Files of the commands: pictures listed and read, results written as a whole or not at all.

Needs pillow, imported when a picture is read.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._command import CommandError, one_line

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "MOST_PIXELS",
    "UnreadableError",
    "check_writable",
    "list_pictures",
    "open_picture",
    "read_progress",
    "replacing",
    "write_json",
]

EXTENSIONS = (".png", ".jpg", ".jpeg")  # those that timm lists
MOST_PIXELS = 178_956_970  # of a picture: half a GiB as RGB, and what pillow refuses by default


class UnreadableError(Exception):
    """A picture that can't be read; the message names it and says why."""


# --- results ------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of ``path``, which it becomes when the block ends well.

    So ``path`` holds the old content or the new, never a part. What is no file, such as
    /dev/stdout, is written to itself.

    Raises:
        CommandError: it can't be written.
    """
    place = path.resolve()  # where a link leads, or the link would be replaced
    direct = path.exists() and not path.is_file()  # by its own name: a pipe has none to resolve
    part = path if direct else place.with_name(place.name + ".part")
    _check_not_output(path)
    try:
        yield part
        if not direct:
            part.replace(place)
    except OSError as error:
        raise CommandError(f"can't write {path}: {error.strerror or error}") from None
    finally:
        if not direct:
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse a place that can't be written to, before there is a result to lose.

    Raises:
        CommandError: there is no such folder, a folder has that name, or the system refuses.
    """
    if not path.parent.is_dir():
        raise CommandError(f"can't write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise CommandError(f"can't write {path}: it is a folder")
    if path.exists() and not path.is_file():
        return
    _check_not_output(path)
    place = path.resolve()
    part = place.with_name(place.name + ".part")
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise CommandError(f"can't write {path}: {error.strerror or error}") from None


def _check_not_output(path: Path) -> None:
    """Refuse the file that a shell sends the command's own output to."""
    for stream in (sys.stdout, sys.stderr):
        try:
            same = path.is_file() and os.path.samestat(path.stat(), os.fstat(stream.fileno()))
        except (OSError, ValueError, AttributeError):  # none, or of no file
            continue
        if same:
            raise CommandError(f"can't write {path}: the output of this command goes there")


def write_json(path: Path, content: Any) -> None:
    """Write a file of JSON, as a whole or not at all; see :func:`replacing`."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_progress(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """The content of a JSON file that an earlier run has left, to go on from.

    Args:
        path: the file.
        expected: entries that it must have: what the run depends on.

    Raises:
        CommandError: it can't be read, or is of another run; says what differs.
    """
    # A pipe would be waited for, a device read without end.
    if path.exists() and not path.is_file():
        raise CommandError(f"can't resume from {path}: it is not a regular file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"can't resume from {path}: {error.strerror or error}") from None
    except ValueError:
        raise CommandError(f"can't resume from {path}: it is not JSON") from None
    if not isinstance(content, dict):
        raise CommandError(f"can't resume from {path}: it holds no results")
    for name, value in json.loads(json.dumps(expected)).items():
        if content.get(name) != value:
            raise CommandError(
                f"can't resume from {path}: it was begun with {name} = {content.get(name)!r}, and "
                f"this command has {value!r}; give the same options, or remove it"
            )
    return content


# --- pictures -----------------------------------------------------------------------------------


def list_pictures(folder: Path) -> list[str]:
    """The paths of all .png, .jpg and .jpeg below a folder, in timm's order: numbers by value.

    Links to folders are followed, but not back into a folder that they lie in. What is no file but
    has such a name (a pipe, a link to nothing) is listed, for reading to refuse.

    Raises:
        CommandError: there is no such folder, or one in it can't be read.
    """
    if not folder.is_dir():
        raise CommandError(f"there is no folder {folder}")
    found: list[str] = []

    def visit(here: str, above: frozenset[tuple[int, int]]) -> None:
        about = os.stat(here)
        identity = about.st_dev, about.st_ino
        if identity in above:  # a link back: all in it is listed already
            return
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.is_dir():
                    visit(entry.path, above | {identity})
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.append(entry.path)

    try:
        visit(str(folder), frozenset())
    except OSError as error:
        raise CommandError(f"can't read {error.filename}: {error.strerror or error}") from None
    return sorted(found, key=lambda path: (natural_key(path), path))


def natural_key(text: str) -> list[str | int]:
    """What sorts "a10" behind "a9", and capitals with small letters."""
    parts: list[str | int] = list(re.split(r"([0-9]+)", text.lower()))
    parts[1::2] = map(int, parts[1::2])
    return parts


def open_picture(path: str | Path, upright: bool = False) -> Image.Image:
    """Read a picture of at most :data:`MOST_PIXELS` as RGB.

    Args:
        path: the file.
        upright: turn it as its EXIF data say.

    Raises:
        UnreadableError: there is none, it is no picture, cut short or too large.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            reason = "it is not a regular file" if os.path.exists(path) else "there is no such file"
            raise UnreadableError(f"can't read the picture {path}: {reason}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the one limit
            opened = Image.open(path)
        with opened as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            turned = ImageOps.exif_transpose(picture) if upright else picture
            return turned.convert("RGB")
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        reason = "it is not a picture that pillow can read"
    except Image.DecompressionBombError:
        reason = f"it has more than {MOST_PIXELS // 10**6} million pixels"
    except OSError as error:
        reason = error.strerror or one_line(error)
    except Exception as error:  # pillow's decoders raise many kinds
        reason = one_line(error)
    raise UnreadableError(f"can't read the picture {path}: {reason}")
