"""The table runner: jobs for SLURM, printed on a machine that may lack the data and the environment."""

import shlex
import subprocess
import sys
from pathlib import Path

from examples.tables import __main__ as runner
from examples.tables import commands, execute, folder, table

from .tables import result, run


def test_jobs_for_slurm_are_what_is_missing(tiny, capsys):
    out = tiny.parent / "out"
    assert run(tiny, "--print-slurm", "--seeds", 1, 2, "--sbatch", "--time 1:00:00", "--set", "cpu=false") == 0
    made, *lines = capsys.readouterr().out.splitlines()
    assert made == f"mkdir -p {out}" and len(lines) == 4 and not out.exists()
    assert all(line.startswith("sbatch --job-name tiny-") and " --gpus-per-node 1 " in line for line in lines)
    words = shlex.split(lines[-1])
    assert words[-4:-2] == ["--time", "1:00:00"] and words[-2] == "--wrap" and "--requeue" in words
    job = runner.parser().parse_args(shlex.split(words[-1].split(" -m examples.tables ")[1]))
    assert (job.table, job.out, job.only, job.seeds, job.set) == (tiny, out, ["lamemo"], [2], ["cpu=false"])

    held = folder.RunFolder(out / "transformer_xl" / "seed-1")
    plan = execute.Plan(table.load(tiny), out, {"cpu": False})
    one = table.Run("transformer_xl", 1)
    held.claim(plan.identity(one))
    for evaluation in plan.evaluations(one):
        figures = {"loss": 1.0, "perplexity": 2.0, "identity": plan.evaluation_identity(one, evaluation)}
        folder.write_json(held.evaluated(evaluation.name), figures)
    folder.write_json(held.trained, result()["training"])
    folder.write_json(held.results, {})
    assert run(tiny, "--print-slurm", "--set", "cpu=false") == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]] == ["tiny-lamemo-1"]
    assert run(tiny, "--print-slurm", "--scale", 5) == 0
    (job,) = capsys.readouterr().out.splitlines()[1:]
    assert "--scale 5" in job and "--gpus-per-node" not in job


def test_jobs_are_printed_where_the_data_are_not(tiny, capsys):
    """What is complete is told by all but the data; a folder of another run is refused, as where the data are."""
    missing, out = ["--set", "data=/nowhere", "cpu=true"], tiny.parent / "out"
    plan = execute.Plan(table.load(tiny), out, {"cpu": True})
    one = table.Run("lamemo", 1)
    held = plan.folder(one)
    held.claim(plan.identity(one))
    folder.write_json(held.trained, result()["training"])
    assert run(tiny, "--print-slurm", *missing) == 0
    printed = capsys.readouterr()
    assert "# /nowhere is not on this machine" in printed.err
    jobs = printed.out.splitlines()[1:]
    assert len(jobs) == 2 and all("data=/nowhere" in job for job in jobs)
    assert run(tiny, "--print-slurm", *missing, "lr=0.1") == 1
    assert "holds another run: options --lr is 0.1, there it was 0.02. Ask" in capsys.readouterr().err
    assert run(tiny, *missing) == 1
    assert "/nowhere holds no dict.txt" in capsys.readouterr().err


def test_jobs_activate_an_environment(tiny, tmp_path, capsys, monkeypatch):
    """That which is given, as a folder or as a script, or else the active one; in the shell that runs jobs."""
    monkeypatch.chdir(tmp_path)
    (venv := tmp_path / "a venv" / "bin").mkdir(parents=True)
    (venv / "python").write_text('#!/bin/sh\necho "$MADE:$0:$*"\n')
    (venv / "python").chmod(0o755)
    (venv / "activate").write_text(f'MADE=venv PATH="{venv}:$PATH"; export MADE PATH\n')
    (tmp_path / "here.sh").write_text('. "a venv/bin/activate"; MADE=script\n')
    for given, made in (("a venv", "venv"), ("here.sh", "script")):
        assert run(tiny, "--print-slurm", "--only", "lamemo", "--environment", given) == 0
        job = shlex.split(capsys.readouterr().out.splitlines()[1])[-1]
        done = subprocess.run(["sh", "-c", job], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.startswith(f"{made}:{venv}/python:-m examples.tables {tiny}"), (job, done)
    monkeypatch.setattr(sys, "prefix", str(venv.parent))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert commands.activation(None) == venv / "activate"
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    job = shlex.split(commands.slurm("j", ["x"], 0, tmp_path, None, commands.activation(None)))[-1]
    assert job == f"{sys.executable} -m examples.tables x"
    for path, script in (("/absent/venv", "/absent/venv/bin/activate"), ("/absent/env.sh", "/absent/env.sh")):
        assert str(commands.activation(Path(path))) == script, "jobs may have what the login node has not"
