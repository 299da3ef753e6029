"""The demo's data and base are what its report needs: unseen prompts, an unseen task, no unknown tokens."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[2] / "launch" / "demo"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module `tasks`, importable as the scripts import it, in an empty folder."""
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.chdir(tmp_path)
    for name in ("tasks", "make_data", "make_base"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("tasks")


def test_no_held_out_prompt_is_trained_on_and_every_answer_is_right(demo: ModuleType) -> None:
    importlib.import_module("make_data").main()
    train, held_out, held_out_known = (
        json.loads((demo.DATA_DIR / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train", "held_out", "held_out_known")
    )
    trained = {record["input"] for record in train}
    assert not trained & {record["input"] for record in held_out + held_out_known}
    assert len(held_out) == 200 and all(record["input"].startswith("sort: ") for record in held_out)
    for record in held_out:
        letters = record["input"].removeprefix("sort: ").removesuffix(" -> ").split()
        assert record["output"] == " ".join(sorted(letters))


def test_copying_the_prompt_is_rarely_the_right_answer(demo: ModuleType) -> None:
    """What the base does with the new task; a demo in which that scores would show nothing."""
    records = demo.samples(demo.NEW_TASK, 200, random.Random(1))
    copied = [record["input"].split(": ")[1].removesuffix(" -> ") == record["output"] for record in records]
    assert sum(copied) / len(copied) < 0.05


def test_the_base_never_sees_the_new_task(demo: ModuleType) -> None:
    assert demo.NEW_TASK == "sort" and demo.NEW_TASK not in demo.KNOWN_TASKS
    assert set(demo.KNOWN_TASKS) | {demo.NEW_TASK} == set(demo.TASKS)


def test_the_tokenizer_knows_every_word_and_prompt_and_answer_join_without_a_seam(demo: ModuleType) -> None:
    tokenizer = demo.build_tokenizer()
    rng = random.Random(0)
    for task in demo.TASKS:
        record = demo.sample(task, rng)
        prompt = tokenizer(record["input"])["input_ids"]
        answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in prompt + answer
        assert tokenizer(record["input"] + record["output"])["input_ids"] == prompt + answer
        assert prompt[0] == tokenizer.bos_token_id


def test_only_answers_are_learned_by_the_base(demo: ModuleType) -> None:
    make_base = importlib.import_module("make_base")
    tokenizer = demo.build_tokenizer()
    records = [{"input": "last: c a b -> ", "output": "b"}, {"input": "copy: a b -> ", "output": "a b"}]
    input_ids, labels = make_base.collate(records, tokenizer)
    for row, record in enumerate(records):
        learned = tokenizer.decode(labels[row][labels[row] != -100])
        assert learned == f"{record['output']} </s>"
    # nothing but the answer: prompt and padding are not learned, and what is learned stands in the input
    assert ((labels == -100) | (labels == input_ids)).all()


def test_the_base_can_be_quantized(demo: ModuleType) -> None:
    model = importlib.import_module("make_base").build_model(demo.build_tokenizer())
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    assert matrices and all(matrix.shape[1] % 64 == 0 for matrix in matrices)
