"""How a run's prompts look and where its answers end: kept with the run, and carried by what it exports.

PromptFormat       the template, or plain text; a file in the run directory and in the adapter's folder
record_prompts     writes it when a run starts: it also serves checkpoints, and no later change of a template matters
find_stops         what ends an answer
export_tokenizer   tokenizer and generation_config with which other programs write such prompts and stop there
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.json_file import read_json_object
from ..data.documents.encode import Encoder
from ..data.templates import Template, render, tokenizer_template
from ..data.tokenizer import load_tokenizer
from ..errors import UserError
from ..files import write_json
from ..model import save_generation_config, stop_ids_of
from .run import Run

log = logging.getLogger(__name__)

FILE = "prompt_format.json"
_ANSWER = "x7x"  # stands for an answer while a template is asked how it ends one


@dataclass(frozen=True)
class PromptFormat:
    """`template` None: the run saw plain text only, and a prompt is continued as it is."""

    template: Template | None

    @classmethod
    def of_formats(cls, tokenizer: Any, formats: Sequence[str], template: str, date: str | None) -> PromptFormat:
        """By the formats of the sources, in their order, data.template and data.date. Raises UserError."""
        chat = next((name for name in formats if name not in ("text", "tokens")), None)
        if chat is None:
            return cls(None)
        encoder = Encoder(tokenizer, format_name=chat, columns={}, template=template, learn="all", date=date)
        return cls(encoder.template)

    def write(self, folder: Path) -> None:
        """Writes the file."""
        write_json(folder / FILE, {"template": self.template and dataclasses.asdict(self.template)})

    @classmethod
    def read(cls, folder: Path) -> PromptFormat | None:
        """None where an earlier version wrote the folder. Raises UserError when the file cannot be read."""
        path = folder / FILE
        known = {field.name for field in dataclasses.fields(Template)}
        if not os.path.lexists(path):
            return None
        advice = "restore it, or remove it: then the template is found by the run's config and data"
        content = read_json_object(path, str(path), advice)
        try:
            stored = content["template"]
            if stored is None:
                return cls(None)
            template = Template(**{key: value for key, value in stored.items() if key in known})
            if not isinstance(template.source, str):
                raise TypeError("its source is not text")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); {advice}") from None
        return cls(template)


def record_prompts(run: Run) -> None:
    """Keeps with the run how its prompts look. After `resume_newest`, which refuses other data or another template."""

    def record_on_main() -> None:
        settings = run.config.model
        formats = [source.format for source in run.data.documents.stats.sources]
        tokenizer = load_tokenizer(settings.name, settings.revision)
        data = run.config.data
        PromptFormat.of_formats(tokenizer, formats, data.template, data.date).write(run.dir.path)

    run.world.from_main(record_on_main)


# --- the end of an answer ---------------------------------------------------------------------------------------------


def find_stops(model: Any, tokenizer: Any, template: Template | None) -> tuple[list[int], list[str]]:
    """What ends an answer: EOS and the model's own stop tokens, then what the template writes after an answer."""
    ids, texts = [tokenizer.eos_token_id, *stop_ids_of(model)], []
    ending, token = ("", None) if template is None else _end_of_answer(tokenizer, template)
    if token is not None:
        ids.append(token)
    elif ending:
        texts.append(ending)
    return list(dict.fromkeys(id for id in ids if id is not None)), texts


def _end_of_answer(tokenizer: Any, template: Template) -> tuple[str, int | None]:
    """The text that is learned after an answer, and its token if it is a single one."""
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        (rendered,) = render(tokenizer, template, conversation, None, "last")
    except UserError as error:
        log.warning("the end of an answer is not known, EOS is used: %s", error)
        return "", None
    begin, end = rendered.spans[-1]
    ending = rendered.text[begin:end].rpartition(_ANSWER)[2].strip()
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
    return ending, ids[0] if len(ids) == 1 else None


def export_tokenizer(folder: Path, model: Any, tokenizer: Any, prompts: PromptFormat | None) -> None:
    """Writes the tokenizer with the template that was used and the end of turn as its EOS; the model's generation
    config with all stops. For plain text, and where nothing is known (None), the tokenizer as it is.

    Changes `tokenizer`. An end of several tokens, or one that is an ordinary word, remains the caller's to stop at.
    """
    template = None if prompts is None else prompts.template
    if template is not None:
        save_generation_config(model, folder, find_stops(model, tokenizer, template)[0])
        _, token = _end_of_answer(tokenizer, template)
        if template.source != tokenizer_template(tokenizer):
            tokenizer.chat_template = template.source
        text = None if token is None else tokenizer.convert_ids_to_tokens(token)
        # a template that writes eos_token somewhere else would write another text with another EOS
        if text in tokenizer.get_added_vocab() and "eos_token" not in template.source:
            tokenizer.eos_token = text
    tokenizer.save_pretrained(folder)
