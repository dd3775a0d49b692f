"""Options of evaluation and generation that do not apply to streams, and why: a part of `option_table.py`."""

from typing import Iterator

from . import generation_options
from .option_rules import (
    EVAL_LM,
    EVALUATION,
    GENERATION,
    IGNORED,
    INTERACTIVE,
    REFUSED,
    TRAINING,
    VALIDATE,
    Rule,
    is_one,
    is_other,
    rule,
)

_FOR_TRAINING = "it is for training"

EVALUATION_RULES = (
    rule(
        IGNORED,
        "fp16_no_flatten_grads fp16_init_scale fp16_scale_window fp16_scale_tolerance on_cpu_convert_precision "
        "min_loss_scale threshold_loss_scale amp_batch_retries amp_init_scale amp_scale_window empty_cache_freq "
        "profile aim_repo aim_run_hash tensorboard_logdir wandb_project azureml_logging log_file train_subset "
        "ignore_unused_valid_subsets validate_interval validate_interval_updates validate_after_updates "
        "fixed_validation_seed disable_validation max_valid_steps ddp_comm_hook bucket_cap_mb find_unused_parameters "
        "gradient_as_bucket_view heartbeat_timeout broadcast_buffers criterion optimizer lr_scheduler force_anneal "
        "lr_shrink warmup_updates roll",
        EVALUATION,
        _FOR_TRAINING,
    ),
    rule(IGNORED, "combine_valid_subsets", (EVAL_LM, *GENERATION), _FOR_TRAINING),
    rule(
        IGNORED,
        "save_dir restore_file continue_once finetune_from_model reset_dataloader reset_lr_scheduler reset_meters "
        "reset_optimizer optimizer_overrides save_interval save_interval_updates keep_interval_updates "
        "keep_interval_updates_pattern keep_last_epochs keep_best_checkpoints no_save no_epoch_checkpoints "
        "no_last_checkpoints no_save_optimizer_state best_checkpoint_metric maximize_best_checkpoint_metric patience "
        "load_checkpoint_on_all_dp_ranks write_checkpoints_asynchronously",
        GENERATION,
        f"{_FOR_TRAINING}; the checkpoint to read is --path",
    ),
    rule(
        REFUSED,
        "sampling",
        GENERATION,
        "fairseq prints every text that it draws, --beam of them for a prompt: pass --beam 1, or as many --nbest as "
        "--beam",
        lambda s: s.get("beam") != s.get("nbest"),
    ),
    rule(
        REFUSED,
        "batch_size",
        (INTERACTIVE,),
        "a batch has at most the --buffer-size lines that are read at a time: pass as large a --buffer-size too",
        lambda s: (s.get("batch_size") or 0) > max(1, s.get("buffer_size") or 1),
    ),
    rule(
        REFUSED,
        "documents document_separator score_separators at_document",
        GENERATION,
        "every prompt is read from an empty memory anyway; leave it out",
    ),
    rule(
        IGNORED,
        "document_separator score_separators",
        (*TRAINING, EVAL_LM),
        "without --documents separator",
        is_other("documents", "separator"),
    ),
    rule(IGNORED, "at_document", (*TRAINING, EVAL_LM), "without --documents", is_one("documents", "none")),
    rule(
        IGNORED, "quiet results_path", (EVAL_LM, VALIDATE, INTERACTIVE), "what is printed can be redirected to a file"
    ),
    rule(IGNORED, "post_process tokenizer bpe", (VALIDATE,), "the loss is that of the binarized tokens"),
    rule(IGNORED, "no_progress_bar log_interval log_format", (INTERACTIVE,), "this command shows no progress"),
)


def of_generation() -> Iterator[Rule]:
    """Yield the rules on options that choose words."""
    for effect, reasons, joined in (
        (REFUSED, generation_options.REFUSED, " "),
        (IGNORED, generation_options.WITHOUT_EFFECT, None),
    ):
        for reason in dict.fromkeys(reasons.values()):
            options = " ".join(name for name, why in reasons.items() if why == reason)
            yield rule(effect, options, GENERATION, reason, joined=joined)
    yield rule(IGNORED, "no_seed_provided", GENERATION, "fairseq sets it where --seed is not given")
    yield rule(IGNORED, "prefix_size", (INTERACTIVE,), "a prompt is its own prefix")
