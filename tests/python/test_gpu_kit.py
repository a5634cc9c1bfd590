"""bench/gpu.sh and its parts, as far as no GPU is needed: what a page says of known results, and
that nothing is lost when a test, a case or a row takes its process along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from bench_scripts import BENCH, load

gpu_report = load("gpu_report")
gpu_run = load("gpu_run")
gpu_checks = load("gpu_checks")
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
    ended = {"stage": "missing", "of": "check", "cases": 4, "why": "out of time", "fault": False}
    broke = {"stage": "missing", "of": "tests", "cases": 0, "why": "pytest broke", "fault": True}
    kernels = {"stage": "kernels", "kernels": {"device": "Some GPU", "attention": "mma"}}
    write(tmp_path, "check.jsonl", [kernels, good, bad, lost, again, *tools, ended, broke])
    write(
        tmp_path,
        "tests.jsonl",
        [
            {"collected": 570},
            {"test": "a.py::away", "outcome": "skipped", "when": "call", "why": "no second GPU"},
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
    assert "- tests: pytest broke" in wrong
    run, left_out = wrong.split("Not run:")
    assert "synccheck: not here" in left_out
    assert "model:vit_l: not run for want of time" in left_out
    assert "- check: 4 cases, out of time" in left_out
    assert "fine" not in run
    assert "broke" not in left_out
    assert "out of time" not in run


def test_what_our_own_operators_refuse_is_wrong(folder: Path) -> None:
    refused = {"tome as a graph": "RuntimeError: no", "flash as a graph": "no", "cudnn": "none"}
    us, how = {"tome": 50.0, "flash": 100.0}, {"tome": "eager", "flash": "eager"}
    row = {"row": "attention:b256_n150", "us": us, "how": how, "refused": refused}
    part = {"us": {"ceiling": 1.0}, "how": {}, "refused": {"tome": "CUDA error: gone"}}
    write(folder, "figures.jsonl", [row, {"row": "model:vit_l384", "eager": part}])
    results = gpu_report.Results(folder)
    faults = "\n".join(gpu_report.faults(results))
    assert "- attention:b256_n150: tome as a graph: RuntimeError: no" in faults
    assert "- model:vit_l384 eager: tome: CUDA error: gone" in faults
    assert "flash" not in faults
    assert "cudnn" not in faults
    goals = {goal.name: goal for goal in gpu_report.goals(results)}
    name = "attention with sizes, B=256 H=12 N=150: over the fastest without"
    assert goals[name].line().endswith("| 0.500 (eager) | yes |")


def test_our_contenders_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    figures = load("gpu_figures")
    shape = {"batch": 1, "tokens": 9, "channels": 8, "heads": 2, "r": 2, "device": "cpu"}
    ours, stocks, _ = figures.layer_contenders(shape)
    assert ours.keys() <= set(gpu_report.OURS)
    assert not stocks.keys() & set(gpu_report.OURS)


def test_tests_that_were_not_reached_are_wrong(folder: Path) -> None:
    why = "- pytest: 567 tests not reached"
    assert why not in gpu_report.faults(gpu_report.Results(folder))  # the stage says why itself
    write(folder, "check.jsonl", [])
    assert why in gpu_report.faults(gpu_report.Results(folder))


@pytest.mark.parametrize(
    ("capability", "attention", "wrong"),
    [("9.0", "mma", True), ("9.0", "hopper", False), ("8.0", "mma", False), (None, "mma", False)],
)
def test_hopper_needs_its_own_kernels(
    tmp_path: Path, capability: str | None, attention: str, wrong: bool
) -> None:
    (tmp_path / "machine.json").write_text(json.dumps({"compute_cap": capability}))
    write(tmp_path, "check.jsonl", [{"stage": "kernels", "kernels": {"attention": attention}}])
    faults = "\n".join(gpu_report.faults(gpu_report.Results(tmp_path)))
    assert ("built without sm_90a" in faults) == wrong


def test_a_machine_that_was_cut_off(folder: Path) -> None:
    write(folder, "check.jsonl", [])
    (folder / "machine.json").write_text('{"device": "Some')
    assert "no GPU, driver unknown" in gpu_report.page(gpu_report.Results(folder))
    (folder / "machine.json").write_text('{"error": "torch: no such module"}')
    assert "- machine: torch: no such module" in gpu_report.faults(gpu_report.Results(folder))


def test_what_is_right(folder: Path) -> None:
    page = gpu_report.page(gpu_report.Results(folder))
    right = page[page.index("## What is right") : page.index("## Goals")]
    assert "gpu_check: 1 of 7 cases (match 1)" in right  # three of them reached
    assert "1 of them decided near ties otherwise" in right
    assert "gpu_check, 1000 repeats: not run" in right
    assert "pytest: 1 of 570 passed, 1 failed, 1 skipped, 567 not reached" in right
    assert "  - 1 skipped: no second GPU" in right
    assert "gpu_check runs: attention mma." in page
    assert "memcheck: 12 cases clean" in right
    assert "Some GPU, driver 1.2, torch 9.9" in page
    assert "layer:vit_b match: bench_cuda takes 1.29 of the time above" in page
    assert "layer:vit_b merge: bench_cuda" not in page


def test_no_cases_at_all_are_wrong(folder: Path) -> None:
    run = a_run(folder, "check")
    gpu_checks.Checks(run, run.end).all([], [], {"stage": "repeats"})
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
    # Known by their hashes where these are known.
    (folder / "machine.json").write_text(json.dumps({**machine, "wheel": "123"}))
    (other / "machine.json").write_text(json.dumps({**machine, "check_binary": "456"}))
    assert "wheel 123, gpu_check 456" in gpu_report.page(gpu_report.Results(folder, other))
    (other / "machine.json").write_text(json.dumps({**machine, "wheel": "124"}))
    with pytest.raises(SystemExit, match="got wheel 123 and 124"):
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
    assert content["tests"] == {"passed": 1, "failed": 1, "skipped": 1}
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


def a_run(out: Path, stages: str, **options: Any) -> Any:
    """What the stages share, of a command with these options."""
    argv = ["gpu.sh", "--out", str(out), "--jobs", "2", "--stages", stages]
    for name, value in options.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    with pytest.MonkeyPatch.context() as change:
        change.setattr(sys, "argv", argv)
        change.setattr(tempfile, "tempdir", str(out))
        return gpu_checks.Run(gpu_run.arguments())


def program(path: Path, source: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{source}")
    path.chmod(0o755)
    return path


def faults_of(out: Path) -> str:
    return "\n".join(gpu_report.faults(gpu_report.Results(out)))


HARD_TESTS = """
import os, time, pytest

