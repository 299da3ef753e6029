"""Adapter + base -> an ordinary 16-bit model that needs neither PEFT nor bitsandbytes.

    onto base          W + delta             the original weights: best for serving in 16 bit
    onto dequantized   dequant(NF4(W)) + delta   what was trained: equals the run's own outputs

A base that is a wrapper (with towers for images or sound) is written as a wrapper: its files again, with a new text
model, every other tensor bit for bit. With `text_only` the text model alone is written.

Each tensor is computed in fp32 and rounded once. The two differ by the quantization error; for some models that is
larger than what was learned, so the merged model's largest logit difference from the trained one is measured and
reported.

Legend: O outputs, I inputs of a layer, r rank.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..cluster.world import own_device
from ..errors import UserError
from ..files import folder_aside, format_bytes
from ..model import (
    INFERENCE,
    is_conv1d,
    linear_layers,
    load_base,
    load_config,
    lora_files,
    non_finite_tensor,
    quantized_and_back,
    stacked_experts,
    text_part,
    write_errors,
)
from ..model.pretrained import find_text_part
from ..model.text_part import TextPart
from ..model.weights.wrapper_files import write_wrapper
from ..progress import each
from ..train.prompt_format import PromptFormat, export_tokenizer
from .generate import find_template
from .outputs import check_output_folder
from .trained import Trained, find_trained, first_documents, load_trained

log = logging.getLogger(__name__)

Target = Literal["base", "dequantized"]
NUM_SAMPLES, SAMPLE_TOKENS = 4, 64
CHEAP_PARAMETERS = 2_000_000_000  # up to this size the other target is measured too
_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and then it sleeps.",
    "In the beginning there was nothing but a small town near the sea.",
    "def add(a, b):\n    return a + b\n",
    "Question: what is the capital of France? Answer: it is",
)


@dataclass(frozen=True)
class MergeReport:
    """Where the model is, and the largest difference of its logits from those of the trained model."""

    folder: Path
    onto: Target
    gaps: dict[str, float]  # by target; the other target only where it was measured
    logit_range: float  # largest magnitude of the trained model's logits, to compare with


def merge(
    path: str | Path,
    out: str | Path,
    *,
    onto: Target = "base",
    base: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    compare: bool | None = None,
    max_shard_size: str = "5GB",
    text_only: bool = False,
) -> MergeReport:
    """Merges the adapter of a run directory or adapter folder and writes a model folder with its tokenizer.

    `out` appears complete or not at all. `base` is the original 16-bit model if it has moved. `compare` also measures
    the other target (None: only for small models). Holds one copy of the 16-bit model at a time.
    Raises UserError for an output that exists, a base in 4 bits, an adapter of another kind.
    """
    out = check_output_folder("OUT", out)
    trained = find_trained(path, base)
    if trained.adapter is None:
        raise UserError(f"{path}: a full fine-tuning run has no adapter to merge; {trained.model.name} is its model")
    if onto not in ("base", "dequantized"):
        raise UserError(f"--onto {onto}: expected base or dequantized")
    _check_original(trained.model.name, load_config(trained.model.name, trained.model.revision))
    adapter = Adapter.read(trained.adapter, find_text_part(trained.model.name, trained.model.revision))
    device = device or own_device()
    samples = sample_ids(trained)
    reference = _logits(load_trained(trained, device), samples)

    model = _merged(trained, adapter, onto, dtype)
    gaps: dict[str, float] = {onto: _gap(model, samples, reference)}
    if not math.isfinite(gaps[onto]):
        raise UserError(
            f"{path}: the logits of the trained or the merged model are not finite, though all weights are: they are "
            f"too large for {trained.model.compute_dtype} or {dtype}. Use --dtype float32, or another adapter. Nothing "
            "was written"
        )
    _write(model, trained, out, max_shard_size, text_only)
    if compare or (compare is None and _num_parameters(model) <= CHEAP_PARAMETERS):
        other: Target = "dequantized" if onto == "base" else "base"
        del model
        gaps[other] = _gap(_merged(trained, adapter, other, dtype), samples, reference)
    return MergeReport(out, onto, gaps, max(float(one.abs().max()) for one in reference))


def describe(report: MergeReport) -> str:
    """One paragraph for the terminal."""
    text = (
        f"{report.folder}: merged onto {report.onto}; its logits differ from those of the trained model by up to "
        f"{report.gaps[report.onto]:.4g} (their largest magnitude is {report.logit_range:.4g})"
    )
    other = next((target for target in report.gaps if target != report.onto), None)
    if other is None:
        return text
    smaller = min(report.gaps, key=lambda target: report.gaps[target])
    return f"{text}; onto {other} it would be {report.gaps[other]:.4g}: {smaller} is closer to what was trained"


# --- the arithmetic ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA adapter as plain tensors."""

    layers: dict[str, lora_files.Factors]  # by the layer's name in the base
    scale: float

    @classmethod
    def read(cls, folder: Path, part: TextPart | None) -> Adapter:
        config, layers = lora_files.read_adapter(folder, part)
        return cls(layers, lora_files.scale_of(config))

    def on(self, name: str, weight: Tensor) -> Tensor:
        """(O, I) fp32: the layer's weight with the adapter merged."""
        factors, device = self.layers[name], weight.device
        changed = weight + self.scale * (factors.b.to(device) @ factors.a.to(device))
        if factors.magnitude is not None:
            changed *= (factors.magnitude.to(device) / changed.norm(dim=1))[:, None]
        return changed


