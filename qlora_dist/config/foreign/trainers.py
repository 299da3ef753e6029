"""Whose config it is, and what that trainer takes for keys that are absent, where this package takes something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...errors import UserError

NAMES = {"axolotl": "Axolotl", "llama-factory": "LLaMA-Factory", "trl": "TRL", "torchtune": "torchtune"}

# keys that configs of only one of them have
_SIGNS = {
    "axolotl": {
        "base_model", "micro_batch_size", "sequence_len", "adapter", "num_epochs", "sample_packing", "val_set_size",
        "dataset_prepared_path", "lora_target_linear", "pad_to_sequence_len", "train_on_inputs", "flash_attention",
        "special_tokens", "tokenizer_type", "wandb_project", "evals_per_epoch", "saves_per_epoch", "test_datasets",
        "lora_model_dir", "bnb_config_kwargs", "eval_sample_packing", "excess_length_strategy", "chat_template",
    },
    "llama-factory": {
        "stage", "do_train", "finetuning_type", "lora_target", "lora_rank", "template", "cutoff_len", "dataset",
        "dataset_dir", "quantization_bit", "plot_loss", "val_size", "overwrite_cache", "max_samples", "flash_attn",
        "preprocessing_num_workers", "double_quantization", "quantization_type", "mask_history", "train_on_prompt",
        "additional_target", "disable_gradient_checkpointing", "eval_dataset", "pure_bf16", "quantization_method",
    },
    "trl": {
        "dataset_name", "max_length", "max_seq_length", "use_peft", "attn_implementation", "lora_target_modules",
        "dataset_config", "dataset_train_split", "dataset_test_split", "dataset_num_proc", "assistant_only_loss",
        "completion_only_loss", "packing_strategy", "padding_free", "torch_dtype", "dtype", "use_bnb_nested_quant",
        "dataset_text_field", "dataset_streaming", "model_init_kwargs", "eos_token", "chat_template_path", "lora_r",
        "lora_task_type", "dataset_mixture",
    },
}  # fmt: skip

_HUGGING_FACE = {
    "lr_scheduler_type": "linear", "optim": "adamw_torch_fused", "max_grad_norm": 1.0, "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "save_steps": 500,
}  # fmt: skip
Default = Any | Callable[[Mapping[str, Any]], Any]
DEFAULTS: dict[str, dict[str, Default]] = {
    "axolotl": {
        "load_in_4bit": False, "adapter": "none", "lr_scheduler": "cosine", "optimizer": "adamw_torch_fused",
        "max_grad_norm": 1.0, "num_epochs": 1, "micro_batch_size": 1, "gradient_accumulation_steps": 1,
        "sample_packing": False, "warmup_ratio": 0.03, "excess_length_strategy": "drop", "sequence_len": 512,
        "lora_target_modules": lambda fields: "auto" if fields.get("adapter") else None,
    },
    "llama-factory": {
        **_HUGGING_FACE, "quantization_bit": "none", "learning_rate": 5e-5, "lora_rank": 8, "lora_target": "all",
        "lora_alpha": lambda fields: 2 * fields.get("lora_rank", 8), "cutoff_len": 2048,
        "packing": lambda fields: fields.get("stage") == "pt",
    },
    "trl": {
        **_HUGGING_FACE, "load_in_4bit": False, "use_peft": False, "learning_rate": 2e-5, "lora_r": 16,
        "lora_alpha": 32, "lora_dropout": 0.05, "max_length": 1024, "packing": False, "use_bnb_nested_quant": False,
        "dataset_test_split": lambda fields: "test" if fields.get("eval_strategy") in ("steps", "epoch") else None,
        "assistant_only_loss": False, "lora_target_modules": lambda fields: "auto" if fields.get("use_peft") else None,
    },
    "torchtune": {
        "lr_scheduler": "constant", "clip_grad_norm": 0.0, "dataset.packed": False,
        "gradient_accumulation_steps": 1, "optimizer.weight_decay": 0.01,
    },
}  # fmt: skip
# A default that only these keys, when they are given, leave without an effect
REPLACED = {
    "load_in_4bit": ("load_in_8bit",),
    "lora_target_modules": ("lora_target_linear",),
    "warmup_ratio": ("warmup_steps",),
    "save_steps": ("saves_per_epoch",),
    "packing": ("neat_packing",),
    "max_length": ("max_seq_length",),
    "assistant_only_loss": ("completion_only_loss",),
    "lr_scheduler": ("lr_scheduler._component_",),
}


def detect(raw: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> str:
    """The trainer whose config this is. `keys`: the same, flat. Raises UserError if it cannot be told."""
    if isinstance(raw.get("model"), dict) and "run_dir" in raw:
        raise UserError(f"{where}: this is a config of qlora-dist already (it has run_dir and a section model)")
    if any(key.endswith("._component_") for key in keys):
        return "torchtune"
    found = {trainer: len(signs & set(raw)) for trainer, signs in _SIGNS.items()}
    best = max(found, key=lambda trainer: found[trainer])
    if found[best] == 0 or list(found.values()).count(found[best]) > 1:
        raise UserError(
            f"{where}: its keys do not tell which trainer it is from ({', '.join(map(str, list(raw)[:8])) or 'none'}); "
            f"expected a training config of {', '.join(NAMES.values())}; say which with --from {'|'.join(NAMES)}"
        )
    return best
