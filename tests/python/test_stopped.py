"""Memory that can't be had, and signals: an error or an end that says so, and nothing left behind.

On Linux only (see conftest.py): memory is limited as Linux counts it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_CACHE": "/nonexistent",
    "TORCH_CPP_LOG_LEVEL": "FATAL",  # torch logs each error that crosses its C interface
    "MALLOC_MMAP_THRESHOLD_": "65536",  # freed memory goes back, so that the next call asks anew
}

LEAVE = """
import resource, sys

def leave(room):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room if room is not None else -1, -1))
"""

OPERATORS = """
import torch, tome_ext

torch.set_num_threads(int(sys.argv[1]))
ops, tokens = torch.ops.tome, 300_000
x, size = torch.randn(1, tokens, 2), torch.ones(1, tokens)
plan = tome_ext.match(x, 500, tokens - 2000)
rows = plan.merge(x)[0]
q = torch.randn(1, 2, 1024, 128)
out, lse = ops.attention_forward(q, q, q)
calls = {
    "match": lambda: ops.match(x, 500, tokens - 2000, weight=size),
    "select": lambda: ops.select(x[..., 0], 1000, 0, True),
    "plan": lambda: ops.plan(plan.assign, plan.num_output_tokens),
    "merge": lambda: ops.merge(x, size, *plan[1:]),
    "merge_add_norm": lambda: ops.merge_add_norm(x, x, size, *plan[1:]),
    "merge_backward": lambda: ops.merge_backward(rows, size, *plan[1:]),
    "unmerge": lambda: ops.unmerge(rows, plan.assign),
    "attention_forward": lambda: ops.attention_forward(q, q, q),
    "attention_backward": lambda: ops.attention_backward(q, q, q, q, None, out, lse),
    "cls_attention": lambda: ops.cls_attention(x[:, None], x[:, None]),
}
for name, call in calls.items():
    wanted = call()
    room, refused = 0, 0
    while True:
        leave(room)
        try:
            got = call()
        except (RuntimeError, MemoryError) as error:
            text = str(error)
            refused += 1
            got = None
        leave(None)
        if got is not None:
            break
        assert tome_ext._command.out_of_memory(RuntimeError(text)), text
        room += 256 * 1024
    assert refused > 0, f"{name} needed no memory"
    for a, b in zip(*((y,) if isinstance(y, torch.Tensor) else y for y in (got, wanted))):
        assert torch.equal(a, b), name
    print(name)
"""

COMMAND = """
import timm, torch, torchvision
import tome_ext.bench, tome_ext.demo, tome_ext.evaluate
from tome_ext_cli import main

timm.create_model("test_vit")(torch.zeros(1, 3, 160, 160))
leave(100 << 20)
sys.exit(main(sys.argv[1:]))
"""


# A shell without a terminal starts programs in the background with Ctrl-C switched off.
FROM_A_TERMINAL = """
import signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
from tome_ext_cli import main

sys.exit(main())
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FOLDER/CLASS/PICTURE, more than a command reads before it is stopped."""
    folder = tmp_path_factory.mktemp("stopped") / "pictures"
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for name in ("ant", "bee"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(noise).save(folder / name / "0.png")
        for i in range(1, 3000):
            os.link(folder / name / "0.png", folder / name / f"{i}.png")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights for as many classes."""
    import timm
    import torch

    torch.save(timm.create_model("test_vit", num_classes=2).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("threads", [1, 2])
def test_operators_without_memory_raise_and_work_again(run_python: Any, threads: int) -> None:
    """Whichever of its allocations fails: the room grows until the call succeeds."""
    program = LEAVE + "import tome_ext._command\n" + OPERATORS
    done = run_python(program, str(threads), env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == 10


@pytest.mark.parametrize("command", ["bench", "demo", "eval"])
def test_commands_without_memory_say_so(
    run_python: Any, command: str, pictures: Path, weights: Path, tmp_path: Path
) -> None:
    options = {
        "bench": ["--batch-size", "1024", "--seconds", "0"],
        "demo": ["--batch-size", "1024", "--output", tmp_path / "shown.png"],
        "eval": [pictures, "--checkpoint", weights, "--workers", "0", "--batch-size", "1024"],
    }[command]
    argv = [command, "--model", "test_vit", "--r", "4", *map(str, options)]
    done = run_python(LEAVE + COMMAND, *argv, env=ENVIRONMENT)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "tome-ext: error: " in done.stderr
    assert "memory" in done.stderr
    assert "Traceback" not in done.stderr


# The file that a command has begun when it is in the middle of its work, and what is in it then:
# what it printed, or its results.
BEGUN = {
    "bench": ("said.txt", r"weights "),
    "demo": ("said.txt", r"\d threads"),
    "eval": ("figures.json", r'"complete": false'),
}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
@pytest.mark.parametrize("command", ["bench", "demo", "eval"])
def test_a_stopped_command_ends_at_once_and_leaves_no_process(
    command: str, sent: signal.Signals, pictures: Path, weights: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "shown.png"
    options = {
        "bench": ["--seconds", "600", "--json", tmp_path / "figures.json"],
        "demo": ["--batch-size", "16", "--output", picture],
        "eval": [
            *(pictures, "--checkpoint", weights, "--workers", "2", "--batch-size", "16"),
            *("--json", tmp_path / "figures.json"),
        ],
    }[command]
    argv = [command, "--model", "test_vit", "--r", "4", *map(str, options)]
    said = tmp_path / "said.txt"
    name, content = BEGUN[command]
    sign = tmp_path / name
    with said.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", FROM_A_TERMINAL, *argv],
            cwd=tmp_path,  # not in the source folder, which would be imported
            env=ENVIRONMENT,
            stdout=file,
            stderr=file,
            start_new_session=True,  # a group of its own, as a shell gives it
        )
    try:
        while not sign.exists() or re.search(content, sign.read_text()) is None:
            assert process.poll() is None, said.read_text()[-3000:]
            time.sleep(0.05)
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # Ctrl-C goes to all of the group
            assert process.wait() == 130
        else:
            process.send_signal(sent)
            assert process.wait() == -sent
        # Readers of pictures look every few seconds whether their parent still lives.
        while group_lives(process.pid):
            time.sleep(0.2)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in said.read_text()
    assert not picture.exists()


def group_lives(group: int) -> bool:
    """Whether a process of that group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
