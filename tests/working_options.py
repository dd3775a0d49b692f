"""Options that work, by command, and the test that would notice if one did not."""

from collections import defaultdict
from typing import DefaultDict, Dict, List

from lamemo_fairseq.host.option_rules import (
    COMMANDS,
    EVAL_LM,
    GENERATE,
    GENERATION,
    HYDRA,
    INTERACTIVE,
    TRAIN,
    VALIDATE,
)

FAIRSEQS_OWN = "what fairseq does by itself, whatever a batch holds"

WORKING: Dict[str, DefaultDict[str, List[str]]] = {c: defaultdict(list) for c in COMMANDS if c != HYDRA}


def _work(commands, file, options):
    for command in commands:
        WORKING[command][file] += options.split()


_ALL = tuple(WORKING)
_SPLITS = (EVAL_LM, VALIDATE, GENERATE)

# Every command
_work(_ALL, FAIRSEQS_OWN, "help user_dir distributed_num_procs distributed_backend distributed_rank")
_work(_ALL, "helpers.py", "task cpu distributed_world_size")
_work(_ALL, "test_launch.py", "distributed_init_method distributed_port device_id distributed_no_spawn")
_work(_ALL, "test_bad_input.py", "data tokens_per_sample batch_size max_tokens ddp_backend")
_work(_ALL, "test_resume.py", "seed")
_work([TRAIN, *_SPLITS], FAIRSEQS_OWN, "no_progress_bar log_format")
_work([TRAIN, *_SPLITS], "test_commands.py", "log_interval num_workers data_buffer_size")
_work([TRAIN, *_SPLITS], "test_fuzz.py", "dataset_impl")

