"""A trained run or adapter -> text: one prompt, a file of prompts, or a chat. Prompts look exactly as in training.

    Writer     base + adapters + tokenizer + template, ready to answer
    generate   the command

Greedy and batched by default: the same prompts give the same text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from ..cluster.launcher import launched_ranks
from ..cluster.world import World, own_device
from ..config import DataConfig
from ..data.templates import Template, apply_template, resolve_template
from ..errors import UserError, printable_json
from ..model import Sampling, check_gathered_layer, generate_ids, lora
from ..train.prompt_format import PromptFormat, find_stops
from .screen import write_data
from .trained import Trained, find_trained, first_documents, load_trained_base, require_memory

log = logging.getLogger(__name__)

Message = dict[str, Any]


def find_template(trained: Trained, tokenizer: Any, name: str = "auto") -> Template | None:
    """How a conversation becomes text; None where the run was trained on plain text: a prompt is then just continued.

    auto: what the run used. Without a run: the tokenizer's chat template, else None.
    """
    if name != "auto":
        return None if name == "raw" else resolve_template(tokenizer, name, default="vicuna")
    if trained.prompts is not None:
        return trained.prompts.template
    if trained.data is None:
        has_own = isinstance(tokenizer.chat_template, str)
        return resolve_template(tokenizer, "tokenizer", default="") if has_own else None
    kind = _format_of(trained.data, tokenizer)
    return PromptFormat.of_formats(tokenizer, [kind], trained.data.template, trained.data.date).template


def _format_of(data: DataConfig, tokenizer: Any) -> str:
    """Format of the first training source, detected again if the config does not name it: for runs of earlier versions,
    which did not keep it."""
    if data.train[0].format != "auto":
        return data.train[0].format
    try:
        return first_documents(data, tokenizer, 8, data.row_tokens).stats.sources[0].format
    except UserError as error:
        log.warning("the training data cannot be read (%s): prompts are treated as conversations", error)
        return "messages"


# --- answering --------------------------------------------------------------------------------------------------------


class Writer:
    """A model that answers. Conversations go through the run's template; prompts of a text run are used as they are."""

    def __init__(
        self, model: torch.nn.Module, tokenizer: Any, template: Template | None, world: World | None = None
    ) -> None:
        self.model = model
        self._world = world  # prompts are distributed over its ranks; None: one process
        self.tokenizer = tokenizer
        self.template = template
        self.stop_ids, self.stop_texts = find_stops(model, tokenizer, template)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids up to the start of the answer."""
        if self.template is None:
            text = "".join(message["content"] for message in messages)
            ids = self.tokenizer(text)["input_ids"]
            # a tokenizer that appends EOS would end the document before it is continued
            return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids
        text = apply_template(self.tokenizer, self.template, messages, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling,
        *,
        batch_size: int = 8,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[str]:
        """One text per conversation, in order, on every rank. All ranks call it together."""
        rank, ranks = (0, 1) if self._world is None else (self._world.rank, self._world.size)
        for start in range(0, len(conversations), batch_size * ranks):
            group = conversations[start : start + batch_size * ranks]
            each = -(-len(group) // ranks)
            own = group[rank * each : (rank + 1) * each]
            # a rank without a prompt takes part in the gathers of a sharded base
            prompts = [self.encode(messages) for messages in own or group[:1]]
            made = generate_ids(
                self.model,
                self.tokenizer,
                prompts,
                sampling,
                stop_ids=self.stop_ids,
                stop_texts=self.stop_texts,
                on_text=on_text if rank == 0 else None,
            )
            texts = [self._text(ids) for ids in made[: len(own)]]
            yield from texts if self._world is None else chain.from_iterable(self._world.gather(texts))

    def _text(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self.stop_texts:
            text = text.split(stop, 1)[0]
        return text


def open_writer(
    trained: Trained,
    device: torch.device,
    *,
    adapters: dict[str, Path] | None = None,
    weights: dict[str, float] | None = None,
    how: str = "cat",
    template: str = "auto",
    world: World | None = None,
) -> Writer:
    """Loads base and adapters. The run's own adapter is named `trained`; `weights` activates their weighted sum.

    Without weights, the last of the named adapters is active. With a `world` the base of an fsdp run is sharded over
    its ranks, as it was in training.
    """
    shards = None if world is None else trained.shards(world)
    module: Any = load_trained_base(trained, device, shards=shards)
    if shards is not None:
        with torch.no_grad():
            module(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))
        check_gathered_layer(module)
    folders = {} if trained.adapter is None else {"trained": trained.adapter}
    folders |= adapters or {}
    if folders:
        module = lora.load_adapters(module, folders)
        if weights:
            lora.combine_adapters(module, weights, how)
        else:
            lora.activate(module, list(folders)[-1])
    tokenizer = trained.load_tokenizer()
    return Writer(module.eval(), tokenizer, find_template(trained, tokenizer, template), world)


# --- prompts and commands ---------------------------------------------------------------------------------------------


def read_prompts(path: str | Path) -> list[list[Message]]:
    """.jsonl: an object per line: `messages`, or `prompt` and optionally `system`. Other files: a prompt per line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {path}: cannot be read ({error})") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"prompts {path}: the file is empty; expected one prompt per line")
    if path.suffix == ".jsonl":
        return [_conversation(line, f"{path}:{number}") for number, line in numbered]
    return [[{"role": "user", "content": line}] for _, line in numbered]


