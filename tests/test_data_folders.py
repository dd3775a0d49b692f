"""Data folders: shards that belong together, storage formats, and files with other encodings and line ends."""

import io
import json
import logging
import os
import pickle
import re
import sys

import numpy as np
import pytest
from fairseq.data.huffman import HuffmanMMapIndex
from fairseq.data.indexed_dataset import IndexedDatasetBuilder

from lamemo_fairseq.core.text import TextEncoding
from lamemo_fairseq.data.binarized import load_dictionary, load_lines
from lamemo_fairseq.data.folders import data_folders, shared_dictionary
from lamemo_fairseq.data.streams import TokenSequence
from lamemo_fairseq.data.text import check_input, clean_prompt, read_text
from lamemo_fairseq.data.text_encoding import read_text_encoding
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask

from .helpers import dictionary_of, write_data


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", train=200, valid=60)


def opened(*folders, split="train", impl=None, **options):
    config = SegmentLanguageModelingConfig(
        data=os.pathsep.join(map(str, folders)), tokens_per_sample=8, train_subset="train", dataset_impl=impl
    )
    return SegmentLanguageModelingTask.setup_task(config).load_dataset(split, **options)


# Shards.


def test_shards_with_one_dictionary(data, tmp_path):
    other = write_data(tmp_path / "other", seed=1, train=100)
    (other / "dict.txt").write_text((data / "dict.txt").read_text().replace(" 1\n", " 7\n"))  # other counts
    assert len(opened(data, other).tokens) == 200
    assert len(opened(data, other, split="valid").tokens) == 60  # which only the first has


def test_a_split_that_other_shards_have_too_is_told(data, tmp_path, caplog):
    """A loss of the first folder alone would pass for one of all of them."""
    other, third = (write_data(tmp_path / name, seed=1, train=100, valid=30) for name in ("other", "third"))
    opened(data, other, combine=True, epoch=2)  # to train on
    opened(data, split="valid")
    assert "alone" not in caplog.text
    assert len(opened(data, other, third, split="valid").tokens) == 60
    assert f"'valid' is read from {data} alone, and not from {other}, {third}: evaluate each folder with" in caplog.text


def test_parts_that_are_left_out_are_told(data, caplog):
    """Training joins them, so that a loss of the first part would pass for one of all that was trained on."""
    caplog.set_level(logging.INFO)
    write_data(data, train1=50, train2=40, train4=30, valid1=20)
    assert len(opened(data, combine=True).tokens) == 290
    assert "without" not in caplog.text
    assert len(opened(data).tokens) == 200 and len(opened(data, split="valid").tokens) == 60
    opened(data, split="train2")
    told = {record.getMessage(): record.levelname for record in caplog.records if "without" in record.getMessage()}
    assert told == {
        "the split 'train' is read without train1, train2, which training joins to it: evaluate each with a command of "
        "its own": "WARNING",
        "the split 'valid' is read without valid1": "INFO",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda words: ["W0 1", *words[1:]], "word 4 is 'w0' in one and 'W0' in the other; 40 and 40 words"),
        (lambda words: [words[1], words[0], *words[2:]], "word 4 is 'w0' in one and 'w1' in the other"),
        (lambda words: [*words, "w99 1"], "word 40 is missing in one and 'w99' in the other; 40 and 41 words"),
        (lambda words: words[:-1], "word 39 is 'w35' in one and missing in the other"),
    ],
)
def test_shards_with_different_dictionaries(data, tmp_path, change, message):
    other = write_data(tmp_path / "other", train=100)
    words = (data / "dict.txt").read_text().splitlines()
    (other / "dict.txt").write_text("\n".join(change(words)) + "\n")
    with pytest.raises(ValueError, match=rf"{data} and {other} hold different dictionaries \({message}.*--srcdict"):
        opened(data, other)


def test_shards_without_what_training_needs(data, tmp_path):
    other = write_data(tmp_path / "other", valid=30)
    with pytest.raises(FileNotFoundError, match=rf"no split 'train' in {other}, which holds valid"):
        opened(data, other)
    write_data(other, train=30)
    (other / "train.bin").write_bytes(b"?")
    with pytest.raises(ValueError, match=rf"{other}/train is damaged"):
        opened(data, other)
    (other / "dict.txt").unlink()
    with pytest.raises(FileNotFoundError, match=rf"no dictionary at {other}/dict.txt"):
        opened(data, other)


