"""Names that people bring from other trainers are answered with the key that does that here, and with its value."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import yaml
from helpers.tiny_run import changed
from pydantic import BaseModel

from qlora_dist.config import RunConfig, parse_config
from qlora_dist.config.foreign.table import ANSWERS, answer
from qlora_dist.errors import UserError

MINIMAL = {"run_dir": "runs/x", "model": {"name": "m"}, "data": {"train": [{"path": "d.json"}]}, "train": {"steps": 3}}

AXOLOTL = """
base_model: NousResearch/Llama-2-7b-hf
load_in_4bit: true
adapter: qlora
datasets: [{path: mhenrichsen/alpaca_2k_test, type: alpaca}]
val_set_size: 0.05
output_dir: ./outputs/qlora-out
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
"""


def test_a_config_of_another_trainer_is_answered_key_by_key():
    with pytest.raises(UserError) as caught:
        parse_config(yaml.safe_load(AXOLOTL), "axolotl.yaml")
    said = str(caught.value)
    for line in (
        "base_model: unknown key; set model.name: NousResearch/Llama-2-7b-hf",
        "load_in_4bit: unknown key; set model.quantization: nf4",
        "sequence_len: unknown key; set data.row_tokens: 4096",
        "micro_batch_size: unknown key; set batch.rows_per_step: 8 and batch.micro_rows: 2 (2 per device",
        "gradient_accumulation_steps: unknown key; set batch.rows_per_step: 8 and batch.micro_rows: 2",
        "on one device; 8 x N on N",
        "datasets: unknown key; set data.train: [{path: ..., format: ...}]",
        "val_set_size: unknown key; set in each source of data.train hold_out: 0.05",
        "lora_r: unknown key; set lora.rank: 32",
        "num_epochs: unknown key; set train.epochs: 4",
        "optimizer: unknown key; set optim.name: paged_adamw_32bit",
        "learning_rate: unknown key; set optim.lr: 0.0002",
        "output_dir: unknown key; set run_dir: ./outputs/qlora-out",
    ):
        assert line in said, (line, said)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"max_seq_length": 2048}, "set data.row_tokens: 2048"),
        ({"lora": {"r": 8}}, "lora.r: unknown key; set lora.rank: 8"),
        ({"per_device_train_batch_size": 4}, "set batch.rows_per_step: 4 and batch.micro_rows: 4 (4 per"),
        ({"batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 8}}, "set batch.rows_per_step: 16 and"),
        ({"gradient_accumulation_steps": 8}, "set batch.rows_per_step, and batch.micro_rows"),
        ({"warmup_ratio": 0.03, "max_steps": 1000}, "set optim.warmup_steps: 0.03 (that share"),
        ({"warmup_ratio": 3}, "or to a share of them below 1"),
        ({"load_in_4bit": False}, "set model.quantization: none"),
        ({"lr_scheduler_type": "polynomial"}, "here it is optim.schedule, one of cosine, linear, constant"),
        ({"report_to": "none"}, "set logging.trackers: []"),
        ({"lora_target": "all"}, "set lora.target_modules: all-linear"),
        ({"LEARNING_RATE": 1}, "set optim.lr: 1"),
        ({"learning_rate": ["x"] * 1000}, "..."),
    ],
)  # fmt: skip
def test_the_value_is_computed_where_it_can_be(given, expected):
    raw = changed(MINIMAL)
    raw |= {key: {**raw.get(key, {}), **value} if isinstance(value, dict) else value for key, value in given.items()}
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    assert expected in str(caught.value)


def _keys(model, prefix=""):
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from _keys(section, f"{prefix}{name}.")


@pytest.mark.parametrize("value", [True, False, None, 1, 0.5, "all", [], {}], ids=repr)
def test_every_answer_names_keys_that_exist_whatever_was_given(value):
    keys = set(_keys(RunConfig))
    for name in ANSWERS:
        said = answer(name, value, {name: value})
        assert said
        named = set(re.findall(r"\b(?:model|lora|data|batch|optim|train|memory|strategy|logging)\.[a-z_]+", said))
        assert named <= keys, (name, named - keys)


def test_a_name_that_is_a_key_here_too_is_never_unknown_and_a_text_in_place_of_a_section_is_answered():
    """seed and device mean the same everywhere; `optim: adamw_torch` is a name where a section stands here."""
    assert {key for key in _keys(RunConfig) if "." not in key} & set(ANSWERS) == {"seed", "device", "optim"}
    with pytest.raises(UserError, match=r"optim: expected a section of keys; set optim\.name: adamw "):
        parse_config(changed(MINIMAL, optim="adamw_torch"))
    with pytest.raises(UserError, match="optim: expected a section of keys, such as name, lr, schedule"):
        parse_config(changed(MINIMAL, optim=3))
    with pytest.raises(UserError, match=r"data.train.0: expected a section of keys, such as path, format"):
        parse_config(changed(MINIMAL, data__train=["d.json"]))
