"""Builds the operator libraries; everything else about the package is in pyproject.toml.

``_C.abi3.so``            schemas and CPU kernels.
``_C_cuda.abi3.so``       CUDA registrations, loaded only under a torch that has CUDA.
``_onnxruntime.abi3.so``  the CPU kernels for ONNX Runtime, which loads it.
``_openvino.abi3.so``     the CPU kernels for the OpenVINO that TOME_OPENVINO names, if any.

The first two use torch's stable ABI (2.10 and newer), the third ONNX Runtime's, and none holds
Python code, so that one wheel serves every Python >= 3.10, torch >= 2.10 and ONNX Runtime >= 1.17.
The last serves one release of OpenVINO. Environment variables: TOME_CUDA (auto, 0, 1),
TORCH_CUDA_ARCH_LIST, CUDA_HOME, TOME_OPENVINO, MAX_JOBS. CONTRIBUTING.md describes them.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"tome_ext: building needs torch >= 2.10, and importing it failed: {error}\n"
        "  With --no-build-isolation, install torch first; without it pip fetches torch itself."
    ) from error

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "tome_ext" / "_version.py"))["__version__"]
# The oldest torch whose stable ABI is used, as the headers spell it: 2.10 is 0x020a.
TORCH_TARGET = "0x020a000000000000"
# The last one as PTX too, for newer GPUs. 7.5 is left to who asks for it: without mma of bfloat16,
# attention takes nvcc three minutes, more than all the others together.
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")
NAMED_ARCHS = {
    "Turing": ("7.5",),
    "Ampere": ("8.0", "8.6"),
    "Ada": ("8.9",),
    "Hopper": ("9.0",),
    "Blackwell": ("10.0", "12.0"),
}
PTX_TOO = ("10.0",)  # for 11.0, which runs code of neither 10.0 nor 12.0


class CudaUnusableError(Exception):
    """Why the CUDA library cannot be built here."""


# --- the CUDA toolkit ---------------------------------------------------------------------------


def toolkit_candidates() -> list[Path]:
    """Folders to look for a CUDA toolkit in. CUDA_HOME or CUDA_PATH, when set, is the only one."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return [Path(os.environ[name])]
    found = []
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        # The nvcc on PATH may be a wrapper script far from the toolkit, so ask it where it is.
        dryrun = subprocess.run([nvcc, "-v", "--dryrun", "x.cu"], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stdout + dryrun.stderr, re.MULTILINE)
        if top is not None:
            found.append(Path(os.path.realpath(top.group(1).strip())))
        found.append(Path(os.path.realpath(nvcc)).parent.parent)
    found.append(Path("/usr/local/cuda"))
    return found


def library_folder(home: Path) -> Path | None:
    """The folder of a toolkit that holds the static CUDA runtime, or None."""
    folders = [home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))]
    return next((f for f in folders if (f / "libcudart_static.a").is_file()), None)


def find_toolkit() -> tuple[Path, Path]:
    """The toolkit's home and library folder."""
    missing = []
    for home in dict.fromkeys(toolkit_candidates()):
        libraries = library_folder(home)
        if not (home / "bin" / "nvcc").is_file():
            missing.append(f"{home}: no bin/nvcc")
        elif not list(home.glob("include/cuda_runtime.h")):
            missing.append(f"{home}: no include/cuda_runtime.h")
        elif libraries is None:
            missing.append(f"{home}: no libcudart_static.a in lib64, lib or targets/*/lib")
        else:
            return home, libraries
    raise CudaUnusableError(
        "no complete CUDA toolkit was found; set CUDA_HOME to one. Looked in\n    "
        + "\n    ".join(missing)
    )


def check_toolkit(home: Path) -> None:
    """Check nvcc's version against torch's, and that it accepts the host compiler."""
    nvcc = str(home / "bin" / "nvcc")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", version)
    wanted = str(torch.version.cuda)
    if release is None or release.group(1) != wanted.split(".")[0]:
        got = f"{release.group(1)}.{release.group(2)}" if release else "an unknown version"
        raise CudaUnusableError(
            f"torch {torch.__version__} is built for CUDA {wanted}, which needs a toolkit of the "
            f"same major version, and {nvcc} is {got}"
        )
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("#include <cuda_runtime.h>\n__global__ void probe() {}\n")
        command = [nvcc, "-std=c++20", "-c", str(probe), "-o", str(probe.with_suffix(".o"))]
        if os.environ.get("CC"):
            command += ["-ccbin", os.environ["CC"]]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode != 0:
        raise CudaUnusableError(f"{nvcc} does not compile an empty kernel:\n{run.stderr.strip()}")


