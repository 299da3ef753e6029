"""The trained weights as files: an adapter in PEFT's format, or all weights for full fine-tuning."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..errors import RunFailed, UserError
from ..model import unwrap
from ..model.lora import trainable_parameters
from ..model.lora_files import load_adapter_weights, save_adapter, verify_adapter_file

FULL = "weights.safetensors"


def save_trained(model: torch.nn.Module, folder: Path, base_name: str, is_full: bool) -> None:
    """Writes the trained weights into a checkpoint's folder."""
    if is_full:
        state = {name: value.detach().to("cpu", copy=True) for name, value in trainable_parameters(model).items()}
        save_file(state, folder / FULL)
    else:
        save_adapter(model, folder, base_name)


def restore_trained(model: torch.nn.Module, folder: Path, is_full: bool) -> None:
    """Restores saved weights in place. Raises UserError when they belong to another model."""
    if not is_full:
        load_adapter_weights(model, folder)
        return
    stored, live = load_file(folder / FULL), trainable_parameters(model)
    if stored.keys() != live.keys():
        raise UserError(f"{folder / FULL}: its weights belong to another model")
    with torch.no_grad():
        for name, parameter in live.items():
            parameter.copy_(stored[name])


def verify_trained(model: torch.nn.Module, folder: Path, is_full: bool) -> None:
    """Reads saved weights back and compares them bit by bit with the live ones. Raises RunFailed."""
    if not is_full:
        verify_adapter_file(model, folder, must_be_trained=True)
        return
    stored = load_file(folder / FULL)
    live = {name: value.detach().cpu() for name, value in trainable_parameters(model).items()}
    wrong = [name for name, value in live.items() if not torch.equal(stored[name], value)]
    if wrong:
        raise RunFailed(f"{folder / FULL} differs from what is in memory: {len(wrong)} tensors, first {wrong[0]}")


def export_trained(
    model: torch.nn.Module, folder: Path, base_name: str, compute_dtype: torch.dtype, is_full: bool
) -> None:
    """Writes the result of training: the adapter, or the whole model in its compute type."""
    if not is_full:
        save_adapter(model, folder, base_name)
        verify_adapter_file(model, folder, must_be_trained=True)
        return
    base = unwrap(model)
    state = {name: value.detach().to("cpu", compute_dtype, copy=True) for name, value in base.state_dict().items()}
    base.config.dtype = compute_dtype
    base.save_pretrained(folder, state_dict=state)
