"""The authors' names for weights and variants, and ours.

Here the authors' ``r_net`` of all layers is one tensor, and their queries, keys and values are one matrix a layer.
"""

from typing import Any, Dict, List, Tuple

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


# Theirs -> ours: {} is the number of the band, and {output} is the name of the softmax here.
_BANDS = {
    "word_emb.emb_layers.{}.weight": "embed_tokens.tables.{}.weight",
    "word_emb.emb_projs.{}": "embed_tokens.projections.{}",
    "crit.out_layers.{}.weight": "{output}.weights.{}",
    "crit.out_layers.{}.bias": "{output}.biases.{}",
    "crit.out_projs.{}": "{output}.projections.{}",
    "crit.cluster_weight": "{output}.cluster_weight",
    "crit.cluster_bias": "{output}.cluster_bias",
}


def from_released(released: Dict[str, Tensor], layers: int) -> Dict[str, Tensor]:
    """Return weights under our decoder's names, from those under the released names."""
    ours = {f"positions.{name}": released[theirs] for theirs, name in _BIASES.items() if theirs in released}
    if "layers.0.dec_attn.r_net.weight" in released:
        ours["positions.projection"] = torch.stack(
            [released[f"layers.{i}.dec_attn.r_net.weight"] for i in range(layers)]
        )
    for i in range(layers):
        prefix = f"layers.{i}."
        ours[f"{prefix}self_attn.qkv_proj.weight"] = _stack_qkv(released, prefix)
        ours.update({prefix + name: released[prefix + theirs] for theirs, name in _LAYER.items()})
    ours.update((name, released[theirs]) for theirs, name in _numbered("crit.cluster_weight" in released, released))
    return ours


def to_released(ours: Dict[str, Tensor], layers: int, joined_qkv: bool) -> Dict[str, Tensor]:
    """Return weights under the released names, from those under our decoder's.

    *joined_qkv* says whether the released weights have queries, keys and values in one matrix, as without look-ahead.
    """
    released = {theirs: ours[f"positions.{name}"] for theirs, name in _BIASES.items() if f"positions.{name}" in ours}
    for i in range(layers):
        prefix = f"layers.{i}."
        if "positions.projection" in ours:
            released[f"{prefix}dec_attn.r_net.weight"] = ours["positions.projection"][i]
        qkv = ours[f"{prefix}self_attn.qkv_proj.weight"]
        if joined_qkv:
            released[f"{prefix}dec_attn.qkv_net.weight"] = qkv
        else:
            width = qkv.size(0) // 3
            released[f"{prefix}dec_attn.q_net.weight"] = qkv[:width]
            released[f"{prefix}dec_attn.kv_net.weight"] = qkv[width:]
        released.update({prefix + theirs: ours[prefix + name] for theirs, name in _LAYER.items()})
    adaptive = "adaptive_softmax.cluster_weight" in ours
    released.update((theirs, ours[name]) for name, theirs in _numbered(adaptive, ours, ours_first=True))
    return released


def _numbered(adaptive: bool, there: Dict[str, Tensor], ours_first: bool = False) -> List[Tuple[str, str]]:
    """Return pairs (theirs, ours) of the weights of bands, or the reverse, of which the first is in *there*."""
    output = "adaptive_softmax" if adaptive else "output"
    pairs = []
    for theirs, ours in _BANDS.items():
        for i in range(MAX_BANDS if "{}" in theirs else 1):
            pair = (theirs.format(i), ours.format(i, output=output))
            pair = pair[::-1] if ours_first else pair
            if pair[0] in there:
                pairs.append(pair)
    return pairs


def _stack_qkv(released: Dict[str, Tensor], prefix: str) -> Tensor:
    """Stack queries, keys, values; the authors keep queries apart where the memory looks ahead."""
    joined = released.get(f"{prefix}dec_attn.qkv_net.weight")
    if joined is not None:
        return joined
    weights: List[Tensor] = [released[f"{prefix}dec_attn.{projection}_net.weight"] for projection in ("q", "kv")]
    return torch.cat(weights)


def model_options(config: Dict[str, Any]) -> Dict[str, Any]:
    """Return our options for a released configuration.

    Raises:
        ValueError: a variant that is not known.
    """
    if config["attn_type"] not in ATTENTION_TYPES:
        known = ", ".join(map(str, ATTENTION_TYPES))
        raise ValueError(f"attn_type {config['attn_type']} is not known here; the known ones are {known}")
    memory, positions, window = ATTENTION_TYPES[config["attn_type"]]
    cutoffs, div_val = list(config.get("cutoffs") or []), config.get("div_val", 1)
    return {
        "memory": memory,
        "position_encoding": positions,
        "lookahead_window": window,
        "mem_len": config["mem_len"],
        "clamp_len": max(config.get("clamp_len", 0), 0),
        "same_length": bool(config.get("same_length", False)),
        "adaptive_softmax_cutoff": ",".join(map(str, cutoffs)) or None,
        "adaptive_softmax_factor": float(div_val) if cutoffs else 1.0,
        "adaptive_input": bool(cutoffs) and div_val > 1,
        "untie_output": not config.get("tie_weight", True),
        "decoder_layers": config["n_layer"],
        "decoder_embed_dim": config["d_model"],
        "decoder_input_dim": config.get("d_embed") or config["d_model"],
        "decoder_attention_heads": config["n_head"],
        "decoder_head_dim": config["d_head"],
        "decoder_ffn_embed_dim": config["d_inner"],
        "decoder_normalize_before": bool(config.get("pre_lnorm", False)),
        "dropout": float(config.get("dropout", 0.1)),
        "attention_dropout": float(config.get("dropatt", 0.0)),
        "tokens_per_sample": config["tgt_len"],
    }
