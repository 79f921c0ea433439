"""The report: figures and pictures that are those of the experiment's files, in one page that a browser shows whole."""

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
import warnings
import xml.etree.ElementTree
import zlib

import numpy as np
import pytest
import torch
from browsing import browser, lines_of, screenshot, set_window
from conftest import ROOT, experiment, run_script, snapshot
from PIL import Image

from b2diffurl.experiment.evaluation_table import with_error
from b2diffurl.experiment.stage import Stage
from b2diffurl.experiment.stage_table import stage_list, stage_rows
from b2diffurl.phases.health import ADVICE, warn
from b2diffurl.reporting import page
from b2diffurl.reporting.markup import breakable
from b2diffurl.reporting.page import change, disk_usage, figure_table, read_pairs, refresh, warned_kinds, write_report
from b2diffurl.reporting.plots import Pair
from b2diffurl.runtime.files import read_json, read_json_lines, seal, write_json, write_json_lines, write_record


def test_the_page_is_self_contained_and_the_same_each_time(root):
    """Nothing is loaded from anywhere, every picture has its PNG, and writing it again changes no byte of anything."""
    html = (root / "report.html").read_text()
    assert "<h2>Warnings" not in html
    sources = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\'\s>)]+)', html)
    assert sources
    assert [source[:40] for source in sources if not source.startswith(("data:", "#"))] == []
    names = {path.name for path in (root / "report").iterdir()}
    assert names == {
        "kept.json",
        *("curves.png", "log_ratio_per_step.png", "clip_fraction_per_step.png", "branches.png", "branches_last.png"),
        *(f"{kind}_{prompts}.png" for kind in ("before_after", "losses", "gains") for prompts in ("test", "train")),
    }
    write_report(root)  # here, where its commands find it
    before = snapshot(root)
    write_report(root)
    assert snapshot(root) == before


def test_the_table_has_base_newest_stage_and_paired_difference(root):
    """Held-out prompts first; of the stages the newest; the numbers are eval.jsonl's."""
    rows = read_json_lines(root / "eval.jsonl")
    table = figure_table(page.evaluation_rows(root))
    assert table[0]["prompts"] == "Training prompts, as test"  # they are the same here
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
        ("reward", 5021.4, 4.3142, {}, "5021.4 ± 4.3"),
        ("reward", 0.12345, None, {}, "0.123"),
        ("reward", 0.5, 0.0, {}, "0.500 ± 0.000"),
        ("reward", 0.0757, 0.0105, {"signed": True}, "+0.076 ± 0.011"),
        ("accuracy", 0.461, 0.0442, {}, "46.1 ± 4.4 %"),
        ("accuracy_gain", 0.2968, 0.042, {"signed": True}, "+29.7 ± 4.2 points"),
        ("reward", None, None, {}, ""),
    ],
)
def test_figures_are_written_with_as_many_digits_as_their_error_allows(key, value, error, options, expected):
    assert with_error({key: value, f"{key}_se": error}, key, **options) == expected


def test_pairs_are_of_the_same_noise_and_losses_come_by_their_size(root, tmp_path):
    """Each pair's images, rewards and verdicts are those of its two evaluations; the largest fall of reward is the worst,
    whatever the judge says; without rewards it is the judge's."""
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
        Pair("right now", nowhere, (0.5, 0.1), (False, True)),
        Pair("lower", nowhere, (0.5, 0.2), (True, True)),
        Pair("wrong now", nowhere, (0.1, 0.9), (True, False)),
    )
    assert sorted([three, two, one], key=change) == [one, two, three]
    assert change(Pair("unknown", nowhere, (None, None), None)) is None
    assert change(Pair("judged", nowhere, (None, None), (False, True))) == 1.0


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


@pytest.mark.usefixtures("no_pngs")
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
    del record["config"]["selection"]
    record["config"]["eval"]["selection"] = "all"  # as earlier versions called it
    write_json(root / "config.json", record)
    assert page.marks(stage) == {}
    assert "all of them are trained on" in write_report(root).read_text()


# ---- what need not be there ----


