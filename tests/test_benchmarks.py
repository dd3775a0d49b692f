"""The benchmarks run; what they measure is not looked at."""

import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fairseq.logging.progress_bar import format_stat

FOLDER = Path(__file__).parent.parent / "examples" / "benchmarks"
ON_A_DEVICE = ("attention", "decoding", "reading", "training", "scaling")


@pytest.mark.parametrize(
    ("command", "row"),
    [
        (
            "training.py quickstart --device cpu --steps 3 --paths lamemo-eager",
            r"\| quickstart \| lamemo-eager \| [\d,]+ \| [\d,]+ \|",
        ),
        (  # no efficiency where one rank has not been measured
            "scaling.py quickstart --device cpu --steps 4 --paths lamemo-eager --worlds 2 --backends legacy_ddp "
            "--options '--batch-size 2 --num-workers 0'",
            r"\| 2 \| [\d,]+ \|  \|  \|",
        ),
    ],
)
def test_a_benchmark_prints_its_figures(command, row):
    script, *options = shlex.split(command)
    done = subprocess.run(
        [sys.executable, FOLDER / script, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert re.search(row, done.stdout), done.stdout + done.stderr[-2000:]
    if script == "training.py":
        assert done.stderr.splitlines()[-1] == "quickstart lamemo-eager: update 3 of 3"
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("attention.py --shape 2,2,8,16,16 --device cpu", "| PyTorch's, bias written out | "),
        ("decoding.py --length 8 --segments 1 --memory lookahead", "batch 1: cached"),
        (
            "reading.py tiny --device cpu --dtype float32 --length 8 --segments 8 --repeats 1 --memory lookahead",
            "1 x 8 (eager): bits are the same",
        ),
    ],
)
def test_a_benchmark_without_processes_of_its_own_prints_its_figures(command, row, monkeypatch, capsys):
    script, *options = command.split()
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert row in capsys.readouterr().out


