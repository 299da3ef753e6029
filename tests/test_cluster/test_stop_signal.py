"""A stop signal is heard from the first import on, however often it comes, and never kills a run that saves."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from helpers.ranks import run_python

from qlora_dist.cluster.stop_signal import LAUNCHER_ENDED, STOP_SIGNALS, StopRequested, StopSignal


@pytest.fixture(autouse=True)
def hangup_is_not_ignored():
    """As it is for a command started from a terminal, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_a_flag_with_its_name(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and stop.name == number.name
    assert signal.getsignal(number) == before


def test_the_second_sigterm_changes_nothing_and_it_is_the_last_word():
    with StopSignal() as stop:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert stop.name == "SIGTERM"


def test_a_stop_can_be_requested_from_a_thread_and_says_why():
    with StopSignal() as stop:
        thread = threading.Thread(target=stop.request, args=(LAUNCHER_ENDED,))
        with pytest.raises(StopRequested), stop.interrupting():
            thread.start()
            thread.join(10)
            threading.Event().wait(30)
        assert stop.name == LAUNCHER_ENDED
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGTERM"


def test_under_nohup_a_closed_terminal_does_not_stop_the_run():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_after_its_terminal_was_closed_a_run_can_still_print_and_save(tmp_path):
    code = """
    import os, pty, signal, sys, time
    from qlora_dist.cluster.stop_signal import StopSignal
    child, terminal = pty.fork()  # the child's output and controlling terminal
    if child:
        os.read(terminal, 10)
        os.close(terminal)  # the terminal is closed: SIGHUP
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    with StopSignal() as stop:
        print("ready", flush=True)
        deadline = time.monotonic() + 30
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        print("this goes nowhere", flush=True)
        open(sys.argv[1], "w").write(stop.name)
    os._exit(0)
    """
    run_python(code, str(tmp_path / "saved"))
    assert (tmp_path / "saved").read_text() == "SIGHUP"


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignal():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_work_that_can_be_thrown_away_is_broken_off_once_and_other_work_is_not():
    with StopSignal() as stop:
        with pytest.raises(StopRequested), stop.interrupting():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # what cleans up is not broken off
                cleaned_up = True
        assert cleaned_up
        os.kill(os.getpid(), signal.SIGTERM)  # outside: a flag
        with pytest.raises(StopRequested), stop.interrupting():
            pytest.fail("a signal that came before was not heard")


def test_a_signal_before_the_heavy_imports_is_heard_though_the_launcher_ignored_it():
    code = """
    import os, runpy, signal, sys
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as torchrun's workers inherit it
    sys.argv = ["qlora_dist", "train", "--help"]
    import qlora_dist.commands as cli
    def main():
        os.kill(os.getpid(), signal.SIGUSR1)  # long before a StopSignal is there
        from qlora_dist.cluster.stop_signal import StopSignal
        with StopSignal() as stop:
            print(stop.name, "torch" in sys.modules)
    cli.main = main
    runpy.run_module("qlora_dist", run_name="__main__")
    """
    assert run_python(code).stdout == "SIGUSR1 False\n"


def test_after_a_failure_sigterm_ends_the_process_again():
    code = """
    import os, signal
    from qlora_dist.cluster.stop_signal import StopSignal, listen
    listen()
    try:
        with StopSignal():
            raise ValueError
    except ValueError:
        os.kill(os.getpid(), signal.SIGTERM)
    print("alive")
    """
    done = run_python(code, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_a_forked_worker_is_ended_by_a_signal_as_if_nobody_listened():
    with StopSignal() as stop:
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(worker, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not stop.requested
