"""What `auto` stands for, the longest micro-batch first, and the end of a run that is out of memory."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.crew import Crew
from helpers.ranks import on_ranks, outcome
from helpers.tiny_run import changed, config_of, losses_of, make_inputs, metrics_of, write_config

from qlora_dist.cluster.world import World
from qlora_dist.errors import RunFailed, UserError
from qlora_dist.memory import choose, plan_memory, shapes_from_config
from qlora_dist.train import fit_memory as fitting
from qlora_dist.train import out_of_memory, train

GIB = 2**30
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
ONE = {"world_size": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


class Card(World):
    """A rank whose GPU has this much memory, as far as `settle` asks."""

    def __init__(self, device_bytes: int | None, size: int = 1) -> None:
        self.rank, self.size, self.local_size, self.device = 0, size, size, torch.device("cpu")
        self.device_bytes = device_bytes

    def node_ranks(self) -> int:
        return self.local_size


@pytest.fixture
def settle_7b(raw, tmp_path, monkeypatch):
    """settle(bytes, size, **changes) for a Llama 7B of which there is config.json only."""
    folder = tmp_path / "llama-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **LLAMA_7B}))
    monkeypatch.setattr(fitting, "usable_bytes", lambda world: world.device_bytes)

    def settle(device_bytes: int | None, size: int = 1, **changes: Any) -> fitting.Fit:
        settings = {
            "model__name": str(folder),
            "model__compute_dtype": "bfloat16",
            "data__row_tokens": 2048,
            "lora__rank": 64,
            "memory__recompute": "full",
            "batch__rows_per_step": 16,
            "optim__name": "paged_adamw_32bit",
        }
        return fitting.resolve_auto(config_of(raw, **(settings | changes)), Card(device_bytes, size))

    return settle


# --- what auto stands for ---------------------------------------------------------------------------------------------


def test_auto_takes_more_rows_or_less_recomputation_on_a_larger_card_and_says_so(settle_7b):
    for gib in (12, 24, 80):
        fit = settle_7b(gib * GIB, batch__micro_rows="auto", memory__recompute="auto")
        batch, memory = fit.config.batch, fit.config.memory
        assert fit.plan.fits and 16 % batch.micro_rows == 0
        assert f"batch.micro_rows={batch.micro_rows} (the fastest that fits in {gib}.00 GiB" in fit.messages
        assert f"memory.recompute={memory.recompute}" in fit.messages
    layers = {gib: settle_7b(gib * GIB, memory__recompute="auto").plan.recompute for gib in (8, 12, 80)}
    assert layers[8] > layers[12] > layers[80] == 0  # of one row at a time
    rows = {gib: settle_7b(gib * GIB, batch__micro_rows="auto").plan.micro_rows for gib in (8, 12, 24)}
    assert rows[8] < rows[12] < rows[24]  # with every layer recomputed


def test_a_large_card_saves_activations_before_it_takes_more_rows(settle_7b):
    """Recomputation costs a third of the products, twice as many rows a few hundredths."""
    fit = settle_7b(80 * GIB, batch__micro_rows="auto", memory__recompute="auto")
    assert fit.plan.recompute == 0
    assert settle_7b(80 * GIB, batch__micro_rows=16, memory__recompute="auto").plan.recompute > 0


def test_the_micro_batch_divides_the_share_of_a_rank(settle_7b):
    alone = settle_7b(80 * GIB, batch__micro_rows="auto", batch__rows_per_step=24)
    shared = settle_7b(80 * GIB, 8, batch__micro_rows="auto", batch__rows_per_step=24)
    assert 24 % alone.config.batch.micro_rows == 0
    assert shared.config.batch.micro_rows == 3  # all that a rank has


def test_what_the_user_gave_is_not_touched(settle_7b):
    fit = settle_7b(80 * GIB, batch__micro_rows=2, memory__recompute=5)
    assert (fit.config.batch.micro_rows, fit.config.memory.recompute, fit.messages) == (2, 5, "")


def test_a_run_whose_tensors_have_no_room_is_refused_with_what_would_fit(settle_7b):
    with pytest.raises(UserError, match=r"more than the 6\.00 GiB available; to make it fit: .*lora\.rank=16"):
        settle_7b(6 * GIB, memory__recompute="auto")


def test_a_run_that_lacks_the_reserve_only_is_warned_and_tried(settle_7b):
    plan = settle_7b(80 * GIB).plan
    reserve = plan.items["allocator reserve"].size
    fit = settle_7b(plan.peak_bytes - plan.pageable_bytes - reserve // 2)
    assert fit.plan.fits is False and fit.config.memory.recompute == "full"
    assert (
        "according to the memory plan this run does not fit; to make it fit: memory.offload_activations=true"
        in fit.messages
    )


def test_on_a_cpu_auto_is_one_row_and_full_recomputation_and_the_reason_is_said(raw, capsys):
    train(config_of(raw, batch__micro_rows="auto", memory__recompute="auto", train__steps=1))
    said = "memory.recompute=full batch.micro_rows=1 (the memory of a cpu is not planned)"
    assert said in capsys.readouterr().out
    run = Path(raw["run_dir"])
    assert "micro_rows: auto" in (run / "config.yaml").read_text()  # what the run is, not what it became here
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["micro_rows"], summary["recompute"]) == (1, "full")


def test_the_rank_with_the_least_memory_decides_for_all():
    assert on_ranks(_usable, 2) == [6 * GIB] * 2


def _usable() -> int | None:
    world = World.init()
    world.device = torch.device("cuda", world.rank)  # only asked for its kind and its memory, which is told here
    world.max = lambda value, ask=world.max: _on_cpu(world, ask, value)
    torch.cuda.mem_get_info = lambda device: ((7 - device.index) * GIB, 80 * GIB)
    torch.cuda.memory_reserved = lambda device: 0
    torch.cuda.get_per_process_memory_fraction = lambda device: 1.0
    return fitting.usable_bytes(world) // GIB * GIB


def _on_cpu(world: World, ask: Any, value: float) -> float:
    device, world.device = world.device, torch.device("cpu")
    try:
        return ask(value)
    finally:
        world.device = device


# --- the longest micro-batch first ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "num_ranks"), [("ddp", 1), ("fsdp", 2), ("zero3", 2)])
def test_the_longest_micro_batch_first_changes_no_bit(raw, tmp_path, strategy, num_ranks):
    losses = {}
    for first in (True, False):
        run_dir = str(tmp_path / f"{first}")
        settings = changed(
            raw,
            run_dir=run_dir,
            train__longest_first=first,
            lora__dropout=0.3,
            data__packing=False,
            train__steps=2,
            strategy__name=strategy,
            model__quantization="none" if strategy == "zero3" else "nf4",
        )
        on_ranks(_train, num_ranks, settings)
        losses[first] = [(line["loss"], line["grad_norm"]) for line in metrics_of(run_dir)]
    assert losses[True] == losses[False] and len(losses[True]) == 2


def _train(raw: dict[str, Any]) -> int:
    return train(config_of(raw)).step


def test_the_longest_micro_batch_runs_before_the_first_step_and_has_the_most_tokens(raw, monkeypatch, capsys):
    seen = []
    original = fitting.try_batch

    def watching(world, model, batch, later_bytes):
        seen.append((batch.num_tokens, later_bytes, [p.detach().clone() for p in model.module.parameters()]))
        original(world, model, batch, later_bytes)
        assert all(p.grad is None or not p.grad.any() for p in model.module.parameters())
        seen.append(all(torch.equal(a, b) for a, b in zip(seen[0][2], model.module.parameters(), strict=True)))

    monkeypatch.setattr(fitting, "try_batch", watching)
    train(config_of(raw, train__longest_first=True, data__packing=False, train__steps=4))
    (tokens, later_bytes, _), is_untouched = seen
    lines = metrics_of(raw["run_dir"])
    assert is_untouched and tokens >= max(line["tokens"] for line in lines) / 4  # four rows a step, one at a time
    trainable = json.loads((Path(raw["run_dir"]) / "summary.json").read_text())["trainable_parameters"]
    assert later_bytes == 8 * trainable  # AdamW's states, which the first update makes
    assert f"the longest micro-batch of the run fits: {tokens} tokens, peak" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_only_states_that_the_first_update_allocates_are_reserved(raw, strategy, optimizer):
    """Two states in fp32, or in 8 bits with one fp32 scale for each 256 elements."""
    config = config_of(raw, strategy__name=strategy, optim__name=optimizer)
    for weights in (1, 255, 256, 257, 1000, 40_960):
        blocks = len(range(0, weights, 256))
        expected = 2 * (weights + 4 * blocks) if optimizer == "adamw_8bit" else 2 * 4 * weights
        is_to_come = strategy == "ddp" and not optimizer.startswith("paged")
        model = SimpleNamespace(num_trainable_parameters=weights)
        assert fitting.states_to_come(config, model) == (expected if is_to_come else 0)


# --- out of memory ----------------------------------------------------------------------------------------------------


def run_out_of_memory(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """The forward pass number `call` asks for too much."""
    from qlora_dist.train.step import TrainingModel

    original, calls = TrainingModel.nll_sum, iter(range(1, 1000))

    def failing(self, batch):
        if next(calls) == call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.20 GiB.\nGPU 0 has ...")
        return original(self, batch)

    monkeypatch.setattr(TrainingModel, "nll_sum", failing)


def test_out_of_memory_names_step_rank_items_and_what_would_fit(raw, monkeypatch):
    run_out_of_memory(monkeypatch, 6)  # four micro-batches a step
    kind, text = outcome(train, config_of(raw, memory__recompute="none"))
    assert kind == "RunFailed"
    assert text.startswith("step 2, rank 0 (")
    assert "out of GPU memory: CUDA out of memory. Tried to allocate 1.20 GiB.\n" in text
    for item in ("base", "adapters", "gradients", "activations and the rest"):
        assert any(line.startswith(f"  {item} ") and "iB, planned" in line for line in text.splitlines())
    assert "the cheapest settings that would fit:\n  memory.recompute=full" in text


def test_what_does_not_fit_ends_at_the_longest_micro_batch(raw, monkeypatch):
    run_out_of_memory(monkeypatch, 1)
    kind, text = outcome(train, config_of(raw, train__longest_first=True))
    assert kind == "RunFailed" and text.startswith("the longest micro-batch (")
    assert ", before step 1, rank 0 (" in text
    assert (Path(raw["run_dir"]) / "metrics.jsonl").read_text() == ""


def planned_7b(raw: dict[str, Any], **changes: Any) -> fitting.Fit:
    """A Llama 7B with every layer saved, on a card of 24 GB."""
    config = config_of(
        raw,
        **{
            "model__compute_dtype": "bfloat16",
            "data__row_tokens": 2048,
            "batch__micro_rows": 4,
            "batch__rows_per_step": 16,
            "lora__rank": 64,
            "memory__recompute": "full",
        }
        | changes,
    )
    shapes = shapes_from_config(LLAMA_7B)
    assert shapes is not None
    return fitting.Fit(config, shapes, plan_memory(config, shapes, **ONE, device_bytes=24 * GIB), "")


def held_as_planned(fit: fitting.Fit) -> dict[str, int]:
    return {
        kind: sum(fit.plan.items[name].size for name in names if name in fit.plan.items)
        for kind, names in out_of_memory.PLAN_KINDS.items()
    }


def test_the_item_that_grew_beyond_the_plan_is_named(raw):
    fit = planned_7b(raw)
    held = held_as_planned(fit)
    text = out_of_memory.explain(fit, held, fit.plan.tensor_bytes + 3 * GIB, 1)
    assert "items that exceed the plan: activations and the rest\n" in text
    more = {**held, "base": held["base"] + 2 * GIB}
    text = out_of_memory.explain(fit, more, fit.plan.tensor_bytes + 2 * GIB, 1)
    assert "items that exceed the plan: base\n" in text
    text = out_of_memory.explain(fit, held, fit.plan.tensor_bytes, 1)
    assert "no item exceeds the plan" in text and "PYTORCH_ALLOC_CONF=expandable_segments:True" in text


@pytest.mark.parametrize("missed_gib", [0, 2])
def test_the_advice_fits_with_what_the_plan_missed(raw, missed_gib):
    fit = planned_7b(raw)
    peak = fit.plan.tensor_bytes + missed_gib * GIB
    advice = out_of_memory.cheapest_settings(fit, peak, 1)
    assert advice and advice[0].startswith("batch.micro_rows=1")
    smaller = planned_7b(raw, batch__micro_rows=1).plan
    assert smaller.peak_bytes + missed_gib * GIB <= 24 * GIB
    assert smaller.peak_bytes < fit.plan.peak_bytes
    # what did not fit is never advised, even where the plan says that it does
    assert choose(fit.config, fit.shapes, **ONE, device_bytes=24 * GIB).fits
    assert not any("micro_rows=4" in line for line in advice)


def test_before_there_is_a_model_the_plan_alone_is_shown(raw):
    fit = planned_7b(raw)
    text = out_of_memory.explain(replace(fit), {}, 3 * GIB, 1)
    assert re.search(r"\n  base +[?], planned +3\.60 GiB", text) and "exceed the plan" not in text


def test_a_rank_that_is_out_of_memory_ends_all_ranks(raw, tmp_path):
    """Rank 1 fails within a step, while rank 0 waits for its gradients."""
    config = write_config(tmp_path / "config.yaml", raw)
    with Crew(config, tmp_path, {"do": "out of memory", "at": "loss", "rank": 1, "nth": 4}) as crew:
        first, second = crew.wait()
    assert first.code == second.code == 1
    assert "rank 1: error: step 2, rank 1 (" in second.output
    assert losses_of(raw["run_dir"]) and len(losses_of(raw["run_dir"])) == 1


def test_other_errors_pass_as_they_are(raw):
    fit = planned_7b(raw)
    with pytest.raises(KeyError, match="something else"), out_of_memory.explain_out_of_memory(fit, Card(None)):
        raise KeyError("something else")
    with (
        pytest.raises(RunFailed, match="loading the model, rank 0"),
        out_of_memory.explain_out_of_memory(fit, Card(None)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
