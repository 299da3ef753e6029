"""`qlora-dist import`: each key of another trainer's config is translated, needs nothing here, or is listed as lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.foreign_cases import CASES, INFO, SMALL

from qlora_dist.config import load_config
from qlora_dist.config.commented import Setting, commented_yaml, nested
from qlora_dist.config.foreign.answers import Given
from qlora_dist.config.foreign.left_out import _NOT_HERE, _NOT_NEEDED
from qlora_dist.config.foreign.table import ANSWERS, lookup
from qlora_dist.config.foreign.trainers import _SIGNS, DEFAULTS
from qlora_dist.config.foreign.translate import Translation, report, translate_file
from qlora_dist.config.reading import parse_yaml
from qlora_dist.errors import UserError


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
    raw: dict[str, Any] = {}
    for key, value in flat.items():
        *above, last = key.split(".")
        node = raw
        for part in above:
            node = node.setdefault(part, {})
        node[last] = value
    return raw


def _translate(folder: Path, flat: dict[str, Any], **options: Any) -> Translation:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    (folder / "theirs.yaml").write_text(yaml.safe_dump(_nested(flat), sort_keys=False))
    return translate_file(folder / "theirs.yaml", **options)


def _config(folder: Path, translation: Translation) -> dict[str, Any]:
    """What the text of a translation says to the reader of configs."""
    (folder / "ours.yaml").write_text(translation.text("theirs.yaml"))
    return json.loads(load_config(folder / "ours.yaml").model_dump_json())


def _value(config: dict[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


def _answers(translation: Translation) -> dict[str, Any]:
    return {line.key: line.answer for line in translation.lines if not line.is_default}


@pytest.mark.parametrize(
    ("trainer", "key", "value", "beside", "expected"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES]
)
def test_a_key_means_here_what_it_means_there(tmp_path, trainer, key, value, beside, expected):
    """By the reader of configs, from the text that is written, for two GPUs."""
    translation = _translate(tmp_path, {**SMALL[trainer], **beside, key: value}, trainer=trainer, gpus=2)
    config = _config(tmp_path, translation)
    answers = {name: one for name, one in _answers(translation).items() if name.startswith(key)}
    assert answers
    if expected is None:
        assert all(answer.is_lost and answer.text for answer in answers.values())
        assert f"#   {key}" in translation.text("theirs.yaml")
        return
    assert not any(answer.is_lost for answer in answers.values()), answers
    assert not any(line.is_default and "already" in line.answer.text for line in translation.lost)
    for name, wanted in expected.items():
        assert _value(config, name) == wanted, name


def test_a_mapping_that_is_a_value_stays_one():
    settings = [Setting("s.a.0.b", {"0": "x"}), Setting("s.a.1.b", 2), Setting("c", {})]
    assert nested(settings) == {"s": {"a": [{"b": {"0": "x"}}, {"b": 2}]}, "c": {}}
    assert parse_yaml(commented_yaml(settings), "text") == nested(settings)


def test_every_key_of_the_table_has_a_case():
    generic = {key for group in (_NOT_NEEDED, _NOT_HERE) for keys in group.values() for key in keys}
    assert set(ANSWERS) - generic <= {case[1] for case in CASES}


@pytest.mark.parametrize("group", [_NOT_NEEDED, _NOT_HERE], ids=["not needed", "not here"])
def test_what_is_left_out_says_why_and_sets_nothing(tmp_path, group):
    keys = [key for keys in group.values() for key in keys]
    bare = {key.replace("*", "any"): True for key in keys}
    bare = {key: value for key, value in bare.items() if not any(other.startswith(f"{key}.") for other in bare)}
    before = _config(tmp_path, _translate(tmp_path, SMALL["axolotl"]))
    translation = _translate(tmp_path, SMALL["axolotl"] | bare, trainer="axolotl")
    answers = _answers(translation)
    assert _config(tmp_path, translation) == before
    assert len(bare) > 50 and all(answers[key].text and not answers[key].values for key in bare)
    assert {answers[key].is_lost for key in bare} == {group is _NOT_HERE}
    if group is _NOT_HERE:  # what is switched off is not missed
        off = _answers(_translate(tmp_path, SMALL["axolotl"] | dict.fromkeys(bare, False), trainer="axolotl"))
        assert not any(off[key].is_lost for key in bare)


@pytest.mark.parametrize("trainer", SMALL)
def test_no_key_is_dropped(tmp_path, trainer):
    """Known or not, empty or not, each is in the report; what nobody knows is listed as not translated, in the text."""
    odd = {"mystery": 3, "mystery_section.inner": "x", "empty_one": None, "listed": [1, {"a": 2}]}
    translation = _translate(tmp_path, SMALL[trainer] | odd)
    assert translation.trainer == trainer  # by its keys
    said = "\n".join(report(translation))
    for key in (*SMALL[trainer], *odd):
        assert f"  {key}" in said, key
    assert {"mystery", "mystery_section.inner", "listed"} <= {line.key for line in translation.lost}
    text = translation.text("theirs.yaml")
    assert "#   mystery: 3: this key is not known here" in text and "empty_one" not in text


@pytest.mark.parametrize("trainer", DEFAULTS)
def test_what_a_trainer_takes_for_absent_keys_is_translated_where_it_differs_here(tmp_path, trainer):
    config = _config(tmp_path, _translate(tmp_path, SMALL[trainer]))
    expected = {
        "axolotl": {"optim.schedule": "cosine", "optim.max_grad_norm": 1.0, "data.packing": False,
                    "optim.warmup_steps": 0.03, "data.on_long": "drop", "data.row_tokens": 512, "optim.name": "adamw"},
        "llama-factory": {"optim.schedule": "linear", "optim.lr": 5e-5, "lora.rank": 8, "lora.alpha": 16,
                          "batch.rows_per_step": 8, "train.epochs": 3, "train.save_every": 500},
        "trl": {"optim.schedule": "linear", "optim.lr": 2e-5, "lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.05,
                "data.row_tokens": 1024, "model.double_quant": False, "batch.micro_rows": 8},
        "torchtune": {"optim.schedule": "constant", "optim.max_grad_norm": None, "data.packing": False},
    }[trainer]  # fmt: skip
    assert {name: _value(config, name) for name in expected} == expected


def test_the_same_rows_per_step_whatever_the_number_of_gpus_is_said(tmp_path):
    keys = SMALL["axolotl"] | {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    for gpus in (1, 8):
        translation = _translate(tmp_path, keys, gpus=gpus)
        assert _config(tmp_path, translation)["batch"]["rows_per_step"] == 8 * gpus
        plural = "s" * (gpus > 1)
        assert f"2 per device x 4 accumulated x {gpus} GPU{plural}" in translation.text("theirs.yaml")
        assert f"for {gpus} GPU{plural} (--gpus N for another number)" in report(translation)[0]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("alpaca", {"data.train.0.format": "alpaca", "data.template": "alpaca"}),
        ("gpteacher", {"data.train.0.format": "alpaca", "data.train.0.columns": {"output": "response"}}),
        ("alpaca_chat.load_qa", {"data.train.0.columns": {"instruction": "question", "output": "answer"}}),
        ("sharegpt.load_role", {"data.train.0.format": "sharegpt"}),
        ("chat_template", {"data.train.0.format": "messages"}),
        ({"field_instruction": "q", "field_output": "output"},
         {"data.train.0.format": "alpaca", "data.train.0.columns": {"instruction": "q"}}),
    ],
)  # fmt: skip
def test_forms_of_prompts_of_axolotl(tmp_path, kind, expected):
    config = _config(tmp_path, _translate(tmp_path, SMALL["axolotl"] | {"datasets": [{"path": "c/d", "type": kind}]}))
    assert {name: _value(config, name) for name in expected} == expected


def test_parts_of_a_source_that_mean_nothing_here_are_listed_one_by_one(tmp_path):
    entry = {
        "path": "c/d", "type": "chat_template", "field_messages": "conversations", "shards": 10,
        "trust_remote_code": True,
        "message_property_mappings": {"role": "from", "content": "value"},
        "roles": {"user": ["human"], "ai": ["robot"]},
        "roles_to_train": ["gpt"], "train_on_eos": "none", "chat_template": "phi_3", "revision": "v1",
    }  # fmt: skip
    translation = _translate(tmp_path, SMALL["axolotl"] | {"datasets": [entry, {"path": "e/f", "type": "unheard_of"}]})
    assert {line.key for line in translation.lost} == {
        f"datasets[0].{key}" for key in ("shards", "trust_remote_code", "roles", "train_on_eos", "chat_template")
    } | {"datasets[1].type"}
    first, second = _config(tmp_path, translation)["data"]["train"]
    assert (first["format"], first["columns"], first["revision"]) == ("sharegpt", {}, "v1")
    assert (second["path"], second["format"]) == ("e/f", "auto")


def test_names_of_datasets_are_looked_up_beside_the_config_and_in_its_folder_of_data(tmp_path):
    translation = _translate(tmp_path, SMALL["llama-factory"] | {"dataset": "words, pairs"})
    config = _config(tmp_path, translation)
    assert config["data"]["train"][0]["path"] == str(tmp_path / "data" / "words.json")
    assert {"dataset pairs.ranking", "dataset pairs.columns.chosen"} <= {line.key for line in translation.lost}


def test_a_dataset_that_cannot_be_found_is_an_error_that_says_what_to_add_and_set_adds_it(tmp_path):
    keys = SMALL["llama-factory"] | {"dataset": "identity"}
    with pytest.raises(UserError, match=r"data\.train: missing") as caught:
        _translate(tmp_path, keys)
    said = str(caught.value)
    assert (
        f"dataset identity: identity: {tmp_path}/data does not name it" in said and "--set 'data.train=[{path:" in said
    )
    override = "data.train=[{path: /x.json, format: alpaca}]"
    with pytest.raises(UserError, match=r"there is no dataset_info.json in .*/elsewhere or "):
        _translate(tmp_path, keys | {"dataset_dir": "elsewhere", "dataset": "words"})
    translation = _translate(tmp_path, keys, overrides=("optim.lr=3e-4", override))
    config = _config(tmp_path, translation)
    assert (config["optim"]["lr"], config["data"]["train"][0]["path"]) == (3e-4, "/x.json")
    assert "# from --set" in translation.text("theirs.yaml")


def test_secrets_are_not_repeated(tmp_path):
    keys = {"hub_token": "hf_hidden", "comet_api_key": "hidden_key", "my_own_secret": "hidden", "hub_model_id": "shown"}
    translation = _translate(tmp_path, SMALL["axolotl"] | keys)
    said = "\n".join(report(translation)) + translation.text("theirs.yaml")
    assert "hidden" not in said and "comet_api_key: (not shown)" in said and "hub_model_id: shown" in said


def test_keys_that_contradict_each_other_are_not_silently_merged(tmp_path):
    translation = _translate(tmp_path, SMALL["trl"] | {"max_length": 512, "max_seq_length": 1024})
    (line,) = [line for line in translation.lost if line.key == "max_seq_length"]
    assert line.answer.text == "data.row_tokens is 512 already, from max_length"
    assert _config(tmp_path, translation)["data"]["row_tokens"] == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rl": "dpo"}, "rl: dpo cannot be done here: only supervised fine-tuning"),
        ({"adapter": "llama-adapter"}, "adapter: llama-adapter cannot be done here: here lora is trained"),
        ({"learning_rate": "fast"}, "optim.lr is from learning_rate: fast"),
        ({"lora_r": -1}, "lora.rank is from lora_r: -1"),
        ({"base_model": None}, "model.name: missing"),
        ({"adapter": None}, "lora is null (full fine-tuning) but model.quantization is nf4"),
    ],
)
def test_what_cannot_be_trained_here_is_refused_with_the_key_that_says_so(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        _translate(tmp_path, SMALL["axolotl"] | change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a mapping of keys at the top level, found null"),
        ("- 1\n- 2\n", "found [1, 2]"),
        ("a: [1", "not valid YAML"),
        ("1: 2\n", "found keys that are no names"),
        ("colour: red\n", "its keys do not tell which trainer it is from (colour)"),
        ("run_dir: x\nmodel: {name: m}\n", "this is a config of qlora-dist already"),
        (
            "base_model: !!python/object/apply:os.system [id]\n",
            "not valid YAML: line 1, column 13: could not determine a constructor",
        ),
        ("base_model: \x00\n", "not valid YAML"),
    ],
)
def test_garbage_is_refused_with_what_was_expected(tmp_path, content, message):
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        translate_file(tmp_path / "x.yaml")
    assert message in str(caught.value) and str(tmp_path / "x.yaml") in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        translate_file(tmp_path)


ODD = [True, False, None, 0, -1, float("inf"), 2**70, "x", "", "a\nb: c", [], [None], {}, {"a": {}}, "\U0010ffff"]


@pytest.mark.parametrize("trainer", ["", *SMALL])
def test_any_value_of_any_key_is_answered(trainer):
    for key in ANSWERS:
        for value in ODD:
            found = lookup(key, value, Given({key: value}, 2, trainer, (Path("/nowhere"),)))
            assert found is not None and (found.values or found.text or found.parts), (key, value)
            assert found.sentence()


@pytest.mark.parametrize("value", [-1, [None], "a\nb: \x07#c"], ids=repr)
def test_any_value_ends_in_a_config_or_in_an_error_that_names_the_file(tmp_path, value):
    keys = [case[1] for case in CASES if case[0] == "axolotl"]
    for key in dict.fromkeys(keys):
        flat = {**SMALL["axolotl"], key: value}
        try:
            assert _config(tmp_path, _translate(tmp_path, flat, trainer="axolotl"))
        except UserError as error:
            assert "theirs.yaml" in str(error), key


def test_the_signs_of_trainers_are_keys_that_are_known():
    for signs in _SIGNS.values():
        for sign in signs:
            assert sign in ANSWERS or any(key.startswith(f"{sign}.") for key in ANSWERS), sign
