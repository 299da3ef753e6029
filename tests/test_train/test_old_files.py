"""What commit b1dc400 wrote is still read: a finished run, a run stopped half way, adapters, checkpoints, both caches.

tests/data/b1dc400 holds the files and says how they were made. Everything goes through the command line, in a copy of
them that is the current folder: all paths in them are relative.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_run import metrics_of
from safetensors.torch import load_file

from qlora_dist.commands import invoke

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what is recorded was computed on a CPU; hide the GPUs (CUDA_VISIBLE_DEVICES=)"
)

OLD = Path(__file__).parents[1] / "data" / "b1dc400"
TRAIN = ["train", "config.yaml"]
HALF = Path("run/checkpoints/step-00000002")
LAST = Path("run/checkpoints/step-00000004")
ADAPTER, OPTIMIZER = "adapter_model.safetensors", "optimizer.safetensors"

# Two processes on one kind of processor give the same bits; other kinds add in another order. With torch and MKL held
# to SSE or AVX2 on the processor that made the files, the last loss moves by 1e-7 of itself, weights by 4e-7 and
# Adam's states by 2e-6 (L2). A resume that loses Adam's states moves the weights by more than 0.1.
SAME_LOSS, SAME_TENSORS = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")


def _stop_half_way() -> None:
    """Leaves of the run what was there after its second step."""
    shutil.rmtree("run")
    shutil.copytree(OLD / HALF, HALF)
    for name in ("config.yaml", "eval_start.json"):
        shutil.copy(OLD / "run" / name, "run")
    lines = (OLD / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_text("".join(lines[:2]))


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)


def _content(folder: str | Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file below a folder, but for locks."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _distance(old_file: Path, new_file: Path) -> float:
    """Relative L2 distance of two files' tensors, whose names, types and shapes must be equal."""
    old, new = load_file(old_file), load_file(new_file)
    assert {key: (t.dtype, t.shape) for key, t in new.items()} == {key: (t.dtype, t.shape) for key, t in old.items()}
    left, right = (torch.cat([tensors[key].flatten().double() for key in sorted(old)]) for tensors in (old, new))
    return float((left - right).norm() / left.norm())


def _json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text())


def _assert_ended_as_recorded() -> None:
    old_lines, new_lines = metrics_of(OLD / "run"), metrics_of("run")
    assert len(old_lines) == 4
    for old, new in zip(old_lines, new_lines, strict=True):
        assert old.keys() <= new.keys()
        for key in ("step", "epoch", "lr", "tokens", "num_labels"):
            assert new[key] == old[key], key
        for key in {"loss", "grad_norm", "eval_loss"} & old.keys():
            assert new[key] == pytest.approx(old[key], rel=SAME_LOSS), key
    for file in (f"run/adapter/{ADAPTER}", LAST / ADAPTER, LAST / OPTIMIZER):
        assert _distance(OLD / file, Path(file)) < SAME_TENSORS, file
    old, new = _json(OLD / "run/summary.json"), _json("run/summary.json")
    for key in ("step", "total_tokens", "total_labels", "eval_loss_start", "trainable_parameters", "base_parameters"):
        assert new[key] == old[key], key


# --- train ------------------------------------------------------------------------------------------------------------


def _made_cache() -> Path:
    """The tokenized data made here: their name holds the version of the code that makes tokens and masks."""
    (made,) = {path.name for path in Path("cache").iterdir() if path.is_dir()} - {
        path.name for path in (OLD / "cache").iterdir()
    }
    return Path("cache") / made


def _assert_same_tokens(made: Path) -> None:
    (old,) = (OLD / "cache").iterdir()
    for name in ("input_ids.bin", "is_label.bin", "record_of.npy", "hashes.npy"):
        assert (made / name).read_bytes() == (old / name).read_bytes(), name


def test_a_run_stopped_half_way_ends_as_it_did_with_the_tokens_that_it_had(capsys: pytest.CaptureFixture[str]) -> None:
    assert _distance(HALF / ADAPTER, LAST / ADAPTER) > 0.01  # the guard: the last two steps matter
    _stop_half_way()
    assert invoke([*TRAIN, "--set", "model.cache_4bit=null"]) == 0
    said = capsys.readouterr().out
    assert f"resuming from {HALF.absolute()} (step 2)" in said and "rejected" not in said
    assert re.search(r"evaluates [0-9]+ held-out rows", said), "a run of before train.eval_rows evaluates them all"
    _assert_ended_as_recorded()
    _assert_same_tokens(_made_cache())


def test_a_finished_run_is_finished(capsys: pytest.CaptureFixture[str]) -> None:
    before = _content("run") | _content("cache") | _content("cache-4bit")
    assert invoke(TRAIN) == 0
    assert "run: this run is finished (4 steps" in capsys.readouterr().out
    after = _content("run") | _content("cache") | _content("cache-4bit")
    for content in (before, after):
        del content["run/config.yaml"]  # it is written again, with the fields that there are now
    assert after == before


