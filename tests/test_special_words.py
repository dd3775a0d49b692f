"""A text may hold every symbol of its dictionary: <s>, <pad>, </s> and <unk> are words like any other."""

import functools
import re
import runpy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.data import data_utils
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq_cli import eval_lm, generate, train, validate
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.criterions.chunked_cross_entropy import ChunkedCrossEntropyCriterion
from lamemo_fairseq.data.dictionary import NO_WORD, TextDictionary
from lamemo_fairseq.generation import PromptDataset, StreamingScorer
from lamemo_fairseq.models.language_models import LaMemoLanguageModel
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .helpers import TASK, dictionary_of, split_of, tiny_decoder, write_data
from .test_commands import printed

WORDS = 9
SOFTMAXES = {
    "full": {},
    "adaptive": {"adaptive_softmax_cutoff": "4,7"},
    "divided": {"adaptive_softmax_cutoff": "4,7", "adaptive_softmax_factor": 2.0, "adaptive_input": True},
}
VARIANT = ("recurrent", "transformer-xl", "right")
DECODERS = {name: tiny_decoder(VARIANT, words=WORDS, **options) for name, options in SOFTMAXES.items()}
CRITERIONS = {
    "cross_entropy": CrossEntropyCriterion,
    "chunked_cross_entropy": ChunkedCrossEntropyCriterion,
    "label_smoothed_cross_entropy": lambda task, average: LabelSmoothedCrossEntropyCriterion(task, average, 0.1),
    "adaptive_loss": AdaptiveLoss,
}
texts = st.lists(st.lists(st.integers(0, WORDS - 1), max_size=9), min_size=1, max_size=6).filter(any)


class Losses(SimpleNamespace):
    """An optimizer that only runs the backward pass."""

    def backward(self, loss):
        loss.sum().backward()


