"""The authors' names for weights and variants, and ours.

Their ``r_net`` of all layers is one tensor here, their queries, keys and values one matrix a layer.
"""

from typing import Any, Dict, List

import torch
from torch import Tensor

# attn_type of the released code -> (memory, position encoding, look-ahead window)
ATTENTION_TYPES: Dict[int, tuple[str, str, str]] = {
    0: ("recurrent", "transformer-xl", "right"),
    1: ("recurrent", "shaw", "right"),
    2: ("none", "absolute", "right"),
    3: ("lookahead", "disentangled", "right"),
    31: ("lookahead", "transformer-xl", "right"),
    32: ("lookahead", "disentangled-content", "right"),
    33: ("lookahead", "disentangled", "full"),
}

MAX_BANDS = 16

_BIASES = {
    "r_w_bias": "content_bias",
    "r_r_bias": "position_bias",
    "r_w_bias_future": "ahead_content_bias",
    "r_r_bias_future": "ahead_position_bias",
    "r_emb": "distance_embedding",
    "r_bias": "distance_bias",
}

_LAYER = {
    "dec_attn.o_net.weight": "self_attn.out_proj.weight",
    "dec_attn.layer_norm.weight": "self_attn_layer_norm.weight",
    "dec_attn.layer_norm.bias": "self_attn_layer_norm.bias",
    "pos_ff.CoreNet.0.weight": "feed_forward.fc1.weight",
    "pos_ff.CoreNet.0.bias": "feed_forward.fc1.bias",
    "pos_ff.CoreNet.3.weight": "feed_forward.fc2.weight",
    "pos_ff.CoreNet.3.bias": "feed_forward.fc2.bias",
    "pos_ff.layer_norm.weight": "final_layer_norm.weight",
    "pos_ff.layer_norm.bias": "final_layer_norm.bias",
}


def from_released(released: Dict[str, Tensor], layers: int) -> Dict[str, Tensor]:
    """Weights under our decoder's names, from those under the released names."""
    ours = {f"positions.{name}": released[theirs] for theirs, name in _BIASES.items() if theirs in released}
    if "layers.0.dec_attn.r_net.weight" in released:
        ours["positions.projection"] = torch.stack(
            [released[f"layers.{i}.dec_attn.r_net.weight"] for i in range(layers)]
        )
    for i in range(layers):
        prefix = f"layers.{i}."
        ours[f"{prefix}self_attn.qkv_proj.weight"] = _stack_qkv(released, prefix)
        ours.update({prefix + name: released[prefix + theirs] for theirs, name in _LAYER.items()})
    output = "adaptive_softmax" if "crit.cluster_weight" in released else "output"
    ours.update(_renamed(released, "word_emb.emb_layers.{}.weight", "embed_tokens.tables.{}.weight"))
    ours.update(_renamed(released, "word_emb.emb_projs.{}", "embed_tokens.projections.{}"))
    ours.update(_renamed(released, "crit.out_layers.{}.weight", f"{output}.weights.{{}}"))
    ours.update(_renamed(released, "crit.out_layers.{}.bias", f"{output}.biases.{{}}"))
    ours.update(_renamed(released, "crit.out_projs.{}", f"{output}.projections.{{}}"))
    for name in ("cluster_weight", "cluster_bias"):
        if f"crit.{name}" in released:
            ours[f"{output}.{name}"] = released[f"crit.{name}"]
    return ours


def _renamed(released: Dict[str, Tensor], theirs: str, ours: str) -> Dict[str, Tensor]:
    """Numbered weights under another name."""
    return {ours.format(i): released[theirs.format(i)] for i in range(MAX_BANDS) if theirs.format(i) in released}


def _stack_qkv(released: Dict[str, Tensor], prefix: str) -> Tensor:
    """Queries, keys, values; the authors keep queries apart where the memory looks ahead."""
    joined = released.get(f"{prefix}dec_attn.qkv_net.weight")
    if joined is not None:
        return joined
    parts: List[Tensor] = [released[f"{prefix}dec_attn.{part}_net.weight"] for part in ("q", "kv")]
    return torch.cat(parts)


def model_options(config: Dict[str, Any]) -> Dict[str, Any]:
    """Our options for a released configuration."""
    memory, positions, window = ATTENTION_TYPES[config["attn_type"]]
    return {
        "memory": memory,
        "position_encoding": positions,
        "lookahead_window": window,
        "mem_len": config["mem_len"],
        "clamp_len": max(config["clamp_len"], 0),
        "same_length": config["same_length"],
        "adaptive_softmax_cutoff": ",".join(map(str, config["cutoffs"])) or None,
        "adaptive_softmax_factor": float(config["div_val"]) if config["cutoffs"] else 1.0,
        "adaptive_input": bool(config["cutoffs"]) and config["div_val"] > 1,
        "decoder_layers": config["n_layer"],
        "decoder_embed_dim": config["d_model"],
        "decoder_input_dim": config["d_embed"],
        "decoder_attention_heads": config["n_head"],
        "decoder_head_dim": config["d_head"],
        "decoder_ffn_embed_dim": config["d_inner"],
        "decoder_normalize_before": config["pre_lnorm"],
        "tokens_per_sample": config["tgt_len"],
    }
