"""What importing the package does, and does not do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from qlora_dist.model import bitsandbytes_import


def test_importing_the_model_package_prints_nothing_and_contacts_no_hub() -> None:
    code = """
import sys, torch
compile = torch.compile
import qlora_dist.model, bitsandbytes
print([name for name in ("kernels", "torch._inductor.compile_fx") if name in sys.modules], torch.compile is compile)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "[] True\n"  # nor does it import the compiler, which takes seconds
    assert "kernels" not in result.stderr


def test_what_bitsandbytes_compiles_is_compiled_at_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_now(function: Any, **options: Any) -> Any:
        compiled.append((function.__name__, options))
        return lambda x: function(x) + 1

    monkeypatch.setattr(torch, "compile", compile_now)
    with bitsandbytes_import._compiling_at_the_first_call():

        @torch.compile
        def twice(x: int) -> int:
            return 2 * x

        @torch.compile(dynamic=False)
        def thrice(x: int) -> int:
            return 3 * x

    assert torch.compile is compile_now and compiled == []
    assert [twice(1), thrice(1), thrice(2)] == [3, 4, 7]
    assert compiled == [("twice", {}), ("thrice", {"dynamic": False})]
