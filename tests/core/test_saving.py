"""Saved models: to the last bit, or refused in one line."""

import copy
import json
import pickle
import sys
from dataclasses import replace

import pytest
import torch

from lamemo_fairseq.core import LanguageModel, ModelConfig
from lamemo_fairseq.core.memory import MemoryOptions
from lamemo_fairseq.core.memory.compressive.options import CompressiveOptions

from .helpers import VARIANTS, random_tokens, read_streams, tiny_decoder

safetensors = pytest.importorskip("safetensors.torch")
SOFTMAXES = {
    "tied": {},
    "untied": {"untie_output": True},
    "narrow": {"decoder_input_dim": 4},
    "adaptive, tied": {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True},
    "adaptive, untied": {"adaptive_softmax_cutoff": "6,11", "untie_output": True},
}
COMPRESSIVE = ("compressive", "transformer-xl", "conv")


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    tiny_decoder(COMPRESSIVE).save(tmp_path / "model")
    return tmp_path / "model"


def assert_equal(model, other):
    assert model.config == other.config and not other.training
    weights, others = model.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype and torch.equal(weight, others[name]), name
    tokens = random_tokens(2, 7)
    with torch.no_grad():
        assert torch.equal(read_streams(model, tokens), read_streams(other, tokens))


@pytest.mark.parametrize("variant", VARIANTS, ids="-".join)
def test_a_model_comes_back_to_the_last_bit(variant, tmp_path):
    model = tiny_decoder(variant)
    model.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    assert_equal(model, LanguageModel.load(str(tmp_path / "new" / "folder")))


@pytest.mark.parametrize("options", SOFTMAXES.values(), ids=SOFTMAXES)
def test_weights_stay_tied(options, tmp_path):
    model = tiny_decoder(**options)
    model.save(tmp_path)
    loaded = LanguageModel.load(tmp_path)
    assert_equal(model, loaded)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_is_saved(dtype, tmp_path):
    model = tiny_decoder(dtype=dtype)
    model.save(tmp_path)
    loaded = LanguageModel.load(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_equal(model, loaded)


def test_other_users_may_read_the_weights_if_they_may_read_the_rest(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_another_model_takes_the_place_of_the_first(folder):
    model = tiny_decoder(seed=3)
    model.save(folder)
    assert len(list(folder.iterdir())) == 2
    assert_equal(model, LanguageModel.load(folder))


def test_a_model_does_not_get_the_tokenizer_of_the_one_before(folder):
    model = tiny_decoder(seed=3)
    (folder / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(13)))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"has a dict\.txt, and the model to save no tokenizer: set model\.tokenizer"):
        model.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model.tokenizer = LanguageModel.load(folder).tokenizer
    model.save(folder)
    assert_equal(model, LanguageModel.load(folder))


def test_values_are_replaced_by_name(folder):
    config = LanguageModel.load(folder, mem_len=9, dropout=0.5).config
    assert (config.mem_len, config.dropout) == (9, 0.5)
    own = CompressiveOptions(compressed_len=7, compression_rate=2)
    for given in (own, {"compressed_len": 7, "compression_rate": 2}):
        assert LanguageModel.load(folder, memory_options=given).config.memory_options == own


def test_the_memory_is_replaced_where_the_weights_fit(tmp_path):
    """By the remedy that the refusal names."""
    tiny_decoder(("lookahead", "transformer-xl", "right")).save(tmp_path)
    with pytest.raises(
        ValueError, match=r"--memory recurrent does not take lookahead_window, which .*memory_options={}"
    ):
        LanguageModel.load(tmp_path, memory="recurrent")
    config = LanguageModel.load(tmp_path, memory="recurrent", memory_options={}).config
    assert config.memory == "recurrent" and config.memory_options == MemoryOptions()


