"""What is compared: a cell is one model, trained one way. The cells of a group are measured in one run, in turns."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from .profiling import WARMUP_STEPS

METHODS = {
    # name: (quantization of the base, double quantization, is full fine-tuning)
    "full-bf16": ("none", False, True),
    "full-fp16": ("none", False, True),
    "lora-bf16": ("none", False, False),
    "nf4-dq": ("nf4", True, False),
    "nf4": ("nf4", False, False),
    "fp4": ("fp4", False, False),
    "int8": ("int8", False, False),
}
FEW_STEPS = (3, 12, 1, 2)  # warm-up, timed, turns, instrumented
ENGINES = ("ours", "trainer", "trl", "unsloth", "gemm")


@dataclass(frozen=True)
class Cell:
    """One measurement. `engine` gemm is the machine's rate for the shape's products, measured in the same turns."""

    engine: str
    method: str
    shape: str
    row_tokens: int
    layers: int | None = None  # None: all layers of the shape
    rows_per_step: int = 1
    micro_rows: int = 1
    recompute: str | int = "full"
    packing: bool = True  # peers: False = documents padded to the longest of the micro-batch
    variant: str = ""  # peers: default, or best (declared in peers.py)
    strategy: str = "ddp"
    ranks: int = 1
    data: str = "alpaca"
    rank: int = 16  # LoRA rank
    cap_gib: float | None = None  # memory limit
    threads: int | None = None  # CPU threads per rank; None: all cores, shared by the ranks

    def __post_init__(self) -> None:
        assert self.engine in ENGINES and (self.method in METHODS or self.engine == "gemm"), self

    @property
    def name(self) -> str:
        """File name of its raw result; unique to the cell."""
        depth = "" if self.layers is None else f"-{self.layers}l"
        parts = [f"{self.shape}{depth}", self.engine, self.method, f"t{self.row_tokens}x{self.micro_rows}"]
        if self.rows_per_step != self.micro_rows:
            parts.append(f"of{self.rows_per_step}")
        parts += [f"re{self.recompute}"] if self.engine != "gemm" else []
        parts += [self.variant] if self.variant else []
        parts += [] if self.packing else ["padded" if self.engine != "ours" else "unpacked"]
        parts += [f"{self.strategy}{self.ranks}"] if self.ranks > 1 or self.strategy != "ddp" else []
        parts += [self.data] if self.data != "alpaca" else []
        parts += [f"cap{self.cap_gib:g}"] if self.cap_gib is not None else []
        return "_".join(parts)

    @property
    def label(self) -> str:
        """Its name in the report."""
        name = {"ours": "qlora_dist", "trainer": "Trainer + PEFT", "trl": "TRL", "unsloth": "Unsloth"}.get(self.engine)
        if name is None:
            return "GEMM alone"
        parts = [name, self.method, self.variant, f"recompute {self.recompute}"]
        parts += [] if self.packing else ["padded" if self.engine != "ours" else "one document per micro-step"]
        parts += [f"{self.strategy} x {self.ranks}"] if self.ranks > 1 or self.strategy != "ddp" else []
        return ", ".join(part for part in parts if part)

    @property
    def is_full(self) -> bool:
        return METHODS[self.method][2]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Group:
    """Cells that are compared with each other. In turns: all are loaded at once and step alternately."""

    cells: tuple[Cell, ...]
    in_turns: bool = True
    title: str = ""


@dataclass(frozen=True)
class Preset:
    """A grid of cells, and how long each is measured."""

    groups: tuple[Group, ...]
    warmup_steps: int
    steps: int  # timed steps, over all turns
    turns: int
    instrumented_steps: int
    timeout_seconds: float  # per cell
    profile_steps: int = 0  # under torch's profiler, after all other steps

    @property
    def num_steps(self) -> int:
        """The most steps that a cell takes; its data must suffice for them."""
        counted = self.warmup_steps + self.steps + self.turns + self.instrumented_steps
        return counted + self.profile_steps + (WARMUP_STEPS if self.profile_steps else 0) + 1


def tiny() -> Preset:
    """Under a minute: for tests."""
    ours = Cell("ours", "nf4-dq", "tiny", 64, rank=4, data="drawn", threads=1)
    cells = (ours, replace(ours, method="lora-bf16"), replace(ours, engine="trainer", variant="best"))
    return Preset((Group(cells, title="tiny peers"),), 2, 20, 4, 1, 240)


def cpu() -> Preset:
    """Under five minutes on two idle cores: methods by memory, this package against its peers, ranks.

    int8 is only in `cpu_all`: on a CPU its products run in fp16, at a fraction of the speed.
    """
    return Preset((_cpu_methods(("full-bf16", "lora-bf16", "nf4-dq")), _cpu_peers(), _cpu_ranks()), 2, 20, 4, 1, 240)


def cpu_all() -> Preset:
    """Every method and variant that a CPU can run; takes about twice as long."""
    methods = _cpu_methods(tuple(method for method in METHODS if method != "full-fp16"))
    unpacked = Cell("ours", "nf4-dq", "cpu-40m", 256, packing=False, rows_per_step=2)
    alone = Group((unpacked,), title="one document per micro-step")
    return Preset((methods, _cpu_peers(), _cpu_ranks(), alone), 2, 20, 4, 2, 600)


def _cpu_methods(names: tuple[str, ...]) -> Group:
    """The 80M shape: large enough that the memory of the weights dominates the differences between methods."""
    ours = Cell("ours", "nf4-dq", "cpu-80m", 128)
    cells = (Cell("gemm", "bf16", "cpu-80m", 128), *(replace(ours, method=name) for name in names))
    return Group(cells, title="methods")


def _cpu_peers() -> Group:
    ours = Cell("ours", "nf4-dq", "cpu-40m", 256)
    cells = (
        Cell("gemm", "bf16", "cpu-40m", 256),
        ours,
        replace(ours, recompute="none"),
        replace(ours, engine="trl", variant="default", packing=False),
        replace(ours, engine="trl", variant="best", recompute="none"),
        replace(ours, engine="trainer", variant="default", packing=False),
        replace(ours, engine="trainer", variant="best", recompute="none"),
    )
    return Group(cells, title="peers")


def _cpu_ranks() -> Group:
    one = Cell("ours", "nf4-dq", "cpu-40m", 128, rows_per_step=2, threads=1)
    return Group((one, replace(one, ranks=2)), in_turns=False, title="ranks")


def gpu_shape(shape: str, layers: int | None, row_tokens: int = 2048) -> tuple[Group, ...]:
    """One shape on one GPU: every method, recompute levels, micro-batches, peers, memory caps, data regimes."""
    ours = Cell("ours", "nf4-dq", shape, row_tokens, layers=layers, data="drawn", rows_per_step=4, micro_rows=4)
    peers = tuple(
        replace(ours, engine=engine, variant=variant, packing=variant == "best", recompute=recompute)
        for engine, variant, recompute in (
            ("trl", "default", "full"), ("trl", "best", "full"), ("trl", "best", "none"),
            ("trainer", "default", "full"), ("trainer", "best", "none"),
            ("unsloth", "default", "full"), ("unsloth", "best", "none"),
        )
    )  # fmt: skip
    methods = tuple(replace(ours, method=method) for method in METHODS if method != "nf4-dq")
    sizes = tuple(
        replace(ours, rows_per_step=micro, micro_rows=micro, recompute=recompute)
        for micro in (1, 2, 4, 8, 16)
        for recompute in ("full", "none")
    )
    full_rows = tuple(replace(cell, data="full") for cell in (ours, *peers))
    capped = tuple(
        replace(cell, cap_gib=cap, rows_per_step=1, micro_rows=1)
        for cap in (24.0, 48.0, 80.0)
        for cell in (ours, peers[0], peers[2], *methods[:2])
    )
    gemm = Cell("gemm", "bf16", shape, row_tokens, layers=layers, rows_per_step=4, micro_rows=4, data="drawn")
    return (
        Group((gemm, ours, *peers), False, f"{shape} peers"),
        Group(methods, False, f"{shape} methods"),
        Group(sizes, False, f"{shape} micro-batches"),
        Group(full_rows, False, f"{shape} full rows"),
        Group(capped, False, f"{shape} equal memory"),
    )


def fair(shape: str = "8b", layers: int | None = None) -> Preset:
    """One shape against its peers in minutes: full rows of 2,048 tokens, 8,192 tokens per micro-step.

    Every document fills its row, so that no engine pads and attention lengths are equal: only the step itself differs.
    In order of value, since a time limit cuts the list short. 3 + 12 + 2 steps per cell: at these sizes a step takes
    about a second, and the median of 12 is stable to a few percent.
    """
    ours = Cell("ours", "nf4-dq", shape, 2048, layers=layers, data="full", rows_per_step=4, micro_rows=4)
    trl = replace(ours, engine="trl", variant="best")
    cells = (
        replace(ours, engine="gemm", method="bf16"),
        replace(ours, recompute="none"),
        ours,
        replace(trl, recompute="none"),
        trl,
        replace(trl, engine="trainer", recompute="none"),
        replace(trl, variant="default", packing=False),
    )
    return Preset((Group(cells, False, f"{shape} full rows"),), *FEW_STEPS, 300)


def depth() -> Preset:
    """8B at full depth, in minutes: a large and a small micro-step, with and without recomputation, and TRL's best."""
    large = Cell("ours", "nf4-dq", "8b", 2048, data="full", rows_per_step=4, micro_rows=4)
    small = replace(large, rows_per_step=1, micro_rows=1)
    cells = (
        replace(large, recompute="none"),
        large,
        replace(small, recompute="none"),
        small,
        replace(large, engine="trl", variant="best", recompute="none"),
    )
    return Preset((Group(cells, False, "8b full rows"),), *FEW_STEPS, 300)


