"""Folders whose weights are fp8 or MXFP4, as releases store them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.tiny_models import save_model, tiny_model

FP8_MAX = 448.0


def fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(codes, scales): one fp32 scale for each block, those at the edges smaller."""
    rows, columns = weight.shape
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(down * block[0], across * block[1])
    padded[:rows, :columns] = weight.float()
    cells = padded.view(down, block[0], across, block[1])
    scales = cells.abs().amax(dim=(1, 3)) / FP8_MAX
    codes = (cells / scales[:, None, :, None]).view_as(padded)[:rows, :columns]
    return codes.contiguous().to(torch.float8_e4m3fn), scales


def save_fp8(
    folder: Path,
    family: str = "llama",
    block: tuple[int, int] = (32, 32),
    scale_type: Any = torch.float32,
    **changes: Any,
) -> Path:
    """A random model whose linear layers and experts, stored one by one, are fp8; scales in a file of their own."""
    save_model(folder, tiny_model(family, attention=None, **changes))
    weights = load_file(folder / "model.safetensors")
    scales = {}
    for name in [key for key in weights if key.endswith("proj.weight")]:
        codes, scale = fp8(weights[name], block)
        weights[name], scales[f"{name}_scale_inv"] = codes, scale.to(scale_type)
    rest = {
        name: value.to(torch.bfloat16) if value.dtype == torch.float32 else value for name, value in weights.items()
    }
    return write(folder, [rest, scales], {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                          "weight_block_size": list(block)})  # fmt: skip


def save_mxfp4(folder: Path, seed: int = 0) -> Path:
    """A random gpt-oss whose experts are MXFP4."""
    save_model(folder, tiny_model("gpt_oss", attention=None, seed=seed))
    weights = {name: value.to(torch.bfloat16) for name, value in load_file(folder / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(seed)
    for name in [key for key in weights if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, inputs, outputs = weights.pop(name).shape
        shape = (num_experts, outputs, inputs // 32)
        weights[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        weights[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
    return write(folder, [weights], {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def write(folder: Path, files: list[dict[str, Tensor]], stored: dict[str, Any]) -> Path:
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [f"model-{index + 1:05d}-of-{len(files):05d}.safetensors" for index in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in zip(names, files, strict=True) for key in tensors}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": stored, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
