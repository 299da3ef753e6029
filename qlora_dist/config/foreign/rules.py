"""Keys of other trainers whose meaning depends on their value, or on other keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..json_file import read_json_object
from .answers import EACH, Answer, Given, Rule, is_count, lost, shown
from .sources import num_sources

SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine", "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": "cosine",
}  # fmt: skip
OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit", "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "torch.optim.adamw": "adamw", "bitsandbytes.optim.adamw8bit": "adamw_8bit",
    "bitsandbytes.optim.pagedadamw": "paged_adamw_32bit", "bitsandbytes.optim.pagedadamw8bit": "paged_adamw_8bit",
}  # fmt: skip
_TEMPLATES = {
    **{name: name for name in ("chatml", "llama2", "llama3", "mistral", "gemma", "alpaca", "vicuna", "zephyr")},
    "mistral_v1": "mistral", "tokenizer_default": "tokenizer", "empty": "none",
}  # fmt: skip

_ROWS = "the batch of one update, over all ranks, is batch.rows_per_step: per device x accumulation x number of devices"
PER_DEVICE = ("per_device_train_batch_size", "micro_batch_size", "per_device_batch_size", "batch_size")
ACCUMULATION = ("gradient_accumulation_steps", "grad_accum", "gradient_accumulation")
ROW_TOKENS = ("max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "max_length", "model_max_length")
SCHEDULE_KEYS = ("lr_scheduler_type", "lr_scheduler", "lr_scheduler._component_")
_PRECISION = "model.compute_dtype is bfloat16 by default (float32 where a device has none)"
FLASH = "model.attention auto takes flash-attn where it is installed, else torch's own kernel for packed rows"
_MOST_SECONDS = 30 * 86400


# --- batch, length, schedule ---


def rows(value: Any, given: Given) -> Answer:
    """Rows of one update, from what was given per device."""
    per_device, accumulation = given.first(PER_DEVICE), given.first(ACCUMULATION) or 1
    if not is_count(per_device) or not is_count(accumulation):
        return lost(f"{_ROWS}; set batch.rows_per_step, and batch.micro_rows for the rows of one forward pass")
    rows = per_device * accumulation
    how = f"{per_device} per device x {accumulation} accumulated"
    if given.gpus is None:
        how += f" on one device; {rows} x N on N: {_ROWS}"
    else:
        how += f" x {given.gpus} GPU{'s' * (given.gpus > 1)}"
    return Answer({"batch.rows_per_step": rows * (given.gpus or 1), "batch.micro_rows": per_device}, how)


def batch_size(value: Any, given: Given) -> Answer:
    """Per device in torchtune and elsewhere; in Axolotl an older name for all of accumulation."""
    if given.first(PER_DEVICE[:-1]) is not None:
        return lost("the batch per device and gradient_accumulation_steps decide")
    return rows(value, given)


def epochs(value: Any, given: Given) -> Answer:
    if is_count(given.fields.get("max_steps")):
        return Answer(text="max_steps decides")
    return Answer({"train.epochs": value})


def max_steps(value: Any, given: Given) -> Answer:
    return Answer(text="train.epochs decides") if value in (-1, 0) else Answer({"train.steps": value})


def warmup(value: Any, given: Given) -> Answer:
    if given.first(SCHEDULE_KEYS) == "constant":
        return Answer(text="with the schedule named constant there is no warm-up there")
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        return lost("set optim.warmup_steps to a number of steps, or to a share of them below 1")
    if is_count(given.fields.get("warmup_steps")):
        return Answer(text="warmup_steps decides")
    return Answer({"optim.warmup_steps": value}, "that share of the steps")


def warmup_steps(value: Any, given: Given) -> Answer:
    if given.first(SCHEDULE_KEYS) == "constant":
        return Answer(text="with the schedule named constant there is no warm-up there")
    if value == 0 and given.fields.get("warmup_ratio"):
        return Answer(text="warmup_ratio decides")
    return Answer({"optim.warmup_steps": value})


def betas(value: Any, given: Given) -> Answer:
    first, second = given.fields.get("adam_beta1"), given.fields.get("adam_beta2")
    return Answer({"optim.betas": [0.9 if first is None else first, 0.999 if second is None else second]})


def min_lr(value: Any, given: Given) -> Answer:
    peak = given.fields.get("learning_rate")
    if isinstance(value, int | float) and isinstance(peak, int | float) and peak > 0:
        return Answer({"optim.min_lr_ratio": round(value / peak, 12)}, "as a share of learning_rate")
    return lost("set optim.min_lr_ratio to its share of the learning rate")


def every(key: str, strategies: tuple[str, ...]) -> Rule:
    """A number of steps, which one of these keys may switch off."""

    def answer(value: Any, given: Given) -> Answer:
        strategy = given.first(strategies)
        if strategy is not None and str(strategy) not in ("steps", "True"):
            return Answer(text=f"{strategies[0]} is {shown(strategy)}, so it has no effect")
        steps = given.fields.get("max_steps")
        if isinstance(value, float) and 0 < value < 1 and is_count(steps):
            return Answer({key: max(1, round(value * steps))}, f"{value} of {steps} steps")
        if is_count(value):
            return Answer({key: value})
        return lost(f"set {key} to a number of steps; a share of them is known only when the data are packed")

    return answer


def per_epoch(key: str) -> Rule:
    def answer(value: Any, _: Given) -> Answer:
        if value == 0:
            return Answer(text="none, as by default")
        return lost(f"set {key} to a number of steps: `qlora-dist data` shows the rows of an epoch")

    return answer


def eval_strategy(value: Any, given: Given) -> Answer:
    if str(value) == "steps" and given.fields.get("eval_steps") is None:
        steps = given.fields.get("logging_steps", 500)
        return Answer({"train.eval_every": steps}, "without eval_steps, it is evaluated as often as it is logged")
    return strategy("train.eval_every", "eval_steps")(value, given)


def strategy(key: str, steps: str) -> Rule:
    def answer(value: Any, _: Given) -> Answer:
        if str(value) == "steps":
            return Answer(text=f"{steps} decides")
        if value is False or str(value) == "no":
            return Answer(text=f"{key} is null by default: only at the end")
        return lost(f"set {key} to a number of steps: `qlora-dist data` shows the rows of an epoch")

    return answer


# --- model, adapters ---


def _is_4bit(given: Given) -> bool:
    """Whether the base is in 4 bits, or nothing is known about it."""
    return not given.trainer or given.fields.get("load_in_4bit") is True or given.fields.get("quantization_bit") == 4


def bits(bits: int) -> Rule:
    def answer(value: Any, given: Given) -> Answer:
        if value is True:
            kind = str(given.first(("bnb_4bit_quant_type", "quantization_type")) or "nf4")
            return Answer({"model.quantization": kind if bits == 4 else "int8"})
        other = "load_in_8bit" if bits == 4 else "load_in_4bit"
        if given.fields.get(other) is True:
            return Answer(text=f"{other} decides")
        return Answer({"model.quantization": "none"}, "a base that is not quantized; the default here is nf4")

    return answer


def quantization_bit(value: Any, given: Given) -> Answer:
    if value in (4, 8):
        return bits(value)(True, given)
    if value == "none":
        return Answer({"model.quantization": "none"}, "a base that is not quantized; the default here is nf4")
    return lost(
        f"a base of {shown(value)} bits cannot be trained on here: model.quantization is nf4, fp4, int8 or none"
    )


def quant_type(value: Any, given: Given) -> Answer:
    return Answer({"model.quantization": value}) if _is_4bit(given) else Answer(text="without a 4-bit base no effect")


def double(value: Any, given: Given) -> Answer:
    return Answer({"model.double_quant": value}) if _is_4bit(given) else Answer(text="without a 4-bit base no effect")


def dtype(value: Any, given: Given) -> Answer:
    name = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}.get(str(value), str(value).split(".")[-1])
    if name == "auto":
        return Answer(text=_PRECISION)
    if name == "float16":
        return lost("gradients underflow in float16; model.compute_dtype is bfloat16 by default")
    if name == "float32" and given.fields.get("bf16") is True:
        return Answer(text="bf16 decides in which type is computed")
    return Answer({"model.compute_dtype": name})


def bf16(value: Any, given: Given) -> Answer:
    if value is False and given.trainer and given.fields.get("fp16") is not True:
        return Answer({"model.compute_dtype": "float32"}, "neither bf16 nor fp16")
    return Answer(text=_PRECISION)


def attention(value: Any, _: Given) -> Answer:
    name = str(value).lower()
    if name == "sdpa":
        return Answer({"model.attention": "sdpa"})
    if name in ("auto", "fa2", "flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2"):
        return Answer(text=FLASH)
    return lost("here it is model.attention, one of auto, flash, varlen, sdpa; all give the same results")


def targets(value: Any, given: Given) -> Answer:
    if given.fields.get("lora_target_linear") is True:
        return Answer(text="lora_target_linear: all linear layers include them")
    if value == "auto":
        return lost("PEFT then chooses by the model's family, often q_proj and v_proj alone; here all linear layers")
    names = value.split(",") if isinstance(value, str) else value
    if isinstance(value, str) and value in ("all", "all-linear"):
        return Answer({"lora.target_modules": "all-linear"})
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return lost("set lora.target_modules: all-linear, or a list of names")
    if any(re.search(r"[^\w. -]", name) for name in names):
        return lost("it is a pattern; set lora.target_modules to a list of names that linear layers end in")
    return Answer({"lora.target_modules": [name.strip() for name in names]})


def parameters(value: Any, _: Given) -> Answer:
    names = value if isinstance(value, list) else [value]
    if {str(name).rsplit(".", 1)[-1] for name in names} == {"gate_up_proj", "down_proj"}:
        return Answer({"lora.experts": "all"})
    return lost("set lora.experts: all, which adapts gate_up_proj and down_proj of all experts")


def torchtune_targets(value: Any, given: Given) -> Answer:
    names = given.fields.get("model.lora_attn_modules") or []
    if not isinstance(names, list):
        return lost("set lora.target_modules to a list of names")
    own = ["o_proj" if name == "output_proj" else name for name in names]
    own += ["gate_proj", "up_proj", "down_proj"] * (given.fields.get("model.apply_lora_to_mlp") is True)
    return Answer({"lora.target_modules": own})


def builder(value: Any, _: Given) -> Answer:
    name = str(value).rsplit(".", 1)[-1]
    if name.startswith("qlora_"):
        return Answer({"model.quantization": "nf4"}, "the model itself is that of checkpointer.checkpoint_dir")
    if name.startswith("lora_"):
        return Answer({"model.quantization": "none"}, "the model itself is that of checkpointer.checkpoint_dir")
    return Answer({"model.quantization": "none", "lora": None}, "a builder without lora: full fine-tuning")


FULL = Answer({"lora": None}, "full fine-tuning")
LORA = "the lora section is the adapter, in every config that does not set lora: null"


def adapter(value: Any, _: Given) -> Answer:
    if str(value).lower() in ("lora", "qlora"):
        return Answer(text=LORA)
    return FULL if str(value).lower() in ("none", "full") else lost("here lora is trained, or (lora: null) all weights")


def tokenizer(value: Any, given: Given) -> Answer:
    if value == given.first(("base_model", "model_name_or_path")):
        return Answer(text="the model's own tokenizer is used")
    return lost("the tokenizer is that of model.name: put its files into that folder")


# --- data ---


def held_out(value: Any, given: Given) -> Answer:
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        return lost("set hold_out in a source of data.train: that part of it is evaluated, not trained on")
    if value == 0:
        return Answer(text="nothing is held out by default")
    if value >= 1 and num_sources(given) > 1:
        return lost("a number of records of several sources together; set hold_out in sources of data.train")
    return Answer({f"{EACH}hold_out": value}, "it is evaluated, not trained on")


def template(value: Any, given: Given) -> Answer:
    name = str(value).lower()
    if name == "jinja":
        return Answer(text="chat_template_jinja decides")
    if name.startswith("tokenizer_default_fallback_"):
        return Answer({"data.template": "auto"}, "the tokenizer's own; without one, by the format of the data")
    if name in _TEMPLATES:
        return Answer({"data.template": _TEMPLATES[name]})
    return lost(f"no named template; data.template auto takes the tokenizer's own. Named: {', '.join(_TEMPLATES)}")


def template_file(value: Any, _: Given) -> Answer:
    if isinstance(value, str) and value.endswith(".jinja") and "\n" not in value:
        return Answer({"data.template": value if "/" in value else f"./{value}"})
    return lost("put the template into a .jinja file, and set data.template to its path")


def cpu_work(value: Any, _: Given) -> Answer:
    return Answer({"data.num_workers": value}) if is_count(value) else Answer(text="data.num_workers is null: chosen")


# --- memory, strategy, trackers ---


def checkpointing(value: Any, _: Given) -> Answer:
    if str(value).startswith("offload"):
        return Answer({"memory.recompute": "full", "memory.offload_activations": True})
    return Answer({"memory.recompute": "none" if value is False else "full"})


def offload(value: Any, _: Given) -> Answer:
    return Answer(text="off by default") if value is False else Answer({"memory.offload_activations": True})


def deepspeed(value: Any, given: Given) -> Answer:
    say = "set strategy.name to zero1, zero2, zero2_offload or zero3, and strategy.ds_config to a file of your own"
    content: Mapping[str, Any] = value if isinstance(value, dict) else {}
    how = "by the name of that file, which is not here"
    if isinstance(value, str):
        for folder in given.folders:
            if (folder / value).is_file():
                content, how = read_json_object(folder / value, f"deepspeed {value}:"), f"read from {folder / value}"
                break
    zero = content.get("zero_optimization")
    if isinstance(zero, dict):
        stage: Any = zero.get("stage", 0)
        offloads = any(isinstance(zero.get(part), dict) for part in ("offload_optimizer", "offload_param"))
    else:
        found = re.search(r"(?:zero|_z|stage)[_-]?([0-3])", Path(str(value)).name)
        stage, offloads = (int(found[1]) if found else None), "offload" in str(value)
    if stage not in (0, 1, 2, 3) or type(stage) is not int:
        return lost(say)
    if stage == 0:
        return Answer({"strategy.name": "ddp"}, "stage 0 shards nothing")
    if stage == 3 and offloads:
        how += "; what it offloads stays on the GPU here: memory.offload_activations, or strategy fsdp with offload"
    return Answer({"strategy.name": f"zero{stage}{'_offload' * (offloads and stage == 2)}"}, how)


def fsdp(value: Any, _: Given) -> Answer:
    words = value if isinstance(value, list) else str(value).split()
    if value is False or value == "" or "no_shard" in words:
        return Answer(text="nothing is sharded by default")
    return Answer({"strategy.name": "fsdp"} | ({"strategy.offload": True} if "offload" in words else {}))


def fsdp_offload(value: Any, _: Given) -> Answer:
    return Answer({"strategy.name": "fsdp"} | ({"strategy.offload": True} if value is True else {}))


def timeout(value: Any, _: Given) -> Answer:
    if isinstance(value, int | float) and value > _MOST_SECONDS:
        return Answer({"strategy.timeout_seconds": _MOST_SECONDS}, "30 days, the longest here")
    return Answer({"strategy.timeout_seconds": value})


PROJECTS = {
    "wandb_project": "wandb", "comet_project_name": "comet_ml", "mlflow_experiment_name": "mlflow",
    "trackio_project_name": "trackio",
}  # fmt: skip
USES = {
    "use_wandb": "wandb", "use_tensorboard": "tensorboard", "use_mlflow": "mlflow", "use_comet": "comet_ml",
    "use_trackio": "trackio", "use_swanlab": "swanlab",
}  # fmt: skip


def trackers(value: Any, given: Given) -> Answer:
    """All of them, from whichever key names one."""
    listed = given.fields.get("report_to")
    names = [*listed] if isinstance(listed, list) else [] if listed is None else [listed]
    if "all" in names:
        return lost("set logging.trackers to a list of names")
    names = [name for name in names if name not in ("none", False)]
    names += [name for key, name in USES.items() if given.fields.get(key) is True]
    names += [name for key, name in PROJECTS.items() if given.fields.get(key) and given.fields.get(f"use_{name}", True)]
    return Answer({"logging.trackers": list(dict.fromkeys(map(str, names)))})


def project(value: Any, given: Given) -> Answer:
    first = given.first(tuple(PROJECTS))
    return Answer({**trackers(value, given).values, "logging.project": value if first is None else first})