def test_a_model_is_loaded_without_its_memory(tmp_path, caplog):
    """As in evaluation; weights that a memory adds to layers stay where they are needed."""
    model = tiny_decoder(("lookahead", "disentangled-content", "right"))
    model.save(tmp_path)
    changes = {"memory": "none", "memory_options": {}, "position_encoding": "transformer-xl"}
    with caplog.at_level("INFO"):
        plain = LanguageModel.load(tmp_path, **changes)
    assert "leaves out weights of the saved model: positions.ahead_" in caplog.text
    tokens = random_tokens(2, 3)
    with torch.no_grad():  # the first segment has no memory
        torch.testing.assert_close(plain(tokens).features, model(tokens).features, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"another configuration: the model lacks positions.ahead_.*content_bias"):
        LanguageModel.load(tmp_path, **{**changes, "memory": "recurrent"})
    tiny_decoder(("infini", "transformer-xl", "delta")).save(tmp_path / "infini")
    with pytest.raises(ValueError, match=r"another configuration: the model lacks layers\.0\.self_attn"):
        LanguageModel.load(tmp_path / "infini", memory="none", memory_options={})


def test_options_of_a_memory_are_given_by_name():
    given = {"compressed_len": 7, "compression_rate": 2}
    sizes = {"memory": "compressive", "position_encoding": "transformer-xl"}
    config = ModelConfig(17, 4, **sizes, memory_options=given)
    assert config == ModelConfig(17, 4, **sizes, memory_options=CompressiveOptions(**given))
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert replace(config, memory="recurrent", memory_options={}).own_options == MemoryOptions()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"memory_options": {"compressed_length": 7}},
            r"unknown name 'compressed_length'.*did you mean compressed_len",
        ),
        ({"memory_options": {"store_len": 7}}, r"--memory compressive does not take store_len, .*--memory memorizing"),
        ({"memory_options": {"compressed_len": "7"}}, r"--compressed-len is '7': pass a whole number"),
        ({"memory_options": {"compression": 1}}, r"--compression is 1: pass a string"),
        ({"memory_options": {"compressed_len": -7}}, r"--compressed-len is -7"),
        ({"memory_options": [7]}, r"memory_options is a list, but .* takes CompressiveOptions: pass a dictionary of"),
        ({"mem_len": "300"}, r"--mem-len is '300': pass a whole number"),
        ({"mem_len": None}, r"--mem-len is None: pass a whole number"),
        ({"dropout": "0.1"}, r"--dropout is '0.1': pass a number"),
        ({"same_length": "no"}, r"--same-length is 'no': pass True or False"),
        ({"segment_length": "8"}, r"segment_length is '8': pass a whole number"),
        ({"vocabulary_size": 17.0}, r"vocabulary_size is 17.0: pass a whole number"),
        ({"vocabulary_size": 0}, r"vocabulary_size is 0, it must be positive"),
    ],
    ids=str,
)
def test_values_of_another_kind(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        sizes = {"vocabulary_size": 17, "segment_length": 4, "position_encoding": "transformer-xl"}
        ModelConfig(**{**sizes, "memory": "compressive", **changes})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is not there: pass a folder that LanguageModel.save has "):
        LanguageModel.load(folder)


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_place_of_a_folder_is_named_once(below, tmp_path):
    file = tmp_path / "train.txt"
    file.touch()
    folder = file / "model" if below else file
    named = f"{folder}: {file}" if below else file
    with pytest.raises(NotADirectoryError, match=f"^{named} is a file, pass a folder$"):
        tiny_decoder().save(folder)


def test_files_of_two_saves_are_told_apart(folder, tmp_path):
    """As when one of them was copied, or a save was killed between the two."""
    tiny_decoder(COMPRESSIVE, decoder_normalize_before=True).save(tmp_path / "other")
    (tmp_path / "other" / "config.json").replace(folder / "config.json")
    with pytest.raises(ValueError, match=r"is not the configuration that model.safetensors was saved with: save the "):
        LanguageModel.load(folder)


def edited(folder, **changes):
    """Edit a saved configuration, in both files."""
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    text = json.dumps({name: value for name, value in values.items() if value is not ...})
    weights = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"config.json": text})
    (folder / "config.json").write_text(text)


