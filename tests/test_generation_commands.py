"""fairseq-interactive, fairseq-generate and the hub, from a checkpoint to text."""

import importlib
import io
import itertools
import os
import pty
import re
import select
import subprocess
import sys
import threading
import time
import types

import pytest
import sentencepiece
import torch
from fairseq_cli import generate, interactive, train

from lamemo_fairseq.models import language_models

from .gpus import gpu
from .helpers import ON_GPU, TASK, dictionary_of, noise, run_command, write_data
from .test_commands import TRAIN, evaluate

ARCHS = ["lamemo_lm", "transformer_xl_lm", "relative_transformer_lm"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), train=3000, test=300)


@pytest.fixture(scope="module")
def checkpoints(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for arch in ARCHS:
        run_command(
            train.cli_main, data, *TASK, "--arch", arch, *TRAIN, "--max-update", 30, "--disable-validation",
            "--save-dir", folder / arch,
        )  # fmt: skip
    return folder


def hypotheses(text):
    return re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", text, flags=re.MULTILINE)


def ask(data, path, prompts, capsys, monkeypatch, *options, task=TASK):
    """What fairseq-interactive answers to lines of its standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(p + "\n" for p in prompts).encode())))
    run_command(interactive.cli_main, data, *task, "--path", path, *options)
    captured = capsys.readouterr()
    assert "generated" not in captured.err
    return hypotheses(captured.out)


def assert_continued(found, prompts):
    """Two hypotheses a prompt, which begin as it does and have 3 to 20 words more, all of them of the dictionary."""
    assert [int(row) for row, _, _ in found] == [0, 0, 1, 1, 2, 2, 3, 3]
    for row, _, text in found:
        prompt, words = prompts[int(row)].split(), text.split()
        assert words[: len(prompt)] == prompt and 3 <= len(words) - len(prompt) <= 20


PROMPTS = ["w3 w4", "", " ".join(f"w{i % 30}" for i in range(70)), "w1 w2 </s> w3 </s> </s> w5 w6 </s>"]
BEST_OF = ["--buffer-size", 4, "--batch-size", 4, "--max-len-b", 20, "--min-len", 3]


OPTIONS = {
    "beam": ["--beam", 3, "--nbest", 2],
    "top-k": ["--sampling", "--beam", 2, "--nbest", 2, "--sampling-topk", 5, "--temperature", 0.7],
    "top-p": ["--sampling", "--beam", 2, "--nbest", 2, "--sampling-topp", 0.9],
    "diverse": ["--beam", 4, "--nbest", 2, "--diverse-beam-groups", 2],
    "fp16": ["--beam", 2, "--nbest", 2, "--fp16"],
    "ngram": ["--beam", 2, "--nbest", 2, "--no-repeat-ngram-size", 2],
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_interactive_continues_prompts_of_any_length(arch, options, data, checkpoints, capsys, monkeypatch):
    path = checkpoints / arch / "checkpoint_last.pt"
    assert_continued(ask(data, path, PROMPTS, capsys, monkeypatch, *BEST_OF, *options), PROMPTS)


def test_prompts_from_a_file_and_more_new_words_for_longer_prompts(data, checkpoints, tmp_path, capsys):
    (tmp_path / "prompts").write_text("".join(f"{p}\n" for p in PROMPTS))
    run_command(
        interactive.cli_main, data, *TASK, "--path", checkpoints / "lamemo_lm" / "checkpoint_last.pt",
        *["--input", tmp_path / "prompts", "--buffer-size", 4, "--max-tokens", 50, "--max-len-a", 1, "--max-len-b", 2],
        *["--min-len", 2, "--unkpen", 1],
    )  # fmt: skip
    for row, _, text in hypotheses(capsys.readouterr().out):
        prompt = PROMPTS[int(row)].split()
        assert len(prompt) + 2 <= len(text.split()) <= 2 * len(PROMPTS[int(row)].split()) + 2


def test_a_terminal_shows_how_far_a_long_generation_is(data, checkpoints, tmp_path):
    """Also one that does not know its width. The command is ended once it has shown the counter."""
    (tmp_path / "prompts").write_text("w1 w2\n")
    command = [
        sys.executable, "-m", "fairseq_cli.interactive", data, *TASK, "--input", tmp_path / "prompts",
        "--path", checkpoints / "lamemo_lm" / "checkpoint_last.pt", "--min-len", 60_000, "--max-len-b", 60_000,
        *["--sampling", "--beam", 1],
    ]  # fmt: skip
    terminal, other_end = pty.openpty()
    process = subprocess.Popen([*map(str, command)], stdout=other_end, stderr=other_end)
    os.close(other_end)
    seen, shown, deadline = {}, "", time.monotonic() + 60
    try:
        while "generated" not in seen and time.monotonic() < deadline and process.poll() is None:
            if select.select([terminal], [], [], 0.1)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")
            for mark in ("Type the input sentence", "generated"):
                if mark in shown:
                    seen.setdefault(mark, time.monotonic())
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert re.search(r"generated: .* [1-9]\d*/60000 \[", shown), shown
    assert noise(shown) == [] and "interactive.py " in shown  # the command line, in place of the configuration
    # Who waits for less than two seconds sees nothing.
    assert seen["generated"] - seen["Type the input sentence"] > 1


@pytest.mark.parametrize("prefix", [[], ["--prefix-size", 3]], ids=["lines", "beginnings"])
def test_generate_continues_the_lines_of_a_split(prefix, data, checkpoints, capsys):
    run_command(
        generate.cli_main, data, *TASK, "--path", checkpoints / "lamemo_lm" / "checkpoint_last.pt", "--batch-size", 7,
        *["--beam", 2, "--max-len-b", 5, *prefix],
    )  # fmt: skip
    text = capsys.readouterr().out
    lines = {int(i): line.split() for i, line in re.findall(r"^T-(\d+)\t(.*)$", text, flags=re.MULTILINE)}
    found = hypotheses(text)
    assert sorted(lines) == list(range(len(lines))) == sorted(int(row) for row, _, _ in found)
    for row, _, continued in found:
        prompt = lines[int(row)][:3] if prefix else lines[int(row)]
        assert continued.split()[: len(prompt)] == prompt and len(continued.split()) <= len(prompt) + 5


def test_a_beginning_longer_than_a_line_is_the_line(data, checkpoints, capsys):
    found = []
    for prefix in ([], ["--prefix-size", 200]):
        run_command(
            generate.cli_main, data, *TASK, "--path", checkpoints / "lamemo_lm" / "checkpoint_last.pt",
            *["--batch-size", 7, "--beam", 1, "--max-len-b", 5, *prefix],
        )  # fmt: skip
        found.append(hypotheses(capsys.readouterr().out))
    assert found[0] == found[1]


def test_a_prompt_may_hold_the_padding_symbol(data, checkpoints, capsys, monkeypatch):
    """It is a word like any other there, and the words behind it count."""
    path = checkpoints / "lamemo_lm" / "checkpoint_last.pt"
    options = ["--buffer-size", 2, "--batch-size", 2, "--beam", 1, "--max-len-b", 3, "--min-len", 3]
    (_, _, first), (_, _, second) = ask(data, path, ["<pad> w1 <pad> w5", "w3"], capsys, monkeypatch, *options)
    assert first.split()[:4] == ["<pad>", "w1", "<pad>", "w5"] and second.split()[0] == "w3"


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--constraints", "ordered"], "--constraints is for"), (["--retain-dropout"], "--retain-dropout is not known")],
)
def test_options_that_mean_nothing_here_are_refused(options, message, data, checkpoints):
    with pytest.raises(ValueError, match=message):
        run_command(
            generate.cli_main, data, *TASK, "--path", checkpoints / "lamemo_lm" / "checkpoint_last.pt", *options
        )


def test_generate_scores_the_lines_of_a_split(data, checkpoints, capsys):
    run_command(
        generate.cli_main, data, *TASK, "--path", checkpoints / "lamemo_lm" / "checkpoint_last.pt", "--batch-size", 7,
        "--score-reference",
    )  # fmt: skip
    text = capsys.readouterr().out
    lines = dict(re.findall(r"^T-(\d+)\t(.*)$", text, flags=re.MULTILINE))
    assert lines and {row: found for row, _, found in hypotheses(text)} == lines


@pytest.mark.parametrize(
    ("name", "prompt", "shown"),
    [
        ("letter", "w1 w2 </s> w3", "w1w2</s>w3"),
        ("none", "w1 w2 </s> w3", "w1 w2 </s> w3"),
        ("@@ ", "w1 w2", "w1 w2"),
    ],
)
def test_joined_pieces_are_no_words_of_later_prompts(name, prompt, shown, data, checkpoints, capsys, monkeypatch):
    """fairseq adds them to the dictionary, with ids that the model does not have."""
    path = checkpoints / "lamemo_lm" / "checkpoint_last.pt"
    options = ["--score-reference", "--post-process", name]
    found = ask(data, path, [prompt, "w1 w2", "w1w2", prompt], capsys, monkeypatch, *options)
    assert found[0][2] == found[3][2] == shown and found[0][1] == found[3][1]
    assert found[2][2] == "<unk>"
    with pytest.raises(ValueError, match="--post-process 'bpe' is not known: pass one of"):
        ask(data, path, [prompt], capsys, monkeypatch, "--post-process", "bpe")


@gpu
@pytest.mark.parametrize("arch", ARCHS)
def test_interactive_on_a_gpu(arch, data, checkpoints, capsys, monkeypatch):
    """The hypotheses of the CPU in single precision, and the same options in half."""
    path = checkpoints / arch / "checkpoint_last.pt"
    both = [
        ask(data, path, PROMPTS, capsys, monkeypatch, *BEST_OF, *OPTIONS["beam"], task=task) for task in (TASK, ON_GPU)
    ]
    assert [(row, text) for row, _, text in both[1]] == [(row, text) for row, _, text in both[0]]
    scores = [torch.tensor([float(score) for _, score, _ in found]) for found in both]
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=1e-3)
    for options in OPTIONS.values():
        found = ask(data, path, PROMPTS, capsys, monkeypatch, *BEST_OF, *options, "--fp16", task=ON_GPU)
        assert_continued(found, PROMPTS)


@gpu
@pytest.mark.parametrize("arch", ARCHS)
def test_generate_scores_on_a_gpu_in_half_precision_what_the_cpu_scores(arch, data, checkpoints, capsys):
    scores = []
    for task in (TASK, [*ON_GPU, "--fp16"]):
        path = checkpoints / arch / "checkpoint_last.pt"
        run_command(generate.cli_main, data, *task, "--path", path, "--batch-size", 7, "--score-reference")
        found = re.findall(r"^P-(\d+)\t(.*)$", capsys.readouterr().out, flags=re.MULTILINE)
        scores.append({row: torch.tensor([float(score) for score in line.split()]) for row, line in found})
    assert scores[0] and scores[0].keys() == scores[1].keys()
    for row, expected in scores[0].items():
        torch.testing.assert_close(scores[1][row], expected, rtol=0, atol=2e-2)


@gpu
@pytest.mark.parametrize("arch", ARCHS)
def test_hub_on_a_gpu_in_half_precision(arch, data, checkpoints):
    model = language_models.MODELS[arch][0].from_pretrained(str(checkpoints / arch), "checkpoint_last.pt", str(data))
    text = " ".join(f"w{i % 30}" for i in range(70))
    expected = model.score(text)["positional_scores"]
    model.cuda().half()
    scored = model.score([text, "w1"])[0]["positional_scores"]
    torch.testing.assert_close(scored.float().cpu(), expected, rtol=0, atol=2e-2)
    for options in ({"sampling": True, "sampling_topp": 0.9, "beam": 1}, {"beam": 2}):
        assert model.sample(text, max_len_b=40, min_len=40, **options).startswith(text)


@pytest.mark.parametrize("arch", ARCHS)
def test_hub_in_three_lines(arch, data, checkpoints):
    model = language_models.MODELS[arch][0].from_pretrained(
        str(checkpoints / arch), checkpoint_file="checkpoint_last.pt", data_name_or_path=str(data)
    )
    text = "w1 w2\nw5 " + " ".join(f"w{i % 30}" for i in range(60))
    torch.manual_seed(1)
    sampled = model.sample([text, ""], sampling=True, beam=1, max_len_b=30)
    assert sampled[0].startswith(text) and len(sampled) == 2
    assert model.decode(model.encode(text)) == text
    scored = model.score(text)
    assert len(scored["tokens"]) == len(scored["positional_scores"]) == 64
    assert model.score(text)["positional_scores"].equal(scored["positional_scores"])
    generated = model.generate([model.encode(text)], beam=2, max_len_b=5)[0][0]
    whole = generated["positional_scores"]
    torch.testing.assert_close(whole[:64], scored["positional_scores"], rtol=0, atol=1e-4)

    def allowed(row, tokens):
        return [2, 7, 8]

    only = model.sample("w1", beam=2, max_len_b=6, prefix_allowed_tokens_fn=allowed)
    assert only.startswith("w1") and set(only.split()[1:]) <= {"w3", "w4"}


def test_hub_scores_what_evaluation_scores(data, checkpoints):
    """A split as one document: the tokens of whole segments have the log-probabilities of fairseq-eval-lm."""
    folder = checkpoints / "lamemo_lm"
    model = language_models.LaMemoLanguageModel.from_pretrained(str(folder), "checkpoint_last.pt", str(data))
    lines = model.task.load_dataset("test").tokens.lines
    document = torch.cat([lines[i] for i in range(len(lines))])
    scores = model.generate([document], score_reference=True)[0][0]["positional_scores"]
    tokens, loss = evaluate(data, folder / "checkpoint_last.pt", "--batch-size", 1)
    # The last of the document's end-of-sentence tokens is left out, and its last segment is not a whole one.
    assert tokens == len(scores) + 1
    assert -float(scores.mean()) / 0.6931 == pytest.approx(loss, abs=0.03)


def test_hub_calls_at_the_same_time_are_apart(data, checkpoints):
    folder = str(checkpoints / "lamemo_lm")
    model = language_models.LaMemoLanguageModel.from_pretrained(folder, "checkpoint_last.pt", str(data))
    texts = [" ".join(f"w{(i * k) % 30}" for i in range(50)) for k in (1, 7)]
    alone = [model.score(text)["positional_scores"] for text in texts]
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: model.score(texts[i])["positional_scores"]}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i].equal(alone[i]) for i in range(2))


def test_hub_with_a_tokenizer_and_pieces(data, checkpoints, tmp_path):
    words = [" ".join(dictionary_of(40).symbols[4:])] * 30
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words), model_prefix=str(tmp_path / "m"), vocab_size=16, hard_vocab_limit=False
    )
    model = language_models.LaMemoLanguageModel.from_pretrained(
        str(checkpoints / "lamemo_lm"), "checkpoint_last.pt", str(data),
        tokenizer="moses", bpe="sentencepiece", sentencepiece_model=str(tmp_path / "m.model"),
    )  # fmt: skip
    assert model.tokenizer is not None and model.bpe is not None
    pieces = model.apply_bpe(model.tokenize("w1, w2"))
    assert "\u2581" in pieces and model.detokenize(model.remove_bpe(pieces)) == "w1, w2"
    assert isinstance(model.sample("w1", sampling=True, max_len_b=4), str)


class PairMerges:
    """Stands in for fastBPE where it is not installed: the same algorithm, written plainly.

    Each line of *codes* is a pair of pieces that become one and how often it was seen, the most frequent pair first.
    """

    def __init__(self, codes):
        with open(codes) as lines:
            self.rank = {tuple(line.split()[:2]): i for i, line in enumerate(lines)}

    def apply(self, sentences):
        return [" ".join(self._split(word) for word in sentence.split()) for sentence in sentences]

    def _split(self, word):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while known := [pair for pair in itertools.pairwise(pieces) if pair in self.rank]:
            best, merged = min(known, key=self.rank.__getitem__), []
            for piece in pieces:
                merged[-1:] = [merged[-1] + piece] if merged and (merged[-1], piece) == best else [*merged[-1:], piece]
            pieces = merged
        return "@@ ".join(pieces).removesuffix("</w>")


def fast_bpe_module():
    try:
        return importlib.import_module("fastBPE")
    except ImportError:
        return types.SimpleNamespace(fastBPE=PairMerges)


def test_hub_with_a_tokenizer_and_fastbpe(data, checkpoints, tmp_path, monkeypatch):
    """With the package fastBPE if it is there."""
    monkeypatch.setitem(sys.modules, "fastBPE", fast_bpe_module())
    merges = [f"w {i}</w>" for i in range(10)] + ["w 1", "w 2", *(f"w{t} {i}</w>" for t in (1, 2) for i in range(10))]
    (tmp_path / "codes").write_text("".join(f"{pair} {1000 - i}\n" for i, pair in enumerate(merges)))
    options = {"tokenizer": "moses", "bpe": "fastbpe", "bpe_codes": str(tmp_path / "codes")}
    folder = str(checkpoints / "lamemo_lm")
    model = language_models.LaMemoLanguageModel.from_pretrained(folder, "checkpoint_last.pt", str(data), **options)
    assert model.apply_bpe("w1 w13 w1w2 w45") == "w1 w13 w1@@ w2 w@@ 4@@ 5"
    assert model.detokenize(model.remove_bpe(model.apply_bpe(model.tokenize("w1w2, w13")))) == "w1w2, w13"
    text = "w1 w13\nw25 w7"
    assert model.encode("").tolist() == [2]
    assert model.encode(text).tolist() == [5, 17, 2, 29, 11, 2] and model.decode(model.encode(text)) == text
    plain = language_models.LaMemoLanguageModel.from_pretrained(folder, "checkpoint_last.pt", str(data))
    assert model.score(text)["positional_scores"].equal(plain.score(text)["positional_scores"])
    assert model.sample(text, sampling=True, max_len_b=4).startswith(text)


def test_a_missing_fastbpe_is_an_error_that_says_how_to_install_it(data, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastBPE", None)
    (tmp_path / "codes").touch()
    with pytest.raises(ImportError, match="--no-build-isolation fastBPE"):
        language_models.LaMemoLanguageModel.from_pretrained(
            str(checkpoints / "lamemo_lm"), "checkpoint_last.pt", str(data),
            bpe="fastbpe", bpe_codes=str(tmp_path / "codes"),
        )  # fmt: skip
