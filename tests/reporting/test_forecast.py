"""How long a run will take, from the pace of what is done, against hand-worked numbers."""

import json
import math
import random
import shutil
import time
from pathlib import Path
from statistics import fmean

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
from b2diffurl.evaluation.generate import training_sampler
from b2diffurl.experiment.metrics import judgings, record_judging
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.experiment.stage_table import stage_rows
from b2diffurl.models import stable_diffusion
from b2diffurl.phases.evaluate import evaluate_timed
from b2diffurl.reporting import dry_run, forecast, page
from b2diffurl.reporting.forecast import Pace, Work
from b2diffurl.runtime import logs
from b2diffurl.runtime.files import read_json, read_metadata


def write_stage(root: Path, index: int, finished: tuple[str, ...] = VERBS, **facts) -> None:
    """Manifests alone: of 48 evaluations, 18 images and 40 transitions, finished at :00, :10 and :30."""
    values = {"sample": 24.0, "decode": 0.0, "score": 9.0, "train": 16.0, "num_transitions": 40, "num_selected": 9}
    values |= {"started": 4, "at": 0} | facts
    sampling = {"load": 1.0, "sample": values["sample"], "decode": values["decode"]}
    manifests = {
        "sample": {"num_trained_steps": 2, "num_evaluations": 48, "seconds": sampling},
        "select": {"num_images": 18, "num_selected": values["num_selected"], "seconds": {"score": values["score"]}},
        "train": {"num_transitions": values["num_transitions"], "seconds": {"load": 3.0, "train": values["train"]}},
    }
    selected, trained = 10, 10 + int(values["train"]) + values["started"]
    for phase, second in zip(VERBS, (0, selected, trained), strict=True):
        second += values["at"]
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
        write_stage(
            tmp_path, index, sample=24.0 * factor, decode=6.0 * factor, score=9.0 * factor, train=16 * factor, started=factor
        )
    write_stage(tmp_path, 6, ("sample", "select"), sample=1e9)
    pace = forecast.measured_pace(settings_at(config, tmp_path))
    found = pace.evaluation, pace.decode, pace.image, pace.transition, pace.process
    assert found == (3 * 18 / 48, 3 * 6 / 18, 3 * 9 / 18, 3 * 16 / 40, 3)
    assert (pace.num_stages, "training" in pace.guessed) == (5, False)


def test_pace_without_training(overrides, tmp_path):
    """Where nothing was selected a transition counts as a pass forward and one backward, and as guessed; with a base policy
    as three passes; of clocks that were set back the time for loading is taken."""
    write_stage(tmp_path, 0, num_transitions=0, started=-9)
    pace = forecast.measured_pace(settings_at(make_config(overrides), tmp_path))
    assert (pace.evaluation, pace.image, pace.transition, pace.process) == (0.5, 0.5, 2 * 0.5, 3)
    assert "training" in pace.guessed
    asking = make_config(overrides | {"train.objective": "dpok"})
    assert forecast.measured_pace(settings_at(asking, tmp_path)).transition == 3 * 0.5


def test_a_pause_is_no_start_up(overrides, tmp_path):
    """Eight hours between two phases are the user's; what a process takes to start is then known by its loading alone."""
    write_stage(tmp_path, 0, started=8 * 3600)
    assert forecast.measured_pace(settings_at(make_config(overrides), tmp_path)).process == 3


@pytest.mark.parametrize(("later", "expected"), [(0, 9), *((late, forecast.REPORT_SEC + 4) for late in (60, 8 * 3600))])
def test_the_report_takes_what_lies_between_two_stages(overrides, tmp_path, later, expected):
    """The next stage begins 13 s after the first one's end. A process takes 4 s to start, so 9 s are the report's.

    A run that was stopped between the two, for a minute or a night, says nothing of it.
    """
    write_stage(tmp_path, 0)
    write_stage(tmp_path, 1, sample=24.0, at=30 + 13 + 1 + 24 + later)
    settings = settings_at(make_config(overrides | {"eval.every": 0}), tmp_path)
    assert forecast.measured_pace(settings).report == expected


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
    took = sampled["seconds"]
    assert pace.evaluation == pytest.approx((took["sample"] - took["decode"]) / (sampled["num_evaluations"] / 3))
    assert pace.decode == pytest.approx(took["decode"] / (18 / 3))
    assert pace.transition == pytest.approx(trained["seconds"]["train"] / (trained["num_transitions"] / 2))
    whole = Stage(experiment(workplace), 0).manifest("sample")
    assert whole["seconds"]["share"] == 1
    images = (18 + 18 / 3) / (whole["seconds"]["sample"] + sampled["seconds"]["sample"])
    root = experiment(workplace)
    found = page.facts(root, stage_rows(root), read_json(root / "config.json"), page.read_stages(root, page.Kept(root), []))
    assert found["images_per_second"] == pytest.approx(images)


