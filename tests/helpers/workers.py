"""pytest --workers N: runs whole files on N processes, forked from pytest's own after it has collected all tests.

What every worker needs is so imported, rewritten and collected once, not once a worker: a quarter of a minute of CPU
time each. A file's tests stay together and in order; a file goes to the next free worker. If a worker dies, the test
that it ran has failed, and another takes the rest of the file.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Iterator
from itertools import groupby
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import pytest
import torch

from helpers.ranks import leave_fork_server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--workers", type=int, default=0, metavar="N", help="run the files on N forked processes")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.workers and torch.cuda.is_available():
        raise pytest.UsageError("--workers forks, which CUDA does not survive: set CUDA_VISIBLE_DEVICES= (empty)")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    options = session.config.option
    if (
        not options.workers
        or options.collectonly
        or (session.testsfailed and not options.continue_on_collection_errors)
    ):
        return None  # pytest's own loop
    session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]  # one for all
    _Controller(session, options.workers).run()
    return True


class _Worker:
    def __init__(self, process: int, items: deque[pytest.Item]) -> None:
        self.process = process
        self.items = items  # of its file: the one that it runs, and those that follow


class _Controller:
    def __init__(self, session: pytest.Session, num_workers: int) -> None:
        self._session, self._num_workers = session, num_workers
        self._files = deque(deque(items) for _, items in groupby(session.items, key=lambda item: item.path))
        self._workers: dict[Connection, _Worker] = {}
        self._num_forked = 0

    def run(self) -> None:
        try:
            for _ in range(min(self._num_workers, len(self._files))):
                self._fork()
            while self._workers:
                for connection in wait(list(self._workers)):
                    assert isinstance(connection, Connection)
                    try:
                        kind, value = connection.recv()
                    except (EOFError, ConnectionResetError):
                        self._ended(connection)
                    else:
                        getattr(self, f"_{kind}")(connection, value)
                if self._session.shouldfail:
                    raise self._session.Failed(self._session.shouldfail)
                if self._session.shouldstop:
                    raise self._session.Interrupted(self._session.shouldstop)
        finally:
            for worker in self._workers.values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process, signal.SIGINT)  # what its fixtures have started ends, too
            for worker in self._workers.values():
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(worker.process, 0)

    def _fork(self) -> None:
        here, there = Pipe()
        self._num_forked += 1
        process = os.fork()
        if process == 0:
            here.close()
            _work(self._session, there, self._num_forked)
        there.close()
        self._workers[here] = _Worker(process, deque())
        self._give(here)

    def _give(self, connection: Connection) -> None:
        """The next file, if there is one."""
        items = self._files.popleft() if self._files else deque()
        self._workers[connection].items = items
        with contextlib.suppress(BrokenPipeError):  # it has died: `_ended`
            connection.send([item.nodeid for item in items])

    def _report(self, connection: Connection, data: dict[str, Any]) -> None:
        hook = self._session.config.hook
        hook.pytest_runtest_logreport(
            report=hook.pytest_report_from_serializable(config=self._session.config, data=data)
        )

    def _finished(self, connection: Connection, nodeid: str) -> None:
        items = self._workers[connection].items
        item = items.popleft()
        assert item.nodeid == nodeid
        self._session.config.hook.pytest_runtest_logfinish(nodeid=nodeid, location=item.location)
        if not items:
            self._give(connection)

    def _ended(self, connection: Connection) -> None:
        worker = self._workers.pop(connection)
        _, status = os.waitpid(worker.process, 0)
        if not worker.items:
            return
        item = worker.items.popleft()
        code = os.waitstatus_to_exitcode(status)
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        report = pytest.TestReport(
            item.nodeid, item.location, {}, "failed", f"its worker ended in this test: {reason}", "call"
        )
        self._session.config.hook.pytest_runtest_logreport(report=report)
        if worker.items:
            self._files.appendleft(worker.items)
        if self._files:
            self._fork()


# --- a worker ---------------------------------------------------------------------------------------------------------


class _Reporter:
    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self._config, self._connection = config, connection

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._connection.send(("report", data))


def _work(session: pytest.Session, connection: Connection, number: int) -> None:
    """Runs the files that it is given, and does not return."""
    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process inherits that it is ignored
    try:
        with _own(session.config, connection, number), contextlib.suppress(KeyboardInterrupt):
            items = {item.nodeid: item for item in session.items}
            while names := connection.recv():
                file = [items[name] for name in names]
                for item, following in zip(file, [*file[1:], None], strict=True):
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                    connection.send(("finished", item.nodeid))
            code = 0
    finally:
        with contextlib.suppress(BaseException):
            session._setupstate.teardown_exact(None)
        os._exit(code)


@contextlib.contextmanager
def _own(config: pytest.Config, connection: Connection, number: int) -> Iterator[None]:
    """What a worker must not share: captured output, folder, terminal, and processes that are not its children."""
    captured: Any = config.pluginmanager.getplugin("capturemanager")
    captured.stop_global_capturing()
    captured.start_global_capturing()
    captured.suspend_global_capture(in_=True)
    factory: Any = config._tmp_path_factory  # type: ignore[attr-defined]
    factory._basetemp = factory.getbasetemp() / f"worker{number}"
    factory._basetemp.mkdir()
    config.pluginmanager.unregister(name="terminalreporter")
    config.pluginmanager.register(_Reporter(config, connection))
    leave_fork_server()
    yield
