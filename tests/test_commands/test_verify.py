"""`qlora-dist verify` finds nothing where nothing is wrong, and names what is wrong where something is."""

from __future__ import annotations

import json
import math
import multiprocessing.util
from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.tiny_run import changed, config_of, make_inputs, metrics_of, write_config
from safetensors.torch import load_file, save_file

from qlora_dist import commands as cli
from qlora_dist.cluster.world import World
from qlora_dist.commands.verify import Plan, Proof, Report, one_process, prove, runs
from qlora_dist.commands.verify.report import not_checked, relative_difference
from qlora_dist.config import load_config
from qlora_dist.config.run_dir import RunDir
from qlora_dist.data.loader import Loader
from qlora_dist.errors import UserError
from qlora_dist.train import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


def plan_of(raw, tmp_path, **changes):
    folder = tmp_path / "proofs"
    folder.mkdir()
    return Plan(config_of(raw, **changes), folder, steps=4, ranks=2, num_gpus=0)


def model_proofs(raw, tmp_path, **changes):
    return {
        proof.name: proof for proof in one_process.prove_on_one_process(plan_of(raw, tmp_path, **changes), World.init())
    }


def failures(proofs):
    return [name for name, proof in proofs.items() if proof.verdict == "FAILED"]


# --- on one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"lora__dropout": 0.1},
        {"model__compute_dtype": "bfloat16"},
        {"model__quantization": "int8"},
        {"model__quantization": "none", "lora__variant": "dora", "data__packing": False, "batch__micro_rows": 4},
    ],
    ids=["nf4 fp32", "nf4 bf16", "int8", "16 bit, DoRA, unpacked"],
)
def test_a_sound_trainer_has_every_claim_of_one_process_proved(raw, tmp_path, changes):
    proofs = model_proofs(raw, tmp_path, **changes)
    assert list(proofs) == list(one_process.CLAIMS)
    assert {proof.verdict for proof in proofs.values()} == {"holds"}, proofs
    # what is compared is computed in two ways, not with itself (DoRA layers keep PEFT's forward: bits may be the same)
    if changes.get("lora__variant") != "dora":
        assert proofs[one_process.STOCK].difference > 0 and proofs[one_process.REFERENCE].difference > 0
    assert not Path(raw["run_dir"]).exists(), "the user's run directory is not touched"


def test_full_fine_tuning_has_no_adapter_to_prove_and_the_rest_holds(raw, tmp_path):
    proofs = model_proofs(raw, tmp_path, lora=None, model__quantization="none", model__compute_dtype="bfloat16")
    assert failures(proofs) == [] and proofs[one_process.REFERENCE].verdict == "holds"
    assert one_process.RELOADED not in proofs


def _leaking(monkeypatch):
    """The third document of a row and those behind it are one: what check_head sees, two documents, stay apart."""
    from qlora_dist.model import attention
    from qlora_dist.model import forward as running

    original = attention.documents_of

    def merged(batch, backend):
        packed = original(batch, backend)
        if len(packed.lengths) < 3:
            return packed
        lengths = (*packed.lengths[:2], sum(packed.lengths[2:]))
        return attention.PackedDocuments(backend, lengths, packed.cu_seqlens, max(lengths))

    monkeypatch.setattr(running, "documents_of", merged)


def _mean_of_means(monkeypatch):
    from qlora_dist.train.step import TrainingModel

    original = TrainingModel.nll_sum
    monkeypatch.setattr(TrainingModel, "nll_sum", lambda self, batch: original(self, batch) / max(batch.num_labels, 1))


def _forgotten_microbatch(monkeypatch):
    from qlora_dist.optim.replicated import ReplicatedUpdate

    original = ReplicatedUpdate.forward_backward
    calls = []

    def forgetting(self, loss_sum, is_last):
        calls.append(is_last)

        def lost():
            loss = loss_sum()
            return loss.detach() + 0.0 * loss

        return original(self, lost if len(calls) == 2 else loss_sum, is_last)

    monkeypatch.setattr(ReplicatedUpdate, "forward_backward", forgetting)


