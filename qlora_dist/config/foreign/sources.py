"""Data sources of other trainers -> sources of data.train and data.eval.

A source is answered part by part: `datasets[0].type` -> `data.train.0.format`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..json_file import read_json_object
from .answers import EACH, Answer, Given, Rule, lost, shown

Parts = dict[str, tuple[Any, Answer]]

_BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # of `datasets`, where the files are named beside them
# Axolotl's prompt strategy -> (format, columns)
_TYPES: dict[str, tuple[str, dict[str, str]]] = {
    "alpaca": ("alpaca", {}),
    "alpaca_w_system.load": ("alpaca", {}),
    "gpteacher": ("alpaca", {"output": "response"}),
    "alpaca_chat.load_qa": ("alpaca", {"instruction": "question", "output": "answer"}),
    "alpaca_chat.load": ("alpaca", {}),
    "sharegpt": ("sharegpt", {}),
    "completion": ("text", {}),
    "pretrain": ("text", {}),
}
_ROLES = {"user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation"}


def num_sources(given: Given) -> int:
    """How many sources of training data were given."""
    value = given.first(("datasets", "dataset"))
    return len(value) if isinstance(value, list) else len(str(value).split(",")) if value else 1


# --- a list of entries: Axolotl, TRL's mixtures ---


def _entries(side: str) -> Rule:
    def answer(value: Any, given: Given) -> Answer:
        text = f"set {side}: [{{path: ..., format: ...}}]"
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(isinstance(entry, dict) and entry.get("path") for entry in entries):
            return lost(text)
        parts: Parts = {}
        number = 0
        for i, entry in enumerate(entries):
            paths = _paths(entry)
            for path in paths:
                here = f"{side}.{number}"
                number += 1
                where = f"[{i}]" if len(paths) == 1 else f"[{i}] ({path})"
                parts[f"{where}.path"] = (path, Answer({f"{here}.path": path}))
                for key, one in entry.items():
                    if key != "path" and not (key == "data_files" and path != entry["path"]):
                        parts[f"{where}.{key}"] = (one, _of_entry(str(key), one, entry, here))
                if str(entry.get("type")).startswith("chat_template"):
                    parts.setdefault(f"{where}.field_messages", ("messages", _messages(entry, here)))
        return Answer(text=text, parts=parts)

    return answer


def _paths(entry: Mapping[str, Any]) -> list[str]:
    """The files of an entry whose path is only a file type; else its path."""
    path, files = str(entry["path"]), entry.get("data_files")
    if path not in _BUILDERS or not files:
        return [path]
    return [str(file) for file in files] if isinstance(files, list) else [str(files)]


def _of_entry(key: str, value: Any, entry: Mapping[str, Any], here: str) -> Answer:
    """What one key of an entry means for the source `here`."""
    if value in (None, "", [], {}) or key in ("ds_type", "preprocess_shards"):
        return Answer(text="the file format is seen from its name" if value else "empty")
    if key in _COPIED:
        return Answer({f"{here}.{_COPIED[key]}": value})
    if key == "type":
        return _type(value, here)
    if key in ("field_messages", "message_property_mappings", "message_field_role", "message_field_content"):
        return _messages(entry, here)
    if key == "field":
        return Answer({f"{here}.columns": {"text": value}})
    if key == "chat_template":
        return lost("one template holds for all sources; set data.template")
    if key == "data_files":
        return lost("a source is a file, a folder or a hub dataset: give each file as a source of its own")
    if key == "roles_to_train" and isinstance(value, list) and set(map(str, value)) <= {"assistant", "gpt"}:
        return Answer(text="answers are learned by default")
    if key in ("train_on_eos", "train_on_eot") and value == "turn":
        return Answer(text="the end of every learned turn is learned")
    if key == "roles" and isinstance(value, dict):
        names = {str(name) for one in value.values() for name in (one if isinstance(one, list) else [one])}
        return Answer(text="these names are known") if names <= _ROLES else lost("rename these roles in the data")
    if key == "trust_remote_code" and value is False:
        return Answer(text="code that comes with a data set is never executed")
    return lost(f"a source has no such setting; what it may have: {', '.join(_KNOWN)}")


_COPIED = {"split": "split", "name": "subset", "revision": "revision", "fraction": "weight"}
_KNOWN = ("path", "format", "columns", "split", "subset", "revision", "weight", "max_examples", "shuffle", "hold_out")


def _type(value: Any, here: str) -> Answer:
    if isinstance(value, dict):
        return _own_type(value, here)
    name, _, style = str(value).partition(":")
    if name.startswith("chat_template"):
        return Answer(text="conversations; by their fields")
    known = _TYPES.get(name) or _TYPES.get(name.partition(".")[0] if name.startswith("sharegpt") else "")
    if known is None:
        return lost(
            f"no such form of prompt here; the format is detected from the columns. Forms: {', '.join(_TYPES)}, "
            "chat_template"
        )
    values: dict[str, Any] = {f"{here}.format": known[0]}
    if known[1]:
        values[f"{here}.columns"] = known[1]
    if name == "alpaca" and style in ("", "chat"):
        values["data.template"] = "alpaca"  # whatever the model's own template
    elif style:
        return Answer(values, f"the style {style} is data.template here")
    return Answer(values)


def _own_type(value: Mapping[str, Any], here: str) -> Answer:
    """Axolotl's prompt of one's own: fields, and a text around them."""
    columns = {own: str(value[key]) for key, own in _FIELDS.items() if value.get(key) and value[key] != own}
    rest = [str(key) for key, one in value.items() if key not in _FIELDS and one]
    values = {f"{here}.format": "alpaca"} | ({f"{here}.columns": columns} if columns else {})
    note = f"not translated: {', '.join(rest)}; write that text as a .jinja file for data.template" if rest else ""
    return Answer(values, note)


_FIELDS = {
    "field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system",
}  # fmt: skip


def _messages(entry: Mapping[str, Any], here: str) -> Answer:
    """Conversations: the field that has the turns, and what a turn's speaker and text are called."""
    field = str(entry.get("field_messages") or "messages")
    given = entry.get("message_property_mappings")
    mapping: Mapping[str, Any] = given if isinstance(given, dict) else {}
    speaker = str(mapping.get("role") or entry.get("message_field_role") or "role")
    text = str(mapping.get("content") or entry.get("message_field_content") or "content")
    return conversations(here, field, speaker, text)


