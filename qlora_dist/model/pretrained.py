"""What is read before the weights: config.json, and which bases are accepted."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, cached_file

from ..config.model_json import DECODED, check_quantization_method, method_of, read_model_json
from ..config.names import model_folder
from ..config.quantization import BLOCK, Quantization
from ..data.tokenizer import expanded, first_line, where_to_read
from ..errors import UserError
from .attention import AttentionNeeds, register
from .bitsandbytes_import import bitsandbytes
from .text_part import TextPart, text_config_of, text_part_of

log = logging.getLogger(__name__)

register()

INFERENCE = "inference"  # value of `attention` for generation: transformers' own attention and a key-value cache


# --- config ---------------------------------------------------------------------------------------------------------


def load_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """The config of the language model in `name`: config.json, or the text model's part of a wrapper's. Raises
    UserError."""
    return text_config_of(load_whole_config(name, revision))


def load_whole_config(name: str, revision: str | None = None) -> PretrainedConfig:
    """config.json of a model. Raises UserError when it is missing, odd in any way, or needs custom code."""
    source = where_to_read(name, revision)
    try:
        read_stored_json(name, revision)
        return _as_decoded(AutoConfig.from_pretrained(expanded(name), **source))
    except UserError:
        raise
    except Exception as error:  # a family's own checks raise anything
        hint = (
            "it needs custom code (trust_remote_code), which is never run here"
            if "trust_remote_code" in str(error)
            else "give the name of a model on the hub, or a folder with config.json and *.safetensors"
        )
        raise UserError(f"model.name {name}: config.json cannot be read ({first_line(error)}); {hint}") from None


def read_stored_json(name: str, revision: str | None = None, is_needed: bool = True) -> dict[str, Any]:
    """config.json as plain data; empty where there is none and it is not needed. Raises UserError, OSError."""
    source = where_to_read(name, revision)
    options = {"revision": source["revision"], "local_files_only": source["local_files_only"]}
    path = cached_file(expanded(name), CONFIG_NAME, **options, _raise_exceptions_for_missing_entries=is_needed)
    return {} if path is None else read_model_json(name, Path(path))


def decoded_form(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """The quantization settings of files that are decoded while they are read; None for all others."""
    config = read_stored_json(name, revision, is_needed=False)
    for part in (config, config.get("text_config")):
        stored = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(stored, dict) and method_of(stored) in DECODED:
            return stored
    return None


def _as_decoded(config: Any) -> PretrainedConfig:
    """The config of the plain model that the files are decoded to."""
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored is not None and method_of(dict(stored)) in DECODED:
            del part.quantization_config
    return config


def find_text_part(name: str, revision: str | None = None) -> TextPart | None:
    """The text model of a wrapper; None for a model that is no wrapper. Raises UserError."""
    return text_part_of(name, load_whole_config(name, revision))


def check_weight_files(name: str) -> None:
    """A folder must contain safetensors. Hub models are checked when they are read."""
    folder = model_folder(name)
    if folder is None or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    if pickled:
        raise UserError(
            f"model.name {name}: the weights are pickled ({', '.join(pickled[:3])}), and unpickling can run code; "
            "convert them to safetensors once, for example with AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(folder), on a machine where you trust the file"
        )
    raise UserError(f"model.name {name}: the folder contains no *.safetensors file")


# --- quantization -----------------------------------------------------------------------------------------------------


def quantization_settings(
    name: str,
    config: PretrainedConfig,
    quantization: Quantization,
    double_quant: bool,
    compute_dtype: torch.dtype,
) -> dict[str, Any]:
    """The keyword for from_pretrained. Left out if the files are quantized: None would hide the stored settings."""
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        _check_stored_quantization(name, dict(stored), quantization, double_quant)
        return {}
    if quantization == "none":
        return {}
    if quantization == "int8":
        if compute_dtype != torch.float16:
            log.info("int8 layers compute in float16 internally, regardless of model.compute_dtype")
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        # packed codes stay bytes: a gather of floats may rewrite NaN bit patterns
        bnb_4bit_quant_storage=torch.uint8,
    )
    return {"quantization_config": four_bit}


def _check_stored_quantization(name: str, stored: dict[str, Any], quantization: str, double_quant: bool) -> None:
    check_quantization_method(name, stored)
    kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4")
    nested = bool(stored.get("bnb_4bit_use_double_quant"))
    if kind != quantization or (kind != "int8" and nested != double_quant):
        raise UserError(
            f"model.name {name}: the weights are stored as {kind} with double_quant={nested}, the run requests "
            f"{quantization} with double_quant={double_quant}; set model.quantization and model.double_quant "
            "to the stored values, or use the 16-bit model"
        )


def attention_needs(config: PretrainedConfig, dtype: torch.dtype) -> AttentionNeeds:
    """What this model's attention requires of a backend."""
    text = config.get_text_config()
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    width = max(
        getattr(one, "head_dim", None) or one.hidden_size // getattr(one, "num_attention_heads", 1) for one in layers
    )
    has_sinks = text.model_type == "gpt_oss" or bool(getattr(text, "attention_sink", False))
    return AttentionNeeds(
        dtype,
        width,
        has_softcap=getattr(text, "attn_logit_softcapping", None) is not None,
        has_window=getattr(text, "sliding_window", None) is not None,
        has_sinks=has_sinks,
    )


