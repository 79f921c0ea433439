"""What a run is said to ask for, against hand-worked numbers and against what runs then did; log lines and progress bars."""

import contextlib
import json
import os
import pty
import re
import runpy
import shutil
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import (
    PROMPTS,
    ROOT,
    Ended,
    assert_same,
    call,
    experiment,
    flags,
    get_config,
    make_config,
    run_script,
    run_stage,
    run_verb,
    script_arguments,
    settings_at,
    snapshot,
)
from safetensors.torch import load_file

from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_rows
from b2diffurl.models import Sizes, stable_diffusion
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.reporting import dry_run, forecast
from b2diffurl.reporting.forecast import Pace, Work
from b2diffurl.reporting.page import facts
from b2diffurl.runtime.files import read_metadata

PHASES = ("sample", "select", "train")


def begin(folder: Path, overrides: dict, *more: str, preset: str = "sd14") -> Ended:
    """`python -m b2diffurl.start`, in `folder`."""
    path = str(ROOT / "b2diffurl" / "start.py")
    argv = [path, *script_arguments("sample", overrides, *more, preset=preset)[1:]]
    return call(folder, argv, lambda: runpy.run_path(path, run_name="__main__"))


def write_stage(root: Path, index: int, finished: tuple[str, ...] = PHASES, **facts) -> None:
    """Manifests alone: of 48 evaluations, 18 images and 40 transitions, finished at :00, :10 and :30."""
    values = {"sample": 24.0, "score": 9.0, "train": 16.0, "num_transitions": 40, "num_selected": 9, "started": 4} | facts
    manifests = {
        "sample": {"num_trained_steps": 2, "num_evaluations": 48, "seconds": {"load": 1.0, "sample": values["sample"]}},
        "select": {"num_images": 18, "num_selected": values["num_selected"], "seconds": {"score": values["score"]}},
        "train": {"num_transitions": values["num_transitions"], "seconds": {"load": 3.0, "train": values["train"]}},
    }
    selected, trained = 10, 10 + int(values["train"]) + values["started"]
    for phase, second in zip(PHASES, (0, selected, trained), strict=True):
        if phase in finished:
            path = Stage(root, index).manifest_path(phase)
            path.parent.mkdir(parents=True, exist_ok=True)
            when = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(1e9 + second))}
            path.write_text(json.dumps(when | manifests[phase]))


# ---- amounts ----


@pytest.mark.parametrize(
    ("more", "evaluations", "selected", "updates"),
    [
        ({}, 6 * 2 + 18 * 2, 12, 2 * 3),  # 6 prefixes of 2 steps, 18 images of 2; 12 in updates of 4
        ({"sampling": "independent"}, 18 * 4, 12, 2 * 3),
        ({"eval.selection": "all", "train.num_epochs": 1}, 48, 18, 5),
        ({"train.objective": "d3po", "train.batch_size": 5, "train.gradient_accumulation_steps": 1}, 48, 12, 2 * 3),  # pairs
        ({"train.objective": "d3po", "train.batch_size": 1, "train.gradient_accumulation_steps": 1}, 48, 12, 2 * 6),
    ],
)
def test_amounts(overrides, more, evaluations, selected, updates):
    """By hand: 3 batches of 2 groups of 3, S = 2 of 4 steps, updates of 4 trajectories in 2 epochs."""
    config = make_config(overrides | more)
    budget = Budget.of(read_settings(config))
    assert (budget.num_groups, budget.num_images) == (6, 18)
    found = (budget.num_evaluations(2), budget.most_selected, budget.most_updates)
    assert found == (evaluations, selected, updates)


def test_amounts_are_those_of_a_run(stage_with, overrides):
    """Where all images are selected, the manifests have exactly the evaluations and updates that are foretold."""
    settings = {"eval.selection": "all", "train.gradient_accumulation_steps": 4}
    stage = Stage(experiment(stage_with(**settings)), 0)
    budget = Budget.of(read_settings(make_config(overrides | settings)))
    assert stage.manifest("sample")["num_evaluations"] == budget.num_evaluations(2)
    assert stage.manifest("train")["num_updates"] == budget.most_updates == 2 * 3


def test_planned_steps(tmp_path):
    """The schedule's, which is the reference's; a stage that is sampled keeps its own, and split_step is for the others."""
    config = get_config("sd14")
    steps = Budget.of(read_settings(config)).planned_steps(tmp_path)
    assert [steps.count(S) for S in range(14, 21)] == [15, 14, 14, 15, 14, 14, 14]
    write_stage(tmp_path, 1, ("sample",))
    assert Budget.of(read_settings(config)).planned_steps(tmp_path) == [14, 2, *steps[2:]]
    config.split_step = 17
    assert Budget.of(read_settings(config)).planned_steps(tmp_path) == [17, 2] + [17] * 98


