"""Options of fairseq's own language models that models with memory do not have, and why: users pass them by habit."""

from typing import Collection, Dict, List

from ..core.names import option_name

_REASONS = {
    # The task, language_modeling
    "sample_break_mode": "a stream is read whole in segments of --tokens-per-sample, as with none; --documents reads "
    "documents",
    "self_target future_target past_target": "the target is always the next token, as with --future-target alone",
    "output_dictionary_size": "every word of dict.txt can be predicted; `python -m preprocess own --nwords` makes a "
    "smaller one",
    "add_bos_token": "a stream begins after `</s>`, and a segment goes on where the one before it ended",
    "max_target_positions": "--tokens-per-sample is the length of a segment, and a text may have any length",
    "shorten_method shorten_data_split_list": "no text is too long: it goes on in the next segment",
    "pad_to_fixed_length pad_to_fixed_bsz": "a segment has --tokens-per-sample tokens anyway, and a batch has "
    "--batch-size streams",
    # The model, transformer_lm
    "relu_dropout": "its name is --activation-dropout",
    "no_decoder_final_norm": "no layer norm follows the last layer, also with --decoder-normalize-before",
    "no_token_positional_embeddings decoder_learned_pos": "--position-encoding chooses how positions are encoded",
    "share_decoder_input_output_embed tie_adaptive_weights tie_adaptive_proj": "the output layer has the weights of "
    "the embeddings anyway, unless --untie-output is given",
    "adaptive_input_factor adaptive_input_cutoff": "with --adaptive-input, --adaptive-softmax-factor and "
    "--adaptive-softmax-cutoff hold for the embeddings too",
    "adaptive_softmax_dropout": "--dropout is also that of the output",
    "character_embeddings character_filters character_embedding_dim char_embedder_highway_layers": "every token of "
    "dict.txt has an embedding of its own",
    "layernorm_embedding no_scale_embedding": "embeddings are scaled by the root of the width, without layer norm",
    "offload_activations": "--checkpoint-activations saves memory",
    "decoder_layerdrop decoder_layers_to_keep": "every segment needs the memory of every layer",
    "quant_noise_pq quant_noise_pq_block_size quant_noise_scalar": "fairseq's quantization has not been tried with "
    "these layers",
    "min_params_to_wrap": "it belongs to --ddp-backend fully_sharded, which cuts checkpoints up",
    "base_layers base_sublayers base_shuffle scale_fc scale_attn scale_heads scale_resids": "its layers are "
    "transformer_lm's alone",
    "decoder_xformers_att_config": "--attention-backend chooses the implementation of the attention",
}

ABSENT: Dict[str, str] = {name: reason for names, reason in _REASONS.items() for name in names.split()}
"""The reason by field."""


def message(names: Collection[str]) -> str:
    """Return the message on options of `ABSENT`, by field, all in one line."""
    fields_of: Dict[str, List[str]] = {}
    for name in dict.fromkeys(names):
        fields_of.setdefault(ABSENT[name], []).append(option_name(name))
    reasons = [f"no {' and no '.join(options)} ({reason})" for reason, options in fields_of.items()]
    return f"models with memory have {', '.join(reasons)}: leave {'it' if len(names) == 1 else 'them'} out"


def render() -> str:
    """Return the part of the page of options on these, in Markdown."""
    rows = [f"| {', '.join(f'`{option_name(name)}`' for name in k.split())} | {why} |" for k, why in _REASONS.items()]
    return "\n".join([_HEAD, *rows, ""])


_HEAD = """### Not there

fairseq's `language_modeling` and `transformer_lm` have these options, and models with memory do not. Leave them out.

| option | reason |
|---|---|"""
