"""How long a run will take, from the pace of what is done, against hand-worked numbers."""

import json
import shutil
import time
from pathlib import Path

import pytest
from conftest import (
    PROMPTS,
    VERBS,
    experiment,
    make_config,
    run_stage,
    settings_at,
)
from safetensors.torch import load_file

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import read_settings
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_rows
from b2diffurl.models import stable_diffusion
from b2diffurl.reporting import dry_run, forecast, page
from b2diffurl.reporting.forecast import Pace, Work
from b2diffurl.runtime.files import read_json, read_metadata


def write_stage(root: Path, index: int, finished: tuple[str, ...] = VERBS, **facts) -> None:
    """Manifests alone: of 48 evaluations, 18 images and 40 transitions, finished at :00, :10 and :30."""
    values = {"sample": 24.0, "score": 9.0, "train": 16.0, "num_transitions": 40, "num_selected": 9, "started": 4} | facts
    manifests = {
        "sample": {"num_trained_steps": 2, "num_evaluations": 48, "seconds": {"load": 1.0, "sample": values["sample"]}},
        "select": {"num_images": 18, "num_selected": values["num_selected"], "seconds": {"score": values["score"]}},
        "train": {"num_transitions": values["num_transitions"], "seconds": {"load": 3.0, "train": values["train"]}},
    }
    selected, trained = 10, 10 + int(values["train"]) + values["started"]
    for phase, second in zip(VERBS, (0, selected, trained), strict=True):
        if phase in finished:
            path = Stage(root, index).manifest_path(phase)
            path.parent.mkdir(parents=True, exist_ok=True)
            when = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(1e9 + second))}
            path.write_text(json.dumps(when | manifests[phase]))


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
    for phase in VERBS:
        stage.manifest_path(phase).unlink()
    stage.batch(1).unlink()
    shutil.rmtree(stage.checkpoints()[-1])
    run_stage(workplace, overrides, 1)
    sampled, trained = stage.manifest("sample"), stage.manifest("train")
    assert (sampled["seconds"]["share"], trained["seconds"]["share"]) == (pytest.approx(1 / 3), 0.5)
    pace = forecast.stage_pace(read_settings(make_config(overrides)), stage)
    assert pace.evaluation == pytest.approx(sampled["seconds"]["sample"] / (sampled["num_evaluations"] / 3))
    assert pace.transition == pytest.approx(trained["seconds"]["train"] / (trained["num_transitions"] / 2))
    whole = Stage(experiment(workplace), 0).manifest("sample")
    assert whole["seconds"]["share"] == 1
    images = (18 + 18 / 3) / (whole["seconds"]["sample"] + sampled["seconds"]["sample"])
    root = experiment(workplace)
    found = page.facts(root, stage_rows(root), read_json(root / "config.json"), page.read_stages(root, page.Kept(root), []))
    assert found["images_per_second"] == pytest.approx(images)


def test_first_pace(overrides):
    """3 s for a batch, of three with 48 evaluations in all; scoring is unknown; training is twice sampling."""
    assert forecast.first_pace(read_settings(make_config(overrides)), Window(2, 4), 3.0, 7.0) == Pace(
        3 / 16, 0, 2 * 3 / 16, 7
    )


@pytest.mark.parametrize(("sampled", "trained", "expected"), [(5.0, 0.0, 3), (5.0, 1.0, 1.5), (1.0, 0.0, 3), (1.0, 4.0, 6)])
def test_training_costs_less_without_guidance(overrides, sampled, trained, expected):
    """nft: forward, backward and the old policy, each of one row of the network or, with guidance, of two."""
    settings = {"train.objective": "nft", "sample.guidance_scale": sampled, "train.guidance_scale": trained}
    assert forecast.evaluations_per_transition(read_settings(make_config(overrides | settings))) == expected


def test_work_left_of_moving_windows(overrides, tmp_path):
    """A window that slides, by hand: [0, 2) with one step after it, then [2, 4) after a shared prefix of two."""
    sliding = {"curriculum": "sliding", "sample.suffix_eta": 0.0, "sample.suffix_steps": 1}
    settings = settings_at(make_config(overrides | sliding), tmp_path)
    judged = forecast.evaluations_left(settings, finished=set())
    sampled = 18 * (2 + 1) + 6 * 2 + 18 * 2
    assert forecast.work_left(settings).evaluations - judged.evaluations == sampled


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
    assert forecast.evaluations_left(read_settings(config), finished=finished) == expected


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
    base = stable_diffusion.FAMILY.sizes(settings.model)
    assert (base.latent_shape, base.image_px, base.embedding) == ((4, 8, 8), (64, 64), 77 * 16)
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
