"""Writes the tables of the README and docs/ from the JSON that benchmarks left in bench/results/.

python bench/tables.py          # rewrite them
python bench/tables.py --check  # fail if one is not what the JSON says
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
AGREEMENT = 1.15  # as of tome-ext bench: at most this times, a ratio and that of the medians
TITLES = {
    "merge": ("merge, mean with sizes", "clone of x", "of_clone"),
    "unmerge": ("unmerge", "clone of its output", "of_clone"),
    "match": ("match, with the mean over heads", "matmul of the scores alone", "of_matmul"),
}


def row(entry: dict[str, Any]) -> str:
    ms = entry["ms"]
    _, _, ratio = TITLES[entry["op"]]
    floor = ms["clone" if "clone" in ms else "matmul"]
    of_floor = steady(entry[ratio], ms["tome"] / floor, "{:.2f}")
    over_stock = steady(entry["over_stock"], ms["stock"] / ms["tome"], "{:.1f}x")
    return (
        f"| {entry['shape']} | {entry['dtype']} | {ms['tome']:.3g} | {floor:.3g} | "
        f"{of_floor} | {ms['stock']:.3g} | {over_stock} |"
    )


def steady(ratio: float, of_medians: float, form: str) -> str:
    """A ratio, or "?" where it contradicts the medians beside it, as on a busy machine."""
    agrees = 1 / AGREEMENT < ratio / of_medians < AGREEMENT
    return form.format(ratio) if agrees else "?"


def machine_line(result: dict[str, Any], figures: str = "milliseconds, medians") -> str:
    machine = result["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']} kernels, "
        f"torch {machine['torch']}, tome_ext {machine['tome_ext']}; {figures}."
    )


def ops_table(result: dict[str, Any]) -> str:
    lines = [machine_line(result)]
    for op, (title, floor, _) in TITLES.items():
        lines += [
            "",
            f"| {title} | dtype | tome_ext | {floor} | tome_ext / that | stock "
            "| stock / tome_ext |",
            "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [row(entry) for entry in result["rows"] if entry["op"] == op]
    (large,) = (entry for entry in result["rows"] if "extra_bytes" in entry)
    ours, stock = (large["extra_bytes"][name] / 2**20 for name in ("tome", "stock"))
    lines += [
        "",
        f"The large match ({large['shape']}) takes {ours:.1f} MiB of extra memory where stock "
        f"takes {stock:.0f} MiB ({100 * ours / stock:.1f}%).",
    ]
    return "\n".join(lines)


def attention_table(result: dict[str, Any]) -> str:
    """Forward, backward and class token beside what users call today."""
    lines = [
        machine_line(result),
        "",
        "| attention | dtype | forward | SDPA, mask | SDPA, no sizes | explicit | backward | "
        "SDPA, mask | cls_attention | explicit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {(entry["op"], entry["shape"], entry["dtype"]): entry for entry in result["rows"]}
    for (op, shape, dtype), forward in rows.items():
        if op != "attention":
            continue
        backward = rows["attention_backward", shape, dtype]
        cls = rows["cls_attention", shape, dtype]
        cells = [
            shape,
            dtype,
            f"{forward['ms']['tome']:.3g}",
            *(f"{forward['over'][name]:.2f}x" for name in ("masked", "unbiased", "explicit")),
            f"{backward['ms']['tome']:.3g}",
            f"{backward['over']['masked']:.2f}x",
            f"{cls['ms']['tome']:.3g}",
            f"{cls['over']['explicit']:.1f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def alternatives_table(result: dict[str, Any]) -> str:
    """Every stock form of proportional attention: time over ours, and error."""
    forms = {
        "masked": "SDPA, float mask",
        "rank_1": "rank-1, SDPA",
        "flex": "FlexAttention",
        "explicit": "explicit",
    }
    lines = [
        machine_line(result),
        "",
        f"| attention | dtype | tome_ext | {' | '.join(forms.values())} |",
        f"| --- | --- | ---: | {' | '.join('---:' for _ in forms)} |",
    ]
    for entry in result["rows"]:
        if entry["op"] != "attention":
            continue
        error = entry["error"]
        cells = [f"{entry['over'][name]:.2f}x, {error[name]:.1e}" for name in forms]
        ours = f"{entry['ms']['tome']:.3g} ms, {error['tome']:.1e}"
        lines.append(f"| {entry['shape']} | {entry['dtype']} | {ours} | {' | '.join(cells)} |")
    return "\n".join(lines)


def models_table(result: dict[str, Any]) -> str:
    """Whole models: images/s, and how near to the ceiling; of `tome-ext bench --json`."""
    rows = result["rows"]
    ours = ("unpatched", "ceiling", "tome_ext")
    peers = list(dict.fromkeys(n for entry in rows for n in entry["contenders"] if n not in ours))
    heads = ["unpatched", "ceiling", "tome_ext", "speed-up", "of the ceiling"]
    titles = {"tome": "published package", "stock": "stock, fused attention"}
    heads += [f"{titles.get(peer, peer)}, of the ceiling" for peer in peers]
    lines = [
        machine_line(result, f"images/s, medians, {result['settings']['mode']}"),
        "",
        f"| model | method | dtype | B | {' | '.join(heads)} |",
        f"| --- | --- | --- | ---: |{' ---: |' * len(heads)}",
    ]
    for entry in rows:
        figures, rate = entry["contenders"], entry["keep_rate"]
        amount = f"r = {entry['r']}" if rate is None else f"keep rate {rate:g}"
        cells = [
            entry["model"],
            f"{entry['method']}, {amount}",
            entry["dtype"],
            str(entry["batch_size"]),
            *(f"{figures[name]['images_per_second']:.3g}" for name in ours),
            f"{figures['tome_ext']['speed_up']:.2f}x",
            f"{figures['tome_ext']['of_ceiling']:.3f}",
            *(f"{figures[n]['of_ceiling']:.3f}" if n in figures else "-" for n in peers),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


WAYS = {
    "eager": "PyTorch, eager",
    "eager glibc": "PyTorch, eager, glibc keeps memory",
    "eager jemalloc": "PyTorch, eager, jemalloc",
    "eager tcmalloc": "PyTorch, eager, tcmalloc",
    "compile": "`torch.compile`",
    "freezing": "`torch.compile`, frozen weights",
    "onnxruntime": "ONNX Runtime, native operators",
    "onnxruntime standard": "ONNX Runtime, standard operators",
    "openvino": "OpenVINO, native operators",
    "openvino standard": "OpenVINO, standard operators",
}


def ways_line(result: dict[str, Any], what: str) -> str:
    """Machine, engines and model of bench/cpu_ways.py."""
    machine, first = result["machine"], result["rows"][0]
    engines = f"ONNX Runtime {machine['onnxruntime']}, OpenVINO {machine['openvino'].split('-')[0]}"
    return machine_line(result, f"{engines}; {first['model']}, r = {first['r']}; {what}")


def ways_table(result: dict[str, Any]) -> str:
    """Every way to run a model on a CPU, of bench/cpu_ways.py: images/s, and over eager."""
    lines = [
        ways_line(result, "images/s"),
        "",
        "| dtype | B | way | unmerged | merged | speed-up | merged, over unmerged eager |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for entry in result["rows"]:
        cells = [entry["dtype"], str(entry["batch_size"]), WAYS[entry["way"]]]
        cells += [f"{entry[name]:.3g}" for name in ("unmerged", "merged")]
        cells += [f"{entry[name]:.2f}x" for name in ("speed_up", "over_eager")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def more_ways_table(result: dict[str, Any]) -> str:
    """Of a shorter run: eager with other allocators, the engines, and int8."""
    lines = [
        ways_line(result, "images/s, medians of few rounds"),
        "",
        "| dtype | B | way | unmerged | merged | speed-up |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for entry in result["rows"]:
        if entry["way"] not in ("compile", "freezing"):
            cells = [entry["dtype"], str(entry["batch_size"]), WAYS[entry["way"]]]
            cells += [f"{entry[name]:.3g}" for name in ("unmerged", "merged")]
            lines.append(f"| {' | '.join([*cells, times(entry['speed_up'], 1.0)])} |")
    return "\n".join(lines)


# --- GPUs: what bench/gpu_report.py --json wrote -------------------------------------------------

GPU_LAYERS = {"vit_b": "B=256 N=197 C=768", "vit_l384": "B=64 N=577 C=1024", "single": "B=1 N=197"}
GPU_ATTENTION = {
    "b256_n197": "B=256 H=12 N=197",
    "b256_n150": "B=256 H=12 N=150",
    "b256_n80": "B=256 H=12 N=80",
    "b64_n577": "B=64 H=16 N=577",
    "single": "B=1 H=12 N=197",
}
GPU_LARGE = {"n4096": "B=2 N=4096 D=320 r=2048", "n16384": "B=1 N=16384 D=320 r=8192"}
GPU_MODELS = {
    "vit_b": ("vit_base_patch16_224", 13, 256),
    "vit_l": ("vit_large_patch16_224", 7, 256),
    "vit_l384": ("vit_large_patch16_384", 23, 64),
    "vit_b_single": ("vit_base_patch16_224", 13, 1),
}


def gpu_line(result: dict[str, Any], figures: str) -> str:
    machine = result["machine"]
    return (
        f"{machine['device']}, driver {machine['driver_version']}, torch {machine['torch']}, "
        f"tome_ext {machine['tome_ext']}, bfloat16, {machine['date']}; {figures}."
    )


def gpu_us(result: dict[str, Any], row: str, *path: str) -> float | None:
    """A figure, or None for one that is missing."""
    value: Any = result["figures"].get(row, {})
    for key in (*path[:-1], "us", path[-1]):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def figure(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def times(a: float | None, b: float | None, form: str = "{:.2f}x") -> str:
    return "-" if a is None or not b else form.format(a / b)


def least(*values: float | None) -> float | None:
    return min((x for x in values if x is not None), default=None)


def gpu_ops_table(result: dict[str, Any]) -> str:
    """What a layer does, in microseconds; the floor is a copy of as many bytes."""
    bandwidth = result["copy_tb_per_s"]
    lines = [
        gpu_line(result, f"microseconds; floor: the bytes at {bandwidth:.2f} TB/s, a copy's"),
        "",
        "| operator | shape | tome_ext | floor | tome_ext / that | stock | stock / tome_ext |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, stock in (
        ("match", "stock match"),
        ("merge", "stock merge"),
        ("both", "stock both"),
        ("merge_add_norm", "stock add, merge, norm"),
        ("unmerge", "stock unmerge"),
    ):
        for key, shape in GPU_LAYERS.items():
            row = f"layer:{key}"
            ours, other = gpu_us(result, row, name), gpu_us(result, row, stock)
            size = result["figures"].get(row, {}).get("bytes", {}).get(name)
            floor = None if size is None else size / bandwidth / 1e6
            cells = ["match and merge" if name == "both" else name, shape, figure(ours)]
            cells += [figure(floor), times(ours, floor, "{:.2f}")]
            lines.append(f"| {' | '.join([*cells, figure(other), times(other, ours)])} |")
    for key, shape in GPU_LARGE.items():
        ours, other = (gpu_us(result, f"large:{key}", name) for name in ("match", "stock match"))
        cells = ["match", shape, figure(ours), "-", "-", figure(other), times(other, ours)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_attention_table(result: dict[str, Any]) -> str:
    """Forward and backward beside the kernels of SDPA, in microseconds."""
    rivals = ("flash", "cudnn", "efficient")
    lines = [
        gpu_line(result, "microseconds; sizes are part of tome_ext and of the masks only"),
        "",
        "| attention | shape | tome_ext | flash | cuDNN | efficient | fastest with a mask | "
        "tome_ext / fastest without sizes |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, name in (("attention", "forward"), ("backward", "backward")):
        for key, shape in GPU_ATTENTION.items():
            row = f"{kind}:{key}"
            ours = gpu_us(result, row, "tome")
            if ours is None:
                continue
            plain = [gpu_us(result, row, rival) for rival in rivals]
            mask = [gpu_us(result, row, f"{n}, mask") for n in ("efficient", "cudnn", "default")]
            fastest = least(*plain, gpu_us(result, row, "default"))
            cells = [name, shape, figure(ours), *map(figure, plain), figure(least(*mask))]
            lines.append(f"| {' | '.join(cells)} | {times(ours, fastest, '{:.2f}')} |")
    return "\n".join(lines)


def gpu_models_table(result: dict[str, Any]) -> str:
    """Whole models: images/s and the share of the ceiling."""
    titles = [
        *("model", "r", "B", "mode", "unpatched", "unpatched, flash", "ceiling", "tome_ext"),
        *("speed-up", "over flash", "of the ceiling", "over stock ToMe as published"),
    ]
    package = any(
        gpu_us(result, f"model:{key}", "eager", "published package") for key in GPU_MODELS
    )
    if package:  # it is a rival only where it was installed
        titles.append("over the published package")
    guided = any(gpu_us(result, f"model:{key}", "eager", "guided") for key in GPU_MODELS)
    if guided:
        titles.append("guided, speed-up")
    lines = [
        gpu_line(result, "images/s, medians; flash: SDPA held to its flash kernel"),
        "",
        f"| {' | '.join(titles)} |",
        "| --- | ---: | ---: | --- |" + " ---: |" * (len(titles) - 4),
    ]
    for key, (model, r, batch) in GPU_MODELS.items():
        for mode, kind, part in (
            ("eager", "model", "eager"),
            ("graph", "model", "graph"),
            ("compile", "compiled_model", "eager"),
            ("compile, graph", "compiled_model", "graph"),
        ):
            names = (
                *("unmerged", "unmerged, flash", "ceiling", "tome"),
                *("published", "published package", "guided"),
            )
            us = {name: gpu_us(result, f"{kind}:{key}", part, name) for name in names}
            ours = us["tome"]
            if ours is None:
                continue
            rates = [None if us[n] is None else 1e6 * batch / us[n] for n in names[:4]]
            cells = [model, str(r), str(batch), mode, *map(figure, rates)]
            cells += [times(us["unmerged"], ours), times(us["unmerged, flash"], ours)]
            cells += [times(us["ceiling"], ours, "{:.3f}"), times(us["published"], ours)]
            if package:
                cells.append(times(us["published package"], ours))
            if guided:
                cells.append(times(us["unmerged"], us["guided"]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def goals_table(*results: dict[str, Any]) -> str:
    """What was aimed at, and what each GPU gave: misses in bold, goals never measured left out."""
    names = [result["machine"]["device"].removeprefix("NVIDIA ").split()[0] for result in results]
    wanted = {goal["goal"]: goal for result in results for goal in result["goals"]}
    for result in results:
        for goal in result["goals"]:
            assert goal["wanted"] == wanted[goal["goal"]]["wanted"], goal["goal"]
    found = [{goal["goal"]: goal for goal in result["goals"]} for result in results]
    lines = [f"| | goal | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    for name, goal in wanted.items():
        cells = []
        for of_one in found:
            value, met = (of_one.get(name, {}).get(key) for key in ("value", "met"))
            near_1 = value is not None and abs(value - 1) <= 0.05
            text = "-" if value is None else f"{value:.3f}" if near_1 else f"{value:.2f}"
            cells.append(f"**{text}**" if met is False else text)
        if set(cells) != {"-"}:
            sign = "at least" if goal["least"] else "at most"
            lines.append(f"| {name} | {sign} {goal['wanted']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def short_table(h100: dict[str, Any], models: dict[str, Any], ways: dict[str, Any]) -> str:
    """The first screen's: what merging gives to whole models, on each kind of machine."""
    lines = [
        f"{gpu_line(h100, 'CUDA graphs')} {machine_line(models, 'medians')} "
        f"OpenVINO {ways['machine']['openvino'].split('-')[0]}: in a run of its own, "
        f"{ways['machine']['cpu']}, tome_ext {ways['machine']['tome_ext']}.",
        "",
        "| speed-up | model | r | B | on | images/s, unmerged | merged |",
        "| ---: | --- | ---: | ---: | --- | ---: | ---: |",
    ]

    def add(model: str, r: int, batch: int, where: str, *figures: float | None) -> None:
        speed_up, plain, ours = figures
        name = model.removesuffix("_224").replace("_384", ", 384 px").replace("_patch16", "/16")
        cells = [times(speed_up, 1.0), name.replace("vit_", "ViT-"), str(r), str(batch), where]
        lines.append(f"| {' | '.join([*cells, figure(plain), figure(ours)])} |")

    gpu = h100["machine"]["device"].removeprefix("NVIDIA ").split()[0]
    for key, (model, r, batch) in GPU_MODELS.items():
        us = [gpu_us(h100, f"model:{key}", "graph", name) for name in ("unmerged", "tome")]
        rates = [None if x is None else 1e6 * batch / x for x in us]
        speed_up = None if None in us else us[0] / us[1]
        add(model, r, batch, f"{gpu}, bfloat16, CUDA graph", speed_up, *rates)
    cpu = f"{models['machine']['threads']} cores, AVX-512"
    for row in models["rows"]:
        model, dtype, batch = row["model"], row["dtype"], row["batch_size"]
        if row["r"] == 13 and (model, dtype, batch) in (
            ("vit_small_patch16_224", "bfloat16", 8),
            ("vit_base_patch16_224", "float32", 1),
        ):
            plain, ours = (row["contenders"][name] for name in ("unpatched", "tome_ext"))
            rates = [one["images_per_second"] for one in (plain, ours)]
            add(model, 13, batch, f"{cpu}, {dtype}, eager", ours["speed_up"], *rates)
    for row in ways["rows"]:
        if (row["way"], row["dtype"], row["batch_size"]) == ("openvino", "float32", 8):
            rates = [row["unmerged"], row["merged"]]
            add(row["model"], row["r"], 8, f"{cpu}, float32, OpenVINO", row["speed_up"], *rates)
    return "\n".join(lines)


