"""Runs in one process that stop and go on, of a tiny model."""

import copy

import fairseq_cli.train
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from .helpers import TASK, write_data

SEGMENTS = 6  # an epoch, with four streams
MODEL = [
    "--arch", "lamemo_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-attention-heads", 1,
    "--decoder-ffn-embed-dim", 8, "--tokens-per-sample", 8, "--mem-len", 8, "--batch-size", 4,
]  # fmt: skip
RUN = ["--num-workers", 0, "--log-format", "none", "--save-interval-updates", 4, "--max-update", 14]
ADAM = ["--optimizer", "adam", "--lr", 5e-3]
PLATEAU = ["--lr-scheduler", "reduce_lr_on_plateau", "--lr-threshold", 0.9, "--lr-shrink", 0.5]


def two_folders(folder):
    """Data of two texts with one dictionary."""
    for number in (1, 2):
        write_data(folder / str(number), train=4 * SEGMENTS * 8 - 6 * number, valid=60, seed=number)
        (folder / str(number) / "dict.txt").write_text((folder / "1" / "dict.txt").read_text())
    return folder


def configured(data, *arguments):
    given = [str(a) for a in (data, *TASK, *MODEL, *RUN, *arguments)]
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), given))


def as_in_a_new_process():
    """fairseq keeps the best loss and the count of --patience as attributes of functions."""
    for function in (checkpoint_utils.save_checkpoint, fairseq_cli.train.should_stop_early):
        for name in ("best", "num_runs"):
            vars(function).pop(name, None)


def train(cfg, folder):
    cfg = copy.deepcopy(cfg)
    cfg.checkpoint.save_dir = str(folder)
    as_in_a_new_process()
    fairseq_cli.train.main(cfg)


def read(folder, name="checkpoint_last.pt"):
    return torch.load(folder / name, weights_only=False)
