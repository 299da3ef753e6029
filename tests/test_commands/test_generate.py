"""Generation: the prompt of training, batches, stops, streams, several adapters, what a path leads to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.tiny_models import shared_model, tiny_model, tiny_tokenizer
from helpers.tiny_run import changed, make_inputs
from tokenizers.processors import TemplateProcessing

from qlora_dist.commands.generate import (
    Trained,
    Writer,
    chat,
    find_template,
    find_trained,
    generate,
    open_writer,
    parse_named,
    read_prompts,
)
from qlora_dist.config import parse_config
from qlora_dist.data.documents import build_documents
from qlora_dist.data.tokenizer import load_tokenizer
from qlora_dist.errors import UserError
from qlora_dist.model import Sampling
from qlora_dist.model.generation import generate_ids
from qlora_dist.model.lora import attach_lora, trainable_parameters
from qlora_dist.model.lora_files import save_adapter

CPU = torch.device("cpu")
QUESTIONS = ["w6 w7", "w9 w8 w7 w6 w20 w21", "w30"]


def save_random_adapter(folder: Path, base: Path, seed: int) -> None:
    model = attach_lora(tiny_model(), rank=4, alpha=8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model).items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(model, folder, str(base))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    raw = make_inputs(folder)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(raw))
    save_random_adapter(folder / "run" / "adapter", folder / "model", 1)
    save_random_adapter(folder / "second", folder / "model", 2)
    return folder / "run"


@pytest.mark.parametrize("place", [0, 2, 5])
def test_new_tokens_end_before_the_first_stop_token(place: int) -> None:
    model, tokenizer = tiny_model(attention="sdpa"), tiny_tokenizer()
    (whole,) = generate_ids(model, tokenizer, [[5, 6, 7]], Sampling(max_new_tokens=6))
    assert len(whole) == 6
    (ended,) = generate_ids(model, tokenizer, [[5, 6, 7]], Sampling(max_new_tokens=6), stop_ids=[whole[place]])
    assert ended == whole[: whole.index(whole[place])]


def ask(*texts: str) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


# --- what a path leads to ---------------------------------------------------------------------------------------------


def test_a_run_its_adapter_and_its_newest_checkpoint_lead_to_the_same_base(run: Path, tmp_path: Path) -> None:
    trained = find_trained(run)
    assert trained.adapter == run / "adapter" and trained.model.compute_dtype == "float32"
    from_adapter = find_trained(run / "adapter")
    assert (from_adapter.model, from_adapter.data) == (trained.model, trained.data)
    moved = find_trained(run, base="elsewhere")
    assert moved.model.name == "elsewhere" and moved.model.quantization == trained.model.quantization


def test_an_unfinished_run_gives_its_newest_good_checkpoint(run: Path, tmp_path: Path) -> None:
    from qlora_dist.train.checkpoint import save_checkpoint

    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="no adapter and no intact checkpoint yet"):
        find_trained(unfinished)
    for step in (3, 5):
        save_checkpoint(
            unfinished / "checkpoints",
            step,
            write_weights=lambda folder: save_random_adapter(folder, run.parent / "model", 1),
            optimizer_tensors={},
            state={
                "num_tokens": 1,
                "num_labels": 1,
                "config": "",
                "data_fingerprint": "",
                "layout": [],
                "optimizer_numbers": {},
            },
            keep=3,
        )
    assert find_trained(unfinished).adapter == unfinished / "checkpoints" / "step-00000005"
    weights = unfinished / "checkpoints" / "step-00000005" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert find_trained(unfinished).adapter == unfinished / "checkpoints" / "step-00000003"


def test_an_adapter_without_a_run_brings_its_own_base(run: Path, tmp_path: Path) -> None:
    trained = find_trained(run.parent / "second")
    # it lies beside, not in, a run directory
    assert trained.data is None and trained.model.name == str(run.parent / "model")
    assert trained.model.quantization == "nf4"


def test_paths_that_lead_nowhere_say_what_is_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        find_trained(tmp_path / "absent")
    with pytest.raises(UserError, match="neither a run directory"):
        find_trained(tmp_path)
    raw = changed(yaml.safe_load((run / "config.yaml").read_text()), model__quantization="none") | {"lora": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match="the run is not finished"):
        find_trained(tmp_path)
    (tmp_path / "model").mkdir()
    whole = find_trained(tmp_path)
    assert whole.adapter is None and whole.model.name == str(tmp_path / "model")


# --- the prompt -------------------------------------------------------------------------------------------------------


def first_document(raw: dict[str, Any], tokenizer: Any, folder: Path) -> Any:
    data = parse_config(raw).data
    return build_documents(data.train, tokenizer, row_tokens=512, template=data.template, cache_dir=folder)[0]


@pytest.mark.parametrize("template", ["auto", "chatml", "alpaca", "vicuna"])
def test_a_prompt_is_token_for_token_what_training_put_before_the_answer(
    run: Path, template: str, tmp_path: Path
) -> None:
    raw = changed(yaml.safe_load((run / "config.yaml").read_text()), data__template=template)
    tokenizer = load_tokenizer(raw["model"]["name"])
    example = first_document(raw, tokenizer, tmp_path)
    begins = int(example.is_label.argmax())
    question = json.loads((run.parent / "train.json").read_text())[0]["input"]
    trained = Trained(parse_config(raw).model, None, parse_config(raw).data)
    writer = Writer(torch.nn.Module(), tokenizer, find_template(trained, tokenizer))
    assert writer.encode(ask(question)[0]) == example.input_ids[:begins].tolist()


@pytest.mark.parametrize("template", ["auto", "alpaca", "chatml"])
def test_the_same_holds_for_a_subword_tokenizer_without_a_chat_template(
    run: Path, template: str, tmp_path: Path
) -> None:
    base = shared_model("tinybase6m")
    (tmp_path / "data.json").write_text(
        json.dumps([{"instruction": "Name three colours.", "input": "", "output": "Red, blue, green."}])
    )
    raw = changed(yaml.safe_load((run / "config.yaml").read_text()), model__name=str(base), data__template=template)
    raw["data"]["train"] = [{"path": str(tmp_path / "data.json")}]  # its format is detected, here and there
    tokenizer = load_tokenizer(str(base))
    tokenizer.chat_template = None
    example = first_document(raw, tokenizer, tmp_path / "cache")
    begins = int(example.is_label.argmax())
    trained = Trained(parse_config(raw).model, None, parse_config(raw).data)
    found = find_template(trained, tokenizer)
    assert found is not None and found.name == {"auto": "alpaca"}.get(template, template)
    writer = Writer(torch.nn.Module(), tokenizer, found)
    assert writer.encode(ask("Name three colours.")[0]) == example.input_ids[:begins].tolist()
    assert writer.stop_ids or writer.stop_texts


def test_a_run_on_plain_text_continues_the_prompt_as_it_is(run: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "w6 w7 w8"}\n')
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["data"]["train"] = [{"path": str(tmp_path / "data.jsonl")}]
    tokenizer = load_tokenizer(raw["model"]["name"])
    trained = Trained(parse_config(raw).model, None, parse_config(raw).data)
    assert find_template(trained, tokenizer) is None
    assert Writer(torch.nn.Module(), tokenizer, None).encode(ask("w6 w7")[0]) == [6, 7]


def test_a_tokenizer_that_ends_every_text_does_not_end_what_is_continued() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    assert tokenizer("w6 w7")["input_ids"] == [6, 7, 2], "the guard: it does so"
    assert Writer(torch.nn.Module(), tokenizer, None).encode(ask("w6 w7")[0]) == [6, 7]


def test_a_template_can_be_named_and_raw_means_none(run: Path) -> None:
    tokenizer = tiny_tokenizer()
    trained = Trained(find_trained(run).model, None, None)
    found = find_template(trained, tokenizer)
    assert found is not None and found.source == tokenizer.chat_template
    assert find_template(trained, tokenizer, "raw") is None
    named = find_template(trained, tokenizer, "alpaca")
    assert named is not None and named.name == "alpaca"
    tokenizer.chat_template = None
    assert find_template(trained, tokenizer) is None


def test_an_ending_that_is_no_token_stops_by_its_text() -> None:
    tokenizer = tiny_tokenizer()
    trained = Trained(parse_config_model("x"), None, None)
    own = Writer(torch.nn.Module(), tokenizer, find_template(trained, tokenizer))
    assert own.stop_ids == [2] and own.stop_texts == []
    tokenizer.chat_template = tokenizer.chat_template.replace("</s>", "w8 w9")
    two_words = Writer(torch.nn.Module(), tokenizer, find_template(trained, tokenizer))
    assert two_words.stop_texts == ["w8 w9"]
    assert two_words._text([6, 7, 8, 9, 10]).strip() == "w6 w7"


def parse_config_model(name: str) -> Any:
    from qlora_dist.config import ModelConfig

    return ModelConfig(name=name)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_batched_answers_equal_answers_alone_and_repeat(run: Path) -> None:
    writer = open_writer(find_trained(run), CPU)
    sampling = Sampling(max_new_tokens=8)
    alone = [next(writer.answer([one], sampling)) for one in ask(*QUESTIONS)]
    assert list(writer.answer(ask(*QUESTIONS), sampling, batch_size=3)) == alone
    assert list(writer.answer(ask(*QUESTIONS), sampling, batch_size=2)) == alone
    assert len(set(alone)) > 1 and all(alone)


def test_greedy_answers_are_the_arguments_of_the_largest_logit(run: Path) -> None:
    writer = open_writer(find_trained(run), CPU)
    ids = writer.encode(ask(QUESTIONS[1])[0])
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(6):
            logits = writer.model(input_ids=torch.tensor([ids + expected]), use_cache=False).logits[0, -1]
            if (token := int(logits.argmax())) in writer.stop_ids:
                break
            expected.append(token)
    (text,) = writer.answer(ask(QUESTIONS[1]), Sampling(max_new_tokens=6))
    assert text == writer.tokenizer.decode(expected, skip_special_tokens=True)


def test_sampling_follows_its_seed_and_leaves_the_global_generator_alone(run: Path) -> None:
    writer = open_writer(find_trained(run), CPU)

    def sample(seed: int) -> str:
        return next(
            writer.answer(ask(QUESTIONS[0]), Sampling(max_new_tokens=12, temperature=2.0, top_p=0.95, seed=seed))
        )

    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    texts = [sample(seed) for seed in (0, 0, 1, 2)]
    assert torch.equal(torch.rand(2), expected)
    assert texts[0] == texts[1] and len(set(texts)) > 1


def test_a_streamed_answer_is_the_answer(run: Path) -> None:
    writer = open_writer(find_trained(run), CPU)
    sampling = Sampling(max_new_tokens=8)
    pieces: list[str] = []
    (text,) = writer.answer(ask(QUESTIONS[1]), sampling, on_text=pieces.append)
    assert len(pieces) > 1 and "".join(pieces).strip() == text.strip()
    assert [text] == list(writer.answer(ask(QUESTIONS[1]), sampling))


def test_adapters_by_name_change_the_answer_and_weights_combine_them(run: Path) -> None:
    second = {"second": run.parent / "second"}
    trained, sampling = find_trained(run), Sampling(max_new_tokens=8)

    def answers(**options: Any) -> list[str]:
        return list(open_writer(trained, CPU, **options).answer(ask(*QUESTIONS), sampling))

    alone = answers()
    last = answers(adapters=second)
    assert alone != last
    assert answers(adapters=second, weights={"trained": 1.0, "second": 0.0}) == alone
    assert answers(adapters=second, weights={"trained": 0.0, "second": 1.0}) == last
    with pytest.raises(UserError, match="adapter 'third' is not loaded; loaded: trained, second"):
        answers(adapters=second, weights={"third": 1.0})


# --- commands ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_stream_a_file_of_answers_or_a_chat(run: Path, tmp_path: Path) -> None:
    sampling = Sampling(max_new_tokens=6)
    expected = list(open_writer(find_trained(run), CPU).answer(ask(*QUESTIONS), sampling))

    def output(**options: Any) -> str:
        written: list[str] = []
        generate(run, sampling=sampling, device="cpu", write=written.append, **options)
        return "".join(written)

    assert output(prompt=QUESTIONS[0]).strip() == expected[0].strip()
    (tmp_path / "prompts.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    lines = [json.loads(line) for line in output(prompts=tmp_path / "prompts.txt").splitlines()]
    assert [line["completion"] for line in lines] == expected
    assert [line["messages"][0]["content"] for line in lines] == QUESTIONS
    typed = iter([QUESTIONS[0], "/reset", QUESTIONS[1], ""])
    said = output(read=lambda: next(typed)).splitlines()
    assert [line.strip() for line in said[1:]] == [expected[0].strip(), expected[1].strip()]
    with pytest.raises(UserError, match="both given"):
        output(prompt="a", prompts="b")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_of_an_answer_reach_no_terminal_raw(
    is_terminal: bool, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    escape = "\x1b]52;c;aGk=\x07\u202e"

    def answer(self: Writer, conversations: Any, *_: Any, on_text: Any = None, **__: Any) -> list[str]:
        if on_text is not None:
            on_text(escape)
        return [escape for _ in conversations]

    monkeypatch.setattr(Writer, "answer", answer)
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    generate(run, prompt="w6", device="cpu")
    said = capsys.readouterr().out
    assert (said == escape + "\n") is not is_terminal
    assert not is_terminal or said == r"\x1b]52;c;aGk=\x07\u202e" + "\n"
    (tmp_path / "prompts.txt").write_text("w6\n")
    generate(run, prompts=tmp_path / "prompts.txt", device="cpu")
    assert json.loads(capsys.readouterr().out)["completion"] == escape  # whoever parses it gets the text itself


def test_a_chat_remembers_until_it_is_reset() -> None:
    seen: list[list[str]] = []

    class Echo:
        def answer(
            self, conversations: Sequence[Any], sampling: Sampling, *, on_text: Callable[[str], None]
        ) -> list[str]:
            seen.append([message["content"] for message in conversations[0]])
            on_text("ok")
            return ["ok"]

    typed: list[str | None] = ["one", "two", "/reset", "three", None]
    written: list[str] = []
    chat(Echo(), Sampling(), lambda: typed.pop(0), written.append)  # type: ignore[arg-type]
    assert seen == [["one"], ["one", "ok", "two"], ["three"]]
    assert "".join(written).count("ok\n") == 3


def test_prompt_files_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    system = {"role": "system", "content": "w8"}
    path.write_text('{"prompt": "w6", "system": "w8"}\n\n' + json.dumps({"messages": [system, *ask("w7")[0]]}) + "\n")
    assert read_prompts(path) == [[system, *ask("w6")[0]], [system, *ask("w7")[0]]]
    for text, message in (
        ("{", r"prompts\.jsonl:1: not valid JSON"),
        ('{"text": "a"}', "expected an object with `prompt`"),
        ('{"messages": [{"role": "user"}]}', "needs role and content"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message is the assistant's"),
        ("\n", "the file is empty"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_prompts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")


def test_named_options_are_pairs() -> None:
    assert parse_named(["a=x=y", "b=1"], "--adapter") == {"a": "x=y", "b": "1"}
    for bad in (["a"], ["=x"], ["a="], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="expected name=value, each name once"):
            parse_named(bad, "--adapter")
