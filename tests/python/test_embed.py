"""tome-ext embed: features against plain loops, runs that are stopped or shared, and mistakes."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from commands import fails
from PIL import Image
from pyarrow import parquet
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

import tome_ext
from tome_ext import embed
from tome_ext._command import Reduction
from tome_ext_cli import commands, main

SMALL = "test_vit"  # timm's: 6 blocks at 160 x 160 pixels, patches of 16
DOC = Path(__file__).parents[2] / "docs" / "embedding.md"
PICTURES = 40  # with one a batch, 3 parts: 16, 16 and 8
CHANNELS = 64

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures, some of them in folders of it, and one of weights."""
    work = tmp_path_factory.mktemp("embed")
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        folder = work / "pictures" / ("", "cats", "dogs/small")[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
        coarse.resize((150 + 5 * i, 260 - 3 * i)).save(folder / f"{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save(timm.create_model(SMALL), work / "weights")
    return work


def save(model: Any, folder: Path) -> None:
    """A folder that timm takes as local-dir:FOLDER.

    As timm's ``save_for_hf`` writes it, which of timm 1.0.20 needs an older huggingface_hub.
    """
    folder.mkdir()
    names = ("input_size", "interpolation", "crop_pct", "mean", "std", "num_classes", "classifier")
    data = {name: model.pretrained_cfg[name] for name in names}
    config = {"architecture": SMALL, "num_classes": model.num_classes, "pretrained_cfg": data}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def arguments(work: Path, out: Path, *more: object) -> list[str]:
    """Of a command that embeds the fixture's pictures, one a batch."""
    model = ["--model", f"local-dir:{work / 'weights'}"]
    fixed = ["embed", work / "pictures", *model, "--out", out, "--batch-size", 1, "--workers", 0]
    return [str(a) for a in [*fixed, *more]]


def small(work: Path) -> Any:
    """The fixture's model, to be run by hand."""
    return timm.create_model(f"local-dir:{work / 'weights'}", pretrained=True, num_classes=0).eval()


def by_hand(work: Path, config: dict[str, Any], features: Callable[[Tensor], Tensor]) -> Tensor:
    """Features of the pictures (n, C), one by one in the order of :func:`names`."""
    transform = create_transform(**config, is_training=False)
    rows = []
    for name in names(work):
        with Image.open(work / "pictures" / name) as picture, torch.no_grad():
            rows.append(features(transform(picture.convert("RGB"))[None])[0])
    return torch.stack(rows)


def names(work: Path) -> list[str]:
    """The pictures' paths, as the file lists them: by folder, and there by number."""
    folders = ("", "cats/", "dogs/small/")
    return [f"{folders[k]}{i}.png" for k in range(3) for i in range(k, PICTURES, 3)]


def read(file: Path) -> tuple[list[str], Tensor, dict[str, Any]]:
    """Paths, features (n, C) and what the file says of itself."""
    table = parquet.read_table(file)
    numbers = table["feature"].combine_chunks().flatten().to_numpy()
    said = json.loads(table.schema.metadata[b"tome_ext"])
    return table["path"].to_pylist(), torch.tensor(numbers).reshape(len(table), -1), said


# --- right features -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reduction"),
    [
        (["--r", "0"], Reduction()),
        (["--r", "8"], Reduction(r=8)),
        (["--method", "topk", "--keep-rate", "0.5"], Reduction("topk", keep_rate=0.5)),
        (["--method", "guided", "--threshold", "0.9"], Reduction("guided", threshold=0.9)),
    ],
    ids=str,
)
def test_features_are_those_of_the_model(
    options: list[str],
    reduction: Reduction,
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "features.parquet"
    assert main(arguments(work, out, *options, "--batch-size", 7)) == 0
    paths, features, said = read(out)
    model = small(work)
    if reduction.reduces:
        reduction.patch(model)
    expected = by_hand(work, resolve_model_data_config(model), model)
    assert paths == names(work)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    if reduction.reduces:  # and it shows
        tome_ext.patch.remove(model)
        plain = by_hand(work, resolve_model_data_config(model), model)
        assert (features - plain).abs().max() > 0.01
    assert (said["reduction"], said["batch_size"]) == (str(reduction), 7)
    assert (said["input_size"], said["unreadable"]) == ([3, 160, 160], [])
    captured = capsys.readouterr()
    assert f"{PICTURES} features of {CHANNELS} numbers" in captured.out
    assert re.search(rf"{PICTURES} pictures in [\d.]+ s: [\d.]+ images/s", captured.out)
    assert "embedding" not in captured.err  # no bar: this is no terminal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet"]


def transformers_vit() -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=64, image_size=64)
    return ViTModel(config), lambda model, x: model(x).pooler_output


def clip_config() -> Any:
    from transformers import CLIPConfig

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["intermediate_size"] = 64
    return CLIPConfig(
        text_config=sizes,
        vision_config={**sizes, "image_size": 64, "patch_size": 16, "projection_dim": 24},
        projection_dim=24,
    )


def transformers_clip() -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    from transformers import CLIPModel

    return CLIPModel(
        clip_config()
    ), lambda model, x: model(pixel_values=x, input_ids=torch.tensor([[1, 2]])).image_embeds


def transformers_clip_tower() -> tuple[Any, Callable[[Any, Tensor], Tensor]]:
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(clip_config().vision_config)
    return model, lambda model, x: model(x).image_embeds


@pytest.mark.parametrize(
    ("make", "width"),
    [(transformers_vit, 32), (transformers_clip, 24), (transformers_clip_tower, 24)],
)
def test_features_of_transformers(make: Any, width: int, work: Path, tmp_path: Path) -> None:
    model, features_of = make()
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "features.parquet"
    options = ["--model", f"hf:{tmp_path / 'model'}", "--r", 2]
    assert main(arguments(work, out, *options, "--batch-size", 16)) == 0
    paths, features, said = read(out)
    tome_ext.patch.transformers(model.eval(), r=2)
    config = {key: said[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    expected = by_hand(
        work, {**config, "input_size": tuple(said["input_size"])}, lambda x: features_of(model, x)
    )
    if make is transformers_clip:  # which gives them a length of 1
        features = torch.nn.functional.normalize(features)
    assert features.shape == (PICTURES, width)
    assert paths == names(work)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_a_pooler_without_weights_is_not_used(work: Path, tmp_path: Path) -> None:
    """As of a classifier's checkpoint, which has none: Transformers makes up random ones."""
    from transformers import ViTForImageClassification

    config = transformers_vit()[0].config
    classifier: Any = ViTForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "model")
    out = tmp_path / "features.parquet"
    assert main(arguments(work, out, "--model", f"hf:{tmp_path / 'model'}", "--r", 2)) == 0
    _, features, said = read(out)
    tome_ext.patch.transformers(classifier, r=2)
    config = {key: said[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    expected = by_hand(
        work,
        {**config, "input_size": tuple(said["input_size"])},
        lambda x: classifier.vit(x).last_hidden_state[:, 0],
    )
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_towers_of_texts_may_lack_weights(work: Path, tmp_path: Path) -> None:
    """Those of a picture classifier do, which AutoModel makes a model of pictures and texts of."""
    from transformers import SiglipConfig, SiglipForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["intermediate_size"] = 64
    config = SiglipConfig(
        text_config=sizes, vision_config={**sizes, "image_size": 64, "patch_size": 16}
    )
    classifier: Any = SiglipForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path / "model")
    out = tmp_path / "features.parquet"
    assert main(arguments(work, out, "--model", f"hf:{tmp_path / 'model'}", "--r", 2)) == 0
    assert read(out)[1].shape == (PICTURES, 32)


def test_other_missing_weights_are_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = transformers_vit()
    model.save_pretrained(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    out = tmp_path / "features.parquet"
    line = fails(capsys, *arguments(work, out, "--model", f"hf:{tmp_path / 'model'}", "--r", 2))
    assert "got none for 1 of its tensors, such as layernorm.weight" in line
    assert not out.exists()


def test_features_of_open_clip(work: Path, tmp_path: Path) -> None:
    import open_clip

    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 64}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}
    (tmp_path / "tiny_embed.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny_embed.json")
    model = open_clip.create_model("tiny_embed").eval()
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    out = tmp_path / "features.parquet"
    options = ["--model", f"open_clip:tiny_embed/{tmp_path / 'clip.pt'}", "--r", 2]
    assert main(arguments(work, out, *options)) == 0
    paths, features, said = read(out)
    tome_ext.patch.open_clip(model, r=2)
    config = {key: said[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")}
    expected = by_hand(work, {**config, "input_size": (3, 64, 64)}, model.encode_image)
    assert (said["mean"], features.shape) == (list(open_clip.OPENAI_DATASET_MEAN), (PICTURES, 24))
    assert paths == names(work)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


def test_a_setting_that_a_search_has_found(work: Path, tmp_path: Path) -> None:
    model = small(work)
    found = tome_ext.tune(
        model, by_hand(work, resolve_model_data_config(model), lambda x: x).split(10),
        flops=0.8, seconds=0.0,
    )  # fmt: skip
    found.save(tmp_path / "setting.json")
    out = tmp_path / "features.parquet"
    assert main(arguments(work, out, "--setting", tmp_path / "setting.json")) == 0
    _, features, said = read(out)
    assert said["reduction"] == f"tome, r = {found.r}, prop_attn=True"
    tome_ext.patch.auto(model, setting=found)
    expected = by_hand(work, resolve_model_data_config(model), model)
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)


# --- runs that are stopped, or shared -----------------------------------------------------------

# A run that stops in the midst of the second part, half of which is then on disk.
STOPS = """
import sys, time
from pyarrow import parquet
from tome_ext_cli import main

def write_table(table, file, **options):
    whole(table, file, **options)
    if len(seen) == 1:
        file.flush()
        with open(file.name, "r+b") as half:
            half.truncate(1000)
        print("half", flush=True)
        time.sleep(600)
    seen.append(file)

whole, parquet.write_table, seen = parquet.write_table, write_table, []
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(work: Path) -> bytes:
    """The file of a run that nobody stops."""
    with pytest.MonkeyPatch.context() as change:
        change.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert main(arguments(work, work / "whole.parquet", "--r", 8)) == 0
    return (work / "whole.parquet").read_bytes()


def test_an_interrupted_run_goes_on(
    work: Path,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "features.parquet"
    argv = arguments(work, out, "--r", 8)
    write, written = embed.write_part, []

    def write_two(job: embed.Job, part: int, *of_it: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        write(job, part, *of_it)
        written.append(part)

    monkeypatch.setattr(embed, "write_part", write_two)
    assert main(argv) == 130
    assert f"the same command goes on from {out}.parts" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = fails(capsys, *arguments(work, out, "--r", 9))
    there = f"can't resume from {out}.parts/plan.json: it was begun with"
    assert f"{there} reduction = 'r = 8', and this command has 'r = 9'" in line
    line = fails(capsys, *arguments(work, out, "--r", 8, "--batch-size", 2))
    assert f"{there} batch_size = 1, and this command has 2" in line
    # What a machine that lost power has not written to its end is done again.
    first = min(Path(f"{out}.parts").glob("*.parquet"))
    first.write_bytes(bytes(first.stat().st_size))
    assert main(argv) == 0
    assert "24 pictures in " in capsys.readouterr().out
    assert out.read_bytes() == whole


def test_parts_that_nobody_finished_are_no_obstacle(
    work: Path, whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "features.parquet"
    parts = tmp_path / "features.parquet.parts"
    parts.mkdir()
    (parts / "plan.json").write_text('{"model": "of a run that stopped before its first part"}')
    assert main(arguments(work, out, "--r", 8)) == 0
    assert out.read_bytes() == whole


def commands_of_doc() -> list[list[str]]:
    """Every command of the page, with the models and devices that are here."""
    blocks = re.findall(r"```bash\n(.*?)```", DOC.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line) for line in lines if not line.startswith("pip ")]
    for command in commands:
        command[command.index("--model") + 1] = "local-dir:weights"
        if "--device" in command:
            command[command.index("--device") + 1] = "cpu"
        command += ["--workers", "0", "--dtype", "float32"]
    return commands


def test_commands_and_code_of_the_doc(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(work)
    code = "".join(re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL))
    single = [command for command in commands_of_doc() if command[0] == "tome-ext"]
    assert len(single) >= 2
    for command in single:
        Path("features.parquet").unlink(missing_ok=True)
        assert main(command[1:]) == 0, command
        found: dict[str, Any] = {}
        exec(compile(code, str(DOC), "exec"), found)
        paths, features, said = read(Path("features.parquet"))
        assert found["paths"] == paths
        assert torch.equal(torch.tensor(found["features"]), features)
        assert found["made_by"] == said
        assert str(found["features"].shape) in DOC.read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_in_two_processes(work: Path, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "features.parquet"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    argv = [*arguments(work, out, "--r", 8), "--model", "local-dir:weights"]
    with subprocess.Popen(
        [sys.executable, "-c", STOPS, *argv], cwd=work, stdout=subprocess.PIPE, text=True, env=env
    ) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "half\n"
        killed.kill()
    parts = tmp_path / "features.parquet.parts"
    assert not out.exists()
    assert [path.name for path in parts.glob("*.parquet")] == ["0000000.parquet"]
    assert len(list(parts.iterdir())) == 3  # with the plan, and half of a part

    (command,) = (c for c in commands_of_doc() if c[0] == "torchrun")
    options = ["--r", "8", "--batch-size", "1", "--out", str(out)]
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, *command[1:], *options],
        cwd=work, capture_output=True, text=True, timeout=300, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "40 pictures, 1 of 3 parts done" in done.stderr
    assert done.stdout.count("24 pictures in ") == 1  # those of both; one process prints
    paths, features, said = read(out)
    wanted_paths, wanted, wanted_said = read(work / "whole.parquet")
    assert paths == wanted_paths
    torch.testing.assert_close(features, wanted)
    assert said == {**wanted_said, "model": "local-dir:weights"}
    assert not parts.exists()


# Ray by its own means, but for what it would ask of the machine.
RAY = """
import runpy, sys, ray
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100_000_000)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_example_for_ray_data(work: Path, whole: bytes, tmp_path: Path) -> None:
    script = DOC.parents[1] / "examples" / "ray_embed.py"
    given = [script, work / "pictures", tmp_path / "out", "--model", f"local-dir:{work}/weights"]
    done = subprocess.run(
        [sys.executable, "-c", RAY, *given, "--r", "8", "--batch-size", "16"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    tables = [parquet.read_table(file) for file in (tmp_path / "out").glob("*.parquet")]
    found = {
        str(Path(row["path"]).relative_to(work / "pictures")): row["feature"]
        for table in tables
        for row in table.to_pylist()
    }
    paths, features, _ = read(work / "whole.parquet")
    torch.testing.assert_close(
        torch.tensor([found.pop(path) for path in paths]), features, atol=1e-4, rtol=1e-4
    )
    assert found == {}
    schema = parquet.read_schema(work / "whole.parquet").remove_metadata()
    assert tables[0].schema.remove_metadata() == schema


# --- mistakes -----------------------------------------------------------------------------------


@pytest.fixture
def broken(work: Path, tmp_path: Path) -> Path:
    """A folder with a picture that is one, half of one, and a way back into the folder."""
    folder = tmp_path / "broken"
    folder.mkdir()
    whole = (work / "pictures" / "0.png").read_bytes()
    (folder / "whole.png").write_bytes(whole)
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / "again").symlink_to(folder)
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_cannot_be_read(
    workers: int,
    broken: Path,
    work: Path,
    whole: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "features.parquet"
    argv = arguments(work, out, "--r", 8, "--workers", workers)
    argv[1] = str(broken)
    line = fails(capsys, *argv)
    assert line.startswith(f"tome-ext: error: can't read the picture {broken}/half.png: ")
    assert not out.exists()
    os.mkfifo(broken / "pipe.png")  # which nobody writes to
    assert main([*argv, "--skip-unreadable"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count(f"skipped: can't read the picture {broken}/half.png: ") == 1
    pipe = f"skipped: can't read the picture {broken}/pipe.png: it is not a regular file"
    assert pipe in captured.err
    assert "2 could not be read and have no row" in captured.out
    paths, features, said = read(out)
    assert (paths, said["unreadable"]) == (["whole.png"], ["half.png", "pipe.png"])
    wanted_paths, wanted, _ = read(work / "whole.parquet")
    torch.testing.assert_close(features[0], wanted[wanted_paths.index("0.png")])


def test_paths_that_are_no_text(work: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    odd = os.fsencode(tmp_path) + b"/odd/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write((work / "pictures" / "0.png").read_bytes())
    argv = arguments(work, tmp_path / "features.parquet", "--r", 8)
    argv[1] = str(tmp_path / "odd")
    assert main(argv) == 0
    assert read(tmp_path / "features.parquet")[0] == [r"caf\xe9.png"]


def test_mistakes_in_files(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = fails(capsys, *arguments(work, tmp_path / "no" / "x.parquet", "--r", 8))
    assert f"can't write {tmp_path}/no/x.parquet: there is no folder {tmp_path}/no" in line
    there = tmp_path / "there.parquet"
    there.write_text("precious")
    line = fails(capsys, *arguments(work, there, "--r", 8))
    assert f"{there} is there already; remove it, or name another file with --out" in line
    assert there.read_text() == "precious"
    (tmp_path / "x.parquet.parts").write_text("no folder")
    line = fails(capsys, *arguments(work, tmp_path / "x.parquet", "--r", 8))
    assert f"can't write into {tmp_path}/x.parquet.parts: it is no folder" in line
    argv = arguments(work, tmp_path / "y.parquet", "--r", 8)
    argv[1] = "nowhere"
    assert "there is no folder nowhere" in fails(capsys, *argv)
    line = fails(capsys, *arguments(work, tmp_path / "y.parquet", "--setting", tmp_path / "no"))
    assert f"can't read {tmp_path}/no: No such file" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.parquet", "x.parquet.parts"]

    def write_table(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet, "write_table", write_table)
    line = fails(capsys, *arguments(work, tmp_path / "z.parquet", "--r", 8))
    assert f"can't write {tmp_path}/z.parquet.parts/0000000.parquet: No space left on" in line


def test_mistakes_in_models_and_amounts(
    work: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "x.parquet"
    line = fails(capsys, *arguments(work, out, "--r", 8, "--model", SMALL))
    assert "can't load pretrained weights of 'test_vit' (HF_HUB_OFFLINE is set); weights of" in line
    assert "one of the arguments --r --keep-rate --threshold --setting is required" in fails(
        capsys, *arguments(work, out)
    )
    assert "expected one number, got '0.5,0.7'" in fails(
        capsys, *arguments(work, out, "--keep-rate", "0.5,0.7")
    )
    line = fails(capsys, *arguments(work, out, "--method", "topk", "--threshold", "0.9"))
    assert "threshold" in line
    line = fails(capsys, *arguments(work, out, "--method", "tome", "--setting", "found.json"))
    assert "--setting: the file says which method; expected no --method beside it" in line
    monkeypatch.setattr(commands, "EMBED_PACKAGES", ("numpy", "no_such_package"))
    line = fails(capsys, *arguments(work, out, "--r", 8))
    assert "tome-ext embed needs no_such_package: pip install 'tome_ext[embed]'" in line


def test_features_that_are_not_finite(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = timm.create_model(f"local-dir:{work / 'weights'}", pretrained=True)
    with torch.no_grad():
        model.norm.bias.fill_(float("nan"))
    save(model, tmp_path / "nan")
    argv = arguments(work, tmp_path / "x.parquet", "--r", 8, "--model", f"local-dir:{tmp_path}/nan")
    assert "NaN or infinite features of" in fails(capsys, *argv)
