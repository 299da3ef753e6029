"""What a conversation says is in the text, whole and once; each answer is learned after the prompt of inference."""

import copy
import itertools

import numpy as np
import pytest
from helpers.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

from qlora_dist.data.documents.encode import Encoder
from qlora_dist.data.formats import BadRecord, Conversation
from qlora_dist.data.templates import Template, apply_template, control_tokens, resolve_template, template_key
from qlora_dist.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


TURNS = [user("Which colour?"), answer("Green."), user("And now?"), answer("Blue."), user("Last?"), answer("Red.")]

HEADER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = HEADER + "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
# drops the reasoning of all answers but the last
REASONS = (
    HEADER + "{% if m.reasoning_content and loop.last %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
# Phi: EOS closes the text, after the last end of turn
CLOSES = CHATML.replace(PROMPT, PROMPT.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"))
# gpt-oss: the last answer ends in another token than earlier ones
RETURNS = (
    HEADER + "{{ m.content }}{{ eos_token if loop.last and not add_generation_prompt else '<|im_end|>' }}{% endfor %}"
) + PROMPT
# R1: the generation prompt begins what the template never writes
BEGINS = CHATML.replace(PROMPT, PROMPT.replace("assistant\n", "assistant\n<think>\n"))
MARKED = (
    HEADER + "{% if m.role == 'assistant' %}{% generation %}{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)


def with_template(source, tokenizer=None):
    other = copy.deepcopy(tokenizer or byte_level_tokenizer())
    other.chat_template = source
    return other


def documents_of(tokenizer, messages, learn="assistant", template="auto", tools=None):
    encoder = Encoder(tokenizer, format_name="messages", columns={}, template=template, learn=learn)
    (result,) = encoder._encode_documents([Conversation(copy.deepcopy(messages), tools)])
    if isinstance(result, BadRecord):
        raise result
    return result


def learned(tokenizer, document):
    runs = itertools.groupby(zip(document.input_ids.tolist(), document.is_label), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_label, run in runs if is_label]


def learned_of(source, messages, learn="assistant", tools=None):
    tokenizer = with_template(source)
    return [learned(tokenizer, one) for one in documents_of(tokenizer, messages, learn, tools=tools)]


# --- several documents ------------------------------------------------------------------------------------------------


def test_a_token_that_closes_the_text_does_not_hinder_one_document_for_all_answers():
    (runs,) = learned_of(CLOSES, TURNS)
    assert runs == ["Green.<|im_end|>", "Blue.<|im_end|>", "Red.<|im_end|>\n<|endoftext|>"]


def test_a_token_in_place_of_the_end_of_turn_is_learned_after_every_answer():
    assert learned_of(RETURNS, TURNS) == [["Green.<|endoftext|>"], ["Blue.<|endoftext|>"], ["Red.<|endoftext|>"]]


def test_reasoning_that_a_template_drops_from_earlier_answers_is_learned_in_documents_of_their_own():
    messages = [
        user("a?"),
        answer("One.", reasoning_content="Hm."),
        user("b?"),
        answer("Two.", reasoning_content="So."),
    ]
    tokenizer = with_template(REASONS)
    documents = documents_of(tokenizer, messages)
    assert [learned(tokenizer, one) for one in documents] == [
        ["<think>Hm.</think>One.<|im_end|>"],
        ["<think>So.</think>Two.<|im_end|>"],
    ]
    assert [one.is_unrolled for one in documents] == [True, True]
    assert "Hm." not in tokenizer.decode(documents[1].input_ids)  # as at inference
    assert learned_of(REASONS, messages, "last") == [["<think>So.</think>Two.<|im_end|>"]]


def test_an_answer_of_weight_zero_gets_no_document_of_its_own():
    messages = [user("a?"), answer("One.", weight=0, reasoning_content="Hm."), user("b?"), answer("Two.")]
    assert learned_of(REASONS, messages) == [["Two.<|im_end|>"]]


@pytest.mark.parametrize("learn", ["assistant", "last"])
def test_a_generation_prompt_that_the_template_never_writes_is_named(learn):
    with pytest.raises(UserError, match=r"its generation prompt ends in '<think>\\n', where it writes 'Red\..*jinja"):
        learned_of(BEGINS, [user("Last?"), answer("Red.")], learn)


# --- nothing is lost --------------------------------------------------------------------------------------------------

THINKS = [user("2+2?"), answer("<think>\nI add.\n</think>\n\nFour.")]
STRIPS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
NO_SYSTEM = CHATML.replace(HEADER, HEADER.replace("%}{{", "%}{% if m.role != 'system' %}{{", 1)).replace(
    "{% endfor %}", "{% endif %}{% endfor %}", 1
)


@pytest.mark.parametrize("learn", ["assistant", "last", "all"])
@pytest.mark.parametrize("source", [STRIPS, MARKED], ids=["prefixes", "markers"])
def test_an_answer_that_the_template_shortens_is_refused_with_what_is_lost(source, learn):
    with pytest.raises(BadRecord, match=r"leaves out the text of message 2 \(assistant\), 'I add\.'"):
        learned_of(source, THINKS, learn)


@pytest.mark.parametrize("learn", ["assistant", "last", "all"])
def test_a_system_prompt_that_the_template_drops_is_named(learn):
    messages = [{"role": "system", "content": "Be brief."}, *TURNS]
    with pytest.raises(BadRecord, match=r"leaves out the text of message 1 \(system\), 'Be brief\.'"):
        learned_of(NO_SYSTEM, messages, learn)


@pytest.mark.parametrize("learn", ["assistant", "all"])
def test_reasoning_is_passed_under_both_names_and_refused_where_no_template_reads_it(learn):
    messages = [user("2+2?"), answer("Four.", reasoning_content="I add.")]
    (runs,) = learned_of(REASONS, messages)
    assert runs == ["<think>I add.</think>Four.<|im_end|>"]
    (runs,) = learned_of(REASONS.replace("m.reasoning_content", "m.thinking"), messages)
    assert runs == ["<think>I add.</think>Four.<|im_end|>"]
    with pytest.raises(BadRecord, match=r"leaves out reasoning of message 2 .*'I add\.'"):
        learned_of(CHATML, messages, learn)


def test_the_same_words_in_answer_and_reasoning_must_both_be_there():
    with pytest.raises(BadRecord, match="leaves out reasoning"):
        learned_of(CHATML, [user("2+2?"), answer("It is four.", reasoning_content="It is four.")])


CALL = {"type": "function", "function": {"name": "add", "arguments": {"left": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
# Llama-3.1: text beside a call is not written
CALLS = (
    "{{ (tools or []) | tojson }}" + HEADER + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}"
    "{{ m.content | tojson if m.role == 'tool' else m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}" + PROMPT
)


def test_text_beside_a_call_is_refused_where_the_template_drops_it_and_json_forms_count_as_written():
    messages = [
        user("2+2?"),
        answer("", tool_calls=[CALL]),
        {"role": "tool", "content": '{"sum": "4\n"}'},
        answer("Four."),
    ]
    (runs,) = learned_of(CALLS, messages, tools=TOOLS)
    assert runs == ['{"name": "add", "arguments": {"left": 2}}<|im_end|>', "Four.<|im_end|>"]
    messages[1]["content"] = "Let me see."
    with pytest.raises(BadRecord, match=r"leaves out the text of message 2 .*'Let me see\.'"):
        learned_of(CALLS, messages, tools=TOOLS)


def test_of_several_templates_the_one_for_tools_is_used_where_there_are_tools():
    several = {"default": CHATML, "tool_use": CALLS, "rag": "{{ 'no' }}"}
    messages = [user("2+2?"), answer("Four.")]
    tokenizer = with_template(several)
    plain, tools = (documents_of(tokenizer, messages, tools=tools)[0] for tools in (None, TOOLS))
    assert not tokenizer.decode(plain.input_ids).startswith("[")
    assert tokenizer.decode(tools.input_ids).startswith('[{"type": "function"')
    with pytest.raises(UserError, match="several chat templates \\(rag\\), but none named default"):
        resolve_template(with_template({"rag": CHATML}), "auto", default="chatml")


# --- control tokens ---------------------------------------------------------------------------------------------------


def test_tokens_added_without_being_special_end_an_answer_and_are_named_in_a_text():
    tokenizer = with_template(CHATML.replace("<|im_end|>", "<|eot|>"))
    tokenizer.add_tokens(["<|eot|>", "<b>"])
    (document,) = documents_of(tokenizer, [user("a <|eot|> <b> <<|im_start|>?"), answer("One.")])
    control = control_tokens(tokenizer)
    assert control.learned_ends(document.input_ids, document.is_label) == ["<|eot|>"]
    assert document.control_tokens == ("<|eot|>", "<|im_start|>")  # <b> is a word, not the template's


@pytest.mark.parametrize("learn", ["assistant", "all"])
def test_a_line_break_after_the_end_token_does_not_hide_it(learn):
    tokenizer = with_template(MARKED)
    (document,) = documents_of(tokenizer, TURNS, learn)
    ends = control_tokens(tokenizer).learned_ends(document.input_ids, document.is_label)
    assert ends == ["<|im_end|>"] * (3 if learn == "assistant" else 1)
    assert control_tokens(tokenizer).learned_ends(document.input_ids[:-2], document.is_label[:-2])[-1] == ""


def test_runs_of_labels_without_an_end_token_have_none():
    control = control_tokens(byte_level_tokenizer())
    ids = np.array(byte_level_tokenizer()("a<|im_end|>b").input_ids)
    assert control.learned_ends(ids, np.array([True, False, True])) == ["", ""]
    assert control.learned_ends(ids, np.zeros(3, dtype=bool)) == []
    assert "<s>" in control_tokens(sentencepiece_tokenizer()).spelled_in("x <s>")


# --- offsets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["none", "auto"])
def test_offsets_that_leave_out_a_space_do_not_move_it_from_the_prompt_into_the_answer(template):
    from tokenizers import processors

    tokenizer = with_template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    steps = [processors.ByteLevel(trim_offsets=True), processors.ByteLevel(trim_offsets=True)]
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)
    (document,) = documents_of(tokenizer, [user("Which "), answer("are you")], template=template)
    prompt = tokenizer("Which ").input_ids
    assert learned(tokenizer, document) == ["are you<|endoftext|>"]
    assert document.input_ids.tolist()[: len(prompt)] == prompt
    assert tokenizer.backend_tokenizer.post_processor[0].trim_offsets  # the caller's own is left as it is


# --- the clock --------------------------------------------------------------------------------------------------------

DATED = "{{ strftime_now('%d %b %Y, %A, %-d.%-m., %%d %H:%M') + '|' }}" + CHATML


def test_a_template_that_asks_for_the_date_is_told_the_one_date_of_its_run():
    tokenizer = with_template(DATED)
    encoder = Encoder(
        tokenizer, format_name="messages", columns={}, template="auto", learn="assistant", date="2024-07-06"
    )
    ((document,),) = encoder._encode_documents([Conversation(TURNS)])
    assert tokenizer.decode(document.input_ids).startswith("06 Jul 2024, Saturday, 6.7., %d 00:00|<|im_start|>user")
    assert learned(tokenizer, document) == ["Green.<|im_end|>", "Blue.<|im_end|>", "Red.<|im_end|>"]


def test_a_stopped_clock_changes_nothing_else_in_the_text():
    tokenizer = byte_level_tokenizer()
    for start in ("", "\n", "  \n{%- if true %}\n  x\n{% endif %}"):
        plain = tokenizer.apply_chat_template(TURNS, chat_template=start + "{{ 'd' }}" + CHATML, tokenize=False)
        template = Template("x", start + "{{ 'd' if strftime_now is defined }}" + CHATML, date="2024-07-06")
        assert apply_template(tokenizer, template, TURNS) == plain


def test_the_date_is_part_of_a_fingerprint_only_where_the_template_asks_for_it():
    dated, plain = with_template(DATED), with_template(CHATML)
    assert template_key(dated, "auto", "2024-07-06") != template_key(dated, "auto", "2024-07-07")
    assert template_key(plain, "auto", "2024-07-06") == template_key(plain, "auto", "2024-07-07")
    assert template_key(dated, "chatml", "2024-07-06") == template_key(dated, "chatml", "2024-07-07")
