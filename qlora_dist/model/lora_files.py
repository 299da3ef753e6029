"""Adapter files in PEFT's format: save, read back, compare bit for bit. Stock PEFT loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import RunFailed, UserError
from .base_weights import same_bits
from .forward import strip_wrappers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADAPTER = "default"  # PEFT's name for the trained adapter


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's keys: copies on the CPU, contiguous, sorted by key."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in sorted(_live_state(model).items())}


def save_adapter(model: nn.Module, folder: str | Path, base_name: str) -> None:
    """Writes adapter_model.safetensors and adapter_config.json into an existing or new folder. Not atomic."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_state(model), folder / WEIGHTS, metadata={"format": "pt"})
    config = _peft(model).peft_config[ADAPTER].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    # the order of sets differs between processes: sorted, equal adapters give equal files
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / CONFIG).write_text(json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def load_adapter_weights(model: nn.Module, folder: str | Path) -> None:
    """Copies a saved adapter into the attached one, in place. Raises UserError unless keys and shapes match."""
    live, stored = _live_state(model), read_adapter_weights(folder)
    missing, unexpected = sorted(live.keys() - stored.keys()), sorted(stored.keys() - live.keys())
    if missing or unexpected:
        lines = [f"{len(keys)} {what}, first {keys[0]}" for what, keys in
                 (("missing", missing), ("unexpected", unexpected)) if keys]  # fmt: skip
        raise UserError(
            f"adapter {folder} does not match this model and lora section: {'; '.join(lines)}; "
            "use the target_modules and the base that it was trained with"
        )
    for key, value in live.items():
        if value.shape != stored[key].shape:
            raise UserError(
                f"adapter {folder}: {key} has shape {tuple(stored[key].shape)}, expected {tuple(value.shape)}; "
                "it was trained with another lora.rank or base"
            )
    with torch.no_grad():
        for key, value in live.items():
            value.copy_(stored[key])  # in place: the optimizer may hold views


def verify_adapter_file(model: nn.Module, folder: str | Path, *, must_be_trained: bool = False) -> None:
    """Reads a saved adapter back and compares it bit for bit with the live one. Raises RunFailed.

    With must_be_trained, an adapter whose B matrices are all zero (it changes nothing) fails too.
    """
    live, stored = adapter_state(model), read_adapter_weights(folder)
    wrong = sorted(
        key for key in live.keys() | stored.keys()
        if key not in live or key not in stored or not same_bits(live[key], stored[key])
    )  # fmt: skip
    if wrong or not live:
        raise RunFailed(
            f"the adapter in {folder} differs from the one in memory in {len(wrong)} of {len(live)} tensors"
            + (f", first {wrong[0]}" if wrong else "")
            + "; do not use this file, earlier checkpoints are unaffected"
        )
    if must_be_trained and not any(bool(value.any()) for key, value in live.items() if "lora_B" in key):
        raise RunFailed(f"the adapter in {folder} changes nothing: every lora_B is zero; no gradient reached it")


def read_adapter_weights(folder: str | Path) -> dict[str, Tensor]:
    """Tensors of a saved adapter. Raises UserError."""
    path = require_weights(folder)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); the file is damaged or incomplete") from None


def require_weights(folder: str | Path) -> Path:
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickled = path.with_name("adapter_model.bin")
        hint = f"{pickled.name} is pickled, which can run code: convert it to safetensors" if pickled.is_file() else ""
        raise UserError(f"{folder}: no {WEIGHTS} here; {hint or 'give the folder of a saved PEFT adapter'}")
    return path


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """adapter_config.json of a LoRA adapter. Raises UserError for anything else."""
    path = Path(folder) / CONFIG
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {CONFIG} cannot be read ({error}); give the folder of a PEFT adapter") from None
    if kind != "LORA":
        raise UserError(f"{path}: peft_type is {kind}, expected LORA")
    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


# --- helpers ----------------------------------------------------------------------------------------------------------


def _peft(model: nn.Module) -> PeftModel:
    """The PeftModel inside data-parallel and compile wrappers."""
    inner: Any = model
    while not isinstance(inner, PeftModel):
        outer, inner = inner, getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            raise RuntimeError(f"{type(outer).__name__} has no adapters; call attach_lora first")
    return inner


def _live_state(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's keys -> the parameters themselves. Own code: PEFT's function does not handle wrappers inside the model."""
    return {
        strip_wrappers(name).replace(f".{ADAPTER}.weight", "" if "lora_magnitude_vector" in name else ".weight"): value
        for name, value in _peft(model).named_parameters()
        if "lora_" in name and f".{ADAPTER}." in name
    }
