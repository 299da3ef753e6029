"""Ranks agree, fail together, and sum gradients the same way every time."""

from __future__ import annotations

import json
import math
import os
import re
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from helpers.ranks import on_ranks, outcome

from qlora_dist.cluster import trackers as trackers_module
from qlora_dist.cluster import world as world_module
from qlora_dist.cluster.heartbeat import Failure
from qlora_dist.cluster.stop_signal import StopRequested, StopSignal
from qlora_dist.cluster.trackers import Trackers
from qlora_dist.cluster.world import World, own_device
from qlora_dist.errors import RunFailed, UserError


def test_one_process_is_a_world_of_one():
    world = World.init()
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert world.sum(torch.tensor([2.0])).item() == 2.0
    assert world.any(False) is False and world.any(True) is True
    assert world.gather("x") == ["x"]
    assert world.from_main(lambda: 5) == 5
    with world.local_main_first("nothing"):
        pass


def test_a_cuda_device_always_has_its_index(monkeypatch):
    """Without a launcher Accelerate gives `cuda`, which is no tensor's device and which set_device refuses."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert own_device(torch.device("cuda")) == torch.device("cuda", 0)
    assert own_device(torch.device("cuda", 3)) == torch.device("cuda", 3)
    assert own_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert own_device() == torch.device("cuda", 0)
    state = SimpleNamespace(process_index=0, num_processes=1, local_process_index=0, device=torch.device("cuda"))
    assert World(state, StopSignal(), 1.0).device == torch.device("cuda", 0)


def _collectives():
    world = World.init()
    rank = world.rank
    own = torch.tensor([rank + 1.0])
    return {
        "sum": world.sum(own).item(),
        "own": own.item(),
        "max": world.max(rank),
        "any": world.any(rank == 1),
        "gather": world.gather({"rank": rank}),
        "pieces": _gathered_in_pieces(world),
        "from_main": world.from_main(lambda: f"of {rank}"),
        "user": outcome(world.from_main, _raise_user),
        "bug": outcome(world.from_main, _raise_bug),
        "differs": outcome(world.require_equal, str(rank == 2), "the answer"),
        "same": outcome(world.require_equal, "x", "the answer"),
    }


def _gathered_in_pieces(world):
    """A tensor of 5 x 3 elements, of which rank 0 may hold two of each rank at a time."""
    world_module.GATHER_BYTES = 2 * 4 * world.size
    parts = world.gather_tensor(torch.arange(15.0).view(5, 3) + 100 * world.rank)
    return None if parts is None else [part.tolist() for part in parts]


def _raise_user():
    raise UserError("wrong file")


def _raise_bug():
    raise KeyError("k")


def test_collectives_agree_and_failures_of_rank_0_reach_all():
    results = on_ranks(_collectives, 3)
    for rank, result in enumerate(results):
        assert result["sum"] == 6.0 and result["own"] == rank + 1.0 and result["max"] == 2 and result["any"] is True
        assert result["gather"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        whole = [(torch.arange(15.0).view(5, 3) + 100 * sender).tolist() for sender in range(3)]
        assert result["pieces"] == (whole if rank == 0 else None)
        assert result["from_main"] == "of 0"
        assert result["user"] == ("UserError", "wrong file")
        assert result["bug"][0] == ("KeyError" if rank == 0 else "RunFailed")
        assert (
            result["differs"][0] == "RunFailed"
            and "the answer differs between rank 0 and rank 2 (" in result["differs"][1]
        )
        assert result["same"] == ("", "")


def _first_builds(fails):
    world = World.init()
    times, wait = [], world._wait

    def waiting(*arguments, **options):
        world._store.set("test/waits", "")
        wait(*arguments, **options)

    def run():
        if world.rank == 1:
            world._wait = waiting
        with world.local_main_first("building"):
            if world.rank == 0:
                world._store.get("test/waits")  # returns when the other rank waits, here or for the end
                if fails:
                    raise UserError("line 3 is broken")
            times.append(time.time())
        world.gather(None)  # rank 0 holds the store: it must not end before the others have read it

    return outcome(run), times


def test_the_first_rank_of_a_node_builds_before_the_others():
    (_, first), (_, second) = on_ranks(_first_builds, 2, False)
    assert first[0] < second[0]


def test_when_the_builder_fails_the_others_fail_at_once_for_the_same_reason():
    results = on_ranks(_first_builds, 2, True)
    assert results[0][0] == ("UserError", "line 3 is broken")
    kind, text = results[1][0]
    assert kind == "UserError" and re.fullmatch(r"rank 0 \(.+\) failed: line 3 is broken", text)


def test_a_wait_on_the_store_ends_at_once_with_the_failure_of_another_rank(monkeypatch):
    monkeypatch.setattr(world_module, "LOOK_SECONDS", 1e9)
    world, looks = World.init(), iter([False] * 5)
    world._heartbeat.failure = Failure(1, "b", "user", "line 3 is broken")
    with pytest.raises(UserError, match=r"rank 1 \(b\) failed: line 3 is broken"):
        world._wait(lambda: next(looks), until_stop=False)


def _until_first_waits(world):
    """Returns when rank 0 publishes that it waits for the others."""
    while "waiting for the other ranks" not in json.loads(world._store.get("heartbeat/0"))["what"]:
        time.sleep(0.05)


def _unequal_work():
    """What rank 0 does while the other is not ready, after a block and at the end."""
    world, statuses = World.init(), []
    wait = world._wait

    def recorded(*arguments):
        statuses.append(world._heartbeat._status)
        wait(*arguments)

    world._wait = recorded
    with world.stoppable("preparing data"):
        if world.rank == 1:
            _until_first_waits(world)
    world.set_status("step 3", 500.0)
    if world.rank == 1:  # as a tracker that sends its results
        _until_first_waits(world)
    world.close()
    return [(status.what, status.is_waiting, status.limit_seconds) for status in statuses]


def test_ranks_that_are_ready_early_wait_on_the_store_without_a_limit():
    first, _ = on_ranks(_unequal_work, 2)
    assert first == [
        ("waiting for the other ranks after preparing data", False, math.inf),
        ("waiting for the other ranks after the end", False, math.inf),
    ]


def _fails_on_rank_1(place, error):
    """How the error with which each rank ends reads."""
    world = World.init()
    try:
        if place == "a collective":
            world.set_status("step 3")
            if world.rank == 1:
                raise error
            world.sum(torch.ones(1))
        elif place == "the first of a node":
            with world.stoppable("preparing data"), world.local_main_first("preparing data"):
                if world.rank == 1:
                    raise error
        else:
            with world.stoppable("preparing data"):
                if world.rank == 1:
                    raise error
    except Exception as found:
        ended = world.fail(found)
        return type(ended).__name__, str(ended)


@pytest.mark.parametrize(
    ("place", "error", "kind", "text"),
    [
        ("a block", OSError(28, "No space left", "/x"), "MachineFailed", "preparing data: No space left (/x); free"),
        ("the first of a node", UserError("line 3 is broken"), "UserError", "line 3 is broken"),
        ("a collective", KeyError("k"), "RunFailed", "KeyError: 'k'"),
    ],
)
def test_an_exception_on_one_rank_ends_the_others_with_its_text(place, error, kind, text):
    other, failed = on_ranks(_fails_on_rank_1, 2, place, error)
    assert failed[0] == (kind if kind != "RunFailed" else type(error).__name__)
    assert other[0] == kind and re.match(rf"rank 1 \(.+\) failed: {re.escape(text)}", other[1]), other


def test_rank_0_meets_a_fault_of_the_machine_as_the_others_do():
    world = World.init()
    world.set_status("saving step 4")

    def full():
        raise OSError(28, "No space left on device", "/run/x")

    def no_memory():
        raise MemoryError

    assert outcome(world.from_main, full)[0] == "MachineFailed"
    assert outcome(world.from_main, full)[1].startswith("saving step 4: No space left on device (/run/x); free space")
    assert outcome(world.from_main, no_memory) == ("MachineFailed", "saving step 4: host memory is used up")


def test_the_steps_after_the_first_are_limited_and_torchs_own_limit_comes_last():
    world, limits = World.init(timeout_seconds=5.0), []
    for step in (1, 2, 3):
        world.begin_step(step)
        limits.append(world._heartbeat._status.limit_seconds)
    assert limits == [math.inf, 5.0, 5.0]  # the first one may compile
    for seconds in (1.0, 600.0, 7 * 24 * 3600.0):
        longest = world_module.WAIT_FACTOR * seconds
        assert world_module._backend_timeout(seconds).total_seconds() >= longest + 60


def _reduce(shuffled):
    """Gradients that differ by rank, in an order of parameters that differs by rank; one rank lacks one."""
    from qlora_dist.optim import reducer
    from qlora_dist.optim.flat import FlatParameters

    reducer.BUCKET_BYTES = 4096  # several buckets
    world = World.init()
    parameters = {f"p{i}": torch.nn.Parameter(torch.ones(300 + i)) for i in range(8)}
    flat = FlatParameters(parameters, lambda _: False)
    sums = reducer.GradientReducer(world.size, flat.grads, [group.spans() for group in flat.groups])
    order = list(parameters.values())
    if shuffled and world.rank == 1:
        order = order[::-1]
    sum(p.sum() for p in order).backward()
    sums.arm()
    used = order[1:] if world.rank == 2 else order
    loss = torch.zeros(())
    for i, p in enumerate(used):
        loss = loss + (p * float(world.rank + 1) * (i + 1 if not shuffled else 1)).sum()
    loss.backward()
    sums.finish()
    return {name: p.grad[0].item() for name, p in parameters.items()}, flat.grads[0].numel() * 4 // 4096


def test_gradients_are_summed_whatever_their_order_and_though_one_is_missing():
    results = on_ranks(_reduce, 3, True)
    grads, num_buckets = results[0]
    assert num_buckets >= 2, "one bucket would show nothing"
    # 3 ranks x 1 from the first micro-step, then 1 + 2 + 3; rank 2 gave nothing to p0 in the second
    assert grads == {"p0": 3 + 1 + 2.0, **{f"p{i}": 9.0 for i in range(1, 8)}}
    assert all(result[0] == grads for result in results)


def test_more_processes_than_gpus_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"local rank 1 was started but only 1 GPUs are visible"):
        World.init()


def _tracked(folder):
    """Finished trackers, one of which fails: the process group outlives them, and the run its trackers."""
    world, finished = World.init(), []

    def fails():
        raise OSError("no network")

    trackers_module._MODULES["wandb"] = ("json",)  # as if it were installed
    with Trackers(["tensorboard", "wandb"], folder) as trackers:
        trackers._accelerator.trackers = [
            SimpleNamespace(name="first", finish=fails),
            SimpleNamespace(name="second", finish=lambda: finished.append("second")),
        ]
    world.close()
    return finished


def test_trackers_finish_before_the_process_group_and_fail_nothing(tmp_path):
    assert on_ranks(_tracked, 2, str(tmp_path)) == [["second"], ["second"]]


@pytest.mark.parametrize(("error", "finishes"), [(None, True), (StopRequested, True), (RunFailed, False)])
def test_trackers_finish_after_a_stop_and_not_after_a_failure(error, finishes):
    finished = []
    with suppress(RunFailed, StopRequested), Trackers(["tensorboard"], ".") as trackers:
        one = SimpleNamespace(name="one", finish=lambda: finished.append("one"))
        trackers._accelerator = SimpleNamespace(trackers=[one])
        if error is not None:
            raise error("stopped")
    assert bool(finished) == finishes


def test_an_unknown_tracker_is_explained():
    with pytest.raises(UserError, match=r"names 'carrier_pigeon'; expected some of tensorboard, wandb"):
        Trackers(["tensorboard", "carrier_pigeon"], ".")


def test_a_tracker_that_is_not_installed_is_refused_and_not_left_out_in_silence(monkeypatch):
    monkeypatch.setitem(trackers_module._MODULES, "wandb", ("no_such_module",))
    with pytest.raises(UserError, match=r"wandb, which is not installed here: .*pip install"):
        Trackers(["wandb"], ".")


def test_the_trackers_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(trackers_module._MODULES) <= set(LOGGER_TYPE_TO_CLASS)


def test_a_run_that_asks_for_a_gpu_does_not_train_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"device is cuda, but .* has no GPU for this run: .*--set device=cpu"):
        World.init(device="cuda")


def test_a_run_that_asks_for_the_cpu_does_not_take_the_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    world = World.init(device="cpu")
    assert world.device.type == "cpu"
    world.close()


def test_errors_carry_their_exit_codes():
    assert (UserError.exit_code, RunFailed.exit_code) == (2, 1)
