"""`python -m b2diffurl.report`, by hand."""

import shutil

import pytest
from conftest import call, experiment

from b2diffurl.report import main


@pytest.mark.usefixtures("no_pictures")
def test_by_hand(reported, tmp_path):
    """`python -m b2diffurl.report EXP` takes a name or a folder; mistakes end in two lines and code 2."""
    work = shutil.copytree(reported, tmp_path / "work")
    (experiment(work) / "report.html").unlink()
    for name in ("tiny", "model/lora/tiny"):
        ended = call(work, ["report", name], main)
        assert (ended.code, ended.stdout.strip()) == (0, "model/lora/tiny/report.html"), ended.stderr
    ended = call(work, ["report", "tiyn"], main)
    assert ended.code == 2
    said = f"error: report: no experiment 'tiyn', nor in {work}/tiyn. Give its folder, or its name. Experiments in "
    assert ended.stderr.startswith(f"{said}model/lora: tiny.")
    (work / "empty").mkdir()
    shutil.copy(experiment(work) / "config.json", work / "empty")
    ended = call(work, ["report", "empty"], main)
    assert ended.code == 2
    assert "no stage that has been scored" in ended.stderr
