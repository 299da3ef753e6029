"""Adapter + base -> an ordinary 16-bit model that needs neither PEFT nor bitsandbytes.

    onto base          W + delta                 the original weights
    onto dequantized   dequant(NF4(W)) + delta   what was trained: equals the run's own outputs
    onto auto          the nearer of the two to the trained model, by the logits of both where that is cheap; else what
                       the adapter was trained on, which is nearer by construction: deciding costs nothing

A base that is a wrapper (with towers for images or sound) is written as a wrapper: its files again, with a new text
model, every other tensor bit for bit. With `text_only` the text model alone is written.

Each tensor is computed in fp32 and rounded once. The two differ by the quantization error; for some models that is
larger than what was learned, so the merged model's largest logit difference from the trained one is measured and
reported. An adapter without its run does not tell which of the two it was trained on: there the user has to.

Legend: O outputs, I inputs of a layer, r rank.
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..cluster.world import own_device
from ..errors import UserError
from ..files import folder_aside, format_bytes
from ..memory.read_shapes import read_shapes
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
from ..model.precision import cast
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
TARGETS: tuple[Target, ...] = ("base", "dequantized")
CPU = torch.device("cpu")
NUM_SAMPLES, SAMPLE_TOKENS = 4, 64
CHEAP_WEIGHTS = 2_000_000_000  # in linear layers: up to this size the other target is measured too
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
    is_chosen: bool  # by `merge`, not by the user
    gaps: dict[str, float]  # by target; the other target only where it was measured
    logit_range: float  # largest magnitude of the trained model's logits, to compare with
    reference: str = "the trained model"  # in words


def merge(
    path: str | Path,
    out: str | Path,
    *,
    onto: Target | Literal["auto"] = "auto",
    base: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    compare: bool | None = None,
    max_shard_size: str = "5GB",
    text_only: bool = False,
) -> MergeReport:
    """Merges the adapter of a run directory or adapter folder and writes a model folder with its tokenizer.

    `out` appears complete or not at all. `base` is the original 16-bit model if it has moved. `compare` also measures
    the other target (None: only for small models, unless both are the same). Holds one copy of the 16-bit model at a
    time. Raises UserError for an output that exists, a base in 4 bits, an adapter of another kind, and under `auto` for
    an adapter that does not tell what it was trained on.
    """
    out = check_output_folder("OUT", out)
    trained = find_trained(path, base)
    if trained.adapter is None:
        raise UserError(f"{path}: a full fine-tuning run has no adapter to merge; {trained.model.name} is its model")
    if onto not in ("auto", *TARGETS):
        raise UserError(f"--onto {onto}: expected auto, base or dequantized")
    _check_original(trained.model.name, load_config(trained.model.name, trained.model.revision))
    adapter = Adapter.read(trained.adapter, find_text_part(trained.model.name, trained.model.revision))
    target = trained_on(path, trained) if onto == "auto" else onto
    other: Target = "base" if target == "dequantized" else "dequantized"
    is_same = trained.model.quantization == "none"
    compares = compare if compare is not None else not (is_same and onto == "auto") and _is_cheap(trained)
    device = device or own_device()
    samples = sample_ids(trained)
    reference = _logits(load_trained(trained, device), samples)

    gaps: dict[str, float] = {}
    if compares and onto == "auto":  # the other one first: the model that is probably written is then there already
        gaps[other] = _gap(_merged(trained, adapter, other, dtype, device), samples, reference)
    model = _merged(trained, adapter, target, dtype, device)
    gaps[target] = _gap(model, samples, reference)
    if onto == "auto" and gaps.get(other, math.inf) < gaps[target]:
        del model
        target, other = other, target
        model = _merged(trained, adapter, target, dtype, device)
    if not math.isfinite(gaps[target]):
        raise UserError(
            f"{path}: the logits of the trained or the merged model are not finite, though all weights are: they are "
            f"too large for {trained.model.compute_dtype} or {dtype}. Use --dtype float32, or another adapter. Nothing "
            "was written"
        )
    _write(model, trained, out, max_shard_size, text_only)
    if compares and other not in gaps:
        del model
        gaps[other] = _gap(_merged(trained, adapter, other, dtype, device), samples, reference)
    report = MergeReport(out, target, onto == "auto", gaps, max(float(one.abs().max()) for one in reference))
    return report if trained.data is not None else replace(report, reference="the adapter on the base in nf4")


def trained_on(path: str | Path, trained: Trained) -> Target:
    """The weights that the adapter was trained on. Raises UserError where nothing tells."""
    if trained.data is None:
        raise UserError(
            f"{path}: this adapter belongs to no run directory, so nothing tells whether it was trained on "
            f"{trained.model.name} in 4 bits or in 16. Merge it onto what it was trained on: --onto dequantized after "
            "QLoRA in NF4 with double quantization, --onto base after LoRA in 16 bits"
        )
    return "base" if trained.model.quantization == "none" else "dequantized"


def _is_cheap(trained: Trained) -> bool:
    shapes = read_shapes(trained.model.name, trained.model.revision)
    return shapes.linear_weights + shapes.expert_weights <= CHEAP_WEIGHTS


def describe(report: MergeReport) -> str:
    """One paragraph for the terminal."""
    other: Target = "base" if report.onto == "dequantized" else "dequantized"
    is_nearer = report.gaps[report.onto] < report.gaps.get(other, -math.inf)
    why = ", the nearer to what was trained" if report.is_chosen and is_nearer else ""
    if report.is_chosen and other not in report.gaps:
        why = ", the weights that it was trained on"
    text = (
        f"{report.folder}: merged onto {report.onto}{why}; its logits differ from those of {report.reference} by up to "
        f"{report.gaps[report.onto]:.4g} (their largest magnitude is {report.logit_range:.4g})"
    )
    if other not in report.gaps:
        return text
    text = f"{text}; onto {other} it would be {report.gaps[other]:.4g}"
    if report.is_chosen:
        return text
    nearer = report.onto if is_nearer else other
    return f"{text}: {nearer} is closer to {'what was trained' if report.reference == 'the trained model' else 'that'}"


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
def _merged(trained: Trained, adapter: Adapter, onto: Target, dtype: torch.dtype, device: torch.device) -> Any:
    """The base in its stored type with every adapted weight replaced, then rounded to `dtype`. On the CPU; each weight
    is computed on `device`, where it was trained: quantizing 7B takes a CPU core minutes.

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
        device=CPU,
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
        weight = weight.to(device)
        original = _dequantized(weight, settings) if onto == "dequantized" else weight.float()
        changed = (original if factors is None else adapter.on(name, original)).to(CPU, dtype)
        layer.weight.data = changed.T.contiguous() if is_conv1d(layer) else changed
    if onto == "dequantized" and settings.quantization in ("nf4", "fp4"):
        for experts in stacked_experts(model).values():
            for parameter in experts.parameters(recurse=False):
                matrices = torch.empty(parameter.shape, dtype=dtype)
                for matrix, stored_matrix in zip(matrices, parameter.data, strict=True):
                    matrix.copy_(_dequantized(stored_matrix.to(device), settings))
                parameter.data = matrices
    cast(model, dtype)
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
