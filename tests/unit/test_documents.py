"""README.md leads to every page of docs/, and no link between the pages leads nowhere."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def targets(page: Path) -> set[Path]:
    """The files that a page links to or shows."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    return {(page.parent / link).resolve() for link in links if "://" not in link}


def test_every_link_between_the_pages_leads_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {path}" for page in PAGES + OTHERS for path in targets(page) if not path.exists()
    ]
    assert broken == []


def test_no_page_has_a_section_twice() -> None:
    """As after a merge that kept both sides."""
    for page in PAGES:
        headings = re.findall(r"^#+ .*", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(headings) == len(set(headings)), page.name


def test_the_readme_leads_to_every_page() -> None:
    assert [page.name for page in PAGES[1:] if page not in targets(PAGES[0])] == []


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    targets_ = set(phony[1].replace("\\\n", " ").split())
    done = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    assert {line.split()[0] for line in lines[1:]} == targets_


def commands() -> list[tuple[str, str]]:
    """Each `pip install` that a page, a message or a comment names, with its file."""
    files = [
        *PAGES,
        *OTHERS,
        ROOT / "pyproject.toml",
        *(ROOT / "megatron_tempo").rglob("*.py"),
        *(ROOT / "tools").glob("*.py"),
    ]
    return [
        (path.relative_to(ROOT).as_posix(), command)
        for path in files
        for command in re.findall(
            r"pip install ((?:[^\s`,;)\n#]+|'[^']*')(?: (?:'[^']*'|[\w.\[\]=-]+))*)", path.read_text()
        )
    ]


def test_what_is_to_be_installed_is_on_pypi_or_in_the_checkout() -> None:
    """This package is on no index. So a command names the checkout, with extras that it has, or other projects."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = commands()
    assert len(installs) >= 6
    for file, command in installs:
        assert "megatron-tempo" not in command, (file, command)
        assert "megatron_tempo" not in command, (file, command)
        for names in re.findall(r"\.\[([^\]]*)\]", command):
            if names != "...":
                assert set(names.split(",")) <= set(extras), (file, command)


def test_no_dependency_is_asked_for_by_an_extra_that_pip_does_not_find() -> None:
    """pip 23 compares an extra's name as it is written with the metadata of the package, where dashes stand."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    for line in asked:
        for extra in re.findall(r"\[([^\]]*)\]", line):
            package = re.split(r"[\[<>=!~; ]", line)[0]
            try:
                known = metadata(package).get_all("Provides-Extra") or []
            except PackageNotFoundError:
                continue  # one of an extra that is not installed here
            assert set(extra.split(",")) <= set(known), line
