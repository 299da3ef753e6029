"""Keys of other trainers for which nothing is set here: they are not needed, or nothing means them."""

from __future__ import annotations

import re
from typing import Any

from .answers import Answer, Given, Rule, default, lost, never

# what is already so -> keys
_NOT_NEEDED = {
    "every step is in metrics.jsonl": (
        "logging_steps", "log_every_n_steps", "logging_first_step", "logging_strategy", "plot_loss", "debug",
        "include_num_input_tokens_seen", "include_tokens_per_second", "include_tkps", "log_peak_memory_stats",
        "include_effective_tokens_per_second", "metric_logger.*", "log_level", "disable_tqdm", "logging_dir",
    ),
    "a run resumes by itself; --resume DIR chooses a checkpoint": (
        "resume_from_checkpoint", "auto_resume_from_checkpoints", "ignore_data_skip", "checkpointer.recipe_checkpoint",
    ),
    "`train --fresh` sets an old run aside": ("overwrite_output_dir",),
    "`train` trains; `evaluate` and `generate` are commands of their own": (
        "do_train", "do_eval", "do_predict", "predict_with_generate", "infer_backend", "infer_dtype", "use_kv_cache",
        "use_cache",
    ),
    "the family is read from the model's config.json": (
        "model_type", "tokenizer_type", "is_llama_derived_model", "is_mistral_derived_model",
        "is_falcon_derived_model", "is_qwen_derived_model", "type_of_model", "cls_model_config", "lora_task_type",
        "tokenizer_use_fast", "use_fast_tokenizer", "tokenizer_legacy", "checkpointer._component_",
        "checkpointer.checkpoint_files", "checkpointer.model_type", "tokenizer._component_", "tokenizer.path",
        "tokenizer.merges_file", "checkpointer.safe_serialization",
    ),
    "rows are packed, and shared out by cost; documents in a row do not see each other, and nothing is padded for it": (
        "group_by_length", "train_sampling_strategy", "pad_to_sequence_len", "pad_to_multiple_of",
        "eval_sample_packing", "eval_packing", "padding_free", "packing_strategy", "batch_flattening",
        "multipack_real_batches", "sample_packing_eff_est", "sample_packing_group_size", "sample_packing_bin_size",
        "sample_packing_sequentially", "total_num_tokens", "block_diag_attn", "ignore_pad_token_for_loss",
        "remove_unused_columns", "label_names", "length_column_name",
    ),
    "no padding token is needed, as none is learned or attended to": ("special_tokens.pad_token", "pad_token"),
    "the order of rows is a function of the seed, shuffled in every epoch": (
        "shuffle", "shuffle_dataset", "shuffle_merged_datasets", "shuffle_before_merging_datasets", "data_seed",
        "dataloader_drop_last", "buffer_size",
    ),
    "records are read and tokenized once, and kept in data.cache_dir": (
        "overwrite_cache", "dataset_keep_in_memory", "preprocessing_batch_size", "data_shared_file_system",
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "skip_prepare_dataset",
        "dataloader_persistent_workers", "num_dataset_shards_to_save", "preprocess_iterable",
    ),
    "evaluation takes batch.micro_rows rows at a time; its loss does not depend on that": (
        "per_device_eval_batch_size", "eval_batch_size", "eval_accumulation_steps", "eval_table_size",
        "prediction_loss_only", "do_causal_lm_eval", "eval_max_new_tokens",
    ),
    "checkpointing is non-reentrant": (
        "gradient_checkpointing_kwargs.*", "activation_checkpointing_kwargs.*", "use_reentrant_gc",
    ),
    "every token of a step has the same weight, on all ranks": ("average_tokens_across_devices",),
    "the kernels of this package are used where they fit (model.kernels)": (
        "use_liger_kernel", "enable_liger_kernel", "liger_rope", "liger_rms_norm", "liger_glu_activation",
        "liger_layer_norm", "liger_fused_linear_cross_entropy", "liger_cross_entropy", "liger_use_token_scaling",
        "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "flash_attn_cross_entropy", "flash_attn_rms_norm",
        "flash_attn_fuse_mlp", "xformers_attention", "use_unsloth", "use_unsloth_gc", "chunked_cross_entropy",
        "chunked_cross_entropy_num_chunks", "tiled_mlp", "use_v1_kernels", "optimizer.fused", "cut_cross_entropy",
        "use_kernels",
    ),
    "adapters are kept in float32, the base in model.quantization, and tf32 is torch's own setting": (
        "tf32", "upcast_layernorm", "bnb_4bit_quant_storage", "bnb_config_kwargs.bnb_4bit_quant_storage",
        "fp32_norms", "upcast_lmhead_output",
    ),
    "strategy fsdp shards layer by layer, and saves the same files as any other strategy": tuple(
        f"fsdp_config.{prefix}{name}"
        for name in (
            "transformer_layer_cls_to_wrap", "auto_wrap_policy", "state_dict_type", "final_state_dict_type",
            "cpu_ram_efficient_loading", "sync_module_states", "use_orig_params", "limit_all_gathers", "version",
            "reshard_after_forward", "sharding_strategy", "backward_prefetch", "forward_prefetch", "min_num_params",
            "cpu_offload_pin_memory",
        )
        for prefix in ("", "fsdp_")
    ),
    "adapters' gradients are reduced in one buffer": (
        "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend",
    ),
    "each rank reads the base piece by piece onto its own device; `train --ranks N` or a launcher starts the ranks": (
        "low_cpu_mem_usage", "low_cpu_ram", "qlora_sharded_model_loading", "local_rank", "world_size", "device_map",
        "lora_on_cpu",
    ),
    "memory is planned before the start, and not freed in between": (
        "gc_steps", "torch_empty_cache_steps", "gc_collect_steps",
    ),
    "the names in `dataset` were looked up in its dataset_info.json": ("dataset_dir",),
    "files are safetensors, and each is checked when it is saved": (
        "save_safetensors", "save_only_model", "save_adapter_weights_only", "save_on_each_node",
    ),
    "tokens and secrets are read from the environment (hf auth login)": (
        "hf_use_auth_token", "hf_hub_token", "hub_token", "use_auth_token",
    ),
    "the file format is seen from its name": ("ds_type",),
    "no profile is taken": ("profiler.*",),
    "a key that does not exist is always an error": ("strict",),
}  # fmt: skip

