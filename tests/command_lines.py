"""Command lines, and a configuration of hydra's, read as fairseq's commands read them before they do anything else."""

import sys
from contextlib import nullcontext
from unittest import mock

from fairseq import options
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

from lamemo_fairseq.host import named_checkpoints
from lamemo_fairseq.host.option_rules import EVAL_LM, GENERATE, INTERACTIVE, TRAIN, VALIDATE

from .helpers import TASK

PARSERS = {
    TRAIN: (
        options.get_training_parser,
        ["--arch", "lamemo_lm", "--optimizer", "adam", "--lr", "1e-3", "--batch-size", "1"],
    ),
    EVAL_LM: (options.get_eval_lm_parser, ["--path", "x"]),
    VALIDATE: (options.get_validation_parser, ["--path", "x", "--batch-size", "1"]),
    GENERATE: (options.get_generation_parser, ["--path", "x"]),
    INTERACTIVE: (options.get_interactive_generation_parser, ["--path", "x"]),
}
SIZES = ["--tokens-per-sample", 8, "--num-workers", 0]


def read(command, *words, task=TASK):
    """The parser and the namespace of a command line; without a ``--path`` among the words, no checkpoint is read."""
    get, more = PARSERS[command]
    reading = nullcontext() if "--path" in words else mock.patch.object(named_checkpoints, "_files", lambda _: [])
    words = [str(word) for word in ("DATA", *task, *more, *words)]
    with mock.patch.object(sys, "argv", [command, *words]), reading:
        parser = get()
        return parser, options.parse_args_and_arch(parser, words)


def start_training(*words, arch="lamemo_lm", task=TASK, optimizer=("adam", 1e-3), streams=4):
    """Read a command line of training; a choice that is None is left out."""
    sizes = [*SIZES, *(["--batch-size", streams] if streams else [])]
    words = ["DATA", *task, *(["--arch", arch] if arch else []), *sizes, *words]
    if optimizer:
        words += ["--optimizer", optimizer[0], *(["--lr", optimizer[1]] if optimizer[1] else [])]
    words = [str(word) for word in words]
    with mock.patch.object(sys, "argv", [TRAIN, *words]):
        return options.parse_args_and_arch(options.get_training_parser(), words)


def configuration(data, **changes):
    """The configuration of a run as hydra composes it, with *changes* such as ``dataset__curriculum=1``."""
    cfg = OmegaConf.structured(FairseqConfig)
    OmegaConf.set_struct(cfg, False)
    cfg.task = {"_name": "segment_language_modeling", "data": str(data), "tokens_per_sample": 8}
    cfg.model = {"_name": "lamemo_lm", "decoder_layers": 1}
    cfg.criterion, cfg.lr_scheduler = {"_name": "cross_entropy"}, {"_name": "fixed"}
    cfg.optimizer, cfg.optimization.lr = {"_name": "adam"}, [1e-3]
    cfg.common.cpu, cfg.dataset.batch_size, cfg.optimization.max_update = True, 4, 3
    for name, value in changes.items():
        OmegaConf.update(cfg, name.replace("__", "."), value, force_add=True)
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
