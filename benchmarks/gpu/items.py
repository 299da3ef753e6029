"""What waits for a GPU, most valuable first, in three parts of one command each, and what is left for later.

A GPU is often had for minutes: a machine that is bare at each start, and a limit on each command. The parts are those
commands: what must be known first (does every path run, the headline, the tests), what a card can do and how peers do
beside it, what needs a large model. `estimate` is what an item should take on one H100, `seconds` its limit: what was
written when it is reached stays. The limits of a part fit into PART_SECONDS.

`{out}` in a command is the item's own folder below OUT, where it leaves its raw JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

PART_SECONDS = 560  # of one command: ten minutes, less the start of Python, the installation of wheels and the packing
LATER = 4  # the part of everything else, in order of value


@dataclass(frozen=True)
class Item:
    """One measurement. `needs`: modules that must be importable, beside torch and transformers."""

    name: str
    command: str
    seconds: int  # its limit
    why: str
    needs: tuple[str, ...] = ("bitsandbytes", "pydantic", "datasets")
    gpus: int = 1
    device_gib: int = 0
    resumes: bool = False  # goes on where its time ran out: is run again until it is done
    device: str = "cuda"  # cpu: for the queue's own tests
    part: int = LATER
    estimate: int = 0  # seconds on one H100; 0: not known


def _throughput(arguments: str) -> str:
    return f"python -m benchmarks.throughput {arguments} --out {{out}} --scratch {{scratch}} --resume --allow-dirty"


def _grid(name: str, shape: str, layers: int | None, only: str, why: str, estimate: int, device_gib: int = 0) -> Item:
    depth = "" if layers is None else f" --layers {layers}"
    command = _throughput(f"--preset gpu --shape {shape}{depth} --only {only}")
    return Item(f"grid-{name}", command, 590, why, device_gib=device_gib, resumes=True, estimate=estimate)


# estimates: 8 to 12 s a process for its start, an 8B step of 8,192 tokens 0.65 to 0.95 s, 16-bit weights to disk
# 0.2 GB/s to 0.4 GB/s where they are drawn; a grid's is that of all its runs together
FIRST = (
    Item("smoke", "python -m benchmarks.gpu.smoke {out}/smoke.json --seconds 110", 120,
         "every CUDA path once, each failure by name", part=1, estimate=90),
    # without --crowd: states that are paged beside a full card ask for more managed memory than is free
    Item("repro-65b", "python -m benchmarks.repro_65b --random-weights --steps 3 --out {out}/repro_65b.json", 250,
         "the paper's headline: 65B within 48 GB", device_gib=48, part=1, estimate=200),
    Item("pytest-gpu", "python -m pytest -m gpu -q -rfEs --junitxml={out}/junit.xml", 160,
         "the tests that no CPU machine can run", needs=("bitsandbytes", "pydantic", "datasets", "pytest"),
         part=1, estimate=150),
    Item("ceilings", "python -m benchmarks.gpu.ceilings --out {out}/ceilings.json --allow-dirty", 110,
         "what every other figure is a share of", needs=(), part=2, estimate=100),
    Item("fair-8b-8l", _throughput("--preset fair --shape 8b --layers 8"), 420,
         "this package beside its peers on the same full rows, 8 of 32 layers", resumes=True, part=2, estimate=285),
    Item("depth-8b", _throughput("--preset depth --shape 8b --profile"), 420,
         "8B at full depth, with what each kernel takes, and a peer", device_gib=40, resumes=True, part=3,
         estimate=345),
    Item("peaks-1b", _throughput("--preset peaks --only 1b_ours"), 110,
         "the plan's peaks beside measured ones, another shape", resumes=True, part=3, estimate=85),
)  # fmt: skip
REST = (
    Item("plan-peaks", _throughput("--preset peaks"), 590, "the plan's peaks beside measured ones", resumes=True,
         estimate=540),
    _grid("8b-8l-peers", "8b", 8, "t2048x4_", "every method and peer at 8 of 32 layers, micro-batch 4", 1100),
    _grid("1b-peers", "1b", None, "t2048x4_", "the same at full depth of a small model", 600),
    _grid("8b-peers", "8b", None, "t2048x4_", "the same at full depth of 8B", 2300, 40),
    _grid("8b-8l-sizes", "8b", 8, "ours_nf4-dq", "micro-batches and recompute levels of 8B", 600),
    _grid("8b-caps", "8b", None, "cap", "equal memory: 24, 48, 80 GB", 900, 40),
    _grid("13b", "13b", None, "t2048x4_", "13B at full depth", 900, 40),
    _grid("65b-8l", "65b", 8, "t2048x4_", "65B shapes at 8 of 80 layers", 900, 40),
    _grid("70b-8l", "70b", 8, "t2048x4_", "70B shapes at 8 of 80 layers", 900, 40),
    _grid("65b", "65b", None, "ours_nf4-dq_t2048x1_", "65B at full depth, drawn 4-bit base", 350, 44),
    _grid("70b", "70b", None, "ours_nf4-dq_t2048x1_", "70B at full depth, drawn 4-bit base", 350, 46),
    Item("pytest-multi-gpu", "python -m pytest -m multi_gpu -q -rs --junitxml={out}/junit.xml", 900,
         "strategies over NCCL: ddp, zero2, fsdp", gpus=2,
         needs=("bitsandbytes", "pydantic", "datasets", "deepspeed", "pytest")),
    Item("scaling-8b", _throughput("--preset scaling --shape 8b --ranks 1 2 4 8"), 900,
         "scaling over the GPUs of a node", gpus=2, resumes=True),
)  # fmt: skip
ITEMS = (*FIRST, *REST)