_RANDOM = re.compile("drop|jitter")  # dropout, resid_pdrop, layerdrop, drop_path, router_jitter_noise, moe_jitter_eps


def switch_dropout_off(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """A frozen base has nothing to regularize (GPT-2 ships with 0.1), and packed kernels have no dropout.

    Families keep probabilities in modules of their own and under names of their own: every number in (0, 1] whose
    name or class suggests one is set to zero. Modules that read the config get a changed copy: the model's own is
    saved with it. Returns (owner, attribute, value) of what was changed. `check_head` proves that nothing else
    changed, and that nothing random is left.
    """
    changed: list[tuple[Any, str, Any]] = []
    found = set()
    copies: dict[int, Any] = {}
    for module in model.modules():
        is_dropout = isinstance(module, _DropoutNd) or _RANDOM.search(type(module).__name__.lower()) is not None
        for name, value in _probabilities(module, is_dropout):
            changed.append((module, name, value))
            found.add(value)
            setattr(module, name, 0.0)
        config = vars(module).get("config")
        if isinstance(module, PreTrainedModel) or config is None or not (stored := _probabilities(config, False)):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            for name, _ in stored:
                setattr(copies[id(config)], name, 0.0)
        changed.append((module, "config", config))
        module.config = copies[id(config)]
    if found:
        log.info("the base's dropout is off (its config sets %s); lora.dropout is the only dropout", sorted(found))
    return changed


def _probabilities(owner: Any, is_dropout: bool) -> list[tuple[str, float]]:
    """Attributes of a module or config that make it random: (name, value)."""
    return [
        (name, value)
        for name, value in vars(owner).items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 < value <= 1
        and (_RANDOM.search(name) or (is_dropout and name == "p"))
    ]


def guard_cpu_layers(model: nn.Module) -> None:
    """Keeps bitsandbytes' CPU layers from changing the base, and rejects shapes that they misread.

    In eval mode without gradients `Linear4bit` repacks its weight in place for an AVX512-BF16 kernel: the base then
    differs from the loaded (and the saved) one, and some shapes fail an assertion.
    Remove once bitsandbytes repacks a copy.
    """
    check_cpu_shapes(
        {
            name: module.in_features
            for name, module in model.named_modules()
            if isinstance(module, bitsandbytes.nn.Linear4bit)
        }
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_cpu_shapes(in_features: dict[str, int]) -> None:
    """Raises UserError for 4-bit layers whose rows are not a whole number of blocks.

    bitsandbytes 0.50 dequantizes such rows with other blocks' constants on AVX512 CPUs: finite but wrong values.
    """
    wrong = {name: width for name, width in in_features.items() if width % BLOCK}
    if wrong:
        name, width = next(iter(wrong.items()))
        raise UserError(
            f"layer {name} has {width} inputs, not a multiple of the quantization block size {BLOCK} ({len(wrong)} "
            "such layers); bitsandbytes dequantizes it incorrectly on a CPU. Use a GPU, or set model.quantization=none"
        )
