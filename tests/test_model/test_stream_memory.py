"""Streamed loading and quantizing hold little more than what stays loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_forked
from helpers.tiny_models import tiny_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

CPU = torch.device("cpu")
BF16 = torch.bfloat16


_PEAK = """
    import sys, threading, time
    import torch
    from bitsandbytes.functional import quantize_4bit
    from qlora_dist.model import load_base, quantize_model, base_weights

    def status(field):
        line = next(line for line in open("/proc/self/status") if line.startswith(field))
        return int(line.split()[1]) * 1024

    torch.set_num_threads(1)
    what, source, out = sys.argv[1:]
    quantize_4bit(torch.ones(4096), quant_type="nf4")  # imports what the first call needs, compilers too
    before, peak, is_done = status("VmRSS"), [0], []

    def watch():
        while not is_done:
            peak[0] = max(peak[0], status("VmRSS"))
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    held = 0
    if what == "load":
        model = load_base(source, quantization="nf4", double_quant=True, compute_dtype=torch.bfloat16,
                          attention="auto", device=torch.device("cpu"))
        held = sum(tensor.nbytes for _, tensor in base_weights(model))
    else:
        quantize_model(source, out, shard_bytes=32 * 2**20)
    is_done.append(True)
    watcher.join()
    print(before, peak[0], held)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.4 GB of bf16: 8 layers of 51 MB; the files repeat the same numbers."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config("llama", hidden_size=1024, intermediate_size=6912, num_hidden_layers=8, vocab_size=4096,
                         head_dim=64, num_attention_heads=16, num_key_value_heads=16)  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    numbers = torch.randn(6912 * 1024, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(BF16)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        file = f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors"
        files.setdefault(file, {})[name] = numbers[: shape.numel()].view(shape).clone()
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("what", ["load", "quantize"])
def test_memory_is_bounded_by_what_stays_loaded_plus_a_constant_far_below_the_model(
    what: str, large: Path, tmp_path: Path
) -> None:
    size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    done = run_forked(_PEAK, what, str(large), str(tmp_path / "out"), timeout=280)
    assert done.returncode == 0, done.stderr
    before, peak, held = map(int, done.stdout.split())
    # pieces of 2 M weights in the types that bitsandbytes uses on a CPU, modules imported on first use, what the
    # allocator keeps, and a file of 32 MiB with its serialized form while it is written
    constant = 192 * 2**20
    assert size > 2 * constant
    assert peak - before < held + constant, f"{(peak - before) / 2**20:.0f} MiB, {held / 2**20:.0f} of them held"
    assert (held > 100e6) == (what == "load")
