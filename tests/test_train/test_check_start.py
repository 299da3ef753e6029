"""Before the model is read all ranks agree that they can start, or stop together and name host and rank."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.ranks import on_ranks, outcome
from helpers.tiny_run import changed, config_of, make_inputs

from qlora_dist.errors import RunFailed, UserError
from qlora_dist.train import check_start as preflight
from qlora_dist.train import train
from qlora_dist.train.check_start import (
    Facts,
    check_code,
    check_collective,
    check_devices,
    check_disk,
    check_shared,
    check_start,
    checkpoint_bytes,
    describe_start,
)
from qlora_dist.train.fit_memory import resolve_auto

GPU = Facts("node1", "network 1", "NVIDIA H100", "cuda", 80 * 2**30, 3.0, 0.0004, True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"), train__steps=1)


def with_changes(**changes):
    return dataclasses.replace(GPU, **changes)


# --- verdicts, from gathered facts ------------------------------------------------------------------------------------


def test_gpus_of_different_kinds_or_memory_are_refused_unless_allowed():
    check_devices([GPU, with_changes(host="node2", device_bytes=GPU.device_bytes - 5 * 2**20)], allow_mixed=False)
    mixed = [GPU, GPU, with_changes(host="node2", device="NVIDIA A100", device_bytes=40 * 2**30)]
    with pytest.raises(UserError, match=r"rank 0 \(node1\) has NVIDIA H100 80 GiB, but rank 2 \(node2\) has .*A100 40"):
        check_devices(mixed, allow_mixed=False)
    check_devices(mixed, allow_mixed=True)
    smaller = [GPU, with_changes(device_bytes=40 * 2**30)]
    with pytest.raises(UserError, match=r"but rank 1 \(node1\) has NVIDIA H100 40 GiB.*strategy.mixed_devices=true"):
        check_devices(smaller, allow_mixed=False)


def test_a_rank_that_sees_no_gpu_among_ranks_that_do_is_refused_in_any_case():
    blind = with_changes(host="node2", device="x86_64", device_type="cpu", device_bytes=0)
    with pytest.raises(UserError, match=r"rank 1 \(node2\) find no GPU, the other ranks do"):
        check_devices([GPU, blind], allow_mixed=True)
    check_devices([blind, blind], allow_mixed=False)


def test_a_wrong_sum_names_who_got_it():
    check_collective([GPU, GPU])
    with pytest.raises(RunFailed, match=r"over the 2 ranks should be 3, but rank 1 \(node2\) got 2\.5: .*_IFNAME"):
        check_collective([GPU, with_changes(host="node2", collective_sum=2.5)])


def test_other_code_names_who_runs_it():
    with pytest.raises(RunFailed, match=r"rank 0 \(a\) has code 1, torch 2, but rank 1 \(b\) has code 2, torch 2\."):
        check_code([("a", "code 1, torch 2"), ("b", "code 2, torch 2")])
    with pytest.raises(RunFailed, match=r"rank 4 \(b\) has y; and 2 more"):
        check_code([("a", "x")] + [("b", "y")] * 6)


def test_too_little_disk_says_how_much_is_needed_and_counts_what_is_there():
    gib = 2**30
    with pytest.raises(UserError, match=r"3\.00 GiB are free, 4\.00 GiB are needed for 4 checkpoints of 1\.00 GiB"):
        check_disk(Path("runs/x"), 3 * gib, gib, keep=3, num_there=0)
    check_disk(Path("runs/x"), 3 * gib, gib, keep=3, num_there=2)  # a resume: two of them are on disk already
    with pytest.raises(UserError, match="needed for 2 checkpoints"):
        check_disk(Path("runs/x"), gib, gib, keep=3, num_there=3)


def test_a_run_directory_that_is_not_shared_names_who_does_not_see_it():
    with pytest.raises(UserError, match=r"run_dir runs/x on rank 1 \(node2\) is not the one that rank 0 \(node1\)"):
        check_shared([GPU, with_changes(host="node2", sees_run_dir=False)], Path("runs/x"))


@pytest.mark.parametrize(
    ("capability", "is_before"), [((7, 0), True), ((7, 5), True), ((8, 0), False), ((9, 0), False)]
)
def test_a_gpu_before_bfloat16_is_known_by_its_capability(monkeypatch, capability, is_before):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert preflight.is_before_bfloat16(torch.device("cuda", 0)) == is_before
    assert not preflight.is_before_bfloat16(torch.device("cpu"))


def test_the_start_line_names_ranks_nodes_devices_time_and_disk():
    # the second node has the first one's name
    line = describe_start([GPU, GPU, with_changes(network="network 2", collective_seconds=0.0021)], 12 * 2**30)
    assert line == "3 ranks on 2 nodes: 3 x NVIDIA H100; all-reduce 2.10 ms; 12.00 GiB free for checkpoints"


# --- on real ranks ----------------------------------------------------------------------------------------------------


FAULTS = {
    "config": ("RunFailed", "has `lr: 0.01`, this one `lr: 0.5`. Start all ranks"),
    "code": ("RunFailed", "has code digest0, torch"),
    "sum": ("RunFailed", "a sum over the 2 ranks should be 3, but rank 1 ("),
    "disk": ("UserError", "1.0 MiB are free, 4"),
}


def _train_with_each_fault(raw):
    from qlora_dist.cluster.world import World

    rank = World.init().rank
    sound_sum, usage = World.sum, shutil.disk_usage("/")
    faults = {
        "config": lambda patch: None,
        "code": lambda patch: patch.setattr(preflight, "code_digest", lambda: f"digest{rank}"),
        "sum": lambda patch: patch.setattr(
            World, "sum", lambda self, values: sound_sum(self, values) + (0.5 if self.rank == 1 else 0.0)
        ),
        "disk": lambda patch: patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20)),
    }
    found = {}
    for name, inject in faults.items():
        with pytest.MonkeyPatch.context() as patch:
            inject(patch)
            lr = 0.5 if name == "config" and rank == 1 else 0.01
            found[name] = outcome(train, config_of(raw, optim__lr=lr))
    return found


def test_what_is_wrong_on_one_rank_stops_all_before_the_model_is_read(raw):
    for found in on_ranks(_train_with_each_fault, 2, raw):
        assert found.keys() == FAULTS.keys()
        for fault, (kind, message) in FAULTS.items():
            assert found[fault][0] == kind and message in found[fault][1], (fault, found[fault])
    assert not (Path(raw["run_dir"]) / "metrics.jsonl").exists()


def _start(folders):
    from qlora_dist.cluster.world import World

    world = World.init()
    folder = Path(folders[world.rank])
    options = {"checkpoint_bytes": 2**20, "keep": 1, "patience_seconds": 1.0}
    failure = outcome(lambda: check_start(world, folder, **options))
    return failure, [path.name for path in folder.iterdir()]


def test_another_folder_of_the_same_name_on_one_rank_is_found_and_nothing_is_left_behind(tmp_path):
    folders = [str(tmp_path / name) for name in ("a", "b")]
    for folder in folders:
        Path(folder).mkdir()
    for failure, left in on_ranks(_start, 2, folders):
        assert failure[0] == "UserError" and "a" in failure[1] and "is not the one that rank 0 (" in failure[1]
        assert left == []
    assert [result for result in on_ranks(_start, 2, [folders[0]] * 2)] == [(("", ""), [])] * 2


def test_rank_0_says_once_where_the_run_starts(raw, capsys):
    train(config_of(raw))
    said = capsys.readouterr().out
    assert said.count("machine  1 rank on 1 node: 1 x ") == 1 and "iB free for checkpoints; code " in said
    assert re.search(r"base: [0-9.]+ KiB on each rank, as ddp promises; model\.layers\.", said)


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_estimate_of_a_checkpoint_is_what_is_written(raw, optimizer, variant):
    from qlora_dist.cluster.world import World

    config = config_of(raw, optim__name=optimizer, lora__variant=variant, lora__rank=64)
    train(config)
    written = sum(path.stat().st_size for path in Path(raw["run_dir"]).glob("checkpoints/step-*/*"))
    num_trainable = resolve_auto(config, World.init()).plan.trainable_parameters
    # a MiB is meant for the JSON files, of which a tiny model has little
    assert written < checkpoint_bytes(num_trainable, optimizer) < 1.02 * written + 2**20
