"""A split read as documents: told apart, dealt to streams, scored and trained on as each alone."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fairseq.data import ConcatDataset
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq_cli import train
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.analysis import __main__ as analysis
from lamemo_fairseq.core.memory.position import real_tokens
from lamemo_fairseq.data.documents import DocumentDataset, DocumentOptions, Documents
from lamemo_fairseq.data.iterator import SegmentBatchIterator
from lamemo_fairseq.evaluation.evaluate import evaluate

from . import test_commands
from .core.helpers import first_of_each_memory
from .helpers import TASK, dictionary_of, run_command, split_of, tiny_decoder, write_data
from .test_streams import EOS, epoch_of

ROOT = Path(__file__).parent.parent
SEPARATOR = 9  # the word w5
WORDS = dictionary_of(17)
LINE, EMPTY = [SEPARATOR, EOS], [EOS]
A, B, C = [4, 5, 6, EOS], [7, EOS], [8, SEPARATOR, EOS]


def spans_of(lines, options):
    """The tokens of each document."""
    tokens = split_of(lines, 3).tokens
    found = options.find(["data/train"], tokens, WORDS)
    return [tokens.read(start, stop).tolist() for start, stop in zip(*found, strict=True)]


@pytest.mark.parametrize("line", [LINE, LINE[:1]], ids=["ended", "not ended"])
@pytest.mark.parametrize(
    ("shape", "left_out", "scored"),
    [
        ("A-BC", ["A", "BC"], ["A-", "BC"]),
        ("-AB", ["AB"], ["-AB"]),
        ("AB-", ["AB"], ["AB-"]),
        ("A--B", ["A", "B"], ["A--", "B"]),
        ("A-_-B", ["A", "B"], ["A-_-", "B"]),
        ("--A-", ["A"], ["--A-"]),
        ("--A--B---", ["A", "B"], ["--A--", "B---"]),
    ],
)
def test_documents_between_separators(shape, left_out, scored, line):
    lines = {"A": A, "B": B, "C": C, "-": line, "_": []}
    text = [lines[name] for name in shape]
    for documents, is_scored in ((left_out, False), (scored, True)):
        options = DocumentOptions("separator", WORDS[SEPARATOR], is_scored)
        assert spans_of(text, options) == [[t for name in names for t in lines[name]] for names in documents]


def test_an_empty_line_separates():
    assert spans_of([A, EMPTY, B, C], DocumentOptions("separator")) == [A, B + C]


def test_what_does_not_separate():
    with pytest.raises(ValueError, match=r"has no line 'w5': pass another --document-separator, or --documents none"):
        spans_of([A, B, C], DocumentOptions("separator", "w5"))
    with pytest.raises(ValueError, match=r" has no empty line: pass another --document-separator, or --documents none"):
        spans_of([A, B, C], DocumentOptions("separator"))
    with pytest.raises(ValueError, match=r"--document-separator 'w5 x': 'x' is not in dict.txt: write the line as it"):
        spans_of([A, LINE], DocumentOptions("separator", "w5 x"))
    for scored in (False, True):
        with pytest.raises(ValueError, match=r"has no document of at least one token: pass another --documents$"):
            spans_of([LINE, LINE], DocumentOptions("separator", "w5", scored))


def test_recorded_documents(tmp_path):
    parts = [split_of([A, B, C], 3).tokens.lines, split_of([B, A], 3).tokens.lines]
    tokens = split_of([A, B, C, B, A], 3).tokens
    tokens.lines = ConcatDataset(parts)
    paths = [str(tmp_path / name) for name in ("train", "train1")]
    options = DocumentOptions("recorded")
    # The values of the option are not those of every command: another rule is `none` here and `one` in the analysis.
    otherwise = "or pass another --documents$"
    with pytest.raises(FileNotFoundError, match=rf"no documents are recorded in .*train\.documents: .*, {otherwise}"):
        options.find(paths, tokens, WORDS)
    (tmp_path / "train.documents").write_text("0\n2\n1\n")
    (tmp_path / "train1.documents").write_text("1\n0\n1\n")
    found = options.find(paths, tokens, WORDS)
    assert [list(map(int, bound)) for bound in found] == [[0, 6, 9, 11], [6, 9, 11, 15]]
    for wrong, message in (
        ("3\n", f"is of 6 lines, and the split has 5: .*, {otherwise}"),
        ("x\n", "damaged"),
        ("3\n-1\n", "damaged"),
    ):
        (tmp_path / "train1.documents").write_text(wrong)
        with pytest.raises(ValueError, match=message):
            options.find(paths, tokens, WORDS)


def dataset_of(lengths, segment_length=3, clear=True, roll_seed=None, words=17):
    """Documents of numbered tokens, a token that belongs to none between any two."""
    count, starts = 4, []
    for length in lengths:
        starts.append(count - 4)
        count += length + 1
    text = [[4 + i % (words - 4) for i in range(count)]]
    starts = np.array(starts)
    keep = np.array(lengths) > 0
    documents = Documents(starts[keep], (starts + np.array(lengths))[keep])
    tokens = split_of(text, segment_length, words).tokens
    options = DocumentOptions("recorded", clear=clear)
    return DocumentDataset(documents, options, tokens, "valid", segment_length, EOS, roll_seed)


def documents_of(dataset):
    return [dataset.tokens.read(start, stop).tolist() for start, stop in zip(*dataset.documents, strict=True)]


lengths = st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(any)


@settings(max_examples=150, deadline=None)
@given(lengths=lengths, streams=st.integers(1, 9), shards=st.sampled_from([1, 2]), clear=st.booleans())
def test_every_token_is_a_target_once(lengths, streams, shards, clear):
    dataset = dataset_of(lengths, 4, clear, roll_seed=1, words=400)
    rows, contexts, begun = {}, {}, 0
    for batches in epoch_of(dataset, streams * shards, shards=shards):
        for batch in batches:
            position = batch["net_input"]["position"]
            real = real_tokens(batch["target"], batch["net_input"]["src_lengths"])
            assert position.ragged == (not real.all())
            begun += len(position.cleared)
            for row, stream in enumerate(position.streams):
                target = batch["target"][row][real[row]].tolist()
                assert (row in position.ended) == (not target)
                rows.setdefault(stream, []).extend(target)
                contexts.setdefault(stream, []).extend(batch["net_input"]["src_tokens"][row][real[row]].tolist())
    layout, documents = dataset.layout(streams * shards), documents_of(dataset)
    assert begun == (len(documents) if clear else 0)
    assert sum(map(len, rows.values())) == layout.num_tokens == sum(lengths)
    for stream, row in rows.items():
        order = list(dataset.in_order.layout(streams * shards).deal.dealt[stream])
        read = []
        while row:  # documents in another order, each whole, the first word after </s>
            document = next(d for d in order if row[: len(documents[d])] == documents[d])
            length = len(documents[document])
            assert contexts[stream][:length] == [EOS, *row[: length - 1]]
            contexts[stream], row = contexts[stream][length:], row[length:]
            order.remove(document)
            read.append(document)
        assert order == []


def test_streams_without_documents_are_told(caplog):
    dataset_of([3, 0, 5]).layout(9).check("the split 'valid'", training=False)
    assert "has 2 documents, so that 7 of 9 streams (--batch-size times ranks) read nothing" in caplog.text


def test_streams_read_in_the_order_of_the_split_or_in_another_each_epoch():
    def order(roll_seed, epoch):
        (batches,) = epoch_of(dataset_of([3] * 20, roll_seed=roll_seed, words=400), 2, epoch)
        return [int(batch["target"][0, 0]) for batch in batches]

    assert order(None, 1) == order(None, 2) == sorted(order(None, 1)) == sorted(order(1, 1))
    assert order(1, 1) == order(1, 1) != order(1, 2)


@torch.no_grad()
def bits_alone(decoder, dataset):
    """The mean loss of the tokens of documents, each read by itself."""
    nll, count = 0.0, 0
    for words in documents_of(dataset):
        text = torch.tensor([[EOS, *words]])
        log_probs = decoder.log_probs(decoder.read_text(text[:, :-1]))
        nll -= log_probs.gather(2, text[:, 1:, None]).sum().item()
        count += len(words)
    return nll / count / math.log(2)


@pytest.mark.parametrize("variant", first_of_each_memory().values(), ids="-".join)
def test_the_loss_is_that_of_documents_alone(variant):
    """At any number of streams and of shards."""
    decoder = tiny_decoder(variant)
    dataset = dataset_of([17, 0, 1, 5, 3, 9, 1, 20])
    expected = bits_alone(decoder, dataset)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = decoder
            self.get_normalized_probs = decoder.get_normalized_probs
            self.forward = decoder.forward

    model = Model()
    for streams, shards in ((1, 1), (3, 1), (12, 1), (4, 2)):
        batches = [batch for shard in epoch_of(dataset, streams, shards=shards) for batch in shard]
        found = evaluate([model], WORDS, batches)["loss"]
        assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("streams", [1, 3])
def test_a_memory_that_is_kept_is_that_of_one_text(streams):
    """In the order of the split; each document begins after </s>."""
    decoder, dataset = tiny_decoder(), dataset_of([17, 1, 5, 3, 9, 20], clear=False)
    (batches,) = epoch_of(dataset, streams)
    found = {}
    with torch.no_grad():
        for batch in batches:
            inputs = batch["net_input"]
            features, _ = decoder.extract_features(**inputs)
            for row, stream in enumerate(inputs["position"].streams):
                found.setdefault(stream, []).append(features[row, : inputs["src_lengths"][row]])
        documents = documents_of(dataset)
        for stream, dealt in enumerate(dataset.layout(streams).deal.dealt):
            text = torch.tensor([[t for d in dealt for t in [EOS, *documents[d][:-1]]]])
            expected = decoder.read_text(text).squeeze(0)
            torch.testing.assert_close(torch.cat(found[stream]), expected, rtol=0, atol=1e-12)


MODEL = [
    *("--arch", "compressive_transformer_lm", "--decoder-layers", 1, "--decoder-embed-dim", 16, "--mem-len", 10),
    *("--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 32, "--tokens-per-sample", 8, "--compressed-len", 4),
    *("--dropout", 0.1, "--optimizer", "adam", "--lr", 3e-3, "--criterion", "chunked_cross_entropy"),
]
DOCUMENTS = ["--documents", "separator", "--document-separator", "w5"]
SPLITS = {
    "train": [90, 3, 41, 120, 1, 66, 250, 17, 8, 30, 75, 200],
    "valid": [30, 5, 61, 2],
    "test": [3, 70, 1, 40, 19],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("data"), SPLITS)


def write_documents(folder, splits):
    """Documents of so many tokens, a line each, with a separator before each, and a record of the same."""
    write_data(folder, words=40)
    generator = torch.Generator().manual_seed(0)
    for split, lengths in splits.items():
        builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.int32)
        for length in lengths:
            builder.add_item(torch.tensor(LINE))
            builder.add_item(torch.randint(10, 40, (length,), generator=generator))
        builder.finalize(str(folder / f"{split}.idx"))
        (folder / f"{split}.documents").write_text("2\n" * len(lengths))
    return folder


def run_training(data, folder, updates, *options, run=run_command):
    return run(
        train.cli_main,
        *(data, *TASK, *MODEL, "--save-dir", folder, "--max-update", updates, "--save-interval-updates", 7),
        *("--batch-size", 4, "--log-format", "simple", "--num-workers", 0, *options),
    )


def last_checkpoint(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=False)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_training(data, folder, 20, *DOCUMENTS, "--roll")
    return folder, last_checkpoint(folder)


def test_training_goes_on_within_documents(data, trained, tmp_path):
    folder, whole = trained
    state = torch.load(folder / "checkpoint_1_14.pt", weights_only=False)
    groups = state["extra_state"]["train_iterator"]["memory"]["groups"]
    assert len(groups) > 1 and sorted(s for group in groups for s in group["streams"]) == [0, 1, 2, 3]
    restore = ["--restore-file", folder / "checkpoint_1_14.pt"]
    run_training(data, tmp_path, 20, *DOCUMENTS, "--roll", *restore)
    resumed = last_checkpoint(tmp_path)
    assert all(torch.equal(weight, resumed["model"][name]) for name, weight in whole["model"].items())
    with pytest.raises(ValueError, match="--documents is none, there it was separator"):
        run_training(data, tmp_path, 20, "--roll", *restore)


def test_other_documents_within_an_epoch_are_refused():
    def iterator(lengths=(30, 6), **options):
        dataset = dataset_of(list(lengths))
        dataset.document_options = replace(dataset.document_options, **options)
        return SegmentBatchIterator(dataset, 2)

    first = iterator()
    next(first.next_epoch_itr())
    state = first.state_dict()
    iterator().load_state_dict(state)
    for changes, message in (
        ({"clear": False}, "--at-document is keep, there it was clear"),
        ({"scored": True}, "--score-separators is given, there it was not given"),
        ({"source": "separator", "separator": "w5"}, "--documents is separator, there it was recorded"),
        ({"lengths": (20, 10, 6)}, "the number of documents is 3, there it was 2"),
    ):
        with pytest.raises(ValueError, match=message):
            iterator(**changes).load_state_dict(state)


def test_shards_have_documents_of_their_own(data, tmp_path):
    """Each epoch reads the next folder. What is not recorded there is told before the first update."""
    shards = f"{data}:{write_documents(tmp_path / 'shard', {'train': [30, 8, 70, 2]})}"
    words = ["--documents", "recorded", "--disable-validation"]
    text = run_training(shards, tmp_path, 40, *words, run=test_commands.printed)
    seen = re.findall(
        r"train: (\d+) documents of (\d+) tokens in 4 streams, (\d+) segments; the memory is cleared", text
    )
    assert [tuple(map(int, found)) for found in seen] == [(12, 925, 32), (4, 118, 9)]
    (tmp_path / "shard" / "train.documents").unlink()
    with pytest.raises(FileNotFoundError, match=r"no documents are recorded in .*shard/train\.documents"):
        run_training(shards, tmp_path, 30, *words)


def test_a_checkpoint_of_before_goes_on_with_one_text():
    iterator = SegmentBatchIterator(split_of([A] * 9, 3), 2)
    next(iterator.next_epoch_itr())
    state = iterator.state_dict()
    assert state["layout"].pop("--documents") == "none"
    other = SegmentBatchIterator(split_of([A] * 9, 3), 2)
    other.load_state_dict(state)
    assert other.iterations_in_epoch == 1
    with pytest.raises(ValueError, match="--documents is recorded, there it was none"):
        SegmentBatchIterator(dataset_of([30, 6]), 2).load_state_dict(state)


def test_curves_are_those_of_one_text(data, trained):
    """The analysis tells documents by a rule of its own, in what one stream reads after another."""
    args = analysis.parser().parse_args([str(data), "x", "--out", "x", "--subset", "test", "--cpu"])
    args.rule = analysis.Rule.parse(args.documents)
    opened = analysis.opening(str(trained[0] / "checkpoint_last.pt"), args)
    assert not isinstance(opened.split, DocumentDataset) and len(opened.split.tokens) > sum(SPLITS["test"])


def test_commands_score_documents(data, trained):
    """At any number of streams, and separators only if asked to; fairseq-validate as in training, without options."""
    path, tokens, separators = trained[0] / "checkpoint_last.pt", sum(SPLITS["test"]), 2 * len(SPLITS["test"])
    one, nine = (test_commands.evaluate(data, path, *DOCUMENTS, "--batch-size", streams) for streams in (1, 9))
    assert one == nine and one[0] == tokens
    assert test_commands.validated(data, path, "--batch-size", 3) == (tokens, pytest.approx(one[1], abs=1e-3))
    recorded = test_commands.evaluate(data, path, "--documents", "recorded", "--batch-size", 2)
    assert recorded[0] == tokens + separators and recorded[1] != one[1]  # there they are a document's first line
    kept = ["--score-separators", "--at-document", "keep", "--batch-size", 4]
    assert test_commands.evaluate(data, path, *DOCUMENTS, *kept)[0] == tokens + separators


def test_the_commands_of_the_page_go_from_a_text_to_a_trained_model(tmp_path):
    page = (ROOT / "docs" / "documents.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for folder in ("examples", "lamemo_fairseq", "preprocess"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": "."}
    done = subprocess.run(
        ["bash", "-ec", block.replace("--max-update 1000", "--max-update 2")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    told = done.stdout + done.stderr
    assert done.returncode == 0, told[-3000:]
    (streams,) = re.findall(r"`(train: [^`]* streams)`", page)
    assert streams in told and "test: 30 documents of" in told and "Loss (base 2): " in told
