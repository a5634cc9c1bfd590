"""What a run of bench/gpu.sh showed: what is right, what is wrong, and how the figures stand.

    python bench/gpu_report.py FOLDER...                    prints a page of Markdown
    python bench/gpu_report.py FOLDER... --json bench/results/gpu_h100.json
                                                            writes what bench/tables.py reads

Several folders are of one machine and one build; of a row that was measured twice the last counts.
Takes whatever files are there: a stage that did not run is "not run", a figure that is missing is
"not measured".
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLAIN = ("flash", "cudnn", "efficient", "default")  # stock attention without sizes
MASKED = ("efficient, mask", "cudnn, mask", "default, mask")
NO_TIME = "not run for want of time"  # as gpu_figures.py says it
OURS = (  # contenders of ours: that one of them can't run is a fault, unlike a rival's refusal
    *("match", "guided match", "merge", "both", "unmerge", "select"),
    *("merge_add_norm", "merge_add_norm, norms kept", "tome", "cls_attention", "guided"),
)
# What an earlier build may have made: options of gpu.sh, and what a page calls them.
GIVEN = {"wheel": "wheel", "check_binary": "gpu_check", "bench_binary": "bench_cuda"}
MOST_CASES = 40  # of the wrong ones, on the page
CPP_TOLERANCE = 0.1  # of bench_cuda's figures against those from Python


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of JSON lines; a last one that was cut off is left out."""
    found = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                found.append(value)
    return found


