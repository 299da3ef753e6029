"""Loads the frozen base from its source into memory, quantizing it while reading."""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..cluster.shard_group import ShardGroup
from ..config.model_json import method_of
from ..config.quantization import Quantization
from ..data.tokenizer import expanded, first_line, where_to_read
from ..errors import UserError
from .attention import PACKED, disable_cudnn_attention, resolve_backend
from .base_weights import non_finite_tensor
from .bitsandbytes_import import bitsandbytes
from .experts import packed_experts
from .pretrained import (
    INFERENCE,
    attention_needs,
    check_weight_files,
    decoded_form,
    find_text_part,
    guard_cpu_layers,
    load_config,
    quantization_settings,
    switch_dropout_off,
)
from .rope import scale_by_document
from .state_layers import separate_documents
from .text_part import TextPart
from .weights import shard, stream
from .weights.cache_4bit import copied_from
from .weights.quantize import Losses
from .weights.sources import RandomSource, WeightSource, open_files

log = logging.getLogger(__name__)

Weights = Literal["files", "random"]


def load_base(
    name: str,
    *,
    revision: str | None = None,
    copy_of: str | None = None,
    quantization: Quantization,
    double_quant: bool,
    compute_dtype: torch.dtype,
    attention: str,
    device: torch.device,
    run_device: torch.device | None = None,
    attention_dtype: torch.dtype | None = None,
    weights: Weights = "files",
    seed: int = 0,
    shards: ShardGroup | None = None,
    offload: bool = False,
) -> PreTrainedModel:
    """The base on one device: quantized while it is read, the rest in `compute_dtype`, frozen, dropout off.

    Of a wrapper its text model. `copy_of` is the model that `name` is a 4-bit copy of: adapters are saved for that.
    `run_device` is where it is moved afterwards, if that is not `device`.
    `attention_dtype` is the type of the queries, if that is not `compute_dtype` (fp32 weights under autocast).
    `attention` is auto, flash, varlen or sdpa (packed batches, see `hidden_states`), or INFERENCE (generation).
    `weights` random needs only config.json and draws them from `seed`.
    With `shards` this rank holds only its part (see `weights.shard`), with `offload` in host memory.
    Norms, embeddings and head keep `compute_dtype`: an upcast to fp32 costs gigabytes and changes nothing measurable.
    Raises UserError when weights are missing, pickled, not finite or of a kind that cannot be quantized here.
    """
    config = load_config(name, revision)
    if weights == "files":
        check_weight_files(name)
    is_packed = attention != INFERENCE
    needs = attention_needs(config, attention_dtype or compute_dtype)
    backend = resolve_backend(attention, run_device or device, needs) if is_packed else ""
    if backend in ("sdpa", ""):
        disable_cudnn_attention(run_device or device)
    settings = quantization_settings(name, config, quantization, double_quant, compute_dtype)
    implementation = PACKED if is_packed else None
    part = find_text_part(name, revision)
    model = losses = None
    form = decoded_form(name, revision) if weights == "files" else None
    if quantization != "int8":
        skeleton = stream.build_skeleton(
            config, dtype=compute_dtype, attention=implementation, four_bit=settings.get("quantization_config")
        )
        skeleton.model.text_part = part  # type: ignore[assignment]
        source = open_source(name, revision, skeleton, weights, seed, device)
        model = None if source is None else _streamed(name, skeleton, source, device, shards, offload)
        losses, skeleton.losses = skeleton.losses, None  # what is read again later does not count
        if model is None:
            _check_convertible(name, skeleton.model, part, form)
        else:
            set_generation(model, name, revision)
    else:
        _check_int8(name, weights, form, part)
    if model is None and shards is not None:
        raise UserError(
            f"model.name {name}: strategy fsdp reads each rank's part of the files, which works neither for int8 nor "
            "for families whose files transformers must convert; use strategy ddp"
        )
    if model is None:
        model = _from_pretrained(name, revision, settings, compute_dtype, implementation, device)
    if copy_of is not None and copy_of != name:
        part = find_text_part(copy_of, revision)
    if part is not None:
        log.info("model.name %s: %s", copy_of or name, part.describe())
    model.text_part = part  # type: ignore[assignment]
    model.requantized = _requantized(name, losses, form, quantization)  # type: ignore[assignment]
    _require_finite(model, name, compute_dtype)
    return _finalize(model, backend, is_packed, compute_dtype, device)


def _streamed(
    name: str,
    skeleton: stream.Skeleton,
    source: WeightSource,
    device: torch.device,
    shards: ShardGroup | None,
    offload: bool,
) -> PreTrainedModel:
    tied = stream.resolve_ties(skeleton.model, source)
    stream.check_complete(name, skeleton.model, source, tied)
    if shards is None:
        return stream.fill(skeleton, source, tied, device)
    return shard.load_sharded(skeleton, source, tied, shards, offload)


