"""The parts of the benchmarks: steps, shapes, presets, profiles, data."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import torch

from benchmarks import cells, dataset, profiling, throughput
from benchmarks.conductor import Conductor
from benchmarks.shapes import SHAPES, shape_of
from qlora_dist.config import SourceConfig
from qlora_dist.data.documents import build_documents
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.train.checks.learning import check_ends_are_learned

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_a_conductor_takes_warm_up_timed_and_instrumented_steps_in_this_order():
    conductor = Conductor(CPU, warmup_steps=2, steps=3, instrumented_steps=2)
    conductor.start()
    is_running, count, instrumented = True, 0, []
    while is_running:
        with conductor.phase("forward"):
            instrumented.append(conductor.is_instrumented)
        count += 1
        is_running = conductor.step_done(10, 5)
    assert count == 7 and instrumented == [False] * 5 + [True] * 2
    assert [sample["tokens"] for sample in conductor.samples] == [10] * 3
    assert conductor.split()["total"] >= conductor.split()["forward"] > 0


@pytest.mark.parametrize(
    ("name", "billions"), [("7b", 6.48), ("8b", 6.98), ("13b", 12.69), ("65b", 64.76), ("70b", 68.45)]
)
def test_shapes_have_the_linear_weights_of_the_models_they_are_named_after(name, billions):
    shape = SHAPES[name]
    linear = shape.linear_parameters - shape.vocabulary * shape.hidden
    assert linear / 1e9 == pytest.approx(billions, abs=0.01)


def test_flops_per_weight_and_token_are_four_with_adapters_and_six_without():
    shape = shape_of("8b")
    assert shape.model_flops([1], is_full=False) / shape.linear_parameters == pytest.approx(4, rel=1e-3)
    assert shape.model_flops([1], is_full=True) / shape.linear_parameters == pytest.approx(6, rel=1e-3)
    # 32 layers of width 4096, 2048 tokens: a document's attention adds 3 x 4 x 4096 x 1024 per token and layer
    added = shape.model_flops([2048], is_full=False) / 2048 - 4 * shape.linear_parameters
    assert added == pytest.approx(32 * 3 * 4 * 4096 * 1024, rel=1e-2)


def test_every_cell_of_every_preset_has_a_unique_name():
    for preset in (cells.tiny(), cells.cpu(), cells.cpu_all(), cells.gpu("8b", 8), cells.gpu("65b"), cells.peaks(),
                   cells.scaling("8b", None, (1, 2, 4), ("ddp",))):  # fmt: skip
        names = [cell.name for group in preset.groups for cell in group.cells]
        assert len(set(names)) == len({cell for group in preset.groups for cell in group.cells})
        assert preset.steps >= 20 or preset == cells.peaks()


def test_a_cell_of_two_groups_is_measured_once(tmp_path, monkeypatch):
    started = []

    def one_by_one(run, group):
        for cell in group.cells:
            started.append(cell.name)
            yield throughput._without_result(cell, "failed", "a test")

    monkeypatch.setattr(throughput.Run, "_one_by_one", one_by_one)
    preset = cells.gpu("8b", 8)
    names = [cell.name for group in preset.groups for cell in group.cells]
    assert len(names) > len(set(names)), "no cell is in two groups, so this tests nothing"
    results = throughput.run(preset, tmp_path / "out", command="a test", scratch=tmp_path / "scratch")
    assert sorted(started) == sorted(set(names))
    assert {result["name"] for result in results} == set(names)


def test_presets_for_short_gpu_time_have_few_steps_in_order_of_value():
    fair, depth = cells.fair("8b", 8), cells.depth()
    kinds = [(cell.engine, cell.variant, cell.recompute) for group in fair.groups for cell in group.cells]
    assert kinds[:3] == [("gemm", "", "full"), ("ours", "", "none"), ("ours", "", "full")]
    assert kinds[3:6] == [("trl", "best", "none"), ("trl", "best", "full"), ("trainer", "best", "none")]
    assert kinds[6:] == [("trl", "default", "full")]
    for preset in (fair, depth):
        assert (preset.warmup_steps, preset.steps, preset.instrumented_steps) == (3, 12, 2)
        packed = [cell for group in preset.groups for cell in group.cells]
        assert all(cell.data == "full" and cell.row_tokens == 2048 for cell in packed)
    assert all(cell.layers is None for group in depth.groups for cell in group.cells)


def test_profiled_steps_come_last_and_give_a_table_of_operators():
    conductor = Conductor(CPU, warmup_steps=1, steps=2, instrumented_steps=1, profile_steps=2)
    conductor.start()
    is_running, count = True, 0
    while is_running:
        with conductor.phase("forward"):
            torch.ones(64, 64) @ torch.ones(64, 64)
        count += 1
        is_running = conductor.step_done(10, 5)
    assert count == 1 + 2 + 1 + profiling.WARMUP_STEPS + 2
    assert len(conductor.samples) == 2 and len(conductor.phases) == 1
    table = conductor.profile
    products = [row for row in table["kernels"] if row["name"] == "aten::mm"]
    assert products and products[0]["calls_per_step"] == 1.0
    assert 0 < table["kernel_microseconds_per_step"] <= table["wall_microseconds_per_step"] * 1.05


@pytest.mark.parametrize("preset", [cells.fair("8b", 8), cells.depth(), cells.tiny()])
@pytest.mark.parametrize("profiled", [0, 3])
def test_a_peer_gets_documents_for_every_step_that_it_takes(preset, profiled):
    """Its trainer stops when they run out: without documents for the profiled steps the profile would never finish."""
    preset = dataclasses.replace(preset, profile_steps=profiled)
    conductor = Conductor(
        CPU,
        warmup_steps=preset.warmup_steps,
        steps=preset.steps,
        instrumented_steps=preset.instrumented_steps,
        profile_steps=profiled,
    )
    conductor.start()
    taken = 1
    while conductor.step_done(1, 1):
        taken += 1
    assert taken <= preset.num_steps
    assert (conductor.profile is not None) == bool(profiled)


@pytest.mark.parametrize("kind", ["drawn", "full"])
def test_random_documents_are_accepted_by_the_trainer(kind, tmp_path):
    """With a vocabulary so large that no end token appears by chance, as it does with a tiny one."""
    dataset.write_tokenizer(tmp_path, 128256)
    dataset.write_dataset(tmp_path / "data", tmp_path, kind=kind, row_tokens=64, vocabulary=128256)
    source = SourceConfig(path=str(tmp_path / "data" / "tokens.jsonl"), format="tokens")
    tokenizer = load_tokenizer(str(tmp_path))
    documents = build_documents([source], tokenizer, row_tokens=64, cache_dir=tmp_path / "cache", num_workers=1)
    check_ends_are_learned(documents, tokenizer)
    assert len(documents) >= 512


def test_a_turn_has_the_steps_and_counts_between_its_ends():
    """Warm-up, and what passes between turns while other cells step, is in none."""
    totals = {"cpu_seconds": 0.0}

    class Orders(io.StringIO):
        def readline(self, size: int = -1) -> str:
            totals["cpu_seconds"] += 100.0  # while the others step
            return super().readline(size)

    orders, answers = Orders("turn 2\nturn 3\nfinish\n"), io.StringIO()
    conductor = Conductor(
        CPU, warmup_steps=1, steps=5, instrumented_steps=0, orders=orders, answers=answers,
        counters=lambda: dict(totals),
    )  # fmt: skip
    conductor.start()
    is_running = True
    while is_running:
        totals["cpu_seconds"] += 1.0
        is_running = conductor.step_done(10, 5)
    assert [(turn["steps"], turn["cpu_seconds"]) for turn in conductor.turns] == [(2, 2.0), (3, 3.0)]
    assert all(turn["seconds"] > 0 for turn in conductor.turns)
