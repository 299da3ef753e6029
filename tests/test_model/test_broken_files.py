"""Model files of any form: an error that names the file and the entry, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import tiny_config
from transformers import AutoConfig

from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.memory.read_shapes import read_shapes
from qlora_dist.model import check_config, load_config
from qlora_dist.model.weights.safetensors_files import BadFile, WeightFiles
from qlora_dist.model.weights.sources import open_files

GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _file(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([1, 2], "the header is"),
        (None, "the header is None"),
        (b'{"a": \xff}', "header is not JSON"),
        (b"[" * 100_000, "header is not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', "header is not JSON"),
        (b'{"a": NaN}', "'a' is nan"),
        ({"a": 3}, "'a' is 3; expected an object"),
        ({"a": {}}, "'a' has the type None"),
        ({"a": GOOD | {"dtype": ["F32"]}}, r"type \['F32'\]"),
        ({"a": GOOD | {"dtype": "F3"}}, "type 'F3'"),
        ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "shape None"),
        ({"a": GOOD | {"shape": [2.0]}}, r"shape \[2.0\]"),
        ({"a": GOOD | {"shape": [-2]}}, r"shape \[-2\]"),
        ({"a": GOOD | {"shape": [True, 2]}}, "shape"),
        ({"a": GOOD | {"shape": "2"}}, "shape '2'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets None"),
        ({"a": GOOD | {"data_offsets": [0]}}, r"data_offsets \[0\]"),
        ({"a": GOOD | {"data_offsets": {"0": 8}}}, "data_offsets"),
        ({"a": GOOD | {"data_offsets": [8, 0]}}, "not where the header places it"),
        ({"a": GOOD | {"data_offsets": [12, 20]}}, "not where the header places it"),
        ({"a": GOOD | {"shape": [2**62, 2**62]}}, "not where the header places it"),
        ({"a": GOOD, "b": GOOD | {"data_offsets": [4, 12]}}, "'a' and 'b' overlap"),
    ],
)
def test_a_header_of_any_form_is_rejected_by_file_and_tensor(header: Any, message: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "model.safetensors", header)
    with pytest.raises(BadFile, match=message) as found:
        WeightFiles([path])
    assert str(path) in str(found.value) and len(str(found.value)) < 600
    with pytest.raises(UserError, match="weights cannot be read"):
        open_files(str(tmp_path))


def test_a_good_header_is_read_whatever_its_order(tmp_path: Path) -> None:
    header = {"b": GOOD | {"data_offsets": [8, 16]}, "__metadata__": {"format": "pt"}, "a": GOOD}
    assert set(WeightFiles([_file(tmp_path / "model.safetensors", header)]).entries) == {"a", "b"}


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        "{",
        "[" * 100_000,
        '{"metadata": {}, "weight_map": []}',
        '{"metadata": 3, "weight_map": {"a": "a.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": 3}}',
        '{"metadata": {}, "weight_map": {"a": "../a.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": "/etc/a.safetensors"}}',
        '{"metadata": {}, "weight_map": {"a": "absent.safetensors"}}',
    ],
)
def test_an_index_of_any_form_is_rejected_by_name(index: str, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=r"weights cannot be read .*safetensors"):
        open_files(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**18}, "num_hidden_layers is 10{18}; expected a whole number from 1 to 10,000"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 7, "head_dim": None}, "num_attention_heads is 7; expected a divisor"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings is 'many'"),
        ({"vocab_size": 10**12}, "vocab_size is 10{12}"),
        ({"quantization_config": [1]}, r"quantization_config is \[1\]; expected an object"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
        ({"quantization_config": {"quant_method": ["odd"]}}, "quantized with"),
        ({"layer_types": "full"}, "layer_types is 'full'"),
        ({"layer_types": ["full_attention"]}, "one name for each of 2 layers, found 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"dtype": 7}, "dtype is 7; expected text"),
        ({"rope_theta": 0}, "rope_theta is 0; expected a positive number"),
    ],
)
def test_a_config_of_any_form_is_rejected_by_key_when_planning_and_training(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = tiny_config("llama", num_key_value_heads=2, head_dim=16).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    for read in (lambda: read_shapes(str(tmp_path)), lambda: check_config(str(tmp_path))):
        with pytest.raises(UserError, match=message):
            read()


@pytest.mark.parametrize(
    "change", [{"pad_token_id": 10**9}, {"dtype": "nonsense"}, {"rope_parameters": 3}, {"hidden_act": 3}]
)
def test_values_that_a_family_rejects_itself_end_without_a_traceback(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config("llama").to_dict() | change))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"config\.json cannot be read|cannot be trained"):
        check_config(str(tmp_path))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '{"vocab_size": ' + "9" * 5000 + "}"])
def test_a_config_that_is_no_object_is_rejected(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    for read in (read_shapes, load_config):
        with pytest.raises(UserError, match=r"config\.json"):
            read(str(tmp_path))


@pytest.mark.parametrize("text", ["{}", "[" * 100_000, '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_broken_in_content_is_rejected(text: str, tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "falcon"])
def test_a_family_with_an_attention_class_of_its_own_is_told_so(family: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2}}.get(family, {})
    AutoConfig.for_model(family, **changes).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be trained \(its attention is a class of its own"):
        check_config(str(tmp_path))
