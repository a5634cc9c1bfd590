#!/usr/bin/env bash
# Everything that only a GPU can show, in one go and without network: tests, compute-sanitizer,
# measurements. Under 9 minutes on one GPU.
#
#   bench/gpu.sh [--wheel FILE] [--out FOLDER] [--dry-run]
#
# Runs in the Python of $PYTHON (default python3), which needs torch with CUDA, pytest, hypothesis and
# numpy. Installs the wheel, or builds one from this folder, into FOLDER/package (default
# build-gpu/), and writes there: pytest.log, sanitizer-*.log, gpu.json and gpu-cpp.json.
# With --dry-run no GPU is needed: everything is built and loaded, the GPU tests are only collected,
# each benchmark runs once on the CPU, and every figure stays null.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0"; }
fail() { printf 'gpu.sh: %s\n' "$*" >&2 && exit 1; }

PY="${PYTHON:-python3}"
OUT="$PWD/build-gpu"
WHEEL=""
DRY=0
while [ $# -gt 0 ]; do
    case "$1" in
        --wheel) WHEEL="$(realpath "${2:?--wheel needs a file}")" && shift 2 ;;
        --out) OUT="$(realpath -m "${2:?--out needs a folder}")" && shift 2 ;;
        --dry-run) DRY=1 && shift ;;
        -h | --help) usage && exit 0 ;;
        *) usage >&2 && fail "unknown argument: $1" ;;
    esac
done

STARTED=$SECONDS
section() { printf '\n=== %s  (after %d s)\n' "$*" "$((SECONDS - STARTED))"; }
export PYTHONDONTWRITEBYTECODE=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" TOME_CUDA=1
mkdir -p "$OUT"
TESTS="$PWD/tests/python"
BENCH="$PWD/bench"

section "Machine"
"$PY" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
if [ "$DRY" = 0 ]; then
    nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv,noheader
    # One architecture builds sooner.
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)}"
else
    TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}"
fi
export TORCH_CUDA_ARCH_LIST

if [ -z "$WHEEL" ]; then
    section "Build for $TORCH_CUDA_ARCH_LIST"
    rm -rf "$OUT/wheel"
    "$PY" -m pip wheel -q . --no-deps --no-build-isolation --no-index --wheel-dir "$OUT/wheel"
    WHEEL="$(ls "$OUT"/wheel/tome_ext-*.whl)"
fi
rm -rf "$OUT/package"
"$PY" -m pip install -q --no-deps --no-index --target "$OUT/package" "$WHEEL"
export PYTHONPATH="$OUT/package"
cd "$OUT"  # not the source folder, whose package has no library
"$PY" -c 'import tome_ext; from tome_ext import _library; print(_library.cuda_status())
assert _library.cuda_status().startswith("loaded")'

section "pytest -m cuda"
if [ "$DRY" = 0 ]; then
    TOME_REQUIRE_CUDA=1 "$PY" -m pytest -q -p no:cacheprovider -c "$TESTS/../../pyproject.toml" \
        -m cuda "$TESTS/test_cuda.py" 2>&1 | tee pytest.log
else
    "$PY" -m pytest -q -p no:cacheprovider -c "$TESTS/../../pyproject.toml" "$TESTS/test_cuda.py" \
        2>&1 | tee pytest.log
fi

section "compute-sanitizer"
if [ "$DRY" = 0 ]; then
    command -v compute-sanitizer > /dev/null || fail "compute-sanitizer, of the CUDA toolkit, is not on PATH"
    for tool in memcheck racecheck synccheck; do
        # Torch's allocator would hide what is out of bounds.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            --kernel-regex kns=tome "$PY" "$BENCH/gpu_ops.py" --exercise > "sanitizer-$tool.log" 2>&1 ||
            { tail -n 40 "sanitizer-$tool.log" && fail "$tool found errors"; }
        tail -n 1 "sanitizer-$tool.log"
    done
else
    "$PY" "$BENCH/gpu_ops.py" --dry-run --exercise && echo "not run: no GPU"
fi

section "Without torch"
"${CUDA_HOME:+$CUDA_HOME/bin/}nvcc" -std=c++20 -O3 \
    -gencode "arch=compute_${TORCH_CUDA_ARCH_LIST//./},code=sm_${TORCH_CUDA_ARCH_LIST//./}" \
    -I"$BENCH/../csrc/core/include" -I"$BENCH/../csrc/core/cuda" \
    "$BENCH/cpp/bench_cuda.cu" "$BENCH"/../csrc/core/cuda/*.cu -o bench_cuda
if [ "$DRY" = 0 ]; then ./bench_cuda | tee gpu-cpp.json; else ./bench_cuda --dry-run > gpu-cpp.json; fi

section "Measurements"
if [ "$DRY" = 0 ]; then
    "$PY" "$BENCH/gpu_ops.py" --json gpu.json --cpp gpu-cpp.json
else
    "$PY" "$BENCH/gpu_ops.py" --dry-run --json gpu.json --cpp gpu-cpp.json
fi
section "Done: $OUT/gpu.json"
