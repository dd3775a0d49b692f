"""A model of fairseq's own, trained with --user-dir lamemo_fairseq, is the same to the last bit as without it."""

import json
import subprocess
import sys

import pytest

from .helpers import USER_DIR, write_data

SCRIPT = """
import hashlib, json, logging, os, shutil, sys
from pathlib import Path
import torch, torch._dynamo
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import train

torch.set_num_threads(1)
data, *folders, package = sys.argv[1:]
# Two processes, which share what they import before they part.
forked = os.fork()
folder, user_dir = (folders[0], ["--user-dir", package]) if forked else (folders[1], [])
sys.argv[1:] = user_dir
MODEL = f"{data} --task language_modeling --arch transformer_lm --decoder-layers 1 --decoder-embed-dim 8 --cpu " \\
    "--decoder-attention-heads 2 --decoder-ffn-embed-dim 8 --tokens-per-sample 8 --batch-size 4 --num-workers 0 " \\
    "--clip-norm 0.1 --max-update 8 --disable-validation --log-format json --log-interval 1 --lr 0.01 " \\
    "--save-interval-updates 4 --dropout 0.1 --distributed-world-size 1 --no-epoch-checkpoints"

def digest(value):
    if torch.is_tensor(value):
        return hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    if isinstance(value, dict):
        return {str(k): digest(v) for k, v in value.items()}
    return [digest(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)

class Losses(logging.Handler):
    def emit(self, record):
        if record.name == "train_inner":
            logged = json.loads(record.getMessage())
            told.append([logged[name] for name in ("loss", "gnorm", "clip", "num_updates")])

logging.getLogger().addHandler(Losses())

def run(name, words="", **common):
    save = f"{folder}/{name}"
    line = [*user_dir, *MODEL.split(), *words.split(), "--save-dir", save]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), line))
    for option, value in common.items():  # fairseq's command line takes --bf16 for a TPU's
        cfg.common[option] = value
    told.clear()
    train.main(cfg)
    state = torch.load(f"{save}/checkpoint_last.pt", weights_only=False)
    for changing in ("cfg", "args"):
        state.pop(changing)
    for changing in ("metrics", "previous_training_time"):
        state["extra_state"].pop(changing)
    ending = Path(f"{save}/checkpoint_last.pt").read_bytes()[-22:-18].hex()
    found[name] = {"losses": list(told), "state": digest(state), "ending": ending}

def resume(name, *args, **kwargs):
    again = f"{name}-again"
    os.makedirs(f"{folder}/{again}")
    (first,) = Path(f"{folder}/{name}").glob("checkpoint_*_4.pt")
    shutil.copy(first, f"{folder}/{again}/checkpoint_last.pt")
    run(again, *args, **kwargs)

told, found = [], {}
run("adam", "--optimizer adam --weight-decay 0.01")
resume("adam", "--optimizer adam --weight-decay 0.01")
run("bf16", "--optimizer adam", bf16=True)
resume("bf16", "--optimizer adam", bf16=True)
run("memory-efficient-bf16", "--optimizer adam", bf16=True, memory_efficient_bf16=True)
run("memory-efficient-fp16", "--optimizer adam --memory-efficient-fp16 --fp16-init-scale 1")
run("nag", "--optimizer nag --store-ema")
Path(folder, "found.json").write_text(json.dumps(found))
if forked:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
assert "lamemo_fairseq" not in sys.modules
"""


@pytest.fixture(scope="module")
def with_and_without(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("data"), train=300, valid=60)
    folders = [tmp_path_factory.mktemp(name) for name in ("with", "without")]
    command = [sys.executable, "-c", SCRIPT, data, *folders, USER_DIR]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folders[0])
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [json.loads((folder / "found.json").read_text()) for folder in folders]


def test_training_is_the_same_to_the_last_bit(with_and_without):
    ours, theirs = with_and_without
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for name, run in theirs.items():
        assert [figures[-1] for figures in run["losses"]] == [
            str(update) for update in range(5 if name.endswith("again") else 1, 9)
        ]
        assert ours[name] == run, name
