"""What was trained over a sharded base is evaluated and answers over a sharded base, and says what that takes."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.mmlu import write_mmlu
from helpers.ranks import on_ranks, outcome
from helpers.tiny_models import save_model, tiny_model
from helpers.tiny_run import changed, make_inputs, train_here
from helpers.tiny_tokenizers import byte_level_tokenizer

from qlora_dist.commands import invoke, trained
from qlora_dist.commands.evaluate import MmluTask, evaluate_trained
from qlora_dist.commands.generate import generate
from qlora_dist.commands.trained import find_trained, load_trained_base
from qlora_dist.config import load_config
from qlora_dist.errors import UserError
from qlora_dist.files import GIB
from qlora_dist.memory import shapes_from_config
from qlora_dist.memory.inference import fewest_ranks, inference_bytes
from qlora_dist.model import Sampling, unwrap

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two ranks with a sharded base, and questions of MMLU."""
    folder = tmp_path_factory.mktemp("sharded")
    raw = make_inputs(folder)
    tokenizer = byte_level_tokenizer()
    model = tiny_model(attention=None, vocab_size=len(tokenizer), max_position_embeddings=1024)
    tokenizer.save_pretrained(save_model(folder / "subwords", model, tokenizer=False))
    raw = changed(
        raw,
        model__name=str(folder / "subwords"),
        data__template="none",
        data__row_tokens=128,
        data__eval=[{"path": str(folder / "held_out.json"), "format": "input-output"}],
        strategy__name="fsdp",
    )
    on_ranks(train_here, 2, raw)
    write_mmlu(folder / "mmlu")
    (folder / "prompts.txt").write_text("one\ntwo and three\nw20 w21\nfour\nw6 w7 w8\n")
    return {**raw, "folder": str(folder)}


def _is_sharded(run_dir: str) -> bool:
    from qlora_dist.cluster.world import World

    found = find_trained(run_dir)
    world = World.init()
    base: Any = unwrap(load_trained_base(found, world.device, shards=found.shards(world)))
    return base.sharded.group.size == world.size and base.model.layers[0].mlp.up_proj.weight.to_local().numel() * 2 == (
        base.model.layers[0].mlp.up_proj.codes_shape.numel() // 2
    )


def _evaluated(run: dict[str, Any]) -> dict[str, Any]:
    mmlu = MmluTask(f"{run['folder']}/mmlu", "val", shots=1, max_tokens=512)
    return {name: asdict(one) for name, one in evaluate_trained(run["run_dir"], with_base=True, mmlu=mmlu).items()}


def _generated(run: dict[str, Any], options: dict[str, Any]) -> str:
    out: list[str] = []
    generate(run["run_dir"], sampling=Sampling(max_new_tokens=12), write=out.append, **options)
    return "".join(out)


def test_losses_and_scores_are_those_of_one_process(run: dict[str, Any]) -> None:
    alone = _evaluated(run)
    for sharded in on_ranks(_evaluated, 2, run):
        for name in ("base", "trained"):
            expected, found = alone[name], sharded[name]
            assert found["held_out"]["loss"] == pytest.approx(expected["held_out"]["loss"], abs=1e-6)
            assert found["held_out"]["num_labels"] == expected["held_out"]["num_labels"] > 50
            assert found["mmlu"] == expected["mmlu"] and found["mmlu"]["num_questions"] == 10
    assert alone["base"]["held_out"]["loss"] - alone["trained"]["held_out"]["loss"] > 0.05  # the guard
    assert on_ranks(_is_sharded, 2, run["run_dir"]) == [True, True]


def test_answers_are_those_of_one_process_and_written_once(run: dict[str, Any]) -> None:
    """Five prompts over two ranks: a batch that is not full, and a rank without any."""
    options: dict[str, Any] = {"prompts": f"{run['folder']}/prompts.txt", "batch_size": 2}
    alone = _generated(run, options)
    assert len(alone.splitlines()) == 5 and len({json.loads(line)["completion"] for line in alone.splitlines()}) > 2
    assert on_ranks(_generated, 2, run, options) == [alone, ""]


