"""Every block of code in README and docs runs, or is checked as its kind allows.

Python runs page by page, in the page's order. What cannot run in a test (it would install packages,
need a GPU or data, or take minutes) is read by the command's own parser, or held against the files
that it names; a block of a kind that nothing here knows fails.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch

import tome_ext as tome
from tome_ext_cli.options import parser

ROOT = Path(__file__).parents[2]
RUNNING = ROOT / "docs" / "running"
MARKS = {
    "compile.md": pytest.mark.compiler,
    "cuda-graphs.md": pytest.mark.cuda,
    "export.md": pytest.mark.compiler,
    "openvino.md": pytest.mark.openvino,
}
BY_TORCHRUN = {"docs/running/distributed.md"}
# The others need a file that a command makes: test_embed.py runs them.
RUN_OTHERWISE = BY_TORCHRUN | {"docs/embedding.md"}
# What pages change in torch._dynamo.config, as it was before: set back after each.
CHANGED = ("recompile_limit", "skip_fwd_side_effects_in_bwd_under_checkpoint")
SETTINGS = {name: getattr(torch._dynamo.config, name) for name in CHANGED}
FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

# Python that only compiles here, by its first line, with the reason.
ONLY_COMPILES = {
    "path = torch._inductor.aoti_compile_and_package": "a minute; test_run_export.py does it",
    "from onnxscript import opset18 as op": "works around a model whose export takes a minute",
}
# Text, by the page it is on: what it is. Nothing of it is code.
TEXT = {
    "CONTRIBUTING.md": "the folders",
    "examples/aoti_cpp/README.md": "what a program prints, as test_run_export.py reads it",
    "docs/reference/schemas.md": "schemas, held against the operators below",
    "docs/troubleshooting.md": "messages, held against the source below",
}


ANY = "\0"  # stands for any text, in messages
SOURCES = [*ROOT.glob("tome_ext*/**/*.py"), ROOT / "setup.py"]


class Block(NamedTuple):
    """A block of code: the page it is on, as a path in the repository, its line, language, text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    found = FENCE.finditer(text)
    blocks = [
        Block(name, text.count("\n", 0, x.start(3)) + 1, x[2], textwrap.dedent(x[3])) for x in found
    ]
    assert 2 * len(blocks) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{name}: stray ```"
    return blocks


FILES = [*ROOT.glob("*.md"), *ROOT.glob("examples/*/*.md"), *ROOT.glob("docs/**/*.md")]
FILES = [file for file in sorted(FILES) if ROOT / "docs" / "gallery" not in file.parents]
BLOCKS = [block for file in FILES for block in blocks_of(file)]


def of(*languages: str) -> list[Any]:
    chosen = [block for block in BLOCKS if block.language in languages]
    return [pytest.param(block, id=block.where) for block in chosen]


def test_every_block_is_of_a_kind_that_is_checked() -> None:
    kinds = {"python", "py", "bash", "cmake", "cpp", "text"}
    built = {"{eval-rst}", "{toctree}"}  # by the site, with warnings as errors
    for block in BLOCKS:
        assert block.language in kinds | built, f"{block.where}: {block.language!r}"
        if block.language == "text":
            assert block.page in TEXT, f"{block.where}: text, or code that nothing runs?"
        if block.language == "py":
            first = block.text.splitlines()[0]
            assert any(first.startswith(line) for line in ONLY_COMPILES), block.where


# --- Python -------------------------------------------------------------------------------------

PAGES = sorted({block.page for block in BLOCKS if block.language == "python"})


def code_of(page: str) -> str:
    """The page's blocks, each on the lines it has in the page, so that errors point there."""
    code = ""
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            code += "\n" * (block.line - 1 - code.count("\n")) + block.text
    return code


def marked(page: str) -> Any:
    return pytest.param(page, marks=MARKS.get(Path(page).name, ()))


@pytest.mark.slow
@pytest.mark.parametrize("page", [marked(page) for page in PAGES if page not in RUN_OTHERWISE])
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for what the page writes
    with_weights = timm.create_model

    def create_model(*names: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        return with_weights(*names, **options)  # random ones, as the tests have no network

    monkeypatch.setattr(timm, "create_model", create_model)
    torch.compiler.reset()
    with torch._dynamo.config.patch(SETTINGS):
        exec(compile(code_of(page), str(ROOT / page), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(BY_TORCHRUN))
def test_page_under_torchrun(page: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(code_of(page))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("block", of("python", "py"))
def test_code_is_python(block: Block) -> None:
    compile(block.text, block.where, "exec")  # also that which needs a GPU, or does not run


@pytest.mark.parametrize("file", sorted(RUNNING.glob("*.md")), ids=lambda file: file.name)
def test_the_index_of_ways_names_the_page(file: Path) -> None:
    if file.name != "README.md":
        assert f"[{file.name}]({file.name})" in (RUNNING / "README.md").read_text(encoding="utf-8")


# --- shell --------------------------------------------------------------------------------------

# Commands that mean the same whatever follows them here.
FREE = ("pytest", "cd ..", "ctest --test-dir build", "python -m venv .venv", ". .venv/bin/activate")
CMAKE_FLAGS = {"-S", "-B", "-j", "--build", "--install", "--parallel", "--prefix"}


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def without_substitutions(line: str) -> str:
    """A line with SHELL in place of each $(...), whatever is nested in it."""
    while (begin := line.find("$(")) >= 0:
        end, depth = begin + 2, 1
        while depth:
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            end += 1
        line = line[:begin] + "SHELL" + line[end:]
    return line


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a block, each split into words as the shell does it."""
    commands: list[list[str]] = [[]]
    for line in block.text.splitlines():
        for word in [*shlex.split(without_substitutions(line), comments=True), "&&"]:
            if word == "&&":
                commands.append([])
            else:
                commands[-1].append(word)
    return [command for command in commands if command]


def check_tome_ext(words: list[str], page: str) -> None:
    parser().parse_args(words)


def check_torchrun(words: list[str], page: str) -> None:
    from torch.distributed.run import get_args_parser

    split = words.index("--")
    get_args_parser().parse_args([*words[:split], "script"])
    assert words[split + 1] == "tome-ext"
    check_tome_ext(words[split + 2 :], page)


def check_pip(words: list[str], page: str) -> None:
    assert words[0] == "install"
    known = read("pyproject.toml") + read(".ci/run")
    for word in words[1:]:
        requirement = re.fullmatch(r"(\.|[a-z_]+)(?:\[(\w+)\])?(>=\d+)?", word)
        if requirement is None:
            assert word in ("--no-build-isolation", "--no-deps"), word
        elif f'"{word}"' in known:  # another package's extra
            continue
        elif requirement[2] is not None:
            assert re.search(rf"^{requirement[2]} = \[", known, re.MULTILINE), word
        else:
            assert requirement[1] in known, word


def check_apt(words: list[str], page: str) -> None:
    assert words[0] == "install"
    assert all(word in read(".ci/run") for word in words[1:])


def check_cmake(words: list[str], page: str) -> None:
    folder = Path(page).parent if page.startswith("examples/") else Path()
    lists = read(str(folder / "CMakeLists.txt"))
    for word in words:
        name = re.match(r"-D(\w+)=", word)
        if name is not None:
            known = rf"(option|set)\({name[1]} " if name[1] != "OpenVINO_DIR" else "OpenVINO"
            assert name[1] == "CMAKE_PREFIX_PATH" or re.search(known, lists), word
        else:
            assert word in CMAKE_FLAGS or not word.startswith("-"), word


def check_script(words: list[str], page: str) -> None:
    """A script of this repository, and its options as they stand in its source."""
    beside = Path(page).parent / words[0]
    script = beside if (ROOT / beside).is_file() else Path(words[0])
    if script.name == "gpu.sh":
        assert "gpu_run.py" in read(str(script))
        script = script.with_name("gpu_run.py")
    source = read(str(script))
    for word in words[1:]:
        assert not word.startswith("-") or f'"{word}"' in source, f"{script}: {word}"


def check_export(words: list[str], page: str) -> None:
    source = read("bench/cpu_ways.py")  # which measures what these give
    assert all(f'"{word.split("=")[0]}"' in source for word in words)


CHECKS: dict[str, tuple[Callable[[list[str], str], None], str]] = {
    "tome-ext": (check_tome_ext, "downloads weights, needs pictures: by its own parser"),
    "torchrun": (check_torchrun, "the same, by the parsers of both"),
    "pip": (check_pip, "takes minutes and the network: extras and packages are known"),
    "apt-get": (check_apt, "changes the machine: packages are those of .ci/run"),
    "cmake": (check_cmake, "takes minutes; .ci/run core builds it: options are known"),
    "export": (check_export, "changes the shell: variables are known"),
    "python": (check_script, "takes minutes or a GPU: the script has these options"),
    "bench/gpu.sh": (check_script, "needs a GPU; .ci/run gpu-kit runs it dry: as above"),
}


@pytest.mark.parametrize("block", of("bash"))
def test_commands_are_known(block: Block) -> None:
    for words in commands_of(block):
        while re.match(r"[A-Z_]+=", words[0]):  # a variable for this command
            assert f"`{words[0].split('=')[0]}`" in read("CONTRIBUTING.md")
            words = words[1:]
        if " ".join(words) in FREE:
            continue
        if words[0] in CHECKS:
            inner = words if words[0].endswith(".sh") else words[1:]
            CHECKS[words[0]][0](inner, block.page)
        else:  # a program that was built before
            program = Path(words[0])
            assert "build" in program.parts, f"{block.where}: unknown command {words[0]!r}"
            page_lists = ROOT / Path(block.page).parent / "CMakeLists.txt"
            lists = page_lists.read_text() if page_lists.is_file() else read(block.page)
            assert f"add_executable({program.name} " in lists, block.where


# --- C++ ----------------------------------------------------------------------------------------


def test_the_program_is_the_one_that_ctest_builds() -> None:
    files = [read(f"tests/cpp/consumer/{name}") for name in ("CMakeLists.txt", "main.cpp")]
    blocks = [block for block in BLOCKS if block.language in ("cmake", "cpp")]
    assert {block.page for block in blocks} == {"docs/cpp.md"}
    assert [block.text for block in blocks[:2]] == files
    assert len(blocks) == 3
    # The third one, for GPUs, names a target that is exported.
    (target,) = re.findall(r"tome::(\w+)", blocks[2].text)
    assert f"install(TARGETS {target} EXPORT tome_core-targets)" in read("CMakeLists.txt")


# --- text ---------------------------------------------------------------------------------------


def test_schemas_are_the_operators() -> None:
    (block,) = (x for x in BLOCKS if x.page == "docs/reference/schemas.md" and x.language == "text")
    lines = block.text.splitlines()
    names = [re.match(r"tome::(\w+)", line)[1] for line in lines]  # type: ignore[index]
    assert sorted(names) == sorted([*tome.ops.NAMES, "attention"])
    for name, line in zip(names, lines, strict=True):
        assert torch._C.parse_schema(line) == getattr(torch.ops.tome, name).default._schema


def may_be(message: str, template: str) -> bool:
    """Whether some text fits both, in each of which NUL stands for anything."""
    # fits[j]: whether what was read of the message fits the first j of the template.
    fits = list(
        itertools.accumulate(template, lambda all_any, x: all_any and x == ANY, initial=True)
    )
    for letter in message:
        row = [letter == ANY and fits[0]]
        for j, other in enumerate(template):
            if letter == ANY or other == ANY:
                row.append(fits[j + 1] or row[j])
            else:
                row.append(fits[j] and letter == other)
        fits = row
    return fits[-1]


def texts_of(path: Path) -> Iterator[str]:
    """The texts in a source file, with NUL in place of values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(x.value) if isinstance(x, ast.Constant) else ANY for x in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def vit(**options: Any) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, **options).eval()


def head_without_sizes() -> None:
    model = tome.patch.timm(vit(global_pool="avg"), r=2)
    model.forward_head(model.forward_features(torch.randn(2, 3, 64, 64)).clone())


def block_by_itself() -> None:
    model = tome.patch.timm(vit(), r=2)
    model.blocks[1](torch.randn(2, 13, 192))


def replaced_forward(module: str, then: Callable[[Any], Any]) -> None:
    model = vit() if module else tome.patch.timm(vit(), r=2)
    model.get_submodule(module).forward = lambda x: x
    then(model)


def sharded() -> None:
    class FSDPModule:  # by which fully_shard's classes are known
        pass

    model = vit()
    model.__class__ = type("FSDPViT", (FSDPModule, type(model)), {})
    tome.patch.timm(model)


def exported() -> None:
    model = tome.patch.timm(vit(), threshold=0.9)
    torch.export.export(model, (torch.randn(2, 3, 64, 64),))


def picture() -> None:
    from PIL import Image

    tome.make_visualization(Image.new("RGB", (60, 60)), torch.zeros(1, 17, dtype=torch.int32))


# What raises each message, by its beginning; None: nothing can here, and it is in the source.
RAISED: dict[str, Callable[[], Any] | None] = {
    "the operators of tome_ext": None,  # without a compiled library
    "tome_ext: building without CUDA": None,  # a build
    "TOME_ISA: expected": None,  # when the package is imported
    "model: expected one of timm's": lambda: tome.patch.auto(
        timm.create_model("swin_tiny_patch4_window7_224")
    ),
    "model: expected a model of open_clip": lambda: tome.patch.auto(torch.nn.Linear(2, 2)),
    "model: got": lambda: replaced_forward("blocks.0", tome.patch.timm),
    "model: expected a model that is not sharded": sharded,
    "model: ... in it is patched already": lambda: tome.patch.auto(
        torch.nn.Sequential(tome.patch.timm(vit()))
    ),
    "r: expected": lambda: tome.patch.timm(vit(), r=0.5),
    "expected one of r, keep_rate": lambda: tome.patch.timm(vit(), r=2, threshold=0.9),
    "keep_rate: expected": lambda: tome.patch.timm(vit(), keep_rate=0.3),
    "method: 'evit'": lambda: tome.patch.timm(
        vit(class_token=False, global_pool="avg"), method="evit"
    ),
    "threshold: how many": exported,
    "the sizes of these": head_without_sizes,
    "block 1 was called": block_by_itself,
    "these are not the tokens": None,  # in a compiled function
    "tome_ext runs plain": None,  # a GPU without kernels
    "a patched model cannot": lambda: torch.fx.symbolic_trace(tome.patch.timm(vit())),
    "the model (VisionTransformer)": lambda: replaced_forward("", tome.patch.remove),
    "img: expected": picture,
}
MESSAGES = [x for x in BLOCKS if x.page == "docs/troubleshooting.md" and x.language == "text"]


@pytest.mark.parametrize("block", [pytest.param(x, id=x.where) for x in MESSAGES])
def test_messages_are_raised(block: Block) -> None:
    (raising,) = [x for begin, x in RAISED.items() if block.text.startswith(begin)]
    message = block.text.strip().replace("...", ANY)
    if raising is None:
        texts = (x for path in SOURCES for x in texts_of(path) if x[:8] == message[:8])
        # Its first line is what the page shows.
        assert any(may_be(message, text.split("\n")[0]) for text in texts), block.text
    else:
        with pytest.raises(Exception) as caught:
            raising()
        assert may_be(message, str(caught.value)), f"{block.where}: {caught.value}"


def test_every_message_is_on_the_page() -> None:
    for begin in RAISED:
        assert sum(block.text.startswith(begin) for block in MESSAGES) == 1, begin


def test_the_table_of_supported_models_is_that_of_the_patches() -> None:
    script = ROOT / "bench" / "supported.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