@torch.no_grad()
def _merged(trained: Trained, adapter: Adapter, onto: Target, dtype: torch.dtype) -> Any:
    """The base in its stored type with every adapted weight replaced, then rounded to `dtype`. On the CPU.

    Onto dequantized, weights that were quantized but not adapted are replaced too: experts, most of all.
    """
    settings = trained.model
    config = load_config(settings.name, settings.revision)
    stored = getattr(config, "dtype", None) or torch.float32
    model: Any = load_base(
        settings.name,
        revision=settings.revision,
        quantization="none",
        double_quant=False,
        compute_dtype=stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored)),
        attention=INFERENCE,
        device=torch.device("cpu"),
    )
    layers: dict[str, Any] = linear_layers(model)
    unknown = sorted(adapter.layers.keys() - layers.keys())
    if unknown:
        raise UserError(f"the adapter has weights for {unknown[0]}, which is not a linear layer of {settings.name}")
    for name, layer in each(layers.items(), "merging layer"):
        factors = adapter.layers.get(name)
        if factors is None and onto == "base":
            continue
        weight = layer.weight.data.T if is_conv1d(layer) else layer.weight.data
        if factors is not None and weight.shape != (len(factors.b), factors.a.shape[1]):
            raise UserError(f"the adapter's weights for {name} do not fit {settings.name}, where it is {weight.shape}")
        original = _dequantized(weight, settings) if onto == "dequantized" else weight.float()
        changed = (original if factors is None else adapter.on(name, original)).to(dtype)
        layer.weight.data = changed.T.contiguous() if is_conv1d(layer) else changed
    if onto == "dequantized" and settings.quantization in ("nf4", "fp4"):
        for experts in stacked_experts(model).values():
            for parameter in experts.parameters(recurse=False):
                matrices = torch.empty(parameter.shape, dtype=dtype)
                for matrix, stored_matrix in zip(matrices, parameter.data, strict=True):
                    matrix.copy_(_dequantized(stored_matrix, settings))
                parameter.data = matrices
    model.to(dtype)
    model.config.dtype = dtype
    if (bad := non_finite_tensor(model)) is not None:
        raise UserError(
            f"{bad} is not finite when it is merged in {dtype}, though base and adapter are: its values are too large. "
            "Use --dtype bfloat16 or float32; if it fails there too, the adapter has diverged. Nothing was written"
        )
    return model.eval()


def _dequantized(weight: Tensor, settings: Any) -> Tensor:
    """(O, I) fp32: what was trained with."""
    compute_dtype = getattr(torch, settings.compute_dtype)
    return quantized_and_back(weight, settings.quantization, settings.double_quant, compute_dtype)


# --- measuring --------------------------------------------------------------------------------------------------------


def sample_ids(trained: Trained) -> list[list[int]]:
    """The beginnings of the first training documents, or fixed sentences if the data cannot be read."""
    tokenizer = trained.load_tokenizer()
    if trained.data is not None:
        try:
            # the memory map stays readable after its temporary folder is deleted
            documents = first_documents(trained.data, tokenizer, NUM_SAMPLES, SAMPLE_TOKENS)
            return [documents[index].input_ids.tolist() for index in range(min(NUM_SAMPLES, len(documents)))]
        except UserError as error:
            log.info("the training data cannot be read (%s): fixed sentences are used instead", error)
    return [tokenizer(text)["input_ids"][:SAMPLE_TOKENS] for text in _SENTENCES]


@torch.inference_mode()
def _logits(model: Any, samples: Sequence[Sequence[int]]) -> list[Tensor]:
    """(T, V) fp32 on the CPU for each sample."""
    device = next(model.parameters()).device
    return [model(torch.tensor([list(ids)], device=device)).logits[0].float().cpu() for ids in samples]


def _gap(model: Any, samples: Sequence[Sequence[int]], reference: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(_logits(model, samples), reference, strict=True))


def _num_parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- writing ----------------------------------------------------------------------------------------------------------


def _check_original(name: str, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{name} holds quantized weights; name the original 16-bit model with --base")


def _write(model: Any, trained: Trained, out: Path, max_shard_size: str, text_only: bool) -> None:
    tokenizer = trained.load_tokenizer()
    try:
        prompts = PromptFormat(find_template(trained, tokenizer))
    except UserError as error:
        log.warning("the chat template of the run is not known, the tokenizer keeps its own: %s", error)
        prompts = None
    with write_errors(f"writing {out}", "No part of the model was kept"):
        out.parent.mkdir(parents=True, exist_ok=True)
        part = None if text_only else text_part(model)
        needed = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        needed += 0 if part is None else 4 * part.num_left_out  # kept as stored: fp32 at most
        free = shutil.disk_usage(out.parent).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"{format_bytes(free)} are free, {format_bytes(needed)} are needed", str(out))
        with folder_aside(out, replaces=False) as aside:
            if part is None:
                model.save_pretrained(aside, max_shard_size=max_shard_size)
            else:
                write_wrapper(model, trained.model.name, trained.model.revision, aside)
            export_tokenizer(aside, model, tokenizer, prompts)
