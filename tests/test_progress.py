"""Long work says how far it is: in one place, on one line of a terminal, and libraries draw nothing beside it."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers.documents import ALPACA, build, write
from helpers.terminal import Clock, Terminal
from helpers.tiny_models import save_model

from qlora_dist import progress
from qlora_dist.cluster.quiet import LIBRARIES, quiet_libraries
from qlora_dist.config import SourceConfig
from qlora_dist.console import Console
from qlora_dist.data.packing import pack_best_fit
from qlora_dist.files import GIB
from qlora_dist.progress import each, followed, track


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def said_by(stream: io.StringIO) -> list[str]:
    return [line.split("  ")[0] for line in stream.getvalue().splitlines()]


def test_a_task_is_one_line_of_a_terminal_that_makes_way_at_its_end() -> None:
    terminal = Terminal()
    with Console(True, terminal, Clock(0.2)) as console:
        with track("downloading meta-llama/Llama-2-70b-hf", 100 * GIB, "bytes") as task:
            for _ in range(10):
                task.add(10 * GIB)
        assert terminal.screen() == [""], "its line is gone before anything else is said"
        console.print("done")
    assert terminal.screen() == ["done", ""]
    states = [state for state in terminal.states() if state != "done"]
    assert len(states) == 10 and all(len(state) < 80 for state in states)
    assert states[4].startswith("downloading meta-llama/Llama-2-70b-hf 50.00 GiB/100.00 GiB")
    assert states[4].endswith("  left 0:02"), "what is left matters more than what has elapsed"


def test_work_without_a_known_total_counts_and_promises_no_end() -> None:
    terminal = Terminal()
    with Console(True, terminal, Clock(1.0)), track("tokenizing record") as task:
        task.add(1234)
    (state,) = terminal.states()
    assert state.startswith("tokenizing record 1,234  elapsed 0:0") and "left" not in state and "━" not in state


def test_a_short_task_says_nothing_and_a_long_one_a_line_every_ten_seconds() -> None:
    for seconds, expected in ((9, []), (35, ["quantizing 29%", "quantizing 57%", "quantizing 86%"])):
        clock = Clock()
        with Console(True, said := io.StringIO(), clock), track("quantizing", seconds, "share") as task:
            for _ in range(seconds):
                clock.seconds += 1.0
                task.add()
        assert said_by(said) == expected


def test_the_newest_place_shows_it_and_without_one_nothing_happens() -> None:
    outer, inner = io.StringIO(), io.StringIO()
    assert list(each([1, 2], "merging layer")) == [1, 2]
    with Console(True, outer, Clock(10.0)):
        with Console(True, inner, Clock(10.0)):
            assert list(each([1, 2], "merging layer")) == [1, 2]
        assert list(each([1], "evaluating batch")) == [1]
    assert (said_by(inner), said_by(outer)) == (["merging layer 1/2", "merging layer 2/2"], ["evaluating batch 1/1"])
    with Console(False, silent := io.StringIO(), Clock(10.0)):  # a rank other than 0
        list(each([1], "evaluating batch"))
    assert silent.getvalue() == "" and progress._places == []


def test_work_of_other_processes_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.001)
    seen, looked = io.StringIO(), threading.Event()

    def count() -> int:
        looked.set()
        return 7

    with Console(True, seen, Clock(10.0)), track("tokenizing record", 10) as task, followed(task, count):
        assert looked.wait(60)
    assert set(said_by(seen)) <= {"tokenizing record 7/10"} and task.done == 7


# --- who tells --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_tokenizing_counts_its_records(tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TELL_SECONDS", 0.001)
    path = write(tmp_path / "data.jsonl", ALPACA)
    with Console(True, said := io.StringIO(), Clock(10.0)):
        build(tmp_path, SourceConfig(path=path), num_workers=num_workers)
    lines = said_by(said)
    assert lines[-1] == "tokenizing record 40"
    if num_workers > 1:
        assert "tokenizing record 40/40" in lines, "what the workers have done is not known"


def test_packing_counts_its_documents() -> None:
    with Console(True, said := io.StringIO(), Clock(10.0)):
        pack_best_fit(np.array([5, 3, 7, 8, 2]), 10, 0)
    lines = said_by(said)
    assert len(lines) > 1 and lines[-1] == "packing document 5/5"


# --- libraries --------------------------------------------------------------------------------------------------------


def bars() -> list[bool]:
    import datasets
    import huggingface_hub.utils as hub
    from transformers.utils import logging as transformers_logging

    return [
        transformers_logging.is_progress_bar_enabled(),
        not hub.are_progress_bars_disabled(),
        not datasets.utils.are_progress_bars_disabled(),
    ]


def test_libraries_are_quiet_inside_and_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    bars()  # imports them
    monkeypatch.setenv("DATASETS_VERBOSITY", "info")
    levels, environment, drawn = [logging.getLogger(name).level for name in LIBRARIES], dict(os.environ), bars()
    logging.getLogger("transformers").setLevel(logging.INFO)
    try:
        with pytest.raises(KeyError), quiet_libraries():
            assert bars() == [False, False, False]
            assert not logging.getLogger("transformers.modeling_utils").isEnabledFor(logging.WARNING)
            assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
            assert os.environ["DATASETS_VERBOSITY"] == "info", "what the user has set counts"
            raise KeyError
        assert logging.getLogger("transformers").level == logging.INFO
    finally:
        logging.getLogger("transformers").setLevel(levels[0])
    assert [logging.getLogger(name).level for name in LIBRARIES] == levels
    assert (dict(os.environ), bars()) == (environment, drawn) and True in drawn


# --- a download -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A hub on this machine with one model, `tiny/model`; its client's cache is empty. Gives the model's folder."""
    folder = save_model(tmp_path / "served")

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            headers, name = {}, self.path.split("?")[0].split("/")[-1]
            if "/tree/" in self.path:
                listed = [(file.name, file.stat().st_size) for file in sorted(folder.iterdir())]
                tree = [{"type": "file", "path": file, "size": size, "oid": "b" * 40} for file, size in listed]
                content = json.dumps(tree).encode()
            elif "/api/" in self.path:
                files = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                content = json.dumps({"id": "tiny/model", "sha": "a" * 40, "siblings": files}).encode()
            elif (folder / name).is_file():
                content = (folder / name).read_bytes()
                headers = {"X-Repo-Commit": "a" * 40, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            else:
                headers, content = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "a" * 40}, b""
            self.send_response(404 if "X-Error-Code" in headers else 200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from huggingface_hub import constants

    address = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "HF_HUB_OFFLINE": False, "ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    yield folder
    server.shutdown()
    server.server_close()


def test_a_download_tells_its_bytes_and_the_client_draws_nothing(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from qlora_dist.model.weights import download

    monkeypatch.setattr(progress, "TELL_SECONDS", 0.0)
    with quiet_libraries(), Console(True, said := io.StringIO(), Clock(10.0)):
        download.fetch("tiny/model", None, ["model.safetensors"])
    size = progress.format_bytes((hub / "model.safetensors").stat().st_size)
    assert said_by(said)[-1] == f"downloading tiny/model {size}/{size}"
    assert capfd.readouterr().err == "" and "tqdm" in sys.modules
