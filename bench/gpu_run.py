"""Runs everything that only a GPU can show, in a given time; bench/gpu.sh is its command.

Nothing is lost whatever fails: each stage has a time limit, each result is appended to its file and
flushed as it comes, and no stage stops the next; one that fails is wrong, not left out. Needs
nothing but Python for itself.

First, beside each other: gpu_check (and its wrong cases again without overlap and with blocking
launches, many repeats, compute-sanitizer) and pytest. Then, alone on the machine: bench_cuda and
the figures. Last the report.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import gpu_report
from gpu_checks import BENCH, OUT_OF_TIME, Run, check

ROOT = BENCH.parent
TESTS = ROOT / "tests" / "python"
STAGES = ("machine", "check", "again", "repeats", "sanitizer", "tests", "cpp", "figures")
OPTIONAL = ("compiled",)  # torch.compile takes minutes
CHECK_SHARE = 0.42  # of the time, for what does not time anything, if figures follow
TEST_SECONDS = 60
CPP_SECONDS = 20
BUILT_FROM = ("csrc", "tome_ext", "bench/cpp")
TEST_FILES = ("test_cuda.py", "test_cuda_hosts.py", "test_run_modes.py", "test_bench.py")
CPP_ROWS = ("layer:vit_b", "layer:vit_l384", "layer:single", "layer:single_l384")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--minutes", type=float, default=4.0, help="for everything but building (default 4)")
    add("--wheel", type=Path, help="the package; without it one is built from this folder")
    add("--check-binary", type=Path, help="gpu_check; without it nvcc builds one")
    add("--bench-binary", type=Path, help="bench_cuda; without it nvcc builds one")
    add("--out", type=Path, default=ROOT / "build-gpu", help="folder for the results")
    add("--stages", default=",".join(STAGES), help="default all of %(default)s; besides: compiled")
    add("--rows", help="rows of the figures; bench/gpu_figures.py --list names them")
    add("--jobs", type=int, default=6, help="processes of gpu_check at once, and of pytest")
    add("--dry-run", action="store_true", help="without a GPU: everything starts, no figures")
    args = parser.parse_args()
    args.stages = args.stages.split(",")
    unknown = set(args.stages) - set(STAGES) - set(OPTIONAL)
    if unknown:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    args.given = {}  # by hash: what is built here is known by its commit
    for name in gpu_report.GIVEN:
        path = getattr(args, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name.replace('_', '-')}: no file {path}")
        setattr(args, name, path and path.resolve())
        args.given[name] = path and hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    args.out = args.out.resolve()
    return args


# --- before the clock starts ---------------------------------------------------------------------


def program_arch(capability: str | None, listed: str) -> str:
    """What the programs are built for: one architecture, this GPU's or else the newest listed."""
    known = [(int(a), int(b)) for a, b in re.findall(r"(\d+)\.(\d)", capability or listed)]
    major, minor = max(known, default=(9, 0))
    number = f"{major}{minor}"
    return "90a" if number == "90" else number  # as setup.py builds it


def build(run: Run) -> None:
    """Builds what was not given. On a dry run the programs are left out instead."""
    args = run.args
    capability = None
    if not run.dry:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            capability = run.answer(query, 20).split()[0]
        except (OSError, IndexError, RuntimeError) as error:
            run.say(f"nvidia-smi names no GPU: {error}")
    # Kernels for one chip only, such as those of sm_90a, are part of what is to be looked at.
    arch = capability or "9.0"
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", arch + ("a" if arch == "9.0" else ""))
    if args.wheel is None:
        run.say(f"building a wheel for {arch}")
        where = run.temporary / "wheel"
        command: list[object] = [sys.executable, "-m", "pip", "wheel", "-q", ROOT, "--no-deps"]
        command += ["--no-index", "--no-build-isolation", "--wheel-dir", where]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        run.command(command, 3600, TORCH_CUDA_ARCH_LIST=arch, MAX_JOBS=jobs)
        args.wheel = next(iter(where.glob("*.whl")), None) if where.is_dir() else None
    if args.wheel is None:
        raise SystemExit(f"gpu.sh: the wheel could not be built, see {run.out / 'log.txt'}")
    number = program_arch(capability, arch)
    nvcc = ["nvcc", "-std=c++20", "-O3", "--threads", "0"]
    nvcc += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    nvcc += [f"-I{ROOT}/csrc/core/include", f"-I{ROOT}/csrc/core/cuda"]
    kernels = sorted((ROOT / "csrc/core/cuda").glob("*.cu"))
    cpu = sorted((ROOT / "csrc/core/cpu").glob("*.cpp"))
    for name, stages, sources in (
        ("check_binary", ("check", "repeats", "sanitizer"), [BENCH / "cpp/gpu_check.cpp", *cpu]),
        ("bench_binary", ("cpp",), [BENCH / "cpp/bench_cuda.cu"]),
    ):
        if getattr(args, name) is not None or run.dry or not set(stages) & set(args.stages):
            continue
        if shutil.which("nvcc") is None:
            run.say(f"no nvcc to build a {name.replace('_', '-')} with; its stages are left out")
            continue
        run.say(f"building a {name.replace('_', '-')}")
        program = run.temporary / name
        if run.command([*nvcc, *sources, *kernels, "-o", program], 3600) == 0:
            setattr(args, name, program)
        else:
            run.missing(stages[0], f"no {name.replace('_', '-')} could be built", fault=True)


