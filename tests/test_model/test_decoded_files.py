"""fp8 and MXFP4 files: the bits of transformers' dequantization, in pieces; quantized again, and what that changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoded import fp8, save_fp8, save_mxfp4
from helpers.ranks import on_ranks
from helpers.shards import load, world_and_shards
from helpers.tiny_models import random_batch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qlora_dist.errors import RunFailed, UserError
from qlora_dist.model import (
    base_checksum,
    check_config,
    check_gathered_layer,
    check_head,
    hidden_states,
    linear_layers,
    packed_experts,
    quantize_model,
    quantized_and_back,
)
from qlora_dist.model.weights import decoded_files, quantize, safetensors_files, stream
from qlora_dist.model.weights.decoded_files import DecodedFiles
from qlora_dist.model.weights.original import read_source_weight
from qlora_dist.train.checks.base import check_source_bits, promised_base_bytes

BF16 = torch.bfloat16
FORMS: dict[str, Callable[[Path], Path]] = {
    "fp8": save_fp8,
    "fp8 experts": lambda folder: save_fp8(folder, "qwen3_moe"),
    "mxfp4": save_mxfp4,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    return {form: make(tmp_path_factory.mktemp("decoded")) for form, make in FORMS.items()}


@pytest.fixture(params=FORMS)
def folder(request: Any, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def files_of(folder: Path) -> DecodedFiles:
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    return DecodedFiles(sorted(folder.glob("*.safetensors")), stored)


def decoded_copy(folder: Path, out: Path, dtype: torch.dtype = BF16) -> Path:
    """The plain model that transformers makes of the files. Not by save_pretrained, which makes fp8 of it again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    out.mkdir()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return out


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, torch.float32, torch.float16])
def test_weights_have_the_bits_of_transformers(
    folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "gpt_oss" in (folder / "config.json").read_text() and dtype == torch.float16:
        pytest.skip("transformers keeps this family's norms in fp32 then: not streamed")
    theirs = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).named_parameters())
    for piece in (64 * 7, 2**21):  # pieces that end inside rows, blocks and matrices
        for module in (quantize, stream):
            monkeypatch.setattr(module, "PIECE", piece)
        ours = dict(load(folder, None, quantization="none", compute_dtype=dtype).named_parameters())
        assert ours.keys() == theirs.keys()
        # transformers leaves in bf16 what was not fp8
        assert {value.dtype for value in ours.values()} == {dtype}
        assert [name for name in ours if not torch.equal(ours[name], theirs[name].to(dtype))] == []


@pytest.mark.parametrize("scale_type", [BF16, torch.float8_e8m0fnu])
def test_scales_of_other_types_are_read_as_transformers_reads_them(scale_type: torch.dtype, tmp_path: Path) -> None:
    save_fp8(tmp_path, scale_type=scale_type)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16)
    ours = load(tmp_path, None, quantization="none")
    assert base_checksum(ours) == base_checksum(theirs)
    if scale_type != BF16:  # the same exponents as plain bytes
        path = next(path for path in tmp_path.glob("model-*") if "_scale_inv" in next(iter(load_file(path))))
        save_file({name: value.view(torch.uint8) for name, value in load_file(path).items()}, path)
        assert base_checksum(load(tmp_path, None, quantization="none")) == base_checksum(theirs)


def one_fp8(folder: Path, codes: torch.Tensor, scales: torch.Tensor, block: Any) -> DecodedFiles:
    save_file({"a.weight": codes, "a.weight_scale_inv": scales}, folder / "model.safetensors")
    return DecodedFiles([folder / "model.safetensors"], {"quant_method": "fp8", "weight_block_size": block})


@pytest.mark.parametrize(
    ("shape", "scales", "block", "spread"),
    [
        ((72, 80), (3, 3), [32, 32], (32, 32)),  # blocks at the edges are smaller: DeepSeek-V3's kv_a_proj_with_mqa
        ((64, 96), (), None, (64, 96)),
        ((64, 96), (1,), [128, 128], (64, 96)),
        ((64, 96), (64, 1), None, (1, 96)),
        ((3, 64, 96), (3, 2, 3), [32, 32], (32, 32)),  # stacked experts
        ((3, 64, 96), (3, 1, 1), None, (64, 96)),
        ((3, 64, 96), (3, 2, 1), [128, 128], (32, 96)),  # gate and up, each smaller than a block
    ],
)
def test_a_scale_belongs_to_its_block(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Any, spread: tuple[int, int], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scales, generator=generator) + 0.5
    files = one_fp8(tmp_path, codes, scale, block)
    grid = scale.view(*shape[:-2], *(scales[-2:] if len(scales) == len(shape) else (1, 1)))
    wide = grid.repeat_interleave(spread[0], -2).repeat_interleave(spread[1], -1)[..., : shape[-2], : shape[-1]]
    expected = (codes.float() * wide).view(-1)
    assert files.entries.keys() == {"a.weight"} and files.entries["a.weight"].shape == shape
    for start, stop in ((0, len(expected)), (0, 1), (97, 1234), (len(expected) - 5, len(expected))):
        assert torch.equal(files.read("a.weight", start, stop), expected[start:stop])
    assert len(torch.unique(wide)) == scale.numel() and torch.equal(files.read("a.weight"), expected)


