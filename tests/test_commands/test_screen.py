"""What a command writes: nothing that a terminal would obey, and one paragraph for each kind of end."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import click
import pytest
import torch
from helpers.ranks import ROOT, clean_environment
from helpers.tiny_run import make_inputs, write_config
from rich.console import Console
from rich.text import Text

from qlora_dist import commands
from qlora_dist.commands.data_report import html, print_audit
from qlora_dist.commands.data_report.measure import Audit, Run, Sample
from qlora_dist.commands.outputs import check_output_file, check_output_folder
from qlora_dist.commands.screen import PlainFormatter, PlainHandler, guarded, styled, write_data, write_json
from qlora_dist.data.documents import SourceStats
from qlora_dist.errors import RunFailed, UserError

# a colour, the clipboard, the title, clearing, up a line, C1's CSI, a right-to-left override, half a surrogate pair
HOSTILE = "\x1b[31m\x1b]52;c;aGk=\x07\x1b]0;t\x07\x1b[2J\x1b[1A\x9b1m\u202e\ud83d\rX"
SHOWN = r"\x1b[31m\x1b]52;c;aGk=\x07\x1b]0;t\x07\x1b[2J\x1b[1A\x9b1m\u202e\ud83d\rX"
OBEYED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def screen(out: TextIO | None = None) -> Iterator[tuple[Any, Any]]:
    """stdout and stderr as a command finds them, both guarded; gives what lies behind them, a terminal unless `out`."""
    streams = out or Terminal(), Terminal()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]), guarded():
        yield streams


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Adds a command `act` that does what the test says."""

    def add(act: Any) -> None:
        monkeypatch.setitem(commands.cli.commands, "act", click.Command("act", callback=act))

    return add


# --- the guard --------------------------------------------------------------------------------------------------------


def test_no_control_character_passes_to_stdout_but_the_return_before_a_progress_line():
    before = sys.stdout
    with screen() as streams:
        print(HOSTILE)
        print("\rstep 1", end="")
        sys.stdout.writelines([HOSTILE])
    assert streams[0].getvalue() == f"{SHOWN}\n\rstep 1{SHOWN}"
    assert sys.stdout is before


def test_progress_bars_and_colours_of_libraries_pass_to_stderr_and_nothing_else():
    with screen() as streams:
        bar = "\r 50%|\x1b[32m###\x1b[0m|\x1b[A\x1b[2K\n"
        sys.stderr.write(bar)
        sys.stderr.write("\x1b]0;title\x07\x1b[2J\x1b[5;5H\x1b[?1049h\x1b[31")
    assert streams[1].getvalue() == bar + r"\x1b]0;title\x07\x1b[2J\x1b[5;5H\x1b[?1049h\x1b[31"


def test_a_bar_of_tqdm_is_what_it_was():
    from tqdm import tqdm

    def bars() -> None:
        with tqdm(
            range(3), ncols=40, mininterval=0, miniters=1, bar_format="{n}/{total}|{bar}|", colour="green"
        ) as one:
            for _ in one:
                list(tqdm(range(2), position=1, ncols=40, mininterval=0, miniters=1, bar_format="{n}|{bar}|"))

    with contextlib.redirect_stderr(Terminal()) as plain:
        bars()
    before = plain.getvalue()
    with screen() as streams:
        bars()
    assert streams[1].getvalue() == before and "\x1b[A" in before and "\x1b[32m" in before


def test_rich_keeps_its_colours_and_the_text_in_them_its_harmless_form():
    with screen() as streams:
        Console(file=styled(), force_terminal=True, color_system="standard").print(Text("x", style="green"))
    assert streams[0].getvalue() == "\x1b[32mx\x1b[0m\n"


def test_a_character_that_the_encoding_lacks_is_shown_as_an_escape():
    raw = io.BytesIO()
    wrapper = io.TextIOWrapper(raw, encoding="latin-1")
    with screen(wrapper):
        print("é 🙂")
        write_data("🙂")
    assert raw.getvalue() == b"\xe9 \\U0001f642\n\\U0001f642"


