"""DeepSpeed's ZeRO as another way to compute the same update: ddp's losses, files and failures."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.ranks import ROOT, clean_environment, on_ranks, outcome, run_forked
from helpers.tiny_run import changed, config_of, digests_of, losses_of, make_inputs, metrics_of, write_config
from safetensors.torch import load_file

from qlora_dist.model import base_weights
from qlora_dist.train import setup_model, train

ZERO = ["zero1", "zero2", "zero2_offload", "zero3"]
RANKS = 2
DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Each of the first steps has a learning rate of its own, which DeepSpeed's optimizer must be told."""
    raw = make_inputs(tmp_path_factory.mktemp("inputs"))
    return changed(raw, batch__rows_per_step=8, batch__micro_rows=2, optim__warmup_steps=3)


@pytest.fixture(scope="module")
def zero3_config(tmp_path_factory):
    """The shipped file, but sharding also what it keeps whole: small weights, and weights that are reused soon."""
    config = json.loads((DS_CONFIGS / "zero3.json").read_text())
    for key in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"):
        config["zero_optimization"][f"stage3_{key}"] = 0
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


def _train(raw, **changes):
    return train(config_of(raw, **changes)).step


def _metrics(run_dir):
    return torch.tensor([[m["loss"], m["grad_norm"], m["lr"]] for m in metrics_of(run_dir)], dtype=torch.float64)


def _inspected(raw):
    """Trains, and returns what this rank holds just before the run ends."""
    import qlora_dist.train as trainer

    seen = {}
    build, build_update, finish = trainer.build_model, setup_model.build_update, trainer.finish

    def fingerprinting(config, world, model, head_weight):
        seen["base"] = _digest(model)
        seen["base_bytes"] = _base_bytes(model)
        seen["dtypes"] = {name: p.dtype for name, p in model.named_parameters()}
        return build_update(config, world, model, head_weight)

    def measuring(config, world):
        model = build(config, world)
        seen["start"] = model.update.digest()
        forward_backward = model.update.forward_backward

        def measured(loss_sum, is_last):
            loss = forward_backward(loss_sum, is_last)
            if is_last:
                seen["gradient_bytes"] = _gradient_bytes(model)
            return loss

        model.update.forward_backward = measured
        return model

    def inspecting(run, trained_model, *rest):
        model, update = trained_model.module, trained_model.update
        optimizer = getattr(update, "_optimizer", None) or update._zero.optimizer
        seen["base_share"] = _base_bytes(model) / seen["base_bytes"]
        with _whole(model):
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            seen["base_kept"] = _digest(model) == seen["base"]
            seen["all_b_moved"] = all(bool(p.any()) for name, p in trained.items() if "lora_B" in name)
            seen["dtypes_kept"] = {name: p.dtype for name, p in model.named_parameters()} == seen["dtypes"]
            seen["trained_dtypes"] = {str(p.dtype) for p in trained.values()}
            seen["weight_bytes"] = sum(p.numel() * 4 for p in trained.values())
        seen["digest"] = update.digest()
        seen["gathered_at_a_time"] = max(_num_gathered(model) for _ in update.each_weight())
        with update.whole_weights():
            seen["gathered_to_save"] = _num_gathered(model)
            seen["readable"] = all(p.numel() for p in model.parameters() if p.requires_grad)
        seen["state_bytes"] = sum(
            value.numel() * value.element_size()
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.ndim
        )
        return finish(run, trained_model, *rest)

    setup_model.build_update, trainer.build_model, trainer.finish = fingerprinting, measuring, inspecting
    _train(raw)
    del seen["dtypes"]
    return seen


def _digest(model):
    """Digest of the whole base, gathered where it is sharded."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_weights(model), key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(model):
    """Inside, all weights are whole, including those that ZeRO-3 has sharded."""
    parameters = list(model.parameters())
    if not hasattr(parameters[0], "ds_tensor"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _num_gathered(model):
    """Weights that ZeRO-3 has gathered on the device just now."""
    return sum(getattr(one, "ds_status", None) is not None and one.ds_status.name == "AVAILABLE"
               for one in model.parameters())  # fmt: skip


def _base_bytes(model):
    """Bytes of the base on this rank: its shards, where weights are sharded."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    held = [p.ds_tensor if hasattr(p, "ds_tensor") and p.numel() == 0 else p for p in frozen]
    return sum(p.numel() * p.element_size() for p in held)