def _shifted_labels(monkeypatch):
    """The loss looks one token too far, in training and in what is compared with it."""
    from qlora_dist.commands.verify import one_process as module
    from qlora_dist.train import step

    def shifted(hidden, head, positions, labels, _original=step.nll_sum):
        return _original(hidden, head, (positions - 1).clamp_min(0), labels)

    monkeypatch.setattr(step, "nll_sum", shifted)
    assert module.REFERENCE


def _wrong_scale(monkeypatch):
    from qlora_dist.model.products import SharedInput

    original = SharedInput.__init__

    def scaled(self, layers):
        original(self, layers)
        self.scale *= 2

    monkeypatch.setattr(SharedInput, "__init__", scaled)
    # it would be found before the first step
    monkeypatch.setattr("qlora_dist.train.setup_model.check_blocks", lambda model: None)


def _lossy_save(monkeypatch):
    from qlora_dist.model import lora_files

    original = lora_files.adapter_state
    monkeypatch.setattr(
        lora_files, "adapter_state", lambda model: {k: v.bfloat16().float() for k, v in original(model).items()}
    )


def _writes_to_base(monkeypatch):
    from qlora_dist.commands.verify import one_process as module

    original = module.train_step

    calls = []

    def writing(world, model, rows, **options):
        calls.append(rows)
        if len(calls) > 1:  # twice would put the bit back
            return original(world, model, rows, **options)
        model.module.get_submodule("base_model.model.model.layers.0.mlp.up_proj").base_layer.weight.data[0] ^= 1
        return original(world, model, rows, **options)

    monkeypatch.setattr(module, "train_step", writing)


def _other_constants(monkeypatch):
    from qlora_dist.train import setup_model

    original = setup_model.load_base

    def damaged(name, **options):
        model = original(name, **options)
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.quant_state.absmax[0] ^= 1
            layer.self_attn.q_proj.weight.data[0] ^= 1
            layer.self_attn.k_proj.weight.data[0] ^= 1
        return model

    monkeypatch.setattr(setup_model, "load_base", damaged)


