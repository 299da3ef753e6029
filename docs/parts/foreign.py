"""What keys of other trainers become: what `qlora-dist import` makes of the cases that its tests check."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from docs.parts.markdown import code, prose, table
from qlora_dist.config.foreign.answers import EACH, Answer, shown
from qlora_dist.config.foreign.translate import Line, translate_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from helpers.foreign_cases import CASES, INFO, SMALL

# Names of transformers' TrainingArguments and of PEFT that several of these trainers take. The cases name one trainer
_HUGGING_FACE = (
    "gradient_accumulation_steps", "max_steps", "learning_rate", "weight_decay", "adam_epsilon", "adam_beta1",
    "adam_beta2", "max_grad_norm", "warmup_ratio", "warmup_steps", "eval_steps", "eval_strategy", "save_steps",
    "save_strategy", "save_total_limit", "lora_alpha", "lora_dropout", "gradient_checkpointing", "deepspeed", "fsdp",
    "ddp_timeout", "seed", "output_dir", "bf16",
)  # fmt: skip
_ALSO: dict[str, tuple[str, ...]] = {
    "axolotl": (*_HUGGING_FACE, "load_in_4bit", "load_in_8bit", "eval_on_start"),
    "llama-factory": (
        *_HUGGING_FACE, "model_name_or_path", "per_device_train_batch_size", "num_train_epochs", "lr_scheduler_type",
        "optim", "report_to", "packing", "use_rslora", "use_dora", "eval_on_start", "resume_from_checkpoint",
    ),
    "trl": (*_HUGGING_FACE, "lora_r"),
    "torchtune": ("gradient_accumulation_steps", "seed", "output_dir"),
}  # fmt: skip
# Older or other names, which import knows and no trainer documents today
_ALIASES = {
    "per_device_batch_size", "grad_accum", "gradient_accumulation", "max_seq_len", "model_max_length",
    "max_train_steps", "model_name", "model_id", "pretrained_model_name_or_path", "r", "train_file",
    "tokenizer_name_or_path", "test_split_size",
}  # fmt: skip


# What makes evaluations possible, beside keys of another trainer's cases
_HELD_OUT: dict[str, dict[str, Any]] = {
    "axolotl": {"val_set_size": 0.1}, "llama-factory": {"val_size": 0.1}, "trl": {"eval_strategy": "steps"},
}  # fmt: skip


def translated(trainer: str) -> str:
    """A table of keys with a value each, beside a small config of that trainer, on two GPUs."""
    rows = []
    with _folder():
        for key, value, beside in _examples(trainer):
            lines = [line for line in _lines(trainer, {**SMALL[trainer], **beside, key: value}) if _is_of(line, key)]
            theirs = "<br>".join(code(f"{name}: {_short(one)}") for name, one in {key: value, **beside}.items())
            rows.append((theirs, "<br>".join(filter(None, (_ours(line.answer) for line in lines)))))
    return table(("there", "here"), rows)


def defaults(trainer: str) -> str:
    """What is set, or said to be missing, for keys that a small config of that trainer leaves out."""
    with _folder():
        lines = [line for line in _lines(trainer, SMALL[trainer]) if line.is_default]
    return table(("absent there", "here"), [(code(line.origin), _ours(line.answer)) for line in lines])


def left_out(groups: Mapping[str, tuple[str, ...]]) -> str:
    rows = [(prose(why), ", ".join(code(key) for key in keys)) for why, keys in groups.items()]
    return table(("why", "keys"), rows)


def _examples(trainer: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """(key, value, keys beside it) of the cases, once each."""
    seen = set()
    for whose, key, value, beside, _ in CASES:
        mine = whose == trainer or key in _ALSO[trainer]
        if whose != trainer:
            beside = {"eval_steps": 100, **_HELD_OUT[trainer]} if key.startswith("eval_st") and mine else {}
            beside = {name: one for name, one in beside.items() if name != key}
        told = repr((key, value, beside))
        if mine and key not in _ALIASES and "*" not in key and None not in beside.values() and told not in seen:
            seen.add(told)
            yield key, value, beside


def _lines(trainer: str, flat: Mapping[str, Any]) -> tuple[Line, ...]:
    raw: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        node = raw
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    Path("theirs.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return translate_file("theirs.yaml", trainer=trainer, gpus=2).lines


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    """A temporary working directory with the data sets' names of LLaMA-Factory."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            Path("data").mkdir()
            Path("data/dataset_info.json").write_text(json.dumps(INFO))
            yield
        finally:
            os.chdir(before)


def _is_of(line: Line, key: str) -> bool:
    return (
        not line.is_default and line.key.startswith(key) and line.key[len(key) :][:1] not in ("_", *map(str, range(10)))
    )


def _ours(answer: Answer) -> str:
    if answer.is_lost:
        return f"not translated: {prose(_here(answer.text))}"
    values = "<br>".join(map(_setting, answer.values.items()))
    note = prose(_here(answer.text))
    if not values:
        return f"nothing to set: {note}"
    return f"{values} ({note})" if note and not note.startswith("set data") else values


def _setting(setting: tuple[str, Any]) -> str:
    key, value = setting
    return f"{code(f'{key.removeprefix(EACH)}: {_short(value)}')}{' in each source' * key.startswith(EACH)}"


def _short(value: Any) -> str:
    return _here(shown(value))


def _here(text: str) -> str:
    """Without the temporary folder."""
    return text.replace(f"{Path.cwd()}/", "").replace(str(Path.cwd().resolve()), ".")
