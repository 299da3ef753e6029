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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..cluster.world import own_device
from ..config import ModelConfig
from ..config.model_json import method_of
from ..config.run_dir import RunDir
from ..errors import UserError
from ..files import folder_aside, format_bytes
from ..memory.read_shapes import read_shapes
from ..model import (
    is_conv1d,
    linear_layers,
    load_config,
    lora_files,
    quantized_and_back,
    stacked_experts,
    text_part,
    write_errors,
)
from ..model.experts import EXPERT_WEIGHTS
from ..model.one_by_one import OpenBase, is_finite, open_base, run_layer_by_layer
from ..model.precision import float32_names
from ..model.pretrained import decoded_form, find_text_part
from ..model.reference_logits import Reference
from ..model.text_part import TextPart
from ..model.weights.wrapper_files import write_wrapper
from ..model.weights.write_model import write_model
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
    decoded: str = ""  # in words, of a base whose files were decoded


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
    the other target (None: only for small models, unless both are the same). Holds one weight at a time, and one
    decoder layer while logits are measured. Raises UserError for an output that exists, a base in 4 bits, an adapter of
    another kind, and under `auto` for an adapter that does not tell what it was trained on.
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
    form = decoded_form(trained.model.name, trained.model.revision)
    # what was decoded was rounded to the compute type before it was quantized
    stored_dtype = None if form is None else getattr(torch, trained.model.compute_dtype)
    original = open_base(trained.model.name, trained.model.revision, stored_dtype)
    merged = {one: Merged(original, trained.model, adapter, one, dtype, device) for one in TARGETS}
    samples, reference = _reference(path, trained, device)

    gaps: dict[str, float] = {}
    if compares and onto == "auto":  # before the first is written: it is probably the one to keep
        gaps[other] = _gap(original, merged[other].weight, samples, reference, dtype, device)
    with _written(out) as aside:
        merged[target].write(aside, trained, max_shard_size, text_only)
        gaps[target] = _gap_of_files(aside, samples, reference, dtype, device)
        if onto == "auto" and gaps.get(other, math.inf) < gaps[target]:
            target, other = other, target
            for file in aside.iterdir():
                file.unlink()
            merged[target].write(aside, trained, max_shard_size, text_only)
        if not math.isfinite(gaps[target]):
            raise UserError(
                f"{path}: the logits of the trained or the merged model are not finite, though all weights are: they "
                f"are too large for {trained.model.compute_dtype} or {dtype}. Use --dtype float32, or another adapter. "
                "Nothing was written"
            )
        _export_tokenizer(aside, original.model, trained)
    if compares and other not in gaps:
        gaps[other] = _gap(original, merged[other].weight, samples, reference, dtype, device)
    largest = max(float(one.abs().max()) for one in reference)
    kind = str(dtype).removeprefix("torch.")
    said = "" if form is None else f"the base's files are {method_of(form)}, these are decoded: {kind}"
    report = MergeReport(out, target, onto == "auto", gaps, largest, decoded=said)
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
    if report.decoded:
        text = f"{text}; {report.decoded}"
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

    layers: dict[str, lora_files.Factors]  # by the name in the base of a layer, or of stacked experts' weight
    scale: float
    rank: int

    @classmethod
    def read(cls, folder: Path, part: TextPart | None) -> Adapter:
        config, layers = lora_files.read_adapter(folder, part)
        return cls(layers, lora_files.scale_of(config), config.r)

    def check_fits(self, name: str, shape: Sequence[int], base: str) -> None:
        """`shape` in the base: (O, I), or (E, O, I) of stacked experts. Raises UserError."""
        if (factors := self.layers.get(name)) is None:
            return
        num_experts = math.prod(shape[:-2])  # 1 for a linear layer
        if factors.a.shape != (num_experts * self.rank, shape[-1]) or len(factors.b) != shape[-2]:
            raise UserError(f"the adapter's weights for {name} do not fit {base}, where it is {tuple(shape)}")

    def on(self, name: str, weight: Tensor) -> Tensor:
        """(O, I) fp32: the layer's weight with the adapter merged."""
        factors, device = self.layers[name], weight.device
        changed = weight + self.scale * (factors.b.to(device) @ factors.a.to(device))
        if factors.magnitude is not None:
            changed *= (factors.magnitude.to(device) / changed.norm(dim=1))[:, None]
        return changed

    def on_expert(self, name: str, weight: Tensor, expert: int) -> Tensor:
        """(O, I) fp32: one expert's part of a stacked weight with its adapter merged, if it has one."""
        if (factors := self.layers.get(name)) is None:
            return weight
        a = factors.a.view(-1, self.rank, weight.shape[1])[expert].to(weight.device)
        b = factors.b.view(len(weight), self.rank, -1)[:, :, expert].to(weight.device)
        return weight + self.scale * (b @ a)


