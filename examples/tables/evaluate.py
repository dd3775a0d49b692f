"""Several calls of fairseq-eval-lm at the price of one start, each in a fork of a process that has imported everything.

Used by the runner: `python -m examples.tables.evaluate JOBS.json`, a list of objects with `arguments` (those of
fairseq-eval-lm), `log` and `result`, the files to write.
"""

import json
import os
import sys
from pathlib import Path
from typing import List, Tuple

from . import logs
from .folder import write_json
from .process import in_gib


def main(jobs: Path) -> int:
    # Imported here, before the forks; neither touches a GPU.
    import fairseq_cli.eval_lm  # noqa: F401

    import lamemo_fairseq  # noqa: F401

    for job in json.loads(jobs.read_text(encoding="utf-8")):
        log = Path(job["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        code, host_memory = _in_a_fork(job["arguments"], log)
        if code:
            print(f"fairseq-eval-lm ended with {code}; its log is {log}", file=sys.stderr)
            return 1
        found = logs.evaluation(log)
        result = {"identity": job["identity"], **found, "host_memory_gib": host_memory}
        write_json(Path(job["result"]), result)
    return 0


def _in_a_fork(arguments: List[str], log: Path) -> Tuple[int, float]:
    pid = os.fork()
    if pid == 0:
        os._exit(_evaluate(arguments, log))
    _, status, usage = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), in_gib(usage.ru_maxrss)


def _evaluate(arguments: List[str], log: Path) -> int:
    import logging
    import traceback

    import torch
    from fairseq_cli import eval_lm

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for handler in logging.root.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stdout)
    sys.argv = ["fairseq-eval-lm", *arguments]
    try:
        eval_lm.cli_main()
        if torch.cuda.is_initialized():
            print(f"{logs.DEVICE_MEMORY}{torch.cuda.max_memory_allocated() / 2**30:.3f} GiB", flush=True)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
