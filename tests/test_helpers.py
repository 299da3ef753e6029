"""What the tests themselves stand on, where it differs on a GPU machine."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
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


@pytest.fixture(scope="module")
def mutation():
    path = ROOT / "tests" / "mutation" / "run.py"
    spec = importlib.util.spec_from_file_location("mutation_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_list_of_mutants_fits_the_package(mutation):
    """Each change has its place in the code just once, and the tests that should notice it are there."""
    assert len(mutation.read_mutants()) >= 500


def test_of_the_mutants_that_were_tried_few_survive(mutation):
    survived, caught, real = mutation.score(mutation.read_mutants(), mutation.read_results())
    assert real >= 200 and caught >= 0.95 * real, [mutant.id for mutant in survived]