def _conversation(line: str, where: str) -> list[Message]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"prompts {where}: not valid JSON ({error})") from None
    if isinstance(record, dict) and isinstance(record.get("messages"), list) and record["messages"]:
        for message in record["messages"]:
            if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
                raise UserError(f"prompts {where}: each message needs role and content, found {message!r}")
        if record["messages"][-1]["role"] == "assistant":
            raise UserError(f"prompts {where}: the last message is the assistant's; expected one to answer")
        return record["messages"]
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
        return [*system, {"role": "user", "content": record["prompt"]}]
    raise UserError(f"prompts {where}: expected an object with `prompt` (text) or `messages` (a list)")


def parse_named(values: Sequence[str], option: str) -> dict[str, str]:
    """name=value options -> a dict, in order. Raises UserError."""
    named = {}
    for value in values:
        name, separator, rest = value.partition("=")
        if not separator or not name or not rest or name in named:
            raise UserError(f"{option} {value!r}: expected name=value, each name once")
        named[name] = rest
    return named


def generate(
    path: str | Path,
    *,
    prompt: str | None = None,
    prompts: str | Path | None = None,
    base: str | None = None,
    adapters: Sequence[str] = (),
    weights: Sequence[str] = (),
    how: str = "cat",
    template: str = "auto",
    sampling: Sampling | None = None,
    batch_size: int = 8,
    device: str | None = None,
    read: Callable[[], str | None] | None = None,
    write: Callable[[str], None] | None = None,
) -> None:
    """The command. One prompt is streamed; a file of prompts gives one JSON object per line; without both it is a chat.
    As one of several ranks each answers its part of the prompts, and rank 0 writes.

    `adapters` and `weights` are name=folder and name=number. `read` returns the user's next line, None at the end.
    """
    sampling = sampling or Sampling()
    emit = write or write_data
    if prompt is not None and prompts is not None:
        raise UserError("--prompt and --prompts were both given; give one of them, or neither for a chat")
    conversations = read_prompts(prompts) if prompts is not None else None  # before the model is loaded
    numbers = {name: _number(name, value) for name, value in parse_named(weights, "--weight").items()}
    folders = {name: Path(folder) for name, folder in parse_named(adapters, "--adapter").items()}
    if launched_ranks().size > 1 and prompt is None and conversations is None:
        raise UserError("a chat is held with one process; give --prompt or --prompts, or start it without ranks")
    trained = find_trained(path, base)
    world = World.init() if device is None else None
    if world is not None:
        emit = emit if world.is_main else _nowhere
        if memory := require_memory(trained, world, batch_size * sampling.max_new_tokens):
            log.info("memory: %s", memory)
    on = own_device(None if device is None else torch.device(device)) if world is None else world.device
    writer = open_writer(trained, on, adapters=folders, weights=numbers, how=how, template=template, world=world)
    if conversations is not None:
        answers = writer.answer(conversations, sampling, batch_size=batch_size)
        for messages, text in zip(conversations, answers, strict=True):
            record = json.dumps({"messages": messages, "completion": text}, ensure_ascii=False)
            emit(printable_json(record) + "\n")
    elif prompt is not None:
        list(writer.answer([[{"role": "user", "content": prompt}]], sampling, on_text=emit))
        emit("\n")
    else:
        chat(writer, sampling, read or _read_line, emit)
    if world is not None:
        world.close()


def _nowhere(text: str) -> None:
    """What ranks other than 0 write."""


def chat(writer: Writer, sampling: Sampling, read: Callable[[], str | None], emit: Callable[[str], None]) -> None:
    """Answers line by line until the end of input; `/reset` starts over, an empty line or `/quit` ends the chat."""
    emit("chat: /reset starts over, an empty line ends\n")
    messages: list[Message] = []
    while (line := read()) and line.strip() != "/quit":
        if line.strip() == "/reset":
            messages = []
            continue
        messages.append({"role": "user", "content": line})
        (answer,) = writer.answer([messages], sampling, on_text=emit)
        emit("\n")
        messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"--weight {name}={value}: expected a number") from None
