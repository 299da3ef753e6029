"""The shape of the package, read from its syntax: levels, homes of libraries, no cycles, sizes."""

import ast
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qlora_dist"

# Rooms (folders, and files at the top), lowest first. A room imports rooms of lower levels only.
LEVELS = [
    ["__init__", "errors", "files"],
    ["progress"],
    ["console"],
    ["config", "cluster"],
    ["data", "optim", "pages"],
    ["model"],
    ["memory"],
    ["train"],
    ["commands"],
    ["api", "__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FOLDERS = {"config", "cluster", "data", "optim", "model", "memory", "pages", "train", "commands", "api"}

# Library -> the files that may import it. doctor looks at what is installed: it may import anything.
HOMES = {
    "pydantic": ["config/*"],
    "yaml": ["config/*"],
    "accelerate": ["cluster/*"],
    "deepspeed": ["optim/*"],
    "bitsandbytes": ["optim/adamw.py", "model/*"],
    "datasets": ["data/*"],
    "transformers": ["model/*", "data/tokenizer.py", "data/templates/limited.py"],
    "peft": ["model/lora*"],
    "flash_attn": ["model/attention.py"],
    "triton": ["model/kernels/*"],
    "liger_kernel": ["model/*"],
    "safetensors": ["model/*", "train/checkpoint.py", "train/trained_weights.py", "commands/verify/*"],
    "tensorboard": ["train/metrics.py"],
    "torch.utils.tensorboard": ["train/metrics.py"],
    "jinja2": ["pages/render.py"],
    "markupsafe": ["pages/render.py"],
    "click": ["commands/__init__.py", "commands/group.py", "commands/on_*.py"],
}
FREE = "commands/doctor/*"
NO_CODE = ("__pycache__", "py.typed")


def _files():
    return sorted(PACKAGE.rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


def _imports(path: Path):
    """(dotted name, is of ours) of every import in a file, wherever it stands; ours without the package's name."""
    here = list(path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                is_ours = alias.name.split(".")[0] == PACKAGE.name
                yield alias.name.removeprefix(f"{PACKAGE.name}."), is_ours
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield (node.module or "").removeprefix(f"{PACKAGE.name}."), (node.module or "").startswith(PACKAGE.name)
                continue
            base = here[: len(here) - node.level + 1] + (node.module or "").split(".") * bool(node.module)
            for alias in node.names:
                name = ".".join([*base, alias.name])
                # `from . import x` of the package itself: a room, or what its __init__ defines
                yield name if base or alias.name in LEVEL else "__init__", True


def _is_at_home(name: str, path: Path) -> bool:
    if fnmatch(_name(path), FREE):
        return True
    homes = [files for library, files in HOMES.items() if f"{name}.".startswith(f"{library}.")]
    return all(any(fnmatch(_name(path), pattern) for pattern in files) for files in homes)


def test_every_room_has_a_level():
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir() if path.name not in NO_CODE}
    assert rooms <= set(LEVEL), "a new room: give it a level, or put it into one that is there"
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == FOLDERS


@pytest.mark.parametrize("path", _files(), ids=_name)
def test_imports_go_down_the_levels_and_libraries_stay_at_home(path):
    room = _room(_name(path))
    for name, is_ours in _imports(path):
        if is_ours:
            other = name.split(".")[0]
            assert other == room or LEVEL[other] < LEVEL[room], f"{room} imports {name}, which is not below it"
        else:
            assert _is_at_home(name, path), f"{_name(path)} imports {name}, which lives elsewhere: see HOMES"


def _arrows(node_of):
    """Who imports whom, of what `node_of` makes of a file's name."""
    modules = {_name(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in _files()}
    arrows: dict[str, set[str]] = {}
    for path in _files():
        for name, is_ours in _imports(path):
            found = name if name in modules else name.rpartition(".")[0]
            if is_ours and found in modules:
                arrows.setdefault(node_of(_name(path)), set()).add(node_of(_name(modules[found])))
    return {here: {other for other in others if other != here} for here, others in arrows.items()}


def _cycle(arrows):
    """One cycle, or None."""
    done: set[str] = set()

    def visit(node: str, way: tuple[str, ...]):
        if node in way:
            return " -> ".join([*way[way.index(node) :], node])
        if node in done:
            return None
        found = [visit(other, (*way, node)) for other in sorted(arrows.get(node, ()))]
        done.add(node)
        return next(filter(None, found), None)

    return next(filter(None, [visit(node, ()) for node in sorted(arrows)]), None)


@pytest.mark.parametrize("kind", ["rooms", "files"])
def test_nothing_imports_itself_on_a_detour(kind):
    assert _cycle(_arrows(_room if kind == "rooms" else str)) is None


def test_a_cycle_would_be_found():
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == "b -> c -> b"


def test_files_and_functions_stay_readable():
    long_files = {_name(p): n for p in _files() if (n := len(p.read_text().splitlines())) > 400}
    assert long_files == {}
    long_functions = [
        f"{_name(path)}:{node.name} {node.end_lineno - node.lineno + 1}"
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > 75
    ]
    assert long_functions == []


def test_no_mean_reduction_and_no_unsafe_loading():
    for path in _files():
        text = path.read_text()
        assert 'reduction="mean"' not in text, path
        assert "torch.load(" not in text, path
        assert "trust_remote_code=True" not in text, path


def test_only_cluster_asks_for_the_number_of_ranks_and_reads_the_environment():
    for path in _files():
        text, room = path.read_text(), _room(_name(path))
        if room != "cluster":
            assert "world.size > 1" not in text and "world.size == 1" not in text, path
        if room not in ("cluster", "commands"):
            assert "os.environ" not in text, path
