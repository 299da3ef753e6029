"""What tests of a run share."""

from __future__ import annotations

import pytest
from helpers.tiny_run import changed, make_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    """A run of two steps."""
    return changed(inputs, run_dir=str(tmp_path / "run"), train__steps=2)


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that reads weights."""

    def refuse(*_, **__):
        raise AssertionError("the model was read")

    monkeypatch.setattr("qlora_dist.train.setup_model.load_base", refuse)
