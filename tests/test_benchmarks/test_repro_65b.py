"""The 65B recipe: on a scaled-down model that a CPU trains in seconds, and on a GPU with limited memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import repro_65b as repro
from qlora_dist.config import load_config
from qlora_dist.memory import plan_memory, shapes_from_config


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Two steps of two rows of 64 tokens, two layers 128 wide."""
    folder = tmp_path_factory.mktemp("repro")
    words = ["--random-weights", "--layers", "2", "--hidden", "128", "--steps", "2", "--work", str(folder / "work")]
    sizes = ["--set", "data.row_tokens=64", "--set", "batch.rows_per_step=2"]
    repro.main([*words, *sizes, "--out", str(folder / "results" / "repro.json")])
    return json.loads((folder / "results" / "repro.json").read_text()), folder / "work"


def test_the_shapes_are_those_of_llama_65b() -> None:
    shapes = shapes_from_config(repro.llama_65b())
    assert shapes is not None
    assert (shapes.base_parameters, shapes.linear_weights) == (65_285_660_672, 64_760_053_760)


@pytest.mark.parametrize("changes", [(), ("data.packing=true", "data.row_tokens=2048", "batch.rows_per_step=4")])
def test_the_plan_counts_what_two_full_width_layers_of_the_recipe_allocate(changes: tuple[str, ...]) -> None:
    """The real step under fake tensors. 80 layers differ from 2 by 78 times one layer's weights and input."""
    from transformers import LlamaConfig

    from qlora_dist.commands.plan.simulate import simulate

    config = load_config(repro.RECIPE, changes)
    shapes = shapes_from_config(repro.llama_65b(layers=2))
    assert shapes is not None
    plan = plan_memory(config, shapes, world_size=1, device_bytes=None)
    trace = simulate(config, plan, LlamaConfig(**repro.llama_65b(layers=2)))
    # the plan's working set of one layer is exact to 2 of its (T, H) tensors: 0.1 % of the card
    assert 0 <= trace.planned_bytes - trace.peak_bytes < 72 * 2**20
    assert trace.peak_bytes > 2 * 2**30


def test_a_scaled_model_trains_with_the_recipe_without_any_weight_file(scaled: tuple[dict[str, Any], Path]) -> None:
    result, work = scaled
    # random weights know nothing: all 32,000 tokens are equally likely
    assert all(abs(loss - math.log(32_000)) < 0.2 for loss in result["losses"]) and len(result["losses"]) == 2
    assert result["losses"][0] != result["losses"][1]
    assert not list((work / "model").glob("*.safetensors"))
    assert list((work / "run").glob("adapter/adapter_model.safetensors"))
    assert result["weights"] == "random" and result["is_full_size"] is False and result["recipe_hours"] is None
    assert result["tokens_per_second"] > 0 and result["peak_bytes"] > 0
    assert result["device_state"] == {"before": None, "after": None} and result["device_used_bytes"] is None  # a CPU
    origin = result["provenance"]
    assert origin["code_hash"] and origin["versions"]["torch"]
    assert origin["command"].startswith("python -m benchmarks.repro_65b --random-weights --layers 2")


def test_a_scaled_run_changes_only_data_length_and_size_of_the_recipe(
    scaled: tuple[dict[str, Any], Path],
) -> None:
    result, _ = scaled
    expected = load_config(repro.RECIPE).model_dump(mode="json")
    for section in ("lora", "optim", "memory", "strategy", "seed"):
        assert result["config"][section] == expected[section]
    differing = {key for key, value in result["config"]["model"].items() if value != expected["model"][key]}
    assert differing == {"name", "weights"}
    assert result["config"]["batch"]["micro_rows"] == expected["batch"]["micro_rows"] == 1
    assert not result["config"]["data"]["packing"] and result["config"]["data"]["learn"] == "all"


def test_overrides_reach_the_run() -> None:
    changes = ("data.packing=true", "data.row_tokens=2048", "batch.rows_per_step=4")
    words = [word for change in changes for word in ("--set", change)]
    config = repro.configure(repro.parse([*words, "--steps", "3"]))
    assert (config.data.row_tokens, config.batch.rows_per_step, config.train.steps) == (2048, 4, 3)
    assert config.model.name == "huggyllama/llama-65b" and config.model.weights == "files"


def test_a_crowded_card_is_refused_if_paged_states_would_not_fit(tmp_path: Path) -> None:
    """Managed memory beyond what is free can hang a GPU, so this is checked before the card is touched."""
    arguments = repro.parse(["--random-weights", "--work", str(tmp_path / "work"), "--steps", "1"])
    arguments.work.mkdir()
    config = repro.configure(arguments)
    paged = repro.require_room(config, int(repro.A6000_GIB * repro.GIB))
    assert paged == 8 * 799_539_200
    with pytest.raises(SystemExit, match=r"--crowd: of 46\.5\d GiB planned, .* do not fit on a card of 44\.00 GiB"):
        repro.require_room(config, 44 * repro.GIB)


def test_a_neighbour_leaves_pytorch_only_what_the_paged_states_do_not_need() -> None:
    """Otherwise fragmentation, which no plan includes, would push managed memory beyond what is free."""
    cap, context, paged = 48 * repro.GIB, repro.GIB // 2, 6 * repro.GIB
    assert repro.allocator_limit(cap, context, 0) == cap - context
    limit = repro.allocator_limit(cap, context, paged)
    assert limit + context + paged < cap and limit > 40 * repro.GIB


def test_an_invalid_stated_commit_is_reported_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.provenance.commit", lambda: None)
    monkeypatch.setenv("QLORA_DIST_COMMIT", "main")
    monkeypatch.setattr(repro, "train", lambda config: pytest.fail("it trained"))
    with pytest.raises(SystemExit, match="'main', not a commit of 40 hex digits"):
        repro.main(["--random-weights", "--layers", "2", "--hidden", "128", "--work", str(tmp_path / "work")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: measures its memory")
@pytest.mark.parametrize("is_crowded", [False, True])
def test_on_a_gpu_four_full_layers_stay_under_the_cap_and_near_the_plan(tmp_path: Path, is_crowded: bool) -> None:
    words = ["--random-weights", "--layers", "4", "--steps", "2", "--cap-gib", "7", "--work", str(tmp_path / "work")]
    result = repro.main(words + ["--crowd"] * is_crowded)
    assert result["cap_bytes"] == 7 * 2**30
    assert result["peak_with_context_bytes"] <= result["cap_bytes"]
    assert abs(result["plan_error"]) < 0.05
    # the card's memory in use is at least the allocator's; paged states may or may not be on it
    assert result["reserved_bytes"] <= result["device_used_bytes"]
    assert all(math.isfinite(loss) for loss in result["losses"])
