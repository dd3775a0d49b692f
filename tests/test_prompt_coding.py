"""Prompts become the tokens that the data folder's text became, and texts again, without a word on the command line."""

import logging
import re

import pytest
import torch
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPEConfig
from omegaconf import OmegaConf

from lamemo_fairseq.checkpoints.to_core import core_tokenizer
from lamemo_fairseq.core import Tokenizer
from lamemo_fairseq.core.text import coders as text_coders
from lamemo_fairseq.data.binarized import load_dictionary
from lamemo_fairseq.data.text_encoding import read_text_encoding
from lamemo_fairseq.generation.lines import encode_prompts
from lamemo_fairseq.tasks.segment_language_modeling import SegmentLanguageModelingConfig, SegmentLanguageModelingTask
from preprocess.tokenization import LineTokenizer, NormalizedLetterTokenizer

from .helpers import dictionary_of
from .preprocessing import TEXTS, own, tokens_of, write, write_texts

KINDS = {
    "space": (),
    "words": ("--tokenizer", "words"),
    "pattern": ("--tokenizer", "words", "--pattern", r"\w|\S"),
    "moses": ("--tokenizer", "moses"),
    "sentencepiece": ("--bpe", "sentencepiece", "--vocab-size", "90"),
    "moses-sentencepiece": ("--tokenizer", "moses", "--bpe", "sentencepiece", "--vocab-size", "90"),
    "bytes": ("--bpe", "bytes"),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts") / "texts")


@pytest.fixture(scope="module")
def folders(texts, tmp_path_factory):
    made = tmp_path_factory.mktemp("folders")

    def folder(kind):
        if not (made / kind).exists():
            own(texts, made / kind, *KINDS[kind])
        return made / kind

    return folder


def task_of(folder, **options):
    config = SegmentLanguageModelingConfig(data=str(folder), tokens_per_sample=8, **options)
    return SegmentLanguageModelingTask.setup_task(config)


def coders(task, tokenizer=None, bpe=None):
    """As fairseq's commands put them together."""
    words, pieces = task.build_tokenizer(tokenizer), task.build_bpe(bpe)

    def encode(text):
        text = text if words is None else words.encode(text)
        return text if pieces is None else pieces.encode(text)

    def decode(tokens):
        tokens = tokens if pieces is None else pieces.decode(tokens)
        return tokens if words is None else words.decode(tokens)

    return encode, decode


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_becomes_what_the_text_became(kind, folders):
    """The validation text as one prompt: the ids of the validation split."""
    task = task_of(folders(kind))
    encode, decode = coders(task)
    lines = TEXTS["valid"].decode().splitlines()
    (ids,), (length,) = task.get_interactive_tokens_and_lengths(["</s>".join(lines)], encode)
    assert [task.dictionary[i] for i in ids] == tokens_of(folders(kind), "valid") and length == len(ids)
    if kind in ("sentencepiece", "bytes"):
        assert decode(" ".join(task.dictionary[i] for i in ids[:-1])).split(" </s> ") == lines


@pytest.mark.parametrize("kind", KINDS)
def test_the_core_reads_text_as_the_data_was_made(kind, folders, tmp_path):
    """Without the data folder: from the files that a model's folder gets."""
    dictionary = load_dictionary(str(folders(kind) / "dict.txt"))
    core_tokenizer(dictionary, read_text_encoding(str(folders(kind)))).save(tmp_path)
    assert (tmp_path / "dict.txt").read_bytes() == (folders(kind) / "dict.txt").read_bytes()
    tokenizer = Tokenizer.load(tmp_path)
    text = TEXTS["valid"].decode().removesuffix("\n").replace("\r", "")
    ids = tokenizer.encode("\n".join(TEXTS["valid"].decode().splitlines()))
    assert [tokenizer.symbols[i] for i in ids] == tokens_of(folders(kind), "valid")[:-1]
    if kind in ("sentencepiece", "bytes"):
        assert tokenizer.decode(ids).splitlines() == text.splitlines()


def test_letters_are_reduced_as_the_text_was(tmp_path):
    text = b"The 2 caf\xc3\xa9s,  it's 10 o'clock!\n"
    own(write(tmp_path / "text", text * 40), tmp_path / "data", "--bpe", "text8", "--shares", "9", "1")
    encode, decode = coders(task_of(tmp_path / "data"))
    tokenizer = NormalizedLetterTokenizer()
    symbols, ids, _ = tokenizer.encode(text)
    assert encode(text.decode()).split() == [symbols[i] for i in ids]
    assert decode(encode(text.decode())) == "the two caf s it s one zero o clock "
    task = task_of(tmp_path / "data")
    encode, _ = coders(task)
    (ids,) = encode_prompts(["o'\nclock"], encode, task.source_dictionary, task.coding, by_word=False)
    assert task.source_dictionary.string(ids).split() == encode("o clock").split()  # the end of a line is a space


@pytest.mark.parametrize("text", ["a b\nc\n\n \nd e\r\n\rf", "\n\na\n", "a\n\n", "\ufeff\na \n\t\n\ufeffb", "", "\n"])
def test_paragraphs_are_lines_where_they_were(text, tmp_path, caplog):
    """In the core, and in the hub; a text's last paragraph has its end where the text ends with that of a line."""
    data = tmp_path / "data"
    prose = b"a b\nc\n\nd e f\na\n\n" * 40
    own(write(tmp_path / "text", prose), data, "--tokenizer", "words", "--paragraphs", "--shares", "9", "1")
    dictionary = load_dictionary(str(data / "dict.txt"))
    core_tokenizer(dictionary, read_text_encoding(str(data))).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    symbols, ids, _ = LineTokenizer(tokenizer="words", paragraphs=True).encode(text.encode())
    made = [symbols[i] for i in ids]
    found = tokenizer.encode(text)
    ended = text.endswith("\n") or not made
    assert [tokenizer.symbols[i] for i in found] == (made if ended else made[:-1])
    assert torch.equal(tokenizer.encode(tokenizer.decode(found)), found)
    task = task_of(data)
    encode, _ = coders(task)
    (ids,) = encode_prompts([text], encode, dictionary, task.coding, by_word=False)
    assert ids.tolist() == [*found.tolist(), dictionary.eos()] and task.coding.line_end == "\n\n"
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "text", ["", " a  b\t", "caf\xe9 \u65e5\u672c \U0001f600", "\u2581 \xa0 <unk> </ s>", "\r\x0b"]
)
def test_bytes_keep_every_character(text):
    coder = text_coders.Bytes()
    assert coder.decode(coder.encode(text)) == text
    assert len(coder.encode(text).split()) == len(text.encode())