# Training
_work(
    [TRAIN],
    FAIRSEQS_OWN,
    "log_file aim_repo aim_run_hash tensorboard_logdir wandb_project azureml_logging empty_cache_freq profile "
    "ddp_comm_hook bucket_cap_mb find_unused_parameters gradient_as_bucket_view heartbeat_timeout broadcast_buffers "
    "fp16_no_flatten_grads fp16_scale_tolerance min_loss_scale threshold_loss_scale debug_param_names stop_time_hours "
    "memory_efficient_bf16 ema_seed_model reset_meters reset_lr_scheduler "
    "load_checkpoint_on_all_dp_ranks adam_betas adam_eps use_old_adam fp16_adam_stats",
)
_work([TRAIN], "test_adam.py", "weight_decay")
_work([TRAIN, EVAL_LM, VALIDATE], "test_documents.py", "documents document_separator score_separators at_document")
_work([TRAIN], "test_ranks.py", "clip_norm update_freq")
_work([TRAIN], "test_precision.py", "bf16 fp16 memory_efficient_fp16 amp amp_batch_retries fp16_init_scale")
_work(
    [TRAIN],
    "test_resume.py",
    "fp16_scale_window train_subset finetune_from_model reset_dataloader save_interval_updates keep_interval_updates "
    "best_checkpoint_metric patience store_ema ema_decay roll warmup_updates validate_interval_updates "
    "no_epoch_checkpoints lr_scheduler optimizer lr",
)
_work([TRAIN], "test_resumed_options.py", "ema_start_update ema_update_freq ema_fp32")
_work([TRAIN], "test_checkpoints.py", "restore_file save_dir")
_work([TRAIN], "test_out_of_order.py", "batch_size_valid valid_subset")
_work([TRAIN], "test_criterions.py", "criterion sentence_avg")
_work([TRAIN], "test_vocabulary.py", "decoder_input_dim decoder_output_dim untie_output")
_work([TRAIN], "test_vocabulary.py", "adaptive_softmax_cutoff adaptive_softmax_factor adaptive_input")
_work([TRAIN], "test_divergence.py", "disable_validation max_update")
_work(
    [TRAIN],
    "test_training_options.py",
    "max_epoch validate_interval validate_after_updates save_interval keep_last_epochs keep_interval_updates_pattern "
    "keep_best_checkpoints no_last_checkpoints no_save maximize_best_checkpoint_metric checkpoint_suffix stop_min_lr "
    "optimizer_overrides reset_optimizer continue_once no_save_optimizer_state combine_valid_subsets force_anneal "
    "ignore_unused_valid_subsets fixed_validation_seed max_tokens_valid lr_shrink bpe tokenizer "
    "preset_tokens_per_sample",
)
_work([TRAIN], "test_presets.py", "memory num_basis_functions memory_tokens")
_work([TRAIN], "test_incremental.py", "mem_len clamp_len same_length decoder_normalize_before")
_work([TRAIN], "test_backends.py", "attention_backend")
_work([TRAIN], "test_commands.py", "arch position_encoding")
_work([TRAIN], "test_diagonal.py", "reading_order")
_work([TRAIN], "test_graphs.py", "cuda_graphs checkpoint_activations decoder_head_dim")
_work([TRAIN], "test_bad_input.py", "decoder_layers decoder_embed_dim decoder_attention_heads decoder_ffn_embed_dim")
_work([TRAIN], "test_dropout.py", "dropout attention_dropout activation_dropout")
_work([TRAIN], "test_convert_refusals.py", "activation_fn")
_work([TRAIN], "test_segatron.py", "lookahead_window")
_work([TRAIN], "test_lookahead_schedule.py", "lookahead_from_layer lookahead_every")
_work([TRAIN], "test_compressive.py", "compression_rate compression compression_loss compression_loss_weight")
_work([TRAIN], "test_compressive.py", "compressed_len")
_work([TRAIN], "test_continuous_memory.py", "basis_widths ridge_penalty contraction_factor memory_samples")
_work([TRAIN], "test_continuous_memory.py", "memory_sampling kl_weight kl_sigma")
_work([TRAIN], "test_token_memory.py", "memory_reads_cache bptt_segments")
_work([TRAIN], "test_infini.py", "memory_update_rule memory_gate_lr_scale")
_work([TRAIN], "test_memorizing.py", "store_len store_layer retrieval retrieved_rows")
_work([TRAIN], "test_sentence_ends.py", "sentence_ends paragraph_ends")
_work([TRAIN], "test_associative.py", "associative_tokens associative_dim associative_decay")
_work([TRAIN], "test_associative.py", "associative_value_lr_scale")
_work([TRAIN], "test_block_recurrent.py", "recurrent_states recurrent_layers recurrent_scale state_gate")

# Evaluation
_work([EVAL_LM, VALIDATE, *GENERATION], "test_commands.py", "path model_overrides")
_work([EVAL_LM, VALIDATE, *GENERATION], "test_generation_commands.py", "fp16")
_work([EVAL_LM, VALIDATE, *GENERATION], "test_resume.py", "memory_efficient_fp16")
_work([EVAL_LM, GENERATE], "test_commands.py", "gen_subset")
_work([VALIDATE], "test_ranks.py", "valid_subset")
_work([EVAL_LM], "test_streams.py", "num_shards shard_id")
_work([EVAL_LM], "test_ranks.py", "output_word_probs")
_work([EVAL_LM], "test_commands.py", "softmax_batch")
_work([EVAL_LM], FAIRSEQS_OWN, "output_word_stats post_process tokenizer bpe")
_work(GENERATION, FAIRSEQS_OWN, "post_process checkpoint_suffix")
_work([VALIDATE, GENERATE], "test_prompt_commands.py", "num_shards shard_id")
_work([GENERATE], FAIRSEQS_OWN, "quiet results_path")
_work([GENERATE], "test_prompt_commands.py", "scoring prefix_size")
_work(
    GENERATION,
    "test_generation_commands.py",
    "beam nbest max_len_a max_len_b min_len unkpen score_reference no_repeat_ngram_size sampling sampling_topk "
    "sampling_topp temperature diverse_beam_groups tokenizer bpe",
)
_work(GENERATION, "test_generation_options.py", "unnormalized lenpen diverse_beam_strength diversity_rate")
_work([INTERACTIVE], "test_commands.py", "buffer_size input")
