"""The shape of the package, read from its syntax: levels, homes of libraries, no cycles, sizes."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_dist"

LEVELS = {
    0: ["errors", "config", "runlock", "state", "flat", "provenance", "outcome"],
    1: [
        "preempt",
        "pulse",
        "distributed",
        "packing",
        "loss",
        "lowrank",
        "offload",
        "optim",
        "update",
        "memory",
        "metrics",
        "supervise",
        "templates",
    ],
    2: ["formats", "examples", "loader", "attention", "model", "adapters", "kernels"],
    3: ["checkpoint", "verify", "evaluate", "mmlu", "generate", "merge", "audit", "doctor", "planning"],
    4: ["trainer", "proofs"],
    5: ["cli", "__main__", "__init__"],
}
LEVEL = {module: level for level, modules in LEVELS.items() for module in modules}

# doctor looks at what is installed, so it may import anything (inside its functions)
HOMES = {
    "pydantic": {"config"},
    "yaml": {"config", "state"},
    "accelerate": {"distributed"},
    "deepspeed": {"update"},
    "tensorboard": {"metrics"},
    "datasets": {"formats", "examples"},
    "flash_attn": {"attention"},
    "transformers": {"model", "attention"},
    "peft": {"adapters"},
    "triton": {"kernels"},
    "safetensors": {"checkpoint", "adapters", "trainer", "proofs", "merge", "model"},
    "bitsandbytes": {"optim", "model"},
    "click": {"cli"},
}
FREE = {"doctor"}


def _files():
    return sorted(PACKAGE.rglob("*.py"))


def _module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path):
    """(dotted name, is of ours) of every import in a file, wherever it stands."""
    depth = len(path.relative_to(PACKAGE).parts) - 1  # folders between the package and the file
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, False
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module or "", False
            elif node.level == depth + 1:  # from the package itself
                for name in [node.module] if node.module else [alias.name for alias in node.names]:
                    yield name, True


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_the_levels_and_libraries_stay_at_home(path):
    module = _module(path)
    assert module in LEVEL, f"{module} has no level: add it to the table"
    for name, is_ours in _imports(path):
        top = name.split(".")[0]
        if is_ours and top in LEVEL and module not in ("cli", "__main__"):
            same_module = top == module
            # inside a level, later modules may use earlier ones; the order of the table is the order of use
            order = LEVELS[LEVEL[module]]
            earlier = LEVEL[top] == LEVEL[module] and order.index(top) < order.index(module)
            assert same_module or LEVEL[top] < LEVEL[module] or earlier, f"{module} imports {top}"
        if not is_ours and top in HOMES and module not in FREE:
            assert module in HOMES[top], f"{module} imports {name}, which lives in {HOMES[top]}"


def test_files_and_functions_stay_readable():
    long_files = {str(p.relative_to(PACKAGE)): n for p in _files() if (n := len(p.read_text().splitlines())) > 400}
    assert long_files == {}
    long_functions = [
        f"{path.name}:{node.name} {node.end_lineno - node.lineno + 1}"
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 75
    ]
    assert long_functions == []


def test_no_mean_reduction_and_no_unsafe_loading():
    for path in _files():
        text = path.read_text()
        assert 'reduction="mean"' not in text, path
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path


def test_only_distributed_asks_for_the_number_of_ranks_and_reads_the_environment():
    for path in _files():
        text = path.read_text()
        if _module(path) != "distributed":
            assert "world.size > 1" not in text and "world.size == 1" not in text, path
        if _module(path) not in ("distributed", "cli", "doctor"):
            assert "os.environ" not in text, path
