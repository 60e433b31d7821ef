"""Reject private vocabulary in prose: documentation, docstrings, comments and string literals.

    python tools/check_words.py                     # everything in DEFAULT
    python tools/check_words.py docs README.md      # only these files, and the .md and .py files below these folders

Prints FILE:LINE, the phrase and what to write instead. Exit status: 1 if it finds any, 2 if a path cannot be read. Not
checked: identifiers; the expressions of f-strings; the generated parts of pages (`<!-- made by ... -->`), whose text is
checked in the code that they come from; a file that contains SKIP.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import token
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ("megatron_tempo", "tools", "tests", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SUFFIXES = (".md", ".py")
SKIP = "check_words: skip-file"
CODE = "\x00"  # stands for a character of code: no blank, and no part of a word

_GENERATED = re.compile(r"<!-- made by .*?<!-- end -->", re.DOTALL)
_INNERMOST_FIELD = re.compile(r"\{[^{}]*\}")
_TEXT_TOKENS = {token.STRING, tokenize.COMMENT, getattr(token, "FSTRING_MIDDLE", token.STRING)}


@dataclass(frozen=True, slots=True)
class Phrase:
    """Words that are not used, in all their `forms`. `allowed`: longer phrases with them that are plain English.

    >>> Phrase(("goes on",), '"continues"', allowed=("what goes on",))
    """

    forms: tuple[str, ...]
    instead: str
    allowed: tuple[str, ...] = ()


PHRASES = (
    Phrase(("beside",), '"next to", "in addition to" or "with"'),
    Phrase(("goes on", "go on", "going on", "gone on", "went on"), '"continues" or "resumes"', ("what is going on",)),
    Phrase(("wants",), '"requires" or "needs"'),
    Phrase(("so many",), '"this many", or what is counted'),
    Phrase(("learnt from",), '"trained on"'),
    Phrase(("told of", "tells of", "tell of"), '"reported" or "logged"'),
    Phrase(("held against", "holds against", "hold against"), '"compared with"'),
    Phrase(("becomes of", "become of", "became of"), '"happens to"'),
    Phrase(("of its own accord", "of their own accord"), '"automatically"'),
    Phrase(("stands in", "stand in", "stood in"), '"is in"'),
    Phrase(("with a word",), '"with a message"'),
    Phrase(("without a word",), '"without a message"'),
    Phrase(("alone has", "alone have"), '"only X has"'),
    Phrase(("misshapen",), '"of the wrong shape"'),
    Phrase(("reckons", "reckon", "reckoned"), '"computes" or "counts"'),
    Phrase(("lets go of", "let go of", "letting go of"), '"frees", "releases" or "closes"'),
    Phrase(("comes to pass", "come to pass", "came to pass"), '"happens"'),
    Phrase(("spoilt",), '"corrupted"'),
    Phrase(("none:",), '"None if" or "None:"'),
)


@dataclass(frozen=True, slots=True)
class Finding:
    line: int  # from 1
    form: str
    instead: str


def _matches(words: str, prose: str) -> Iterator[re.Match[str]]:
    """Where these words are, also on two lines. `stand-in` and `beside_x` are other words; `None:` is not `none:`."""
    is_label = words.endswith(":")
    pattern = r"(?<![\w-])" + r"\s+".join(map(re.escape, words.split())) + ("" if is_label else r"(?![\w-])")
    return re.finditer(pattern, prose, 0 if is_label else re.IGNORECASE)


def find(prose: str) -> list[Finding]:
    """The phrases in a text, in their order."""
    findings: list[Finding] = []
    for phrase in PHRASES:
        allowed = [match.span() for words in phrase.allowed for match in _matches(words, prose)]
        for form in phrase.forms:
            for match in _matches(form, prose):
                if not any(start <= match.start() and match.end() <= end for start, end in allowed):
                    findings.append(Finding(prose.count("\n", 0, match.start()) + 1, form, phrase.instead))
    return sorted(findings, key=lambda finding: finding.line)


def prose_of(path: Path) -> str:
    """The text of a file that is prose, on the lines where it is in the file."""
    text = path.read_text(encoding="utf-8")
    if SKIP in text:
        return ""
    return _prose_of_python(text) if path.suffix == ".py" else _GENERATED.sub(_blanked, text)


def _blanked(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", CODE, match[0])


def _prose_of_python(text: str) -> str:
    """Comments and strings. Comment signs and quotes are blanks, so that a phrase is found across two of them."""
    lines = _lines(text)
    prose = [re.sub(r"\S", CODE, line) for line in lines]
    for kind, _, start, end, _ in tokenize.generate_tokens(io.StringIO(text).readline):
        if kind not in _TEXT_TOKENS:
            continue
        source = _between(lines, start, end)
        if kind == token.STRING:
            source = _without_quotes(source)
        elif kind == tokenize.COMMENT:
            source = " " + source[1:]
        _replace(prose, start, source)
    return "".join(prose)


def _lines(text: str) -> list[str]:
    """As tokenize counts them: str.splitlines ends a line at other characters too."""
    return io.StringIO(text).readlines()


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    (first, left), (last, right) = start, end
    if first == last:
        return lines[first - 1][left:right]
    return "".join([lines[first - 1][left:], *lines[first : last - 1], lines[last - 1][:right]])


def _without_quotes(literal: str) -> str:
    """A string literal with blanks for its prefix and quotes, and code for the expressions of an f-string."""
    match = re.fullmatch(r"(\w*)('''|\"\"\"|'|\")(.*)\2", literal, re.DOTALL)
    assert match is not None, literal
    prefix, quote, text = match[1], match[2], match[3]
    if "f" in prefix.lower():  # before Python 3.12 the whole of it is one token
        while _INNERMOST_FIELD.search(text):
            text = _INNERMOST_FIELD.sub(_blanked, text)
    text = re.sub(r"\\n", "  ", text)
    return " " * len(prefix + quote) + text + " " * len(quote)


def _replace(prose: list[str], start: tuple[int, int], source: str) -> None:
    """Put `source` in its place."""
    row, column = start[0] - 1, start[1]
    for piece in _lines(source):
        line = prose[row]
        prose[row] = line[:column] + piece + line[column + len(piece) :]
        row, column = row + 1, 0


def files(path: Path) -> Iterator[Path]:
    """The file itself, or the pages and programs below a folder."""
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
    else:
        yield path


def _shown(file: Path) -> Path:
    """The path as short as it can be from here."""
    return file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="*", metavar="PATH", help="files and folders (default: everything)")
    paths = parser.parse_args().paths or [ROOT / name for name in DEFAULT]
    count = 0
    for path in paths:
        try:
            for file in files(path):
                for finding in find(prose_of(file)):
                    print(f'{_shown(file)}:{finding.line}: "{finding.form}": write {finding.instead}')
                    count += 1
        except (OSError, UnicodeDecodeError, SyntaxError, tokenize.TokenError) as error:
            print(f"{path}: cannot be read: {error}", file=sys.stderr)
            return 2
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
