"""What was installed: its symbols, its files, and how it behaves when its library is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch

import tome_ext_cli
from tome_ext import _library

FOLDER = Path(_library.FOLDER)
COMMAND = Path(tome_ext_cli.__file__).parent
FLOOR = (2, 10)  # the oldest torch that is supported
HEADERS = Path(torch.__file__).parent / "include" / "torch" / "csrc"
LINUX = sys.platform == "linux"

# --- symbols ------------------------------------------------------------------------------------

# A C++ name inside one of torch's namespaces: at::, c10::, caffe2::, torch::.
TORCH_CPP = re.compile(r"^_Z.*N[KVrRO]*(?:2at|3c10|6caffe2|5torch)(?=[0-9A-Za-z])")
PYTHON = re.compile(r"^_?Py[A-Z_]")


def libraries() -> list[Path]:
    """The compiled libraries of the package: ``_C``, and ``_C_cuda`` where it was built."""
    return sorted(FOLDER.glob("_C*.so"))


def engine_libraries() -> list[Path]:
    """Those of inference engines: ``_onnxruntime``, and ``_openvino`` where it was asked for."""
    found = sorted(FOLDER.glob("_onnxruntime*.so")) + sorted(FOLDER.glob("_openvino*.so"))
    assert found[0].name.startswith("_onnxruntime")
    return found


def imported_symbols(library: Path) -> set[str]:
    """The names a library expects others to define."""
    command = ["nm", "-D", "--undefined-only"] if LINUX else ["nm", "-u"]
    run = subprocess.run([*command, str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[-1].split("@")[0] for line in run.stdout.splitlines() if line.strip()}
    return names if LINUX else {name.removeprefix("_") for name in names}


def stable_functions() -> dict[str, tuple[int, int]]:
    """The C functions of torch's stable ABI, and the torch version each appeared in.

    Read from the installed torch's headers, where ``#if TORCH_FEATURE_VERSION >=
    TORCH_VERSION_2_x_0`` surrounds what is newer than the first stable version.
    """
    since: dict[str, tuple[int, int]] = {}
    for header in sorted(HEADERS.glob("**/*shim*.h")):
        text = re.sub(r"//.*|/\*[\s\S]*?\*/", "", header.read_text())
        guards: list[tuple[int, int]] = []
        for line in re.findall(r"#\s*(?:if|endif).*|AOTI_TORCH_EXPORT[^;{]*", text):
            version = re.search(r"FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)_", line)
            function = re.match(r"AOTI_TORCH_EXPORT[\w\s*]*?(\w+)\s*\(", line)
            if line.startswith("AOTI") and function is not None:
                since.setdefault(function.group(1), max(guards, default=(0, 0)))
            elif re.match(r"#\s*if", line):
                guards.append((int(version[1]), int(version[2])) if version else (0, 0))
            elif re.match(r"#\s*endif", line):
                guards.pop()
    return since


def offences(names: set[str], since: dict[str, tuple[int, int]]) -> dict[str, str]:
    """The imported names that tie a library to one torch or one Python, and why."""
    found = {}
    for name in names:
        if TORCH_CPP.match(name):
            found[name] = "a C++ symbol of torch, which changes between versions"
        elif PYTHON.match(name):
            found[name] = "a symbol of Python, which a library of operators needs none of"
        elif re.match(r"(aoti_)?torch_", name):
            version = since.get(name)
            if version is None:
                found[name] = "not in the headers of torch's stable ABI"
            elif version > FLOOR:
                found[name] = f"appeared in torch {version[0]}.{version[1]}"
    return found


def test_the_cpu_library_is_there() -> None:
    assert [file.name for file in FOLDER.glob("_C.*")] == ["_C.abi3.so"]


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name)
def test_imports_only_the_stable_abi(library: Path) -> None:
    names = imported_symbols(library)
    assert "torch_library_impl" in names, "read no symbols"
    assert offences(names, stable_functions()) == {}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("_ZN2at6Tensor4sizeEl", "C++ symbol of torch"),
        ("_ZNK3c1010TensorImpl4sizeEl", "C++ symbol of torch"),
        ("_ZTIN3c105ErrorE", "C++ symbol of torch"),
        ("_ZNSt6vectorIN2at6TensorESaIS1_EED1Ev", "C++ symbol of torch"),
        ("PyObject_Call", "symbol of Python"),
        ("_Py_NoneStruct", "symbol of Python"),
        ("torch_library_def_with_tags", "appeared in torch 2.12"),
        ("torch_no_such_function", "not in the headers"),
    ],
)
def test_symbol_rules_catch(name: str, why: str) -> None:
    since = {**stable_functions(), "torch_library_def_with_tags": (2, 12)}
    assert why in offences({name}, since)[name]


@pytest.mark.parametrize(
    "name", ["_ZNSt6vectorIfSaIfEED1Ev", "_ZNKSt9exception4whatEv", "memcpy", "torch_library_impl"]
)
def test_symbol_rules_let_pass(name: str) -> None:
    assert offences({name}, stable_functions()) == {}


def test_the_headers_date_known_functions() -> None:
    since = stable_functions()
    assert since["aoti_torch_library_def"] <= FLOOR
    assert since["torch_library_impl"] == FLOOR
    assert len(since) > 200


@pytest.mark.parametrize("library", engine_libraries(), ids=lambda path: path.name)
def test_libraries_of_engines_import_nothing_of_torch_or_python(library: Path) -> None:
    names = imported_symbols(library)
    assert "memcpy" in names, "read no symbols"
    assert offences(names, {}) == {}
    assert not any(name.startswith(("Ort", "torch")) for name in names)


@pytest.mark.parametrize("library", [*libraries(), *engine_libraries()], ids=lambda path: path.name)
def test_exports_none_of_our_functions(library: Path) -> None:
    command = ["nm", "-D", "--defined-only"] if LINUX else ["nm", "-gU"]
    run = subprocess.run([*command, str(library)], capture_output=True, text=True, check=True)
    assert "tome" not in run.stdout


@pytest.mark.parametrize("library", [*libraries(), *engine_libraries()], ids=lambda path: path.name)
def test_carries_no_search_path_of_the_build_machine(library: Path) -> None:
    command = ["readelf", "-d"] if LINUX else ["otool", "-l"]
    run = subprocess.run([*command, str(library)], capture_output=True, text=True, check=True)
    assert not re.search(r"RPATH|RUNPATH", run.stdout)


# --- files --------------------------------------------------------------------------------------


def test_wheel_serves_every_python_from_3_10() -> None:
    tags = re.findall(r"^Tag: (\S+)$", distribution("tome_ext").read_text("WHEEL") or "", re.M)
    assert tags
    assert all(tag.startswith("cp310-abi3-") for tag in tags), tags


def test_wheel_holds_the_package_and_nothing_else() -> None:
    files = [str(file) for file in distribution("tome_ext").files or []]
    tops = {file.split("/")[0] for file in files if not file.startswith("..")}  # .. is bin/
    assert {top for top in tops if not top.endswith(".dist-info")} == {"tome_ext", "tome_ext_cli"}
    assert "tome_ext/py.typed" in files
    assert any(re.fullmatch(r"tome_ext/assets/\w+\.jpg", file) for file in files)
    assert "tome_ext/assets/digits.npz" in files
    kinds = {Path(file).suffix for file in files if file.startswith("tome_ext/")}
    assert kinds <= {".py", ".pyc", ".so", ".typed", ".jpg", ".npz", ".md", ".txt"}


def test_metadata() -> None:
    dist = distribution("tome_ext")
    assert dist.metadata["License-Expression"] == "Apache-2.0"
    assert dist.metadata["Requires-Python"] == ">=3.10"
    required = [name for name in dist.requires or [] if "extra ==" not in name]
    assert required == ["torch>=2.10"]
    assert {"demo", "test"} <= set(dist.metadata.get_all("Provides-Extra") or [])
    commands = [entry.value for entry in dist.entry_points if entry.name == "tome-ext"]
    assert commands == ["tome_ext_cli:main"]


def test_errors_name_extras_that_there_are() -> None:
    extras = set(distribution("tome_ext").metadata.get_all("Provides-Extra") or [])
    sources = [
        path.read_text(encoding="utf-8")
        for folder in (FOLDER, COMMAND)
        for path in folder.glob("**/*.py")
    ]
    named = set(re.findall(r"tome_ext\[(\w+)\]", "\n".join(sources)))
    assert {"bench", "demo", "embed", "eval"} <= named <= extras


# --- a missing or broken library ----------------------------------------------------------------

SCRIPT = """
import torch, tome_ext
from tome_ext_cli import main
print(tome_ext.__version__, tome_ext.__file__)
main(["info"])
try:
    tome_ext.match(torch.zeros(1, 4, 2), 1)
except ImportError as error:
    print("REFUSED", error)
"""


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_import_survives_without_the_library(run_python: Any, kind: str, tmp_path: Path) -> None:
    copy = tmp_path / "tome_ext"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    shutil.copytree(COMMAND, tmp_path / COMMAND.name)
    if kind == "broken":
        (copy / "_C.abi3.so").write_bytes(b"not a library")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = run_python(SCRIPT, env=env)
    assert run.returncode == 0, run.stderr
    assert str(copy) in run.stdout
    refusal = run.stdout.split("REFUSED", 1)[1]
    found = {"missing": "no _C library lies in", "broken": "_C.abi3.so does not load"}
    for part in ("expected:", "found:", "to do:", torch.__version__, found[kind]):
        assert part in refusal
