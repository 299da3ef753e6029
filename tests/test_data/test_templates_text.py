"""The text of each named template is the published one, written here once more by hand, in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from helpers.tiny_tokenizers import TOKENIZERS
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_dist.data.templates import NAMED, adds_bos, render, resolve_template

Turns = Sequence[tuple[str, str]]  # (role, content); a system prompt first, if any
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


def _split(turns: Turns) -> tuple[str, Turns]:
    """(the system prompt or "", the rest)."""
    return (turns[0][1], turns[1:]) if turns[0][0] == "system" else ("", turns)


def _chatml(turns: Turns, bos: str, eos: str) -> str:
    return bos + "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def _llama2(turns: Turns, bos: str, eos: str) -> str:
    system, turns = _split(turns)
    text = ""
    for i, (role, content) in enumerate(turns):
        inner = f"<<SYS>>\n{system}\n<</SYS>>\n\n{content}" if i == 0 and system else content
        text += f"{bos}[INST] {inner} [/INST]" if role == "user" else f" {content} {eos}"
    return text


def _llama3(turns: Turns, bos: str, eos: str) -> str:
    return bos + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>" for role, content in turns
    )


def _mistral(turns: Turns, bos: str, eos: str) -> str:
    system, turns = _split(turns)
    text = bos
    for i, (role, content) in enumerate(turns):
        inner = f"{system}\n\n{content}" if i == 0 and system else content
        text += f"[INST] {inner}[/INST]" if role == "user" else f" {content}{eos}"
    return text


def _gemma(turns: Turns, bos: str, eos: str) -> str:
    system, turns = _split(turns)
    text = bos
    for i, (role, content) in enumerate(turns):
        name = "model" if role == "assistant" else role
        inner = f"{system}\n\n{content}" if i == 0 and system else content
        text += f"<start_of_turn>{name}\n{inner}<end_of_turn>\n"
    return text


def _alpaca(turns: Turns, bos: str, eos: str) -> str:
    text = bos + ALPACA
    for i, (role, content) in enumerate(turns):
        if role == "system":
            text += f"{content}\n\n"
        elif role == "user":
            text += f"### Instruction:\n{content}\n\n### Response:\n"
        else:
            text += content + eos + ("" if i == len(turns) - 1 else "\n\n")
    return text


def _vicuna(turns: Turns, bos: str, eos: str) -> str:
    system, turns = _split(turns)
    return f"{bos}{system or VICUNA} " + "".join(
        f"USER: {content} ASSISTANT:" if role == "user" else f" {content}{eos}" for role, content in turns
    )


def _zephyr(turns: Turns, bos: str, eos: str) -> str:
    return bos + "".join(f"<|{role}|>\n{content}{eos}\n" for role, content in turns)


def _none(turns: Turns, bos: str, eos: str) -> str:
    return bos + "".join(content + (eos if role == "assistant" else "") for role, content in turns)


WRITERS: dict[str, Callable[[Turns, str, str], str]] = {
    "chatml": _chatml, "llama2": _llama2, "llama3": _llama3, "mistral": _mistral, "gemma": _gemma, "alpaca": _alpaca,
    "vicuna": _vicuna, "zephyr": _zephyr, "none": _none,
}  # fmt: skip

word = st.text(alphabet="abc \n<|>é", min_size=1, max_size=12).filter(str.strip)


def test_every_named_template_is_written_here() -> None:
    assert WRITERS.keys() == NAMED.keys()


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", WRITERS)
@given(system=st.none() | word, pairs=st.lists(st.tuples(word, word), min_size=1, max_size=3))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_the_text_is_the_published_one(kind: str, name: str, system: str | None, pairs: list[tuple[str, str]]) -> None:
    tokenizer = TOKENIZERS[kind]()
    turns = [("system", system)] if system else []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    template = resolve_template(tokenizer, name, default="")
    messages = [{"role": role, "content": content} for role, content in turns]
    (rendered,) = render(tokenizer, template, messages, None, "assistant")
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    assert rendered.text == WRITERS[name](turns, bos, tokenizer.eos_token)


@pytest.mark.parametrize("name", WRITERS)
def test_the_generation_prompt_is_what_stands_before_the_answer(name: str) -> None:
    tokenizer = TOKENIZERS["byte-level"]()
    turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi")]
    messages = [{"role": role, "content": content} for role, content in turns]
    source = resolve_template(tokenizer, name, default="").source
    prompt = tokenizer.apply_chat_template(
        messages[:-1], chat_template=source, tokenize=False, add_generation_prompt=True
    )
    text = WRITERS[name](turns, "", tokenizer.eos_token)
    begin = text.index("Hi") - (name in ("llama2", "mistral", "vicuna"))  # these write a space before it
    assert prompt == text[:begin]