# why not -> keys; with `false` nothing is lost
_NOT_HERE = {
    "code that comes with a model or a data set is never executed": ("trust_remote_code",),
    "embeddings, norms and the head stay frozen; only adapters are trained": (
        "lora_modules_to_save", "additional_target", "embedding_lr", "embedding_lr_scale", "unfrozen_parameters",
        "model.apply_lora_to_output", "peft_trainable_token_indices", "freeze_trainable_layers",
        "freeze_trainable_modules", "freeze_extra_modules", "fix_untrained_tokens",
    ),
    "no tokens are added and none change their role: the vocabulary is the model's": (
        "tokens", "special_tokens.*", "added_tokens_overrides.*", "add_tokens", "add_special_tokens",
        "resize_vocab", "new_special_tokens_config", "eot_tokens",
        "resize_token_embeddings_to_32x", "eos_token",
        "bos_token", "unk_token", "additional_special_tokens", "split_special_tokens",
    ),
    "one rank and one alpha hold for all adapted layers": (
        "lora_rank_pattern", "lora_alpha_pattern", "peft_layers_to_transform", "peft_layers_pattern",
        "peft_layer_replication",
    ),
    "adapters start as PEFT's default does, or from lora.init_from": (
        "pissa_init", "pissa_iter", "pissa_convert", "loftq_config.*", "peft_init_lora_weights", "create_new_adapter",
        "peft.*",
    ),
    "all adapters have one learning rate": (
        "loraplus_lr_ratio", "loraplus_lr_embedding", "lr_groups", "optim_target_modules",
    ),
    "not an optimizer of this package (adamw in 32 or 8 bits, paged or not)": (
        "optim_args", "use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon", "optimizer_in_bwd",
        "adam_beta3", "adam_epsilon2", "relora", "lisa_n_layers",
    ),
    "no noise is added, and labels are not smoothed": (
        "neftune_noise_alpha", "noisy_embedding_alpha", "label_smoothing_factor", "use_dft_loss", "use_eaft_loss",
        "use_asft_loss", "use_eaft",
    ),
    "the model is used as its config.json says": (
        "rope_scaling", "shift_attn", "s2_attention", "mixture_of_depths", "overrides_of_model_config.*",
        "overrides_of_model_kwargs.*", "rope_scaling.*",
        "moe_aux_loss_coef", "router_aux_loss_coef", "train_from_scratch", "reinit_weights", "use_pose",
    ),
    "nothing is compiled": ("torch_compile", "compile", "torch_compile_backend", "torch_compile_mode", "deepcompile"),
    "float8 is not offered": ("fp8", "fp8_config.*", "fp8_backend", "qat", "quantization"),
    "gradients underflow in float16; model.compute_dtype is bfloat16 by default": ("fp16", "float16"),
    "adapters and their optimizer states stay in float32": ("pure_bf16",),
    "a run ends after train.steps or train.epochs, and keeps the newest checkpoints": (
        "early_stopping_patience", "early_stopping_steps", "load_best_model_at_end", "metric_for_best_model",
        "greater_is_better", "loss_watchdog_threshold", "loss_watchdog_patience", "max_steps_per_epoch",
    ),
    "the batch size is not changed by the hardware: batch.micro_rows auto takes what fits, with the same result": (
        "auto_find_batch_size",
    ),
    "nothing is uploaded: the adapter is in run_dir/adapter": (
        "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "push_dataset_to_hub", "hub_revision",
        "hf_mlflow_log_artifacts",
    ),
    "trackers read it from the environment (WANDB_ENTITY, WANDB_NAME, MLFLOW_TRACKING_URI, ...)": (
        "wandb_entity", "wandb_name", "wandb_run_id", "wandb_watch", "wandb_log_model", "wandb_mode", "run_name",
        "mlflow_tracking_uri", "mlflow_run_name", "comet_workspace", "comet_api_key", "swanlab_project",
        "swanlab_run_name", "trackio_space_id", "trackio_run_name", "swanlab_mode",
    ),
    "data are read whole; `streaming: true` in a hub source reads it record by record": (
        "streaming", "pretraining_dataset", "interleave_probs", "max_prompt_len", "min_sample_len",
    ),
    "documents that are alike are counted and shown by `qlora-dist data`, not removed": (
        "dataset_exact_deduplication",
    ),
    "write the system prompt into the records": (
        "default_system", "default_system_message", "tokenizer.prompt_template",
    ),
    "what the template is told cannot be set": (
        "chat_template_kwargs.*", "enable_thinking", "tool_format", "preserve_thinking",
    ),
    "images, audio and video cannot be learned from": (
        "image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "media_dir", "processor_type",
        "freeze_vision_tower", "freeze_multi_modal_projector", "image_size",
    ),
    "no profile is taken": ("profiler_steps", "enable_torch_profiler"),
    "an epoch always has the whole data": ("dataset_shard_num", "dataset_shard_idx"),
    "preferences are not learned from": ("pref_beta", "pref_loss", "pref_ftx", "dpo_beta", "rl_beta", "ref_model"),
}  # fmt: skip


