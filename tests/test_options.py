"""Every option of every command works, is refused, or is ignored with a warning, as docs/options.md says."""

import re
import sys
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY

from lamemo_fairseq.core.names import option_name
from lamemo_fairseq.host import option_checks
from lamemo_fairseq.host.option_page import render
from lamemo_fairseq.host.option_rules import EVAL_LM, INTERACTIVE, REFUSED, TRAIN, always
from lamemo_fairseq.host.option_table import rules_for

from .command_lines import PARSERS, SIZES, configuration, read
from .helpers import TASK, write_data
from .working_options import FAIRSEQS_OWN, WORKING

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=200, valid=60, valid1=40, test=30)


@pytest.fixture(scope="module")
def actions():
    """The options of every command, by field."""
    return {command: {action.dest: action for action in read(command)[0]._actions} for command in PARSERS}


def test_the_page_is_that_of_the_table():
    text = (ROOT / "docs" / "options.md").read_text()
    assert text == render(), "python -m lamemo_fairseq.host.option_page > docs/options.md"


def test_the_page_has_our_options_with_their_defaults():
    """Those of fairseq-train, where none is passed."""
    config = convert_namespace_to_omegaconf(read(TRAIN)[1])
    shown = dict(
        re.findall(r"^\| `(--[\w-]+)` \| `?([^`|]*?)`? \| ", render().split("## Defaults by")[0], re.MULTILINE)
    )
    classes = MODEL_DATACLASS_REGISTRY["lamemo_lm"], TASK_DATACLASS_REGISTRY[TASK[3]]
    ours = {f.name for known in classes for f in fields(known) if not str(f.default).startswith("${")}
    parsed = {option_name(name): {**config.task, **config.model}[name] for name in ours - {"_name", "data"}}
    names = {name: "off" if value is False else str(value) for name, value in parsed.items()}
    assert shown == {name: "none" if value in ("", "None") else value for name, value in names.items()}


@pytest.mark.parametrize("command", PARSERS)
def test_every_option_is_accounted_for(command, actions):
    """A new option, of fairseq's or of this package, has to be put into the table or among those that work."""
    working = {option for those in WORKING[command].values() for option in those}
    ruled = set(rules_for(command))
    without = {option for option, rules in rules_for(command).items() if any(rule.applies is always for rule in rules)}
    assert set(actions[command]) - ruled - working == set(), "neither in the table nor known to work"
    assert without & working == set(), "said to work, but in the table without a condition"
    assert ruled - without - working == set(), "in the table on a condition: what proves that they work otherwise?"
    assert (working | ruled) - set(actions[command]) == set(), "not an option"


@pytest.mark.parametrize("command", PARSERS)
def test_what_is_said_to_work_is_tested(command, actions):
    for file, those in WORKING[command].items():
        if file == FAIRSEQS_OWN:
            continue
        paths = [path for path in (ROOT / "tests" / file, ROOT / "tests/core" / file) if path.exists()]
        assert paths, file
        text = "".join(path.read_text() for path in paths)
        for option in those:
            names = [*actions[command][option].option_strings, option]
            assert re.search(rf"(?<![\w-])({'|'.join(map(re.escape, names))})(?![\w-])", text), (file, option)


def test_every_choice_is_accounted_for():
    """Criterions that do not serve are refused by name."""
    own = {name for name, made in REGISTRIES["criterion"]["registry"].items() if option_checks.serves(name)}
    assert own == {"adaptive_loss", "chunked_cross_entropy", "cross_entropy", "label_smoothed_cross_entropy"}
    assert set(REGISTRIES["lr_scheduler"]["registry"]) == {
        *("cosine", "fixed", "inverse_sqrt", "manual", "pass_through", "polynomial_decay"),
        *("reduce_lr_on_plateau", "step", "tri_stage", "triangular"),
    }
    assert set(REGISTRIES["optimizer"]["registry"]) == {
        *("adadelta", "adafactor", "adagrad", "adam", "adamax", "composite", "cpu_adam", "lamb", "nag", "sgd"),
    }


def other_value(action):
    """Words that give an option another value than its default."""
    name = action.option_strings[0]
    if action.nargs == 0:
        return [name]
    if action.choices:
        return [name, next(str(c) for c in action.choices if str(c) != str(action.default))]
    number = action.default if isinstance(action.default, (int, float)) else 0
    is_text = action.type in (str, None) and not name.endswith("-valid")  # those numbers, fairseq reads as text
    return [name, "x" if is_text else str(abs(number) + 3)]