class Merged:
    """The base with an adapter merged, one weight after another: what is written, and what is measured.

    Each weight is computed on `device`, where it was trained: quantizing 7B takes a CPU core minutes. Onto dequantized,
    weights that were quantized but not adapted are replaced too: experts, most of all.
    """

    def __init__(
        self, base: OpenBase, settings: ModelConfig, adapter: Adapter, onto: Target, dtype: torch.dtype, device: Any
    ) -> None:
        self.base, self._settings, self._adapter, self._onto = base, settings, adapter, onto
        self._dtype, self._device = dtype, device
        self._layers: dict[str, Any] = linear_layers(base.model)
        self._kept = float32_names(base.model, dtype)
        self._stacks = {  # name -> whether it is stored (E, I, O)
            f"{name}.{weight}": bool(getattr(experts, "is_transposed", False))
            for name, experts in stacked_experts(base.model).items()
            for weight in EXPERT_WEIGHTS
        }
        unknown = sorted(adapter.layers.keys() - self._layers.keys() - self._stacks.keys())
        if unknown:
            raise UserError(
                f"the adapter has weights for {unknown[0]}, which is neither a linear layer nor experts of "
                f"{settings.name}; name the base that it was trained on with --base"
            )

    @torch.no_grad()
    def weight(self, name: str) -> Tensor:
        """A weight or buffer of the merged model, on the CPU, in its final type. Raises UserError if not finite."""
        stored, layer = self.base.weight(name), self._layers.get(name.removesuffix(".weight"))
        if not stored.is_floating_point():
            return stored
        if layer is not None and name.endswith(".weight"):
            merged = self._linear(name.removesuffix(".weight"), layer, stored)
        elif name in self._stacks:
            merged = self._stacked(name, stored)
        else:
            merged = stored.to(torch.float32 if name in self._kept else self._dtype)
        if not is_finite(merged, is_buffer=name not in self.base.parameters):
            raise UserError(
                f"{name} is not finite when it is merged in {self._dtype}, though base and adapter are: its values are "
                "too large. Use --dtype bfloat16 or float32; if it fails there too, the adapter has diverged. Nothing "
                "was written"
            )
        return merged

    def _linear(self, name: str, layer: Any, stored: Tensor) -> Tensor:
        adapter, dtype, onto = self._adapter, self._dtype, self._onto
        factors = adapter.layers.get(name)
        if factors is None and onto == "base":
            return stored.to(dtype)
        weight = stored.T if is_conv1d(layer) else stored
        adapter.check_fits(name, weight.shape, self._settings.name)
        weight = weight.to(self._device)
        original = _dequantized(weight, self._settings) if onto == "dequantized" else weight.float()
        changed = (original if factors is None else adapter.on(name, original)).to(CPU, dtype)
        return changed.T.contiguous() if is_conv1d(layer) else changed

    def _stacked(self, name: str, stored: Tensor) -> Tensor:
        """Of all experts of a layer."""
        is_dequantized = self._onto == "dequantized" and self._settings.quantization in ("nf4", "fp4")
        if not is_dequantized and name not in self._adapter.layers:
            return stored.to(self._dtype)
        is_transposed = self._stacks[name]
        if is_transposed and name in self._adapter.layers:
            raise UserError(
                f"the adapter has weights for {name}, whose matrices are stored (inputs, outputs), which is not "
                "supported; use PEFT's merge"
            )
        self._adapter.check_fits(name, stored.shape, self._settings.name)
        merged = torch.empty(stored.shape, dtype=self._dtype)
        for expert, matrix in enumerate(stored):
            weight = matrix.to(self._device)
            if is_transposed:
                weight = weight.T.contiguous()
            original = _dequantized(weight, self._settings) if is_dequantized else weight.float()
            changed = self._adapter.on_expert(name, original, expert)
            merged[expert].copy_(changed.T if is_transposed else changed)
        return merged

    def write(self, folder: Path, trained: Trained, max_shard_size: str, text_only: bool) -> None:
        """Writes the model. Raises OSError when there is no space."""
        model, dtype = self.base.model, self._dtype
        part = None if text_only else text_part(model)
        needed = dtype.itemsize * sum(parameter.numel() for parameter in model.parameters())
        needed += 0 if part is None else 4 * part.num_left_out  # kept as stored: fp32 at most
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC, f"{format_bytes(free)} are free, {format_bytes(needed)} are needed", str(folder)
            )
        if part is None:
            write_model(model, self.weight, folder, dtype, max_shard_size)
        else:
            write_wrapper(model, self.weight, trained.model.name, trained.model.revision, folder, dtype)