def conversations(here: str, field: str, speaker: str, text: str) -> Answer:
    """A source of conversations in `field`, whose turns have these two keys."""
    form = {("role", "content"): "messages", ("from", "value"): "sharegpt"}.get((speaker, text))
    if form is None:
        return lost(f"turns have {speaker} and {text}; known are role and content, or from and value: rename them")
    own = "messages" if form == "messages" else "conversations"
    return Answer({f"{here}.format": form} | ({f"{here}.columns": {own: field}} if field != own else {}))


# --- names in dataset_info.json: LLaMA-Factory ---


def _named_datasets(side: str) -> Rule:
    def answer(value: Any, given: Given) -> Answer:
        names = value if isinstance(value, list) else str(value).split(",")
        names = [str(name).strip() for name in names] or [""]
        if given.trainer != "llama-factory":
            return Answer(text=f"set {side}: [{{path: {shown(names[0])}}}]", parts=_by_path(names, side))
        parts: Parts = {}
        info, folder = _dataset_info(given)
        for i, name in enumerate(names):
            here = f"{side}.{i}"
            entry = info.get(name) if info is not None else None
            if not isinstance(entry, dict):
                where = (
                    f"{folder} does not name it" if info is not None else f"there is no dataset_info.json in {folder}"
                )
                parts[f" {name}"] = name, lost(f"{where}; give it with --set '{side}=[{{path: FILE, format: alpaca}}]'")
                continue
            for key, one in _of_info(name, entry, here, folder, given).items():
                parts[f" {name}{key}"] = one
            parts |= {f" {name}.{key}": (one, _limit(one, here)) for key, one in entry.items() if key == "num_samples"}
        return Answer(text=f"set {side}: [{{path: ..., format: ...}}]", parts=parts)

    return answer


