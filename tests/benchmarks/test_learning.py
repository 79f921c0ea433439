"""The default run learns, and the figures that say so are computed right.

python -m pytest -m slow -rP tests/benchmarks/test_learning.py     a shortened default run, 14 minutes on one core
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, get_config

from b2diffurl.configuration.loop import calls
from b2diffurl.configuration.plan import make_plan
from b2diffurl.configuration.recorded import record_experiment
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import SamplerSettings, training_sampler
from b2diffurl.runtime import files
from benchmarks import learning
from benchmarks.learning import SETS, Run, as_made, configure, meaningless, sweep_settings
from benchmarks.learning_figures import against, failures, mean_gain, with_gains
from benchmarks.learning_report import draw_curves, write_tables


def result(checkpoint: str, prompts: str, formed: list[int], bound: list[int], right: list[int]) -> dict:
    """An evaluation's result, with what the figures need."""
    values = {"accuracy": right, "reward": right, "shapes/well_formed": formed, "shapes/binding": bound}
    means = {key: sum(numbers) / len(numbers) for key, numbers in values.items()}
    errors = {f"{key}_se": 0.1 for key in values}
    spread = {name: {"all": {"a": 1.0, "b": 2.0}, "right": {"a": 0.5, "b": 0.5}} for name in ("clip", "layout")}
    sampler = {"num_steps": 10, "eta": 1.0, "guidance_scale": 2.0}
    facts = {"checkpoint": checkpoint, "prompts": prompts, "conditions": prompts, "n_prompts": 2}
    facts |= {"values": values, "diversity": spread}
    return facts | means | errors | sampler


BASE = [result("base", prompts, [1, 1, 1, 0, 1], [1, 1, 0, 0, 1], [1, 0, 0, 0, 0]) for prompts in SETS]
TUNED = [
    result(f"stage{stage}", prompts, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 1, 0])
    for stage in (0, 1)
    for prompts in SETS
]


def test_the_gain_is_the_sum_of_what_no_longer_fails():
    """Of five images one is malformed, one has a wrong binding, two a wrong relation; afterwards two a wrong relation."""
    found = failures(BASE + TUNED, "test")
    assert {kind: (one["base"], one["tuned"]) for kind, one in found.items()} == {
        "malformed": (0.2, 0.0),
        "binding": (pytest.approx(0.2), 0.0),
        "relation": (0.4, 0.4),
        "right": (0.2, 0.6),
    }
    assert sum(one["base"] for one in found.values()) == pytest.approx(1)
    assert found["right"]["change"] == pytest.approx(-sum(found[kind]["change"] for kind in found if kind != "right"))
    # the relation's changes are -1, 0, 1 and 0, 0: mean 0, deviation sqrt(2 / 4), over sqrt(5)
    assert found["relation"]["se"] == pytest.approx((2 / 4) ** 0.5 / 5**0.5)


def test_the_mean_gain_has_an_error_over_images_and_one_over_prompts():
    """Two seeds, four images of two prompts in turn: changes 1, 0 and 1, 1 for prompt a, 0, 0 and 0, 1 for b. Their means by
    image 1, 0, 0.5, 0.5; by prompt 0.75 and 0.25."""
    before, *after = (
        {"prompts": "test", "n_prompts": 2, "values": {"accuracy": values}}
        for values in ([0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 1])
    )
    found = mean_gain([[before, one] for one in after], "test")
    assert found["gain"] == 0.5
    assert found["se"] == pytest.approx((0.5 / 3) ** 0.5 / 2)
    assert found["se_by_prompt"] == pytest.approx(0.25)


def test_reward_queries_are_counted_by_stage():
    """The base cost none, stage i the images of i + 1 stages; 5 stages are the 7,200 that the preset promises."""
    found = with_gains("shapes", BASE + TUNED)
    assert [one["queries"] for one in found] == [0, 0, 1440, 1440, 2880, 2880]
    assert [one["queries"] for one in with_gains("b2", BASE + TUNED)] == [0, 0, 640, 640, 1280, 1280]
    assert "accuracy_gain" not in found[0]
    assert found[-1]["accuracy_gain"] == pytest.approx(0.4)