@pytest.mark.parametrize("script", ON_A_DEVICE)
def test_a_gpu_that_is_not_there_is_refused_in_one_line(script):
    absent = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    command = [sys.executable, FOLDER / f"{script}.py", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, env=absent)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("--device cuda: ") and done.stderr.endswith("here, pass --device cpu\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((f"{script}.py --device cud", "argument --device: invalid choice: 'cud'") for script in ON_A_DEVICE),
        *((f"{script}.py enwik9", "argument sizes: invalid choice: 'enwik9'") for script in ON_A_DEVICE[2:]),
        ("training.py --paths lamemo-graph", "argument --paths: invalid choice: 'lamemo-graph'"),
        ("reading.py --memory look-ahead", "argument --memory: invalid choice: 'look-ahead'"),
        ("softmax.py x", "argument words: invalid int value: 'x'"),
        ("steps.py table.yaml", "the following arguments are required: row: --help describes them"),
        ("plot.py", "the following arguments are required: results, figure: --help describes them"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(command, message, monkeypatch, capsys):
    """Without argparse's usage before it."""
    words = command.split()
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / words[0]), run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{words[0]}: error: {message}")


def test_training_says_how_far_it_is_and_refuses_too_few_steps(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import training

    told = []
    progress = training.Progress(told.append, 60)
    for name, text in (("train_inner", '{"loss": "2", "num_updates": "10"}'), ("train", '{"train_num_updates": "20"}')):
        progress.emit(logging.makeLogRecord({"name": name, "msg": text}))
    assert told == ["update 10 of 60"]
    monkeypatch.setattr(sys, "argv", ["training.py", "--device", "cpu", "--steps", "2"])
    with pytest.raises(SystemExit, match="--steps 2: pass 3 or more"):
        training.main()


def test_softmaxes_of_fewer_words_than_the_first_cutoff_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["softmax.py", "50000", "20000"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit):
        runpy.run_path(str(FOLDER / "softmax.py"), run_name="__main__")
    assert "error: words: 20000 is too few, the adaptive softmax begins above 20,000" in capsys.readouterr().err


def test_efficiency_is_the_rate_over_that_of_one_rank_times_the_ranks(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import scaling

    monkeypatch.setattr(scaling, "train", lambda size, path, world, *_: {"tok/s": {1: 100.0, 2: 150.0}[world]})
    command = "scaling.py quickstart --device cpu --steps 4 --paths lamemo-eager --worlds 1 2 --backends legacy_ddp"
    monkeypatch.setattr(sys, "argv", command.split())
    scaling.main()
    printed = capsys.readouterr().out
    assert "| quickstart | lamemo-eager |  | 1 | 100 | 100.0% |" in printed
    assert "| quickstart | lamemo-eager | legacy_ddp | 2 | 150 | 75.0% |" in printed


@pytest.mark.parametrize(("device", "shown"), [("cpu", ""), ("cuda", "0,1")])
def test_ranks_on_a_cpu_see_no_gpu(device, shown, monkeypatch, tmp_path):
    """Also where there are some: fairseq asks for them without regard to --cpu."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import scaling

    seen = []

    def run(command, env, **_):
        seen.append(("--cpu" in command, env["CUDA_VISIBLE_DEVICES"]))
        for rank in (0, 1):
            (tmp_path / f"rank{rank}").write_text("{}")
        return SimpleNamespace(returncode=0, stdout='{"wps": "10"}\n' * 4, stderr="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(scaling.subprocess, "run", run)
    args = SimpleNamespace(steps=4, device=device, options="")
    assert scaling.train("quickstart", "lamemo-eager", 2, "legacy_ddp", args, str(tmp_path))["tok/s"] == 10
    assert seen == [(device == "cpu", shown)]


@pytest.mark.parametrize("rate", [7, 98765, 1176610, 21000000])
def test_rates_are_read_as_fairseq_writes_them(rate):
    shown = format_stat(rate)  # from a million with an exponent
    reader = "import sys; from training import speeds; print(speeds(sys.stdin.read()))"
    log = f'{{"wps": "{shown}", "ups": "1"}}\n' * 3
    found = subprocess.run([sys.executable, "-c", reader], input=log, capture_output=True, text=True, cwd=FOLDER)
    assert found.stdout == f"{[float(shown)] * 3}\n", found.stderr[-2000:]


def test_the_parts_of_a_step(monkeypatch):
    """Two steps of 50 us each: kernels side by side, a collective half of which runs alone, and a wait of the host.

    What lies before the first mark does not count, nor what lies behind the last.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    import timeline

    def event(cat, name, ts, dur, correlation=0):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"correlation": correlation}}

    trace = [
        event("kernel", "gemm", -100, 20),
        event("cuda_runtime", "cudaEventSynchronize", -70, 60),
        event("cuda_runtime", "cudaLaunchKernel", -20, 5, correlation=1),
        event("kernel", "at::cuda::spin_kernel(long)", 0, 1, correlation=1),
        event("kernel", "gemm", -10, 40),
        event("kernel", "softmax", 10, 10),
        event("gpu_memcpy", "Memcpy HtoD", 30, 10),
        event("kernel", "ncclDevKernel_AllReduce", 20, 40),
        event("cuda_runtime", "cudaEventSynchronize", 10, 20),
        event("cuda_runtime", "cudaLaunchKernel", 80, 5, correlation=2),
        event("kernel", "at::cuda::spin_kernel(long)", 100, 1, correlation=2),
        event("kernel", "gemm", 101, 20),
        {"name": "no event of the device", "ts": 0},
    ]
    assert {name: round(1e3 * value, 9) for name, value in timeline.parts(trace, updates=2).items()} == {
        "host ms": 35, "reduction ms": 20, "exposed ms": 10, "idle ms": 20,
    }  # fmt: skip


def test_a_lead_is_by_seed_and_told_beside_the_last_point(monkeypatch, tmp_path):
    from examples.books import lead

    perplexities = {"lamemo": {1: 90.0, 2: 95.0}, "transformer_xl": {1: 100.0}, "transformer_xl_longer": {2: 76.0}}
    stored = {
        f"{row}-{seed}": {
            "run": {"row": row, "seed": seed},
            "training": {"updates": 1000, "tokens_an_update": 2e4},
            "evaluations": {"test": {"perplexity": perplexity}},
        }
        for row, by_seed in perplexities.items()
        for seed, perplexity in by_seed.items()
    }
    monkeypatch.setattr(lead.kept, "read", lambda path: stored)
    assert lead.leads("books/words", "transformer_xl") == (20, [pytest.approx(10)])
    for key, value, told in (
        ("training", {"updates": 900, "tokens_an_update": 2e4}, "several updates or tokens an update of LaMemo"),
        ("run", {"row": "lamemo", "seed": 2, "data": {"size": 1}}, "several data"),
        ("evaluations", {"test": {"perplexity": 95.0, "identity": []}}, "several options of the test evaluation"),
        ("run", {"row": "lamemo_2n", "seed": 2}, "no seed of both rows"),
    ):
        other = {**stored, "lamemo-2": {**stored["lamemo-2"], key: value}}
        other |= {"xl-2": {**stored["transformer_xl-1"], "run": {"row": "transformer_xl", "seed": 2}}}
        opponent = "transformer_xl_longer" if "no seed" in told else "transformer_xl"
        monkeypatch.setattr(lead.kept, "read", lambda path, other=other: other)
        with pytest.raises(ValueError, match=f"examples/books/words/results/runs.jsonl has .*{told}"):
            lead.leads("books/words", opponent)
    monkeypatch.setattr(lead.kept, "read", lambda path: stored)
    monkeypatch.setattr(sys, "argv", ["lead", str(tmp_path / "lead.svg")])
    lead.main()
    drawn = (tmp_path / "lead.svg").read_text()
    assert "at equal tokens: 10.0% ahead" in drawn and "at equal time: 25.0% behind" in drawn
