"""The doctor names what is missing, measures what it claims, and its exit code says whether training can run here."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch
from helpers.ranks import run_forked

from qlora_dist.commands.doctor import Finding, doctor
from qlora_dist.commands.doctor import devices as doctor_devices
from qlora_dist.commands.doctor.devices import NF4_ERROR_RANGE, check_round_trip, nf4_relative_error
from qlora_dist.commands.doctor.finding import guarded
from qlora_dist.commands.doctor.machine import check_hub, check_network
from qlora_dist.commands.doctor.packages import check_packages, requires
from qlora_dist.model.bitsandbytes_import import bitsandbytes


def test_a_machine_that_can_train_gives_exit_code_0_and_names_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor() == 0
    *lines, empty, verdict = capsys.readouterr().out.splitlines()
    assert verdict.startswith("Training can run here, on: ") and "cpu" in verdict and not empty
    assert all(line.split()[0] in ("ok", "warn", "missing") for line in lines)
    report = "\n".join(lines)
    for subject in ("python", "torch", "bitsandbytes library", "4-bit on cpu", "disk here", "open files", "Slurm"):
        assert f" {subject} " in report


def test_missing_packages_are_named_with_what_to_install_and_give_exit_code_1() -> None:
    program = """
        import sys

        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("peft", "bitsandbytes"):
                    raise ModuleNotFoundError(f"No module named {name!r}")

        sys.meta_path.insert(0, Hide())
        for name in [name for name in sys.modules if name.split(".")[0] in ("peft", "bitsandbytes", "qlora_dist")]:
            del sys.modules[name]
        from qlora_dist.commands.doctor import doctor
        sys.exit(doctor())
    """
    result = run_forked(program, timeout=240)
    lines = result.stdout.splitlines()
    assert result.returncode == 1, result.stderr
    assert lines[-1] == "Training cannot run here; missing: peft, bitsandbytes."
    (peft,) = [line for line in lines if line.split()[:2] == ["missing", "peft"]]
    assert "pip install 'peft>=" in peft
    (trip,) = [line for line in lines if "4-bit on cpu" in line]
    assert trip.startswith("missing") and "not checked" in trip
    assert any("open files" in line for line in lines), "the checks after it still run"


def test_a_package_that_is_not_installed_blocks_only_when_it_is_required() -> None:
    (required,) = check_packages(["no-such-package>=1.0"])
    assert (required.status, required.blocks) == ("missing", True)
    assert required.advice == "pip install 'no-such-package>=1.0'"
    (optional,) = check_packages(["flash-attn>=2.8 ; extra == 'flash'"])
    if optional.status == "missing":
        assert not optional.blocks
        assert "pip install 'qlora-dist[flash]'" in optional.advice


def test_a_version_outside_of_the_range_is_a_warning() -> None:
    (found,) = check_packages(["click>=999"])
    assert found.status == "warn"
    assert "needs >=999" in found.found


def test_every_required_package_is_checked_and_development_tools_are_not() -> None:
    names = [finding.subject for finding in check_packages(requires())]
    assert {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "flash-attn"} <= set(names)
    assert not {"pytest", "ruff", "mypy"} & set(names)


def nf4_with_one_constant_a_block(weight: torch.Tensor) -> torch.Tensor:
    """NF4 by its definition: the nearest of 16 values of the block of 64, in units of the block's largest."""
    code = torch.tensor(
        [
            *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
            *(0.0795803, 0.16093020, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
        ]
    )
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    nearest = (blocks / scale).unsqueeze(-1).sub(code).abs().argmin(dim=-1)
    return (code[nearest] * scale).reshape(weight.shape)


def test_the_round_trip_error_is_that_of_nf4() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    expected = ((nf4_with_one_constant_a_block(weight) - weight).norm() / weight.norm()).item()
    assert NF4_ERROR_RANGE[0] < expected < NF4_ERROR_RANGE[1]
    # the reference has no double quantization, which adds about 0.0001
    assert nf4_relative_error("cpu") == pytest.approx(expected, abs=5e-4)


def test_wrong_arithmetic_on_a_device_is_not_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bitsandbytes.functional.dequantize_4bit
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, state: 1.05 * right(packed, state))
    found = check_round_trip("cpu")
    assert (found.status, found.can_train) == ("missing", False)
    assert "do not train here" in found.advice
    # weights that come back too well were never in 4 bits
    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", lambda weight, **_: (weight, None))
    monkeypatch.setattr(bitsandbytes.functional, "dequantize_4bit", lambda packed, _: packed)
    assert check_round_trip("cpu").status == "missing"


def test_a_device_that_is_not_there_is_not_ok() -> None:
    found = check_round_trip(f"cuda:{torch.cuda.device_count()}")
    assert (found.status, found.can_train) == ("missing", False)


@pytest.mark.gpu
def test_each_gpu_does_the_round_trip_and_reports_paged_memory() -> None:
    findings = [*doctor_devices.check_devices(), *doctor_devices.check_paged_memory()]
    for index in range(torch.cuda.device_count()):
        (trip,) = [finding for finding in findings if finding.subject == f"4-bit on cuda:{index}"]
        assert trip.can_train, trip
        assert f"paged memory, GPU {index}" in {finding.subject for finding in findings}


def test_the_token_of_the_hub_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_print_this")
    text = "\n".join(map(str, check_hub()))
    assert "present" in text
    assert "do_not_print" not in text


def test_a_check_that_fails_in_an_unforeseen_way_is_a_line_of_the_report() -> None:
    def check_something() -> Iterator[Finding]:
        yield Finding("ok", "first part", "fine")
        raise RuntimeError("the driver\nwent away")

    first, second = guarded(check_something)
    assert first.status == "ok"
    assert (second.status, second.subject) == ("warn", "something")
    assert "RuntimeError: the driver" in second.found


@pytest.mark.parametrize(
    ("addresses", "status", "text"),
    [
        (["10.0.0.7"], "ok", "nodea is 10.0.0.7"),
        (["127.0.1.1"], "warn", "nodea is 127.0.1.1, an address of every node itself; on several nodes start with"),
        (
            [],
            "warn",
            "nodea does not resolve (Name or service not known); on several nodes start with qlora-dist torchrun",
        ),
    ],
)
def test_a_host_name_that_other_nodes_could_not_use_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], status: str, text: str
) -> None:
    def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        if not addresses:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, 2, 17, "", (address, 9)) for address in addresses]

    monkeypatch.setattr(socket, "gethostname", lambda: "nodea")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    name, network = check_network()
    assert name.status == status and text in str(name) and not name.blocks
    assert network.status == "ok" and "lo 127.0.0.1" in network.found and "route to the first node" in network.advice


def test_a_chosen_interface_that_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "absent0")
    *_, network = check_network()
    assert network.status == "warn" and "GLOO_SOCKET_IFNAME=absent0 chooses none of them" in network.advice
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    *_, network = check_network()
    assert network.status == "ok" and network.advice == "GLOO_SOCKET_IFNAME=lo chooses"
