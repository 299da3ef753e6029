"""The Triton kernels compiled for real GPUs, without one: nothing spilled, 16 bytes at a time, no byte moved twice."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from benchmarks.kernel_cases import NAMES, operands
from benchmarks.kernels_compiled import Compiled, Launch, compile_case, recorded
from benchmarks.shapes import SHAPES
from qlora_dist.model.kernels.traffic import Traffic, traffic

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
META = torch.device("meta")
TOKENS = 8192
# tensors that a launch streams through, in the order of the arguments; the others are small and shared by programs
STREAMS = {
    "rms_norm": (0,),
    "rms_norm_backward": (0, 1),
    "rms_norm_backward+residual": (0, 1, 4),
    "rotate_heads": (0,),
    "rotate_heads+norms": (0,),
    "rotate_heads_backward": (0, 1, 2),
    "swiglu": (0,),
    "swiglu_backward": (0, 1),
    "dequantize_4bit": (0,),
    "dequantize_4bit+single": (0,),
}

# bytes of what every program reads again: weights of a row; angles, and weights of queries and of keys, of 8 heads
HEADS = 8 * 128 * 2
SHARED = {
    "rms_norm": 4096 * 2,
    "rms_norm_backward": 4096 * 2,
    "rms_norm_backward+residual": 4096 * 2,
    "rotate_heads": 2 * HEADS,
    "rotate_heads+norms": 4 * HEADS,
    "rotate_heads_backward": 2 * HEADS,
}
# kernels with fewer operands than another case of theirs
LIGHTER = ("rms_norm_backward", "rotate_heads", "rotate_heads_backward", "dequantize_4bit+single")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check(name: str, shape: str, architecture: int) -> tuple[Launch, Compiled, Traffic]:
    launch, made = compile_case(name, SHAPES[shape], architecture, TOKENS)
    assert made.local == 0 and made.stack_bytes == 0, "registers spilled"
    assert set(made.accesses("STG")) == {16}, "narrow stores"
    return launch, made, traffic(name.partition("+")[0], operands(name, SHAPES[shape], TOKENS, META))


@pytest.mark.parametrize("name", NAMES)
def test_8b_on_sm_90_moves_each_element_once(name: str) -> None:
    launch, made, expected = check(name, "8b", 90)
    assert made.bytes_of("STG") * launch.programs == expected.written
    if name not in STREAMS:
        return
    arguments = operands(name, SHAPES["8b"], TOKENS, META)
    streamed = sum(arguments[place].numel() * arguments[place].element_size() for place in STREAMS[name])
    wide_bytes = made.accesses("LDG")[16] * 16 * made.threads * launch.programs
    assert wide_bytes == streamed + launch.programs * SHARED.get(name, 0)
    assert streamed >= 0.85 * expected.read  # the rest: constants of blocks, angles, weights


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LIGHTER])
def test_70b_on_sm_80_spills_nothing(name: str) -> None:
    _, made, _ = check(name, "70b", 80)
    # four of these programs or more fit on a multiprocessor: enough bytes in flight to hide the memory's latency
    assert made.registers * made.threads * 4 <= 65536 or (made.threads * 2 <= 2048 and made.registers <= 64)


def test_strides_that_are_no_multiple_of_8_get_narrow_loads_and_the_same_values() -> None:
    x, out = torch.empty(8, 100, device=META)[:, :96], torch.empty(8, 97, device=META)[:, :96]
    weight = torch.empty(96, device=META)
    assert recorded("rms_norm", [x, weight, 1e-5, out]).constants["UNIT"] == 1
    assert recorded("rms_norm", [x[:, :96], weight, 1e-5, torch.empty(8, 96, device=META)]).constants["UNIT"] == 1
    wide = torch.empty(8, 104, device=META)[:, :96]
    assert recorded("rms_norm", [wide, weight, 1e-5, wide]).constants["UNIT"] == 8