def install(run: Run) -> bool:
    """The package, and the programs, which may have lost their permissions on the way here."""
    for name in ("check_binary", "bench_binary"):
        given = getattr(run.args, name)
        if given is not None and not os.access(given, os.X_OK):
            copy = run.temporary / f"{name}_executable"
            shutil.copyfile(given, copy)
            copy.chmod(0o755)
            setattr(run.args, name, copy)
    command: list[object] = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
    command += ["--no-index", "--no-compile", "--target", run.temporary / "package", run.args.wheel]
    return run.command(command, 120) == 0


# --- stages --------------------------------------------------------------------------------------

MACHINE = """
import json, platform, sys, torch, tome_ext
from importlib.metadata import version
info = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "tome_ext": tome_ext.__version__, "library": tome_ext._library.cuda_status()}
for name in ("timm", "triton"):
    try: info[name] = version(name)
    except Exception: info[name] = None
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    info |= {"device": p.name, "capability": f"{p.major}.{p.minor}",
             "multiprocessors": p.multi_processor_count,
             "memory_gib": round(p.total_memory / 2**30)}
    info["cudnn"] = torch.backends.cudnn.version()
print(json.dumps(info))
"""


def commit() -> str | None:
    """Of this folder; None if it is no clone, such as a copy on a lent machine."""
    if not (ROOT / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *BUILT_FROM)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return f"{head}{'+changes' if changed else ''}" if head else None


def machine(run: Run, end: float) -> None:
    """Who measures: written at once without torch, and again with it."""
    about: dict[str, Any] = {"dry_run": run.dry, "date": time.strftime("%Y-%m-%d")}
    about |= {"commit": commit(), **run.args.given}
    fields = "name,compute_cap,driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        values = run.answer(query, 20).splitlines()[0].split(",")
        about |= dict(zip(fields.split(","), (x.strip() for x in values), strict=True))
    except (OSError, IndexError, ValueError, RuntimeError) as error:
        about["nvidia_smi"] = str(error)
    write_machine(run, about)
    try:
        seconds = max(5.0, min(60.0, end - time.monotonic()))
        about |= json.loads(run.answer([sys.executable, "-c", MACHINE], seconds).splitlines()[-1])
    except (IndexError, ValueError, RuntimeError) as error:
        about["error"] = f"torch: {error}"
    write_machine(run, about)
    run.say(f"{about.get('device', 'no GPU')}, torch {about.get('torch')}, {about.get('library')}")


def write_machine(run: Run, about: dict[str, Any]) -> None:
    """At once, so that no end of this process leaves half of it."""
    part = run.out / "machine.json.part"
    part.write_text(json.dumps(about, indent=1) + "\n")
    part.replace(run.out / "machine.json")


