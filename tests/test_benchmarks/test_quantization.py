"""The benchmark's plain quantizers against bitsandbytes and known codes, and on real weights."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from helpers.shared_data import shared_file

from benchmarks import quantization as q

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def not_compiled():
    """bitsandbytes compiles what it has no CPU kernel for: seconds of a C++ compiler for the same values."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weight(rows=16, columns=4096, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize(("kind", "theirs"), [("nf4", "nf4"), ("fp4-bitsandbytes", "fp4")])
@pytest.mark.parametrize("block", [64, 256, 4096])
def test_four_bit_types_equal_bitsandbytes(kind, theirs, block):
    original = weight()
    packed, state = bnb.quantize_4bit(original, blocksize=block, quant_type=theirs)
    expected = bnb.dequantize_4bit(packed, state)
    ours = q.quantize_dequantize(original, kind, block)
    # its boundaries between codes are rounded to 7 digits: a value on a boundary may get the other code
    differs = (ours - expected).abs() > 1e-6 * original.abs().max()
    assert differs.float().mean() < 1e-4


@pytest.mark.parametrize("block", [64, 512])
def test_double_quantization_equals_bitsandbytes(block):
    original = weight()
    packed, state = bnb.quantize_4bit(original, blocksize=block, quant_type="nf4", compress_statistics=True)
    expected = bnb.dequantize_4bit(packed, state)
    ours = q.quantize_dequantize(original, "nf4-dq", block)
    # one constant in a thousand is midway between two 8-bit codes and gets the other one
    assert (ours - expected).norm() / expected.norm() < 5e-4
    plain = q.quantize_dequantize(original, "nf4", block)
    assert 5e-4 < (ours - plain).norm() / plain.norm() < 1e-2  # and double quantization has an effect, but a small one


def test_the_dynamic_map_of_the_constants_equals_bitsandbytes():
    assert torch.allclose(q.dynamic_map(), bnb.create_dynamic_map().sort().values, atol=1e-7)


def test_int8_by_rows_equals_llm_int8():
    original = weight(8, 256)
    codes, scales, _ = bnb.int8_vectorwise_quant(original.half())
    expected = codes.float() * scales[:, None] / 127
    # its input is fp16, whose rounding (up to 6 % of a code's width) moves a few values to the next code
    difference = (q.quantize_dequantize(original, "int8", 256) - expected).abs()
    assert difference.max() < 1.1 * (scales.max() / 127)
    assert difference.mean() < 0.1 * scales.mean() / 127


def test_codes_are_the_known_ones():
    assert q.CODEBOOKS["fp4-e2m1"][-8:] == pytest.approx((0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1))
    assert q.CODEBOOKS["fp4-e3m0"][-8:] == (0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
    assert q.CODEBOOKS["int4"] == tuple(i / 7 for i in range(-7, 8))
    assert len(q.CODEBOOKS["nf4"]) == 16 and q.CODEBOOKS["nf4"][7] == 0
    assert q.bits_per_weight("nf4", 64) - q.bits_per_weight("nf4-dq", 64) == pytest.approx(0.373, abs=1e-3)  # the paper


@pytest.mark.parametrize("kind", q.TYPES)
def test_a_second_round_trip_changes_nothing_and_zero_stays_zero(kind):
    original = weight(4, 256)
    original[0, :64] = 0
    once = q.quantize_dequantize(original, kind, 64)
    assert (
        not once[0, :64].any() or kind == "nf4-dq"
    )  # its mean of constants moves an empty block's scale, times code 0
    assert once[0, :64].abs().max() == 0
    if kind != "nf4-dq":
        assert torch.allclose(q.quantize_dequantize(once, kind, 64), once, rtol=1e-5, atol=0)
    ragged = q.quantize_dequantize(original[:, :100].contiguous(), kind, 64)  # 400 weights: the last block is short
    assert ragged.shape == (4, 100) and torch.isfinite(ragged).all()


def test_finer_types_and_smaller_blocks_are_closer_to_real_weights():
    path = shared_file("gpt2_real_weights/gpt2_small_attn_sample.fp16.safetensors")
    found = q.measure_weights(q.matrices_of(path), (64, 1024))
    error = {(e["matrix"], e["type"], e["block"]): e["relative_error"] for e in found}
    for name in {e["matrix"] for e in found}:
        assert error[name, "int8", 64] < error[name, "nf4", 64] < error[name, "fp4-e2m1", 64]
        assert error[name, "nf4", 64] < error[name, "fp4-bitsandbytes", 64]
        assert error[name, "nf4", 64] < error[name, "int4", 64]
        assert all(error[name, kind, 64] < error[name, kind, 1024] for kind in q.TYPES)


def test_perplexity_of_a_real_model_rises_with_coarser_storage(tmp_path):
    folder = shared_file("models/stories260k")
    text = shared_file("text/tinystories_train.txt")
    (measured,) = q.measure_model(str(folder), [text], 4096, (64,), 512)
    at = {e["type"]: e["perplexity"] for e in measured["results"]}
    assert abs(at["bf16"] / at["fp32"] - 1) < 2e-3 and abs(at["int8"] / at["fp32"] - 1) < 5e-3
    assert at["fp32"] < at["nf4"] < at["fp4-bitsandbytes"]
    assert abs(at["nf4-dq"] / at["nf4"] - 1) < 0.01  # double quantization costs almost nothing


def test_the_findings_on_the_papers_order_follow_the_numbers():
    def findings_of(**at):
        values = {kind.replace("_", "-"): value for kind, value in at.items()}
        results = [{"type": kind, "block": 64, "perplexity": value} for kind, value in values.items()]
        return " ".join(q.findings({"perplexity": [{"model": "m", "text": "t", "results": results}]}))

    assert "This is the paper's order" in findings_of(nf4_dq=27.41, fp4_e3m0=29.48, fp4_e2m1=31.07, int4=34.34)
    partly = findings_of(nf4_dq=3.8, fp4_e2m1=3.9, int4=4.0, fp4_e3m0=6.7)
    assert "NF4 + DQ < FP4 < Int4 holds with fp4-e2m1." in partly and "unlike in the paper" in partly
    other = findings_of(nf4_dq=4.7, fp4_e3m0=5.5, fp4_e2m1=5.2, int4=5.0)
    assert "NF4 + DQ is best, as in the paper. Unlike in the paper, Int4 is better than both float types" in other
    assert "not the best" in findings_of(nf4_dq=5.0, fp4_e3m0=5.5, fp4_e2m1=4.9, int4=4.5)


def test_the_committed_result_has_every_type_and_block():
    content = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "quantization.json").read_text())
    for model in content["perplexity"]:
        seen = {(e["type"], e["block"]) for e in model["results"]}
        assert seen == {("fp32", None), ("bf16", None)} | {(kind, block) for kind in q.TYPES for block in q.BLOCKS}
    assert any("holds with" in sentence or "This is" in sentence for sentence in q.findings(content))
