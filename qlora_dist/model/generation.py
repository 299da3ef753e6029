"""Token ids in, token ids out: batched, streamed, deterministic. Also: a weight quantized and dequantized."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from ..config.quantization import BLOCK, Quantization
from .bitsandbytes_import import bitsandbytes
from .forward import computing_device, unwrap


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy: the same prompt always gives the same text."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Sequence[int] = (),
    stop_texts: Sequence[str] = (),
    on_text: Callable[[str], None] | None = None,
) -> list[list[int]]:
    """New tokens per prompt, without the prompt, cut before the first stop token.

    Prompts of different lengths are left-padded and masked: prompts in a batch do not see each other.
    `on_text` receives the text piece by piece as it is generated (one prompt only). Over a sharded base all ranks call
    this together, each with prompts of its own: a rank that is done goes on computing until the last one is.
    """
    assert on_text is None or len(prompts) == 1
    base = unwrap(model)
    device, is_sharded = computing_device(base), getattr(base, "sharded", None) is not None
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (stop_ids[0] if stop_ids else 0)
    ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts], device=device)
    chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling.temperature > 0:
        chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if stop_texts:
        chosen |= {"stop_strings": list(stop_texts), "tokenizer": tokenizer}
    if on_text is not None:
        chosen["streamer"] = _Streamer(tokenizer, on_text)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.manual_seed(sampling.seed)
        # FSDP2 keeps what it gathers into, which inference mode would make unusable outside of it
        stack.enter_context(torch.no_grad() if is_sharded else torch.inference_mode())
        out = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=list(stop_ids) or None,
            use_cache=True,
            synced_gpus=is_sharded,
            **chosen,
        )
    return [_until_stop(row, set(stop_ids)) for row in out[:, longest:].tolist()]


def _until_stop(ids: list[int], stop_ids: set[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in stop_ids:
            return ids[:index]
    return ids


def stop_ids_of(model: nn.Module) -> list[int]:
    """The tokens at which the model's own generation config ends a text."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if own is None else own if isinstance(own, list) else [own]


def save_generation_config(model: nn.Module, folder: Path, stop_ids: Sequence[int]) -> None:
    """Writes generation_config.json: the model's own, ending a text at `stop_ids`."""
    config: Any = copy.deepcopy(getattr(model, "generation_config", None)) or GenerationConfig()
    config.eos_token_id = list(stop_ids)
    config._from_model_config = False  # else transformers reads the end token from config.json again
    # not save_pretrained: it refuses what many published models have, a temperature without do_sample
    config.to_json_file(folder / "generation_config.json")


class _Streamer(TextStreamer):
    """Passes text on as soon as no later token can change it."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def quantized_and_back(
    weight: Tensor, quantization: Quantization, double_quant: bool, compute_dtype: torch.dtype
) -> Tensor:
    """(O, I) fp32: the weight that a base quantized by `load_base` computes with.

    `weight` is the original in its stored type. Checks nothing: shapes were checked when the run was trained.
    """
    functional = bitsandbytes.functional
    rounded = weight.to(compute_dtype).contiguous()  # load_base rounds to the compute type first
    if quantization == "none":
        return rounded.float()
    if quantization == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(rounded.half())
        return functional.int8_vectorwise_dequant(codes, scales).float()
    packed, state = functional.quantize_4bit(
        rounded, blocksize=BLOCK, compress_statistics=double_quant, quant_type=quantization
    )
    return functional.dequantize_4bit(packed, state).float()
