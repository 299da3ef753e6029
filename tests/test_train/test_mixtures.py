"""Runs with experts in 4 bits, gpt-oss from MXFP4: ranks, strategies, resuming, the adapter in stock PEFT, merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoded import save_mxfp4
from helpers.ranks import on_ranks
from helpers.tiny_models import save_model, tiny_model
from helpers.tiny_run import changed, config_of, losses_of, make_inputs, metrics_of, resumed_digests
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qlora_dist.commands import invoke
from qlora_dist.commands.merge import merge
from qlora_dist.errors import UserError
from qlora_dist.model import INFERENCE, load_base
from qlora_dist.model.lora import load_adapters
from qlora_dist.train import expert_load, train


def _inputs(folder: Path, family: str, experts: str, **sizes: Any) -> dict[str, Any]:
    raw = make_inputs(folder)
    shutil.rmtree(folder / "model")
    if family == "gpt_oss":
        save_mxfp4(folder / "model")
    else:
        save_model(folder / "model", tiny_model(family, attention=None, **sizes))
    raw["train"] = {"steps": 4, "save_every": 2}
    raw["lora"]["experts"] = experts
    raw["data"]["eval"] = [{"path": str(folder / "held_out.json"), "format": "input-output"}]
    return raw


def _train(raw: dict[str, Any], **changes: Any) -> str | None:
    try:
        train(config_of(raw, **changes))
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral", "gpt_oss"])
def trained(request: Any, tmp_path_factory: Any) -> dict[str, Any]:
    """A run of one process: with adapters on all of many experts, some of which have no token; with frozen experts."""
    kinds: dict[str, Any] = {
        "qwen3_moe": {"experts": "all", "num_experts": 32, "num_experts_per_tok": 2},
        "mixtral": {"experts": "shared"},
        "gpt_oss": {"experts": "shared"},
    }
    raw = _inputs(tmp_path_factory.mktemp("mixture"), request.param, **kinds[request.param])
    assert _train(raw) is None
    return raw


def test_the_loss_falls_and_the_saved_adapter_has_what_was_asked_for(trained: dict[str, Any]) -> None:
    losses = losses_of(trained["run_dir"])
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    assert all(line["peak_bytes"] > 0 for line in metrics_of(trained["run_dir"]))
    keys = load_file(Path(trained["run_dir"]) / "adapter/adapter_model.safetensors")
    assert sum("self_attn" in key for key in keys) == 2 * 4 * 2
    assert len(keys) == 2 * 4 * 2 + (2 * 2 * 2 if trained["lora"]["experts"] == "all" else 0)
    assert not any("mlp.gate." in key for key in keys)


def test_metrics_tell_how_even_experts_are_loaded(trained: dict[str, Any]) -> None:
    """32 experts for a few hundred slots a step, of which a rank of two sees half: some have no token."""
    for line in metrics_of(trained["run_dir"]):
        assert 1 < line["expert_load"] < 16
        assert (line["experts_without_tokens"] > 0) == (trained["lora"]["experts"] == "all")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero2"])
def test_two_ranks_train_as_one(trained: dict[str, Any], strategy: str, tmp_path: Path) -> None:
    run_dir = str(tmp_path / "run")
    raw = changed(trained, run_dir=run_dir, strategy__name=strategy)
    assert on_ranks(_train, 2, raw, timeout=240) == [None, None]
    assert losses_of(run_dir) == pytest.approx(losses_of(trained["run_dir"]), abs=1e-5)
    first, alone = metrics_of(run_dir)[0], metrics_of(trained["run_dir"])[0]
    for key in ("expert_load", "experts_without_tokens"):  # over all ranks, before rounding could reroute a token
        assert first[key] == alone[key]


def test_a_stage_that_cannot_gather_experts_is_refused(trained: dict[str, Any], tmp_path: Path) -> None:
    for text in on_ranks(_train, 2, changed(trained, run_dir=str(tmp_path / "run"), strategy__name="zero3")):
        assert text is not None and "zero3 gathers weights layer by layer" in text and "use strategy fsdp" in text


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(trained: dict[str, Any], tmp_path: Path) -> None:
    expected, found = resumed_digests(trained, tmp_path / "run")
    assert found == expected


@torch.no_grad()
def test_the_adapter_gives_equal_logits_in_stock_peft(trained: dict[str, Any]) -> None:
    """Over the same 16-bit base, and over the 4-bit one with this package's forward pass."""
    folder, name = Path(trained["run_dir"]) / "adapter", trained["model"]["name"]
    ids = torch.tensor([[5, 9, 30, 7, 61, 12]])
    settings = {"double_quant": True, "compute_dtype": torch.float32, "device": torch.device("cpu")}
    base = load_base(name, quantization="none", attention=INFERENCE, **settings)
    ours = load_adapters(base, {"one": folder})(ids).logits
    stock = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).float()
    plain = stock(ids).logits
    theirs = PeftModel.from_pretrained(stock, str(folder))(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - plain).abs().max() > 0.01