def _dequantized(weight: Tensor, settings: ModelConfig) -> Tensor:
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


def _reference(path: str | Path, trained: Trained, device: torch.device) -> tuple[list[list[int]], list[Tensor]]:
    """(samples, the trained model's logits for each (T, V) fp32 on the CPU), as its run has kept them, if it has."""
    folder = Path(path).expanduser().resolve()
    for above in (folder, *list(folder.parents)[:2]):  # RUN, RUN/adapter, RUN/checkpoints/step-*
        file = RunDir(above).reference
        if trained.adapter is not None and file.is_file():
            kept = Reference.load(file, trained.adapter)
            if kept is not None:
                return kept.samples, kept.logits
    samples = sample_ids(trained)
    model: Any = load_trained(trained, device)
    with torch.inference_mode():
        return samples, [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in samples]


def _gap(
    base: OpenBase,
    weight: Callable[[str], Tensor],
    samples: Sequence[Sequence[int]],
    reference: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The largest difference of logits from the reference, of the base with these weights."""
    found = run_layer_by_layer(base, weight, samples, dtype, device)
    return max(float((a - b).abs().max()) for a, b in zip(found, reference, strict=True))


def _gap_of_files(
    folder: Path,
    samples: Sequence[Sequence[int]],
    reference: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Of the model in the files that were written, read as any other."""
    base = open_base(str(folder.resolve()), dtype=dtype)
    return _gap(base, base.weight, samples, reference, dtype, device)


# --- writing ----------------------------------------------------------------------------------------------------------


def _check_original(name: str, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{name} holds quantized weights; name the original 16-bit model with --base")


@contextmanager
def _written(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` when the block succeeds."""
    with write_errors(f"writing {out}", "No part of the model was kept"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with folder_aside(out, replaces=False) as aside:
            yield aside


def _export_tokenizer(folder: Path, model: Any, trained: Trained) -> None:
    tokenizer = trained.load_tokenizer()
    try:
        prompts = PromptFormat(find_template(trained, tokenizer))
    except UserError as error:
        log.warning("the chat template of the run is not known, the tokenizer keeps its own: %s", error)
        prompts = None
    export_tokenizer(folder, model, tokenizer, prompts)
