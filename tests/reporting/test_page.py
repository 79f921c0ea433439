"""The report: figures and pictures that are those of the experiment's files, in one page that a browser shows whole."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, call, experiment, run_script, snapshot
from matplotlib.figure import Figure
from PIL import Image

from b2diffurl.experiment.branch_picture import Tree, decode_tree, load_tree, recording_prefix, save_tree, spread
from b2diffurl.experiment.evaluation_table import with_error
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.stage_table import per_step_rows, stage_rows
from b2diffurl.phases.health import ADVICE, warn
from b2diffurl.report import main
from b2diffurl.reporting import page
from b2diffurl.reporting.page import change, disk_usage, figure_table, read_pairs, refresh, write_report
from b2diffurl.reporting.plots import Pair, curve_panels, heat_map, panel_figure, panels_figure, short
from b2diffurl.runtime.files import read_image, read_json, read_json_lines, write_json, write_json_lines

JUDGED = {"eval.judge": "shapes", "eval.diversity": ("clip", "layout")}


@pytest.fixture(scope="module")
def reported(finished, overrides, tmp_path_factory) -> Path:
    """A folder in which the tiny experiment is judged, every stage on both prompt sets, and reported. Not to be changed."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("reported") / "copy")
    ended = run_script(folder, "eval", overrides | JUDGED, "--all", "--prompts=test,train", "--sampler=training")
    assert ended.code == 0, ended.stderr
    return folder


@pytest.fixture
def root(reported, tmp_path) -> Path:
    """A copy of that experiment's own folder, to work on."""
    return shutil.copytree(experiment(reported), tmp_path / "tiny")


def test_the_page_is_self_contained_and_the_same_each_time(root):
    """Nothing is loaded from anywhere, every picture has its PNG, and writing it again changes no byte of anything."""
    html = (root / "report.html").read_text()
    assert "<h2>Warnings" not in html
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', html)
    assert sources
    assert [source[:40] for source in sources if not source.startswith(("data:", "#"))] == []
    names = {path.name for path in (root / "report").iterdir()}
    assert names == {
        *("curves.png", "log_ratio_per_step.png", "clip_fraction_per_step.png", "branches.png", "branches_last.png"),
        *(f"{kind}_{prompts}.png" for kind in ("before_after", "losses", "gains") for prompts in ("test", "train")),
    }
    before = snapshot(root)
    write_report(root)
    assert snapshot(root) == before


def test_stage_rows_are_what_the_files_say(root):
    one, two = stage_rows(root)
    assert (one["queries"], two["queries"]) == (18, 36)
    assert (one["num_trained_steps"], two["num_trained_steps"]) == (2, 3)
    for row, stage in zip((one, two), (Stage(root, 0), Stage(root, 1)), strict=True):
        rewards = np.array([score["reward"] for score in read_json_lines(stage.scores)])
        assert row["reward_mean"] == pytest.approx(rewards.mean())
        assert row["reward_std"] == pytest.approx(rewards.std(ddof=1))
        updates = read_events(stage.metrics("train"), "update")
        assert row["num_updates"] == len(updates) > 1
        assert row["clip_fraction"] == pytest.approx(np.mean([update["clip_fraction"] for update in updates]))
        assert row["grad_norm"] == pytest.approx(np.mean([update["grad_norm"] for update in updates]))
        assert row["max_abs_log_ratio_first"] == updates[0]["max_abs_log_ratio"]
        assert row["seconds/train/train"] == read_json(stage.manifest_path("train"))["seconds"]["train"]
        columns = np.mean([update["log_ratio_per_step"] for update in updates], axis=0)
        assert list(per_step_rows(root, "log_ratio_per_step")[stage.index].values()) == pytest.approx(columns)
    assert list(per_step_rows(root, "log_ratio_per_step")[1]) == read_events(Stage(root, 1).metrics("train"))[0]["timesteps"]