pytestmark = pytest.mark.cuda

@pytest.mark.parametrize("i", range(8))
def test_fine(i): pass

def test_wrong(): assert 1 == 2

def test_lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_dies(): os._exit(3)

def waits_for_ever(): time.sleep(100)

def test_hangs(): waits_for_ever()

def test_away(): pytest.skip("no second GPU")

@pytest.mark.xfail(reason="not yet")
def test_expected(): assert 1 == 2

@pytest.mark.parametrize("i", range(8))
def test_fine_too(i): pass
"""


def test_no_test_is_lost_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_hard.py").write_text(HARD_TESTS)
    monkeypatch.setattr(gpu_run, "TESTS", tmp_path)
    monkeypatch.setattr(gpu_run, "TEST_FILES", ("test_hard.py",))
    monkeypatch.setattr(gpu_run, "TEST_SECONDS", 3)
    run = a_run(tmp_path, "tests")
    gpu_run.tests(run, time.monotonic() + 60)
    log = (tmp_path / "log.txt").read_text()
    results = gpu_report.Results(tmp_path)
    assert gpu_report.missing(results) == [], log
    outcomes: dict[str, set[str]] = {}
    for line in results.tests:
        outcomes.setdefault(line["test"].split("::")[1], set()).add(line["outcome"])
    failed = {test for test, found in outcomes.items() if "failed" in found}
    assert failed == {"test_wrong", "test_lost", "test_dies", "test_hangs"}
    lost = [line for line in results.tests if "test_lost" in line["test"]]
    assert "illegal memory access" in lost[0]["why"]
    assert "waits_for_ever" in log  # where it hung
    page = gpu_report.page(results)
    assert results.collected == 22
    assert "- pytest: 16 of 22 passed, 4 failed, 2 skipped" in page
    assert "  - 1 skipped: no second GPU" in page
    assert "  - 1 skipped: xfail not yet" in page


def test_a_pytest_that_cannot_run_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "TESTS", tmp_path)
    run = a_run(tmp_path, "tests")
    gpu_run.tests(run, time.monotonic() + 60)
    assert "- tests: pytest ended with 5: no tests ran" in faults_of(tmp_path)


def with_path(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


GPU_CHECK = """
import json, os, sys, time
names = [*("x:f32:" + c for c in "abcdefg"), "y:f32:h", "z:f32:i"]
if "--list" in sys.argv:
    print("\\n".join(names)); sys.exit()
