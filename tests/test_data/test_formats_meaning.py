"""Every field that changes the meaning is read, or the record is refused; what nothing reads is named."""

import pytest

from qlora_dist.data.formats import FORMATS, BadRecord, RawRecord, convert

TURNS = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]
SHAREGPT = [{"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in TURNS]
CALL = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
TOOLS = [{"name": "weather", "parameters": {}}]


def read(format_name, record):
    documents, unread = convert(format_name, RawRecord(record, "a.jsonl, line 1"), {})
    return documents[0], unread


def messages_of(format_name, record):
    return read(format_name, record)[0].messages


def with_turn(format_name, index, **extra):
    """A record of a format with turns, in which one turn has more fields."""
    turns = SHAREGPT if format_name == "sharegpt" else TURNS
    turns = [dict(turn, **(extra if i == index else {})) for i, turn in enumerate(turns)]
    if format_name == "prompt-completion":
        return {"prompt": turns[:1], "completion": turns[1:]}
    return {"conversations" if format_name == "sharegpt" else "messages": turns}


WITH_TURNS = ["messages", "sharegpt", "prompt-completion"]


@pytest.mark.parametrize("format_name", WITH_TURNS)
@pytest.mark.parametrize("switch", ["weight", "train", "training", "trainable", "loss", "loss_mask"])
@pytest.mark.parametrize("value", [0, 1, False, True, 0.0])
def test_a_switch_of_a_turn_becomes_its_weight_in_every_format_with_turns(format_name, switch, value):
    messages = messages_of(format_name, with_turn(format_name, 1, **{switch: value}))
    assert messages[1]["weight"] == int(value) and "weight" not in messages[3]


@pytest.mark.parametrize("format_name", WITH_TURNS)
@pytest.mark.parametrize(
    ("index", "extra", "message"),
    [
        (1, {"train": "no"}, r"\[[01]\].train is 'no', expected 0 or false"),
        (1, {"weight": 0.5}, r"weight is 0.5, expected 0 or false"),
        (1, {"loss_mask": [1, 0]}, "loss_mask is"),
        (1, {"train": False, "loss": True}, "switches that contradict each other"),
        (0, {"train": True}, "train is True, but only answers can be switched"),
        (1, {"mask": True}, "mask is True: it may mean learned or hidden"),
        (1, {"images": ["a.png"]}, "only text can be learned"),
        (0, {"tools": TOOLS}, "tools belong beside the messages"),
        (1, {"reasoning": "x", "thinking": "y"}, "two different texts of reasoning"),
        (1, {"reasoning": {"a": 1}}, "reasoning is an object, expected text"),
        (0, {"reasoning": "x"}, "only answers have reasoning"),
    ],
)
def test_what_a_turn_asks_for_and_cannot_have_is_refused_by_its_name(format_name, index, extra, message):
    with pytest.raises(BadRecord, match=message):
        read(format_name, with_turn(format_name, index, **extra))


@pytest.mark.parametrize("format_name", WITH_TURNS)
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_passed_on_under_one_name(format_name, name):
    messages = messages_of(format_name, with_turn(format_name, 1, **{name: "because"}))
    assert messages[1]["reasoning_content"] == "because" and messages[1]["content"] == "a1"


def test_a_question_whose_switch_is_off_is_context_as_ever():
    assert messages_of("messages", with_turn("messages", 0, train=False))[0] == TURNS[0]


def test_answers_inside_a_prompt_are_context():
    messages = messages_of("prompt-completion", {"prompt": TURNS[:3], "completion": TURNS[3:]})
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


ONE_ANSWER = {
    "alpaca": {"instruction": "q", "output": "a"},
    "dolly": {"instruction": "q", "response": "a"},
    "input-output": {"input": "q", "output": "a"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "self-instruct": {"instruction": "q", "instances": [{"output": "a"}]},
    "guanaco": {"text": "### Human: q### Assistant: a"},
    "chip2": {"text": "<human>: q\n<bot>: a"},
    "hh-rlhf": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": None},
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "oasst": {
        "prompt": {"role": "prompter", "text": "q", "replies": [{"role": "assistant", "text": "a", "replies": []}]}
    },
}


@pytest.mark.parametrize("format_name", ONE_ANSWER)
def test_system_prompt_history_and_tools_beside_a_record_are_used_in_every_format(format_name):
    beside = {"system_prompt": "Be kind.", "history": [["q0", "a0"]], "tools": TOOLS}
    conversation, unread = read(format_name, ONE_ANSWER[format_name] | beside)
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in conversation.messages] == ["Be kind.", "q0", "a0", "q", "a"]
    assert conversation.messages[2]["weight"] == 0 and "weight" not in conversation.messages[4]
    assert conversation.tools == [{"type": "function", "function": TOOLS[0]}] and unread == set()


def test_two_different_system_prompts_are_refused_and_equal_ones_are_one():
    turns = [{"role": "system", "content": "s"}, *TURNS]
    assert len(messages_of("messages", {"messages": turns, "system": "s"})) == 5
    with pytest.raises(BadRecord, match="system prompt is 't', but its first message has another: 's'"):
        read("messages", {"messages": turns, "system": "t"})
    with pytest.raises(BadRecord, match="system and system_prompt are different"):
        read("messages", {"messages": TURNS, "system": "t", "system_prompt": "u"})


@pytest.mark.parametrize("history", ["x", [["only a question"]], [["q", 1]], [3]])
def test_a_history_of_another_form_is_refused(history):
    with pytest.raises(BadRecord, match=r"field history"):
        read("alpaca", ONE_ANSWER["alpaca"] | {"history": history})


@pytest.mark.parametrize("format_name", ONE_ANSWER)
@pytest.mark.parametrize("field", ["images", "audio", "videos", "chat_template_kwargs"])
def test_media_and_options_of_templates_are_refused_unless_empty(format_name, field):
    record = ONE_ANSWER[format_name]
    with pytest.raises(BadRecord, match=f"field {field} is "):
        read(format_name, record | {field: {"x": 1}})
    for empty in (None, [], {}, ""):
        read(format_name, record | {field: empty})


def test_fields_without_a_use_are_named_at_every_level_and_nulls_are_none():
    turns = [dict(TURNS[0], refusal=None), dict(TURNS[1], refusal="no", id=3)]
    _, unread = read("messages", {"messages": turns, "id": 1, "source": "web", "lang": None})
    assert unread == {"id", "source", "messages[].refusal", "messages[].id"}
    assert read("text", {"text": "a", "url": "u"})[1] == {"url"}
    assert read("self-instruct", {"instruction": "q", "instances": [{"output": "a", "n": 1}]})[1] == {"instances[].n"}


@pytest.mark.parametrize("place", [0, 1])
def test_a_deleted_reply_is_never_on_the_path_whatever_its_rank(place):
    good = {"role": "assistant", "text": "good", "rank": 1, "replies": []}
    replies = [good, good | {"text": "next"}]
    replies.insert(place, good | {"text": "bad", "rank": 0, "deleted": True})
    record = {"prompt": {"role": "prompter", "text": "q", "replies": replies}}
    assert [message["content"] for message in messages_of("oasst", record)] == ["q", "good"]


def test_an_answer_that_is_context_is_learned_where_its_own_switch_says_so():
    turns = [TURNS[0], TURNS[1] | {"train": True}, TURNS[2]]
    messages = messages_of("prompt-completion", {"prompt": turns, "completion": TURNS[3:]})
    assert [message.get("weight") for message in messages] == [None, 1, None, None]


def test_calls_of_sharegpt_get_ids_of_nine_characters_and_their_results_the_same():
    calls = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    result = {"from": "observation", "value": "1"}
    turns = [SHAREGPT[0], {"from": "function_call", "value": calls}, result, result, SHAREGPT[1]]
    messages = messages_of("sharegpt", {"conversations": [*turns, SHAREGPT[2], *turns[1:3], SHAREGPT[3]]})
    ids = [call["id"] for message in messages for call in message.get("tool_calls", [])]
    assert len(set(ids)) == 4 and all(len(name) == 9 and name.isalnum() for name in ids)
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == ids[:3]


@pytest.mark.parametrize("field", ["loss_mask", "assistant_masks", "completion_mask"])
def test_masks_beside_token_ids_are_honoured_with_the_labels(field):
    record = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], field: [1, 0, 1]}
    assert read("tokens", record)[0].is_label == [False, False, True]
    for wrong, message in (([1, 0], "2 entries"), ([1, 0, 0.5], "expected 0"), ("101", "expected a list")):
        with pytest.raises(BadRecord, match=f"field {field}.*{message}"):
            read("tokens", record | {field: wrong})