@pytest.mark.parametrize("command", PARSERS)
def test_options_without_use_are_refused_or_told(command, actions, caplog):
    """Those of the table that depend on no other option, one by one."""
    for option, rules in rules_for(command).items():
        for rule in rules:
            if rule.applies is not always:
                continue
            caplog.clear()
            words = other_value(actions[command][option])
            if rule.effect == REFUSED:
                with pytest.raises(ValueError, match=re.escape(rule.message(option))):
                    read(command, *words)
            else:
                read(command, *words)
                assert rule.message(option) in caplog.messages
    caplog.clear()
    read(command, *SIZES, "--batch-size", 4, *(["--buffer-size", 4] if command == INTERACTIVE else []))
    assert not caplog.messages or command == INTERACTIVE or "goes on until" in caplog.messages[0]


def test_other_models_have_all_options(caplog):
    """They may be trained with this package imported."""
    common = [
        "DATA",
        "--task",
        "language_modeling",
        "--arch",
        "transformer_lm",
        "--optimizer",
        "adam",
        "--curriculum",
        "1",
    ]
    common += ["--skip-remainder-batch", "--log-interval", "0", "--criterion", "masked_lm"]

    def read(*words):
        with mock.patch.object(sys, "argv", ["fairseq-train", *common, *words]):
            return options.parse_args_and_arch(options.get_training_parser(), [*common, *words])

    caplog.clear()
    assert read("--tpu").curriculum == 1
    with pytest.raises(ValueError, match="Cannot combine --fp16 and --tpu"):  # fairseq's
        read("--tpu", "--fp16")
    with pytest.raises(SystemExit):  # argparse's
        read("--lr", "fast")
    assert not caplog.messages


def test_a_yaml_is_checked_as_a_command_line_is(data, caplog):
    tasks.setup_task(configuration(data).task)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    changes = {"dataset__curriculum": 1, "model__compression_rate": 5, "dataset__required_batch_size_multiple": 8}
    tasks.setup_task(configuration(data, **changes).task)
    assert "--curriculum is ignored" in caplog.text and "--compression-rate is ignored" in caplog.text
    assert "--required-batch-size-multiple" not in caplog.text  # its default
    for changes, message in (
        ({"common__fp16": True}, "--fp16 is refused"),
        ({"model__cuda_graphs": True}, "--cuda-graphs is refused"),
        ({"optimization__update_freq": [0]}, "--update-freq is 0"),
        ({"optimization__skip_remainder_batch": True}, "--skip-remainder-batch is refused"),
        ({"criterion___name": "ctc"}, "--criterion ctc is not for language models"),
        ({"optimization.max_updat": 3}, r"optimization\.max_updat is not known: did you mean max_update"),
        ({"common__threads": 3}, r"common\.threads is not known"),
        ({"lr_scheduler___name": "tri_stage"}, "pass --warmup-steps"),
        ({"distributed_training__ddp_backend": "slowmo"}, "--ddp-backend is refused"),
    ):
        with pytest.raises(ValueError, match=message):
            tasks.setup_task(configuration(data, **changes).task)


def test_the_rate_that_a_yaml_leaves_to_fairseq_is_told(data, caplog):
    for changes in ({"optimization__lr": [0.25]}, {"optimization__lr": [0.25], "lr_scheduler___name": "manual"}):
        caplog.clear()
        tasks.setup_task(configuration(data, **changes).task)
        told = "optimization.lr is 0.25, fairseq's default, which is too large: set one" in caplog.text
        assert told == (len(changes) == 1)


def test_a_warm_up_as_long_as_the_run_is_told(data, caplog):
    for updates, told in ((4, False), (3, True)):
        caplog.clear()
        changes = {"lr_scheduler__warmup_updates": 3, "optimization__max_update": updates}
        tasks.setup_task(configuration(data, **changes).task)
        assert ("pass fewer --warmup-updates" in caplog.text) == told


def test_only_eval_lm_has_its_log_set_up(monkeypatch):
    set_up = []
    monkeypatch.setattr("lamemo_fairseq.host.options.log_in_fairseqs_format", lambda: set_up.append(1))
    for command in PARSERS:
        read(command)
        assert bool(set_up) == (command == EVAL_LM), command
        set_up.clear()


def test_the_options_of_a_checkpoint_are_not_checked_again(data):
    tasks.setup_task(configuration(data, common__fp16=True).task, from_checkpoint=True)
