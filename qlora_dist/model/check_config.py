"""Before any weight is read: config.json -> can this model be trained as configured? About one second, no memory.

The model is built on the meta device (shapes without storage) and run once with an attention function that only
records how it was called. So a family's behaviour is observed, not looked up in a list of names.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ..config.model_json import check_quantization_method
from ..config.names import AdaptedExperts, adapted_names
from ..config.quantization import BLOCK, Quantization
from ..data.tokenizer import first_line
from ..errors import UserError
from .attention import PROBE, Call, PackedDocuments, probing
from .experts import EXPERT_WEIGHTS, expert_matrices, linear_shape, stacked_experts
from .forward import decoder_layers, is_conv1d, linear_layers
from .pretrained import check_cpu_shapes, check_weight_files, load_whole_config
from .state_layers import num_apart, requires_calls, separate_documents, state_mixers
from .text_part import check_wrapper, text_config_of, text_part_of

log = logging.getLogger(__name__)

# accepted by every check here, and yet other than transformers' own in `make support`; the cause is not found
DIFFERENT = {"granitemoe_swa", "youtu"}
PACKABLE_LAYERS = {"full_attention", "sliding_attention"}
STATELESS_LAYERS = {"mlp", "moe"}  # each token by itself


@dataclass(frozen=True)
class ModelFacts:
    """What config.json specifies for a model that passed `check_config`."""

    linear_names: tuple[str, ...]  # every linear layer except the output head
    num_parameters: int  # tied weights counted once
    vocab_size: int = 0  # rows of the input embedding: larger token ids cannot be read


def check_config(
    name: str,
    *,
    revision: str | None = None,
    quantization: Quantization = "nf4",
    target_modules: str | tuple[str, ...] = "all-linear",
    experts: AdaptedExperts = "shared",
    row_tokens: int | None = None,
    device_type: str = "cuda",
    weights: str = "files",
) -> ModelFacts:
    """Raises UserError for a model that cannot be trained as configured: missing, pickled, not a causal language model,
    attention that cannot be packed, target modules that match nothing, rows longer than its position table, shapes
    that a CPU cannot dequantize, experts that cannot be quantized.
    """
    whole = load_whole_config(name, revision)
    config = text_config_of(whole)
    if weights == "files":
        check_weight_files(name)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        check_quantization_method(name, dict(stored))
    text_part_of(name, whole)
    model = build_on_meta(name, config)
    layers = linear_layers(model)
    adapted_names(tuple(layers), target_modules, experts, config.model_type)
    if experts == "all" and not stacked_experts(model):
        raise UserError(
            f"model.name {name}: lora.experts is all, but {config.model_type} has no stacked experts of the form "
            "that is held in 4 bits; set lora.experts=shared"
        )
    if experts == "all" and any(
        is_transposed for one in stacked_experts(model).values() for _, is_transposed in expert_matrices(one)
    ):
        raise UserError(
            f"model.name {name}: lora.experts is all, but {config.model_type} stores its experts' matrices (inputs, "
            "outputs), on which adapters are not supported; set lora.experts=shared"
        )
    if quantization != "none":
        _check_experts(name, model, quantization, device_type)
    if quantization in ("nf4", "fp4") and device_type == "cpu":
        check_cpu_shapes({key: _shape(layer)[1] for key, layer in layers.items()})
    text = config.get_text_config()
    _check_packing(name, model, text)
    max_positions = getattr(text, "max_position_embeddings", None)
    if row_tokens is not None and max_positions is not None and row_tokens > max_positions:
        _check_positions(name, model, row_tokens, max_positions)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, torch.Tensor)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelFacts(tuple(layers), num_parameters, embedding.weight.shape[0])


def build_on_meta(name: str, config: PretrainedConfig) -> PreTrainedModel:
    """The model without storage. Raises UserError when the config does not describe a causal language model."""
    check_wrapper(name, config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation=PROBE, dtype=torch.bfloat16, trust_remote_code=False
            )
            return model.eval()  # some families skip layers at random in training
    except KeyError as error:
        if PROBE not in str(error):
            raise _not_trainable(name, config, f"{error} is not known") from None
        reason = "its attention is a class of its own, which cannot be replaced by packed attention"
        raise _not_trainable(name, config, reason) from None
    except Exception as error:  # a family's code on values that it does not expect
        raise _not_trainable(name, config, first_line(error)[:200]) from None


def _not_trainable(name: str, config: PretrainedConfig, reason: str) -> UserError:
    return UserError(
        f"model.name {name}: {config.model_type} cannot be trained ({reason}); expected a decoder-only causal "
        "language model from transformers whose attention can be replaced"
    )


def _shape(layer: torch.nn.Module) -> tuple[int, int]:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    first, second = weight.shape
    return (second, first) if is_conv1d(layer) else (first, second)


def _check_experts(name: str, model: PreTrainedModel, quantization: Quantization, device_type: str) -> None:
    """Matrices outside of linear layers and tables stay in 16 bits (convolutions, experts of an unknown form): refused
    where they are more than a few. Stacked experts of the form of `experts.stacked_experts` are quantized."""
    known = stacked_experts(model)
    packed = known if quantization in ("nf4", "fp4") else {}
    for key, experts in packed.items():
        _check_expert_shapes(name, key, experts, device_type)
        _check_router(name, model, key, len(experts.down_proj))
    loose = {
        f"{owner}.{key}": value
        for owner, module in model.named_modules()
        if not (isinstance(module, torch.nn.Linear | torch.nn.Embedding) or is_conv1d(module) or owner in packed)
        for key, value in module.named_parameters(recurse=False)
        if value.ndim >= 2
    }
    total = sum(value.numel() for value in model.parameters())
    num_loose = sum(value.numel() for value in loose.values())
    if num_loose <= total // 20:
        return
    largest = max(loose, key=lambda key: loose[key].numel())
    kind, reason = "matrices outside of linear layers", "which bitsandbytes does not quantize"
    if "expert" in largest:
        kind, reason = "stacked experts", f"which {quantization} does not cover" if known else "of an unsupported form"
    remedy = "model.quantization=nf4 or none" if known else "model.quantization=none"
    raise UserError(
        f"model.name {name}: {100 * num_loose // total} % of the weights are {kind} (such as {largest}), {reason}; "
        f"set {remedy}, or use a dense model"
    )


def _check_router(name: str, model: PreTrainedModel, key: str, num_experts: int) -> None:
    """Raises UserError for a router that is a linear layer: it would be quantized, and adapted by all-linear."""
    prefix = key.rpartition(".")[0]
    for part, module in model.get_submodule(prefix).named_modules():
        is_router = isinstance(module, torch.nn.Linear) and module.out_features == num_experts
        if is_router and not part.endswith("_proj"):
            raise UserError(
                f"model.name {name}: the router {prefix}.{part} is a linear layer, which would be quantized and "
                "adapted like any other; set model.quantization=none and lora.target_modules, or use another base model"
            )


def _check_expert_shapes(name: str, key: str, experts: Any, device_type: str) -> None:
    """Raises UserError for experts whose matrices are not a whole number of blocks."""
    is_transposed = bool(getattr(experts, "is_transposed", False))
    shapes = {f"{key}.{part}": linear_shape(getattr(experts, part), is_transposed) for part in EXPERT_WEIGHTS}
    for matrix, shape in shapes.items():
        if shape[1:].numel() % BLOCK:
            raise UserError(
                f"model.name {name}: an expert's matrix {matrix} has {shape[1:].numel():,} weights, not a multiple of "
                f"the quantization block size {BLOCK}; set model.quantization=none, or use another base model"
            )
    if device_type == "cpu":
        check_cpu_shapes({matrix: shape[2] for matrix, shape in shapes.items()})


def _check_positions(name: str, model: PreTrainedModel, row_tokens: int, max_positions: int) -> None:
    has_table = any(
        isinstance(module, torch.nn.Embedding) and module.num_embeddings in (max_positions, max_positions + 2)
        for module in model.modules()
        if module is not model.get_input_embeddings()
    )
    if has_table:
        raise UserError(
            f"data.row_tokens is {row_tokens:,}, but {name} has learned positions for {max_positions:,} tokens; "
            f"set data.row_tokens to at most {max_positions}"
        )
    log.warning(
        "data.row_tokens is %d, but %s was built for documents of up to %d tokens; longer ones are out of distribution",
        row_tokens,
        name,
        max_positions,
    )


def _check_packing(name: str, model: PreTrainedModel, text: PretrainedConfig) -> None:
    """Every layer must compute attention by the registered function, with document boundaries and without a mask."""
    advice = "this family cannot be trained on packed rows; use another base model"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise UserError(
            f"model.name {name}: its config sets use_bidirectional_attention: tokens see what follows them, and the "
            "next token cannot be learned; use a causal language model"
        )
    separate_documents(model)
    kinds = list(getattr(text, "layer_types", None) or ())
    if strange := _carriers(model, kinds):
        # what is chosen by blocks or by content could be packed, what is recurrent carries state across documents
        chooses = any(part in kind for kind in strange for part in ("chunked", "sparse", "index", "compressed"))
        why = (
            "choose the tokens that they attend to in a way that packed attention does not"
            if chooses
            else "carry state from one packed document into the next by code that is not known here"
        )
        raise UserError(
            f"model.name {name}: {text.model_type} has layers of type {', '.join(strange)}, which {why}; {advice}"
        )
    if text.model_type in DIFFERENT:
        raise UserError(
            f"model.name {name}: loss, logits or gradients of {text.model_type} with an adapter have been found to "
            "differ from those of transformers' own model; use another base model"
        )
    if not model._supports_flash_attn:
        raise UserError(
            f"model.name {name}: {text.model_type} puts more into its attention mask than boundaries and windows can "
            f"express (transformers has no flash attention for it); {advice}"
        )
    within = f"{model.base_model_prefix}." if model.base_model is not model else ""
    idle = {key for key in linear_layers(model) if key.startswith(within)}
    calls = _probe(name, model, idle)
    if calls is None:
        return  # part of it cannot run without storage: `check_head` repeats the test on the loaded model
    if not all(call.is_causal for call in calls):
        raise UserError(
            f"model.name {name}: {text.model_type} is not causal: in its attention tokens see what follows them, and "
            "the next token cannot be learned; use a causal language model"
        )
    if idle:
        raise UserError(
            f"model.name {name}: {len(idle)} linear layers of {text.model_type} take no part in reading text (such as "
            f"{min(idle)}): it is made to be run with another model beside it; use a causal language model"
        )
    # "hybrid" layers have attention beside a layer with state
    attending = [kind for kind in kinds if kind in PACKABLE_LAYERS or kind.startswith("hybrid")]
    num_layers = len(attending) if kinds else text.num_hidden_layers
    good = [call for call in calls if call.has_documents and not call.has_mask]
    if len(good) != num_layers:
        raise UserError(
            f"model.name {name}: {len(good)} of {num_layers} layers of {text.model_type} use the boundaries of packed "
            f"documents; {advice}"
        )
    if num_apart(model) < len(state_mixers(model)):
        raise UserError(
            f"model.name {name}: only {num_apart(model)} of {len(state_mixers(model))} layers of {text.model_type} "
            f"with state call functions that can be given borders of documents; {advice}"
        )
    if kinds and [kind == "sliding_attention" for kind in attending] != [
        call.sliding_window is not None for call in good
    ]:
        raise UserError(
            f"model.name {name}: {text.model_type} does not pass its sliding windows to attention; {advice}"
        )


def _carriers(model: PreTrainedModel, kinds: list[str]) -> list[str]:
    """Kinds of layers beside attention in which no mixer was found whose functions can be given borders."""
    layers = decoder_layers(model)
    unknown = {
        kind
        for index, kind in enumerate(kinds)
        if kind not in PACKABLE_LAYERS | STATELESS_LAYERS
        and (len(layers) != len(kinds) or not state_mixers(layers[index]))
    }
    return sorted(unknown)


def _probe(name: str, model: PreTrainedModel, idle: set[str]) -> list[Call] | None:
    """How attention was called; None where the model does not run without storage. Takes the linear layers that were
    called out of `idle`."""
    tokens = torch.zeros(1, 4, dtype=torch.int64, device="meta")
    keywords: dict[str, Any] = {
        "input_ids": tokens,
        "position_ids": tokens,
        "use_cache": False,
        "packed": PackedDocuments("sdpa", (2, 2), torch.zeros(3, dtype=torch.int32, device="meta"), 2),
    }
    hooks = [
        layer.register_forward_pre_hook(lambda *_, key=key: idle.discard(key))
        for key, layer in linear_layers(model).items()
    ]
    with probing() as calls, requires_calls(model, f"model.name {name}"), torch.no_grad():
        try:
            model.base_model(**keywords)
        except (RuntimeError, NotImplementedError) as error:
            log.debug("packing of %s was not probed: %s", type(model).__name__, error)
            return None
        except Exception as error:  # a family that needs more than tokens
            raise UserError(
                f"{type(model).__name__} does not read text alone ({first_line(error)[:200]}); use another base model"
            ) from None
        finally:
            for hook in hooks:
                hook.remove()
    return calls
