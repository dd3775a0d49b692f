#!/usr/bin/env bash
# Make a virtual environment with everything that the examples and the tests need.
#   bash examples/install.sh FOLDER      (PYTHON=python3.12 chooses the interpreter)
# Ends at once if the folder is complete, and starts over if it was left half made. A folder that
# this script did not make is left alone.
set -euo pipefail
venv=${1:?usage: bash examples/install.sh FOLDER}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}

"$python" - <<'CHECK' || exit 1
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"this is Python {sys.version.split()[0]}, and fairseq is built for 3.10 to 3.13: set PYTHON=/path/to/python3.11 (lamemo_fairseq.core needs torch alone)")
CHECK

stamp=$(cat "$root/constraints.txt" "${BASH_SOURCE[0]}" | sha256sum | cut -d' ' -f1)
mark=$venv/made-by-install.sh # there from the start, and empty until the end
if [ -e "$venv" ]; then
    if [ ! -e "$mark" ]; then
        echo "$venv is there already and was not made by this script: move it away, or name another folder" >&2
        exit 1
    fi
    if [ "$(cat "$mark")" = "$stamp" ]; then exit 0; fi
    rm -rf "$venv"
fi
echo "== installing into $venv (some minutes the first time)"
mkdir -p "$venv"
: >"$mark"
"$python" -m venv "$venv"
# Most of torch's modules are never imported: those that are get compiled then.
pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --no-compile -c "$root/constraints.txt" "$@"; }
# torch first: what comes after is then content with it.
pip torch
case $("$venv/bin/python" -c 'import sys; print(sys.version_info.minor)') in
    11 | 12) pip ve-fairseq ;;
    *) # compiles for some minutes; in isolation pip would fetch another torch, of gigabytes, to compile with
        pip cython setuptools wheel numpy
        pip --no-build-isolation fairseq-fixed
        ;;
esac
pip numpy safetensors sentencepiece sacremoses pyyaml tqdm pytest pytest-xdist hypothesis ruff mypy matplotlib
# torch's GPU builds bring the Triton that they need; with others the tests interpret its kernels on the CPU.
"$venv/bin/python" -c 'import triton' 2>/dev/null || pip "triton<=3.9.0"
echo "$stamp" >"$mark"
