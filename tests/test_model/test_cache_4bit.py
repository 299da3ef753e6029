"""The 4-bit copy of a base: built once, of the weights that there are, and believed only while every file is whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import on_ranks
from helpers.tiny_models import save_model, tiny_model
from safetensors.torch import load_file, save_file

from qlora_dist.errors import MachineFailed, UserError
from qlora_dist.model import base_checksum, cached_4bit, load_base
from qlora_dist.model.weights import cache_4bit as four_bit_files

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


def load(folder: Path) -> Any:
    return load_base(
        str(folder), quantization="nf4", double_quant=True, compute_dtype=BF16, attention="auto", device=CPU
    )


def copy_of(folder: Path, cache: Path, **changes: Any) -> Path:
    options = {"quantization": "nf4", "double_quant": True, "compute_dtype": BF16, "device": CPU, **changes}
    return Path(cached_4bit(cache, str(folder), **options))


def test_the_copy_is_built_once_and_rebuilt_when_its_inputs_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_model(tmp_path / "source")
    cache = tmp_path / "cache"
    first = copy_of(source, cache)
    assert base_checksum(load(first)) == base_checksum(load(source))
    built = first.stat().st_mtime_ns
    assert copy_of(source, cache) == first and first.stat().st_mtime_ns == built
    others = {copy_of(source, cache, double_quant=False), copy_of(source, cache, quantization="fp4"),
              copy_of(source, cache, compute_dtype=torch.float32)}  # fmt: skip
    save_model(source, tiny_model(attention=None, seed=1))
    others.add(copy_of(source, cache))
    assert len(others | {first}) == 5
    assert base_checksum(load(copy_of(source, cache))) == base_checksum(load(source))
    # nothing to copy
    assert copy_of(source, cache, quantization="none") == source and copy_of(first, cache) == first


def test_a_damaged_copy_is_rebuilt_and_leftovers_of_a_killed_builder_are_not_used(folder: Path, tmp_path: Path) -> None:
    whole = copy_of(folder, tmp_path)
    expected = base_checksum(load(whole))
    weights = next(whole.glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert copy_of(folder, tmp_path) == whole and base_checksum(load(whole)) == expected
    left = whole.with_name(f".{whole.name}.incomplete-{os.uname().nodename}-1")
    whole.rename(left)  # as left by a builder killed before its rename, here even with the manifest
    weights.parent.mkdir(exist_ok=True)
    assert copy_of(folder, tmp_path) == whole and base_checksum(load(whole)) == expected
    assert not left.exists()


def test_only_one_of_several_processes_builds_the_copy(folder: Path, tmp_path: Path) -> None:
    results = on_ranks(_copy_and_count, 3, folder, tmp_path / "cache")
    assert len({path for path, _ in results}) == 1
    assert sum(built for _, built in results) == 1


def _copy_and_count(folder: Path, cache: Path) -> tuple[str, int]:
    built = []
    original = four_bit_files.write_manifest
    four_bit_files.write_manifest = lambda *values, **options: built.append(1) or original(*values, **options)
    return str(copy_of(folder, cache)), len(built)


def test_a_copy_in_which_one_layer_changed_at_the_same_size_is_rebuilt(
    folder: Path, tmp_path: Path, caplog: Any
) -> None:
    whole = copy_of(folder, tmp_path)
    expected = base_checksum(load(whole))
    weights = next(whole.glob("model-*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    before = weights.stat()
    tensors[name] = 255 - tensors[name]  # all of its codes inverted
    save_file(tensors, weights, metadata={"format": "pt"})
    assert weights.stat().st_size == before.st_size
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert base_checksum(load(whole)) != expected  # the guard
    assert copy_of(folder, tmp_path) == whole and base_checksum(load(whole)) == expected
    assert f"is not whole ({weights.name} is damaged" in caplog.text

    config = whole / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-02'))
    assert copy_of(folder, tmp_path) == whole and "is not whole (config.json is damaged" in caplog.text
    save_file({"model.norm.weight": torch.zeros(1)}, whole / "model.safetensors")  # would be read instead
    assert copy_of(folder, tmp_path) == whole and "does not list model.safetensors" in caplog.text
    assert base_checksum(load(whole)) == expected


def test_a_copy_of_other_weights_of_the_same_size_and_time_is_rebuilt(tmp_path: Path) -> None:
    source, other = save_model(tmp_path / "base", tiny_model()), save_model(tmp_path / "other", tiny_model(seed=1))
    copy = copy_of(Path(source), tmp_path / "cache")
    weights = Path(source) / "model.safetensors"
    before = weights.stat()
    weights.write_bytes((Path(other) / "model.safetensors").read_bytes())
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert copy_of(Path(source), tmp_path / "cache") == copy
    assert base_checksum(load(copy)) == base_checksum(load(Path(other)))


def test_weights_that_change_while_they_are_quantized_leave_no_copy(tmp_path: Path, monkeypatch: Any) -> None:
    source = Path(save_model(tmp_path / "base", tiny_model()))
    write_rest = four_bit_files._write_rest

    def replace_weights(*args: Any) -> None:
        (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
        write_rest(*args)

    monkeypatch.setattr(four_bit_files, "_write_rest", replace_weights)
    with pytest.raises(MachineFailed, match=r"were written to or replaced while they were being quantized"):
        copy_of(source, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_an_unwritable_cache_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"model.cache_4bit .*a writable folder is needed: Not a directory .*file"):
        copy_of(folder, tmp_path / "file" / "cache")