@pytest.mark.usefixtures("no_pngs")
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
        *("kept.json", "curves.png", "log_ratio_per_step.png", "clip_fraction_per_step.png"),
    }


@pytest.mark.usefixtures("no_pngs")
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
    assert re.search(r"clip on .*: 2 stages,\s+36 images scored", write_report(root).read_text())
    record = read_json(root / "config.json")
    record["config"]["stage_cnt"] = 100
    write_json(root / "config.json", record)
    assert ": 2 of 100 stages," in write_report(root).read_text()


@pytest.mark.usefixtures("no_pngs")
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


@pytest.mark.usefixtures("no_pngs")
def test_what_was_watched_when_judged_is_on_the_page(reported, overrides, tmp_path):
    work = shutil.copytree(reported, tmp_path / "work")
    watching = overrides | {"reward.watch": ("jpeg_compressibility",)}
    ended = run_script(work, "eval", watching, "--all", "--prompts=train", "--sampler=training")
    assert ended.code == 0, ended.stderr
    table = figure_table(page.evaluation_rows(experiment(work)), [])
    assert "jpeg_compressibility" in {row["figure"] for row in table}
    assert "Judged: jpeg_compressibility" in (experiment(work) / "report.html").read_text()


@pytest.mark.usefixtures("no_pngs")
def test_losses_are_losses_and_gains_are_gains(root):
    """Where no image is worse there is no picture of losses."""
    for row in page.evaluation_rows(root, prompts="test"):
        path = root / row["folder"] / "result.json"
        result = read_json(path)
        result["values"]["reward"] = [float(n if row["checkpoint"] == "base" else n + 0.5) for n in range(6)]
        write_json(path, result)
    html = write_report(root).read_text()
    assert "Training prompts, as test: the largest gains of reward, of 6 images" in html
    assert "prompts, as test: the largest losses" not in html
    assert not (root / "report" / "losses_test.png").exists()


@pytest.mark.usefixtures("no_pngs")
def test_a_mistake_in_the_report_stops_nothing(root, caplog, monkeypatch):
    """One warning that names the command, and no exception."""
    (root / "config.json").write_text("{")
    monkeypatch.setattr(page.logger, "propagate", True)
    refresh(root)
    assert "python -m b2diffurl.report" in caplog.text
    assert "is damaged" in caplog.text


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.usefixtures("no_pngs")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param("eval/base_test_*/00001.png", cut, marks=pytest.mark.long),
        ("eval/stage1_test_*/00001.png", lambda path: path.unlink()),
        ("eval/stage1_test_*/result.json", cut),
        ("eval.jsonl", cut),
        ("stage1/select.json", cut),
        pytest.param("stage1/train.json", cut, marks=pytest.mark.long),
        ("stage0/metrics/train.jsonl", lambda path: path.write_text("{\n" + path.read_text())),
        pytest.param("stage0/metrics/select.jsonl", lambda path: path.unlink(), marks=pytest.mark.long),
        ("stage0/tree.json", cut),
        pytest.param("stage0/tree.png", cut, marks=pytest.mark.long),
        pytest.param("stage0/selection.json", cut, marks=pytest.mark.long),
        ("stage0/scores.jsonl", cut),
    ],
)
def test_a_damaged_file_is_left_out_and_named(root, caplog, monkeypatch, name, how):
    """There is a report, with everything else in it; the file is named in the log and on the page."""
    monkeypatch.setattr(page.logger, "propagate", True)
    shutil.rmtree(root / "report")
    (path,) = root.glob(name)
    how(path)
    html = write_report(root).read_text()
    assert "<h2>Left out</h2>" in html
    assert path.name in html.split("<h2>Left out</h2>")[1].split("</section>")[0]
    assert f"{path.name}" in caplog.text
    assert "<h2>Curves</h2>" in html
    assert "<h2>Training prompts: the first 6</h2>" in html or path.name == "eval.jsonl" or name.startswith("stage1/")


def bomb(path):
    """A whole PNG that says it has 20000 x 20000 pixels."""
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


