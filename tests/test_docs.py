"""README and docs: README is short; every link, file and heading that a page names is there; every command parses."""

import importlib.util
import itertools
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import CONFIG, ROOT, parse_command, process_variables

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


def commands() -> list[tuple[str, str]]:
    """(file, command) of every bash block in README.md and docs/: continued lines joined, here-documents left out."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL):
            subprocess.run(["bash", "-n", "-c", block], check=True, timeout=60)
            block = re.sub(r"<<-?'?(\w+)'?\n.*?^\1$", "", block.replace("\\\n", " "), flags=re.MULTILINE | re.DOTALL)
            lines = [line.strip() for line in block.splitlines()]
            found += [(path.name, line) for line in lines if line and not line.startswith("#")]
    return found


def test_the_pages_have_commands():
    """Quick start and tests in README, word for word, and the single scripts in docs/, are there to be checked."""
    lines = commands()
    readme = [line for name, line in lines if name == "README.md"]
    assert "pip install -r requirements.txt && bash run_process.sh" in readme
    tests = "pip install -r requirements.txt -r tests/requirements.txt && python -m pytest -n 2 --dist worksteal"
    assert tests in readme
    text = "\n".join(line for _, line in lines)
    for script in ("run_sample.py", "run_select.py", "run_train.py", "run_eval.py"):
        assert script in text


def test_documented_commands_parse(tmp_path):
    """Every bash block is valid bash; the scripts, modules and requirement files its commands name exist, their
    variables are run_process.sh's, and their flags are accepted."""
    for name, line in commands():
        for command in re.split(r"&&|;|\|", line):
            words = shlex.split(command, comments=True)
            variables = [words.pop(0).partition("=")[0] for _ in range(len(words)) if re.match(r"\w+=", words[0])]
            check_command(tmp_path, f"{name}: {line}", words, variables)


def check_command(folder: Path, where: str, words: list[str], variables: list[str]) -> None:
    if words[:2] == ["python", "-"]:
        return
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), where
    elif words[0] == "python" and words[1].startswith("run_"):
        argv = [word.replace("--config=config", f"--config={ROOT}/config") for word in words[1:]]
        if not any(word.startswith("--config=") for word in argv):  # the default file, as where the scripts lie
            argv.append(f"{CONFIG}:shapes")
        assert parse_command(folder, argv).code == 0, where
    elif words[0] in ("python", "bash"):
        assert (ROOT / words[1]).is_file(), where
    if words[:2] == ["bash", "run_process.sh"]:
        assert {*variables} <= process_variables(), where
        settings = [word for word in words[2:] if word != "--dry_run"]
        assert parse_command(folder, ["run_train.py", f"{CONFIG}:shapes", *settings]).code == 0, where
    for word, following in itertools.pairwise(words):
        assert word != "-r" or (ROOT / following).is_file(), where


def test_leverages_are_those_that_the_page_s_own_program_prints(capsys):
    """method.md's program, run as it stands there, and the page's tables for 20 and 10 steps."""
    text = (ROOT / "docs" / "method.md").read_text()
    (program,) = re.findall(r"^python - <<'EOF'\n(.*?)^EOF$", text, re.MULTILINE | re.DOTALL)
    exec(program, {})
    printed = [float(one) for one in re.findall(r"\d+\.\d+", capsys.readouterr().out)]
    rows = re.findall(r"^\| leverage \| (.*) \|$", text, re.MULTILINE)
    named = [float(one.strip("*")) for row in rows for one in row.split(" | ")]
    assert len(named) == 23
    assert all(any(abs(one - other) < 0.0051 for other in printed) for one in named)


def intervals(page: Path) -> set[tuple[float, float, float]]:
    """(difference, low, high) of every `1.2 points [0.3, 2.1]` of a page, and the same seen from the other side."""
    found = re.findall(r"([+-]?\d+\.\d+)(?:\*\*| px| points)* \[([+-]?\d+\.\d+), ([+-]?\d+\.\d+)\]", page.read_text())
    rows = {tuple(map(float, row)) for row in found}
    return rows | {(-middle, -high, -low) for middle, low, high in rows}


def test_which_method_has_the_figures_that_were_measured():
    """Every difference with an interval on that page stands on a page that it links to. It has some, and is short."""
    page = ROOT / "docs" / "which_method.md"
    linked = {page.parent / link.partition("#")[0] for link in re.findall(r"\]\(([\w./]+\.md)", page.read_text())}
    measured = set().union(*(intervals(one) for one in linked))
    assert len(intervals(page)) >= 30
    assert intervals(page) - measured == set()
    assert len(page.read_text().splitlines()) <= 120