# ---- time ----


def test_pace_is_the_median_of_the_latest_stages(overrides, tmp_path):
    """Of six finished stages the oldest does not count; a stage begun is none; each rate by hand."""
    config = make_config(overrides)
    assert forecast.measured_pace(settings_at(config, tmp_path)) is None
    for index, factor in enumerate((100, 1, 4, 2, 3, 50)):
        write_stage(tmp_path, index, sample=24.0 * factor, score=9.0 * factor, train=16 * factor, started=factor)
    write_stage(tmp_path, 6, ("sample", "select"), sample=1e9)
    assert forecast.measured_pace(settings_at(config, tmp_path)) == Pace(3 * 24 / 48, 3 * 9 / 18, 3 * 16 / 40, 3)


def test_pace_without_training(overrides, tmp_path):
    """Where nothing was selected a transition counts as a pass forward and one backward; with a base policy as three passes;
    of clocks that were set back the time for loading is taken."""
    write_stage(tmp_path, 0, num_transitions=0, started=-9)
    assert forecast.measured_pace(settings_at(make_config(overrides), tmp_path)) == Pace(0.5, 0.5, 2 * 0.5, 3)
    asking = make_config(overrides | {"train.objective": "dpok"})
    assert forecast.measured_pace(settings_at(asking, tmp_path)).transition == 3 * 0.5


def test_a_pause_is_no_start_up(overrides, tmp_path):
    """Eight hours between two phases are the user's; what a process takes to start is then known by its loading alone."""
    write_stage(tmp_path, 0, started=8 * 3600)
    assert forecast.measured_pace(settings_at(make_config(overrides), tmp_path)).process == 3


def test_seconds_of_an_interrupted_phase_are_of_a_share(overrides, workplace):
    """One of three batches sampled again, and the second of two epochs trained again: the manifests say so, and the pace is
    that of the work that was timed."""
    stage = Stage(experiment(workplace), 1)
    for phase in PHASES:
        stage.manifest_path(phase).unlink()
    stage.batch(1).unlink()
    shutil.rmtree(stage.checkpoints()[-1])
    run_stage(workplace, overrides, 1)
    sampled, trained = stage.manifest("sample"), stage.manifest("train")
    assert (sampled["seconds"]["share"], trained["seconds"]["share"]) == (pytest.approx(1 / 3), 0.5)
    pace = forecast.stage_pace(OBJECTIVES["ddpo"], stage)
    assert pace.evaluation == pytest.approx(sampled["seconds"]["sample"] / (sampled["num_evaluations"] / 3))
    assert pace.transition == pytest.approx(trained["seconds"]["train"] / (trained["num_transitions"] / 2))
    whole = Stage(experiment(workplace), 0).manifest("sample")
    assert whole["seconds"]["share"] == 1
    images = (18 + 18 / 3) / (whole["seconds"]["sample"] + sampled["seconds"]["sample"])
    assert facts(experiment(workplace), stage_rows(experiment(workplace)))["images_per_second"] == pytest.approx(images)


def test_first_pace(overrides):
    """3 s for a batch, of three with 48 evaluations in all; scoring is unknown; training is twice sampling."""
    assert forecast.first_pace(read_settings(make_config(overrides)), 2, 3.0, 7.0) == Pace(3 / 16, 0, 2 * 3 / 16, 7)


def test_work_left(overrides, tmp_path):
    """By hand, stage by stage and phase by phase. Unselected stages count with the share of the latest, or the most."""
    config = make_config(overrides | {"eval.every": 0, "eval.deployed.num_steps": 5})
    judging = Work(
        6 * (4 * 4 + 2 * 5), 6 * 6, processes=2
    )  # base and last on train and test; and both by the deployed sampler
    stages = Work(48 + 60, 36, 2 * 12 * (2 + 3), 6 + 2)  # S = 2 and 3
    assert forecast.work_left(settings_at(config, tmp_path)) == judging + stages
    write_stage(tmp_path, 0, ("sample",))
    assert forecast.work_left(settings_at(config, tmp_path)) == judging + Work(60, 36, 2 * 12 * (2 + 3), 5 + 2)
    write_stage(tmp_path, 0, ("sample", "select"))
    assert forecast.work_left(settings_at(config, tmp_path)) == judging + Work(60, 18, 2 * 9 * (2 + 3), 4 + 2)
    write_stage(tmp_path, 0)
    assert forecast.work_left(settings_at(config, tmp_path)) == judging + Work(60, 18, 2 * 9 * 3, 3 + 1)
    write_stage(tmp_path, 1)
    assert forecast.work_left(settings_at(config, tmp_path)) == judging
    assert Pace(1, 10, 100, 1000).seconds(Work(4, 3, 2, 1)) == 1234


