"""Step 2 of the data pipeline: records -> token ids and label mask, before any length limit.

Labels are placed on characters (templates) and mapped to tokens here. If a token would straddle the boundary of a
learned span, the text is tokenized in two pieces instead: at inference the prompt ends there too, so the model never
sees the merged token. A record with a boundary that cannot be kept is an error; nothing is approximated.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UserError
from ..formats import BadRecord, Conversation, Document, RawRecord, Text, Tokens, convert
from ..templates import Rendered, Template, adds_bos, control_tokens, render, resolve_template

# Text put before a piece while it is tokenized, so that the tokenizer does not treat it as the start of a text
# (where SentencePiece adds a space). The first one that does not merge with the piece is used.
_ANCHORS = ("\n", "a", ":", "0", ")")

# What `data.template: auto` means for a tokenizer without a chat template; conversations get vicuna.
_PLAIN_TEMPLATES = {
    "alpaca": "alpaca",
    "alpaca-cleaned": "alpaca",
    "alpaca-gpt4": "alpaca",
    "dolly": "alpaca",
    "longform": "alpaca",
    "unnatural-instructions": "alpaca",
    "self-instruct": "alpaca",
    "input-output": "none",
    "prompt-completion": "none",
}

# A record larger than this is a mistake in the file (a whole dump in one row), and would be tokenized for minutes
# only to be truncated to one row. Text files come in smaller parts.
_MAX_CHARACTERS = 2**25

_Tokenized = tuple[list[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Encoded:
    """Token ids with label mask; the first token is never a label. A text may be split into pieces."""

    input_ids: np.ndarray  # (L,) int32
    is_label: np.ndarray  # (L,) bool
    is_text: bool = False
    has_empty_answer: bool = False
    has_replacement: bool = False  # U+FFFD: text that was once decoded incorrectly
    is_unrolled: bool = False  # one answer of a conversation that no single document could hold
    control_tokens: tuple[str, ...] = ()  # that the data's own text spells out


class Encoder:
    """Converts and tokenizes records of one format, in batches. It is sent to worker processes as is."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        format_name: str,
        columns: Mapping[str, str],
        template: str,
        learn: str,
        date: str | None = None,
    ) -> None:
        self.tokenizer = _with_whole_offsets(tokenizer)
        self.format_name = format_name
        self.columns = dict(columns)
        self.learn = learn
        self.adds_bos = adds_bos(tokenizer)
        self._template_name, self._date = template, date
        self._template: Template | None = None
        self.unread: list[set[str]] = []  # of the last call of `encode`: each record's fields without a use

    @property
    def template(self) -> Template:
        if self._template is None:  # texts need none: a missing EOS, for example, is no error for them
            default = _PLAIN_TEMPLATES.get(self.format_name, "vicuna")
            self._template = resolve_template(self.tokenizer, self._template_name, default=default, date=self._date)
        return self._template

    def encode(self, records: Sequence[RawRecord]) -> list[list[Encoded] | BadRecord]:
        """For each record, its documents or the reason why it cannot be used."""
        self.unread = [set() for _ in records]
        results: list[list[Encoded] | BadRecord] = []
        documents: list[Document] = []
        owners: list[int] = []
        for i, raw in enumerate(records):
            try:
                converted, self.unread[i] = convert(self.format_name, raw, self.columns)
                documents += converted
                owners += [i] * len(converted)
                results.append([])
            except BadRecord as error:
                results.append(error)
        for i, encoded in zip(owners, self._encode_documents(documents)):
            result = results[i]
            if isinstance(encoded, BadRecord):
                results[i] = encoded
            elif isinstance(result, list):
                result += encoded
        return results

    def _encode_documents(self, documents: Sequence[Document]) -> list[list[Encoded] | BadRecord]:
        results: list[list[Encoded] | BadRecord] = [[] for _ in documents]
        rendered: list[tuple[int, Rendered]] = []
        texts: list[str] = []
        for i, document in enumerate(documents):
            try:
                if isinstance(document, Tokens):
                    results[i] = [self._encode_tokens(document)]
                    continue
                for one in self._render(document):
                    rendered.append((i, one))
                    texts.append(one.text)
                    if one.from_prefixes:
                        texts += [one.text[:begin] for begin, _ in one.spans]
            except BadRecord as error:
                results[i] = error
        tokenized = iter(self._tokenize(texts))
        for i, one in rendered:
            whole = next(tokenized)
            prefixes = [next(tokenized)[0] for _ in one.spans] if one.from_prefixes else []
            result = results[i]
            try:
                if isinstance(result, list):
                    result.append(self._encode_rendered(documents[i], one, whole, prefixes))
            except BadRecord as error:
                results[i] = error
        return results

    def _render(self, document: Conversation | Text) -> list[Rendered]:
        if isinstance(document, Text):
            rendered = [Rendered(document.text, ((0, len(document.text)),))]
        else:
            rendered = render(self.tokenizer, self.template, document.messages, document.tools, self.learn)
        num_characters = sum(len(one.text) for one in rendered)
        if num_characters > _MAX_CHARACTERS:
            raise BadRecord(f"{num_characters:,} characters, expected at most {_MAX_CHARACTERS:,} per record; split it")
        return rendered

    def _tokenize(self, texts: list[str]) -> list[_Tokenized]:
        if not texts:
            return []
        # verbose=False: no warning about model_max_length, which is not the length that matters here
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        return list(zip(batch["input_ids"], batch["offset_mapping"]))

    def _encode_tokens(self, document: Tokens) -> Encoded:
        largest = max(document.input_ids)
        if largest >= len(self.tokenizer):
            raise BadRecord(
                f"field input_ids contains {largest}, but this tokenizer has {len(self.tokenizer):,} tokens: the data "
                "was tokenized with another one"
            )
        return _encoded(document.input_ids, document.is_label)

    def _encode_rendered(
        self, document: Document, rendered: Rendered, whole: _Tokenized, prefixes: list[list[int]]
    ) -> Encoded:
        if isinstance(document, Text):
            return self._encode_text(document, whole[0])
        assert isinstance(document, Conversation)
        ids, is_label = _mask(self, rendered, whole, prefixes)
        contents = [message["content"] for message in document.messages]
        return _encoded(
            ids,
            is_label,
            has_empty_answer=any(
                message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
                for message in document.messages
            ),
            has_replacement=any("\ufffd" in content for content in contents),
            is_unrolled=rendered.is_unrolled,
            control_tokens=self._spelled(document.messages),
        )

    def _spelled(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
        """Control tokens in the data's own text. Added tokens such as <think> are an answer's own way to write."""
        control, written = control_tokens(self.tokenizer), self.template.source
        found = set()
        for message in messages:
            text = f"{message.get('reasoning_content') or ''}\n{message['content']}"
            found |= control.spelled_in(text, written, special_only=message["role"] == "assistant")
        return tuple(sorted(found))

    def _encode_text(self, document: Text, ids: list[int]) -> Encoded:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        # some texts spell out their own BOS or EOS: never add a second one
        if self.adds_bos and document.is_first and ids[:1] != [bos]:
            ids = [bos, *ids]
        if eos is not None and document.is_last and ids[-1:] != [eos]:
            ids = [*ids, eos]
        return _encoded(ids, [True] * len(ids), is_text=True, has_replacement="\ufffd" in document.text)


def _mask(
    encoder: Encoder, rendered: Rendered, whole: _Tokenized, prefixes: list[list[int]]
) -> tuple[list[int], list[bool]]:
    """Token ids and label mask of a rendered conversation; the text is cut at boundaries that a token straddles."""
    text = rendered.text
    boundaries = sorted({boundary for span in rendered.spans for boundary in span} - {0, len(text)})
    cuts = _token_cuts(whole[1], boundaries)
    straddled = {boundary for boundary, cut in zip(boundaries, cuts) if cut is None}
    for (begin, _), prefix in zip(rendered.spans, prefixes):
        # the prompt alone, as at inference, must give the tokens that precede the answer here
        if begin not in straddled and begin in boundaries and whole[0][: cuts[boundaries.index(begin)]] != prefix:
            straddled.add(begin)
    if not straddled:
        return whole[0], _between(len(whole[0]), dict(zip(boundaries, cuts)), rendered)
    while True:
        edges = [0, *sorted(straddled), len(text)]
        pieces = [(begin, _piece(encoder, text, begin, edges[i + 1])) for i, begin in enumerate(edges[:-1])]
        # cutting at one boundary may, rarely, make a token straddle another
        found = {cut for begin, (_, offsets) in pieces for cut in _straddled(offsets, begin, boundaries)} - straddled
        if not found:
            break
        straddled |= found
    ids: list[int] = []
    is_label: list[bool] = []
    for begin, (piece_ids, offsets) in pieces:
        ids += piece_ids
        is_label += _inside(offsets, begin, rendered.spans)
    return ids, is_label


def _inside(offsets: Sequence[tuple[int, int]], begin: int, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Whether each token is inside a span; none straddles a boundary."""
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T + begin
    is_inside = np.zeros(len(starts), dtype=np.bool_)
    for low, high in spans:
        is_inside |= (starts >= low) & (ends <= high)
    return is_inside.tolist()


def _between(num_tokens: int, cuts: dict[int, Any], rendered: Rendered) -> list[bool]:
    """The mask of a text in which no token straddles a boundary."""
    edges = {0: 0, len(rendered.text): num_tokens} | cuts
    is_label = [False] * num_tokens
    for begin, end in rendered.spans:
        is_label[edges[begin] : edges[end]] = [True] * (edges[end] - edges[begin])
    return is_label


def _token_cuts(offsets: Sequence[tuple[int, int]], boundaries: Sequence[int]) -> list[int | None]:
    """The number of tokens before each boundary; None if a token straddles it."""
    cuts: list[int | None] = []
    token = 0
    for boundary in boundaries:
        while token < len(offsets) and offsets[token][1] <= boundary:
            token += 1
        cuts.append(None if token < len(offsets) and offsets[token][0] < boundary else token)
    return cuts


def _straddled(offsets: Sequence[tuple[int, int]], begin: int, boundaries: Sequence[int]) -> list[int]:
    inner = [boundary - begin for boundary in boundaries if boundary > begin]
    return [boundary + begin for boundary, cut in zip(inner, _token_cuts(offsets, inner)) if cut is None]


def _piece(encoder: Encoder, text: str, begin: int, end: int) -> _Tokenized:
    """Tokens of text[begin:end] as the continuation of the text before it, with offsets from `begin`."""
    piece = text[begin:end]
    if begin == 0:
        return encoder._tokenize([piece])[0]
    anchored = encoder._tokenize([anchor + piece for anchor in _ANCHORS])
    for anchor, (input_ids, offsets) in zip(_ANCHORS, anchored):
        (cut,) = _token_cuts(offsets, [len(anchor)])
        if cut is not None:
            shifted = [(start - len(anchor), stop - len(anchor)) for start, stop in offsets[cut:]]
            return input_ids[cut:], shifted
    raise BadRecord(
        f"the tokenizer merges the beginning of an answer ({piece[:20]!r}) with the text before it, so it cannot be "
        "labelled exactly"
    )


def _encoded(ids: Sequence[int], is_label: Sequence[bool], **flags: Any) -> Encoded:
    if not len(ids):
        raise BadRecord("no tokens")
    mask = np.array(is_label, dtype=np.bool_)
    mask[0] = False  # nothing precedes it that could predict it
    return Encoded(np.array(ids, dtype=np.int32), mask, **flags)


def _with_whole_offsets(tokenizer: Any) -> Any:
    """The tokenizer, or a copy whose offsets cover every character: some leave out the space before a word (GPT-NeoX).

    Offsets that leave out a space would put the space of a prompt into the answer's first token without a word.
    """
    if not any(getattr(step, "trim_offsets", False) for step in _steps(tokenizer.backend_tokenizer.post_processor)):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    processor = tokenizer.backend_tokenizer.post_processor
    for step in _steps(processor):
        if getattr(step, "trim_offsets", False):
            step.trim_offsets = False
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def _steps(processor: Any) -> list[Any]:
    """The steps of a post-processor; a sequence has no length of its own."""
    if not hasattr(processor, "__getitem__"):
        return [processor]
    steps: list[Any] = []
    with contextlib.suppress(IndexError):
        for i in itertools.count():
            steps += _steps(processor[i])
    return steps


def check_tokenizer(tokenizer: Any) -> None:
    """Raises UserError for a tokenizer that cannot report token offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which reports no token offsets; convert it to a fast one "
            "(tokenizer.json)"
        )