def test_first_pace(overrides):
    """3 s for a batch, 1 of them of decoding its 6 images, of three with 48 evaluations in all; training is twice sampling;
    all that has not begun is guessed."""
    pace = forecast.first_pace(read_settings(make_config(overrides)), Window(2, 4), 3.0, 1.0, 7.0)
    assert (pace.evaluation, pace.decode, pace.transition, pace.process) == (2 / 16, 1 / 6, 2 * 2 / 16, 7)
    assert pace.image == forecast.SCORING_SHARE * 3 / 6
    assert pace.guessed == set(forecast.GUESSED)


# ---- the range ----


def test_a_range_by_hand():
    """One stage was measured, with a spread of 0.2; a quarter of the time is guessed: both errors add by their squares."""
    pace = Pace(1, 0, 1, 0, 0, 0, guessed=frozenset({"scoring"}), spread=0.2, num_stages=1)
    found = forecast.expected(pace, Work(evaluations=75, images=25))
    error = math.sqrt(0.2**2 * (forecast.DRIFT + 1) + (0.25 * forecast.GUESSED["scoring"]) ** 2)
    assert (found.low, found.middle, found.high) == pytest.approx(
        (100 * math.exp(-1.645 * error), 100, 100 * math.exp(1.645 * error))
    )
    assert forecast.expected(pace, Work()) == forecast.Range(0, 0, 0)


@pytest.mark.parametrize("spread", [0.05, forecast.STAGE_SPREAD, 0.5])
def test_nine_of_ten_ranges_hold(spread):
    """Planted records: stages whose pace varies by `spread`, which is known, and a rest that drifts as a whole. The truth
    lies within 87 to 93 % of 3,000 ranges."""
    rng, held, trials = random.Random(0), 0, 3000
    for _ in range(trials):
        # The mean of the logarithms: the median of five varies by 1.2 times as much.
        logs = [rng.gauss(0, spread) for _ in range(3)]
        pace = Pace(math.exp(fmean(logs)), 0, 0, 0, 0, 0, spread=spread, num_stages=3)
        rest = 100 * math.exp(rng.gauss(0, spread * math.sqrt(forecast.DRIFT)))
        found = forecast.expected(pace, Work(evaluations=100))
        held += found.low <= rest <= found.high
    assert 0.87 < held / trials < 0.93


def test_the_spread_is_that_of_the_stages():
    """Three prior stages of STAGE_SPREAD and what was seen: equal stages make it smaller, wild ones larger."""
    assert forecast.measured_spread([0.0]) == forecast.STAGE_SPREAD
    assert forecast.measured_spread([0.0] * 5) == pytest.approx(forecast.STAGE_SPREAD * math.sqrt(3 / 7))
    assert forecast.measured_spread([-0.7, 0.0, 0.7]) == pytest.approx(
        math.sqrt((3 * forecast.STAGE_SPREAD**2 + 2 * 0.49) / 5)
    )


def test_judging_is_measured_by_the_evaluations(overrides, tmp_path):
    """Two calls that judged 6 images of 4 steps took 30 and 42 s; sampling, decoding and scoring as many takes
    6 * 4 / 2 + 6 / 2 = 15 s."""
    write_stage(tmp_path, 0)
    for took in (30.0, 42.0):
        record_judging(tmp_path, took, after=None, images=6, evaluations=24)
    pace = forecast.measured_pace(settings_at(make_config(overrides), tmp_path))
    assert pace.judging == 36 / 15
    assert "judging" not in pace.guessed
    (tmp_path / "eval_seconds.jsonl").write_text("no JSON\n{}\n")
    assert "judging" in forecast.measured_pace(settings_at(make_config(overrides), tmp_path)).guessed