@pytest.mark.parametrize(
    ("defect", "claim"),
    [
        (_leaking, one_process.PACKED),
        (_mean_of_means, one_process.ACCUMULATED),
        (_forgotten_microbatch, one_process.ACCUMULATED),
        (_shifted_labels, one_process.REFERENCE),
        (_wrong_scale, one_process.STOCK),
    ],
)
def test_a_defect_is_named_even_with_the_tolerance_of_bfloat16(raw, tmp_path, monkeypatch, defect, claim):
    defect(monkeypatch)
    assert claim in failures(model_proofs(raw, tmp_path, model__compute_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("defect", "claim"),
    [
        (_lossy_save, one_process.RELOADED),
        (_writes_to_base, one_process.UNCHANGED),
        (_other_constants, one_process.SOURCE),
    ],
)
def test_a_defect_of_bits_is_named(raw, tmp_path, monkeypatch, defect, claim):
    defect(monkeypatch)
    assert claim in failures(model_proofs(raw, tmp_path))


def test_a_base_that_is_too_large_for_one_device_is_said_and_not_called_proved(raw, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("qlora_dist.commands.verify.one_process.build_model", full)
    proofs = model_proofs(raw, tmp_path)
    assert {proof.verdict for proof in proofs.values()} == {"not checked"} and len(proofs) == len(one_process.CLAIMS)
    assert "does not fit on one device: CUDA out of memory" in proofs[one_process.PACKED].note


# --- runs -------------------------------------------------------------------------------------------------------------


def test_runs_that_differ_in_rows_losses_or_weights_are_told_apart(raw, tmp_path):
    folders = {}
    for name, changes in {"a": {}, "same": {}, "seed": {"seed": 4}, "rate": {"optim__lr": 0.02}}.items():
        config = config_of(raw, run_dir=str(tmp_path / name), train__steps=3, **changes)
        train(config)
        folders[name] = RunDir(Path(config.run_dir))
    same = runs.compare_runs("claim", folders["a"], folders["same"], 0.0, "here")
    assert (same.verdict, same.difference) == ("holds", 0.0)
    other = runs.compare_runs("claim", folders["a"], folders["seed"], 1e9, "here")
    assert other.verdict == "FAILED" and "they trained on different rows" in other.note
    # the first loss is the same: the weights tell after one update, the losses after two
    rate = runs.compare_runs("claim", folders["a"], folders["rate"], 1e-2, "here")
    assert rate.verdict == "FAILED" and rate.difference > 0.1
    assert runs.compare_weights(folders["a"], folders["rate"]) > 0.1
    last = max(folders["same"].checkpoints.iterdir()) / "optimizer.safetensors"
    states = load_file(last)
    save_file({key: value + 1e-9 for key, value in states.items()}, last)
    states_alone = runs.compare_runs("claim", folders["a"], folders["same"], 0.0, "here")
    assert states_alone.verdict == "FAILED" and "differ in their optimizer states" in states_alone.note
    lines = metrics_of(folders["same"].path)
    lines[-1]["loss"] *= 1.5
    folders["same"].metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last_loss = runs.compare_runs("claim", folders["a"], folders["same"], 1e-2, "here")
    assert last_loss.verdict == "FAILED" and last_loss.difference == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_difference_is_relative_to_what_is_expected(scale):
    expected = scale * torch.tensor([3.0, 4.0])
    assert relative_difference(1.5 * expected, expected) == pytest.approx(0.5)
    assert relative_difference(expected, expected) == 0.0


def test_ranks_run_on_gpus_where_there_are_enough_else_on_the_cpu_where_the_model_is_small():
    assert runs.choose_place(2, 8, 10**10) == runs.Place(2, on_cpu=False)
    assert runs.choose_place(2, 0, 10**10) == runs.Place(2, on_cpu=True)
    assert runs.choose_place(2, 1, 10**8) == runs.Place(2, on_cpu=True)
    large = runs.choose_place(2, 1, 7 * 10**9)
    assert (large.num_ranks, large.on_cpu) == (1, False)
    assert large.reason == "2 ranks need 2 GPUs, found 1; 7.0 G weights are too many for the CPU"


def _train_file(path):
    train(load_config(path))


@pytest.fixture
def launch_the_first_only(monkeypatch):
    """Only the first run has a launcher and fresh interpreters; the ranks of the others are forked."""
    launch, launched = runs.run, []
    multiprocessing.util.get_temp_dir()  # created once, and not in the folder that the test looks into

    def run(plan, config, place):
        launched.append(Path(config.run_dir).name)
        if len(launched) == 1 or not place.on_cpu:
            return launch(plan, config, place)
        on_ranks(_train_file, place.num_ranks, plan.write(config), timeout=300)
        return RunDir(Path(config.run_dir))

    monkeypatch.setattr(runs, "run", run)
    return launched


@pytest.mark.timeout(900)  # three processes that import torch, on a machine that may have other work
@pytest.mark.launched
def test_verify_proves_everything_on_real_processes_and_leaves_no_trace(
    raw, tmp_path, capsys, monkeypatch, launch_the_first_only
):
    config = write_config(tmp_path / "c.yaml", raw, lora__dropout=0.1)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert cli.invoke(["verify", str(config), "--json", "--set", "strategy.name=fsdp"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True and launch_the_first_only == ["whole", "ddp", "one", "resumed"]
    claims = [*one_process.CLAIMS, "2 ranks = 1 rank", "strategy fsdp = ddp", "resumed = uninterrupted"]
    assert [proof["name"] for proof in report["proofs"]] == claims
    assert {proof["verdict"] for proof in report["proofs"]} == {"holds"}
    assert report["proofs"][-3]["difference"] > 0, "two ranks sum in another order: equal bits would be the same run"
    assert report["proofs"][-1]["difference"] == report["proofs"][-1]["tolerance"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_rows_that_a_resume_drops_fail_the_verification_by_name(raw, tmp_path, capsys, monkeypatch):
    original_iterate, original_rows = Loader.iterate, Loader.rows_of_step
    start = {"at": 0}

    def iterate(self, first, stop, pin_memory=False):
        start["at"] = first
        return original_iterate(self, first, stop, pin_memory)

    def dropping(self, step):
        return original_rows(self, step + (start["at"] > 0))

    def in_this_process(plan, config, place):  # the defect is in this process only
        start["at"] = 0
        train(config)
        return RunDir(Path(config.run_dir))

    monkeypatch.setattr(Loader, "iterate", iterate)
    monkeypatch.setattr(Loader, "rows_of_step", dropping)
    monkeypatch.setattr(runs, "run", in_this_process)
    config = write_config(tmp_path / "c.yaml", raw)
    assert cli.invoke(["verify", str(config), "--ranks", "1", "--steps", "2"]) == 1
    said = capsys.readouterr().out.strip().splitlines()
    assert said[-1].startswith("FAILED: resumed = uninterrupted (8 of 9 claims hold) for ")
    (line,) = [line for line in said if line.startswith("resumed = uninterrupted")]
    assert "FAILED" in line and "they trained on different rows" in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_gpu_every_claim_of_one_process_is_proved(raw, tmp_path, dtype):
    proofs = model_proofs(raw, tmp_path, model__compute_dtype=dtype)
    assert {proof.verdict for proof in proofs.values()} == {"holds"}, proofs


@pytest.mark.multi_gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "fsdp"])
def test_on_two_gpus_every_claim_is_proved(raw, strategy):
    report = prove(config_of(raw, model__compute_dtype="bfloat16", strategy__name=strategy), ranks=2)
    assert report.failures == [] and "on GPU" in report.proofs[-1].note, report.table()


def test_a_run_that_dies_fails_its_claims_with_its_last_words(raw, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho starting\necho 'error: the disk is full'\necho bye\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(runs.sys, "executable", str(python))
    proofs = runs.prove_runs(plan_of(raw, tmp_path), 1000)
    assert [proof.verdict for proof in proofs] == ["FAILED"] * 2
    assert {proof.note for proof in proofs} == {"run whole ended with code 3: error: the disk is full"}


# --- the plan and the report ------------------------------------------------------------------------------------------


def test_the_variants_are_small_and_stay_in_the_temporary_folder(raw, tmp_path):
    raw = changed(raw, train__epochs=3, train__steps=None, train__eval_every=50, batch__micro_rows=2, lora__dropout=0.1)
    raw["data"]["train"][0] |= {"hold_out": 0.1, "weight": 2.0, "shuffle": True, "max_examples": 50}
    plan = plan_of(raw, tmp_path)
    variant = plan.variant("one")
    assert variant.batch.rows_per_step == 8 and variant.train.steps == 4 and variant.train.save_every == 2
    (source,) = variant.data.train
    assert (source.max_examples, source.hold_out, source.weight, source.shuffle) == (50, None, 1.0, False)
    assert Path(variant.run_dir).parent == Path(variant.data.cache_dir).parent == plan.folder
    assert variant.lora.dropout == 0.1  # a mask depends on its row alone
    assert variant.model == plan.config.model and variant.optim == plan.config.optim
    raw["data"]["train"] = [{"path": "x.json"}]
    many = Plan(config_of(raw, train__eval_every=None), plan.folder, steps=4, ranks=2, num_gpus=0)
    assert many.variant("one").data.train[0].max_examples == 4 * 8 * 32


def test_too_few_steps_are_explained(raw):
    with pytest.raises(UserError, match="--steps 1 --ranks 2: expected at least 2 steps"):
        prove(config_of(raw), steps=1)


def test_a_number_that_is_no_number_is_no_proof_and_the_table_says_what_failed():
    proofs = [
        Proof("a = b", 1e-6, 1e-4, "here"),
        Proof("c = d", math.nan, 1e-4),
        not_checked("e = f", "no GPU"),
    ]
    report = Report("model", proofs, 12.3)
    assert [proof.verdict for proof in proofs] == ["holds", "FAILED", "not checked"]
    assert report.sentence() == "FAILED: c = d (1 of 3 claims hold; 1 not checked) for model"
    lines = report.table().splitlines()
    assert lines[1].split() == ["a", "=", "b", "1.0e-06", "1.0e-04", "holds", "here"]
    assert lines[3].split() == ["e", "=", "f", "-", "-", "not", "checked", "no", "GPU"]
    assert report.as_json()["passed"] is False
    assert Report("model", proofs[:1], 12.3).sentence() == "1 of 1 claims hold for model, in 12 s"
    assert relative_difference(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_metrics_of_a_variant_are_those_of_a_run(raw, tmp_path):
    plan = plan_of(raw, tmp_path)
    train(plan.variant("here"))
    assert [line["step"] for line in metrics_of(plan.folder / "here")] == [1, 2, 3, 4]
