"""The basis of GPU results: many calls between two events, operands larger than the cache, a profile as a table."""

from __future__ import annotations

import threading

import torch

from benchmarks import memory, nvml, profiling, provenance
from benchmarks.gpu import ceilings, timing

MIB = 2**20


def test_operands_rotate_through_more_than_twice_the_cache() -> None:
    for set_bytes in (MIB, 42 * MIB, 400 * MIB):
        number = timing.num_sets(set_bytes, 50 * MIB)
        assert number >= 3
        # between two uses of a set all others pass through the cache
        assert (number - 1) * set_bytes > 50 * MIB
        assert number * set_bytes > 2 * 50 * MIB


def test_a_sample_is_some_milliseconds_of_many_calls() -> None:
    assert timing.num_calls(25e-6) == 50  # a small product: the cost of a launch is spread over 50
    assert timing.num_calls(0.2e-3) == 25
    assert timing.num_calls(1.0) == 20


def test_calls_cycle_through_the_sets_and_seconds_are_per_call() -> None:
    taken: list[int] = []
    works = [lambda i=i: taken.append(i) for i in range(3)]
    samples, calls = timing.seconds_of(works, torch.device("cpu"), 0.0)
    assert len(samples) == timing.LEAST_SAMPLES and calls == timing.MOST_CALLS
    assert taken[:6] == [0, 1, 2, 0, 1, 2] and {taken.count(i) > 40 for i in range(3)} == {True}
    assert 0 < min(samples) < 1e-3  # others may have been interrupted by another process


def test_varlen_gets_grouped_heads_without_repetition(monkeypatch) -> None:
    """A repetition would be timed as attention. Only the keyword for grouped heads differs between torch versions."""

    def newest(query, key, value, *borders, window_size, enable_gqa=False):
        raise AssertionError

    def older(query, key, value, *borders, window_size):
        raise AssertionError

    def oldest(query, key, value, *borders, is_causal=False):
        raise AssertionError

    for kernel, keywords in (
        (newest, {"window_size": (-1, 0), "enable_gqa": True}),
        (older, {"window_size": (-1, 0)}),
        (oldest, {"is_causal": True}),
    ):
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        assert ceilings.varlen_keywords() == keywords


def test_a_call_of_varlen_launches_nothing_but_attention(monkeypatch) -> None:
    """Document boundaries are created once: created in the call, they would be timed as attention."""
    seen = []

    def kernel(query, key, value, first, second, *lengths, window_size):
        seen.append((first, second, lengths, query.shape[1], key.shape[1]))

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    attend = ceilings.attentions(torch.device("cpu"), 4, 3)["varlen"]
    query, key = torch.ones(12, 4, 8), torch.ones(12, 2, 8)
    attend(query, key, key)
    attend(query, key, key)
    assert seen[0][0] is seen[0][1] is seen[1][0] and seen[0][0].tolist() == [0, 4, 8, 12]
    assert seen[0][2:] == ((4, 4), 4, 2)


def test_tiny_cases_do_not_fill_a_gpus_cache(monkeypatch) -> None:
    """Filling twice 50 MB with sets of a few KB would take thousands of them, for a case that measures nothing."""
    monkeypatch.setattr(ceilings, "cache_bytes", lambda device: 50 * MIB)
    tiny = ceilings.Ceilings(torch.device("cpu"), True)
    assert len(tiny.sets_of(lambda: lambda: None, 36_000)) == 3
    assert len(ceilings.Ceilings(torch.device("cpu"), False).sets_of(lambda: lambda: None, 10 * MIB)) == 11


def test_a_kernel_table_has_neither_named_ranges_nor_steps() -> None:
    """They cover the kernels: counted too, they would double the GPU's busy time."""

    class Event:
        def __init__(self, key, kind=torch.autograd.DeviceType.CUDA, is_user_annotation=False):
            self.key, self.device_type, self.is_user_annotation = key, kind, is_user_annotation
            self.count, self.self_device_time_total = 2, 7.0

    events = [
        Event("gemm"),
        Event("Memcpy HtoD"),
        Event("ProfilerStep#1"),
        Event("a range", is_user_annotation=True),
        Event("cudaLaunchKernel", torch.autograd.DeviceType.CPU),
    ]
    assert profiling._kernels(events) == [("gemm", 2, 7.0), ("Memcpy HtoD", 2, 7.0)]


def test_a_device_watch_keeps_the_peak_of_memory_in_use(monkeypatch) -> None:
    used = iter([3, 9, 4])
    is_exhausted = threading.Event()

    def in_use(device):
        value = next(used, None)
        if value is None:
            is_exhausted.set()
        return value or 1

    monkeypatch.setattr(memory, "device_used_bytes", in_use)
    with memory.DeviceWatch(torch.device("cuda", 0), interval_seconds=0.01) as watch:
        assert is_exhausted.wait(20)  # values after the peak must not replace it
    assert watch.peak_bytes == 9
    with memory.DeviceWatch(torch.device("cpu")) as watch:
        pass
    assert watch.peak_bytes is None