def gpu(shape: str = "1b", layers: int | None = None, row_tokens: int = 2048) -> Preset:
    """One shape on one GPU."""
    return Preset(gpu_shape(shape, layers, row_tokens), 20, 50, 1, 3, 600)


def peaks() -> Preset:
    """A few steps of many shapes on one GPU: measured peaks against planned ones."""
    shapes = (("1b", None), ("8b", 8), ("8b", None), ("13b", 8), ("65b", 4), ("70b", 4))
    cells = [
        Cell("ours", method, shape, 2048, layers=layers, data="full", rows_per_step=micro, micro_rows=micro,
             recompute=recompute)
        for shape, layers in shapes
        for method, micro, recompute in (("nf4-dq", 1, "full"), ("nf4-dq", 4, "none"), ("lora-bf16", 1, "full"))
    ]  # fmt: skip
    return Preset((Group(tuple(cells), False, "peaks"),), 1, 3, 1, 0, 300)


def scaling(
    shape: str, layers: int | None, ranks: tuple[int, ...], strategies: tuple[str, ...], row_tokens: int = 2048
) -> Preset:
    """The same global batch on 1 to N ranks."""
    most = max(ranks)
    base = Cell("ours", "nf4-dq", shape, row_tokens, layers=layers, data="drawn", rows_per_step=4 * most)
    cells = tuple(replace(base, ranks=n, strategy=s) for s in strategies for n in ranks)
    return Preset((Group(cells, False, "ranks"),), 5, 20, 1, 3, 900)
