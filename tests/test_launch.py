"""The launch lines of docs/several_machines.md do what it says: those for CPUs are run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from fairseq.dataclass.configs import DistributedTrainingConfig
from fairseq.distributed import utils as distributed_utils

from .helpers import noise, write_data
from .processes import output_of, train_in_processes

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "several_machines.md").read_text()
OPTIONS = (
    "--user-dir lamemo_fairseq --task segment_language_modeling --arch lamemo_lm --decoder-layers 2 "
    "--decoder-embed-dim 16 --decoder-attention-heads 2 --decoder-ffn-embed-dim 32 --tokens-per-sample 16 "
    "--mem-len 16 --batch-size 2 --optimizer adam --lr 5e-3 --max-update 12 --num-workers 0 "
    "--log-format simple --log-interval 1"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=1000, valid=100)


def line_of(start: str) -> str:
    """The line of the page that begins so."""
    (line,) = re.findall(rf"^{re.escape(start)}.*$", PAGE, flags=re.MULTILINE)
    return line


def run(line: str, path: Path, **environment: str) -> str:
    """What a shell prints that runs the line with our commands, and *path* before those of the system."""
    commands = f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, "PATH": commands, "PWD": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def losses(text: str):
    return re.findall(r"loss=([\d.]+)", text)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """One rank with the four streams that two ranks have together."""
    folder = tmp_path_factory.mktemp("alone")
    options = OPTIONS.replace("--batch-size 2", "--batch-size 4").split()
    assert train_in_processes([data, "--cpu", *options, "--dropout", 0], folder) == [0], output_of(folder)[-2000:]
    return losses(output_of(folder))


def test_torchrun_on_cpus(data, alone, tmp_path):
    line = line_of("torchrun --nproc_per_node 2 --no-python fairseq-train").replace("data-bin/wikitext-103", str(data))
    printed = run(line.replace("...", f"{OPTIONS} --dropout 0 --save-dir {tmp_path}/checkpoints"), tmp_path)
    assert len(alone) == 12 and losses(printed) == alone
    assert noise(printed) == [] and "| fairseq-train " in printed  # both ranks' output
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    assert saved["cfg"]["distributed_training"]["distributed_world_size"] == 2


def test_torchrun_with_a_yaml_on_cpus(data, tmp_path):
    (block,) = re.findall(r"^(torchrun [^\n]* bash -c 'fairseq-hydra-train[^']*)'$", PAGE, flags=re.MULTILINE)
    block = block.replace("$PWD/data-bin/enwik8", str(data)).replace("batch_size=20", "batch_size=2")
    sizes = ["layers=2", "embed_dim=16", "attention_heads=2", "head_dim=8", "ffn_embed_dim=32"]
    options = [f"+model.decoder_{size}" for size in sizes]
    options += [
        "task.tokens_per_sample=16",
        "optimization.max_update=2",
        f"checkpoint.save_dir={tmp_path}/checkpoints",
    ]
    printed = run(f"{block} {' '.join(options)}'", tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    assert saved["cfg"]["distributed_training"]["distributed_world_size"] == 2
    assert re.search(r'"train_bsz": "4"', printed)  # the streams of both ranks


def test_slurm_on_cpus(data, alone, tmp_path):
    """With stand-ins for the two programs of SLURM that the line uses."""
    program(tmp_path / "scontrol", "#!/bin/sh\necho localhost\necho elsewhere\n")
    program(
        tmp_path / "srun",
        '#!/bin/bash\n[ "$1 $2 $3" = "--ntasks 2 --kill-on-bad-exit" ] || exit 3\nshift 3\nexport SLURM_NTASKS=2\n'
        'SLURM_PROCID=1 "$@" & SLURM_PROCID=0 "$@" && wait $!\n',
    )
    line = line_of("srun --ntasks 2").replace("data-bin/wikitext-103", str(data))
    line = line.replace("...", f"{OPTIONS} --dropout 0 --save-dir {tmp_path}/checkpoints").replace("29500", "29517")
    assert losses(run(line, tmp_path, SLURM_JOB_NODELIST="n[1-2]")) == alone


@pytest.mark.parametrize("rank", [0, 9])
def test_slurm_on_gpus(rank, monkeypatch):
    """What fairseq makes of the environment in which its line starts every process."""
    line = line_of("srun --nodes 2 --ntasks-per-node 8")
    world, port = re.search(r"--distributed-world-size (\d+) --distributed-port (\d+)", line).groups()
    environment = {"NODELIST": "n[1-2]", "NNODES": 2, "NTASKS_PER_NODE": 8, "PROCID": rank, "LOCALID": rank % 8}
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{'JOB_' if name == 'NODELIST' else ''}{name}", str(value))
    config = DistributedTrainingConfig(distributed_world_size=int(world), distributed_port=int(port), tpu=False)
    with (
        mock.patch.object(subprocess, "check_output", return_value=b"n1\nn2\n"),
        mock.patch.object(torch.cuda, "set_device") as device,
    ):
        distributed_utils.infer_init_method(config)
    assert (config.distributed_rank, config.distributed_world_size, config.device_id) == (rank, 16, rank % 8)
    assert config.distributed_init_method == "tcp://n1:29500" and config.distributed_no_spawn
    assert device.called == (rank % 8 > 0)


def test_torchrun_on_gpus(monkeypatch):
    line = line_of("torchrun --nnodes 2")
    world = int(re.search(r"--distributed-world-size (\d+)", line).group(1))
    for name, value in {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "11"}.items():
        monkeypatch.setenv(name, value)
    config = DistributedTrainingConfig(distributed_world_size=world, tpu=False)
    with (
        mock.patch.object(torch.cuda, "device_count", return_value=8),
        mock.patch.object(torch.cuda, "set_device"),
    ):
        distributed_utils.infer_init_method(config)
    assert (config.distributed_rank, config.distributed_world_size, config.device_id) == (11, 16, 3)
    assert config.distributed_init_method == "env://" and config.distributed_no_spawn


def hydra(data, folder):
    """The line for hydra, with options for a small model."""
    sizes = {"layers": 2, "embed_dim": 16, "attention_heads": 2, "head_dim": 8, "ffn_embed_dim": 32}
    small = [f"+model.decoder_{name}={value}" for name, value in sizes.items()]
    small += [
        "task.tokens_per_sample=16",
        "+model.mem_len=16",
        "dataset.batch_size=4",
    ]
    small += ["dataset.batch_size_valid=4", "optimization.max_update=5", f"checkpoint.save_dir={folder}/checkpoints"]
    small += ["common.cpu=true", "common.fp16=false", "common.bf16=true", f"hydra.run.dir={folder}"]
    return f"{line_of('fairseq-hydra-train').replace('$PWD/data-bin/enwik8', str(data))} {' '.join(small)}"


def test_hydra_with_bf16(data, tmp_path):
    run(hydra(data, tmp_path), tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "checkpoint_last.pt", weights_only=False)
    memory = saved["extra_state"]["train_iterator"]["memory"]
    assert memory["outputs"][0].dtype == torch.bfloat16
    assert memory["normalizers"][0].dtype == torch.float32


@pytest.mark.parametrize("asked", [False, True])
def test_hydra_prints_a_refusal_in_one_line_unless_asked_for_more(asked, data, tmp_path):
    environment = {"HYDRA_FULL_ERROR": "1"} if asked else {}
    line = f"{hydra(data, tmp_path)} dataset.batch_size=0 2>&1 | tail -n 2; echo ${{PIPESTATUS[0]}}"
    before, last, status = run(line, tmp_path, **environment).splitlines()
    assert last == f"{'ValueError: ' * asked}--batch-size is 0, it must be at least 1" and status == "1"
    assert before.startswith("Error executing job with overrides: ") != asked


def test_a_relative_path_is_not_there_under_hydra(data, tmp_path):
    relative = os.path.relpath(data, ROOT)
    line = f"{hydra(relative, tmp_path)} 2>&1 | tail -n 1; echo ${{PIPESTATUS[0]}}"
    last, status = run(line, tmp_path).splitlines()
    there = f"as hydra runs in another folder, {tmp_path}: pass an absolute path, such as task.data=$PWD/{relative}"
    assert last == f"the data folder {relative} is not there, {there}" and status == "1"


def test_processes_that_do_not_know_of_each_other_are_refused(data, tmp_path):
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}
    with pytest.raises(AssertionError, match=r"torchrun has started 2 processes, .*--distributed-world-size"):
        run(hydra(data, tmp_path), tmp_path, **torchrun)
    assert not (tmp_path / "checkpoints" / "checkpoint_last.pt").exists()