def _gradient_bytes(model):
    """Bytes of gradients held between the last micro-step and the update."""
    zero = getattr(model.update, "_zero", None)
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    held = [p.grad for p in parameters if p.grad is not None]
    if zero is not None:
        held += [part for group in zero.averaged_gradients.values() if group is not None for part in group]
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in held}
    return sum(storages.values())


@pytest.fixture(scope="module")
def runs(inputs, zero3_config, tmp_path_factory):
    """Strategy -> (run directory of six steps with accumulation and clipping, what each rank held), run on demand."""
    results = {}

    def run_of(strategy):
        if strategy not in results:
            run = str(tmp_path_factory.mktemp(strategy) / "run")
            changes = {"run_dir": run, "strategy__name": strategy, "train__steps": 6}
            changes |= {"strategy__ds_config": zero3_config} if strategy == "zero3" else {}
            held_out = Path(inputs["data"]["train"][0]["path"]).with_name("held_out.json")
            changes |= {"data__eval": [{"path": str(held_out), "format": "input-output"}]}
            results[strategy] = (run, on_ranks(_inspected, RANKS, changed(inputs, **changes)))
        return results[strategy]

    return run_of


@pytest.mark.parametrize("strategy", ZERO)
def test_a_zero_strategy_matches_ddps_losses_norms_and_adapter_with_less_memory(runs, inputs, strategy):
    (run, results), (ddp, ddp_results) = runs(strategy), runs("ddp")
    expected = _metrics(ddp)
    assert expected.shape == (6, 3) and expected[5, 0] < 0.7 * expected[0, 0], (
        "a run that learns nothing proves nothing"
    )
    # fp32 sums in another order, six updates deep
    torch.testing.assert_close(_metrics(run), expected, rtol=1e-5, atol=0)
    mine, theirs = (json.loads((Path(folder) / "summary.json").read_text()) for folder in (run, ddp))
    for key in ("eval_loss_start", "eval_loss"):
        assert mine[key] == pytest.approx(theirs[key], rel=1e-5)
    for result in results:
        assert result["base_kept"] and result["dtypes_kept"] and result["all_b_moved"]
        assert result["trained_dtypes"] == {"torch.float32"}
        assert result["start"] == ddp_results[0]["start"] != result["digest"] == results[0]["digest"]
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        mine, theirs = load_file(Path(run) / name), load_file(Path(ddp) / name)
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        for key, value in theirs.items():
            torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-5)  # Adam divides small numbers
    assert _loads_in_stock_peft(inputs["model"]["name"], Path(run) / "adapter")
    for result, whole in zip(results, ddp_results):
        assert whole["state_bytes"] >= 2 * result["weight_bytes"]
        assert result["state_bytes"] == pytest.approx(2 * result["weight_bytes"] / RANKS, rel=0.01)
        if strategy in ("zero2", "zero3"):  # in zero2 a weight on the border of two shards is in both
            assert result["gradient_bytes"] < 0.75 * whole["gradient_bytes"]
        # no device holds more than one whole weight to check, compare or save them; rank 0 reads them all
        assert (result["gathered_at_a_time"], result["gathered_to_save"]) == (int(strategy == "zero3"), 0)
        assert result["readable"] or result is not results[0]
        assert result["base_share"] == pytest.approx(1 / RANKS if strategy == "zero3" else 1.0, rel=0.01)


