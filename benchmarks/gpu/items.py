"""Measurements that need a GPU, most valuable first: three parts of one command each, and a rest for later.

Often a GPU is available only for minutes, on a machine that is bare at each start and limits each command. The parts
are those commands: what must be known first (whether every path runs, the headline, the tests), ceilings and peers, and
what needs a large model. `estimate` is the time that an item should take on one H100, `seconds` its limit; what it has
written by then is kept. The limits of a part add up to at most PART_SECONDS.

`{out}` in a command is the item's own folder below OUT, where it writes its raw JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

PART_SECONDS = 560  # per command: ten minutes minus starting Python, installing wheels and packing
LATER = 4  # the part with everything else, in order of value


@dataclass(frozen=True)
class Item:
    """One measurement. `needs`: modules that must be importable, in addition to torch and transformers."""

    name: str
    command: str
    seconds: int  # time limit
    why: str
    needs: tuple[str, ...] = ("bitsandbytes", "pydantic", "datasets")
    gpus: int = 1
    device_gib: int = 0
    resumes: bool = False  # continues where its time ran out, and runs again until it is done
    device: str = "cuda"  # cpu: for the queue's own tests
    part: int = LATER
    estimate: int = 0  # seconds on one H100; 0: unknown


def _throughput(arguments: str) -> str:
    return f"python -m benchmarks.throughput {arguments} --out {{out}} --scratch {{scratch}} --resume --allow-dirty"


def _grid(name: str, shape: str, layers: int | None, only: str, why: str, estimate: int, device_gib: int = 0) -> Item:
    depth = "" if layers is None else f" --layers {layers}"
    command = _throughput(f"--preset gpu --shape {shape}{depth} --only {only}")
    return Item(f"grid-{name}", command, 590, why, device_gib=device_gib, resumes=True, estimate=estimate)


# estimates: 8 to 12 s to start a process, 0.65 to 0.95 s for an 8B step of 8,192 tokens, 0.2 to 0.4 GB/s to write
# random 16-bit weights to disk; a grid's estimate covers all its runs together
FIRST = (
    Item("smoke", "python -m benchmarks.gpu.smoke {out}/smoke.json --seconds 110", 120,
         "every CUDA path once, each failure by name", part=1, estimate=90),
    # without --crowd: on a full card, paged states would request more managed memory than is free
    Item("repro-65b", "python -m benchmarks.repro_65b --random-weights --steps 3 --out {out}/repro_65b.json", 250,
         "the paper's headline: 65B within 48 GB", device_gib=48, part=1, estimate=200),
    Item("pytest-gpu", "python -m pytest -m gpu -q -rfEs --junitxml={out}/junit.xml", 160,
         "the tests that need a GPU", needs=("bitsandbytes", "pydantic", "datasets", "pytest"),
         part=1, estimate=150),
    Item("ceilings", "python -m benchmarks.gpu.ceilings --out {out}/ceilings.json --allow-dirty", 110,
         "the denominators of every other result", needs=(), part=2, estimate=100),
    Item("fair-8b-8l", _throughput("--preset fair --shape 8b --layers 8"), 420,
         "this package against its peers on the same full rows, 8 of 32 layers", resumes=True, part=2, estimate=285),
    Item("depth-8b", _throughput("--preset depth --shape 8b --profile"), 420,
         "8B at full depth with a kernel table, and a peer", device_gib=40, resumes=True, part=3,
         estimate=345),
    Item("peaks-1b", _throughput("--preset peaks --only 1b_ours"), 110,
         "planned against measured peaks, another shape", resumes=True, part=3, estimate=85),
)  # fmt: skip
REST = (
    Item("kernels", "python -m benchmarks.kernels --out {out}/kernels.json --allow-dirty", 300,
         "each memory-bound operation against a copy's bandwidth", needs=("bitsandbytes", "triton"), estimate=120),
    Item("plan-peaks", _throughput("--preset peaks"), 590, "planned against measured peaks", resumes=True,
         estimate=540),
    _grid("8b-8l-peers", "8b", 8, "t2048x4_", "every method and peer at 8 of 32 layers, micro-batch 4", 1100),
    _grid("1b-peers", "1b", None, "t2048x4_", "the same for a small model at full depth", 600),
    _grid("8b-peers", "8b", None, "t2048x4_", "the same for 8B at full depth", 2300, 40),
    _grid("8b-8l-sizes", "8b", 8, "ours_nf4-dq", "micro-batches and recompute levels for 8B", 600),
    _grid("8b-caps", "8b", None, "cap", "equal memory: 24, 48, 80 GB", 900, 40),
    _grid("13b", "13b", None, "t2048x4_", "13B at full depth", 900, 40),
    _grid("65b-8l", "65b", 8, "t2048x4_", "65B shapes at 8 of 80 layers", 900, 40),
    _grid("70b-8l", "70b", 8, "t2048x4_", "70B shapes at 8 of 80 layers", 900, 40),
    _grid("65b", "65b", None, "ours_nf4-dq_t2048x1_", "65B at full depth, random 4-bit base", 350, 44),
    _grid("70b", "70b", None, "ours_nf4-dq_t2048x1_", "70B at full depth, random 4-bit base", 350, 46),
    Item("pytest-multi-gpu", "python -m pytest -m multi_gpu -q -rs --junitxml={out}/junit.xml", 900,
         "strategies over NCCL: ddp, zero2, fsdp", gpus=2,
         needs=("bitsandbytes", "pydantic", "datasets", "deepspeed", "pytest")),
    Item("scaling-8b", _throughput("--preset scaling --shape 8b --ranks 1 2 4 8"), 900,
         "scaling over the GPUs of a node", gpus=2, resumes=True),
)  # fmt: skip
ITEMS = (*FIRST, *REST)
