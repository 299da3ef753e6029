"""What docs/troubleshooting.md says is refused: each row is provoked, and what it promises is what is said."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import tiny_model
from helpers.tiny_run import changed, make_inputs, write_config
from safetensors.torch import load_file, save_file

from qlora_dist.commands import invoke
from qlora_dist.data.templates import limited

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
CHAT = [{"role": "user", "content": "w6 w7"}, {"role": "assistant", "content": "w8"}]


class Case:
    """A tiny run below `folder`, to be spoiled."""

    def __init__(self, folder: Path, raw: dict[str, Any]) -> None:
        self.folder = folder
        self.raw = raw
        self.model = Path(raw["model"]["name"])

    def set(self, **changes: Any) -> None:
        self.raw = changed(self.raw, **changes)

    def data(self, *records: Any, text: str | None = None, name: str = "data.jsonl", **source: Any) -> None:
        """One source with these records."""
        path = self.folder / name
        path.write_text("\n".join(json.dumps(one) for one in records) if text is None else text)
        self.set(data__train=[{"path": str(path), **source}])

    def chat(self, *messages: Any, template: str | None = None, **record: Any) -> None:
        """One source with one conversation."""
        self.data({"messages": list(messages), **record}, format="messages")
        if template is not None:
            (self.folder / "chat.jinja").write_text(template)
            self.set(data__template=str(self.folder / "chat.jinja"))

    def config(self, **changes: Any) -> None:
        """Changes the model's config.json."""
        path = self.model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def train(self, *arguments: str) -> int:
        return invoke(["train", str(write_config(self.folder / "config.yaml", self.raw)), *arguments])


def _unknown_key(case: Case) -> int:
    case.set(lora__rnak=4)
    return case.train()


def _value_out_of_range(case: Case) -> int:
    case.set(optim__lr=float("inf"))
    return case.train()


def _bad_record(case: Case) -> int:
    case.data({"input": "w6", "output": "w7"}, {"input": "w6", "output": 5}, format="input-output")
    return case.train()


def _media(case: Case) -> int:
    case.chat(*CHAT, images=["a.png"])
    return case.train()


def _second_list(case: Case) -> int:
    case.data(text='[{"text": "w6"}] [{"text": "w7"}]', name="data.json")
    return case.train()


def _split(case: Case) -> int:
    case.data({"text": "w6"}, split="validation")
    return case.train()


def _llama_factory(case: Case) -> int:
    (case.folder / "lf").mkdir()
    (case.folder / "lf" / "dataset_info.json").write_text('{"alpaca": {"file_name": "alpaca.json"}}')
    (case.folder / "lf" / "alpaca.json").write_text("[]")
    case.set(data__train=[{"path": str(case.folder / "lf")}])
    return case.train()


def _left_out(case: Case) -> int:
    system = {"role": "system", "content": "w9"}
    case.chat(system, *CHAT, template="{% for m in messages if m.role != 'system' %}{{ m.content }}</s>{% endfor %}")
    return case.train()


