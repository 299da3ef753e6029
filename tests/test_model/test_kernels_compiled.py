"""The Triton kernels compiled for real GPUs, without one: nothing spilled, 16 bytes at a time, no byte moved twice."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from benchmarks.kernel_cases import NAMES, operands
from benchmarks.kernels_compiled import Compiled, Launch, compile_case, recorded
from benchmarks.shapes import SHAPES
from qlora_dist.config.joint_products import COLUMNS_OF_PART as COLUMNS
from qlora_dist.config.joint_products import COLUMNS_OF_RAISED
from qlora_dist.config.joint_products import ROWS_OF_STEP as ROWS
from qlora_dist.model.kernels.traffic import Traffic, traffic

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
if importlib.util.find_spec("triton") is not None:
    from qlora_dist.model.kernels.gradients_triton import SUM_PARTS, SUM_ROWS
    from qlora_dist.model.kernels.lower_triton import NORM_CACHED_BYTES, NORM_ROWS, NORM_TILE
    from qlora_dist.model.kernels.lower_triton import ROWS as LOWER_ROWS
    from qlora_dist.model.kernels.lower_triton import TILE as LOWER_TILE
META = torch.device("meta")
TOKENS = 8192
# tensors that a launch streams through, in the order of the arguments; the others are small and shared by programs
STREAMS = {
    "rms_norm": (0,),
    "rms_norm+scales": (0,),
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
    "rms_norm+scales": 4096 * 2,
    "rms_norm_backward": 4096 * 2,
    "rms_norm_backward+residual": 4096 * 2,
    "rotate_heads": 2 * HEADS,
    "rotate_heads+norms": 4 * HEADS,
    "rotate_heads_backward": 2 * HEADS,
}
LOOPS = ("swiglu_backward_products", "sum_parts", "swiglu_lower", "copy_lower", "norm_lower", "raised_products")
# kernels with fewer operands than another case of theirs
LIGHTER = ("rms_norm", "rms_norm_backward", "rotate_heads", "rotate_heads_backward", "dequantize_4bit+single")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def check(name: str, shape: str, architecture: int) -> tuple[Launch, Compiled, Traffic]:
    launch, made = compile_case(name, SHAPES[shape], architecture, TOKENS)
    assert made.local == 0 and made.stack_bytes == 0, "registers spilled"
    # the one value of a row is stored once, by one thread; sums of 16 columns are 8 bytes a thread
    narrow = {
        "rms_norm+scales": {4}, "norm_lower": {4}, "swiglu_lower": {8}, "copy_lower": {8}, "raised_products": {8},
    }.get(name, set())  # fmt: skip
    assert set(made.accesses("STG")) == {16} | narrow, "narrow stores"
    return launch, made, traffic(name.partition("+")[0], operands(name, SHAPES[shape], TOKENS, META))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOOPS])
def test_8b_on_sm_90_moves_each_element_once(name: str) -> None:
    launch, made, expected = check(name, "8b", 90)
    rows_only = 4 * TOKENS if name == "rms_norm+scales" else 0
    assert made.accesses("STG")[16] * 16 * made.threads * launch.programs == expected.written - rows_only
    if name not in STREAMS:
        return
    assert not made.accesses("LDGSTS")
    arguments = operands(name, SHAPES["8b"], TOKENS, META)
    streamed = sum(arguments[place].numel() * arguments[place].element_size() for place in STREAMS[name])
    wide_bytes = made.accesses("LDG")[16] * 16 * made.threads * launch.programs
    assert wide_bytes == streamed + launch.programs * SHARED.get(name, 0)
    assert streamed >= 0.85 * expected.read  # the rest: constants of blocks, angles, weights


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_gates_gradient_moves_each_element_once_with_the_next_step_on_its_way(architecture: int) -> None:
    """In the code are the copies of the first step and, in the loop, of the next one; and stores of one step."""
    name = "swiglu_backward_products"
    launch, made, expected = check(name, "8b", architecture)
    assert launch.options["num_stages"] == 2 and not made.accesses("LDG")
    arguments = operands(name, SHAPES["8b"], TOKENS, META)
    grad, of_columns = arguments[0], arguments[-1]
    tile, steps = ROWS * COLUMNS, len(of_columns) * launch.arguments[-1]
    assert launch.programs == grad.shape[1] // COLUMNS * len(of_columns)
    # of each step 3 tiles, and 2 r columns of B for as many; what tokens share, r values each, is not 16 bytes a thread
    copied = made.accesses("LDGSTS")
    assert copied[16] * 16 * made.threads == 2 * (3 * tile * 2)
    assert copied[8] * 8 * made.threads == 2 * (2 * COLUMNS * 16 * 2)
    assert copied[4] * 4 * made.threads == 2 * (3 * ROWS * 16 * 2)
    # a program stores 2 tiles and 2 sums of r columns in each step, and 3 sums at its end
    stored = made.bytes_of("STG")
    assert stored == 2 * tile * 2 + 2 * ROWS * 16 * 4 + 3 * COLUMNS * 16 * 4
    in_steps = (stored - 3 * COLUMNS * 16 * 4) * steps * (grad.shape[1] // COLUMNS)
    assert in_steps + of_columns.numel() * 4 == pytest.approx(expected.written, rel=0.02)  # rows behind the last token
    assert 3 * tile * 2 * steps * (grad.shape[1] // COLUMNS) == pytest.approx(expected.read, rel=0.02)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("name", "tiles"), [("swiglu_lower", 2), ("copy_lower", 1)])
def test_an_input_and_its_columns_are_moved_once_with_the_next_tiles_on_their_way(
    name: str, tiles: int, architecture: int
) -> None:
    """In the code are the copies of the first two steps and, in the loop, of one more; and the stores of one step."""
    launch, made, expected = check(name, "8b", architecture)
    assert launch.options["num_stages"] == 3 and not made.accesses("LDG")
    rows = operands(name, SHAPES["8b"], TOKENS, META)[1]
    steps = launch.programs * -(-rows.shape[1] // LOWER_TILE)
    tile = LOWER_ROWS * LOWER_TILE * 2
    # a step's tiles of X, and as many columns of A, which programs share
    assert set(made.accesses("LDGSTS")) == {16}
    assert made.bytes_of("LDGSTS") == 3 * (tiles * tile + 16 * LOWER_TILE * 2)
    assert steps * tiles * tile + rows.numel() * 2 == expected.read
    stored = made.accesses("STG")
    of_low = stored[8] * 8 * made.threads * launch.programs
    assert stored[16] * 16 * made.threads * steps + of_low == expected.written


@pytest.mark.parametrize("shape", ["8b", "70b"])
def test_a_norm_reads_its_rows_again_from_the_cache_and_writes_each_element_once(shape: str) -> None:
    """In the code: a step of the statistics; copies of the first two steps and, in the loop, of one more; stores."""
    launch, made, expected = check("norm_lower", shape, 90)
    _, weight, _, rows, *_ = operands("norm_lower", SHAPES[shape], TOKENS, META)
    columns, width = rows.shape
    tile, block = NORM_ROWS * NORM_TILE * 2, launch.constants["BLOCK"]
    assert made.accesses("LDG")[16] * 16 * made.threads == 2 * tile and set(made.accesses("LDG")) == {16}
    copied = made.accesses("LDGSTS")
    assert copied[16] * 16 * made.threads == 3 * (tile + block * NORM_TILE * 2)
    assert copied[4] * 4 * made.threads == 3 * NORM_TILE * 2 and set(copied) == {4, 16}
    blocks, steps = TOKENS // NORM_ROWS, width // NORM_TILE
    assert blocks * steps * tile + (rows.numel() + weight.numel()) * 2 == expected.read
    assert made.accesses("STG")[16] * 16 * made.threads == tile + 2 * NORM_ROWS * block * 2
    assert blocks * (steps * tile + 2 * NORM_ROWS * columns * 2 + NORM_ROWS * 4) == expected.written
    # so few blocks at a time that they stay in the cache, and still one for each multiprocessor
    assert launch.programs * NORM_ROWS * width * 2 <= NORM_CACHED_BYTES and launch.programs >= 128


@pytest.mark.parametrize("architecture", [80, 90])
def test_gradients_are_raised_in_one_pass_with_the_next_step_on_its_way(architecture: int) -> None:
    """In the code: B once; copies of the first step and, in the loop, of the next one; stores of a step, of all dB."""
    launch, made, expected = check("raised_products", "8b", architecture)
    *_, of_rows, of_columns = operands("raised_products", SHAPES["8b"], TOKENS, META)
    tile, steps = ROWS * COLUMNS_OF_RAISED, len(of_columns) * launch.arguments[-1]
    assert launch.options["num_stages"] == 2 and launch.programs == len(of_rows) * len(of_columns)
    assert made.accesses("LDG") == {16: COLUMNS_OF_RAISED * 16 * 2 // 16 // made.threads}
    copied = made.accesses("LDGSTS")
    assert copied[16] * 16 * made.threads == 2 * tile * 2
    assert copied[4] * 4 * made.threads == 2 * ROWS * 16 * 2 and set(copied) == {4, 16}
    stored = made.accesses("STG")
    assert (
        stored[8] * 8 * made.threads == ROWS * 16 * 4 and stored[16] * 16 * made.threads == COLUMNS_OF_RAISED * 16 * 4
    )
    # rows behind the last token and columns behind a layer's end are masked
    assert tile * 2 * steps * len(of_rows) == pytest.approx(expected.read, rel=0.04)
    in_steps = ROWS * 16 * 4 * steps * len(of_rows)
    assert in_steps + of_columns.numel() * 4 == pytest.approx(expected.written, rel=0.02)


@pytest.mark.parametrize("shape", ["8b", "70b"])
def test_sums_of_parts_read_each_once(shape: str) -> None:
    """In the loop: a block of parts of 16 tokens."""
    launch, made, expected = check("sum_parts", shape, 90)
    parts, ends, *_ = operands("sum_parts", SHAPES[shape], TOKENS, META)
    of_parts = SUM_PARTS * SUM_ROWS * 16 * 4
    # beside them each thread reads the scales of its rows: two words with Triton 3.7, up to sixteen with 3.6
    assert of_parts + 4 * 2 * made.threads <= made.bytes_of("LDG") <= of_parts + 4 * 16 * made.threads
    rounds = sum(-(-(end - start) // SUM_PARTS) for start, end in zip([0, *ends], ends, strict=False))
    assert rounds * SUM_PARTS * SUM_ROWS * 16 * 4 * launch.programs // 2 == parts.numel() * 4
    assert made.bytes_of("STG") * launch.programs == expected.written


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LIGHTER])
def test_70b_on_sm_80_spills_nothing(name: str) -> None:
    launch, made, _ = check(name, "70b", 80)
    if "num_stages" in launch.options:  # what is on its way hides the latency
        return
    # four of these programs or more fit on a multiprocessor: enough bytes in flight to hide the memory's latency
    assert made.registers * made.threads * 4 <= 65536 or (made.threads * 2 <= 2048 and made.registers <= 64)


def test_strides_that_are_no_multiple_of_8_get_narrow_loads_and_the_same_values() -> None:
    x, out = torch.empty(8, 100, device=META)[:, :96], torch.empty(8, 97, device=META)[:, :96]
    weight = torch.empty(96, device=META)
    assert recorded("rms_norm", [x, weight, 1e-5, None, out]).constants["UNIT"] == 1
    assert recorded("rms_norm", [x[:, :96], weight, 1e-5, None, torch.empty(8, 96, device=META)]).constants["UNIT"] == 1
    wide = torch.empty(8, 104, device=META)[:, :96]
    assert recorded("rms_norm", [wide, weight, 1e-5, None, wide]).constants["UNIT"] == 8
