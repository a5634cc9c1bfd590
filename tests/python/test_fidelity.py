"""bench/fidelity.py on a small model with random weights and pictures of noise."""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from bench_scripts import load
from PIL import Image
from sklearn.linear_model import RidgeCV

import tome_ext

FEW, MANY = 3, 5  # pictures of each half
R_VALUES = (4, 8)

fidelity_data = load("fidelity_data")
fidelity = load("fidelity")
tables = load("tables")


def pictures(seed: int, labels: bool) -> Any:
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (FEW + MANY, 240, 240, 3)).astype(np.uint8)
    kinds = np.array(["cat", "dog"])[np.arange(FEW + MANY) % 2]
    chooses = np.arange(FEW + MANY) < MANY
    images = [Image.fromarray(x) for x in noise]
    return fidelity_data.Pictures(images, kinds if labels else None, chooses)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=20, depth=3, embed_dim=128, num_heads=2
    ).eval()
    model.requires_grad_(False)
    sets = {"photographs": pictures(0, False), "things": pictures(1, True)}
    sets["cloth"] = pictures(2, True)
    options = Namespace(
        device="cpu", data=None, most=None, batch_size=4, speed=0.01, tune=1.0, tune_pictures=12,
        json=tmp_path_factory.mktemp("fidelity") / "result.json",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as change, torch.inference_mode():
        change.setattr(fidelity, "R_VALUES", R_VALUES)
        change.setattr(fidelity, "TUNED", [("tome", R_VALUES[0]), ("guided", R_VALUES[0])])
        change.setattr(fidelity, "SIDES", (160,))
        change.setattr(fidelity, "THRESHOLDS", {"tome": (0.5, 0.2), "guided": (0.2,)})
        change.setattr(fidelity, "BATCHES", (1, 2))
        change.setattr(fidelity, "clip_tower", lambda folder: model)
        change.setattr(fidelity, "load", lambda folder, most: sets)
        fidelity.measure(options)
        measured = json.loads(options.json.read_text())
        # Once more: nothing is measured that is there.
        change.setattr(fidelity, "deviation_figures", None)
        change.setattr(fidelity, "ratio", None)
        options.tune = 0
        fidelity.measure(options)
    assert json.loads(options.json.read_text()) == measured
    return measured


def test_every_contender_is_measured(result: Any) -> None:
    rows = result["rows"]
    assert {row["kind"] for row in rows} == set(fidelity.NAMES)
    plain = rows[0]
    assert plain["kind"] == "none"
    assert plain["deviation"]["all"]["worst"] < 1e-12
    assert plain["answers"]["things"]["probe"]["same"] == 1
    for row in rows[1:]:
        assert row["gflops"] < plain["gflops"]
        for figures in row["deviation"].values():
            assert 0 < figures["mean"] <= figures["worst"]
            assert figures["median"] <= figures["p95"] <= figures["worst"]
        timed = row["kind"] not in ("random", "sliced")
        assert ("speed" in row) == timed
    settings = {(row["kind"], row["amount"]) for row in result["padding"]}
    assert {kind for kind, _ in settings} == {"tome", "near tome", "near guided"}
    assert len(result["padding"]) == 2 * len(settings)
    assert all(row["speed"] > 0 for row in result["padding"])
    assert result["pictures"] == {"photographs": FEW, "things": FEW, "cloth": FEW}


def test_methods_are_compared_at_equal_operations(result: Any) -> None:
    for r in R_VALUES:
        flops = [row["gflops"] for row in result["rows"] if row["amount"] == f"r = {r}"]
        assert len(flops) == 6
        assert max(flops) <= 1.03 * min(flops)  # comparing tokens counts


def test_choices_are_compared_with_tome(tmp_path: Path) -> None:
    choices = load("fidelity_choices")
    torch.manual_seed(0)
    # Sizes count from the second merge on, and the class token does not see the last one.
    model = timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=128, num_heads=2).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() == 2:
            parameter.mul_(8)  # or attention is all but even, and its power changes nothing
    options = Namespace(
        data=None, most=None, each=2, device="cpu", batch_size=4, json=tmp_path / "choices.json"
    )
    with pytest.MonkeyPatch.context() as change, torch.inference_mode():
        change.setattr(choices, "R_VALUES", R_VALUES)
        change.setattr(choices, "clip_tower", lambda folder: model)
        change.setattr(choices, "load", lambda folder, most: {"noise": pictures(0, False)})
        choices.measure(options)
        # The first is ToMe, and guided merging is the one that is called so.
        x = pictures(0, False)
        x = x.tensor(x.chooses)[:2]
        plain = fidelity.embed(model, x, 4, torch.device("cpu"))
        for name, method in (("ToMe: ", "tome"), ("guided: ", "guided")):
            made = tome_ext.patch.auto(copy.deepcopy(model), r=8, method=method)
            far = 1 - (fidelity.embed(made, x, 4, torch.device("cpu")) * plain).sum(1)
            found = json.loads(options.json.read_text())["choices"]
            (row,) = (row for key, row in found.items() if key.startswith(name))
            assert row["8"]["mean"] == pytest.approx(far.mean(), rel=1e-3)
    assert len({row["8"]["mean"] for row in found.values()}) == len(choices.CHOICES)
    table = tables.choices_table(json.loads(options.json.read_text()))
    assert table.count("|") == 4 * (len(choices.CHOICES) + 2)


def test_the_probe_is_ridge_regression() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((40, 7)), rng.integers(0, 3, 40)
    weights, kinds = fidelity.fit_probe(x, labels)
    both = np.concatenate([x, np.ones((40, 1))], 1)
    peer = RidgeCV(fidelity.RIDGES, fit_intercept=False).fit(both, np.eye(3)[labels])
    assert list(kinds) == [0, 1, 2]
    np.testing.assert_allclose(weights.T, peer.coef_, rtol=1e-6, atol=1e-9)


def test_answers_of_the_unmerged_model_are_its_own() -> None:
    set_of = pictures(0, True)
    known = np.where(set_of.labels == "cat", 1.0, -1.0)[:, None] * np.ones((1, 4)) / 2
    answers = fidelity.Answers(set_of, known)
    flipped = answers.figures(-known[~set_of.chooses])
    for found in (flipped["probe"], flipped["neighbour"]):
        assert found["accuracy"] == found["same"] == 0
    for found in answers.figures(known[~set_of.chooses]).values():
        assert found == {"accuracy": 1.0, "same": 1.0, "error": 0.0}


def test_a_file_that_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"a\.whl: expected SHA-256 00, got [0-9a-f]{64}"):
        fidelity_data.Source("a==1", "a.whl", "00").get(tmp_path)


def test_the_chart_and_the_tables_show_it(result: Any, tmp_path: Path) -> None:
    fidelity.draw(result).savefig(tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000
    short, long = tables.fidelity_short_table(result), tables.fidelity_table(result)
    assert len(short.splitlines()) < len(long.splitlines())
    padding = tables.padding_table(result)
    for row in result["padding"]:
        assert f"| {fidelity.NAMES[row['kind']]} | {row['amount']} |" in padding
    for row in result["rows"][1:]:
        assert f"| {fidelity.NAMES[row['kind']]} | {row['amount']} |" in long
