"""The word list of the lint step: what it finds, and what it leaves alone. check_words: skip-file"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.tools import TOOLS, load_tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("check_words", monkeypatch)


def findings(tool: ModuleType, path: Path, text: str) -> list[tuple[int, str]]:
    path.write_text(text)
    return [(finding.line, finding.form) for finding in tool.find(tool.prose_of(path))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The run goes on.\n", [(1, "goes on")]),
        ("A line.\n\nThe run goes\non, and wants a GPU.\n", [(3, "goes on"), (4, "wants")]),
        ("| `limit` | rows; none: all |\n", [(1, "none:")]),
        ("What is going on is in the log.\n", []),
        ("Beside it is another.\n", [(1, "beside")]),
        ("A stand-in, besides; `beside_results`; a beside-table; None: all; `none`: all.\n", []),
        ("a\n<!-- made by x -->\nso many\n<!-- end -->\nso many\n", [(5, "so many")]),
    ],
)
def test_pages(tool: ModuleType, tmp_path: Path, text: str, expected: list[tuple[int, str]]) -> None:
    assert findings(tool, tmp_path / "page.md", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"""What\n\n    goes on."""\n', [(3, "goes on")]),
        ("x = 1  # of so many\n", [(1, "so many")]),
        ("# the run goes\n# on\nx = 1\n", [(1, "goes on")]),
        ('raise ValueError("it wants "\n    "a GPU, and is told "\n    "of it")\n', [(1, "wants"), (2, "told of")]),
        ('f"{count} wants"\n', [(1, "wants")]),
        ('"so\\nmany"\n', [(1, "so many")]),
        ('r"so \\d many"\n', []),
        ("beside = wants = 1\nprint(beside, wants)\n", []),  # identifiers
        ('f"{wants} {beside:>{wants}}"\n', []),
        ('print("so", "many")\n', []),  # two texts
        ("so = 1  # so\nmany = 2  # many\n", []),
        ('x = {"none": 1}\n', []),
        ('"wants"  # check_words: skip-' + "file\n", []),
    ],
)
def test_programs(tool: ModuleType, tmp_path: Path, text: str, expected: list[tuple[int, str]]) -> None:
    assert findings(tool, tmp_path / "program.py", text) == expected


def test_every_form_is_found_and_has_a_substitute(tool: ModuleType) -> None:
    for phrase in tool.PHRASES:
        assert phrase.instead
        for form in phrase.forms:
            assert [finding.form for finding in tool.find(f"A model {form} it.")] == [form]


def test_the_command(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "a.md").write_text("It goes on.\n")
    (tmp_path / "pages" / "b.txt").write_text("It goes on.\n")
    (tmp_path / "c.py").write_text("x = 1  # it runs\n")
    monkeypatch.chdir(tmp_path)

    def status(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["check_words.py", *arguments])
        return tool.main()

    assert status("c.py", str(tmp_path / "pages")) == 1
    assert capsys.readouterr().out == 'pages/a.md:1: "goes on": write "continues" or "resumes"\n'
    assert status("c.py") == 0
    assert status("absent.md") == 2
    assert "absent.md: cannot be read" in capsys.readouterr().err


def test_the_list_does_not_find_itself(tool: ModuleType) -> None:
    assert tool.prose_of(TOOLS / "check_words.py") == ""
    assert tool.prose_of(Path(__file__)) == ""
