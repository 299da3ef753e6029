"""MMLU (Hendrycks et al., arXiv 2009.03300): four-way multiple choice, answered by the letter with the largest logit.

    folder/dev/<subject>_dev.csv     five worked questions of each subject, shown before the question
    folder/<split>/<subject>_<split>.csv   question,A,B,C,D,answer: the layout of the original release, no header

Prompts are those of the original code, so that results are comparable. Questions are packed into rows and distributed
over ranks like held-out data; only the position before the answer reaches the output head.

Legend: D questions of a batch, V vocabulary.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.loader import eval_batches
from ...data.packing import Batch, Example, pack_best_fit
from ...errors import UserError
from ...model import evaluation_mode
from ...progress import track
from ...train.evaluation import SumsOverRanks

LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """One question with its four choices; `answer` is the index of the right one."""

    subject: str
    text: str
    choices: tuple[str, str, str, str]
    answer: int


@dataclass(frozen=True)
class MmluResult:
    """Accuracies over all ranks' questions."""

    accuracy: float  # mean over subjects, as the QLoRA paper reports it
    accuracy_by_question: float  # mean over questions
    standard_error: float  # of accuracy_by_question
    num_questions: int
    shortened: int  # prompts with fewer worked questions than requested
    subjects: dict[str, float]


def read_questions(folder: str | Path, split: str) -> list[Question]:
    """Questions of one split, subject by subject. Raises UserError naming file and record of what cannot be read."""
    place = Path(folder).expanduser() / split
    files = sorted(place.glob(f"*_{split}.csv"))
    if not files:
        raise UserError(
            f"{place}: no file *_{split}.csv; give the folder of MMLU's original release, which has dev/, val/ and "
            "test/"
        )
    questions = []
    for file in files:
        with open(file, encoding="utf-8", newline="") as lines:
            for number, record in enumerate(csv.reader(lines), 1):
                if len(record) != 6 or record[5] not in LETTERS or len(record[5]) != 1:
                    raise UserError(
                        f"{file}, record {number}: expected question, four choices and a letter of {LETTERS}, found "
                        f"{len(record)} fields ending in {record[-1]!r}"
                    )
                text, a, b, c, d, letter = record
                subject = file.name.removesuffix(f"_{split}.csv")
                questions.append(Question(subject, text, (a, b, c, d), LETTERS.index(letter)))
    return questions


def prompt_of(question: Question, worked: Sequence[Question]) -> str:
    """The prompt up to and including "Answer:". The two spaces before the subject are those of the original code."""
    subject = question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about  {subject}.\n\n"
    shown = "".join(f"{_asked(one)} {LETTERS[one.answer]}\n\n" for one in worked)
    return head + shown + _asked(question)


def _asked(question: Question) -> str:
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))
    return f"{question.text}{choices}\nAnswer:"


def letter_ids(tokenizer: Any) -> list[int]:
    """The token of each letter after "Answer:". Raises UserError unless they are four distinct single tokens."""
    found = [tokenizer.encode(f"Answer: {letter}", add_special_tokens=False) for letter in LETTERS]
    ids = [one[-1] for one in found]
    if len({tuple(one[:-1]) for one in found}) != 1 or len(set(ids)) != len(LETTERS):
        raise UserError(
            "this tokenizer does not encode the letters of 'Answer: A', 'Answer: B', ... as single tokens; MMLU cannot "
            "be scored by letters with it"
        )
    return ids


class _Prompts:
    """Tokenized prompts as a document store; the only label of each is the correct letter."""

    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples
        self.lengths = np.array([len(example) for example in examples], dtype=np.int32)
        self.num_labels = np.ones(len(examples), dtype=np.int32)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


@torch.no_grad()
def score(
    model: torch.nn.Module,
    label_logits: Callable[[Batch], Tensor],  # Batch -> (D, V): logits at the positions before its labels
    tokenizer: Any,
    questions: Sequence[Question],
    worked: Sequence[Question],  # the pool of worked questions; those of the same subject are shown
    *,
    shots: int,
    max_tokens: int,
    micro_rows: int,
    world: SumsOverRanks,
    rank: int,
    world_size: int,
    what: str = "MMLU batch",
) -> MmluResult:
    """Accuracy over all questions. Every rank calls it with the same arguments except `rank`.

    A prompt longer than `max_tokens` loses worked questions, the last ones first. Raises UserError when it is too long
    even without any.
    """
    letters = letter_ids(tokenizer)
    examples, shortened = [], 0
    for question in questions:
        pool = [one for one in worked if one.subject == question.subject][:shots]
        ids, dropped = _fitting_ids(tokenizer, question, pool, max_tokens - 1)
        shortened += dropped > 0
        is_label = np.zeros(len(ids) + 1, dtype=bool)
        is_label[-1] = True
        examples.append(Example(np.array([*ids, letters[question.answer]], dtype=np.int32), is_label))
    prompts = _Prompts(examples)
    rows = pack_best_fit(prompts.lengths, max_tokens, 0)
    subjects = sorted({question.subject for question in questions})
    counts = torch.zeros(len(subjects), 2, dtype=torch.float64)  # right, all
    choices = torch.tensor(letters, device=world.device)
    batches = eval_batches(prompts, rows, micro_rows, rank, world_size)
    with evaluation_mode(model), track(what, len(batches)) as task:
        for done, batch in enumerate(batches):
            task.to(done)
            logits = label_logits(batch.to(world.device))  # also for filler: a sharded base is gathered by all ranks
            if not batch.num_labels:
                continue
            picked = logits[:, choices].argmax(-1).tolist()
            asked = [questions[document] for row in batch.row_indices for document in rows[row].documents]
            for question, choice in zip(asked, picked, strict=True):
                counts[subjects.index(question.subject)] += torch.tensor([float(choice == question.answer), 1.0])
    counts = world.sum(counts.to(world.device)).cpu()
    by_subject = (counts[:, 0] / counts[:, 1]).tolist()
    right, total = counts.sum(0).tolist()
    share = right / total
    return MmluResult(
        accuracy=sum(by_subject) / len(by_subject),
        accuracy_by_question=share,
        standard_error=math.sqrt(share * (1 - share) / total),
        num_questions=int(total),
        shortened=shortened,
        subjects=dict(zip(subjects, by_subject)),
    )


def _fitting_ids(
    tokenizer: Any, question: Question, worked: Sequence[Question], max_tokens: int
) -> tuple[list[int], int]:
    """Token ids of the longest prompt that fits, and the number of worked questions left out."""
    for dropped in range(len(worked) + 1):
        # encoded with a letter, then cut: the space before it may be a separate token or part of the letter's
        ids = tokenizer.encode(f"{prompt_of(question, worked[: len(worked) - dropped])} {LETTERS[0]}")
        if ids[-1] == tokenizer.eos_token_id:  # some tokenizers append EOS to every text
            ids = ids[:-1]
        if len(ids) - 1 <= max_tokens:
            return ids[:-1], dropped
    raise UserError(
        f"a question of {question.subject} has {len(ids):,} tokens without worked questions, more than the "
        f"{max_tokens:,} that fit; raise --mmlu-tokens"
    )


def describe(result: MmluResult) -> str:
    """MMLU 45.3 % over 57 subjects, ..."""
    short = f"; {result.shortened:,} prompts have fewer worked questions" if result.shortened else ""
    return (
        f"MMLU {result.accuracy:.1%} over {len(result.subjects)} subjects ({result.accuracy_by_question:.1%} of "
        f"{result.num_questions:,} questions, standard error {result.standard_error:.1%}; chance is 25 %){short}"
    )