def test_the_table_has_base_newest_stage_and_paired_difference(root):
    """Held-out prompts first; of the stages the newest; the numbers are eval.jsonl's."""
    rows = read_json_lines(root / "eval.jsonl")
    table = figure_table(page.evaluation_rows(root))
    assert table[0]["prompts"] == "Held-out prompts"
    assert {row["checkpoint"] for row in table} == {"stage1"}
    reward = next(row for row in table if row["figure"] == "reward" and row["prompts"] == "Training prompts")
    base, tuned = (
        next(row for row in rows if (row["checkpoint"], row["prompts"]) == (name, "train")) for name in ("base", "stage1")
    )
    assert reward["base"] == with_error(base, "reward")
    assert reward["tuned"] == with_error(tuned, "reward")
    assert reward["gain"] == with_error(tuned, "reward_gain", signed=True)
    assert "4 steps, eta 1, guidance 5" in reward["sampler"]


@pytest.mark.parametrize(
    ("key", "value", "error", "options", "expected"),
    [
        ("reward", 0.17864, 0.0112, {}, "0.179 ± 0.011"),
        ("reward", 29.3843, 1.8423, {}, "29.4 ± 1.8"),
        ("reward", 1234.5, 99.9, {}, "1234 ± 100"),
        ("reward", 0.5, 0.0, {}, "0.5000 ± 0.0000"),
        ("reward", 0.0757, 0.0105, {"signed": True}, "+0.076 ± 0.011"),
        ("accuracy", 0.461, 0.0442, {}, "46.1 ± 4.4 %"),
        ("accuracy_gain", 0.2968, 0.042, {"signed": True}, "+29.7 ± 4.2 points"),
        ("reward", None, None, {}, ""),
    ],
)
def test_figures_are_written_with_as_many_digits_as_their_error_allows(key, value, error, options, expected):
    assert with_error({key: value, f"{key}_se": error}, key, **options) == expected


def test_pairs_are_of_the_same_noise_and_losses_come_by_the_judge_first(root, tmp_path):
    """Each pair's images, rewards and verdicts are those of its two evaluations; from right to wrong is the worst."""
    base, _, tuned = page.evaluation_rows(root, prompts="test")
    pairs = read_pairs(root, base, tuned)
    assert len(pairs) == 6
    for n, pair in enumerate(pairs):
        for image, row, reward in zip(pair.images, (base, tuned), pair.rewards, strict=True):
            assert image == root / row["folder"] / f"{n:05d}.png"
            assert image.is_file()
            found = read_json(root / row["folder"] / "result.json")
            assert reward == found["values"]["reward"][n]
            assert pair.prompt == found["shown_prompts"][n]
    nowhere = (tmp_path, tmp_path)
    one, two, three = (
        Pair("wrong now", nowhere, (0.1, 0.9), (True, False)),
        Pair("lower", nowhere, (0.5, 0.2), (True, True)),
        Pair("right now", nowhere, (0.5, 0.1), (False, True)),
    )
    assert sorted([three, two, one], key=change) == [one, two, three]
    assert change(Pair("unknown", nowhere, (None, None), None)) is None
    assert change(Pair("judged", nowhere, (None, None), (False, True))) == (1, 0.0)


def test_the_page_shows_the_experiment_s_own_images(root):
    """The first held-out images of base and newest stage, byte for byte, in order, then those of other galleries."""
    html = (root / "report.html").read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)]
    base, _, tuned = page.evaluation_rows(root, prompts="test")
    expected = [(root / row["folder"] / f"{n:05d}.png").read_bytes() for n in range(6) for row in (base, tuned)]
    assert embedded[: len(expected)] == expected


def test_large_images_are_scaled_down_for_the_page(tmp_path):
    path = tmp_path / "large.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)).save(path)
    found = page.embed(path)
    assert found["src"].startswith("data:image/webp;base64,")
    assert len(found["src"]) < path.stat().st_size / 2
    assert not found["small"]


