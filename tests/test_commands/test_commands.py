"""What a user types: every mistake has its own message and exit code 2, before the model is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.tiny_run import changed, losses_of, make_inputs, metrics_of, write_config

from qlora_dist import commands as cli
from qlora_dist.train import setup_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def raw(inputs, tmp_path):
    return changed(inputs, run_dir=str(tmp_path / "run"))


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that reads weights."""

    def refuse(*_, **__):
        raise AssertionError("the model was read")

    monkeypatch.setattr(setup_model, "load_base", refuse)


def _fails(capsys, config: Path, *arguments: str) -> str:
    """Runs `train`, which must end with exit code 2; returns its message."""
    assert cli.invoke(["train", str(config), *arguments]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def _data(tmp_path, content: str, name: str = "data.json") -> list[dict[str, str]]:
    (tmp_path / name).write_text(content)
    return [{"path": str(tmp_path / name)}]


ROW = '{"input": "w6 w7", "output": "w8"}'


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"optim__lrr": 1}, ["optim.lrr: unknown key; did you mean lr?"]),
        ({"data__train": [{"path": "nowhere/data.json"}]}, ["nowhere/data.json", "no such file"]),
        ({"batch__rows_per_step": 5, "batch__micro_rows": 2}, ["nearest multiples: 4 or 6"]),
        ({"lora__target_modules": ["q_proj", "no_such"]}, ["no_such", "q_proj", "down_proj"]),
        ({"model__name": "./nowhere"}, ["model.name /", "nowhere: there is no such folder"]),
    ],
    ids=["unknown key", "missing data", "batch", "targets", "missing model"],
)
def test_a_wrong_value_is_explained(raw, tmp_path, capsys, changes, messages):
    error = _fails(capsys, write_config(tmp_path / "c.yaml", raw, **changes))
    for message in messages:
        assert message in error


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "name", "messages"),
    [
        ("[]", "data.json", ["empty"]),
        (f"{ROW}\n{{broken\n{ROW}\n", "data.jsonl", ["data.jsonl", "line 2"]),
        ('[{"instruction": 5, "output": "w8"}]', "data.json", ["instruction"]),
        ('[{"colour": "red"}]', "data.json", ["colour"]),
        ("not a table", "data.xyz", ["data.xyz"]),
    ],
    ids=["empty", "corrupt line", "wrong type", "unknown columns", "unknown kind of file"],
)
def test_bad_data_is_explained(raw, tmp_path, capsys, content, name, messages):
    error = _fails(capsys, write_config(tmp_path / "c.yaml", raw, data__train=_data(tmp_path, content, name)))
    for message in messages:
        assert message in error


@pytest.mark.usefixtures("no_model")
def test_all_examples_too_long_is_explained(raw, tmp_path, capsys):
    long = json.dumps([{"input": "w6 " * 20, "output": "w7 " * 50}])
    config = write_config(
        tmp_path / "c.yaml", raw, data__train=_data(tmp_path, long), data__on_long="drop", data__row_tokens=32
    )
    error = _fails(capsys, config)
    assert "row_tokens" in error and "32" in error


def test_a_corrupt_line_is_counted_when_skipping_is_configured(raw, tmp_path, capsys):
    data = _data(tmp_path, f"{ROW}\n{{broken\n" + f"{ROW}\n" * 8, "data.jsonl")
    config = write_config(tmp_path / "c.yaml", raw, data__train=data, data__on_bad="skip", batch__rows_per_step=1)
    assert cli.invoke(["train", str(config)]) == 0
    assert "bad 1" in capsys.readouterr().out
    assert json.loads((Path(raw["run_dir"]) / "summary.json").read_text())["bad"] == 1


def test_a_run_directory_of_another_config_or_another_use_is_refused(raw, tmp_path, capsys, no_model):
    run = Path(raw["run_dir"])
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    error = _fails(capsys, write_config(tmp_path / "c.yaml", raw))
    assert "is not empty but holds no run" in error and "notes.txt" in error
    (run / "notes.txt").unlink()
    from qlora_dist.config import dump_yaml, load_config

    config = write_config(tmp_path / "c.yaml", raw)
    (run / "config.yaml").write_text(dump_yaml(load_config(config)))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    error = _fails(capsys, config, "--set", "optim.lr=0.5", "--set", "lora.rank=2")
    assert "holds a run with a different config" in error
    assert "lora.rank: was 4, now 2" in error and "optim.lr: was 0.01, now 0.5" in error


