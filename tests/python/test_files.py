"""Files of the commands: results as a whole or not at all, pictures listed and read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tome_ext import _files
from tome_ext._command import CommandError


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    _files.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        _files.write_json(file, {"a": object()})

    def fill_the_disk() -> None:
        with _files.replacing(file) as part:
            part.write_text("half of")
            raise OSError(28, os.strerror(28))

    with pytest.raises(CommandError, match=r"can't write .*x\.json: No space left on device"):
        fill_the_disk()
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_links_and_devices_are_written_through(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    _files.write_json(link, [1])
    assert link.is_symlink()
    assert json.loads(real.read_text()) == [1]
    device = tmp_path / "null"
    device.symlink_to("/dev/null")
    _files.check_writable(device)
    _files.write_json(device, [1])
    assert not Path("/dev/null").is_file()


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    kept.write_text("[]")
    _files.check_writable(kept)
    assert kept.read_text() == "[]"
    assert list(tmp_path.iterdir()) == [kept]
    for path, reason in (
        (tmp_path / "no" / "x.json", f"there is no folder {tmp_path}/no"),
        (tmp_path, "it is a folder"),
        (Path("/proc/x.json"), ""),  # where nobody can make a file
    ):
        with pytest.raises(CommandError, match=f"can't write {path}: {reason}"):
            _files.check_writable(path)


def test_the_file_of_the_own_output_is_not_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    program = "from pathlib import Path; from tome_ext import _files; print('kept', flush=True); "
    program += "_files.write_json(Path({!r}), [1])"
    for place in ("/dev/stdout", str(log)):
        with log.open("w") as out:
            command = [sys.executable, "-c", program.format(place)]
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
        assert f"can't write {place}: the output of this command goes there" in done.stderr
        assert log.read_text() == "kept\n"
    command = [sys.executable, "-c", program.format("/dev/stdout")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["kept", "[", "1", "]"]  # a pipe is written to


def test_progress_of_another_run_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    _files.write_json(file, {"model": "a", "size": [1, 2], "done": 3})
    assert _files.read_progress(file, {"model": "a", "size": (1, 2)})["done"] == 3
    with pytest.raises(CommandError, match="begun with model = 'a', and this command has 'b'"):
        _files.read_progress(file, {"model": "b"})
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(CommandError, match=r"can't resume from .*: it is not a regular file"):
        _files.read_progress(pipe, {})
    with pytest.raises(CommandError, match=r"can't resume from .*: No such file"):
        _files.read_progress(tmp_path / "none.json", {})
    for text, reason in (("{", "it is not JSON"), ("[]", "it holds no results")):
        file.write_text(text)
        with pytest.raises(CommandError, match=reason):
            _files.read_progress(file, {})


def test_pictures_are_listed_as_timm_does(tmp_path: Path) -> None:
    from timm.data import create_dataset

    for name in ("b/10.PNG", "b/9.png", "B2/x/1.jpeg", "a/z.jpg", "a/notes.txt", "a/x²1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listed = _files.list_pictures(tmp_path)
    assert len(listed) == 5
    (tmp_path / "a" / "x²1.png").unlink()  # timm takes the ² for a number
    theirs = [path for path, _ in create_dataset("", str(tmp_path)).reader.samples]
    assert [path for path in listed if "²" not in path] == theirs


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)  # a loop
    (tmp_path / "b").symlink_to(tmp_path / "a")  # a class of its own
    names = [os.path.relpath(path, tmp_path) for path in _files.list_pictures(tmp_path)]
    assert names == ["a/1.png", "b/1.png"]


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    good, cut = tmp_path / "good.png", tmp_path / "cut.png"
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(good)
    assert _files.open_picture(good).mode == "RGB"
    cut.write_bytes(good.read_bytes()[:45])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(bomb)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path, reason in (
        (cut, "truncated|cut short|broken"),
        (text, "it is not a picture that pillow can read"),
        (bomb, "it has more than 178 million pixels"),
        (pipe, "it is not a regular file"),
        (tmp_path, "it is not a regular file"),
        (tmp_path / "none.png", "there is no such file"),
    ):
        with pytest.raises(
            _files.UnreadableError, match=f"can't read the picture {re.escape(str(path))}: .*"
        ) as told:
            _files.open_picture(path)
        assert re.search(reason, str(told.value)), str(told.value)
        assert "\n" not in str(told.value)


def test_one_limit_on_pixels(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    large = tmp_path / "large.png"
    Image.new("1", (10_000, 9_000)).save(large)  # which pillow warns of
    with Image.new("L", (10, 4)) as small:
        exif = small.getexif()
        exif[0x0112] = 6  # lies on its side
        small.save(tmp_path / "side.png", exif=exif)
    assert _files.open_picture(large).size == (10_000, 9_000)
    assert not recwarn
    assert _files.open_picture(tmp_path / "side.png").size == (10, 4)
    assert _files.open_picture(tmp_path / "side.png", upright=True).size == (4, 10)
