"""The frozen base: read, quantize, verify, run on packed batches.

    check_config   config.json alone: can this model be trained as configured? Runs before any weight is read.
    load_base      safetensors -> 4-bit, 8-bit or plain base on one device, every parameter frozen
    quantize_model safetensors -> 4-bit safetensors, without ever holding the model in memory
    check_head     on the loaded model: our head on packed documents reproduces the model's own logits
    check_blocks   on the loaded model: a decoder layer as a block gives what transformers' own layer gives
    hidden_states  Batch -> (T, H), the input of the loss

Only this folder imports bitsandbytes.nn, and transformers (but for `data.tokenizer` and the process that renders
templates). Import order within it: attention, loss, rope <- pretrained <- forward <- check_config, lora, generation,
and weights (safetensors_files <- quantize, sources <- stream <- shard, cache_4bit) <- load.
The base never changes after loading; `base_checksum` proves it.
"""

from . import bitsandbytes_import  # noqa: F401  (must come first: see the module)
from .base_weights import base_checksum, base_weights, held_bytes, non_finite_tensor, num_weights, own_part
from .check_blocks import check_blocks
from .check_config import ModelFacts, check_config
from .experts import packed_experts, stacked_experts, take_slots
from .forward import (
    check_head,
    decoder_layers,
    evaluation_mode,
    gathered_head,
    hidden_states,
    is_4bit,
    is_conv1d,
    is_linear,
    linear_layers,
    output_head,
    plain_name,
    set_recompute,
    text_part,
    training_mode,
    unwrap,
)
from .generation import Sampling, generate_ids, quantized_and_back, save_generation_config, stop_ids_of
from .load import load_base
from .pretrained import INFERENCE, load_config
from .rope import scaled_beyond
from .weights.cache_4bit import cached_4bit, quantize_model
from .weights.shard import check_gathered_layer, check_sharding
from .weights.write_errors import write_errors

__all__ = [
    "INFERENCE",
    "ModelFacts",
    "Sampling",
    "base_checksum",
    "base_weights",
    "cached_4bit",
    "check_blocks",
    "check_config",
    "check_gathered_layer",
    "check_head",
    "check_sharding",
    "decoder_layers",
    "evaluation_mode",
    "gathered_head",
    "generate_ids",
    "held_bytes",
    "hidden_states",
    "is_4bit",
    "is_conv1d",
    "is_linear",
    "linear_layers",
    "load_base",
    "load_config",
    "non_finite_tensor",
    "num_weights",
    "output_head",
    "own_part",
    "packed_experts",
    "plain_name",
    "quantize_model",
    "quantized_and_back",
    "save_generation_config",
    "scaled_beyond",
    "set_recompute",
    "stacked_experts",
    "stop_ids_of",
    "take_slots",
    "text_part",
    "training_mode",
    "unwrap",
    "write_errors",
]