@pytest.mark.parametrize(
    ("every", "unfinished", "sets"),
    [
        (0, range(5), 4),
        (2, range(5), 6),  # after stages 1 and 3; the last is not due
        (2, [2, 3, 4], 4),  # the base has been judged once, with stage 1
        (5, range(5), 4),  # the last is due: base and last on held-out prompts are then judged
        (5, [], 2),
        (1, [4], 3),
    ],
)
def test_evaluations_left(overrides, every, unfinished, sets):
    """Nothing is judged twice: sets of 6 images, 4 steps each, and the deployed sampler's two of 5 steps."""
    config = make_config(overrides | {"stage_cnt": 5, "eval.every": every, "eval.deployed.num_steps": 5})
    expected = Work(6 * (sets * 4 + 2 * 5), 6 * (sets + 2), processes=len(unfinished) + 2)
    finished = set(range(5)).difference(unfinished)
    assert forecast.judging_left(read_settings(config), finished=finished) == expected


def test_what_is_said_after_a_stage(overrides, tmp_path):
    """Time so far is that of phases and three starts a stage; time left is that of other stages and of evaluations; a stage
    beyond stage_cnt is no stage of the run."""
    config = make_config(overrides | {"eval.every": 0, "eval.deployed.num_steps": 5})
    write_stage(tmp_path, 0)
    left = (156 + 60) * 0.5 + (36 + 18) * 0.5 + 2 * 9 * 3 * 0.4 + (2 + 4) * 4  # 180.6 s
    assert left == pytest.approx(180.6)
    said = forecast.stage_done_line(settings_at(config, tmp_path), Stage(tmp_path, 0))
    assert said == "stage0 done: 1 of 2 stages, 61 s so far, about 3.0 min left"  # 24 + 9 + 16 + 3 * 4
    assert forecast.plan_line(settings_at(config, tmp_path)).endswith(", 1 of 2 stages done, about 3.0 min left")
    write_stage(tmp_path, 7)
    assert forecast.num_done(settings_at(config, tmp_path)) == 1
    write_stage(tmp_path, 1)
    assert forecast.plan_line(settings_at(config, tmp_path)).endswith("all stages done")


def test_durations_and_sizes():
    seconds = {4.44: "4.4 s", 89: "89 s", 91: "1.5 min", 61 * 60: "61 min", 5 * 3600: "5.0 h", 30 * 3600: "30 h"}
    assert {one: forecast.duration(one) for one in seconds} == seconds
    assert forecast.duration(50 * 3600) == "2.1 days"
    assert [dry_run.size(n) for n in (640e3, 3.21e6, 15e9, 2e12)] == ["640 kB", "3.2 MB", "15 GB", "2.0 TB"]


# ---- disk ----


def test_sizes_of_files(finished, overrides):
    """Against the finished experiment's: trajectories but for their headers, checkpoints to the number, images."""
    settings = read_settings(make_config(overrides))
    base = stable_diffusion.sizes(settings.model)
    assert (base.latent_shape, base.image_px, base.embedding) == ((4, 8, 8), 64, 77 * 16)
    for stage in finished_stages(experiment(finished), "train"):
        num_steps = stage.manifest("sample")["num_trained_steps"]
        tensors = [tensor for n in range(3) for tensor in load_file(stage.batch(n)).values()]
        missing = sum(2 - len(read_metadata(stage.batch(n))["prompts"]) for n in range(3))  # two groups, one prompt
        expected = sum(tensor.nbytes for tensor in tensors) + missing * 77 * 16 * 4
        assert dry_run.trajectory_bytes(settings, base, num_steps, len(PROMPTS), 4) == expected
        folder = stage.checkpoints()[-1]
        written = [*load_file(folder / LORA_FILE).values()]
        written += [value for key, value in load_file(folder / "optimizer.safetensors").items() if "exp_avg" in key]
        assert dry_run.checkpoint_bytes(settings, base) == sum(tensor.nbytes for tensor in written)
    sizes = [path.stat().st_size for path in stage.images.iterdir()]
    assert dry_run.image_bytes(experiment(finished), base) == pytest.approx(sum(sizes) / len(sizes))
    assert dry_run.image_bytes(finished, base) == 3 * 64 * 64


