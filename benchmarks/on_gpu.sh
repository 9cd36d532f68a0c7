#!/bin/sh
# Proves and measures cvfast on this machine's NVIDIA GPU; needs PyTorch, and no network.
#
#   benchmarks/on_gpu.sh --out DIR [--stages build,test,...] [--budget SECONDS]
#   benchmarks/on_gpu.sh --plan      what it would run; needs no GPU
#
# PYTHON chooses the interpreter that has PyTorch (default python3). See docs/on_gpu.md.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec "${PYTHON:-python3}" "$here/on_gpu.py" "$@"
