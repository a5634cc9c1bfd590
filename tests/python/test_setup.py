"""What setup.py tells nvcc, what it refuses, and what it packs; one version in all files."""

from __future__ import annotations

import re
import runpy
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

ROOT = Path(__file__).resolve().parents[2]
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
AMPERE = "-gencode=arch=compute_80,code=sm_80"


@pytest.fixture
def arch_flags(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    monkeypatch.setenv("TOME_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))["arch_flags"]


@pytest.mark.parametrize(
    ("archs", "flags"),
    [
        ("9.0", [HOPPER]),
        ("9.0a", [HOPPER]),
        ("8.0;9.0", [AMPERE, HOPPER]),
        ("8.0 9.0;", [AMPERE, HOPPER]),
        ("9.0;9.0a", [HOPPER]),
        # Newer chips can translate PTX of 9.0, and not that of 9.0a.
        ("9.0+PTX", [HOPPER, "-gencode=arch=compute_90,code=compute_90"]),
        (
            "12.0+PTX",
            [
                "-gencode=arch=compute_120,code=sm_120",
                "-gencode=arch=compute_120,code=compute_120",
            ],
        ),
        # Names as torch has them: the newest of each as PTX too.
        ("8.0;Hopper", [AMPERE, HOPPER, "-gencode=arch=compute_90,code=compute_90"]),
        ("Hopper+PTX", [HOPPER, "-gencode=arch=compute_90,code=compute_90"]),
        ("8.0\t9.0\n", [AMPERE, HOPPER]),
        ("native", [AMPERE, HOPPER]),
        ("", []),
    ],
)
def test_archs_as_nvcc_is_told_them(
    arch_flags: Callable[[str], list[str]],
    archs: str,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (8, 0), (9, 0)][i])
    assert arch_flags(archs) == flags


@pytest.mark.parametrize("archs", ["8.0, 9.0", "sm_90", "9", "Fermi"])
def test_what_is_no_arch_is_refused(arch_flags: Callable[[str], list[str]], archs: str) -> None:
    with pytest.raises(SystemExit, match=r"expected numbers such as 8\.0"):
        arch_flags(archs)


def test_a_folder_without_openvino_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("TOME_CUDA", "0")
    for wrong in (tmp_path, "1"):
        monkeypatch.setenv("TOME_OPENVINO", str(wrong))
        with pytest.raises(SystemExit, match="TOME_OPENVINO: expected 0 or the folder of an"):
            runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.filterwarnings("ignore:setup.py install is deprecated")  # pip does not run it so
def test_a_wheel_holds_nothing_of_earlier_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setenv("TOME_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", asked.update)
    runpy.run_path(str(ROOT / "setup.py"))
    monkeypatch.chdir(tmp_path)
    packages = ["tome_ext", "tome_ext_cli"]
    for package in packages:
        Path(package).mkdir()
        Path(package, "__init__.py").touch()
    # As setup.py has it, but for the libraries, which take a minute.
    of_package = {"name": "tome_ext", "packages": packages, "script_name": "setup.py"}
    distribution = setuptools.Distribution({**asked, **of_package, "ext_modules": []})
    build: Any = distribution.get_command_obj("build")
    build.ensure_finalized()
    for package in packages:
        earlier = Path(build.build_lib, package)
        earlier.mkdir(parents=True)
        for name in ("_openvino.abi3.so", "renamed_since.py"):
            (earlier / name).touch()
    distribution.run_command("bdist_wheel")
    (wheel,) = Path("dist").glob("*.whl")
    files = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert files == ["tome_ext/__init__.py", "tome_ext_cli/__init__.py"]


def test_all_files_name_one_version() -> None:
    version = runpy.run_path(str(ROOT / "tome_ext" / "_version.py"))["__version__"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (released,) = re.findall(r"^date-released: (.+)$", citation, re.MULTILINE)
    assert f"\nversion: {version}\n" in citation
    assert f"\n## [{version}] - {released}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
