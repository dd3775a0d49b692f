"""Splits are cut into streams, and streams into segments, without losing or doubling a token."""

from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from fairseq.data import ConcatDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset, MMapIndexedDatasetBuilder
from hypothesis import given, settings
from hypothesis import strategies as st

from lamemo_fairseq.core.memory import StreamMemory
from lamemo_fairseq.core.memory.lookahead import LookaheadState
from lamemo_fairseq.core.memory.position import real_tokens
from lamemo_fairseq.data.iterator import SegmentBatchIterator
from lamemo_fairseq.data.segments import SegmentDataset, SegmentKey
from lamemo_fairseq.data.streams import StreamLayout, TokenSequence

from .helpers import split_of, tiny_decoder

EOS = 2
texts = st.lists(st.lists(st.integers(0, 16), max_size=12), min_size=1, max_size=12).filter(lambda t: sum(map(len, t)))


def numbered(count: int, line: int = 7):
    """Lines whose tokens are all different."""
    ids = list(range(4, 4 + count))
    return [ids[i : i + line] for i in range(0, count, line)]


def rows_of(batch):
    """The targets of a batch, without padding."""
    return [row[:n].tolist() for row, n in zip(batch["target"], batch["net_input"]["src_lengths"], strict=True)]


def epoch_of(dataset, num_streams, epoch=1, shards=1):
    """All batches of an epoch, shard by shard."""
    return [
        [dataset.collater([dataset[key] for key in keys]) for keys in iterator.ordered_batches(epoch)]
        for iterator in (
            SegmentBatchIterator(dataset, num_streams // shards, num_shards=shards, shard_id=i) for i in range(shards)
        )
    ]


@settings(max_examples=200, deadline=None)
@given(text=texts, streams=st.integers(1, 9), length=st.integers(1, 8), seed=st.sampled_from([None, 1]))
def test_every_token_is_a_target_once(text, streams, length, seed):
    tokens = [t for line in text for t in line]
    streams = min(streams, len(tokens))
    dataset = split_of(text, length, roll_seed=seed)
    (batches,) = epoch_of(dataset, streams)
    rows = {b: [] for b in range(streams)}
    contexts = {b: [] for b in range(streams)}
    for k, batch in enumerate(batches):
        position = batch["net_input"]["position"]
        assert position.index == k and position.last == (k == len(batches) - 1)
        real = real_tokens(batch["target"], batch["net_input"]["src_lengths"])
        assert batch["ntokens"] == int(real.sum())
        assert position.ragged == (not real.all())
        for row, stream in enumerate(position.streams):
            rows[stream] += batch["target"][row][real[row]].tolist()
            contexts[stream] += batch["net_input"]["src_tokens"][row][real[row]].tolist()
    layout = dataset.layout(streams)
    for stream, row in rows.items():
        start, stop = layout.bounds(stream)
        own = tokens[start:stop]
        if seed is None:
            assert row == own
            assert contexts[stream][0] == (tokens[start - 1] if start else EOS)
        else:
            assert any(row == own[i:] + own[:i] for i in range(len(own)))
        assert contexts[stream][1:] == row[:-1]
    assert sum(map(len, rows.values())) == len(tokens)


def test_rolling_differs_by_epoch_and_seed_and_repeats():
    def targets(seed, epoch):
        dataset = split_of(numbered(400), 100, words=500, roll_seed=seed)
        return dataset[SegmentKey(epoch, 1, 0, 0)].target.tolist()

    assert targets(1, 1) == targets(1, 1)
    assert targets(1, 1) != targets(1, 2)
    assert targets(1, 1) != targets(2, 1)


def test_streams_roll_apart():
    """One offset for all would read them in step, and their seams at once."""
    dataset = split_of(numbered(400), 100, words=500, roll_seed=1)
    offsets = {dataset[SegmentKey(1, 4, 0, stream)].target[0] - 4 - 100 * stream for stream in range(4)}
    assert len(offsets) == 4


def test_every_row_of_an_epoch_has_an_id_of_its_own():
    (batches,) = epoch_of(split_of(numbered(40), 3, words=99), 4)
    ids = torch.cat([batch["id"] for batch in batches]).tolist()
    assert len(set(ids)) == len(ids) == 4 * 4


def test_looking_at_the_first_batch_leaves_the_iterator_where_it_is():
    iterator = SegmentBatchIterator(split_of(numbered(60), 5, words=99), 2)
    batches = iterator.next_epoch_itr()
    next(batches)
    assert iterator.first_batch["net_input"]["position"].index == 0
    assert next(batches)["net_input"]["position"].index == 1
    assert iterator.iterations_in_epoch == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer_size", [0, 10])
def test_batches_looked_at_early_are_those_that_follow(workers, buffer_size):
    dataset, decoder = split_of(numbered(100), 5, words=128), tiny_decoder(words=128, tokens_per_sample=5).train()
    iterator = SegmentBatchIterator(
        dataset, 2, num_workers=workers, buffer_size=buffer_size, memory=decoder.streams, reuse_dataloader=True
    )
    prepared = []

    def prepare(batch):
        prepared.append({**batch, "prepared": True})
        return prepared[-1]

    assert iterator.peek(prepare) == (None, None)  # nothing is read yet
    for epoch in (1, 2):
        (expected,) = epoch_of(dataset, 2, epoch=epoch)
        for number, batch in enumerate(iterator.next_epoch_itr()):
            assert batch["net_input"]["position"] == expected[number]["net_input"]["position"]
            assert torch.equal(batch["target"], expected[number]["target"])
            assert ("prepared" in batch) == (number > 0 and number % 3 == 1)
            decoder(**batch["net_input"])
            if number % 3 == 0:
                saved = iterator.state_dict()
                (loaded, first), (_, again) = iterator.peek(prepare), iterator.peek(prepare)
                assert first is again and first is (prepared[-1] if number + 1 < len(expected) else None)
                assert loaded == (first and {key: first[key] for key in first if key != "prepared"})
                now = iterator.state_dict()
                assert now.keys() == saved.keys() and now["iterations_in_epoch"] == saved["iterations_in_epoch"]
        assert number + 1 == len(expected)


def test_what_goes_wrong_early_is_raised_in_its_place():
    class Broken(SegmentDataset):
        def __getitem__(self, key):
            if key.segment == 2:
                raise OSError("the disk is gone")
            return super().__getitem__(key)

    dataset = split_of(numbered(60), 5, words=99)
    dataset.__class__ = Broken
    iterator = SegmentBatchIterator(dataset, 2)
    batches = iterator.next_epoch_itr()
    next(batches)
    next(batches)
    assert iterator.peek(lambda batch: batch) == (None, None) and iterator.iterations_in_epoch == 2
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_a_batch_that_cannot_be_prepared_early_is_handed_out_as_it_is():
    """Whoever asks for it prepares it again, when the device may have room for it."""
    iterator = SegmentBatchIterator(split_of(numbered(60), 5, words=99), 2)

    def without_room(batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for number, batch in enumerate(iterator.next_epoch_itr()):
        assert batch["net_input"]["position"].index == number and batch["target"].shape == (2, 5)
        for _ in range(2):
            loaded, prepared = iterator.peek(without_room)
            assert prepared is None and (loaded is None) == (number == 5)
    assert number == 5


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 10**9), streams=st.integers(1, 500), length=st.integers(1, 2000))
def test_streams_are_contiguous_and_equal_within_a_token(tokens, streams, length):
    layout = StreamLayout(tokens, streams, length)
    bounds = [layout.bounds(i) for i in range(streams)]
    assert bounds[0][0] == 0 and bounds[-1][1] == tokens
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    sizes = [b - a for a, b in bounds]
    assert max(sizes) - min(sizes) <= 1
    assert (layout.num_segments - 1) * length < max(sizes) <= layout.num_segments * length


