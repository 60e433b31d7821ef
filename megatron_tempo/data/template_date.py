"""A fixed date for chat templates that write today's: otherwise a run could not be resumed or repeated later."""

from __future__ import annotations

import datetime

DATE = datetime.datetime(2025, 1, 1)
_ASKS = "strftime_now"  # the function that transformers gives to templates
_CODES = [f"%-{letter}" for letter in "dmHIMSyj"] + [f"%{letter}" for letter in "aAbBcdDefFGHIjmMnpRSTuUVwWxXyYzZ%"]


def asks_for_date(template: str) -> bool:
    """Whether a chat template reads the clock."""
    return _ASKS in template


def with_fixed_date(template: str) -> str:
    """The template, in which `strftime_now` writes `DATE`.

    transformers does not let callers replace the function, so a macro of its name is put before the template. The macro
    ends in a newline, which Jinja drops, so the template's first line stays unchanged.
    """
    if not asks_for_date(template):
        return template
    values = "".join(f" | replace({code!r}, {DATE.strftime(code)!r})" for code in _CODES)
    return f"{{%- macro {_ASKS}(format) -%}}{{{{- format{values} -}}}}{{%- endmacro %}}\n{template}"