def test_the_report_s_time_has_no_evaluation_in_it(overrides, tmp_path):
    """13 s from one stage to the next, of which an evaluation took 7 and a start 4. Without its record nothing is known."""
    write_stage(tmp_path, 0)
    write_stage(tmp_path, 1, sample=24.0, at=30 + 13 + 1 + 24)
    settings = settings_at(make_config(overrides | {"eval.every": 1}), tmp_path)
    assert "reports" in forecast.measured_pace(settings).guessed
    record_judging(tmp_path, 7.0, after=0, images=6, evaluations=24)
    assert forecast.measured_pace(settings).report == 13 - 7 - 4


def test_calls_that_judge_are_timed(overrides, workplace, monkeypatch):
    """With their amounts of work: 6 images of 4 steps by the base and by the stage; figures that are read back count not."""
    monkeypatch.chdir(workplace)
    settings = read_settings(make_config(overrides))
    for _ in range(2):
        evaluate_timed(settings, ["base", "stage1"], ["test"], {"training": training_sampler(settings)}, after=1)
    (judged,) = judgings(settings.output.root)
    assert judged.pop("seconds") > 0
    assert judged == {"event": "judged", "after": 1, "images": 12, "evaluations": 48}


@pytest.mark.parametrize(("sampled", "trained", "expected"), [(5.0, 0.0, 3), (5.0, 1.0, 1.5), (1.0, 0.0, 3), (1.0, 4.0, 6)])
def test_training_costs_less_without_guidance(overrides, sampled, trained, expected):
    """nft: forward, backward and the old policy, each of one row of the network or, with guidance, of two."""
    settings = {"train.objective": "nft", "sample.guidance_scale": sampled, "train.guidance_scale": trained}
    assert forecast.evaluations_per_transition(read_settings(make_config(overrides | settings))) == expected


def test_distilled_guidance_is_one_pass(overrides, tmp_path):
    """FLUX.1-dev reads the scale of guidance: an update without it costs what one with it does; SDXL's costs half."""
    settings = {"train.objective": "nft", "sample.guidance_scale": 3.5, "train.guidance_scale": 1.0}
    costs = {}
    for name in ("black-forest-labs/FLUX.1-dev", "stabilityai/stable-diffusion-xl-base-1.0"):
        config = make_config(overrides | settings | {"pretrained.model": name})
        costs[name] = forecast.evaluations_per_transition(read_settings(config))
    assert list(costs.values()) == [3, 1.5]


def test_work_left_of_moving_windows(overrides, tmp_path):
    """A window that slides, by hand: [0, 2) with one step after it, then [2, 4) after a shared prefix of two."""
    sliding = {"curriculum": "sliding", "sample.suffix_eta": 0.0, "sample.suffix_steps": 1}
    settings = settings_at(make_config(overrides | sliding), tmp_path)
    judged = forecast.evaluations_left(settings, finished=set())
    sampled = 18 * (2 + 1) + 6 * 2 + 18 * 2
    assert judged.evaluations == 0
    assert forecast.work_left(settings).evaluations == sampled


def test_work_left(overrides, tmp_path):
    """By hand, stage by stage and phase by phase. Unselected stages count with the share of the latest, or the most."""
    config = make_config(overrides | {"eval.every": 0, "eval.deployed.num_steps": 5})
    # Base and last on train and test; and both by the deployed sampler; two reports, and the end.
    judging = Work(judged_evaluations=6 * (4 * 4 + 2 * 5), judged=6 * 6, reports=2 + 1)

    def work(evaluations: int, decoded: int, images: int, transitions: int, processes: int, reports: int) -> Work:
        some = {"evaluations": evaluations, "decoded": decoded, "images": images, "transitions": transitions}
        return judging + Work(**some, processes=processes, reports=reports)

    assert forecast.work_left(settings_at(config, tmp_path)) == work(48 + 60, 36, 36, 2 * 12 * (2 + 3), 6, 2)  # S = 2 and 3
    write_stage(tmp_path, 0, ("sample",))
    assert forecast.work_left(settings_at(config, tmp_path)) == work(60, 18, 36, 2 * 12 * (2 + 3), 5, 2)
    write_stage(tmp_path, 0, ("sample", "select"))
    assert forecast.work_left(settings_at(config, tmp_path)) == work(60, 18, 18, 2 * 9 * (2 + 3), 4, 2)
    write_stage(tmp_path, 0)
    assert forecast.work_left(settings_at(config, tmp_path)) == work(60, 18, 18, 2 * 9 * 3, 3, 1)
    write_stage(tmp_path, 1)
    assert forecast.work_left(settings_at(config, tmp_path)) == judging
    pace = Pace(evaluation=1, decode=2, image=10, transition=100, process=1000, report=10_000, judging=3)
    assert pace.seconds(Work(4, 5, 3, 2, 7, 1, 1, 1)) == 4 + 10 + 30 + 200 + 3 * (7 + 12) + 1000 + 10_000


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
    evaluations = 6 * (sets * 4 + 2 * 5)
    expected = Work(judged_evaluations=evaluations, judged=6 * (sets + 2), reports=len(unfinished) + 2 + 1)
    finished = set(range(5)).difference(unfinished)
    assert forecast.evaluations_left(read_settings(config), finished=finished) == expected


