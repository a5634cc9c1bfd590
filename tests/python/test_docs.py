"""Every Python block of the README and of the pages named here runs, page by page, in its order."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

RUNNING = Path(__file__).parents[2] / "docs" / "running"
PAGES = sorted(page.name for page in RUNNING.glob("*.md") if page.name != "README.md")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARKS = {"cuda-graphs.md": pytest.mark.cuda, "openvino.md": pytest.mark.openvino}
BY_TORCHRUN = {"distributed.md"}
# Pages elsewhere.
OTHERS = ("../methods.md", "../migration.md", "../operators.md", "../tuning.md", "../../README.md")
# What pages change in torch._dynamo.config, as it was before: set back after each.
CHANGED = ("recompile_limit", "skip_fwd_side_effects_in_bwd_under_checkpoint")
SETTINGS = {name: getattr(torch._dynamo.config, name) for name in CHANGED}


def code_of(page: str) -> str:
    """The page's blocks, each on the lines it has in the page, so that errors point there."""
    text = (RUNNING / page).read_text(encoding="utf-8")
    code = ""
    for block in BLOCK.finditer(text):
        before = text.count("\n", 0, block.start(1))
        code += "\n" * (before - code.count("\n")) + block[1]
    return code


def marked(page: str) -> Any:
    return pytest.param(page, marks=MARKS.get(page, ()))


@pytest.mark.slow
@pytest.mark.parametrize("page", [*map(marked, sorted({*PAGES, *OTHERS} - BY_TORCHRUN))])
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # for what the page writes
    with_weights = timm.create_model

    def create_model(*names: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        return with_weights(*names, **options)  # random ones, as the tests have no network

    monkeypatch.setattr(timm, "create_model", create_model)
    torch.compiler.reset()
    with torch._dynamo.config.patch(SETTINGS):
        exec(compile(code_of(page), str(RUNNING / page), "exec"), {"__name__": "__main__"})


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted(BY_TORCHRUN))
def test_page_under_torchrun(page: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(code_of(page))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("page", PAGES)
def test_code_is_python_and_the_index_names_the_page(page: str) -> None:
    code = code_of(page)
    assert "tome" in code
    compile(code, page, "exec")  # those that need a GPU too
    assert f"[{page}]({page})" in (RUNNING / "README.md").read_text(encoding="utf-8")


def test_the_table_of_supported_models_is_that_of_the_patches() -> None:
    script = RUNNING.parents[1] / "bench" / "supported.py"
    subprocess.run([sys.executable, script, "--check"], check=True)
