"""Held-out loss: equal to a plain computation, over ranks, and without touching the model."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny_models import alone, random_batch, save_model, tiny_model
from helpers.tiny_run import config_of

from qlora_dist.cluster.stop_signal import StopRequested, StopSignal
from qlora_dist.cluster.trackers import Trackers
from qlora_dist.config.run_dir import RunDir
from qlora_dist.console import Console
from qlora_dist.data.packing import Batch
from qlora_dist.model import base_checksum, decoder_layers, hidden_states, load_base, output_head, set_recompute
from qlora_dist.model.lora import attach_lora
from qlora_dist.model.loss import nll_sum
from qlora_dist.train.evaluation import BATCHES_PER_POLL, evaluate, evaluate_if_due
from qlora_dist.train.metrics import Metrics
from qlora_dist.train.run import Run
from qlora_dist.train.run_page import RunPage


class OneRank:
    device = torch.device("cpu")

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values


class Doubled(OneRank):
    """As if another rank held the same batches."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values * 2


def nll_of(model: torch.nn.Module):  # type: ignore[no-untyped-def]
    head = output_head(model)

    def nll(batch: Batch) -> torch.Tensor:
        return nll_sum(hidden_states(model, batch), head, batch.label_positions, batch.labels)

    return nll


BATCHES = [random_batch((9, 5), seed=1), random_batch((3, 12, 2), seed=2)]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_loss_is_the_mean_over_all_labels_of_plain_cross_entropy(family: str) -> None:
    model = tiny_model(family)
    result = evaluate(model, BATCHES, nll_of(model), OneRank())
    plain = tiny_model(family, attention="eager")
    losses = []
    with torch.no_grad():
        for batch in BATCHES:
            for one in alone(batch):
                logits = plain(input_ids=one.input_ids).logits[0, :-1]
                losses.append(F.cross_entropy(logits, one.input_ids[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean().item()
    assert result.num_labels == sum(batch.num_labels for batch in BATCHES) == len(torch.cat(losses))
    assert result.loss == pytest.approx(expected, rel=1e-5)  # fp32, other order of sums
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.seconds > 0


def test_values_are_global_and_a_rank_without_labels_brings_none() -> None:
    model = tiny_model()
    one, two = (evaluate(model, BATCHES, nll_of(model), world) for world in (OneRank(), Doubled()))
    assert two.num_labels == 2 * one.num_labels and two.loss == pytest.approx(one.loss)
    filled = evaluate(model, [*BATCHES, BATCHES[0].without_labels()], nll_of(model), OneRank())
    assert (filled.loss, filled.num_labels) == (one.loss, one.num_labels)
    nothing = evaluate(model, [], nll_of(model), OneRank())
    assert (nothing.loss, nothing.num_labels) == (0.0, 0)


def test_evaluation_changes_no_mode_no_gradient_and_no_bit_of_the_base(tmp_path: Path) -> None:
    base = load_base(
        str(save_model(tmp_path)),
        quantization="nf4",
        double_quant=True,
        compute_dtype=torch.bfloat16,
        attention="auto",
        device=OneRank.device,
    )
    model = attach_lora(base, rank=2, alpha=4, dropout=0.5).train()
    set_recompute(model, "full")
    before = base_checksum(model)
    first = evaluate(model, BATCHES, nll_of(model), OneRank())
    assert evaluate(model, BATCHES, nll_of(model), OneRank()).loss == first.loss  # dropout is off inside
    assert model.training and all(layer.training for layer in decoder_layers(model))
    assert base_checksum(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_all_ranks_are_asked_to_stop_every_few_batches_and_a_stop_ends_it() -> None:
    asked: list[bool] = []

    class Asked(OneRank):
        def any(self, flag: bool) -> bool:
            asked.append(flag)
            return flag

    seen = 0

    def nll(batch: Batch) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return torch.zeros(())

    model = torch.nn.Linear(1, 1)
    evaluate(model, BATCHES[:1] * 10, nll, Asked(), lambda: False)
    assert (len(asked), seen) == (-(-10 // BATCHES_PER_POLL), 10)
    asked.clear()
    seen = 0
    with pytest.raises(StopRequested):
        evaluate(model, BATCHES[:1] * 100, nll, Asked(), lambda: seen >= 5)
    assert seen == 2 * BATCHES_PER_POLL and asked == [False, False, True]


def test_progress_is_told_after_every_batch() -> None:
    model, seconds = tiny_model(), iter(range(100))
    with Console(True, said := io.StringIO(), lambda: 10.0 * next(seconds)):
        evaluate(model, BATCHES, nll_of(model), OneRank())
    assert [line.split("  ")[0] for line in said.getvalue().splitlines()] == [
        "evaluating batch 1/2", "evaluating batch 2/2",
    ]  # fmt: skip


def test_the_cost_of_evaluations_is_said_once_from_the_steps_when_none_was_timed(tmp_path: Path) -> None:
    """Eight batches forward, of steps of two micro-batches that take forward, backward and the recomputed forward."""
    said = io.StringIO()
    config = config_of(
        {"run_dir": str(tmp_path), "model": {"name": "m"}, "data": {"train": [{"path": "d"}]}, "train": {"steps": 100}},
        train__eval_at_start=False, memory__recompute="full", batch={"rows_per_step": 4, "micro_rows": 1},
    )  # fmt: skip
    absent: Any = None
    run_dir = RunDir(tmp_path)
    metrics = Metrics(run_dir, Console(True, said), 100, Trackers((), ""), RunPage(run_dir, StopSignal()))
    world, data = SimpleNamespace(size=2), SimpleNamespace(held_out=BATCHES * 4)
    run = Run(config, cast(Any, world), absent, absent, cast(Any, data), 100, metrics)
    for step, seconds in enumerate((900.0, 30.0, 30.0), 1):
        assert evaluate_if_due(run, absent, step, is_stopping=False) == ({}, False)
        metrics._seconds.append(seconds)
        metrics._num_seen += 1
    assert said.getvalue() == "held-out data: 1 evaluation to come, about 40 s each\n"
