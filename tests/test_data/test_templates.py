"""Masks are exact: what the assistant wrote is learned, with its end-of-turn token, and nothing else."""

import copy
import itertools
import json

import pytest
from helpers.tiny_tokenizers import TOKENIZERS, byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qlora_dist.data.documents.encode import Encoder
from qlora_dist.data.formats import BadRecord, RawRecord
from qlora_dist.data.templates import NAMED, Template, render, resolve_template
from qlora_dist.errors import UserError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "I am fine, thank you."},
    {"role": "user", "content": "Which colour?"},
    {"role": "assistant", "content": "Green.\n\nOr blue"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!"},
]
ANSWERS = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]

# what each template writes around an answer inside the learned span; EOS is the tokenizer's
ENDS = {
    "chatml": ("", "<|im_end|>"),
    "llama2": (" ", " EOS"),
    "llama3": ("", "<|eot_id|>"),
    "mistral": (" ", "EOS"),
    "gemma": ("", "<end_of_turn>"),
    "alpaca": ("", "EOS"),
    "vicuna": (" ", "EOS"),
    "zephyr": ("", "EOS"),
    "none": ("", "EOS"),
}

# templates as in model repositories, without and with markers
PLAIN_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- 'A: ' }}
        {%- generation %}
        {{- m.content + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- 'Q: ' + m.content + '\n' }}
    {%- endif %}
{%- endfor %}"""


def encode(tokenizer, messages, template="auto", learn="assistant", tools=None):
    encoder = Encoder(tokenizer, format_name="messages", columns={}, template=template, learn=learn)
    fields = {"messages": messages, "tools": tools}
    (result,) = encoder.encode([RawRecord(fields, "x, line 1")])
    if isinstance(result, BadRecord):
        raise result
    return result[0]


def learned_runs(tokenizer, encoded) -> list[str]:
    """Decoded runs of learned tokens."""
    runs = itertools.groupby(zip(encoded.input_ids.tolist(), encoded.is_label), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for is_label, run in runs if is_label]


def with_template(tokenizer, source):
    other = copy.deepcopy(tokenizer)
    other.chat_template = source
    return other


def expected_runs(tokenizer, name, answers=ANSWERS):
    before, after = ENDS[name]
    return [before + answer + after.replace("EOS", tokenizer.eos_token) for answer in answers]


@pytest.mark.parametrize("name", NAMED)
def test_decoded_learned_tokens_are_the_assistant_texts_and_their_end_tokens(name):
    tokenizer = byte_level_tokenizer()
    assert learned_runs(tokenizer, encode(tokenizer, TURNS, name)) == expected_runs(tokenizer, name)


@pytest.mark.parametrize("name", NAMED)
def test_the_same_is_true_of_a_sentencepiece_tokenizer_up_to_its_leading_space(name):
    tokenizer = sentencepiece_tokenizer()
    runs = learned_runs(tokenizer, encode(tokenizer, TURNS, name))
    # decoding a run drops the space before every SentencePiece word
    assert [run.lstrip() for run in runs] == [run.lstrip() for run in expected_runs(tokenizer, name)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", NAMED)
def test_learn_last_keeps_the_last_answer_and_learn_all_keeps_everything_but_the_first_token(kind, name):
    tokenizer = TOKENIZERS[kind]()
    every, last, all_ = (encode(tokenizer, TURNS, name, learn) for learn in ("assistant", "last", "all"))
    assert learned_runs(tokenizer, last) == learned_runs(tokenizer, every)[-1:]
    assert all_.is_label[1:].all() and not all_.is_label[0]
    assert len({tokenizer.decode(one.input_ids) for one in (every, last, all_)}) == 1


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", NAMED)
def test_bos_is_prepended_exactly_once_if_the_tokenizer_does_so_and_not_otherwise(kind, name):
    tokenizer = TOKENIZERS[kind]()
    ids = encode(tokenizer, TURNS[:3], name).input_ids.tolist()
    adds = kind == "sentencepiece"
    assert ids[: 2 if adds else 1].count(tokenizer.bos_token_id) == int(adds)


@pytest.mark.parametrize("name", NAMED)
def test_a_named_template_gives_the_ids_and_mask_of_transformers_itself(name):
    """Cross-check: the ids of `apply_chat_template` on the resolved source, and its own mask from the markers."""
    tokenizer = byte_level_tokenizer()
    source = resolve_template(tokenizer, name, default="").source
    reference = tokenizer.apply_chat_template(
        TURNS, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(tokenizer, TURNS, name)
    assert encoded.input_ids.tolist() == reference["input_ids"]
    mask = [bool(value) for value in reference["assistant_masks"]]
    assert encoded.is_label.tolist() == mask


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"none"}))
def test_the_prompt_before_an_answer_is_what_the_model_sees_at_inference(name):
    """Generation prompt + answer = training text: otherwise the model would be trained on another prompt."""
    tokenizer = byte_level_tokenizer()
    template = resolve_template(tokenizer, name, default="")
    (rendered,) = render(tokenizer, template, TURNS, None, "assistant")
    prompt = tokenizer.apply_chat_template(
        TURNS[:-1], chat_template=template.source, tokenize=False, add_generation_prompt=True
    )
    # alpaca separates turns by an empty line, which belongs to the following turn
    assert rendered.text[: rendered.spans[-1][0]] == prompt


@pytest.mark.parametrize("source", [PLAIN_CHATML, MARKED], ids=["prefixes", "markers"])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizers_own_template_is_masked_exactly_with_and_without_markers(kind, source):
    tokenizer = with_template(TOKENIZERS[kind](), source)
    messages = TURNS[1:]
    encoded = encode(tokenizer, messages)
    end = tokenizer.eos_token if source is MARKED else "<|im_end|>"
    runs = learned_runs(tokenizer, encoded)
    if kind == "byte-level":
        assert runs == [answer + end for answer in ANSWERS]
    else:  # here <|im_end|> is plain text and ends in a line break that no special token cuts off
        assert [run.strip() for run in runs] == [answer + end for answer in ANSWERS]


def encode_all(tokenizer, messages, template="auto", learn="assistant", tools=None):
    """The documents of one conversation."""
    encoder = Encoder(tokenizer, format_name="messages", columns={}, template=template, learn=learn)
    (result,) = encoder.encode([RawRecord({"messages": messages, "tools": tools}, "x, line 1")])
    if isinstance(result, BadRecord):
        raise result
    return result


REWRITES = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' and loop.last %}{{ '<think/>' }}"
    "{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_answers_gets_one_exact_document_per_answer():
    tokenizer = with_template(byte_level_tokenizer(), REWRITES)
    documents = encode_all(tokenizer, TURNS)
    assert [learned_runs(tokenizer, one) for one in documents] == [[f"<think/>{a}<|im_end|>"] for a in ANSWERS]
    assert all(one.is_unrolled for one in documents)
    for one, until in zip(documents, (2, 4, 6)):
        prompt = tokenizer.apply_chat_template(TURNS[:until], add_generation_prompt=True, return_dict=False)
        assert one.input_ids.tolist()[: len(prompt)] == prompt and not one.is_label[: len(prompt)].any()
    assert learned_runs(tokenizer, encode(tokenizer, TURNS, learn="last")) == ["<think/>Bye!<|im_end|>"]


def test_a_template_without_a_generation_prompt_is_rejected_because_its_header_would_be_learned():
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    tokenizer = with_template(byte_level_tokenizer(), source)
    with pytest.raises(UserError, match=r"has no generation prompt.*'<\|im_start\|>assistant"):
        encode(tokenizer, TURNS)


def test_markers_that_do_not_enclose_the_answers_are_rejected():
    source = "{% for m in messages %}{{ m.content }}{% generation %}{{ '!' }}{% endgeneration %}{% endfor %}"
    with pytest.raises(UserError, match="markers enclose 2 spans for 1 answers"):
        encode(with_template(byte_level_tokenizer(), source), TURNS[1:3], learn="last")
    source = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ '!' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="do not enclose the answer 'I am fine"):
        encode(with_template(byte_level_tokenizer(), source), TURNS[1:3])


def test_a_token_that_straddles_the_boundary_of_an_answer_is_split_as_at_inference():
    tokenizer = byte_level_tokenizer()
    messages = [{"role": "user", "content": "Which"}, {"role": "assistant", "content": "are you"}]
    whole = tokenizer("Whichare you").input_ids
    encoded = encode(tokenizer, messages, "none")
    assert learned_runs(tokenizer, encoded) == ["are you<|endoftext|>"]
    prompt = tokenizer("Which").input_ids
    assert encoded.input_ids.tolist()[: len(prompt)] == prompt
    spaced = [{"role": "user", "content": "Which "}, {"role": "assistant", "content": "are you"}]
    assert whole and learned_runs(tokenizer, encode(tokenizer, spaced, "none")) == ["are you<|endoftext|>"]


def test_the_tokens_before_an_answer_are_those_of_the_prompt_alone_where_no_token_straddles():
    """A tokenizer that looks ahead splits the line breaks before an answer otherwise than those at a prompt's end."""
    tokenizer = copy.deepcopy(byte_level_tokenizer())
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    line_break = "Ċ"
    core["model"]["vocab"][2 * line_break] = len(tokenizer)
    core["model"]["merges"].append([line_break, line_break])
    tokenizer = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ':\n\n' + m.content + '<|endoftext|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n\n' }}{% endif %}"
    )
    prompt = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(TURNS[:3], return_dict=False)
    assert whole[: len(prompt)] != prompt and tokenizer.decode(whole).startswith(tokenizer.decode(prompt))
    encoded = encode(tokenizer, TURNS[:3])
    assert encoded.input_ids.tolist()[: len(prompt)] == prompt
    assert learned_runs(tokenizer, encoded) == [ANSWERS[0] + "<|endoftext|>"]


