#!/usr/bin/env bash
# One build of the CPU extension, loaded and tested under several versions of PyTorch.
#
#   tests/check_stable_abi.sh [VERSION ...]     default: 2.13.0 2.11.0, the oldest one supported
#
# PYTHON   interpreter with torch, setuptools and ninja that builds the wheel and makes the
#          environments (default: .venv/bin/python)
#
# Downloads each version, some of them gigabytes, into a temporary folder that is deleted at the end.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
versions=("$@")
[ $# -gt 0 ] || versions=(2.13.0 2.11.0)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_QUIET=1

digest() { sha256sum "$1" | cut -d ' ' -f 1; }

# A copy: the build must leave the checkout's own, and the tests must not find its sources.
mkdir "$work/source" "$work/checks"
cp -r "$root"/{setup.py,pyproject.toml,README.md,LICENSE,csrc,cvfast} "$work/source"
rm -f "$work"/source/cvfast/_C_*.so
cp -r "$root"/{pyproject.toml,tests} "$work/checks"

bin=$(dirname "$("$python" -c 'import sys; print(sys.executable)')")
PATH="$bin:$PATH" CVFAST_CUDA=0 "$python" -m pip wheel --no-build-isolation --no-deps \
    --wheel-dir "$work" "$work/source"
wheel=$(echo "$work"/cvfast-*.whl)
unzip="import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract('cvfast/_C_cpu.so', sys.argv[2])"
"$python" -c "$unzip" "$wheel" "$work/built"
expected=$(digest "$work/built/cvfast/_C_cpu.so")
echo "built $(basename "$wheel") with torch $("$python" -c 'import torch; print(torch.__version__)')," \
    "_C_cpu.so sha256 $expected"

# The versions of the test tools that the project pins.
tools=$(grep -hE '^(pytest|hypothesis|numpy)==' "$root"/requirements/*.txt)
for version in "${versions[@]}"; do
    env=$work/torch-$version
    "$python" -m venv "$env"
    # shellcheck disable=SC2086  # one argument per tool
    "$env/bin/python" -m pip install "torch==$version" $tools
    "$env/bin/python" -m pip install --no-deps "$wheel"
    cd "$work/checks"
    library=$("$env/bin/python" -c \
        'import cvfast, pathlib; print(pathlib.Path(cvfast.__file__).parent / "_C_cpu.so")')
    case $library in "$env"/*) ;; *) echo "cvfast was imported from $library" >&2; exit 1 ;; esac
    [ "$(digest "$library")" = "$expected" ] || { echo "$library is another file" >&2; exit 1; }
    echo "torch $("$env/bin/python" -c 'import torch; print(torch.__version__)'): same _C_cpu.so"
    "$env/bin/pytest" -q -p no:cacheprovider tests/ops
    cd "$root"
    rm -rf "$env"
done