def test_parts_of_a_later_shard_are_checked_before_the_first_epoch(data, tmp_path):
    other = write_data(tmp_path / "other", train=50, train1=50)
    (other / "dict.txt").write_text((data / "dict.txt").read_text())
    (other / "train1.bin").write_bytes(b"?")
    with pytest.raises(ValueError, match=rf"{other}/train1 is damaged"):
        opened(data, other, combine=True)
    assert len(opened(data, other).tokens) == 200  # the part alone is read


def test_folders_that_are_not_there(data, tmp_path):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError, match=rf"data folder {nowhere} is not there: pass the folder"):
        data_folders(str(nowhere))
    with pytest.raises(FileNotFoundError, match=rf"{nowhere}, one of the 2 in '{data}:{nowhere}' is not there"):
        opened(data, nowhere)
    with pytest.raises(NotADirectoryError, match=r"dict.txt is a file: pass the folder that it lies in"):
        data_folders(str(data / "dict.txt"))
    text = tmp_path / "book.txt"
    text.touch()
    with pytest.raises(NotADirectoryError, match=rf"is a file: pass the --destdir of .* own --source {text}$"):
        data_folders(str(text))
    for listed in (f"{data}:", f":{data}", f"{data}::{data}"):
        with pytest.raises(ValueError, match=rf"'{listed}' has an empty entry"):
            data_folders(listed)


# The record of python -m preprocess.


def record(folder, tokenizer, sha256="0"):
    made = {
        "made_from": {"settings": {"tokenizer": tokenizer}},
        "files": {"sentencepiece.bpe.model": {"sha256": sha256}},
    }
    (folder / "preprocess.json").write_text(json.dumps(made))


def lines(tokenizer="space", bpe="none", pattern="", source_lang="", model=None):
    return {**locals(), "paragraphs": False, "name": "lines"}


@pytest.mark.parametrize(
    ("tokenizer", "encoding"),
    [
        (lines(), TextEncoding("space", "none")),
        (lines("words", pattern="x"), TextEncoding("words", "none", pattern="x")),
        (lines("moses", source_lang="de"), TextEncoding("moses", "none", source_lang="de")),
        ({"name": "bytes"}, TextEncoding("none", "bytes")),
        ({"name": "letters"}, TextEncoding("none", "characters")),
        ({"name": "text8"}, TextEncoding("none", "characters", normalized=True)),
    ],
)
def test_a_folder_says_how_its_text_became_tokens(tmp_path, tokenizer, encoding):
    assert read_text_encoding(str(tmp_path)) is None
    record(tmp_path, tokenizer)
    assert read_text_encoding(str(tmp_path)) == encoding


@pytest.mark.parametrize("model", [None, ["../../elsewhere.model", 1, "1"]])
def test_a_model_lies_in_the_folder_whatever_the_record_calls_it(tmp_path, model):
    record(tmp_path, lines(bpe="sentencepiece", model=model), sha256="abc")
    path = str(tmp_path / "sentencepiece.bpe.model")
    expected = TextEncoding("space", "sentencepiece", model=path, model_sha256="abc")
    assert read_text_encoding(str(tmp_path)) == expected


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"made_from": 3}', '{"made_from": {"settings": {"tokenizer": []}}}']
)
def test_a_damaged_record(tmp_path, content):
    (tmp_path / "preprocess.json").write_text(content)
    with pytest.raises(ValueError, match=r"preprocess.json is damaged .*python -m \S*preprocess"):
        read_text_encoding(str(tmp_path))


def test_shards_of_text_that_was_made_differently(data, tmp_path):
    other = write_data(tmp_path / "other", train=100)
    record(data, lines("moses", source_lang="en"))
    assert len(shared_dictionary([str(data), str(other)])) == 40  # the other does not say
    record(other, lines("words"))
    with pytest.raises(ValueError, match=r"text of different tokenizer 'moses' and 'words', source_lang 'en' and ''"):
        opened(data, other)
    for folder, sha256 in (data, "1"), (other, "2"):
        record(folder, lines(bpe="sentencepiece"), sha256)
    with pytest.raises(ValueError, match=r"text of different model_sha256 '1' and '2'"):
        opened(data, other)
    record(other, lines(bpe="sentencepiece"), "1")
    assert len(opened(data, other).tokens) == 200


