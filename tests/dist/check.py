"""`make test-dist`: sdist and wheel have what they need, and the installed wheel works from an empty folder.

Everything happens in a temporary folder, on a copy of the checkout: a build would leave its own folders behind. The wheel
is installed into an environment of its own, which sees the libraries of the one that runs this, but not the checkout.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # what `build` needs there

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true", help="run the whole demo from the installed wheel")
    is_whole = parser.parse_args().demo
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied = copy_checkout(folder / "source")
        # the wheel is built from the sdist: what one lacks the other lacks as well
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", "../dist", "."], folder / "source")
        (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
        check_contents(copied, sdist, wheel)
        commands = install(folder / "environment", wheel)
        empty = folder / "empty"
        empty.mkdir()
        use(commands, empty, is_whole)


def copy_checkout(target: Path) -> list[str]:
    """The files that git knows, or would add."""
    listed = run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT).split("\0")
    names = [name for name in listed if (ROOT / name).is_file()]
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes((ROOT / name).read_bytes())
    return names


def wanted(names: Sequence[str]) -> dict[str, str]:
    """Path in the wheel -> path in the checkout: the package, and the data files that pyproject.toml names."""
    found = {name: name for name in names if name.startswith("qlora_dist/")}
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    for target, globs in patterns.items():
        for name in names:
            if any(PurePosixPath(name).match(one) and name.count("/") == one.count("/") for one in globs):
                found[f"data/{target}/{PurePosixPath(name).name}"] = name
    return found


def check_contents(names: Sequence[str], sdist: Path, wheel: Path) -> None:
    """Every file of the package and every data file is in both, byte for byte; so are licences, and nothing else is."""
    needed = wanted(names)
    for kind, least in {
        "ds_configs/": 4, "launch/recipes/": 15, "launch/demo/": 4, "launch/accelerate/": 4, "slurm/": 4,
        "qlora_dist/pages/templates/": 4, "qlora_dist/pages/assets/": 6, "qlora_dist/commands/": 20,
    }.items():  # fmt: skip
        count = sum(name.startswith(kind) for name in needed.values())
        assert count >= least, f"{kind}: {count} files are shipped, expected at least {least}"
    with zipfile.ZipFile(wheel) as archive:
        stem = "-".join(wheel.name.split("-")[:2])
        inside = {name.removeprefix(f"{stem}.data/"): name for name in archive.namelist()}
        lacking = sorted(name for name in needed if name not in inside)
        assert not lacking, f"{wheel.name} lacks {', '.join(lacking)}"
        for name, source in needed.items():
            assert archive.read(inside[name]) == (ROOT / source).read_bytes(), f"{name} differs from {source}"
        licences = [f"{stem}.dist-info/licenses/{name}" for name in ("LICENSE", "qlora_dist/pages/assets/uPlot.LICENSE")]
        assert set(licences) <= inside.keys(), f"{wheel.name} lacks a licence"
        more = [name for name in inside if name not in needed and not name.startswith(f"{stem}.dist-info/")]
        assert not more, f"{wheel.name} has {', '.join(more)}, which is no part of the package"
        metadata = archive.read(f"{stem}.dist-info/METADATA").decode()
    with tarfile.open(sdist) as sources:
        held = {name.partition("/")[2] for name in sources.getnames()}
    lacking = sorted({*needed.values(), "CHANGELOG.md", "CITATION.cff", "Containerfile"} - held)
    assert not lacking, f"{sdist.name} lacks {', '.join(lacking)}"
    assert f"Version: {wheel.name.split('-')[1]}\n" in metadata
    print(f"{wheel.name}: {len(inside)} files, {wheel.stat().st_size / 2**20:.1f} MiB; {sdist.name}: {len(held)} files")


def install(environment: Path, wheel: Path) -> Path:
    """Returns the folder of its commands."""
    venv.create(environment, with_pip=False)
    values = {"base": str(environment), "platbase": str(environment)}
    # the libraries beside it; a path in a .pth file is added after the environment's own, and its .pth files are not read,
    # so that an editable installation of the checkout is not seen
    own = Path(sysconfig.get_path("purelib", vars=values))
    own.joinpath("libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
         "--disable-pip-version-check", "--ignore-installed", str(wheel)], environment)  # fmt: skip
    return environment / "bin"


def use(commands: Path, folder: Path, is_whole: bool) -> None:
    """The commands that read shipped files, from an empty folder; then the demo, or its first step."""

    def command(*words: str) -> str:
        program = {"python": "python", "qlora-dist": "qlora-dist"}[words[0]]
        return run([str(commands / program), *words[1:]], folder)

    place = command("python", "-c", "import qlora_dist; print(qlora_dist.__file__, qlora_dist.__version__)").split()
    assert Path(place[0]).is_relative_to(commands.parent), f"{place[0]} is not the installed package"
    assert place[1] in command("qlora-dist", "--version")
    listed = command("qlora-dist", "init", "--list-recipes")
    assert all(name in listed for name in ("alpaca-7b", "accelerate/ddp", "slurm/train")), listed
    command("qlora-dist", "init", "--recipe", "alpaca-7b")
    assert str(commands.parent) in (folder / "alpaca-7b.yaml").read_text().splitlines()[0]  # its launch file is there
    located = "from qlora_dist.config.shipped import shipped_files as f; print(len(f('ds_configs', '*.json')))"
    assert command("python", "-c", located).strip() == "4"
    steps = [line.split() for line in command("qlora-dist", "init", "--demo").splitlines()[1:]]
    assert [words[0] for words in steps] == ["python", "python", "qlora-dist", "qlora-dist", "python"]
    for words in steps if is_whole else steps[:1]:
        said = command(*words)
    if is_whole:
        print(said)
        assert "uPlot" in (folder / "runs" / "demo" / "report.html").read_text()  # the charts' script
    print(f"from an empty folder: version, recipes, {'the demo' if is_whole else 'the demo as far as its data'}")


def run(words: Sequence[str], folder: Path) -> str:
    """Output of a command, without the caller's settings of Python. Raises RuntimeError with both streams."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") and name != "VIRTUAL_ENV"}
    offline = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    done = subprocess.run(words, cwd=folder, env=kept | offline, capture_output=True, text=True, timeout=3000)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
