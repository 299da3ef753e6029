"""MMLU is scored as one question after another would be, over ranks, with the prompts of the original code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers.mmlu import SUBJECTS, write_mmlu
from helpers.shared_data import shared_file
from helpers.tiny_models import save_model, tiny_model
from helpers.tiny_run import changed, make_inputs, write_config
from helpers.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

from qlora_dist import commands as cli
from qlora_dist.commands.evaluate.mmlu import (
    MmluResult,
    Question,
    describe,
    letter_ids,
    prompt_of,
    read_questions,
    score,
)
from qlora_dist.errors import UserError
from qlora_dist.model import hidden_states, output_head


class OneOf:
    """This rank among several, the others' counts added as they come."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.summed = torch.zeros(())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        self.summed = self.summed + values
        return self.summed


def scored(model, tokenizer, questions, worked, *, shots=2, max_tokens=512, world_size=1) -> MmluResult:  # type: ignore[no-untyped-def]
    head = output_head(model)

    def label_logits(batch):  # type: ignore[no-untyped-def]
        return head.logits(hidden_states(model, batch)[batch.label_positions])

    world, result = OneOf(), None
    for rank in range(world_size):
        result = score(
            model,
            label_logits,
            tokenizer,
            questions,
            worked,
            shots=shots,
            max_tokens=max_tokens,
            micro_rows=2,
            world=world,
            rank=rank,
            world_size=world_size,
        )
    assert result is not None
    return result


def test_the_prompt_is_that_of_the_original_code() -> None:
    worked = [Question("us_history", "Who?", ("a", "b", "c", "d"), 1)]
    asked = Question("us_history", "When?", ("1", "2", "3", "4"), 0)
    assert prompt_of(asked, worked) == (
        "The following are multiple choice questions (with answers) about  us history.\n\n"
        "Who?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
        "When?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )


@pytest.mark.parametrize("make_tokenizer", [byte_level_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("world_size", [1, 3])
def test_packed_scores_over_ranks_equal_one_question_after_another_under_the_librarys_own_attention(
    tmp_path, make_tokenizer, world_size
):
    tokenizer = make_tokenizer()
    folder = write_mmlu(tmp_path)
    questions, worked = read_questions(folder, "val")[:-3], read_questions(folder, "dev")  # of two unequal subjects
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    result = scored(tiny_model(**sizes), tokenizer, questions, worked, world_size=world_size)
    plain = tiny_model(attention="eager", **sizes)
    right = {subject: [] for subject in SUBJECTS}
    for question in questions:
        text = prompt_of(question, [one for one in worked if one.subject == question.subject])
        ids = tokenizer.encode(text + " A")[:-1]
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, -1]
        right[question.subject].append(int(logits[letter_ids(tokenizer)].argmax()) == question.answer)
    expected = {subject: sum(hits) / len(hits) for subject, hits in right.items()}
    assert result.subjects == pytest.approx(expected)
    assert result.accuracy == pytest.approx(sum(expected.values()) / 2)
    hits = [hit for subject in SUBJECTS for hit in right[subject]]
    assert result.accuracy_by_question == pytest.approx(sum(hits) / len(hits)) != result.accuracy
    assert result.num_questions == 7 and result.shortened == 0
    assert 0 < result.accuracy < 1, "all right or all wrong would show little"


def test_a_prompt_without_room_shows_fewer_worked_questions_and_says_so(tmp_path):
    tokenizer, folder = byte_level_tokenizer(), write_mmlu(tmp_path)
    questions, worked = read_questions(folder, "val")[:3], read_questions(folder, "dev")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=1024)
    longest = max(len(tokenizer.encode(prompt_of(question, []) + " A")) for question in questions)
    result = scored(model, tokenizer, questions, worked, max_tokens=longest + 1)
    assert result.shortened == 3
    assert "3 prompts have fewer worked questions" in describe(result)
    with pytest.raises(UserError, match="more than the 18 that fit"):
        scored(model, tokenizer, questions, worked, max_tokens=19)


def test_what_cannot_be_scored_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"no file \*_val.csv; give the folder of MMLU's original release"):
        read_questions(tmp_path, "val")
    folder = write_mmlu(tmp_path)
    (folder / "val" / "law_val.csv").write_text("Why?,a,b,c,d,E\n")
    with pytest.raises(UserError, match=r"law_val.csv, record 1: expected question, four choices and a letter"):
        read_questions(folder, "val")
    from helpers.tiny_models import tiny_tokenizer

    with pytest.raises(UserError, match="MMLU cannot be scored by letters"):
        letter_ids(tiny_tokenizer())  # it knows no letters: all four are one token
    for odd in ([1, 9], [2, 6], [1, 1, 6], [5]):  # in the place of B's
        ids = {"A": [1, 5], "B": odd, "C": [1, 7], "D": [1, 8]}
        tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens, ids=ids: ids[text[-1]])
        if odd == [1, 9]:
            assert letter_ids(tokenizer) == [5, 9, 7, 8]
        else:
            with pytest.raises(UserError, match="MMLU cannot be scored by letters"):
                letter_ids(tokenizer)


def test_the_release_is_read_whole():
    folder = shared_file("eval/mmlu")
    questions = read_questions(folder, "val")
    assert (len(questions), len({question.subject for question in questions})) == (1531, 57)
    assert len(read_questions(folder, "dev")) == 5 * 57


def test_the_command_scores_base_and_adapter(tmp_path, capsys):
    raw = make_inputs(tmp_path)
    tokenizer = byte_level_tokenizer()
    model = save_model(
        tmp_path / "subwords",
        tiny_model(attention=None, vocab_size=len(tokenizer), max_position_embeddings=1024),
        tokenizer=False,
    )
    tokenizer.save_pretrained(model)
    folder = write_mmlu(tmp_path / "mmlu")
    raw = changed(raw, model__name=str(model), data__template="none", train__steps=2)
    assert cli.invoke(["train", str(write_config(tmp_path / "c.yaml", raw))]) == 0
    capsys.readouterr()
    command = ["evaluate", raw["run_dir"], "--tasks", "mmlu", "--with-base", "--mmlu-split", "val", "--mmlu-shots", "1"]
    assert cli.invoke(command) == 2
    assert "--tasks mmlu and --mmlu DIR" in capsys.readouterr().err
    assert cli.invoke([*command, "--mmlu", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("base: MMLU ") and lines[-1].startswith("trained: MMLU ")
    assert "over 2 subjects" in lines[-1] and "of 10 questions" in lines[-1]
