"""`qlora-dist import` on the command line."""

from __future__ import annotations

import pytest
import yaml

from qlora_dist.commands import invoke
from qlora_dist.config import load_config

THEIRS = {
    "base_model": "a/b", "adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_alpha": 16,
    "lora_target_linear": True, "datasets": [{"path": "c/d", "type": "alpaca"}], "learning_rate": 1e-4,
    "micro_batch_size": 2, "mystery": "\x1b]0;title",
}  # fmt: skip


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(THEIRS))
    return path


def test_a_file_is_written_with_a_report_and_never_replaced(theirs, tmp_path, capsys):
    out = tmp_path / "new" / "run.yaml"
    assert invoke(["import", str(theirs), "--gpus", "4", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert not said.err
    assert (
        "A config of Axolotl, for 4 GPUs" in said.out and "  mystery: \\x1b]0;title: this key is not known" in said.out
    )
    config = load_config(out)
    assert (config.model.name, config.batch.rows_per_step, config.optim.schedule) == ("a/b", 8, "cosine")
    out.write_text("mine")
    assert invoke(["import", str(theirs), "--out", str(out)]) == 2
    assert "exists already, and is not replaced" in capsys.readouterr().err and out.read_text() == "mine"


def test_without_out_the_config_is_on_stdout_and_the_report_beside_it(theirs, tmp_path, capsys):
    assert invoke(["import", str(theirs), "--from", "axolotl", "--set", "seed=5"]) == 0
    said = capsys.readouterr()
    (tmp_path / "run.yaml").write_text(said.out)
    assert load_config(tmp_path / "run.yaml").seed == 5
    assert "Not translated:" in said.err and "Translated:" not in said.out


def test_a_mistake_is_one_paragraph(theirs, tmp_path, capsys):
    assert invoke(["import", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml: cannot be read" in capsys.readouterr().err
    assert invoke(["import", str(theirs), "--set", "lora.rnk=3"]) == 2
    assert "lora.rnk: unknown key; did you mean rank?" in capsys.readouterr().err