@pytest.mark.parametrize("file", [ADAPTER, OPTIMIZER, "state.json"])
def test_a_damaged_checkpoint_is_rejected(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The guard of the tests above: they would not pass with files that are not those of b1dc400."""
    _stop_half_way()
    _damage(HALF / file)
    assert invoke([*TRAIN, "--set", "model.cache_4bit=null"]) == 2
    said = capsys.readouterr().err
    assert "no checkpoint can be used" in said and f"rejected {HALF.name}: {file} is damaged" in said


def test_damaged_tokenized_data_are_made_again(caplog: pytest.LogCaptureFixture) -> None:
    _stop_half_way()
    assert invoke([*TRAIN, "--set", "model.cache_4bit=null"]) == 0
    made = _made_cache()
    _damage(made / "input_ids.bin")
    _stop_half_way()
    caplog.clear()
    assert invoke([*TRAIN, "--set", "model.cache_4bit=null"]) == 0
    assert f"tokenized data: written to {made.absolute()}" in caplog.text
    _assert_same_tokens(made)


def test_the_4_bit_copy_of_the_base_is_made_again(caplog: pytest.LogCaptureFixture) -> None:
    """The old one has no digests, so nobody can tell whether it is still what was written: it is said and made again.

    Its name is made of place and time of change of the base's files too, which no checkout keeps, and of the version of
    bitsandbytes: so a first start makes a copy of its own, and the old one is then put under that copy's name.
    """
    (old,) = Path("cache-4bit").iterdir()
    _stop_half_way()
    assert invoke(TRAIN) == 0
    (own,) = [path for path in Path("cache-4bit").iterdir() if path.is_dir() and path != old]
    shutil.rmtree(own)
    old.rename(own)
    weights = _tensors(own)
    _stop_half_way()
    caplog.clear()
    assert invoke(TRAIN) == 0
    assert f"{own} is not whole (source None" in caplog.text and "it is built again" in caplog.text
    _assert_ended_as_recorded()
    made = _content("cache-4bit")
    assert _tensors(own) == weights  # bit by bit what b1dc400 wrote
    _stop_half_way()
    assert invoke(TRAIN) == 0
    assert _content("cache-4bit") == made  # and then read


def _tensors(folder: Path) -> dict[str, bytes]:
    found = (load_file(path) for path in sorted(folder.glob("*.safetensors")))
    return {name: tensor.view(torch.uint8).numpy().tobytes() for one in found for name, tensor in one.items()}


# --- what takes a run or an adapter -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["run", "run/adapter", str(LAST)])
def test_a_run_its_adapter_and_its_checkpoint_are_evaluated_as_they_were(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["evaluate", path, "--json", "--with-base"]) == 0
    found = json.loads(capsys.readouterr().out)
    recorded = _json(OLD / "recorded/evaluate.json")["trained"]["held_out"]
    assert recorded["loss"] == metrics_of(OLD / "run")[-1]["eval_loss"]
    assert found["trained"]["held_out"]["num_labels"] == recorded["num_labels"]
    assert found["trained"]["held_out"]["loss"] == pytest.approx(recorded["loss"], rel=SAME_LOSS)
    start = _json(OLD / "run/eval_start.json")["eval_loss"]
    assert found["base"]["held_out"]["loss"] == pytest.approx(start, rel=SAME_LOSS)


def test_an_adapter_without_its_run_brings_its_base(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.move("run/adapter", "adapter")
    assert invoke(["evaluate", "adapter", "--json", "--config", "config.yaml"]) == 0
    loss = json.loads(capsys.readouterr().out)["trained"]["held_out"]["loss"]
    # computed in bfloat16, which no config sets otherwise: 8 bits; the base alone is 11 % away
    assert loss == pytest.approx(metrics_of(OLD / "run")[-1]["eval_loss"], rel=0.02)


def test_a_run_answers_as_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["generate", "run", "--prompt", "w6 w7 w20", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == (OLD / "recorded/generate.txt").read_text()


def test_an_unfinished_run_answers_by_its_checkpoint(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    _stop_half_way()
    assert invoke(["generate", "run", "--prompt", "w6 w7 w20", "--max-new-tokens", "8"]) == 0
    assert f"using its newest checkpoint {HALF}" in caplog.text
    assert len(capsys.readouterr().out.split()) > 0


def test_a_run_is_merged(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert invoke(["merge", "run", "merged", "--onto", "dequantized", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    gap = re.search(r"differ from those of the trained model by up to (\S+) ", said)
    # fp32: two products of matrices against one, logits of some units
    assert gap is not None and float(gap[1]) < 1e-4, said
    assert said.rstrip().endswith("dequantized is closer to what was trained")
    assert (Path("merged") / "model.safetensors").is_file()
    assert "fixed sentences" not in caplog.text  # its own data are at hand