def _loads_in_stock_peft(base, adapter):
    """Whether PEFT loads every weight of the file into its model."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    loaded, stored = get_peft_model_state_dict(model), load_file(adapter / "adapter_model.safetensors")
    return loaded.keys() == stored.keys() and all(torch.equal(loaded[key], value) for key, value in stored.items())


@pytest.mark.parametrize("strategy", ["zero2", "zero2_offload"])
def test_an_interrupted_run_resumes_bit_identically(runs, raw, strategy):
    raw = changed(raw, strategy__name=strategy)
    for steps in (4, 6):
        on_ranks(_train, RANKS, changed(raw, train__steps=steps))
    whole, _ = runs(strategy)
    assert losses_of(raw["run_dir"]) == losses_of(whole)
    last = "checkpoints/step-00000006"
    assert digests_of(Path(raw["run_dir"]) / last) == digests_of(Path(whole) / last)


def test_any_strategy_and_number_of_ranks_resumes_from_the_checkpoints_of_another(runs, raw):
    plan = [("ddp", 2, 1), ("zero2", 2, 2), ("zero3", 2, 4), ("zero1", 1, 5), ("ddp", 2, 6)]
    for strategy, num_ranks, steps in plan:
        on_ranks(_train, num_ranks, changed(raw, strategy__name=strategy, train__steps=steps))
    ddp, _ = runs("ddp")
    # the same rows and states: sums in another order only
    torch.testing.assert_close(_metrics(raw["run_dir"]), _metrics(ddp), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("strategy", "where"), [("zero2", "gradient"), ("zero3", "loss")])
def test_a_non_finite_value_on_one_rank_stops_all_ranks_before_the_update(raw, strategy, where):
    raw = changed(raw, strategy__name=strategy, train__save_every=2, train__steps=6)
    for name, text, num_updates in on_ranks(_poisoned, RANKS, raw, where, 3):
        assert name == "RunFailed" and num_updates == 3
        assert "step 4:" in text and "rank 1" in text and f"{where} of rows [" in text and "rank 0" not in text
    assert len(losses_of(raw["run_dir"])) == 3
    assert [p.name for p in (Path(raw["run_dir"]) / "checkpoints").iterdir()] == ["step-00000002"]


def _poisoned(raw, where, step):
    """What training raises for a bad value on rank 1 in the second of two micro-steps, and the number of updates."""
    import qlora_dist.train as trainer
    from qlora_dist.train.step import TrainingModel

    original, build = TrainingModel.nll_sum, trainer.build_model
    num_losses = num_updates = 0

    def counting(config, world):
        model = build(config, world)
        update = model.update.clip_and_step

        def counted(*arguments):
            nonlocal num_updates
            num_updates += 1
            update(*arguments)

        model.update.clip_and_step = counted
        return model

    def poisoned(self, batch):
        nonlocal num_losses
        nll = original(self, batch)
        num_losses += 1
        if os.environ["RANK"] == "1" and num_losses == 2 * step + 2:
            return nll * float("nan") if where == "loss" else _BadGradient.apply(nll)
        return nll

    trainer.build_model, TrainingModel.nll_sum = counting, poisoned
    return *outcome(train, config_of(raw)), num_updates


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


def test_full_fine_tuning_under_zero3_exports_the_model_that_one_process_trains(raw, zero3_config, tmp_path):
    from transformers import AutoModelForCausalLM

    full = changed(raw, model__quantization="none", lora=None, train__steps=4, optim__lr=3e-3)
    zero3 = {"strategy__name": "zero3", "strategy__ds_config": zero3_config, "run_dir": str(tmp_path / "zero3")}
    on_ranks(_train, RANKS, changed(full, **zero3))
    on_ranks(_train, 1, full)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "zero3" / "model", output_loading_info=True)
    assert not any(loading.values()), loading
    stored = load_file(tmp_path / "zero3" / "model" / "model.safetensors")
    expected, base = (load_file(Path(folder) / "model.safetensors") for folder in
                      (Path(full["run_dir"]) / "model", full["model"]["name"]))  # fmt: skip
    assert stored.keys() == expected.keys() == base.keys() == model.state_dict().keys()
    for name, value in expected.items():
        assert torch.equal(model.state_dict()[name], stored[name]) and stored[name].dtype == value.dtype
        torch.testing.assert_close(stored[name], value, rtol=1e-3, atol=1e-5)  # Adam divides small numbers
        assert (value - base[name]).norm() > 1e-3  # the guard: each weight has moved, by more than the tolerance
    torch.testing.assert_close(_metrics(tmp_path / "zero3"), _metrics(full["run_dir"]), rtol=1e-5, atol=0)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        checkpoints = [Path(run) / "checkpoints/step-00000004" / name for run in (tmp_path / "zero3", full["run_dir"])]
        mine, theirs = map(load_file, checkpoints)
        assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


def test_8bit_states_resume_under_another_strategy_if_their_blocks_line_up(raw, tmp_path):
    raw = changed(raw, optim__name="adamw_8bit", lora__rank=8)  # the size of every weight is a multiple of 256
    for strategy, steps in (("zero2", 2), ("ddp", 4)):
        on_ranks(_train, RANKS, changed(raw, strategy__name=strategy, train__steps=steps))
    on_ranks(_train, RANKS, changed(raw, run_dir=str(tmp_path / "ddp"), train__steps=4))
    assert load_file(tmp_path / "ddp/checkpoints/step-00000004/optimizer.safetensors")["0.state1"].dtype == torch.uint8
    # the same codes, except where the last bit of a sum tips a value to the next code
    torch.testing.assert_close(_metrics(raw["run_dir"]), _metrics(tmp_path / "ddp"), rtol=1e-4, atol=0)


# --- launched for real ------------------------------------------------------------------------------------------------


def test_one_process_without_a_launcher_trains_under_one_strategy_after_another(raw, tmp_path):
    plan = [("zero3", str(tmp_path / "a")), ("ddp", str(tmp_path / "b")), ("zero1", str(tmp_path / "c"))]
    for strategy, run in plan:
        write_config(tmp_path / f"{strategy}.yaml", raw, run_dir=run, strategy__name=strategy, train__steps=2)
    code = """
        import sys
        from qlora_dist.config import load_config
        from qlora_dist.train import train
        for path in sys.argv[1:]:
            train(load_config(path))
    """
    done = run_forked(code, *(str(tmp_path / f"{strategy}.yaml") for strategy, _ in plan), timeout=200)
    assert done.returncode == 0, done.stderr
    zero3, ddp, zero1 = (torch.tensor(losses_of(run)) for _, run in plan)
    torch.testing.assert_close(zero3, ddp, rtol=1e-5, atol=0)  # fp32 sums in another order
    torch.testing.assert_close(zero1, ddp, rtol=1e-5, atol=0)
    assert "strategy zero3 on cpu: base, trained weights, gradients and optimizer states are sharded" in done.stdout


@pytest.mark.timeout(800)
@pytest.mark.launched
def test_two_nodes_of_accelerate_train_with_zero2_from_another_folder(raw, runs, tmp_path):
    config = write_config(tmp_path / "c.yaml", raw, strategy__name="zero2", train__steps=3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    start += [str(ROOT / "launch/accelerate/nodes-2.yaml"), "--num_processes", "2", "--main_process_port", str(port)]
    train_it = ["-m", "qlora_dist", "train", str(config)]
    logs = [tmp_path / f"node{rank}.log" for rank in range(2)]
    nodes = []
    for rank, log in enumerate(logs):
        with open(log, "w") as stream:
            command = [*start, "--machine_rank", str(rank), *train_it]
            # as `qlora-dist torchrun`: workers that share the agents' store depend on the order in which agents exit
            environment = {**clean_environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            nodes.append(
                subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT)
            )
    try:
        for node in nodes:
            node.wait(timeout=350)  # an agent waits 300 s for a failed one, whose log has the reason
    finally:
        for node in nodes:
            node.kill()
        outputs = [log.read_text() for log in logs]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    zero2, _ = runs("zero2")
    assert losses_of(raw["run_dir"]) == losses_of(zero2)[:3]
    assert "strategy zero2 on cpu: every rank holds the whole base and trained weights; gradients and" in outputs[0]
    # DeepSpeed logs nothing, and only rank 0 prints steps
    assert "DeepSpeed" not in outputs[0] + outputs[1] and "real_accelerator" not in outputs[0] + outputs[1]
    assert "finished" in outputs[0] and "step" not in outputs[1]