def default_archs(home: Path) -> str:
    """DEFAULT_ARCHS that both this nvcc and this torch know, as TORCH_CUDA_ARCH_LIST has them."""
    nvcc = str(home / "bin" / "nvcc")
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(listed.split())
    archs = [arch for arch in DEFAULT_ARCHS if f"compute_{arch.replace('.', '')}" in known]
    if not archs:
        raise CudaUnusableError(
            f"{nvcc} knows none of the default archs {', '.join(DEFAULT_ARCHS)}"
        )
    return ";".join(
        f"{arch}+PTX" if arch in PTX_TOO or arch == archs[-1] else arch for arch in archs
    )


def arch_flags(archs: str) -> list[str]:
    """What nvcc is told of TORCH_CUDA_ARCH_LIST.

    9.0 is built as 9.0a: the chips are the same, and only the latter has the instructions that the
    kernels for Hopper are made of (device_hopper.h). All flags are ours: torch adds its own only
    where none has "arch" in it, a folder's name included.
    """
    flags = []
    names = [part for name in re.split(r"[;\s]+", archs) for part in archs_of(name) if part]
    for name in names:
        arch = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if arch is None:
            raise SystemExit(
                f"tome_ext: TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0 or 9.0+PTX, "
                f"{', '.join(NAMED_ARCHS)} or native, got {name!r}"
            )
        number = arch[1] + arch[2] + arch[3]
        native = "90a" if number == "90" else number
        flags.append(f"-gencode=arch=compute_{native},code=sm_{native}")
        if arch[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return list(dict.fromkeys(flags))


def archs_of(name: str) -> list[str]:
    """What a name of torch's stands for; anything else as it is."""
    if name == "native":
        count = torch.cuda.device_count()
        found = {torch.cuda.get_device_capability(i) for i in range(count)}
        return [f"{major}.{minor}" for major, minor in sorted(found)]
    plain = name.removesuffix("+PTX")
    known = NAMED_ARCHS.get(plain)
    if known is None:
        return [name]
    return [*known[:-1], f"{known[-1]}+PTX"]


def cuda_toolkit() -> tuple[Path, Path] | None:
    """The toolkit to build ``_C_cuda`` with, as TOME_CUDA asks; None for a build without CUDA."""
    switch = os.environ.get("TOME_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"tome_ext: TOME_CUDA: expected auto, 0 or 1, got {switch!r}")
    if switch == "0":
        print("tome_ext: building without CUDA, as TOME_CUDA=0 asks")
        return None
    try:
        if torch.version.cuda is None:
            raise CudaUnusableError(f"torch {torch.__version__} is built without CUDA")
        home, libraries = find_toolkit()
        check_toolkit(home)
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(home)
    except CudaUnusableError as why:
        if switch == "1":
            raise SystemExit(f"tome_ext: TOME_CUDA=1, but CUDA cannot be built: {why}") from why
        print(f"tome_ext: building without CUDA: {why}")
        return None
    print(f"tome_ext: building with CUDA from {home} for {os.environ['TORCH_CUDA_ARCH_LIST']}")
    return home, libraries


# --- the libraries ------------------------------------------------------------------------------


def sources(*patterns: str) -> list[str]:
    """Sources relative to this folder, as setuptools wants them."""
    return sorted(
        str(Path(path).relative_to(ROOT))
        for pattern in patterns
        for path in glob(str(ROOT / pattern))
    )


CORE = "csrc/core/cpu/*.cpp"
# Source paths end up in error messages: keep this machine's folders out of them.
HOST_FLAGS = [
    *("-Wall", "-Wextra", "-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    f"-ffile-prefix-map={ROOT}=.",
]
LINK_FLAGS = ["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else []


def extension(
    name: str,
    files: list[str],
    libraries: Sequence[str] = (),
    library_dirs: Sequence[str] = (),
    include_dirs: Sequence[str] = (),
    nvcc_flags: Sequence[str] = (),
) -> Extension:
    """An operator library: optimised, symbols hidden, linked to what holds the stable ABI only."""
    host = [*HOST_FLAGS, f"-ffile-prefix-map={Path(torch.__file__).resolve().parent}=torch"]
    through_nvcc = [part for flag in host for part in ("-Xcompiler", flag)]
    extension = cpp_extension.CppExtension(
        name,
        files,
        include_dirs=[str(ROOT / "csrc/core/include"), str(ROOT / "csrc/torch"), *include_dirs],
        library_dirs=list(library_dirs),
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET),
            ("TOME_VERSION", f'"{VERSION}"'),
            ("TORCH_VERSION_BUILT", f'"{torch.__version__}"'),
        ],
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-std=c++20", *host],
            "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA", *through_nvcc, *nvcc_flags],
        },
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )
    # CppExtension adds c10 and torch, which no stable symbol comes from.
    extension.libraries = [*libraries, "torch_cpu"]
    return extension


