"""Compiles every CUDA kernel for every architecture and fails if a hot one spills registers.

    python .ci/check_kernels.py [--log FILE] [ARCH ...]        default: 75 80 90 100 120

Needs nvcc on PATH, no GPU and no torch. Architectures that FILE covers, the output of a build with
NVCC_APPEND_FLAGS=-Xptxas=-v, are read from there instead of compiled again. A kernel of float64 may
spill: it is there for gradient checks, not for speed. So may any kernel on 75, which is kept
running, not fast.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/core/cuda").glob("*.cu"))
ARCHS = ("75", "80", "90", "100", "120")

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


# The compiler's name for an unnamed namespace differs from one compilation to the next.
NAMELESS = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?_cu)_[0-9a-f]{8}")


class Kernel(NamedTuple):
    """What ptxas says about one kernel."""

    arch: str
    name: str  # as the compiler mangles it, but for NAMELESS
    registers: int
    spilled: int  # bytes, stores and loads together

    @property
    def hot(self) -> bool:
        """Whether spilling fails the check. A template argument `double` is mangled as Id...E."""
        return self.arch != "sm_75" and re.search(r"I(?:L\w+E)*d[LIE]", self.name) is None


def kernels_of(log: str) -> list[Kernel]:
    """The kernels in an output of ``nvcc -Xptxas -v``."""
    return [
        Kernel(
            m["arch"],
            NAMELESS.sub(r"\1", m["name"]),
            int(m["registers"]),
            int(m["stores"]) + int(m["loads"]),
        )
        for m in ENTRY.finditer(log)
    ]


def compile_source(source: Path, arch: str, folder: str) -> list[Kernel]:
    """Compile one file for one architecture."""
    include = ["-I", str(ROOT / "csrc/core/include"), "-I", str(source.parent)]
    target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    output = ["-cubin", "-o", str(Path(folder, f"{source.stem}.{arch}.cubin"))]
    command = [
        "nvcc",
        "-std=c++20",
        "-O3",
        "-Xptxas",
        "-v",
        *include,
        *target,
        *output,
        str(source),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(f"{source.name} does not compile for sm_{arch}:\n{run.stderr}")
    return kernels_of(run.stderr)


def report(name: str, arch: str, kernels: list[Kernel]) -> list[Kernel]:
    """Print a line, and return the hot kernels that spill."""
    most = max((kernel.registers for kernel in kernels), default=0)
    spills = [kernel for kernel in kernels if kernel.spilled > 0]
    print(
        f"{name:24} {arch:7} {len(kernels):3} kernels, at most {most:3} registers, "
        f"{len(spills)} spill",
        flush=True,
    )
    return [kernel for kernel in spills if kernel.hot]


def compile_all(archs: list[str]) -> tuple[list[Kernel], set[str]]:
    """Compile every file for every architecture.

    Returns the hot kernels that spill, and the names of all kernels.
    """
    jobs = [(source, arch) for source in SOURCES for arch in archs]
    spilling: list[Kernel] = []
    names: set[str] = set()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool,
    ):
        results = pool.map(lambda job: compile_source(*job, folder), jobs)
        for (source, arch), kernels in zip(jobs, results, strict=True):
            spilling += report(source.name, f"sm_{arch}", kernels)
            names |= {kernel.name for kernel in kernels}
    return spilling, names


def main() -> int:
    """Check all architectures; 1 if a hot kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=Path, help="what a build printed")
    parser.add_argument("archs", nargs="*", default=ARCHS)
    args = parser.parse_args()
    logged = kernels_of(args.log.read_text()) if args.log else []
    in_log = {arch: [k for k in logged if k.arch == f"sm_{arch}"] for arch in args.archs}
    spilling, names = compile_all([arch for arch in args.archs if not in_log[arch]])
    for arch, kernels in in_log.items():
        if kernels and names <= {kernel.name for kernel in kernels}:
            spilling += report(args.log.name, f"sm_{arch}", kernels)
        elif kernels:  # the log lacks some
            spilling += compile_all([arch])[0]
    for kernel in spilling:
        print(f"spills {kernel.spilled} bytes on {kernel.arch}: {kernel.name}", file=sys.stderr)
    return 1 if spilling or not SOURCES else 0


if __name__ == "__main__":
    sys.exit(main())
