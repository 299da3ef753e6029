"""Nothing from outside moves a cursor, sets a title or hides text; an error that nobody expected is one paragraph."""

import errno
import io
import json
import logging
import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.ranks import clean_environment
from helpers.tiny_run import make_inputs, write_config

from qlora_dist import commands
from qlora_dist.commands import invoke
from qlora_dist.commands.data_report import html as page
from qlora_dist.commands.data_report import terminal
from qlora_dist.commands.screen import PrintableFormatter, Screen, guard_terminals
from qlora_dist.errors import UserError

CLIPBOARD, TITLE, CLEAR, OVERRIDE = "\x1b]52;c;aGk=\x07", "\x1b]0;title\x07", "\x1b[2J\x1b[H", "\u202e"
EVIL = f"a{CLIPBOARD}{TITLE}{CLEAR}{OVERRIDE}\x1b[31mred\x9b31m\x00\ud800b"


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 7


def shown(text):
    stream = Terminal()
    assert Screen(stream).write(text) == len(text)
    return stream.getvalue()


def test_a_screen_lets_colours_and_progress_through_and_nothing_else():
    own = "\x1b[1m\x1b[38;5;9mred\x1b[0m\t1\r\x1b[K\n\x1b[A\x1b[2Kdone \u00e9 \u4e2d"
    assert shown(own) == own
    for sequence in (CLIPBOARD, TITLE, CLEAR, "\x1bP1$r\x1b\\\\", "\x1b[?1049h", "\x1b[6n", "\x1bc", "\x9b2J"):
        left = shown(f"a{sequence}b")
        assert "\x1b" not in left and "\x9b" not in left and left.startswith("a\\x") and left.endswith("b")
    assert shown("a\x1b") + shown("[2J") == "a\\x1b[2J"  # in two pieces
    assert shown("\ud800 \u202e \u2066 \x00 \x07") == "\\ud800 \\u202e \\u2066 \\x00 \\x07"


def test_a_screen_is_the_stream_that_it_guards():
    stream = Terminal()
    screen = Screen(stream)
    screen.writelines(["a", "\x07"])
    assert screen.getvalue() == "a\\x07" and screen.isatty() and screen.fileno() == 7


def test_terminals_are_guarded_and_pipes_get_every_byte(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="utf-8"))
    monkeypatch.setattr(sys, "stderr", Terminal())
    guard_terminals()
    print("\x1b[2J\ud800", flush=True)  # a lone surrogate would be an error
    print("\x1b[2J", file=sys.stderr)
    assert raw.getvalue() == b"\x1b[2J\\ud800\n" and sys.stderr.getvalue() == "\\x1b[2J\n"


def test_log_records_hold_no_control_characters():
    record = logging.LogRecord("name", logging.WARNING, "file", 1, "columns %s", (EVIL,), None)
    assert PrintableFormatter("%(name)s: %(message)s").format(record).isprintable()


@pytest.fixture
def evil(tmp_path):
    """The config of a run whose data try everything: texts, a column, a file name."""
    raw = make_inputs(tmp_path)
    file = tmp_path / "da\x1b[31mta\x1b]0;t\x07.jsonl"
    file.write_text(json.dumps({"input": f"w6 {EVIL}", "output": f"w7 {EVIL}", f"c{EVIL}": 1}) + "\n")
    raw["data"]["train"] = [{"path": str(file), "format": "input-output"}]
    raw["data"]["on_bad"] = "skip"
    return raw