def test_an_offloaded_base_gives_the_same(run: dict[str, Any], tmp_path: Path) -> None:
    offloaded = {**run, "run_dir": str(shutil.copytree(run["run_dir"], tmp_path / "run"))}
    config = changed(yaml.safe_load((tmp_path / "run/config.yaml").read_text()), strategy__offload=True)
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    options: dict[str, Any] = {"prompts": f"{run['folder']}/prompts.txt"}
    assert on_ranks(_generated, 2, offloaded, options) == [_generated(run, options), ""]
    expected, found = _evaluated(run), on_ranks(_evaluated, 2, offloaded)[0]
    assert found["trained"]["held_out"]["loss"] == pytest.approx(expected["trained"]["held_out"]["loss"], abs=1e-6)


def test_one_prompt_is_streamed_by_rank_0_and_a_chat_is_refused(run: dict[str, Any]) -> None:
    alone = _generated(run, {"prompt": "w20 w21"})
    assert on_ranks(_generated, 2, run, {"prompt": "w20 w21"}) == [alone, ""] and len(alone) > 3
    for kind, text in on_ranks(outcome_of, 2, run):
        assert kind == "UserError" and "a chat is held with one process; give --prompt or --prompts" in text


def outcome_of(run: dict[str, Any]) -> tuple[str, str]:
    return outcome(_generated, run, {})


# --- what it takes ----------------------------------------------------------------------------------------------------


def test_a_card_that_is_too_small_is_said_before_anything_is_loaded(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    monkeypatch.setattr(trained, "load_base", lambda *given, **_: loaded.append(given))
    monkeypatch.setattr(trained, "usable_bytes", lambda _: 2**20)
    for use in (lambda: evaluate_trained(run["run_dir"]), lambda: _generated(run, {"prompt": "w6"})):
        with pytest.raises(UserError, match=r"subwords does not fit, and nothing was loaded: .* planned .*use a GPU"):
            use()
    monkeypatch.setattr(trained, "fewest_ranks", lambda *_, **__: 3)
    with pytest.raises(UserError, match="shard the base over 3 GPUs or more, as in training: --ranks 3"):
        evaluate_trained(run["run_dir"])
    assert loaded == []


def test_70b_needs_two_cards_of_24_gb(tmp_path: Path) -> None:
    """The recipe's base, by the plan alone."""
    config = load_config(REPOSITORY / "launch/recipes/llama2-70b-fsdp.yaml")
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
             "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}  # fmt: skip
    shapes = shapes_from_config({"model_type": "llama", **sizes})
    assert shapes is not None
    card = 23 * GIB
    assert inference_bytes(config, shapes, world_size=1, tokens=1024) > 34 * GIB
    assert inference_bytes(config, shapes, world_size=2, tokens=1024) < card
    assert fewest_ranks(config, shapes, device_bytes=card, tokens=1024) == 2
    assert fewest_ranks(config, shapes, device_bytes=GIB, tokens=1024) is None


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "RUN", "--with-base", "--micro-rows", "2"],
        ["generate", "RUN", "--prompts", "PROMPTS", "--adapter", "a=RUN/adapter", "--adapter", "b=RUN/adapter"],
    ],
)
def test_ranks_are_started_with_the_same_words(
    run: dict[str, Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> None:
        started.append(command)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    names = {"RUN": run["run_dir"], "PROMPTS": f"{run['folder']}/prompts.txt"}
    given = [names.get(word, word.replace("RUN", run["run_dir"])) for word in words]
    with pytest.raises(SystemExit):
        invoke([*given, "--ranks", "2"])
    (command,) = started
    assert "--nproc-per-node=2" in command
    again = command[command.index("qlora_dist") + 1 :]
    assert again[:2] == given[:2] and len(again) == len({*again}) and not any("ranks" in word for word in again)
    assert sorted("=".join(again[2:]).split("=")) == sorted("=".join(given[2:]).split("="))
