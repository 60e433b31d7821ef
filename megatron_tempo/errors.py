"""Errors that are shown to the user in one line, without a traceback, and the text that is safe to show."""

import re

# Invisible characters by which a text could control a terminal or change the order in which it is shown:
# control characters (C0, DEL, C1), line separators, marks of direction, invisible operators and tags. Surrogates cannot
# be written as UTF-8. Newline and tab stay, and so do the joiners that emoji and some scripts are spelled with.
_HIDDEN = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    *(0x61C, 0x180E, 0x200B, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF),
    *range(0x202A, 0x202F),
    *range(0x2060, 0x2070),
    *range(0xFFF9, 0xFFFC),
    *range(0xE0000, 0xE0080),
)
_VISIBLE: dict[int, str] = {code: chr(0x2400 + code) if code < 0x20 else f"<U+{code:04X}>" for code in _HIDDEN}
_VISIBLE |= {0x7F: "\u2421"} | dict.fromkeys(range(0xD800, 0xE000), "\ufffd")


def printable(text: str) -> str:
    """The text with its invisible characters made visible: safe for a terminal, HTML and SVG.

    >>> printable("\\x1b[31m\\x9b")
    '\u241b[31m<U+009B>'
    """
    return text.translate(_VISIBLE)


def hidden(text: str) -> str | None:
    """The first character of `text` that `printable` replaces, as U+XXXX, or None. Newline and tab do not count."""
    code = next((ord(character) for character in text if ord(character) in _VISIBLE), None)
    return None if code is None else f"U+{code:04X}"


# Python's words for a whole number with too many digits, which advise a change of code.
_TOO_LONG = re.compile(
    r"Exceeds the limit \((\d+) digits\) for integer string conversion[^;]*; use sys\.\w+\(\) to increase the limit"
)


class _PrintableError:
    """An error whose text, which may quote a file, a name or an error of Python, is safe and fit to print."""

    def __str__(self) -> str:
        return printable(_TOO_LONG.sub(r"a whole number has more than \1 digits", super().__str__()))


class InputError(_PrintableError, ValueError):
    """Invalid input: a configuration, a file, a folder or a checkpoint. The message names it and the fix."""


class EngineError(_PrintableError, RuntimeError):
    """An engine failed, or returned a response that cannot be trained on."""


class DriftError(EngineError):
    """The engine's weights or log-probabilities are not the actor's."""


class RejectedRolloutsError(DriftError):
    """An iteration's rollouts are of drifted weights. Its other models may have been updated."""


class Stopped(_PrintableError, Exception):
    """The run was asked to stop and has saved a checkpoint. The message names it."""


class NotFiniteError(_PrintableError, ArithmeticError):
    """Too many consecutive optimizer steps had a loss or gradient that is not finite. The message names the dump."""


class UnwrittenError(_PrintableError, OSError):
    """A file that the run requires could not be written. The message names it, the reason and the fix."""