@pytest.mark.usefixtures("no_pngs")
@pytest.mark.parametrize("how", [bomb, lambda path: path.write_bytes(path.read_bytes()[:60] + path.read_bytes()[-12:])])
def test_only_the_pair_that_cannot_be_read_is_left_out(root, how):
    """A PNG with its end that has too many pixels, or lacks its middle, costs its own pair alone, and is named."""
    (path,) = root.glob("eval/stage1_test_*/00001.png")
    how(path)
    html = write_report(root).read_text()
    assert "<h2>Training prompts, as test: the first 5</h2>" in html
    assert "<h2>Training prompts: the first 6</h2>" in html
    left_out = html.split("<h2>Left out</h2>")[1].split("</section>")[0]
    assert f"1 of 6 images of Training prompts, as test are left out: {path} cannot be read as an image" in left_out


@pytest.mark.usefixtures("no_pngs")
def test_a_note_in_the_report_s_folder_stays(root):
    """Of what lies there only pictures of our names are deleted, when the report has them no more."""
    (root / "report" / "note.txt").write_text("mine")
    (root / "report" / "mine.png").write_text("mine")
    (root / "report" / "losses_gone.png").write_text("ours")
    write_report(root)
    assert (root / "report" / "note.txt").read_text() == (root / "report" / "mine.png").read_text() == "mine"
    assert not (root / "report" / "losses_gone.png").exists()


@pytest.mark.usefixtures("no_pngs")
def test_what_was_changed_and_when_is_on_the_page(root):
    """From the stages' own records; of stages of an earlier version from config.json."""
    path = Stage(root, 1).manifest_path("sample")
    manifest = read_json(path)
    write_record(path, manifest | {"settings": manifest["settings"] | {"train.learning_rate": 5e-4}})
    html = write_report(root).read_text()
    assert 'train.learning_rate is 0.0005, was 0.01</code></td><td class="number">1</td>' in html
    record = {"changed": [{"stage": 1, "changes": ["train.eps is 1, was 2"]}]}
    assert page.setting_changes({0: None, 1: None}, record) == [{"stage": 1, "change": "train.eps is 1, was 2"}]


def test_hostile_letters_are_shown_as_codes():
    """Control characters, and letters that turn the direction of writing; a long prompt is cut."""
    assert page.visible("a\x1b[2J\u202eb\nc") == "a\\x1b[2J\\u202eb\nc"
    assert page.visible("x" * 10_000) == "x" * 399 + "…"
    assert page.visible("一只猫") == "一只猫"


@pytest.mark.usefixtures("no_pngs")
def test_what_was_kept_cannot_act_on_the_page(root):
    """Markup in kept.json, which may be somebody else's with a right checksum, is a picture's data or text: no element."""
    path = root / "report" / "kept.json"
    kept, script = read_json(path), "<script>alert(1)</script>"
    for name, entry in kept["entries"].items():
        if isinstance(entry["value"], str):
            entry["value"] = script
        elif name == "curves":
            entry["value"] = [script for _ in entry["value"]]
        elif name.startswith("disk "):
            entry["value"] = {script: 1}
        elif name.startswith("settings "):
            entry["value"]["seed"] = script
        else:
            entry["value"]["warned"] = [{"stage": 0, "kind": script, "what": script, "advice": script}]
    path.write_bytes(seal(json.dumps(kept)))
    html = write_report(root).read_text()
    assert f"data:image/svg+xml;base64,{base64.b64encode(script.encode()).decode()}" in html
    assert "&lt;script&gt;" in html
    assert "<script" not in html


def test_pictures_have_the_page_s_colours(root):
    """Inside <img> a picture sees none of the page's style: it has the same colours itself, light and dark."""
    html = (root / "report.html").read_text()
    pictures = [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)]
    assert len(pictures) >= 14
    for name in ("--ink", "--faint", "--grid"):
        colours = re.findall(f"{name}: (#[0-9a-f]+);", html)
        assert len(colours) == 2
        for picture in pictures:
            assert re.findall(f"{name}: (#[0-9a-f]+);", picture) == colours
    assert "var(--ink)" in pictures[0]
    for picture in pictures:
        xml.etree.ElementTree.fromstring(picture)  # else no browser would show it


