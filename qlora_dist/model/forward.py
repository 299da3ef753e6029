"""Running the base: packed batches -> hidden states, the head, recomputation, and finding its layers.

Legend: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..data.packing import Batch
from ..errors import UserError
from .attention import PACKED, documents_of
from .bitsandbytes_import import bitsandbytes
from .dropout import RowDropout
from .loss import OutputHead
from .rope import scaled_beyond
from .state_layers import lengths_to_check, requires_calls
from .text_part import TextPart

WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside PEFT and data-parallel wrappers."""
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.module
    return inner


def text_part(model: nn.Module) -> TextPart | None:
    """Where the base is in the wrapper that it is the text model of; None for any other base."""
    part: TextPart | None = getattr(unwrap(model), "text_part", None)
    return part


def strip_wrappers(name: str) -> str:
    """A parameter's name without what compilers, data parallelism and checkpointing insert."""
    for wrapper in WRAPPERS:
        name = name.replace(f".{wrapper}", ".").removeprefix(wrapper)
    return name


def plain_name(name: str) -> str:
    """A parameter's name in the base alone, without wrappers and PEFT."""
    # PEFT wraps experts once for each of their adapted weights
    return re.sub(r"(\.base_layer)+\.", ".", strip_wrappers(name).removeprefix("base_model.model."))


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """(T, H): final normed hidden states of a packed batch; no document sees another."""
    base = unwrap(model)
    _require_packed(base)
    output = base.base_model(**_packed_inputs(base, batch))
    hidden: Tensor = output.last_hidden_state.squeeze(0)
    return hidden


def _packed_inputs(base: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "packed": documents_of(batch, str(base.packed_backend)),
    }


def _require_packed(base: PreTrainedModel) -> None:
    if base.config._attn_implementation != PACKED:
        raise RuntimeError("this model was loaded for generation; packed batches need load_base(attention='auto')")


def output_head(model: nn.Module) -> OutputHead:
    """The projection to logits, with the transforms that some families apply to it. `check_head` verifies it."""
    base = unwrap(model)
    head = base.get_output_embeddings()
    if head is None:
        raise UserError(f"{type(base).__name__} has no output head over the vocabulary: not a causal language model")
    text = base.config.get_text_config()
    divisor = getattr(text, "logits_scaling", None)  # Granite divides
    scale = getattr(text, "logit_scale", None) if divisor is None else 1.0 / divisor  # Cohere multiplies
    softcap = getattr(text, "final_logit_softcapping", None)
    return OutputHead(head.weight, getattr(head, "bias", None), softcap, 1.0 if scale is None else float(scale))


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor on the device, for as long as the caller keeps it; any other tensor unchanged."""
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    local = tensor.to_local().to(mesh.device_type)  # an offloaded part is in host memory
    sharded = DTensor.from_local(
        local, mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return sharded.full_tensor()


def gathered_head(head: OutputHead) -> OutputHead:
    """The output head with its whole weight, to be dropped after one loss."""
    return replace(head, weight=gathered(head.weight)) if isinstance(head.weight, DTensor) else head


@torch.no_grad()
def check_head(model: nn.Module) -> None:
    """Checks on 12 tokens that our head gives the loaded model's own logits, that packed documents stay separate, and
    that the base's forward pass is not random.

    Raises UserError for a family that transforms its logits, or its attention, in an unsupported way.
    """
    base = unwrap(model)
    _require_packed(base)
    device = computing_device(base)
    vocabulary = base.config.get_text_config().vocab_size
    tokens = torch.tensor([(7 + 13 * i) % vocabulary for i in range(12)], device=device)
    both, second = packed_documents(tokens, (8, 4)), packed_documents(tokens[8:], (4,))
    # the first document counts as long: where frequencies depend on length, it must not decide for the second
    with evaluation_mode(model), scaled_beyond(base, 6):
        hidden, hidden_alone = hidden_states(model, both), hidden_states(model, second)
        own = base(**_packed_inputs(base, both)).logits[0].float()
        ours = gathered_head(output_head(model)).logits(hidden).float()
    with evaluation_mode(model), scaled_beyond(base, 6), _as_stored(base):
        hidden_as_stored = hidden_states(model, second)
    family = type(base).__name__
    if differ(ours, own):
        raise UserError(
            f"{family} computes its logits in an unsupported way (they differ from its head's by up to "
            f"{(ours - own).abs().max():.3g}); training it would minimize the wrong loss"
        )
    if differ(hidden[8:].float(), hidden_alone.float()):
        raise UserError(
            f"{family} lets a packed document see the one before it; this family cannot be trained on packed rows"
        )
    if differ(hidden_alone.float(), hidden_as_stored.float()) or is_random(model, second):
        raise UserError(
            f"{family} is random in training (dropout, jitter or sampling), and it cannot be switched off without "
            "another result; the frozen base must always compute the same; use another base model"
        )
    _check_state(base, model)


def _check_state(base: PreTrainedModel, model: nn.Module) -> None:
    """Documents longer than every convolution and chunk: packed = alone, in training as in evaluation, by projections
    that are called as modules. Raises UserError."""
    lengths = lengths_to_check(base)
    if lengths is None:
        return
    vocabulary = base.config.get_text_config().vocab_size
    tokens = (7 + 13 * torch.arange(sum(lengths), device=computing_device(base))) % vocabulary
    both = packed_documents(tokens, lengths)
    parts = [packed_documents(part, (len(part),)) for part in tokens.split(lengths)]
    family, tolerance = type(base).__name__, rounding(base)
    with evaluation_mode(model), requires_calls(base, family):
        hidden = hidden_states(model, both).float()
        alone = torch.cat([hidden_states(model, part) for part in parts]).float()
    with training_mode(model), requires_calls(base, family):
        trained = hidden_states(model, both).float()
    if differ(hidden, alone, tolerance):
        raise UserError(
            f"{family} lets the state of a layer pass from a packed document into the next (hidden states differ by "
            f"up to {(hidden - alone).abs().max():.3g}); this family cannot be trained on packed rows"
        )
    if differ(trained, hidden, tolerance):
        raise UserError(
            f"{family} computes otherwise in training than in evaluation (hidden states differ by up to "
            f"{(trained - hidden).abs().max():.3g}), which cannot be switched off; use another base model"
        )


def rounding(base: PreTrainedModel) -> float:
    """How far two orders of summation may differ, as a part of the largest value: the rounding error of sums of as many
    terms as the state and hidden sizes have, through all layers; at most that of 16 bits."""
    dtype = next(one.dtype for one in base.parameters() if one.is_floating_point())
    text = base.config.get_text_config()
    return min(0.03, 16 * torch.finfo(dtype).eps * text.hidden_size**0.5 * text.num_hidden_layers)


@contextmanager
def _as_stored(base: PreTrainedModel) -> Iterator[None]:
    """The dropout of the base's config is on again inside."""
    changed = [(owner, name, value, getattr(owner, name)) for owner, name, value in getattr(base, "switched_off", ())]
    for owner, name, value, _ in changed:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, _, current in changed:
            setattr(owner, name, current)


