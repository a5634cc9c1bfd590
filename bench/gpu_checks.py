"""What the stages of bench/gpu.sh share, and those that run gpu_check. See gpu_run.py.

Whatever waits for a process or a thread does so for a given time: one that hangs in the driver
survives even SIGKILL, and must not keep figures and report waiting.
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
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
FOUND = os.environ.get("PYTHONPATH")  # where a rival may be
REPORT_SECONDS = 3
KILL_SECONDS = 5  # for a process to be gone after SIGKILL
JOIN_SECONDS = KILL_SECONDS + 2  # for a thread that has ended its processes
CASE_SECONDS = 20  # for one case of gpu_check to print its line; twice that for many repeats
MOST_SAID = 40  # wrong cases in the log; the files have all
OUT_OF_TIME = "out of time"
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZER_PART = 12  # cases at a time
# What begins an error of one of the tools; its own troubles, such as a device that it does not
# know, are none.
FINDING = re.compile(
    r"^=+ .*(Invalid __|Misaligned|hazard detected|Race reported|Barrier error|Uninitialized __"
    r"|Stack overflow|Malloc/Free error|Illegal |Hardware exception|UVM .*fault)",
    re.IGNORECASE | re.MULTILINE,
)


class Run:
    """What the stages share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dry: bool = args.dry_run
        self.out: Path = args.out
        self.lock = threading.Lock()
        self.began = time.monotonic()
        self.killed: list[subprocess.Popen[Any]] = []
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

    def append_text(self, name: str, text: str) -> None:
        """The output of a program; of a long one its beginning, where errors are, and its end."""
        if len(text) > 200_000:
            text = f"{text[:150_000]}\n... left out ...\n{text[-50_000:]}"
        with self.lock, (self.out / name).open("a") as file:
            file.write(text + "\n")

    def missing(self, of: str, why: str, cases: int = 0, fault: bool = False) -> None:
        """So that a stage that did not run, or a part of its cases, is not taken for all of it."""
        row = {"stage": "missing", "of": of, "cases": cases, "why": why, "fault": fault}
        self.append("check.jsonl", row)
        self.say(f"{of}: {f'{cases} cases, ' if cases else ''}{why}")

    def command(
        self,
        command: Sequence[object],
        seconds: float,
        to: str = "log.txt",
        errors: str | None = None,
        **extra: str,
    ) -> int | None:
        """Runs a command, its output appended to a file, errors to another if one is named; None
        if its time ran out."""
        if seconds <= 0:
            return None
        with (self.out / to).open("a") as file, (self.out / (errors or to)).open("a") as said:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdout=file,
                stderr=said,
                stdin=subprocess.DEVNULL,
                cwd=self.temporary,  # not the source folder, whose package has no library
                env={**self.environment, **extra},
                start_new_session=True,
            )
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.kill(process)
                return None

    def answer(self, command: Sequence[object], seconds: float) -> str:
        """What a command prints, which must end well."""
        with tempfile.NamedTemporaryFile(dir=self.temporary) as file:
            status = self.command(command, seconds, to=file.name, errors="log.txt")
            if status != 0:
                ended = f"no end in {seconds:.0f} s" if status is None else f"exit status {status}"
                raise RuntimeError(f"{Path(str(command[0])).name}: {ended}, see log.txt")
            return Path(file.name).read_text(errors="replace")

    def kill(self, process: subprocess.Popen[Any]) -> None:
        """With what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.killed.append(process)
            self.say(f"process {process.pid} lives on after SIGKILL")

    def guarded(self, name: str, stage: Callable[[], None]) -> None:
        """A stage's own mistakes don't stop the others, and are no success."""
        try:
            stage()
        except Exception as error:
            self.missing(name, f"{type(error).__name__}: {error}", fault=True)

    def at_once(self, stages: Sequence[tuple[str, Callable[[], None]]], end: float) -> bool:
        """Runs them beside each other; whether all have ended, which they should by ``end``."""
        threads = [
            threading.Thread(target=self.guarded, args=stage, daemon=True) for stage in stages
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, end + JOIN_SECONDS - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)


def case_or_kernels(line: str) -> dict[str, Any] | None:
    """A line of gpu_check; None if it is something else, such as what a library prints."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    known = {"case", "ok"} <= value.keys() or isinstance(value.get("kernels"), dict)
    return value if known else None


