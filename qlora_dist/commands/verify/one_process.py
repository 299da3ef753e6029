"""Checks on one process: the same documents computed in two ways, and compared with transformers and PEFT.

Legend: D documents, L tokens of the longest, N labels.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...cluster.world import World
from ...config import RunConfig
from ...data.loader import StepRows
from ...data.packing import Batch, Example, collate
from ...errors import RunFailed
from ...model import (
    INFERENCE,
    base_checksum,
    evaluation_mode,
    hidden_states,
    load_base,
    scaled_beyond,
    training_mode,
    unwrap,
)
from ...model.lora import load_adapters, trainable_parameters
from ...model.lora_files import load_adapter_weights, save_adapter, verify_adapter_file
from ...train.fit_memory import resolve_auto
from ...train.setup_data import Data, build_data
from ...train.setup_model import build_model, check_base
from ...train.step import TrainingModel, train_step
from .report import Proof, failed, not_checked, relative_difference
from .variants import Plan

NUM_DOCUMENTS, DOCUMENT_TOKENS = 5, 96  # of the user's data: enough to have borders, small enough for any device
CHUNK = 64  # labels whose logits exist at the same time

SOURCE, STEADY = "base = its files", "training mode = itself = evaluation"
PACKED, ACCUMULATED = "packed = alone", "accumulation = one batch"
UNCHANGED, RELOADED = "base unchanged by training", "saved = reloaded"
REFERENCE, STOCK = "loss = transformers' own", "adapter in stock PEFT = trained"
CLAIMS = (SOURCE, STEADY, PACKED, ACCUMULATED, UNCHANGED, RELOADED, REFERENCE, STOCK)


def prove_on_one_process(plan: Plan, world: World) -> list[Proof]:
    """Claims that one process can check. Not checked if the whole base does not fit on one device."""
    try:
        return _prove(plan, world)
    except torch.OutOfMemoryError as error:
        reason = f"the base with {NUM_DOCUMENTS} documents does not fit on one device: {str(error).splitlines()[0]}"
        return [not_checked(claim, reason) for claim in CLAIMS]
    finally:
        _free_memory(world)


def _prove(plan: Plan, world: World) -> list[Proof]:
    config, tolerances = resolve_auto(plan.single, world).config, plan.tolerances
    data = build_data(config, world)
    model = build_model(config, world)
    has_adapter = config.lora is not None
    proofs = [_prove_base(config, world, model)]
    before = base_checksum(model.module) if has_adapter else ""
    move_adapters(model, config.seed)
    documents = some_documents(data)
    packed = collate(documents, (0,)).to(world.device)
    proofs.append(prove_steady(model, packed, tolerances.labels))
    proofs.append(prove_packed(model, documents, world, tolerances.labels))
    proofs.append(prove_accumulation(model, data.loader.step(0), world, tolerances.gradient))
    folder = plan.folder / "adapter"
    if has_adapter:
        is_same = base_checksum(model.module) == before
        proofs.append(Proof(UNCHANGED, 0.0 if is_same else 1.0, 0.0, "checksum of the whole base"))
        proofs.append(prove_reloaded(model, folder, config.model.name))
    with torch.no_grad(), evaluation_mode(model.module):
        ours = label_nll(model, packed), model.nll_sum(packed).item() / packed.num_labels
    forward_context = model.forward_context
    del model  # two bases at once may not fit
    _free_memory(world)
    with torch.no_grad(), forward_context():
        return [*proofs, *_prove_reference(plan, world, documents, *ours, folder if has_adapter else None)]


def _free_memory(world: World) -> None:
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


# --- what is computed -------------------------------------------------------------------------------------------------


def some_documents(data: Data) -> list[Example]:
    """The first documents of the first step, shortened; every token but the first is a label, so that all are compared.

    A common beginning (a system prompt) would hide a leak between documents: their ends are kept.
    """
    chosen = [document for row in data.loader.rows_of_step(0).tolist() for document in data.rows[row].documents]
    examples = []
    for place, index in enumerate(chosen[:NUM_DOCUMENTS]):
        # of unequal lengths, so that what depends on the length of a document shows in a packed row
        ids = data.documents[index].input_ids[-(DOCUMENT_TOKENS >> place % 2) :]
        examples.append(Example(ids, np.arange(len(ids)) > 0))
    return [example for example in examples if example.num_labels]


def move_adapters(model: TrainingModel, seed: int) -> None:
    """Gives every B small values: at zero, adapters would not affect anything that is compared."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model.module).items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def label_nll(model: TrainingModel, batch: Batch) -> torch.Tensor:
    """(N,) fp32 NLL of each label by the path used in training, without dropout, in the order of the documents."""
    with evaluation_mode(model.module):
        return _label_nll(model, batch)