def test_what_is_no_text_is_marked():
    assert text_coders.Bytes().decode("a \xc3 b <unk> c") == "a\ufffdb\ufffdc"


def test_what_a_command_names_comes_before_what_the_folder_records(folders, caplog):
    task = task_of(folders("moses-sentencepiece"))
    with caplog.at_level(logging.WARNING):
        encode, decode = coders(task, tokenizer="space")
    assert encode("it's  so") == "it's so" and decode("it's so") == "it's so"
    assert "made with --tokenizer moses --bpe sentencepiece, but prompts are read with --tokenizer space" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        coders(task_of(folders("bytes")), bpe="bytes")
        coders(task_of(folders("space")), tokenizer="space")
        coders(task_of(folders("moses")), tokenizer="moses")
    assert not caplog.text


def test_pieces_without_their_file_are_refused(folders):
    task = task_of(folders("space"))
    task.build_tokenizer(None)
    with pytest.raises(ValueError, match="--bpe subword_nmt needs a file: pass --bpe-codes"):
        task.build_bpe(OmegaConf.structured(SubwordNMTBPEConfig(_name="subword_nmt")))


def test_folders_of_fairseqs_record_nothing(tmp_path):
    dictionary_of(20).save(str(tmp_path / "dict.txt"))
    task = task_of(tmp_path)
    assert task.build_tokenizer(None) is None and task.build_bpe(None) is None


