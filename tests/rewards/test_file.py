"""Scores made elsewhere: a table that is waited for, filled in and checked."""

import csv
import json
import os
import runpy
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    VERBS,
    assert_refused,
    call,
    experiment,
    flags,
    judged,
    ran,
    refuse,
    run_script,
    snapshot,
    stage_of,
)
from scored import NUM_IMAGES, scores

from b2diffurl.experiment.stage import Stage
from b2diffurl.rewards.file import read_scores

FILE = {"reward.name": "file"}


def read_table(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict], *, delimiter: str = ",", encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        table.writeheader()
        table.writerows(rows)


def fill(stage: Stage) -> list[float]:
    """Do as the instructions say, with scores that are not in order."""
    rows = read_table(stage.wanted_scores)
    values = [(7 * n % 18) / 4 - 1 for n in range(len(rows))]
    write_table(stage.given_scores, [row | {"score": value} for row, value in zip(rows, values, strict=True)])
    return values


def test_scores_made_elsewhere(begin):
    """Without them selecting ends well, with a table of the ids, images and prompts and where to put it; again, nothing
    changes; with them filled in, in any order and as spreadsheets save them, it goes on, and training works."""
    folder, settings = begin(FILE)
    stage, before = stage_of(folder), snapshot(folder)
    said = ran(folder, "select", settings)
    relative = stage.folder.relative_to(folder)
    assert all(str(relative / name) in said for name in ("images", "scores_wanted.csv", "scores_given.csv"))
    after = snapshot(folder)
    assert after.keys() - before.keys() == {str(relative / "scores_wanted.csv")}
    rows = read_table(stage.wanted_scores)
    assert [row["prompt"] for row in rows] == json.loads(stage.prompts.read_text())
    assert [(row["id"], row["score"], stage.folder / row["image"]) for row in rows] == [
        (str(n), "", stage.image(n)) for n in range(NUM_IMAGES)
    ]
    ran(folder, "select", settings)
    assert snapshot(folder) == after

    values = fill(stage)
    rows = read_table(stage.given_scores)[::-1]
    write_table(stage.given_scores, [row | {"remark": "é"} for row in rows], encoding="utf-8-sig")
    for verb in ("select", "train"):
        ran(folder, verb, settings)
    assert [row["reward"] for row in scores(folder)] == values
    assert stage.manifest("train")["num_updates"] > 0


def test_scores_written_into_the_template_are_not_lost(begin):
    """Who fills in scores_wanted.csv itself and forgets to rename it keeps what was filled in."""
    folder, settings = begin(FILE)
    ran(folder, "select", settings)
    stage = stage_of(folder)
    fill(stage)
    stage.given_scores.replace(stage.wanted_scores)
    filled = stage.wanted_scores.read_bytes()
    run_script(folder, "select", settings)
    assert stage.wanted_scores.read_bytes() == filled


