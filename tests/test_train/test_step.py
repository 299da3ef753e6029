"""One update, as a rank of two sees it: what is summed, what it is divided by, and what stops it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_batch

from qlora_dist.data.loader import StepRows
from qlora_dist.errors import RunFailed
from qlora_dist.train.run import Run, TrainState
from qlora_dist.train.step import StepStats, _dropout_rows, train_step

BATCHES = [replace(random_batch((9, 5), seed=row), row_indices=(row,)) for row in (4, 7, 2)]
OWN_LABELS = sum(batch.num_labels for batch in BATCHES)
ROWS = StepRows(BATCHES, OWN_LABELS + 10, 99, 0.5, (4, 7, 2, 1), 1.0)


class World:
    """The sums of two ranks, of which the other brought `nll`, perhaps a request to stop, and labels."""

    def __init__(self, nll: float = 50.0, stops: bool = False, labels: int = 10) -> None:
        self.device = torch.device("cpu")
        self._other = torch.tensor([nll, float(stops), float(labels)], dtype=torch.float64)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self._other

    @contextmanager
    def waiting(self) -> Any:
        yield

    def gather(self, value: Any) -> list[Any]:
        return [value, ("other", None)]


class Update:
    """Records the calls; each micro-step has an NLL of 10, the sum of all gradients a norm."""

    def __init__(self, norm: float = 120.0) -> None:
        self.calls: list[Any] = []
        self._norm = norm
        self.zero_grad = lambda: self.calls.append("zero_grad")
        self.clip_and_step = lambda *arguments: self.calls.append(arguments)
        self.own_gradients_are_finite = lambda: True

    def forward_backward(self, loss_sum: Any, is_last: bool) -> torch.Tensor:
        self.calls.append(is_last)
        loss: torch.Tensor = loss_sum()
        return loss

    def grad_norm(self) -> torch.Tensor:
        return torch.tensor(self._norm)


def step(world: World, update: Update, rows: StepRows = ROWS, nll: float = 10.0, **options: Any) -> StepStats:
    model: Any = SimpleNamespace(
        update=update, dropout=SimpleNamespace(), nll_sum=lambda batch: torch.tensor(nll), module=torch.nn.Module()
    )
    return train_step(world, model, rows, **{"step": 0, "seed": 3, "lr": 0.25, "stop_requested": False, **options})  # type: ignore[arg-type]


def test_sums_are_divided_once_by_the_labels_of_all_ranks() -> None:
    update = Update()
    stats = step(World(), update)
    labels = OWN_LABELS + 10
    assert update.calls == ["zero_grad", False, False, True, (0.25, labels, 120.0 / labels)]
    assert stats == StepStats((30.0 + 50.0) / labels, 120.0 / labels, labels, 99, stop_requested=False)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("others", [True, False])
def test_a_request_to_stop_on_any_rank_is_one_on_all(own: bool, others: bool) -> None:
    assert step(World(stops=others), Update(), stop_requested=own).stop_requested == (own or others)


NO_ROWS = replace(ROWS, microbatches=[one.without_labels() for one in BATCHES], num_labels=0)


@pytest.mark.parametrize(
    ("world", "update", "options", "said"),
    [
        (World(labels=9), Update(), {}, "rows were lost, duplicated"),
        (World(labels=11), Update(), {}, "rows were lost, duplicated"),
        (World(labels=0), Update(), {"rows": NO_ROWS}, "have no label"),
        (World(nll=float("nan")), Update(), {}, "loss nan"),
        (World(), Update(float("inf")), {}, "gradient norm inf"),
        (World(), Update(), {"nll": float("inf")}, r"loss of rows \[4, 7, 2\]"),
    ],
)
def test_what_is_wrong_on_any_rank_stops_before_the_update(
    world: World, update: Update, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(RunFailed, match=said):
        step(world, update, **options)
    assert not any(isinstance(call, tuple) for call in update.calls)


def test_every_row_of_every_step_and_seed_has_a_dropout_of_its_own() -> None:
    batch = replace(random_batch((9, 5)), row_indices=(4, 7), row_tokens=(9, 5))
    found = [_dropout_rows(batch, seed, step) for seed in (0, 1) for step in (0, 1, 2)]
    assert all([tokens for tokens, _ in rows] == [9, 5] for rows in found)
    assert len({seed for rows in found for _, seed in rows}) == 12
    alone = replace(random_batch((5,)), row_indices=(7,))
    assert _dropout_rows(alone, 1, 2) == found[-1][1:], "it depends on the row, not on its micro-batch"


# --- what follows from the number of a step ---------------------------------------------------------------------------


def test_a_state_counts_steps_tokens_and_labels() -> None:
    state = TrainState(3, 100, 10).after(StepStats(1.0, 1.0, num_labels=5, num_tokens=70, stop_requested=False))
    assert state == TrainState(4, 170, 15)


def run_of(num_steps: int, **train: Any) -> Run:
    optim = SimpleNamespace(lr=1.0, schedule="linear", warmup_steps=2, min_lr_ratio=0.0)
    config: Any = SimpleNamespace(optim=optim, train=SimpleNamespace(**train))
    absent: Any = None
    return Run(config, absent, absent, absent, absent, num_steps, absent)


def test_a_run_evaluates_and_saves_when_due_and_at_its_end() -> None:
    run = run_of(7, eval_every=2, save_every=3)
    assert [done for done in range(1, 8) if run.evaluates_after(done)] == [2, 4, 6, 7]
    assert [done for done in range(1, 8) if run.saves_after(done)] == [3, 6, 7]
    never = run_of(3, eval_every=None, save_every=None)
    assert [done for done in range(1, 4) if never.evaluates_after(done) or never.saves_after(done)] == [3]


def test_the_learning_rate_is_that_of_the_whole_run() -> None:
    assert [run_of(6).learning_rate(step) for step in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
