"""The loss of a split per token, per word and per byte: one total, and the counts of the text as it was given."""

import json
import math
import os
import subprocess
from unittest import mock

import pytest
from fairseq_cli import eval_lm, train
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq import score
from lamemo_fairseq.data.binarized import load_dictionary
from lamemo_fairseq.data.original import COUNTED, read_original
from lamemo_fairseq.evaluation.evaluate import evaluate
from lamemo_fairseq.evaluation.units import Original, Totals, report, sentence
from lamemo_fairseq.models.language_models import LaMemoLanguageModel
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask
from preprocess import original
from preprocess.__main__ import main as preprocess
from preprocess.files import Span

from .helpers import TASK, run_command, tiny_decoder
from .preprocessing import TEXTS, own, write
from .test_commands import printed

TEXT = TEXTS["test"]
TRAINED = ["--decoder-layers", 2, "--decoder-embed-dim", 16, "--decoder-attention-heads", 2, "--mem-len", 8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same text as words, pieces and bytes, and cut with @@ before, by the way it was made."""
    top = tmp_path_factory.mktemp("units")
    texts = top / "texts"
    texts.mkdir()
    (top / "cut").mkdir()
    for split, text in TEXTS.items():
        write(texts / f"{split}.txt", text)
        lines = text.decode().split("\n")
        cut = [" ".join(f"{w[:3]}@@ {w[3:]}" if len(w) > 3 else w for w in line.split()) for line in lines]
        write(top / "cut" / f"{split}.txt", "\n".join(cut).encode())
    own(texts, top / "words")
    own(texts, top / "sentencepiece", "--bpe", "sentencepiece", "--vocab-size", "90")
    own(texts, top / "bytes", "--bpe", "bytes")
    own(top / "cut", top / "@@")
    own(texts, top / "text8", "--bpe", "text8")
    return top


def split_of(folder, length=5):
    """The dictionary, the test split and its task."""
    dictionary = load_dictionary(str(folder / "dict.txt"))
    cfg = SegmentLanguageModelingConfig(data=str(folder), tokens_per_sample=length, train_subset="train")
    cfg.dataset_impl = None
    task = SegmentLanguageModelingTask(cfg, dictionary)
    return dictionary, task.load_dataset("test"), task


def scored(folder, streams=3, take=None, **options):
    """The result of `evaluate`, and the total loss in nats added up token by token."""
    dictionary, split, task = split_of(folder)
    model = LaMemoLanguageModel(tiny_decoder(("recurrent", "transformer-xl", "right"), words=len(dictionary)))

    def batches():
        return task.get_batch_iterator(split, max_sentences=streams, as_streams=True).next_epoch_itr(shuffle=False)

    total = 0.0
    for batch in batches():
        probs = model.get_normalized_probs(model(**batch["net_input"]), log_probs=True)
        for row, length in enumerate(batch["net_input"]["src_lengths"].tolist()):
            total -= sum(float(probs[row, i, batch["target"][row, i]].detach()) for i in range(length))
    return evaluate([model], dictionary, list(batches())[:take], split=split, **options), total


def test_four_tokenizations_of_a_text_are_measured_alike(folders):
    """Whatever the tokens: the total divided by the words and bytes that ``wc`` counts."""
    folder = folders / "@@"
    preprocess(["count", str(folder), f"test={folders / 'texts' / 'test.txt'}"])
    words, size = len(TEXT.split()), len(TEXT)
    tokens = set()
    for name in ("words", "sentencepiece", "bytes", "@@"):
        result, total = scored(folders / name)
        assert result["nll_nats"] == pytest.approx(total, rel=1e-9)
        assert (result["words"], result["bytes"], result["text"]) == (words, size, "test.txt")
        assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-9)
        assert result["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-9)
        assert result["bits_per_token"] == pytest.approx(total / math.log(2) / result["tokens"], rel=1e-9)
        assert result["token_perplexity"] == pytest.approx(2 ** result["loss"], rel=1e-9)
        assert result["line_ends"] == TEXT.count(b"\n") and result["missing"] == ""
        tokens.add(result["tokens"])
    assert len(tokens) == 4
    joined, total = scored(folder, post_process="@@ ")
    assert joined["loss"] == pytest.approx(total / math.log(2) / (words + TEXT.count(b"\n")), rel=1e-9)
    assert joined["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-9)


def test_unknown_words_are_shares_of_words(folders):
    """<unk> in the text, and words that the training text does not have; ends of lines are no words."""
    known = set(TEXTS["train"].decode().split()) - {"<unk>"}
    words = TEXT.decode().split()
    unknown = sum(word not in known for word in words)
    result, _ = scored(folders / "words")
    assert (result["unknown_tokens"], result["tokens"] - result["line_ends"]) == (unknown, len(words))
    assert result["unknown_share"] == unknown / len(words) > 0.01
    assert f"{unknown / len(words):.2%} of the others unknown" in sentence(result)
    assert sentence(result).endswith("; both count all unknown words as one, which is easy to predict")
    of_bytes = scored(folders / "bytes")[0]
    assert of_bytes["unknown_tokens"] == 0 and sentence(of_bytes).endswith(" of it)")


def test_a_part_of_a_split_has_no_figures_per_word(folders):
    result, _ = scored(folders / "words", take=2)
    assert result["word_perplexity"] is result["bits_per_byte"] is result["words"] is None
    assert result["missing"].startswith("30 of ") and "score the whole split" in sentence(result)
    assert "; Loss is that of a token, </s> among them, as words and bytes" in sentence(result)
    assert "; Loss is that of a token, as words" in sentence({**result, "line_ends": 0})
    joined, _ = scored(folders / "@@", take=2, post_process="@@ ")
    assert "; Loss is that of a word that --post-process joins, </s> among them, as words" in sentence(joined)


def test_a_shard_that_reads_nothing_has_no_loss(folders):
    """It would be 0, and the perplexity 1."""
    with pytest.raises(ValueError, match="no token was scored, as all documents are in other streams: leave"):
        scored(folders / "words", take=0)
    assert math.isnan(Totals().bits(0)) and math.isnan(Totals().perplexity(0))


def test_counts_of_another_text_are_not_used(folders, tmp_path):
    """Of as many lines, so that nobody noticed; nor those of what was normalised, without a word."""
    folder = tmp_path / "data"
    own(folders / "texts", folder)
    split = split_of(folder)[1]
    assert Original.of(split).text.words == len(TEXT.split())
    preprocess(["count", str(folder), f"test={folders / 'texts' / 'test.txt'}"])
    counts = json.loads((folder / COUNTED).read_text())
    counts["originals"]["test"]["tokens"] -= 1
    (folder / COUNTED).write_text(json.dumps(counts))
    wrong = Original.of(split)
    assert wrong.text is None and "count" in wrong.missing and f"and test has {len(split.tokens):,}" in wrong.missing
    (folder / COUNTED).write_text('{"originals": {"test": {"words": 1}}}')
    with pytest.raises(ValueError, match=r"original.json is damaged .*: remove it, and count again"):
        Original.of(split)
    (folder / COUNTED).unlink()
    for record in ("preprocess.json", None):
        if record:
            (folder / record).unlink()
        missing = Original.of(split).missing
    assert (
        missing.startswith(f"{folder} has no counts of the text of test; `python -m ") and "test=TEXT` adds" in missing
    )
    assert "are not counted: it is not known of which split" in sentence(report(Totals(1.0, 2, 2), Original.of(None)))
    normalized = sentence(scored(folders / "text8")[0])
    assert "original text, test.txt, which was reduced to letters and spaces before it was scored)" in normalized


def test_data_made_anew_forgets_what_was_counted(folders, tmp_path):
    own(folders / "cut", tmp_path / "data")
    assert read_original(str(tmp_path / "data"), "test") is None
    preprocess(["count", str(tmp_path / "data"), f"test={folders / 'texts' / 'test.txt'}"])
    assert read_original(str(tmp_path / "data"), "test").bytes == len(TEXT)
    own(folders / "cut", tmp_path / "data", "--threshold", "3")
    assert read_original(str(tmp_path / "data"), "test") is None


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("aé中\u3000\u00a0\u2028 \n\r\t\x1c"), max_size=40),
    junk=st.binary(max_size=2),
    block=st.integers(1, 5),
    start=st.integers(0, 3),
)
def test_words_are_counted_across_blocks(text, junk, block, start, tmp_path_factory):
    content = b"\n\n\n" + text.encode() + junk
    file = write(tmp_path_factory.getbasetemp() / "blocks.txt", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(original, "_BLOCK", block)
        counts = original.count_text(Span(file, start, len(content)))
    part = content[start:]
    assert counts[:3] == (len(part.decode("utf-8", "replace").split()), len(part), part.count(b"\n"))


def test_counts_are_those_of_wc(folders):
    for split in TEXTS:
        file = folders / "texts" / f"{split}.txt"
        wc = subprocess.run(["wc", "-lwc", file], capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})
        text = read_original(str(folders / "words"), split)
        assert [text.lines, text.words, text.bytes] == [int(n) for n in wc.stdout.split()[:3]]
    train_only = folders / "shares"
    preprocess(
        ["own", "--destdir", str(train_only), "--source", str(folders / "texts" / "train.txt"), "--bpe", "bytes"]
    )
    parts = [read_original(str(train_only), split) for split in TEXTS]
    assert sum(part.bytes for part in parts) == len(TEXTS["train"])
    assert sum(part.words for part in parts) == len(TEXTS["train"].split()) and "bytes 0 to " in parts[0].text


def test_parts_of_a_text_are_counted_as_one(folders, tmp_path):
    """A word that begins in one part and ends in the next, as ``cat`` joins them."""
    middle = TEXT.index(b"word") + 2
    parts = [write(tmp_path / f"part{i}", text) for i, text in enumerate((TEXT[:middle], TEXT[middle:]))]
    own(folders / "cut", tmp_path / "data")
    preprocess(["count", str(tmp_path / "data"), *(f"test={part}" for part in parts)])
    text = read_original(str(tmp_path / "data"), "test")
    assert (text.words, text.bytes) == (len(TEXT.split()), len(TEXT)) and text.text == "part0 and 1 more"
    assert {path.name for path in (tmp_path / "data").iterdir() if path.is_dir()} == set()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("test={cut}/test.txt", "is cut into pieces already .@@ is at .*: name the text as it was before"),
        (
            "test={texts}/valid.txt",
            "has 40 lines, and .*test has 50: name the text that it was made from, or pass --oth",
        ),
        ("other={texts}/test.txt", r"no split 'other' in .* \(or choose another as SPLIT=TEXT\)$"),
        ("test={texts}/none.txt", "there is no file"),
        ("test.txt", "name a split and its text, such as test=test.txt"),
    ],
)
def test_another_text_is_not_counted(text, message, folders, tmp_path):
    own(folders / "cut", tmp_path / "data")
    text = text.format(cut=folders / "cut", texts=folders / "texts")
    with pytest.raises(SystemExit, match=message):
        preprocess(["count", str(tmp_path / "data"), text])
    assert not (tmp_path / "data" / COUNTED).exists()


def test_lines_may_differ_if_that_is_said(folders, tmp_path, capsys):
    own(folders / "texts", tmp_path / "data", "--paragraphs")
    text = f"test={folders / 'texts' / 'test.txt'}"
    preprocess(["count", str(tmp_path / "data"), text, "--other-lines"])
    assert f"test: {len(TEXT.split()):,} words, {len(TEXT):,} bytes, 50 lines in test.txt" in capsys.readouterr().out


def test_a_text_in_pieces_gets_a_hint_and_no_counts(folders, tmp_path, capsys):
    own(folders / "cut", tmp_path / "data")
    assert "hint: the text is cut into pieces already (@@ is at" in capsys.readouterr().err
    assert read_original(str(tmp_path / "data"), "test") is None


def test_both_commands_report_the_same(folders, tmp_path, capsys):
    """In a line of the log, and as JSON."""
    data = folders / "bytes"
    run_command(
        train.cli_main, data, *TASK, "--arch", "lamemo_lm", *TRAINED, "--tokens-per-sample", 8, "--batch-size", 4,
        "--optimizer", "adam", "--lr", 0.01, "--max-update", 1, "--num-workers", 0, "--save-dir", tmp_path,
        "--disable-validation",
    )  # fmt: skip
    path = tmp_path / "checkpoint_last.pt"
    options = ["--path", path, "--gen-subset", "test", "--batch-size", 2, "--num-workers", 0]
    text = printed(eval_lm.cli_main, data, *TASK, *options)
    lines = text.splitlines()
    [logged] = [json.loads(line) for line in lines if line.startswith("{") and "bits_per_byte" in line]
    capsys.readouterr()
    with mock.patch("lamemo_fairseq.evaluation.evaluate.logger.info") as told:
        score.main([str(data), str(path), "--batch-size", "2", "--cpu"])
    assert [call.args[0].split(" ")[0] for call in told.call_args_list] == ["Evaluated", "Units:"]  # no JSON
    reported = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in reported.items() if k in logged and k != "tokens_per_second"} == {
        k: v for k, v in logged.items() if k != "tokens_per_second"
    }
    assert reported["data"] == str(data / "test") and reported["tokens"] == reported["bytes"] == len(TEXT)
    assert reported["bits_per_byte"] == reported["loss"] > 3
    [units] = [line for line in lines if line.startswith("Units: ")]
    assert (
        units == f"Units: {sentence(logged)}"
        and f"{logged['bits_per_byte']:.4f} bits per byte ({len(TEXT):,} of it)" in units
    )
    half = printed(eval_lm.cli_main, data, *TASK, *options, "--num-shards", 2)
    assert "tokens were scored, and the counts of test.txt are of all of them; score the whole split" in half
    with pytest.raises(SystemExit, match=r"score: there is no checkpoint none\.pt"):
        score.main([str(data), "none.pt"])
    for option, needed in (
        (["--document-separator", "w"], "--document-separator is for --documents separator"),
        (["--score-separators", "--documents", "recorded"], "--score-separators is for --documents separator"),
        (["--batch-size", "0"], "--batch-size is 0, it must be at least 1"),
        (["--batch-size", "-1"], "--batch-size is -1, it must be at least 1"),
        (["--at-document", "keep"], "--at-document is for --documents recorded or separator"),
    ):
        with pytest.raises(SystemExit, match=f"score: {needed}"):
            score.main([str(data), str(path), "--cpu", *option])