@torch.no_grad()
def is_random(model: nn.Module, batch: Batch) -> bool:
    """Whether the base in training mode draws random numbers that affect its hidden states. Adapters' dropout is off.

    Compared with itself, bit for bit. Kernels that sum in any order draw nothing: they are not what is looked for.
    """
    device = batch.input_ids.device
    with training_mode(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        before = _random_state(device)
        first = hidden_states(model, batch)
        is_drawn = any(not torch.equal(*pair) for pair in zip(before, _random_state(device), strict=True))
        second = hidden_states(model, batch)  # on every rank: sharded layers are gathered
    return is_drawn and not torch.equal(first, second)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def computing_device(base: PreTrainedModel) -> torch.device:
    """Where it computes: norms are there even when sharded matrices are kept in host memory."""
    return next(one.device for one in base.parameters() if not isinstance(one, DTensor))


def packed_documents(tokens: Tensor, lengths: tuple[int, ...]) -> Batch:
    """Documents without labels, for checks before the first step."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(tokens.device)
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(tokens.device)
    no_labels = torch.empty(0, dtype=torch.int64, device=tokens.device)
    return Batch(tokens[None], positions, boundaries, max(lengths), no_labels, no_labels, (), lengths, lengths)


def differ(left: Tensor, right: Tensor, tolerance: float = 0.03) -> bool:
    """Beyond what 16-bit rounding explains: a part of the largest value. A value that is not a number differs."""
    return not bool((left - right).abs().max() <= tolerance * right.abs().max().clamp_min(1e-3))


def decoder_layers(model: nn.Module) -> list[Any]:
    """The layers that can be recomputed, first to last."""
    return [module for module in unwrap(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def set_recompute(model: nn.Module, recompute: Literal["full", "none"] | int) -> None:
    """Gradient checkpointing of all, no, or the first N decoder layers.

    Non-reentrant: it works with a frozen embedding, keeps DDP's hooks in order and recomputes only what is needed: with
    `lora_forward`, not the last linear layer. Every byte that a layer could keep (attention output, queries, gate and
    up) saves about the same work, so whole layers are the unit, without the cost of a mode that filters operators.
    The last layers keep theirs: that is the memory that the backward pass frees first.
    """
    layers = decoder_layers(model)
    count = {"full": len(layers), "none": 0}.get(recompute, recompute) if isinstance(recompute, str) else recompute
    assert isinstance(count, int)
    if count > len(layers):
        raise UserError(
            f"memory.recompute is {count}, but the model has {len(layers)} layers; expected at most that, or full"
        )
    if recompute == "full" and not layers:
        raise UserError(f"{type(unwrap(model)).__name__} cannot recompute its layers; set memory.recompute=none")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < count
        # no random state is kept: dropout is a function of the row (`dropout`)
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


# --- finding layers ---------------------------------------------------------------------------------------------------


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer (plain, 4-bit, 8-bit, GPT-2's Conv1D) except the output head, by name."""
    head = unwrap(model).get_output_embeddings()
    return {name: module for name, module in unwrap(model).named_modules() if is_linear(module) and module is not head}


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def is_4bit(module: nn.Module) -> bool:
    return isinstance(module, bitsandbytes.nn.Linear4bit)


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is stored (inputs, outputs)."""
    return isinstance(module, Conv1D)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout and recomputation are off inside; every module's own mode is restored afterwards."""
    with _modes_restored(model):
        model.eval()
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """As in training, but for modules that are dropout: the base's are off, and adapters have one before them."""
    with _modes_restored(model):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout | RowDropout):
                module.eval()
        yield


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
