"""Runs one cell with this package: the trainer's stages, loader and step, in the trainer's order."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_dist.cluster.stop_signal import StopSignal
from qlora_dist.cluster.world import World
from qlora_dist.config import RunConfig, parse_config
from qlora_dist.console import Console
from qlora_dist.data.packing import Batch
from qlora_dist.model import unwrap
from qlora_dist.model.lora import trainable_parameters
from qlora_dist.train.check_start import check_model
from qlora_dist.train.run import join_ranks
from qlora_dist.train.setup_data import build_data
from qlora_dist.train.setup_model import build_model
from qlora_dist.train.step import StepStats, TrainingModel, train_step

from .cells import METHODS, Cell
from .conductor import Conductor
from .memory import items
from .shapes import DRAWN
from .work import LR, MAX_GRAD_NORM, sample_gradients


def config_of(cell: Cell, model: Path, data: Path, scratch: Path) -> RunConfig:
    """The run config that a user would write for this cell."""
    quantization, double_quant, is_full = METHODS[cell.method]
    # a shape whose 16-bit weights do not fit on the disk is initialized randomly, layer by layer, instead of read
    drawn = {"weights": "random"} if (model / DRAWN).exists() else {}
    return parse_config(
        {
            "run_dir": str(scratch / "run"),
            "model": {"name": str(model), "quantization": quantization, "double_quant": double_quant, **drawn},
            "lora": None if is_full else {"rank": cell.rank, "alpha": 16},
            "data": {
                "train": [{"path": str(data / "tokens.jsonl"), "format": "tokens"}],
                "row_tokens": cell.row_tokens,
                "packing": cell.packing,
                "cache_dir": str(data / "cache"),
                "num_workers": 1,
            },
            "batch": {"rows_per_step": cell.rows_per_step, "micro_rows": cell.micro_rows},
            "optim": {"name": "adamw", "lr": LR, "max_grad_norm": MAX_GRAD_NORM},
            "train": {"steps": 1_000_000},
            "memory": {"recompute": cell.recompute},
            "strategy": {"name": cell.strategy},
            "logging": {"trackers": []},
        }
    )


class TimedWorld:
    """The world with a timer around its all-reduce; everything else is delegated."""

    def __init__(self, world: World, conductor: Conductor) -> None:
        self._world, self._conductor = world, conductor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        with self._conductor.phase("communication"):
            return self._world.sum(values)


class TimedUpdate:
    """The strategy's update with a timer: the part of a micro-step that is neither forward nor communication is
    backward (under ZeRO and FSDP including their communication inside it)."""

    def __init__(self, update: Any, conductor: Conductor) -> None:
        self._update, self._conductor = update, conductor
        if (reducer := getattr(update, "reducer", None)) is not None:  # ddp and fsdp
            finish = reducer.finish

            def timed_finish() -> None:
                with conductor.phase("communication"):  # the part that did not overlap with the backward pass
                    finish()

            reducer.finish = timed_finish

    def __getattr__(self, name: str) -> Any:
        return getattr(self._update, name)

    def forward_backward(self, loss_sum: Any, is_last: bool) -> torch.Tensor:
        with self._conductor.phase("backward", excluding=("forward", "communication")):
            loss: torch.Tensor = self._update.forward_backward(loss_sum, is_last)
        return loss


@dataclass
class TimedTrainingModel(TrainingModel):
    """The model with a timer around its forward pass."""

    conductor: Any = None

    def nll_sum(self, batch: Batch) -> torch.Tensor:
        with self.conductor.phase("forward"):
            return super().nll_sum(batch)


def run(
    cell: Cell, model_folder: Path, data_folder: Path, scratch: Path, conductor: Conductor, watch: Any
) -> dict[str, Any]:
    """Trains until the conductor stops it; returns facts for the raw result (on every rank; rank 0 writes)."""
    config = config_of(cell, model_folder, data_folder, scratch)
    with StopSignal() as stop, join_ranks(config, stop, Console()) as world:
        check_model(config, world)  # not `check_run`: no checkpoint is written, so no disk space is needed for one
        data = build_data(config, world)
        watch.imported()
        timed_world: Any = TimedWorld(world, conductor)
        model = build_model(config, timed_world)
        timed = TimedTrainingModel(
            **{f.name: getattr(model, f.name) for f in fields(TrainingModel)}, conductor=conductor
        )
        timed.update = TimedUpdate(model.update, conductor)
        step_fn = _ScaledStep(timed) if cell.method == "full-fp16" else train_step
        watch.loaded()
        conductor.start()
        first: dict[str, Any] = {}
        waited = time.perf_counter()
        for step, rows in enumerate(data.loader.iterate(0, 1_000_000, pin_memory=world.device.type == "cuda")):
            conductor.add("data", time.perf_counter() - waited)
            stats = step_fn(
                timed_world,
                timed,
                rows,
                step=step,
                seed=config.seed,
                lr=LR,
                stop_requested=False,
            )
            if step == 0:
                first = {"loss": stats.loss, "gradients": sample_gradients(trainable_parameters(model.module))}
            if not conductor.step_done(stats.num_tokens, stats.num_labels, stats.loss):
                break  # all ranks count the same steps, so all stop here
            waited = time.perf_counter()
        for phase in conductor.phases:  # the rest of train_step: norm, scaling, update
            parts = sum(phase[name] for name in ("data", "forward", "backward", "communication"))
            phase["optimizer"] = max(0.0, phase["total"] - parts)
        trainable = trainable_parameters(model.module)
        gradients = [parameter.grad for parameter in trainable.values() if parameter.grad is not None]
        return {
            "first": first,
            "attention": getattr(unwrap(model.module), "packed_backend", None),
            "base_parameters": model.num_base_parameters,
            "trainable_parameters": model.num_trainable_parameters,
            "items": items(model.module, getattr(model.update, "_optimizer", None), trainable.values(), gradients),
            "world_size": world.size,
            "rank": world.rank,
        }


class _ScaledStep:
    """Full fine-tuning in fp16: the step with a loss scale.

    For comparison only: the trainer has no float16, so this step belongs to the benchmark. It is `train_step` with
    torch's GradScaler around the backward pass and the update.
    """

    def __init__(self, model: TrainingModel) -> None:
        update: Any = model.update  # of ddp: the only strategy whose parts are accessible
        self._flat, self._optimizer = update._flat, update._optimizer
        device = self._flat.grads[0].device.type
        self._scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        model.compute_dtype = torch.float16
        model.forward_context = lambda: torch.autocast(device, torch.float16)

    def __call__(self, world: Any, model: TrainingModel, rows: Any, *, lr: float, **_: Any) -> StepStats:
        self._flat.zero_grad()
        losses = []
        for index, batch in enumerate(rows.microbatches):
            is_last = index == len(rows.microbatches) - 1
            loss = partial(self._scaled_loss, model, batch.to(world.device), rows.num_labels)
            losses.append(model.update.forward_backward(loss, is_last) / self._scaler.get_scale())
        total = world.sum(torch.stack(losses).sum())
        self._scaler.unscale_(self._optimizer)
        norm = float(self._flat.grad_norm())
        self._flat.scale_grads(min(1.0, MAX_GRAD_NORM / (norm + 1e-6)) if norm < float("inf") else 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._scaler.step(self._optimizer)  # skips an update whose gradients overflowed
        self._scaler.update()
        return StepStats(float(total), norm, rows.num_labels, rows.num_tokens, False)

    def _scaled_loss(self, model: TrainingModel, batch: Batch, num_labels: int) -> torch.Tensor:
        return self._scaler.scale(model.nll_sum(batch) / num_labels)  # a sum over the step would overflow fp16
