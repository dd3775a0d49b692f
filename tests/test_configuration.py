"""What the tests spare hydra makes no difference to a command's configuration."""

import copy

import pytest
from fairseq import options
from fairseq.dataclass import utils
from fairseq.dataclass.configs import CommonConfig
from omegaconf import OmegaConf

from lamemo_fairseq.host.configuration import complete

from .helpers import TASK

COMMANDS = [
    "--arch lamemo_lm --optimizer adam --lr 0.1",
    "--arch lamemo_lm --optimizer adam --lr 0.1,0.2 --adam-betas (0.8,0.9) --mem-len 7 --save-dir it's/a,b=c --seed 3",
    "--arch transformer_xl_lm --optimizer nag --lr 0.1 --lr-scheduler cosine --warmup-updates 2",
    "--arch transformer_xl_lm --optimizer nag --lr 0.1 --lr-scheduler cosine --bpe bytes --update-freq 2,3",
    "--arch transformer_xl_lm --optimizer nag --lr 0.1 --lr-scheduler cosine --update-freq 2 --bf16",
    "--arch transformer_xl_lm --optimizer adam --lr 0.1",
]


@pytest.mark.filterwarnings("ignore")
def test_a_configuration_does_not_depend_on_those_before(monkeypatch):
    def configurations():
        for command in COMMANDS:
            arguments = options.parse_args_and_arch(
                options.get_training_parser(),
                ["data", *TASK, "--max-update", "5", "--batch-size", "4", *command.split()],
            )
            yield utils.convert_namespace_to_omegaconf(arguments)

    made = list(configurations())
    monkeypatch.setattr(utils, "compose", getattr(utils.compose, "__wrapped__", utils.compose))
    for mine, hydras in zip(made, configurations(), strict=True):
        one, other = (OmegaConf.to_container(cfg, resolve=False) for cfg in (mine, hydras))
        assert repr(one) == repr(other)  # 1.0 is no 1
        assert one["common"]["seed"] == (3 if mine is made[1] else 1)
        assert OmegaConf.is_struct(mine) == OmegaConf.is_struct(hydras)


def test_a_copy_has_the_same_types_and_flags_of_its_own():
    options = OmegaConf.structured(CommonConfig(seed=3))
    OmegaConf.set_readonly(options._get_node("seed"), True)
    copied = copy.deepcopy(options)
    assert copied == options and copied.seed == 3
    for name in options:
        node, other = options._get_node(name), copied._get_node(name)
        assert type(node) is type(other) and node._metadata == other._metadata
        assert other._get_parent() is copied
    OmegaConf.set_readonly(copied._get_node("seed"), False)
    copied.seed = 4
    assert OmegaConf.is_readonly(options._get_node("seed")) and options.seed == 3


def test_a_checkpoint_that_is_older_than_an_option_keeps_what_it_was_trained_with():
    """Not what the architecture gives new models."""
    model = {"_name": "associative_recurrent_memory_transformer_lm", "memory": "associative", "mem_len": 7}
    filled = complete({"model": model})["model"]
    assert filled["associative_decay"] == 1.0 and filled["mem_len"] == 7
    assert filled["position_encoding"] == "transformer-xl"
    assert complete({"model": {**model, "associative_decay": 0.5}})["model"]["associative_decay"] == 0.5
