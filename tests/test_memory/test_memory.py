"""The memory plan's arithmetic: counts against real models, bytes against real tensors, totals against the paper's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import FAMILIES, save_model, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_dist import model as base_model
from qlora_dist.cluster import world
from qlora_dist.config import RunConfig, parse_config
from qlora_dist.errors import UserError
from qlora_dist.memory import (
    MemoryPlan,
    ModelShapes,
    choose,
    largest_micro_rows,
    largest_row_tokens,
    plan_memory,
    shapes_from_config,
    strategies,
)
from qlora_dist.memory.choosing import changed_config
from qlora_dist.memory.constants import ALIGNMENT, NCCL_BYTES, OFFLOAD_AHEAD_BYTES
from qlora_dist.memory.gpus import GPUS, estimate_speed, parse_gpu
from qlora_dist.memory.step_peak import CHUNK_BYTES
from qlora_dist.memory.strategies import BUCKET_BYTES, STRATEGIES
from qlora_dist.model import activation_offload as offload
from qlora_dist.model import lora as adapters
from qlora_dist.model import loss
from qlora_dist.optim import flat, reducer

MIB, GIB = 2**20, 2**30
PHI3 = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 32000}
SIZES = {  # hidden, inner, layers, heads
    "7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40), "33B": (6656, 17920, 60, 52),
    "65B": (8192, 22016, 80, 64),
}  # fmt: skip


def llama(size: str, **changes: Any) -> ModelShapes:
    hidden, inner, layers, heads = SIZES[size]
    raw = {
        **LLAMA, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, **changes,
    }  # fmt: skip
    shapes = shapes_from_config(raw)
    assert shapes is not None
    return shapes


def config(**changes: Any) -> RunConfig:
    raw: dict[str, Any] = {
        "run_dir": "unused", "model": {"name": "unused"}, "train": {"steps": 1},
        "data": {"train": [{"path": "unused"}], "row_tokens": 512},
    }  # fmt: skip
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return parse_config(raw)


def plan(shapes: ModelShapes, device_bytes: int | None = None, ranks: int = 1, **settings: Any) -> MemoryPlan:
    keywords = {key: settings.pop(key) for key in ("recompute", "micro_rows") if key in settings}
    return plan_memory(config(**settings), shapes, world_size=ranks, device_bytes=device_bytes, **keywords)


# --- counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "phi3"])
def test_weights_and_linear_layers_match_the_real_model(family):
    real = AutoConfig.for_model(family, **PHI3) if family == "phi3" else tiny_config(family)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(real)
    shapes = shapes_from_config(real.to_dict())
    assert shapes is not None and shapes.is_exact
    assert shapes.base_parameters == sum(parameter.numel() for parameter in model.parameters())
    planned = {
        f"{shapes.layer_prefix}.{index}.{linear.name}": (linear.outputs, linear.inputs, linear.has_bias)
        for index in range(shapes.num_layers)
        for linear in shapes.linears
    }
    found = {}
    for name, layer in base_model.linear_layers(model).items():
        shape = layer.weight.shape[::-1] if base_model.is_conv1d(layer) else layer.weight.shape
        found[name] = (*shape, layer.bias is not None)
    assert planned == found
    adapted = adapters.attach_lora(model, rank=4, alpha=4)
    assert plan(shapes, lora__rank=4).trainable_parameters == adapters.count_parameters(adapted)[1]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, 6_738_415_616),
        ({**LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
          "num_key_value_heads": 8}, 8_030_261_248),
        ({"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
          "num_hidden_layers": 32, "num_key_value_heads": 8}, 7_241_732_096),
        ({"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
          "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}, 7_615_616_512),
        ({"model_type": "gemma", "vocab_size": 256000, "hidden_size": 2048, "intermediate_size": 16384,
          "num_hidden_layers": 18, "num_attention_heads": 8, "num_key_value_heads": 1}, 2_506_172_416),
    ],
    ids=["Llama-7B", "Llama-3-8B", "Mistral-7B", "Qwen2.5-7B", "Gemma-2B"],
)  # fmt: skip
def test_published_models_have_their_published_number_of_weights(raw, expected):
    shapes = shapes_from_config({"num_attention_heads": 32, **raw})
    assert shapes is not None and shapes.base_parameters == expected


def test_distilgpt2_has_81_912_576_weights_of_which_589_824_are_trained():
    shapes = shapes_from_config({"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 6, "n_head": 12})
    assert shapes is not None
    made = plan(shapes, lora__rank=8, lora__target_modules=["c_attn", "c_proj", "c_fc"])
    assert (made.base_parameters, made.trainable_parameters) == (81_912_576, 589_824)


def test_adapters_on_one_layer_only_are_counted_once():
    shapes = llama("7B")
    one = plan(shapes, lora__target_modules=["model.layers.3.self_attn.q_proj"])
    assert one.trainable_parameters == 64 * (4096 + 4096)
    with pytest.raises(UserError, match=r"lora.target_modules: w_proj matches no linear layer; available: down_proj"):
        plan(shapes, lora__target_modules=["q_proj", "w_proj"])


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [True, False])
def test_bytes_of_the_base_match_a_loaded_base(tmp_path, double_quant):
    folder = save_model(tmp_path / "model", tiny_model("qwen2", attention=None))
    loaded = base_model.load_base(
        str(folder), quantization="nf4", double_quant=double_quant, compute_dtype=torch.bfloat16, attention="auto",
        device=torch.device("cpu"),
    )  # fmt: skip
    real = sum(parameter.numel() * parameter.element_size() for parameter in loaded.parameters())
    for layer in base_model.linear_layers(loaded).values():
        state: Any = layer.weight.quant_state
        tensors = [state.absmax, state.code]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
        real += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    shapes = shapes_from_config(loaded.config.to_dict())
    assert shapes is not None
    items = plan(shapes, model__double_quant=double_quant).items
    planned = sum(items[name].size for name in ("base", "quantization constants", "embeddings, head, norms"))
    assert planned == real


def test_constants_repeated_in_the_plan_equal_those_in_the_code():
    """The plan does not import torch, so it repeats them."""
    assert loss.CHUNK_BYTES["cuda"] == CHUNK_BYTES
    assert (flat.ALIGNMENT, reducer.BUCKET_BYTES) == (ALIGNMENT, BUCKET_BYTES)
    assert offload.AHEAD_BYTES == OFFLOAD_AHEAD_BYTES
    assert world.GATHER_BYTES == strategies.GATHER_BYTES


@pytest.mark.parametrize(
    ("size", "base", "lora", "checkpoints", "floor", "floor_fp32"),
    [
        ("7B", 3_687, 305, 128, 5_645, 6_255),
        ("13B", 6_869, 478, 200, 9_934, 10_889),
        ("33B", 16_609, 930, 390, 22_579, 24_439),
        ("65B", 32_865, 1_525, 640, 42_655, 45_705),
    ],
)
def test_the_floor_of_the_original_recipe_is_reproduced(size, base, lora, checkpoints, floor, floor_fp32):
    """r = 64 on all linear layers, one row of 512 tokens, everything recomputed; MiB, rounded, hence 0.5 %."""
    made = plan(llama(size))
    items = {name: item.size / MIB for name, item in made.items.items()}
    weights = items["base"] + items["quantization constants"] + items["embeddings, head, norms"]
    assert weights == pytest.approx(base, rel=5e-3)
    assert items["adapters"] / 2 == pytest.approx(lora, rel=5e-3)  # bf16 in the original, fp32 here
    assert items["saved activations"] == pytest.approx(checkpoints, rel=5e-3)
    trained = items["adapters"] + items["gradients"]
    planned = weights + trained + items["optimizer, pageable"] + items["saved activations"]
    assert planned == pytest.approx(floor_fp32, rel=5e-3)
    assert planned - trained / 2 == pytest.approx(floor, rel=5e-3)


def test_65b_fits_on_one_48_gb_card_by_less_than_1_gib():
    made = choose(config(), llama("65B"), world_size=1, device_bytes=GPUS["a6000"].device_bytes)
    assert made.fits and made.paged_out_bytes == 0
    assert made.headroom_bytes is not None and made.headroom_bytes < GIB


def test_8bit_states_take_a_quarter_and_paged_states_may_move_to_the_host():
    shapes = llama("7B")
    kinds = {name: plan(shapes, optim__name=name) for name in ("adamw", "adamw_8bit", "paged_adamw_32bit")}
    assert kinds["adamw"].items["optimizer"].size == 8 * kinds["adamw"].trainable_parameters
    # two bytes per weight, and two fp32 scales per 256 weights
    assert kinds["adamw_8bit"].items["optimizer"].size == pytest.approx(2.03125 * 159_907_840, rel=1e-3)
    paged = kinds["paged_adamw_32bit"]
    assert paged.pageable_bytes == 8 * paged.trainable_parameters
    assert paged.tensor_bytes == kinds["adamw"].tensor_bytes - paged.pageable_bytes
    tight = plan(shapes, paged.peak_bytes - paged.pageable_bytes // 2, optim__name="paged_adamw_32bit")
    assert tight.fits and tight.paged_out_bytes == pytest.approx(paged.pageable_bytes / 2, abs=1)
    assert not plan(shapes, paged.peak_bytes - paged.pageable_bytes // 2, optim__name="adamw").fits


def test_the_items_add_up_to_the_peak_and_each_has_a_note():
    made = plan(llama("7B"), 24 * GIB, ranks=2)
    assert made.peak_bytes == sum(item.size for item in made.items.values())
    assert all(item.note and item.size > 0 for item in made.items.values())
    assert made.headroom_bytes == 24 * GIB - made.peak_bytes
    assert "NCCL" in made.items and "NCCL" not in plan(llama("7B")).items
    assert made.to_json()["items"]["base"] == made.items["base"].size


# --- what fits --------------------------------------------------------------------------------------------------------


def test_more_recomputation_never_needs_more_memory():
    shapes = llama("7B")
    peaks = [plan(shapes, recompute=count, data__row_tokens=2048).peak_bytes for count in range(33)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] > 1.5 * peaks[32]


def test_choose_recomputes_as_few_layers_as_fit():
    shapes = llama("7B")
    sizes = {"world_size": 1, "device_bytes": 10 * GIB}
    settings = config(data__row_tokens=2048, optim__name="adamw")
    made = choose(settings, shapes, **sizes)
    assert made.fits and 0 < made.recompute < 32
    one_less = plan_memory(settings, shapes, **sizes, recompute=made.recompute - 1)
    assert not one_less.fits


def test_the_largest_rows_and_micro_batch_fit_and_the_next_larger_do_not():
    shapes, sizes = llama("7B"), {"world_size": 1, "device_bytes": 16 * GIB}
    settings = config(data__row_tokens=512)
    tokens = largest_row_tokens(settings, shapes, **sizes)
    rows = largest_micro_rows(settings, shapes, **sizes)
    assert tokens > 2048 and rows > 4
    for value, count, expected in (
        (tokens, 1, True),
        (tokens + 256, 1, False),
        (512, rows, True),
        (512, rows + 1, False),
    ):
        tried = changed_config(settings, data={"row_tokens": value})
        assert plan_memory(tried, shapes, **sizes, recompute=32, micro_rows=count).fits is expected


@pytest.mark.parametrize("positions", [100, 1000, 2048])
def test_no_longer_rows_are_promised_than_the_model_has_positions(positions):
    shapes, sizes = replace(llama("7B"), max_positions=positions), {"world_size": 1, "device_bytes": 16 * GIB}
    settings = config(data__row_tokens=4096)
    tokens = largest_row_tokens(settings, shapes, **sizes)
    assert positions - 256 < tokens <= positions and tokens % min(256, positions) == 0
    plan = plan_memory(settings, shapes, **sizes)
    assert any(f"but the model was built for documents of up to {positions:,} tokens" in one for one in plan.remarks)
    fitting = config(data__row_tokens=positions)
    assert not any("was built for" in one for one in plan_memory(fitting, shapes, **sizes).remarks)


@pytest.mark.parametrize(("key", "config_json"), [("max_position_embeddings", "llama"), ("n_positions", "gpt2")])
def test_the_positions_of_a_model_are_read_from_its_config(key, config_json):
    sizes = {
        "llama": {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1},
        "gpt2": {"n_embd": 8, "n_head": 2, "n_layer": 1},
    }[config_json]
    raw = {"model_type": config_json, "vocab_size": 16, **sizes}
    assert shapes_from_config({**raw, key: 512}).max_positions == 512
    assert shapes_from_config(raw).max_positions is None
    with pytest.raises(UserError, match="missing or not a number"):
        shapes_from_config({**raw, key: "many"})


def test_if_nothing_fits_the_advice_lists_changes_that_do():
    shapes = llama("65B")
    sizes = {"world_size": 4, "device_bytes": 44 * GIB}
    settings = config(optim__name="adamw")
    made = choose(settings, shapes, **sizes)
    assert not made.fits and made.recompute == 80
    assert any(line.startswith("optim.name=paged_adamw_32bit (") for line in made.advice)
    assert any(line.startswith("strategy.name=fsdp (") for line in made.advice)
    fixed = changed_config(settings, strategy={"name": "fsdp"})
    assert plan_memory(fixed, shapes, **sizes, recompute=80).fits
    hopeless = choose(settings, shapes, **(sizes | {"world_size": 1, "device_bytes": 8 * GIB}))
    assert "no single change is enough: one row with every layer recomputed needs" in hopeless.advice[0]


def test_each_strategy_shards_what_it_is_documented_to_shard():
    shapes = llama("7B")
    made = {
        name: plan_memory(
            changed_config(config(optim__name="adamw"), strategy={"name": name}), shapes, world_size=8,
            device_bytes=None,
        ).items
        for name in STRATEGIES
    }  # fmt: skip
    ddp = made["ddp"]
    for sharded in ("base", "quantization constants"):
        assert made["fsdp"][sharded].size == ddp[sharded].size // 8
    tables, norms = 2 * 32000 * 4096 * 2, (2 * 32 + 1) * 4096 * 2
    assert made["fsdp"]["embeddings, head, norms"].size == tables // 8 + norms
    for name in ("zero1", "zero2", "zero2_offload"):
        assert made[name]["base"] == ddp["base"]
    assert made["zero1"]["gradients"] == ddp["gradients"]
    assert made["zero1"]["optimizer"].size < ddp["optimizer"].size / 5
    assert made["zero2"]["gradients"].size == ddp["gradients"].size // 8
    assert made["fsdp"]["communication"].size == 32000 * 4096 * 2  # the head, gathered for the loss
    assert made["zero2"]["communication"].size == 64 * MIB
    assert "optimizer" not in made["zero2_offload"]
    with pytest.raises(UserError, match=r"strategy.name is 'fsdp3'; expected one of ddp, zero1"):
        plan_memory(
            changed_config(config(), strategy={"name": "fsdp3"}), shapes, world_size=1,
            device_bytes=None,
        )  # fmt: skip


def test_an_offloaded_base_is_on_the_host_and_makes_room_on_the_device():
    shapes = llama("65B")
    sizes = {"world_size": 2, "device_bytes": 20 * GIB}
    sharded = changed_config(config(optim__name="adamw"), strategy={"name": "fsdp"})
    offloaded = changed_config(sharded, strategy={"name": "fsdp", "offload": True})
    on_device, on_host = (plan_memory(one, shapes, **sizes) for one in (sharded, offloaded))
    assert not on_device.fits and on_host.fits
    moved = ("base", "quantization constants")
    assert not set(moved) & on_host.items.keys()
    tables = 2 * 32000 * 8192 * 2
    assert on_host.host_items["base"].size == pytest.approx(
        sum(on_device.items[name].size for name in moved) + tables / 2, abs=1024
    )
    # a rank's own part of what is gathered crosses the bus first
    assert on_host.items["communication"].size == on_device.items["communication"].size * 3 // 2
    assert any("strategy.offload=true" in line for line in choose(sharded, shapes, **sizes).advice)
    alone = plan_memory(offloaded, shapes, world_size=1, device_bytes=None)
    assert "base" in alone.items  # one rank has nothing to share


def test_each_communicator_and_the_peak_of_a_save_are_counted():
    shapes = llama("7B")

    def planned(name: str, ranks: int = 2, **changes: Any) -> MemoryPlan:
        settings = config(optim__name="adamw", strategy__name=name, **changes)
        return plan_memory(settings, shapes, world_size=ranks, device_bytes=None)

    assert "NCCL" not in planned("fsdp", 1).items
    assert planned("ddp").items["NCCL"].size == NCCL_BYTES and planned("fsdp").items["NCCL"].size == 2 * NCCL_BYTES
    tiny = {"data__row_tokens": 8, "memory__recompute": "full", "lora__rank": 64}
    saved = planned("zero2", **tiny)
    assert saved.peak_at == "saving a checkpoint" and saved.items["gathered states"].size == 256 * MIB
    assert planned("ddp", **tiny).peak_at != "saving a checkpoint" != planned("zero2").peak_at


def test_full_fine_tuning_needs_16_bytes_per_weight_and_states_its_assumptions():
    shapes = llama("7B")
    adapted = config(model__quantization="none", optim__name="adamw", lora__rank=1)
    everything = adapted.model_copy(update={"lora": None})
    sizes = {"world_size": 1, "device_bytes": 80 * GIB}
    few, trained = (plan_memory(one, shapes, **sizes) for one in (adapted, everything))
    assert trained.trainable_parameters == shapes.base_parameters
    states = sum(trained.items[name].size for name in ("weights", "gradients", "optimizer"))
    assert states == 16 * shapes.base_parameters
    assert few.fits and not trained.fits
    assert "activations are counted as for a frozen base" in trained.remarks[0]


def test_gpus_are_given_by_name_or_by_memory():
    assert parse_gpu("48GiB").device_bytes == 48 * GIB and parse_gpu("24 gb").device_bytes == 24 * 10**9
    assert parse_gpu("A100").name == "a100-80" and parse_gpu("a6000").device_bytes == 48_681 * MIB
    with pytest.raises(UserError, match=r"--gpu 'abacus': expected an amount such as 48GiB, or one of a100-40"):
        parse_gpu("abacus")


def test_the_estimated_speed_follows_the_flops_and_is_higher_without_recomputation():
    shapes, settings = llama("7B"), config(data__row_tokens=2048)
    full, none = (plan(shapes, data__row_tokens=2048, recompute=count) for count in (32, 0))
    speeds = [estimate_speed(settings, shapes, one, GPUS["h200"]) for one in (full, none)]
    assert speeds[0] is not None and speeds[1] is not None
    # 790e12 / 41.8e9 FLOPs per token (with recomputation) is 18.8k tokens/s; the plan assumes 40 % of 989e12, and
    # dequantization, about a tenth of the products at 2,048 tokens
    assert speeds[0].tokens_per_second == pytest.approx(18_800 * 0.4 * 989 / 790, rel=0.15)
    assert 1.3 < speeds[1].tokens_per_second / speeds[0].tokens_per_second < 1.55
    assert "estimate" in speeds[0].assumptions
    assert estimate_speed(settings, shapes, full, parse_gpu("48GiB")) is None


def test_an_unknown_family_is_none_and_a_config_without_its_sizes_is_a_user_error():
    assert shapes_from_config({"model_type": "whale"}) is None
    with pytest.raises(
        UserError, match=r"config.json of a llama model: KeyError\('hidden_size'\) is missing or not a number"
    ):
        shapes_from_config({"model_type": "llama"})
    assert replace(llama("7B"), is_exact=False).base_parameters == llama("7B").base_parameters