def test_an_answer_of_weight_zero_is_context():
    messages = [dict(turn) for turn in TURNS]
    messages[2]["weight"] = 0
    tokenizer = byte_level_tokenizer()
    for template in ("chatml", "auto"):
        encoded = encode(with_template(tokenizer, PLAIN_CHATML), messages, template)
        assert learned_runs(tokenizer, encoded) == [answer + "<|im_end|>" for answer in ANSWERS[1:]]


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALLS = [
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2}'}}]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4."},
]


def test_tool_calls_are_learned_and_tool_results_are_not():
    tokenizer = byte_level_tokenizer()
    encoded = encode(tokenizer, CALLS, "chatml", tools=TOOLS)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    assert learned_runs(tokenizer, encoded) == [call, "It is 4.<|im_end|>"]
    text = tokenizer.decode(encoded.input_ids)
    assert '<tools>\n{"type": "function"' in text and "<tool_response>\n4\n</tool_response><|im_end|>" in text


@pytest.mark.parametrize("name", sorted(set(NAMED) - {"chatml"}))
def test_a_template_that_would_omit_tools_rejects_them(name):
    with pytest.raises(BadRecord, match="does not support tools or tool calls or tool results"):
        encode(byte_level_tokenizer(), CALLS, name, tools=TOOLS)


