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

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..cluster.world import own_device
from ..config.model_json import method_of
from ..config.run_dir import RunDir
from ..errors import UserError
from ..files import folder_aside
from ..memory.read_shapes import read_shapes
from ..model import (
    load_config,
    write_errors,
)
from ..model.one_by_one import OpenBase, open_base, run_layer_by_layer
from ..model.pretrained import decoded_form, find_text_part
from ..model.reference_logits import Reference
from ..train.prompt_format import PromptFormat, export_tokenizer
from .generate import find_template
from .merged import Adapter, Merged, Target
from .outputs import check_output_folder
from .trained import Trained, find_trained, first_documents, load_trained

log = logging.getLogger(__name__)

TARGETS: tuple[Target, ...] = ("base", "dequantized")
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
