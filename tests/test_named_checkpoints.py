"""Checkpoints that commands name: their task, options that are changed of them, runs that go on with other options."""

import contextlib
import copy
import logging
import re
from dataclasses import fields

import pytest
import torch
from fairseq_cli import eval_lm, generate, interactive, train, validate

from lamemo_fairseq import score
from lamemo_fairseq.core import MEMORIES
from lamemo_fairseq.core.names import missing_checkpoint
from lamemo_fairseq.host.overrides import check_overrides, parse_overrides
from lamemo_fairseq.host.restoring import _FIXED
from lamemo_fairseq.models.language_models import LaMemoLanguageModel

from .core.helpers import TINY, first_of_each_memory, random_tokens, read_streams, tiny_decoder
from .helpers import TASK, USER_DIR, run_command, write_data
from .test_commands import printed

SIZES = {
    "--decoder-layers": 1, "--decoder-embed-dim": 8, "--decoder-attention-heads": 2, "--decoder-ffn-embed-dim": 8,
    "--tokens-per-sample": 8, "--mem-len": 8, "--batch-size": 2, "--optimizer": "adam", "--lr": 0.01,
    "--max-update": 2, "--num-workers": 0, "--dropout": 0.1,
}  # fmt: skip


def trained_with(data, folder, *options, arch="lamemo_lm", **sizes):
    """Train, or go on training, with other sizes and options than those above."""
    given = {**SIZES, **{f"--{name.replace('_', '-')}": value for name, value in sizes.items()}}
    flat = [part for pair in given.items() for part in pair]
    run_command(
        train.cli_main, data, *TASK, "--arch", arch, *flat, "--disable-validation", "--save-dir", folder, *options
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=300, valid=40)


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    trained_with(data, folder)
    return folder / "checkpoint_last.pt"