def tests(run: Run, end: float) -> None:
    if "tests" not in run.args.stages:
        return
    command: list[object] = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT]
    command += ["--tb=short", "--continue-on-collection-errors"]
    command += ["-m", "not cuda and not slow" if run.dry else "cuda"]
    command += ["-n", 2 if run.dry else run.args.jobs, "--max-worker-restart", 100]
    command += ["--results", run.out / "tests.jsonl", "--seconds-per-test", TEST_SECONDS]
    # On a dry run those that need no GPU; the last file's take a minute.
    command += [TESTS / name for name in TEST_FILES[: 3 if run.dry else None]]
    extra = {} if run.dry else {"TOME_REQUIRE_CUDA": "1"}
    said = run.temporary / "pytest.txt"
    status = run.command(command, end - time.monotonic(), to=str(said), **extra)
    text = said.read_text(errors="replace") if said.exists() else ""
    run.append_text("log.txt", text)
    last = ([""] + text.strip().splitlines())[-1]
    if status is None:
        run.missing("tests", OUT_OF_TIME)
    elif status in (0, 1):  # of tests that failed there are lines
        run.say(f"tests: {last}")
    else:
        run.missing("tests", f"pytest ended with {status}: {last}", fault=True)


def cpp(run: Run) -> None:
    if "cpp" not in run.args.stages:
        return
    if run.args.bench_binary is None:
        return run.missing("cpp", "no bench_cuda")
    file = run.out / "cpp.jsonl"
    for row in CPP_ROWS:
        limit = min(CPP_SECONDS, run.left())
        command = [run.args.bench_binary, *(["--dry-run"] if run.dry else []), row]
        status = run.command(command, limit, to=file.name)
        error = f"exit status {status}"
        if status is None:
            error = gpu_report.NO_TIME if limit < CPP_SECONDS else f"stopped after {limit} s"
        elif status == 0:
            error = "" if row in gpu_report.merged(gpu_report.lines_of(file)) else "no figures"
        if error:
            run.append(file.name, {"row": row, "error": error})
            run.say(f"cpp: {row}: {error}")
    run.say("cpp: done")


def figures(run: Run, name: str, rows: str) -> None:
    if name not in run.args.stages:
        return
    seconds = run.left()
    if seconds < 10:
        return run.missing(name, OUT_OF_TIME)
    command: list[object] = [sys.executable, BENCH / "gpu_figures.py", "--rows", rows]
    command += ["--out", run.out / "figures.jsonl", "--seconds", f"{seconds:.0f}"]
    command += ["--row-seconds", 600 if name == "compiled" else 60]
    command += ["--dry-run"] if run.dry else []
    status = run.command(command, seconds + 2)
    if status is None:
        run.missing(name, OUT_OF_TIME)
    elif status != 0:
        run.missing(name, f"gpu_figures.py ended with {status}, see log.txt", fault=True)
    else:
        run.say(f"{name}: done")


def run_stages(run: Run) -> None:
    """All of them, and before the figures nothing else may be left on the machine."""
    args = run.args
    timed = [s for s in ("cpp", "figures", "compiled") if s in args.stages]
    share = CHECK_SHARE if timed else 1.0
    end = run.began + share * (run.end - run.began)
    together = [("check", partial(check, run, end)), ("tests", partial(tests, run, end))]
    if "machine" in args.stages:
        together.append(("machine", partial(machine, run, end)))
    ended = run.at_once(together, end)
    alive = [process.pid for process in run.killed if process.poll() is None]
    if timed and (alive or not ended):
        what = f"processes {alive}" if alive else "an earlier stage"
        run.missing("figures", f"not alone on the machine: {what} had not ended", fault=True)
    run.guarded("cpp", partial(cpp, run))
    # Shares of what a copy does need its figure from the same run.
    rows = f"ceilings,{args.rows}" if args.rows else "figures"
    run.guarded("figures", partial(figures, run, "figures", rows))
    run.guarded("compiled", partial(figures, run, "compiled", "compiled"))


def main() -> int:
    """0 if nothing that ran was wrong."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("machine.json", "check.jsonl", "cpp.jsonl", "tests.jsonl", "figures.jsonl"):
        (args.out / name).unlink(missing_ok=True)  # of an earlier run
    for name in ("sanitizer.txt", "log.txt", "report.md"):
        (args.out / name).unlink(missing_ok=True)
    run = Run(args)
    try:
        build(run)
        run.began = time.monotonic()
        if not install(run):  # another tome_ext must not be taken for this one
            run.missing("wheel", "it could not be installed, see log.txt", fault=True)
            args.stages = [s for s in args.stages if s not in ("tests", "figures", "compiled")]
        run_stages(run)
        results = gpu_report.Results(args.out)
        page = gpu_report.page(results)
        (args.out / "report.md").write_text(page)
        print(page[:8000])
        return 1 if gpu_report.faults(results) else 0
    finally:
        shutil.rmtree(run.temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
