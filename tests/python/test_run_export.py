"""Patched models under torch.export, and packaged by AOTInductor for Python and C++."""

from __future__ import annotations

import importlib.util
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VARIANTS, images, tiny
from torch import Tensor, nn

import tome_ext as tome
from tome_ext import _library

EXAMPLE = Path(__file__).parents[2] / "examples" / "aoti_cpp"
NAMES = ("plain", "registers, layer scale", "class token, avg")
DEPTH = 2
BATCHES = (1, 2, 5)


def patched(name: str) -> Any:
    return tome.patch.timm(tiny(**VARIANTS[name], depth=DEPTH), r=9).requires_grad_(False)


def export(model: nn.Module, strict: bool = False) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, (images(3),), dynamic_shapes=({0: batch},), strict=strict)


def operators(program: torch.export.ExportedProgram) -> Counter[str]:
    """The operators of tome_ext in a program, by name."""
    targets = (str(node.target) for node in program.graph.nodes)
    return Counter(target for target in targets if target.startswith("tome."))


class Everything(nn.Module):
    """The three models, and every operator of a forward pass with the arguments they leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList(patched(name) for name in NAMES)

    def forward(self, x: Tensor) -> list[Tensor]:
        tokens = x.reshape(x.shape[0], 48, 64)
        first = tome.match(tokens, 5)
        total, size = first.merge(tokens, reduce="sum")
        second = tome.match(total, 7, num_prefix_tokens=2)
        largest, _ = second.merge(total, size, reduce="amax")
        plan = first.then(second)
        spread = plan.unmerge(largest)
        heads = total.unflatten(2, (4, 16)).transpose(1, 2)
        attended = tome.proportional_attention(heads, heads, heads, size, scale=0.3)
        scores = tome.cls_attention(heads, heads, size, scale=0.1)
        return [*(model(x) for model in self.models), spread, attended, scores]


@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in NAMES), ("registers, layer scale", True)]
)
# Strict export warns that it does not keep what a forward leaves in the model.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export_gives_the_model_s_logits_for_every_batch_size(name: str, strict: bool) -> None:
    model = patched(name)
    program = export(model, strict)
    assert operators(program) == {
        "tome.match.default": DEPTH,
        "tome.merge_add_norm.default": DEPTH,
        "tome.attention_forward.default": DEPTH,
    }
    for batch in BATCHES:
        x = images(batch, seed=batch)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("method", ["evit", "topk"])
def test_export_of_a_pruned_model(method: str) -> None:
    model = tome.patch.timm(tiny(depth=2), method=method, keep_rate=0.6).requires_grad_(False)
    program = export(model)
    assert operators(program)["tome.select.default"] == 2
    for batch in (1, 4):
        x = images(batch, seed=batch)
        torch.testing.assert_close(program.module()(x), model(x))


def test_export_of_guided_merging() -> None:
    model = tome.patch.timm(tiny(depth=2), r=9, method="guided").requires_grad_(False)
    program = export(model)
    counts = operators(program)
    assert counts["tome.match.default"] == counts["tome.cls_attention.default"] == 2
    for batch in (1, 4):
        x = images(batch, seed=batch)
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_export_leaves_no_trace_in_the_model(strict: bool) -> None:
    model = patched("class token, avg")
    export(model, strict)
    assert model.tome is None
    x = images(2)
    logits = model(x)
    before = model.tome
    export(model, strict)
    assert model.tome is before
    assert type(model.tome.size) is Tensor
    assert torch.equal(model(x), logits)


def test_a_program_runs_where_only_tome_ext_is_imported(run_python: Any, tmp_path: Path) -> None:
    x = images(4)
    model = Everything()
    torch.export.save(export(model), tmp_path / "program.pt2")
    torch.save((x, model(x)), tmp_path / "expected.pt")
    code = (
        "import sys, torch, tome_ext\n"
        "program = torch.export.load('program.pt2')\n"
        "x, expected = torch.load('expected.pt')\n"
        "torch.testing.assert_close(program.module()(x), expected)\n"
        "assert 'timm' not in sys.modules\n"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("aoti_cpp_export", EXAMPLE / "export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cpp_build(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen]]:
    """The C++ example while it builds, as its README says but not optimised."""
    folder = tmp_path_factory.mktemp("build")
    torch_root = Path(torch.__file__).parent
    settings = [f"-DTORCH_ROOT={torch_root}", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", folder, *settings], check=True)
    with (folder / "log").open("w") as log:
        build = subprocess.Popen(["cmake", "--build", folder], stdout=log, stderr=log)
        yield folder, build
        if build.poll() is None:
            build.terminate()


@pytest.fixture(scope="module")
def packaged(
    cpp_build: object, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Everything, Path]:
    """A module and its package, compiled once for all tests while the C++ example builds."""
    folder = tmp_path_factory.mktemp("package")
    model = Everything()
    # Of the code that only calls kernels; optimising it would take longer than the tests.
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        load_example().package(model, images(3), folder)
    return model, folder


@pytest.mark.compiler
@pytest.mark.slow
def test_an_aot_inductor_package_runs_in_python(packaged: tuple[Everything, Path]) -> None:
    model, folder = packaged
    package = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    for batch in BATCHES:
        x = images(batch, seed=batch)
        torch.testing.assert_close(package(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.compiler
@pytest.mark.slow
def test_an_aot_inductor_package_runs_in_cpp(
    packaged: tuple[Everything, Path], cpp_build: tuple[Path, subprocess.Popen]
) -> None:
    folder, build = cpp_build
    assert build.wait() == 0, (folder / "log").read_text()
    library = next(_library.FOLDER.glob("_C.*so"))
    command = [folder / "aoti_cpp", packaged[1], library]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if line.startswith("batch of 1,")] == [
        *(f"batch of 1, output {i} of shape [1, 5]" for i in range(3)),
        "batch of 1, output 3 of shape [1, 48, 64]",
        "batch of 1, output 4 of shape [1, 4, 43, 16]",
        "batch of 1, output 5 of shape [1, 43]",
    ]
    assert len(lines) == 12


@pytest.mark.compiler
@pytest.mark.slow
def test_the_cpp_example_names_a_library_that_does_not_load(
    cpp_build: tuple[Path, subprocess.Popen], tmp_path: Path
) -> None:
    folder, build = cpp_build
    assert build.wait() == 0, (folder / "log").read_text()
    command = [folder / "aoti_cpp", tmp_path, tmp_path / "none.so"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert f"cannot load {tmp_path / 'none.so'}" in run.stderr