SPLIT = ["--gen-subset", "valid", "--batch-size", 2, "--num-workers", 0]
COMMANDS = {
    "eval-lm": (eval_lm.cli_main, SPLIT),
    "validate": (validate.cli_main, ["--valid-subset", "valid", "--batch-size", 2, "--num-workers", 0]),
    "generate": (generate.cli_main, [*SPLIT, "--max-len-b", 2, "--prefix-size", 1]),
    "interactive": (interactive.cli_main, ["--max-len-b", 2, "--beam", 1]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_task_is_the_checkpoints(name, data, checkpoint, tmp_path):
    command, options = COMMANDS[name]
    if name == "interactive":
        (tmp_path / "prompts").write_text("w3 w4\n")
        options = [*options, "--input", tmp_path / "prompts"]
    here = ["--user-dir", USER_DIR, "--cpu", "--path", checkpoint, *options]
    without, given = (
        re.findall(r"(?m)^[HPT]-.*$|Loss.*$|valid on .*? ppl \S+", printed(command, data, *here, *task))[-1:]
        for task in ([], ["--task", "segment_language_modeling"])
    )
    assert without and without == given
    with pytest.raises(ValueError, match=r"checkpoint_last.pt is a checkpoint of .*--task language_modeling does not"):
        run_command(command, data, *here, "--task", "language_modeling")


@pytest.mark.parametrize("name", COMMANDS)
def test_neither_checkpoint_nor_task(name, data, capsys):
    command, _ = COMMANDS[name]
    with pytest.raises(ValueError, match=r"^no --path: pass the checkpoint of a trained model, .*--task is read from"):
        run_command(command, data, "--user-dir", USER_DIR)
    with pytest.raises(SystemExit):
        run_command(command, "--user-dir", USER_DIR, "--help")
    assert "--user-dir" in capsys.readouterr().out


@pytest.mark.parametrize("task", [["--task", "segment_language_modeling"], []], ids=["task", "no task"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_path_is_refused_with_those_that_are_there(name, task, data, checkpoint):
    command, options = COMMANDS[name]
    wrong = f"{checkpoint.parent}/checkpoint_lats.pt"
    for path in (wrong, *([] if name == "validate" else [f"{checkpoint}:{wrong}"])):
        with pytest.raises(FileNotFoundError, match=rf"^--path {wrong}: there is no such file: did .* {checkpoint}\?$"):
            run_command(command, data, "--user-dir", USER_DIR, "--cpu", "--path", path, *options, *task)
    with pytest.raises(ValueError, match=rf"^--path {checkpoint.parent} is a folder: pass a checkpoint in it"):
        run_command(command, data, "--user-dir", USER_DIR, "--cpu", "--path", checkpoint.parent, *options, *task)


def test_checkpoints_in_the_nearest_folder_are_proposed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "lamemo"
    folder.mkdir(parents=True)
    assert missing_checkpoint("x.pt") == f"there is no checkpoint x.pt, and {tmp_path} has no checkpoints"
    for number in range(7):
        (folder / f"checkpoint{number}.pt").touch()
    near = r"--path \S+: there is no such file: did you mean (runs/lamemo/checkpoint\d.pt|[?]| or )+"
    for path in ("runs/lamemo/checkpoint.pt", "runs/lmaemo/checkpoint1.pt", "rusn/lamemo/checkpoint1.pt"):
        assert re.fullmatch(near, missing_checkpoint(path, "--path"))
    listed = [f"runs/lamemo/checkpoint{number}.pt" for number in (6, 5, 4, 3, 2)]
    assert missing_checkpoint("runs/lamemo/" + 60 * "z").endswith(f": runs/lamemo has {', '.join(listed)} and others")
    monkeypatch.chdir(folder)
    assert ": this folder has checkpoint6.pt, checkpoint5.pt, " in missing_checkpoint(60 * "z")
    assert missing_checkpoint("/nowhere/at/all.pt").endswith("all.pt, nor is there a folder /nowhere/at")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'memlen': 32}", r"--model-overrides does not know 'memlen': did you mean 'mem_len'"),
        ("{'model': {'memlen': 32}}", r"does not know 'memlen': did you mean 'mem_len'"),
        ("{'mem-len': 32}", r"does not know 'mem-len': did you mean 'mem_len'"),
        ("{'data': '/tmp'}", r"does not know 'data'"),
        ("{'lr': 0.1}", r"does not know 'lr'"),
        ("{'preset_tokens_per_sample': 4}", r"did you mean 'tokens_per_sample'"),
        ("{'compression_rate': 4}", r"compression_rate belongs to --memory compressive, .* leave it out"),
        ("{'sentence_ends': 'w1'}", r"sentence_ends belongs to --position-encoding segatron, .* leave it out"),
        ("{mem_len: 32}", r"is no dictionary of options: write it as \"\{'mem_len': 640\}\""),
        ("mem_len=32", r"is no dictionary of options"),
        ("{'mem_len': 32", r"is no dictionary of options"),
        ("['mem_len']", r"is no dictionary of options"),
        ("{1: 2}", r"is no dictionary of options"),
        ("", r"is no dictionary of options"),
        ("__import__('os').mkdir('CANARY')", r"is no dictionary of options"),
        ("{'mem_len': __import__('os').mkdir('CANARY')}", r"is no dictionary of options"),
        ("{'mem_len': 'many'}", r"--mem-len cannot be 'many'"),
        ("{'mem_len': [1]}", r"--mem-len cannot be \[1\]"),
        ("{'model': {'mem_len': None}}", r"--mem-len cannot be None"),
        ("{'memory': 'lokahead'}", r"--memory cannot be 'lokahead'"),
        ("{'mem_len': -3}", r"--mem-len is -3"),
        ("{'decoder_layers': 2}", r"another --arch or other options"),
    ],
)
def test_overrides_that_a_checkpoint_does_not_have(text, message, data, checkpoint, tmp_path):
    canary = tmp_path / "ran"
    text = text.replace("CANARY", str(canary))
    command, options = COMMANDS["validate" if "model" in text else "eval-lm"]
    with pytest.raises(ValueError, match=message) as refusal:
        run_command(command, data, *TASK, "--path", checkpoint, *options, "--model-overrides", text)
    assert "\n" not in str(refusal.value) and not canary.exists()


def test_overrides_that_a_checkpoint_has(data, checkpoint, caplog):
    cfg = torch.load(checkpoint, weights_only=False)["cfg"]
    for text in (
        "{'mem_len': 4}",
        "{'model': {'mem_len': 4}}",
        "{'memory': 'none', 'position_encoding': 'shaw'}",
        "{}",
    ):
        check_overrides(parse_overrides(text), cfg)
    with pytest.raises(ValueError, match="does not know 'sentence_avg'"):
        check_overrides({"sentence_avg": True}, cfg)
    check_overrides({"sentence_avg": True}, cfg, with_criterion=True)
    compressive = copy.deepcopy(cfg)
    compressive["model"]["memory"] = "compressive"
    check_overrides({"compression_rate": 4}, compressive)
    with caplog.at_level(logging.WARNING):
        check_overrides({"dropout": 0.5}, cfg)
    assert "dropout has no effect outside training" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memlen": 4}, "from_pretrained does not know 'memlen': did you mean 'mem_len'"),
        ({"fp16": True}, "does not know 'fp16'"),
        ({"bpe": "sentencepiece", "sentencpiece_model": "x"}, "did you mean 'sentencepiece_model'"),
        ({"sentencepiece_model": "x"}, "does not know 'sentencepiece_model'"),
        ({"bpe": "sentencpiece"}, "from_pretrained: bpe=sentencpiece is not known: did you mean sentencepiece"),
        ({"beam": 3}, r"beam is an argument of sample\(\)"),
        ({"compression_rate": 3}, "belongs to --memory compressive"),
        ({"mem_len": "x"}, "--mem-len cannot be 'x'"),
        ({"sampling": "x"}, "--sampling cannot be 'x'"),
        ({"generation_args": {"sampling_topc": 3}}, "generation_args does not know 'sampling_topc'"),
    ],
    ids=str,
)
def test_arguments_that_a_model_in_python_does_not_have(arguments, message, data, checkpoint):
    with pytest.raises(ValueError, match=message):
        LaMemoLanguageModel.from_pretrained(checkpoint.parent, checkpoint.name, data, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"bpe": "sentencepiece", "sentencepiece_model": "x"},
            "--bpe sentencepiece: --sentencepiece-model x: there is no",
        ),
        ({"bpe": "subword_nmt", "bpe_codes": "x"}, "--bpe subword_nmt: --bpe-codes x: there is no such file"),
        ({"bpe": "fastbpe", "bpe_codes": "x"}, "--bpe fastbpe: --bpe-codes x: there is no such file"),
        ({"bpe": "sentencepiece"}, "--bpe sentencepiece needs a file: pass --sentencepiece-model"),
    ],
    ids=str,
)
def test_a_file_of_pieces_that_is_missing_is_named(arguments, message, data, checkpoint):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        LaMemoLanguageModel.from_pretrained(checkpoint.parent, checkpoint.name, data, **arguments)