class EngineLibrary(Extension):
    """A library for an inference engine: of ``_C`` the kernels, compiled once, and no torch."""

    def __init__(
        self, name: str, file: str, flags: Sequence[str] = (), link_flags: Sequence[str] = ()
    ) -> None:
        super().__init__(
            name,
            sources("csrc/engines/operators.cpp", file),
            include_dirs=[str(ROOT / "csrc/core/include")],
            extra_compile_args=["-O3", "-g0", "-std=c++20", *HOST_FLAGS, *flags],
            extra_link_args=[*LINK_FLAGS, *link_flags],
            language="c++",
            py_limited_api=True,
        )


def openvino() -> EngineLibrary | None:
    """The library for the OpenVINO package whose folder TOME_OPENVINO names, if it names one."""
    home = os.environ.get("TOME_OPENVINO", "0")
    if home == "0":
        return None
    names = ("libopenvino", "libopenvino_onnx_frontend", "libtbb")
    found = [sorted(Path(home, "libs").glob(f"{name}.so.*")) for name in names]
    if not all(found) or not Path(home, "include/openvino/openvino.hpp").is_file():
        raise SystemExit(
            "tome_ext: TOME_OPENVINO: expected 0 or the folder of an OpenVINO package, got "
            f"{home!r}\n  python -c 'import openvino; print(openvino.__path__[0])' prints it"
        )
    libraries = [str(files[-1]) for files in found]
    # As a system's headers, so that their warnings are not ours.
    flags = ["-isystem", str(Path(home, "include")), f"-ffile-prefix-map={home}=openvino"]
    return EngineLibrary("tome_ext._openvino", "csrc/engines/openvino.cpp", flags, libraries)


def extensions() -> list[Extension]:
    """``_C``, those of engines, and ``_C_cuda`` where it can be built."""
    built = [
        extension("tome_ext._C", sources(CORE, "csrc/torch/*.cpp")),
        EngineLibrary("tome_ext._onnxruntime", "csrc/engines/onnxruntime.cpp"),
    ]
    for_openvino = openvino()
    if for_openvino is not None:
        built.append(for_openvino)
    toolkit = cuda_toolkit()
    if toolkit is not None:
        home, libraries = toolkit
        # Torch guesses the toolkit from where nvcc lies on PATH; ours is checked.
        cpp_extension.CUDA_HOME = str(home)
        built.append(
            extension(
                "tome_ext._C_cuda",
                sources(
                    "csrc/core/cuda/*.cu",
                    "csrc/torch/cuda/*.cpp",
                    "csrc/torch/cuda/*.cu",
                    "csrc/torch/calls.cpp",  # the same calls and checks as the CPU's
                    "csrc/torch/checks.cpp",
                ),
                # The static CUDA runtime, as cuBLAS and cuDNN carry it: it shares contexts and
                # streams with torch's through the driver and needs no library of this machine.
                libraries=["torch_cuda", "cudart_static", "dl", "rt", "pthread"],
                library_dirs=[str(libraries)],
                include_dirs=[str(home / "include")],
                nvcc_flags=arch_flags(os.environ["TORCH_CUDA_ARCH_LIST"]),
            )
        )
    return built


class Build(build):
    """setuptools' build, into an empty folder.

    Whatever lies there goes into the wheel: a library of an earlier build with other switches, a
    module that has been renamed since. Objects lie elsewhere, and are used again.
    """

    def run(self) -> None:
        for package in {name.partition(".")[0] for name in self.distribution.packages}:
            folder = Path(self.build_lib, package).resolve()
            if folder.is_dir() and folder != ROOT / package:
                shutil.rmtree(folder)
        super().run()


class BuildLibraries(cpp_extension.BuildExtension):
    """Torch's builder, for libraries that register operators and are not Python modules."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return list(ext.export_symbols)  # no PyInit_*

    def build_extension(self, ext: Extension) -> None:
        if isinstance(ext, EngineLibrary):  # behind _C, whose objects it takes
            folder = os.path.abspath(self.build_temp)
            ext.extra_objects = self.compiler.object_filenames(sources(CORE), output_dir=folder)
        super().build_extension(ext)


setup(
    ext_modules=extensions(),
    cmdclass={"build": Build, "build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
