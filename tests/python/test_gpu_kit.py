"""bench/gpu.sh and its parts, as far as no GPU is needed: what a page says of known results, and
that nothing is lost when a test, a case or a row takes its process along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import BENCH, load

gpu_report = load("gpu_report")
tables = load("tables")


# --- the page ------------------------------------------------------------------------------------


def write(folder: Path, name: str, lines: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run in which a case is wrong, a goal is missed and figures are missing."""
    machine = {"device": "Some GPU", "driver_version": "1.2", "torch": "9.9", "dry_run": False}
    machine["tome_ext"] = "0.9"
    (tmp_path / "machine.json").write_text(json.dumps({**machine, "date": "2030-01-02"}))
    case = "attention:bf16:B2H3N197D64"
    bad: dict[str, Any] = {"stage": "check", "case": case, "op": "attention", "ok": False}
    bad |= {"repeats": 3, "why": "values", "output": "out", "index": 7, "wrong": 2, "of": 9}
    bad |= {"first": [[7, 1.5, 2.5]]}
    good = {"stage": "check", "case": "match:f32:B1", "op": "match", "ok": True, "ties": 2}
    lost = {"stage": "check", "case": "merge:f16:B1", "ok": False, "cuda_error": "launch: gone"}
    again = {"case": case, "stage": "again", "ok": True, "TOME_OVERLAP": "0"}
    tools = [
        {"stage": "sanitizer", "tool": "memcheck", "cases": 12, "ok": True, "summary": "0 errors"},
        {"stage": "sanitizer", "tool": "racecheck", "cases": 3, "ok": False, "summary": "1 hazard"},
        {"stage": "sanitizer", "tool": "synccheck", "cases": 0, "ok": None, "why": "not here"},
    ]
    ended = {"stage": "missing", "of": "check", "cases": 4, "why": "out of time"}
    write(tmp_path, "check.jsonl", [good, bad, lost, again, *tools, ended])
    write(
        tmp_path,
        "tests.jsonl",
        [
            {"test": "a.py::fine", "outcome": "passed", "seconds": 1},
            {"test": "a.py::bad", "outcome": "failed", "when": "call", "why": "x\nE   boom\n"},
            {"test": "a.py::bad", "outcome": "failed", "when": "???", "why": "worker crashed"},
        ],
    )
    layer = {
        "row": "layer:vit_b",
        "us": {"merge": 60.0, "match": 70.0, "both": 120.0, "stock both": 300.0},
        "bytes": {"merge": 150e6, "match": 75e6, "merge_add_norm": 300e6},
    }
    write(
        tmp_path,
        "figures.jsonl",
        [
            {"row": "ceilings", "copy_tb_per_s": {"copy_ 1 GiB": 2.4, "neg 1 GiB": 2.5}},
            layer,
            {"row": "attention:b256_n197", "us": {"tome": 110.0, "flash": 200.0, "cudnn": 100.0}},
            {"row": "model:vit_b", "graph": {"us": {"ceiling": 10.0, "tome": 9.0}}},
            {"row": "model:vit_b", "eager": {"us": {"ceiling": 10.0, "tome": 20.0}}},
            {"row": "model:vit_l", "error": "not run for want of time"},
            {"row": "large:n4096", "error": "the process ended with -11"},
        ],
    )
    write(tmp_path, "cpp.jsonl", [{"row": "layer:vit_b", "us": {"merge": 61.0, "match": 90.0}}])
    with (tmp_path / "figures.jsonl").open("a") as file:
        file.write('{"row": "cut o')  # the run was ended while it wrote
    return tmp_path


def test_what_is_wrong_and_how_to_see_it_again(folder: Path) -> None:
    page = gpu_report.page(gpu_report.Results(folder))
    wrong = page[page.index("## What is wrong") : page.index("## What is right")]
    assert "- `attention:bf16:B2H3N197D64`: values" in wrong
    assert "index, got, wanted: [[7, 1.5, 2.5]]" in wrong
    assert "with TOME_OVERLAP=0: right" in wrong
    assert "`gpu_check --case attention:bf16:B2H3N197D64`" in wrong
    assert "- `merge:f16:B1`: launch: gone" in wrong
    assert "- `a.py::bad`: E   boom" in wrong  # not that its worker then ended
    assert "racecheck: 1 hazard" in wrong
    assert "- large:n4096: the process ended with -11" in wrong
    run, left_out = wrong.split("Not run:")
    assert "synccheck: not here" in left_out
    assert "model:vit_l: not run for want of time" in left_out
    assert "- check: 4 cases, out of time" in left_out
    assert "fine" not in run


def test_what_is_right(folder: Path) -> None:
    page = gpu_report.page(gpu_report.Results(folder))
    right = page[page.index("## What is right") : page.index("## Goals")]
    assert "gpu_check: 1 of 7 cases (match 1)" in right  # three of them reached
    assert "1 of them decided near ties otherwise" in right
    assert "gpu_check, 1000 repeats: not run" in right
    assert "pytest: 1 failed, 1 passed" in right
    assert "memcheck: 12 cases clean" in right
    assert "Some GPU, driver 1.2, torch 9.9" in page
    assert "layer:vit_b match: bench_cuda takes 1.29 of the time above" in page
    assert "layer:vit_b merge: bench_cuda" not in page


