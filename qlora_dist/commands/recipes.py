"""The recipes, launch files and Slurm scripts of this package: listed, and written where a user wants them."""

from __future__ import annotations

from pathlib import Path

from ..config.shipped import shipped_files
from ..errors import UserError
from ..files import write_text


def recipes() -> dict[str, Path]:
    """Name -> file: recipes by their own names, launch files as accelerate/NAME, Slurm scripts as slurm/NAME."""
    found = {path.stem: path for path in shipped_files("launch/recipes", "*.yaml")}
    found |= {f"accelerate/{path.stem}": path for path in shipped_files("launch/accelerate", "*.yaml")}
    return found | {f"slurm/{path.stem}": path for path in shipped_files("slurm", "*.sbatch")}


def recipe_lines() -> list[str]:
    """Each name with the first sentence of what its file says of itself."""
    return [f"{name:<20} {_about(path)}" for name, path in recipes().items()]


def recipe_file(name: str) -> Path:
    """Raises UserError for a name that is none."""
    found = recipes()
    if name not in found:
        known = ", ".join(found) or "none: the package was installed without its data files"
        raise UserError(f"--recipe {name}: there is no such recipe; there are {known}")
    return found[name]


def write_recipe(name: str, target: Path) -> str:
    """Copies one to `target`, with the paths in it as they are here. Returns the command that uses it."""
    path = recipe_file(name)
    text = path.read_text(encoding="utf-8")
    if "/" in name:
        write_text(target, text)
        return (
            f"sbatch {target} CONFIG" if name.startswith("slurm/") else f"accelerate launch --config_file {target} ..."
        )
    launch = next(iter(shipped_files("launch/accelerate", "single.yaml")), path).parent
    text = text.replace(f"launch/recipes/{path.name}", str(target)).replace("launch/accelerate/", f"{launch}/")
    write_text(target, text)
    return f"qlora-dist train {target} --ranks auto"


def write_demo(folder: Path) -> list[str]:
    """Copies the demo's scripts and recipe into `folder`. Returns the commands that run it. Raises UserError."""
    scripts = shipped_files("launch/demo", "*.py")
    if not scripts:
        raise UserError("--demo: the package was installed without its data files; install its wheel again")
    folder.mkdir(parents=True, exist_ok=True)
    train = write_recipe("demo", folder / "demo.yaml").replace("auto", "2")
    for script in scripts:
        write_text(folder / script.name, script.read_text(encoding="utf-8"))
    make_data, make_base, report = (f"python {folder / name}.py" for name in ("make_data", "make_base", "report"))
    return [make_data, make_base, train, "qlora-dist merge runs/demo build/demo/merged --onto dequantized", report]


def _about(path: Path) -> str:
    """The first sentence of the comment at the head of a file, on one line; of a script, how it is started."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("# To launch:") and path.suffix == ".sbatch":
            return line.removeprefix("# To launch:").strip()
        if not line.startswith(("# To launch:", "#!")):
            words += line.lstrip("#").split()
    text = " ".join(words)
    for end in (": ", ". ", "; "):
        text = text.split(end)[0]
    return text.rstrip(".") if len(text) <= 96 else f"{text[:93].rsplit(' ', 1)[0]} ..."