def drawn(panels: list, title: str):
    """The axes of a panel."""
    axes = Figure().subplots()
    next(panel for panel in panels if panel.title == title).draw(axes)
    return axes


def test_curves_are_drawn_of_the_rows(root):
    """Everything at the images scored by then, the spread one deviation to both sides, evaluations with their errors,
    seconds stacked to their sum."""
    rows, judged = stage_rows(root), page.evaluation_rows(root)
    panels = curve_panels(rows, judged)
    (line,) = drawn(panels, "Reward of the stage's images, ± one sd").lines
    assert line.get_xydata().tolist() == [[row["queries"], row["reward_mean"]] for row in rows]
    (band,) = drawn(panels, "Reward of the stage's images, ± one sd").collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(max(row["reward_mean"] + row["reward_std"] for row in rows))
    assert heights.min() == pytest.approx(min(row["reward_mean"] - row["reward_std"] for row in rows))
    test, train = drawn(panels, "Judged: reward").containers
    for container, prompts in ((test, "test"), (train, "train")):
        mine = [row for row in judged if row["prompts"] == prompts]
        assert container[0].get_xydata().tolist() == [[row["queries"], row["reward"]] for row in mine]
        (errors,) = container[2]
        spread = [segment[1, 1] - segment[0, 1] for segment in errors.get_segments()]
        assert spread == pytest.approx([2 * row["reward_se"] for row in mine])
    bars = drawn(panels, "Seconds a stage").patches
    tops = [max(bar.get_y() + bar.get_height() for bar in bars[n::2]) for n in range(2)]
    timed = ("sample/load", "sample/sample", "select/load", "select/score", "train/load", "train/train")
    assert tops == pytest.approx([sum(row[f"seconds/{part}"] for part in timed) for row in rows])