def test_a_configuration_edited_by_hand_is_refused(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"mem_len": 4', '"mem_len": 5'))
    with pytest.raises(ValueError, match=r"config.json is not the configuration .* pass it to LanguageModel.load"):
        LanguageModel.load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"text"', "null", "{}", '{"format": '])
def test_a_damaged_configuration_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"is not a folder that LanguageModel.save has written"):
        LanguageModel.load(folder)


@pytest.mark.parametrize("size", [0, 5, 60, -1])
def test_damaged_weights_are_refused(folder, size):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:size])
    with pytest.raises(ValueError, match=r"is not a folder that LanguageModel.save has written"):
        LanguageModel.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"config.json has format 2, this version reads 1: install a newer one"),
        ({"format": ...}, r"is not a folder that LanguageModel.save has written"),
        ({"memlen": 3}, r"unknown name 'memlen' in a model's configuration; did you mean mem_len\?"),
        ({"memory": "lost"}, r"unknown memory 'lost'; the known ones are associative, "),
        (
            {"memory": "recurrent"},
            r"^--memory recurrent does not take compressed_len, which the configuration has for ",
        ),
        ({"position_encoding": "none"}, r"unknown position encoding 'none'"),
    ],
    ids=str,
)
def test_configurations_that_are_not_known_here(folder, changes, message):
    edited(folder, **changes)
    with pytest.raises(ValueError, match=message):
        LanguageModel.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mem_length": 3}, r"unknown name 'mem_length' in a model's configuration; did you mean .*mem_len"),
        (
            {"compressed_len": 3},
            r"'compressed_len' .*; it is an option of --memory compressive: pass memory_options, with",
        ),
        (
            {"memory": "recurrent"},
            r"compressed_len, .* for --memory compressive: keep that memory; or pass memory_options={}",
        ),
        ({"memory": "recurrent", "memory_options": {}}, "the weights are those of another configuration"),
        ({"decoder_layers": 3}, "the weights are those of another configuration"),
        ({"decoder_layers": 1}, "the weights are those of another configuration"),
        ({"decoder_embed_dim": 10}, "the weights are those of another configuration"),
        ({"mem_len": -1}, "--mem-len is -1, but --memory compressive needs at least"),
        ({"memory_options": {"compresed_len": 3}}, r"unknown name 'compresed_len'.*did you mean compressed_len"),
    ],
    ids=str,
)
def test_changes_that_make_no_sense(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel.load(folder, **changes)


def test_misspelt_options():
    with pytest.raises(ValueError, match=r"^unknown name 'mem_length' .*; did you mean .*mem_len"):
        ModelConfig(17, 4, mem_length=3)
    with pytest.raises(ValueError, match=r"^unknown name 'compressed_len' .*; it is an option of --memory "):
        ModelConfig(17, segment_length=4, compressed_len=3)
    with pytest.raises(TypeError, match="segment_length"):
        ModelConfig(vocabulary_size=17)
    config = ModelConfig(17, 4)
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("memory", "positions", "message"),
    [
        ("compressive", "disentangled", "disentangled and its variants tell right from left"),
        ("lookahead", "shaw", "shaw has no distances to the right"),
        ("token", "t5", "t5 has no distances to the right"),
    ],
)
def test_positions_that_do_not_go_with_a_memory(memory, positions, message):
    """The configuration refuses them, before there is a model."""
    with pytest.raises(ValueError, match=f"^--position-encoding {message}"):
        ModelConfig(17, 4, memory=memory, position_encoding=positions)


def test_options_of_another_memory_are_refused():
    with pytest.raises(ValueError, match="memory_options is a CompressiveOptions, but --memory none takes Memory"):
        ModelConfig(17, 4, memory="none", position_encoding="absolute", memory_options=CompressiveOptions())


def test_a_configuration_cannot_be_changed_behind_the_models_back():
    config = tiny_decoder().config
    with pytest.raises(AttributeError):
        config.mem_len = 3
    assert replace(config, mem_len=3).mem_len == 3


def test_safetensors_is_asked_for_where_it_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (lambda: LanguageModel.load(folder), lambda: tiny_decoder().save(tmp_path / "other")):
        with pytest.raises(ModuleNotFoundError, match="with safetensors: pip install safetensors"):
            use()