# Storage formats.


def as_older_format(folder, split="train", dtype=np.int32):
    """Write a split again, as --dataset-impl lazy and cached do."""
    dictionary = dictionary_of(40)
    stored = load_lines(str(folder), split, dictionary, None, False)
    builder = IndexedDatasetBuilder(str(folder / f"{split}.new"), dtype=dtype)
    texts = [line.clone() for line in stored]
    for line in texts:
        builder.add_item(line)
    builder.finalize(str(folder / f"{split}.idx"))
    (folder / f"{split}.new").rename(folder / f"{split}.bin")
    return texts


@pytest.mark.parametrize("impl", [None, "lazy", "cached"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_the_older_format(data, impl, dtype):
    texts = as_older_format(data, dtype=dtype)
    lines = load_lines(str(data), "train", dictionary_of(40), impl, False)
    assert lines.sizes.tolist() == [len(text) for text in texts]
    for read in lines, pickle.loads(pickle.dumps(lines)):  # as a data loader's process gets it
        assert [line.tolist() for line in read] == [text.tolist() for text in texts]
    tokens = TokenSequence(lines, 40, "train")
    assert tokens.read(3, 150).tolist() == np.concatenate(texts)[3:150].tolist()
    assert lines.part(1, 1, 3).tolist() == texts[1][1:3].tolist()


def test_parts_of_different_formats(data):
    as_older_format(data)
    write_data(data, train1=50)
    assert len(TokenSequence(load_lines(str(data), "train", dictionary_of(40), None, True), 40, "train")) == 250


@pytest.mark.parametrize("end", [".idx", ".bin"])
@pytest.mark.parametrize("change", [lambda b: b[:-8], lambda b: b + b"12345678", lambda b: b[:30]])
def test_the_older_format_damaged(data, end, change):
    as_older_format(data)
    path = data / f"train{end}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train is damaged: .*fairseq-preprocess"):
        opened(data)


@pytest.mark.parametrize("at", range(8, 48, 8))
@pytest.mark.parametrize("value", [0, 7, 1 << 60])
def test_an_index_that_lies(data, at, value):
    as_older_format(data)
    index = bytearray((data / "train.idx").read_bytes())
    index[at : at + 8] = value.to_bytes(8, "little")
    (data / "train.idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"train (is damaged|holds numbers of type float64)"):
        opened(data)


@pytest.mark.parametrize("array", [0, 1, 2])
def test_an_index_that_says_wrongly_where_lines_are(data, array):
    lines = len(as_older_format(data))
    index = np.fromfile(data / "train.idx", dtype=np.int64)
    index[6 + array * (lines + 1) + 1] += 1  # the second line's first dimension, place or size
    index.tofile(data / "train.idx")
    with pytest.raises(ValueError, match=r"train is damaged: \.(idx does not say where its lines are|bin has)"):
        opened(data)


def test_an_id_beyond_the_dictionary_in_the_older_format(data):
    as_older_format(data)
    for number, named in (0, -1), (41, 40):
        stored = np.fromfile(data / "train.bin", dtype=np.int32)
        stored[-1] = number
        stored.tofile(data / "train.bin")
        with pytest.raises(ValueError, match=rf"holds the word id {named}, but dict.txt has 40 words"):
            opened(data)


def test_an_option_that_is_not_the_files_format(data):
    assert len(opened(data, impl="mmap").tokens) == 200
    for impl in "lazy", "cached", "raw", "huffman", "fasta":
        with pytest.raises(
            ValueError, match=rf"--dataset-impl {impl}: .*train was written with mmap: leave the option out"
        ):
            opened(data, impl=impl)
    as_older_format(data)
    with pytest.raises(ValueError, match=r"--dataset-impl mmap: .*train was written with lazy or cached"):
        opened(data, impl="mmap")


def test_formats_that_are_not_read(data):
    (data / "train.idx").write_bytes(HuffmanMMapIndex._HDR_MAGIC + bytes(50))
    with pytest.raises(ValueError, match=r"train is stored in fairseq's format huffman.*--dataset-impl mmap"):
        opened(data)
    (data / "train.idx").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"train is damaged: .idx of 14 bytes begins like no index"):
        opened(data)
    for end in ".idx", ".bin":
        (data / f"train{end}").unlink()
    (data / "train").mkdir()  # of something else
    with pytest.raises(FileNotFoundError, match="no split 'train'"):
        opened(data)
    (data / "train").rmdir()
    for name, form in ("train.None-None", "raw"), ("train", "raw"), ("train.fasta", "fasta"):
        (data / name).write_text("w1 w2\n")
        with pytest.raises(ValueError, match=rf"train is stored in fairseq's format {form}.*--dataset-impl mmap"):
            opened(data)
        (data / name).unlink()


# Encodings and line ends.


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_dictionaries_of_every_editor(tmp_path, end, mark, last):
    words = ["the 9", "caf\u00e9 5", "\u2028x\u2028 3", "# 2", "#fairseq:overwrite 1"]
    text = mark + end.join(words) + end * last
    (tmp_path / "dict.txt").write_bytes(text.encode())
    expected = ["the", "caf\u00e9", "\u2028x\u2028", "#", "#fairseq:overwrite"]
    assert load_dictionary(str(tmp_path / "dict.txt")).symbols[4:] == expected


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"the 9\ncaf\xe9 5\n", r"line 2 has b'\\xe9' \(at byte 9 of the file\)"),
        ("the 9\n".encode("utf-16"), r"line 1 has b'\\xff' \(at byte 0"),
        ("the 9\n".encode("utf-16-le"), r"line 1 has b'\\x00' \(at byte 1"),
        (b"the 9\na\0b 5\n", r"line 2 has b'\\x00' \(at byte 7"),
    ],
)
def test_what_is_not_utf8(tmp_path, content, where):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    for read in read_text, load_dictionary:
        with pytest.raises(ValueError, match=rf"dict.txt is not text in UTF-8: {where}.*iconv"):
            read(str(path))
    with pytest.raises(ValueError, match=r"dict.txt is not text in UTF-8"):
        check_input(SegmentLanguageModelingConfig(input=str(path)))


