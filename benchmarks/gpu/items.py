"""What waits for a GPU, most valuable first.

`{out}` in a command is the item's own folder below OUT, where it leaves its raw JSON. `seconds` is its time limit:
what was written when it is reached stays. Items are split so that each fits into one short loan of a machine.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One measurement. `needs`: modules that must be importable, beside torch and transformers."""

    name: str
    command: str
    seconds: int
    why: str
    needs: tuple[str, ...] = ("bitsandbytes", "pydantic", "datasets")
    gpus: int = 1
    device_gib: int = 0
    resumes: bool = False  # goes on where its time ran out: is run again until it is done
    device: str = "cuda"  # cpu: for the queue's own tests


def _throughput(arguments: str) -> str:
    return f"python -m benchmarks.throughput {arguments} --out {{out}} --scratch {{scratch}} --resume --allow-dirty"


def _grid(name: str, shape: str, layers: int | None, only: str, why: str, device_gib: int = 0) -> Item:
    depth = "" if layers is None else f" --layers {layers}"
    command = _throughput(f"--preset gpu --shape {shape}{depth} --only {only}")
    return Item(f"grid-{name}", command, 590, why, device_gib=device_gib, resumes=True)


ITEMS = (
    Item("ceilings", "python -m benchmarks.gpu.ceilings --out {out}/ceilings.json --allow-dirty", 420,
         "what every other figure is a share of", needs=()),
    Item("pytest-gpu", "python -m pytest -m gpu -q -rs --junitxml={out}/junit.xml", 540,
         "the tests that no CPU machine can run", needs=("bitsandbytes", "pydantic", "datasets", "pytest")),
    _grid("8b-8l-peers", "8b", 8, "t2048x4_", "every method and peer at 8 of 32 layers, micro-batch 4"),
    _grid("1b-peers", "1b", None, "t2048x4_", "the same at full depth of a small model"),
    _grid("8b-peers", "8b", None, "t2048x4_", "the same at full depth of 8B", 40),
    _grid("8b-8l-sizes", "8b", 8, "ours_nf4-dq", "micro-batches and recompute levels of 8B"),
    _grid("8b-caps", "8b", None, "cap", "equal memory: 24, 48, 80 GB", 40),
    _grid("13b", "13b", None, "t2048x4_", "13B at full depth", 40),
    _grid("65b-8l", "65b", 8, "t2048x4_", "65B shapes at 8 of 80 layers", 40),
    _grid("70b-8l", "70b", 8, "t2048x4_", "70B shapes at 8 of 80 layers", 40),
    _grid("65b", "65b", None, "ours_nf4-dq_t2048x1_", "65B at full depth, drawn 4-bit base", 44),
    _grid("70b", "70b", None, "ours_nf4-dq_t2048x1_", "70B at full depth, drawn 4-bit base", 46),
    Item("plan-peaks", _throughput("--preset peaks"), 590, "the plan's peaks beside measured ones", resumes=True),
    Item("repro-65b", "python -m benchmarks.repro_65b --random-weights --crowd --out {out}/repro_65b.json", 600,
         "the paper's headline: 65B within 48 GB", device_gib=48),
    Item("pytest-multi-gpu", "python -m pytest -m multi_gpu -q -rs --junitxml={out}/junit.xml", 900,
         "strategies over NCCL: ddp, zero2, fsdp", gpus=2,
         needs=("bitsandbytes", "pydantic", "datasets", "deepspeed", "pytest")),
    Item("scaling-8b", _throughput("--preset scaling --shape 8b --ranks 1 2 4 8"), 900,
         "scaling over the GPUs of a node", gpus=2, resumes=True),
)  # fmt: skip
