"""tome-ext eval: accuracy against plain loops, shares of processes, and one line for mistakes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import fails
from PIL import Image
from torch import nn

import tome_ext
from tome_ext import evaluate
from tome_ext._command import CommandError, Reduction
from tome_ext._world import World
from tome_ext.bench._cost import count_flops
from tome_ext_cli import commands, main

SMALL = "test_vit"  # timm's: 6 blocks at 160 x 160 pixels, patches of 16
DOC = Path(__file__).parents[2] / "docs" / "evaluation.md"
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu")
R_VALUES = (0, 4, 12)

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 15 pictures of 7 classes, and weights for them."""
    work = tmp_path_factory.mktemp("eval")
    rng = np.random.default_rng(0)
    for i in range(15):
        folder = work / "flowers" / CLASSES[i % 7]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        coarse.resize((150 + 20 * i, 260 - 10 * i)).save(folder / f"{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model(SMALL, num_classes=len(CLASSES))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.4)  # so that answers differ, with r too
    torch.save(model.state_dict(), work / "tuned.pth")
    return work


def arguments(work: Path, *more: object) -> list[str]:
    """Of a command that evaluates on the fixture's pictures with its weights."""
    fixed = ["eval", work / "flowers", "--model", SMALL, "--checkpoint", work / "tuned.pth"]
    return [str(a) for a in [*fixed, "--workers", 0, *more]]


def expected(work: Path) -> dict[int, tuple[int, int]]:
    """By r: how many pictures are right in the first answer, and among the first five."""
    model = timm.create_model(SMALL, num_classes=len(CLASSES)).eval()
    model.load_state_dict(torch.load(work / "tuned.pth"))
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    answers: dict[int, tuple[int, int]] = {}
    for r in R_VALUES:
        tome_ext.patch.timm(model, r=r)
        top1 = top5 = 0
        for target, name in enumerate(CLASSES):
            for path in sorted((work / "flowers" / name).iterdir()):
                with Image.open(path) as img, torch.no_grad():
                    logits = model(transform(img.convert("RGB"))[None])[0]
                order = logits.argsort(descending=True).tolist()
                top1 += order[0] == target
                top5 += target in order[:5]
        answers[r] = top1, top5
    return answers


def test_smaller_pictures_that_cost_as_much(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = ["--r", "0,2,12,20", "--smaller-pictures", "--json", file]
    assert main(arguments(work, *options)) == 0
    told = capsys.readouterr()
    rows = json.loads(file.read_text())["results"]

    def operations(side: int, r: int = 0) -> int:
        model = tome_ext.patch.timm(timm.create_model(SMALL, img_size=side).eval(), r=r)
        return count_flops(lambda: model(torch.zeros(1, 3, side, side)))

    nearest = []
    for r in (2, 12, 20):
        off = {side: abs(operations(side) - operations(160, r)) for side in range(32, 161, 16)}
        nearest.append(min(off, key=lambda side: off[side]))
    assert nearest == [160, 128, 112]  # the first is the unpatched model's row
    smaller = [row["smaller"] for row in rows]
    assert smaller[:4] == [None] * 4
    assert smaller[4:] == [{"side": 128, "like": ["12"]}, {"side": 112, "like": ["20"]}]
    assert "no smaller picture is as near to the operations of 2 as" in told.err
    assert [row["r"] for row in rows] == [0, 2, 12, 20, 0, 0]

    model = timm.create_model(SMALL, num_classes=len(CLASSES)).eval()
    model.load_state_dict(torch.load(work / "tuned.pth"))
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    model.set_input_size(img_size=112)
    right = 0
    for target, name in enumerate(CLASSES):
        for path in (work / "flowers" / name).iterdir():
            with Image.open(path) as img, torch.no_grad():
                x = transform(img.convert("RGB"))[None]
            small = torch.nn.functional.interpolate(x, (112, 112), mode="bicubic", antialias=True)
            right += int(model(small).argmax()) == target
    assert rows[5]["top1"] == pytest.approx(100 * right / 15)
    assert re.search(r"^ *112 px, as 20 +15 ", told.out, re.MULTILINE)


def rows_of(out: str) -> dict[int, list[str]]:
    """The lines of the printed table, by r."""
    lines = [line.split() for line in out.splitlines() if re.match(r" *(unpatched|\d+) ", line)]
    return {0 if line[0] == "unpatched" else int(line[0]): line[1:] for line in lines}


def torchrun(work: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a ``torchrun`` command with this Python's programs, on any free port."""
    found = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command],
        cwd=work,
        env={**os.environ, "PATH": found, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def commands_of_doc() -> list[list[str]]:
    """Every command of the page, with the models and devices that are here."""
    blocks = re.findall(r"```bash\n(.*?)```", DOC.read_text(), re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    for command in commands:
        command[command.index("--model") + 1] = SMALL
        if "--device" in command:
            command[command.index("--device") + 1] = "cpu"
        if "--checkpoint" not in command:
            command += ["--checkpoint", "tuned.pth"]
        command += ["--workers", "0"]
    return commands


# --- right answers ------------------------------------------------------------------------------


def test_accuracy_is_that_of_a_plain_loop(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = work / "eval.json"
    argv = arguments(work, "--r", "4,12", "--batch-size", 4, "--json", json_file)
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "15 pictures, 7 classes" in out
    assert "15/15" not in err  # no progress bar into a pipe
    answers = expected(work)
    assert len(set(answers.values())) > 1  # or merging would not matter here
    assert any(0 < top1 < top5 < 15 for top1, top5 in answers.values())

    written = json.loads(json_file.read_text())
    assert [row["r"] for row in written["results"]] == list(R_VALUES)
    shown = rows_of(out)
    for row in written["results"]:
        top1, top5 = answers[row["r"]]
        assert row["images"] == 15
        assert row["top1"] == pytest.approx(100 * top1 / 15)
        assert row["top5"] == pytest.approx(100 * top5 / 15)
        assert row["images_per_second"] > 0
        assert row["paper"] is None
        assert shown[row["r"]][:3] == ["15", f"{100 * top1 / 15:.2f}", f"{100 * top5 / 15:.2f}"]
    assert shown[0][5] == "1.00x"
    for row in written["results"]:
        lost = written["results"][0]["top1"] - row["top1"]
        assert row["lost"] == pytest.approx(lost)
    last = written["results"][-1]
    assert f"{last['lost']:.2f} ±{last['lost_error']:.2f}" in out
    assert (written["complete"], written["done"], written["unreadable"]) == (True, 15, [])
    assert "paper" not in out
    assert written["model"] == SMALL
    assert written["weights"] == str(work / "tuned.pth")
    assert (written["classes"], written["pictures"], written["processes"]) == (7, 15, 1)
    assert written["input_size"] == [3, 160, 160]
    assert (written["crop_pct"], written["interpolation"]) == (0.95, "bicubic")
    assert written["versions"]["torch"] == torch.__version__


def test_workers_batches_and_a_split_change_nothing(work: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(work / "flowers")
    reductions = tuple(Reduction(r=r) for r in R_VALUES)
    rows = evaluate.run(
        tmp_path, SMALL, reductions, batch_size=15, workers=1, checkpoint=work / "tuned.pth"
    )
    answers = expected(work)
    assert {row.r: (row.top1, row.top5) for row in rows} == {
        r: (100 * top1 / 15, 100 * top5 / 15) for r, (top1, top5) in answers.items()
    }


def test_methods_and_keep_rates(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = work / "methods.json"
    options = ["--method", "evit,topk", "--keep-rate", "0.3", "--json", json_file]
    assert main(arguments(work, *options)) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^ *(keep rate|unpatched|evit 0.3|topk 0.3)  ", out, re.MULTILINE) == [
        "keep rate", "unpatched", "evit 0.3", "topk 0.3",
    ]  # fmt: skip
    rows = json.loads(json_file.read_text())["results"]
    settings = [(row["method"], row["r"], row["keep_rate"]) for row in rows]
    assert settings == [(None, 0, None), ("evit", 0, 0.3), ("topk", 0, 0.3)]
    model = timm.create_model(SMALL, num_classes=len(CLASSES)).eval()
    model.load_state_dict(torch.load(work / "tuned.pth"))
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    for row in rows[1:]:
        tome_ext.patch.timm(model, method=row["method"], keep_rate=0.3)
        right = 0
        for target, name in enumerate(CLASSES):
            for path in sorted((work / "flowers" / name).iterdir()):
                with Image.open(path) as img, torch.no_grad():
                    right += model(transform(img.convert("RGB"))[None]).argmax().item() == target
        assert row["top1"] == pytest.approx(100 * right / 15)


def test_readers_say_nothing_of_a_process_that_was_stopped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for error in (ConnectionResetError(104, "reset by peer"), EOFError(), BrokenPipeError()):
        evaluate._unless_left_alone(type(error), error, None)
    assert capsys.readouterr().err == ""
    evaluate._unless_left_alone(ValueError, ValueError("wrong"), None)
    assert "ValueError: wrong" in capsys.readouterr().err


def test_thresholds(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_file = work / "thresholds.json"
    options = ["--method", "tome,guided", "--threshold", "0.9,1", "--json", json_file]
    assert main(arguments(work, *options)) == 0
    out = capsys.readouterr().out
    names = ["threshold", "unpatched", "0.9", "1", "guided 0.9", "guided 1"]
    assert re.findall(rf"^ *({'|'.join(names)})  ", out, re.MULTILINE) == names
    rows = json.loads(json_file.read_text())["results"]
    settings = [(row["method"], row["r"], row["threshold"]) for row in rows]
    assert settings == [
        (None, 0, None), ("tome", 0, 0.9), ("tome", 0, 1), ("guided", 0, 0.9), ("guided", 0, 1),
    ]  # fmt: skip
    assert rows[2]["top1"] == rows[4]["top1"] == rows[0]["top1"]  # nothing merges


def test_commands_of_the_doc(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    if not Path("imagenet").exists():
        Path("imagenet").mkdir()
        Path("imagenet/val").symlink_to(work / "flowers")
    single = [command for command in commands_of_doc() if command[0] == "tome-ext"]
    assert len(single) == 4
    for command in single:
        assert main(command[1:]) == 0, command
        shown = rows_of(capsys.readouterr().out)
        asked = command[command.index("--r") + 1]
        assert list(shown) == [0, *map(int, asked.split(","))]
    assert json.loads(Path("flowers.json").read_text())["results"]


@pytest.mark.slow
def test_processes_count_each_picture_once(work: Path) -> None:
    (command,) = (c for c in commands_of_doc() if c[0] == "torchrun")
    json_file = work / "shared.json"
    done = torchrun(work, *command[1:], "--r", "4,12", "--json", str(json_file))
    assert done.returncode == 0, done.stderr
    assert list(rows_of(done.stdout)) == list(R_VALUES)
    assert done.stdout.count("images/s") == 1  # one process prints
    written = json.loads(json_file.read_text())
    assert written["processes"] == 2
    # From a beginning of the list: two processes go on where one had stopped.
    begun = ["--limit", "15", "--batch-size", "2", "--checkpoint", str(work / "tuned.pth")]
    with pytest.MonkeyPatch.context() as patched:
        interrupted_after(2, patched)
        patched.chdir(work)
        first = [command[command.index("eval") + 1], "--model", SMALL, "--workers", "0", *begun]
        argv = ["eval", *first, "--r", "4,12", "--json", str(json_file)]
        assert main(argv) == 130
    assert json.loads(json_file.read_text())["done"] == 4
    done = torchrun(work, "--nproc-per-node=2", "--no-python", "--", "tome-ext", *argv, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed     after 4 pictures" in done.stdout
    written = json.loads(json_file.read_text())
    assert [(row["r"], row["images"], row["top1"], row["top5"]) for row in written["results"]] == [
        (r, 15, 100 * top1 / 15, 100 * top5 / 15) for r, (top1, top5) in expected(work).items()
    ]


def test_shares_are_a_partition(work: Path) -> None:
    whole = evaluate.Share.of(work / "flowers", World(0, 0, 1), None)
    for size in (2, 4, 15, 20):
        shares = [
            evaluate.Share.of(work / "flowers", World(rank, rank, size), None)
            for rank in range(size)
        ]
        paths = [path for share in shares for path, _ in share.samples]
        assert sorted(paths) == sorted(path for path, _ in whole.samples)
        assert len(set(paths)) == 15
        assert {share.digest for share in shares} == {whole.digest}
    assert evaluate.loader(shares[-1], {}, 1, torch.device("cpu"), torch.float32, 0) == []


def test_limit_spreads_over_the_classes(work: Path) -> None:
    share = evaluate.Share.of(work / "flowers", World(0, 0, 1), 8)
    assert len(share) == 8
    assert {target for _, target in share.samples} == set(range(7))
    assert len(evaluate.Share.of(work / "flowers", World(0, 0, 1), 99)) == 15


def test_devices_of_processes() -> None:
    assert World(1, 1, 2).device_name("cuda") == "cuda:1"
    assert World(1, 1, 2).device_name("cpu") == "cpu"
    assert World(0, 0, 1).device_name("cuda:3") == "cuda:3"
    with pytest.raises(CommandError, match="without a number for 2 processes, got 'cuda:1'"):
        World(1, 1, 2).device_name("cuda:1")


def test_error_of_a_difference_counts_the_pictures_that_change() -> None:
    counts = torch.tensor([[200, 100, 150, 0, 0], [200, 94, 150, 10, 4]])
    tally = evaluate.Tally(200, counts, torch.tensor([2.0, 1.0]).double())
    _, row = evaluate.rows_of((None, Reduction(r=8)), tally, {})
    differences = torch.tensor([1.0] * 10 + [-1.0] * 4 + [0.0] * 186).double()
    assert row.lost == pytest.approx(100 * differences.mean().item())
    error = differences.std(correction=0).item() / 200**0.5
    assert row.lost_error == pytest.approx(100 * error)


# --- what survives ------------------------------------------------------------------------------


def interrupted_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C in the midst of the batch after so many."""
    forward, calls = evaluate.timed, itertools.count()
    # Three settings, and each of them once more in the first batch.
    last = 3 * (batches + 1) + 1

    def timed(*arguments: Any) -> Any:
        if next(calls) == last:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(evaluate, "timed", timed)


def test_what_is_counted_survives_and_is_gone_on_from(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = arguments(work, "--r", "4,12", "--batch-size", 4, "--json", tmp_path / "x.json")
    with monkeypatch.context() as patched:
        interrupted_after(2, patched)
        assert main(argv) == 130
    out, err = capsys.readouterr()
    assert "stopped after 8 of 15 pictures; the same command with --resume goes on" in err
    assert {row[0] for row in rows_of(out).values()} == {"8"}
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["complete"], written["done"]) == (False, 8)
    assert [row["images"] for row in written["results"]] == [8, 8, 8]

    changed = work / "changed.pth"
    state = torch.load(work / "tuned.pth")
    torch.save({name: value + 1 for name, value in state.items()}, changed)
    other = ["--checkpoint", changed, "--resume"]
    assert "begun with weights = " in fails(capsys, *argv, *other)
    kept = (work / "tuned.pth").read_bytes()
    (work / "tuned.pth").write_bytes(changed.read_bytes())
    assert "begun with weights_sha256 = " in fails(capsys, *argv, "--resume")
    (work / "tuned.pth").write_bytes(kept)
    line = fails(capsys, *argv, "--resume", "--dtype", "bfloat16")
    assert "was begun with dtype = 'float32', and this command has 'bfloat16'" in line
    assert main([*argv, "--resume"]) == 0
    assert "resumed     after 8 pictures" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["complete"]
    assert [(row["images"], row["top1"], row["top5"]) for row in written["results"]] == [
        (15, 100 * top1 / 15, 100 * top5 / 15) for top1, top5 in expected(work).values()
    ]
    assert main([*argv, "--resume"]) == 0  # of what is complete, the table again
    assert {row[0] for row in rows_of(capsys.readouterr().out).values()} == {"15"}


def test_results_are_written_as_they_come(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = evaluate.write_json

    def write_json(path: Path, content: Any) -> None:
        write(path, content)
        written.append(json.loads(path.read_text())["done"])

    monkeypatch.setattr(evaluate, "write_json", write_json)
    monkeypatch.setattr(evaluate, "BETWEEN_WRITES", 0.0)
    json_file = tmp_path / "x.json"
    assert main(arguments(work, "--r", 4, "--batch-size", 4, "--json", json_file)) == 0
    assert written == [4, 8, 12, 15]
    assert list(tmp_path.iterdir()) == [json_file]


def test_mistakes_in_results(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "expected --json FILE" in fails(capsys, *arguments(work, "--resume"))
    assert "can't write /proc/x.json" in fails(capsys, *arguments(work, "--json", "/proc/x.json"))
    (tmp_path / "x.json").write_text("{")
    argv = arguments(work, "--json", tmp_path / "x.json", "--resume")
    assert "it is not JSON" in fails(capsys, *argv)


def test_settings_take_turns(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, order = evaluate.timed, []

    def timed(model: Any, x: Any, setting: Any) -> Any:
        order.append(0 if setting is None else setting.r)
        return forward(model, x, setting)

    monkeypatch.setattr(evaluate, "timed", timed)
    reductions = (Reduction(r=4), Reduction(r=12))
    evaluate.run(
        work / "flowers", SMALL, reductions, batch_size=1, workers=0, checkpoint=work / "tuned.pth"
    )
    batches = [tuple(order[i : i + 3]) for i in range(6, len(order), 3)]
    assert len(batches) == 14
    assert all(set(batch) == set(R_VALUES) for batch in batches)
    assert len({batch[0] for batch in batches}) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_pictures_are_left_out_and_named(
    workers: int, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "flowers"
    shutil.copytree(work / "flowers", folder)
    (folder / "cat" / "a.png").write_text("no picture")
    os.mkfifo(folder / "dog" / "pipe.png")
    (folder / "dog" / "up").symlink_to(folder)  # a loop
    argv = ["eval", folder, "--model", SMALL, "--checkpoint", work / "tuned.pth", "--r", "4,12"]
    argv += ["--workers", workers, "--batch-size", 1, "--json", tmp_path / "x.json"]
    assert main([*map(str, argv), "--skip-unreadable"]) == 0
    out = capsys.readouterr().out
    left_out = [f"{folder}/cat/a.png", f"{folder}/dog/pipe.png"]
    assert out.endswith("\n  ".join(["left out, as they can't be read: 2", *left_out]) + "\n")
    written = json.loads((tmp_path / "x.json").read_text())
    assert (written["done"], written["unreadable"]) == (17, left_out)
    assert [(row["images"], row["top1"]) for row in written["results"]] == [
        (15, 100 * top1 / 15) for top1, _ in expected(work).values()
    ]


def test_nothing_that_can_be_read(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_text("no picture")
    argv = ["eval", tmp_path, "--model", SMALL, "--checkpoint", work / "tuned.pth"]
    line = fails(capsys, *argv, "--workers", 0, "--skip-unreadable")
    assert f"none of the 7 pictures in {tmp_path} can be read" in line


# --- the paper's numbers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-1k's thousand folders with a tiny picture each."""
    folder = tmp_path_factory.mktemp("imagenet")
    for i, name in enumerate(timm.data.ImageNetInfo().label_names()):
        (folder / name).mkdir()
        Image.new("RGB", (4, 4), (i % 256, 0, 0)).save(folder / name / "0.png")
    return folder


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give timm's pretrained models random weights, as there is no network."""
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: Any) -> Any:
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create_model)


def test_paper_stands_beside_its_models(
    imagenet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained(monkeypatch)
    short = ["--r", "1,13", "--limit", "2", "--workers", "0"]
    # timm's default weights of this name are the paper's.
    assert main(["eval", str(imagenet), "--model", "vit_small_patch16_224", *short]) == 0
    out = capsys.readouterr().out
    assert "vit_small_patch16_224.augreg_in21k_ft_in1k, pretrained weights" in out
    shown = rows_of(out)
    assert (shown[0][-1], shown[13][-1]) == ("81.41", "79.30")
    assert len(shown[1]) == len(shown[13]) - 1  # the paper has no r = 1
    assert "arXiv 2210.09461" in out

    size = ["--img-size", "32"]
    assert main(["eval", str(imagenet), "--model", "vit_small_patch16_224", *short, *size]) == 0
    assert "paper" not in capsys.readouterr().out


def test_papers_models_are_timms() -> None:
    for name, numbers in evaluate.PAPER.items():
        config = timm.get_pretrained_cfg(name)
        assert config is not None
        assert (config.num_classes, config.tag) == (1000, "augreg_in21k_ft_in1k")
        first, *merged = numbers
        assert first == 0
        assert len(merged) == 1
        row = f"| `{name}` | {numbers[0]:.2f} | {numbers[merged[0]]:.2f} (r = {merged[0]}) |"
        assert row in DOC.read_text()


def test_other_thousand_classes_are_not_imagenet(imagenet: Path, tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for i, folder in enumerate(sorted(imagenet.iterdir())):
        (tmp_path / "all" / f"class {i}").symlink_to(folder)
    one = World(0, 0, 1)
    assert evaluate.is_imagenet(evaluate.Share.of(imagenet, one, 3))
    assert not evaluate.is_imagenet(evaluate.Share.of(tmp_path / "all", one, None))


# --- mistakes -----------------------------------------------------------------------------------


def test_mistakes_in_folders(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", SMALL, "--checkpoint", work / "tuned.pth"]
    assert "there is no folder /nowhere" in fails(capsys, "eval", "/nowhere", *given)
    assert "there is no folder" in fails(capsys, "eval", work / "tuned.pth", *given)
    (tmp_path / "ant").mkdir()
    assert "no pictures in" in fails(capsys, "eval", tmp_path, *given)
    Image.new("RGB", (8, 8)).save(tmp_path / "stray.png")
    assert "itself; expected them in a folder per class" in fails(capsys, "eval", tmp_path, *given)
    line = fails(capsys, *arguments(work, "--json", tmp_path / "no" / "x.json"))
    assert "there is no folder" in line


def test_other_number_of_classes(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    untrained(monkeypatch)
    line = fails(capsys, "eval", work / "flowers", "--model", SMALL)
    assert re.search(r"'test_vit' has 1000 classes, but .*flowers has 7", line)
    assert "--checkpoint" in line


def test_mistakes_in_models(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flowers = work / "flowers"
    line = fails(capsys, "eval", flowers, "--model", SMALL)
    assert "can't load pretrained weights of 'test_vit' (HF_HUB_OFFLINE is set)" in line
    assert "did you mean" in fails(capsys, "eval", flowers, "--model", "test_vitt")
    assert "required: --model" in fails(capsys, "eval", flowers)
    convolutional = timm.create_model("test_resnet", num_classes=7)
    torch.save(convolutional.state_dict(), tmp_path / "resnet.pth")
    given = ["--model", "test_resnet", "--checkpoint", tmp_path / "resnet.pth"]
    assert "ResNet" in fails(capsys, "eval", flowers, *given)
    assert "can't use the device 'nonsense'" in fails(
        capsys, *arguments(work, "--device", "nonsense")
    )
    assert "at least 0, got '-1'" in fails(capsys, *arguments(work, "--workers=-1"))


class Code:
    """What runs code where a file that holds it is loaded without care."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return Path.touch, (self.made,)


def test_mistakes_in_checkpoints(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flowers, state = work / "flowers", torch.load(work / "tuned.pth")

    def line_for(path: Path) -> str:
        return fails(capsys, "eval", flowers, "--model", SMALL, "--checkpoint", path)

    assert "there is no checkpoint" in line_for(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("no weights")
    assert re.search(r"text\.pth is no checkpoint of 'test_vit'", line_for(tmp_path / "text.pth"))
    torch.save({"state_dict": state, "code": Code(tmp_path / "ran")}, tmp_path / "code.pth")
    assert "is no checkpoint of" in line_for(tmp_path / "code.pth")
    assert not (tmp_path / "ran").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    assert "is no checkpoint of" in line_for(tmp_path / "list.pth")
    torch.save({**state, "head.bias": torch.zeros(9)}, tmp_path / "nine.pth")
    line = line_for(tmp_path / "nine.pth")
    assert "with 7 classes, as many as" in line
    assert "size mismatch for head.bias" in line
    del state["norm.weight"]
    torch.save(state, tmp_path / "part.pth")
    assert 'Missing key(s) in state_dict: "norm.weight"' in line_for(tmp_path / "part.pth")


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_picture_is_named(
    workers: int, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in CLASSES:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "good.png")
    whole = (tmp_path / "cat" / "good.png").read_bytes()
    (tmp_path / "cat" / "broken.png").write_bytes(whole[: len(whole) // 2])
    argv = ["eval", tmp_path, "--model", SMALL, "--checkpoint", work / "tuned.pth"]
    line = fails(capsys, *argv, "--workers", workers)
    assert line.startswith(f"tome-ext: error: can't read the picture {tmp_path}/cat/broken.png: ")


def test_output_that_is_not_finite(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(work / "tuned.pth")
    state["head.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pth")
    argv = ["eval", work / "flowers", "--model", SMALL, "--checkpoint", tmp_path / "nan.pth"]
    assert "unpatched: NaN or infinite output of the model in float32" in fails(
        capsys, *argv, "--workers", 0
    )


@pytest.mark.slow
def test_mistake_is_told_once_by_many_processes(work: Path) -> None:
    command = ["--nproc-per-node=2", "--no-python", "--", "tome-ext", "eval", "nowhere"]
    done = torchrun(work, *command, "--model", SMALL)
    assert done.returncode != 0
    assert done.stderr.count("tome-ext: error: there is no folder nowhere") == 1
    assert done.stderr.count("tome-ext: error") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux does")
def test_no_thread_of_gloo_is_left_when_python_ends_after_an_error(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("""
import atexit, os

import torch
from torch import distributed
from tome_ext._command import CommandError
from tome_ext._world import World

@atexit.register  # the first of all is called last
def count():
    names = [open(f"/proc/self/task/{id}/comm").read() for id in os.listdir("/proc/self/task")]
    left = [name for name in names if "gloo" in name]
    # At once: of two processes' prints the parts may be mixed.
    os.write(1, f"LEFT {left} {distributed.is_initialized()}\\n".encode())

def prepare():
    if world.rank == 0:
        raise CommandError("the mistake")

with World.join() as world:
    world.gather(torch.zeros(3))
    world.agree(prepare, str)
""")
    done = torchrun(tmp_path, "--nproc-per-node=2", str(script))
    assert done.returncode != 0
    assert done.stderr.count("CommandError: the mistake") == 1
    # The other one may have been stopped by torchrun before.
    assert set(re.findall("LEFT .*", done.stdout)) == {"LEFT [] False"}


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "EVAL_PACKAGES", ("numpy", "no_such_package"))
    line = fails(capsys, *arguments(work))
    assert "tome-ext eval needs no_such_package: pip install 'tome_ext[eval]'" in line
