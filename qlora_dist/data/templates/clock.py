"""The clock of chat templates. Some write today's date (`strftime_now`): here it stands still at one date, so that the
same config gives the same tokens on every node and day."""

from __future__ import annotations

import datetime

# what strftime may be asked for, of a date alone; the locale is C's
_DIRECTIVES = "aAbBcCdDeFgGhHIjmMnpPrRSTtuUVwWxXyY"
_READS_CLOCK = "strftime_now"


def reads_clock(source: str) -> bool:
    """Whether a chat template asks for the date."""
    return _READS_CLOCK in source


def today() -> str:
    """Today's date in the local time zone, YYYY-MM-DD."""
    return datetime.date.today().isoformat()


def with_clock(source: str, date: str) -> str:
    """The template with a `strftime_now` that always answers for midnight of `date` (YYYY-MM-DD).

    A macro, because transformers passes data into a template, never functions.
    """
    if not reads_clock(source):
        return source
    moment = datetime.datetime.fromisoformat(date)
    forms = {f"%{directive}": moment.strftime(f"%{directive}") for directive in _DIRECTIVES}
    forms |= {f"%-{letter}": forms[f"%{letter}"].lstrip("0") or "0" for letter in "dHIjmMSUVwWy"}
    # "%%" is set aside, so that "%%d" is not read as a directive
    steps = [("%%", "\0"), *forms.items(), ("\0", "%")]
    replacements = "".join(f"|replace({_literal(old)},{_literal(new)})" for old, new in steps)
    return f"{{%- macro strftime_now(format) %}}{{{{ format{replacements} }}}}{{% endmacro %}}{{{{ '' }}}}{source}"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("\0", "\\x00").replace("\n", "\\n").replace("\t", "\\t") + "'"