def test_heat_maps_run_from_noise_to_image():
    """Stages across, timesteps down; what was not trained is empty."""
    figure = heat_map("title", {0: {101: 0.5}, 2: {901: 0.2, 101: 0.1}}, log=False)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["901", "101"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    (mesh,) = axes.collections[:1]
    np.testing.assert_array_equal(mesh.get_array().filled(np.nan), [[np.nan, 0.2], [0.5, 0.1]])


def test_what_was_trained_and_is_zero_is_no_gap():
    """On a logarithmic scale, too, where a stage of one update has ratios of exactly 1."""
    (mesh,) = heat_map("title", {0: {101: 1e-3}, 1: {901: 0.0, 101: 1e-5}}, log=True).axes[0].collections[:1]
    np.testing.assert_array_equal(mesh.get_array().filled(np.nan), [[np.nan, 1e-5], [1e-3, 1e-5]])


def test_axes_say_what_is_there():
    """Percentages at half points are not rounded to whole ones, and there is no negative clip fraction."""
    judged = {"prompts": "test", "sampler": "training", "accuracy_se": 0.01}
    rows = [judged | {"queries": n, "accuracy": 0.45 + n / 100} for n in (0, 10)]
    panels = curve_panels([{"queries": 10, "num_updates": 1, "clip_fraction": 0.0}], rows)
    axis = drawn(panels, "Judged: accuracy").yaxis
    places = axis.get_majorticklocs()
    said = [float(label.removesuffix("%")) for label in axis.get_major_formatter().format_ticks(places)]
    assert said == pytest.approx([100 * place for place in places])
    assert drawn(panels, "Clip fraction, mean over updates").get_ylim()[0] == 0


def test_long_names_end_where_their_panel_ends():
    """Titles and legends of a function of a long package, and of a prompt file; what tells them apart is to be seen."""
    names = [f"my_company.rewards_of_ours:how_{word}_it_is" for word in ("beautiful", "surprising")]
    rows = [
        {"prompts": f"/home/{'a_long_name_' * 4}{n}.txt", "sampler": "training", "queries": 0, "stage": None}
        | dict.fromkeys(names, 0.5)
        | {f"{name}_se": 0.1 for name in names}
        for n in range(3)
    ]
    panels = [panel for panel in curve_panels([{"queries": 10}], rows) if panel.title.startswith("Judged")]
    assert len({panel.title for panel in panels}) == 2
    for panel in panels:
        figure = panel_figure(panel)
        figure.draw_without_rendering()
        (axes,) = figure.axes
        assert axes._left_title.get_window_extent().x1 < figure.bbox.x1
        legend = axes.get_legend().get_window_extent()
        assert figure.bbox.x0 < legend.x0 < legend.x1 < figure.bbox.x1


# ---- the branch picture ----


def test_what_is_watched_of_a_prefix_is_the_first_group_s():
    """Its state before each step of the prefix; predictions pass through."""
    seen: list[torch.Tensor] = []
    predict = recording_prefix(lambda x, i: x * 2, 2, seen)
    x = torch.arange(6.0).view(3, 2, 1, 1)
    for i in range(4):
        assert torch.equal(predict(x + i, i), (x + i) * 2)
    assert [state.flatten().tolist() for state in seen] == [[0.0, 1.0], [1.0, 2.0]]


def test_a_tree_shows_the_first_group_s_way(root, config, models):
    """Its last column is the first group's images, its first the decoded noise that all branches share."""
    for index, split in ((0, 2), (1, 1)):
        stage = Stage(root, index)
        tree = load_tree(stage)
        assert tree.prompt == read_json(stage.prompts)[0]
        assert (tree.num_steps, list(tree.shared)) == (4, list(range(split + 1)))
        assert [list(branch) for branch in tree.branches] == [list(range(split + 1, 5))] * 3
        for branch, states in enumerate(tree.branches):
            np.testing.assert_allclose(states[4].astype(int), read_image(stage.image(branch)).numpy().astype(int), atol=1)
        assert len({states[split + 1].tobytes() for states in tree.branches}) == 3
        assert tree.shared[0].std() > 0


def test_a_tree_decodes_each_state_at_its_place(tmp_path):
    """States that are numbers: the tile of step j has the number of step j, that of branch k is k more."""
    stage = Stage(tmp_path, 0)
    prefix = [torch.full((1, 3, 2, 2), float(step)) for step in range(6)]
    latents = torch.stack([torch.arange(6, 21.0) + 20 * (k > 0) * k for k in range(2)])
    latents[:, 0] = 6
    latents = latents[:, :, None, None, None].expand(-1, -1, 3, 2, 2)
    save_tree(stage, decode_tree("a prompt", prefix, latents, lambda states: states.permute(0, 2, 3, 1).to(torch.uint8)))
    tree = load_tree(stage)
    assert tree == Tree("a prompt", 20, tree.shared, tree.branches)
    assert {step: int(tile.max()) for step, tile in tree.shared.items()} == {0: 0, 2: 2, 4: 4, 6: 6}
    for k, states in enumerate(tree.branches):
        assert {step: (int(tile.min()), int(tile.max())) for step, tile in states.items()} == {
            step: (step + 20 * k, step + 20 * k) for step in (7, 11, 16, 20)
        }


@pytest.mark.parametrize(
    ("first", "last", "count", "expected"),
    [
        (0, 0, 4, [0]),
        (3, 3, 4, [3]),
        (0, 1, 4, [0, 1]),
        (0, 9, 4, [0, 3, 6, 9]),
        (1, 10, 4, [1, 4, 7, 10]),
        (5, 7, 2, [5, 7]),
    ],
)
def test_states_are_spread_over_the_way(first, last, count, expected):
    assert spread(first, last, count) == expected


def test_marks_are_the_selection(root):
    """Winner above, loser below its prompt's mean; the branch picture is of a stage that has both if there is one."""
    stage = Stage(root, 0)
    rows = [
        {"id": 0, "group": 0, "branch": 2, "score": 1.5, "advantage": 1.5},
        {"id": 1, "group": 0, "branch": 0, "score": -0.6},
    ]
    write_json(stage.selection, [*rows, {"id": 9, "group": 3, "branch": 1, "score": 9.0}])
    assert page.marks(stage) == {2: "winner", 0: "loser"}
    record = read_json(root / "config.json")
    record["config"]["eval"]["selection"] = "all"
    write_json(root / "config.json", record)
    assert page.marks(stage) == {}
    assert "all of them are trained on" in write_report(root).read_text()


# ---- what need not be there ----


def test_a_report_of_an_experiment_that_nobody_judged(root):
    """It says how to judge it, and has its curves; without trees it has no branch picture."""
    for path in ("eval", "report"):
        shutil.rmtree(root / path)
    for path in (root / "eval.jsonl", *root.glob("stage*/tree.*")):
        path.unlink()
    html = write_report(root).read_text()
    assert "Nothing has been judged yet" in html
    assert "<h2>Branches</h2>" not in html
    assert {path.name for path in (root / "report").iterdir()} == {
        *("curves.png", "log_ratio_per_step.png", "clip_fraction_per_step.png"),
    }


def test_a_report_in_the_middle_of_a_stage(root):
    """Scored but not trained, and one whose selection was empty: no update, no ratio, and still a page."""
    shutil.rmtree(root / "eval")
    (root / "eval.jsonl").unlink()
    stage = Stage(root, 1)
    shutil.rmtree(stage.folder / "checkpoints")
    stage.manifest_path("train").unlink()
    write_json_lines(Stage(root, 0).metrics("train"), [])
    row = stage_rows(root)[0]
    assert (row["num_updates"], row["max_abs_log_ratio_first"], row["clip_fraction"]) == (0, None, None)
    assert [key for key in stage_rows(root)[1] if key.startswith("seconds/train")] == []
    assert re.search(r"clip on .*: 2 stages,\s+36 scored images", write_report(root).read_text())
    record = read_json(root / "config.json")
    record["config"]["stage_cnt"] = 100
    write_json(root / "config.json", record)
    assert ": 2 of 100 stages," in write_report(root).read_text()


def test_rewards_may_be_unknown(root):
    """Reward `file` has no scores for new images: the judge's verdicts stand alone."""
    for row in read_json_lines(root / "eval.jsonl"):
        path = root / row["folder"] / "result.json"
        result = read_json(path)
        result["values"].pop("reward", None)
        write_json(path, result)
    rows = read_json_lines(root / "eval.jsonl")
    for row in rows:
        row |= dict.fromkeys(("reward", "reward_se", "reward_gain", "reward_gain_se"))
    write_json_lines(root / "eval.jsonl", rows)
    html = write_report(root).read_text()
    assert "Judged: accuracy" in html
    assert "Judged: reward" not in html


def test_other_prompt_files_are_kept_apart(reported, overrides, tmp_path):
    """A file of the name test.json is not the held-out set: it has its own pictures, and its name as a title, without the
    folders; prompts are text and neither markup nor mathematics."""
    work = shutil.copytree(reported, tmp_path / "work")
    prompts = ["a $5 bill and a $10 bill", r"price $\foo$", '<script>alert(1)</script> & "quotes"']
    (work / "test.json").write_text(json.dumps(prompts))
    before = (experiment(work) / "report" / "before_after_test.png").read_bytes()
    ended = run_script(work, "eval", overrides, "--prompts=test.json", "--sampler=training")
    assert ended.code == 0, ended.stderr
    assert "report: model" in ended.stdout
    assert (experiment(work) / "report" / "before_after_test.png").read_bytes() == before
    names = {re.sub("test_[0-9a-f]{6}", "other", path.name) for path in (experiment(work) / "report").iterdir()}
    assert "before_after_other.png" in names
    html = (experiment(work) / "report.html").read_text()
    assert "<h2>test.json: the first 6</h2>" in html
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in html
    ended = run_script(work, "eval", overrides, r"--prompt=price $\foo$", "--sampler=training")
    assert ended.code == 0, ended.stderr


def test_what_was_watched_when_judged_is_on_the_page(reported, overrides, tmp_path):
    work = shutil.copytree(reported, tmp_path / "work")
    watching = overrides | {"reward.watch": ("jpeg_compressibility",)}
    ended = run_script(work, "eval", watching, "--all", "--prompts=train", "--sampler=training")
    assert ended.code == 0, ended.stderr
    table = figure_table(page.evaluation_rows(experiment(work)))
    assert "jpeg_compressibility" in {row["figure"] for row in table}
    assert "Judged: jpeg_compressibility" in (experiment(work) / "report.html").read_text()


def test_losses_are_losses_and_gains_are_gains(root):
    """Where no image is worse there is no picture of losses."""
    for row in page.evaluation_rows(root, prompts="test"):
        path = root / row["folder"] / "result.json"
        result = read_json(path)
        result["values"]["reward"] = [float(n if row["checkpoint"] == "base" else n + 0.5) for n in range(6)]
        write_json(path, result)
    html = write_report(root).read_text()
    assert "Held-out prompts: the largest gains of 6 images" in html
    assert "Held-out prompts: the largest losses" not in html
    assert not (root / "report" / "losses_test.png").exists()


def test_watched_rewards_have_their_curve(root):
    for index in range(2):
        path = Stage(root, index).metrics("select")
        write_json_lines(
            path, [row | {"watch/clip_mean": 0.5, "watch/clip/part_mean": 0.1} for row in read_json_lines(path)]
        )
    titles = [panel.title for panel in curve_panels(stage_rows(root), [])]
    assert "clip, watched" in titles
    assert len(titles) == len(set(titles)) == 9
    assert titles[0] == "Reward of the stage's images, ± one sd"
    panels_figure(curve_panels(stage_rows(root), [])).draw_without_rendering()


def test_a_mistake_in_the_report_stops_nothing(root, caplog, monkeypatch):
    """One warning that names the command, and no exception."""
    (Stage(root, 1).scores).write_text("{")
    monkeypatch.setattr(page.logger, "propagate", True)
    refresh(root)
    assert "python -m b2diffurl.report" in caplog.text
    assert "is damaged" in caplog.text


def test_nothing_is_reported_before_anything_is_scored(tmp_path):
    refresh(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- facts ----


def test_settings_that_differ_from_the_preset(root):
    """The tiny experiment is sd14 with other settings: each of them with the preset's value, and nothing else."""
    found = {key: (here, preset) for key, here, preset in page.facts(root, stage_rows(root))["differences"]}
    assert found["split_time"] == (3, 5)
    assert found["train.learning_rate"] == (1e-2, 1e-4)
    assert "sample.eta" not in found
    assert "run_name" not in found
    assert page.preset_rows({"config": {"preset": "gone"}}) == page.preset_rows({"config": {}}) == []


def test_differences_are_those_of_when_it_was_recorded(root):
    """The preset of a record that says nothing, as an earlier version wrote it, is read anew, and says the same; one that
    says what differed is believed, whatever the preset has become."""
    record = read_json(root / "config.json")
    found = page.preset_rows(record)
    assert found == page.preset_rows({"config": record["config"]})
    recorded = {"differs_from_preset": {"seed": [1, 2]}}
    assert page.preset_rows(record | recorded) == [("seed", 1, 2)]
    assert page.preset_rows(record | {"differs_from_preset": {}}) == []


def test_disk_is_counted_by_kind_without_the_report(root):
    found = disk_usage(root)
    samples = sum(path.stat().st_size for path in root.glob("stage*/samples/*"))
    assert found["samples"] == samples > 0
    ours = {"report.html", *(str(path.relative_to(root)) for path in (root / "report").iterdir())}
    everything = {name: len(data) for name, data in snapshot(root).items() if name not in ours}
    assert sum(found.values()) == sum(everything.values())


def test_facts_are_on_the_page(root):
    html = (root / "report.html").read_text()
    for text in ("torch", torch.__version__, "images sampled a second", "cpu_cores", "sample: load"):
        assert text in html


# ---- by hand ----


def test_by_hand(reported, tmp_path):
    """`python -m b2diffurl.report EXP` takes a name or a folder; mistakes end in two lines and code 2."""
    work = shutil.copytree(reported, tmp_path / "work")
    (experiment(work) / "report.html").unlink()
    for name in ("tiny", "model/lora/tiny"):
        ended = call(work, ["report", name], main)
        assert (ended.code, ended.stdout.strip()) == (0, "model/lora/tiny/report.html"), ended.stderr
    ended = call(work, ["report", "tiyn"], main)
    assert ended.code == 2
    assert ended.stderr.startswith(
        "error: report: no experiment 'tiyn'. Give its folder, or its name. Experiments in model/lora: tiny."
    )
    (work / "empty").mkdir()
    shutil.copy(experiment(work) / "config.json", work / "empty")
    ended = call(work, ["report", "empty"], main)
    assert ended.code == 2
    assert "no stage that has been scored" in ended.stderr


def test_rewards_are_short():
    assert [short(value) for value in (0.00878, -1.8521, 12.345)] == ["0.009", "-1.852", "12.3"]


# ---- in a browser ----


def browser():
    """Headless Chromium from Debian's packages; without it the test is skipped, but not under CI."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        message = f"no {' and '.join(missing)}: apt-get install chromium chromium-driver"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_a_browser_shows_it_whole(root, tmp_path, scheme):
    """At phone and desktop width: every image is rendered, every curve has its size, warnings are in sight before all else,
    nothing is wider than the window, the console is empty, and the paper is light or dark as the reader's system is.
    Screenshots are left in the test's folder."""
    for index, phase in ((0, "train"), (1, "select"), (1, "train")):
        path = Stage(root, index).manifest_path(phase)
        kinds = [kind for kind in ADVICE if kind.startswith(("Mean", "Rewards", "Ident")) == (phase == "select")]
        warned = [warn(kind, f"some figure up to 0.53, in {path}, usual 0.0075") for kind in kinds]
        write_json(path, read_json(path) | {"warnings": warned})
    write_report(root)
    driver = browser()
    try:
        emulate(driver, "setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        for width in (390, 1280):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            emulate(driver, "setDeviceMetricsOverride", metrics)
            driver.get((root / "report.html").as_uri())
            images = driver.execute_script("return [...document.images].map(image => image.complete && image.naturalWidth)")
            assert len(images) == 2 * (6 + 6) * 2  # the first of each prompt set, and of each image that it lost or gained
            assert min(images) == 64
            sizes = driver.execute_script(
                "return [...document.querySelectorAll('svg')].map(svg => [svg.clientWidth, svg.clientHeight])"
            )
            assert len(sizes) >= 14
            assert min(min(size) for size in sizes) > 150
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            top = "return document.querySelector('.warnings h2').getBoundingClientRect().top"
            assert 0 < driver.execute_script(top) < 300
            height = driver.execute_script("return document.documentElement.scrollHeight")
            emulate(driver, "setDeviceMetricsOverride", metrics | {"height": height})
            shot = base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", {})["data"])
            picture = tmp_path / f"{scheme}_{width}.png"
            picture.write_bytes(shot)
            pixels = np.asarray(Image.open(picture).convert("L"))
            assert pixels.shape == (height, width)
            assert (pixels[:20].mean() > 240) if scheme == "light" else (pixels[:20].mean() < 40)
            assert pixels.std() > 10
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def emulate(driver, what: str, settings: dict) -> None:
    driver.execute_cdp_cmd(f"Emulation.{what}", settings)


def test_reading_a_report_s_files_needs_no_model():
    """The report of a long run is written in seconds: neither diffusers nor transformers is imported."""
    code = "import sys, b2diffurl.reporting.page; print(sorted({'diffusers', 'transformers', 'wandb'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.replace("'", '"')) == []
