"""Training on a sharded base equals ddp, bit for bit, and what cannot be sharded is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.crew import Crew
from helpers.ranks import on_ranks
from helpers.tiny_run import changed, config_of, digests_of, losses_of, make_inputs, metrics_of, write_config

from qlora_dist.errors import UserError
from qlora_dist.model import (
    base_checksum,
    held_bytes,
)


def _train(raw: dict[str, Any]) -> dict[str, Any]:
    """A run; returns facts about the model that it leaves in memory."""
    import qlora_dist.train as trainer
    from qlora_dist.train import setup_model

    seen: dict[str, Any] = {}
    build = setup_model.build_model

    def recording(config: Any, world: Any) -> Any:
        model = build(config, world)
        seen.update(model=model, before=base_checksum(model.module))
        return model

    trainer.build_model = recording
    trainer.train(config_of(raw))
    if not seen:
        return {}
    model = seen["model"].module
    return {
        "unchanged": base_checksum(model) == seen["before"],
        "held": held_bytes(model),
        "counts": (seen["model"].num_base_parameters, seen["model"].num_trainable_parameters),
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def losses_and_norms(run_dir: Any) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics_of(run_dir)]


LAST = "checkpoints/step-00000006"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy__offload": True, "memory__recompute": "none", "model__double_quant": False},
        {"model__quantization": "none", "memory__recompute": 1, "lora__dropout": 0.1},
    ],
)
def test_fsdp_matches_ddp_bit_for_bit_over_six_steps(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    raw = changed(inputs, train__steps=6, data__eval=inputs["data"]["train"], train__eval_every=3, **changes)
    found = {}
    for strategy in ("ddp", "fsdp"):
        own = {"run_dir": str(tmp_path / strategy), "strategy__name": strategy}
        if strategy == "ddp":
            own["strategy__offload"] = False
        found[strategy] = on_ranks(_train, 2, changed(raw, **own))
    # the same numbers in the same kernels, wherever they were stored: no tolerance
    assert losses_and_norms(tmp_path / "fsdp") == losses_and_norms(tmp_path / "ddp")
    assert len(losses_of(tmp_path / "ddp")) == 6
    assert losses_of(tmp_path / "fsdp")[-1] < losses_of(tmp_path / "fsdp")[0]
    assert digests_of(tmp_path / "fsdp" / LAST) == digests_of(tmp_path / "ddp" / LAST)
    assert [m["eval_loss"] for m in metrics_of(tmp_path / "fsdp")[2::3]] == [
        m["eval_loss"] for m in metrics_of(tmp_path / "ddp")[2::3]
    ]
    for ddp, fsdp in zip(found["ddp"], found["fsdp"]):
        assert fsdp["unchanged"] and fsdp["counts"] == ddp["counts"]
        assert fsdp["held"] < 0.62 * ddp["held"]  # half, plus what every rank holds: code books and norms matter here


def test_four_ranks_give_the_losses_of_one_even_if_some_have_no_labels(inputs: dict[str, Any], tmp_path: Path) -> None:
    # 13 rows in steps of 4: in the last step three ranks have filler, but must still gather every layer
    raw = changed(inputs, train__steps=None, train__epochs=13 / 24, batch__rows_per_step=4)
    on_ranks(_train, 4, changed(raw, run_dir=str(tmp_path / "four"), strategy__name="fsdp"))
    # with one rank there is nothing to shard: fsdp is then ddp
    on_ranks(_train, 1, changed(raw, run_dir=str(tmp_path / "one"), strategy__name="fsdp"))
    four = metrics_of(tmp_path / "four")
    assert len(four) == 4 and four[-1]["tokens"] <= 32 < four[0]["tokens"], "the last step must be one row"
    # fp32 sums in another order, over four updates
    assert losses_of(tmp_path / "four") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


def test_a_run_resumes_under_another_strategy_bit_for_bit(inputs: dict[str, Any], tmp_path: Path) -> None:
    raw = changed(inputs, lora__dropout=0.1)
    on_ranks(_train, 2, changed(raw, run_dir=str(tmp_path / "whole"), train__steps=6))
    moved = changed(raw, run_dir=str(tmp_path / "moved"))
    for steps, strategy in ((2, "fsdp"), (4, "ddp"), (6, "fsdp")):
        on_ranks(_train, 2, changed(moved, train__steps=steps, strategy__name=strategy))
    assert losses_of(tmp_path / "moved") == losses_of(tmp_path / "whole")
    last = "checkpoints/step-00000006"
    assert digests_of(tmp_path / "moved" / last) == digests_of(tmp_path / "whole" / last)


def test_the_adapter_of_a_sharded_base_is_whole_and_loads_in_stock_peft(inputs: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    raw = changed(inputs, run_dir=str(tmp_path / "run"), strategy__name="fsdp")
    on_ranks(_train, 2, raw)
    base = AutoModelForCausalLM.from_pretrained(raw["model"]["name"])
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
        assert (plain - adapted(ids).logits).abs().max() > 1e-2
    matrices = {name: value for name, value in adapted.named_parameters() if "lora_" in name}
    assert len(matrices) == 28 and all(value.any() for value in matrices.values())
    for name, value in matrices.items():
        layer = adapted.get_submodule(name.split(".lora_")[0]).base_layer.weight
        assert value.shape == ((4, layer.shape[1]) if "lora_A" in name else (layer.shape[0], 4))


def test_a_run_with_a_4_bit_cache_reads_the_copy_on_every_rank(inputs: dict[str, Any], tmp_path: Path) -> None:
    raw = changed(inputs, train__steps=3)
    on_ranks(_train, 2, changed(raw, run_dir=str(tmp_path / "plain")))
    own = {"model__cache_4bit": str(tmp_path / "cache"), "strategy__name": "fsdp"}
    on_ranks(_train, 2, changed(raw, run_dir=str(tmp_path / "fsdp"), **own))
    assert losses_of(tmp_path / "fsdp") == losses_of(tmp_path / "plain")
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1
    adapter = (tmp_path / "fsdp" / "adapter" / "adapter_config.json").read_text()
    assert raw["model"]["name"] in adapter and "cache" not in adapter


def test_a_run_reports_what_is_sharded(inputs: dict[str, Any], tmp_path: Path) -> None:
    fsdp = {"run_dir": str(tmp_path / "run"), "train__steps": 2, "strategy__name": "fsdp"}
    with Crew(write_config(tmp_path / "config.yaml", inputs, **fsdp), tmp_path) as crew:
        first, _ = crew.wait()
    assert first.code == 0, first.output
    assert "every rank holds 1/2 of the base's matrices and constants, and whole norms and adapters" in first.output
    assert len(losses_of(tmp_path / "run")) == 2


def test_a_dry_run_on_random_weights_needs_only_config_and_tokenizer(inputs: dict[str, Any], tmp_path: Path) -> None:
    model = Path(shutil.copytree(inputs["model"]["name"], tmp_path / "model"))
    (model / "model.safetensors").unlink()
    raw = changed(inputs, run_dir=str(tmp_path / "files"), train__steps=2, model__name=str(model))
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        _train(raw)
    _train(changed(raw, run_dir=str(tmp_path / "run"), model__weights="random"))
    assert len(losses_of(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__quantization": "int8"}, "strategy fsdp cannot shard int8 weights.*nf4, fp4 or none, or strategy ddp"),
        ({"lora": None, "model__quantization": "none"}, "strategy fsdp shards a frozen base.*full fine-tuning.*ddp"),
        ({"lora__variant": "dora"}, "lora.variant dora needs whole weights.*strategy ddp"),
        ({"strategy__name": "ddp", "strategy__offload": True}, "strategy.offload .*only strategy fsdp"),
        ({"strategy__offload": True}, "strategy.offload is true, but one rank shards nothing"),
    ],
)
def test_what_fsdp_does_not_support_is_rejected_before_the_model_is_read(
    inputs: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    from qlora_dist.train import train

    raw = changed(inputs, run_dir=str(tmp_path / "run"), **{"strategy__name": "fsdp", **changes})
    with pytest.raises(UserError, match=message):
        train(config_of(raw))
