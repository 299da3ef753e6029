"""What a run would learn from: numbers, warnings and samples of its documents. Pure; terminal.py and html.py render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.documents import Documents, SourceStats, overlap_warning
from ...data.packing import Rows, hashed_order
from ...data.templates import CONTROL_TOKENS, control_tokens, tokenizer_template

# documents whose tokens are inspected
_MAX_INSPECTED = 2000
_LOW_LABEL_SHARE = 0.05


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one kind."""

    text: str
    is_label: bool
    is_special: bool


@dataclass(frozen=True)
class Sample:
    """One document as the model sees it."""

    index: int
    source: str
    num_tokens: int
    num_labels: int
    runs: list[Run]


@dataclass(frozen=True)
class Audit:
    """Everything that `qlora-dist data` shows about one dataset."""

    name: str  # data.train or data.eval
    sources: list[SourceStats]
    histogram: list[tuple[int, int, int]]  # (from, to, documents), tokens per document
    num_rows: int
    row_tokens: int
    packed_share: float  # fraction of slots that hold a token: packed rows
    padded_share: float  # ... documents padded to the longest in their micro-batch
    full_share: float  # ... documents padded to row_tokens
    micro_rows: int
    warnings: list[str]
    samples: list[Sample]


def audit(
    documents: Documents,
    rows: Rows,
    tokenizer: Any,
    *,
    name: str = "data.train",
    template: str = "auto",
    micro_rows: int = 1,
    show: int = 3,
    seed: int = 0,
    trained_on: Documents | None = None,
) -> Audit:
    """Measures a dataset. `trained_on`: the training documents, to find what occurs in both."""
    order = hashed_order(len(documents), seed)
    return Audit(
        name=name,
        sources=documents.stats.sources,
        histogram=_histogram(documents.lengths),
        num_rows=len(rows),
        row_tokens=rows.row_tokens,
        packed_share=rows.efficiency,
        padded_share=_padded_share(documents.lengths[order], max(2, micro_rows)),
        full_share=float(documents.lengths.mean() / rows.row_tokens),
        micro_rows=max(2, micro_rows),
        warnings=[
            *_source_warnings(documents),
            *_label_warnings(documents, tokenizer, order),
            *_template_warnings(documents.stats.sources, tokenizer, template),
            *([] if trained_on is None else _overlap_warnings(documents, trained_on)),
        ],
        samples=[sample_of(documents, int(index), tokenizer) for index in order[:show]],
    )


def sample_of(documents: Documents, index: int, tokenizer: Any) -> Sample:
    """One document with its learned tokens separated from context, and special tokens from text."""
    example = documents[index]
    ids = example.input_ids.tolist()
    special = control_tokens(tokenizer).texts
    kinds = [(bool(label), token in special) for token, label in zip(ids, example.is_label)]
    boundaries = [0, *(i for i in range(1, len(ids)) if kinds[i] != kinds[i - 1]), len(ids)]
    runs, text = [], ""
    for i, begin in enumerate(boundaries[:-1]):
        # decoded from the beginning: on its own, a run would lose the space before its first word
        longer = tokenizer.decode(ids[: boundaries[i + 1]], clean_up_tokenization_spaces=False)
        runs.append(Run(longer[len(text) :], *kinds[begin]))
        text = longer
    source = documents.stats.sources[int(documents.source_of[index])].path
    return Sample(index, source, len(ids), example.num_labels, runs)


def _histogram(lengths: np.ndarray, bins: int = 16) -> list[tuple[int, int, int]]:
    counts, edges = np.histogram(lengths, bins=min(bins, int(lengths.max())), range=(0, int(lengths.max())))
    return [(int(low), int(high), int(n)) for low, high, n in zip(edges, edges[1:], counts)]


def _padded_share(lengths: np.ndarray, micro_rows: int) -> float:
    groups = [lengths[i : i + micro_rows] for i in range(0, len(lengths), micro_rows)]
    return float(lengths.sum() / sum(int(group.max()) * len(group) for group in groups))


