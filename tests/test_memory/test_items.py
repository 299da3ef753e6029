"""Each item of the plan, to the byte, from sizes written here; what is chosen is the best that fits."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_dist.config import RunConfig, parse_config
from qlora_dist.memory import MemoryPlan, ModelShapes, choose, plan_memory, shapes_from_config
from qlora_dist.memory.choosing import changed_config, relative_time
from qlora_dist.memory.constants import OFFLOAD_AHEAD_BYTES
from qlora_dist.memory.layers import dequantized_bytes
from qlora_dist.memory.shapes import Linear

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 4096, 11008, 32, 32, 32_000
RANK, TOKENS, RANKS = 64, 512, 8
GIB = 2**30

# inputs and outputs of the seven linear layers
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(HIDDEN, INNER)] * 2 + [(INNER, HIDDEN)]
ADAPTER = LAYERS * sum(RANK * (inputs + outputs) for inputs, outputs in SHAPES)  # all are multiples of 256


def shapes(**changes: Any) -> ModelShapes:
    raw = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, **changes,
    }  # fmt: skip
    found = shapes_from_config(raw)
    assert found is not None
    return found


def config(**sections: dict[str, Any]) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": "unused", "model": {"name": "unused"}, "train": {"steps": 1}, "optim": {"name": "adamw"},
        "data": {"train": [{"path": "unused"}], "row_tokens": TOKENS}, "lora": {"rank": RANK},
    }  # fmt: skip
    for name, values in sections.items():
        raw[name] = raw.get(name, {}) | values
    return parse_config(raw)


def plan(ranks: int = 1, device_bytes: int | None = None, recompute: int = LAYERS, **sections: Any) -> MemoryPlan:
    return plan_memory(config(**sections), shapes(), world_size=ranks, device_bytes=device_bytes, recompute=recompute)


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "adapters", "gradients", "states", "master"),
    [
        ("ddp", 1, 1, 1, 0), ("fsdp", 1, 1, 1, 0), ("zero1", 1, 1, RANKS, 1), ("zero2", 1, RANKS, RANKS, 1),
        ("zero3", RANKS, RANKS, RANKS, 1),
    ],
)  # fmt: skip
def test_what_a_rank_keeps_of_the_trained_weights(
    strategy: str, adapters: int, gradients: int, states: int, master: int
) -> None:
    """fp32 weights and gradients, two fp32 states, and under DeepSpeed an fp32 copy of the shard that it updates."""
    items = plan(RANKS, strategy={"name": strategy}).items
    assert items["adapters"].size == 4 * ADAPTER // adapters
    assert items["gradients"].size == 4 * ADAPTER // gradients
    assert items["optimizer"].size == (8 + 4 * master) * ADAPTER // states


def test_what_is_offloaded_to_the_host_is_counted_there() -> None:
    made = plan(RANKS, strategy={"name": "zero2_offload"})
    assert not {"optimizer", "gradients"} & made.items.keys()
    assert made.host_items["optimizer"].size == (8 + 4 + 4) * ADAPTER // RANKS  # states, weights, gradients


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_a_checkpoint_is_written_from_copies_of_states_and_adapters(strategy: str) -> None:
    ranks = 1 if strategy == "ddp" else RANKS
    made = plan(ranks, strategy={"name": strategy})
    assert made.host_items["checkpoint"].size == (8 // ranks + 4) * ADAPTER


def test_dora_trains_one_more_number_per_output() -> None:
    more = plan(lora={"variant": "dora"}).trainable_parameters - plan().trainable_parameters
    assert more == LAYERS * sum(outputs for _, outputs in SHAPES)


def test_every_factor_starts_at_a_multiple_of_256_elements() -> None:
    made = plan(lora={"rank": 1, "target_modules": ["k_proj"]})
    small = shapes(hidden_size=96, num_attention_heads=4)
    padded = plan_memory(config(lora={"rank": 1}), small, world_size=1, device_bytes=None).items["adapters"].size
    assert made.items["adapters"].size == 4 * LAYERS * 2 * HIDDEN
    assert padded == 4 * LAYERS * (4 * 2 * 256 + 3 * (256 + 43 * 256))  # 96 -> 256, 11,008 = 43 x 256


@pytest.mark.parametrize(("quantization", "share"), [("nf4", 1), ("fp4", 1), ("int8", 1), ("none", RANKS)])
def test_zero3_shards_a_base_that_is_not_quantized_and_says_that_it_counts_another_whole(
    quantization: str, share: int
) -> None:
    model = {"quantization": quantization}
    whole, sharded = (plan(RANKS, model=model, strategy={"name": name}) for name in ("ddp", "zero3"))
    assert sharded.items["base"].size == whole.items["base"].size // share
    assert any("counted in full" in remark for remark in sharded.remarks) == (quantization != "none")
    assert not any("counted in full" in remark for remark in whole.remarks)


@pytest.mark.parametrize(
    ("quantization", "double_quant", "constants"),
    [("nf4", True, 4), ("fp4", True, 4), ("nf4", False, 0), ("int8", True, 0), ("none", True, -1)],
)
def test_a_product_needs_its_matrix_and_the_constants_that_are_quantized_themselves(
    quantization: str, double_quant: bool, constants: int
) -> None:
    """16 bits per weight, and while they are restored one more fp32 for each 64 weights."""
    linear = Linear("x", 96, 50)  # 75 blocks
    found = dequantized_bytes(linear, quantization, double_quant, 2)
    assert found == (0 if quantization == "none" else 2 * 96 * 50 + constants * 75)


# --- what comes and goes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [0, 5, LAYERS])
def test_offloaded_activations_are_on_the_host_and_a_few_on_the_device(recompute: int) -> None:
    """The host holds all that is saved between forward and backward; the device what is on its way."""
    row = TOKENS * HIDDEN * 2
    here = plan(recompute=recompute)
    there = plan(recompute=recompute, memory={"offload_activations": True})
    nothing = plan(recompute=LAYERS, memory={"offload_activations": True}).host_items["saved activations"].size
    kept = there.host_items["saved activations"].size
    assert nothing == LAYERS * row  # the input of each layer
    one = (plan(recompute=0, memory={"offload_activations": True}).host_items["saved activations"].size) // LAYERS
    # the first layer saves less: nothing before its adapters has a gradient
    assert kept == pytest.approx(recompute * row + (LAYERS - recompute) * one, rel=0.02)
    assert there.items["saved activations"].size <= OFFLOAD_AHEAD_BYTES + row
    if recompute == 0:
        assert here.items["saved activations"].size > 4 * there.items["saved activations"].size
    assert "saved activations" not in here.host_items


# --- what fits --------------------------------------------------------------------------------------------------------


def test_whatever_the_device_no_layer_too_many_is_recomputed() -> None:
    """Every device on which one count of layers just fits, or just does not."""
    settings = config(data={"row_tokens": 2048})
    peaks = [
        plan_memory(settings, shapes(), world_size=1, device_bytes=None, recompute=count).peak_bytes
        for count in range(LAYERS + 1)
    ]
    for device in {peak + more for peak in peaks for more in (-1, 0)}:
        made = choose(settings, shapes(), world_size=1, device_bytes=device)
        fewest = next((count for count, peak in enumerate(peaks) if peak <= device), None)
        assert made.fits is (fewest is not None)
        assert made.recompute == (LAYERS if fewest is None else fewest)


@pytest.mark.parametrize("gib", [8, 12])  # on the smaller one the fastest would page its states out
@pytest.mark.parametrize(("rows", "ranks"), [(16, 1), (12, 2), (30, 1), (7, 1)])
def test_a_chosen_micro_batch_divides_the_step_and_no_other_that_fits_is_better(
    rows: int, ranks: int, gib: int
) -> None:
    settings = config(batch={"rows_per_step": rows, "micro_rows": "auto"}, optim={"name": "paged_adamw_32bit"})
    sizes = {"world_size": ranks, "device_bytes": gib * GIB}
    made = choose(settings, shapes(), **sizes)
    assert made.fits and rows // ranks % made.micro_rows == 0
    others = [
        choose(changed_config(settings, batch={"micro_rows": count}), shapes(), **sizes)
        for count in range(1, rows // ranks + 1)
        if rows // ranks % count == 0
    ]
    # nothing is paged out if that can be; then the fastest
    best = min((one.paged_out_bytes > 0, relative_time(one)) for one in others if one.fits)
    assert (made.paged_out_bytes > 0, relative_time(made)) == best


@pytest.mark.parametrize("gib", [4, 5, 6, 7])
def test_each_change_that_is_advised_is_one_that_fits(gib: int) -> None:
    settings = config(data={"row_tokens": 2048}, batch={"micro_rows": 2})
    made = choose(settings, shapes(), world_size=2, device_bytes=gib * GIB)
    assert not made.fits
    changes = [line.split(" (")[0] for line in made.advice if "=" in line and "longest rows" not in line]
    assert changes or gib < 7
    for line in changes:
        raw = settings
        recompute, rows = LAYERS, 2
        for part in line.replace(" with ", " and ").split(" and "):
            key, _, value = part.partition("=")
            section, name = key.split(".")
            if name == "micro_rows":
                rows = int(value)
            elif name != "recompute":
                raw = changed_config(raw, **{section: {name: {"true": True}.get(value, value)}})
        fixed = plan_memory(raw, shapes(), world_size=2, device_bytes=gib * GIB, recompute=recompute, micro_rows=rows)
        assert fixed.fits, line