def test_a_model_in_python_is_found_or_not(data, checkpoint):
    hub = LaMemoLanguageModel.from_pretrained(
        checkpoint.parent, checkpoint.name, data, mem_len=4, bpe="bytes", batch_size=3, generation_args={"lenpen": 2.0}
    )
    assert hub.models[0].decoder.memory.slots == 4 and hub.cfg.generation.lenpen == 2.0
    for folder, name, words in ((checkpoint, checkpoint.name, data), (checkpoint.parent, "no.pt", data),
                                (checkpoint.parent, checkpoint.name, data / "no")):  # fmt: skip
        with pytest.raises(FileNotFoundError, match=r"there is no (folder|checkpoint)"):
            LaMemoLanguageModel.from_pretrained(folder, name, words)


def test_copies_of_a_model_in_python(data, checkpoint):
    hub = LaMemoLanguageModel.from_pretrained(checkpoint.parent, checkpoint.name, data)
    text = "w3 w4 w5"
    scores = hub.score(text)["positional_scores"]
    twin = copy.deepcopy(hub)
    assert torch.equal(twin.score(text)["positional_scores"], scores) and twin.task is not hub.task
    with torch.no_grad():
        next(twin.models[0].parameters()).zero_()
    assert torch.equal(hub.score(text)["positional_scores"], scores)
    assert not torch.equal(twin.score(text)["positional_scores"], scores)