@settings(max_examples=100, deadline=None)
@given(text=texts, data=st.data())
def test_reading_a_sequence_is_slicing_it(text, data):
    tokens = [t for line in text for t in line]
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(0, len(tokens)))
    assert split_of(text, 3).tokens.read(start, stop).tolist() == tokens[start:stop]


@settings(max_examples=40, deadline=None)
@given(text=texts, dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64]), data=st.data())
def test_a_part_of_a_line_is_read_without_the_line(text, dtype, data, tmp_path_factory):
    """A text in one long line costs no more than in short ones, also if it is one of several files."""
    path = tmp_path_factory.mktemp("mapped") / "train"
    builder = MMapIndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for line in text:
        builder.add_item(torch.tensor(line, dtype=torch.int64))
    builder.finalize(f"{path}.idx")
    mapped = MMapIndexedDataset(str(path))
    tokens = [t for line in text for t in line]
    start = data.draw(st.integers(0, 2 * len(tokens)))
    stop = data.draw(st.integers(0, 2 * len(tokens)))
    with mock.patch.object(MMapIndexedDataset, "__getitem__", side_effect=AssertionError("loads a whole line")):
        read = TokenSequence(mapped, 17, "train").read(start, min(stop, len(tokens)))
        assert read.dtype == np.int64 and read.tolist() == tokens[start : min(stop, len(tokens))]
        assert (
            TokenSequence(ConcatDataset([mapped, mapped]), 17, "train").read(start, stop).tolist()
            == ((tokens * 2)[start:stop])
        )


