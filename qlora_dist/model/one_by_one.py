"""A base of which only the weights in use are in memory: to change it, write it, and run it, however large it is.

open_base           files -> the names of its weights, each of which is read when it is asked for
run_layer_by_layer  its logits: embedding and head stay, a decoder layer is there while it runs

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError
from ..progress import track
from .attention import disable_cudnn_attention
from .forward import decoder_layers
from .load import load_base, open_source, set_generation
from .pretrained import INFERENCE, check_weight_files, find_text_part, load_config
from .weights import stream
from .weights.quantize import Range

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
ReadWeight = Callable[[str], Tensor]


@dataclass(frozen=True)
class OpenBase:
    """A base in 16 bits (or its files' type), whose weights are read one by one."""

    model: PreTrainedModel  # without storage, unless transformers must convert the files
    tied: dict[str, str]  # names that are another one's weight
    parameters: frozenset[str]  # the names that are no buffer's
    read: ReadWeight

    def weight(self, name: str) -> Tensor:
        """A whole weight or persistent buffer on the CPU, in the type of the model. Raises UserError for one that is
        not finite."""
        name = self.tied.get(name, name)
        tensor = self.read(name)
        if not is_finite(tensor, is_buffer=name not in self.parameters):
            raise UserError(
                f"model.name {self.model.name_or_path}: {name} has values that are NaN or infinite in {tensor.dtype}: "
                "every output would be. Get the files again"
            )
        return tensor


def is_finite(tensor: Tensor, is_buffer: bool = False) -> bool:
    """Whether no value is NaN or infinite; of a buffer, which may be a mask, -inf is none."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    part = tensor.float() if tensor.dtype.itemsize < 2 else tensor
    # both pass a NaN on, and need no temporary memory
    return bool((part.max().clamp(min=0) if is_buffer else torch.linalg.vector_norm(part, torch.inf)).isfinite())


def open_base(name: str, revision: str | None = None, dtype: torch.dtype | None = None) -> OpenBase:
    """The weights of a model that is not quantized, in `dtype` (None: the type that its config names).

    Files that transformers must convert are loaded whole, which is logged. Raises UserError as `load_base`.
    """
    config: Any = load_config(name, revision)
    if dtype is None:
        stored = getattr(config, "dtype", None) or torch.float32
        dtype = stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored))
    check_weight_files(name)
    skeleton = stream.build_skeleton(config, dtype=dtype, attention=None, four_bit=None)
    model = skeleton.model.eval()
    model.text_part = find_text_part(name, revision)
    source = open_source(name, revision, skeleton, "files", 0, CPU)
    if source is None:
        loaded: Any = load_base(
            name,
            revision=revision,
            quantization="none",
            double_quant=False,
            compute_dtype=dtype,
            attention=INFERENCE,
            device=CPU,
        )
        state = loaded.state_dict()
        return OpenBase(loaded, dict(loaded.all_tied_weights_keys), _parameters(loaded), state.__getitem__)
    needless = stream.resolve_ties(model, source)
    stream.check_complete(name, model, source, needless)
    set_generation(model, name, revision)
    state, files = model.state_dict(), source

    def read(key: str) -> Tensor:
        if key not in files.names:
            return state[key]  # a buffer that the model has computed
        whole = torch.empty(state[key].shape, dtype=state[key].dtype)
        stream.read_plain(whole.view(-1), files, key, Range(0, whole.numel()))
        return whole

    return OpenBase(model, dict(model.all_tied_weights_keys), _parameters(model), read)


def _parameters(model: nn.Module) -> frozenset[str]:
    return frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))


# --- running ----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def run_layer_by_layer(
    base: OpenBase, weight: ReadWeight, samples: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """(T, V) fp32 logits on the CPU for each sample, of the model `base` with the weights that `weight` returns.

    Memory: embedding, head and one decoder layer. Each weight is asked for once.
    """
    disable_cudnn_attention(device)
    model: Any = stream.build_skeleton(base.model.config, dtype=dtype, attention=None, four_bit=None).model.eval()
    for target in set(model.all_tied_weights_keys) - set(base.tied):  # tied by the config, but not in the files
        model.all_tied_weights_keys.pop(target)
    layers = decoder_layers(model)
    prefixes = {module: f"{prefix}." if prefix else "" for prefix, module in model.named_modules()}
    within = {module for layer in layers for module in layer.modules()}
    placed: dict[str, nn.Parameter] = {}

    def place(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for attribute, parameter in module._parameters.items():
                if parameter is None:
                    continue
                name = base.tied.get(prefixes[module] + attribute, prefixes[module] + attribute)
                if name not in placed:
                    placed[name] = nn.Parameter(weight(name).to(device, parameter.dtype), requires_grad=False)
                module._parameters[attribute] = placed[name]
            for attribute, buffer in module._buffers.items():
                if buffer is None:
                    continue
                if attribute not in module._non_persistent_buffers_set:
                    buffer = weight(prefixes[module] + attribute).to(buffer.dtype)
                module._buffers[attribute] = buffer.to(device)

    def drop(modules: Iterable[nn.Module]) -> None:
        for module in modules:
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    placed.pop(prefixes[module] + attribute, None)
                    module._parameters[attribute] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    place(module for module in prefixes if module not in within)
    with ExitStack() as stack, track("measuring layer", len(layers)) as task:

        def enter(layer: nn.Module, *_: Any) -> None:
            place(layer.modules())

        def leave(layer: nn.Module, *_: Any) -> None:
            drop(layer.modules())
            task.add()

        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(enter).remove)
            stack.callback(layer.register_forward_hook(leave).remove)
        logits = model(**_padded(samples, device), use_cache=False).logits
    return [one[: len(ids)].float().cpu() for one, ids in zip(logits, samples, strict=True)]


def _padded(samples: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """Samples of different lengths as one batch, padded on the right, where no causal model looks."""
    longest = max(map(len, samples))
    ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in samples], device=device)
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in samples], device=device)
    return {"input_ids": ids, "attention_mask": mask}
