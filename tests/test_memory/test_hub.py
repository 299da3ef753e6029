"""A model's config.json from the hub: what takes long says so."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import huggingface_hub
import pytest

from qlora_dist import console
from qlora_dist.errors import UserError
from qlora_dist.memory.read_shapes import read_config_json


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_hub_that_does_not_answer_is_not_waited_for_in_silence(
    rank: int, is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))

    def slow(name: str, file: str, revision: str | None = None) -> str:
        end = time.monotonic() + (20.0 if rank == 0 else 0.2)
        while "asking the hub for some/model" not in said.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        if not is_there:
            raise OSError("no route to host")
        return str(tmp_path / file)

    monkeypatch.setattr("sys.stderr", said)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", slow)
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.05)
    monkeypatch.setattr(console, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    if is_there:
        assert read_config_json("some/model")["model_type"] == "llama"
    else:
        with pytest.raises(UserError, match="could not be downloaded"):
            read_config_json("some/model")
    assert ("... asking the hub for some/model: 0:00" in said.getvalue()) == (rank == 0)
