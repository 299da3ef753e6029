"""What the tests themselves stand on, where it differs on a GPU machine."""

from __future__ import annotations

import os

import torch
from helpers.ranks import ROOT, process_context, python_path


def test_child_interpreters_keep_what_was_on_the_path(monkeypatch):
    """Libraries that a machine has on PYTHONPATH, and nowhere else, must be found by children too."""
    monkeypatch.setenv("PYTHONPATH", f"/somewhere/site{os.pathsep}{ROOT}")
    assert python_path().split(os.pathsep) == [str(ROOT), str(ROOT / "tests"), "/somewhere/site"]


def test_processes_are_not_forked_where_there_is_a_cuda_device(monkeypatch):
    """The fork server's imports ask for the device, and CUDA refuses every process that is forked after that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_context().get_start_method() == "spawn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert process_context().get_start_method() == "forkserver"
