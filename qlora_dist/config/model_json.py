"""A model's config.json, of any form: read and checked before anything is computed from it. Does not import torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import UserError, shortened
from .json_file import read_json_object

# Key (families use different ones) -> the largest value that any model could have
_LIMITS = (
    dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10_000)
    | dict.fromkeys(("hidden_size", "n_embd", "d_model", "head_dim"), 2**20)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads"), 2**16)
    | dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "max_seq_len"), 2**31 - 1)
)
_OPTIONAL = {"head_dim", "num_key_value_heads", "max_position_embeddings", "max_seq_len"}  # null: the family's default
_HEAD_SIZES = ("head_dim", "head_size", "kv_channels", "attention_head_size", "qk_nope_head_dim")


def read_model_json(name: str, path: Path) -> dict[str, Any]:
    """config.json as plain data. Raises UserError naming the file, the key, what was found and what was expected."""
    where = f"model.name {name}: {path}"
    config = read_json_object(path, where)
    _check_values(where, config)
    if isinstance(config.get("text_config"), dict):
        _check_values(f"{where}, text_config", config["text_config"])
    return config


DECODED = ("fp8", "mxfp4")  # methods whose files are decoded while they are read (`model.weights.decoded_files`)


def method_of(stored: dict[str, Any]) -> str:
    """The method by which the weights of a file are quantized."""
    return str(stored.get("quant_method", "unknown")).rsplit(".")[-1].lower()


def check_quantization_method(name: str, stored: dict[str, Any]) -> None:
    """Raises UserError for weights that are quantized by a method that is not read."""
    method = method_of(stored)
    if method not in ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", *DECODED):
        raise UserError(
            f"model.name {name}: the weights are quantized with {shortened(method)[1:-1]}; use the 16-bit model instead"
        )


def _check_values(where: str, config: dict[str, Any]) -> None:
    for key, largest in _LIMITS.items():
        value = config.get(key)
        if key not in config or (value is None and key in _OPTIONAL):
            continue
        if type(value) is not int or not 1 <= value <= largest:
            raise _wrong(where, key, value, f"a whole number from 1 to {largest:,}")
    heads = config.get("num_attention_heads") or config.get("n_head") or config.get("n_heads")
    hidden = config.get("hidden_size") or config.get("n_embd") or config.get("d_model")
    groups = config.get("num_key_value_heads")
    if heads and hidden and hidden % heads and not any(config.get(key) for key in _HEAD_SIZES):
        raise _wrong(where, "num_attention_heads", heads, f"a divisor of the hidden size {hidden}, or a head_dim")
    if heads and groups and heads % groups:
        raise _wrong(where, "num_key_value_heads", groups, f"a divisor of num_attention_heads {heads}")
    for key in ("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        value = config.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise _wrong(where, key, value, "a positive number")
    layers = config.get("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is not None and not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise _wrong(where, "layer_types", kinds, "a list with one name for each layer")
    if kinds is not None and layers is not None and len(kinds) != layers:
        raise _wrong(where, "layer_types", kinds, f"one name for each of {layers} layers, found {len(kinds)}")
    kind_of: tuple[tuple[str, Any, str], ...] = (
        ("quantization_config", dict, "an object"),
        ("tie_word_embeddings", bool, "true or false"),
        ("model_type", str, "text"),
        ("dtype", str | dict, "text"),
        ("torch_dtype", str | dict, "text"),
    )
    for key, kind, expected in kind_of:
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise _wrong(where, key, config[key], expected)


def _wrong(where: str, key: str, found: Any, expected: str) -> UserError:
    return UserError(
        f"{where}: {key} is {shortened(found)}; expected {expected}. The file is damaged or was edited: download it "
        "again"
    )