def fidelity_line(result: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in result["pictures"].items())
    return (
        f"CLIP ViT-B/16, float32, {counts}; speed: {machine_line(result, 'medians')[:-1]}, batches "
        f"of {result['batch']}."
    )


FIDELITY_ORDER = (
    "tome", "near tome", "tuned tome", "guided", "near guided", "tuned guided", "topk", "evit",
    "small", "random", "sliced",
)  # fmt: skip


def by_cost(rows: list[dict[str, Any]], whole: float) -> list[dict[str, Any]]:
    """Rows of about the same operations together."""
    return sorted(
        rows,
        key=lambda row: (-round(row["gflops"] / whole, 1), FIDELITY_ORDER.index(row["kind"])),
    )


def fidelity_cells(row: dict[str, Any], whole: float, keys: tuple[str, ...]) -> list[str]:
    """Operations, kind, setting, deviations, speed."""
    figures = [f"{row['deviation']['all'][key]:.2g}" for key in keys]
    speed = f"{row['speed']:.2f}x" if "speed" in row else "-"
    share = f"{row['gflops'] / whole:.2f}"
    return [share, row["name"], row["amount"], *figures, speed]


def fidelity_short_table(result: dict[str, Any]) -> str:
    """The README's: what users choose from, at about 0.75 and 0.62 of the operations."""
    lines = [
        fidelity_line(result),
        "",
        "| operations | method | setting | mean | 95 of 100 below | speed-up |",
        "| ---: | --- | --- | ---: | ---: | ---: |",
    ]
    whole = result["rows"][0]["gflops"]
    shown = ("tome", "guided", "near guided", "tuned guided", "small")
    rows = [
        row
        for row in result["rows"]
        if row["kind"] in shown and 0.6 * whole < row["gflops"] < 0.8 * whole
    ]
    for row in by_cost(rows, whole):
        lines.append(f"| {' | '.join(fidelity_cells(row, whole, ('mean', 'p95')))} |")
    return "\n".join(lines)