def _only(value: Any, allowed: tuple[Any, ...], text: str, reason: str) -> Answer:
    return Answer(text=text) if value in allowed else lost(reason)


def _plugins(value: Any, _: Given) -> Answer:
    names = value if isinstance(value, list) else [value]
    other = [str(name) for name in names if not re.search("liger|cut_cross_entropy|CutCrossEntropy", str(name))]
    if other:
        return lost(f"plugins of Axolotl cannot run here: {', '.join(other[:5])}")
    return Answer(text="the kernels of this package are used where they fit (model.kernels)")


def _loss(value: Any, _: Given) -> Answer:
    if re.search("nll|CEWith|CrossEntropy|cross_entropy", str(value)):
        return Answer(text="the loss is the negative log likelihood of the labels")
    return lost("the loss is the negative log likelihood of the labels, and no other")


def _split(value: Any, _: Given) -> Answer:
    return _only(
        value, (False, 1), "nothing is split",
        "sequences, tensors and layers are not split over GPUs; strategy fsdp shards the base, and "
        "memory.offload_activations makes room for longer rows",
    )  # fmt: skip


def _stage(value: Any, _: Given) -> Answer:
    return _only(
        value, ("sft", "pt"), "supervised fine-tuning, and texts of format text, are what is done here",
        "only supervised fine-tuning and training on texts are done here, no preferences and no rewards",
    )  # fmt: skip


LEFT_OUT: dict[str, Rule] = {
    **{key: default(text) for text, keys in _NOT_NEEDED.items() for key in keys},
    **{key: never(text) for text, keys in _NOT_HERE.items() for key in keys},
    **dict.fromkeys(
        ("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size", "dp_shard_size",
         "dp_replicate_size"),
        _split,
    ),
    **dict.fromkeys(("loss_type", "loss._component_"), _loss),
    "loss.*": _loss,
    "stage": _stage,
    "rl": lambda value, _: _stage("sft" if value is False else value, _),
    "plugins": _plugins,
    "quantization_method": lambda value, _: _only(
        str(value).lower(), ("bnb", "bitsandbytes"), "bitsandbytes quantizes here, too",
        "the base is quantized by bitsandbytes: nf4, fp4 or int8",
    ),
    "truncation_mode": lambda value, _: _only(
        value, ("keep_start",), "data.on_long is truncate by default: the end is cut off",
        "data.on_long truncate cuts off the end, not the start",
    ),
    "mix_strategy": lambda value, _: _only(
        value, ("concat",), "sources are joined, in order",
        "sources are joined; set `weight` in a source of data.train",
    ),
    "export_dir": lambda value, _: lost("`qlora-dist merge RUN OUT` writes the merged model"),
}  # fmt: skip
