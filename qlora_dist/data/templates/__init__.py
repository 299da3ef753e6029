"""Chat templates: conversation -> text with exact learned spans."""

from .named import CONTROL_TOKENS, NAMED
from .render import BadRecord, Rendered, Template, adds_bos, render, resolve_template, tokenizer_template

__all__ = [
    "CONTROL_TOKENS",
    "NAMED",
    "BadRecord",
    "Rendered",
    "Template",
    "adds_bos",
    "render",
    "resolve_template",
    "tokenizer_template",
]
