"""Weight files of zeros without any disk blocks: a loader reads them, byte by byte, as it reads a download.

For the null device, which computes nothing. On a real one a trainer's checks refuse such a model: it cannot learn.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

WEIGHTS = "sparse files of zeros"  # as named in a raw result


def write_sparse_weights(model: Path, storage: Path) -> int:
    """bf16 weights for model/config.json, one file per decoder layer in `storage`, linked from `model`; their bytes.

    A hole is read from a tmpfs at the speed of memory (5 GiB/s), from ext4 through the page cache (0.2 to 0.3 GiB/s).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.bfloat16)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, weight in skeleton.state_dict().items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        parts.setdefault(f"layer-{int(layer[1]):03d}" if layer else "others", {})[name] = weight
    storage.mkdir(parents=True, exist_ok=True)
    total, weight_map = 0, {}
    for part, weights in parts.items():
        file = f"model-{part}.safetensors"
        total += _write_part(storage / file, weights)
        (model / file).symlink_to((storage / file).resolve())
        weight_map |= dict.fromkeys(weights, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write_part(path: Path, weights: dict[str, torch.Tensor]) -> int:
    """A safetensors file: the header's length, the header, then a hole of the size of its weights."""
    header, end = {}, 0
    for name, weight in weights.items():
        start, end = end, end + weight.numel() * weight.element_size()
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end
