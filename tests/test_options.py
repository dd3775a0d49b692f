"""Every option of every command works, is refused, or is ignored with a warning, as docs/options.md says."""

import re
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf

from lamemo_fairseq.core.names import option_name
from lamemo_fairseq.host import named_checkpoints, start
from lamemo_fairseq.host.option_page import render
from lamemo_fairseq.host.option_rules import EVAL_LM, GENERATE, INTERACTIVE, REFUSED, TRAIN, VALIDATE
from lamemo_fairseq.host.option_table import rules_for

from .helpers import TASK, USER_DIR, write_data
from .working_options import FAIRSEQS_OWN, WORKING

ROOT = Path(__file__).parent.parent
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
MODEL = ["--arch", "lamemo_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8, "--decoder-attention-heads", 2]
MODEL += ["--decoder-ffn-embed-dim", 8, "--mem-len", 4]
SIZES = ["--tokens-per-sample", 8, "--num-workers", 0]
ADAM = ["--optimizer", "adam", "--lr", 1e-3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=200, valid=60, valid1=40, test=30)


def read(command, *words, task=TASK):
    """The parser and the namespace of a command line; without a ``--path`` among the words, no checkpoint is read."""
    get, more = PARSERS[command]
    reading = nullcontext() if "--path" in words else mock.patch.object(named_checkpoints, "_files", lambda _: [])
    words = [str(word) for word in ("DATA", *task, *more, *words)]
    with mock.patch.object(sys, "argv", [command, *words]), reading:
        parser = get()
        return parser, options.parse_args_and_arch(parser, words)


@pytest.fixture(scope="module")
def actions():
    """The options of every command, by field."""
    return {command: {action.dest: action for action in read(command)[0]._actions} for command in PARSERS}


def always(rule):
    return rule.applies({}) and rule.applies({"cpu": True, "batch_size": 1, "fp16": True, "memory": "lookahead"})


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
    without = {option for option, rules in rules_for(command).items() if any(rule.unconditional for rule in rules)}
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
    own = {name for name, made in REGISTRIES["criterion"]["registry"].items() if start.serves(name)}
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
            if not rule.unconditional:
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


def start_training(*words, arch="lamemo_lm", task=TASK, optimizer=("adam", 1e-3), command=TRAIN, streams=4):
    """Read a command line of training; a choice that is None is left out."""
    sizes = [*SIZES, *(["--batch-size", streams] if streams else [])]
    words = ["DATA", *task, *(["--arch", arch] if arch else []), *sizes, *words]
    if optimizer:
        words += ["--optimizer", optimizer[0], *(["--lr", optimizer[1]] if optimizer[1] else [])]
    words = [str(word) for word in words]
    with mock.patch.object(sys, "argv", [command, *words]):
        return options.parse_args_and_arch(options.get_training_parser(), words)


WRONG = {
    "an architecture's name": (["--arch", "lamemo"], "--arch lamemo is not known: did you mean lamemo_lm"),
    "an option of another model": (
        ["--arch", "transformer_lm", "--compression-rate", 3],
        "--compression-rate is not known to --arch transformer_lm: pass --arch lamemo_lm or another with memory",
    ),
    "a task's name": (["--task", "segment_language_modelling"], "did you mean segment_language_modeling"),
    "a criterion's name": (["--criterion", "chunked_crossentropy"], "did you mean chunked_cross_entropy"),
    "an optimizer's name": (["--optimizer", "adm"], "--optimizer adm is not known: did you mean adam"),
    "a schedule's name": (["--lr-scheduler", "cos"], "--lr-scheduler cos is not known: .*cosine"),
    "a backend's name": (["--ddp-backend", "mpi"], "--ddp-backend mpi is not known: pass one of .*legacy_ddp"),
    "an option's name": (["--memory-len", 5], "option --memory-len is not known: did you mean .*--mem-len"),
    "an underscore": (["--mem_len", 5], "option --mem_len is not known: did you mean --mem-len"),
    "an option of another choice": (["--label-smoothing", 0.1], "belongs to --criterion label_smoothed_cross_entropy,"),
    "two words": (["--basis-widths", "0.1", "0.2"], "0.2: an option's value is one word, put it in quotes"),
    "a criterion for other tasks": (["--criterion", "ctc"], "--criterion ctc is not for language models: pass chunked"),
    "a rate that is no number": (["--lr", "fast"], "--lr is 'fast': pass a number"),
    "a part of a batch": (["--update-freq", 1.5], "--update-freq is 1.5: pass whole numbers"),
    "no batch": (["--update-freq", 0], "--update-freq is 0, it must be at least 1"),
    "fewer than no batches": (["--update-freq", "2,-1"], "--update-freq is 2, -1, it must be at least 1"),
    "no stream": (["--batch-size", 0], "--batch-size is 0, it must be at least 1"),
    "no token": (["--tokens-per-sample", 0], "--tokens-per-sample is 0, it must be at least 1"),
    "fewer than no workers": (["--num-workers", -1], "--num-workers is -1, it must be at least 0"),
    "no log": (["--log-interval", 0], "--log-interval is 0, it must be at least 1"),
    "no epoch to validate": (["--validate-interval", 0], "--validate-interval is 0"),
    "no epoch to save": (["--save-interval", 0], "--save-interval is 0"),
    "a negative norm": (["--clip-norm", -1], "--clip-norm is -1.0, it must be at least 0"),
    "a negative rate": (["--lr", -1], "--lr is -1.0, it must be at least 0"),
    "a negative limit": (["--max-update", -1], "--max-update is -1"),
    "no rank": (["--distributed-world-size", 0], "--distributed-world-size is 0, it must be at least 1"),
    "ranks for which there are no GPUs": (["--distributed-world-size", 99], "99, and fairseq starts one rank a GPU"),
    "averages that grow": (["--store-ema", "--ema-decay", 2], "--ema-decay is 2.0, it must be between 0 and 1"),
    "two beginnings": (["--finetune-from-model", "a.pt", "--restore-file", "b.pt"], "pass one of the two"),
    "two precisions": (["--fp16", "--memory-efficient-bf16"], "--fp16 and --memory-efficient-bf16 exclude each other"),
    "fp16 on a CPU": (["--fp16"], "--fp16 is refused: .*on a CPU leave it out, or pass --bf16 .*common.fp16=false"),
    "amp on a CPU": (["--amp"], "--amp is refused: .*on a CPU leave it out"),
    "graphs on a CPU": (["--cuda-graphs"], "--cuda-graphs is refused: .*on a CPU leave it out"),
    "a profile on a CPU": (["--profile"], "--profile is refused: .*on a CPU leave it out"),
    "sharded checkpoints": (["--ddp-backend", "fully_sharded"], "fully_sharded cuts checkpoints up.* pass pytorch_ddp"),
    "a momentum not saved": (["--ddp-backend", "slowmo"], "--ddp-backend is refused: no checkpoint holds slowmo's"),
    "no cutoffs": (["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"], "pass --adaptive-softmax-cutoff"),
    "a reducer that does not serve": (
        ["--criterion", "adaptive_loss", "--adaptive-softmax-cutoff", "10,20"],
        "--criterion adaptive_loss .*pass --ddp-backend legacy_ddp",
    ),
    "cosine": (["--lr-scheduler", "cosine"], "--lr-scheduler cosine .*pass --max-update"),
    "polynomial_decay": (["--lr-scheduler", "polynomial_decay"], "pass --total-num-update"),
    "tri_stage": (["--lr-scheduler", "tri_stage"], "pass --warmup-steps, --hold-steps and --decay-steps, or --phase-r"),
    "parts of nothing": (["--lr-scheduler", "tri_stage", "--phase-ratio", "(0.1,0.4,0.5)"], "pass --max-update"),
    "triangular": (["--lr-scheduler", "triangular"], "--max-lr is not given"),
    "a peak below the base": (["--lr-scheduler", "triangular", "--max-lr", 1e-4], "pass --max-lr, a rate above --lr"),
    "a fall from nowhere": (["--lr-scheduler", "inverse_sqrt", "--warmup-updates", 0], "pass --warmup-updates above 0"),
    "no update after the warm-up": (
        ["--lr-scheduler", "cosine", "--warmup-updates", 5, "--max-update", 5],
        "--lr-scheduler cosine is incomplete: pass fewer --warmup-updates than --max-update",
    ),
    "no next period": (["--lr-scheduler", "cosine", "--max-update", 5, "--t-mult", 0], "pass --t-mult above 0"),
    "no steps": (["--lr-scheduler", "step", "--lr-deacy-period", 0], "pass --lr-deacy-period above 0, --lr-decay up"),
    "steps upwards": (["--lr-scheduler", "step", "--min-lr", 1], "and --min-lr below --lr"),
    "no way down": (["--lr-scheduler", "tri_stage", "--warmup-steps", 3], "pass --decay-steps above 0"),
    "no triangle": (
        ["--lr-scheduler", "triangular", "--max-lr", 1, "--lr-period-updates", 1],
        "pass --lr-period-updates of 2 or more",
    ),
    "a plateau that rises": (["--lr-scheduler", "reduce_lr_on_plateau", "--lr-shrink", 2], "pass --lr-shrink below 1"),
    "rates of epochs": (
        ["--lr", "0.1,0.01", "--lr-scheduler", "step"],
        "--lr has several values.*--lr-scheduler fixed",
    ),
    "a window of several": (["--bf16", "--update-freq", "2,4"], "--fp16-scale-window with --bf16: pass one, such as"),
    "half the memory for float32": (
        ["--memory-efficient-bf16", "--optimizer", "sgd", "--lr", 1e-3],
        "--memory-efficient-bf16 is refused: --optimizer sgd .*pass --bf16, or another optimizer such as adam",
    ),
    "a rate beside another": (
        ["--optimizer", "adafactor", "--lr", 1e-3, "--relative-step"],
        "--relative-step is refused: it chooses the learning rate in place of --lr, .*leave it out",
    ),
    "a first rate beside another": (
        ["--optimizer", "adafactor", "--lr", 1e-3, "--warmup-init"],
        "--warmup-init is ref",
    ),
    "pass_through": (["--lr-scheduler", "pass_through"], "is for --optimizer composite"),
    "a plateau of nothing": (["--lr-scheduler", "reduce_lr_on_plateau", "--disable-validation"], "leave out --disable"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_at_the_start_are_one_line(wrong):
    words, message = WRONG[wrong]
    arch = None if "--arch" in words else "lamemo_lm"
    optimizer = None if "--optimizer" in words else ("adam", None if "--lr" in words else 1e-3)
    with pytest.raises(ValueError, match=message) as raised:
        start_training(*words, arch=arch, optimizer=optimizer)
    assert len(str(raised.value).splitlines()) == 1
    assert raised.value.__suppress_context__ or raised.value.__context__ is None  # one traceback


def test_choices_that_are_not_made():
    with pytest.raises(ValueError, match=r"no --arch: pass .*--arch lamemo_lm"):
        start_training(arch=None)
    with pytest.raises(ValueError, match=r"no --task: .*pass --task segment_language_modeling"):
        start_training(task=["--user-dir", USER_DIR])
    with pytest.raises(ValueError, match=r"no --optimizer: pass one"):
        start_training(optimizer=None)
    with pytest.raises(ValueError, match=r"no --lr: pass one"):
        start_training(optimizer=("adam", None))
    with pytest.raises(ValueError, match=r"no --batch-size: pass the number of streams"):
        start_training(streams=None)
    start_training("--max-tokens", 64, streams=None)
    with pytest.raises(ValueError, match=r"no --lr: pass one"):
        start_training(optimizer=("adafactor", None))
    start_training(optimizer=("adadelta", None))


def test_a_validation_needs_a_number_of_streams():
    """Which fairseq-eval-lm chooses by itself."""
    words = ["DATA", *map(str, TASK), "--path", "x"]
    with mock.patch.object(named_checkpoints, "_files", lambda _: []):
        with pytest.raises(ValueError, match=r"no --batch-size: pass the number of streams"):
            options.parse_args_and_arch(options.get_validation_parser(), words)
        options.parse_args_and_arch(options.get_eval_lm_parser(), words)


@pytest.mark.parametrize("arch", ["transformer_lm", "lstm_lm"])
def test_another_model_is_refused_before_its_options_are_merged(arch):
    """fairseq cannot merge this task's --tokens-per-sample, which may be None, into transformer_lm's."""
    with pytest.raises(ValueError, match=r"which \w+ does not have: pass --arch lamemo_lm or another"):
        start_training(arch=arch)


@pytest.mark.parametrize("task", ["language_modeling", "translation"])
def test_another_task_is_refused_before_its_options_are_merged(task):
    """fairseq looks for --tokens-per-sample in the task's options, and translation has none."""
    with pytest.raises(ValueError, match=r"which \w+ does not feed: pass --task segment_language_modeling"):
        start_training(task=["--user-dir", USER_DIR, "--task", task])


def test_the_fused_backend_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"--attention-backend is refused: .*on a CPU pass auto, blocked or eager"):
        start_training("--attention-backend", "fused")
    start_training("--attention-backend", "eager")


def test_a_refused_option_may_have_its_default_value():
    start_training("--model-parallel-size", 1, "--zero-sharding", "none", "--pipeline-checkpoint", "never")


@pytest.mark.parametrize(
    ("words", "warning"),
    {
        "another memory's": (
            ["--compression-rate", 5],
            "--compression-rate is ignored: it belongs to --memory compress",
        ),
        "streams counted twice": (
            ["--max-tokens", 64],
            "--max-tokens is ignored: --batch-size is given, the number of streams",
        ),
        "averages that are not kept": (["--ema-decay", 0.9], "--ema-decay is ignored: without --store-ema"),
        "a scale of nothing": (["--fp16-init-scale", 4], "--fp16-init-scale is ignored: without --fp16 or --amp"),
        "the best of nothing": (["--disable-validation", "--patience", 3], "--patience is ignored: with --disable-val"),
        "a best one that is not saved": (
            ["--validate-interval-updates", 10],
            "--validate-interval-updates: checkpoint_best.pt is the best of those models that are saved, and a better",
        ),
        "a best epoch that is not saved": (
            ["--save-interval", 2],
            "--save-interval: checkpoint_best.pt is the best of",
        ),
        "a rate of nothing": (
            ["--lr-scheduler", "polynomial_decay", "--total-num-update", 5, "--max-update", 9],
            "--total-num-update is 5 and --max-update 9: the learning rate is 0 in the updates between",
        ),
        "no end": ([], "neither --max-update nor --max-epoch is given"),
    }.values(),
)
def test_options_that_depend_on_others_are_told(words, warning, caplog):
    start_training(*words)
    assert warning in caplog.text


def test_a_product_of_all_scales_is_told(caplog):
    start_training("--scale-parameter", "--max-update", 1, optimizer=("adafactor", 1e-3))
    assert "--scale-parameter: fairseq multiplies the learning rate by the scale of each parameter in" in caplog.text


def test_a_window_that_fairseq_asks_for_is_not_ignored(caplog):
    start_training("--bf16", "--update-freq", "2,4", "--fp16-scale-window", 8, "--max-update", 1)
    assert not caplog.messages
    start_training("--bf16", "--fp16-scale-window", 8, "--max-update", 1)
    assert "--fp16-scale-window is ignored: without --fp16" in caplog.text


@pytest.mark.parametrize(
    "words",
    [
        ["--validate-interval-updates", 10, "--save-interval-updates", 20],
        ["--validate-interval", 4, "--save-interval", 2],
        ["--save-interval", 2, "--no-save"],
        ["--lr-scheduler", "polynomial_decay", "--total-num-update", 9, "--lr", "0.1,0.01"],
        ["--lr-scheduler", "fixed", "--lr", "0.1,0.01", "--update-freq", "2,4"],
        ["--lr-scheduler", "polynomial_decay", "--total-num-update", 5, "--end-learning-rate", 1e-5],
    ],
)
def test_intervals_and_lengths_that_serve_are_not_told(words, caplog):
    start_training(*words, "--max-update", 9)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("arch", "words", "warning"),
    [
        ("lamemo_lm", ["--lookahead-window", "full"], None),
        ("compressive_transformer_lm_wt103", ["--compression-rate", 5], None),
        ("infinity_former_lm", ["--num-basis-functions", 8], None),
        ("recurrent_memory_transformer_lm", ["--bptt-segments", 2], None),
        ("infini_attention_lm", ["--bptt-segments", 2, "--mem-len", 0], None),
        ("lamemo_lm", ["--memory", "infini", "--mem-len", 0], None),
        ("transformer_xl_lm", ["--memory", "lookahead", "--lookahead-window", "full"], None),
        ("lamemo_lm", ["--memory", "recurrent", "--lookahead-window", "full"], "belongs to --memory lookahead"),
        ("transformer_xl_lm", ["--sentence-ends", "w1"], "it belongs to --position-encoding segatron"),
        ("relative_transformer_lm", ["--mem-len", 5], "--mem-len is ignored: --memory none has no slots"),
    ],
)
def test_the_memory_is_that_of_the_architecture(arch, words, warning, caplog):
    """Where no --memory is given."""
    start_training("--max-update", 1, *words, arch=arch)
    assert ("is ignored" in caplog.text) is (warning is not None) and (warning or "") in caplog.text


@pytest.mark.parametrize("words", [(), ("--arch", "lamemo_lm", "--memory", "infini")], ids=str)
def test_the_length_of_a_memory_without_slots(words):
    with pytest.raises(ValueError, match="--mem-len is refused: --memory infini has no slots: leave it out, or pass 0"):
        start_training("--mem-len", 5, *words[2:], arch=words[1] if words else "infini_attention_lm")


def test_an_option_of_training_in_evaluation():
    with pytest.raises(
        ValueError, match=r"--mem-len belongs to training: .*--model-overrides \"\{'mem_len': VALUE\}\""
    ):
        read(EVAL_LM, "--mem-len", 5)


@pytest.mark.parametrize("command", [EVAL_LM, VALIDATE, GENERATE, INTERACTIVE])
def test_no_path(command):
    with pytest.raises(ValueError, match=r"^no --path: pass the checkpoint of .*, such as --path "):
        read(command, "--path", "")


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"--path .* is a folder: pass a checkpoint in it"):
        read(EVAL_LM, "--path", tmp_path)