def test_a_report_reads_and_draws_only_what_is_new(root, monkeypatch):
    """The second report of the same files reads no stage and draws nothing; one more stage is one more read."""
    read, drawn = [], []
    whole, save = page.summary, page.save_png
    monkeypatch.setattr(page, "summary", lambda stage: read.append(stage.index) or whole(stage))
    monkeypatch.setattr(page, "save_png", lambda figure, path: drawn.append(path.stem) or save(figure, path))
    write_report(root)
    assert (read, drawn) == ([], [])
    shutil.copytree(root / "stage1", root / "stage2")
    for phase in page.PHASES:
        path = root / "stage2" / f"{phase}.json"
        write_record(path, read_json(path) | {"stage": 2})
    write_report(root)
    assert read == [2]
    assert [row["stage"] for row in stage_rows(root)] == [0, 1, 2]  # by the folder, whatever the metrics say
    assert "before_after_test" not in drawn
    assert "curves" in drawn


def test_nothing_is_reported_before_anything_is_scored(tmp_path):
    refresh(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- facts ----


def test_settings_that_differ_from_the_preset(root):
    """The tiny experiment is sd14 with other settings: each of them with the preset's value, and nothing else."""
    found = {key: (here, preset) for key, here, preset in page.preset_rows(read_json(root / "config.json"))}
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
    found = disk_usage(root, page.Kept(root / "report"))
    samples = sum(path.stat().st_size for path in root.glob("stage*/samples/*"))
    assert found["samples"] == samples > 0
    ours = {"report.html", *(str(path.relative_to(root)) for path in (root / "report").iterdir())}
    everything = {name: len(data) for name, data in snapshot(root).items() if name not in ours}
    assert sum(found.values()) == sum(everything.values())


def test_facts_are_on_the_page(root):
    html = (root / "report.html").read_text()
    for text in ("torch", torch.__version__, "images sampled per second", "cpu_cores", "sample: load"):
        assert text in html


# ---- in a browser ----


@pytest.mark.usefixtures("no_pngs")
@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.long)])
def test_a_browser_shows_it_whole(root, tmp_path, scheme):
    """At phone and desktop width: every image is rendered, every curve has its size, warnings are in sight before all else,
    nothing is wider than the window, no number is broken, the console is empty, and the paper is light or dark as the
    reader's system is. Screenshots are left in the test's folder."""
    for index, phase in ((0, "train"), (1, "select"), (1, "train")):
        path = Stage(root, index).manifest_path(phase)
        kinds = [kind for kind in ADVICE if kind.startswith(("Mean", "Rewards", "Ident")) == (phase == "select")]
        warned = [warn(kind, f"some figure up to 0.53, in {path}, usual 0.0075") for kind in kinds]
        write_json(path, read_json(path) | {"warnings": warned})
    write_report(root)
    driver = browser()
    try:
        for width in (390, 1280):
            set_window(driver, width, scheme)
            driver.get((root / "report.html").as_uri())
            images = driver.execute_script("return [...document.images].map(image => image.complete && image.naturalWidth)")
            assert min(images) == 64
            shots = driver.execute_script("return document.querySelectorAll('.shot img').length")
            assert shots == 2 * (6 + 6) * 2  # the first of each prompt set, and of each image that it lost or gained
            sizes = driver.execute_script(
                "return [...document.querySelectorAll('[src^=\"data:image/svg\"]')]"
                ".map(picture => [picture.clientWidth, picture.clientHeight])"
            )
            assert len(sizes) >= 14
            assert min(min(size) for size in sizes) > 150
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
            # A number and its error are never broken, and none runs into the next one.
            assert max(lines_of(driver, ".figures:not(.verdict) td.number")) == max(lines_of(driver, ".interval")) == 1
            cells = (
                "return [...document.querySelectorAll('.figures td.number')].map(one => one.scrollWidth - one.clientWidth)"
            )
            assert max(driver.execute_script(cells)) <= 0
            headings = "return [...document.querySelectorAll('.verdict th:first-child')].map(one => one.clientWidth)"
            assert min(driver.execute_script(headings)) > 100
            top = "return document.querySelector('.warnings h2').getBoundingClientRect().top"
            assert 0 < driver.execute_script(top) < 300
            picture = tmp_path / f"{scheme}_{width}.png"
            height = screenshot(driver, width, picture)
            pixels = np.asarray(Image.open(picture).convert("L"))
            assert pixels.shape == (height, width)
            assert (pixels[:20].mean() > 240) if scheme == "light" else (pixels[:20].mean() < 40)
            assert pixels.std() > 10
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def test_reading_a_report_s_files_needs_no_model():
    """The report of a long run is written in seconds: neither diffusers nor transformers is imported."""
    code = "import sys, b2diffurl.reporting.page; print(sorted({'diffusers', 'transformers', 'wandb'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.replace("'", '"')) == []


