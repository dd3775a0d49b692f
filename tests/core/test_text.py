"""Text to word ids and back, from the files of a model's folder."""

import json
import sys

import pytest
import torch

from lamemo_fairseq.core import LanguageModel, TextEncoding, Tokenizer
from lamemo_fairseq.core.text.coders import BYTE_SYMBOLS

from .helpers import tiny_decoder

KINDS = [
    (TextEncoding(), ["the", "old", "house"], "the  old\n\nhouse house", "the old\n\nhouse house"),
    (TextEncoding("words"), ["the", "house", ",", "'", "s", "don't"], "the,house\ndon't", "the , house\ndon't"),
    (TextEncoding(paragraphs=True), ["the", "old", "house"], "the\nold\n\n\nhouse\n", "the old\n\nhouse\n\n"),
    (TextEncoding("none", "bytes"), list(BYTE_SYMBOLS.values()), "caf\xe9 \t the\n", "caf\xe9 \t the\n"),
    (TextEncoding("none", "characters"), [*"abc", "\u2581"], "a b\ncc", "a b\ncc"),
    (TextEncoding("none", "characters", normalized=True), [*"abcone", "\u2581"], "B-1\nc\n", "b one c "),
    (TextEncoding("moses"), ["the", "house", ",", "&apos;s"], "the house's, the\nhouse", "the house's, the\nhouse"),
]


@pytest.mark.parametrize(
    ("encoding", "words", "text", "back"), KINDS, ids=lambda value: getattr(value, "tokenizer", "")
)
def test_text_comes_back(encoding, words, text, back, tmp_path):
    words = list(dict.fromkeys(words))
    Tokenizer(words, encoding, range(len(words))).save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = tokenizer.encode(text)
    assert tokenizer.encoding == encoding and 3 not in ids and ids.dtype == torch.int64
    assert tokenizer.decode(ids) == back == tokenizer.decode(ids.tolist())
    assert (tmp_path / "dict.txt").read_text("utf-8").split("\n")[1] == f"{words[1]} 1"


def test_ids_are_fairseqs():
    tokenizer = Tokenizer(["a", "</s>x", "b\u200b"])
    assert tokenizer.encode("a </s>x\n<s> b <unk> <pad> </s>\n").tolist() == [4, 5, 2, 0, 3, 3, 1, 2, 2]
    assert tokenizer.encode("").tolist() == [] and tokenizer.encode("\n").tolist() == [2] and len(tokenizer) == 7


def test_a_text_that_holds_special_symbols_gives_them_no_other_ids(tmp_path):
    """As WikiText does: its words are those of fairseq's dictionary, which fairseq reads again."""
    text = "the <unk> sat </s> on\n<pad> the <s> <unk>"
    words = list(dict.fromkeys(text.split()))
    model = tiny_decoder(words=7)
    model.tokenizer = Tokenizer(words, counts=range(len(words)))
    assert model.tokenizer.symbols == ["<s>", "<pad>", "</s>", "<unk>", "the", "sat", "on"]
    assert model.tokenizer.encode(text).tolist() == [4, 3, 5, 2, 6, 2, 1, 4, 0, 3]
    model.save(tmp_path)
    assert (tmp_path / "dict.txt").read_text() == "the 0\nsat 2\non 4\n"


def test_a_dictionary_whose_words_replace_special_symbols(tmp_path):
    """Each word has an id, and stays marked, so that fairseq reads the file again."""
    text = "a 3\n<unk> 2 #fairseq:overwrite\n\u2028 1\n"
    (tmp_path / "dict.txt").write_text(text, "utf-8")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("<unk> b").tolist() == [5, 3] and len(tokenizer) == 7
    tokenizer.save(tmp_path)
    assert (tmp_path / "dict.txt").read_text("utf-8") == text


@pytest.mark.parametrize("word", ["a b", "", " ", "a\n", "\u2028"])
def test_words_that_no_text_has_are_refused(word):
    with pytest.raises(ValueError, match=r"^no text has the word .*, as spaces and ends of lines .*: leave it out$"):
        Tokenizer(["a", word])
    with pytest.raises(ValueError, match=r"^the dictionary holds 'a' twice: pass each word once$"):
        Tokenizer(["a", "b", "a"])


def test_pieces_are_joined_without_what_split_them():
    assert Tokenizer(["ho@@", "use"], TextEncoding(pieces="subword_nmt")).decode([4, 5, 2, 4, 4, 5]) == "house\nhohouse"
    assert Tokenizer(["\u2581ho", "use"], TextEncoding(pieces="sentencepiece")).decode([4, 5, 4]) == "house ho"
    tokenizer = Tokenizer(["\u2581x", "<0xC3>", "<0xA9>", "<0", "x41>"], TextEncoding(pieces="sentencepiece"))
    assert tokenizer.decode([4, 5, 6, 4, 5, 4, 7, 8]) == "x\xe9 x\ufffd x<0x41>"