def _by_path(names: list[str], side: str) -> Parts:
    return {f" {name}": (name, Answer({f"{side}.{i}.path": name})) for i, name in enumerate(names)}


def _dataset_info(given: Given) -> tuple[dict[str, Any] | None, str]:
    """dataset_info.json and its folder; without one, the folders that were searched."""
    asked = str(given.fields.get("dataset_dir") or "data")
    folders = [folder / asked for folder in given.folders] + list(given.folders)
    for folder in folders:
        file = folder / "dataset_info.json"
        if file.is_file():
            return read_json_object(file, f"{file}:"), str(folder)
    return None, " or ".join(dict.fromkeys(map(str, folders)))


def _of_info(name: str, entry: dict[str, Any], here: str, folder: str, given: Given) -> Parts:
    parts: Parts = {}
    path = entry.get("hf_hub_url") or entry.get("file_name")  # the hub's comes first there, too
    if not isinstance(path, str):
        reason = "neither file_name nor hf_hub_url: a script, or another hub; give the path of its files"
        return {"": (name, lost(reason))}
    if not entry.get("hf_hub_url"):
        path = str(Path(folder) / path)
    parts[""] = name, Answer({f"{here}.path": path})
    for key in ("subset", "split"):
        if entry.get(key) and not (key == "split" and entry[key] == "train"):
            parts[f".{key}"] = entry[key], Answer({f"{here}.{key}": entry[key]})
    columns = entry.get("columns")
    columns = dict(columns) if isinstance(columns, dict) else {}
    tags = entry.get("tags")
    tags = dict(tags) if isinstance(tags, dict) else {}
    form = str(entry.get("formatting") or "alpaca")
    if entry.get("ranking"):
        parts[".ranking"] = True, lost("preferences are not learned from")
    if given.fields.get("stage") == "pt":
        parts[".columns"] = columns, Answer(_with(here, "text", {"text": columns.get("prompt", "instruction")}))
    elif form == "alpaca":
        own = {mine: str(columns[key]) for key, mine in _COLUMNS.items() if columns.get(key)}
        parts[".columns"] = columns or "its default", Answer(_with(here, "alpaca", own))
        _leftovers(parts, ".columns.", columns, _COLUMNS)
    elif form in ("sharegpt", "openai"):
        usual = ("role", "content") if form == "openai" else ("from", "value")
        field = str(columns.get("messages") or ("messages" if form == "openai" else "conversations"))
        speaker, text = str(tags.get("role_tag") or usual[0]), str(tags.get("content_tag") or usual[1])
        parts[".formatting"] = form, conversations(here, field, speaker, text)
        known = [tag for tag, role in tags.items() if str(tag).endswith("_tag") and str(role) in _ROLES]
        _leftovers(parts, ".tags.", tags, ("role_tag", "content_tag", *known))
        _leftovers(parts, ".columns.", columns, ("messages", "system", "tools"))
    else:
        parts[".formatting"] = form, lost("unknown; the format is detected from the columns")
    return parts


_COLUMNS = {
    "prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history",
}  # fmt: skip


def _with(here: str, form: str, columns: Mapping[str, str]) -> dict[str, Any]:
    renamed = {own: theirs for own, theirs in columns.items() if own != theirs}
    return {f"{here}.format": form} | ({f"{here}.columns": renamed} if renamed else {})


def _leftovers(parts: Parts, prefix: str, given: Mapping[str, Any], known: Any) -> None:
    for key, value in given.items():
        if key not in known and value:
            parts[f"{prefix}{key}"] = value, lost("this column or tag has no meaning here")


def _limit(value: Any, here: str) -> Answer:
    return Answer({f"{here}.max_examples": value})