def test_no_cases_at_all_are_wrong(folder: Path) -> None:
    with (folder / "check.jsonl").open("a") as file:
        line = {"stage": "missing", "of": "repeats", "cases": 0, "why": "gpu_check lists no cases"}
        file.write(json.dumps(line) + "\n")
    assert "- repeats: gpu_check lists no cases" in gpu_report.faults(gpu_report.Results(folder))


def test_folders_of_different_builds_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    machine = json.loads((folder / "machine.json").read_text())
    (other / "machine.json").write_text(json.dumps(machine))
    gpu_report.Results(folder, other)
    (other / "machine.json").write_text(json.dumps({**machine, "commit": "abc"}))
    with pytest.raises(SystemExit, match="one machine and one build, got commit None and abc"):
        gpu_report.Results(folder, other)


def test_goals(folder: Path) -> None:
    goals = {goal.name: goal for goal in gpu_report.goals(gpu_report.Results(folder))}
    merge = goals["merge, B=256 N=197 C=768: share of the copy bandwidth"]
    assert (merge.value, merge.met) == (pytest.approx(1.0), True)
    match = goals["match, B=256 N=197 C=768: over reading the keys at copy speed"]
    assert (match.value, match.met) == (pytest.approx(70 / 30), False)
    both = goals["match and merge, B=256 N=197 C=768: stock operators' time over ours"]
    assert (both.value, both.met) == (2.5, True)
    attention = goals["attention with sizes, B=256 H=12 N=197: over the fastest without"]
    assert (attention.value, attention.met) == (pytest.approx(1.1), False)
    assert goals["ViT-B r=13 B=256, CUDA graph: share of the ceiling"].met is True
    assert goals["ViT-B r=13 B=256, eager: share of the ceiling"].met is False
    missing = goals["merge, B=64 N=577 C=1024: share of the copy bandwidth"]
    assert (missing.value, missing.met) == (None, None)
    assert missing.line().endswith("| not measured | |")
    assert "**no**" in match.line()


