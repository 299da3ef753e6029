"""ds_configs/*.json -> the config that DeepSpeed is initialized with. Needs neither DeepSpeed nor a process group.

Values that the run config owns are "auto" in the file and filled in here; explicit values must agree with it. Other
values (bucket sizes, overlap_comm, ...) are the user's and are passed to DeepSpeed unchanged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..config.json_file import read_json_object
from ..config.shipped import shipped_folders
from ..errors import UserError

STAGES = {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3}
REPLICATES = {
    "ddp": "every rank holds the whole base and all trained weights, gradients and optimizer states",
    "zero1": "every rank holds the whole base, trained weights and gradients; optimizer states are sharded",
    "zero2": "every rank holds the whole base and trained weights; gradients and optimizer states are sharded",
    "zero2_offload": "every rank holds the whole base and trained weights; gradients and optimizer states are sharded, "
    "in host memory, where torch's AdamW updates",
    "zero3": "base, trained weights, gradients and optimizer states are sharded; a layer is gathered while it runs",
}

# other values would change the mathematics or break this package's bookkeeping
REQUIRED: dict[str, tuple[Any, str]] = {
    "communication_data_type": ("fp32", "gradients are reduced in fp32"),
    "data_types.grad_accum_dtype": ("fp32", "gradients are accumulated in fp32"),
    "gradient_allreduce_op": ("mean", "the division by the number of labels assumes it"),
    "managed_gradient_accumulation": (True, "the trainer marks the last micro-step"),
    "prescale_gradients": (False, "gradients are divided once, after the sum"),
    "gradient_predivide_factor": (1.0, "gradients are divided once, after the sum"),
    "torch_autocast.enabled": (False, "the trainer chooses the compute types"),
    "zero_force_ds_cpu_optimizer": (False, "the optimizer is torch's, which needs no compiler at startup"),
    "zero_allow_untested_optimizer": (True, "the run config chooses the optimizer"),
    "zero_optimization.compute_grad_norm": (True, "the gradient norm is a metric, and stops a run that diverges"),
    "zero_optimization.zero_hpz_partition_size": (1, "checkpoints gather each weight's shards from all ranks"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients are reduced in fp32"),
    "zero_optimization.zero_quantized_weights": (False, "weights are gathered as they are"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "weights are gathered as they are"),
}
# DeepSpeed's defaults, where they differ from the required values
DEEPSPEED_DEFAULTS = {
    "communication_data_type": None,
    "zero_force_ds_cpu_optimizer": True,
    "zero_allow_untested_optimizer": False,
}
REFUSED = {
    "optimizer": "the run config sets it (optim.name, optim.lr, ...)",
    "scheduler": "the run config sets it (optim.schedule, optim.warmup_steps)",
    "zero_optimization.zenflow": "it updates with stale gradients",
    "zero_optimization.sub_group_size": "it splits groups for disk offload, but checkpoints hold whole groups",
    "zero_optimization.mics_shard_size": "checkpoints gather each weight's shards from all ranks",
    "elasticity": "batch.rows_per_step is the batch size, on any number of ranks",
    "tensor_parallel": "every rank runs whole layers",
    "sequence_parallel_size": "every rank runs whole rows",
    "amp": "the run config sets it (model.compute_dtype)",
    "compile": "the trainer does not compile the model",
    "hybrid_engine": "it is for generation between steps",
    "progressive_layer_drop": "it changes the model",
    "compression_training": "it changes the weights",
    "curriculum_learning": "the trainer sets the order of rows",
    "data_efficiency": "the trainer sets the order of rows",
}


def check_pairs(strategy: str, *, optimizer: str, quantization: str, recompute: str | int, variant: str | None) -> None:
    """Raises UserError for settings that a ZeRO strategy cannot train correctly; see zero3.py for the evidence."""
    if strategy == "zero2_offload" and optimizer != "adamw":
        raise UserError(
            "strategy.name zero2_offload keeps optimizer states in host memory and updates there; optim.name "
            f"{optimizer} is bitsandbytes', made for device memory. Set optim.name=adamw (torch's fused kernel, "
            "which needs no compiler at startup), or strategy.name=zero2"
        )
    if strategy != "zero3":
        return
    if "8bit" in optimizer:
        raise UserError(
            f"strategy.name zero3 shards each weight separately, so the blocks of {optimizer}'s states would depend on "
            "the number of ranks, and no checkpoint could resume on another; set optim.name=paged_adamw_32bit"
        )
    if quantization == "int8":
        raise UserError(
            "strategy.name zero3 with model.quantization int8: bitsandbytes' int8 layers keep copies of codes and "
            "scales that DeepSpeed does not know about, so nothing would be sharded; set model.quantization=nf4, or "
            "strategy.name=zero2"
        )
    if quantization != "none" and recompute == "none":
        raise UserError(
            f"strategy.name zero3 with model.quantization {quantization} and memory.recompute none: gathered layers "
            "would be kept until their backward pass, so no memory would be saved; set memory.recompute=full, or "
            "strategy.name=zero2"
        )
    if variant == "dora":
        raise UserError(
            "strategy.name zero3 with lora.variant dora: its forward pass reads base weights outside their layer, "
            "where they are not gathered; set lora.variant=rslora, or strategy.name=zero2"
        )


def find_ds_config(strategy: str, path: str | None) -> Path:
    """The file given by `strategy.ds_config`, or the one shipped for the strategy.

    Shipped files are in ds_configs/ of the checkout that contains this package, else in share/qlora_dist/ds_configs/
    of the environment that it is installed in, so a run may start in any folder. Raises UserError if there is none.
    """
    if path is not None:
        given = Path(path).expanduser()
        if not given.is_file():
            raise UserError(f"strategy.ds_config {path}: there is no such file (looked for {given.resolve()})")
        return given
    folders = shipped_folders("ds_configs")
    for folder in folders:
        if (file := folder / f"{strategy}.json").is_file():
            return file
    raise UserError(
        f"strategy.name {strategy}: {strategy}.json is in neither {folders[0]} nor {folders[1]}; reinstall the "
        "package, or give a file with strategy.ds_config"
    )


def fill_ds_config(
    file: Path,
    *,
    strategy: str,
    rows_per_step: int,
    micro_rows: int,
    accumulation: int,
    max_grad_norm: float | None,
) -> dict[str, Any]:
    """The config for DeepSpeed. Raises UserError for a value that contradicts the run config, giving both."""
    config = read_json_object(file, str(file), "give a DeepSpeed config")
    if not isinstance(config.get("zero_optimization"), dict):
        raise UserError(f"{file}: expected a DeepSpeed config with a zero_optimization section")
    owned = {
        "train_batch_size": (rows_per_step, "batch.rows_per_step"),
        "train_micro_batch_size_per_gpu": (micro_rows, "batch.micro_rows"),
        "gradient_accumulation_steps": (accumulation, "batch.rows_per_step / (ranks x batch.micro_rows)"),
        "gradient_clipping": (max_grad_norm or 0.0, "optim.max_grad_norm; 0: no clipping"),
        # DeepSpeed's dtype is that of the weights it updates, the fp32 masters, whatever model.compute_dtype is
        "bf16.enabled": (False, "trained weights are fp32 masters; model.compute_dtype is for the forward pass"),
        "fp16.enabled": (False, "trained weights are fp32 masters; model.compute_dtype is for the forward pass"),
        "zero_optimization.stage": (STAGES[strategy], f"strategy.name {strategy}"),
        "zero_optimization.offload_optimizer.device": (
            "cpu" if strategy == "zero2_offload" else "none",
            f"strategy.name {strategy}",
        ),
        "zero_optimization.offload_param.device": ("none", f"strategy.name {strategy}"),
    }
    for key, (value, owner) in owned.items():
        found = _get(config, key)
        if found not in (None, "auto", value):
            raise UserError(
                f'{file}: {key} is {found!r}, expected {value!r} ({owner}); write "auto", or change the run config'
            )
        _set(config, key, value)
    for key, why in REFUSED.items():
        if _get(config, key) is not None:
            raise UserError(f"{file}: {key} is not allowed: {why}; remove it")
    for key, (value, why) in REQUIRED.items():
        found = _get(config, key)
        if found not in (None, value):
            raise UserError(f"{file}: {key} is {found!r}, expected {value!r}: {why}")
        if value != DEEPSPEED_DEFAULTS.get(key, value):
            _set(config, key, value)
    if remaining := _auto_keys(config):
        raise UserError(f'{file}: {remaining[0]} is "auto", but the run config has no value for it; write a number')
    return {"steps_per_print": sys.maxsize, **config}


def _get(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _set(config: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[last] = value


def _auto_keys(node: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in node.items():
        if isinstance(value, dict):
            found += _auto_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found
