"""What rank 0 says: whole words in the width that there is, one line of progress, and never silence."""

from __future__ import annotations

import io
import logging
import random
import re
import threading
from pathlib import Path

import pytest
from helpers.terminal import Clock, Terminal

from qlora_dist import console as console_module
from qlora_dist.console import ECHO, PLAIN_SECONDS, Console, Silence, about, count
from qlora_dist.progress import format_seconds, track


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


FIELDS = ["loss 1.2345", "left 1:02:03", "12,345 tok/s", "23.45 GiB"]
MORE = ["elapsed 1:02:03", "unsmoothed 1.2345", "lr 1.00e-04"]


def test_progress_on_a_terminal_is_one_line_with_a_bar_and_whole_fields() -> None:
    terminal, clock = Terminal(), Clock()
    with Console(True, terminal, clock) as console:
        for step in range(1, 11):
            clock.seconds += 1.0
            console.progress("step", step, 10, FIELDS, MORE, is_edge=step in (1, 10))
    (line, end) = terminal.screen()
    assert end == "" and len(line) < 80
    assert re.fullmatch(r"step 10/10  ━+  loss 1\.2345  left 1:02:03  12,345 tok/s  23\.45 GiB", line)
    assert len(terminal.getvalue().split("\r")) == 11, "one state a second"