def test_alpaca_data_gets_stanfords_prompt_with_and_without_input():
    tokenizer = byte_level_tokenizer()
    encoder = Encoder(tokenizer, format_name="alpaca", columns={}, template="auto", learn="assistant")
    records = [{"instruction": "Do.", "input": extra, "output": "Done."} for extra in ("", "this")]
    texts = [
        tokenizer.decode(one[0].input_ids) for one in encoder.encode([RawRecord(fields, "") for fields in records])
    ]
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n### Instruction:\nDo.\n\n"
    assert texts == [
        f"{head}. {tail}### Response:\nDone.<|endoftext|>",
        f"{head}, paired with an input that provides further context. {tail}### Input:\nthis\n\n"
        "### Response:\nDone.<|endoftext|>",
    ]


def test_errors_for_unknown_and_missing_templates_list_the_choices(tmp_path):
    tokenizer = byte_level_tokenizer()
    with pytest.raises(UserError, match=r"data.template is 'chatlm'; expected auto, tokenizer, a .jinja"):
        resolve_template(tokenizer, "chatlm", default="alpaca")
    with pytest.raises(UserError, match="has no chat template; set it to one of chatml"):
        resolve_template(tokenizer, "tokenizer", default="alpaca")
    with pytest.raises(UserError, match="cannot be read"):
        resolve_template(tokenizer, str(tmp_path / "no.jinja"), default="alpaca")


def test_a_jinja_file_can_be_the_template(tmp_path):
    (tmp_path / "mine.jinja").write_text(MARKED)
    tokenizer = byte_level_tokenizer()
    runs = learned_runs(tokenizer, encode(tokenizer, TURNS[1:], str(tmp_path / "mine.jinja")))
    assert runs == [answer + "<|endoftext|>" for answer in ANSWERS]


def test_a_template_cannot_reach_python():
    source = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    template = Template("evil", source, is_own=True)
    with pytest.raises(BadRecord, match="rejects this conversation"):
        render(byte_level_tokenizer(), template, TURNS, None, "all")


content = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\ue0f0\ue0f1"), min_size=1, max_size=30)


@pytest.mark.parametrize("name", NAMED)
@given(question=content, answers=st.lists(content, min_size=1, max_size=3))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_masks_stay_exact_for_any_text(name, question, answers):
    tokenizer = byte_level_tokenizer()
    messages = [{"role": "user", "content": question}]
    for answer in answers:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "next"}]
    encoded = encode(tokenizer, messages[:-1], name)
    runs = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in _learned_ids(encoded)]
    assert runs == expected_runs(tokenizer, name, answers)


def _learned_ids(encoded):
    runs = itertools.groupby(zip(encoded.input_ids.tolist(), encoded.is_label), key=lambda pair: pair[1])
    return [[token for token, _ in run] for is_label, run in runs if is_label]