def test_prompts(data, tmp_path, monkeypatch):
    config = SegmentLanguageModelingConfig(data=str(data), tokens_per_sample=8)
    task = SegmentLanguageModelingTask.setup_task(config)
    plain, lengths = task.get_interactive_tokens_and_lengths(["w1 w2"], str)
    marked, _ = task.get_interactive_tokens_and_lengths(["\ufeffw1 w2"], str)
    assert plain[0].tolist() == marked[0].tolist() == [5, 6, 2] and lengths == [3]
    for wrong in "caf\udce9", "w\0\x001\0":
        with pytest.raises(ValueError, match=re.escape(f"the prompt {wrong!r} is not text in UTF-8") + ".*iconv"):
            task.get_interactive_tokens_and_lengths([wrong], str)


def test_the_prompts_of_a_command(tmp_path, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"old\rMac\r\nends\ncaf\xe9\n"), encoding="utf-8", newline="\n")
    monkeypatch.setattr(sys, "stdin", stdin)
    check_input(SegmentLanguageModelingConfig(input="-"))
    assert [clean_prompt(stdin.readline()) for _ in range(3)] == ["old\n", "Mac\n", "ends\n"]
    with pytest.raises(ValueError, match="not text in UTF-8"):
        clean_prompt(stdin.readline())
    check_input(SegmentLanguageModelingConfig(input="-"))  # read already
    stdin.close()
    check_input(SegmentLanguageModelingConfig(input="-"))
    for other in io.StringIO(), None:
        monkeypatch.setattr(sys, "stdin", other)
        check_input(SegmentLanguageModelingConfig(input="-"))
    with pytest.raises(FileNotFoundError, match=r"--input .*nowhere: there is no such file"):
        check_input(SegmentLanguageModelingConfig(input=str(tmp_path / "nowhere")))
    with pytest.raises(FileNotFoundError, match=r"--input .*: there is no such file"):
        check_input(SegmentLanguageModelingConfig(input=str(tmp_path)))
    os.mkfifo(tmp_path / "pipe")
    check_input(SegmentLanguageModelingConfig(input=str(tmp_path / "pipe")))  # it would wait here if it read
    check_input(SegmentLanguageModelingConfig())  # of no command
