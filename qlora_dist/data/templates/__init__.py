"""Chat templates: conversation -> texts with exact learned spans.

named      our own templates
template   where a template comes from, and how it writes a conversation
clock      its date stands still
lost       what it leaves out is noticed
control    the control tokens of a tokenizer
render     the texts and their learned spans
"""

from .clock import today
from .control import control_tokens
from .lost import BadRecord
from .named import CONTROL_TOKENS, NAMED
from .render import Rendered, render
from .template import Template, adds_bos, apply_template, resolve_template, template_key, tokenizer_template

__all__ = [
    "CONTROL_TOKENS",
    "NAMED",
    "BadRecord",
    "Rendered",
    "Template",
    "adds_bos",
    "apply_template",
    "control_tokens",
    "render",
    "resolve_template",
    "template_key",
    "today",
    "tokenizer_template",
]
