"""convert_checkpoint refuses what is no checkpoint, what lacks something, and what has no place in the other format."""

import os

import pytest
import torch

from lamemo_fairseq.convert_checkpoint import main

from .helpers import run_command
from .released import SQUARE, export, import_released, released, trained_here


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_fn": "gelu"}, "--activation-fn gelu"),
        ({"lookahead_from_layer": 2}, "--lookahead-from-layer 2"),
        ({"lookahead_every": 3}, "--lookahead-every 3"),
        ({"decoder_output_dim": 6, "untie_output": True}, "--decoder-output-dim 6"),
        ({"adaptive_softmax_cutoff": "6", "adaptive_softmax_factor": 1.5, "adaptive_input": True}, "-factor 1.5"),
        ({"adaptive_softmax_cutoff": "6", "adaptive_softmax_factor": 2.0, "untie_output": True}, "-factor 2.0"),
    ],
)
def test_what_the_released_code_lacks_is_not_exported(options, message, tmp_path):
    trained_here(tmp_path, **options)
    with pytest.raises(SystemExit, match=f"the released code has no model with .*{message}"):
        export(tmp_path)
    assert not (tmp_path / "released.pt").exists()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([1, 2], "holds a list, so it is no checkpoint"),
        ({"model_state": {}, "model_config": None}, "model_config lacks attn_type, n_layer"),
        ("a weight", "lacks the weight 'layers.1.dec_attn.o_net.weight'"),
    ],
)
def test_a_released_checkpoint_that_lacks_something(broken, message, tmp_path):
    trained_here(tmp_path)
    exported = export(tmp_path)
    if broken == "a weight":
        del exported["model_state"]["layers.1.dec_attn.o_net.weight"]
        broken = exported
    elif isinstance(broken, dict):
        broken["vocab"] = exported["vocab"]
    torch.save(broken, tmp_path / "broken.pt")
    with pytest.raises(SystemExit, match=message):
        main(["import", str(tmp_path / "broken.pt"), str(tmp_path / "again")])


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_foreign_objects_are_refused_and_not_run(tmp_path):
    _, _, checkpoint = released(SQUARE)
    with pytest.raises(SystemExit, match="not a checkpoint of tensors and plain containers; nothing in it was run"):
        import_released({**checkpoint, "vocab": Evil(tmp_path / "ran")}, tmp_path, tmp_path / "out")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model_config"), r"released\.pt lacks 'model_config', so it is no checkpoint of the authors'"),
        (lambda c: [c.pop("model_state"), c.pop("vocab")], "lacks 'model_state', .*; it holds model_config$"),
        (lambda c: c.pop("vocab"), "pass --vocabulary FILE"),
        (lambda c: c["vocab"].pop(), "has 23 words, the vocabulary 22"),
        (lambda c: c["vocab"].__setitem__(0, c["vocab"][1]), "holds a word twice"),
        (
            lambda c: c["model_config"].update(attn_type=7),
            "attn_type 7 is not known here; the known ones are 0, 1, 2, 3",
        ),
        (lambda c: c["vocab"].__setitem__(c["vocab"].index("word5"), "a\nb"), r"a word a line, and .* 'a\\nb': rename"),
        (lambda c: c["vocab"].__setitem__(c["vocab"].index("word5"), "</s>"), r"holds </s> under two names"),
        (lambda c: c["model_config"].update(n_layer="2"), r"has n_layer '2', no whole number"),
        (lambda c: c["model_config"].update(mem_len=[3]), r"has mem_len \[3\], no whole number"),
        (lambda c: c["model_config"].update(clamp_len="x"), r"holds a value of another kind"),
        (lambda c: c["model_config"].update(dropout="x"), r"could not convert|another kind"),
        (lambda c: c["model_config"].update(d_inner=6), r"fc1.bias has the shape \(\d+,\), and by the config \(6,\)"),
        (lambda c: c["model_state"].update(more="__import__('os')"), r"holds something that is no tensor"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    _, _, checkpoint = released(SQUARE)
    change(checkpoint)
    with pytest.raises(SystemExit, match=message) as refusal:
        import_released(checkpoint, tmp_path, tmp_path / "out")
    assert "\n" not in str(refusal.value) and not (tmp_path / "out" / "checkpoint.pt").exists()


def test_a_file_cut_short_is_named(tmp_path):
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(SystemExit, match="cut short"):
        main(["import", str(tmp_path / "cut.pt"), str(tmp_path / "out")])


def test_what_does_not_fit_an_imported_checkpoint_is_refused(tmp_path):
    _, _, checkpoint = released(SQUARE)
    import_released(checkpoint, tmp_path)
    ours = str(tmp_path / "checkpoint.pt")
    dictionary = ["--dictionary", str(tmp_path / "dict.txt")]
    for arguments, message in (
        (["import", ours, "out"], "is a checkpoint of this package already: pass it to the commands as it is"),
        (["import", str(tmp_path / "released.pt"), ours], "is a file, pass a folder"),
        (["core", ours, f"{ours}/out", *dictionary], f"{ours}/out: {ours} is a file, pass a folder"),
        (["export", ours, f"{ours}/out.pt", *dictionary], f"{ours} is a file, pass a folder"),
        (["export", ours, str(tmp_path), *dictionary], "is a folder: pass a file"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(SystemExit, match=r"latin\.txt is not text in UTF-8: line 1 has"):
        main(["import", str(tmp_path / "released.pt"), "out", "--vocabulary", str(tmp_path / "latin.txt")])
    (tmp_path / "dict.txt").write_text("other 1\n")
    with pytest.raises(SystemExit, match="trained with another dictionary"):
        run_command(
            lambda: main(["export", str(tmp_path / "checkpoint.pt"), "x", "--dictionary", str(tmp_path / "dict.txt")])
        )
