"""Keys of other trainers (Axolotl, LLaMA-Factory, TRL, torchtune, Unsloth, PEFT) -> which key does that here.

They are answered by an error, never translated in silence: some mean something else here (a batch size per device).
Names and meanings are those of the trainers' public documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Fields = Mapping[str, Any]  # everything that the user gave, by the last part of its name

_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit", "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_ATTENTION = {"flash_attention_2": "flash", "flash_attention_3": "flash", "fa2": "flash", "sdpa": "sdpa"}

_ROWS = "the batch of one update, over all ranks, is batch.rows_per_step: per device x accumulation x number of devices"


def _same(key: str) -> Callable[[Any, Fields], str]:
    """The same meaning under another name."""
    return lambda value, _: f"set {key}: {_shown(value)}"


def _named(key: str, names: Mapping[str, str]) -> Callable[[Any, Fields], str]:
    def answer(value: Any, _: Fields) -> str:
        name = names.get(str(value).lower())
        return f"set {key}: {name}" if name else f"here it is {key}, one of {', '.join(dict.fromkeys(names.values()))}"

    return answer


def _say(text: str) -> Callable[[Any, Fields], str]:
    return lambda value, _: text


def _switch(on: str, off: str) -> Callable[[Any, Fields], str]:
    return lambda value, _: on if value in (True, "auto") else off


def _rows(value: Any, fields: Fields) -> str:
    """Rows of one update, from what was given per device."""
    per_device = next((fields[name] for name in _PER_DEVICE if name in fields), None)
    accumulation = next((fields[name] for name in _ACCUMULATION if name in fields), 1)
    if type(per_device) is not int or type(accumulation) is not int:
        return f"{_ROWS}; set batch.rows_per_step, and batch.micro_rows for the rows of one forward pass"
    return (
        f"set batch.rows_per_step: {per_device * accumulation} on one device, {per_device * accumulation} x N on N "
        f"({_ROWS}), and batch.micro_rows: {per_device}; accumulation follows from the two"
    )


def _warmup(value: Any, fields: Fields) -> str:
    steps = fields.get("max_steps", fields.get("steps"))
    if isinstance(value, int | float) and type(steps) is int and 0 <= value < 1 and steps > 0:
        return f"set optim.warmup_steps: {round(value * steps)} ({value} of {steps} steps)"
    return "set optim.warmup_steps to that share of the steps"


def _bits(bits: int) -> Callable[[Any, Fields], str]:
    name = "nf4" if bits == 4 else "int8"
    return lambda value, _: (
        f"set model.quantization: {name}"
        if value is True
        else "set model.quantization: none for LoRA on a base that is not quantized (nf4 is the default)"
    )


def _kept(value: Any, fields: Fields) -> str:
    return "set train.keep: 1" if value is None else f"set train.keep: {_shown(value)}"


def _source(value: Any, fields: Fields) -> str:
    return f"set data.train: [{{path: {_shown(value)}}}]" if isinstance(value, str) else "set data.train: [{path: ...}]"


def _held_out(value: Any, fields: Fields) -> str:
    return f"set hold_out: {_shown(value)} in a source of data.train: that part of it is evaluated, not trained on"


def _steps_of(key: str) -> Callable[[Any, Fields], str]:
    def answer(value: Any, fields: Fields) -> str:
        if type(value) is int and value > 0:
            return f"set {key}: {value}"
        return f"set {key} to a number of steps"

    return answer


def _max_steps(value: Any, fields: Fields) -> str:
    return "leave it out, and set train.epochs" if value == -1 else f"set train.steps: {_shown(value)}"


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


_PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size", "per_device_batch_size", "batch_size")
_ACCUMULATION = ("gradient_accumulation_steps", "grad_accum", "gradient_accumulation")
_ROW_TOKENS = ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "max_length", "model_max_length")
_FREE_PRECISION = "leave it out: model.compute_dtype is bfloat16 by default (float32 where a device has none)"

ANSWERS: dict[str, Callable[[Any, Fields], str]] = {
    **dict.fromkeys(_ROW_TOKENS, _same("data.row_tokens")),
    **dict.fromkeys((*_PER_DEVICE, *_ACCUMULATION), _rows),
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "model_name", "model_id", "pretrained_model_name_or_path"),
        _same("model.name"),
    ),
    "learning_rate": _same("optim.lr"),
    "num_train_epochs": _same("train.epochs"),
    "num_epochs": _same("train.epochs"),
    "max_steps": _max_steps,
    "max_train_steps": _max_steps,
    "lora_r": _same("lora.rank"),
    "lora_rank": _same("lora.rank"),
    "r": _same("lora.rank"),
    "lora_alpha": _same("lora.alpha"),
    "lora_dropout": _same("lora.dropout"),
    "lora_target": lambda value, _: f"set lora.target_modules: {'all-linear' if value == 'all' else _shown(value)}",
    "lora_target_modules": _same("lora.target_modules"),
    "lora_target_linear": _switch("set lora.target_modules: all-linear", "set lora.target_modules to a list of names"),
    "use_rslora": _switch("set lora.variant: rslora", "leave it out: lora.variant is lora by default"),
    "use_dora": _switch("set lora.variant: dora", "leave it out: lora.variant is lora by default"),
    "output_dir": _same("run_dir"),
    "resume_from_checkpoint": _say("leave it out: a run resumes by itself; --resume DIR chooses a checkpoint"),
    "overwrite_output_dir": _say("leave it out: `train --fresh` sets an old run aside"),
    "load_in_4bit": _bits(4),
    "load_in_8bit": _bits(8),
    "quantization_bit": lambda value, fields: _bits(8 if value == 8 else 4)(True, fields),
    "bnb_4bit_quant_type": _same("model.quantization"),
    "bnb_4bit_use_double_quant": _same("model.double_quant"),
    "double_quantization": _same("model.double_quant"),
    "bnb_4bit_compute_dtype": _same("model.compute_dtype"),
    "torch_dtype": _same("model.compute_dtype"),
    "bf16": _say(_FREE_PRECISION),
    "fp16": _say("leave it out: gradients underflow in float16; model.compute_dtype is bfloat16 by default"),
    "tf32": _say(_FREE_PRECISION),
    "flash_attention": _switch("set model.attention: flash", "set model.attention: sdpa"),
    "attn_implementation": _named("model.attention", _ATTENTION),
    "flash_attn": _named("model.attention", _ATTENTION),
    "adapter": _say("leave it out: the lora section is the adapter; model.quantization: nf4 makes it QLoRA"),
    "finetuning_type": _say("leave it out: the lora section is the adapter; lora: null is full fine-tuning"),
    "optimizer": _named("optim.name", _OPTIMIZERS),
    "lr_scheduler": _named("optim.schedule", _SCHEDULES),
    "lr_scheduler_type": _named("optim.schedule", _SCHEDULES),
    "warmup_ratio": _warmup,
    "adam_beta1": _say("set optim.betas: [BETA1, BETA2]"),
    "adam_beta2": _say("set optim.betas: [BETA1, BETA2]"),
    "adam_epsilon": _same("optim.eps"),
    "logging_steps": _say("leave it out: every step is in metrics.jsonl"),
    "save_steps": _steps_of("train.save_every"),
    "eval_steps": _steps_of("train.eval_every"),
    "save_total_limit": _kept,
    "report_to": lambda value, _: (
        "set logging.trackers: []" if value in (None, "none") else f"set logging.trackers: [{_shown(value)}]"
    ),
    "val_size": _held_out,
    "val_set_size": _held_out,
    "sample_packing": _same("data.packing"),
    "group_by_length": _say("leave it out: rows are packed (data.packing) and shared out by cost"),
    "train_on_inputs": _switch("set data.learn: all", "leave it out: data.learn is assistant by default"),
    "train_on_prompt": _switch("set data.learn: all", "leave it out: data.learn is assistant by default"),
    "datasets": _say("set data.train: [{path: ..., format: ...}]"),
    "dataset": _source,
    "dataset_name": _source,
    "train_file": _source,
    "chat_template": _same("data.template"),
    "preprocessing_num_workers": _same("data.num_workers"),
    "dataset_num_proc": _same("data.num_workers"),
    "dataset_prepared_path": _same("data.cache_dir"),
    "gradient_checkpointing": _switch("set memory.recompute: full", "set memory.recompute: none"),
    "deepspeed": _say("set strategy.name to zero1, zero2, zero2_offload or zero3, and strategy.ds_config to that file"),
    "fsdp": _say("set strategy.name: fsdp"),
    "fsdp_config": _say("set strategy.name: fsdp"),
    "wandb_project": lambda value, _: f"set logging.trackers: [wandb] and logging.project: {_shown(value)}",
    "ddp_timeout": _same("strategy.timeout_seconds"),
    "trust_remote_code": _say("leave it out: code that comes with a model is never executed"),
}


def answer(key: str, value: Any, fields: Fields) -> str | None:
    """What to set here instead of another trainer's `key`, with the value if that can be computed; None for a name
    that is not known. `fields`: everything that was given, see `given_fields`."""
    known = ANSWERS.get(key.lower())
    return None if known is None else known(value, fields)


def given_fields(raw: Any) -> dict[str, Any]:
    """The leaves of plain data by the last part of their names."""
    fields: dict[str, Any] = {}
    if isinstance(raw, dict):
        for key, value in raw.items():
            fields |= given_fields(value) if isinstance(value, dict) else {str(key): value}
    return fields