def fidelity_table(result: dict[str, Any]) -> str:
    """Everything."""
    answers = [
        (way, kind) for way in ("probe", "neighbour") for kind in result["rows"][0]["answers"]
    ]
    titles = ["operations", "method", "setting", "mean", "median", "95%", "worst", "speed-up"]
    titles += [f"{way}, {kind}" for way, kind in answers]
    lines = [
        fidelity_line(result),
        "",
        f"| {' | '.join(titles)} |",
        f"| ---: | --- | --- |{' ---: |' * (len(titles) - 3)}",
    ]
    plain, *rows = result["rows"]
    accuracies = [f"{plain['answers'][kind][way]['accuracy']:.3f}" for way, kind in answers]
    lines.append(f"| 1.00 | unmerged | | 0 | 0 | 0 | 0 | 1 | {' | '.join(accuracies)} |")
    for row in by_cost(rows, plain["gflops"]):
        cells = fidelity_cells(row, plain["gflops"], ("mean", "median", "p95", "worst"))
        for way, kind in answers:
            found = row["answers"][kind][way]
            cells.append(f"{found['accuracy']:.3f} ± {found['error']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def padding_table(result: dict[str, Any]) -> str:
    """Speed by batch size, of numbers of tokens that are all alike and that are not."""
    rows = result["padding"]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    speeds = {(row["kind"], row["amount"], row["batch"]): row["speed"] for row in rows}
    whole = result["rows"][0]["gflops"]
    lines = [
        f"Over the unmerged model; {machine_line(result, 'all taking turns on the same pictures')}",
        "",
        f"| operations | method | setting | {' | '.join(f'B = {batch}' for batch in batches)} |",
        f"| ---: | --- | --- |{' ---: |' * len(batches)}",
    ]
    measured = {(kind, amount) for kind, amount, _ in speeds}
    shown = [row for row in result["rows"] if (row["kind"], row["amount"]) in measured]
    for row in by_cost(shown, whole):
        found = [f"{speeds[row['kind'], row['amount'], batch]:.2f}x" for batch in batches]
        cells = [f"{row['gflops'] / whole:.2f}", row["name"], row["amount"], *found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def choices_table(result: dict[str, Any]) -> str:
    """Deviations of ways of merging, over those of the first, which is ToMe."""

    def figures(found: dict[str, float], over: dict[str, float] | None = None) -> str:
        keys = ("mean", "median", "p95")
        if over is None:
            return " / ".join(f"{found[key]:.2g}" for key in keys)
        return " / ".join(f"{found[key] / over[key]:.2f}" for key in keys)

    counts = ", ".join(f"{count} {name}" for name, count in result["pictures"].items())
    (first, tome), *others = result["choices"].items()
    lines = [
        f"CLIP ViT-B/16, float32, {counts} to choose by: mean / median / 95% of the deviations; "
        "below the first row, over those of the first row.",
        "",
        f"| what is compared, and what a merge costs | {' | '.join(f'r = {r}' for r in tome)} |",
        f"| --- |{' ---: |' * len(tome)}",
        f"| {first} | {' | '.join(figures(found) for found in tome.values())} |",
    ]
    for name, found in others:
        lines.append(f"| {name} | {' | '.join(figures(found[r], tome[r]) for r in tome)} |")
    return "\n".join(lines)


# Where each table stands, and the figures it is made from. A block whose figures are not there,
# which only those of GPUs may be, stays as it is.
TABLES = [
    ("README.md", "short", ("gpu_h100.json", "models_cpu.json", "cpu_ways.json"), short_table),
    ("README.md", "fidelity_short", "fidelity.json", fidelity_short_table),
    ("docs/fidelity.md", "fidelity", "fidelity.json", fidelity_table),
    ("docs/fidelity.md", "padding", "fidelity.json", padding_table),
    ("docs/fidelity.md", "choices", "fidelity_choices.json", choices_table),
    ("docs/benchmarking.md", "models_cpu", "models_cpu.json", models_table),
    ("docs/benchmarking.md", "models_cpu_before", "models_cpu_before.json", models_table),
    ("docs/operators.md", "ops_cpu", "ops_cpu.json", ops_table),
    ("docs/operators.md", "attention_cpu", "attention_cpu.json", attention_table),
    ("docs/running/cpu.md", "cpu_ways", "cpu_ways.json", ways_table),
    ("docs/running/cpu.md", "cpu_ways_more", "cpu_ways_more.json", more_ways_table),
    ("docs/benchmarking.md", "models_cpu_compile", "models_cpu_compile.json", models_table),
    ("docs/benchmarking.md", "models_cpu_avx2", "models_cpu_avx2.json", models_table),
    ("docs/attention.md", "alternatives_cpu", "attention_cpu.json", alternatives_table),
    ("docs/benchmarking.md", "models_gpu", "gpu_h100.json", gpu_models_table),
    ("docs/benchmarking.md", "models_h200", "gpu_h200.json", gpu_models_table),
    ("docs/benchmarking.md", "goals_gpu", ("gpu_h100.json", "gpu_h200.json"), goals_table),
    ("docs/benchmarking.md", "ops_gpu", "gpu_h100.json", gpu_ops_table),
    ("docs/benchmarking.md", "ops_h200", "gpu_h200.json", gpu_ops_table),
    ("docs/benchmarking.md", "attention_gpu", "gpu_h100.json", gpu_attention_table),
    ("docs/benchmarking.md", "attention_h200", "gpu_h200.json", gpu_attention_table),
]


def put_table(document: str, name: str, table: str, source: str) -> bool:
    """Write a table where the document has its block; under --check say so if it is another.

    ``source`` is what the table is made from, in words. Returns whether it is stale.
    """
    path = ROOT / document
    old = path.read_text()
    new, count = re.subn(
        rf"(<!-- {name} -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table}\n{found[2]}",
        old,
        flags=re.DOTALL,
    )
    if count != 1:
        raise SystemExit(f"{document}: expected one block <!-- {name} --> ... <!-- end -->")
    if new == old:
        return False
    if "--check" in sys.argv:
        print(f"{document}: table {name} is not that of {source}; run this script")
        return True
    path.write_text(new)
    return False


def main() -> int:
    stale = False
    for document, name, figures, make in TABLES:
        names = (figures,) if isinstance(figures, str) else figures
        sources = [ROOT / "bench/results" / source for source in names]
        if any(x.name.startswith("gpu_") and not x.exists() for x in sources):
            continue
        table = make(*(json.loads(source.read_text()) for source in sources))
        stale |= put_table(document, name, table, "bench/results/")
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