@torch.no_grad()
def _label_nll(model: TrainingModel, batch: Batch) -> torch.Tensor:
    with model.forward_context():
        hidden = hidden_states(model.module, batch).to(model.compute_dtype)
        parts = [
            torch.nn.functional.cross_entropy(model.head.logits(hidden[positions]).float(), labels, reduction="none")
            for positions, labels in zip(batch.label_positions.split(CHUNK), batch.labels.split(CHUNK), strict=True)
        ]
    return torch.cat(parts)


# --- claims -----------------------------------------------------------------------------------------------------------


def _prove_base(config: RunConfig, world: World, model: TrainingModel) -> Proof:
    try:
        compared = check_base(config, world, model)
    except RunFailed as error:
        return failed(SOURCE, str(error))
    return Proof(SOURCE, 0.0, 0.0, compared)


def prove_steady(model: TrainingModel, packed: Batch, tolerance: float) -> Proof:
    """The base draws nothing at random: training mode twice and evaluation agree. The adapters' dropout is off."""
    with training_mode(model.module):
        first, second = _label_nll(model, packed), _label_nll(model, packed)
    evaluated = label_nll(model, packed)
    difference = max(relative_difference(first, second), relative_difference(first, evaluated))
    return Proof(STEADY, difference, tolerance, f"NLL of {len(first)} labels")


def prove_packed(model: TrainingModel, documents: Sequence[Example], world: World, tolerance: float) -> Proof:
    """Each document's labels, packed with the others and alone; the largest difference counts."""
    if len(documents) < 2:
        return not_checked(PACKED, "the data give only one document")
    # rotary frequencies that depend on length change within these documents, as they do in longer ones
    with scaled_beyond(unwrap(model.module), min(len(document) for document in documents)):
        together = label_nll(model, collate(documents, (0,)).to(world.device))
        parts = together.split([document.num_labels for document in documents])
        differences = [
            relative_difference(part, label_nll(model, collate([document], (0,)).to(world.device)))
            for part, document in zip(parts, documents, strict=True)
        ]
    return Proof(PACKED, max(differences), tolerance, f"NLL of {len(together)} labels in {len(documents)} documents")


def prove_accumulation(model: TrainingModel, rows: StepRows, world: World, tolerance: float) -> Proof:
    """Gradient and loss of one update: over several micro-batches, and all documents in one.

    By `train_step` itself, at learning rate zero: the weights stay, and the gradient is left in its buffers.
    """
    documents = [document for batch in rows.microbatches for document in documents_of(batch)][: 2 * NUM_DOCUMENTS]
    documents = [document for document in documents if document.num_labels]
    if len(documents) < 2:
        return not_checked(ACCUMULATED, "the data give only one document with labels")
    # of unequal size, so that the mean of their means is not the mean over all labels
    parts = [documents[:1], documents[1:]]
    batches = {"one": [documents], "accumulated": parts}
    gradients, losses = {}, {}
    for name, groups in batches.items():
        microbatches = [collate(group, (0,)) for group in groups]
        step = replace(
            rows,
            microbatches=microbatches,
            num_labels=sum(document.num_labels for document in documents),
            num_tokens=sum(len(document) for document in documents),
        )
        with evaluation_mode(model.module):
            stats = train_step(world, model, step, step=0, seed=0, lr=0.0, stop_requested=False)
        losses[name] = stats.loss
        gradients[name] = torch.cat([gradient.detach().double().cpu().flatten() for gradient in _gradients(model)])
    model.update.zero_grad()
    difference = relative_difference(gradients["accumulated"], gradients["one"])
    loss_difference = abs(losses["accumulated"] - losses["one"]) / abs(losses["one"])
    return Proof(ACCUMULATED, max(difference, loss_difference), tolerance, "gradient of all trained weights, and loss")


