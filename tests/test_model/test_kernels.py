"""The memory-bound operations: plain references against automatic differentiation in fp64, and what a call moves."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import kernels as benchmark
from benchmarks.kernel_cases import NAMES, operands, reference_of
from benchmarks.shapes import SHAPES, Shape
from qlora_dist.config.joint_products import LEAST_PROGRAMS, ROWS_OF_STEP, num_parts, num_raised
from qlora_dist.model import kernels
from qlora_dist.model.kernels import registry
from qlora_dist.model.kernels.gradients import column_ranges, raised_ranges, token_ranges
from qlora_dist.model.kernels.traffic import TRAFFIC, bytes_moved, traffic

EPS = 0.1  # large enough to be missed
META = torch.device("meta")
F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def leaf(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=F64, requires_grad=True)


def close(found: Tensor, expected: Tensor) -> bool:
    """In fp64, to far less than any other formula would differ."""
    return torch.allclose(found, expected, rtol=1e-11, atol=1e-12)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, EPS)


@pytest.mark.parametrize("has_residual", [False, True])
def test_norm_and_its_gradient(has_residual: bool) -> None:
    x, weight, grad = leaf(5, 12), torch.randn(12, dtype=F64), torch.randn(5, 12, dtype=F64)
    residual = torch.randn(5, 12, dtype=F64) if has_residual else None
    expected = normed(x, weight)
    out = torch.empty_like(x)
    scales = torch.empty(5, dtype=F64)
    kernels.rms_norm(x.detach(), weight, EPS, scales, out)
    assert close(out, expected) and close(scales[:, None] * x * weight, expected)
    (gradient,) = torch.autograd.grad(expected, x, grad)
    kernels.rms_norm_backward(grad, x.detach(), weight, EPS, residual, grad)  # in place
    assert close(grad, gradient if residual is None else gradient + residual)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula of transformers: x cos + rotate_half(x) sin, on the first columns of each head."""
    width = cos.shape[-1]
    turning, rest = heads[..., :width], heads[..., width:]
    half = torch.cat([-turning[..., width // 2 :], turning[..., : width // 2]], dim=-1)
    return torch.cat([turning * cos[:, None] + half * sin[:, None], rest], dim=-1)


@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("turned", [8, 4])
def test_rotation_and_its_gradient(has_norms: bool, turned: int) -> None:
    tokens, queries, keys, dim = 5, 4, 2, 8
    x = leaf(tokens, (queries + keys) * dim)
    weights = [torch.randn(dim, dtype=F64) if has_norms else None for _ in range(2)]
    cos, sin = torch.randn(2, tokens, turned, dtype=F64)  # no two halves are the same
    parts = x.unflatten(1, (-1, dim)).split([queries, keys], dim=1)
    parts = tuple(part if w is None else normed(part, w) for part, w in zip(parts, weights, strict=True))
    expected = [rotated(part, cos, sin) for part in parts]
    out = torch.empty_like(x)
    kernels.rotate_heads(x.detach(), *weights, EPS, cos, sin, queries, dim, out)
    assert close(out, torch.cat(expected, dim=1).flatten(1))

    # stored head by head, as attention leaves them
    grads = [torch.randn(number, tokens, dim, dtype=F64).transpose(0, 1) for number in (queries, keys, keys)]
    (gradient,) = torch.autograd.grad(expected, x, grads[:2])
    out = torch.empty(tokens, (queries + 2 * keys) * dim, dtype=F64)
    kernels.rotate_heads_backward(*grads, x.detach() if has_norms else None, *weights, EPS, cos, sin, out)
    assert close(out, torch.cat([gradient, grads[2].flatten(1)], dim=1))


def test_gate_and_its_gradient_which_leaves_the_result_in_place_of_the_gradient() -> None:
    both, grad = leaf(5, 24), torch.randn(5, 12, dtype=F64)
    expected = torch.nn.functional.silu(both[:, :12]) * both[:, 12:]
    out = torch.empty_like(grad)
    kernels.swiglu(both.detach(), out)
    assert close(out, expected)
    (gradient,) = torch.autograd.grad(expected, both, grad)
    written = both.detach().clone()
    kernels.swiglu_backward(grad, written)
    assert close(written, gradient) and close(grad, expected.detach())


@pytest.mark.parametrize("is_gated", [True, False])
def test_an_input_with_its_adapters_columns(is_gated: bool) -> None:
    x, rows = torch.randn(7, 24, dtype=F64), torch.randn(5, 12 if is_gated else 24, dtype=F64)
    expected = torch.nn.functional.silu(x[:, :12]) * x[:, 12:] if is_gated else x
    low, joined = torch.empty(7, 5, dtype=F64), torch.empty(7, rows.shape[1] + 5, dtype=F64)
    (kernels.swiglu_lower if is_gated else kernels.copy_lower)(x, rows, low, joined)
    assert close(low, expected @ rows.t()) and close(joined, torch.cat([expected, low], dim=1))


def test_a_norm_with_its_adapters_columns() -> None:
    x, weight, rows = torch.randn(7, 24, dtype=F64), torch.randn(24, dtype=F64), torch.randn(5, 24, dtype=F64)
    normed, expected_scales = torch.empty(7, 24, dtype=F64), torch.empty(7, dtype=F64)
    kernels.rms_norm(x, weight, EPS, expected_scales, normed)
    scales, low, joined = (torch.empty(*size, dtype=F64) for size in ((7,), (7, 5), (7, 29)))
    kernels.norm_lower(x, weight, EPS, rows, scales, low, joined)
    assert torch.equal(scales, expected_scales)
    assert close(low, normed @ rows.t()) and close(joined, torch.cat([normed, low], dim=1))


@pytest.mark.parametrize("outputs", [[1100], [600, 40, 8]])
@pytest.mark.parametrize("is_in_parts", [False, True])
def test_what_adapters_need_of_their_layers_gradient_is_that_of_autograd(outputs: list[int], is_in_parts: bool) -> None:
    """y = s low B^T for each layer: the gradients of low and B from one pass over y's, and their parts."""
    tokens, rank, scale, starts = 70, 3, 1.5, [sum(outputs[:i]) for i in range(len(outputs))]
    low, b = leaf(tokens, rank * len(outputs)), leaf(sum(outputs), rank)
    grad = torch.randn(tokens, sum(outputs), dtype=F64)
    each = zip(low.split(rank, dim=1), b.split(outputs), strict=True)
    y = torch.cat([scale * own_low @ own_b.t() for own_low, own_b in each], dim=1)
    of_low, of_b = torch.autograd.grad(y, [low, b], grad)
    columns, rows = num_raised(tokens, outputs) if is_in_parts else (len(outputs), 1)
    assert (columns > len(outputs)) == (rows > 1) == is_in_parts
    of_rows = torch.empty(columns, tokens, rank, dtype=F64)
    of_columns = torch.empty(rows, sum(outputs), rank, dtype=F64)
    ends = [start + width for start, width in zip(starts, outputs, strict=True)]
    kernels.raised_products(grad, low.detach(), b.detach(), ends, scale, of_rows, of_columns)
    assert close(of_columns.sum(0), of_b)
    layers = [layer for layer, _ in raised_ranges(ends, columns)]
    part_ends = [sum(layer <= index for layer in layers) for index in range(len(outputs))]
    summed = torch.empty(tokens, rank * len(outputs), dtype=F64)
    kernels.sum_parts(of_rows, part_ends, None, None, summed)
    assert close(summed, of_low)


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (2, 3)])
def test_gradients_of_the_gate_and_of_its_adapters_are_those_of_autograd(columns: int, rows: int) -> None:
    """y = silu(x Wg + ...) * ..., down's product and all adapters: five products from one pass, and their parts."""
    tokens, width, rank, scale = 70, 300, 4, 1.5
    low = torch.randn(tokens, 2 * rank, dtype=F64)
    b, base = leaf(2 * width, rank), leaf(tokens, 2 * width)
    low_leaf = low.clone().requires_grad_()
    grown = torch.cat([low_leaf[:, :rank] @ b[:width].t(), low_leaf[:, rank:] @ b[width:].t()], dim=1)
    both = base + scale * grown
    a, raised = leaf(rank, width), torch.randn(tokens, rank, dtype=F64)
    opened = torch.nn.functional.silu(both[:, :width]) * both[:, width:]
    grad = torch.randn(tokens, width, dtype=F64)
    # of down's low, whose gradient is `raised`; and of the rest of down's product
    expected = torch.autograd.grad([opened @ a.t(), opened], [a, b, low_leaf], [raised, grad], retain_graph=True)
    of_both, of_b, of_low = torch.autograd.grad(opened, [base, b, low_leaf], grad)

    written = both.detach().clone()
    of_rows = torch.empty(2 * columns, tokens, rank, dtype=F64)
    of_columns = torch.empty(rows, 3 * width * rank, dtype=F64)
    arguments = (grad, raised, low, b.detach(), scale, written, of_rows, of_columns)
    kernels.swiglu_backward_products(*arguments)
    assert close(written, of_both)
    summed = of_columns.sum(0)
    assert close(summed[: rank * width].view(rank, width), expected[0])
    assert close(summed[rank * width :].view(2 * width, rank), of_b)
    scales, scaled = torch.randn(tokens, dtype=F64), torch.empty(tokens, 2 * rank, dtype=F64)
    out = torch.full((tokens, 2 * rank + 3), 7.0, dtype=F64)
    kernels.sum_parts(of_rows, [columns, 2 * columns], scales, scaled, out)
    assert close(out[:, : 2 * rank], of_low) and bool((out[:, 2 * rank :] == 0).all())
    assert close(scaled, of_low * scales[:, None])


@pytest.mark.parametrize("width", [1, 255, 256, 257, 14336, 70_000])
def test_parts_of_one_pass_cover_all_tokens_and_columns_once(width: int) -> None:
    """None is empty, and programs are enough wherever tokens are."""
    for tokens in [*range(1, 300), 4095, 4096, 8192, 8191]:
        columns, rows = num_parts(tokens, width)
        for found, length, number in (
            (column_ranges(width, columns), width, columns), (token_ranges(tokens, rows), tokens, rows),
        ):  # fmt: skip
            assert len(found) == number and found[0].start == 0 and found[-1].stop == length
            assert all(left.stop == right.start for left, right in itertools.pairwise(found))
            assert all(one.start < one.stop for one in found)
        blocks = -(-tokens // ROWS_OF_STEP)
        assert columns * rows >= min(LEAST_PROGRAMS, columns * blocks) / 2 and rows <= -(-LEAST_PROGRAMS // columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_double", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_codes_become_what_bitsandbytes_makes_of_them(
    dtype: torch.dtype, is_double: bool, storage: torch.dtype
) -> None:
    weight = torch.randn(96, 448).to(dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=is_double, quant_storage=storage)
    nested = [state.state2.absmax, state.state2.code, state.offset] if is_double else [None] * 3
    buffer = torch.full((96, 512), 7.0, dtype=dtype)
    kernels.dequantize_4bit(packed, state.code, state.absmax, *nested, buffer[:, :448])
    assert torch.equal(buffer[:, :448], bnb.dequantize_4bit(packed, state)) and bool((buffer[:, 448:] == 7).all())


def test_adapters_become_parts_of_one_matrix() -> None:
    sizes, ranks = (7, 5, 3), (2, 3, 1)
    a = [torch.randn(rank, 10) for rank in ranks]
    b = [torch.randn(size, rank) for size, rank in zip(sizes, ranks, strict=True)]
    rows = torch.full((8, 10), 7.0)
    kernels.write_a(a, rows)
    assert torch.equal(rows, torch.cat([*a, torch.zeros(2, 10)]))
    columns = torch.full((15, 8), 7.0)
    kernels.write_b(b, [0, 7, 12], 0.5, columns)
    assert torch.equal(columns, torch.cat([torch.block_diag(*b) * 0.5, torch.zeros(15, 2)], dim=1))


# --- what a call moves ------------------------------------------------------------------------------------------------


def test_bytes_of_each_operation_are_those_of_the_table() -> None:
    """Of a Llama 3 8B layer with bf16: bytes read and written per element, without what programs share."""
    shape, tokens = SHAPES["8b"], 4096
    hidden, inner, weights = tokens * 4096, tokens * 14336, 14336 * 4096
    heads = tokens * 128
    expected = {
        "rms_norm": (2 * hidden, 2 * hidden),
        "rms_norm+scales": (2 * hidden, 2 * hidden + 4 * tokens),
        "rms_norm_backward": (4 * hidden, 2 * hidden),
        "rms_norm_backward+residual": (6 * hidden, 2 * hidden),
        "rotate_heads": (2 * 40 * heads, 2 * 40 * heads),
        "rotate_heads+norms": (2 * 40 * heads, 2 * 40 * heads),
        "rotate_heads_backward": (2 * 48 * heads, 2 * 48 * heads),
        "rotate_heads_backward+norms": (2 * (48 + 40) * heads, 2 * 48 * heads),
        "swiglu": (4 * inner, 2 * inner),
        "swiglu_backward": (6 * inner, 6 * inner),
        "dequantize_4bit": (weights * (0.5 + 1 / 64 + 4 / 64 / 256), 2 * weights),
        "dequantize_4bit+single": (weights * (0.5 + 4 / 64), 2 * weights),
        "write_a": (4 * 48 * 4096, 2 * 64 * 4096),
        "write_b": (4 * 16 * 6144, 2 * 64 * 6144),
        "swiglu_backward_products": (
            6 * inner + 2 * 16 * (3 * tokens + 2 * 14336),
            4 * inner + 4 * 16 * (2 * 56 * tokens + 5 * 3 * 14336),
        ),
        "swiglu_lower": (4 * inner + 2 * 16 * 14336, 2 * inner + 2 * 2 * 16 * tokens),
        "copy_lower": (2 * hidden + 2 * 16 * 4096, 2 * hidden + 2 * 2 * 16 * tokens),
        "norm_lower": (2 * hidden + 2 * 48 * 4096, 2 * hidden + 2 * 2 * 48 * tokens + 4 * tokens),
        "raised_products": (
            2 * tokens * 6144 + 2 * 16 * (3 * tokens + 6144),
            4 * 16 * (12 * tokens + 11 * 6144),
        ),
        "sum_parts": (4 * 16 * 2 * 56 * tokens, 2 * 2 * 32 * tokens),
    }
    assert expected.keys() == set(NAMES) and {name.partition("+")[0] for name in NAMES} == set(TRAFFIC)
    for name, (read, written) in expected.items():
        arguments = operands(name, shape, tokens, META)
        found = traffic(name.partition("+")[0], arguments)
        angles = 2 * 2 * heads if name.startswith("rotate") else 0
        shared = found.read - read - angles
        assert 0 <= shared <= max(2 * 4096, 4 * tokens), name  # norm weights, tables of codes, factors of rows
        assert found.written == written
        assert bytes_moved(name.partition("+")[0], arguments) == sum(found)


# --- as operations ----------------------------------------------------------------------------------------------------

SMALL = Shape(256, 512, 1, 8, 2, 64)


@pytest.mark.parametrize("name", NAMES)
def test_under_fake_tensors_each_is_one_operation_that_allocates_nothing(name: str) -> None:
    operation = getattr(kernels, name.partition("+")[0])
    with FakeTensorMode():
        assert operation(*operands(name, SMALL, 6, torch.device("cpu"))) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_the_benchmark_needs_a_gpu_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["kernels", "--allow-dirty", "--out", str(tmp_path / "kernels.json")])
    with pytest.raises(SystemExit, match="2"):
        benchmark.main()
    assert "there is no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: runs the Triton kernels")
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu_the_kernel_gives_what_the_reference_gives(name: str) -> None:
    operation = name.partition("+")[0]
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        expected, found = (_seeded_operands(name, dtype) for _ in range(2))
        reference_of(operation)(*expected)
        getattr(kernels, operation)(*found)
        for right, got in zip(_tensors(expected), _tensors(found), strict=True):
            if operation in ("dequantize_4bit", "write_a", "write_b") or not right.is_floating_point():
                assert torch.equal(right, got), dtype
                continue
            # both round once what differs in the last bits of fp32 (sums, and the device's fast exponential)
            step = max(torch.finfo(dtype).eps, 2.0**-20)
            absolute = step * 2.0**-4 * float(right.abs().max())
            assert torch.allclose(right.double(), got.double(), rtol=step, atol=absolute), dtype


