"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, loads and stores by width.

python -m benchmarks.kernels_compiled --shapes 8b 70b --architectures 80 90
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .kernel_cases import NAMES, kernel_of, operands
from .shapes import SHAPES, Shape

TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int32: "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One launch as its wrapper asks for it."""

    kernel: Any
    programs: int
    arguments: Sequence[Any]
    constants: dict[str, Any]
    options: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """Machine code of one kernel. Bytes are those of all threads of a program, masked or not."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    instructions: Counter[str]  # memory instructions

    @property
    def local(self) -> int:
        """Accesses of memory that registers were spilled to."""
        return sum(self.instructions[name] for name in ("LDL", "STL"))

    def accesses(self, kind: str) -> Counter[int]:
        """Number of global loads (LDG; LDGSTS: into shared memory) or stores (STG) in the code, by width in bytes."""
        found: Counter[int] = Counter()
        for name, number in self.instructions.items():
            first, *rest = name.split(".")
            if first == kind:
                found[_width(rest)] += number
        return found

    def bytes_of(self, kind: str) -> int:
        """Bytes that a program without loops loads or stores at most."""
        return self.threads * sum(width * number for width, number in self.accesses(kind).items())


def _width(suffixes: list[str]) -> int:
    for suffix, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if suffix in suffixes:
            return width
    return 4


def recorded(name: str, arguments: Sequence[Any]) -> Launch:
    """The launch that an operation (without the option of its case) makes for these arguments, without making it."""
    from qlora_dist.model.kernels import launching

    launches: list[Launch] = []

    def record(kernel: Any, programs: int, *values: Any, **keywords: Any) -> None:
        constants = {key: value for key, value in keywords.items() if key in kernel.arg_names}
        options = {key: value for key, value in keywords.items() if key not in kernel.arg_names}
        launches.append(Launch(kernel, programs, values, constants, options))

    real, launching.start = launching.start, record
    try:
        if not kernel_of(name)(*arguments):
            raise ValueError(f"the kernel of {name} leaves these arguments to the reference")
    finally:
        launching.start = real
    (launch,) = launches
    return launch


def compiled(launch: Launch, architecture: int) -> Compiled:
    """Compiles for sm_80, sm_90, ... Tensors count as aligned to 16 bytes, as the allocator gives them."""
    import triton
    from triton.backends.compiler import GPUTarget

    names = launch.kernel.arg_names
    signature: dict[str, str] = dict.fromkeys(launch.constants, "constexpr")
    constants = {(names.index(key),): value for key, value in launch.constants.items()}
    aligned = {}
    for place, (name, value) in enumerate(zip(names, launch.arguments)):
        signature[name] = _type_of(value)
        if value is None:
            constants[place,] = None
        if isinstance(value, Tensor):
            aligned[place,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(
        launch.kernel, signature={name: signature[name] for name in names}, constexprs=constants, attrs=aligned
    )
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch.options)
    said = _dump(made.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert usage is not None, said[:500]
    found = Counter(re.findall(r"\b((?:LDGSTS|LDG|STG|LDL|STL|LDS|STS)[A-Z0-9.]*)", said))
    threads = 32 * launch.options["num_warps"]
    return Compiled(int(usage[1]), int(usage[2]), made.metadata.shared, threads, found)


def _type_of(value: Any) -> str:
    if value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if abs(value) < 2**31 else "i64"


def _dump(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(tool), "-sass", "-res-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout + done.stderr


def compile_case(name: str, shape: Shape, architecture: int, tokens: int = 8192) -> tuple[Launch, Compiled]:
    """The launch and machine code of a case (see kernel_cases) at a model's shape."""
    launch = recorded(name.partition("+")[0], operands(name, shape, tokens, torch.device("meta")))
    return launch, compiled(launch, architecture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8b", "70b"], choices=SHAPES)
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES)
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed; pip install triton", file=sys.stderr)
        sys.exit(2)
    print("| kernel | shape | sm | warps | registers | stack | shared | loads | copies to shared | stores | local |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name in arguments.only:
        for shape in arguments.shapes:
            for architecture in arguments.architectures:
                _, made = compile_case(name, SHAPES[shape], architecture)
                loads, copies, stores = (
                    " ".join(f"{number}x{width}B" for width, number in sorted(made.accesses(kind).items()))
                    for kind in ("LDG", "LDGSTS", "STG")
                )
                print(
                    f"| {name} | {shape} | {architecture} | {made.threads // 32} | {made.registers} "
                    f"| {made.stack_bytes} | {made.shared_bytes} | {loads} | {copies} | {stores} | {made.local} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