class Checks:
    """Runs cases of gpu_check in a few processes at once; the culprit of a crash costs its own
    result only, the cases behind it go to a new process."""

    def __init__(self, run: Run, end: float) -> None:
        self.run = run
        self.end = end
        self.wrong = 0
        self.kernels: dict[str, Any] = {}  # as the first process named them

    def names(self, which: str) -> list[str]:
        command = [self.run.args.check_binary, "--list", "--set", which]
        return self.run.answer(command, 60).split()

    def all(self, names: list[str], options: list[str], note: dict[str, Any]) -> list[dict]:
        """Every case's line; also appended to check.jsonl as it comes."""
        stage = note.get("stage", "check")
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
                    group = self._group(group, options, {"stage": stage, **note}, rows)

        self.run.at_once([(stage, work)] * self.run.args.jobs, self.end)
        found = list(rows)
        if not names:
            self.run.missing(stage, "gpu_check lists no cases", fault=True)
        elif len(found) < len(names):
            late = time.monotonic() >= self.end
            why = OUT_OF_TIME if late else "not reached"
            self.run.missing(stage, why, len(names) - len(found), fault=not late)
        return found

    def _group(
        self, names: list[str], options: list[str], note: dict[str, Any], rows: list[dict]
    ) -> list[str]:
        """Runs a group; returns the names that are left when its process has died."""
        command = [str(self.run.args.check_binary), *options]
        for name in names:
            command += ["--case", name]
        variables = {k: v for k, v in note.items() if k.isupper()}
        with tempfile.TemporaryFile("w+", errors="replace") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                errors="replace",
                env={**self.run.environment, **variables},
                start_new_session=True,
            )
            lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

            def read() -> None:
                for line in process.stdout or ():
                    lines.put(line)
                lines.put(None)

            threading.Thread(target=read, daemon=True).start()
            reached: list[str] = []
            why, strange, told = "", "", False
            patience = CASE_SECONDS * (2 if options else 1)
            patience *= 20 if self.run.dry else 1  # the emulator takes its time
            while True:
                try:
                    line = lines.get(timeout=self._wait(patience))
                except queue.Empty:
                    if time.monotonic() >= self.end:
                        self.run.kill(process)
                        return []
                    why = f"nothing for {patience} s"
                    break
                if line is None:
                    break
                row = case_or_kernels(line)
                if row is None:
                    strange = strange or line.strip()[:200]
                elif "case" not in row:
                    self._keep(row["kernels"])
                else:
                    row = {**row, **note}
                    reached.append(row["case"])
                    rows.append(row)
                    told |= "cuda_error" in row
                    self._report(row)
            status = None
            if not why:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(self._wait(patience))
            if status is None:
                self.run.kill(process)
                if time.monotonic() >= self.end:
                    return []
            errors.seek(0)
            said = errors.read()[-300:]
        ended = f"the process ended with {status}: {said}"
        if status is None:
            ended = why or "the process closed its output and did not end"
        if strange:
            ended += f"; printed {strange}"
        missing = [name for name in names if name not in reached]
        # The case that lost the context says so itself; else the next one is taken for the culprit.
        if missing and (not told or len(missing) == len(names)):
            row = {"case": missing.pop(0), "ok": False, **note, "why": ended}
            rows.append(row)
            self._report(row)
        elif not told and status not in (0, 1):
            self.run.missing(note["stage"], f"after the last case: {ended}", fault=True)
        return missing

    def _wait(self, seconds: float) -> float:
        return max(0.01, min(seconds, self.end - time.monotonic()))

    def _keep(self, kernels: dict[str, Any]) -> None:
        with self.run.lock:
            first = not self.kernels
            self.kernels = self.kernels or kernels
        if first:
            self.run.append("check.jsonl", {"stage": "kernels", "kernels": kernels})

    def _report(self, row: dict) -> None:
        self.run.append("check.jsonl", row)
        self.wrong += not row["ok"]
        if not row["ok"] and self.wrong <= MOST_SAID:
            self.run.say(f"WRONG {json.dumps(row)[:300]}")