def changed(**columns) -> Callable[[list[dict]], list[dict]]:
    """A table whose row 5 has other values."""
    return lambda rows: [*rows[:5], rows[5] | columns, *rows[6:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:3] + rows[5:11] + rows[12:], r"lacks the scores of 3 ids: \[3, 4, 11\]"),
        (changed(score=""), r"lacks the scores of 1 ids: \[5\]"),
        (changed(score=" "), r"lacks the scores of 1 ids: \[5\]"),
        (changed(id=4), "line 7: id 4 is given twice"),
        (changed(id=18), r"line 7: id 18 .*0\.\.17"),
        (changed(id=-1), r"line 7: id -1 .*0\.\.17"),
        (changed(id="5.5"), "line 7: id '5.5'.*must be numbers"),
        (changed(id=""), "line 7: id ''.*must be numbers"),
        (changed(score="good"), "line 7: .*'good' must be numbers"),
        (changed(score="0,5"), "line 7: .*'0,5' must be numbers"),
        (changed(score="nan"), "line 7: the score of id 5 is nan"),
        (changed(score="-inf"), "line 7: the score of id 5 is -inf"),
        (changed(score="1e999"), "line 7: the score of id 5 is inf"),
        (changed(score="1e39"), "5"),
        (changed(score="1_0"), "line 7: .*'1_0' must be numbers"),
        (changed(id="0_5"), "line 7: .*'0_5'.* must be numbers"),
        (lambda rows: [{"id": row["id"], "rating": row["score"]} for row in rows], r"columns \['id', 'rating'\]; it needs"),
        (lambda rows: [{"score": row["score"]} for row in rows], r"columns \['score'\]; it needs"),
        (changed(score="\x1b[2J" + "[" * 100_000), r"line 7: .*score '\\x1b\[2J\[+… must be numbers"),
        (changed(prompt="two\nlines", score="good"), "line 8: .*'good' must be numbers"),
    ],
    ids=["missing", "empty", "blank", "twice", "unknown", "negative", "fraction", "no id", "word", "comma", "nan", "inf",
         "huge", "huge for a float32", "underscore", "underscored id", "other column", "no id column", "escapes",
         "a line break before"],
)  # fmt: skip
def test_scores_given_wrongly(begin, change, said):
    """Ids missing, double or unknown, scores that are no finite numbers, columns missing: two lines with the file and the
    ids or the line; nothing else on disk has changed."""
    folder, settings = begin(FILE)
    ran(folder, "select", settings)
    stage = stage_of(folder)
    fill(stage)
    write_table(stage.given_scores, change(read_table(stage.given_scores)))
    before = snapshot(folder)
    ended = run_script(folder, "select", settings)
    assert_refused(ended, said)
    assert ended.code == 2
    evidence = ("scores.jsonl", "debug/rewards.safetensors")  # of a number beyond a float32
    assert {name: data for name, data in snapshot(folder).items() if not name.endswith(evidence)} == before


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("id,score,score", r"has the columns \['id', 'score', 'score'\]; it needs id and score, each once"),
        ("id,score,id", r"has the columns \['id', 'score', 'id'\]; it needs id and score, each once"),
        ("id;score;remark", r"has the columns \['id;score;remark'\]; .*with commas between columns"),
        ("\x1b[2J" + "[" * 100_000, r"has the columns \['\\x1b\[2J\[+…; it needs"),
    ],
)
def test_columns_that_leave_open_which_is_meant(tmp_path, header, said):
    """Two columns of one name, or one of another form: the file is named, and no column is taken by chance."""
    path = tmp_path / "scores_given.csv"
    path.write_text(f"{header}\n0,0.5,1\n1,0.25,1\n")
    with pytest.raises(ValueError, match=rf"scores_given\.csv {said}") as raised:
        read_scores(path, 2)
    assert len(str(raised.value)) < len(str(path)) + 250


def test_further_columns_may_have_any_name(tmp_path):
    """They are not read, so two of them may be called the same; a byte order mark is no part of the first one's name."""
    path = tmp_path / "scores_given.csv"
    path.write_text("remark,id,score,remark\n,1,0.25,\n,0,0.5,\n", encoding="utf-8-sig")
    assert read_scores(path, 2).tolist() == [0.5, 0.25]


@pytest.mark.parametrize("damage", ["semicolons", "decimal commas", "empty", "latin-1"])
def test_score_files_that_are_none(begin, damage):
    """Semicolons for commas, commas for points, an empty file, bytes that are not UTF-8: the file is named."""
    folder, settings = begin(FILE)
    ran(folder, "select", settings)
    stage = stage_of(folder)
    fill(stage)
    rows = read_table(stage.given_scores)
    match damage:
        case "semicolons":
            write_table(stage.given_scores, rows, delimiter=";")
        case "empty":
            stage.given_scores.write_bytes(b"")
        case "decimal commas":
            stage.given_scores.write_text("id,score\n" + "".join(f"{n},0,5\n" for n in range(NUM_IMAGES)))
        case "latin-1":
            write_table(stage.given_scores, [row | {"prompt": "café"} for row in rows], encoding="latin-1")
    refuse(folder, "select", settings, "scores_given.csv")


@pytest.mark.usefixtures("no_pictures")
def test_other_images_need_another_reward(begin):
    """run_eval.py, whose images nobody has scored, judges without the reward; it is not a judge itself."""
    folder, settings = begin(FILE)
    result = judged(folder, settings, "--checkpoint=base", "--sampler=training")
    assert (result["reward"], result["n_images"]) == (None, 6)
    refuse(
        folder,
        "eval",
        settings | {"eval.judge": "file"},
        "eval.judge is file",
        arguments=(
            "--checkpoint=base",
            "--sampler=training",
        ),
    )


