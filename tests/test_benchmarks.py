"""The benchmarks run; what they measure is not looked at."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("training.py quickstart --device cpu --steps 3 --paths lamemo-eager", "| quickstart | lamemo-eager |"),
        (
            "scaling.py quickstart --device cpu --steps 4 --paths lamemo-eager --worlds 1 --backends legacy_ddp",
            "| quickstart | lamemo-eager |  | 1 |",
        ),
        ("decoding.py --length 8 --segments 1 --memory lookahead", "batch 1: cached"),
    ],
)
def test_a_benchmark_prints_its_figures(command, row):
    script, *options = command.split()
    done = subprocess.run(
        [sys.executable, FOLDER / script, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert row in done.stdout, done.stdout + done.stderr[-2000:]
