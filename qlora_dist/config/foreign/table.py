"""Keys of other trainers -> what they mean here.

In an error message they are answered with the key that does that here; `qlora-dist import` sets it. Never in silence:
some mean something else here (a batch size per device).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import UserError
from . import rules
from .answers import Answer, Given, Rule, lost, one_of, same, switch
from .left_out import LEFT_OUT
from .sources import SOURCES

_ALL = Answer({"data.learn": "all"})
_ANSWERS_ONLY = Answer(text="data.learn is assistant by default")
_LIKE_LORA = Answer(text="lora.variant is lora by default")

ANSWERS: dict[str, Rule] = {
    **LEFT_OUT,
    **SOURCES,
    # batch, length, schedule
    **dict.fromkeys(("tokenizer.max_seq_len", *rules.ROW_TOKENS), same("data.row_tokens")),
    **dict.fromkeys((*rules.PER_DEVICE, *rules.ACCUMULATION), rules.rows),
    "batch_size": rules.batch_size,
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs"), rules.epochs),
    **dict.fromkeys(("max_steps", "max_train_steps"), rules.max_steps),
    **dict.fromkeys(("learning_rate", "optimizer.lr"), same("optim.lr")),
    **dict.fromkeys(("weight_decay", "optimizer.weight_decay"), same("optim.weight_decay")),
    **dict.fromkeys(("adam_epsilon", "optimizer.eps"), same("optim.eps")),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), rules.betas),
    "optimizer.betas": same("optim.betas"),
    **dict.fromkeys(
        ("max_grad_norm", "clip_grad_norm"), lambda value, _: Answer({"optim.max_grad_norm": value or None})
    ),
    **dict.fromkeys(("optimizer", "optim", "optimizer._component_"), one_of("optim.name", rules.OPTIMIZERS)),
    **dict.fromkeys(rules.SCHEDULE_KEYS, one_of("optim.schedule", rules.SCHEDULES)),
    **dict.fromkeys(("cosine_min_lr_ratio", "lr_scheduler_kwargs.min_lr_rate"), same("optim.min_lr_ratio")),
    "lr_scheduler_kwargs.min_lr": rules.min_lr,
    "warmup_ratio": rules.warmup,
    "warmup_steps": rules.warmup_steps,
    "lr_scheduler.num_warmup_steps": same("optim.warmup_steps"),
    "eval_steps": rules.every("train.eval_every", ("eval_strategy", "evaluation_strategy")),
    "save_steps": rules.every("train.save_every", ("save_strategy",)),
    "evals_per_epoch": rules.per_epoch("train.eval_every"),
    "saves_per_epoch": rules.per_epoch("train.save_every"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), rules.eval_strategy),
    "save_strategy": rules.strategy("train.save_every", "save_steps"),
    "save_total_limit": lambda value, _: (
        Answer({"train.keep": value}) if value else Answer(text="the newest three are kept (train.keep)")
    ),
    "eval_on_start": same("train.eval_at_start"),
    # model, adapters
    **dict.fromkeys(
        (
            "model_name_or_path",
            "base_model",
            "model_name",
            "model_id",
            "pretrained_model_name_or_path",
            "checkpointer.checkpoint_dir",
        ),
        same("model.name"),
    ),
    **dict.fromkeys(("model_revision", "revision_of_model"), same("model.revision")),
    "load_in_4bit": rules.bits(4),
    "load_in_8bit": rules.bits(8),
    "quantization_bit": rules.quantization_bit,
    **dict.fromkeys(
        ("bnb_4bit_quant_type", "quantization_type", "bnb_config_kwargs.bnb_4bit_quant_type"), rules.quant_type
    ),
    **dict.fromkeys(
        (
            "bnb_4bit_use_double_quant",
            "double_quantization",
            "use_bnb_nested_quant",
            "bnb_config_kwargs.bnb_4bit_use_double_quant",
        ),
        rules.double,
    ),
    "model._component_": rules.builder,
    "model.quantize_base": lambda value, _: Answer({"model.quantization": "nf4" if value is True else "none"}),
    **dict.fromkeys(
        ("bnb_4bit_compute_dtype", "torch_dtype", "dtype", "model_init_kwargs.torch_dtype", "model_init_kwargs.dtype"),
        rules.dtype,
    ),
    **dict.fromkeys(("bf16", "bfloat16"), rules.bf16),
    "flash_attention": switch(Answer(text=rules.FLASH), Answer({"model.attention": "sdpa"})),
    "sdp_attention": switch(Answer({"model.attention": "sdpa"}), Answer(text=rules.FLASH)),
    **dict.fromkeys(("attn_implementation", "flash_attn", "model_init_kwargs.attn_implementation"), rules.attention),
    **dict.fromkeys(("tokenizer_config", "tokenizer_name_or_path"), rules.tokenizer),
    **dict.fromkeys(("adapter", "finetuning_type"), rules.adapter),
    "use_peft": switch(Answer(text=rules.LORA), rules.FULL),
    **dict.fromkeys(("lora_r", "lora_rank", "r", "model.lora_rank"), same("lora.rank")),
    **dict.fromkeys(("lora_alpha", "model.lora_alpha"), same("lora.alpha")),
    **dict.fromkeys(("lora_dropout", "model.lora_dropout"), same("lora.dropout")),
    **dict.fromkeys(("lora_target", "lora_target_modules"), rules.targets),
    "lora_target_parameters": rules.parameters,
    "lora_target_linear": switch(
        Answer({"lora.target_modules": "all-linear"}), lost("set lora.target_modules to a list of names")
    ),
    **dict.fromkeys(("model.lora_attn_modules", "model.apply_lora_to_mlp"), rules.torchtune_targets),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), switch(Answer({"lora.variant": "rslora"}), _LIKE_LORA)),
    **dict.fromkeys(
        ("use_dora", "peft_use_dora", "model.use_dora"), switch(Answer({"lora.variant": "dora"}), _LIKE_LORA)
    ),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), same("lora.init_from")),
    **dict.fromkeys(("output_dir", "checkpointer.output_dir"), same("run_dir")),
    # data
    **dict.fromkeys(("val_size", "val_set_size", "test_split_size"), rules.held_out),
    **dict.fromkeys(("sample_packing", "packing", "neat_packing", "dataset.packed"), same("data.packing")),
    "excess_length_strategy": one_of("data.on_long", {"drop": "drop", "truncate": "truncate", "raise": "error"}),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt", "dataset.train_on_input"), switch(_ALL, _ANSWERS_ONLY)),
    "mask_history": switch(Answer({"data.learn": "last"}), Answer(text="data.learn is assistant: every answer")),
    "completion_only_loss": switch(_ANSWERS_ONLY, _ALL),
    "assistant_only_loss": switch(
        _ANSWERS_ONLY,
        lost(
            "TRL then learns every token of `messages`, but the completion alone of `prompt` and `completion`; here "
            "only answers are learned. For every token: data.learn=all"
        ),
    ),
    **dict.fromkeys(("chat_template", "template"), rules.template),
    **dict.fromkeys(("chat_template_jinja", "chat_template_path"), rules.template_file),
    **dict.fromkeys(("preprocessing_num_workers", "dataset_num_proc", "dataset_processes"), rules.cpu_work),
    **dict.fromkeys(("dataset_prepared_path", "tokenized_path"), same("data.cache_dir")),
    # memory, strategy, trackers
    **dict.fromkeys(("gradient_checkpointing", "enable_activation_checkpointing"), rules.checkpointing),
    "disable_gradient_checkpointing": lambda value, _: Answer(
        {"memory.recompute": "none" if value is True else "full"}
    ),
    **dict.fromkeys(("activation_offloading", "enable_activation_offloading"), rules.offload),
    "deepspeed": rules.deepspeed,
    "fsdp": rules.fsdp,
    **dict.fromkeys(("fsdp_config", "fsdp_version"), lambda value, _: Answer({"strategy.name": "fsdp"})),
    **dict.fromkeys(
        ("fsdp_config.offload_params", "fsdp_config.fsdp_offload_params", "fsdp_cpu_offload"), rules.fsdp_offload
    ),
    **dict.fromkeys(
        ("fsdp_config.activation_checkpointing", "fsdp_config.fsdp_activation_checkpointing"), rules.checkpointing
    ),
    "ddp_timeout": rules.timeout,
    **dict.fromkeys(("report_to", *rules.USES), rules.trackers),
    **dict.fromkeys((*rules.PROJECTS, "project"), rules.project),
    "seed": same("seed"),
    "device": lambda value, _: Answer({"device": str(value).split(":")[0]}),
}


def lookup(key: str, value: Any, given: Given) -> Answer | None:
    """What a key, by its dotted name, means here; None for a name that is not known."""
    rule = ANSWERS.get(key.lower()) or ANSWERS.get(f"{key.lower().partition('.')[0]}.*")
    return None if rule is None else rule(value, given)


def answer(key: str, value: Any, fields: Mapping[str, Any]) -> str | None:
    """For an error message: what to set here instead of another trainer's `key`, with the value if that can be
    computed; None for a name that is not known. `fields`: everything that was given, see `given_fields`."""
    try:
        found = lookup(key, value, Given(fields))
    except UserError as error:  # of a file that the value names
        return str(error)
    return None if found is None else found.sentence()


def given_fields(raw: Any) -> dict[str, Any]:
    """The leaves of plain data by the last part of their names."""
    fields: dict[str, Any] = {}
    if isinstance(raw, dict):
        for key, value in raw.items():
            fields |= given_fields(value) if isinstance(value, dict) else {str(key): value}
    return fields