def test_padding_is_not_learned_and_padding_in_front_is_refused():
    assert read("tokens", {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]})[0].is_label == [True, True, False]
    with pytest.raises(BadRecord, match="attention_mask has a 0 before a 1"):
        read("tokens", {"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1]})


DEEP = "[" * 3000 + "]" * 3000


@pytest.mark.parametrize(
    ("format_name", "record", "message"),
    [
        ("messages", with_turn("messages", 1, content="a \ud83d b"), "half of a surrogate pair"),
        ("messages", with_turn("messages", 1, tool_calls=5), "tool_calls is a number, expected a list"),
        ("messages", with_turn("messages", 1, tool_calls=[5]), r"tool_calls\[0\] has no function object"),
        ("messages", with_turn("messages", 1, tool_calls=[CALL | {"id": []}]), "id is a list, expected text"),
        (
            "messages",
            with_turn("messages", 1, tool_calls=[{"function": {"name": "f", "arguments": DEEP}}]),
            "nested too deeply",
        ),
        ("messages", {"messages": TURNS, "tools": DEEP}, "field tools is JSON nested too deeply"),
        ("messages", {"messages": TURNS, "tools": "[" + "9" * 5000 + "]"}, "a number with thousands of digits"),
        ("messages", {"messages": TURNS, "tools": '[{"a": 1, "a": 2}]'}, "the key 'a' twice"),
        ("messages", {"messages": TURNS, "tools": 5}, "field tools is a number"),
        ("messages", {"messages": TURNS, "tools": [{"\ud83d": 1}]}, "half of a surrogate pair"),
        ("text", {"text": "\udc00"}, "half of a surrogate pair"),
        ("oasst", {"prompt": {"role": "prompter", "text": "q", "replies": 5}}, "replies of a message is a number"),
        ("oasst", {"prompt": {"role": "prompter", "text": "q", "replies": ["x"]}}, "expected a list of message"),
        ("oasst", {"prompt": 5}, "expected a message object"),
        (
            "oasst",
            {"prompt": {"role": "prompter", "text": "q", "replies": [{"rank": "x"}, {"rank": {}}]}},
            "rank of a reply is text, expected a number",
        ),
    ],
)
def test_records_of_wrong_inner_types_are_refused_with_the_reason(format_name, record, message):
    with pytest.raises(BadRecord, match=message):
        read(format_name, record)


def test_what_no_check_foresees_is_refused_too(monkeypatch):
    def fail(record):
        raise AttributeError("no such thing")

    monkeypatch.setitem(FORMATS, "text", fail)
    with pytest.raises(BadRecord, match=r"cannot be read as text \(AttributeError: 'no such thing'\)"):
        read("text", {"text": "a"})
