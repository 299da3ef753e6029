"""The tokenizer of a model, and where its files are read from: without the libraries that a model itself needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config.names import model_folder
from ..errors import UserError


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a hub model or folder. Raises UserError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(expanded(name), **where_to_read(name, revision))
    except Exception as error:  # the tokenizers library raises plain ones for a file that is broken in content
        raise UserError(
            f"model.name {name}: the tokenizer cannot be read ({first_line(error)}); the folder or hub "
            "repository must contain tokenizer.json, or tokenizer.model with sentencepiece installed"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(
            f"model.name {name}: {type(tokenizer).__name__} has no fast version (tokenizer.json); convert it "
            "with transformers' AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(folder)"
        )
    return tokenizer


def expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name


def where_to_read(name: str, revision: str | None) -> dict[str, Any]:
    """Where transformers may read from. A local folder never causes a request to a hub."""
    folder = model_folder(name)
    # None is the default branch. Given its name, "main", transformers would ask a service to convert a repository
    # without safetensors, and load the result
    return {
        "revision": None if revision == "main" else revision,
        "trust_remote_code": False,
        "local_files_only": folder is not None,
    }


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:500]