def test_a_word_id_beyond_the_dictionary_is_named():
    sequence = split_of([[4, 5, 99]], 3, words=17, name="data-bin/train").tokens
    assert isinstance(sequence, TokenSequence)
    with pytest.raises(ValueError, match=r"data-bin/train holds the word id 99.*17 words.* own --srcdict"):
        sequence.read(0, 3)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_read_the_streams_that_one_rank_would(shards):
    dataset = split_of(numbered(103), 5, words=200)
    (whole,) = epoch_of(dataset, 4)
    parts = epoch_of(dataset, 4, shards=shards)
    assert {len(part) for part in parts} == {len(whole)}
    for k, batch in enumerate(whole):
        rows = [row for part in parts for row in rows_of(part[k])]
        assert rows == rows_of(batch)
        assert sum(part[k]["ntokens"] for part in parts) == batch["ntokens"]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_epoch_reaches_worker_processes(workers):
    dataset = split_of(numbered(120), 10, words=200, roll_seed=3)
    iterator = SegmentBatchIterator(dataset, 2, num_workers=workers, reuse_dataloader=True)
    for epoch in (1, 2, 3):
        (expected,) = epoch_of(dataset, 2, epoch=epoch)
        read = list(iterator.next_epoch_itr())
        assert iterator.epoch == epoch and len(read) == len(expected)
        for got, want in zip(read, expected, strict=True):
            assert got["net_input"]["position"] == want["net_input"]["position"]
            assert torch.equal(got["target"], want["target"])


def test_resuming_in_an_epoch_finds_its_place_and_its_memory():
    dataset = split_of(numbered(60), 5, words=17 + 60)
    decoder = tiny_decoder(words=77, tokens_per_sample=5).train()
    iterator = SegmentBatchIterator(dataset, 2, memory=decoder.streams)
    batches = iterator.next_epoch_itr()
    for _ in range(3):
        decoder(**next(batches)["net_input"])
    saved = iterator.state_dict()
    expected = decoder(**next(batches)["net_input"])[0]

    fresh = tiny_decoder(words=77, tokens_per_sample=5).train()
    resumed = SegmentBatchIterator(dataset, 2, memory=fresh.streams)
    resumed.load_state_dict(saved)
    batch = next(resumed.next_epoch_itr())
    assert batch["net_input"]["position"].index == 3
    assert torch.equal(fresh(**batch["net_input"])[0], expected)


@pytest.mark.parametrize(
    ("batch_size", "length", "tokens", "seed", "message"),
    [
        (3, 5, 60, None, "--batch-size times ranks is 3, there it was 2"),
        (2, 4, 60, None, "--tokens-per-sample is 4, there it was 5"),
        (2, 5, 61, None, "the number of tokens of the split is 61, there it was 60"),
        (2, 5, 60, 1, "--roll is on with --seed 1, there it was off"),
    ],
)
def test_resuming_with_another_cut_is_refused(batch_size, length, tokens, seed, message):
    saved = inside_an_epoch(split_of(numbered(60), 5, words=99)).state_dict()
    other = SegmentBatchIterator(split_of(numbered(tokens), length, words=99, roll_seed=seed), batch_size)
    with pytest.raises(ValueError, match=rf"{message}.*--reset-dataloader"):
        other.load_state_dict(saved)


def test_resuming_with_another_text_of_the_same_length_is_refused():
    """As of documents in another order: what the streams have read would be read again, or never."""
    text = numbered(60)
    saved = inside_an_epoch(split_of(text, 5, words=99)).state_dict()
    inside_an_epoch(split_of(text, 5, words=99)).load_state_dict(saved)
    for other in ([*text[4:], *text[:4]], [*text[:-1], text[0][: len(text[-1])]]):
        with pytest.raises(
            ValueError, match=r"the text of the split is \w{8}, there it was \w{8}\. .*--reset-dataloader"
        ):
            inside_an_epoch(split_of(other, 5, words=99)).load_state_dict(saved)
    del saved["layout"]["the text of the split"]  # as former versions saved it
    inside_an_epoch(split_of(text, 5, words=99)).load_state_dict(saved)


def inside_an_epoch(dataset, shards=1, **options):
    """An iterator over two streams a rank, of a decoder that has read a segment."""
    decoder = tiny_decoder(words=99, tokens_per_sample=5, **options).train()
    iterator = SegmentBatchIterator(dataset, 2, num_shards=shards, memory=decoder.streams)
    decoder(**next(iterator.next_epoch_itr())["net_input"])
    return iterator


def test_nothing_is_saved_without_the_memory():
    dataset = split_of(numbered(60), 5, words=99)
    with pytest.raises(RuntimeError, match="the memory of the other ranks was not gathered"):
        inside_an_epoch(dataset, shards=2).state_dict()
    iterator = inside_an_epoch(dataset)
    iterator.memory = StreamMemory(LookaheadState)
    with pytest.raises(RuntimeError, match="there is no memory after segment 0 of streams 0, 1 to save"):
        iterator.state_dict()


def test_a_checkpoint_of_another_kind_of_batches_is_refused():
    iterator = SegmentBatchIterator(split_of(numbered(60), 5, words=99), 2)
    with pytest.raises(ValueError, match=r"--batch-size times ranks is 2, there it was not recorded"):
        iterator.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": 3, "shuffle": True})