def folder_of(path):
    return sorted(p.name for p in path.iterdir()) if path.exists() else []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"decoder_layers": 2}, "--decoder-layers is 2, the checkpoint was trained with 1. Pass the former"),
        ({"decoder_ffn_embed_dim": 12}, "--decoder-ffn-embed-dim is 12, the checkpoint was trained with 8. Pass"),
        ({"position_encoding": "transformer-xl"}, "--position-encoding is transformer-xl, .* with disentangled"),
        ({"arch": "transformer_xl_lm"}, "--memory is recurrent, the checkpoint was trained with lookahead"),
        ({"adaptive_softmax_cutoff": "10,20"}, "--adaptive-softmax-cutoff is 10,20, the checkpoint .* with None"),
    ],
    ids=str,
)
def test_training_that_goes_on_with_what_the_weights_do_not_fit(other, message, data, checkpoint, tmp_path):
    for option in ("--restore-file", "--finetune-from-model"):
        with pytest.raises(ValueError, match=message) as refusal:
            trained_with(data, tmp_path, option, checkpoint, **other)
        assert "\n" not in str(refusal.value) and not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("option", "value", "former"), [("--activation-fn", "gelu", "relu"), ("--lookahead-every", 2, 1)]
)
def test_training_that_goes_on_with_another_function_of_the_same_weights(
    option, value, former, data, checkpoint, tmp_path
):
    difference = f"{option} is {value}, the checkpoint was trained with {former}"
    with pytest.raises(ValueError, match=rf"{difference}\. Go on with"):
        trained_with(data, tmp_path, "--restore-file", checkpoint, option, value, max_update=3)
    text = printed(lambda: trained_with(data, tmp_path, "--finetune-from-model", checkpoint, option, value))
    (told,) = {line for line in text.split("\n") if "the checkpoint was trained with" in line}
    assert difference in told and "--lr" not in told


def test_training_that_goes_on_with_other_bands_of_the_same_shapes(data, tmp_path):
    """Words would change bands, and the weights of each band's class would stand for other words."""
    criterion = ["--criterion", "chunked_cross_entropy", "--adaptive-softmax-cutoff"]
    trained_with(data, tmp_path, *criterion, "10,20")
    with pytest.raises(ValueError, match=r"cutoff is 10,25, the checkpoint was trained with 10,20\. Go on with"):
        trained_with(data, tmp_path, *criterion, "10,25", max_update=3)


def decoders_by_choice(variant, name, choices):
    """The decoders of the choices that make one, with the same seed."""
    for choice in choices:
        with contextlib.suppress(ValueError):
            yield tiny_decoder(variant, **{"compression_loss": "none", name: choice})


@pytest.mark.parametrize("memory", MEMORIES.names())
def test_choices_of_a_memory_that_its_weights_do_not_tell_are_compared(memory):
    """Of choices with weights of the same shapes and other scores, a resume must not take one for another."""
    for option in fields(MEMORIES[memory].options):
        choices = [False, True] if option.type is bool else option.metadata.get("choices", [])
        made = []
        for decoder in decoders_by_choice(first_of_each_memory()[memory], option.name, choices):
            shapes = {name: weight.shape for name, weight in decoder.state_dict().items()}
            scores = read_streams(decoder, random_tokens(2, 30))
            alike = [other for others, other in made if others == shapes]
            assert option.name in _FIXED or all(torch.allclose(scores, other) for other in alike)
            made.append((shapes, scores))


# Numbers that a run may change, as a model is trained and evaluated with several.
LENGTHS = {"compressed_len", "memory_samples", "retrieved_rows", "store_len"}


def other_numbers(memory):
    """Options of a memory that are numbers, with other values than those of tests."""
    for option in fields(MEMORIES[memory].options):
        value = TINY.get(option.name, option.default)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield option.name, value / 2 if isinstance(value, float) else value + 1
    yield from {"basis_widths": "0.2,0.4", "decoder_attention_heads": 4}.items()


