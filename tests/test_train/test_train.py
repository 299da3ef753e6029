"""The laws of training: the mathematics does not depend on how many ranks do it, or on being interrupted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.tiny_run import changed, config_of, digests_of, losses_of, make_inputs, metrics_of

from qlora_dist.errors import RunFailed
from qlora_dist.train import setup_model, train


def _train(raw, **changes):
    """Called on ranks; the state is plain data."""
    return train(config_of(raw, **changes)).step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


def test_ranks_times_accumulation_give_the_same_losses_and_gradient_norms(raw, tmp_path):
    def figures(run_dir):
        return torch.tensor([[m["loss"], m["grad_norm"]] for m in metrics_of(run_dir)], dtype=torch.float64)

    found = {}
    for num_ranks, micro_rows in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        run_dir = str(tmp_path / f"{num_ranks}x{micro_rows}")
        on_ranks(_train, num_ranks, changed(raw, run_dir=run_dir, batch__micro_rows=micro_rows, train__steps=5))
        found[num_ranks, micro_rows] = figures(run_dir)
    expected = found[1, 1]
    assert expected.shape == (5, 2) and expected[4, 0] < expected[0, 0]
    for figure in found.values():
        # fp32 sums in another order, five updates deep: 1e-5 is two orders above their rounding
        torch.testing.assert_close(figure, expected, rtol=1e-5, atol=0)


def test_packed_rows_give_the_losses_of_unpacked_rows_with_the_same_documents(raw, tmp_path):
    # one step over the whole data set: the same documents, whatever rows they lie in
    losses = {}
    for packing in (True, False):
        config = config_of(raw, run_dir=str(tmp_path / str(packing)), data__packing=packing, train__steps=1)
        num_rows = 60 if not packing else _num_rows(config)
        sized = config.model_copy(update={"batch": config.batch.model_copy(update={"rows_per_step": num_rows})})
        train(sized)
        losses[packing] = metrics_of(sized.run_dir)[0]
    assert losses[True]["num_labels"] == losses[False]["num_labels"] > 0
    assert losses[True]["loss"] == pytest.approx(losses[False]["loss"], rel=1e-5)
    assert losses[True]["grad_norm"] == pytest.approx(losses[False]["grad_norm"], rel=1e-5)


def _num_rows(config):
    from qlora_dist.cluster.world import World
    from qlora_dist.train.setup_data import build_data

    return len(build_data(config, World.init()).rows)


def test_a_run_in_two_starts_has_the_rates_and_the_summary_of_one(raw, tmp_path):
    held_out = [{**raw["data"]["train"][0], "path": raw["data"]["train"][0]["path"].replace("train", "held_out")}]
    raw = changed(raw, data__eval=held_out, optim__warmup_steps=2, optim__schedule="constant", optim__lr=1e-2)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(config_of(raw, run_dir=str(whole), train__steps=4))
    for steps in (2, 4):  # with a constant rate a run may be extended
        train(config_of(raw, run_dir=str(broken), train__steps=steps))
    for run in (whole, broken):
        assert [line["lr"] for line in metrics_of(run)] == [5e-3, 1e-2, 1e-2, 1e-2]
    first, second = (json.loads((run / "summary.json").read_text()) for run in (whole, broken))
    for key in ("step", "total_tokens", "total_labels", "loss", "mean_loss", "eval_loss", "eval_loss_start"):
        assert second[key] == first[key], key
    state = json.loads((broken / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert second["started"] == state["started"] <= second["ended"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", second["ended"])
    assert second["seconds"] > sum(line["step_seconds"] for line in metrics_of(broken)) > 0
    assert (second["best_eval_loss"], second["best_eval_step"]) == (second["eval_loss"], 4)
    assert first["total_tokens"] == sum(line["tokens"] for line in metrics_of(whole))
    assert first["total_labels"] == sum(line["num_labels"] for line in metrics_of(whole)) != first["total_tokens"]


def test_a_stopped_run_says_by_what_and_the_log_has_what_was_said(raw, monkeypatch, capsys):
    import os
    import signal

    import qlora_dist.train as trainer

    step = trainer.train_step

    def stopping(*arguments, **options):
        if options["step"] == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", stopping)
    stopped = train(config_of(raw))
    monkeypatch.undo()
    log = Path(raw["run_dir"], "train.log").read_text()
    said = capsys.readouterr().out
    assert said in log and f"\nstopped by SIGUSR1 after step {stopped.step}; checkpoint saved in " in log
    assert [line[:9] for line in said.splitlines()[:4]] == ["machine  ", "data     ", "steps    ", "memory   "]
    assert stopped.stopped_by == "SIGUSR1" and stopped.step in (2, 3)  # the step at hand, or the next one
    names = [path.name for path in (Path(raw["run_dir"]) / "checkpoints").iterdir()]
    assert names == [f"step-{stopped.step:08d}"]
    whole = train(config_of(raw))
    assert (whole.step, whole.stopped_by) == (5, None)
    both = Path(raw["run_dir"], "train.log").read_text()
    assert both.startswith(log) and capsys.readouterr().out in both[len(log) :]


def test_an_adapter_that_gets_no_gradient_ends_a_run_after_its_first_update(raw, monkeypatch):
    import qlora_dist.train as trainer

    step = trainer.train_step

    def losing(world, model, rows, **options):
        stats = step(world, model, rows, **options)
        next(weight for name, weight in model.update.each_weight() if "lora_B" in name).data.zero_()
        return stats

    monkeypatch.setattr(trainer, "train_step", losing)
    with pytest.raises(RunFailed, match=r"after the first update 1 of 14 LoRA B matrices are still zero"):
        train(config_of(raw))
    assert "\nerror: after the first update 1 of 14" in Path(raw["run_dir"], "train.log").read_text()
    assert metrics_of(raw["run_dir"]) == []


def test_ranks_that_would_begin_with_other_adapters_end_together(raw):
    results = on_ranks(_begins_otherwise, 2, raw)
    assert {name for name, _ in results} == {"RunFailed"}
    assert all("the initial trainable weights differs between rank 0 and rank 1 (" in text for _, text in results)


def _begins_otherwise(raw):
    import os

    attach = setup_model.attach_lora
    rank = int(os.environ["RANK"])
    setup_model.attach_lora = lambda module, **options: attach(module, **{**options, "seed": options["seed"] + rank})
    return outcome(train, config_of(raw))


# one optimizer is enough for 4 ranks: it runs the same code on each; 2 ranks would show nothing (a + b = b + a)
@pytest.mark.parametrize(("num_ranks", "optimizer"), [(1, "adamw"), (1, "paged_adamw_8bit"), (4, "adamw")])
def test_an_interrupted_run_goes_on_bit_identically(raw, tmp_path, num_ranks, optimizer):
    raw = changed(raw, optim__name=optimizer, lora__dropout=0.1, train__save_every=3)
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    on_ranks(_train, num_ranks, changed(raw, run_dir=whole, train__steps=6))
    on_ranks(_train_until_signal, num_ranks, changed(raw, run_dir=broken, train__steps=6), 3)
    assert len(losses_of(broken)) == 3
    on_ranks(_train, num_ranks, changed(raw, run_dir=broken, train__steps=6))
    assert losses_of(broken) == losses_of(whole)
    last = "checkpoints/step-00000006"
    assert digests_of(Path(broken) / last) == digests_of(Path(whole) / last)


def _train_until_signal(raw, step):
    """Sends SIGUSR1 to one rank while it trains step `step`: all ranks must agree to stop."""
    import os
    import signal

    import qlora_dist.train as trainer

    original = trainer.train_step

    def interrupting(world, model, rows, **options):
        if options["step"] == step - 1 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            options["stop_requested"] = True
        return original(world, model, rows, **options)

    trainer.train_step = interrupting
    return train(config_of(raw)).step


def test_a_run_goes_on_with_another_number_of_ranks(raw, tmp_path):
    whole, moved = str(tmp_path / "whole"), str(tmp_path / "moved")
    raw = changed(raw, lora__dropout=0.2, train__steps=6)
    on_ranks(_train, 1, changed(raw, run_dir=whole))
    on_ranks(_train_until_signal, 4, changed(raw, run_dir=moved), 2)
    on_ranks(_train_until_signal, 2, changed(raw, run_dir=moved), 4)
    on_ranks(_train, 1, changed(raw, run_dir=moved))
    # the same rows in the same order, the same dropout: sums in another order only
    assert losses_of(moved) == pytest.approx(losses_of(whole), rel=1e-5)
    assert [m["num_labels"] for m in metrics_of(moved)] == [m["num_labels"] for m in metrics_of(whole)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_dropout_and_so_the_losses_do_not_depend_on_the_size_of_micro_batches(raw, tmp_path, num_ranks):
    raw = changed(raw, lora__dropout=0.3, train__steps=2)
    losses = []
    for micro_rows in (1, 2):
        run_dir = str(tmp_path / f"{micro_rows}")
        on_ranks(_train, num_ranks, changed(raw, run_dir=run_dir, batch__micro_rows=micro_rows))
        losses.append(losses_of(run_dir))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # sums in another order only


def test_the_base_stays_bit_identical_and_only_adapters_move(raw, monkeypatch):
    from qlora_dist.model import base_checksum

    seen = {}
    build = setup_model.build_model

    def watching(config, world):
        model = build(config, world)
        seen["model"], seen["before"] = model, base_checksum(model.module)
        seen["start"] = model.update.digest()
        return model

    monkeypatch.setattr("qlora_dist.train.build_model", watching)
    train(config_of(raw, data__eval=raw["data"]["train"], train__eval_every=2))
    model = seen["model"]
    assert base_checksum(model.module) == seen["before"]
    assert model.update.digest() != seen["start"]
    trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_a_finished_run_says_so_and_does_nothing(raw, capsys):
    train(config_of(raw))
    before = {path: path.stat().st_mtime_ns for path in Path(raw["run_dir"]).rglob("*")}
    capsys.readouterr()
    assert train(config_of(raw)).step == 5
    assert "this run is finished (5 steps" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in Path(raw["run_dir"]).rglob("*")}
    assert {p for p in before if p.is_file()} == {p for p in after if p.is_file()}


def test_a_run_says_which_fields_nothing_reads_and_which_rows_are_trained_on_and_evaluated(raw, tmp_path, capsys):
    (record, *others) = json.loads(Path(raw["data"]["train"][0]["path"]).read_text())
    data = tmp_path / "named.json"
    data.write_text(json.dumps([record | {"id": 1}, *others]))
    sources = [{"path": str(data), "format": "input-output"}]
    train(config_of(raw, data__train=sources, data__eval=[sources[0] | {"max_examples": 10}], train__steps=1))
    output = capsys.readouterr().out
    assert output.count("warning: 10 of 10 evaluation examples also occur in the training data") == 1
    assert output.count(f"fields that nothing reads (number of records): {data}: id (1)") == 1


def test_evaluations_use_the_same_few_rows_on_every_number_of_ranks_and_say_so(raw, tmp_path, capsys):
    """Packed into other rows they would be other documents: one document to a row here."""
    held_out = {**raw["data"]["train"][0], "path": raw["data"]["train"][0]["path"].replace("train", "held_out")}
    raw = changed(raw, data__eval=[held_out], data__packing=False, train__steps=1)
    losses = {}
    for num_ranks, eval_rows in ((1, "all"), (1, 5), (2, 5)):
        run_dir = tmp_path / f"{num_ranks}-{eval_rows}"
        sized = changed(raw, run_dir=str(run_dir), train__eval_rows=eval_rows)
        on_ranks(_train, num_ranks, sized)
        losses[num_ranks, eval_rows] = json.loads((run_dir / "eval_start.json").read_text())["eval_loss"]
    assert losses[2, 5] == pytest.approx(losses[1, 5], rel=1e-6)
    assert losses[1, 5] != pytest.approx(losses[1, "all"], rel=1e-3)
    train(config_of(raw, train__eval_rows=5))
    assert capsys.readouterr().out.count("evaluates 5 of 12 held-out rows (train.eval_rows)") == 1


def test_summary_and_metrics_hold_what_they_promise(raw):
    train(config_of(raw, data__eval=raw["data"]["train"]))
    summary = json.loads((Path(raw["run_dir"]) / "summary.json").read_text())
    promised = """step epoch loss lr grad_norm num_labels tokens step_seconds data_seconds tokens_per_second peak_bytes
        world_size strategy packing_efficiency examples truncated dropped tokens_per_second_median peak_bytes_max
        planned_peak_bytes plan_error trainable_parameters base_parameters versions commit eval_loss eval_loss_start"""
    assert set(promised.split()) <= summary.keys()
    assert summary["eval_loss"] < summary["eval_loss_start"]
    assert summary["trainable_parameters"] == sum(
        4 * (i + o) for i, o in [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)] * 2
    )
    lines = metrics_of(raw["run_dir"])
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(line["peak_bytes"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    assert "eval_loss" in lines[-1] and "eval_loss" not in lines[0]


def test_the_exported_adapter_loads_in_stock_peft_and_gives_the_trained_model(raw):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train(config_of(raw, model__quantization="none"))
    base = AutoModelForCausalLM.from_pretrained(raw["model"]["name"])
    ids = torch.arange(6, 20)[None]
    with torch.no_grad():
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, Path(raw["run_dir"]) / "adapter")(ids).logits
    assert (plain - adapted).abs().max() > 1e-2


@pytest.fixture(scope="module")
def sound(inputs, tmp_path_factory):
    """Losses of two ranks to which nothing happens."""
    run_dir = str(tmp_path_factory.mktemp("sound") / "run")
    on_ranks(_train, 2, changed(inputs, run_dir=run_dir, train__steps=6))
    return losses_of(run_dir)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_value_that_is_not_finite_on_one_rank_stops_all_ranks_before_the_update(raw, sound, where):
    raw = changed(raw, train__save_every=2, train__steps=6)
    results = on_ranks(_poisoned, 2, raw, where, 3)
    for name, text in results:
        assert name == "RunFailed"
        assert "step 4:" in text and "rank 1" in text and f"{where} of rows [" in text and "rank 0" not in text
    assert len(losses_of(raw["run_dir"])) == 3
    good = Path(raw["run_dir"]) / "checkpoints" / "step-00000002"
    assert sorted(p.name for p in good.parent.iterdir()) == ["step-00000002"]
    # the same command goes on from the good checkpoint and gives the losses of a run without the fault
    on_ranks(_train, 2, raw)
    assert losses_of(raw["run_dir"]) == sound


def _poisoned(raw, where, step):
    from qlora_dist.train import step as step_module

    original = step_module.TrainingModel.nll_sum
    calls = {"count": 0}

    def poisoned(self, batch):
        nll = original(self, batch)
        calls["count"] += 1
        if step_module_rank() == 1 and calls["count"] == 2 * step + 2:  # two micro-steps a step, the second of `step`
            return nll * float("nan") if where == "loss" else _BadGradient.apply(nll)
        return nll

    step_module.TrainingModel.nll_sum = poisoned
    return outcome(train, config_of(raw))


def step_module_rank():
    import os

    return int(os.environ["RANK"])


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


def test_a_rank_whose_rows_have_no_labels_neither_hangs_nor_gives_nan(raw, tmp_path):
    # 13 rows in steps of 4: the last step has one row, and three of four ranks have filler without labels
    num_rows = _num_rows(config_of(raw))
    raw = changed(raw, train__steps=None, train__epochs=13 / num_rows, batch__rows_per_step=4)
    on_ranks(_train, 4, changed(raw, run_dir=str(tmp_path / "four")))
    on_ranks(_train, 1, changed(raw, run_dir=str(tmp_path / "one")))
    four, one = metrics_of(tmp_path / "four"), metrics_of(tmp_path / "one")
    assert four[-1]["tokens"] <= 32 < four[0]["tokens"], "the last step must be one row, or this shows nothing"
    assert [m["loss"] for m in four] == pytest.approx([m["loss"] for m in one], rel=1e-5)


def test_full_fine_tuning_trains_and_resumes(raw, tmp_path):
    raw = changed(raw, lora=None, model__quantization="none", optim__lr=1e-3, train__steps=4, train__save_every=2)
    train(config_of(raw))
    assert losses_of(raw["run_dir"])[-1] < losses_of(raw["run_dir"])[0]
    from transformers import AutoModelForCausalLM

    tuned = AutoModelForCausalLM.from_pretrained(Path(raw["run_dir"]) / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(raw["model"]["name"]).state_dict()
    assert all(not torch.equal(tuned[name], start[name]) for name in start)
    broken = changed(raw, run_dir=str(tmp_path / "broken"))
    on_ranks(_train_until_signal, 1, broken, 2)
    on_ranks(_train, 1, broken)
    assert losses_of(tmp_path / "broken") == pytest.approx(losses_of(raw["run_dir"]), rel=1e-6)


def test_full_fine_tuning_checks_its_head_as_a_step_computes(raw, monkeypatch):
    """Weights are fp32, kernels of attention take 16 bits: outside of autocast they would refuse."""
    seen, check_head = [], setup_model.check_head

    def checking(model):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        check_head(model)

    monkeypatch.setattr(setup_model, "check_head", checking)
    train(config_of(raw, lora=None, model__quantization="none", model__compute_dtype="bfloat16", train__steps=1))
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_every_base_trains_and_lowers_the_loss(raw, quantization):
    train(config_of(raw, model__quantization=quantization, train__steps=8))
    losses = losses_of(raw["run_dir"])
    assert losses[-1] < losses[0] - 0.05


def test_memory_settings_change_no_bit_of_the_losses(raw, tmp_path):
    losses = []
    for settings in ("full", "none", 1, "offload"):
        memory = {"offload_activations": True} if settings == "offload" else {"recompute": settings}
        train(config_of(raw, run_dir=str(tmp_path / str(settings)), memory=memory, train__steps=3))
        losses.append(losses_of(tmp_path / str(settings)))
    assert len(losses[0]) == 3 and losses == [losses[0]] * 4
