"""The tome-ext command: its output, its picture, and one line for every mistake."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import fails
from PIL import Image

import tome_ext
import tome_ext_cli
from tome_ext import _command, _digits, _library, demo
from tome_ext._command import Reduction
from tome_ext.patch.common.methods import METHODS
from tome_ext_cli import commands, options

SMALL = "test_vit"  # timm's: 6 blocks at 160 x 160 pixels, patches of 16, 101 tokens
WITHOUT_CLASS_TOKEN = "test_vit2"  # timm's too

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few timed rounds as the demo allows."""
    monkeypatch.setattr(demo, "TIMING_BUDGET", 0.0)


def tables(out: str) -> tuple[list[list[str]], list[list[str]]]:
    """The cells of the demo's two tables, without their headings: of the model, and of digits."""
    model, digits = out.split("A trained model: ")
    return rows_of(model), rows_of(digits)


def rows_of(text: str) -> list[list[str]]:
    lines = [re.split(r"  +", line.strip()) for line in text.splitlines()]
    return [line for line in lines if len(line) == 5 and line[1].isdecimal()]


def test_an_unknown_option_is_followed_by_the_usage_of_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit):
        tome_ext_cli.main(["bench", "--threshold", "0.9"])
    first, _, usage = capsys.readouterr().err.split("\n", 2)
    assert first == "tome-ext bench: error: unrecognized arguments: --threshold 0.9"
    assert usage.startswith("usage: tome-ext bench ")


def test_demo_prints_the_tables_and_writes_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "shown.png"
    assert (
        tome_ext_cli.main(
            ["demo", "--model", SMALL, "--r", "0,4,9", "--batch-size", "2", "--output", str(output)]
        )
        == 0
    )
    out, err = capsys.readouterr()
    assert "random weights" in out
    assert "untrained" in out
    assert "timing" not in err  # no progress bar into a pipe
    depth = 6
    table, digits = tables(out)
    assert [row[0] for row in table] == ["unpatched", "0", "4", "9"]
    assert [int(row[1]) for row in table] == [101, 101, 101 - 4 * depth, 101 - 9 * depth]
    assert table[0][3] == "1.00x"
    assert all(float(row[2]) > 0 for row in table)
    assert [row[4] for row in table] == ["-"] * 4  # of random weights
    assert "see the second table" in out
    assert [row[0] for row in digits] == ["unpatched", *map(str, _digits.R_VALUES)]
    assert [int(row[1]) for row in digits] == [65, *(65 - 6 * r for r in _digits.R_VALUES)]
    assert float(digits[0][2]) > 0.9
    assert 0.5 < float(digits[-1][4]) < 1
    with Image.open(output) as img:
        panels, zoom = 3, round(demo.PANEL_PIXELS / 160)  # r = 0 merges nothing to show
        assert img.width > panels * 160 * zoom
        assert img.height > 160 * zoom
        assert img.convert("RGB").getcolors(maxcolors=50) is None


def test_demo_of_a_picture_of_the_users_own(tmp_path: Path) -> None:
    picture = tmp_path / "mine.png"
    Image.new("L", (300, 200), 128).save(picture)
    output = tmp_path / "shown.jpg"
    argv = ["demo", picture, "--model", SMALL, "--r", 5, "--batch-size", 1, "--output", output]
    assert tome_ext_cli.main([*map(str, argv), "--dtype", "bfloat16"]) == 0
    with Image.open(output) as img:
        assert img.format == "JPEG"


def test_agreement_compares_with_the_unpatched_model() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(SMALL, num_classes=0).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    rows, merged = demo.measure(model, x, (Reduction(), Reduction(r=8)), 101)
    with torch.no_grad():
        plain = model(x)
        with tome_ext.patch.timm(model, r=8):
            other = model(x)
    expected = torch.cosine_similarity(plain, other).mean().item()
    assert rows[0].agreement == pytest.approx(1, abs=1e-6)
    assert rows[1].agreement == pytest.approx(1, abs=1e-6)
    assert rows[2].agreement == pytest.approx(expected, abs=1e-5)
    assert expected < 0.9999
    assert merged[Reduction()] is None
    assert merged[Reduction(r=8)] is not None
    assert merged[Reduction(r=8)].num_output_tokens == rows[2].tokens


