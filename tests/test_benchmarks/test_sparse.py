"""Weight files of zeros that take no disk space, and what reads them."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.repro_65b import llama_65b, write_inputs
from benchmarks.sparse import write_sparse_weights
from qlora_dist.model import load_base

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three layers 512 wide: 52 million weights."""
    folder = tmp_path_factory.mktemp("sparse")
    write_inputs(folder, llama_65b(layers=3, hidden=512), 16, 1)
    return folder / "model", folder / "storage", write_sparse_weights(folder / "model", folder / "storage")


def test_sparse_files_stand_for_all_weights_and_take_almost_no_disk_space(model):
    folder, storage, total = model
    files = sorted(storage.iterdir())
    assert [path.name for path in files] == [
        "model-layer-000.safetensors", "model-layer-001.safetensors", "model-layer-002.safetensors",
        "model-others.safetensors",
    ]  # fmt: skip
    assert total == json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert 0 < sum(path.stat().st_size for path in files) - total < 2**16
    assert sum(512 * path.stat().st_blocks for path in files) < 2**16 < total / 100


def test_both_loaders_read_sparse_files_as_complete_models(model):
    from transformers import AutoModelForCausalLM

    folder, _, total = model
    options = {"compute_dtype": torch.bfloat16, "attention": "sdpa", "device": CPU}
    ours = load_base(str(folder), quantization="none", double_quant=False, **options)
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    for loaded in (ours, theirs):
        weights = list(loaded.parameters())
        assert 2 * sum(weight.numel() for weight in weights) == total
        assert not any(weight.any() for weight in weights)
    four_bit = load_base(str(folder), quantization="nf4", double_quant=True, **options)
    assert four_bit.model.layers[2].mlp.down_proj.weight.quant_state.shape == (512, 1344)