def run_process(folder: Path, settings: dict, variables: dict[str, str]) -> tuple[int, list[str]]:
    """run_process.sh, each `python` of it a call in this process; its exit code and the scripts it ran, with their stage."""
    asked, answered, stub = folder / "asked", folder / "answered", folder / "bin" / "python"
    for pipe in (asked, answered):
        if not pipe.exists():
            os.mkfifo(pipe)
    stub.parent.mkdir(exist_ok=True)
    stub.write_text(
        '#!/bin/bash\nif [ "$1" = -c ]; then exit; fi\n'
        f'printf "%s\\n" "$@" > {asked}\nread -r code < {answered}\ncat {folder}/stdout\nexit "$code"\n'
    )
    stub.chmod(0o755)
    shell = {}

    def run_shell() -> None:
        shell["ended"] = subprocess.run(
            ["bash", ROOT / "run_process.sh", *flags(settings | {"save_path": folder / "model/lora", "log_path": folder})],
            env=os.environ | variables | {"Preset": "sd14", "PATH": f"{stub.parent}:{os.environ['PATH']}"},
            capture_output=True,
            timeout=120,
        )
        asked.write_text("")

    thread = threading.Thread(target=run_shell, daemon=True)
    thread.start()
    ran_scripts = []
    while argv := asked.read_text().splitlines():
        script, *rest = argv[1:] if argv[0] == "-m" else argv
        path = script.replace(".", "/") + ".py" if argv[0] == "-m" else script
        ended = call(ROOT, [path, *rest], lambda path=path: runpy.run_path(str(ROOT / path), run_name="__main__"))
        ran_scripts.append(f"{Path(path).stem} {rest[-1].partition('run_name=')[2]}".strip())
        (folder / "stdout").write_text(ended.stdout)
        answered.write_text(f"{ended.code or 0}\n")
        assert not ended.code, ended.stderr
    thread.join()
    return shell["ended"].returncode, ran_scripts


@pytest.mark.long
def test_run_process_waits_for_scores_stage_by_stage(overrides, tmp_path):
    """Reward=file bash run_process.sh: each call ends well after sampling, before training or another stage, until the
    scores are there; the same command then trains and waits at the next stage; at the end both are judged."""
    settings = {key: value for key, value in overrides.items() if key != "exp_name"}
    variables = {"Reward": "file", "ExpName": "tiny", "Resident": "0"}
    start, first = ["start"], [f"run_{verb} stage0" for verb in VERBS]
    assert run_process(tmp_path, settings, variables) == (0, start + first[:2])
    before = snapshot(experiment(tmp_path))
    assert run_process(tmp_path, settings, variables) == (0, start + first[1:2])
    assert snapshot(experiment(tmp_path)) == before
    fill(stage_of(tmp_path))
    first.append("run_eval")  # when it is due
    second = [f"run_{verb} stage1" for verb in VERBS]
    assert run_process(tmp_path, settings, variables) == (0, start + first[1:] + second[:2])
    assert stage_of(tmp_path).finished("train")
    assert stage_of(tmp_path, 1).wanted_scores.is_file()
    values = fill(stage_of(tmp_path, 1))
    code, scripts = run_process(tmp_path, settings, variables)
    assert (code, scripts) == (0, [*start, *second[1:], *["run_eval"] * 3])
    assert [row["reward"] for row in scores(tmp_path, 1)] == values
    assert (experiment(tmp_path) / "report.html").is_file()


@pytest.mark.long
def test_one_process_waits_for_scores_stage_by_stage(overrides, tmp_path):
    """The same where one process makes all calls, as by default on the CPU: it ends well where scores are missing."""
    settings = {key: value for key, value in overrides.items() if key != "exp_name"}
    variables = {"Reward": "file", "ExpName": "tiny", "Resident": "1"}
    for index in range(2):
        assert run_process(tmp_path, settings, variables) == (0, ["start"])
        stage = stage_of(tmp_path, index)
        assert stage.wanted_scores.is_file()
        assert not stage.finished("train")
        values = fill(stage)
    assert run_process(tmp_path, settings, variables) == (0, ["start"])
    assert [row["reward"] for row in scores(tmp_path, 1)] == values
    assert stage_of(tmp_path, 1).finished("train")
    assert (experiment(tmp_path) / "eval.jsonl").is_file()
