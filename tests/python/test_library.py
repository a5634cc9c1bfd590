"""Which GPUs run the kernels, and what is said of those that do not. Without a GPU."""

from __future__ import annotations

import json
import os
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tome_ext
from tome_ext import _library, ops, reference

BUILT = {"cuda": "13.0", "archs": "8.0 9.0"}


class Gpus:
    """A torch that sees GPUs, and the CUDA library's answers about them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capabilities: list[tuple[int, int]] = []
        self.obstacles: dict[int, str] = {}
        self.asked: list[int] = []
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(self.capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", self.capability)
        monkeypatch.setattr(_library, "_told", set())
        self.library(monkeypatch, loaded=True)
        fake = SimpleNamespace(
            _build_info=torch.ops.tome._build_info,
            _cuda_build_info=lambda: json.dumps(BUILT),
            _cuda_obstacle=self.obstacle,
        )
        monkeypatch.setattr(_library, "torch", _Torch(fake))

    def library(self, monkeypatch: pytest.MonkeyPatch, loaded: bool, error: str = "") -> None:
        """Whether the CUDA library is there."""
        monkeypatch.setattr(_library, "cuda_loaded", loaded)
        monkeypatch.setattr(_library, "_cuda_error", None if loaded else error)
        monkeypatch.setattr(_library, "switched_off", False)
        kinds = ("cpu", "cuda") if loaded else ("cpu",)
        monkeypatch.setattr(ops, "kernel_devices", kinds)

    def capability(self, device: torch.device | int) -> tuple[int, int]:
        return self.capabilities[device if isinstance(device, int) else device.index]

    def obstacle(self, index: int) -> str:
        self.asked.append(index)
        return self.obstacles.get(index, "")


class _Torch:
    """torch, but for the operators that only the CUDA library has."""

    def __init__(self, fake: Any) -> None:
        self.ops = SimpleNamespace(tome=fake)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    return Gpus(monkeypatch)


def cuda(index: int) -> torch.device:
    return torch.device("cuda", index)


def test_obstacles_are_explained() -> None:
    def explain(obstacle: str) -> str | None:
        return _library.explain_obstacle(obstacle, BUILT, (7, 5), "12.8")

    assert explain("") is None
    assert explain("TOME_CUDA_KERNELS=0") == "TOME_CUDA_KERNELS=0 is set"
    for name in ("cudaErrorNoKernelImageForDevice", "cudaErrorInvalidDeviceFunction"):
        assert explain(name) == (
            "its CUDA kernels are built for 8.0 9.0, not for 7.5; build tome_ext with TOME_CUDA=1 "
            "TORCH_CUDA_ARCH_LIST=7.5"
        )
    assert explain("cudaErrorInsufficientDriver") == (
        "its CUDA kernels are built with CUDA 13.0, for which the driver is too old (torch has "
        "12.8); update the driver, or build tome_ext with TOME_CUDA=1 and a toolkit of CUDA 12"
    )
    assert explain("cudaErrorUnsupportedPtxVersion") == (
        "the driver cannot translate its CUDA kernels, built for 8.0 9.0, to 7.5 "
        "(cudaErrorUnsupportedPtxVersion); update the driver, or build tome_ext with TOME_CUDA=1 "
        "TORCH_CUDA_ARCH_LIST=7.5"
    )


def test_status_without_a_gpu(gpus: Gpus) -> None:
    assert _library.cuda_status() == "loaded, built for 8.0 9.0"
    assert gpus.asked == []


def test_status_of_gpus_that_run_the_kernels(gpus: Gpus) -> None:
    gpus.capabilities = [(9, 0), (9, 0), (8, 0)]
    assert _library.cuda_status() == "loaded, built for 8.0 9.0"
    assert gpus.asked == [0, 2], "one of a kind"


def test_status_of_a_gpu_that_does_not(gpus: Gpus) -> None:
    gpus.capabilities = [(7, 5), (7, 5)]
    gpus.obstacles = {0: "cudaErrorNoKernelImageForDevice", 1: "cudaErrorNoKernelImageForDevice"}
    status = _library.cuda_status()
    assert status.startswith("not used: its CUDA kernels are built for 8.0 9.0, not for 7.5; build")
    rows = tome_ext.info()
    assert rows["cuda library"] == status
    assert rows["attention kernels"] == "cpu"


def test_status_of_a_machine_with_both(gpus: Gpus) -> None:
    gpus.capabilities = [(9, 0), (6, 1)]
    gpus.obstacles = {1: "cudaErrorNoKernelImageForDevice"}
    status = _library.cuda_status()
    assert status.startswith("loaded, built for 8.0 9.0; not used on cuda:1: its CUDA kernels are")
    assert tome_ext.info()["attention kernels"] == "cpu, cuda"


def test_status_where_kernels_are_switched_off(gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.capabilities = [(9, 0)]
    monkeypatch.setattr(_library, "switched_off", True)
    assert _library.cuda_status() == "not used: TOME_CUDA_KERNELS=0 is set"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.tell_of_plain(cuda(0))


def test_a_gpu_that_runs_plain_operators_is_told_of_once(gpus: Gpus) -> None:
    gpus.capabilities = [(7, 5), (7, 5)]
    gpus.obstacles = {0: "cudaErrorNoKernelImageForDevice", 1: "cudaErrorNoKernelImageForDevice"}
    with pytest.warns(RuntimeWarning, match=r"on cuda:0 \(a GPU\): .*_ARCH_LIST=7\.5"):
        _library.tell_of_plain(cuda(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in (0, 1, 0, 1):  # the other one for the same reason
            _library.tell_of_plain(cuda(index))


@pytest.mark.parametrize("error", ["no _C_cuda library lies in /a", "_C_cuda.so does not load: b"])
def test_a_build_without_kernels_says_so_on_a_gpu(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    gpus.library(monkeypatch, loaded=False, error=error)
    gpus.capabilities = [(8, 6)]
    assert _library.cuda_status() == f"not loaded: {error}"
    with pytest.warns(RuntimeWarning) as seen:
        _library.tell_of_plain(cuda(0))
    assert str(seen[0].message) == (
        "tome_ext runs plain PyTorch operators, which are slow, on cuda:0 (a GPU): its CUDA "
        f"kernels are not loaded: {error}; build tome_ext with TOME_CUDA=1 TORCH_CUDA_ARCH_LIST=8.6"
    )


def test_nothing_is_said_where_torch_has_no_cuda(
    gpus: Gpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus.library(monkeypatch, loaded=False, error="none")
    monkeypatch.setattr(torch.version, "cuda", None)  # ROCm calls its devices "cuda" too
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.tell_of_plain(cuda(0))


def test_callers_choose_torchs_operators_once_no_gpu_runs_ours(gpus: Gpus) -> None:
    gpus.capabilities = [(7, 5), (7, 5)]
    ops._leave_kernels(cuda(0))
    assert ops.kernel_devices == ("cpu",)
    assert tome_ext.attention.unsupported("cuda", torch.float16, 64) == "no kernel for cuda"


def test_one_gpu_without_kernels_leaves_them_to_the_others(gpus: Gpus) -> None:
    gpus.capabilities = [(9, 0), (7, 5)]
    ops._leave_kernels(cuda(1))
    assert ops.kernel_devices == ("cpu", "cuda")


def test_what_the_cuda_library_falls_back_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[torch.device] = []
    monkeypatch.setattr(_library, "tell_of_plain", told.append)
    keys, x = torch.randn(2, 3, 20, 8), torch.randn(2, 20, 4)
    got = torch.ops.tome._plain_match(keys, 5, 1)
    for mine, theirs in zip(got, reference.match(keys, 5, 1), strict=True):
        assert torch.equal(mine, theirs)
    merged = torch.ops.tome._plain_merge(x, None, got[1], got[2], "sum")
    for mine, theirs in zip(merged, reference.merge(x, None, *got[1:], "sum"), strict=True):
        assert torch.equal(mine, theirs)
    assert told == [keys.device, x.device]
    for name in ("select", "plan", "merge_add_norm", "merge_backward", "unmerge"):
        assert str(getattr(torch.ops.tome, name).default._schema).replace(
            f"tome::{name}", f"tome::_plain_{name}"
        ) == str(getattr(torch.ops.tome, f"_plain_{name}").default._schema)


def test_importing_does_not_start_cuda(run_python: Any) -> None:
    script = "import tome_ext, torch; print(torch.cuda.is_initialized())"
    run = run_python(script)
    assert run.stdout == "False\n", run.stderr


def test_an_instruction_set_that_is_none_is_refused(run_python: Any) -> None:
    done = run_python("import tome_ext", env={**os.environ, "TOME_ISA": "avx512bf16"})
    assert done.returncode == 1
    assert (
        "TOME_ISA: expected one of portable, avx2, avx512, avx512_bf16, amx_bf16, got"
        in done.stderr
    )
    lower = run_python("import tome_ext", env={**os.environ, "TOME_ISA": "portable"})
    assert (lower.returncode, lower.stderr) == (0, "")


def test_a_warning_says_that_the_machine_lacks_an_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_library, "build_info", lambda: {"isa": "avx2"})
    with pytest.warns(RuntimeWarning, match="TOME_ISA=avx512: this machine lacks it, and avx2 is"):
        _library._check_isa("avx512")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library._check_isa("avx2")
        _library._check_isa(None)