print('{"kernels": {"device": "x", "attention": "hopper"}}')
print("[1] a library says hello", flush=True)
for name in [b for a, b in zip(sys.argv, sys.argv[1:]) if a == "--case"]:
    letter = name[-1]
    if letter == "b": os._exit(3)
    if letter == "d": time.sleep(100)
    if letter == "h": os._exit(70)
    row = {"case": name, "op": "x", "ok": letter != "e" or "TOME_OVERLAP" in os.environ}
    if letter == "f": row |= {"ok": False, "cuda_error": "gone"}
    print(json.dumps(row), flush=True)
    if letter == "f": os._exit(70)
    if letter == "i": os.close(1); time.sleep(100)
"""


def test_no_case_is_lost_with_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "CASE_SECONDS", 2)
    given = program(tmp_path / "gpu_check", GPU_CHECK)
    run = a_run(tmp_path, "check,again", check_binary=given)
    gpu_checks.check(run, time.monotonic() + 60)
    rows = gpu_report.lines_of(tmp_path / "check.jsonl")
    first = {row["case"][-1]: row for row in rows if row["stage"] == "check"}
    assert {letter: row["ok"] for letter, row in first.items()} == {
        **dict.fromkeys("acgi", True),
        **dict.fromkeys("bdefh", False),
    }
    assert "ended with 3" in first["b"]["why"]
    assert "printed [1] a library says hello" in first["b"]["why"]
    assert "nothing for 2 s" in first["d"]["why"]
    assert first["f"]["cuda_error"] == "gone"
    assert "ended with 70" in first["h"]["why"]  # the context was lost before any case
    again = [row for row in rows if row["stage"] == "again" and row.get("TOME_OVERLAP") == "0"]
    assert {row["case"][-1]: row["ok"] for row in again} == {
        "e": True,
        **dict.fromkeys("bdfh", False),
    }
    kernels = [row["kernels"] for row in rows if row["stage"] == "kernels"]
    assert kernels == [{"device": "x", "attention": "hopper"}]
    late = "after the last case: the process closed its output and did not end"
    assert f"- check: {late}" in faults_of(tmp_path)


def test_cases_that_the_time_ran_out_for(tmp_path: Path) -> None:
    given = program(tmp_path / "gpu_check", "import time; time.sleep(100)")
    checks = gpu_checks.Checks(a_run(tmp_path, "check", check_binary=given), time.monotonic() + 0.5)
    assert checks.all(["x:f32:a", "x:f32:b"], [], {}) == []
    results = gpu_report.Results(tmp_path)
    assert gpu_report.not_run(results) == ["- check: 2 cases, out of time"]
    assert gpu_report.faults(results) == []


SANITIZER = """
import sys, time
tool, cases = sys.argv[2], sys.argv.count("--case")
if tool == "cannot": print("========= Error: Device not supported"); sys.exit(1)
print("========= COMPUTE-SANITIZER")
print('{"case": "x", "ok": true}\\n' * cases, flush=True)
if tool == "memory":
    print("========= Invalid __global__ read of size 4 bytes")
    print("=========     at kernel+0x10"); print("========= ERROR SUMMARY: 1 error"); sys.exit(99)