def test_crops_are_centred_and_keep_their_shape() -> None:
    frame = demo.Frame(32, 16, (2, 4), 1, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert frame.patches == 8
    photo = Image.new("RGB", (100, 100), (255, 0, 0))
    assert frame.box(photo) == (0, 25, 100, 75)
    crops = frame.crops(photo, 3)
    assert [crop.size for crop in crops] == [(32, 16)] * 3
    x = frame.to_tensor(crops[0])
    assert x.shape == (3, 16, 32)
    assert torch.equal(x[:, 0, 0], torch.tensor([2.0, -2.0, -2.0]))
    assert frame.crop(photo, zoom=3).size == (96, 48)


def test_pretrained_weights_are_used_when_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    create = timm.create_model

    def create_model(name: str, pretrained: bool, **options: Any) -> Any:
        asked.append(pretrained)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    missing = demo.load_model(SMALL).missing
    assert (asked, missing) == ([True], None)


def test_random_weights_say_why_and_are_the_same_each_time() -> None:
    state = torch.get_rng_state()
    one, two = demo.load_model(SMALL), demo.load_model(SMALL)
    assert one.missing == "HF_HUB_OFFLINE is set"
    pairs = zip(one.module.parameters(), two.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    reason = _command.prefer_cache_without_network()
    assert reason is not None
    assert "127.0.0.1:9 does not answer" in reason
    assert constants.HF_HUB_OFFLINE
    assert time.monotonic() - start < 2 * _command.HUB_WAIT  # no retries


def test_mistakes_in_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "can't read the picture" in fails(capsys, "demo", tmp_path / "missing.png")
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "is not a picture that pillow can read" in fails(capsys, "demo", text)
    assert "can't read the picture" in fails(capsys, "demo", tmp_path)
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 10_000)).save(bomb)
    assert "more than 178 million pixels" in fails(capsys, "demo", bomb)
    line = fails(capsys, "demo", "--model", "vit_smal_patch16_224")
    assert "timm has no model 'vit_smal_patch16_224'; did you mean vit_small_patch16_224" in line
    assert "resnet" in fails(capsys, "demo", "--model", "resnet10t").lower()
    assert "there is no folder" in fails(capsys, "demo", "--output", tmp_path / "no" / "x.png")
    assert "can't write" in fails(capsys, "demo", "--output", tmp_path / "x.nonsense")
    assert "can't use the device 'nonsense'" in fails(capsys, "demo", "--device", "nonsense")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "4,x"], "expected numbers of at least 0 .* got '4,x'"),
        (["--r=-1"], "got '-1'"),
        (["--method", "tome,prune"], "expected some of tome, guided, evit, topk; got 'tome,prune'"),
        (["--keep-rate", "0.5,0"], "above 0 and up to 1 .* got '0.5,0'"),
        (["--keep-rate", "half"], "got 'half'"),
        (["--keep-rate", "0.5", "--r", "4"], "--r: not allowed with argument --keep-rate"),
        (["--batch-size", "0"], "expected a number of at least 1, got '0'"),
        (["--dtype", "int8"], "invalid choice: '?int8"),
    ],
)
def test_mistakes_in_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, fails(capsys, "demo", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threshold", "90"], "cosine similarities of at most 1 .* got '90'"),
        (["--threshold", "0.9,nan"], "got '0.9,nan'"),
        (["--threshold", "high"], "got 'high'"),
        (["--threshold", "0.9", "--r", "4"], "--r: not allowed with argument --threshold"),
    ],
)
def test_mistakes_in_thresholds(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, fails(capsys, "eval", "pictures", "--model", SMALL, *arguments))


def test_lists() -> None:
    assert options.r_list("0,4, 8,4") == (0, 4, 8)
    assert options.keep_rates("1, 0.5,.5") == (1.0, 0.5)
    assert options.similarities("-2, 0.5,.5,1") == (-2.0, 0.5, 1.0)
    assert options.methods("topk, tome,topk") == ("topk", "tome")


def test_demo_of_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--method", "tome,evit,topk", "--keep-rate", "0.5", "--batch-size", "1"]
    argv = ["demo", "--model", SMALL, *options, "--output", str(tmp_path / "x.png")]
    assert tome_ext_cli.main(argv) == 0
    out, _ = capsys.readouterr()
    assert len(re.findall(r"^keep rate  tokens left  ", out, re.MULTILINE)) == 2
    table, digits = ({row[0]: int(row[1]) for row in rows} for rows in tables(out))
    # Layers 1, 3 and 4 of 6 keep half, and EViT fuses the others.
    assert table == {"unpatched": 101, "0.5": 14, "evit 0.5": 16, "topk 0.5": 14}
    assert digits == {"unpatched": 65, "0.5": 9, "evit 0.5": 11, "topk 0.5": 9}


def test_demo_reads_digits_with_every_method() -> None:
    reductions = (Reduction("guided", r=13), Reduction("topk", r=13), Reduction("guided", r=4))
    text = demo.read_digits(reductions, torch.device("cpu"), torch.bfloat16)
    expected = [f"{method} {r}" for method in ("guided", "topk") for r in _digits.R_VALUES]
    rows = rows_of(text)
    assert [row[0] for row in rows] == ["unpatched", *expected]
    assert float(rows[0][2]) > 0.9


def test_pretrained_weights_have_an_agreement_to_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **o: create(name, **o))
    argv = ["demo", "--model", SMALL, "--r", "9", "--output", str(tmp_path / "x.png")]
    assert tome_ext_cli.main(argv) == 0
    out, _ = capsys.readouterr()
    table, _ = tables(out)
    assert table[0][4] == "1.0000"
    assert re.fullmatch(r"-?[01]\.\d{4}", table[1][4])
    assert "untrained" not in out
    assert "see the second table" not in out


