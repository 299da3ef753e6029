"""What DeepSpeed's ZeRO is not asked to do: contradictions are refused, the shipped files contradict nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.tiny_run import changed, config_of, make_inputs

from qlora_dist.cluster.launcher import require_own_strategy
from qlora_dist.cluster.world import World
from qlora_dist.errors import UserError
from qlora_dist.optim.deepspeed_config import STAGES, fill_ds_config, find_ds_config
from qlora_dist.train import setup_model, train
from qlora_dist.train.strategy import build_update

RANKS = 2
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return changed(make_inputs(tmp_path_factory.mktemp("inputs")), batch__rows_per_step=8, batch__micro_rows=2)


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


OWNED = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
]


def _fill(file, strategy="zero2", **changes):
    values = {"rows_per_step": 16, "micro_rows": 2, "accumulation": 4, "max_grad_norm": 0.3, **changes}
    return fill_ds_config(file, strategy=strategy, **values)


def _value(config, key):
    for part in key.split("."):
        config = config[part]
    return config


def test_every_shipped_file_leaves_the_run_configs_values_auto():
    assert {path.stem for path in DS_CONFIGS.glob("*.json")} == set(STAGES)
    for strategy, stage in STAGES.items():
        file = find_ds_config(strategy, None)
        config = json.loads(file.read_text())
        assert {key: _value(config, key) for key in OWNED} == dict.fromkeys(OWNED, "auto"), strategy
        assert "optimizer" not in config and "scheduler" not in config
        assert config["zero_optimization"]["stage"] == stage
        filled = _fill(file, strategy)
        assert [_value(filled, key) for key in OWNED] == [16, 2, 4, 0.3, False, False]
        assert "auto" not in json.dumps(filled)
        assert _fill(file, strategy, max_grad_norm=None)["gradient_clipping"] == 0.0
        assert filled["zero_optimization"]["offload_optimizer"]["device"] == (
            "cpu" if strategy == "zero2_offload" else "none"
        )
        # the user's values are passed to DeepSpeed unchanged
        assert filled["zero_optimization"]["reduce_bucket_size"] == config["zero_optimization"]["reduce_bucket_size"]


@pytest.mark.parametrize(
    ("key", "value", "messages"),
    [
        ("train_batch_size", 32, ["train_batch_size is 32", "expected 16 (batch.rows_per_step)"]),
        ("train_micro_batch_size_per_gpu", 1, ["is 1", "expected 2 (batch.micro_rows)"]),
        ("gradient_accumulation_steps", 1, ["gradient_accumulation_steps is 1", "expected 4 (batch.rows_per_step / "]),
        ("gradient_clipping", 1.0, ["gradient_clipping is 1.0", "expected 0.3 (optim.max_grad_norm"]),
        ("bf16.enabled", True, ["bf16.enabled is True, expected False", "fp32 masters"]),
        ("zero_optimization.stage", 3, ["stage is 3", "expected 2 (strategy.name zero2)"]),
        (
            "zero_optimization.offload_optimizer.device",
            "cpu",
            ["device is 'cpu'", "expected 'none' (strategy.name zero2)"],
        ),
        ("optimizer", {"type": "AdamW"}, ["optimizer is not allowed", "optim.name"]),
        ("elasticity", {"enabled": True}, ["elasticity is not allowed", "batch.rows_per_step"]),
        ("zero_optimization.sub_group_size", 1000, ["sub_group_size", "remove it"]),
        ("zero_optimization.zero_hpz_partition_size", 2, ["zero_hpz_partition_size is 2, expected 1"]),
        ("communication_data_type", "bf16", ["communication_data_type is 'bf16'", "reduced in fp32"]),
        ("gradient_allreduce_op", "sum", ["gradient_allreduce_op is 'sum'"]),
        ("zero_optimization.reduce_bucket_size", "auto", ['reduce_bucket_size is "auto"', "write a number"]),
    ],
)
def test_a_ds_config_that_contradicts_the_run_config_is_refused(tmp_path, key, value, messages):
    config = json.loads((DS_CONFIGS / "zero2.json").read_text())
    *sections, last = key.split(".")
    node = config
    for section in sections:
        node = node.setdefault(section, {})
    node[last] = value
    (tmp_path / "mine.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        _fill(tmp_path / "mine.json")
    for message in ["mine.json", *messages]:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {"strategy__name": "zero2_offload", "optim__name": "paged_adamw_32bit"},
            ["zero2_offload", "optim.name=adamw"],
        ),
        ({"strategy__name": "zero3", "optim__name": "adamw_8bit"}, ["zero3", "optim.name=paged_adamw_32bit"]),
        ({"strategy__name": "zero3", "model__quantization": "int8"}, ["int8", "model.quantization=nf4"]),
        ({"strategy__name": "zero3", "memory__recompute": "none"}, ["recompute none", "memory.recompute=full"]),
        ({"strategy__name": "zero3", "lora__variant": "dora"}, ["dora", "lora.variant=rslora"]),
        ({"strategy__name": "ddp", "strategy__ds_config": "x.json"}, ["x.json", "does not use DeepSpeed"]),
        ({"strategy__name": "zero2", "strategy__ds_config": "nowhere.json"}, ["nowhere.json", "no such file"]),
    ],
    ids=["offload", "zero3 8-bit", "zero3 int8", "zero3 recompute", "zero3 dora", "ddp", "missing"],
)
def test_an_unsupported_combination_is_refused_before_the_model_is_read(raw, monkeypatch, changes, messages):
    def refuse(*_, **__):
        raise AssertionError("the model was read")

    monkeypatch.setattr(setup_model, "load_base", refuse)
    with pytest.raises(UserError) as caught:
        train(config_of(raw, **changes))
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "variables", "refused"),
    [
        (
            "ddp",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            "DEEPSPEED with ZeRO stage 2",
        ),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "strategy.name=zero3"),
        ("zero2", {"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        (
            "zero2",
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "my.json"},
            "set strategy.ds_config=my.json",
        ),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, None),
        ("ddp", {}, None),
    ],
)
def test_a_launcher_set_to_another_strategy_is_refused(monkeypatch, name, variables, refused):
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    if refused:
        with pytest.raises(UserError, match=refused):
            require_own_strategy(name)
    else:
        require_own_strategy(name)
        assert "ACCELERATE_USE_DEEPSPEED" not in os.environ, "Accelerator would create its own plugin"


def test_8bit_states_are_refused_if_their_blocks_would_span_weights(raw):
    raw = changed(raw, strategy__name="zero2", optim__name="adamw_8bit")
    for name, text in on_ranks(_outcome_of_training, RANKS, raw):
        assert name == "UserError" and "one scale per 256 elements" in text and "paged_adamw_32bit" in text


def test_experts_are_refused_because_a_rank_may_have_no_gradient_for_them(raw):
    model = torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(4, 4)])})
    with pytest.raises(UserError, match=r"cannot train the experts of a mixture \(experts.0.weight"):
        build_update(config_of(raw, strategy__name="zero2"), World.init(), model, torch.empty(0))


def _outcome_of_training(raw):
    return outcome(train, config_of(raw))