def test_a_second_run_fills_in_the_first(folder: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    row = {"row": "model:vit_l", "graph": {"us": {"ceiling": 1.0, "tome": 1.0}}}
    write(second, "figures.jsonl", [row, {"row": "large:n4096", "us": {"match": 5.0}}])
    results = gpu_report.Results(folder, second)
    assert results.us("model:vit_l", "graph", "tome") == 1.0
    assert results.us("layer:vit_b", "merge") == 60.0
    wrong = "\n".join(gpu_report.faults(results))
    assert "large:n4096" not in wrong
    assert "attention:bf16" in wrong
    assert "model:vit_l" not in "\n".join(gpu_report.not_run(results))


def test_an_empty_folder_is_no_success(tmp_path: Path) -> None:
    results = gpu_report.Results(tmp_path)
    page = gpu_report.page(results)
    assert "0 met, 0 missed" in page
    assert "- gpu_check: not run" in page
    assert "- pytest: not run" in page


def test_what_tables_are_made_from(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "gpu.json"
    command = [sys.executable, BENCH / "gpu_report.py", folder, "--json", target]
    subprocess.run(command, check=True, capture_output=True)
    content = json.loads(target.read_text())
    assert content["machine"]["device"] == "Some GPU"
    assert content["copy_tb_per_s"] == 2.5
    assert content["figures"]["model:vit_b"]["eager"]["us"]["tome"] == 20.0
    assert content["checks"] == {"check right": 1, "check wrong": 2, "again right": 1}
    assert content["tests"] == {"passed": 1, "failed": 1}
    machine = folder / "machine.json"
    machine.write_text(json.dumps({"dry_run": True}))
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_tables_of_what_is_there(folder: Path) -> None:
    result = gpu_report.combined(gpu_report.Results(folder))
    ops = tables.gpu_ops_table(result).splitlines()
    assert ops[0].startswith("Some GPU, driver 1.2, torch 9.9, tome_ext 0.9, bfloat16, 2030")
    assert "| merge | B=256 N=197 C=768 | 60 | 60 | 1.00 | - | - |" in ops
    assert "| match and merge | B=256 N=197 C=768 | 120 | - | - | 300 | 2.50x |" in ops
    assert "| merge | B=64 N=577 C=1024 | - | - | - | - | - |" in ops
    attention = tables.gpu_attention_table(result).splitlines()
    assert "| forward | B=256 H=12 N=197 | 110 | 200 | 100 | - | - | 1.10 |" in attention
    models = tables.gpu_models_table(result)
    model = "vit_base_patch16_224 | 13 | 256 | graph"
    assert f"| {model} | - | - | 25,600,000 | 28,444,444 | - | - | 1.111 |" in models
    goals = tables.goals_table(result, result).splitlines()
    assert goals[0] == "| | goal | Some | Some |"
    first, goal = "attention with sizes, B=256 H=12 N=197: over the fastest without", "at most 1.05"
    assert f"| {first} | {goal} | **1.10** | **1.10** |" in goals


# --- processes that die --------------------------------------------------------------------------

HARD_TESTS = """
import os, time, pytest

@pytest.mark.parametrize("i", range(8))
def test_fine(i): pass

def test_wrong(): assert 1 == 2

def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_dies(): os._exit(3)

def test_hangs(): time.sleep(100)

@pytest.mark.parametrize("i", range(8))
def test_fine_too(i): pass
"""


def test_no_test_is_lost_with_another(tmp_path: Path) -> None:
    (tmp_path / "test_hard.py").write_text(HARD_TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    results = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_pytest", "-p", "no:cacheprovider"]
    command += ["-n", "2", "--max-worker-restart", "20", "--results", str(results)]
    command += ["--seconds-per-test", "3", "test_hard.py"]
    began = time.monotonic()
    run = subprocess.run(
        command, cwd=tmp_path, env=with_path(BENCH), capture_output=True, text=True, timeout=90
    )
    assert time.monotonic() - began < 60
    assert run.returncode == 1, run.stdout + run.stderr
    outcomes: dict[str, set[str]] = {}
    for line in results.read_text().splitlines():
        row = json.loads(line)
        outcomes.setdefault(row["test"].split("::")[1], set()).add(row["outcome"])
    failed = {test for test, found in outcomes.items() if "failed" in found}
    assert failed == {"test_wrong", "test_lost", "test_dies", "test_hangs"}
    assert len(outcomes) == 20
    lost = [json.loads(line) for line in results.read_text().splitlines() if "test_lost" in line]
    assert "illegal memory access" in lost[0]["why"]


def with_path(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


GPU_CHECK = """#!{python}
import json, os, sys, time
names = ["x:f32:" + c for c in "abcdefg"]
if "--list" in sys.argv:
    print("\\n".join(names)); sys.exit()
for name in [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--case"]:
    letter = name[-1]
    if letter == "b": os._exit(3)
    if letter == "d": time.sleep(100)
    row = {{"case": name, "op": "x", "ok": letter != "e" or "TOME_OVERLAP" in os.environ}}
    if letter == "f": row |= {{"ok": False, "cuda_error": "gone"}}
    print(json.dumps(row), flush=True)
    if letter == "f": os._exit(70)
"""


def test_no_case_is_lost_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_run = load("gpu_run")
    program = tmp_path / "gpu_check"
    program.write_text(GPU_CHECK.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(gpu_run, "CASE_SECONDS", 2)
    argv = ["gpu.sh", "--check-binary", str(program), "--out", str(tmp_path), "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--stages", "check,again"])
    run = gpu_run.Run(gpu_run.arguments())
    gpu_run.check(run, time.monotonic() + 60)
    rows = gpu_report.lines_of(tmp_path / "check.jsonl")
    first = {row["case"][-1]: row for row in rows if row["stage"] == "check"}
    assert {letter: row["ok"] for letter, row in first.items()} == {
        **dict.fromkeys("acg", True),
        **dict.fromkeys("bdef", False),
    }
    assert "ended with 3" in first["b"]["why"]
    assert "nothing for 2 s" in first["d"]["why"]
    assert first["f"]["cuda_error"] == "gone"
    again = [row for row in rows if row["stage"] == "again" and row.get("TOME_OVERLAP") == "0"]
    assert {row["case"][-1]: row["ok"] for row in again} == {
        "e": True,
        **dict.fromkeys("bdf", False),
    }


ROWS = """
import os, time
import gpu_figures

def dies(watch, shape): os._exit(3)
def hangs(watch, shape): time.sleep(100)
def raises(watch, shape):
    watch.emit({"part": 1})
    raise RuntimeError("no such kernel\\nsecond line")
def works(watch, shape): watch.emit({"us": {"x": None}})

rows = {name: (globals()[name], {}) for name in ("dies", "hangs", "raises", "works")}
gpu_figures.chosen_rows = lambda names: rows
gpu_figures.main()
"""


def test_no_row_is_lost_with_another(tmp_path: Path) -> None:
    results = tmp_path / "figures.jsonl"
    command = [sys.executable, "-c", ROWS, "--dry-run", "--row-seconds", "3"]
    command += ["--out", str(results)]
    subprocess.run(command, env=with_path(BENCH), cwd=tmp_path, check=True, timeout=90)
    rows = gpu_report.merged(gpu_report.lines_of(results))
    assert rows["dies"]["error"] == "the process ended with 3"
    assert rows["hangs"]["error"] == "stopped after 3 s"
    assert rows["raises"]["error"] == "RuntimeError: no such kernel"
    assert rows["raises"]["part"] == 1
    assert rows["works"]["us"] == {"x": None}
    assert "error" not in rows["works"]