def _seeded_operands(name: str, dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    return operands(name, SMALL, 70, torch.device("cuda", 0), dtype)


def _tensors(arguments: list[Any]) -> list[Tensor]:
    flat = [one for value in arguments for one in (value if isinstance(value, list) else [value])]
    return [one if one._base is None else one._base for one in flat if isinstance(one, Tensor)]


def test_a_kernel_that_does_not_start_leaves_its_work_to_the_reference_and_says_so_once(monkeypatch, caplog) -> None:
    """A GPU machine without a C compiler, which Triton needs for its launcher."""
    monkeypatch.setattr(registry, "_unusable", set())
    monkeypatch.setattr(registry, "_started", set())
    attempts = []

    def fails(*_: Any) -> bool:
        attempts.append(1)
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(registry.importlib, "import_module", lambda *_: SimpleNamespace(double=fails))
    out = torch.zeros(3)
    for expected in (1.0, 2.0):
        registry._run(".any", "double", lambda out: out.add_(1), out)
        assert out.eq(expected).all()
    (line,) = caplog.messages
    assert len(attempts) == 1 and "double does not start here (RuntimeError: Failed to find C compiler.)" in line
    # one that has run before is not replaced in the middle of a run
    registry._unusable.clear()
    registry._started.add("double")
    with pytest.raises(RuntimeError, match="C compiler"):
        registry._run(".any", "double", lambda out: out.add_(1), out)
    assert out.eq(2).all()
