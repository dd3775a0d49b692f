"""convert_checkpoint names the folder that was meant, says what it replaces, and never writes over its own input."""

import pytest

from lamemo_fairseq.convert_checkpoint import main
from lamemo_fairseq.core import LanguageModel, ModelConfig

from .released import SQUARE, import_released, released

SIZES = {"decoder_layers": 1, "decoder_embed_dim": 8, "decoder_attention_heads": 2, "decoder_ffn_embed_dim": 8}


@pytest.fixture
def model(tmp_path):
    """A folder of the core."""
    LanguageModel(ModelConfig(vocabulary_size=20, segment_length=4, mem_len=4, **SIZES)).save(tmp_path / "lamemo")
    return tmp_path / "lamemo"


@pytest.fixture
def checkpoint(tmp_path):
    """A released checkpoint, imported."""
    import_released(released(SQUARE)[2], tmp_path)
    return tmp_path / "checkpoint.pt"


TRANSFORMERS = ["--format", "transformers"]


@pytest.mark.parametrize(
    "words", [["export", *TRANSFORMERS], ["import", *TRANSFORMERS], ["export", "--dictionary", "d"], ["import"]]
)
def test_a_misspelt_folder(words, model, tmp_path):
    with pytest.raises(
        SystemExit, match=f"there is no (folder|checkpoint) {tmp_path}/lameno: did you mean {model}\\?$"
    ):
        main([*words, str(tmp_path / "lameno"), str(tmp_path / "out")])


@pytest.mark.parametrize("words", [["export", "--dictionary", "d"], ["import"], ["core", "--dictionary", "d"]])
def test_a_folder_in_place_of_a_checkpoint(words, model, tmp_path):
    with pytest.raises(SystemExit, match=rf"{model} is a model's folder: pass .* --format transformers$"):
        main([*words, str(model), str(tmp_path / "out")])


def test_what_is_replaced_is_told(checkpoint, tmp_path, capsys):
    dictionary = ["--dictionary", str(tmp_path / "dict.txt")]
    for words, target, former in (
        (["core", str(checkpoint)], tmp_path / "core", [tmp_path / "core/config.json"]),
        (["export", str(checkpoint)], tmp_path / "out.pt", [tmp_path / "out.pt"]),
        (
            ["import", str(tmp_path / "released.pt")],
            tmp_path / "again",
            [tmp_path / "again/checkpoint.pt", tmp_path / "again/dict.txt"],
        ),
    ):
        words = [*words, str(target), *([] if words[0] == "import" else dictionary)]
        capsys.readouterr()
        main(words)
        assert "; the former" not in capsys.readouterr().out
        main(words)
        verb = "is" if len(former) == 1 else "are"
        assert capsys.readouterr().out.endswith(f"; the former {' and '.join(map(str, former))} {verb} replaced\n")


def test_a_checkpoint_is_not_written_over_itself(checkpoint, tmp_path):
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match="is the checkpoint to convert, and would be lost: pass another file"):
        main(["export", str(checkpoint), str(checkpoint), "--dictionary", str(tmp_path / "dict.txt")])
    assert checkpoint.read_bytes() == before
    (tmp_path / "released.pt").rename(checkpoint)
    with pytest.raises(SystemExit, match="is the checkpoint to convert, and would be lost: pass another folder"):
        main(["import", str(checkpoint), str(tmp_path)])
