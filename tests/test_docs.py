"""README and docs: README is short; every link, file and heading that a page names is there. Commands:
configuration/test_command_line.py."""

import re

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = ("b2diffurl", "benchmarks", "config", "docs", "tests")


def prose(page) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page) -> set[str]:
    """The anchors that GitHub gives a page's headings: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    """README fits a few screens; what is longer stands in docs/."""
    text = (ROOT / "README.md").read_bytes()
    assert len(text) <= 8000
    assert len(text.splitlines()) <= 130


def test_every_page_is_in_the_index():
    """docs/README.md leads to every page beside it."""
    index = (ROOT / "docs" / "README.md").read_text()
    others = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in others if f"]({name}" not in index] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page):
    """Relative links lead to a file, with #anchor to a heading in it; paths in backticks are those of files."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    for path in re.findall(r"`([\w./]+)`", prose(page)):
        if path.split("/")[0] in TOP and "/" in path and not (ROOT / path).exists():
            broken.append(path)
    assert broken == []