def test_a_corrupt_checkpoint_is_rejected_with_its_reason(raw, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", raw, train__save_every=2, train__steps=4)
    assert cli.invoke(["train", str(config)]) == 0
    run = Path(raw["run_dir"])
    whole = losses_of(run)
    (run / "completed").unlink()
    newest = run / "checkpoints" / "step-00000004" / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    capsys.readouterr()
    # auto takes the one before and says why
    assert cli.invoke(["train", str(config)]) == 0
    said = capsys.readouterr().out
    assert "rejected step-00000004: optimizer.safetensors has" in said and "resuming from" in said
    assert losses_of(run) == whole
    # named, it is an error
    (run / "completed").unlink()
    newest.write_bytes(newest.read_bytes()[:-8])
    assert "optimizer.safetensors has" in _fails(capsys, config, "--resume", str(newest.parent))
    assert "--resume never, but" in _fails(capsys, config, "--resume", "never")
    # all of them damaged: nothing is started over silently
    for file in run.glob("checkpoints/step-*/state.json"):
        file.write_text("{}")
    assert "no checkpoint can be used" in _fails(capsys, config)


def test_changed_data_are_not_continued(raw, tmp_path, capsys):
    data = tmp_path / "own.json"
    rows = [{"input": "w6 w7", "output": f"w{i}"} for i in range(10, 40)]
    data.write_text(json.dumps(rows))
    config = write_config(tmp_path / "c.yaml", raw, data__train=[{"path": str(data)}], train__steps=2)
    assert cli.invoke(["train", str(config)]) == 0
    (Path(raw["run_dir"]) / "completed").unlink()
    data.write_text(json.dumps(rows[1:]))
    assert "was made with other training data" in _fails(capsys, config)


def test_the_same_command_extends_a_run_with_a_constant_rate_and_refuses_with_a_schedule(raw, tmp_path, capsys):
    config = write_config(tmp_path / "c.yaml", raw, train__steps=2)
    assert cli.invoke(["train", str(config)]) == 0
    assert cli.invoke(["train", str(config), "--set", "train.steps=4"]) == 0
    assert [m["step"] for m in metrics_of(raw["run_dir"])] == [1, 2, 3, 4]
    cosine = write_config(tmp_path / "d.yaml", raw, run_dir=str(tmp_path / "cosine"), optim__schedule="cosine")
    assert cli.invoke(["train", str(cosine)]) == 0
    assert "train.steps: was 5, now 7" in _fails(capsys, cosine, "--set", "train.steps=7")


@pytest.mark.parametrize("command", ["train", "data", "verify", "evaluate", "generate", "merge", "schema", "doctor"])
def test_every_command_has_help_with_an_example(command, capsys):
    assert cli.invoke([command, "--help"]) == 0
    assert "Example:" in capsys.readouterr().out


def test_schema_is_json_and_names_the_sections(capsys):
    assert cli.invoke(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert {"run_dir", "model", "lora", "data", "optim"} <= schema["properties"].keys()


def test_evaluate_holds_out_what_the_run_held_out(raw, tmp_path, capsys):
    source = {**raw["data"]["train"][0], "hold_out": 0.3}
    config = write_config(tmp_path / "c.yaml", raw, seed=3, data__train=[source], data__eval=[], train__steps=2)
    assert cli.invoke(["train", str(config)]) == 0
    expected = metrics_of(raw["run_dir"])[-1]["eval_loss"]
    capsys.readouterr()
    assert cli.invoke(["evaluate", raw["run_dir"], "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["trained"]["held_out"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_after_training_a_run_is_evaluated_generated_from_and_merged(raw, tmp_path, capsys):
    held_out = str(Path(raw["data"]["train"][0]["path"]).with_name("held_out.json"))
    config = write_config(
        tmp_path / "c.yaml", raw, data__eval=[{"path": held_out, "format": "input-output"}], train__steps=30
    )
    assert cli.invoke(["train", str(config)]) == 0
    summary = json.loads((Path(raw["run_dir"]) / "summary.json").read_text())
    capsys.readouterr()
    assert cli.invoke(["evaluate", raw["run_dir"], "--with-base", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    # other rows in other micro-batches: sums in another order
    assert results["trained"]["held_out"]["loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    assert results["base"]["held_out"]["loss"] == pytest.approx(summary["eval_loss_start"], rel=1e-5)
    assert cli.invoke(["generate", raw["run_dir"], "--prompt", "w20 w21 w22", "--max-new-tokens", "4"]) == 0
    assert "w6" in capsys.readouterr().out
    assert cli.invoke(["merge", raw["run_dir"], str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "its logits differ" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_start_that_is_refused_leaves_nothing_and_the_corrected_one_begins(raw, tmp_path, capsys):
    run = Path(raw["run_dir"])
    _fails(capsys, write_config(tmp_path / "c.yaml", raw, lora__target_modules=["no_such"]))
    assert not run.exists()
    assert cli.invoke(["train", str(write_config(tmp_path / "c.yaml", raw, train__steps=1))]) == 0
    assert "is replaced" not in capsys.readouterr().err


def test_fresh_renames_a_run_and_begins_anew(raw, tmp_path, capsys):
    run = Path(raw["run_dir"])
    first, second = (write_config(tmp_path / f"{n}.yaml", raw, train__steps=1, lora__rank=n) for n in (4, 2))
    assert cli.invoke(["train", str(first)]) == 0
    assert "lora.rank: was 4, now 2\n" in _fails(capsys, second)
    assert "give one of the two" in _fails(capsys, second, "--fresh", "--resume", str(run / "checkpoints"))
    assert cli.invoke(["train", str(second), "--fresh"]) == 0
    (aside,) = (path for path in run.parent.iterdir() if path.name.startswith("run."))
    assert f"is now in {aside}" in capsys.readouterr().out
    for folder, rank in ((aside, 4), (run, 2)):
        assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == rank
        assert (folder / "completed").is_file()
