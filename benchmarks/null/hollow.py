"""Model folders whose weight files are holes: full size for every reader, (almost) no bytes on the disk, all zeros.

On a device without values, weights need none. What reads them is real: opening, mapping, copying to the device.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..dataset import write_tokenizer
from ..shapes import Shape, config_json


def write_hollow_model(folder: Path, shape: Shape) -> Path:
    """A model folder that transformers and this package load, with its config and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(shape), indent=1))
    write_tokenizer(folder, shape.vocabulary)
    write_holes(folder, shape)
    return folder


def write_holes(folder: Path, shape: Shape) -> None:
    """The weights alone, bf16: one sparse file per layer, and their index."""
    weight_map, total = {}, 0
    for number, part in enumerate(_parts(shape)):
        file = f"part-{number:03d}.safetensors"
        total += _write_holes(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _parts(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of each file, by name."""
    table = (shape.vocabulary, shape.hidden)
    parts: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": table}]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        norms = ("input_layernorm", "post_attention_layernorm")
        part: dict[str, tuple[int, ...]] = {f"{prefix}.{norm}.weight": (shape.hidden,) for norm in norms}
        parts.append(part | {f"{prefix}.{name}.weight": size for name, size in shape.matrices().items()})
    return [*parts, {"model.norm.weight": (shape.hidden,), "lm_head.weight": table}]


def _write_holes(path: Path, tensors: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file with its header and a hole; returns the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, size in tensors.items():
        start, end = end, end + 2 * math.prod(size)
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end
