#!/usr/bin/env bash
# Everything that only a GPU can show, in a few minutes and without network. See gpu_run.py.
#
#   bench/gpu.sh [--minutes 4] [--wheel FILE] [--check-binary FILE] [--bench-binary FILE]
#                [--out FOLDER] [--stages machine,check,...] [--rows NAME,...] [--dry-run]
#
# Runs in the Python of $PYTHON (default python3), which needs torch with CUDA, timm, pytest,
# pytest-xdist, hypothesis and numpy. What is not given is built first, for this GPU only.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_run.py" "$@"