# --- one hub name, and torchtune's builders ---


def _one(value: Any, given: Given) -> Answer:
    return Answer(
        text=f"set data.train: [{{path: {shown(value)}}}]", parts={"": (value, Answer({"data.train.0.path": value}))}
    )


def _eval_split(value: Any, given: Given) -> Answer:
    if str(given.first(("eval_strategy", "evaluation_strategy")) or "no") in ("no", "False"):
        return Answer(text="eval_strategy is no, so it has no effect")
    path = given.fields.get("dataset_name")
    subset = given.fields.get("dataset_config")
    values = {"data.eval.0.path": path, "data.eval.0.split": value} | ({"data.eval.0.subset": subset} if subset else {})
    return Answer(values) if path else lost("set data.eval: [{path: ..., split: ...}]")


_BUILT_IN = {  # torchtune's builder -> a source
    "alpaca_dataset": ("tatsu-lab/alpaca", "alpaca"),
    "alpaca_cleaned_dataset": ("yahma/alpaca-cleaned", "alpaca"),
    "slimorca_dataset": ("Open-Orca/SlimOrca-Dedup", "sharegpt"),
}


def _builder(value: Any, given: Given) -> Answer:
    """torchtune's dataset section, from all of its keys."""
    name = str(given.fields.get("dataset._component_") or "").rsplit(".", 1)[-1]
    path = given.first(("dataset.data_files", "dataset.source"))
    values: dict[str, Any] = {}
    if name in _BUILT_IN:
        values["data.train.0.path"], values["data.train.0.format"] = _BUILT_IN[name]
        if name.startswith("alpaca"):
            values["data.template"] = "alpaca"
    elif name == "chat_dataset":
        style = given.fields.get("dataset.conversation_style")
        form = "sharegpt" if style == "sharegpt" else "messages"
        field = str(given.fields.get("dataset.conversation_column") or "")
        own = "conversations" if form == "sharegpt" else "messages"
        values = _with("data.train.0", form, {own: field} if field else {})
    elif name == "text_completion_dataset":
        values = _with("data.train.0", "text", {"text": str(given.fields.get("dataset.column") or "text")})
    elif name == "instruct_dataset":
        columns = {one: given.fields.get(f"dataset.column_map.{one}") for one in ("input", "output")}
        values = _with("data.train.0", "input-output", {own: str(theirs) for own, theirs in columns.items() if theirs})
    else:
        return lost("set data.train: [{path: ..., format: ...}]")
    if path is not None:
        values["data.train.0.path"] = path
    return Answer(values)


def _each(field: str) -> Rule:
    return lambda value, _: Answer({f"{EACH}{field}": value})


def _text_field(value: Any, _: Given) -> Answer:
    if value == "text":
        return Answer(text="a column text is read as texts")
    return Answer({f"{EACH}format": "text", f"{EACH}columns": {"text": value}})


SOURCES: dict[str, Callable[[Any, Given], Answer]] = {
    "datasets": _entries("data.train"),
    "dataset_mixture.datasets": _entries("data.train"),
    "test_datasets": _entries("data.eval"),
    "dataset": _named_datasets("data.train"),
    "eval_dataset": _named_datasets("data.eval"),
    "dataset_name": _one,
    "train_file": _one,
    "dataset_config": _each("subset"),
    "dataset_train_split": lambda value, _: (
        Answer(text="train is read by default") if value == "train" else Answer({f"{EACH}split": value})
    ),
    "dataset_test_split": _eval_split,
    "dataset_streaming": _each("streaming"),
    "dataset_text_field": _text_field,
    "max_samples": _each("max_examples"),
    **dict.fromkeys(
        ("dataset._component_", "dataset.source", "dataset.data_files", "dataset.conversation_column",
         "dataset.conversation_style", "dataset.column", "dataset.column_map.input", "dataset.column_map.output"),
        _builder,
    ),
    "dataset.split": _each("split"),
}  # fmt: skip