def on_a_terminal(*arguments):
    """What a command writes to a terminal, as bytes, and its exit code."""
    ours, theirs = pty.openpty()
    environment = {**clean_environment(), "TERM": "xterm-256color", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_dist", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while select.select([ours], [], [], 120)[0]:
        try:
            piece = os.read(ours, 65536)
        except OSError as error:
            assert error.errno == errno.EIO  # the other side is closed
            break
        written += piece
    os.close(ours)
    return written, process.wait(60)


def test_an_audit_shows_what_data_hold_and_obeys_none_of_it(tmp_path, evil):
    good = tmp_path / "gute\x1b[31m.jsonl"
    # the tiny tokenizer has words only: what cannot be decoded again is not shown, so the column and names carry it
    good.write_text(json.dumps({"input": "w6", "output": "w7", f"c{CLIPBOARD}": 1}) + "\n")
    evil["data"]["train"].append({"path": str(good), "format": "input-output"})
    written, code = on_a_terminal("data", str(write_config(tmp_path / "config.yaml", evil)), "--show", "2")
    assert code == 0, written
    assert b"\x1b[" in written  # the guard: there are colours of our own
    assert b"\x1b]" not in written and b"\x07" not in written and b"\x1b[31m." not in written
    assert b"\\x1b]52;c;aGk=\\x07" in written and b"gute\\x1b[31m.jsonl" in written


def test_the_command_line_guards_what_any_library_prints(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(commands, "invoke", lambda _: print(TITLE) or 0)
    commands.main()
    assert stream.getvalue() == "\\x1b]0;title\\x07\n"


def test_a_sample_is_shown_with_its_own_colours_as_text(tmp_path):
    from rich.console import Console

    sample = _sample(EVIL)
    stream = Terminal()
    Console(file=stream, force_terminal=True, width=200).print(terminal._sample(sample))
    text = stream.getvalue()
    assert "\x1b[31m" not in text and "\\x1b[31mred" in text and CLIPBOARD not in text and OVERRIDE not in text
    html = page._sample(sample)
    assert "\x1b" not in html and OVERRIDE not in html and "\ud800" not in html and "\\x1b[31mred" in html


def _sample(text):
    from qlora_dist.commands.data_report.measure import Run, Sample

    return Sample(index=0, source=text, num_tokens=1, num_labels=1, runs=[Run(text, is_label=True, is_special=False)])


def test_an_error_names_what_it_found_without_obeying_it(tmp_path, evil, capsys):
    evil["data"]["on_bad"] = "error"
    assert invoke(["train", str(write_config(tmp_path / "config.yaml", evil))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "\x1b" not in said and "\\x1b[31mta" in said


@pytest.mark.parametrize("error", [KeyError("nobody expected this"), RuntimeError("x" * 10_000), MemoryError()])
def test_an_error_that_nothing_expects_is_one_paragraph_and_a_traceback_with_debug(
    tmp_path, monkeypatch, capsys, error
):
    def fails(*_):
        raise error

    monkeypatch.setattr("qlora_dist.config.load_config", fails)
    assert invoke(["plan", str(tmp_path / "config.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1200 and "Traceback" not in said
    if isinstance(error, MemoryError):
        assert "host memory is used up" in said
    else:
        assert (
            f"internal error: {type(error).__name__}" in said and "on_config.py, line" in said and "report it" in said
        )
    assert invoke(["--debug", "plan", str(tmp_path / "config.yaml")]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_output_file_is_refused_before_the_work_is_done(tmp_path, monkeypatch, capsys):
    config = str(write_config(tmp_path / "config.yaml", make_inputs(tmp_path)))
    monkeypatch.setattr("qlora_dist.commands.data_report.run_data_command", None)  # would be called afterwards
    for html, reason in ((tmp_path, "Is a directory"), (tmp_path / "config.yaml" / "a.html", "move it away")):
        assert invoke(["data", config, "--html", str(html)]) == 2
        assert reason in capsys.readouterr().err


def test_a_reader_that_stops_reading_ends_the_command_quietly(tmp_path):
    command = f"{sys.executable} -m qlora_dist schema | head -c 10"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=clean_environment(), timeout=120,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert len(done.stdout) == 10 and "Traceback" not in done.stderr and "rror" not in done.stderr


def test_user_errors_keep_their_exit_code(monkeypatch, capsys):
    def fails(*_):
        raise UserError("this is yours")

    monkeypatch.setattr("qlora_dist.config.load_config", fails)
    assert invoke(["plan", "x.yaml"]) == 2 and capsys.readouterr().err == "error: this is yours\n"
