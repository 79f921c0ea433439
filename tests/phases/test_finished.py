"""What is left of a run: finished phases get no call of their own, and what their calls did is done all the same."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import assert_refused, assert_same, experiment, make_config, plan, snapshot, stage_of, start, unfinish

from b2diffurl import resident
from b2diffurl.configuration.loop import calls
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.phases.finished import calls_left, check_done
from b2diffurl.runtime import files
from benchmarks.grown import grow

pytestmark = pytest.mark.usefixtures("no_pictures")


def left(folder: Path, overrides: dict, **more) -> list[str]:
    """The calls that start writes: script and stage, `due` where it judges one, `end` for the evaluations at the end."""
    ended = start(folder, overrides | more, f"--calls={folder}/calls")
    assert ended.code == 0, ended.stderr
    lines = [line.split("\t") for line in (folder / "calls").read_text().splitlines()]
    (folder / "calls").unlink()
    found = [(line[2].removeprefix("run_").removesuffix(".py"), line[3]) for line in lines if line[0] == "call"]
    return [f"{script} {flag.partition('=stage')[2] or 'end'}" for script, flag in found]


END = ["eval end", "eval end"]


def all_of(*stages: int) -> list[str]:
    return [f"{script} {stage}" for stage in stages for script in ("sample", "select", "train", "eval")]


def test_a_finished_run_is_only_judged_at_its_end(workplace, overrides):
    """Also where an evaluation was due after its last stage: the one at the end makes it. No file changes."""
    before = snapshot(workplace)
    assert left(workplace, overrides, **{"eval.every": 1}) == END
    assert snapshot(workplace) == before


def test_a_run_goes_on_with_its_first_phase_that_is_not_finished(workplace, overrides):
    """Later calls stay, also of finished phases: they compare what they were made from. The report is made again."""
    report = experiment(workplace) / "report.html"
    assert left(workplace, overrides, stage_cnt=3) == [*all_of(2), *END]
    assert report.is_file()
    report.unlink()
    unfinish(workplace, "select", 0)
    assert left(workplace, overrides) == [*all_of(0)[1:], *all_of(1), *END]
    assert report.is_file()


def test_a_stage_that_is_half_done_goes_on_where_it_is(workplace, overrides):
    unfinish(workplace, "train")
    assert left(workplace, overrides) == ["train 1", "eval 1", *END]


def test_an_evaluation_that_is_due_after_the_newest_stage_stays(workplace, overrides):
    """It may have been interrupted. It also writes the report."""
    assert left(workplace, overrides, stage_cnt=3, **{"eval.every": 2}) == ["eval 1", *all_of(2), *END]
    assert left(workplace, overrides, stage_cnt=3, **{"eval.every": 3}) == [*all_of(2), *END]
    assert left(workplace, overrides, stage_cnt=3, **{"eval.every": 1}) == ["eval 1", *all_of(2), *END]


def test_what_a_killed_phase_left_is_tidied_up(workplace, overrides):
    """Scores of single batches, trajectories and images that are not kept, of every stage; a lost config.json."""
    root = experiment(workplace)
    config = (root / "config.json").read_bytes()
    (root / "config.json").unlink()
    left_over = stage_of(workplace, 0).scored_batch("clip", 0)
    files.write_json(left_over, [])
    left(workplace, overrides, **{"keep.samples": False, "keep.images": 2})
    assert json.loads((root / "config.json").read_bytes())["prompts_sha256"] == json.loads(config)["prompts_sha256"]
    assert not left_over.parent.exists()
    for index in range(2):
        stage = stage_of(workplace, index)
        assert [path.name for path in sorted(stage.images.iterdir())] == ["00000.png", "00001.png"]
        assert not stage.samples.exists()
        assert not stage.selected.exists()


def cut_checkpoint(folder: Path) -> None:
    lora = stage_of(folder, 0).checkpoint(1) / LORA_FILE
    lora.write_bytes(lora.read_bytes()[:-1])


def other_scores(folder: Path) -> None:
    stage = stage_of(folder, 0)
    record = stage.manifest("select")
    record["files"][stage.scores.name]["sha256"] = "0" * 64
    files.write_record(stage.manifest_path("select"), record)


def copy_of_stage(folder: Path) -> None:
    shutil.copytree(stage_of(folder).folder, experiment(folder) / "stage2")


@pytest.mark.parametrize(
    ("harm", "settings", "said"),
    [
        (cut_checkpoint, {}, r"stage0/checkpoints/checkpoint_1/.* is not what the train phase wrote \(size\)"),
        (other_scores, {}, "stage1 was made from the scores .* of stage0"),
        (copy_of_stage, {}, "is the record of stage 0"),
        (lambda _: None, {"seed": 1}, "seed is 1, was 300"),
        (lambda _: None, {"split_step": 3}, "was sampled with the trained window"),
        (lambda folder: unfinish(folder, "train"), {"eval.judge": "geneval"}, "eval.judge"),
    ],
)  # fmt: skip
def test_damage_and_changes_are_refused_before_any_call(workplace, overrides, harm, settings, said):
    """What the calls of finished stages refuse is refused by the first process, and nothing is changed."""
    harm(workplace)
    before = snapshot(workplace)
    ended = start(workplace, overrides | {"stage_cnt": 3} | settings, f"--calls={workplace}/calls")
    assert_refused(ended, said)
    assert snapshot(workplace) == before


def test_looking_through_many_stages_is_linear(finished, workplace, overrides, monkeypatch):
    """20 stages: each manifest is read once, though each stage is compared with the eight before it."""
    root = experiment(workplace)
    shutil.rmtree(root)
    grow(experiment(finished), root, 20)
    wanted, counted = plan(workplace, overrides, stage_cnt=20), []
    read_json = files.read_json
    monkeypatch.setattr(files, "read_json", lambda path: counted.append(path) or read_json(path))
    with contextlib.chdir(workplace):
        check_done(wanted, [call for call in calls(wanted.settings) if call.stage is not None])
    assert len(counted) == 3 * 20


@pytest.mark.long
@pytest.mark.parametrize("every", [0, 1])
def test_a_run_ends_the_same_with_and_without_the_calls_of_finished_phases(
    workplace, overrides, tmp_path, monkeypatch, every
):
    """A run that lost its last training, with and without evaluations due: every file as if each call had been made."""
    unfinish(workplace, "train")
    other = shutil.copytree(workplace, tmp_path / "other")
    for folder, how in ((workplace, calls_left), (other, lambda plan, **_: list(calls(plan.settings)))):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(resident, "calls_left", how)
        resident.run_stages(make_config(overrides | {"eval.every": every}))
    for folder in (workplace, other):  # a report shows times
        (experiment(folder) / "report.html").unlink()
        shutil.rmtree(experiment(folder) / "report")
    assert_same(workplace, other)
