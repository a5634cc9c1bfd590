"""Runs everything that only a GPU can show, in a given time; bench/gpu.sh is its command.

Nothing is lost whatever fails: each stage has a time limit, each result is appended to its file and
flushed as it comes, and no stage stops the next. Needs nothing but Python for itself.

First, beside each other: gpu_check (and its wrong cases again without overlap and with blocking
launches, many repeats, compute-sanitizer) and pytest. Then, alone on the machine: bench_cuda and
the figures. Last the report.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_report

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
FOUND = os.environ.get("PYTHONPATH")  # where a rival may be
TESTS = ROOT / "tests" / "python"
STAGES = ("machine", "check", "again", "repeats", "sanitizer", "tests", "cpp", "figures")
OPTIONAL = ("compiled",)  # torch.compile takes minutes
CHECK_SHARE = 0.42  # of the time, for what does not time anything, if figures follow
REPORT_SECONDS = 3
CASE_SECONDS = 20  # for one case of gpu_check to print its line; twice that for many repeats
MOST_SAID = 40  # wrong cases in the log; the files have all
TEST_SECONDS = 60
CUDA_ERROR = 70  # gpu_check's exit status when its context is lost
TOOLS = ("memcheck", "racecheck", "synccheck")
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
    for name in ("wheel", "check_binary", "bench_binary"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name.replace('_', '-')}: no file {path}")
        setattr(args, name, path and path.resolve())
    args.out = args.out.resolve()
    return args


class Run:
    """What the stages share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dry = args.dry_run
        self.out = args.out
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self.temporary = Path(tempfile.mkdtemp(prefix="tome-gpu-"))
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(self.temporary / "package"), str(BENCH), *filter(None, [FOUND])]
            ),
        }

    @property
    def end(self) -> float:
        return self.began + 60 * self.args.minutes - REPORT_SECONDS

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.began:5.1f} s] {text}"
        with self.lock:
            print(line, flush=True)
            with (self.out / "log.txt").open("a") as file:
                file.write(line + "\n")

    def append(self, name: str, line: dict[str, Any]) -> None:
        with self.lock, (self.out / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def command(
        self, command: list[Any], seconds: float, to: str = "log.txt", **extra: str
    ) -> int | None:
        """Runs a command, its output appended to a file; None if its time ran out."""
        if seconds <= 0:
            return None
        with (self.out / to).open("a") as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.temporary,  # not the source folder, whose package has no library
                env={**self.environment, **extra},
                start_new_session=True,
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                kill(process)
                return None


def kill(process: subprocess.Popen[Any]) -> None:
    """With what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- before the clock starts ---------------------------------------------------------------------


def build(run: Run) -> None:
    """Builds what was not given. On a dry run the programs are left out instead."""
    args = run.args
    arch = "9.0"
    if not run.dry:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            arch = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
        except (OSError, IndexError):
            run.say("nvidia-smi names no GPU")
    # Kernels for one chip only, such as those of sm_90a, are part of what is to be looked at.
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", arch + ("a" if arch == "9.0" else ""))
    if args.wheel is None:
        run.say(f"building a wheel for {arch}")
        where = run.temporary / "wheel"
        command = [sys.executable, "-m", "pip", "wheel", "-q", ROOT, "--no-deps", "--no-index"]
        command += ["--no-build-isolation", "--wheel-dir", where]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        run.command(command, 3600, TORCH_CUDA_ARCH_LIST=arch, MAX_JOBS=jobs)
        args.wheel = next(iter(where.glob("*.whl")), None) if where.is_dir() else None
    if args.wheel is None:
        raise SystemExit(f"gpu.sh: the wheel could not be built, see {run.out / 'log.txt'}")
    number = arch.split(";")[0].split("+")[0].replace(".", "")
    number = "90a" if number == "90" else number  # as setup.py builds it
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
            run.say("it could not be built, see the log")


def install(run: Run) -> bool:
    """The package, and the programs, which may have lost their permissions on the way here."""
    for name in ("check_binary", "bench_binary"):
        given = getattr(run.args, name)
        if given is not None and not os.access(given, os.X_OK):
            copy = run.temporary / f"{name}_executable"
            shutil.copyfile(given, copy)
            copy.chmod(0o755)
            setattr(run.args, name, copy)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    command += ["--no-compile", "--target", run.temporary / "package", run.args.wheel]
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


def machine(run: Run) -> None:
    """Who measures: written at once without torch, and again with it."""
    about: dict[str, Any] = {"dry_run": run.dry, "date": time.strftime("%Y-%m-%d")}
    git = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True
    )
    about["commit"] = git.stdout.strip() or None
    fields = "name,driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        text = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout.splitlines()
        about |= dict(zip(fields.split(","), (x.strip() for x in text[0].split(",")), strict=True))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired) as error:
        about["nvidia_smi"] = str(error)
    path = run.out / "machine.json"
    path.write_text(json.dumps(about, indent=1) + "\n")
    try:
        answer = subprocess.run(
            [sys.executable, "-c", MACHINE],
            capture_output=True,
            text=True,
            timeout=max(5, min(60, run.left())),
            env=run.environment,
            cwd=run.temporary,
        )
        about |= json.loads(answer.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        about["error"] = f"torch: {error}"
    path.write_text(json.dumps(about, indent=1) + "\n")
    run.say(f"{about.get('device', 'no GPU')}, torch {about.get('torch')}, {about.get('library')}")


class Checks:
    """Runs cases of gpu_check in a few processes at once; the culprit of a crash costs its own
    result only, the cases behind it go to a new process."""

    def __init__(self, run: Run, end: float) -> None:
        self.run = run
        self.end = end
        self.wrong = 0

    def names(self, which: str) -> list[str]:
        command = [str(self.run.args.check_binary), "--list", "--set", which]
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return listed.stdout.split()

    def all(self, names: list[str], options: list[str], note: dict[str, Any]) -> list[dict]:
        """Every case's line; also appended to check.jsonl as it comes."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in names:  # of one operator and dtype
            groups.setdefault(tuple(name.split(":")[:2]), []).append(name)
        todo: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        for group in groups.values():
            todo.put(group)
        rows: list[dict] = []

        def work() -> None:
            while time.monotonic() < self.end:
                try:
                    group = todo.get_nowait()
                except queue.Empty:
                    return
                while group and time.monotonic() < self.end:
                    group = self._group(group, options, note, rows)

        workers = [threading.Thread(target=work) for _ in range(self.run.args.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return rows

    def _group(
        self, names: list[str], options: list[str], note: dict[str, Any], rows: list[dict]
    ) -> list[str]:
        """Runs a group; returns the names that are left when its process has died."""
        command = [str(self.run.args.check_binary), *options]
        for name in names:
            command += ["--case", name]
        variables = {k: v for k, v in note.items() if k.isupper()}
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**self.run.environment, **variables},
                start_new_session=True,
            )
            lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

            def read() -> None:
                for line in process.stdout or ():
                    lines.put(line)
                lines.put(None)

            threading.Thread(target=read, daemon=True).start()
            reached, why = [], ""
            patience = CASE_SECONDS * (2 if options else 1)
            patience *= 20 if self.run.dry else 1  # the emulator takes its time
            while True:
                try:
                    wait = min(patience, self.end - time.monotonic())
                    line = lines.get(timeout=max(wait, 0.01))
                except queue.Empty:
                    if time.monotonic() >= self.end:
                        kill(process)
                        return []
                    why = f"nothing for {patience} s"
                    break
                if line is None:
                    break
                row = {"stage": "check", **json.loads(line), **note}
                reached.append(row["case"])
                rows.append(row)
                self._report(row)
            if why:
                kill(process)
            status = process.wait()
            errors.seek(0)
            said = errors.read()[-300:]
        missing = [name for name in names if name not in reached]
        if missing and status != CUDA_ERROR:
            row = {"stage": "check", "case": missing.pop(0), "ok": False, **note}
            row["why"] = why or f"the process ended with {status}: {said}"
            rows.append(row)
            self._report(row)
        return missing

    def _report(self, row: dict) -> None:
        self.run.append("check.jsonl", row)
        self.wrong += not row["ok"]
        if not row["ok"] and self.wrong <= MOST_SAID:
            self.run.say(f"WRONG {json.dumps(row)[:300]}")


def note_missing(run: Run, stage: str, names: list[str], rows: list[dict]) -> None:
    """So that a part of the cases is not taken for all of them."""
    if len(rows) < len(names) or not names:
        why = "out of time" if names else "gpu_check lists no cases"
        row = {"stage": "missing", "of": stage, "cases": len(names) - len(rows), "why": why}
        run.append("check.jsonl", row)


def check(run: Run, end: float) -> None:
    """All cases, the wrong ones in other ways, many repeats of some, and compute-sanitizer."""
    stages = run.args.stages
    if not {"check", "repeats", "sanitizer"} & set(stages):
        return
    if run.args.check_binary is None:
        return run.say("check: no gpu_check, left out")
    checks = Checks(run, end)
    wrong: list[str] = []
    small = "emulator" if run.dry else "all"
    if "check" in stages:
        names = checks.names(small)
        rows = checks.all(names, [], {})
        note_missing(run, "check", names, rows)
        wrong = [row["case"] for row in rows if not row["ok"]]
        run.say(f"check: {len(rows)} cases, {len(wrong)} wrong")
    for note in ({"TOME_OVERLAP": "0"}, {"CUDA_LAUNCH_BLOCKING": "1"}):
        if "again" in stages and wrong:
            rows = checks.all(wrong[:60], [], {**note, "stage": "again"})
            run.say(f"again with {note}: {sum(not r['ok'] for r in rows)} of {len(rows)} wrong")
    if "repeats" in stages:
        names = checks.names(small if run.dry else "repeats")[: 3 if run.dry else None]
        many = "5" if run.dry else "1000"
        rows = checks.all(names, ["--repeats", many], {"stage": "repeats"})
        note_missing(run, "repeats", names, rows)
        run.say(f"{many} repeats: {sum(not r['ok'] for r in rows)} of {len(rows)} wrong")
    if "sanitizer" in stages:
        sanitizer(run, checks, end)


def sanitizer(run: Run, checks: Checks, end: float) -> None:
    """The tools beside each other, each on some cases at a time."""
    program = shutil.which("compute-sanitizer")
    if program is None or run.dry:
        why = "a dry run" if run.dry else "compute-sanitizer is not on PATH"
        run.append("check.jsonl", {"stage": "sanitizer", "ok": None, "why": why})
        return run.say(f"sanitizer: not run, {why}")
    names = checks.names("sanitizer")

    def tool(name: str) -> None:
        options = ["--report-api-errors", "no"] if name == "memcheck" else []
        for part in range(0, len(names), 12):
            if time.monotonic() > end - 2:
                row = {"stage": "missing", "of": name, "cases": len(names) - part}
                run.append("check.jsonl", {**row, "why": "out of time"})
                return run.say(f"{name}: {part} of {len(names)} cases, then the time was over")
            to = run.temporary / f"{name}-{part}.txt"
            command = [program, "--tool", name, *options, "--print-limit", "10"]
            command += ["--error-exitcode", "99", run.args.check_binary, "--repeats", "2"]
            for case in names[part : part + 12]:
                command += ["--case", case]
            status = run.command(command, end - time.monotonic(), to=str(to))
            text = to.read_text(errors="replace") if to.exists() else ""
            with run.lock, (run.out / "sanitizer.txt").open("a") as file:
                file.write(f"--- {name}, cases {part} to {part + 11}: {status}\n{text[-20000:]}\n")
            summary = [x for x in text.splitlines() if "SUMMARY" in x][-1:]
            reached = text.count('{"case"')
            # Without a summary it could not run here at all, which says nothing of the kernels.
            ran = bool(summary) and (reached > 0 or status == 99)
            row = {"stage": "sanitizer", "tool": name, "part": part, "cases": reached}
            clean = re.search(r"SUMMARY: 0 (errors|hazards)", " ".join(summary)) is not None
            # All cases of the part, and with right results.
            clean = clean and status == 0 and reached == len(names[part : part + 12])
            row |= {"ok": clean if ran else None, "summary": " ".join(summary)[:200]}
            if not ran:
                row["why"] = "out of time" if status is None else text.strip()[-300:]
            run.append("check.jsonl", row)
            if not row["ok"]:
                run.say(f"{name}: {json.dumps(row)[:300]}")
            if not ran:
                return

    workers = [threading.Thread(target=tool, args=(name,)) for name in TOOLS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    run.say("sanitizer: done")


def tests(run: Run, end: float) -> None:
    if "tests" not in run.args.stages:
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu_pytest"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "--tb=short", "-m", "cuda"]
    command += ["--continue-on-collection-errors", "-n", 2 if run.dry else run.args.jobs]
    command += ["--max-worker-restart", "100", "--results", run.out / "tests.jsonl"]
    command += ["--seconds-per-test", TEST_SECONDS, *(TESTS / name for name in TEST_FILES)]
    extra = {} if run.dry else {"TOME_REQUIRE_CUDA": "1"}
    status = run.command(
        command, end - time.monotonic(), to=str(run.temporary / "pytest.txt"), **extra
    )
    text = (run.temporary / "pytest.txt").read_text(errors="replace")
    with run.lock, (run.out / "log.txt").open("a") as file:
        file.write(text[-6000:] + "\n")
    last = ([""] + text.strip().splitlines())[-1]
    run.say(f"tests: {'the time was over' if status is None else last}")
    results = run.out / "tests.jsonl"
    if status is None:
        run.append("tests.jsonl", {"test": "pytest", "outcome": "stopped", "why": "out of time"})
    elif not run.dry and not results.is_file():
        run.append("tests.jsonl", {"test": "pytest", "outcome": "stopped", "why": last})


def cpp(run: Run) -> None:
    if "cpp" not in run.args.stages:
        return
    if run.args.bench_binary is None:
        return run.say("cpp: no bench_cuda, left out")
    for row in CPP_ROWS:
        command = [run.args.bench_binary, *(["--dry-run"] if run.dry else []), row]
        status = run.command(command, min(20, run.left()), to="cpp.jsonl")
        if status != 0:
            run.append("cpp.jsonl", {"row": row, "error": f"exit status {status}"})
            run.say(f"cpp: {row}: exit status {status}")
    run.say("cpp: done")


def figures(run: Run, which: str) -> None:
    seconds = run.left()
    if seconds < 10:
        return run.say(f"{which}: no time left")
    command = [sys.executable, BENCH / "gpu_figures.py", "--out", run.out / "figures.jsonl"]
    command += ["--rows", which, "--seconds", f"{seconds:.0f}"]
    command += ["--row-seconds", 600 if "compiled" in which else 60]
    command += ["--dry-run"] if run.dry else []
    status = run.command(command, seconds + 2)
    run.say(f"{which}: {'the time was over' if status is None else 'done'}")


def guarded(run: Run, name: str, stage: Callable[..., None], *arguments: Any) -> None:
    """A stage's own mistakes don't stop the others either."""
    try:
        stage(run, *arguments)
    except Exception as error:
        run.say(f"{name}: {type(error).__name__}: {error}")


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
        if not install(run):
            run.say("the wheel could not be installed, see the log")
        timed = [s for s in ("cpp", "figures", "compiled") if s in args.stages]
        share = CHECK_SHARE if timed else 1.0
        end = run.began + share * (run.end - run.began)
        together = [
            threading.Thread(target=guarded, args=(run, "check", check, end)),
            threading.Thread(target=guarded, args=(run, "tests", tests, end)),
        ]
        if "machine" in args.stages:
            together.append(threading.Thread(target=guarded, args=(run, "machine", machine)))
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
        guarded(run, "cpp", cpp)
        if "figures" in args.stages:
            # Shares of what a copy does need its figure from the same run.
            guarded(run, "figures", figures, f"ceilings,{args.rows}" if args.rows else "figures")
        if "compiled" in args.stages:
            guarded(run, "compiled", figures, "compiled")
        results = gpu_report.Results(args.out)
        (args.out / "report.md").write_text(gpu_report.page(results))
        print(gpu_report.page(results)[:8000])
        return 1 if gpu_report.faults(results) else 0
    finally:
        shutil.rmtree(run.temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