@pytest.mark.parametrize(
    ("encoding", "package"),
    [
        (TextEncoding("moses"), "sacremoses"),
        (TextEncoding(pieces="sentencepiece", model="x"), "sentencepiece"),
        (TextEncoding(pieces="subword_nmt", model="x"), "subword-nmt"),
    ],
)
def test_a_package_that_is_missing_is_named(encoding, package, monkeypatch):
    for name in ("sacremoses", "sentencepiece", "subword_nmt", "subword_nmt.apply_bpe"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match=rf"of this model's text needs {package}: pip install {package}"):
        Tokenizer(["a"], encoding).encode("a")


def test_a_file_of_pieces_that_is_missing_is_named(tmp_path):
    for pieces, name in (("sentencepiece", "sentencepiece.bpe.model"), ("subword_nmt", "bpe.codes")):
        Tokenizer(["a"], TextEncoding(pieces=pieces)).save(tmp_path)
        with pytest.raises(ValueError, match=f"put it into the model's folder as {name}, and load it again"):
            Tokenizer.load(tmp_path).encode("a")


def test_another_file_of_pieces_is_refused(tmp_path):
    (tmp_path / "codes").write_text("#version: 0.2\na b\n")
    Tokenizer(["a"], TextEncoding(pieces="subword_nmt", model=str(tmp_path / "codes"))).save(tmp_path)
    assert (tmp_path / "bpe.codes").read_text() == (tmp_path / "codes").read_text()
    assert Tokenizer.load(tmp_path).encoding.model == str(tmp_path / "bpe.codes")
    (tmp_path / "bpe.codes").write_text("#version: 0.2\na c\n")
    with pytest.raises(ValueError, match=r"bpe.codes is not the file that the text was encoded with: put that back"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("dict.txt", b"a 1\nb\n", "is not a dictionary with a word and its count a line"),
        ("dict.txt", b"a 1\n\xff 1\n", "is not a dictionary with a word and its count a line"),
        ("dict.txt", b"a 1\nb 1\na 2\n", "dict.txt: the dictionary holds 'a' twice: put back the dict.txt of"),
        ("text.json", b"{", "text.json is damaged"),
        ("text.json", b'{"tokenizer": "space"}', "text.json is damaged"),
        ("text.json", b'{"format": 1, "tokeniser": "space"}', "unknown name 'tokeniser' .* did you mean tokenizer"),
        ("text.json", b'{"format": 1, "pieces": "wordpiece"}', "unknown pieces 'wordpiece' .* the known ones are none"),
        ("text.json", b'{"format": 2}', "has format 2, this version reads 1: install a newer one"),
    ],
)
def test_damaged_files_are_refused(name, content, message, tmp_path):
    Tokenizer(["a"]).save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_ids_that_are_no_words_are_refused():
    for word in (-1, 5):
        with pytest.raises(ValueError, match=f"there is no word {word}: the dictionary has the ids 0 to 4"):
            Tokenizer(["a"]).decode([word])


def test_a_text_of_unknown_words_is_told(caplog):
    Tokenizer(["a"]).encode("a B B c")
    assert "3 of the 4 words of the text 'a B B c' are unknown to the dictionary, such as 'B', 'c':" in caplog.text


def test_a_single_unknown_character_is_told(caplog):
    """Below half of a text's words are in no data; a character that a model reads as unknown is a mistake."""
    tokenizer = Tokenizer([*"at", "\u2581"], TextEncoding("none", "characters"))
    tokenizer.encode("a tat at")
    Tokenizer(["a"]).encode("a a B")
    assert not caplog.text
    tokenizer.encode("A tat at")
    assert "1 of the 8 characters of the text 'A tat at' are unknown to the dictionary, such as 'A':" in caplog.text


def test_a_model_takes_its_tokenizer_along(tmp_path):
    model = tiny_decoder()
    model.tokenizer = Tokenizer([f"w{i}" for i in range(13)], TextEncoding("words"))
    model.save(tmp_path)
    names = ["config.json", "dict.txt", "model.safetensors", "text.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    loaded = LanguageModel.load(tmp_path)
    assert loaded.tokenizer.symbols == model.tokenizer.symbols and loaded.tokenizer.encoding == TextEncoding("words")
    (tmp_path / "text.json").unlink()  # as in folders of before
    assert LanguageModel.load(tmp_path).tokenizer.encoding == TextEncoding()
    (tmp_path / "dict.txt").write_text("a 1\n")
    with pytest.raises(ValueError, match=r"dict.txt gives 5 words, and the model has 17: put the dictionary of the "):
        LanguageModel.load(tmp_path)


def test_another_models_tokenizer_is_not_saved(tmp_path):
    model = tiny_decoder(words=1000)
    model.tokenizer = Tokenizer(["a", "b"])
    with pytest.raises(
        ValueError, match=r"^the tokenizer has 6 words, .* and the model 1,000: set model\.tokenizer to"
    ):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_word_with_an_end_of_a_line_is_not_saved(tmp_path):
    model = tiny_decoder(words=5)
    model.tokenizer = Tokenizer.of_dictionary(["a\nb"], [1])
    with pytest.raises(ValueError, match=r"has a word a line, and the vocabulary holds 'a\\nb': rename it"):
        model.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_record_is_plain(tmp_path):
    Tokenizer(["a"], TextEncoding("moses", source_lang="de")).save(tmp_path)
    record = json.loads((tmp_path / "text.json").read_text())
    assert record["format"] == 1 and record["source_lang"] == "de" and "model" not in record
