"""Plans of families with state layers: the layer's own code, traced on short rows, against a whole simulated step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import tiny_config

from qlora_dist.commands.plan.simulate import simulate
from qlora_dist.config import parse_config
from qlora_dist.memory import traced_layer
from qlora_dist.memory.measured_shapes import measure_shapes
from qlora_dist.memory.plan import plan_memory
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.model import load_config

# wide enough that a layer's tensors, not the loss, are the peak
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "max_position_embeddings": 4096}
WIDE: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**SIZES, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "qwen3_next": {**SIZES, "moe_intermediate_size": 128, "linear_key_head_dim": 32, "linear_value_head_dim": 32},
    "bamba": {**SIZES, "mamba_n_heads": 8, "mamba_d_head": 64, "mamba_chunk_size": 64},
    "lfm2": SIZES,
}


def config_of(folder: Path, **memory: Any) -> Any:
    return parse_config(
        {
            "run_dir": "runs/x",
            "model": {"name": str(folder)},
            "data": {"train": [{"path": "a.json", "format": "alpaca"}], "row_tokens": 1024},
            "lora": {"rank": 8, "alpha": 8, "experts": memory.pop("experts", "shared")},
            "batch": {"rows_per_step": 4, "micro_rows": memory.pop("rows", 1)},
            "memory": memory,
            "train": {"steps": 1},
        }
    )


@pytest.mark.parametrize(
    ("family", "memory", "tolerance"),
    [
        ("qwen3_5_text", {"recompute": 1}, 0.005),
        ("qwen3_next", {"recompute": "full", "experts": "all"}, 0.005),
        ("lfm2", {"recompute": 1, "rows": 2}, 0.005),
        ("bamba", {"recompute": "full"}, 0.02),  # of two tiny layers; a row of hidden states is 1.2 % of it
    ],
)
def test_the_plan_is_what_a_simulated_step_holds(
    family: str, memory: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    tiny_config(family, **WIDE[family]).save_pretrained(tmp_path)
    config, shapes = config_of(tmp_path, **memory), read_shapes(str(tmp_path))
    assert not shapes.unknown and [count for _, count in shapes.each_layer()] == [1, 1]
    plan = plan_memory(config, shapes, world_size=1, device_bytes=None)
    trace = simulate(config, plan, load_config(str(tmp_path)))
    assert abs(trace.error) <= tolerance, f"{trace.error:.2%} of {trace.peak_bytes:,} at {trace.peak_at}"


def test_rows_of_thousands_of_tokens_are_planned_from_short_ones(tmp_path: Path, monkeypatch: Any) -> None:
    tiny_config("lfm2").save_pretrained(tmp_path)
    shapes, traced = read_shapes(str(tmp_path)), set()
    original = traced_layer._trace
    monkeypatch.setattr(traced_layer, "_trace", lambda *args: traced.add(args[-1]) or original(*args))
    config = config_of(tmp_path, recompute="full")
    peaks = []
    for tokens in (2**15, 2**16, 2**17):
        longer = config.model_copy(update={"data": config.data.model_copy(update={"row_tokens": tokens})})
        peaks.append(plan_memory(longer, shapes, world_size=1, device_bytes=None).tensor_bytes)
    assert traced == set(traced_layer.ROWS)
    assert peaks[0] < peaks[1] < peaks[2] and (peaks[2] - peaks[1]) == pytest.approx(2 * (peaks[1] - peaks[0]), 0.01)


def test_layers_alike_are_one_kind_and_other_families_are_not_traced(tmp_path: Path) -> None:
    config = tiny_config("qwen3_5_text", num_hidden_layers=5, layer_types=["linear_attention", "full_attention"] * 2
                         + ["linear_attention"])  # fmt: skip
    config.save_pretrained(tmp_path)
    shapes = measure_shapes(str(tmp_path))
    assert [(one.traced.index, count) for one, count in shapes.each_layer() if one.traced] == [(0, 3), (1, 2)]
    assert replace(shapes.at(4), traced=None) == replace(shapes.at(2), traced=None)
    tiny_config("olmo2").save_pretrained(tmp_path / "plain")
    assert measure_shapes(str(tmp_path / "plain")).traced is None