def _source_warnings(documents: Documents) -> list[str]:
    warnings = []
    for source in documents.stats.sources:
        facts = [
            (source.bad, f"{source.bad:,} of {source.records:,} records cannot be used; the first: {source.first_bad}"),
            (
                source.truncated,
                f"{source.truncated:,} conversations are truncated to data.row_tokens and lack their end token; "
                "raise data.row_tokens, or set data.on_long=drop",
            ),
            (len(source.unread), f"nothing reads these fields (number of records): {source.unread_text()}"),
            (source.dropped, f"{source.dropped:,} examples are dropped: too long, or no label within data.row_tokens"),
            (
                source.duplicates > 0.01 * max(1, source.examples) and source.duplicates,
                f"{source.duplicates:,} examples are duplicates of earlier ones",
            ),
            (
                source.empty_answers,
                f"{source.empty_answers:,} examples have an empty answer and teach the model to say nothing",
            ),
            (
                source.unrolled,
                f"{source.unrolled:,} examples hold one answer each: the template writes earlier answers of a "
                "conversation differently, so each answer is learned after its own context, which is repeated",
            ),
            (
                source.control_tokens,
                f"{source.control_tokens:,} conversations spell out a special token in their own text "
                f"({source.control_token_names}); it is encoded as that token",
            ),
            (
                source.replacement_characters,
                f"{source.replacement_characters:,} examples contain U+FFFD (�): their text was once decoded "
                "incorrectly",
            ),
        ]
        warnings += [f"{source.path}: {text}" for count, text in facts if count]
    return warnings


def _label_warnings(documents: Documents, tokenizer: Any, order: np.ndarray) -> list[str]:
    warnings = []
    labels, tokens = int(documents.num_labels.sum()), int(documents.lengths.sum())
    if labels == 0:
        return ["there are no labels: nothing would be learned"]
    if labels < _LOW_LABEL_SHARE * tokens:
        warnings.append(
            f"only {labels / tokens:.1%} of the tokens are labels; to learn prompts as well, set data.learn=all"
        )
    inspected = [int(i) for i in order[:_MAX_INSPECTED]]
    conversations = [i for i in inspected if documents.stats.sources[int(documents.source_of[i])].template]
    control = control_tokens(tokenizer)
    examples = [documents[index] for index in conversations]
    learned = [control.learned_ends(example.input_ids, example.is_label) for example in examples]
    endless = sum(not ends[-1:] or not ends[-1] for ends in learned)
    if endless > 0.05 * len(conversations):
        warnings.append(
            f"{endless:,} of {len(conversations):,} inspected examples do not end with a special token: a model "
            "trained on them does not learn to stop"
        )
    return warnings


def _template_warnings(sources: Sequence[SourceStats], tokenizer: Any, template: str) -> list[str]:
    warnings = []
    used = sorted({source.template for source in sources if source.template})
    if len(used) > 1:
        warnings.append(f"sources use different templates ({', '.join(used)}); set data.template to one of them")
    if template not in ("auto", "tokenizer") and tokenizer_template(tokenizer) is not None and used:
        warnings.append(
            f"the base has its own chat template, but data.template is {template}: prompts rendered with the base's "
            "template have a format that the trained model has not learned"
        )
    for name in used:
        missing = [
            token
            for token in CONTROL_TOKENS.get(name, ())
            if len(tokenizer(token, add_special_tokens=False).input_ids) != 1
        ]
        if missing:
            warnings.append(
                f"template {name} is meant for a base with {', '.join(missing)} as single tokens; this one splits "
                "them; alpaca, vicuna and zephyr need no such tokens"
            )
    return warnings


def _overlap_warnings(documents: Documents, trained_on: Documents) -> list[str]:
    warning = overlap_warning(documents.hashes, trained_on.hashes)
    return [] if warning is None else [warning]