@pytest.mark.parametrize(
    "variant",
    [
        *first_of_each_memory().values(),
        *(("none", "absolute", "right"), ("recurrent", "alibi", "right"), ("compressive", "alibi", "most-used")),
    ],
)
def test_numbers_that_the_weights_do_not_tell_are_compared(variant):
    """As above: the number of heads, for one, does not show in weights without positions of their own."""
    decoder, tokens = tiny_decoder(variant), random_tokens(2, 30)
    weights = {name: torch.randn(w.shape) if w.is_floating_point() else w for name, w in decoder.state_dict().items()}
    decoder.load_state_dict(weights)
    scores = read_streams(decoder, tokens)
    for name, value in other_numbers(variant[0]):
        with contextlib.suppress(ValueError, RuntimeError):  # other weights, or another memory's option
            other = tiny_decoder(variant, **{name: value})
            other.load_state_dict(weights)
            same = torch.allclose(scores, read_streams(other, tokens), atol=1e-5)
            assert same or name in LENGTHS or name in _FIXED, name


def test_what_else_differs_is_told(data, checkpoint, tmp_path):
    text = printed(
        lambda: trained_with(data, tmp_path, "--restore-file", checkpoint, lr=0.02, dropout=0.3, max_update=3)
    )
    (told,) = {line for line in text.split("\n") if "the checkpoint was trained with" in line}
    for option in ("--lr is 0.02, the checkpoint was trained with 0.01", "--dropout is 0.3, the checkpoint"):
        assert option in told
    assert told.count("--lr ") == 1 and "max-update" not in told
    end = tmp_path / "end"  # of an epoch
    trained_with(data, end, max_epoch=1, max_update=99)
    text = printed(lambda: trained_with(data, end, train_subset="valid", max_epoch=2, max_update=99))
    assert "--train-subset is valid, the checkpoint was trained with train" in text
    text = printed(lambda: trained_with(data, tmp_path, lr=0.02, dropout=0.3, max_update=4))
    assert "the checkpoint was trained with" not in text


def test_another_dictionary(data, checkpoint, tmp_path):
    other = write_data(tmp_path / "other", words=44, train=300)
    for option in ("--restore-file", "--finetune-from-model"):
        with pytest.raises(ValueError, match=r"checkpoint_last.pt: .* another dictionary, of 40 words, .* 44 words"):
            trained_with(other, tmp_path / "run", option, checkpoint)


def test_another_dictionary_among_several(data, checkpoint, tmp_path):
    """The message names the file, in commands and in Python."""
    data_of_44 = write_data(tmp_path / "other", words=44, train=300)
    trained_with(data_of_44, tmp_path / "run", max_update=1)
    other = tmp_path / "run" / "checkpoint_last.pt"
    message = rf"^{other}: the checkpoint was trained with another dictionary, of 44 words, than .* 40 words"
    several, options = f"{checkpoint}:{other}", ["--user-dir", USER_DIR, "--cpu"]
    for command in ("eval-lm", "generate"):
        main, split = COMMANDS[command]
        with pytest.raises(ValueError, match=message):
            run_command(main, data, *options, "--path", several, *split)
    with pytest.raises(ValueError, match=message):
        LaMemoLanguageModel.from_pretrained("/", several.replace("/", "", 1).replace(":/", ":"), str(data))
    with pytest.raises(SystemExit, match=message.replace("^", "^score: ")):
        score.main([str(data), several, "--subset", "valid", "--batch-size", "2", "--cpu"])


def test_averages_begin_with_those_of_another_run(data, checkpoint, tmp_path):
    ema = ["--store-ema", "--ema-decay", 0.5]
    trained_with(data, tmp_path / "seed", *ema, "--optimizer", "sgd")
    seed = tmp_path / "seed" / "checkpoint_last.pt"
    trained_with(data, tmp_path / "run", *ema, "--ema-seed-model", seed)
    with pytest.raises(ValueError, match=r"--ema-seed-model .*holds no averages: .* --store-ema"):
        trained_with(data, tmp_path / "none", *ema, "--ema-seed-model", checkpoint)
    with pytest.raises(FileNotFoundError, match=r"--ema-seed-model .*there is no such file"):
        trained_with(data, tmp_path / "none", *ema, "--ema-seed-model", tmp_path / "no.pt")
    with pytest.raises(ValueError, match="--decoder-layers is 2, the checkpoint was trained with 1"):
        trained_with(data, tmp_path / "none", *ema, "--ema-seed-model", seed, decoder_layers=2)
    assert folder_of(tmp_path / "none") == [".lock"]