def test_what_is_on_disk_in_all(overrides, tmp_path):
    """By hand: the trajectories of the larger stage or of both, a copy of two siblings in three, two checkpoints a stage,
    images of which 4 or all are kept, and those that are judged."""
    base = Sizes((4, 8, 8), 64, 77 * 16, 100_000)
    rare = {"eval.every": 0, "keep.images": 4, "keep.samples": False}
    text = dry_run.disk_text(settings_at(make_config(overrides | rare), tmp_path), base, [10_000_000, 30_000_000])
    image, checkpoint = 3 * 64 * 64, 4 * 100_000 * 12
    total = 30e6 + 20e6 + 2 * (2 * checkpoint + 4 * image) + (14 + 36) * image
    assert text.startswith(f"at most {dry_run.size(total)}, ")
    assert f"{dry_run.size(2 * checkpoint)}" in text
    kept = rare | {"keep.images": -1, "keep.samples": True, "train.use_8bit_adam": True, "train.save_interval": 2}
    text = dry_run.disk_text(settings_at(make_config(overrides | kept), tmp_path), base, [10_000_000, 30_000_000])
    assert text.startswith(
        f"at most {dry_run.size(40e6 + 40e6 * 12 // 18 + 2 * (checkpoint / 2 + 18 * image) + 36 * image)}, "
    )


def test_the_base_model_is_looked_for_only_here(models, overrides, tmp_path, monkeypatch):
    """In the hub's cache by its id; elsewhere it is unknown, and so is one without weights. Nothing is asked for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network"))

    def sizes(**pretrained) -> Sizes | None:
        settings = overrides | {f"pretrained.{key}": value for key, value in pretrained.items()}
        return stable_diffusion.sizes(read_settings(make_config(settings)).model)

    assert sizes(model="somebody/model") is None
    root = tmp_path / "hub" / "models--somebody--model"
    shutil.copytree(models / "sd", root / "snapshots" / "abc")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    assert sizes(model="somebody/model") == sizes()
    assert sizes() is not None
    assert sizes(model="./no/model") is None
    assert sizes(model="somebody/model", resolution=128).latent_shape == (4, 16, 16)
    for path in (root / "snapshots").rglob("unet/*.safetensors"):
        path.unlink()
    assert sizes(model="somebody/model") is None


# ---- the dry run ----


def test_the_dry_run_of_a_new_experiment(overrides, tmp_path):
    """The plan: exit code 0, what was asked for in numbers, and nothing is written, not even a log."""
    ended = begin(tmp_path, overrides | {"reward.watch": "('shapes',)", "seed": 7}, "--dry_run")
    assert (ended.code, ended.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in ended.stdout.splitlines() if "  " in line)
    assert lines["experiment"] == "tiny in model/lora/tiny, new"
    assert lines["reward"] == "clip; watched: shapes"
    assert lines["prompts"].startswith("3 of ")
    assert lines["device"].endswith("CPU, threads: 1, float32")
    assert lines["seeds"].startswith("7 of the experiment, 0 of")
    assert lines["stage0"].split() == ["2", "18", "48", "6", lines["stage0"].split()[-2], "kB"]
    assert lines["stage1"].split()[:4] == ["3", "18", "60", "6"]
    assert lines["in all"].split()[:3] == ["36", "108", "12"]
    assert lines["time"] == "minutes known after the first batch"


def test_the_dry_run_of_the_reference(tmp_path):
    """Stages of one S in one row; a curriculum at random by counts; what follows from the model is unknown without it."""
    settings = {"pretrained.model": "nobody/no-model", "prompt_file": ROOT / "config/prompt/template1_train.json"}
    settings |= {"eval.prompt_file": ROOT / "config/prompt/template1_test.json"}
    text = begin(tmp_path, settings, "--dry_run").stdout
    assert re.search(r"^stages 0-14 +14 +1,280 +19,456 +8 +\?$", text, re.MULTILINE)
    assert re.search(r"^stages 86-99 +20 +1,280 +25,600 ", text, re.MULTILINE)
    assert re.search(r"^in all +128,000 ", text, re.MULTILINE)
    assert re.search(r"^disk +unknown until the base model is here$", text, re.MULTILINE)
    counts = re.findall(
        r"^(\d+) stages +\d+ ", begin(tmp_path, settings | {"curriculum": "random"}, "--dry_run").stdout, re.M
    )
    assert sum(map(int, counts)) == 100


def test_the_dry_run_of_an_experiment_that_is_there(workplace, overrides):
    """It says where a run would go on, and how long that takes; the files are as before."""
    Stage(experiment(workplace), 1).manifest_path("train").unlink()
    before = snapshot(workplace, log=True)
    ended = begin(workplace, overrides, "--dry_run")
    assert "1 of 2 stages finished; goes on with train of stage1" in ended.stdout
    assert re.search(r"^time +1 of 2 stages done, about .* left$", ended.stdout, re.MULTILINE)
    assert snapshot(workplace, log=True) == before


def test_a_dry_run_that_finds_a_mistake(workplace, overrides):
    """Another configuration than the experiment's is refused like in a run, but no log is written."""
    shutil.rmtree(workplace / "log", ignore_errors=True)
    ended = begin(workplace, overrides | {"train.eps": 0.5}, "--dry_run")
    assert (ended.code, ended.stdout) == (2, "")
    assert "belongs to another configuration" in ended.stderr
    assert ".log" not in ended.stderr
    assert not (workplace / "log").exists()