def test_data_for_programs_is_exact_in_a_pipe_and_harmless_on_a_terminal():
    for out in (Terminal(), io.StringIO()):
        with screen(out):
            write_data(HOSTILE)
        assert out.getvalue() == (SHOWN if out.isatty() else HOSTILE)


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_json_holds_the_same_value_without_control_characters(kind):
    with screen(kind()) as (out, _):
        write_json({"a": HOSTILE + "\x7f\u2028"}, ensure_ascii=False, indent=1)
    assert json.loads(out.getvalue()) == {"a": HOSTILE + "\x7f\u2028"}
    assert not OBEYED.search(out.getvalue())


def test_a_log_record_and_its_traceback_have_no_escape():
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.LogRecord("a", logging.WARNING, "f", 1, "%s", (HOSTILE,), sys.exc_info())
    text = PlainFormatter("%(message)s").format(record)
    assert text.startswith(SHOWN + "\nTraceback") and text.endswith(f"ValueError: {SHOWN}")


def test_names_and_samples_of_data_are_shown_as_text_in_both_reports(tmp_path):
    source = SourceStats(path=HOSTILE, format="alpaca", why=HOSTILE, template=HOSTILE)
    sample = Sample(0, HOSTILE, 2, 1, [Run(HOSTILE, False, False), Run(HOSTILE, True, True)])
    audit = Audit("data.train", [source], [(1, 2, 1)], 1, 8, 1.0, 1.0, 1.0, 2, [HOSTILE], [sample])
    with screen() as streams:
        print_audit(audit, Console(file=styled(), force_terminal=True, color_system="standard", width=400))
    said = streams[0].getvalue()
    assert said.count(SHOWN) == 7 and "\x1b[31m" not in said and "\x1b[2;" not in said
    assert not OBEYED.search(re.sub("\x1b\\[[0-9;]*m", "", said))
    html.write_html([audit], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count(SHOWN) == 7 and not OBEYED.search(page)


# --- the ends of a command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError(HOSTILE), 2, f"error: {SHOWN}"),
        (RunFailed(HOSTILE), 1, f"error: {SHOWN}"),
        (PermissionError(13, "Permission denied", HOSTILE), 2, f"error: this command: Permission denied ({SHOWN})"),
        (MemoryError(), 1, "error: this command: Cannot allocate memory; host memory is used up"),
        (KeyError(HOSTILE), 1, "internal error: KeyError: "),
        (EOFError("no data left in file"), 1, "internal error: EOFError: no data left in file"),
        (BrokenPipeError(32, "Broken pipe"), 1, "error: this command: Broken pipe"),  # of a worker, not of stdout
        (click.ClickException("a\x07\u202e"), 2, r"error: a\x07\u202e"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RecursionError("too deep"), 1, "internal error: RecursionError: too deep"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 1, "error: CUDA out of memory; end what else uses"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_ends_in_one_paragraph(capsys, command, error, code, said):
    def act() -> None:
        raise error

    command(act)
    assert commands.invoke(["act"]) == code
    streams = capsys.readouterr()
    text = streams.err.strip()
    assert text.startswith(said) and "Traceback" not in text and streams.out == ""
    assert len(text.splitlines()) == 1 and not OBEYED.search(text)
    if said.startswith("internal error"):
        assert re.search(r"\(\w+\.py:\d+\)\. .*please report it .*--debug", text)
    assert commands.invoke(["--debug", "act"]) == code
    traced = capsys.readouterr().err
    assert ("Traceback" in traced) == (not isinstance(error, KeyboardInterrupt | click.ClickException))
    assert not OBEYED.search(traced)


@pytest.mark.parametrize("was_terminated", [True, False])
def test_a_rank_says_what_only_it_has_found_and_nothing_once_its_launcher_ends_it(
    capsys, command, monkeypatch, was_terminated
):
    def act() -> None:
        raise UserError("line 3 is broken")

    waits = []
    command(act)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(commands, "was_terminated", lambda: was_terminated)
    monkeypatch.setattr(commands.time, "sleep", waits.append)
    assert commands.invoke(["act"]) == 2
    assert capsys.readouterr().err == ("" if was_terminated else "rank 1: error: line 3 is broken\n")
    assert bool(waits) != was_terminated, "the others' launcher may end it while it waits"


def test_an_unknown_option_with_escapes_is_shown_as_text(capsys):
    assert commands.invoke(["data", "--" + HOSTILE, "x"]) == 2
    said = capsys.readouterr().err
    assert "No such option" in said and r"\x1b]52;c;aGk" in said and not OBEYED.search(said)


def test_an_error_inside_of_the_package_names_its_own_line(capsys, command):
    command(lambda: PlainFormatter("%(x)s").format(logging.makeLogRecord({})))
    assert commands.invoke(["act"]) == 1
    assert re.match(r"internal error: .*\(screen\.py:\d+\)", capsys.readouterr().err)


def test_on_a_terminal_errors_and_records_are_broken_between_words(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "80")
    terminal, text = Terminal(), "word " * 40 + "/a/path-of/" + "x" * 30
    monkeypatch.setattr("sys.stderr", terminal)
    commands._say(text)
    PlainHandler().handle(logging.makeLogRecord({"name": "somebody", "msg": text}))
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 6 and max(map(len, lines)) <= 80
    assert terminal.getvalue().split() == [*text.split(), "somebody:", *text.split()]
    plain = io.StringIO()
    monkeypatch.setattr("sys.stderr", plain)
    commands._say(text)
    assert plain.getvalue() == f"{text}\n"


def _run(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    environment = clean_environment() | {"TERM": "xterm-256color", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "qlora_dist", *arguments], env=environment, cwd=ROOT, **options
    )  # fmt: skip


def _on_a_terminal(*arguments: str) -> tuple[int, str]:
    """Exit code and what the terminal receives."""
    own, theirs = pty.openpty()
    process = _run(*arguments, stdout=theirs, stderr=theirs)
    os.close(theirs)
    received = b""
    while True:
        try:
            piece = os.read(own, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        received += piece
    os.close(own)
    return process.wait(60), received.decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_hostile_data_names_and_keys_reach_no_terminal_raw(inputs, tmp_path):
    odd = HOSTILE.replace("\ud83d", "")
    folder = tmp_path / odd
    folder.mkdir()
    rows = [{"instruction": odd + str(i), "output": odd, odd: odd} for i in range(4)]
    (folder / "data.json").write_text(json.dumps([*rows, {odd: 1}]))
    config = write_config(
        tmp_path / "c.yaml", inputs, run_dir=str(tmp_path / "run"), data__train=[{"path": str(folder / "data.json")}],
        data__on_bad="skip", data__cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    code, said = _on_a_terminal("data", str(config), "--show", "2")
    assert code == 0 and said.count(r"\x1b]52;c;aGk=\x07") > 8, said
    assert "\x1b[31m" not in said and "\x1b[7;32m" in said  # what is learned is green, what was red is text
    assert not OBEYED.search(re.sub("\x1b\\[[0-9;]*m", "", said))
    for arguments in (["data", str(config), "--set", f"{odd}=1"], ["data", str(config), f"--{odd}"], ["train", odd]):
        code, said = _on_a_terminal(*arguments)
        assert code == 2 and r"\x1b]52;c;aGk" in said and not OBEYED.search(said), said


def test_output_that_nobody_reads_ends_the_command_without_a_word():
    process = _run("schema", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head` does, before anything is written
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)
    process.stderr.close()


# --- where a command writes -------------------------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for path, said in [
        (tmp_path, "this is a folder, expected a file"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "file" / "page.html", "file is not a folder"),
        (tmp_path / "file" / "new" / "page.html", "file is not a folder"),
        ("a\0b", "not a path"),
        ("~nosuchuser/page.html", "not a path"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            check_output_file("--html", path)
        assert len(str(error.value).splitlines()) == 1 and str(error.value).startswith("--html ")
    for path, said in [(tmp_path / "file", "not empty"), (tmp_path, "not empty"), (tmp_path / "file" / "x", "folder")]:
        with pytest.raises(UserError, match=said):
            check_output_folder("OUT", path)
    assert check_output_file("--html", tmp_path / "file") == tmp_path / "file"
    assert check_output_folder("OUT", tmp_path / "new" / "model") == tmp_path / "new" / "model"
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(UserError, match="is not writable"):
        check_output_file("--html", tmp_path / "new" / "page.html")


@pytest.mark.parametrize("arguments", [["data", "x.yaml", "--html"], ["merge", "x"], ["quantize", "x"]], ids=" ".join)
def test_a_command_checks_where_it_writes_before_it_reads_anything(arguments, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert commands.invoke([*arguments, str(tmp_path / "file" / "page")]) == 2
    assert "file is not a folder; name another place" in capsys.readouterr().err