def test_the_report_shows_the_first_warnings_of_a_kind():
    rows = [{"stage": n, "kind": "A" if n < 7 else "B", "what": f"{n}", "advice": "rest"} for n in (1, 2, 4, 5, 6, 9)]
    a, b = warned_kinds(rows)
    assert (a["kind"], a["stages"], a["more"], [row["what"] for row in a["first"]]) == (
        *("A", "stages 1-2, 4-6", "stages 5-6"),
        ["1", "2", "4"],
    )
    assert (b["stages"], b["more"]) == ("stage 9", "")
    assert stage_list([3, 3, 4]) == "stages 3-4"


def test_letters_that_the_font_lacks_are_no_warnings(tmp_path):
    """A prompt in Chinese is drawn without a word about each of its letters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = page.draw_prompt(tmp_path, "一只猫", {"base": torch.zeros(2, 8, 8, 3, dtype=torch.uint8)}, "training")
    assert path.is_file()


def test_the_page_tells_what_is_trained_on_from_what_is_watched(root):
    """A mixture with how it is combined, and of every reward in the table what it is; a name breaks at its separators."""
    path = root / "config.json"
    record = read_json(path)
    record["config"]["reward"] |= {"weights": {"clip": 1.0, "jpeg_compressibility": 0.1}, "combine": "advantages"}
    record["config"]["reward"] |= {"watch": ["aesthetic"]}
    rows = read_json_lines(root / "eval.jsonl")
    scored = {f"{key}{end}": 0.5 for key in ("jpeg_compressibility", "aesthetic") for end in ("", "_se")}
    write_json_lines(root / "eval.jsonl", [row | scored for row in rows])
    reward, stages = record["config"]["reward"], stage_rows(root)
    assert page.describe_training(reward) == "1 clip + 0.1 jpeg_compressibility (each normalised by itself, then added up)"
    assert page.describe_training(reward | {"combine": "sum"}).endswith("(added up)")
    assert page.describe_training({"name": "clip", "weights": None}) == "clip"
    table = figure_table(page.evaluation_rows(root), roles=page.roles(reward, stages))
    found = {row["figure"]: row["role"] for row in table}
    assert (found["jpeg_compressibility"], found["aesthetic"], found["reward"]) == ("trained on", "watched", "")
    assert breakable("jpeg_compressibility<b>") == "jpeg_<wbr>compressibility&lt;b&gt;"


def test_a_map_needs_something_to_tell_apart(root, monkeypatch):
    """One level of noise a stage is no map, and an objective that never clips has no clip fraction."""
    monkeypatch.setattr(page, "heat_map", lambda *_, **__: None)
    kept = page.Kept(root / "report")
    monkeypatch.setattr(kept, "picture", lambda name, *_: name)
    levels = [[901.0, 0.1], [101.0, 0.2]]
    for steps, clips, expected in ((levels, True, 2), (levels, False, 1), (levels[:1], True, 0)):
        one = {"row": {"stage": 0}, "steps": dict.fromkeys(page.HEAT_MAPS, steps)}
        assert len(page.draw_heat_maps([one], kept, clips=clips)) == expected
    assert [page.clips(name) for name in ("ddpo", "awm", "of_a_user", "nft", "reinforce")] == [True] * 3 + [False] * 2