def check(run: Run, end: float) -> None:
    """All cases, the wrong ones in other ways, many repeats of some, and compute-sanitizer."""
    stages = run.args.stages
    if not {"check", "repeats", "sanitizer"} & set(stages):
        return
    if run.args.check_binary is None:
        return run.missing("check", "no gpu_check")
    checks = Checks(run, end)
    wrong: list[str] = []
    small = "emulator" if run.dry else "all"
    if "check" in stages:
        rows = checks.all(checks.names(small), [], {})
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
        run.say(f"{many} repeats: {sum(not r['ok'] for r in rows)} of {len(rows)} wrong")
    if "sanitizer" in stages:
        sanitizer(run, checks.names("sanitizer"), end)


def sanitizer(run: Run, names: list[str], end: float) -> None:
    """The tools beside each other, each on some cases at a time."""
    program = shutil.which("compute-sanitizer")
    if program is None or run.dry:
        why = "a dry run" if run.dry else "compute-sanitizer is not on PATH"
        return run.missing("sanitizer", why)
    parts = [names[i : i + SANITIZER_PART] for i in range(0, len(names), SANITIZER_PART)]

    def tool(name: str) -> None:
        for number, part in enumerate(parts):
            if time.monotonic() > end - 2:
                return run.missing(name, OUT_OF_TIME, sum(map(len, parts[number:])))
            to = run.temporary / f"{name}-{number}.txt"
            command: list[object] = [program, "--tool", name, "--print-limit", "10"]
            command += ["--report-api-errors", "no"] if name == "memcheck" else []
            command += ["--error-exitcode", "99", run.args.check_binary, "--repeats", "2"]
            for case in part:
                command += ["--case", case]
            status = run.command(command, end - time.monotonic(), to=str(to))
            text = to.read_text(errors="replace") if to.exists() else ""
            run.append_text("sanitizer.txt", f"--- {name}, part {number}: {status}\n{text}")
            row = {"stage": "sanitizer", "tool": name, "part": number}
            row |= verdict(text, status, len(part))
            run.append("check.jsonl", row)
            if not row["ok"]:
                run.say(f"{name}: {json.dumps(row)[:300]}")
            if row["ok"] is None:
                return

    run.at_once([(name, partial(tool, name)) for name in TOOLS], end)
    run.say("sanitizer: done")


def verdict(text: str, status: int | None, cases: int) -> dict[str, Any]:
    """What a tool's output says of so many cases; "ok" is None where it says nothing."""
    reached = text.count('{"case"')
    finding = FINDING.search(text)
    line = re.search(r"^=.*SUMMARY.*$", text, re.MULTILINE)
    summary = line[0].strip("= ")[:200] if line else ""
    row: dict[str, Any] = {"cases": reached, "ok": False, "summary": summary}
    if finding:  # also where the tool then hung or died
        first = text[finding.start() :].splitlines()[0].strip("= ")
        row["summary"] = f"{first[:200]}; {OUT_OF_TIME if status is None else summary}"
    elif not summary or not (reached or status == 99):
        # It could not run here at all, which says nothing of the kernels.
        row |= {"ok": None, "why": OUT_OF_TIME if status is None else text.strip()[-300:]}
    elif re.search(r"SUMMARY: 0 (errors|hazards)", summary) and status == 0 and reached == cases:
        row["ok"] = True
    else:
        row["summary"] += f", exit status {status}, {reached} of {cases} cases"
    return row
