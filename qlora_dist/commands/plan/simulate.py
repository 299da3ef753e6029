"""`plan --simulate`: the real model, adapters, loss, backward pass and optimizer under fake tensors.

Fake tensors have shapes, types and storages but no memory, so a 65B model trains a step in seconds on a laptop, and
every tensor that the code creates is counted while it lives. The training code itself runs: transformers' layers, PEFT
adapters with `lean_forward`, packed attention, the chunked loss, recomputation, the optimizer. Fake tensors are CPU
tensors here (autograd on fake CUDA tensors needs a CUDA build); what differs on a GPU is done as there:

- attention runs torch's varlen operator, whose fake kernel has the outputs of the flash kernel, not SDPA on a CPU;
- the loss uses the chunk size of a GPU;
- memory that kernels allocate outside tensors is in `memory.live_bytes`.

Not simulated: several ranks, activation offload, CUDA context, allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from ...config import RunConfig
from ...data.packing import Batch
from ...errors import UserError
from ...memory import MemoryPlan
from ...memory.live_bytes import LiveBytes, create_tables, gpu_workspaces
from ...model import hidden_states, output_head, set_recompute
from ...model.dropout import dropout_rows
from ...model.lora import attach_lora, trainable_parameters
from ...model.loss import CHUNK_BYTES, OutputHead, nll_sum
from ...model.meta import empty_base, fill_empty
from ...optim.adamw import build_optimizer, decays, step_optimizer
from ...optim.flat import FlatParameters


@dataclass(frozen=True)
class Trace:
    """Result of a simulation."""

    peak_bytes: int
    peak_at: str
    categories: dict[str, int]  # bytes at the peak
    planned_bytes: int  # the same according to the plan

    @property
    def error(self) -> float:
        """(plan - trace) / trace."""
        return self.planned_bytes / self.peak_bytes - 1.0


def simulated_bytes(plan: MemoryPlan) -> int:
    """The part of a plan that a simulation of one rank covers: all tensors but cuBLAS and communication buffers."""
    excluded = ("cuBLAS workspace", "communication")
    tensors = sum(item.size for name, item in plan.items.items() if item.is_tensor and name not in excluded)
    return tensors + plan.pageable_bytes


def simulate(
    config: RunConfig,
    plan: MemoryPlan,
    pretrained: Any,
    watching: AbstractContextManager[object] | None = None,
) -> Trace:
    """One training step of this plan under fake tensors. `pretrained` is transformers' config of the model; `watching`
    is around forward, loss and backward, and sees their operations.

    Raises UserError for what cannot be simulated: int8, dora, full fine-tuning, activation offload.
    """
    if config.memory.offload_activations:
        raise UserError("memory.offload_activations cannot be simulated; plan without --simulate")
    create_tables(config.model.quantization)
    model = meta_model(config, plan, pretrained)
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes(gpu_workspaces()) as live:
        _run_step(config, plan, model, live, watching=watching)
    return Trace(live.peak_bytes, live.peak_at, dict(live.peak), simulated_bytes(plan))


def measure(config: RunConfig, plan: MemoryPlan, pretrained: Any, device: torch.device) -> Trace:
    """The same step on a device, with real tensors of arbitrary values. On CUDA `peak_bytes` is the allocator's peak
    above what was allocated before, and `planned_bytes` the same according to the plan."""
    gc.collect()  # a model is full of reference cycles: one measured earlier would still be alive
    is_cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if is_cuda else 0
    model = meta_model(config, plan, pretrained)
    with torch.device(device), LiveBytes({} if is_cuda else gpu_workspaces()) as live:
        _run_step(config, plan, model, live, torch.cuda.reset_peak_memory_stats if is_cuda else lambda: None)
    if is_cuda:
        return Trace(torch.cuda.max_memory_allocated(device) - before, live.peak_at, dict(live.peak), plan.tensor_bytes)
    return Trace(live.peak_bytes, live.peak_at, dict(live.peak), simulated_bytes(plan))


def _run_step(
    config: RunConfig,
    plan: MemoryPlan,
    model: torch.nn.Module,
    live: LiveBytes,
    at_start: Callable[[], None] = lambda: None,
    watching: AbstractContextManager[object] | None = None,
) -> None:
    """Forward, loss, backward, update, in the order and with the lifetimes of `train.step`."""
    head, optimizer = fill_resident(config, model, live)
    batch = full_rows(plan.micro_rows, plan.row_tokens, live)
    at_start()
    live.reset_peak()
    with watching or nullcontext():
        nll = forward(config, model, head, batch, live)
        with live.category("backward"):
            nll.backward()
        del nll
    with live.category("optimizer step"):
        step_optimizer(optimizer, 1e-4)


def forward(config: RunConfig, model: torch.nn.Module, head: OutputHead, batch: Batch, live: LiveBytes) -> torch.Tensor:
    """(): the loss of a micro-batch, with its graph; in chunks as on a GPU."""
    dropout_rows(model).rows = tuple((tokens, 0) for tokens in batch.row_tokens)
    chunk = max(1, CHUNK_BYTES["cuda"] // (4 * head.weight.shape[0]))
    with live.category("saved activations"):
        hidden = hidden_states(model, batch).to(_dtype(config))
    with live.category("loss"):
        return nll_sum(hidden, head, batch.label_positions, batch.labels, chunk)


def meta_model(config: RunConfig, plan: MemoryPlan, pretrained: Any) -> torch.nn.Module:
    """Base and adapters without storage."""
    dtype = _dtype(config)
    if config.lora is None:
        raise UserError("full fine-tuning (lora: null) cannot be simulated; plan without --simulate")
    if config.lora.variant == "dora":
        raise UserError("lora.variant dora cannot be simulated: PEFT copies weights for it; plan without --simulate")
    model: torch.nn.Module = empty_base(
        pretrained,
        quantization=config.model.quantization,
        double_quant=config.model.double_quant,
        compute_dtype=dtype,
        backend="sdpa" if config.model.attention == "sdpa" or dtype == torch.float32 else "varlen",
    )
    model = attach_lora(
        model,
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        dropout=config.lora.dropout,
        target_modules=config.lora.target_modules,
        experts=config.lora.experts,
        variant=config.lora.variant,
        seed=config.seed,
        kernels=config.model.kernels,
    )
    set_recompute(model, plan.recompute)
    return model.train()


def fill_resident(config: RunConfig, model: torch.nn.Module, live: LiveBytes) -> tuple[OutputHead, Any]:
    """Storages for everything that is resident: base, adapters, gradients, optimizer states."""
    with live.category("base"):
        fill_empty(model)
    with live.category("adapters and gradients"):
        flat = FlatParameters(trainable_parameters(model), decays)
    optim = config.optim
    with unset_fake_temporarily():  # bitsandbytes reads values from its table
        optimizer = build_optimizer(
            flat, name=optim.name, lr=optim.lr, weight_decay=optim.weight_decay, betas=optim.betas, eps=optim.eps
        )
    with live.category("optimizer"):
        step_optimizer(optimizer, 0.0)  # creates the states, which exist from the second step on
    return output_head(model), optimizer


def full_rows(rows: int, row_tokens: int, live: LiveBytes) -> Batch:
    """Full rows of one document each, every token a label."""
    with live.category("batch"):
        tokens = rows * row_tokens
        ids, places, positions, labels = (torch.zeros(tokens, dtype=torch.int64) for _ in range(4))
        borders = torch.arange(rows + 1, dtype=torch.int32) * row_tokens
    lengths = (row_tokens,) * rows
    return Batch(ids[None], places[None], borders, row_tokens, positions, labels, tuple(range(rows)), lengths, lengths)


def _dtype(config: RunConfig) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, config.model.compute_dtype)
    return dtype