def _check_int8(name: str, weights: Weights, form: dict[str, Any] | None, part: TextPart | None) -> None:
    """Raises UserError for what transformers, which reads int8 bases, would not load as it is loaded here."""
    if weights == "random":
        raise UserError("model.weights is random, which int8 does not support; use nf4, fp4 or none")
    if form is not None:
        raise UserError(
            f"model.name {name}: its files are {method_of(form)}, and int8 bases are read by transformers, which does "
            "not quantize these again; use nf4, fp4 or none"
        )
    if part is not None:
        raise UserError(
            f"model.name {name}: model.quantization int8 is read by transformers, with all towers; use nf4, fp4 or none"
        )


def _requantized(
    name: str, losses: Losses | None, form: dict[str, Any] | None, quantization: Quantization
) -> str | None:
    """What became of weights that the files hold in fp8 or MXFP4, in words; None for other files."""
    if form is None or losses is None:
        said = copied_from(name)
    elif quantization == "none":
        said = f"its {method_of(form)} files were decoded"
    else:
        said = losses.describe(method_of(form), quantization)
    if said is not None:
        log.info("model.name %s: %s", name, said)
    return said


def _check_convertible(name: str, model: PreTrainedModel, part: TextPart | None, form: dict[str, Any] | None) -> None:
    """Raises UserError for what transformers, which converts files while it reads them, would load otherwise than here:
    wrappers with all towers, experts in 16 bits, files that are decoded."""
    reason = ""
    if form is not None:
        raise UserError(
            f"model.name {name}: its {method_of(form)} files must be converted while they are read, beyond renaming "
            "and stacking, which is done for plain files only; use the 16-bit model instead"
        )
    if part is not None:
        reason = "is not done for the text model of a wrapper"
    elif packed_experts(model):
        reason = "leaves stacked experts in 16 bits"
    if reason:
        raise UserError(
            f"model.name {name}: its files must be converted while they are read, which {reason}; convert them once "
            "(transformers' from_pretrained, then save_pretrained)"
            + (", or set model.quantization=none" if part is None else "")
        )


def open_source(
    name: str,
    revision: str | None,
    skeleton: stream.Skeleton,
    weights: Weights,
    seed: int,
    device: torch.device,
) -> WeightSource | None:
    """Where the weights come from; None, which is logged, if transformers must convert them."""
    if weights == "random":
        return RandomSource(skeleton.model, skeleton.model.config, seed, device)
    source, reason = stream.match_files(skeleton, open_files(name, revision))
    if source is None:
        log.info("weights are loaded by transformers, not streamed: %s", reason)
    return source


def _from_pretrained(
    name: str,
    revision: str | None,
    settings: dict[str, Any],
    compute_dtype: torch.dtype,
    implementation: str | None,
    device: torch.device,
) -> PreTrainedModel:
    """Loads through transformers: 8-bit bases, and families whose files must be converted."""
    open_files(name, revision)  # of any form: transformers ends in a traceback for damaged ones
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            expanded(name),
            **where_to_read(name, revision),
            **settings,
            dtype=compute_dtype,
            device_map={"": device},
            use_safetensors=True,
            attn_implementation=implementation,
            output_loading_info=True,
        )
    except OSError as error:
        reason = "there is no *.safetensors file" if "safetensors" in str(error) else first_line(error)
        raise UserError(f"model.name {name}: weights cannot be read ({reason})") from None
    model, info = loaded
    missing = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if missing:
        raise stream.incomplete(name, missing)
    return model


def _require_finite(model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
    if (bad := non_finite_tensor(model)) is not None:
        raise UserError(
            f"model.name {name}: {bad} has values that are NaN or infinite in {dtype}: every output would be. Get the "
            "files again, choose a model.compute_dtype that holds its values, or mend its config.json (rope_theta)"
        )


def _finalize(
    model: Any, backend: str, is_packed: bool, compute_dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Settings of every base, however it was loaded."""
    model.requires_grad_(False)
    model.config.use_cache = not is_packed
    model.packed_backend = backend
    if is_packed:
        model.switched_off = switch_dropout_off(model)
        scale_by_document(model, model.base_model)
        separate_documents(model)
    else:
        model.eval()
    if device.type == "cpu":
        guard_cpu_layers(model)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # a checkpoint saved in 4 bits comes with the compute type it was saved with
            module.compute_dtype, module.compute_type_is_set = compute_dtype, True
    if is_packed and packed_experts(model):
        log.info("experts are in 4 bits; the router is frozen, and its auxiliary loss is not part of the loss")
    return model


def set_generation(model: PreTrainedModel, name: str, revision: str | None) -> None:
    """generation_config.json if there is one; else the model keeps what config.json specifies."""
    model.name_or_path = expanded(name)
    model.config.name_or_path = expanded(name)
    source = where_to_read(name, revision)
    source.pop("trust_remote_code")
    with contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(expanded(name), **source)