def test_a_meaningless_reward_says_nothing_but_differs_from_image_to_image():
    """Random images: values spread evenly over [0, 1), the same for the same image, and all others for one changed pixel."""
    images = torch.randint(0, 256, (500, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = meaningless(images, [""] * 500)
    assert torch.equal(values, meaningless(images, ["x"] * 500))
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.05
    assert values.std() == pytest.approx(12**-0.5, rel=0.1)
    images[:, 0, 0, 0] ^= 1
    assert (meaningless(images, [""] * 500) != values).all()


def test_the_sweep_covers_guidance_and_steps():
    """Guidance 1 to 10 and 10 to 50 steps, stochastic and deterministic, the training sampler of its page among them."""
    settings = sweep_settings()
    assert training_sampler(read_settings(get_config(learning.SWEPT))) in settings
    assert {one.eta for one in settings} == {0.0, 1.0}
    assert {1.0, 10.0} <= {one.guidance_scale for one in settings}
    assert {10, 50} <= {one.num_steps for one in settings if one.eta == 1}
    assert len(set(settings)) == len(settings)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory with configuration and base model in which experiments and pages may be written."""
    (tmp_path / "model").mkdir()
    for name in ("config", "model/shapes"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_of_other_settings_or_unfinished_are_refused(elsewhere):
    """A folder that was made with another rate, or that is not whole, is not published as the preset's run."""
    run = Run("shapes", 7)
    config = configure(run)
    assert (config.seed, config.exp_name) == (7, "learning_seed7")
    record_experiment(make_plan(config).record, 1)
    with pytest.raises(ValueError, match=r"learning_seed7 is not a whole run of 5 stages"):
        as_made(run)
    (run.root / "config.json").unlink()
    config.train.learning_rate = 0.5
    record_experiment(make_plan(config).record, 1)
    with pytest.raises(ValueError, match=r"train.learning_rate is 0.003, was 0.5"):
        as_made(run)
    assert as_made(run.base).seed == get_config("shapes").seed


def test_a_preset_s_experiments_are_named_after_it_and_run_with_it(elsewhere, monkeypatch):
    """The default preset needs no name. Nothing of the environment but the preset, name and seed reaches run_process.sh."""
    commands = []
    monkeypatch.setattr(learning.subprocess, "run", lambda command, env, check: commands.append((command, env)))
    monkeypatch.setenv("StageCnt", "1")
    runs = [Run("shapes", 2), Run("shapes_ddpo", 3)]
    learning.run(runs, 0)
    given = [{key: env.get(key) for key in ("Preset", "ExpName", "Seed", "StageCnt")} for _, env in commands]
    assert given == [
        {"Preset": "shapes", "ExpName": "learning_seed2", "Seed": "2", "StageCnt": None},
        {"Preset": "shapes_ddpo", "ExpName": "learning_shapes_ddpo_seed3", "Seed": "3", "StageCnt": None},
    ]
    assert configure(runs[1].base).exp_name == "learning_shapes_ddpo_base"
    assert all(learning.seconds_of(run) > 0 for run in runs)


def test_the_base_s_best_sampler_is_the_best_of_a_second_look(monkeypatch):
    """The sweep's best is no better than the others when judged again on other noise: the second best of the sweep wins."""
    sweep = {setting: 0.5 for setting in sweep_settings()}
    first, second, third = list(sweep)[3:6]
    sweep |= {first: 0.7, second: 0.6, third: 0.55}
    again = {setting: 0.5 for setting in sweep} | {first: 0.58, second: 0.6, third: 0.59}

    def evaluate(settings, checkpoints, prompt_sets, samplers):
        assert (checkpoints, prompt_sets) == (["base"], ["train"])
        few = settings.judging.seed == learning.SWEEP_SEED
        assert settings.judging.num_images == (learning.SWEEP_IMAGES if few else learning.NUM_IMAGES)
        accuracies = sweep if few else again
        return [{"sampler": name, "accuracy": accuracies[one]} | vars(one) for name, one in samplers.items()]

    monkeypatch.setattr(learning, "evaluate", evaluate)
    for cached in (learning.swept, learning.best_sampler):
        cached.cache_clear()
    assert learning.best_sampler("shapes_ddpo") == second
    for cached in (learning.swept, learning.best_sampler):
        cached.cache_clear()


def test_other_presets_take_the_sweep_from_its_page(monkeypatch):
    """The base model is the same, so nothing is judged: its best sampler is that of docs/results."""
    monkeypatch.setattr(learning, "evaluate", None)
    assert len(learning.swept("shapes")) == 49
    assert learning.best_sampler("shapes") == SamplerSettings(50, 1.0, 2.5)
    assert learning.stock_guidances("shapes") == [2.0, 2.5]


def test_gains_over_the_base_by_another_sampler_are_paired():
    """Changes of 0, 1, 0, 1 and 0 of five images: 0.4, with a deviation of sqrt(1.2 / 4) over sqrt(5)."""
    found = against(BASE[0], TUNED[0] | {"conditions": "of another sampler"})
    assert found["accuracy_gain"] == pytest.approx(0.4)
    assert found["accuracy_gain_se"] == pytest.approx((1.2 / 4) ** 0.5 / 5**0.5)


def test_a_page_needs_no_more_than_the_runs(elsewhere, monkeypatch):
    """Without `judge` and `stock`, draw asks only for what run_process.sh has judged, and the page says so."""
    (elsewhere / "docs/results").mkdir(parents=True)
    shutil.copy(ROOT / "docs/results/learning_shapes_ddpo.json", elsewhere / "docs/results")
    settings = read_settings(get_config("shapes"))
    num_stages, every = settings.schedule.num_stages, settings.judging.every
    made = {one for call in calls(settings) for one in call.evaluations(num_stages, every)}
    asked = set()

    def evaluate(settings, checkpoints, prompt_sets, samplers):
        assert (settings.judging.num_images, settings.judging.seed) == (512, 0)
        names = [name.replace("last", f"stage{num_stages - 1}") for name in checkpoints]
        asked.update((name, prompts, sampler) for name in names for prompts in prompt_sets for sampler in samplers)
        results = [
            next(one for one in (BASE if name == "base" else TUNED) if one["prompts"] == prompts) | {"checkpoint": name}
            for name in dict.fromkeys(names)
            for prompts in prompt_sets
        ]
        return with_gains("shapes", results)

    monkeypatch.setattr(learning, "evaluate", evaluate)
    monkeypatch.setattr(learning, "require_finished", lambda config: None)
    monkeypatch.setattr(learning, "training_reward", lambda run: [0.1] * num_stages)
    monkeypatch.setattr(learning, "num_updates", lambda run: 42)
    monkeypatch.setattr(learning, "seconds_of", lambda run: 300.0)
    learning.draw([Run("shapes", 1), Run("shapes", 2)], 0)
    assert asked == made
    text = (elsewhere / "docs/results/learning.md").read_text()
    assert "The figures are those that `run_process.sh` itself has made, each of 512 images." in text
    assert "| training | seed 1 | 20.0 % | 60.0 % | +40.0 ± 24.5 | +0.4000 ± 0.2449 | 42 | 5.0 |" in text
    assert "| held-out | seed 2 | 20.0 % | 60.0 % | +40.0 ± 24.5 | +0.4000 ± 0.2449 | 42 | 5.0 |" in text
    assert (
        "By `run_process.sh` itself, with deterministic DDIM and 20 steps (`eval.deployed`), on held-out\nprompts." in text
    )
    assert "| 2 | held-out | seed 2 | 20.0 % | 60.0 % | +40.0 ± 24.5 |" in text
    assert "| training | 56.7 % |" in text
    assert (elsewhere / "docs/results/learning.png").stat().st_size > 20_000


@pytest.mark.parametrize("page", sorted((ROOT / "docs/results").glob("learning*.json")), ids=lambda page: page.stem)
def test_the_committed_pages_are_those_of_their_figures(tmp_path, page):
    """The tables are written again from the JSON file beside them."""
    write_tables(files.read_json(page), tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text() == page.with_suffix(".md").read_text()


def test_tables_and_curves_are_drawn_from_the_facts(tmp_path):
    """Every table has its figures, by hand where they are simple, and the picture is written."""
    curve = with_gains("shapes_ddpo", BASE + TUNED)
    as_trained, at_best = ({"accuracy": 0.8, "accuracy_gain": gain, "accuracy_gain_se": gain / 10} for gain in (0.3, 0.2))
    best = {prompts: {"as_trained": as_trained, "at_best": at_best} for prompts in SETS}
    deployed = {prompts: {"accuracy": 0.7, "gain": 0.1, "gain_se": 0.02} for prompts in SETS}
    facts = {
        "preset": "shapes_ddpo",
        "date": "today",
        "machine": "here",
        "seeds": [1, 2],
        "judged": True,
        "num_images": 5,
        "sweep_images": 5,
        "sweep_judged_images": 5,
        "deployed_in_stock": True,
        "deployed_images": 5,
        "deployed_steps": 50,
        "deployed_by": "Euler's method",
        "updates": {"seed1": 20, "seed2": 21},
        "mean_gain": {prompts: mean_gain([curve, curve], prompts) for prompts in SETS},
        "sampler": {"num_steps": 10, "eta": 1.0, "guidance_scale": 2.0},
        "seconds": {"seed1": 600.0, "seed2": None},
        "training_reward": {"seed1": [0.1, 0.2], "seed2": [0.1, 0.3]},
        "curves": {"seed1": curve, "seed2": curve},
        "failures": {name: {prompts: failures(curve, prompts) for prompts in SETS} for name in ("seed1", "seed2")},
        "sweep": BASE[:1],
        "best": {
            "sampler": {"num_steps": 20, "eta": 0.0, "guidance_scale": 3.0},
            "base": {prompts: {"accuracy": 0.55} for prompts in SETS},
            "seed1": best,
            "seed2": best,
        },
        "deployed": {"2": {"seed1": deployed, "seed2": deployed}},
    }
    write_tables(facts, tmp_path / "learning.md")
    draw_curves(facts, tmp_path / "learning.png")
    text = (tmp_path / "learning.md").read_text()
    assert "| training | seed 1 | 20.0 % | 60.0 % | +40.0 ± 24.5 | +0.4000 ± 0.2449 | 20 | 10.0 |" in text
    assert "| training | seed 2 | 20.0 % | 60.0 % | +40.0 ± 24.5 | +0.4000 ± 0.2449 | 21 | interrupted |" in text
    assert "| training | mean of the seeds |  | 60.0 % | **+40.0 ± 24.5** (over prompts ± 50.0) |" in text
    assert "| training | least of the seeds |  |  | **+40.0** |" in text
    assert "| training | base | 80.0 % | 75.0 % | 33.3 % |" in text
    assert "| held-out | malformed | 20.0 % | 0.0 % | -20.0 |" in text
    assert "| training | seed 1 | 55.0 % | +30.0 ± 3.0 | 80.0 % | +20.0 ± 2.0 |" in text
    assert "| 2 | held-out | seed 2 | 60.0 % | 70.0 % | +10.0 ± 2.0 |" in text
    assert "with Euler's method and 50 steps" in text
    assert (tmp_path / "learning.png").stat().st_size > 20_000
    write_tables(facts | {"sweep": []}, tmp_path / "other_base.md")
    assert "best sampler" not in (tmp_path / "other_base.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_shortened_default_run_learns(tmp_path):
    """Four stages of the preset's eight, all at the last window: the training reward rises by at least 3 standard errors on
    the same noise."""
    overrides = [f"--config.log_path={tmp_path}/log", "--config.eval.num_images=1152"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # conftest's: one thread
    settings = {"Preset": "shapes_ddpo", "ExpName": "short", "StageCnt": "4", "SplitStepLeft": "10", "Seed": "17"}
    settings |= {"SavePath": str(tmp_path)}
    subprocess.run(["bash", "run_process.sh", *overrides], env=environment | settings, cwd=ROOT, check=True)
    flags = [
        "--config=config/stage_process.py:shapes_ddpo",
        "--config.exp_name=short",
        f"--config.save_path={tmp_path}",
        *overrides,
    ]
    command = [sys.executable, "run_eval.py", *flags, "--checkpoint=base,last", "--prompts=train", "--json"]
    ended = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(ended.stdout)
    print(found)
    assert found["n_images"] == 1152
    assert found["reward_gain"] >= 3 * found["reward_gain_se"] > 0
