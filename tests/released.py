"""Checkpoints as the authors' code saves them, checkpoints as `fairseq-train` leaves them, and the way between."""

import json
from pathlib import Path

import numpy as np
import torch

from lamemo_fairseq.checkpoints.convert import load_plain
from lamemo_fairseq.convert_checkpoint import main

from .helpers import tiny_decoder

SQUARE = Path(__file__).parent / "core/golden" / "attn3_square.npz"


def released(path, row=0):
    """A case as its authors' code would save it, the first token of a row being the end of a sentence."""
    case = np.load(path)
    config = json.loads(str(case["config"]))
    words = [f"word{i}" for i in range(config["vocab"])]
    words[case["tokens"][row, 0]] = "<eos>"
    state = {k[len("param/") :]: torch.from_numpy(case[k]) for k in case.files if k.startswith("param/")}
    config = {**config, "n_token": config["vocab"], "tie_weight": True, "dropout": 0.0}
    return case, words, {"model_config": config, "model_state": state, "vocab": words}


def import_released(checkpoint, folder, out=None):
    """Import a released checkpoint, saved as released.pt of *folder*, into *folder* itself or another."""
    torch.save(checkpoint, folder / "released.pt")
    main(["import", str(folder / "released.pt"), str(out or folder)])


def trained_here(folder, **options):
    """A checkpoint as fairseq-train leaves it, as far as exporting it goes, with its dict.txt."""
    decoder = tiny_decoder(dtype=torch.float32, **options)
    decoder.dictionary.save(str(folder / "dict.txt"))
    defaults = {
        **{"memory": "lookahead", "position_encoding": "disentangled", "lookahead_window": "right", "mem_len": 4},
        **{"decoder_layers": 2, "decoder_embed_dim": 8, "decoder_attention_heads": 2, "decoder_head_dim": None},
        **{"decoder_ffn_embed_dim": 12, "decoder_input_dim": None, "adaptive_softmax_cutoff": None},
        **{"adaptive_softmax_factor": 1.0, "untie_output": False, "decoder_normalize_before": False, "dropout": 0.0},
        **{"attention_dropout": 0.0, "same_length": False, "clamp_len": 0, "tokens_per_sample": 3},
    }
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    cfg = {
        "model": {"_name": "lamemo_lm", **defaults, **options},
        "task": {"_name": "segment_language_modeling", "tokens_per_sample": 3},
    }
    rest = {"optimizer_history": [{"num_updates": 1}], "extra_state": {"train_iterator": {"epoch": 1}}}
    torch.save({"model": weights, "cfg": cfg, **rest}, folder / "trained.pt")
    return decoder


def export(folder, trained="trained.pt", to="released.pt"):
    """Export a checkpoint of *folder* with its dict.txt, and return what is exported."""
    main(["export", str(folder / trained), str(folder / to), "--dictionary", str(folder / "dict.txt")])
    return load_plain(folder / to)