def _gradients(model: TrainingModel) -> list[torch.Tensor]:
    parameters = trainable_parameters(model.module).values()
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def documents_of(batch: Batch) -> list[Example]:
    """The documents of a batch with their label masks."""
    is_label = np.zeros(batch.num_tokens, dtype=np.bool_)
    is_label[batch.label_positions.numpy() + 1] = True
    borders = np.cumsum(batch.lengths)[:-1]
    ids = batch.input_ids[0].numpy().astype(np.int32)
    return [Example(*pair) for pair in zip(np.split(ids, borders), np.split(is_label, borders), strict=True)]


def prove_reloaded(model: TrainingModel, folder: Path, base_name: str) -> Proof:
    """Writes the adapter, overwrites the live weights, reads it back: the file and memory must have the same bits."""
    save_adapter(model.module, folder, base_name)
    kept = model.update.digest()
    with torch.no_grad():
        for parameter in trainable_parameters(model.module).values():
            parameter.fill_(0.5)
    try:
        load_adapter_weights(model.module, folder)
        verify_adapter_file(model.module, folder, must_be_trained=True)
    except (RunFailed, ValueError) as error:
        return failed(RELOADED, str(error))
    return Proof(RELOADED, 0.0 if model.update.digest() == kept else 1.0, 0.0, "every bit of the trained weights")


def _prove_reference(
    plan: Plan, world: World, documents: Sequence[Example], nll: torch.Tensor, loss: float, adapter: Path | None
) -> list[Proof]:
    """The same documents, padded, by transformers' model and its loss, with the adapter loaded by stock PEFT."""
    settings = plan.single.model
    reference: Any = load_base(
        settings.name,
        revision=settings.revision,
        quantization=settings.quantization,
        double_quant=settings.double_quant,
        # full fine-tuning keeps fp32 masters and computes under autocast
        compute_dtype=torch.float32 if adapter is None else getattr(torch, settings.compute_dtype),
        attention=INFERENCE,
        device=world.device,
    )
    if adapter is not None:
        reference = load_adapters(reference, {"trained": adapter}, lean=False)
    output = reference.eval()(**padded(documents, world.device))
    longest = max(len(document) for document in documents)
    ids = padded(documents, world.device)["input_ids"]
    theirs = torch.cat(
        [
            torch.nn.functional.cross_entropy(
                output.logits[index, : len(document) - 1].float(), ids[index, 1 : len(document)], reduction="none"
            )
            for index, document in enumerate(documents)
        ]
    )
    difference = abs(loss - output.loss.item()) / abs(output.loss.item())
    parts = zip(*(t.split([document.num_labels for document in documents]) for t in (nll, theirs)), strict=True)
    worst = max(relative_difference(ours, other) for ours, other in parts)
    note = f"{len(documents)} documents padded to {longest} tokens"
    proofs = [Proof(REFERENCE, difference, plan.tolerances.loss, note)]
    if adapter is None:
        return proofs
    return [*proofs, Proof(STOCK, worst, plan.tolerances.labels, f"NLL of {len(nll)} labels")]


def padded(documents: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """(D, L) input_ids, attention_mask and labels in transformers' form: padded on the right, -100 for no label."""
    longest = max(len(document) for document in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, document in enumerate(documents):
        tokens = torch.from_numpy(document.input_ids.astype(np.int64))
        ids[index, : len(tokens)], mask[index, : len(tokens)] = tokens, 1
        labels[index, 1 : len(tokens)] = tokens[1:]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
