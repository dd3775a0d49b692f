"""Run several calls of fairseq-eval-lm in forks of one process, which has imported everything.

The runner calls `python -m examples.tables.evaluate JOBS.json [AT_ONCE]`. A job has `arguments` (those of
fairseq-eval-lm), and the files to write, `log` and `result`. AT_ONCE jobs go side by side.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Dict, List

from . import logs
from .folder import write_json
from .process import in_gib


def main(jobs: Path, at_once: int = 1) -> int:
    # Imported here, before the forks; neither touches a GPU.
    import fairseq_cli.eval_lm  # noqa: F401

    import lamemo_fairseq  # noqa: F401

    waiting = json.loads(jobs.read_text(encoding="utf-8"))
    running: Dict[int, Any] = {}  # jobs by process
    failed = False

    def end(*_: Any) -> None:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    while running or (waiting and not failed):
        while waiting and not failed and len(running) < at_once:
            job = waiting.pop(0)
            running[_start(job)] = job
        pid, status, usage = os.wait3(0)
        if pid not in running:
            continue
        job, code = running.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            print(f"fairseq-eval-lm ended with {code}; its log is {job['log']}", file=sys.stderr)
            failed = True  # running jobs still finish
        else:
            measured = logs.evaluation(Path(job["log"]))
            result = {"identity": job["identity"], **measured, "host_memory_gib": in_gib(usage.ru_maxrss)}
            write_json(Path(job["result"]), result)
    return int(failed)


def _start(job: Dict[str, Any]) -> int:
    """Return the process of a job, a fork of this one."""
    log = Path(job["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(_evaluate(job["arguments"], log))
    return pid


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
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
