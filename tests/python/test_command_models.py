"""Every family that the patches accept, through demo, bench and eval; and mistakes in names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from commands import fails
from PIL import Image

from tome_ext import _models, _supported, demo
from tome_ext._command import Reduction
from tome_ext.bench import _contenders, _run
from tome_ext.patch.registry import HOSTS
from tome_ext_cli import main

pytestmark = pytest.mark.usefixtures("offline")

DEPTH = 2
CLASSES = ("ant", "bee")
# A small model of each family of timm; those without "vit" in their class come by other names.
TIMM = {
    "vit": "vit_tiny_patch16_224",
    "distilled": "deit_tiny_distilled_patch16_224",
    "attention_pool": "vit_base_patch32_siglip_256",
    "hybrid": "vit_tiny_r_s16_p8_224",
    "hybrid_with_stages": "vit_small_r26_s32_224",
    "vitamin": "vitamin_small_224",
    "parallel": "vit_small_patch16_18x2_224",
    "parallel_scaling": "vit_base_patch16_xp_224",
    "eva02": "eva02_tiny_patch14_224",
    "dinov3": "vit_small_patch16_dinov3",
    "rope_mixed": "vit_small_patch16_rope_mixed_224",
    "naflex": "naflexvit_base_patch16_gap",
    "beit": "beit_base_patch16_224",
    "relative_positions": "vit_relpos_small_patch16_224",
}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "tiny_clip": {"layers": DEPTH, "width": 32, "head_width": 16, "patch_size": 8},
    "tiny_norms": {
        "layers": DEPTH, "width": 32, "head_width": 16, "patch_size": 8,
        "block_type": "custom", "qk_norm": True,
    },
    "tiny_timm": {"timm_model_name": "test_vit", "timm_pool": "avg"},
}  # fmt: skip
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SIDES = {"tiny_clip": 64, "tiny_norms": 64, "tiny_timm": 160}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few timed rounds as can be."""
    monkeypatch.setattr(demo, "TIMING_BUDGET", 0.0)
    monkeypatch.setattr(demo, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(_run, "FEWEST_ROUNDS", 1)
    monkeypatch.setattr(_run, "WARM_UP", 0)


@pytest.fixture(scope="module", autouse=True)
def short_models() -> Any:
    """timm's models with two blocks, by names of their own."""
    from timm.models import _registry

    def entry(name: str) -> Callable[..., Any]:
        def make(pretrained: bool = False, **options: Any) -> Any:
            options.pop("pretrained_cfg", None)
            return timm.create_model(name, pretrained=pretrained, depth=DEPTH, **options)

        return make

    with pytest.MonkeyPatch.context() as change:
        for name, real in TIMM.items():
            change.setitem(_registry._model_entrypoints, f"short_{name}", entry(real))
        names = [*timm.list_models(), *(f"short_{name}" for name in TIMM)]
        change.setattr(timm, "list_models", lambda *args, **options: names)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(CLASSES):
        (folder / name).mkdir()
        Image.new("RGB", (80, 60), (200 * i, 90, 30)).save(folder / name / "0.png")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tiny models of OpenCLIP."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("configs")
    for name, vision in OPEN_CLIP.items():
        config = {"embed_dim": 16, "vision_cfg": {**vision, "image_size": SIDES[name]}}
        (folder / f"{name}.json").write_text(json.dumps({**config, "text_cfg": TEXT}))
        open_clip.add_model_config(folder / f"{name}.json")


def measured(spec: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Run demo and bench; both must find as many tokens left. Returns what bench wrote."""
    picture, figures = folder / "shown.png", folder / "bench.json"
    argv = ["demo", "--model", spec, "--r", "2", "--batch-size", "1", "--output", str(picture)]
    assert main(argv) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "random weights" in out or spec.startswith("hf:")
    table, _ = out.split("A trained model: ")
    left = {n: int(m) for n, m in re.findall(r"^ *(unpatched|2)  +(\d+)  ", table, re.MULTILINE)}
    assert picture.exists() == ("No picture: " not in out)
    argv = ["bench", "--model", spec, "--r", "2", "--batch-size", "1", "--seconds", "0"]
    assert main([*argv, "--json", str(figures)]) == 0, capsys.readouterr().err
    (row,) = json.loads(figures.read_text())["rows"]
    contenders = row["contenders"]
    assert contenders["unpatched"]["tokens_left"] == left["unpatched"]
    assert contenders["tome_ext"]["tokens_left"] == left["2"] < left["unpatched"]
    assert contenders["ceiling"]["tokens_left"] == left["2"]
    assert contenders["ceiling"]["flops_per_image"] < contenders["unpatched"]["flops_per_image"]
    return {**contenders, "picture": picture.exists()}


def evaluated(spec: str, pictures: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """Run eval; returns its rows."""
    results = checkpoint.parent / "eval.json"
    argv = ["eval", str(pictures), "--model", spec, "--r", "2", "--workers", "0"]
    assert main([*argv, "--checkpoint", str(checkpoint), "--json", str(results)]) == 0
    rows: list[dict[str, Any]] = json.loads(results.read_text())["results"]
    assert [row["images"] for row in rows] == [2, 2]
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("family", list(TIMM))
def test_timm(
    family: str, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"short_{family}"
    found = measured(spec, tmp_path, capsys)
    assert found["picture"]
    state = timm.create_model(spec, num_classes=len(CLASSES)).state_dict()
    torch.save(state, tmp_path / "two.pth")
    evaluated(spec, pictures, tmp_path / "two.pth")


@pytest.mark.slow
def test_torchvision(tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torchvision = pytest.importorskip("torchvision")
    assert measured("torchvision:vit_b_32", tmp_path, capsys)["picture"]
    state = torchvision.models.vit_b_32(num_classes=len(CLASSES)).state_dict()
    torch.save(state, tmp_path / "two.pth")
    evaluated("torchvision:vit_b_32", pictures, tmp_path / "two.pth")


@pytest.mark.parametrize("name", list(OPEN_CLIP))
def test_open_clip(
    name: str, clips: None, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_clip

    spec = f"open_clip:{name}"
    assert measured(spec, tmp_path, capsys)["picture"]
    torch.save(open_clip.create_model(name).state_dict(), tmp_path / "clip.pt")
    evaluated(spec, pictures, tmp_path / "clip.pt")
    assert "lists no weights of" in fails(capsys, "eval", pictures, "--model", spec)


def hf_cases() -> list[Any]:
    """Tiny models of Transformers."""
    if "transformers" not in HOSTS:
        return []
    pytest.importorskip("transformers")
    import host_cases_transformers

    return list(host_cases_transformers.CASES)


@pytest.mark.parametrize("case", hf_cases(), ids=str)
def test_transformers(
    case: Any, tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification

    folder = tmp_path / "model"
    model: Any = case.make()
    with torch.no_grad():
        # Transformers keeps BEiT's index of positions for all models to come: not one that was made
        # in inference mode, as commands run.
        model(**case.inputs(1, 0))
    model.save_pretrained(folder)
    spec = f"hf:{folder}"
    found = measured(spec, tmp_path, capsys)
    assert found["unpatched"]["tokens_left"] == case.num_tokens
    video = "Video" in case.name or "V-JEPA" in case.name
    assert found["picture"] == (not video)
    if video:
        assert "takes videos" in fails(capsys, "eval", pictures, "--model", spec)
    elif type(model.config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        model.config.num_labels = len(CLASSES)
        two = AutoModelForImageClassification.from_config(model.config)
        torch.save(two.state_dict(), tmp_path / "two.pth")
        evaluated(spec, pictures, tmp_path / "two.pth")
    else:
        assert "was not trained for classes" in fails(capsys, "eval", pictures, "--model", spec)


@pytest.mark.parametrize("family", list(TIMM))
@pytest.mark.parametrize("reduction", [Reduction(r=5), Reduction(keep_rate=0.6)], ids=str)
def test_ceiling_of_every_family_has_the_tokens_of_merging(
    family: str, reduction: Reduction
) -> None:
    model = _models.features(f"short_{family}")
    x, places = model.images(1), _contenders.counted_in(model.module)
    expected = _contenders.count_tokens(model.module, x, places)
    ceiling = _contenders.ceiling(model.module, reduction, x)
    counts = _contenders.count_tokens(ceiling, x, places)
    patched = reduction.patch(_contenders.share_weights(model.module))
    assert counts == _contenders.count_tokens(patched, x, places)
    assert counts[-1] < expected[-1]


def test_grids() -> None:
    assert _models._grid(196, (3, 224, 224)) == (14, 14)
    assert _models._grid(8, (3, 16, 32)) == (2, 4)
    assert _models._grid(729, (3, 384, 384)) == (27, 27)  # 14 pixels each, and 6 are left out
    assert _models._grid(7, (3, 32, 32)) is None


def test_mistakes_in_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("demo", "bench"):
        line = fails(capsys, command, "--model", "keras:vit")
        assert "no library 'keras', of 'keras:vit'; expected timm:NAME, hf:NAME" in line
    line = fails(capsys, "demo", "--model", "torchvision:vit_b_61")
    assert "torchvision has no model 'vit_b_61'; did you mean vit_b_" in line
    assert "open_clip has no model 'ViT-X'" in fails(capsys, "demo", "--model", "open_clip:ViT-X")
    assert "Swin" in fails(capsys, "bench", "--model", "torchvision:swin_t")
    line = fails(capsys, "bench", "--model", f"hf:{tmp_path}")
    assert "expected a folder that save_pretrained has written" in line
    assert "expected a folder" in fails(capsys, "demo", "--model", "hf:nobody/nothing")
    monkeypatch.setattr(_models, "find_spec", lambda name: None)
    line = fails(capsys, "bench", "--model", "open_clip:ViT-B-32")
    assert line.endswith("models of open_clip: need open_clip: pip install open_clip_torch")


# --- tome-ext models ----------------------------------------------------------------------------


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main(["models", *argv, "--json"]) == 0
    rows: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return rows


def test_models_of_a_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in listed(capsys, "timm:vit_[bl]*_patch16_224")}
    assert rows["vit_base_patch16_224"] == {
        "name": "vit_base_patch16_224",
        "tokens": 197,
        "blocks": 12,
        "r": 13,
        "saved": pytest.approx(expected_saving(197, 12, 768, 13)),
    }
    large = rows["vit_large_patch16_224"]
    assert (large["tokens"], large["blocks"], large["r"]) == (197, 24, 6)
    assert main(["models", "torchvision:vit_b_16"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^torchvision:vit_b_16 +197 +12 +13 +41%$", out, re.MULTILINE)
    assert "at most 80% of the patch tokens" in out


def expected_saving(tokens: int, blocks: int, channels: int, r: int) -> float:
    """By hand, of blocks with an MLP four times as wide."""
    whole = blocks * (24 * tokens * channels**2 + 4 * tokens**2 * channels)
    left = 0
    for block in range(blocks):
        before, after = tokens - block * r, tokens - (block + 1) * r
        left += 8 * before * channels**2 + 4 * before**2 * channels + 16 * after * channels**2
    return 1 - left / whole


def test_models_have_the_figures_of_their_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """What is told of a model with one block holds for the whole model."""
    for name in (
        "test_vit",
        "vitamin_small_224",
        "vit_tiny_r_s16_p8_224",
        "eva02_tiny_patch14_224",
    ):
        (row,) = (each for each in listed(capsys, f"timm:{name}") if each["name"] == name)
        layout = _models.layout(_models.features(name))
        assert (row["tokens"], row["blocks"]) == (layout.tokens, len(layout.tower.blocks))


def test_models_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no supported model has 'resnet50x' in its name" in fails(capsys, "models", "resnet50x")
    assert "no library 'keras'" in fails(capsys, "models", "keras:vit")
    assert "no supported model" in fails(capsys, "models", "timm:swin_tiny*")


def test_models_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    families = import_module("tome_ext.patch.hosts.transformers").FAMILIES
    names = {row["name"] for row in listed(capsys, "hf:")}
    assert names == {f"hf:{next(iter(family.towers))}" for family in families}


def test_numbers_that_constructors_read_on_the_meta_device(run_python: Any) -> None:
    code = """
import torch
from tome_ext import _supported

with torch.device("meta"), _supported._RatesOnCpu():
    print([x.item() for x in torch.linspace(0, 1, 3)])
    print(torch.linspace(0, 1, 3, device=None).is_meta)  # where a device is named it stays
"""
    # Elsewhere: once, after other tests, torch's function modes had no effect in this process.
    run = run_python(code)
    assert run.stdout.splitlines() == ["[0.0, 0.5, 1.0]", "True"], run.stderr


def test_suggested_r() -> None:
    assert _supported.suggested_r(196, 12) == 13
    assert _supported.suggested_r(196, 24) == 6
    assert _supported.suggested_r(49, 64) == 1