def machine_of(folder: Path) -> dict[str, Any]:
    """Empty where it was not written, or not to its end."""
    try:
        value = json.loads((folder / "machine.json").read_text(errors="replace"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def merged(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows by name; a row comes in several lines."""
    out: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "row" in row:
            known = out.setdefault(row["row"], {})
            if "error" not in row:
                known.pop("error", None)  # of an earlier try
            known.update(row)
    return out


class Results:
    """Everything in some folders."""

    def __init__(self, *folders: Path) -> None:
        def lines(name: str) -> list[dict[str, Any]]:
            return [line for folder in folders for line in lines_of(folder / name)]

        known = [machine for folder in folders if (machine := machine_of(folder))]
        self.machine: dict[str, Any] = {}
        for other in known:
            for key in ("device", "driver_version", "torch", "commit", *GIVEN):
                one, two = self.machine.get(key), other.get(key)
                # A program is known by its hash where it was given, which need not be in each.
                if self.machine and one != two and not (key in GIVEN and None in (one, two)):
                    raise SystemExit(
                        f"gpu_report.py: expected folders of one machine and one build, got {key} "
                        f"{one} and {two}"
                    )
            given = {key: other[key] for key in GIVEN if other.get(key)}
            self.machine = {**(self.machine or other), **given}
        self.checks = lines("check.jsonl")
        tests = lines("tests.jsonl")
        self.tests = [line for line in tests if "test" in line]
        self.collected = max((line.get("collected", 0) for line in tests), default=0)
        self.cpp = merged(lines("cpp.jsonl"))
        self.figures = merged(lines("figures.jsonl"))

    @property
    def kernels(self) -> dict[str, Any]:
        """Which forms of kernels gpu_check said that this device gets."""
        found = [row["kernels"] for row in self.checks if row.get("stage") == "kernels"]
        return found[0] if found else {}

    def _of(self, what: str, row: str, path: tuple[str, ...]) -> Any:
        value: Any = self.figures.get(row, {})
        for key in (*path[:-1], what, path[-1]):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def us(self, row: str, *path: str) -> float | None:
        """A figure: of a row, in a mode if it has modes, of a contender."""
        value: float | None = self._of("us", row, path)
        return value

    def eager(self, row: str, *path: str) -> bool:
        """Whether a figure that should be of a graph is not."""
        return self._of("how", row, path) == "eager" and path[0] != "eager"

    def fastest(self, row: str, names: tuple[str, ...], *mode: str) -> float | None:
        known = [x for x in (self.us(row, *mode, name) for name in names) if x is not None]
        return min(known, default=None)

    @property
    def bandwidth(self) -> float | None:
        """Bytes read and written in a microsecond by the fastest copy."""
        rates = self.figures.get("ceilings", {}).get("copy_tb_per_s", {})
        known = [x for x in rates.values() if x is not None]
        return 1e6 * max(known) if known else None

    def floor_us(self, row: str, name: str) -> float | None:
        """The time in which the bytes that an operator must move can be copied."""
        size = self.figures.get(row, {}).get("bytes", {}).get(name)
        return ratio(size, self.bandwidth)


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


# --- goals ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A ratio, what it should be, and what it is."""

    name: str
    least: bool  # whether `wanted` is the least it should be, or the most
    wanted: float
    value: float | None
    eager: bool  # ours ran from Python, for it could not be captured

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value >= self.wanted if self.least else self.value <= self.wanted

    def line(self) -> str:
        bound = f"{'at least' if self.least else 'at most'} {self.wanted:g}"
        if self.value is None:
            return f"| {self.name} | {bound} | not measured | |"
        value = f"{self.value:.3f}{' (eager)' if self.eager else ''}"
        return f"| {self.name} | {bound} | {value} | {'yes' if self.met else '**no**'} |"


LAYERS = {"vit_b": "B=256 N=197 C=768", "vit_l384": "B=64 N=577 C=1024"}
ATTENTION = {
    "b256_n197": "B=256 H=12 N=197",
    "b256_n150": "B=256 H=12 N=150",
    "b256_n80": "B=256 H=12 N=80",
    "b64_n577": "B=64 H=16 N=577",
}
BACKWARD = ("b256_n197", "b64_n577")
MODELS = {
    "vit_b": "ViT-B r=13 B=256",
    "vit_l": "ViT-L r=7 B=256",
    "vit_l384": "ViT-L@384 r=23 B=64",
}
MODES = {
    "eager": ("model", "eager"),
    "CUDA graph": ("model", "graph"),
    "compiled": ("compiled_model", "eager"),
    "compiled, CUDA graph": ("compiled_model", "graph"),
}


def goals(r: Results) -> list[Goal]:
    """In bfloat16, for a chip of the class of an H100."""
    out: list[Goal] = []

    # The last arguments say which figure is ours: a row, a mode if it has modes, a contender.
    def least(name: str, wanted: float, value: float | None, row: str, *path: str) -> None:
        out.append(Goal(name, True, wanted, value, r.eager(row, *path)))

    def most(name: str, wanted: float, value: float | None, row: str, *path: str) -> None:
        out.append(Goal(name, False, wanted, value, r.eager(row, *path)))

    for key, shape in LAYERS.items():
        row = f"layer:{key}"
        merge = ratio(r.floor_us(row, "merge"), r.us(row, "merge"))
        least(f"merge, {shape}: share of the copy bandwidth", 0.85, merge, row, "merge")
    for key, shape in LAYERS.items():
        row = f"layer:{key}"
        match = ratio(r.us(row, "match"), r.floor_us(row, "match"))
        most(f"match, {shape}: over reading the keys at copy speed", 2.0, match, row, "match")
    for key, shape in LAYERS.items():
        row = f"layer:{key}"
        folded = ratio(r.us(row, "merge_add_norm"), r.floor_us(row, "merge_add_norm"))
        name = f"merge_add_norm, {shape}: over its bytes at copy speed"
        most(name, 1.15, folded, row, "merge_add_norm")
    for key, shape in LAYERS.items():
        row = f"layer:{key}"
        both = ratio(r.us(row, "stock both"), r.us(row, "both"))
        # The other CUDA extension gains 7 to 10% over stock operators; ten times that is 2x.
        name = f"match and merge, {shape}: stock operators' time over ours"
        least(name, 2.0, both, row, "both")
    for key, shape in ATTENTION.items():
        row = f"attention:{key}"
        ours = r.us(row, "tome")
        plain = ratio(ours, r.fastest(row, PLAIN))
        name = f"attention with sizes, {shape}: over the fastest without"
        most(name, 1.05, plain, row, "tome")
        masked = ratio(r.fastest(row, MASKED), ours)
        name = f"attention with sizes, {shape}: the fastest with a mask over ours"
        least(name, 2.0, masked, row, "tome")
    for key in BACKWARD:
        row = f"backward:{key}"
        backward = ratio(r.us(row, "tome"), r.fastest(row, PLAIN))
        name = f"attention backward with sizes, {ATTENTION[key]}: over the fastest without"
        most(name, 1.1, backward, row, "tome")
    for key, name in MODELS.items():
        for mode, (kind, field) in MODES.items():
            row = f"{kind}:{key}"
            ours = r.us(row, field, "tome")
            share = ratio(r.us(row, field, "ceiling"), ours)
            called = f"{name}, {mode}: share of the ceiling"
            least(called, 0.97, share, row, field, "tome")
            speed_up = ratio(r.us(row, field, "unmerged, flash"), ours)
            called = f"{name}, {mode}: speed-up over the unmerged model on flash"
            least(called, 1.6, speed_up, row, field, "tome")
        row = f"model:{key}"
        for rival, whose in (
            ("published", "the published form"),
            ("published package", "the published package"),
        ):
            times = ratio(r.us(row, "eager", rival), r.us(row, "eager", "tome"))
            called = f"{name}, eager: {whose}'s time over ours"
            least(called, 2.0, times, row, "eager", "tome")
    row = "model:vit_b_single"
    unmerged = r.fastest(row, ("unmerged", "unmerged, flash"), "graph")
    least(
        "ViT-B r=13 B=1, CUDA graph: speed-up over the unmerged model",
        1.0,
        ratio(unmerged, r.us(row, "graph", "tome")),
        *(row, "graph", "tome"),
    )
    return out


# --- the page ------------------------------------------------------------------------------------


def about(r: Results) -> list[str]:
    m = r.machine
    device = m.get("device") or m.get("name") or "no GPU"
    parts = [device, f"driver {m.get('driver_version', 'unknown')}", f"torch {m.get('torch')}"]
    if m.get("commit"):
        sha, plus, changes = m["commit"].partition("+")
        parts.append(f"commit {sha[:12]}{plus}{changes}")
    parts += [f"{name} {m[key]}" for key, name in GIVEN.items() if m.get(key)]
    lines = [f"# {'Dry run' if m.get('dry_run') else 'GPU run'} of {m.get('date', 'unknown date')}"]
    lines += ["", ", ".join(parts) + ".", f"Library: {m.get('library', 'unknown')}."]
    if r.kernels:
        forms = ", ".join(f"{name} {form}" for name, form in r.kernels.items() if name != "device")
        lines.append(f"gpu_check runs: {forms}.")
    if r.bandwidth:
        tflops = r.figures["ceilings"].get("matmul_tflops")
        rates = r.figures["ceilings"]["copy_tb_per_s"]
        copies = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items() if rate)
        lines.append(
            f"Ceilings: {r.bandwidth / 1e6:.2f} TB/s read and written ({copies}), matmul {tflops} "
            "TFLOP/s."
        )
    return lines


def right(r: Results) -> list[str]:
    """What ran and how much of it is right."""
    lines = ["", "## What is right", ""]
    for stage, name in (
        ("check", "gpu_check"),
        ("repeats", "gpu_check, 1000 repeats"),
    ):
        rows = [row for row in r.checks if row.get("stage") == stage]
        if not rows:
            lines.append(f"- {name}: not run")
            continue
        good = Counter(row.get("op", "?") for row in rows if row["ok"])
        each = ", ".join(f"{op} {count}" for op, count in sorted(good.items()))
        wanted = len(rows) + sum(row["cases"] for row in missing(r) if row["of"] == stage)
        lines.append(f"- {name}: {sum(good.values())} of {wanted} cases ({each})")
        ties = [row for row in rows if row.get("ties")]
        if ties:
            lines.append(f"  - {len(ties)} of them decided near ties otherwise than the CPU")
    outcomes = outcomes_of(r)
    if outcomes or r.collected:
        counts = Counter(line["outcome"] for line in outcomes.values())
        said = [f"{counts['passed']} of {max(r.collected, len(outcomes))} passed"]
        said += [f"{counts[name]} {name}" for name in ("failed", "skipped") if counts[name]]
        said += [f"{not_reached(r)} not reached"] if not_reached(r) else []
        lines.append(f"- pytest: {', '.join(said)}")
        skipped = (x["why"][:200] for x in outcomes.values() if x["outcome"] == "skipped")
        lines += [f"  - {count} skipped: {why}" for why, count in Counter(skipped).most_common()]
    else:
        lines.append("- pytest: not run")
    for tool in ("memcheck", "racecheck", "synccheck"):
        rows = [row for row in r.checks if row.get("tool") == tool]
        clean = sum(row["cases"] for row in rows if row["ok"])
        known = [row for row in rows if row["ok"] is not None]
        lines.append(f"- {tool}: {f'{clean} cases clean' if known else 'not run'}")
    return lines


def missing(r: Results) -> list[dict[str, Any]]:
    """A line for each stage that did not run, or not all of it."""
    return [row for row in r.checks if row.get("stage") == "missing"]


def missing_line(row: dict[str, Any]) -> str:
    cases = f"{row['cases']} cases, " if row["cases"] else ""
    return f"- {row['of']}: {cases}{row['why']}"


def not_reached(r: Results) -> int:
    """How many tests have no line."""
    reached = sum(line.get("when") != "collect" for line in outcomes_of(r).values())
    return max(0, r.collected - reached)


def parts_of(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The modes of a row, "" if it has none, with the figures of each."""
    return {"": row} if "us" in row else {m: row[m] for m in ("graph", "eager") if m in row}


def outcomes_of(r: Results) -> dict[str, dict[str, Any]]:
    """The worst line of each test: one that failed and took its worker along comes twice."""
    out: dict[str, dict[str, Any]] = {}
    for line in r.tests:
        before = out.get(line["test"])
        if before is None or before["outcome"] == "passed" or before.get("when") == "???":
            out[line["test"]] = line
    return out


def faults(r: Results) -> list[str]:
    """A line for each thing that is wrong, and indented ones for where and how to see it again."""
    lines = [missing_line(row) for row in missing(r) if row.get("fault")]
    if r.machine.get("error"):
        lines.append(f"- machine: {r.machine['error']}")
    capability = r.machine.get("capability") or r.machine.get("compute_cap")
    attention = r.kernels.get("attention", "hopper")
    if capability == "9.0" and attention != "hopper":
        lines.append(f"- gpu_check: built without sm_90a, its attention is {attention}")
    again = [row for row in r.checks if row.get("stage") == "again"]
    cases = [row for row in r.checks if row.get("stage") in ("check", "repeats") and not row["ok"]]
    for row in cases[:MOST_CASES]:
        why = row.get("cuda_error") or row.get("why") or "wrong"
        lines.append(f"- `{row['case']}`: {why}")
        if row.get("output"):
            lines.append(
                f"  - {row['output']}, worst at {row.get('index')}, {row.get('wrong')} of "
                f"{row.get('of')} wrong; index, got, wanted: {row.get('first')}"
            )
        for other in again:
            if other.get("case") == row["case"]:
                how = next((f"{k}={v}" for k, v in other.items() if k.isupper()), "again")
                lines.append(f"  - with {how}: {'right' if other['ok'] else 'wrong too'}")
        repeats = f" --repeats {row['repeats']}" if row.get("repeats", 3) != 3 else ""
        lines.append(f"  - `gpu_check{repeats} --case {row['case']}`")
    if len(cases) > MOST_CASES:
        lines.append(f"- and {len(cases) - MOST_CASES} more cases, in check.jsonl")
    for test, line in outcomes_of(r).items():
        if line["outcome"] == "failed":
            said = (line.get("why") or "").strip().splitlines()
            reason = next((x for x in reversed(said) if x.startswith("E ")), (said or [""])[-1])
            lines.append(f"- `{test}`: {reason[:200]}")
            lines.append(f"  - `TOME_REQUIRE_CUDA=1 pytest '{test}'`")
    if not_reached(r) and not any(row["of"] == "tests" for row in missing(r)):
        lines.append(f"- pytest: {not_reached(r)} tests not reached")
    for row in r.checks:
        if row.get("stage") == "sanitizer" and row["ok"] is False:
            lines.append(f"- {row['tool']}: {row.get('summary')}; see sanitizer.txt")
    for name, row in (*r.figures.items(), *r.cpp.items()):
        if row.get("error") and row["error"] != NO_TIME:
            lines.append(f"- {name}: {row['error']}")
        for mode, part in parts_of(row).items():
            for refused, why in part.get("refused", {}).items():
                if refused.removesuffix(" as a graph") in OURS:
                    lines.append(f"- {' '.join(filter(None, (name, mode)))}: {refused}: {why}")
    return lines


def not_run(r: Results) -> list[str]:
    """What says nothing, good or bad."""
    out = [missing_line(row) for row in missing(r) if not row.get("fault")]
    for row in r.checks:
        if row.get("stage") == "sanitizer" and row["ok"] is None:
            out.append(f"- {row.get('tool', 'compute-sanitizer')}: {row.get('why')}")
    for name, row in (*r.figures.items(), *r.cpp.items()):
        if row.get("error") == NO_TIME:
            out.append(f"- {name}: {NO_TIME}")
    return out


def wrong(r: Results) -> list[str]:
    out = ["", "## What is wrong", "", *(faults(r) or ["Nothing that ran."])]
    left_out = not_run(r)
    return out + (["", "Not run:", "", *left_out] if left_out else [])


def goals_section(r: Results) -> list[str]:
    all_goals = goals(r)
    counts = Counter(goal.met for goal in all_goals)
    lines = ["", "## Goals", ""]
    lines.append(
        f"{counts[True]} met, {counts[False]} missed, {counts[None]} not measured. bfloat16; every "
        "contender as a CUDA graph where nothing else is said."
    )
    lines += ["", "| goal | wanted | measured | met |", "| --- | --- | ---: | --- |"]
    return [*lines, *(goal.line() for goal in all_goals)]


def cell(value: float | None, form: str = "{:.1f}") -> str:
    return "-" if value is None else form.format(value)


def figures_section(r: Results) -> list[str]:
    """Every time, a line for each row, microseconds."""
    lines = [
        "",
        "## Figures",
        "",
        "Microseconds a call, medians; (e): from Python, not captured.",
        "",
    ]
    for name, row in r.figures.items():
        for mode, part in parts_of(row).items():
            how = part.get("how", {})
            cells = [
                f"{contender} {cell(us, '{:.4g}')}"
                + ("(e)" if mode != "eager" and how.get(contender) == "eager" else "")
                for contender, us in part.get("us", {}).items()
            ]
            lines.append(f"- {name}{f' {mode}' if mode else ''}: {', '.join(cells)}")
            for contender, why in part.get("refused", {}).items():
                lines.append(f"  - {contender}: {why[:120]}")
    for name, row in r.cpp.items():
        for contender, us in row.get("us", {}).items():
            share = ratio(us, r.us(name, contender))
            if share is not None and abs(share - 1) > CPP_TOLERANCE:
                lines.append(
                    f"- {name} {contender}: bench_cuda takes {share:.2f} of the time above"
                )
    return lines


def page(r: Results) -> str:
    parts: list[Callable[[Results], list[str]]] = [about, wrong, right, goals_section]
    return "\n".join(line for part in [*parts, figures_section] for line in part(r)) + "\n"


def combined(r: Results) -> dict[str, Any]:
    """What tables are made from."""
    checks = Counter((row.get("stage"), row["ok"]) for row in r.checks if "case" in row)
    tests = Counter(line["outcome"] for line in outcomes_of(r).values())
    return {
        "machine": r.machine,
        "checks": {f"{stage} {'right' if ok else 'wrong'}": n for (stage, ok), n in checks.items()},
        "tests": dict(tests),
        "copy_tb_per_s": None if r.bandwidth is None else round(r.bandwidth / 1e6, 4),
        "figures": r.figures,
        "cpp": r.cpp,
        "goals": [
            {"goal": g.name, "least": g.least, "wanted": g.wanted, "value": g.value, "met": g.met}
            for g in goals(r)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--json", type=Path, help="write everything for bench/tables.py")
    args = parser.parse_args()
    for folder in args.folders:
        if not folder.is_dir():
            parser.error(f"no folder {folder}")
    results = Results(*args.folders)
    if args.json:
        if results.machine.get("dry_run", True):
            parser.error("a dry run has no figures to keep")
        args.json.write_text(json.dumps(combined(results), indent=1) + "\n")
    print(page(results), end="")


if __name__ == "__main__":
    main()