def test_evaluate_and_generate_read_the_run(trained: dict[str, Any], capsys: Any) -> None:
    """Both losses: of the base and with the adapter, which the run has measured as well."""
    last = metrics_of(trained["run_dir"])[-1]
    assert invoke(["evaluate", trained["run_dir"], "--with-base", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert results["trained"]["held_out"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert results["base"]["held_out"]["loss"] > last["eval_loss"] + 0.1
    answers = []
    for given in (trained["run_dir"], str(Path(trained["run_dir"]) / "adapter")):
        assert invoke(["generate", given, "--prompt", "w20 w21 w22", "--max-new-tokens", "4"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and answers[0].strip()


def test_merged_onto_dequantized_is_what_was_trained(trained: dict[str, Any], tmp_path: Path) -> None:
    report = merge(trained["run_dir"], tmp_path / "out", onto="dequantized", dtype=torch.float32, compare=True)
    assert report.gaps["dequantized"] <= 1e-4 * report.logit_range
    assert report.gaps["base"] > 100 * report.gaps["dequantized"]
    keys = load_file(tmp_path / "out/model.safetensors").keys()
    is_stacked = "gpt_oss" in (tmp_path / "out/config.json").read_text()
    assert any((".experts.gate_up_proj" if is_stacked else ".experts.0.") in key for key in keys)


@torch.no_grad()
def test_merged_onto_base_is_what_peft_merges(trained: dict[str, Any], tmp_path: Path) -> None:
    merge(trained["run_dir"], tmp_path / "out", onto="base", dtype=torch.float32, compare=False)
    stock = AutoModelForCausalLM.from_pretrained(trained["model"]["name"], dtype=torch.float32)
    plain = {name: value.clone() for name, value in stock.named_parameters()}
    theirs = PeftModel.from_pretrained(stock, str(Path(trained["run_dir"]) / "adapter")).merge_and_unload()
    ours = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    changed_names = set()
    for name, expected in theirs.named_parameters():
        torch.testing.assert_close(ours[name], expected, rtol=1e-6, atol=1e-6)
        changed_names |= set() if torch.equal(plain[name], expected) else {name.rpartition("mlp.")[2]}
    assert ("experts.gate_up_proj" in changed_names) == (trained["lora"]["experts"] == "all")


def test_the_4_bit_copy_trains_the_same_adapter(
    trained: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And experts without tokens are named."""
    monkeypatch.setattr(expert_load, "PATIENCE", 2)
    changes = {"run_dir": str(tmp_path / "run"), "model__cache_4bit": str(tmp_path / "copies")}
    assert _train(trained, **changes) is None
    is_named = "warning: no token was routed to expert " in capsys.readouterr().out
    assert is_named == (trained["lora"]["experts"] == "all")
    assert losses_of(tmp_path / "run") == losses_of(trained["run_dir"])
    assert len(list((tmp_path / "copies").glob("model-nf4-*/config.json"))) == 1


def test_a_kind_of_layer_that_is_not_planned_is_a_warning(
    trained: dict[str, Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer is recomputed, and the longest micro-batch tried first."""
    from dataclasses import replace

    from qlora_dist.train import fit_memory

    known = fit_memory.read_shapes
    monkeypatch.setattr(fit_memory, "read_shapes", lambda *name: replace(known(*name), unknown="conv.weight (4, 1, 4)"))
    assert _train(trained, run_dir=str(tmp_path / "run"), train__save_every=None, batch__micro_rows="auto") is None
    printed = capsys.readouterr().out
    assert "warning: the memory of this model is not planned (conv.weight (4, 1, 4))" in printed
    assert "memory.recompute=full batch.micro_rows=1; the longest micro-batch is tried before" in printed
    assert "the longest micro-batch of the run fits" in printed
    assert losses_of(tmp_path / "run") == losses_of(trained["run_dir"])
