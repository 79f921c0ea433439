"""What a stage looks at in the stages before it, and what of it the report shows, in a long experiment."""

import contextlib
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from conftest import experiment, plan

from b2diffurl.configuration.loop import is_shown
from b2diffurl.experiment.evaluation_table import evaluation_rows
from b2diffurl.experiment.origin import history_stages, require_origin
from b2diffurl.experiment.stage import finished_stages
from b2diffurl.experiment.stage_table import image_rows, updates_before
from b2diffurl.phases.health import stage_warnings
from b2diffurl.phases.inputs import reward_checksums
from b2diffurl.phases.preflight import check_windows
from b2diffurl.phases.select import earlier_summaries
from b2diffurl.reporting import page
from b2diffurl.reporting.forecast import stage_done_line
from b2diffurl.reporting.plots import MANY, curve_panels, heat_map, panel_figure, to_svg
from b2diffurl.reporting.verdict import signs_of_evaluations, verdict
from b2diffurl.runtime import files
from benchmarks import growth
from benchmarks.grown import grow

OPENED: list[str] | None = None  # files that are opened, while somebody counts


def hear(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


sys.addaudithook(hear)  # which cannot be taken away again


@contextlib.contextmanager
def opened():
    global OPENED
    OPENED = []
    try:
        yield OPENED
    finally:
        OPENED = None


def look_back(folder: Path, overrides: dict, num_stages: int) -> None:
    """All that the phases of the newest stage read of the stages before it, but for drawing the report."""
    planned = plan(folder, overrides, stage_cnt=num_stages, run_name=f"stage{num_stages - 1}")
    stage, root = planned.stage, planned.stage.root
    with contextlib.chdir(folder):
        check_windows(planned)
        require_origin(stage)
        reward_checksums(planned)
        history_stages(stage, 8)
        stage_warnings(earlier_summaries(stage), stage.manifest("select"), {})
        updates_before(stage, 10)  # as many stages as have ten updates
        assert f"{num_stages} of {num_stages} stages" in stage_done_line(planned.settings, stage)
        rows = evaluation_rows(root)
        signs_of_evaluations(root, rows)
        assert verdict(root, None, rows) is None or rows


def test_looking_back_opens_no_more_files_for_more_stages(finished, overrides, tmp_path):
    """A process that goes on opens as many at 50 stages as at 12; a new one at most six of each stage."""
    counts = {}
    for num_stages in (12, 50):
        folder = tmp_path / str(num_stages)
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model"))
        grow(experiment(finished), experiment(folder), num_stages)
        files.REMEMBERED.clear()
        for kind in ("cold", "warm"):
            with opened() as names:
                look_back(folder, overrides, num_stages)
            counts[num_stages, kind] = len([name for name in names if "stage" in Path(name).parent.name])
    assert counts[50, "warm"] <= counts[12, "warm"] + 2
    assert counts[50, "cold"] - counts[12, "cold"] <= 6 * (50 - 12) + 2


def test_the_stages_of_a_long_experiment_are_as_real_as_those_of_a_short_one(reported, tmp_path):
    """Its report is written, with a row for each stage and evaluation; written again nothing of the stages is read."""
    root = grow(experiment(reported), tmp_path / "long", 8, every=2)
    assert [row["queries"] for row in image_rows(root)] == [18 * (n + 1) for n in range(8)]
    judged = [row["checkpoint"] for row in evaluation_rows(root, prompts="test", sampler="training")]
    assert judged == ["base", "stage0", "stage1", "stage3", "stage5", "stage7"]
    damaged: list[str] = []
    for stage in finished_stages(root, "train"):
        require_origin(stage)
        stage.verify("select")
        stage.verify("train")
    kept = page.Kept(root / "report")
    summaries = page.read_stages(root, kept, damaged)
    sizes = page.disk_usage(root, kept)
    kept.finish()
    assert damaged == []
    with opened() as names:
        again = page.Kept(root / "report")
        assert page.read_stages(root, again, damaged) == summaries
        assert page.disk_usage(root, again) == sizes
    assert [Path(name).name for name in names if "stage" in Path(name).parent.name] == []
    counted = sum(path.stat().st_size for path in root.rglob("*") if path.is_file() and "report" not in path.parts)
    assert sum(sizes.values()) == counted


def stage_row(index: int) -> dict:
    """A stage's row as `stage_row` has it, of an experiment that goes on for long."""
    counts = {
        "num_images": 32,
        "num_best": 9,
        "num_worst": index % 9,
        "num_groups": 8,
        "num_trained_steps": 3 + index // 200,
    }
    figures = {"reward_mean": index % 17 / 17, "reward_std": 0.1, "grad_norm": index % 7, "clip_fraction": index % 5 / 5}
    seconds = {f"seconds/{part}": 1 + index % 3 for part in ("sample/sample", "select/score", "train/train", "train/load")}
    more = {
        "stage": index,
        "queries": 32 * (index + 1),
        "num_updates": 4,
        "max_abs_log_ratio_first": 0.0,
        "num_trained_steps": 3,
    }
    return counts | figures | seconds | more


def test_pictures_of_many_stages_are_not_large():
    """1,000 stages in a page of less than 2 MB; few stages are drawn as ever, each with its mark, bar and column."""
    drawn = {}
    for count in (3, 1000):
        rows = [stage_row(index) for index in range(count)]
        panels = [panel for panel in curve_panels(rows, []) if panel.title[:6] in ("Reward", "Kept i", "Gradie", "Second")]
        levels = {index: {t: 1 + index % 11 for t in range(0, 1000, 50)} for index in range(count)}
        drawn[count] = [to_svg(panel_figure(panel), "curve") for panel in panels]
        drawn[count].append(to_svg(heat_map("log-ratio", levels, log=True), "map"))
    assert len(drawn[3]) == 5
    assert sum(map(len, drawn[1000][:-1])) < 400_000
    assert len(drawn[1000][-1]) < 60_000
    assert "means of" not in drawn[3][3]
    assert f"means of {1000 // MANY}" in drawn[1000][3]


def test_a_long_run_is_shown_more_and_more_rarely():
    """Each of the first stages; 100 times in 1,000 stages, and never more than a twentieth of them behind."""
    shown = [count for count in range(1, 1001) if is_shown(count)]
    assert shown[:20] == list(range(1, 21))
    assert len(shown) == 100
    assert all(later - earlier <= 1 + 0.05 * later for earlier, later in pairwise(shown))


@pytest.mark.long
def test_the_benchmark_measures_and_writes(tmp_path, capsys):
    """Every figure once; called again it measures nothing."""
    given = ["--folder", str(tmp_path), "--times", "1", "2", "--sizes", "3", "5"]
    growth.main(given)
    written = capsys.readouterr().out
    before = (tmp_path / "growth.json").read_bytes()
    assert files.read_json(tmp_path / "growth.json")["stages 5 page"]["bytes"] < 3e6
    assert "| run_select.py |" in written
    assert "| the finished run again, Resident=1 |" in written
    growth.main(given)
    assert capsys.readouterr().out in written
    assert (tmp_path / "growth.json").read_bytes() == before
