"""A tiny table, its runner in this process, and files of tables and of results that tests change."""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import yaml

from examples.tables import __main__ as runner
from examples.tables import process, table

from .processes import _FORKS

ROOT = Path(__file__).parent.parent

TINY = """
title: Tiny
data: {data}
measure: bits-per-character
streams: 4
options:
  user-dir: lamemo_fairseq
  task: segment_language_modeling
  tokens-per-sample: 16
  mem-len: 16
  decoder-layers: 2
  decoder-embed-dim: 16
  decoder-attention-heads: 2
  decoder-ffn-embed-dim: 32
  optimizer: adam
  lr: 0.02
  lr-scheduler: cosine
  max-update: 12
  no-epoch-checkpoints: true
  num-workers: 0
  cpu: true
  log-format: json
  log-interval: 1
evaluation:
  options: {{batch-size: 2}}
  memory: {{subset: test, lengths: [0, 32]}}
rows:
  transformer_xl:
    title: Transformer-XL
    options: {{arch: transformer_xl_lm}}
    paper: {{test: 1.25, source: a paper}}
    sweeps: false
  lamemo:
    title: LaMemo
    options: {{arch: lamemo_lm}}
    without_memory: {{memory: none, position_encoding: transformer-xl}}
"""


def content(**changes):
    """A table with every text that is rendered, as its file would say it."""
    found = {
        "title": "T", "data": "d", "measure": "perplexity", "streams": 2, "options": {"lr": 0.1},
        "evaluation": {"subsets": ["valid", "test"], "memory": {"subset": "test", "lengths": [0, 8]}},
        "rows": {"a": {"title": "A", "paper": {"test": 1.0, "source": "S"}}},
    }  # fmt: skip
    return {**found, **changes}


def load(path, **changes):
    path.write_text(yaml.safe_dump(content(**changes), allow_unicode=False))
    return table.load(path)


def result(row="a", **changes):
    """A complete line of a file of results."""
    figures = {"loss": 1.0, "perplexity": 2.0, "identity": []}
    found = {
        "run": {"row": row, "seed": 1, "streams": 2, "options": {"--lr": 0.1}, "data": {}},
        "training": {"parameters": 1, "curve": [[1, 2.0]]},
        "evaluations": dict.fromkeys(("valid", "test", "test-memory-0", "test-memory-8"), figures),
        "scale": None,
        "starts": [{"device": "D", "versions": {"torch": "2"}, "commit": None, "changed_files": None}],
    }
    return {**found, **changes}


def fork(argv, log, environment, keep_open=(), watch=lambda: None):
    """`process.run` at a fraction of the time: in a fork of a process that has imported everything."""
    log.parent.mkdir(parents=True, exist_ok=True)
    worker = _FORKS.Process(target=_main, args=(argv[2], argv[3:], log))
    worker.start()
    worker.join()
    return process.Ended(worker.exitcode, 0.5)


def _main(module, arguments, log):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run(tiny, *arguments):
    return runner.main([str(tiny), "--out", str(tiny.parent / "out"), *map(str, arguments)])


def read(path):
    return json.loads(path.read_text())