def test_the_shell_script_only_plans(overrides, tmp_path):
    """bash run_process.sh --dry_run: the same plan, from one process that loads no model; nothing is written."""
    settings = flags(overrides | {"save_path": tmp_path / "out", "log_path": tmp_path / "log"})
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"Preset": "sd14", "PATH": path, "PYTHONPROFILEIMPORTTIME": "1"}
    ended = subprocess.run(
        ["bash", ROOT / "run_process.sh", "--dry_run", *settings],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0
    assert ended.stdout.startswith("experiment   tiny in ")
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "b2diffurl.reporting.dry_run" in imported
    assert not imported & {"diffusers", "transformers", "accelerate", "peft"}
    assert list(tmp_path.iterdir()) == []


# ---- log lines ----

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def test_the_log_tells_the_run(overrides, tmp_path):
    """The same lines on stdout and in the log, each with date and time, stage and phase; at the beginning the plan, after
    the first batch the time for all, after a stage the time left; paths are short."""
    ended = [begin(tmp_path, overrides)]
    folder, *made = ended[0].stdout.splitlines()[:11]
    assert folder == "model/lora/tiny"
    scripts = [line.split("\t")[2] for line in made]
    assert scripts == [f"run_{verb}.py" for verb in ("sample", "select", "train", "eval")] * 2 + ["run_eval.py"] * 2
    for index in range(2):
        ended += [run_script(tmp_path, verb, overrides | {"run_name": f"stage{index}"}) for verb in PHASES]
    lines = [line for one in ended for line in one.stdout.splitlines()][11:]
    assert (tmp_path / "log" / "tiny.log").read_text().splitlines() == lines
    assert all(re.match(LINE + r"(plan: |stage[01] (sample: |select: |train: |done: ))", line) for line in lines)
    said = [re.sub(LINE, "", line) for line in lines]
    model = overrides["pretrained.model"]
    assert said[0] == (
        f"plan: LoRA rank 4 on {model}, reward clip, 2 stages of 18 images (36), S 2..3 of 4, "
        "at most 12 updates, seed 300, minutes known after the first batch"
    )
    expected = [
        r"stage0 sample: S 2 of 4, 18 images, from a fresh LoRA",
        r"stage0 sample: first batch in [\d.]+ s; the run takes at most about [\d.]+ (s|min)",
        r"stage0 sample: done in [\d.]+ s, 18 images, [\d.]+ images/s",
        r"stage0 select: scoring 18 images by clip",
        r"stage0 select: done in [\d.]+ s, reward .* \(sd .*, in groups .*\), kept (\d+) of 18 images, \d+ good, \d+ bad",
        r"stage0 train: training on \d+ trajectories, 2 of their 2 steps, from a fresh LoRA",
        r"stage0 train: max \|log-ratio\| at the first update \d.\de[+-]\d\d",
        r"stage0 train: done in [\d.]+ s, \d+ updates, gradient norm .*, clipped .* %, to stage0/checkpoint_2",
        r"stage0 done: 1 of 2 stages, [\d.]+ (s|min) so far, about [\d.]+ (s|min) left",
        r"stage1 sample: S 3 of 4, 18 images, from stage0/checkpoint_2",
    ]
    assert [bool(re.fullmatch(form, line)) for form, line in zip(expected, said[1:], strict=False)] == [True] * len(expected)
    assert sum("first batch" in line for line in said) == 1 + 1  # the plan's line, and stage 0


@pytest.mark.long
def test_stdout_may_be_the_log_itself(workplace, overrides):
    """As in `bash run_process.sh > log/tiny.log`: every line once, one after the other, and a traceback where one is due."""
    log = workplace / "log" / "tiny.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as stream:
        for changed in ({}, {"seed": 1}, {}):
            argv = script_arguments("select", overrides | changed | {"run_name": "stage0"})
            command = [sys.executable, ROOT / argv[0], *argv[1:]]
            subprocess.run(command, cwd=workplace, stdout=stream, stderr=subprocess.DEVNULL, timeout=300, check=False)
    lines = log.read_text().splitlines()
    finished = [re.sub(LINE, "", line) for line in (lines[0], lines[-1])]
    assert finished == ["stage0 select: already finished"] * 2
    assert re.fullmatch(LINE + "select failed", lines[1])
    assert lines[2].startswith("Traceback")
    assert lines[-2].startswith("ValueError: ")


def test_equal_lines_come_from_a_resumed_run(workplace, overrides):
    """Finished phases say so in one line; the plan's line says that all is done."""
    said = begin(workplace, overrides).stdout.splitlines()[-1]
    assert said.endswith("seed 300, all stages done")
    for verb in PHASES:
        line = run_script(workplace, verb, overrides).stdout
        assert re.fullmatch(LINE + f"stage0 {verb}: already finished\n", line)


# ---- progress bars ----

ALL_VERBS = """
import copy, json, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from conftest import make_config, run_verb
from b2diffurl.runtime.logs import set_up_logging

set_up_logging(Path("log/tiny.log"))
for verb in ("sample", "select", "train"):
    run_verb(Path.cwd(), make_config(json.loads(sys.argv[1])), verb)
"""


def on_terminal(folder: Path, overrides: dict) -> str:
    """What a stage writes on a pseudo-terminal, its stdout and stderr, in one process."""
    script = ALL_VERBS.format(tests=str(ROOT / "tests"), root=str(ROOT))
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    environment = os.environ | {"TQDM_MININTERVAL": "0"}
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(overrides)], cwd=folder, env=environment, stdout=child, stderr=child
    )
    os.close(child)
    written = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while data := os.read(parent, 65536):
            written += data
    os.close(parent)
    assert process.wait() == 0, written.decode()
    return written.decode()