def test_what_is_said_after_a_stage(overrides, tmp_path):
    """Time so far is that of phases and three starts a stage; time left is that of other stages and of evaluations; a stage
    beyond stage_cnt is no stage of the run."""
    config = make_config(overrides | {"eval.every": 0, "eval.deployed.num_steps": 5})
    write_stage(tmp_path, 0)
    sampled = 60 * 0.5 + 18 * 0.5 + 2 * 9 * 3 * 0.4 + 3 * 4  # the second stage: S is 3
    judged = forecast.JUDGING * (156 * 0.5 + 36 * 0.5)
    left = sampled + judged + (3 + 1) * (4 + forecast.REPORT_SEC)
    spread = forecast.STAGE_SPREAD**2 * (forecast.DRIFT + 1)
    guessed = {"judging": judged, "reports": left - sampled - judged}
    error = math.sqrt(spread + sum((took / left * forecast.GUESSED[kind]) ** 2 for kind, took in guessed.items()))
    low, high = (left * math.exp(sign * 1.645 * error) / 60 for sign in (-1, 1))
    took = f"about {left / 60:.1f} min ({low:.1f} to {high:.1f} min)"
    said = forecast.stage_done_line(settings_at(config, tmp_path), Stage(tmp_path, 0))
    assert said == f"stage0 done: 1 of 2 stages, 61 s so far, {took} left"  # 24 + 9 + 16 + 3 * 4
    assert forecast.plan_line(settings_at(config, tmp_path)).endswith(f", 1 of 2 stages done, {took} left")
    write_stage(tmp_path, 7)
    assert forecast.num_done(settings_at(config, tmp_path)) == 1
    write_stage(tmp_path, 1)
    assert forecast.plan_line(settings_at(config, tmp_path)).endswith("all stages done")


def test_a_mixture_says_how_it_is_combined(overrides, tmp_path):
    """Where its rewards are normalised each by itself, the plan's line says so."""
    mixed = {"reward.weights": {"clip": 1.0, "jpeg_compressibility": 0.5}}
    plain = forecast.plan_line(settings_at(make_config(overrides | mixed), tmp_path))
    assert "reward 1 clip + 0.5 jpeg_compressibility, 2 stages" in plain
    apart = forecast.plan_line(settings_at(make_config(overrides | mixed | {"reward.combine": "advantages"}), tmp_path))
    assert "reward 1 clip + 0.5 jpeg_compressibility, each normalised by itself, 2 stages" in apart


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((45, 80), "45 to 80 s"),
        ((50, 108), "50 s to 1.8 min"),
        ((144, 246), "2.4 to 4.1 min"),
        ((3600, 9000), "60 min to 2.5 h"),
    ],
)
def test_a_range_in_words(seconds, said):
    assert forecast.span_text(*seconds) == said


def test_durations_and_sizes():
    seconds = {4.44: "4.4 s", 89: "89 s", 91: "1.5 min", 61 * 60: "61 min", 5 * 3600: "5.0 h", 30 * 3600: "30 h"}
    assert {one: logs.duration(one) for one in seconds} == seconds
    assert logs.duration(50 * 3600) == "2.1 days"
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
