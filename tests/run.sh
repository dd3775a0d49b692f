#!/usr/bin/env bash
# The whole test suite, in a fresh clone or an old one: bash tests/run.sh [options of pytest]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash examples/install.sh .venv
bin=$PWD/.venv/bin
echo "== format, lint, types"
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
echo "== tests"
# Two files at a time: most tests run on one core.
exec "$bin/python" -m pytest -n 2 --dist loadfile "$@"
