"""Compiles every CUDA kernel for every architecture and fails if a hot one spills registers.

Fails, too, if an inner loop of attention has more instructions on sm_90 than its budget, or if the
compiler makes Hopper's products wait for each other.

    python .ci/check_kernels.py [--log FILE] [ARCH ...]        default: 75 80 90a 100 120

Needs nvcc, no GPU and no torch; and nvdisasm, from PATH, the toolkit or
``pip install nvidia-cuda-nvdisasm``. Architectures that FILE covers, the output of a build with
NVCC_APPEND_FLAGS=-Xptxas=-v, are read from there instead of compiled again. A kernel of float64 may
spill: it is there for gradient checks, not for speed. So may any kernel on 75, which is kept
running, not fast.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/core/cuda").glob("*.cu"))
ARCHS = ("75", "80", "90a", "100", "120")

# Instructions of a warp on sm_90, in bfloat16 at 64 channels: in a step, which is 32 rows by 16
# columns, and around the steps of a tile of 64 columns, to copy the next one above all. Both on the
# shortest way, which is the usual one. A little above what they were when this was written; who
# needs more says why, and docs/cuda-kernels.md has the numbers.
BUDGET_ARCH = "90a"
BUDGETS = {
    ("attention.cu", "attention_kernelINS_6device6BFloatELi64EE"): (170, 145),
    ("attention_backward.cu", "attention_backward_kernelINS_6device6BFloatELi64ELb0EE"): (155, 120),
    ("attention_backward.cu", "attention_backward_kernelINS_6device6BFloatELi64ELb1EE"): (190, 140),
}

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


# The compiler's name for an unnamed namespace differs from one compilation to the next.
NAMELESS = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_(\w+?_cu)_[0-9a-f]{8}")


# Said of a kernel whose products (wgmma) would not run beside its other instructions.
SERIALIZED = re.compile(r"wgmma\.mma_async instructions are serialized.*")


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
    """The kernels in an output of ``nvcc -Xptxas -v``; stops at one whose products wait."""
    if serialized := SERIALIZED.search(log):
        raise SystemExit(serialized[0])
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


def find_disassembler() -> str | None:
    """nvdisasm: that of PATH, of the toolkit, or of a package of this Python."""
    folders = [Path(entry, "nvidia") for entry in sys.path]
    nvcc = shutil.which("nvcc")
    candidates = [shutil.which("nvdisasm")]
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().with_name("nvdisasm")))
    for folder in folders:
        candidates += map(str, sorted(folder.glob("*/bin/nvdisasm")))
    return next((c for c in candidates if c and os.access(c, os.X_OK)), None)


class Code(NamedTuple):
    """A kernel's instructions, and where each may go on."""

    instructions: list[str]
    successors: list[list[int]]

    @staticmethod
    def of(listing: str) -> Code:
        """From the lines that nvdisasm prints between two kernels."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        for line in listing.splitlines():
            if label := re.match(r"\s*(\.L_\w+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
                instructions.append(instruction[1])
        successors = []
        for i, text in enumerate(instructions):
            target = re.search(r"\bBRA\b.*\((\.L_\w+)\)", text)
            always = re.match(r"(BRA|EXIT|RET)\b", text) and not re.match(r"BRA\S* !?U?P\d", text)
            following = [] if always else [i + 1] if i + 1 < len(instructions) else []
            successors.append(following + ([labels[target[1]]] if target else []))
        return Code(instructions, successors)

    def way(self, begin: int, end: int) -> int:
        """Instructions from one to another on the shortest way, without the last."""
        distance = {begin: 0}
        queue = deque([begin])
        while queue:
            i = queue.popleft()
            if i == end:
                return distance[i]
            for j in self.successors[i]:
                if j not in distance:
                    distance[j] = distance[i] + 1
                    queue.append(j)
        raise SystemExit(f"no way from instruction {begin} to {end}: is this still the same loop?")

    def loop(self, inside: tuple[int, int]) -> tuple[int, int]:
        """First and last instruction of the smallest loop around some, and larger than they are."""
        loops = [
            (begin, end)
            for end, targets in enumerate(self.successors)
            for begin in targets
            if begin <= inside[0] and inside[1] <= end and (begin, end) != inside
        ]
        if not loops:
            raise SystemExit(f"instructions {inside} are in no loop")
        return min(loops, key=lambda loop: loop[1] - loop[0])

    def costs(self) -> tuple[int, int]:
        """Instructions of a step, and of a tile beside its steps."""
        products = [i for i, text in enumerate(self.instructions) if "HMMA" in text]
        copies = [i for i, text in enumerate(self.instructions) if "LDGSTS" in text]
        step = self.loop((products[0], products[-1]))
        tile = self.loop(step)
        # The tile's copies where they are unrolled: the longest run without a branch.
        runs: list[list[int]] = []
        for i in (i for i in copies if tile[0] <= i < step[0]):
            if runs and not any("BRA" in text for text in self.instructions[runs[-1][-1] : i]):
                runs[-1].append(i)
            else:
                runs.append([i])
        run = max(runs, key=len)
        around = self.way(tile[0], run[0]) + self.way(run[0], step[0]) + self.way(step[1], tile[1])
        return self.way(step[0], step[1]) + 1, around


def over_budget(cubins: dict[str, Path], disassembler: str) -> list[str]:
    """Count instructions in compiled files by name of their source; complain."""
    complaints = []
    listings = {
        source: subprocess.run(
            [disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        for source, cubin in cubins.items()
    }
    for (source, kernel), budget in BUDGETS.items():
        sections = re.split(r"^\s*\.section\s+\.text\.", listings[source], flags=re.M)
        (section,) = (s for s in sections if kernel in s.split(",", 1)[0])
        counts = Code.of(section).costs()
        print(f"{kernel}: {counts[0]} instructions a step, {counts[1]} a tile", flush=True)
        for what, count, most in zip(("step", "tile"), counts, budget, strict=True):
            if count > most:
                complaints.append(f"{kernel}: {count} instructions a {what}, more than {most}")
    return complaints


def check_budgets() -> list[str]:
    """Compile what has a budget and count its instructions."""
    disassembler = find_disassembler()
    if disassembler is None:
        return ["instructions not counted: no nvdisasm; pip install nvidia-cuda-nvdisasm"]
    with tempfile.TemporaryDirectory() as folder:
        cubins = {}
        for name in sorted({source for source, _ in BUDGETS}):
            (source,) = (s for s in SOURCES if s.name == name)
            compile_source(source, BUDGET_ARCH, folder)
            cubins[name] = Path(folder, f"{source.stem}.{BUDGET_ARCH}.cubin")
        return over_budget(cubins, disassembler)


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
    """Check all architectures; 1 if a hot kernel spills or is over its budget."""
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
    complaints = check_budgets()
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if spilling or complaints or not SOURCES else 0


if __name__ == "__main__":
    sys.exit(main())
