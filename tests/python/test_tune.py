"""tome_ext.tune and tome-ext tune: budgets, what is claimed, resuming, settings, errors."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import fails
from models import tiny
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tome_ext
from tome_ext import Setting, _search, tuning
from tome_ext._search import Budget, Search
from tome_ext_cli import main

LAYERS = 4


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """The models are too small for threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        return tiny(depth=LAYERS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def setting(model: Any, images: Tensor) -> Setting:
    return tome_ext.tune(model, images, flops=0.7, evaluations=8, seconds=600)


def operations(model: Any, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())


def mean(state: Path, r: list[int], number: int) -> float:
    """The mean deviation of a schedule on the choosing half, as a search has written it."""
    evaluated = json.loads(state.read_text())["evaluated"]
    found = next(each["deviations"] for each in evaluated if each["r"] == r)
    assert len(found) == number
    return math.fsum(found) / number


# --- what is found ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "guided", "evit", "topk"])
def test_the_budget_is_met_and_nothing_worse_is_chosen(
    model: Any, images: Tensor, method: Any, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"
    found = tome_ext.tune(
        model, images, flops=0.6, method=method, evaluations=16, seconds=600, state=state
    )
    one, report = images[:1], found.report
    plain = operations(model, one)
    for r, said in ((report.found, report.found_flops), (report.constant, report.constant_flops)):
        with tome_ext.patch.auto(copy.deepcopy(model).requires_grad_(False), r, method=method) as m:
            assert said == pytest.approx(operations(m, one) / plain)
            assert said <= 0.6
            # With a token more in every layer it would be above.
            m.r = [max(count - 1, 0) for count in r]
            assert operations(m, one) / plain > 0.6
    assert max(report.constant) - min(report.constant) <= 1
    assert report.pictures == 20
    assert mean(state, report.found, 20) <= mean(state, report.constant, 20)
    assert found.r == (report.found if report.better else report.constant)
    assert found.flops == (report.found_flops if report.better else report.constant_flops)
    assert (found.layers, found.tokens, found.image_size) == (LAYERS, 65, [32, 32])


def test_the_report_is_that_of_plain_runs(model: Any, images: Tensor, setting: Setting) -> None:
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    x = images[order[20:]]
    with torch.no_grad():
        wanted = model(x)
        with tome_ext.patch.auto(copy.deepcopy(model), setting.report.constant) as merged:
            deviations = 1 - torch.cosine_similarity(merged(x).double(), wanted.double())
    said = setting.report.constant_deviation
    assert said.mean == pytest.approx(float(deviations.mean()), rel=1e-3)
    assert said.percentile_95 == pytest.approx(float(deviations.quantile(0.95)), rel=1e-3)


def test_the_same_seed_finds_the_same(model: Any, images: Tensor, setting: Setting) -> None:
    batches = [(part, torch.zeros(len(part))) for part in images.split(7)]
    again = tome_ext.tune(model, batches, flops=0.7, evaluations=8, seconds=600)
    assert again == setting
    other = tome_ext.tune(model, images, flops=0.7, evaluations=8, seconds=600, seed=1)
    assert other.report.constant_deviation != setting.report.constant_deviation


def test_a_model_whose_first_block_alone_matters(images: Tensor) -> None:
    """Merging behind the last attention that matters costs nothing, so that is where it goes."""
    model = tiny(depth=LAYERS)
    for block in model.blocks[2:]:
        for last in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    found = tome_ext.tune(model, images, flops=0.75, evaluations=120, seconds=600)
    assert found.r[0] == 0
    assert found.report.better
    assert found.report.found_deviation.mean < 1e-9 < found.report.constant_deviation.mean
    assert "deviates 0.00 times as much as the constant one" in found.verdict


def test_merging_that_changes_nothing_leaves_nothing_to_claim(images: Tensor) -> None:
    model = tiny(depth=LAYERS)
    for block in model.blocks:
        for last in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
    found = tome_ext.tune(model, images, flops=0.75, evaluations=5, seconds=600)
    assert found.r == found.report.constant == found.report.found
    assert not found.report.better
    assert "nothing better than the constant schedule" in found.verdict


def test_noise_is_not_claimed_to_be_a_gain(
    model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noise(self: Any, counts: tuple[int, ...], which: Tensor) -> list[float]:
        return [np.random.default_rng([*counts, i]).lognormal() for i in which.tolist()]

    monkeypatch.setattr(tuning._Runs, "deviations", noise)
    found = tome_ext.tune(model, images, flops=0.7, evaluations=60, seconds=600)
    report = found.report
    assert report.found != report.constant  # by chance it was better on the choosing half
    assert report.high >= 1
    assert not report.better
    assert found.r == report.constant
    assert "do not show that the found schedule is better" in found.verdict


@pytest.mark.parametrize("number", [4, 20])
def test_the_interval_holds_for_few_pictures(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 100 pairs of schedules that are equally good, 2 or 3 may be called better."""
    monkeypatch.setattr(tuning, "RESAMPLES", 400)
    rng = np.random.default_rng(0)
    claimed = 0
    for trial in range(100):
        found, flat = rng.lognormal(sigma=0.5, size=(2, number)).tolist()
        value, low, high = tuning._ratio(found, flat, trial)
        assert low <= value <= high
        claimed += high < 1
    assert claimed <= 4
    assert tuning._student(3) == pytest.approx(3.182, rel=0.01)
    assert tuning._student(19) == pytest.approx(2.093, rel=0.001)


@pytest.mark.parametrize(
    ("variant", "outputs"),
    [
        ({"num_classes": 0}, (2, 32)),
        ({"num_classes": 0, "global_pool": ""}, (2, 65, 32)),
        ({"num_classes": 0, "class_token": False, "global_pool": ""}, (2, 64, 32)),
    ],
)
def test_outputs_of_other_kinds(
    images: Tensor, variant: dict[str, Any], outputs: tuple[int, ...]
) -> None:
    model = tiny(depth=2, **variant)
    assert model(images[:2]).shape == outputs
    found = tome_ext.tune(model, images[:8], flops=0.8, seconds=0)
    assert 0 < found.report.constant_deviation.mean < 1


# --- speed --------------------------------------------------------------------------------------


def test_a_speed_tightens_the_limit_until_it_holds(
    model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def speeds(self: Any, schedules: Any) -> list[float]:
        return [0.9 / self.flops(counts) for counts in schedules]

    monkeypatch.setattr(tuning._Runs, "speeds", speeds)
    state = tmp_path / "state.json"
    options: dict[str, Any] = {"evaluations": 6, "seconds": 600, "state": state}
    found = tome_ext.tune(model, images, speed=1.4, **options)
    assert found.goal == {"speed": 1.4}
    assert found.speed is not None
    assert found.speed >= 1.4
    assert found.report.constant_speed is not None
    assert found.report.constant_speed >= 1.4
    assert 0.55 < found.flops <= 0.9 / 1.4
    assert tome_ext.tune(model, images, speed=1.4, **options) == found
    with pytest.raises(ValueError, match=r"speed: expected 50.0 times .*, reached \d\.\d+ times"):
        tome_ext.tune(model, images, speed=50.0, seconds=0)


def test_speeds_are_measured(model: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MEASURE_SECONDS", 0.0)
    with torch.inference_mode():
        runs = tuning._Runs(model, images[:8], tuning.make_method("tome"), {}, 8)
        found = runs.speeds([(8, 8, 8, 8), (0, 0, 0, 0)])
    assert len(found) == 2
    assert all(0.01 < each < 100 for each in found)


# --- the search by itself -----------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10.0, 40.5, 77.0])
def test_a_shape_just_meets_the_limit(limit: float) -> None:
    def cost(counts: tuple[int, ...]) -> float:
        return 100 - sum(count * weight for count, weight in zip(counts, (3, 2, 1), strict=True))

    budget = Budget(lambda counts: tuple(min(count, 20) for count in counts), cost, limit)
    for shape in ([1.0, 1.0, 1.0], [0.0, 1.0, 5.0], [3.0, 0.5, 0.1]):
        counts = budget.meet(shape)
        if counts is None:
            assert cost(tuple(20 * (weight > 0) for weight in shape)) > limit
            continue
        assert cost(counts) <= limit
        assert cost(tuple(max(count - 1, 0) for count in counts)) > limit
    assert budget.meet([0.0, 0.0, 0.0]) is None


def test_local_search_reaches_the_best_schedule() -> None:
    """Of a cost that is a sum, and deviations with one known best schedule."""
    best = (1, 9, 2, 12, 0, 6)

    def deviations(counts: tuple[int, ...], number: int) -> list[float]:
        off = sum((a - b) ** 2 for a, b in zip(counts, best, strict=True))
        return [off * (1 + 0.1 * i) for i in range(number)]

    search = Search(6, 16, deviations, lambda: False, None, 0)
    found, flat = search.run(Budget(lambda counts: counts, lambda c: 100 - sum(c), 70))
    assert found == best
    assert flat == (5, 5, 5, 5, 5, 5)


def test_shapes_hold_the_constant_linear_ones_and_bumps() -> None:
    found = _search.shapes(12)
    assert found[0] == [1.0] * 12
    assert found[1] == pytest.approx([2 - layer * 2 / 11 for layer in range(12)])
    assert any(max(shape) == shape[6] == 1 and shape[0] < 0.1 for shape in found[5:])
    assert _search.shapes(1) == [[each[0]] for each in _search.shapes(1)]


# --- resuming -----------------------------------------------------------------------------------


def test_a_stopped_search_goes_on_and_evaluates_nothing_twice(
    model: Any, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"flops": 0.6, "evaluations": 30, "seconds": 600}
    wanted = tome_ext.tune(model, images, **options)

    ran: list[Any] = []
    deviations = tuning._Runs.deviations
    stop_at = 12

    def counted(self: Any, counts: tuple[int, ...], which: Tensor) -> list[float]:
        if len(ran) == stop_at:
            raise KeyboardInterrupt
        ran.extend((counts, i) for i in [tuple(which.tolist())])
        return deviations(self, counts, which)

    monkeypatch.setattr(tuning._Runs, "deviations", counted)
    state = tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        tome_ext.tune(model, images, **options, state=state)
    assert len(json.loads(state.read_text())["evaluated"]) > 1
    stop_at = -1
    assert tome_ext.tune(model, images, **options, state=state) == wanted
    alone = [(counts, i) for counts, which in ran for i in which]
    assert len(alone) == len(set(alone))
    assert not list(tmp_path.glob("*.part"))

    ran.clear()
    assert tome_ext.tune(model, images, **options, state=state) == wanted
    assert len(ran) == 2  # the report's
    assert all(len(which) == 20 for _, which in ran)
    known = len(json.loads(state.read_text())["evaluated"])

    # What is known costs no time: the search goes through it before it ends.
    ran.clear()
    tome_ext.tune(model, images, flops=0.6, seconds=0, state=state)
    assert len(json.loads(state.read_text())["evaluated"]) >= known
    assert len(ran) <= 4  # a new one, what finishes the best, and the report's


def test_a_state_of_another_search_is_refused(model: Any, images: Tensor, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    x = images[:8]
    tome_ext.tune(model, x, flops=0.7, seconds=0, state=state)
    before = state.read_text()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.bias[0] += 1
    for name, arguments, options in [
        ("model", (other, x), {"flops": 0.7}),
        ("pictures", (model, x.flip(0)), {"flops": 0.7}),
        ("goal", (model, x), {"flops": 0.6}),
        ("method", (model, x), {"flops": 0.7, "prop_attn": False}),
        ("seed", (model, x), {"flops": 0.7, "seed": 3}),
    ]:
        with pytest.raises(ValueError, match=f"state: .* is of a search with another {name}: exp"):
            tome_ext.tune(*arguments, **options, seconds=0, state=state)
    assert state.read_text() == before
    state.write_text("[1]")
    with pytest.raises(ValueError, match="got something else"):
        tome_ext.tune(model, x, flops=0.7, seconds=0, state=state)
    with pytest.raises(ValueError, match="there is no folder"):
        tome_ext.tune(model, x, flops=0.7, seconds=0, state=tmp_path / "none" / "state.json")


# --- the model and the arguments ----------------------------------------------------------------


def test_the_model_is_left_as_it_was(images: Tensor) -> None:
    model = tiny(depth=2).train()
    model.blocks[0].norm1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = {name: weight.requires_grad for name, weight in model.named_parameters()}
    kinds = [type(module) for module in model.modules()]
    modes = [module.training for module in model.modules()]
    tome_ext.tune(model, images[:8].double(), flops=0.8, seconds=0)
    assert [type(module) for module in model.modules()] == kinds
    assert [module.training for module in model.modules()] == modes
    assert {name: weight.requires_grad for name, weight in model.named_parameters()} == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model(images[:2]).sum().backward()  # type: ignore[no-untyped-call]


def test_progress_is_shown_where_it_is_asked_for(
    model: Any, images: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    tome_ext.tune(model, images[:8], flops=0.8, seconds=0)
    assert capsys.readouterr().err == ""  # no terminal
    tome_ext.tune(model, images[:8], flops=0.8, seconds=0, progress=True)
    assert "1 tried, deviation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected either flops or speed, got flops=None, speed=None"),
        ({"flops": 0.5, "speed": 2.0}, "expected either flops or speed"),
        ({"flops": 1.0}, "flops: expected a number between 0 and 1, got 1.0"),
        ({"flops": "0.5"}, "flops: expected a number"),
        ({"flops": 0.01}, "flops: expected at least 0.[0-9]+, which is what tome reaches"),
        ({"speed": 0.9}, "speed: expected a number above 1, got 0.9"),
        ({"speed": True}, "speed: expected a number above 1, got True"),
        ({"flops": 0.5, "seconds": -1}, "seconds: expected a number of at least 0, got -1"),
        ({"flops": 0.5, "evaluations": 0}, "evaluations: expected at least 1, got 0"),
        ({"flops": 0.5, "batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"flops": 0.5, "seed": 0.5}, "seed: expected an integer"),
        ({"flops": 0.5, "method": "tomato"}, "method: expected one of"),
        ({"flops": 0.5, "prop_attn": 1}, "prop_attn: expected True or False"),
    ],
)
def test_bad_arguments(model: Any, images: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tome_ext.tune(model, images[:8], **{"seconds": 0, **options})


def test_bad_models_and_pictures(model: Any, images: Tensor) -> None:
    goal: dict[str, Any] = {"flops": 0.7, "seconds": 0}
    with pytest.raises(ValueError, match=r"images: expected at least 8 pictures, .* got 7"):
        tome_ext.tune(model, images[:7], **goal)
    with pytest.raises(ValueError, match=r"images: expected at least 8 pictures, .* got 0"):
        tome_ext.tune(model, [], **goal)
    with pytest.raises(ValueError, match=r"images: expected \(P, C, H, W\) floating point"):
        tome_ext.tune(model, (images[:8] * 9).byte(), **goal)
    with pytest.raises(ValueError, match="images: expected pictures of one shape"):
        tome_ext.tune(model, [images[:8], images[:8, :, 1:]], **goal)
    with pytest.raises(ValueError, match="images: expected batches of pictures"):
        tome_ext.tune(model, ["a.png"], **goal)
    with pytest.raises(ValueError, match="takes no input of"):
        tome_ext.tune(model, images[:8, :, :16], **goal)
    with pytest.raises(ValueError, match="NaN or infinite output of the unmerged model"):
        tome_ext.tune(model, images[:8] * math.nan, **goal)
    pooled = tiny(depth=2, class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="no class token"):
        tome_ext.tune(pooled, images[:8], **goal, method="evit")
    with pytest.raises(ValueError, match="Linear"):
        tome_ext.tune(nn.Linear(3, 3), images[:8], **goal)
    with (
        tome_ext.patch.auto(copy.deepcopy(model)) as patched,
        pytest.raises(ValueError, match="expected one that is not patched"),
    ):
        tome_ext.tune(patched, images[:8], **goal)


# --- settings -----------------------------------------------------------------------------------


def test_a_setting_is_saved_and_loaded(setting: Setting, tmp_path: Path) -> None:
    path = tmp_path / "setting.json"
    setting.save(path)
    assert Setting.load(path) == Setting.load(str(path)) == setting
    content = json.loads(path.read_text())
    assert content["format"] == "tome_ext setting"
    assert content["r"] == setting.r
    assert [each.name for each in tmp_path.iterdir()] == ["setting.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no json", "expected JSON, got"),
        ([1], "expected a file of format 'tome_ext setting', got 'list'"),
        ({"format": "other"}, "expected a file of format 'tome_ext setting', got 'other'"),
        ({"version": 2}, "expected version 1, got 2"),
        ({"r": None}, "r: expected a list of integers, got None"),
        ({"r": [1, True, 1, 1]}, "r: expected a list of integers, got"),
        ({"r": [1, 1]}, "r: expected 4 numbers, one per layer, got 2"),
        ({"r": [1, 1, -1, 1]}, "expected an integer >= 0, got -1"),
        ({"tokens": 6.5}, "tokens: expected an integer, got 6.5"),
        ({"flops": "half"}, "flops: expected a number, got 'half'"),
        ({"extra": 1}, "expected the entries .*; got unknown extra"),
        ({"report": {}}, "report: expected the entries .*; got pictures, .* missing"),
        ({"report": 3}, "report: expected an object, got 3"),
        ({"method": "tomato"}, "method: expected one of"),
        ({"options": {"depth": True}}, "options: expected some of"),
    ],
)
def test_what_is_no_setting_is_refused(
    setting: Setting, tmp_path: Path, change: Any, message: str
) -> None:
    path = tmp_path / "setting.json"
    setting.save(path)
    if isinstance(change, dict):
        change = {**json.loads(path.read_text()), **change}
    path.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ValueError, match=message):
        Setting.load(path)


@pytest.mark.parametrize("method", ["tome", "evit"])
def test_a_setting_patches_as_its_numbers_do(
    model: Any, images: Tensor, setting: Setting, tmp_path: Path, method: Any
) -> None:
    option = {"tome": "prop_attn", "evit": "normalize_fused"}[method]
    setting = replace(setting, method=method, r=[0, 9, 4, 1], options={option: method == "evit"})
    setting.save(tmp_path / "setting.json")
    mine = copy.deepcopy(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with tome_ext.patch.auto(mine, setting.r, method=method, **setting.options):
            wanted = mine(images[:2])
        for given in (setting, tmp_path / "setting.json", str(tmp_path / "setting.json")):
            with tome_ext.patch.auto(mine, setting=given):
                assert mine.r == [0, 9, 4, 1]
                assert mine.method == method
                assert torch.equal(mine(images[:2]), wanted)
        with tome_ext.patch.auto(mine), tome_ext.patch.timm(mine, setting=setting):
            assert torch.equal(mine(images[:2]), wanted)  # of a model that is patched already


def test_a_setting_beside_its_parts_is_refused(model: Any, setting: Setting) -> None:
    for given in (
        {"r": 8}, {"method": "topk"}, {"keep_rate": 0.7}, {"prop_attn": False},
        {"normalize_fused": True},
    ):  # fmt: skip
        arguments: dict[str, Any] = {"setting": setting, **given}
        with pytest.raises(ValueError, match=f"expected setting or {next(iter(given))}, got both"):
            tome_ext.patch.auto(copy.deepcopy(model), **arguments)
    with pytest.raises(FileNotFoundError):
        tome_ext.patch.auto(copy.deepcopy(model), setting="none.json")


def test_a_setting_for_another_model(images: Tensor, setting: Setting) -> None:
    deeper = tiny(depth=LAYERS + 1)
    for _ in range(2):
        with pytest.raises(ValueError, match="for a model of 5 layers, got one for 4"):
            tome_ext.patch.auto(deeper, setting=setting)
        tome_ext.patch.auto(deeper, 3)
        assert deeper.r == 3
    larger = tiny(depth=LAYERS, dynamic_img_size=True)
    tome_ext.patch.auto(larger, setting=setting)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="was found for 65 tokens, and this model has 145"):
            larger(torch.randn(1, 3, 48, 48))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            larger(images[:1])
            larger.r = setting.r  # the user's own: nobody says what it was found for
            larger(torch.randn(1, 3, 48, 48))


# --- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures of two classes, and weights for them."""
    work = tmp_path_factory.mktemp("tune")
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = work / "flowers" / ("ant", "bee")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        noise.resize((170, 180)).save(folder / f"{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=2)
        torch.save(model.state_dict(), work / "tuned.pth")
    return work


def command(work: Path, *more: object) -> list[str]:
    fixed = ["tune", work / "flowers", "--model", "test_vit", "--checkpoint", work / "tuned.pth"]
    return [str(a) for a in [*fixed, "--workers", 0, "--output", work / "setting.json", *more]]


@pytest.mark.usefixtures("offline")
def test_the_command_writes_a_setting_and_says_how_to_use_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(work, "--flops", 0.7, "--pictures", 8, "--seconds", 0, "--method", "topk")
    assert main(argv) == 0
    out, err = capsys.readouterr()
    found = Setting.load(work / "setting.json")
    assert (found.method, found.layers, found.goal) == ("topk", 6, {"flops": 0.7})
    assert found.report.pictures == 4
    assert "reading 8 pictures" in err
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if "," in line}
    report = found.report
    shown = rows["constant"]
    assert shown[0] == f"{report.constant_flops:.3f}"
    assert shown[1] == f"{report.constant_deviation.mean:.3g}"
    assert shown[-1] == ",".join(map(str, report.constant))
    assert rows["found"][-1] == ",".join(map(str, report.found))
    assert found.verdict in out
    lines = out.splitlines()
    code = "\n".join(line.strip() for line in lines[lines.index("    import tome_ext") :])
    model = timm.create_model("test_vit").eval()
    exec(code, {"model": model})
    assert model.r == found.r


@pytest.mark.usefixtures("offline")
def test_pooled_features_of_pretrained_weights(work: Path, tmp_path: Path) -> None:
    """Of a model of Transformers, on a folder without classes."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=64, patch_size=16,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "model")
    output = tmp_path / "found.json"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in (work / "flowers").glob("*/*.png"):
        (pictures / path.name).write_bytes(path.read_bytes())
    argv = ["tune", pictures, "--model", f"hf:{tmp_path / 'model'}", "--output", output]
    argv += ["--flops", 0.9, "--seconds", 0, "--workers", 0]
    assert main([str(a) for a in argv]) == 0
    found = Setting.load(output)
    assert (found.layers, found.tokens, found.image_size) == (2, 17, [64, 64])
    assert found.report.pictures == 6
    assert "transformers" in found.versions


@pytest.mark.usefixtures("offline")
def test_a_stopped_command_says_how_to_go_on(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deviations = tuning._Runs.deviations
    left = 2

    def stops(self: Any, counts: Any, which: Tensor) -> list[float]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return deviations(self, counts, which)

    state = work / "state.json"
    argv = command(work, "--flops", 0.7, "--seconds", 600, "--state", state)
    with monkeypatch.context() as patched:
        patched.setattr(tuning._Runs, "deviations", stops)
        assert main(argv) == 130
    assert f"stopped; the same command goes on from {state}" in capsys.readouterr().err
    kept = json.loads(state.read_text())["evaluated"]
    assert len(kept) == 2
    argv[argv.index("--seconds") + 1] = "0"
    assert main(argv) == 0
    assert json.loads(state.read_text())["evaluated"][:1] == kept[:1]


@pytest.mark.usefixtures("offline")
def test_mistakes_of_the_command_are_one_line(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--flops", 0.7, "--seconds", 0]
    few = fails(capsys, *command(work, *quick, "--pictures", 6))
    assert "expected at least 8 pictures" in few
    assert "one of the arguments --flops --speed is required" in fails(capsys, *command(work))
    assert "flops: expected a number between 0 and 1" in fails(
        capsys, *command(work, "--flops", 1.5, "--seconds", 0)
    )
    argv = [str(a) for a in ["tune", work / "flowers", "--model", "test_vit", *quick]]
    assert "can't load pretrained weights of 'test_vit'" in fails(capsys, *argv)
    assert "there is no folder" in fails(capsys, *command(work, *quick, "--state", "no/where"))
    (work / "other.json").write_text("{}")
    line = fails(capsys, *command(work, *quick, "--state", work / "other.json"))
    assert "to be what a search has written" in line