@pytest.mark.parametrize("command", [GENERATE, INTERACTIVE])
def test_every_text_that_is_drawn_is_printed(command):
    for words in ([], ["--nbest", 2], ["--beam", 1, "--nbest", 2]):
        with pytest.raises(ValueError, match=r"--sampling is refused: .* pass --beam 1, or as many --nbest as --beam$"):
            read(command, "--sampling", *words)
    read(command, "--sampling", "--beam", 1)
    read(command, "--sampling", "--beam", 3, "--nbest", 3)


def test_a_batch_of_more_lines_than_are_read():
    for words in ([], ["--buffer-size", 15]):
        with pytest.raises(ValueError, match=r"--batch-size is refused: .* pass as large a --buffer-size too$"):
            read(INTERACTIVE, "--batch-size", 16, *words)
    read(INTERACTIVE, "--batch-size", 16, "--buffer-size", 16)
    read(INTERACTIVE, "--batch-size", 1, "--buffer-size", 0)
    read(GENERATE, "--batch-size", 16)


def test_evaluation_of_another_split_than_the_one_meant():
    with pytest.raises(ValueError, match="--gen-subset is refused: this command evaluates --valid-subset"):
        read(VALIDATE, "--gen-subset", "train")
    with pytest.raises(ValueError, match="--valid-subset is refused: this command reads --gen-subset"):
        read(EVAL_LM, "--valid-subset", "train")
    with pytest.raises(ValueError, match=r"--path is refused: .*evaluate several with fairseq-eval-lm"):
        read(VALIDATE, "--path", "x:y")


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


def configuration(data, **changes):
    """The configuration of a run as hydra composes it, with *changes* such as ``dataset__curriculum=1``."""
    from fairseq.dataclass.configs import FairseqConfig

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
