"""tome-ext bench: fair contenders, right figures, and one line for every mistake."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from commands import fails
from models import DEPTH, GRID, images, tiny
from PIL import Image

from tome_ext import _supported, bench, patch
from tome_ext._command import CommandError, Reduction
from tome_ext.bench import _chart, _contenders, _cost, _rows, _run
from tome_ext.bench.timing import cpu_name, interleave, ratio
from tome_ext_cli import commands, main

SMALL = ["--model", "test_vit", "--img-size", "64", "--batch-size", "2", "--seconds", "0"]
BLOCKS, TOKENS, CHANNELS, HIDDEN = 6, 17, 64, 192  # of timm's test_vit at 64 x 64 pixels
STOCK = Path(__file__).parents[2] / "bench" / "stock.py"


@pytest.fixture(scope="module", autouse=True)
def peers() -> Iterator[None]:
    """A module of peers, of which only the first is fit."""

    def broken(model: Any, r: int) -> Any:
        raise RuntimeError(f"knows no {type(model).__name__}\nand never will")

    module: Any = types.ModuleType("some_peers")
    module.good = lambda model, r: patch.timm(model, r=r)
    module.idle = lambda model, r: model
    module.broken = broken
    with pytest.MonkeyPatch.context() as change:
        change.setitem(sys.modules, "some_peers", module)
        yield


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """The output, the JSON and the chart of a run of two values of r."""
    folder = tmp_path_factory.mktemp("bench")
    figures, chart = folder / "figures.json", folder / "chart.png"
    options = ["--r", "0,2", "--json", str(figures), "--chart", str(chart)]
    options += ["--peer", f"{STOCK}:patch"]
    for name in ("good", "idle", "broken"):
        options += ["--peer", f"{name}=some_peers:{name}"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert main(["bench", *SMALL, *options]) == 0
    assert err.getvalue() == ""  # no progress bar into a pipe
    return out.getvalue(), json.loads(figures.read_text()), chart


def test_a_run(result: tuple[str, dict[str, Any], Path]) -> None:
    out, content, chart = result
    assert set(content) == {"machine", "settings", "rows"}
    assert {"cpu", "threads", "isa", "torch", "tome_ext"} <= set(content["machine"])
    assert content["settings"]["mode"] == "eager"
    assert [row["r"] for row in content["rows"]] == [0, 2]
    for row in content["rows"]:
        assert (row["model"], row["image_size"]) == ("test_vit", [64, 64])
        assert (row["dtype"], row["batch_size"]) == ("float32", 2)
        assert row["rounds"] >= _run.FEWEST_ROUNDS
        contenders = row["contenders"]
        idle = ["idle"] if row["r"] == 0 else []
        assert list(contenders) == ["unpatched", "ceiling", "tome_ext", "stock", "good", *idle]
        for figures in contenders.values():
            assert figures["images_per_second"] == pytest.approx(2e3 / figures["median_ms"])
            assert figures["p90_ms"] >= figures["median_ms"] > 0
            assert figures["extra_memory"] > 0
        left = TOKENS - BLOCKS * row["r"]
        tokens = {name: figures["tokens_left"] for name, figures in contenders.items()}
        assert tokens.pop("unpatched") == TOKENS
        assert set(tokens.values()) == {left}
        assert contenders["unpatched"]["speed_up"] == contenders["ceiling"]["of_ceiling"] == 1
        assert row["left_out"]["broken"] == (
            "RuntimeError: knows no VisionTransformer and never will"
        )
    assert "expected those of the ceiling" in content["rows"][1]["left_out"]["idle"]

    lines = out.splitlines()
    assert "test_vit, 64 x 64, float32, batch of 2" in lines
    shown = [re.split(r"  +", line.strip())[-1] for line in lines if " ceiling (sliced) " in line]
    assert shown == [str(TOKENS), str(TOKENS - 2 * BLOCKS)]
    assert any(re.match(r" +2  unpatched .* 1\.00x ", line) for line in lines)
    assert sum("broken: left out, RuntimeError: knows no" in line for line in lines) == 2
    with Image.open(chart) as img:
        img.load()
        assert img.format == "PNG"
        assert img.width > img.height > 400


def test_flops_of_a_run(result: tuple[str, dict[str, Any], Path]) -> None:
    _, content, _ = result
    unpatched, merged = (row["contenders"] for row in content["rows"])
    expected = flops([TOKENS] * (BLOCKS + 1))
    assert unpatched["tome_ext"]["flops_per_image"] == expected
    assert merged["unpatched"]["flops_per_image"] == expected
    counts = [TOKENS - 2 * layer for layer in range(BLOCKS + 1)]
    ceiling = flops(counts)
    assert merged["ceiling"]["flops_per_image"] == ceiling
    # The stock form multiplies the class token too, and hides its scores.
    for name, prefix in (("tome_ext", 1), ("stock", 0)):
        free = [count - prefix for count in counts[:-1]]
        pairs = sum((n + 1) // 2 * (n // 2) for n in free)
        assert merged[name]["flops_per_image"] == ceiling + 2 * pairs * (CHANNELS // 2)  # two heads


def flops(counts: list[int]) -> int:
    """Of test_vit, by hand; ``counts`` are the tokens before each layer and after the last."""
    total = 2 * (TOKENS - 1) * (3 * 16 * 16) * CHANNELS + 2 * CHANNELS * 1000
    for before, after in itertools.pairwise(counts):
        total += 2 * before * CHANNELS * 4 * CHANNELS + 4 * before * before * CHANNELS
        total += 2 * after * CHANNELS * HIDDEN * 2
    return total


def test_methods_by_keep_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, chart = tmp_path / "x.json", tmp_path / "x.svg"
    argv = ["bench", *SMALL, "--method", "tome,evit,topk", "--keep-rate", "0.5,1"]
    argv += ["--peer", "some_peers:good", "--json", str(figures), "--chart", str(chart)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "test_vit, 64 x 64, float32, batch of 2, evit\nkeep " in out
    assert out.count("some_peers: left out, it takes r, not a keep rate") == 6
    left = {
        (row["method"], row["keep_rate"], name): contender["tokens_left"]
        for row in json.loads(figures.read_text())["rows"]
        for name, contender in row["contenders"].items()
    }
    assert len(left) == 18
    for name in ("ceiling", "tome_ext"):
        for method, tokens in {"tome": 3, "evit": 5, "topk": 3}.items():
            assert left[method, 0.5, name] == tokens
            assert left[method, 1.0, name] == TOKENS
    assert "<!-- keep rate -->" in chart.read_text()  # a text that is drawn


def test_every_combination_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    options = bench.Options(
        ("test_vit", "test_vit2"), (Reduction(r=1),), (1, 2), ("float32", "bfloat16"),
        image_size=32, seconds=0, json=file,
    )  # fmt: skip
    rows = bench.run(options)
    found = [(row.model, row.dtype, row.batch_size, row.r) for row in rows]
    assert len(set(found)) == len(found) == 8
    assert len(json.loads(file.read_text())["rows"]) == 8
    assert all(row.image_size == (32, 32) for row in rows)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    gradients = _contenders._gradients

    def watched(model: Any, x: Any) -> Any:
        found = gradients(model, x)
        seen.append((model.training, [each is not None for each in found]))
        return found

    monkeypatch.setattr(_contenders, "_gradients", watched)
    file = tmp_path / "figures.json"
    assert main(["bench", *SMALL, "--r", "2", "--train", "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["settings"]["train"] is True
    (row,) = content["rows"]
    assert list(row["contenders"]) == ["unpatched", "ceiling", "tome_ext"]
    assert len(seen) >= 3 * row["rounds"]
    assert all(training and all(has) for training, has in seen)
    weights = 4 * sum(x.numel() for x in timm.create_model("test_vit", img_size=64).parameters())
    assert all(each["extra_memory"] > weights for each in row["contenders"].values())  # gradients


def test_tables_for_documents_and_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, document = tmp_path / "x.csv", tmp_path / "x.md"
    argv = ["bench", *SMALL, "--r", "0,2", "--csv", str(table), "--markdown", str(document)]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "%|" not in err  # no progress bar into a pipe
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    found = [(line["r"], line["contender"], line["tokens_left"]) for line in lines]
    names = ("unpatched", "ceiling", "tome_ext")
    assert found[:3] == [("0", name, str(TOKENS)) for name in names]
    assert [line[0] for line in found[3:]] == ["2"] * 3
    text = document.read_text()
    assert "\ntest_vit, 64 x 64, float32, batch of 2:\n" in text
    cells = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    assert len(cells) == 2 + 6
    assert len({len(line) for line in cells}) == 1
    speeds = [line[5].strip() for line in cells[2:]]
    assert all(speed in out for speed in speeds)


def test_a_failed_write_is_a_line_and_destroys_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    argv = ["bench", *SMALL, "--r", "2", "--json", str(file)]
    assert main(argv) == 0
    before = file.read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert fails(capsys, *argv).endswith(f"can't write {file}: No space left on device")
    assert file.read_text() == before
    assert "can't write /proc/x.csv" in fails(capsys, "bench", *SMALL, "--csv", "/proc/x.csv")


def test_memory_that_is_not_there_is_a_line() -> None:
    class Hungry(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.empty(2**60)

    model = tiny()
    model.head = Hungry()
    with pytest.raises(CommandError, match=r"^a batch of \d+ does not fit: .*memory") as told:
        _run.measure(model, images(), Reduction(r=4), "eager", 0.0, [])
    assert "\n" not in str(told.value)


def test_models_by_wildcard() -> None:
    assert _supported.expand(("test_vit?", "a", "test_vit2")) == (
        "test_vit2", "test_vit3", "test_vit4", "a",
    )  # fmt: skip
    for name, message in (
        ("test_res*", "no supported model matches 'test_res.'"),
        ("hf:*", "expected . and . in names of timm"),
        ("nothing:*", "expected . and . in names of timm"),
    ):
        with pytest.raises(CommandError, match=message):
            _supported.expand((name,))


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "timm has no model 'test_vit9'; did you mean" in fails(
        capsys, "bench", "--model", "test_vit9"
    )
    assert "resnet" in fails(capsys, "bench", "--model", "test_vit,resnet10t").lower()
    assert "graphs are CUDA graphs" in fails(capsys, "bench", *SMALL, "--mode", "graphs")
    engine = ("bench", *SMALL, "--mode", "onnxruntime")
    assert "expected --mode eager or compile, got onnxruntime" in fails(capsys, *engine, "--train")
    assert "expected --dtype float32, got float16" in fails(capsys, *engine, "--dtype", "float16")
    assert "expected --device cpu, got meta" in fails(capsys, *engine, "--device", "meta")
    assert "expected no --peer" in fails(capsys, *engine, "--peer", "math:sqrt")
    assert "can't use the device 'nonsense'" in fails(
        capsys, "bench", *SMALL, "--device", "nonsense"
    )
    assert "there is no folder" in fails(
        capsys, "bench", *SMALL, "--json", tmp_path / "no" / "x.json"
    )
    assert "name it .png" in fails(capsys, "bench", *SMALL, "--chart", tmp_path / "x.txt")
    assert "needs a multiple of 16, got 40" in fails(capsys, "bench", *SMALL, "--img-size", 40)
    for peer, message in (
        ("some_peers", r"expected \[NAME=\]MODULE:FUNCTION, got 'some_peers'"),
        ("some_peers:worse", "can't import worse from some_peers: AttributeError"),
        ("no_such_module:patch", "can't import patch .*ModuleNotFoundError"),
        (f"{tmp_path}/x.py:patch", "can't import patch .*FileNotFoundError"),
        ("some_peers:__name__", "expected a function"),
        ("ceiling=some_peers:good", "the name 'ceiling' is taken"),
    ):
        assert re.search(message, fails(capsys, "bench", *SMALL, "--peer", peer))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "2,x"], "expected numbers of at least 0 .* got '2,x'"),
        (["--r=-1"], "got '-1'"),
        (["--batch-size", "1,0"], "expected a number of at least 1, got '0'"),
        (["--dtype", "float32,int8"], "expected some of float32, .* got 'int8'"),
        (["--mode", "fast"], "invalid choice: '?fast"),
        (["--seconds=-1"], "expected a number of seconds, got '-1'"),
    ],
)
def test_mistakes_in_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(message, fails(capsys, "bench", *arguments))


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "CHART_PACKAGES", ("no_such_package",))
    line = fails(capsys, "bench", "--chart", "x.png")
    assert "no_such_package: pip install 'tome_ext[bench]'" in line
    assert "no model" in fails(capsys, "bench", "--model", "x")  # without a chart it is not asked
    monkeypatch.setattr(commands, "BENCH_PACKAGES", ("timm", "no_such_package"))
    assert "no_such_package: pip install 'tome_ext[bench]'" in fails(capsys, "bench")


# --- contenders ---------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, 5, 40])
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4, "init_values": 0.5}])
def test_ceiling_has_the_tokens_of_merging(r: int, options: dict[str, Any]) -> None:
    x, places = images(), _contenders.counted_in(tiny(**options))
    sliced = _contenders.sliced(tiny(**options), Reduction(r=r))
    counts = _contenders.count_tokens(sliced, x, places)
    assert counts == _contenders.count_tokens(Reduction(r=r).patch(tiny(**options)), x, places)
    prefix = 1 + options.get("reg_tokens", 0)
    num_tokens = prefix + GRID**2
    for count in counts:
        num_tokens -= min(r, (num_tokens - prefix) // 2)
        assert count == num_tokens


@pytest.mark.parametrize("method", ["tome", "guided", "evit", "topk"])
@pytest.mark.parametrize("amount", [{"r": 5}, {"r": 40}, {"keep_rate": 0.7}])
def test_ceiling_has_the_tokens_of_every_method(method: Any, amount: dict[str, Any]) -> None:
    x, reduction, places = images(), Reduction(method, **amount), _contenders.counted_in(tiny())
    counts = _contenders.count_tokens(_contenders.sliced(tiny(), reduction), x, places)
    assert counts == _contenders.count_tokens(reduction.patch(tiny()), x, places)
    assert counts[-1] < 1 + GRID**2


def test_ceiling_without_r_is_the_model() -> None:
    model, x = tiny(), images()
    other = _contenders.share_weights(model)
    assert torch.equal(_contenders.sliced(other, Reduction())(x), model(x))
    with pytest.raises(ValueError, match=r"expected r or keep_rate, .* got threshold = 0\.9"):
        _contenders.sliced(other, Reduction(threshold=0.9))
    assert all(a is b for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_other_tokens_than_the_ceilings_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reduction, "patch", lambda _, model, **options: patch.timm(model, r=5))
    with pytest.raises(RuntimeError, match=r"ceiling, \[61, 57, 53\], got \[60, 55, 50\] in tome_"):
        _run.measure(tiny(), images(), Reduction(r=4), "eager", 0.0, [])


def test_stock_computes_what_the_patch_does() -> None:
    (peer,) = _contenders.find_peers((f"{STOCK}:patch",))
    assert peer.name == "stock"
    for options in ({}, {"init_values": 0.5, "qk_norm": True}):
        model, x = tiny(**options).double(), images(dtype=torch.float64)
        expected = patch.timm(_contenders.share_weights(model), r=6)(x)
        torch.testing.assert_close(peer.patch(model, 6)(x), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="at most a class token, got 3"):
        peer.patch(tiny(reg_tokens=2), 6)


def test_published_package_takes_part_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "tome"
    package.mkdir()
    (package / "__init__.py").write_text("from tome_ext import patch\n")
    monkeypatch.syspath_prepend(tmp_path)
    peers = _contenders.find_peers(())
    assert [peer.name for peer in peers] == ["tome"]
    figures, left_out, _ = _run.measure(tiny(), images(), Reduction(r=4), "eager", 0.0, peers)
    del sys.modules["tome"]  # for good: monkeypatch would put it back
    assert left_out == {}
    assert figures["tome"].tokens_left == 1 + GRID**2 - 4 * DEPTH


@pytest.mark.compiler
def test_compiled() -> None:
    figures, left_out, rounds = _run.measure(
        tiny(depth=1), images(), Reduction(r=4), "compile", 0.0, []
    )
    assert (set(figures), left_out) == ({"unpatched", "ceiling", "tome_ext"}, {})
    assert rounds == _run.FEWEST_ROUNDS
    assert all(each.extra_memory is None for each in figures.values())
    assert all(each.flops_per_image > 0 for each in figures.values())


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_on_a_gpu(mode: str) -> None:
    model, x = tiny().cuda(), images(device="cuda")
    figures, _, _ = _run.measure(model, x, Reduction(r=4), mode, 0.1, [])
    assert all(each.extra_memory > 0 for each in figures.values())  # type: ignore[operator]
    assert all(each.median_ms > 0 for each in figures.values())


# --- figures ------------------------------------------------------------------------------------


def test_figures_of_known_times() -> None:
    times = {"unpatched": [4.0, 8.0, 6.0], "ceiling": [2.0, 2.0, 3.0], "tome_ext": [4.0, 2.0, 4.0]}
    cost = _rows.Cost([9, 7], 100, None)
    figures = _rows.summarize(times, dict.fromkeys(times, cost), batch_size=8)
    ours = figures["tome_ext"]
    assert (ours.median_ms, ours.p90_ms, ours.images_per_second) == (4, 4, 2000)
    assert (ours.speed_up, ours.of_ceiling) == (1.5, 0.75)
    assert (ours.flops_per_image, ours.extra_memory, ours.tokens_left) == (100, None, 7)
    tenths = {name: [float(n) for n in range(10, 0, -1)] for name in times}
    assert _rows.summarize(tenths, dict.fromkeys(times, cost), 1)["ceiling"].p90_ms == 9


def test_a_ratio_that_contradicts_its_figures_is_not_printed() -> None:
    # Medians of 3.87 and 1.17 ms, and 1.05 as the median of the ratios.
    times = {
        "unpatched": [1.2, 1.23, 3.87, 3.9, 4.0],
        "ceiling": [1.2, 1.2, 3.8, 3.9, 4.0],
        "tome_ext": [1.14, 1.17, 1.1, 3.9, 4.1],
    }
    cost = _rows.Cost([9], 100, None)
    figures = _rows.summarize(times, dict.fromkeys(times, cost), batch_size=1)
    assert (figures["tome_ext"].median_ms, figures["unpatched"].median_ms) == (1.17, 3.87)
    assert figures["tome_ext"].speed_up == pytest.approx(1.05, abs=0.01)
    unsteady = {name: each.unsteady for name, each in figures.items()}
    assert unsteady == {"unpatched": (), "ceiling": (), "tome_ext": ("speed_up", "of_ceiling")}
    figures["unpatched"] = replace(figures["unpatched"], unsteady=("of_ceiling",))
    row = _rows.Row("m", (8, 8), "float32", 1, "tome", 1, None, 5, figures, {})
    lines = _rows.lines(row)
    assert "1.05" not in "\n".join(lines)
    assert re.search(r"unpatched .* 1\.00x +\? ", lines[0])  # the other ratio stays
    text = _rows.csv_text(
        [row],
        {"cpu": "c", "threads": 1, "torch": "t"},
        {"mode": "eager", "train": False, "device": "cpu"},
    )
    assert [each["unsteady"] for each in csv.DictReader(io.StringIO(text))] == [
        "of_ceiling", "", "speed_up of_ceiling"
    ]  # fmt: skip


def test_times_that_contradict_each_other_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[int] = []

    def times_of(runs: dict[str, Any], *_: object) -> dict[str, list[float]]:
        tries.append(1)
        odd = [1.0, 1.0, 1.0, 9.0, 9.0] if len(tries) < 3 else [9.0] * 5
        steady = [1.0, 1.0, 9.0, 9.0, 9.0] if len(tries) < 3 else [9.0] * 5
        return {name: odd if name == "tome_ext" else steady for name in runs}

    monkeypatch.setattr(_run, "interleave", times_of)
    figures, _, _ = _run.measure(tiny(), images(), Reduction(r=4), "eager", 0.0, [])
    assert len(tries) == 3
    assert not any(each.unsteady for each in figures.values())


def test_processors_of_one_name_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    told = "processor\t: {}\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
    file.write_text(told.format(0) + told.format(1))
    assert cpu_name(file) == "AMD EPYC (family 25, model 17)"
    file.write_text("processor\t: 0\nmodel name\t: Some Arm\n")
    assert cpu_name(file) == "Some Arm"
    assert cpu_name(tmp_path / "none")  # the architecture, at least


def test_contenders_take_turns() -> None:
    calls: list[str] = []
    shares: list[float] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(contenders, 0.0, warm_up=1, fewest=40, on_progress=shares.append)
    assert all(len(ms) == 40 for ms in times.values())
    assert shares == [n / 40 for n in range(1, 41)]
    rounds = {"".join(calls[n : n + 3]) for n in range(0, len(calls), 3)}
    assert rounds == {"abc", "acb", "bac", "bca", "cab", "cba"}
    assert ratio({"x": [2.0, 9.0, 4.0], "y": [1.0, 1.0, 1.0]}, "x", "y") == 4


def test_memory_of_known_functions() -> None:
    weight, x = torch.randn(100, 100), torch.randn(3, 7, 100)

    def allocate() -> None:
        a = torch.empty(1000)
        b = torch.empty(2000)
        del a
        c = torch.empty(500)
        del b, c
        torch.empty(10)

    def views() -> torch.Tensor:
        y = F.linear(x, weight)
        part = y.view(21, 100)[:5]
        del y  # its storage lives on in the view
        return part + 1

    for inference in (True, False):
        with torch.inference_mode(inference):
            assert _cost.live_bytes(allocate) == 4 * 3000
            assert _cost.live_bytes(views) == 4 * (2100 + 500)
            assert _cost.live_bytes(lambda: x.mul_(1).view(-1)) == 0


def test_chart_of_many_panels(tmp_path: Path) -> None:
    def figures(speed: float) -> _rows.Figures:
        return _rows.Figures(1, 1, speed, speed / 100, speed / 150, 1, None, 5)

    rows = []
    for dtype, batch, r in itertools.product(("float32", "bfloat16"), (1, 8), (0, 8)):
        contenders = {"unpatched": figures(100), "ceiling": figures(100 + 6 * r)}
        contenders |= {"tome_ext": figures(100 + 5 * r)} | ({"tome": figures(90)} if r else {})
        rows.append(
            _rows.Row("a_model", (224, 224), dtype, batch, "tome", r, None, 5, contenders, {})
        )
    machine = {"cpu": "A processor", "threads": 2, "torch": "2", "tome_ext": "0"}
    figure = _chart.draw(rows, machine, {"mode": "eager"})
    assert len(figure.axes) == 4
    for axes in figure.axes:
        lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
        assert lines["unpatched"] == [1, 1]
        assert lines["ceiling (sliced)"] == [1, 1.48]  # the speed-ups of the table
        assert (lines["tome_ext"], lines["tome"]) == ([1, 1.4], [0.9])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["unpatched", "ceiling (sliced)", "tome_ext", "tome"]
    figure.savefig(tmp_path / "chart.svg")
    assert "<svg" in (tmp_path / "chart.svg").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("onnxruntime", "float32"),
        pytest.param("openvino", "float32", marks=pytest.mark.openvino),
        pytest.param("openvino", "bfloat16", marks=pytest.mark.openvino),
    ],
)
def test_in_an_engine(engine: str, dtype: str) -> None:
    options = bench.Options(
        ("test_vit",), (Reduction(r=2),), (2,), (dtype,), mode=engine, image_size=64, seconds=0
    )
    (row,) = bench.run(options)
    assert list(row.contenders) == ["unpatched", "ceiling", "tome_ext", "standard ONNX"]
    assert row.left_out == {}
    left = [figures.tokens_left for figures in row.contenders.values()]
    assert left == [TOKENS, *[TOKENS - 2 * BLOCKS] * 3]
    assert {figures.extra_memory for figures in row.contenders.values()} == {None}
