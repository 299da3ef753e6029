"""Peak host memory and time of loading a 16-bit model in 4 bits: this package and transformers, in separate processes.

    python -m benchmarks.loading --out benchmarks/results/cpu/loading.json

A Llama with random bf16 weights is written to several safetensors files and read back (from the page cache: times
measure the processor, not the disk). `shared` is strategy fsdp on two ranks, the larger result of the two. Two peaks
are recorded: resident memory, which includes pages of mapped files, and its anonymous part, which no other process
shares. `held` is the base itself, which on a GPU would not be in host memory: compare what is above it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MIB = 2**20


def write_model(folder: Path, num_layers: int) -> int:
    """Writes a Llama of width 2048, one file per layer; returns its bytes."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=num_layers, vocab_size=32000,
                         num_attention_heads=16, dtype="bfloat16", architectures=["LlamaForCausalLM"])  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in AutoModelForCausalLM.from_config(config).named_parameters()}
    numbers = torch.randn(32000 * 2048, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in files.items():
        tensors = {name: numbers[: shapes[name].numel()].view(shapes[name]).clone() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure(how: str, source: str, out: str) -> dict[str, float]:
    """Runs in its own process: peaks above the state after the imports, seconds, bytes of the base in memory."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qlora_dist.cluster.world import World
    from qlora_dist.model import held_bytes, load_base, quantize_model
    from qlora_dist.model.bitsandbytes_import import bitsandbytes

    torch.set_num_threads(1)
    world = World.init()
    bitsandbytes.functional.quantize_4bit(torch.ones(64))
    fields = {"resident": "VmRSS", "anonymous": "RssAnon"}
    before = {name: status(field) for name, field in fields.items()}
    peaks = dict(before)
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.wait(0.005):
            for name, field in fields.items():
                peaks[name] = max(peaks[name], status(field))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
    model: Any = None
    if how in ("load_base", "shared"):
        model = load_base(source, quantization="nf4", double_quant=True, compute_dtype=torch.bfloat16,
                          attention="auto", device=world.device, shards=world.shard_group())  # fmt: skip
    elif how == "from_pretrained":
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                      bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.bfloat16, quantization_config=settings, device_map={"": "cpu"}
        )
    else:
        quantize_model(source, out)
    seconds = time.perf_counter() - started
    is_done.set()
    watcher.join()
    return {
        **{f"{name}_peak_bytes": peaks[name] - before[name] for name in fields},
        "held_bytes": 0 if model is None else held_bytes(model),
        "seconds": seconds,
        "processor_seconds": resource.getrusage(resource.RUSAGE_SELF).ru_utime - used,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=20, help="20: 2.2 GiB, 40: 4.1 GiB")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)), flush=True)
        return
    from qlora_dist.cluster import provenance

    commit = provenance.commit()
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        source.mkdir()
        size = write_model(source, options.layers)
        results = {}
        for how in ("load_base", "shared", "from_pretrained", "quantize"):
            out = Path(temporary) / how
            launcher = [sys.executable]
            if how == "shared":
                launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
            command = [*launcher, __file__, "--out", "-", "--measure", how, str(source), str(out)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
            ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            results[how] = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
            shutil.rmtree(out, ignore_errors=True)
            sizes = {key: round(value / MIB) for key, value in results[how].items() if key.endswith("bytes")}
            print(f"{how}: {sizes} MiB, {results[how]['processor_seconds']:.0f} s of CPU time")
    record = {
        "what": "peak host memory above the state after imports, and time, to load or write a model in NF4",
        "command": f"python -m benchmarks.loading --layers {options.layers} --out {options.out}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": provenance.versions(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "load_at_end": os.getloadavg()[0]},
        "model_bytes": size,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
