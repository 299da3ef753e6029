"""A chat template from a repository takes no more time and memory than it should, and harms no process but its own."""

import os
import signal

import pytest
from helpers.tiny_tokenizers import byte_level_tokenizer

from qlora_dist.data.templates import Template, apply_template, limited, resolve_template
from qlora_dist.errors import MachineFailed, UserError

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
GOOD = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
WRITTEN = "user: Hi<|endoftext|>assistant: Hello<|endoftext|>"
LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


def text_of(source, **options):
    return apply_template(byte_level_tokenizer(), Template("theirs", source, is_own=True, **options), TURNS)


@pytest.mark.parametrize(
    "source",
    [
        LOOPS,
        "{% if messages | length == 2 %}" + LOOPS + "{% endif %}",
        "{% set text = namespace(x='ab') %}{% for i in range(60) %}{% set text.x = text.x + text.x %}{% endfor %}",
        "{{ '%9000000000d' % 1 }}",
        "{{ '{:9000000000}'.format(1) }}",
        "{{ strftime_now('%Y' * 10**9) }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    ],
    ids=["loops", "on-condition", "doubling", "width", "format", "clock", "output"],
)
def test_a_template_that_takes_too_much_is_stopped_by_name_and_the_next_is_rendered(source, monkeypatch):
    monkeypatch.setattr(limited, "MAX_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"theirs is stopped: it took more than .* set data\.template to one of chatml"):
        text_of(source)
    assert text_of(GOOD) == WRITTEN


def test_a_template_that_is_too_long_is_not_read(tmp_path):
    (tmp_path / "long.jinja").write_text("a" * (2**20 + 1))
    tokenizer = byte_level_tokenizer()
    with pytest.raises(UserError, match="has more than 1,048,576 characters"):
        resolve_template(tokenizer, str(tmp_path / "long.jinja"), default="chatml")
    os.mkfifo(tmp_path / "pipe.jinja")
    with pytest.raises(UserError, match="it is no file"):
        resolve_template(tokenizer, str(tmp_path / "pipe.jinja"), default="chatml")


def test_the_texts_of_both_processes_are_equal_and_a_signal_of_a_scheduler_does_not_end_the_other():
    tokenizer = byte_level_tokenizer()
    assert text_of(GOOD) == tokenizer.apply_chat_template(TURNS, chat_template=GOOD, tokenize=False) == WRITTEN
    child = limited._child.process
    os.kill(child.pid, signal.SIGTERM)
    assert text_of(GOOD) == WRITTEN and limited._child.process is child


def test_when_the_other_process_is_killed_the_run_says_so():
    assert text_of(GOOD) == WRITTEN
    child = limited._child.process
    child.kill()
    with pytest.raises(MachineFailed, match="renders chat templates has ended"):
        text_of(GOOD)
    assert text_of(GOOD) == WRITTEN and limited._child.process is not child