@pytest.mark.long
def test_bars_on_a_terminal(stage_with, overrides, tmp_path):
    """Sampling advances within its batches and shows when it decodes, scoring by images, training by micro-batches to the
    last transition, each with the time left; log lines stay whole lines; and the files are those of a run without bars."""
    written = on_terminal(tmp_path, overrides)
    shown = {
        name: [
            int(n) for n in re.findall(rf"stage0 {name}: +\d+ % \|[^|]*\| (\d+)/{total} {unit}, [\d:]+, \S+ left", written)
        ]
        for name, total, unit in (("sample", 18, "images"), ("score clip", 18, "images"), ("train", r"\d+", "transitions"))
    }
    assert len({*shown["sample"]} - {0, 6, 12, 18}) >= 5
    assert shown["sample"] == sorted(shown["sample"]) and shown["sample"][-1] == 18
    assert {4, 8, 12, 16} <= {*shown["score clip"]}
    assert ", decoding" in written
    stage = Stage(experiment(tmp_path), 0)
    assert shown["train"][-1] == stage.manifest("train")["num_transitions"]
    assert len({*shown["train"]}) > 2 * stage.manifest("train")["num_updates"]
    lines = re.split(r"[\r\n]+", written)
    logged = (tmp_path / "log" / "tiny.log").read_text().splitlines()
    assert len(logged) == 9
    assert {*logged} <= {*lines}
    assert_same(stage.root, experiment(stage_with()))


def test_no_bars_in_a_pipe(overrides, tmp_path):
    """Where stderr is no terminal nothing is written there."""
    for verb in PHASES:
        with contextlib.redirect_stderr((tmp_path / "stderr").open("a")):
            run_verb(tmp_path, make_config(overrides), verb)
    assert (tmp_path / "stderr").read_text() == ""


def test_the_plan_needs_no_rank_but_the_first(overrides, tmp_path, monkeypatch):
    """Further processes show no bar."""
    from b2diffurl.runtime.logs import shows_progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert shows_progress()
    monkeypatch.setenv("RANK", "1")
    assert not shows_progress()
