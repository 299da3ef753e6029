"""The Triton kernels in Triton's interpreter, against the plain references: values, odd sizes, nothing else written.

The interpreter must be chosen before Triton is imported, so one child process runs all cases and reports each. Its
casts to bf16 truncate, so results here are fp32 or fp16.
"""

from __future__ import annotations

import importlib.util
import json
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import run_python
from torch import Tensor

from benchmarks.kernel_cases import kernel_of, reference_of
from qlora_dist.config.joint_products import num_parts, num_raised
from qlora_dist.model.kernels import registry

U32, U16 = 2.0**-24, 2.0**-11  # unit roundoff of fp32 and fp16
EPS = 0.1  # large enough to be missed


class Inputs:
    """Random tensors inside wider buffers, whose other elements no kernel may change."""

    def __init__(self, seed: int, dtype: torch.dtype, pad: int, far: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.pad, self.far = dtype, pad, far

    def __call__(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        """(rows, columns). `far`: the last of the rows begins 2^31 elements or more behind the first."""
        if self.far:
            wide = torch.empty_strided((rows, columns), (2**31 // (rows - 1) + 8, 1), dtype=dtype or self.dtype)
            return wide.copy_(torch.randn(rows, columns, generator=self.generator))
        wide = torch.randn(rows + 2, columns + 2 * self.pad, generator=self.generator).to(dtype or self.dtype)
        return wide[1:-1, self.pad : self.pad + columns]

    def row(self, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(columns, generator=self.generator).to(dtype or self.dtype)

    def heads(self, tokens: int, number: int, dim: int, is_by_head: bool = False) -> Tensor:
        """(tokens, number, dim), by default rows of a wider buffer; else stored head by head."""
        if is_by_head:
            return self(number, tokens * dim).unflatten(1, (tokens, dim)).transpose(0, 1)
        return self(tokens, number * dim).unflatten(1, (number, dim))

    def bytes(self, count: int) -> Tensor:
        return torch.randint(0, 256, (count,), generator=self.generator, dtype=torch.uint8)


def norm(make: Inputs, rows: int, width: int) -> list[Any]:
    return [make(rows, width), make.row(width), EPS, make.row(rows, torch.float32), make(rows, width)]


def norm_in_place(make: Inputs, rows: int, width: int) -> list[Any]:
    x = make(rows, width)
    return [x, make.row(width), EPS, None, x]


def norm_backward(make: Inputs, rows: int, width: int, has_residual: bool, is_in_place: bool) -> list[Any]:
    grad = make(rows, width)
    residual = make(rows, width) if has_residual else None
    out = grad if is_in_place else make(rows, width)
    return [grad, make(rows, width), make.row(width), EPS, residual, out]


def rotation(
    make: Inputs, tokens: int, sizes: tuple[int, int, int, int], has_norms: bool, is_in_place: bool = False
) -> list[Any]:
    queries, keys, dim, turned = sizes
    x = make(tokens, (queries + keys) * dim)
    weights = [make.row(dim), make.row(dim)] if has_norms else [None, None]
    angles = [make(tokens, turned), make(tokens, turned)]  # no two halves are the same
    return [x, *weights, EPS, *angles, queries, dim, x if is_in_place else make(*x.shape)]


def rotation_backward(
    make: Inputs, tokens: int, sizes: tuple[int, int, int, int], has_norms: bool, is_by_head: bool = False
) -> list[Any]:
    queries, keys, dim, turned = sizes
    grads = [make.heads(tokens, number, dim, is_by_head) for number in (queries, keys, keys)]
    norms = [make(tokens, (queries + keys) * dim), make.row(dim), make.row(dim)] if has_norms else [None] * 3
    angles = [make(tokens, turned), make(tokens, turned)]
    return [*grads, *norms, EPS, *angles, make(tokens, (queries + 2 * keys) * dim)]


def gated(make: Inputs, rows: int, width: int) -> list[Any]:
    return [make(rows, 2 * width), make(rows, width)]


def gated_backward(make: Inputs, rows: int, width: int) -> list[Any]:
    return [make(rows, width), make(rows, 2 * width)]


def codes(make: Inputs, rows: int, columns: int, is_double: bool, storage: torch.dtype = torch.uint8) -> list[Any]:
    blocks = rows * columns // 64
    f32 = torch.float32
    constants: list[Any] = [make.row(blocks, f32), None, None, None]
    if is_double:
        nested = -(-blocks // 256)
        constants = [make.bytes(blocks), make.row(nested, f32), make.row(256, f32), make.row(1, f32)[0]]
    packed = make.bytes(rows * columns // 2).view(storage).view(-1, 1)
    return [packed, make.row(16, f32), *constants, make(rows, columns)]


def adapters_a(make: Inputs, ranks: tuple[int, ...], width: int, rows: int) -> list[Any]:
    return [[make(rank, width, torch.float32) for rank in ranks], make(rows, width)]


def adapters_b(make: Inputs, sizes: list[tuple[int, int]], first_rows: list[int], rows: int, columns: int) -> list[Any]:
    return [[make(*size, torch.float32) for size in sizes], first_rows, 1.7, make(rows, columns)]


def gate_products(make: Inputs, tokens: int, width: int, rank: int, rows: int | None = None) -> list[Any]:
    """`rows`: parts of the tokens, each of several steps when they are few."""
    columns, most = num_parts(tokens, width)
    rows = most if rows is None else rows
    f32 = torch.float32
    of_rows = make.row(2 * columns * tokens * rank, f32).view(2 * columns, tokens, rank)
    of_columns = make.row(rows * 3 * width * rank, f32).view(rows, -1)
    operands = [make(tokens, width), make(tokens, rank), make(tokens, 2 * rank), make.row(2 * width * rank)]
    return [*operands[:3], operands[3].view(-1, rank), 1.7, make(tokens, 2 * width), of_rows, of_columns]


def lowered(make: Inputs, tokens: int, width: int, columns: int, is_gated: bool) -> list[Any]:
    rows = make.row(columns * width).view(columns, width)
    x = make(tokens, width * (1 + is_gated))
    return [x, rows, make(tokens, columns), make(tokens, width + columns)]


def normed_and_lowered(make: Inputs, tokens: int, width: int, columns: int) -> list[Any]:
    rows = make.row(columns * width).view(columns, width)
    scales = make.row(tokens, torch.float32)
    return [make(tokens, width), make.row(width), EPS, rows, scales, make(tokens, columns),
            make(tokens, width + columns)]  # fmt: skip


def raised(make: Inputs, tokens: int, outputs: list[int], rank: int, rows: int | None = None) -> list[Any]:
    """`rows`: parts of the tokens, each of several steps when they are few."""
    columns, most = num_raised(tokens, outputs)
    ends = [sum(outputs[: i + 1]) for i in range(len(outputs))]
    rows = most if rows is None else rows
    of_rows = make.row(columns * tokens * rank, torch.float32).view(columns, tokens, rank)
    of_columns = make.row(rows * ends[-1] * rank, torch.float32).view(rows, ends[-1], rank)
    b = make.row(ends[-1] * rank).view(-1, rank)
    return [make(tokens, ends[-1]), make(tokens, rank * len(ends)), b, ends, 1.7, of_rows, of_columns]


def parts_of_sums(make: Inputs, tokens: int, ends: list[int], rank: int, pad: int, is_scaled: bool) -> list[Any]:
    f32 = torch.float32
    parts = make.row(ends[-1] * tokens * rank, f32).view(ends[-1], tokens, rank)
    scaled = [make.row(tokens, f32), make(tokens, rank * len(ends))] if is_scaled else [None, None]
    return [parts, ends, *scaled, make(tokens, rank * len(ends) + pad)]


# operation, maker of its arguments, their sizes, terms of its longest sum (0: bit for bit), dtype, far
F32, F16 = torch.float32, torch.float16
QWEN, ODD, PARTIAL = (4, 2, 16, 16), (11, 3, 12, 12), (9, 1, 20, 8)
CASES: dict[str, tuple[str, Callable[..., list[Any]], tuple[Any, ...], int, torch.dtype, bool]] = {
    "norm": ("rms_norm", norm, (5, 64), 64, F32, False),
    "norm, odd width": ("rms_norm", norm, (3, 100), 100, F32, False),
    "norm, one element": ("rms_norm", norm, (1, 1), 1, F32, False),
    "norm, no rows": ("rms_norm", norm, (0, 64), 1, F32, False),
    "norm, in place": ("rms_norm", norm_in_place, (3, 96), 96, F32, False),
    "norm, long rows": ("rms_norm", norm, (2, 16384 + 40), 16424, F32, False),
    "norm, long rows in place": ("rms_norm", norm_in_place, (2, 20000), 20000, F32, False),
    "norm, fp16": ("rms_norm", norm, (3, 72), 72, F16, False),
    "norm, far rows": ("rms_norm", norm, (3, 64), 64, F16, True),
    "norm backward": ("rms_norm_backward", norm_backward, (5, 64, False, False), 64, F32, False),
    "norm backward, residual": ("rms_norm_backward", norm_backward, (3, 100, True, False), 100, F32, False),
    "norm backward, in place": ("rms_norm_backward", norm_backward, (3, 72, True, True), 72, F32, False),
    "norm backward, long rows": ("rms_norm_backward", norm_backward, (2, 16400, True, True), 16400, F32, False),
    "norm backward, fp16": ("rms_norm_backward", norm_backward, (3, 72, True, False), 72, F16, False),
    "norm backward, far rows": ("rms_norm_backward", norm_backward, (3, 64, True, False), 64, F16, True),
    "rotation": ("rotate_heads", rotation, (3, QWEN, False), 2, F32, False),
    "rotation, in place": ("rotate_heads", rotation, (3, QWEN, False, True), 2, F32, False),
    "rotation, norms": ("rotate_heads", rotation, (3, QWEN, True), 16, F32, False),
    "rotation, odd heads": ("rotate_heads", rotation, (3, ODD, False), 2, F32, False),
    "rotation, odd heads with norms": ("rotate_heads", rotation, (3, ODD, True), 12, F32, False),
    "rotation, a part": ("rotate_heads", rotation, (3, PARTIAL, False), 2, F32, False),
    "rotation, a part with norms": ("rotate_heads", rotation, (3, PARTIAL, True), 20, F32, False),
    "rotation, far rows": ("rotate_heads", rotation, (3, QWEN, True), 16, F16, True),
    "rotation back": ("rotate_heads_backward", rotation_backward, (3, QWEN, False), 2, F32, False),
    "rotation back, norms": ("rotate_heads_backward", rotation_backward, (3, QWEN, True), 16, F32, False),
    "rotation back, by head": ("rotate_heads_backward", rotation_backward, (3, QWEN, True, True), 16, F32, False),
    "rotation back, odd heads": ("rotate_heads_backward", rotation_backward, (3, ODD, False), 2, F32, False),
    "rotation back, odd norms": ("rotate_heads_backward", rotation_backward, (3, ODD, True), 12, F32, False),
    "rotation back, a part": ("rotate_heads_backward", rotation_backward, (3, PARTIAL, False), 2, F32, False),
    "rotation back, part norms": ("rotate_heads_backward", rotation_backward, (3, PARTIAL, True), 20, F32, False),
    "rotation back, far rows": ("rotate_heads_backward", rotation_backward, (3, QWEN, True), 16, F16, True),
    "rotation back, far heads": ("rotate_heads_backward", rotation_backward, (2, QWEN, True, True), 16, F16, True),
    "gate": ("swiglu", gated, (4, 96), 4, F32, False),
    "gate, odd width": ("swiglu", gated, (3, 77), 4, F32, False),
    "gate, pieces": ("swiglu", gated, (2, 2048 + 50), 4, F32, False),
    "gate, fp16": ("swiglu", gated, (3, 40), 4, F16, False),
    "gate, far rows": ("swiglu", gated, (3, 40), 4, F16, True),
    "gate backward": ("swiglu_backward", gated_backward, (4, 96), 8, F32, False),
    "gate backward, odd width": ("swiglu_backward", gated_backward, (3, 77), 8, F32, False),
    "gate backward, pieces": ("swiglu_backward", gated_backward, (2, 2048 + 50), 8, F32, False),
    "gate backward, far rows": ("swiglu_backward", gated_backward, (3, 40), 8, F16, True),
    "gate and products": ("swiglu_backward_products", gate_products, (40, 64, 16), 64, F16, False),
    "gate and products, odd": ("swiglu_backward_products", gate_products, (75, 300, 5), 300, F16, False),
    "gate and products, rank 32": ("swiglu_backward_products", gate_products, (33, 72, 32), 72, F16, False),
    "gate and products, parts": ("swiglu_backward_products", gate_products, (200, 520, 8), 520, F16, False),
    "gate and products, steps": ("swiglu_backward_products", gate_products, (170, 300, 5, 2), 300, F16, False),
    "gate and products, far": ("swiglu_backward_products", gate_products, (3, 40, 8), 40, F16, True),
    "gate and low": ("swiglu_lower", lowered, (40, 96, 16, True), 96, F16, False),
    "gate and low, odd": ("swiglu_lower", lowered, (35, 203, 5, True), 203, F16, False),
    "gate and low, far": ("swiglu_lower", lowered, (3, 40, 48, True), 40, F16, True),
    "copy and low": ("copy_lower", lowered, (33, 136, 64, False), 136, F16, False),
    "copy and low, far": ("copy_lower", lowered, (3, 40, 8, False), 40, F16, True),
    "norm and low": ("norm_lower", normed_and_lowered, (40, 96, 16), 96, F16, False),
    "norm and low, odd": ("norm_lower", normed_and_lowered, (35, 203, 5), 203, F16, False),
    "norm and low, tiles": ("norm_lower", normed_and_lowered, (17, 700, 48), 700, F16, False),
    "norm and low, several blocks of a program": ("norm_lower", normed_and_lowered, (2070, 24, 4), 24, F16, False),
    "norm and low, far": ("norm_lower", normed_and_lowered, (3, 40, 48), 40, F16, True),
    "raised": ("raised_products", raised, (40, [64, 16, 16], 16), 96, F16, False),
    "raised, one layer of odd rank": ("raised_products", raised, (75, [304], 5), 304, F16, False),
    "raised, rank 32": ("raised_products", raised, (33, [72, 40], 32), 112, F16, False),
    "raised, parts": ("raised_products", raised, (200, [1040, 520, 8], 8), 1040, F16, False),
    "raised, steps": ("raised_products", raised, (170, [520, 48], 5, 2), 520, F16, False),
    "raised, far": ("raised_products", raised, (3, [40, 16], 8), 56, F16, True),
    "sums of parts": ("sum_parts", parts_of_sums, (40, [3, 12, 14], 16, 0, True), 14, F32, False),
    "sums of parts, padded": ("sum_parts", parts_of_sums, (19, [9], 3, 13, False), 9, F16, False),
    "sums of parts, far": ("sum_parts", parts_of_sums, (3, [2, 4], 8, 0, True), 4, F16, True),
    "codes": ("dequantize_4bit", codes, (6, 192, False), 0, F32, False),
    "codes, double": ("dequantize_4bit", codes, (96, 448, True), 0, F32, False),
    "codes, in fp32 storage": ("dequantize_4bit", codes, (5, 64, True, torch.float32), 0, F32, False),
    "codes, fp16": ("dequantize_4bit", codes, (5, 128, True), 0, F16, False),
    "codes, far rows": ("dequantize_4bit", codes, (3, 128, True), 0, F16, True),
    "A of three": ("write_a", adapters_a, ((3, 4, 2), 96, 16), 0, F32, False),
    "A of two": ("write_a", adapters_a, ((4, 8), 100, 12), 0, F16, False),
    "A of one, pieces": ("write_a", adapters_a, ((2,), 2048 + 36, 5), 0, F32, False),
    "A, far rows": ("write_a", adapters_a, ((2, 2), 40, 6), 0, F16, True),
    "B of three": ("write_b", adapters_b, ([(40, 3), (24, 4), (9, 2)], [0, 40, 64], 73, 16), 0, F32, False),
    "B of two, apart": ("write_b", adapters_b, ([(20, 4), (30, 8)], [50, 5], 77, 12), 0, F16, False),
    "B of one": ("write_b", adapters_b, ([(70, 8)], [0], 70, 8), 0, F32, False),
    "B, far rows": ("write_b", adapters_b, ([(2, 4), (2, 4)], [0, 2], 4, 8), 0, F16, True),
}


def tensors_of(arguments: list[Any]) -> list[Tensor]:
    flat = [one for value in arguments for one in (value if isinstance(value, list) else [value])]
    return [one for one in flat if isinstance(one, Tensor)]


def whole(tensor: Tensor) -> Tensor:
    """The buffer around a tensor."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def check(case: str) -> None:
    """The kernel leaves in every buffer what the reference leaves there, within the rounding of its sums."""
    operation, maker, sizes, terms, dtype, far = CASES[case]
    reference, kernel = reference_of(operation), kernel_of(operation)
    expected, found = (maker(Inputs(0, dtype, pad, far), *sizes) for pad in [4] * 2)
    before = [tensor.clone() for tensor in tensors_of(expected)]
    reference(*expected)
    assert kernel(*found), "left to the reference"
    changed = False
    for old, right, got in zip(before, tensors_of(expected), tensors_of(found), strict=True):
        changed |= not torch.equal(old, right)
        right, got = (right, got) if far or right.dtype == torch.uint8 else (whole(right), whole(got))
        if terms == 0 or right.numel() == 0:
            assert torch.equal(right, got)
            continue
        # a sum of n terms in any order errs by less than n U of their magnitudes, and some ten roundings follow
        largest = float(right.abs().max())
        allowed = 2 * (terms + 10) * U32 * largest + (2 * U16 * largest if dtype == F16 else 0)
        error = float((right.double() - got.double()).abs().max())
        assert error <= allowed, f"{error} > {allowed}"
    assert changed or before[-1].numel() == 0, "nothing was computed"


def check_fallback() -> None:
    """What a kernel does not take is left to the reference, and nothing is written."""
    make = Inputs(0, F32, 4)
    wide = Inputs(0, torch.float64, 4)
    refused = {
        "rms_norm": norm(wide, 2, 8),
        "rms_norm_backward": norm_backward(wide, 2, 8, True, False),
        "rotate_heads": rotation(wide, 2, QWEN, True),
        "rotate_heads_backward": rotation_backward(wide, 2, QWEN, True),
        "swiglu": [make(4, 16).t(), make(16, 2)],
        "swiglu_backward": gated_backward(wide, 2, 8),
        "swiglu_backward_products": gate_products(make, 2, 8, 2),  # fp32
        "swiglu_lower": lowered(make, 2, 8, 2, True),  # fp32
        "copy_lower": lowered(Inputs(0, F16, 4), 2, 8, 65, False),
        "norm_lower": normed_and_lowered(make, 2, 8, 2),  # fp32
        "raised_products": raised(Inputs(0, F16, 4), 2, [12], 2),  # columns that 16-byte accesses do not divide
        "sum_parts": parts_of_sums(make, 2, [1, 2, 3, 4], 2, 0, False),
        "dequantize_4bit": codes(make, 64, 96, False),
        "write_a": adapters_a(make, (1, 1, 1, 1), 8, 4),
        "write_b": adapters_b(make, [(2, 1)] * 4, [0, 2, 4, 6], 8, 4),
    }
    for operation, arguments in refused.items():
        reference, kernel = reference_of(operation), kernel_of(operation)
        before = [tensor.clone() for tensor in tensors_of(arguments)]
        assert not kernel(*arguments), operation
        assert all(map(torch.equal, before, tensors_of(arguments))), operation
        registry._run(f".{kernel.__module__.rpartition('.')[2]}", operation, reference, *arguments)
        assert not all(map(torch.equal, before, tensors_of(arguments))), operation

    def fail(*_: Any) -> None:
        raise AssertionError("the reference ran")

    registry._run(".norm_triton", "rms_norm", fail, *norm(make, 2, 8))


CHECKS: dict[str, Callable[[], None]] = {
    **{case: (lambda case=case: check(case)) for case in CASES},  # type: ignore[misc]
    "what kernels do not take": check_fallback,
}


def report() -> None:
    """In the child process: one line of JSON, the traceback of each check that failed."""
    torch.set_num_threads(1)
    failures = {}
    for name, run in CHECKS.items():
        try:
            run()
        except Exception:
            failures[name] = traceback.format_exc()
    print(json.dumps({"failures": failures, "ran": list(CHECKS)}))


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    code = """
        import os, sys
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, sys.argv[1])
        import test_kernels_interpreted
        test_kernels_interpreted.report()
    """
    done = run_python(code, __file__.rpartition("/")[0], timeout=240)
    content = json.loads(done.stdout.splitlines()[-1])
    assert content["ran"] == list(CHECKS)
    return dict(content["failures"])


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_interpreter_a_kernel_leaves_what_its_reference_leaves(name: str, failures: dict[str, str]) -> None:
    assert name not in failures, failures[name]
