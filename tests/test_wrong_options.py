"""Options that are wrong, missing or contradict each other end a command in one line, or are ignored with a warning."""

from unittest import mock

import pytest
from fairseq import options

from lamemo_fairseq.host import named_checkpoints
from lamemo_fairseq.host.option_rules import EVAL_LM, GENERATE, INTERACTIVE, VALIDATE

from .command_lines import read, start_training
from .helpers import TASK, USER_DIR

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
    "no norm": (["--clip-norm", "nan"], "--clip-norm is nan: pass a number"),
    "no end": (["--stop-time-hours", "nan"], "--stop-time-hours is nan: pass a number"),
    "a decay that grows": (["--weight-decay", -1], "--weight-decay is -1.0, it must be at least 0"),
    "more than all": (
        ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 2],
        "--label-smoothing is 2.0, it must be between 0 and 1",
    ),
    "a negative limit": (["--max-update", -1], "--max-update is -1"),
    "no rank": (["--distributed-world-size", 0], "--distributed-world-size is 0, it must be at least 1"),
    "ranks for which there are no GPUs": (["--distributed-world-size", 99], "99, and fairseq starts one rank a GPU"),
    "averages that grow": (["--store-ema", "--ema-decay", 2], "--ema-decay is 2.0, it must be between 0 and 1"),
    "averages that stand still": (["--store-ema", "--bf16"], "--store-ema is refused: .* pass --ema-fp32 as well"),
    "rounded averages": (["--store-ema", "--memory-efficient-bf16"], "--store-ema is refused: .* --ema-fp32"),
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
