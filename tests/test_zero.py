"""DeepSpeed's ZeRO as one more way to make the same update: ddp's losses, ddp's files, ddp's failures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.tiny_run import changed, config_of, digests_of, losses_of, make_inputs, metrics_of
from safetensors.torch import load_file

from qlora_dist.trainer import train

ZERO = ["zero1", "zero2", "zero2_offload"]
RANKS = 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return changed(make_inputs(tmp_path_factory.mktemp("inputs")), batch__rows_per_step=8, batch__micro_rows=2)


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


def _train(raw, **changes):
    return train(config_of(raw, **changes)).step


def _figures(run_dir):
    return torch.tensor([[m["loss"], m["grad_norm"], m["lr"]] for m in metrics_of(run_dir)], dtype=torch.float64)


def _watched(raw):
    """A run, and what this rank's learner looks like after it."""
    from qlora_dist.model import base_fingerprint
    from qlora_dist.trainer import stages

    seen = {}
    build = stages.build_learner

    def watching(config, world):
        seen["learner"] = learner = build(config, world)
        seen["base"] = base_fingerprint(learner.model)
        seen["start"] = learner.update.digest()
        accumulate = learner.update.accumulate

        def measured(loss_sum, is_last):
            loss = accumulate(loss_sum, is_last)
            if is_last:
                seen["gradient_bytes"] = _gradient_bytes(learner)
            return loss

        learner.update.accumulate = measured
        return learner

    stages.build_learner = watching
    _train(raw)
    learner = seen["learner"]
    trained = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
    optimizer = getattr(learner.update, "_optimizer", None) or learner.update._zero.optimizer
    return {
        "base_kept": base_fingerprint(learner.model) == seen["base"],
        "moved": learner.update.digest() != seen["start"],
        "digest": learner.update.digest(),
        "dtypes": {str(p.dtype) for p in trained.values()},
        "all_b_moved": all(bool(p.any()) for name, p in trained.items() if "lora_B" in name),
        "base_dtypes": {str(p.dtype) for name, p in learner.model.named_parameters() if "lora_" not in name},
        "state_bytes": sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.ndim
        ),
        "gradient_bytes": seen["gradient_bytes"],
        "weight_bytes": sum(p.numel() * 4 for p in trained.values()),
    }


def _gradient_bytes(learner):
    """Bytes of gradients that are held between the last micro-step and the update."""
    zero = getattr(learner.update, "_zero", None)
    parameters = [p for p in learner.model.parameters() if p.requires_grad]
    held = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None}
    if zero is not None:
        parts = [part for group in zero.averaged_gradients.values() if group is not None for part in group]
        held |= {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
    return sum(held.values())


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Strategy -> (run directory of ten steps with accumulation and clipping, what each rank held), made when asked."""
    made = {}

    def run_of(strategy):
        if strategy not in made:
            run = str(tmp_path_factory.mktemp(strategy) / "run")
            changes = {"run_dir": run, "strategy__name": strategy, "train__steps": 10}
            made[strategy] = (run, on_ranks(_watched, RANKS, changed(inputs, **changes)))
        return made[strategy]

    return run_of


@pytest.mark.parametrize("strategy", ZERO)
def test_a_zero_strategy_gives_ddps_losses_norms_and_adapter_and_holds_less(runs, strategy):
    (run, results), (ddp, ddp_results) = runs(strategy), runs("ddp")
    expected = _figures(ddp)
    assert expected.shape == (10, 3) and expected[9, 0] < 0.7 * expected[0, 0], "a run that learns nothing shows nothing"
    # fp32 sums in another order, ten updates deep
    torch.testing.assert_close(_figures(run), expected, rtol=1e-5, atol=0)
    assert all(result["base_kept"] and result["moved"] and result["all_b_moved"] for result in results)
    assert results[0]["digest"] == results[1]["digest"] and results[0]["dtypes"] == {"torch.float32"}
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000010/optimizer.safetensors"):
        mine, theirs = load_file(Path(run) / name), load_file(Path(ddp) / name)
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-5)  # Adam divides small by small
    for result, whole in zip(results, ddp_results):
        assert whole["state_bytes"] >= 2 * result["weight_bytes"]
        assert result["state_bytes"] == pytest.approx(2 * result["weight_bytes"] / RANKS, rel=0.01)
        if strategy == "zero2":  # a weight on the border between two parts lies on both sides
            assert result["gradient_bytes"] < 0.75 * whole["gradient_bytes"]


@pytest.mark.parametrize("strategy", ["zero2", "zero2_offload"])
def test_an_interrupted_run_goes_on_bit_identically(runs, raw, strategy):
    raw = changed(raw, strategy__name=strategy)
    for steps in (4, 10):
        on_ranks(_train, RANKS, changed(raw, train__steps=steps))
    whole, _ = runs(strategy)
    assert losses_of(raw["run_dir"]) == losses_of(whole)
    last = "checkpoints/step-00000010"
    assert digests_of(Path(raw["run_dir"]) / last) == digests_of(Path(whole) / last)


def test_strategies_and_numbers_of_ranks_go_on_from_each_others_checkpoints(runs, raw):
    plan = [("ddp", 2, 3), ("zero2", 2, 5), ("zero1", 1, 8), ("ddp", 2, 10)]
    for strategy, num_ranks, steps in plan:
        on_ranks(_train, num_ranks, changed(raw, strategy__name=strategy, train__steps=steps))
    ddp, _ = runs("ddp")
    # the same rows and states: sums in another order only
    torch.testing.assert_close(_figures(raw["run_dir"]), _figures(ddp), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("strategy", "where"), [("zero1", "loss"), ("zero2", "gradient")])
def test_a_value_that_is_not_finite_on_one_rank_stops_all_ranks_before_the_update(raw, strategy, where):
    raw = changed(raw, strategy__name=strategy, train__save_every=2, train__steps=6)
    for name, text in on_ranks(_poisoned, RANKS, raw, where, 3):
        assert name == "RunFailed"
        assert "step 4:" in text and "rank 1" in text and f"{where} of rows [" in text and "rank 0" not in text
    assert len(losses_of(raw["run_dir"])) == 3
    assert [p.name for p in (Path(raw["run_dir"]) / "checkpoints").iterdir()] == ["step-00000002"]


def _poisoned(raw, where, step):
    """What training raises, with a bad value on rank 1 in the second of two micro-steps, and weights before and after."""
    from qlora_dist.trainer import stages
    from qlora_dist.trainer import step as step_module

    original, build = step_module.Learner.nll_sum, stages.build_learner
    count, seen = 0, {}

    def watching(config, world):
        seen["learner"] = build(config, world)
        return seen["learner"]

    def poisoned(self, batch):
        nonlocal count
        nll = original(self, batch)
        count += 1
        if count == 2 * step + 1:
            seen["before"] = self.update.digest()
        if os.environ["RANK"] == "1" and count == 2 * step + 2:
            return nll * float("nan") if where == "loss" else _BadGradient.apply(nll)
        return nll

    stages.build_learner, step_module.Learner.nll_sum = watching, poisoned
    raised = outcome(train, config_of(raw))
    assert seen["learner"].update.digest() == seen["before"], "the update was made"
    return raised


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")
