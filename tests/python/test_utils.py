"""benchmark and info."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

import tome_ext
from tome_ext import _library
from tome_ext.utils import benchmark, info, parse_r


class Spy(nn.Module):
    """Counts its calls, and sleeps in the first of them."""

    def __init__(self, slow_calls: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.slow_calls = slow_calls
        self.seen: list[tuple[tuple[int, ...], bool, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        if len(self.seen) < self.slow_calls:
            time.sleep(0.25)
        self.seen.append(
            (
                tuple(x.shape),
                self.training,
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
            )
        )
        return x * self.weight


def test_benchmark_runs_the_model_as_asked() -> None:
    model = Spy()
    rate = benchmark(model, "cpu", input_size=(3, 8, 16), batch_size=5, runs=8)
    assert rate > 0
    assert model.seen == [((5, 3, 8, 16), False, False, False)] * 8
    assert model.training  # put back
    model.eval()
    benchmark(model, torch.device("cpu"), input_size=(3, 8, 8), batch_size=1, runs=1, use_fp16=True)
    assert model.seen[-1] == ((1, 3, 8, 8), False, False, True)
    assert not model.training


def test_benchmark_throws_out_the_first_runs() -> None:
    """Two slow runs of eight: in the count they would allow 16 images a second at most."""
    counted = benchmark(Spy(2), "cpu", (3, 4, 4), batch_size=1, runs=8, throw_out=0.0)
    assert counted <= 8 / 0.5
    thrown_out = benchmark(Spy(2), "cpu", (3, 4, 4), batch_size=1, runs=8, throw_out=0.25)
    assert thrown_out > counted


def test_benchmark_shows_progress_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark(Spy(), "cpu", (3, 4, 4), batch_size=1, runs=4)
    assert capsys.readouterr() == ("", "")
    benchmark(Spy(), "cpu", (3, 4, 4), batch_size=1, runs=4, verbose=True)
    out, err = capsys.readouterr()
    assert "im/s" in out
    assert "4/4" in err


def test_benchmark_puts_the_mode_back_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).train()
    with pytest.raises(RuntimeError):
        benchmark(model, "cpu", (3, 4, 4), batch_size=1, runs=1)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": 0}, "got runs=0"),
        ({"throw_out": 1.0}, "throw_out=1.0"),
        ({"throw_out": -0.1}, "throw_out=-0.1"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_benchmark_rejects(arguments: dict[str, float], message: str) -> None:
    model = Spy()
    with pytest.raises(ValueError, match=message):
        benchmark(model, "cpu", **arguments)  # type: ignore[arg-type]
    assert model.seen == []


def test_benchmark_names_a_missing_device() -> None:
    missing = torch.cuda.device_count()
    with pytest.raises(RuntimeError, match=f"expected one of {missing} CUDA devices, got cuda"):
        benchmark(Spy(), f"cuda:{missing}")


def test_parse_r_is_that_of_schedule() -> None:
    assert parse_r is tome_ext.schedule.parse_r


def test_info_says_what_is_there() -> None:
    rows = info()
    assert rows["tome_ext"] == tome_ext.__version__
    assert rows["torch"] == torch.__version__
    assert rows["library"] == "loaded"
    assert rows["instruction set"] == _library.build_info()["isa"]
    assert rows["devices"].startswith("cpu (")
    assert rows["threads"] == str(torch.get_num_threads())
    assert rows["attention kernels"].startswith("cpu")
    with pytest.raises(ValueError, match="expected a patched model, got Linear"):
        info(nn.Linear(1, 1))


def test_info_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "load_error", "no _C library lies in /nowhere")
    rows = info()
    assert rows["library"] == "no _C library lies in /nowhere"
    assert rows["instruction set"] == "unknown"
    assert "not loaded" in rows["cuda library"]
