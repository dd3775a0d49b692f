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
        echo "$venv is there already and was not made by this script: move it away, and a new one is made there" >&2
        exit 1
    fi
    if [ "$(cat "$mark")" = "$stamp" ]; then exit 0; fi
    rm -rf "$venv"
fi
# Without a GPU, torch comes from its index of builds for CPUs: the default one for Linux brings gigabytes of CUDA.
index=() build="torch with CUDA, some gigabytes,"
if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    cpu=https://download.pytorch.org/whl/cpu build="torch for CPUs, 200 MB,"
    if "$python" -c "import urllib.request; urllib.request.urlopen('$cpu/torch/', timeout=10)" 2>/dev/null; then
        index=(--extra-index-url "$cpu")
    else
        build="torch, perhaps with gigabytes of CUDA as pytorch.org does not answer,"
    fi
fi
echo "== installing into $venv, some minutes the first time: $build fairseq and tools"
mkdir -p "$venv"
: >"$mark"
"$python" -m venv "$venv"
# Most of torch's modules are never imported: those that are get compiled then.
pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-compile -c "$root/constraints.txt" ${index[@]+"${index[@]}"})
tools=(numpy safetensors sentencepiece sacremoses pyyaml tqdm tensorboardX pytest pytest-xdist hypothesis ruff mypy matplotlib)
torch=torch==2.13.0
"${pip[@]}" -q --no-warn-conflicts "${tools[@]}" & # beside torch, which none of them needs and which lacks the rest by then
beside=$!
trap 'kill "$beside" 2>/dev/null || true' EXIT
"${pip[@]}" --no-deps "$torch" # alone, with a progress bar: it is the largest; what comes after is then content with it
wait "$beside"
"${pip[@]}" -q "$torch"
# torch's GPU builds bring the Triton that they need; with others the tests interpret its kernels on the CPU.
beside=
"$venv/bin/python" -c 'import triton' 2>/dev/null || { "${pip[@]}" -q "triton<=3.9.0" & beside=$!; }
case $("$venv/bin/python" -c 'import sys; print(sys.version_info.minor)') in
    11 | 12) "${pip[@]}" -q ve-fairseq ;;
    *) # compiles for some minutes; in isolation pip would fetch another torch, of gigabytes, to compile with
        "${pip[@]}" -q cython setuptools wheel numpy
        "${pip[@]}" -q --no-build-isolation fairseq-fixed
        ;;
esac
[ -z "$beside" ] || wait "$beside"
# Compiles the modules that a command imports, without Python's remarks on fairseq's syntax.
env -u PYTHONDONTWRITEBYTECODE "$venv/bin/python" -W ignore -c 'import fairseq_cli.train'
echo "$stamp" >"$mark"
