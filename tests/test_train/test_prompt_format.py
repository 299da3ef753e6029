"""The template of a run is kept with it, and what is exported ends where the run taught it to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_models import save_model, tiny_tokenizer
from helpers.tiny_run import changed, config_of, make_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qlora_dist.commands.generate import find_template, open_writer
from qlora_dist.commands.merge import merge
from qlora_dist.commands.trained import find_trained
from qlora_dist.data.templates import NAMED, Template
from qlora_dist.errors import UserError
from qlora_dist.model import Sampling
from qlora_dist.train import train
from qlora_dist.train.prompt_format import FILE, PromptFormat

CPU = torch.device("cpu")
QUESTION = [{"role": "user", "content": "w6 w7"}]


def chatml_inputs(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config whose base has EOS </s> and knows ChatML's tokens, which its own template does not use."""
    raw = make_inputs(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    from helpers.tiny_models import tiny_model

    save_model(folder / "model", tiny_model(attention=None, vocab_size=len(tokenizer) + 62), tokenizer=False)
    tokenizer.save_pretrained(folder / "model")
    return changed(raw, data__template="chatml", data__row_tokens=64, train__steps=40, **changes)


@pytest.fixture(scope="module")
def chatml_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run that has learned to end its answers with <|im_end|>."""
    raw = chatml_inputs(tmp_path_factory.mktemp("chatml"))
    train(config_of(raw))
    return raw


def assert_stops(folder: Path, model: Any) -> None:
    """Stock transformers: the answer ends in the end of turn, long before the limit."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert len(answer) < 20 and tokenizer.decode(answer[-1]) == "<|im_end|>" == tokenizer.eos_token


def test_the_merged_model_stops_in_stock_transformers(chatml_run: dict[str, Any], tmp_path: Path) -> None:
    merge(chatml_run["run_dir"], tmp_path / "out", onto="dequantized", dtype=torch.float32, compare=False)
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert {2, 129} <= set(config.eos_token_id)  # the base's own and the learned one
    assert_stops(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_the_adapter_carries_template_and_ends(chatml_run: dict[str, Any]) -> None:
    from peft import PeftModel

    folder = Path(chatml_run["run_dir"]) / "adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(chatml_run["model"]["name"]), str(folder))
    model.get_base_model().generation_config = GenerationConfig.from_pretrained(folder)
    assert_stops(folder, model)
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(folder).chat_template
    assert AutoTokenizer.from_pretrained(chatml_run["model"]["name"]).eos_token == "</s>"  # the base stays as it was


def test_a_template_that_changes_or_vanishes_later_does_not_matter(
    chatml_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = open_writer(find_trained(chatml_run["run_dir"]), CPU).encode(QUESTION)
    monkeypatch.setitem(NAMED, "chatml", "changed {{ messages }}")
    writer = open_writer(find_trained(chatml_run["run_dir"]), CPU)
    assert writer.encode(QUESTION) == expected
    (answer,) = writer.answer([QUESTION], Sampling(max_new_tokens=40))
    assert 0 < len(answer.split()) < 20
    # an adapter that has left its run, and a checkpoint
    moved = tmp_path / "moved"
    (Path(chatml_run["run_dir"]) / "adapter").rename(moved)
    try:
        assert open_writer(find_trained(moved), CPU).encode(QUESTION) == expected
        unfinished = find_trained(chatml_run["run_dir"])
        assert unfinished.adapter is not None and unfinished.adapter.name == "step-00000040"
        assert open_writer(unfinished, CPU).encode(QUESTION) == expected
        assert open_writer(find_trained(unfinished.adapter), CPU).encode(QUESTION) == expected
    finally:
        moved.rename(Path(chatml_run["run_dir"]) / "adapter")


def test_a_removed_template_file_and_removed_data_do_not_matter(tmp_path: Path) -> None:
    raw = make_inputs(tmp_path)
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{{ 'w20 ' if m.role == 'user' else 'w21 ' }}{{ m.content }}{% if m.role == 'user' %}"
        "{{ ' ' }}{% else %}{{ ' ' + eos_token + ' ' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}w21 {% endif %}"
    )
    raw = changed(raw, data__template=str(own), train__steps=1)
    train(config_of(raw))
    own.unlink()
    (tmp_path / "train.json").unlink()
    found = find_template(find_trained(raw["run_dir"]), None)
    assert found is not None and found.source.startswith("{% for m in messages %}{{ 'w20 '")


def test_full_fine_tuning_exports_a_model_that_ends_as_it_learned(tmp_path: Path) -> None:
    raw = chatml_inputs(tmp_path, model__quantization="none", optim__lr=3e-3)
    train(config_of({**raw, "lora": None}))
    folder = Path(raw["run_dir"]) / "model"
    assert_stops(folder, AutoModelForCausalLM.from_pretrained(folder))


def test_a_run_on_plain_text_says_so_and_keeps_the_tokenizer_of_its_base(tmp_path: Path) -> None:
    raw = make_inputs(tmp_path)
    (tmp_path / "train.txt").write_text("\n\n".join("w6 w7 w8 w9 w10" for _ in range(40)))
    raw["data"]["train"] = [{"path": str(tmp_path / "train.txt")}]  # its format is detected
    train(config_of(raw, train__steps=1))
    (tmp_path / "train.txt").unlink()
    assert json.loads((tmp_path / "run" / FILE).read_text()) == {"template": None}
    for place in (tmp_path / "run", tmp_path / "run" / "adapter"):
        trained = find_trained(place)
        assert trained.prompts is not None and find_template(trained, None) is None
    kept, base = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("run/adapter", "model"))
    assert (kept.chat_template, kept.eos_token) == (base.chat_template, base.eos_token)


def test_the_data_of_a_run_are_read_with_the_tokenizer_it_was_trained_with(chatml_run: dict[str, Any]) -> None:
    assert find_trained(chatml_run["run_dir"]).load_tokenizer().eos_token == "</s>"
    exported = AutoTokenizer.from_pretrained(Path(chatml_run["run_dir"]) / "adapter")
    assert exported.eos_token == "<|im_end|>"  # the guard: texts would end in another token


def test_the_file_is_read_strictly_and_its_absence_is_an_earlier_version(tmp_path: Path) -> None:
    assert PromptFormat.read(tmp_path) is None
    kept = PromptFormat(Template("x", "{{ messages }}", is_own=True))
    kept.write(tmp_path)
    assert PromptFormat.read(tmp_path) == kept
    written = json.loads((tmp_path / FILE).read_text())
    written["template"]["of_a_later_version"] = 1
    (tmp_path / FILE).write_text(json.dumps(written))
    assert PromptFormat.read(tmp_path) == kept
    for text in ("", "[]", "{}", '{"template": 3}', '{"template": {"name": "a"}}', "[" * 10**5,
                 '{"template": {"name": "a", "source": 3}}'):  # fmt: skip
        (tmp_path / FILE).write_text(text)
        with pytest.raises(
            UserError, match=rf"{FILE} (cannot be read|is not a JSON object).*; restore it, or remove it"
        ):
            PromptFormat.read(tmp_path)


def test_a_run_of_an_earlier_version_detects_its_template(chatml_run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(chatml_run))
    (tmp_path / "run" / "adapter").symlink_to(Path(chatml_run["run_dir"]) / "checkpoints" / "step-00000040")
    trained = find_trained(tmp_path / "run")
    assert trained.prompts is None
    found = find_template(trained, trained.load_tokenizer())
    assert found is not None and found.name == "chatml"
