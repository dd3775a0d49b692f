"""Weights that a released model shares, and those that a model here shares, are told apart by a conversion."""

import pytest
import torch

from lamemo_fairseq.checkpoints.convert import load_plain
from lamemo_fairseq.convert_checkpoint import main

from .released import export, trained_here


def test_a_window_is_of_look_ahead_memory_alone(tmp_path):
    """Another memory is exported whatever the option says, which means nothing to it."""
    trained_here(tmp_path, memory="recurrent", position_encoding="transformer-xl", lookahead_window="full")
    assert export(tmp_path)["model_config"]["attn_type"] == 0


ADAPTIVE = {"adaptive_softmax_cutoff": "6,11", "adaptive_softmax_factor": 2.0, "adaptive_input": True}


@pytest.mark.parametrize("untied", [False, True])
def test_projections_are_tied_as_the_output_is(untied, tmp_path):
    """The released code ties projections by an option of their own, and would replace those of an untied output."""
    trained_here(tmp_path, **ADAPTIVE, untie_output=untied)
    exported = export(tmp_path)
    state, config = exported["model_state"], exported["model_config"]
    assert config["tie_projs"] == [False, not untied, not untied] and config["tie_weight"] is not untied
    assert torch.equal(state["crit.out_projs.1"], state["word_emb.emb_projs.1"]) is not untied


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("adaptive_softmax.projections.1", "embed_tokens.projections.1"),
        ("adaptive_softmax.weights.0", "embed_tokens.tables.0.weight"),
    ],
)
def test_released_weights_that_are_one_weight_here(one, other, tmp_path):
    """The model has tied projections with tied embeddings; the released code may have only the latter."""
    trained_here(tmp_path, **ADAPTIVE)
    exported = export(tmp_path)
    theirs = {"adaptive_softmax.projections.1": "crit.out_projs.1"}.get(one, "crit.out_layers.0.weight")
    exported["model_state"][theirs] = exported["model_state"][theirs] + 1
    torch.save(exported, tmp_path / "released.pt")
    arguments = ["import", str(tmp_path / "released.pt"), str(tmp_path / "again")]
    with pytest.raises(SystemExit, match=f"has other values for decoder.{one} than for decoder.{other}, .* tie_weight"):
        main(arguments)
    exported["model_config"]["tie_weight"] = False
    torch.save(exported, tmp_path / "released.pt")
    main(arguments)
    weights = load_plain(tmp_path / "again" / "checkpoint.pt")["model"]
    assert torch.equal(weights[f"decoder.{one}"], exported["model_state"][theirs])
    assert not torch.equal(weights[f"decoder.{one}"], weights[f"decoder.{other}"])