def test_every_pair_of_a_code_and_an_exponent_is_decoded_as_by_transformers(tmp_path: Path) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    save_file({"a_blocks": blocks, "a_scales": scales}, tmp_path / "model.safetensors")
    files = DecodedFiles([tmp_path / "model.safetensors"], {"quant_method": "mxfp4"})
    for dtype in (BF16, torch.float32, torch.float16):
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)  # (E, I, O)
        ours = files.read("a").to(dtype).view(1, 255, 512)
        assert torch.equal(ours.transpose(1, 2).contiguous().view(torch.uint8), theirs.view(torch.uint8))
        assert len(torch.unique(theirs)) > 20


def test_no_more_than_a_piece_is_read_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But one matrix of an expert whose files have the other layout, and scales."""
    sizes, read = [], safetensors_files.WeightFiles.read_bytes

    def counted(self: Any, name: str, start: int, stop: int) -> torch.Tensor:
        sizes.append((name, stop - start))
        return read(self, name, start, stop)

    monkeypatch.setattr(safetensors_files.WeightFiles, "read_bytes", counted)
    for module in (quantize, stream):
        monkeypatch.setattr(module, "PIECE", 64 * 7)
    is_mxfp4 = "mxfp4" in (folder / "config.json").read_text()
    for quantization in ("nf4", "none"):
        sizes.clear()
        load(folder, None, quantization=quantization)
        codes = {size for name, size in sizes if name.endswith("_blocks" if is_mxfp4 else "proj.weight")}
        matrix = 128 * 64 // 2 if is_mxfp4 and quantization == "none" else 0
        assert codes and max(codes) <= max(64 * 7, matrix)


# --- quantized again --------------------------------------------------------------------------------------------------


def test_codes_are_those_of_the_decoded_model(folder: Path, tmp_path: Path) -> None:
    plain = decoded_copy(folder, tmp_path / "plain")
    for quantization, double_quant in (("nf4", True), ("fp4", False)):
        options = {"quantization": quantization, "double_quant": double_quant}
        ours, theirs = load(folder, None, **options), load(plain, None, **options)
        assert base_checksum(ours) == base_checksum(theirs)
        assert ours.requantized is not None and theirs.requantized is None
    check_config(str(folder), device_type="cpu")
    check_head(load(folder, None))
    assert promised_base_bytes(str(folder), quantization="nf4", double_quant=True, dtype=BF16) == promised_base_bytes(
        str(plain), quantization="nf4", double_quant=True, dtype=BF16
    )


def lost(folder: Path, double_quant: bool) -> float:
    """Relative root mean square of what NF4 changes in the decoded weights, all at once."""
    model = load(folder, None, quantization="none")
    packed = packed_experts(load(folder, None))
    weights = [layer.weight for layer in linear_layers(model).values()]
    for name, experts in packed.items():
        weights += list(model.get_parameter(name).mT if experts.is_transposed else model.get_parameter(name))
    error = power = 0.0
    for weight in weights:
        plain = weight.detach().contiguous()
        again = quantized_and_back(plain, "nf4", double_quant, torch.float32)
        error += float((again.double() - plain.double()).square().sum())
        power += float(plain.double().square().sum())
    return (error / power) ** 0.5


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_run_says_how_much_that_changes(
    folder: Path, double_quant: bool, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "PIECE", 64 * 7)
    with caplog.at_level("INFO", logger="qlora_dist"):
        model = load(folder, None, double_quant=double_quant)
    method = "mxfp4" if "mxfp4" in (folder / "config.json").read_text() else "fp8"
    share = lost(folder, double_quant)
    assert 0.05 < share < 0.15
    assert model.requantized.startswith(
        f"its {method} files were decoded and quantized again to nf4, which changes the weights by {share:.2%} ("
    )
    assert model.requantized in caplog.text


def test_the_4_bit_copy_is_the_same_base_and_says_the_same(folder: Path, tmp_path: Path) -> None:
    quantize_model(str(folder), tmp_path / "copy")
    copy, original = load(tmp_path / "copy", None), load(folder, None)
    assert base_checksum(copy) == base_checksum(original)
    assert copy.requantized == original.requantized and "quantized again" in copy.requantized


def test_a_layer_and_an_expert_are_held_against_the_files(folder: Path) -> None:
    model = load(folder, None)
    name = sorted(linear_layers(model))[0]
    said = check_source_bits(model, str(folder), compute_dtype=BF16)
    assert f"{name}.weight is bit-equal to its quantized source" in said
    assert (" of " in said and said.endswith("as well")) == bool(packed_experts(model))
    decoded = read_source_weight(str(folder), None, f"{name}.weight")
    expected = load(folder, None, quantization="none").get_parameter(f"{name}.weight")
    assert decoded is not None and torch.equal(decoded.to(BF16), expected)
    model.get_submodule(name).weight.data[0] ^= 1
    with pytest.raises(RunFailed, match="its codes in memory differ"):
        check_source_bits(model, str(folder), compute_dtype=BF16)


def _sharded(folders: list[str]) -> list[tuple[float, str | None, str | None]]:
    world, shards = world_and_shards()
    found = []
    for folder in folders:
        whole, sharded = load(folder, None), load(folder, shards)
        check_head(sharded)
        check_gathered_layer(sharded)
        with torch.no_grad():
            one, other = (hidden_states(model, random_batch((9, 6))) for model in (whole, sharded))
        found.append((float((one - other).abs().max()), whole.requantized, sharded.requantized))
    world.close()
    return found


def test_two_ranks_read_their_parts_and_report_the_whole(folders: dict[str, Path]) -> None:
    for found in on_ranks(_sharded, 2, [str(folder) for folder in folders.values()]):
        for gap, whole, sharded in found:
            assert gap == 0.0 and whole is not None and whole == sharded


# --- what is refused --------------------------------------------------------------------------------------------------


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    codes, scales = fp8(torch.randn(64, 96), (32, 32))
    for wrong, block in ((scales[:1].repeat(5, 1), [32, 32]), (scales, [16, 32]), (scales, None), (scales, "odd")):
        with pytest.raises(decoded_files.BadFile, match="do not divide it into blocks"):
            one_fp8(tmp_path, codes, wrong, block)
    with pytest.raises(decoded_files.BadFile, match=r"has scales but the type torch\.int8"):
        one_fp8(tmp_path, torch.zeros(64, 48, dtype=torch.int8), scales, [32, 32])
    with pytest.raises(decoded_files.BadFile, match=r"scales of the type torch\.int32"):
        one_fp8(tmp_path, codes, scales.int(), [32, 32])


@pytest.mark.parametrize(
    ("method", "tensors", "message"),
    [
        ("fp8", {"a.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, "without a.weight_scale_inv"),
        ("fp8", {"a.weight_scale_inv": torch.ones(1)}, "belongs to no weight"),
        ("fp8", {"a.weight": torch.zeros(2, 2), "a.scale": torch.ones(1, 1)}, "under a name that is not read"),
        ("fp8", {"a.weight": torch.zeros(2, 2)}, "no tensor of the files is"),
        ("mxfp4", {"a_blocks": torch.zeros(1, 2, 3, 16, dtype=torch.uint8)}, "only one of _blocks and _scales"),
        ("mxfp4", {"a_blocks": torch.zeros(1, 2, 3, 8, dtype=torch.uint8),
                   "a_scales": torch.zeros(1, 2, 3, dtype=torch.uint8)}, "expected bytes"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_the_config_says_are_refused(
    method: str, tensors: dict[str, torch.Tensor], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders["fp8"] / "config.json").read_text()) | {
        "quantization_config": {"quant_method": method}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load(tmp_path, None)


def test_int8_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"int8 bases are read by transformers.*use nf4, fp4 or none"):
        load(folder, None, quantization="int8")


def test_files_that_transformers_must_convert_are_refused(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders["fp8"], tmp_path / "copy")
    monkeypatch.setattr(stream, "match_names", lambda *_: (None, "x must be converted"))
    with pytest.raises(UserError, match="its fp8 files must be converted while they are read"):
        load(tmp_path / "copy", None)
