"""`plan --simulate --gpu`: the speed that the trace of the real code predicts, and what it says of itself."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers.tiny_models import tiny_config
from helpers.tiny_run import write_config

from qlora_dist.commands import invoke
from qlora_dist.commands.plan.roofline import HOST_SECONDS, RATES, Rates, Roofline, Sums, predict, rates_of
from qlora_dist.config import RunConfig, parse_config
from qlora_dist.memory import MemoryPlan, plan_memory
from qlora_dist.memory.gpus import GPUS, parse_gpu
from qlora_dist.memory.read_shapes import read_shapes


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_config("llama", num_hidden_layers=2).save_pretrained(folder)
    return {
        "run_dir": str(folder / "run"),
        "model": {"name": str(folder)},
        "lora": {"rank": 4},
        "data": {"train": [{"path": "unused.json"}], "row_tokens": 64},
        "batch": {"rows_per_step": 8},
        "train": {"steps": 1},
    }


def planned(raw, ranks=1, **batch) -> tuple[RunConfig, MemoryPlan]:
    config = parse_config({**raw, "batch": {**raw["batch"], **batch}})
    return config, plan_memory(config, read_shapes(config.model.name, None), world_size=ranks, device_bytes=None)


def traced(**seconds_by_kind: float) -> Roofline:
    """As if these seconds had been traced, in kernels of a millisecond."""
    roofline = Roofline(RATES["h100"])
    for kind, seconds in seconds_by_kind.items():
        sums = Sums(int(seconds * 1000), 1e12 * seconds, 0.0, seconds)
        roofline.operations[kind.replace("memory_bound", "memory-bound"), "an operation"] = sums
    return roofline


def test_more_ranks_and_fewer_micro_steps_are_counted_as_they_are(raw):
    gpu = GPUS["h100"]
    trace = traced(products=0.6, memory_bound=0.4)
    config, plan = planned(raw)
    one = predict(config, plan, trace, gpu)
    assert one.micro_steps == 8 and not one.is_host_bound
    assert sum(one.seconds_by_kind.values()) == pytest.approx(1.0)
    assert one.seconds == pytest.approx(8 * 1.0 + one.update_seconds)
    assert one.tokens_per_second == pytest.approx(8 * 64 / one.seconds)
    assert one.share_of_peak == pytest.approx(8 * 1e12 / one.seconds / gpu.peak_flops)
    four = predict(*planned(raw, ranks=4), trace, gpu)
    assert four.micro_steps == 2 and four.tokens_per_second == pytest.approx(4 * 2 * 64 / four.seconds)
    pairs = predict(*planned(raw, micro_rows=2), trace, gpu)
    assert pairs.micro_steps == 4 and pairs.tokens_per_second == pytest.approx(4 * 128 / pairs.seconds)


def test_the_slower_of_device_and_host_is_the_bound(raw):
    config, plan = planned(raw)
    trace = traced(products=1.0)
    trace.operations["products", "an operation"] = Sums(10**6, 1.0, 1.0, 1.0)  # a million launches in a second
    found = predict(config, plan, trace, GPUS["h100"])
    assert found.is_host_bound and found.host_seconds == pytest.approx(10**6 * HOST_SECONDS)
    assert found.seconds == pytest.approx(8 * found.host_seconds + found.update_seconds)


@pytest.mark.parametrize("name", GPUS)
def test_each_card_of_known_data_has_rates_below_them(name):
    gpu = GPUS[name]
    rates = rates_of(gpu)
    assert (rates is None) == (not gpu.peak_flops)
    if rates is not None:
        largest = max(
            rates.product_flops, rates.attention_flops, rates.attention_backward_flops, rates.wide_product_flops
        )
        assert largest == rates.product_flops < gpu.peak_flops
        assert gpu.memory_rate / 2 < rates.bandwidth < gpu.memory_rate
    assert rates_of(parse_gpu("24GiB")) is None, "an amount of memory says nothing of speed"
    assert set(RATES) <= set(GPUS)


def test_the_command_shows_the_prediction_as_one_and_only_for_a_known_card(raw, tmp_path, capsys):
    path = str(write_config(tmp_path / "run.yaml", raw))
    assert invoke(["plan", path, "--simulate", "--json", "--gpu", "a100"]) == 0
    found = json.loads(capsys.readouterr().out)["prediction"]
    assert found["gpu"] == "a100-80" and Rates(**found["rates"]) == RATES["a100-80"]
    assert set(found["seconds_by_kind"]) == {"products", "attention", "dequantization", "memory-bound"}
    assert all(seconds > 0 for seconds in found["seconds_by_kind"].values())
    assert found["kernels"] > 2 * 50 and found["is_host_bound"], "tiny kernels take less than their launch"
    assert invoke(["plan", path, "--simulate", "--gpu", "a100"]) == 0
    text = capsys.readouterr().out
    assert "Predicted from a trace of the real code, not measured" in text
    assert f"{found['kernels']:,} kernels, so it is the bound" in text and "(estimate:" not in text
    assert invoke(["plan", path, "--simulate", "--json", "--gpu", "24GiB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prediction"] is None and found["simulation"]["peak_bytes"] > 0


def test_a_trace_costs_no_memory_in_the_simulation(raw):
    """The same step is watched: what is counted does not change."""
    from qlora_dist.commands.plan.roofline import trace_micro_step
    from qlora_dist.commands.plan.simulate import simulate
    from qlora_dist.model import load_config

    config, plan = planned(raw)
    pretrained = load_config(config.model.name, None)
    roofline, trace = trace_micro_step(config, plan, pretrained, RATES["h100"])
    assert trace == simulate(config, plan, pretrained)
    slow = replace(RATES["h100"], launch_seconds=1.0)
    again, _ = trace_micro_step(config, plan, pretrained, slow)
    assert again.total().seconds == pytest.approx(roofline.total().kernels)