def test_pinned_copies_fit_a_small_source(monkeypatch) -> None:
    """With --tiny the source is smaller than the usual copy."""
    tiny = ceilings.Ceilings(torch.device("cpu"), True)
    tiny.device = torch.device("cuda", 0)
    sizes = []
    monkeypatch.setattr(tiny, "measure", lambda what, case, unit, amount, works: sizes.append((what, amount)))
    empty = torch.empty

    def on_host(*shape, pin_memory=False, **options):
        return empty(*shape, **(options | {"device": "cpu"}))

    monkeypatch.setattr(torch, "empty", on_host)
    monkeypatch.setattr(torch, "randint", lambda *a, size=None, **options: empty(a[2], dtype=torch.uint8))
    tiny.bandwidth()
    assert sizes == [("copy", 2 * MIB / 1e9), ("pinned", MIB / 1e9), ("pinned", MIB / 1e9)]


def test_a_profile_is_a_table_per_step() -> None:
    rows = [("big", 6, 300.0), ("small", 30, 60.0), ("big", 3, 150.0)]
    table = profiling.table_of(rows, wall_microseconds=1020.0, num_steps=3)
    assert table["kernels"][0] == {"name": "big", "calls_per_step": 3.0, "microseconds_per_step": 150.0}
    assert (table["kernel_microseconds_per_step"], table["kernels_per_step"]) == (170.0, 13.0)
    assert table["busy_share"] == 0.5 and table["num_names"] == 2
    many = [(f"kernel {i}", 1, float(i)) for i in range(100)]
    table = profiling.table_of(many, 1e6, 1)
    assert len(table["kernels"]) == profiling.MAX_ROWS and table["others"]["calls_per_step"] == 40
    total = table["others"]["microseconds_per_step"] + sum(row["microseconds_per_step"] for row in table["kernels"])
    assert total == table["kernel_microseconds_per_step"] == sum(range(100))


def test_a_cpu_has_no_device_state_and_a_gpu_without_a_driver_no_readings(monkeypatch) -> None:
    assert provenance.device_state(torch.device("cpu")) is None
    monkeypatch.setattr(nvml, "_library", lambda: None)
    nvml._open.cache_clear()
    assert nvml.readings(0) == dict.fromkeys(nvml.READINGS)
    assert nvml.energy_joules(0) is None
    nvml._open.cache_clear()


def test_readings_are_converted_and_what_a_card_lacks_is_none(monkeypatch) -> None:
    class Driver:
        """Answers as NVML documents: MHz, milliwatts, degrees; no memory clock (its functions fail)."""

        nvmlInit_v2 = staticmethod(lambda: 0)
        nvmlDeviceGetHandleByIndex_v2 = staticmethod(lambda index, handle: 0)

        @staticmethod
        def nvmlDeviceGetClockInfo(handle, kind, found):
            found._obj.value = 1980
            return 0 if kind == nvml.SM else 3

        @staticmethod
        def nvmlDeviceGetPowerUsage(handle, found):
            found._obj.value = 512_345
            return 0

        @staticmethod
        def nvmlDeviceGetTotalEnergyConsumption(handle, found):
            found._obj.value = 7_000
            return 0

    monkeypatch.setattr(nvml, "_library", Driver)
    nvml._open.cache_clear()
    found = nvml.readings(0)
    assert (found["sm_clock_mhz"], found["power_watts"]) == (1980, 512.345)
    assert found["memory_clock_mhz"] is None and found["temperature_celsius"] is None
    assert nvml.energy_joules(0) == 7.0
    nvml._open.cache_clear()


def test_a_stated_commit_is_marked_and_must_be_valid(monkeypatch, tmp_path) -> None:
    import pytest

    from qlora_dist.errors import UserError

    monkeypatch.setattr(provenance, "commit", lambda: None)  # a copy without .git
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit_and_source() == (None, "none")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "COMMIT").write_text("ab" * 20 + "\n")
    assert provenance.commit_and_source() == ("ab" * 20, "stated")
    monkeypatch.setenv(provenance.STATED_BY, "cd" * 20 + "-dirty")
    assert provenance.commit_and_source() == ("cd" * 20 + "-dirty", "stated")
    monkeypatch.setenv(provenance.STATED_BY, "main")
    with pytest.raises(UserError, match="'main', not a commit of 40 hex digits"):
        provenance.commit_and_source()