@pytest.mark.parametrize("columns", [30, 50, 80, 120, 200])
def test_no_field_is_cut_at_any_width_and_the_bar_fills_with_the_work(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    filled = []
    for done in (0, 500, 1000):
        terminal = Terminal()
        Console(True, terminal).progress("step", done, 1000, FIELDS, MORE)
        (line,) = terminal.screen()
        assert len(line) < columns
        parts = [part for part in re.split(r"  +", line) if "━" not in part]
        assert parts == [f"step {done:,}/1,000", *FIELDS, *MORE][: len(parts)]
        filled.append(line.count("━"))
    if columns >= 80:
        assert filled[0] == 0 < filled[1] < filled[2]


def test_the_echo_of_ctrl_c_has_room_behind_the_progress_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the line is as long as that allows, while the bar can grow."""
    for columns in range(20, 150):
        monkeypatch.setenv("COLUMNS", str(columns))
        terminal = Terminal()
        Console(True, terminal).progress("step", 500, 1000, FIELDS[:2], MORE[:1])
        (line,) = terminal.screen()
        assert len(line) + len(ECHO) < columns
        if 57 <= columns <= 78:
            assert len(line) + len(ECHO) + 1 == columns


def test_a_file_and_a_wide_terminal_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rng = random.Random(0)
    for _ in range(50):
        total = int(10 ** rng.uniform(0, 7))
        done, fields = rng.randint(1, total), rng.sample(FIELDS, 2)
        terminal, file = Terminal(), io.StringIO()
        for stream in (terminal, file):
            Console(True, stream).progress("step", done, total, fields, MORE, is_edge=True)
        parts = [part for part in re.split(r"  +", terminal.screen()[0]) if "━" not in part and "╸" not in part]
        assert file.getvalue() == "  ".join(parts) + "\n"
        assert parts[0].replace(",", "") == f"step {done}/{total}" and ("," in parts[0]) == (total >= 1000)


def test_states_that_follow_at_once_are_not_drawn() -> None:
    terminal, clock = Terminal(), Clock()
    console = Console(True, terminal, clock)
    for done in range(1, 1001):
        clock.seconds += 0.01
        console.progress("batch", done, 2000, [])
    assert 90 <= terminal.getvalue().count("\r") <= 101


def test_a_line_takes_the_place_of_the_progress_with_the_terminals_own_echo() -> None:
    terminal = Terminal()
    with Console(True, terminal) as console:
        console.progress("step", 1, 10, FIELDS)
        terminal.write("^C")  # the terminal's echo of Ctrl-C
        console.print("stopped by SIGINT after step 1")
    assert terminal.screen() == ["stopped by SIGINT after step 1", ""]


def test_a_record_of_a_log_takes_the_place_of_the_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with Console(True, terminal) as console:
        console.progress("step", 1, 10, FIELDS)
        logging.getLogger("somebody").warning("a warning")
    assert terminal.screen() == ["a warning", ""]
    assert handler.filters == []


def test_lines_are_wrapped_between_words_under_their_text() -> None:
    terminal, plain = Terminal(), io.StringIO()
    text = "16 rows of 2,048 tokens a step: about 33 examples; 2 ranks x 8 micro-steps x 1 row; in /a/b-c/" + "d" * 20
    for stream in (terminal, plain):
        with Console(True, stream) as console:
            console.print(text, "steps")
            console.print("error: " + "word " * 30)
    first, *rest = terminal.screen()
    assert all(len(line) <= 80 for line in terminal.screen()) and first.startswith("steps    16 rows ")
    assert rest[0].startswith(" " * 9) and rest[0][9] != " "
    assert " ".join(terminal.getvalue().split()) == " ".join(plain.getvalue().split()), "no word is broken"
    assert plain.getvalue().splitlines()[0] == f"steps    {text}", "a file's lines are whole"


def test_a_word_that_is_wider_than_the_terminal_stays_whole() -> None:
    with Console(True, terminal := Terminal()) as console:
        console.print(f"checkpoint saved in /{'x' * 100} and so on")
    assert f"/{'x' * 100}" in [line.strip() for line in terminal.screen()]


def test_in_a_file_progress_is_a_line_after_ten_seconds_without_one() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(True, stream, clock)
    with console, track("evaluating batch", 100) as task:
        for done in range(1, 101):
            clock.seconds += 1.0
            if done == 24:
                console.print("a line")
            task.add()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "evaluating batch 10/100  left 1:30  elapsed 0:10"
    numbers = [int(line.split()[2].split("/")[0]) for line in lines if line.startswith("evaluating")]
    assert numbers == [10, 20, 34, 44, 54, 64, 74, 84, 94]


def test_other_ranks_say_and_keep_nothing(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(False, stream) as console:
        console.keep_log(tmp_path / "train.log")
        console.print("one")
        console.progress("step", 1, 1, [], is_edge=True)
        console.log("error")
        with console.watched(lambda: "work"):
            pass
    assert stream.getvalue() == "" and not list(tmp_path.iterdir())


# --- silence ----------------------------------------------------------------------------------------------------------


def test_work_that_takes_long_is_named_every_ten_seconds() -> None:
    stream, clock, doing = io.StringIO(), Clock(), ["loading x"]
    console = Console(True, stream, clock)
    silence = Silence(console, lambda: doing[0])
    for second in range(45):
        clock.seconds = float(second)
        if second == 25:
            doing[0] = "saving step 4"
        silence.look()
    assert stream.getvalue().splitlines() == [
        "... loading x: 0:10", "... loading x: 0:20", "... saving step 4: 0:05", "... saving step 4: 0:15",
    ]  # fmt: skip


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
@pytest.mark.parametrize("seed", range(10))
def test_there_is_silence_only_where_nothing_was_shown(seed: int, stream: type[io.StringIO]) -> None:
    """Lines, states of the progress that are drawn, and records of a log: each is a sign of life."""
    shown, clock, rng = stream(), Clock(), random.Random(seed)
    console = Console(True, shown, clock)
    silence, last = Silence(console, lambda: "work"), 0.0
    for number in range(60):
        clock.seconds += rng.uniform(0.0, PLAIN_SECONDS)
        before = shown.getvalue()
        if (kind := rng.choice(["line", "progress", "record", "nothing"])) == "line":
            console.print("a line")
        elif kind == "progress":
            console.progress("step", number + 1, 100, [])
        elif kind == "record":
            console._make_way(logging.makeLogRecord({}))
        if kind == "record" or shown.getvalue() != before:
            last = clock.seconds
        before = shown.getvalue()
        silence.look()
        is_silent = clock.seconds - last >= PLAIN_SECONDS
        assert ("... work" in shown.getvalue()[len(before) :]) == is_silent
        last = clock.seconds if is_silent else last


def test_silence_is_broken_while_the_main_thread_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "LOOK_SECONDS", 0.001)
    clock, said = Clock(), threading.Event()

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            said.set()
            return super().write(text)

    stream = Stream()
    with Console(True, stream, clock) as console, console.watched(lambda: "work"):
        clock.seconds = 11.0
        assert said.wait(60), "nobody spoke"
    assert "... work: " in stream.getvalue()


# --- train.log --------------------------------------------------------------------------------------------------------


def test_the_log_has_what_was_said_before_it_was_there_and_grows_over_starts(tmp_path: Path) -> None:
    path, clock = tmp_path / "train.log", Clock()
    for start in (1, 2):
        terminal = Terminal()
        with Console(True, terminal, clock) as console:
            console.print("\x1b[31mfirst", "machine")
            console.keep_log(path)
            for step in range(1, 31):
                clock.seconds += 1.0
                console.progress("step", step, 30, FIELDS[:1], is_edge=step in (1, 30))
            console.print("finished " + "words " * 20)
            console.log(f"error: {start}")
            assert path.read_text().endswith(f"error: {start}\n"), "a run that is killed has said it"
    lines = path.read_text().splitlines()
    assert len(lines) == 16
    assert re.fullmatch(r"--- \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ---", lines[0])
    steps = [f"step {step}/30  loss 1.2345" for step in (1, 11, 21, 30)]
    said = ["machine  \\x1b[31mfirst", *steps, "finished " + "words " * 20]
    assert lines[1:8] == [*said, "error: 1"] and lines[9:] == [*said, "error: 2"]


def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Console(True, stream) as console:
        console.keep_log(tmp_path / "missing" / "train.log")
        console.print("on it goes")
    first, second = stream.getvalue().splitlines()
    assert re.fullmatch(
        r"train\.log cannot be written \(No such file or directory\): the run goes on without it", first
    )
    assert second == "on it goes"


def test_times_and_counts_read_as_one_would_say_them() -> None:
    assert [format_seconds(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
    assert [about(s) for s in (0.2, 40.4, 190, 7300)] == ["under a second", "40 s", "3 minutes", "2.0 hours"]
    assert [count(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]


def test_a_time_that_is_said_is_the_nearest_second_and_a_rough_one_is_not_far_off() -> None:
    rng = random.Random(0)
    units = {"s": 1, "minutes": 60, "hours": 3600}
    for _ in range(2000):
        seconds = 10 ** rng.uniform(0, 6)
        parts = [int(part) for part in format_seconds(seconds).split(":")]
        assert len(parts) in (2, 3) and all(part < 60 for part in parts[1:]) and (len(parts) == 2 or parts[0] > 0)
        assert abs(sum(part * 60**i for i, part in enumerate(reversed(parts))) - seconds) <= 0.5
        number, unit = about(seconds).split()
        assert abs(float(number) * units[unit] - seconds) <= max(0.5, 0.21 * seconds)
