"""Builds, shows and tests the files of a release. From anywhere:

    python .ci/release.py                sdist, CPU wheel and, where nvcc is, CUDA wheel; then tests
    python .ci/release.py sdist cpu      these only; of sdist, cpu, cuda and tests
    python .ci/release.py --show FILE    what a wheel or an sdist holds

The sdist must hold every file of the repository, and the wheels are built from it. They are tested
in fresh environments where PATH has no compiler; tests that need one, or take long, are left out.

Needs what builds the package without isolation: torch, setuptools >= 77 and ninja. The switches are
those of CONTRIBUTING.md: without TOME_OPENVINO the wheels hold no operators for OpenVINO.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("sdist", "cpu", "cuda", "tests")
OF_SETUPTOOLS = ("PKG-INFO", "setup.cfg", "tome_ext.egg-info/")  # what it adds to an sdist
# What a library asks of the machine: the newest version of each is what counts.
RUNTIMES = re.compile(rb"\b(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)+)\b")


def run(what: str, *command: object, **env: str) -> None:
    """Say what is done, and do it in an empty folder; a failure ends the program."""
    print(f"release: {what}", flush=True)
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(words, cwd=folder, env={**os.environ, **env})
    if done.returncode != 0:
        raise SystemExit(f"release: failed, exit code {done.returncode}: {shlex.join(words)}")


# --- building -----------------------------------------------------------------------------------


def build_sdist(out: Path) -> Path:
    """The sdist, if it holds every file that git knows or would take, and nothing else."""
    code = "import os, sys; from setuptools import build_meta; os.chdir(sys.argv[1]); "
    code += "build_meta.build_sdist(sys.argv[2], {'--global-option': ['--quiet']})"
    run("the sdist", sys.executable, "-c", code, ROOT, out, TOME_CUDA="0")
    (sdist,) = out.glob("tome_ext-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [member.name.partition("/")[2] for member in archive if member.isfile()]
    held = {name for name in names if not name.startswith(OF_SETUPTOOLS)}
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {name for name in known.split("\0") if (ROOT / name).is_file()}
    if held != wanted:
        raise SystemExit(
            "release: the sdist differs from the repository, MANIFEST.in has to say the same\n"
            f"  missing: {', '.join(sorted(wanted - held)) or 'nothing'}\n"
            f"  too much: {', '.join(sorted(held - wanted)) or 'nothing'}"
        )
    return sdist


def build_wheel(sdist: Path, out: Path, cuda: bool) -> Path:
    """A wheel of the sdist; that with CUDA has torch's CUDA version as its build number."""
    import torch

    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command.append("--no-cache-dir")  # where pip would find the other wheel of this sdist
    with tempfile.TemporaryDirectory() as folder:
        if cuda:
            number = f"1cu{str(torch.version.cuda).replace('.', '')}"
            command.append(f"--config-settings=--build-option=--build-number={number}")
        kind = "the CUDA wheel" if cuda else "the CPU wheel"
        run(kind, *command, "--wheel-dir", folder, sdist, TOME_CUDA="1" if cuda else "0")
        (built,) = Path(folder).glob("tome_ext-*.whl")
        return Path(shutil.move(built, out / built.name))


# --- what files hold ----------------------------------------------------------------------------


def show(file: Path) -> None:
    """Print a file's name and size, what it holds, and what its libraries need."""
    libraries: dict[str, bytes] = {}
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel:
            sizes = {info.filename: info.file_size for info in wheel.infolist()}
            libraries = {name: wheel.read(name) for name in sizes if name.endswith(".so")}
    else:
        with tarfile.open(file) as sdist:
            members = [member for member in sdist if member.isfile()]
            sizes = {member.name.partition("/")[2]: member.size for member in members}
    print(f"\n{file.name}  {text(file.stat().st_size)}, unpacked {text(sum(sizes.values()))}")
    groups: dict[str, list[int]] = {}
    for name in sorted(sizes.keys() - libraries.keys()):
        top, slash, _ = name.partition("/")
        groups.setdefault(top + slash, []).append(sizes[name])
    for group, found in groups.items():
        count = f"files: {len(found)}, " if group.endswith("/") else ""
        print(f"    {group:<32}  {count}{text(sum(found))}")
    for name, content in libraries.items():
        print(f"    {name:<32}  {text(len(content))}, needs {', '.join(needs(content))}")


def text(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def needs(library: bytes) -> list[str]:
    """The oldest C and C++ runtimes that a library loads with."""
    newest: dict[str, tuple[int, ...]] = {}
    for runtime, version in RUNTIMES.findall(library):
        number = tuple(map(int, version.split(b".")))
        newest[runtime.decode()] = max(number, newest.get(runtime.decode(), ()))
    return [f"{name} {'.'.join(map(str, number))}" for name, number in sorted(newest.items())]


# --- tests --------------------------------------------------------------------------------------


def test(wheel: Path) -> None:
    """Install a wheel in a fresh environment, and run its tests where there is no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder, "bin", "python")
        run(f"a fresh environment for {wheel.name}", sys.executable, "-m", "venv", folder)
        alone = ROOT / ".ci" / "without_compiler"
        pip = [alone, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        run("installing the wheel", *pip, wheel)
        # As the commands' errors tell those who have it.
        run("installing what its tests need", *pip, "tome_ext[test]")
        run("the operators", alone, python, ROOT / "tests" / "second_torch.py")
        options = ["-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
        options += ["--numprocesses", "auto", "--dist", "worksteal", "-m", "not slow"]
        run("the tests", alone, python, "-m", "pytest", *options, ROOT / "tests" / "python")


def main() -> None:
    """Do what was asked for."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}")
    arguments.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist/")
    arguments.add_argument("--show", type=Path, metavar="FILE", help="only say what this one holds")
    asked = arguments.parse_args()
    if asked.show is not None:
        if not asked.show.is_file():
            arguments.error(f"there is no file {asked.show}")
        show(asked.show)
        return
    if not set(asked.parts) <= set(PARTS):
        arguments.error(f"expected some of {', '.join(PARTS)}, got {' '.join(asked.parts)}")
    if asked.parts and "tests" in asked.parts and not {"cpu", "cuda"} & set(asked.parts):
        arguments.error("tests are of a wheel: expected cpu or cuda beside it")
    parts = asked.parts or [part for part in PARTS if part != "cuda" or shutil.which("nvcc")]
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if left := sorted(out.iterdir()):
        arguments.error(f"expected an empty folder, and {out} holds {left[0].name}")

    sdist = build_sdist(out)
    wheels = [build_wheel(sdist, out, part == "cuda") for part in ("cpu", "cuda") if part in parts]
    for file in (sdist, *wheels):
        show(file)
    if "tests" in parts:
        for wheel in wheels:
            test(wheel)


if __name__ == "__main__":
    main()
