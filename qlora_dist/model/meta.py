"""A base without weights: every tensor has its shape and dtype but no values. For memory traces under fake tensors.

empty_base     config.json -> the base as `load_base` returns it, on the meta device, ready for adapters
fill_empty     meta -> empty tensors under the active mode; inside FakeTensorMode they take no memory
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ..config.quantization import BLOCK, NESTED_BLOCK, Quantization
from ..errors import UserError
from .attention import PACKED
from .bitsandbytes_import import bitsandbytes
from .experts import pack_experts
from .forward import linear_layers
from .pretrained import switch_dropout_off
from .state_layers import separate_documents


def empty_base(
    config: PretrainedConfig,
    *,
    quantization: Quantization,
    double_quant: bool,
    compute_dtype: torch.dtype,
    backend: str,
) -> PreTrainedModel:
    """The base on the meta device, with its 4-bit layers in place.

    Raises UserError for int8, whose kernels cannot be traced.
    """
    if quantization == "int8":
        raise UserError(
            "model.quantization int8 cannot be simulated: its kernels' sizes depend on data; plan without --simulate"
        )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, attn_implementation=PACKED, dtype=compute_dtype, trust_remote_code=False
        )
        model.requires_grad_(False)
        if quantization != "none":
            for name, layer in linear_layers(model).items():
                parent, _, last = name.rpartition(".")
                setattr(
                    model.get_submodule(parent), last, _empty_4bit(layer, quantization, double_quant, compute_dtype)
                )
            pack_experts(model, quantization, double_quant)
            model.is_loaded_in_4bit = True  # read by PEFT
    model.config.use_cache = False
    model.packed_backend = backend
    switch_dropout_off(model)
    separate_documents(model)
    return model


def _empty_4bit(layer: nn.Module, kind: str, double_quant: bool, compute_dtype: torch.dtype) -> nn.Module:
    """Linear4bit of the same shape."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    outputs, inputs = weight.shape if isinstance(layer, nn.Linear) else weight.shape[::-1]  # Conv1D is transposed
    new = bitsandbytes.nn.Linear4bit(
        inputs,
        outputs,
        bias=layer.bias is not None,
        compute_dtype=compute_dtype,
        compress_statistics=double_quant,
        quant_type=kind,
        quant_storage=torch.uint8,
    )
    if layer.bias is not None:
        new.bias = layer.bias
    new.compute_type_is_set = True
    new.support_avx512bf16_for_cpu = False
    new.requires_grad_(False)
    return new


def fill_empty(model: nn.Module) -> None:
    """Allocates every meta tensor under the mode that is active here. 4-bit weights become codes with constants. Shared
    tensors stay shared."""
    filled: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in filled:
                if isinstance(module, bitsandbytes.nn.Linear4bit) and name == "weight":
                    filled[id(parameter)] = _empty_codes(module, parameter)
                else:
                    filled[id(parameter)] = nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
                    )
            module._parameters[name] = filled[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = filled.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


def _empty_codes(layer: Any, weight: Any) -> Any:
    """Codes of a 4-bit layer, with a QuantState of the right sizes.

    A plain parameter with the attributes of a Params4bit: a fake tensor cannot become one.
    """
    outputs, inputs, nested = layer.out_features, layer.in_features, weight.compress_statistics
    blocks = -(-inputs * outputs // BLOCK)
    make_state = bitsandbytes.functional.QuantState
    state = make_state(
        absmax=torch.empty(blocks, dtype=torch.uint8 if nested else torch.float32),
        shape=torch.Size((outputs, inputs)),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type=weight.quant_type,
        dtype=layer.compute_dtype,
    )
    if nested:
        state.nested, state.offset = True, torch.empty(())
        state.state2 = make_state(
            absmax=torch.empty(-(-blocks // NESTED_BLOCK)),
            code=torch.empty(256),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    codes: Any = nn.Parameter(torch.empty((-(-inputs * outputs // 2), 1), dtype=torch.uint8), requires_grad=False)
    codes.quant_state, codes.quant_type, codes.compress_statistics = state, weight.quant_type, nested
    layer.quant_state = state
    return codes