def test_another_model_of_pieces_is_refused(folders, texts, tmp_path):
    own(texts, tmp_path / "data", *KINDS["sentencepiece"])
    model = tmp_path / "data" / "sentencepiece.bpe.model"
    model.write_bytes((folders("moses-sentencepiece") / model.name).read_bytes() + b"\n")
    with pytest.raises(ValueError, match="is not the model that the text was encoded with"):
        coders(task_of(tmp_path / "data"))
    model.unlink()
    with pytest.raises(FileNotFoundError, match="put it back, or pass --bpe sentencepiece"):
        coders(task_of(tmp_path / "data"))


@pytest.mark.parametrize(
    ("symbols", "prompt", "advice"),
    [
        ("the old house", "The OLD House", "in small letters: write the prompt"),
        ("old house , !", "old, house!", "separate words and punctuation marks by spaces"),
        ("old house , &apos;s", "house, old, house,", "pass --tokenizer moses"),
        (" ".join("abcdefghijklmnopqrstuvwxyz"), "the theo", "pass --bpe bytes"),
        (
            " ".join("\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8abcdefghijklmn"),
            "\u03b1\u03b2 \u03b3\u03b4",
            "pass --bpe characters",
        ),
        ("t h e o", "the theo", "dict.txt lists the words"),
        ("\u2581ne a b c d e f g h i", "x", "dict.txt lists the words"),
        ("\u2581the \u2581o ld", "the old", "pass --bpe sentencepiece --sentencepiece-model"),
        ("th@@ e o@@ ld", "the old", "pass --bpe subword_nmt or fastbpe with --bpe-codes"),
        ("the old", "the old", "leave out --tokenizer and --bpe"),
        ("der alte", "the old", "dict.txt lists the words"),
    ],
)
def test_a_prompt_of_unknown_words_is_told_with_what_was_forgotten(symbols, prompt, advice, caplog):
    dictionary = dictionary_of(6)
    for symbol in symbols.split():
        dictionary.add_symbol(symbol)
    encode_prompts(["w0 w1 zebra", "", symbols], str, dictionary)
    assert not caplog.text
    encode_prompts([prompt], (lambda text: text[::-1]) if symbols == prompt else str, dictionary)
    assert re.search(rf"of the {len(prompt.split())} words of the prompt .* are unknown.*{advice}", caplog.text)


@pytest.mark.parametrize(
    ("kind", "named", "prompt", "advice"),
    [
        ("words", {}, "zebra", "dict.txt lists the words"),
        ("letters", {}, "at\xe9", "dict.txt lists the words"),
        ("letters", {"bpe": "bytes"}, "xyz q", "leave out --tokenizer and --bpe"),
        ("letters", {}, "A T", "in small letters: write the prompt in small letters"),
        ("bytes", {}, "the \u0416", "dict.txt lists the words"),
        ("bytes", {"bpe": "bytes"}, "the OF", "in small letters: write the prompt in small letters"),
    ],
)
def test_a_recorded_encoding_is_not_guessed(kind, named, prompt, advice, folders, tmp_path, caplog):
    """Also where each word of a text is a letter, so that its dictionary looks like one of bytes."""
    folder = tmp_path / "data"
    if kind == "letters":
        own(write(tmp_path / "text", b"a t e s o r i n\n" * 40), folder, "--tokenizer", "words", "--shares", "9", "1")
    else:
        folder = folders(kind)
    task = task_of(folder)
    encode, _ = coders(task, **named)
    task.get_interactive_tokens_and_lengths([prompt], encode)
    assert re.search(rf"of the prompt {prompt!r} are unknown.*: [^:]*{advice}", caplog.text)