def batches_of(task, text, streams, shards=1):
    """All batches of the streams of a text, those of every rank."""
    dataset = split_of(text, 3, words=WORDS, name="valid")
    for shard in range(shards):
        options = {"max_sentences": streams // shards, "num_shards": shards, "shard_id": shard}
        yield from task.get_batch_iterator(dataset, **options).next_epoch_itr(shuffle=False)


@settings(max_examples=60, deadline=None)
@given(
    text=texts,
    streams=st.integers(1, 5),
    shards=st.integers(1, 2),
    softmax=st.sampled_from(list(SOFTMAXES)),
    name=st.sampled_from(list(CRITERIONS)),
    average=st.booleans(),
)
def test_every_criterion_counts_every_word(text, streams, shards, softmax, name, average):
    """In validation and in training, with rows that padding ends, and a rank that has nothing but padding."""
    tokens = [word for line in text for word in line]
    streams = max(1, min(streams, len(tokens)) // shards) * shards
    if streams > len(tokens) or (name == "adaptive_loss" and softmax == "full"):
        return
    decoder = DECODERS[softmax]
    model = LaMemoLanguageModel(decoder)
    task = SegmentLanguageModelingTask(SegmentLanguageModelingConfig(tokens_per_sample=3), decoder.dictionary)
    task._decoder = decoder
    criterion = CRITERIONS[name](task, average)
    seen = []
    for batch in batches_of(task, text, streams, shards):
        lengths = batch["net_input"]["src_lengths"].tolist()
        with torch.no_grad():
            scores, _ = decoder(**batch["net_input"])
            log_probs = decoder.get_normalized_probs((scores, None), True)
        expected = torch.zeros((), dtype=torch.float64)
        for row, length in enumerate(lengths):
            for place in range(length):
                nll = -log_probs[row, place]
                smooth = 0.1 if name.startswith("label") else 0.0
                others = smooth / (WORDS - 1)
                expected += (1 - smooth - others) * nll[batch["target"][row, place]] + others * nll.sum()
                seen.append(int(batch["target"][row, place]))
        loss, size, logged = task.valid_step(batch, model, criterion)
        torch.testing.assert_close(loss.sum(), expected, rtol=1e-9, atol=1e-12)
        assert logged["ntokens"] == sum(lengths)
        assert logged["nsentences"] == sum(length > 0 for length in lengths)
        assert size == (len(lengths) if average else sum(lengths))
        model.zero_grad()
        trained, _, logged = task.train_step(batch, model, criterion, Losses(), 0)
        torch.testing.assert_close(trained.sum().detach(), expected, rtol=1e-9, atol=1e-12)
        assert logged["nsentences"] == sum(length > 0 for length in lengths)
        model.eval()
    assert sorted(seen) == sorted(tokens)


@settings(max_examples=40, deadline=None)
@given(texts=texts, softmax=st.sampled_from(list(SOFTMAXES)), with_end=st.booleans())
def test_every_word_of_a_text_is_scored(texts, softmax, with_end):
    model = LaMemoLanguageModel(DECODERS[softmax])
    data = PromptDataset([torch.tensor(text, dtype=torch.long) for text in texts], dictionary_of(WORDS), with_end)
    batch = data.collater([data[i] for i in range(len(data))])
    scored = StreamingScorer(dictionary_of(WORDS)).generate([model], batch)
    for text, [found] in zip(texts, scored, strict=True):
        expected = (text[:-1] if text[-1:] == [2] else text) + [2] * with_end
        assert found["tokens"].tolist() == expected
        source = torch.tensor([[2, *expected]])
        with torch.no_grad():
            log_probs = model.get_normalized_probs(model(source), True)[0]
        alone = torch.tensor([log_probs[place, word] for place, word in enumerate(expected)], dtype=torch.float64)
        torch.testing.assert_close(found["positional_scores"].double(), alone, rtol=1e-9, atol=1e-12)


def test_strings_hold_every_symbol():
    dictionary = TextDictionary()
    dictionary.add_symbol("the")
    dictionary.add_symbol("madeupword0000")
    line = "<s> the <pad> </s> madeupword0000 <unk> </s> the"
    ids = dictionary.encode_line(line, add_if_not_exist=False)
    assert ids.tolist() == [0, 4, 1, 2, 5, 3, 2, 4, 2]
    hypothesis = dictionary.string(ids, extra_symbols_to_ignore={dictionary.eos()})
    prompt = dictionary.string(torch.tensor([dictionary.eos(), *ids[:-1]]))
    assert hypothesis == prompt == line
    assert dictionary.string(ids, include_eos=True) == f"{line} </s>"
    assert dictionary.string(torch.stack([ids, ids])) == f"{line}\n{line}"
    assert dictionary.pad() == NO_WORD and dictionary[dictionary.pad_index] == "<pad>"


def test_no_criterion_leaves_tokens_out():
    task = SegmentLanguageModelingTask(SegmentLanguageModelingConfig(tokens_per_sample=3), dictionary_of(WORDS))
    with pytest.raises(ValueError, match="--ignore-prefix-size drops the first tokens of every segment"):
        task.build_criterion(LabelSmoothedCrossEntropyCriterionConfig(ignore_prefix_size=1))


@pytest.mark.parametrize("name", ["valid", "train"])
def test_no_padding_is_told_by_a_word(name):
    """The batch of a ragged segment tells by its lengths alone what is a word."""
    dataset = split_of([[1] * 7], 3, words=WORDS, name=name)
    task = SegmentLanguageModelingTask(SegmentLanguageModelingConfig(tokens_per_sample=3), dictionary_of(WORDS))
    batches = list(task.get_batch_iterator(dataset, max_sentences=2).next_epoch_itr(shuffle=False))
    assert [batch["net_input"]["src_lengths"].tolist() for batch in batches] == [[3, 3], [1, 0]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data whose lines hold every symbol, and two models trained on it, with what the training logged."""
    folder = tmp_path_factory.mktemp("special")
    data = write_data(folder / "data", words=WORDS, train=400)
    generator = np.random.default_rng(0)
    builder = MMapIndexedDatasetBuilder(str(data / "valid.bin"), dtype=np.int32)
    for _ in range(12):
        builder.add_item(torch.from_numpy(np.append(generator.integers(0, WORDS, 6), 2)))
    builder.finalize(str(data / "valid.idx"))
    command = [
        data, *TASK, "--arch", "transformer_xl_lm", "--decoder-layers", 1, "--decoder-embed-dim", 8,
        "--decoder-attention-heads", 2, "--decoder-ffn-embed-dim", 8, "--tokens-per-sample", 4, "--mem-len", 4,
        "--batch-size", 5, "--optimizer", "adam", "--lr", 0.05, "--max-update", 12, "--log-format", "simple",
        "--num-workers", 0, "--no-epoch-checkpoints",
    ]  # fmt: skip
    logged = [printed(train.cli_main, *command, "--seed", n, "--save-dir", folder / str(n)) for n in (1, 2)]
    return data, [folder / seed / "checkpoint_last.pt" for seed in ("1", "2")], logged


def eval_lm_of(data, path, *options, main=eval_lm.cli_main):
    command = [data, *TASK, "--gen-subset", "valid", "--batch-size", 5, "--num-workers", 0, "--path", path, *options]
    text = printed(main, *command)
    return tuple(map(float, re.search(r"Evaluated (\d+) tokens.*Loss \(base 2\): ([\d.]+)", text, re.DOTALL).groups()))


def test_commands_agree_on_all_tokens(trained):
    data, paths, logged = trained
    for path, log in zip(paths, logged, strict=True):
        tokens, loss = eval_lm_of(data, path)
        assert tokens == 12 * 7
        validated = printed(
            validate.cli_main, data, *TASK, "--valid-subset", "valid", "--batch-size", 5, "--num-workers", 0,
            "--path", path, "--log-format", "simple",
        )  # fmt: skip
        for text in (validated, log):
            told = re.findall(r"valid on 'valid' subset \| .*?loss ([\d.]+) .*wpb ([\d.]+)", text)[-1]
            assert float(told[0]) == pytest.approx(loss, abs=6e-4)
        assert told[1] == "16.8"  # tokens a segment
        hub = LaMemoLanguageModel.from_pretrained(str(path.parent), path.name, str(data))
        line = "<s> w0 <pad> </s> <unk> w1 </s>"
        scored = hub.score(line)
        assert len(scored["positional_scores"]) == 7 and hub.decode(scored["tokens"]) == "<s> w0 <pad>\n<unk> w1"


def test_references_are_scored_and_printed_whole(trained):
    data, paths, _ = trained
    text = printed(
        generate.cli_main, data, *TASK, "--path", paths[0], "--gen-subset", "valid", "--score-reference",
        "--batch-size", 4, "--num-workers", 0,
    )  # fmt: skip
    lines = data_utils.load_indexed_dataset(str(data / "valid"), None)
    dictionary = dictionary_of(WORDS)
    for number, line in enumerate(lines):
        printed_line = {kind: re.search(rf"^{kind}-{number}\t(.*)$", text, re.MULTILINE)[1] for kind in "STHP"}
        words = " ".join(dictionary[i] for i in line[:-1])
        assert printed_line["S"] == printed_line["H"].split("\t")[1] == words
        assert printed_line["T"].replace("<<unk>>", "<unk>") == words  # fairseq's way to let no hypothesis match it
        assert len(printed_line["P"].split()) == len(line)


def test_two_models_in_eval_lm(trained):
    data, paths, _ = trained
    alone = [eval_lm_of(data, path)[1] for path in paths]
    tokens, loss = eval_lm_of(data, ":".join(map(str, paths)))
    assert tokens == 84 and loss < sum(alone) / 2  # the mean probability's loss is below the mean loss
    assert eval_lm_of(data, f"{paths[0]}:{paths[0]}")[1] == pytest.approx(alone[0], abs=1e-4)


def test_the_command_as_a_module_evaluates_the_same(trained):
    """Then the command is another copy of its module, whose functions fairseq calls."""
    data, [path, _], _ = trained
    run = functools.partial(runpy.run_module, "fairseq_cli.eval_lm", run_name="__main__", alter_sys=True)
    assert eval_lm_of(data, path, main=run) == eval_lm_of(data, path)
