"""DeepSpeed's ZeRO as one more way to make the same update: ddp's losses, ddp's files, ddp's failures."""

from __future__ import annotations

import json
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


@pytest.fixture(scope="module")
def ddp(inputs, tmp_path_factory):
    """Run directory of ten steps under ddp, with accumulation, clipping, and a checkpoint at 5 and 10."""
    run = str(tmp_path_factory.mktemp("ddp") / "run")
    on_ranks(_train, RANKS, changed(inputs, run_dir=run, train__steps=10, train__save_every=5))
    return run


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
        backward = learner.update.backward

        def measured(nll, is_last):
            backward(nll, is_last)
            if is_last:
                seen["gradient_bytes"] = _gradient_bytes(learner)

        learner.update.backward = measured
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


@pytest.mark.parametrize("strategy", ZERO)
def test_a_zero_strategy_gives_ddps_losses_norms_and_files(raw, ddp, strategy):
    results = on_ranks(_watched, RANKS, changed(raw, strategy__name=strategy, train__steps=10, model__compute_dtype="float32"))
    expected = _figures(ddp)
    assert expected.shape == (10, 3) and expected[9, 0] < 0.7 * expected[0, 0], "a run that learns nothing shows nothing"
    # fp32 sums in another order, ten updates deep
    torch.testing.assert_close(_figures(raw["run_dir"]), expected, rtol=1e-5, atol=0)
    assert all(result["base_kept"] and result["moved"] and result["all_b_moved"] for result in results)
    assert results[0]["digest"] == results[1]["digest"]
    assert results[0]["dtypes"] == {"torch.float32"}
    adapters = [load_file(Path(run) / "adapter" / "adapter_model.safetensors") for run in (raw["run_dir"], ddp)]
    assert {k: v.shape for k, v in adapters[0].items()} == {k: v.shape for k, v in adapters[1].items()}
    for key, value in adapters[0].items():
        torch.testing.assert_close(value, adapters[1][key], rtol=1e-3, atol=1e-5)  # Adam divides small by small
    states = [load_file(Path(run) / "checkpoints/step-00000010/optimizer.safetensors") for run in (raw["run_dir"], ddp)]
    assert {k: (v.shape, v.dtype) for k, v in states[0].items()} == {k: (v.shape, v.dtype) for k, v in states[1].items()}
    # what is promised is what is held: half of the optimizer states, and from zero2 on of the gradients
    for result in results:
        assert result["state_bytes"] == pytest.approx(2 * result["weight_bytes"] / RANKS, rel=0.01)
        if strategy == "zero2":
            # a weight on the border lies on both sides; ddp and zero1 hold all of them
            assert result["gradient_bytes"] <= 0.75 * result["weight_bytes"]
