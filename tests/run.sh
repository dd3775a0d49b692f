#!/usr/bin/env bash
# The whole test suite, in a fresh clone or an old one: bash tests/run.sh [options of pytest] [files]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONDONTWRITEBYTECODE # a hundred processes would each compile fairseq and torch, five seconds a process
export OMP_NUM_THREADS=1      # two processes share the cores, and numpy's threads spin while they wait
bash examples/install.sh .venv
bin=$PWD/.venv/bin
types=$(mktemp)
"$bin/mypy" >"$types" 2>&1 & # beside the rest, which leaves a core idle now and then
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$types"' EXIT
# For the tests of an extra that examples do without; it needs Python 3.11.
"$bin/python" -c 'import transformers' 2>/dev/null ||
    "$bin/python" -m pip install --disable-pip-version-check --no-compile -q -c constraints.txt "transformers; python_version >= '3.11'"
echo "== format, lint"
"$bin/ruff" format --check .
"$bin/ruff" check .

options=() core=() others=()
for argument in "$@"; do
    case $argument in
        tests/core | tests/core/*) core+=("$argument") ;;
        tests | tests/) core+=(tests/core) others+=(tests) ;;
        tests/*) others+=("$argument") ;;
        *) options+=("$argument") ;;
    esac
done
if [[ ${#core[@]} == 0 && ${#others[@]} == 0 ]]; then
    core=(tests/core) others=(tests)
fi

selected=0 failed=0
run() {  # pytest, two files at a time: most tests run on one core
    local status=0
    "$bin/python" -m pytest -n 2 --dist loadfile "$@" || status=$?
    case $status in
        0) selected=1 ;;
        5) ;;  # nothing was selected, which is no failure if the other run selected something
        *) selected=1 failed=$status ;;
    esac
}
# In a process of their own: the core's tests block fairseq.
if [[ ${#core[@]} != 0 ]]; then
    echo "== tests of the core, without fairseq"
    run "${core[@]}" ${options[@]+"${options[@]}"}
fi
if [[ ${#others[@]} != 0 ]]; then
    echo "== tests"
    run --ignore tests/core "${others[@]}" ${options[@]+"${options[@]}"}
fi
echo "== types"
wait "$checker" || failed=$?
cat "$types"
[[ $failed != 0 || $selected == 1 ]] || exit 5
exit "$failed"