@pytest.mark.parametrize(
    ("given", "patch", "bench", "tune"),
    [
        (["--r", "0,4,9"], "r=9", "--r 0,4,9", "--flops 0.6"),
        (
            ["--method", "guided,tome", "--keep-rate", "0.5"],
            'method="guided", keep_rate=0.5',
            "--method guided,tome --keep-rate 0.5",
            "--method guided --flops 0.6",
        ),
        (["--r", "0"], "r=0", "--r 0", "--flops 0.6"),
        (
            ["--r", "4,6,9", "--dtype", "bfloat16"],
            "r=6",
            "--dtype bfloat16 --r 4,6,9",
            "--dtype bfloat16 --flops 0.6",
        ),
    ],
)
def test_demo_ends_with_what_to_do_next(
    given: list[str], patch: str, bench: str, tune: str
) -> None:
    arguments = options.parser().parse_args(["demo", "--model", SMALL, *given])
    text = demo.next_steps(
        SMALL, commands.reductions_of(arguments), arguments.device, commands.DTYPES[arguments.dtype]
    )
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert lines == [
        "import tome_ext",
        f"tome_ext.patch.auto(model, {patch})",
        f"tome-ext bench --model {SMALL} {bench}",
        f"tome-ext tune FOLDER --model {SMALL} {tune}",
    ]
    exec("\n".join(lines[:2]), {"model": timm.create_model(SMALL)})
    for line in lines[2:]:  # the command has these options
        options.parser().parse_args(shlex.split(line)[1:])


def test_a_setting_that_a_model_cannot_have_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "demo", "--model", SMALL, "--keep-rate", "0.2")
    assert "expected at least 0.5, as tome merges at most half" in line
    line = fails(capsys, "demo", "--model", WITHOUT_CLASS_TOKEN, "--method", "topk")
    assert "ranks tokens by the class token's attention" in line


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "DEMO_PACKAGES", ("numpy", "no_such_package"))
    line = fails(capsys, "demo")
    assert "tome-ext demo needs no_such_package: pip install 'tome_ext[demo]'" in line


def test_missing_library_is_told_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(_library, "load_error", "no _C library lies in /nowhere")
    line = fails(capsys, "demo", "--model", SMALL, "--output", tmp_path / "x.png")
    assert "are not available" in line


def test_info_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert tome_ext_cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^tome_ext +{re.escape(tome_ext.__version__)}$", out, re.MULTILINE)
    assert re.search(r"^instruction set +\S+$", out, re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        tome_ext_cli.main(["--version"])
    assert stop.value.code == 0
    assert tome_ext.__version__ in capsys.readouterr().out


def test_help_and_mistakes_in_options_come_without_torch(run_python: Any) -> None:
    code = """
import sys
from tome_ext_cli import main
for argv in (["--help"], ["eval", "--help"], ["--version"], ["bench", "--r", "x"]):
    try:
        main(argv)
    except SystemExit as stop:
        print("EXIT", argv, stop.code, "torch" in sys.modules)
"""
    run = run_python(code)
    assert re.findall(r"^EXIT .* (\d) (\w+)$", run.stdout, re.MULTILINE) == [
        ("0", "False"), ("0", "False"), ("0", "False"), ("2", "False")
    ]  # fmt: skip


def test_a_reader_that_stops_early_is_no_error(run_python: Any) -> None:
    code = """
import subprocess, sys
command = "import sys; from tome_ext_cli import main; sys.exit(main(['models', 'timm:test_vit']))"
process = subprocess.Popen([sys.executable, "-c", command], stdout=-1, stderr=-1)
process.stdout.close()
print("ERRORS", process.stderr.read(), process.wait())
"""
    assert "ERRORS b'' 1" in run_python(code).stdout


def test_methods_and_dtypes_are_those_there_are() -> None:
    assert tuple(METHODS) == options.METHODS
    assert all(isinstance(dtype, torch.dtype) for dtype in commands.DTYPES.values())


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tome_ext_cli.main(["demo", "--help"])
    out = capsys.readouterr().out
    for word in (
        "PICTURE",
        "--model",
        "--method",
        "--keep-rate",
        "--r",
        "--batch-size",
        "--output",
        "--device",
        "--dtype",
    ):
        assert word in out


def test_the_mistake_comes_before_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tome_ext_cli.main(["bench", "--batch-size", "0"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tome-ext bench: error: argument --batch-size: ")
    assert lines[1] == ""
    assert lines[2].startswith("usage: tome-ext bench")


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("test_vitt", "did you mean test_vit"),
        ("torchvision:vit_b_15", "did you mean vit_b_16"),
        ("resnet5", ""),  # like many that cannot be patched
        ("torchvision:resnet5", ""),
    ],
)
def test_suggestions_can_be_patched(
    name: str, suggested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = fails(capsys, "demo", "--model", name)
    assert suggested in line
    assert "resnet50" not in line
    if not suggested:
        assert "did you mean" not in line


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND" in fails(capsys)


def test_photograph_comes_with_the_package() -> None:
    with Image.open(demo.PHOTO) as img:
        assert img.size == (600, 400)
    assert "CC0" in (demo.PHOTO.parent / "README.md").read_text()
