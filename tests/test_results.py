"""`python -m b2diffurl.results`, by hand."""

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browsing import browser, lines_of, screenshot, set_window
from conftest import call, experiment
from PIL import Image

from b2diffurl.experiment.evaluation_table import every_evaluation
from b2diffurl.reporting.compared_page import curve_panels
from b2diffurl.results import main
from b2diffurl.runtime.files import read_json, write_record


@pytest.fixture
def work(reported, tmp_path) -> Path:
    """A folder with two experiments, of which the second is better in every image."""
    for name in ("tiny", "other"):
        root = shutil.copytree(
            experiment(reported), tmp_path / "model" / "lora" / name, ignore=shutil.ignore_patterns("samples", "selected")
        )
    for row in every_evaluation(root):
        path = root / row["folder"] / "result.json"
        if row["checkpoint"] == "stage1":
            result = read_json(path)
            result["values"]["reward"] = [value + 0.25 for value in result["values"]["reward"]]
            write_record(path, result)
    return tmp_path


def results(work: Path, *words: str):
    return call(work, ["results", *words], main)


def test_listing_and_comparing(work):
    """A line an experiment; with names who is better and by how much; the same as CSV and Markdown, in a file or printed."""
    ended = results(work)
    assert ended.code == 0, ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()[:3]] == ["experiment", "other", "tiny"]
    ended = results(work, "tiny", "other", "--csv", "out.csv", "--html", "out.html")
    assert ended.code == 0, ended.stderr
    rows = {row["figure"]: row for row in csv.DictReader((work / "out.csv").open())}
    assert float(rows["clip"]["difference"]) == pytest.approx(0.25)
    assert rows["clip"]["significant"] == "True"
    assert (rows["accuracy"]["first"], rows["accuracy"]["second"]) == ("model/lora/tiny", "model/lora/other")
    html = (work / "out.html").read_text()
    assert "other is better" in html
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    for form, said in (("--markdown", "| clip |"), ("--csv", "figure,")):
        assert said in results(work, "other", "tiny", form).stdout
    ended = results(work, "other", "tiny")
    assert "no significant difference, +0.0 ± 0.0 points (accuracy)" in ended.stdout
    assert re.search(r"clip +\S+ ± \S+ +\S+ ± \S+ +-0.250 ± 0.000", ended.stdout)
    listed = csv.DictReader(io.StringIO(results(work, "--csv").stdout))
    assert [row["name"] for row in listed] == ["other", "tiny"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny", "tniy"], "no experiment 'tniy'"),
        (["tiny", "model/lora/tiny"], "named twice"),
        (["--folder", "nowhere"], "no folder"),
        (["tiny", "--html", "out.html"], "name two or more experiments"),
        (["tiny", "other", "--prompts", "gone.txt"], "no prompt file at"),
        (["tiny", "--csv", "other"], "put --csv behind the names"),
        (["tiny", "other", "--html", "config.json"], "does not end in .html"),
        (["tiny", "other", "--html", "/proc/nowhere/out.html"], "/proc"),
    ],
)
def test_mistakes_end_in_two_lines(work, words, said):
    """And nothing is written."""
    before = {path for path in work.rglob("*")}
    ended = results(work, *words)
    assert (ended.code, ended.stdout) == (2, "")
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 2
    assert {path for path in work.rglob("*")} == before


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_comparison_whole(work, tmp_path, scheme):
    """At phone and desktop width: every picture and curve is there, base beside both, nothing is wider than the window, no
    number is broken, and the console is empty."""
    assert results(work, "tiny", "other", "--html", "out.html").code == 0
    driver = browser()
    try:
        for width in (390, 1400):
            set_window(driver, width, scheme)
            driver.get((work / "out.html").as_uri())
            assert min(driver.execute_script("return [...document.images].map(one => one.complete && one.naturalWidth)")) > 0
            labels = driver.execute_script("return [...document.querySelectorAll('.name')].map(one => one.textContent)")
            assert labels == ["base", "tiny", "other"] * 6
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            assert max(lines_of(driver, "td.number")) == 1
            assert driver.execute_script("return document.querySelectorAll('.curves img').length") >= 3
            picture = tmp_path / f"compared_{scheme}_{width}.png"
            screenshot(driver, width, picture)
            pixels = np.asarray(Image.open(picture).convert("L"))
            assert (pixels[:20].mean() > 240) if scheme == "light" else (pixels[:20].mean() < 40)
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def test_a_mixture_s_name_stands_whole_over_its_curves(tmp_path):
    """Its beginning is not cut off: name and prompt set have a line each."""
    root = tmp_path / "mixed"
    root.mkdir()
    reward = {"name": "clip", "weights": {"clip": 1.0, "jpeg_compressibility": 0.5}}
    (root / "config.json").write_text(json.dumps({"config": {"reward": reward}}))
    rows = [{"queries": 0, "reward": 0.1, "accuracy": None}]
    panels = curve_panels({root: ("solid", "black")}, {root: []}, {root: rows}, "test")
    assert next(panels).title == "1 clip + 0.5 jpeg_compressibility\nheld-out prompts"
