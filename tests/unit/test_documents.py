"""README.md leads to every page of docs/, and no link between the pages leads nowhere."""

from __future__ import annotations

import re
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


def test_the_readme_leads_to_every_page() -> None:
    assert [page.name for page in PAGES[1:] if page not in targets(PAGES[0])] == []
