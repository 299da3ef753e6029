"""Runs of models with state layers: ranks, resuming, the adapter in stock PEFT, the merged model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.tiny_models import HYBRIDS, save_model, tiny_config, tiny_model
from helpers.tiny_run import changed, config_of, losses_of, make_inputs, resumed_digests
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qlora_dist.commands.merge import merge
from qlora_dist.errors import UserError
from qlora_dist.model import INFERENCE, load_base
from qlora_dist.model.lora import load_adapters
from qlora_dist.train import train

# each kind of layer with state once; the other families differ in nothing that ranks share
STRATEGIES = {"qwen3_5_text": "ddp", "qwen3_next": "fsdp", "lfm2": "zero2", "falcon_h1": "zero3"}


def _train(raw: dict[str, Any], **changes: Any) -> str | None:
    try:
        train(config_of(raw, **changes))
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module", params=HYBRIDS)
def trained(request: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """A run of one process."""
    try:
        tiny_config(request.param)
    except (ValueError, KeyError) as error:
        pytest.skip(f"this transformers has no {request.param}: {error}")
    folder = tmp_path_factory.mktemp(request.param)
    raw = make_inputs(folder)
    shutil.rmtree(folder / "model")
    save_model(folder / "model", tiny_model(request.param, attention=None))
    raw["train"] = {"steps": 4, "save_every": 2}
    raw["lora"]["dropout"] = 0.1  # a pure function of the row: of no order or grouping of its documents
    assert _train(raw) is None
    return raw


def test_the_loss_falls_and_two_ranks_train_as_one(trained: dict[str, Any], tmp_path: Path) -> None:
    losses = losses_of(trained["run_dir"])
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    strategy = STRATEGIES.get(Path(trained["model"]["name"]).parent.name.rstrip("0"))
    if strategy is None:
        return
    run_dir = str(tmp_path / "run")
    raw = changed(trained, run_dir=run_dir, strategy__name=strategy)
    assert on_ranks(_train, 2, raw, timeout=240) == [None, None]
    assert losses_of(run_dir) == pytest.approx(losses, abs=1e-5)


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained: dict[str, Any], tmp_path: Path) -> None:
    expected, found = resumed_digests(trained, tmp_path / "run")
    assert found == expected


@torch.no_grad()
def test_the_adapter_gives_equal_logits_in_stock_peft(trained: dict[str, Any]) -> None:
    folder, name = Path(trained["run_dir"]) / "adapter", trained["model"]["name"]
    ids = torch.tensor([[5, 9, 30, 7, 61, 12]])
    settings = {"double_quant": True, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    base = load_base(name, quantization="none", attention=INFERENCE, **settings)
    ours = load_adapters(base, {"one": folder})(ids).logits
    stock = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    plain = stock(ids).logits
    theirs = PeftModel.from_pretrained(stock, str(folder))(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - plain).abs().max() > 0.01


def test_merged_onto_dequantized_is_what_was_trained(trained: dict[str, Any], tmp_path: Path) -> None:
    report = merge(trained["run_dir"], tmp_path / "out", onto="dequantized", dtype=torch.float32, compare=True)
    assert report.gaps["dequantized"] <= 1e-4 * report.logit_range
    assert report.gaps["base"] > 100 * report.gaps["dequantized"]
