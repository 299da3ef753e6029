"""The control tokens of a tokenizer: what its templates write around text, and what the model ends an answer with.

transformers knows some of them as special (EOS, BOS, `additional_special_tokens`), others only as added tokens
(<|eot_id|>, [/INST], <|im_end|> of many checkpoints). This is the one place that asks for them.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import numpy as np

# Whitespace after an end token that belongs to the template (a line break) is at most this many tokens.
_MAX_AFTER = 8


class ControlTokens:
    """Special and added tokens of one tokenizer, except added whitespace, which is text."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.get_added_vocab()
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        flagged = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.texts: dict[int, str] = {
            int(token): text for text, token in {**added, **special}.items() if text.replace("▁", " ").strip()
        }
        self._is_special = {text: text in flagged or text in special for text in self.texts.values()}
        # candidates are found by their first characters: some tokenizers have thousands of added tokens
        self._by_head: dict[str, list[str]] = {}
        for text in self.texts.values():
            self._by_head.setdefault(text[:3], []).append(text)
        heads = sorted(self._by_head, key=len, reverse=True)
        self._heads = re.compile(f"(?={'|'.join(map(re.escape, heads))})" if heads else "(?!)")
        self._ends = tuple(self.texts.values())
        self.longest = max(map(len, self._ends), default=0)  # characters
        self._tokenizer = weakref.ref(tokenizer)
        self._is_space: dict[int, bool] = {}

    def end_of(self, text: str) -> bool:
        """Whether the text ends with a control token."""
        return text.endswith(self._ends)

    def start_of(self, text: str) -> bool:
        """Whether the text starts with a control token."""
        return text.startswith(self._ends)

    def spelled_in(self, text: str, written: str = "", special_only: bool = False) -> set[str]:
        """Control tokens that the text spells out: special ones, and added ones that `written`, a template, holds."""
        places = [match.start() for match in self._heads.finditer(text)]
        candidates = {
            (token, place)
            for place in places
            for size in (1, 2, 3)
            for token in self._by_head.get(text[place : place + size], ())
        }
        found = {token for token, place in candidates if text.startswith(token, place)}
        return {token for token in found if self._is_special[token] or (not special_only and token in written)}

    def learned_ends(self, input_ids: np.ndarray, is_label: np.ndarray) -> list[str]:
        """The control token that ends each run of labels, "" where none does; whitespace may follow it.

        `input_ids`, `is_label`: (L,). A template may learn the line break after its end of turn.
        """
        padded = np.concatenate([[False], is_label, [False]])
        edges = np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2)
        return [self._last_control(input_ids[begin:end].tolist()) for begin, end in edges]

    def _last_control(self, ids: list[int]) -> str:
        for token in reversed(ids[-_MAX_AFTER:]):
            if token in self.texts:
                return self.texts[token]
            if not self._space(token):
                break
        return ""

    def _space(self, token: int) -> bool:
        if token not in self._is_space:
            tokenizer = self._tokenizer()
            self._is_space[token] = tokenizer is not None and not tokenizer.decode([token]).strip()
        return self._is_space[token]


_known: weakref.WeakKeyDictionary[Any, ControlTokens] = weakref.WeakKeyDictionary()


def control_tokens(tokenizer: Any) -> ControlTokens:
    """The control tokens of a tokenizer, asked once: transformers computes them slowly."""
    if tokenizer not in _known:
        _known[tokenizer] = ControlTokens(tokenizer)
    return _known[tokenizer]