def _endless_template(case: Case) -> int:
    case.chat(*CHAT, template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    return case.train()


def _no_end(case: Case) -> int:
    case.chat(*CHAT, template="{% for m in messages %}{{ ' ' + m.content }}{% endfor %}")
    return case.train()


def _ids_beyond(case: Case) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(case.model)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(case.model)
    case.data({"text": "w6 <more>"})
    return case.train()


def _custom_code(case: Case) -> int:
    case.config(auto_map={"AutoModelForCausalLM": "modeling.Model"}, model_type="own")
    return case.train()


def _pickled(case: Case) -> int:
    (case.model / "model.safetensors").rename(case.model / "pytorch_model.bin")
    return case.train()


def _foreign_quantization(case: Case) -> int:
    case.config(quantization_config={"quant_method": "gptq", "bits": 4})
    return case.train()


def _damaged_weights(case: Case) -> int:
    path = case.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return case.train()


def _nan_weights(case: Case) -> int:
    case.weights(lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    return case.train()


def _own_attention(case: Case) -> int:
    shutil.rmtree(case.model)
    tiny_model("falcon", attention=None).save_pretrained(case.model)
    return case.train()


def _other_towers(case: Case) -> int:
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {"model_type": "paligemma", "text_config": {"model_type": "gemma", **tower}, "vision_config": tower}
    (case.model / "config.json").write_text(json.dumps(config))
    return case.train()


def _experts(case: Case) -> int:
    shutil.rmtree(case.model)
    tiny_model("llama4_text", attention=None, num_key_value_heads=2, head_dim=16, num_local_experts=4).save_pretrained(
        case.model
    )
    return case.train()


def _adapter(case: Case) -> int:
    assert case.train() == 0
    path = case.folder / "run/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    return invoke(["merge", str(case.folder / "run/adapter"), str(case.folder / "out")])


def _other_config(case: Case) -> int:
    assert case.train() == 0
    case.set(lora__rank=8)
    return case.train()


def _other_base(case: Case) -> int:
    case.set(train__save_every=2)
    assert case.train() == 0
    (case.folder / "run/completed").unlink()
    shutil.rmtree(case.folder / "run/checkpoints/step-00000005", ignore_errors=True)
    case.weights(lambda tensors: tensors["model.norm.weight"].mul_(2))
    return case.train()


def _foreign_folder(case: Case) -> int:
    (case.folder / "run").mkdir()
    (case.folder / "run" / "thesis.tex").touch()
    return case.train()


def _no_checkpoint(case: Case) -> int:
    case.set(train__save_every=2)
    assert case.train() == 0
    (case.folder / "run/completed").unlink()
    for path in case.folder.glob("run/checkpoints/*/adapter_model.safetensors"):
        path.write_bytes(b"")
    return case.train()


def _output_there(case: Case) -> int:
    (case.folder / "out").mkdir()
    (case.folder / "out" / "model.safetensors").touch()
    return invoke(["quantize", str(case.model), str(case.folder / "out")])


PROVOKED: dict[str, Callable[[Case], int]] = {
    "a key that does not exist": _unknown_key,
    "an infinite or impossible number": _value_out_of_range,
    "a record of another form": _bad_record,
    "images, audio, video": _media,
    "text after a JSON list": _second_list,
    "a split that a file does not have": _split,
    "a folder of another trainer": _llama_factory,
    "a chat template that leaves a message out": _left_out,
    "a chat template that runs for ever": _endless_template,
    "data in which no answer ends": _no_end,
    "tokens that the model has no row for": _ids_beyond,
    "code that comes with a model": _custom_code,
    "pickled weights": _pickled,
    "weights that are quantized already, by anything but bitsandbytes, fp8 and MXFP4": _foreign_quantization,
    "a truncated or damaged file of weights": _damaged_weights,
    "weights with NaN": _nan_weights,
    "attention that cannot be packed": _own_attention,
    "a model of several towers that is not listed": _other_towers,
    "stacked experts of another form": _experts,
    "an adapter made on a changed base (PiSSA, OLoRA, ...)": _adapter,
    "a run directory of another config": _other_config,
    "a run directory in use for something else": _foreign_folder,
    "a resume on another base, other data or another adapter under the same name": _other_base,
    "a resume when no checkpoint is whole": _no_checkpoint,
    "a folder that is not empty, as an output": _output_there,
}


def _rows() -> dict[str, str]:
    """What is refused -> what is then said, as the page promises."""
    _, section = PAGE.read_text(encoding="utf-8").split("## What is refused, and why\n")
    rows = re.findall(r"^\| (.+?) \| .+? \| `(.+?)` \|$", section.split("\n## ")[0], flags=re.MULTILINE)
    return dict(rows)


def test_every_row_is_provoked() -> None:
    assert list(_rows()) == list(PROVOKED)


@pytest.mark.parametrize("what", PROVOKED)
def test_what_is_refused_is_said_as_promised(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limited, "MAX_SECONDS", 1)
    case = Case(tmp_path, make_inputs(tmp_path))
    assert PROVOKED[what](case) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and _rows()[what] in said
    assert "Traceback" not in said
