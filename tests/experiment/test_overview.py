"""Experiments as rows: what they say is what the files say, whatever else lies in the folder."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, experiment, json_lines

from b2diffurl.experiment import lock
from b2diffurl.experiment.overview import overview, rows
from b2diffurl.runtime.files import read_json


@pytest.fixture
def folder(reported, tmp_path) -> Path:
    """A folder with the reported experiment, one that an earlier version has begun, a foreign folder and a damaged one."""
    place = tmp_path / "lora"
    shutil.copytree(experiment(reported), place / "tiny", ignore=shutil.ignore_patterns("samples", "selected"))
    with zipfile.ZipFile(ROOT / "tests" / "recorded" / "begun.zip") as archive:
        archive.extractall(tmp_path / "old")
    shutil.copytree(next((tmp_path / "old").rglob("config.json")).parent, place / "begun")
    (place / "holiday").mkdir()
    (place / "holiday" / "beach.txt").write_text("sand")
    (place / "cut").mkdir()
    (place / "cut" / "config.json").write_bytes((place / "tiny" / "config.json").read_bytes()[:500])
    (place / "note.txt").write_text("no experiment")
    return place


def test_a_row_is_what_the_files_say(folder):
    """Stages, images, rewards, held-out figures with their errors, the newest file's time, and bytes."""
    row = overview(folder / "tiny")
    root = folder / "tiny"
    assert (row["problem"], row["damaged"], row["preset"]) == ("", [], "sd14")
    assert (row["stages_done"], row["stages_planned"], row["checkpoint"]) == (2, 2, "stage1")
    scored = [read_json(root / f"stage{n}" / "select.json") for n in range(2)]
    assert row["images_scored"] == sum(one["num_images"] for one in scored) == 36
    assert [row["reward_first"], row["reward_last"]] == [one["reward_mean"] for one in scored]
    judged = {one["checkpoint"]: one for one in json_lines(root / "eval.jsonl") if one["prompts"] == "test"}
    for whose, name in (("base", "base"), ("tuned", "stage1")):
        for key in ("reward", "reward_se", "accuracy", "accuracy_se"):
            figure, _, end = key.partition("_")
            assert row[f"test_{figure}_{whose}{'_' + end if end else ''}"] == judged[name][key]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert row["bytes"] == sum(path.stat().st_size for path in files)
    worked = [path.stat().st_mtime for path in files if "report" not in path.relative_to(root).parts[0]]
    assert row["last_worked"] == pytest.approx(max(worked))


def test_whatever_lies_there_has_a_row(folder):
    """An experiment of an earlier version is read; what is no experiment, or damaged, says why; files are passed over."""
    found = {row["name"]: row for row in rows(folder)}
    assert list(found) == ["begun", "cut", "holiday", "tiny"]
    assert (found["begun"]["stages_done"], found["begun"]["stages_planned"]) == (1, 2)
    assert found["begun"]["images_scored"] == 12
    assert "config.json is damaged" in found["cut"]["problem"]
    assert "no config.json" in found["holiday"]["problem"]
    assert len({tuple(row) for row in found.values()}) == 1  # the same keys in the same order, whatever is known
    with pytest.raises(FileNotFoundError, match=r"no folder .+nowhere"):
        rows(folder / "nowhere")


def test_one_damaged_file_costs_only_what_it_holds(folder):
    """A scored stage without its metrics, a cut line of eval.jsonl: named, and the rest is there."""
    root = folder / "tiny"
    (root / "stage1" / "metrics" / "select.jsonl").unlink()
    lines = (root / "eval.jsonl").read_bytes().splitlines()
    (root / "eval.jsonl").write_bytes(b"\n".join([*lines, lines[0][:40]]))
    row = overview(root)
    assert (row["problem"], row["reward_last"], row["images_scored"]) == ("", None, 36)
    assert row["test_accuracy_tuned"] is not None
    assert len(row["damaged"]) == 2
    config = json.loads((root / "config.json").read_text())
    del config["content_sha256"], config["config"]["reward"]
    (root / "config.json").write_text(json.dumps(config))
    assert "config.json is of another program" in overview(root)["problem"]


def test_a_run_is_at_work_while_its_process_lives(folder):
    """By its lock, which stays as it was."""
    root = folder / "tiny"
    assert not overview(root)["at_work"]
    lock.take(root, os.getpid())
    before = lock.path_in(root).read_bytes()
    assert overview(root)["at_work"]
    assert lock.path_in(root).read_bytes() == before
    gone = json.loads(before)
    gone["processes"] = [[gone["processes"][0][0], "another start"]]
    lock.path_in(root).write_text(json.dumps(gone))
    assert not overview(root)["at_work"]
    gone["host"] = "elsewhere"
    lock.path_in(root).write_text(json.dumps(gone))
    assert overview(root)["at_work"]  # it was touched just now
    os.utime(lock.path_in(root), (time.time() - 1000,) * 2)
    assert not overview(root)["at_work"]


def test_looking_imports_no_torch():
    code = (
        "import sys, b2diffurl.experiment.overview, b2diffurl.reporting.listing, b2diffurl.results;"
        "print(sorted({'torch', 'matplotlib', 'diffusers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.long
def test_fifty_experiments_of_a_hundred_stages_take_seconds(folder, tmp_path):
    many = tmp_path / "many"
    one = many / "e00"
    shutil.copytree(folder / "tiny", one, ignore=shutil.ignore_patterns("checkpoints", "images", "eval", "report*"))
    for n in range(2, 100):
        stage = shutil.copytree(one / "stage1", one / f"stage{n}", copy_function=os.link)
        for name in ("sample.json", "select.json", "train.json"):
            text = (stage / name).read_text().replace('"stage": 1', f'"stage": {n}', 1)
            (stage / name).unlink()
            (stage / name).write_text(text)
    for n in range(1, 50):
        shutil.copytree(one, many / f"e{n:02d}", copy_function=os.link)
    started = time.perf_counter()
    found = rows(many)
    seconds = time.perf_counter() - started
    assert {row["stages_done"] for row in found} == {100}
    assert {row["images_scored"] for row in found} == {1800}
    print(f"{seconds:.1f} s")
    assert seconds < 20
