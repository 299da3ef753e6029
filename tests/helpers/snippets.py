"""The fenced blocks of README and docs, and what a line of shell in them means to the real parsers."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import runpy
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from unittest import mock

import click
import yaml

from helpers.ranks import ROOT
from qlora_dist.commands import cli
from qlora_dist.config import load_config, parse_config
from qlora_dist.config.reading import apply_override

LANGUAGES = {"sh", "yaml", "json", "text", "python"}
# the smallest config, to which fragments and overrides are added
SMALLEST = {"run_dir": "r", "model": {"name": "a/b"}, "data": {"train": [{"path": "c/d"}]}, "train": {"epochs": 1}}
_REPOSITORY = ("launch/", "slurm/", "benchmarks/", "ds_configs/", "tests/", "qlora_dist/", "docs/", ".ci/")
_SBATCH = {"nodes", "gpus-per-node", "cpus-per-gpu", "time", "array"}
_FENCE = re.compile(r"^```(\S*)(?: title=\"(.+?)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    title: str  # the file that it is; empty: none
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def pages() -> dict[str, str]:
    """README and the pages, by their path; the quickstart first, as others go on from it."""
    paths = [ROOT / "docs/quickstart.md", ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in dict.fromkeys(paths)}


@cache
def blocks() -> tuple[Block, ...]:
    return tuple(
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2] or "", found[3])
        for page, text in pages().items()
        for found in _FENCE.finditer(text)
    )


def shell_lines(page: str) -> list[str]:
    """The commands of a page, in order."""
    return [
        line for one in blocks() if one.page == page and one.language == "sh" for line in one.text.splitlines() if line
    ]


def words_of(line: str) -> list[list[str]]:
    """The commands of a line, as words: without comments, redirection and variables before them."""
    commands: list[list[str]] = [[]]
    for word in shlex.split(line.replace("<this repository>", "REPOSITORY"), comments=True):
        if word == "&&":
            commands.append([])
        else:
            commands[-1].append(word)
    for words in commands:
        if ">" in words:
            del words[words.index(">") :]
        while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
            del words[0]
    return [words for words in commands if words]


# --- what is parsed ---------------------------------------------------------------------------------------------------


def check(words: Sequence[str]) -> None:
    """Raises an error unless the real parsers take this command and the files of the repository that it names exist."""
    for word in words[1:]:
        if word.startswith(_REPOSITORY):
            assert (ROOT / word).exists(), f"{word} does not exist"
    first, *rest = words
    if first == "qlora-dist":
        check_ours(rest)
    elif first == "python" and rest[0] == "-m":
        _check_module(rest[1], rest[2:])
    elif first == "python":
        _parsed_by_script(lambda: runpy.run_path(str(ROOT / rest[0]), run_name="__main__"), rest[0], rest[1:])
    elif first == "make":
        _check_make(rest)
    elif first == "accelerate":
        _check_accelerate(rest)
    elif first == "torchrun":
        _check_torchrun(rest)
    elif first == "sbatch":
        _check_sbatch(rest)
    elif first == "bash":
        assert (ROOT / rest[0]).is_file()
    elif first == "eval":
        assert re.fullmatch(r"\$\(_QLORA_DIST_COMPLETE=(bash|zsh|fish)_source qlora-dist\)", rest[0])
    else:
        assert first in ("git", "cd"), f"no command that is known here: {first}"


def check_ours(words: Sequence[str]) -> dict[str, object]:
    """`qlora-dist WORDS` by click's parameters, with its overrides and its config by the schema. The parameters."""
    words = list(words)
    cli.make_context("qlora-dist", words[: (at := next(i for i, one in enumerate(words) if one[0] != "-")) + 1])
    name, *rest = words[at:]
    assert name in cli.commands, f"no command {name}"
    context: click.Context = cli.commands[name].make_context(name, rest)
    if name == "torchrun":
        _check_torchrun([f"--rdzv-endpoint={context.params['first_node']}", *context.params["options"]])
    config = ROOT / str(context.params.get("config"))
    overrides = context.params.get("overrides") or ()
    if config.is_file():
        load_config(config, overrides)
    elif overrides and name != "import":  # whose config is not here: it is run
        raw = yaml.safe_load(yaml.safe_dump(SMALLEST))
        for override in overrides:
            apply_override(raw, override)
        parse_config(raw)
    return context.params


class _Parsed(Exception):
    """Stops a program that has taken its words."""


def _parsed_by_script(start: Callable[[], object], name: str, words: Sequence[str]) -> None:
    """Starts a program, and ends it when its argparse parser has taken the words."""
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: object = None) -> None:
        parse(self, args, namespace)  # type: ignore[call-overload]
        raise _Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_only),
        mock.patch.object(sys, "argv", [name, *words]),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # runpy's, of modules that are imported already
        try:
            start()
        except _Parsed:
            return
        except SystemExit as error:
            raise AssertionError(f"{name} does not take {' '.join(words)}") from error
    raise AssertionError(f"{name} has not parsed its words")


def _check_module(module: str, words: Sequence[str]) -> None:
    if module == "qlora_dist":
        check_ours(words)
    elif words:
        _parsed_by_script(lambda: runpy.run_module(module, run_name="__main__"), module, words)
    else:
        assert find_spec(module), f"no module {module}"


def _check_make(words: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^(\S+: )?(export )?{name} *[?:]?=" if is_variable else rf"^{name}:( |$)"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {word}"


def _check_accelerate(words: Sequence[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    with _mistakes(words):
        arguments = launch_command_parser().parse_args(list(words[1:]))
    assert (ROOT / arguments.config_file).is_file() and arguments.module
    _check_module(arguments.training_script, arguments.training_script_args)


def _check_torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    with _mistakes(words):
        arguments = get_args_parser().parse_args(list(words))
    assert arguments.module
    _check_module(arguments.training_script, arguments.training_script_args)


@contextlib.contextmanager
def _mistakes(words: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        raise AssertionError(f"not taken: {' '.join(words)}") from error


def _check_sbatch(words: Sequence[str]) -> None:
    at = next(i for i, word in enumerate(words) if not word.startswith("-"))
    options = {word.removeprefix("--").partition("=")[0] for word in words[:at]}
    assert options <= _SBATCH, f"not among sbatch's options that are known here: {options - _SBATCH}"
    script, rest = words[at], list(words[at + 1 :])
    if script == "slurm/bench.sbatch":
        _check_torchrun(rest)
    elif script == "slurm/repro_65b.sbatch":
        check_ours(["train", "launch/recipes/repro_65b_48gb.yaml", *rest])
    elif script == "slurm/use.sbatch":
        assert len(rest) in (2, 3), "RUN OUT [PROMPTS]"
    elif script == "slurm/sweep.sbatch":
        file = next(one for one in blocks() if one.title == rest[1])
        for line in file.text.splitlines():
            check_ours(["train", rest[0], *(f"--set={one}" for one in shlex.split(line))])
    else:
        assert script == "slurm/train.sbatch"
        check_ours(["train", *rest])