if tool == "hangs":
    print("========= Error: Race reported between Write access at a", flush=True); time.sleep(100)
if tool == "dies": print("========= Barrier error detected. Missing wait."); sys.exit(11)
if tool == "slow": time.sleep(100)
print("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
sys.exit(tool == "wrong")
"""


def test_what_the_sanitizer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path / "compute-sanitizer", SANITIZER)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tools = ("clean", "wrong", "memory", "hangs", "dies", "slow", "cannot")
    monkeypatch.setattr(gpu_checks, "TOOLS", tools)
    run = a_run(tmp_path, "sanitizer", check_binary=tmp_path / "compute-sanitizer")
    gpu_checks.sanitizer(run, ["a", "b", "c"], time.monotonic() + 5)
    rows = {row["tool"]: row for row in gpu_report.lines_of(tmp_path / "check.jsonl")}
    told = {tool: row["ok"] for tool, row in rows.items()}
    assert told == {
        "clean": True,
        **dict.fromkeys(("wrong", "memory", "hangs", "dies"), False),
        **dict.fromkeys(("slow", "cannot"), None),
    }
    assert rows["clean"]["cases"] == 3
    assert "exit status 1" in rows["wrong"]["summary"]
    assert rows["memory"]["summary"].startswith("Invalid __global__ read of size 4 bytes")
    assert rows["hangs"]["summary"].startswith("Error: Race reported between Write")
    assert rows["dies"]["summary"].startswith("Barrier error detected. Missing wait.")
    assert rows["slow"]["why"] == "out of time"
    assert "Device not supported" in rows["cannot"]["why"]
    assert "Invalid __global__" in (tmp_path / "sanitizer.txt").read_text()
    assert "hangs: Error: Race reported" in faults_of(tmp_path)


BENCH_CUDA = """
import sys, time
row = sys.argv[-1]
if row == "hangs": time.sleep(100)
if row == "dies": sys.exit(3)
if row == "works": print('{"row": "works", "us": {"merge": 1.0}}')
"""


def test_rows_of_bench_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = program(tmp_path / "bench_cuda", BENCH_CUDA)
    run = a_run(tmp_path, "cpp", bench_binary=given)
    monkeypatch.setattr(gpu_run, "CPP_ROWS", ("works", "silent", "dies", "hangs"))
    monkeypatch.setattr(gpu_run, "CPP_SECONDS", 5)
    gpu_run.cpp(run)
    monkeypatch.setattr(gpu_run, "CPP_ROWS", ("late",))
    run.began -= 60 * run.args.minutes
    gpu_run.cpp(run)
    rows = gpu_report.Results(tmp_path).cpp
    assert {name: row.get("error") for name, row in rows.items()} == {
        "works": None,
        "silent": "no figures",
        "dies": "exit status 3",
        "hangs": "stopped after 5 s",
        "late": gpu_report.NO_TIME,
    }


def test_a_stage_of_its_own_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path, "check")
    monkeypatch.setattr(gpu_checks, "JOIN_SECONDS", 0.2)
    reached: list[int] = []
    wrong, right = ("wrong", lambda: reached[0]), ("right", lambda: time.sleep(0.1))
    assert run.at_once([wrong, right, ("last", lambda: reached.append(1))], time.monotonic() + 5)
    assert reached == [1]
    assert faults_of(tmp_path) == "- wrong: IndexError: list index out of range"
    assert not run.at_once([("stuck", lambda: time.sleep(2))], time.monotonic())


def test_a_process_that_survives_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path, "cpp")
    monkeypatch.setattr(gpu_checks, "KILL_SECONDS", 0.1)
    with monkeypatch.context() as change:
        change.setattr(gpu_checks.os, "killpg", lambda *_: None)
        assert run.command([sys.executable, "-c", "import time; time.sleep(100)"], 0.1) is None
    (process,) = run.killed
    gpu_run.run_stages(run)
    run.kill(process)
    assert f"processes [{process.pid}] had not ended" in faults_of(tmp_path)
    assert "lives on after SIGKILL" in (tmp_path / "log.txt").read_text()


RESULT_FILES = {
    *("machine.json", "check.jsonl", "cpp.jsonl", "tests.jsonl", "figures.jsonl"),
    *("sanitizer.txt", "log.txt", "report.md"),
}
FINE = """
import sys
print("x:f32:a" if "--list" in sys.argv else '{"case": "x:f32:a", "op": "x", "ok": true}')
"""


@pytest.mark.parametrize(
    ("source", "status", "said"),
    [
        (FINE, 0, "Nothing that ran."),
        (FINE.replace("true", "false"), 1, "- `x:f32:a`: wrong"),
        ("sys.exit(1)", 1, "gpu_check: exit status 1"),
        (None, 1, "Exec format error"),
    ],
)
def test_the_exit_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
    status: int,
    said: str,
) -> None:
    given = program(tmp_path / "gpu_check", source or "")
    if source is None:
        given.write_bytes(b"no program")
    argv = ["gpu.sh", "--out", str(tmp_path / "out"), "--wheel", str(given)]
    argv += ["--stages", "check", "--check-binary", str(given)]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(gpu_run, "install", lambda run: True)
    assert gpu_run.main() == status
    assert said in (tmp_path / "out" / "report.md").read_text()
    assert {path.name for path in (tmp_path / "out").iterdir()} <= RESULT_FILES


def test_a_wheel_that_cannot_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "no.whl"
    wheel.write_text("no wheel")
    argv = ["gpu.sh", "--out", str(tmp_path / "out"), "--wheel", str(wheel)]
    monkeypatch.setattr(sys, "argv", [*argv, "--stages", "tests,figures"])
    assert gpu_run.main() == 1
    assert "- wheel: it could not be installed" in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "tests.jsonl").exists()  # of another tome_ext


def test_figures_that_cannot_run_are_wrong(tmp_path: Path) -> None:
    gpu_run.figures(a_run(tmp_path, "figures"), "figures", "nonsense")
    assert "- figures: gpu_figures.py ended with 1, see log.txt" in faults_of(tmp_path)


def test_which_build_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "MACHINE", 'print(\'{"torch": "9.9"}\')')
    monkeypatch.setattr(gpu_run, "ROOT", tmp_path)
    given = tmp_path / "gpu_check"
    given.write_text("x")
    run = a_run(tmp_path, "machine", check_binary=given)
    gpu_run.machine(run, run.end)
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["check_binary"] == "2d711642b726"  # sha256sum
    assert (machine["wheel"], machine["commit"], machine["torch"]) == (None, None, "9.9")
    for words in (
        "init -q",
        "add gpu_check",
        "-c user.name=x -c user.email=x commit -q -m x",
    ):
        subprocess.run(["git", "-C", tmp_path, *words.split()], check=True)
    clean = gpu_run.commit()
    assert len(clean) == 40
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "new.cpp").write_text("x")
    assert gpu_run.commit() == f"{clean}+changes"


def test_programs_are_built_for_this_gpu() -> None:
    assert gpu_run.program_arch("9.0", "8.0;9.0") == "90a"
    assert gpu_run.program_arch("8.6", "8.0;9.0") == "86"
    assert gpu_run.program_arch(None, "8.0;9.0a") == "90a"
    assert gpu_run.program_arch(None, "10.0 8.0+PTX") == "100"


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


def test_a_row_that_the_clock_ended_is_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = load("gpu_figures")

    def trouble(left: float, row_seconds: float) -> str | None:
        with subprocess.Popen(["sleep", "100"]) as row:
            said: str | None = figures.trouble_of(row.pid, left, row_seconds)
            row.terminate()
        return said

    assert trouble(0.1, 60.0) == gpu_report.NO_TIME
    assert trouble(60.0, 0.1) == "stopped after 0 s"
    monkeypatch.setattr(figures, "KILL_SECONDS", 0.1)
    monkeypatch.setattr(figures.signal, "SIGKILL", 0)
    said = trouble(0.1, 60.0)
    assert said is not None
    assert "lives on" in said
