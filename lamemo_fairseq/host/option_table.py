"""Options of fairseq's commands that do not apply to streams, and why; `option_page.py` renders the table."""

import os
from functools import cache
from typing import Dict, List, Tuple

import torch

from ..core.attention.choice import why_not_fused
from .evaluation_rules import EVALUATION_RULES, of_generation
from .memory_rules import of_memories
from .option_rules import (
    COMMANDS,
    EVAL_LM,
    EVALUATION,
    GENERATE,
    GENERATION,
    IGNORED,
    INTERACTIVE,
    NOTED,
    REFUSED,
    TRAIN,
    TRAINING,
    VALIDATE,
    Rule,
    Settings,
    is_one,
    is_other,
    on_cpu,
    rule,
    with_all,
    without,
)


def _no_fused_kernels(settings: Settings) -> bool:
    q = torch.empty(1, 1, 1, 1)
    return str(settings.get("attention_backend")) == "fused" and on_cpu(settings) and why_not_fused(q) is not None


_HALF = ("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16")
_NO_BEST = ("no_save", "disable_validation")

_RULES = [
    # Devices and precision
    rule(
        REFUSED,
        "fp16 memory_efficient_fp16 bf16 memory_efficient_bf16 amp",
        TRAINING,
        "only one precision is possible; pass one of --fp16, --bf16, --amp",
        lambda s: sum(bool(s.get(name)) for name in ("fp16", "bf16", "amp")) > 1,
    ),
    rule(REFUSED, "tpu", COMMANDS, "models with memory run on CPUs and GPUs; leave it out"),
    rule(
        REFUSED,
        "fp16",
        TRAINING,
        "fairseq trains in fp16 on GPUs alone; on a CPU leave it out, or pass --bf16 (to fairseq-hydra-train "
        "common.fp16=false)",
        lambda s: on_cpu(s) and not s.get("memory_efficient_fp16"),
    ),
    rule(
        NOTED,
        "memory_efficient_fp16",
        TRAINING,
        "on a CPU the first gradient that overflows ends the run; pass --bf16 instead",
        on_cpu,
    ),
    rule(REFUSED, "amp", TRAINING, "fairseq has it for GPUs alone; on a CPU leave it out, or pass --bf16", on_cpu),
    rule(
        IGNORED,
        "bf16 memory_efficient_bf16 amp",
        EVALUATION,
        "these commands compute in float32; pass --fp16 for half precision",
    ),
    rule(
        REFUSED,
        "amp_init_scale",
        TRAINING,
        "fairseq begins with the scale of --fp16-init-scale also with --amp; pass that",
    ),
    rule(
        REFUSED,
        "amp_scale_window",
        TRAINING,
        "fairseq uses another option's value in its place; leave it out, for torch's window of 2,000 updates",
    ),
    rule(IGNORED, "fp16_init_scale min_loss_scale", TRAINING, "without --fp16 or --amp", without("fp16", "amp")),
    rule(
        IGNORED,
        "fp16_scale_window",
        TRAINING,
        "without --fp16",
        # With several values of --update-freq fairseq asks for it also with --bf16.
        lambda s: not (s.get("fp16") or (s.get("bf16") and "," in str(s.get("update_freq")))),
    ),
    rule(IGNORED, "fp16_scale_tolerance threshold_loss_scale", TRAINING, "without --fp16", without("fp16")),
    rule(IGNORED, "amp_batch_retries", TRAINING, "without --amp", without("amp")),
    rule(IGNORED, "fp16_no_flatten_grads", TRAINING, "without --fp16 or --bf16", without("fp16", "bf16")),
    rule(IGNORED, "on_cpu_convert_precision", TRAINING, "batches are word ids, which have no precision"),
    rule(
        REFUSED,
        "attention_backend",
        TRAINING,
        "the fused backend runs on GPUs with Triton; on a CPU pass auto, blocked or eager",
        _no_fused_kernels,
    ),
    rule(REFUSED, "cuda_graphs", TRAINING, "CUDA graphs need a GPU; on a CPU leave it out", on_cpu),
    rule(REFUSED, "profile", TRAINING, "it marks ranges for NVIDIA's profiler; on a CPU leave it out", on_cpu),
    rule(
        REFUSED,
        "quantization_config_path",
        COMMANDS,
        "fairseq's quantization has not been tried with these layers; leave it out",
    ),
    # Several devices
    rule(
        REFUSED,
        "model_parallel_size pipeline_model_parallel pipeline_balance pipeline_devices pipeline_chunks "
        "pipeline_encoder_balance pipeline_encoder_devices pipeline_decoder_balance pipeline_decoder_devices "
        "pipeline_checkpoint",
        COMMANDS,
        "a model with memory is not divided over devices; leave it out (--checkpoint-activations saves memory)",
    ),
    rule(
        REFUSED,
        "ddp_backend",
        TRAINING,
        "fully_sharded cuts checkpoints up, and a run resumes exactly from whole ones alone; pass pytorch_ddp or "
        "legacy_ddp",
        is_one("ddp_backend", "fully_sharded"),
    ),
    rule(
        REFUSED,
        "ddp_backend",
        TRAINING,
        "no checkpoint holds slowmo's momentum, so that a run could not resume exactly; pass pytorch_ddp or legacy_ddp",
        is_one("ddp_backend", "slowmo"),
    ),
    rule(
        REFUSED,
        "slowmo_momentum slowmo_base_algorithm localsgd_frequency nprocs_per_node",
        COMMANDS,
        "it belongs to --ddp-backend slowmo, from which a run could not resume exactly; leave it out",
    ),
    rule(
        REFUSED,
        "no_reshard_after_forward fp32_reduce_scatter cpu_offload use_sharded_state not_fsdp_flatten_parameters",
        COMMANDS,
        "it belongs to --ddp-backend fully_sharded, which cuts checkpoints up; leave it out",
    ),
    rule(
        REFUSED,
        "zero_sharding",
        COMMANDS,
        "a run resumes exactly from a whole optimizer alone, and this one is cut up; leave it out",
    ),
    rule(
        REFUSED,
        "use_bmuf",
        TRAINING,
        "no checkpoint holds its momentum, so that a run could not resume exactly; leave it out",
    ),
    rule(IGNORED, "all_gather_list_size", COMMANDS, "messages between ranks have no limit here"),
    rule(IGNORED, "fast_stat_sync", COMMANDS, "fairseq no longer reads it"),
    # Data
    rule(
        IGNORED,
        "required_batch_size_multiple required_seq_len_multiple skip_invalid_size_inputs_valid_test curriculum "
        "grouped_shuffling update_epoch_batch_itr update_ordered_indices_seed fix_batches_to_gpus",
        COMMANDS,
        "it is for sentences that are shuffled and sorted by length; a stream is read in order, whole",
    ),
    rule(
        REFUSED,
        "skip_remainder_batch",
        TRAINING,
        "every token of a stream is trained on once an epoch; leave it out",
    ),
    rule(
        IGNORED,
        "max_tokens",
        (*TRAINING, EVAL_LM, VALIDATE),
        "--batch-size is given, the number of streams; pass one of the two",
        with_all("batch_size"),
    ),
    rule(
        IGNORED,
        "max_tokens_valid",
        TRAINING,
        "--batch-size-valid, or else --batch-size, is the number of streams; pass that",
        with_all("batch_size_valid"),
    ),
    rule(IGNORED, "max_tokens_valid batch_size_valid", EVALUATION, "pass --batch-size, the number of streams"),
    rule(
        REFUSED,
        "use_plasma_view",
        COMMANDS,
        "binarized text is mapped into memory that processes share anyway; leave it out",
    ),
    rule(IGNORED, "plasma_path", COMMANDS, "it belongs to --use-plasma-view"),
    rule(
        REFUSED,
        "num_shards shard_id",
        TRAINING,
        "in training the ranks share the streams; pass --distributed-world-size",
    ),
    rule(
        REFUSED,
        "combine_valid_subsets",
        TRAINING,
        "it joins valid, valid1 and so on into one split; leave --valid-subset out, or leave this option "
        "out to validate on each split by itself",
        is_other("valid_subset", "valid"),
    ),
    rule(REFUSED, "gen_subset", (VALIDATE,), "this command evaluates --valid-subset; pass that"),
    rule(
        REFUSED,
        "combine_valid_subsets",
        (VALIDATE,),
        "this command evaluates every split of --valid-subset by itself; leave it out",
    ),
    rule(
        REFUSED,
        "context_window",
        (EVAL_LM,),
        "the memory of a model is its context; leave it out, and choose the memory's length with --model-overrides "
        "\"{'mem_len': M}\"",
    ),
    rule(
        REFUSED,
        "path",
        (VALIDATE,),
        "this command computes the loss of one model; pass one, or evaluate several with fairseq-eval-lm",
        lambda s: os.pathsep in (s.get("path") or "") and not os.path.exists(s["path"]),
    ),
    rule(REFUSED, "valid_subset", (EVAL_LM, GENERATE), "this command reads --gen-subset; pass that"),
    rule(IGNORED, "gen_subset", TRAINING, "training reads --train-subset and --valid-subset"),
    rule(
        REFUSED,
        "num_shards shard_id",
        (INTERACTIVE,),
        "every line of --input is read; divide the file, or take fairseq-generate",
    ),
    rule(
        IGNORED,
        "gen_subset valid_subset num_workers data_buffer_size dataset_impl",
        (INTERACTIVE,),
        "this command reads --input",
    ),
    # Training
    rule(
        NOTED,
        "max_valid_steps",
        TRAINING,
        "fairseq evaluates one batch more than it says, and streams then end before the split does",
    ),
    rule(
        NOTED,
        "validate_interval_updates",
        TRAINING,
        "checkpoint_best.pt is the best of those models that are saved, and a better one in between is lost; pass "
        "--save-interval-updates with the same number",
        # Who gives both numbers has chosen them.
        lambda s: bool(s.get("validate_interval_updates")) and without(*_NO_BEST, "save_interval_updates")(s),
    ),
    rule(
        NOTED,
        "save_interval",
        TRAINING,
        "checkpoint_best.pt is the best of those models that are saved, and a better one in between is lost; pass "
        "--validate-interval with the same number",
        lambda s: without(*_NO_BEST)(s) and int(s.get("validate_interval") or 1) % int(s.get("save_interval") or 1) > 0,
    ),
    rule(
        NOTED,
        "validate_after_updates",
        TRAINING,
        "before it, --save-interval-updates saves nothing either; a run that is killed loses what came after the last "
        "epoch",
        with_all("save_interval_updates"),
    ),
    rule(
        IGNORED,
        "patience best_checkpoint_metric maximize_best_checkpoint_metric keep_best_checkpoints max_valid_steps "
        "fixed_validation_seed",
        TRAINING,
        "with --disable-validation",
        with_all("disable_validation"),
    ),
    rule(
        REFUSED,
        "store_ema",
        TRAINING,
        "with --fp16 and --bf16 averages are rounded too, and with an --ema-decay near 1 they stand still; pass "
        "--ema-fp32 as well",
        lambda s: any(s.get(name) for name in _HALF) and not s.get("ema_fp32"),
    ),
    rule(
        IGNORED,
        "ema_decay ema_start_update ema_seed_model ema_update_freq ema_fp32",
        TRAINING,
        "without --store-ema",
        without("store_ema"),
    ),
    rule(
        IGNORED,
        "keep_interval_updates keep_interval_updates_pattern",
        TRAINING,
        "without --save-interval-updates",
        without("save_interval_updates"),
    ),
    rule(
        IGNORED,
        "debug_param_names",
        TRAINING,
        "without --fp16-no-flatten-grads",
        without("fp16_no_flatten_grads"),
    ),
    rule(
        REFUSED,
        "write_checkpoints_asynchronously",
        TRAINING,
        "it writes neither checkpoint_last.pt, from which a run resumes, nor checksums; leave it out. The log has "
        "the time that writing takes",
    ),
    rule(
        REFUSED,
        "checkpoint_shard_count",
        (*TRAINING, *GENERATION),
        "checkpoints of these models are whole; leave it out",
    ),
    rule(IGNORED, "reset_logging suppress_crashes", (TRAIN, *EVALUATION), "it is for fairseq-hydra-train"),
    rule(
        IGNORED,
        "scoring",
        (*TRAINING, EVAL_LM, VALIDATE, INTERACTIVE),
        "these commands compare no texts",
    ),
    rule(IGNORED, "pad eos unk", COMMANDS, "the dictionary of the data has these symbols"),
]


@cache
def all_rules() -> Tuple[Rule, ...]:
    """Return the rules of all commands."""
    return (*_RULES, *EVALUATION_RULES, *of_memories(), *of_generation())


def rules_for(command: str) -> Dict[str, List[Rule]]:
    """Return the rules of a command, by option."""
    rules: Dict[str, List[Rule]] = {}
    for one in all_rules():
        if command in one.commands:
            for option in one.options:
                rules.setdefault(option, []).append(one)
    return rules
