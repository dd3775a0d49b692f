"""The table runner: evaluations of a run side by side, in one process that ends with the runner."""

import subprocess
import sys
import time
from pathlib import Path

from examples.tables import folder

from .tables import ROOT, read


def write_jobs(folder_, bodies):
    """Jobs whose fairseq-eval-lm is what *bodies* say, in Python, by name."""
    jobs = [
        {"identity": [name], "arguments": [body], "log": str(folder_ / f"{name}.log"), "result": str(folder_ / name)}
        for name, body in bodies.items()
    ]
    folder.write_json(folder_ / "jobs.json", jobs)
    return folder_ / "jobs.json"


HELPERS = """
import os, pathlib, sys, time, types

def wait_for(condition):
    while not condition():
        time.sleep(0.01)

def figures():
    print("Evaluated 10 tokens in 1.0s (10.0 tokens/s)")
    print("Loss (base 2): 1.5, Perplexity: 2.83")
"""


def evaluator(jobs, at_once):
    """The process that evaluates *jobs*, each of them its argument as Python."""
    code = f"""{HELPERS}
from examples.tables import evaluate
eval_lm = types.SimpleNamespace(cli_main=lambda: exec(sys.argv[1], globals()))
fairseq_cli = types.SimpleNamespace(eval_lm=eval_lm)
sys.modules.update({{"fairseq_cli": fairseq_cli, "fairseq_cli.eval_lm": eval_lm, "lamemo_fairseq": types}})
sys.exit(evaluate.main(pathlib.Path({str(jobs)!r}), {at_once}))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_evaluations_side_by_side(tmp_path):
    """Each waits for the other; one that fails lets those that run end, and no other begin."""
    meets = "pathlib.Path({!r}).touch(); wait_for(pathlib.Path({!r}).exists); figures()"
    one, other, log = str(tmp_path / "one"), str(tmp_path / "other"), str(tmp_path / "c.log")
    bodies = {
        "a": meets.format(one, other),
        "b": meets.format(other, one),
        "c": "0 / 0",
        "d": f"wait_for(lambda: 'Zero' in pathlib.Path({log!r}).read_text()); time.sleep(1); figures()",
        "e": "figures()",
    }
    (tmp_path / "c.log").touch()
    ended = evaluator(write_jobs(tmp_path, bodies), 2)
    _, errors = ended.communicate(timeout=120)
    assert ended.returncode == 1 and f"its log is {log}" in errors
    assert [read(tmp_path / name)["loss"] for name in "abd"] == [1.5] * 3
    assert read(tmp_path / "a")["identity"] == ["a"] and not (tmp_path / "e.log").exists()


def test_evaluations_end_with_the_process_that_began_them(tmp_path):
    body = f"pathlib.Path({str(tmp_path)!r}, str(os.getpid()) + '.pid').touch(); time.sleep(60)"
    started = evaluator(write_jobs(tmp_path, {"a": body, "b": body}), 2)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.pid"))) < 2:
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    started.terminate()
    assert started.wait(120) == 128 + 15
    started.stderr.close()
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False
