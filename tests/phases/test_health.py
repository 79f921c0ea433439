"""What looks like collapse warns, in log, manifest and report.

18 images of 6 groups, K = 3 siblings
"""

import re
import shutil

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from conftest import experiment, make_config, ran, settings_at, stage_of

from b2diffurl.models.stable_diffusion import StableDiffusion
from b2diffurl.phases import health
from b2diffurl.phases.health import MIN_UPDATES, WINDOW, UpdateHealth, stage_warnings
from b2diffurl.reporting import forecast
from b2diffurl.reporting.page import write_report

# ---- updates that are unusual ----


def update(norm: float | None = 1.0, ratio: float = 0.01, *, first: bool = False, steps: dict | None = None) -> dict:
    """One as metrics/train.jsonl has it; `steps` gives timesteps their mean |log-ratio|, `ratio` is the largest of one."""
    steps = steps or {1: ratio}
    kept = {"timesteps": list(steps), "log_ratio_per_step": list(steps.values())}
    return {"first": first, "grad_norm": norm, "max_abs_log_ratio": ratio} | kept


def said(earlier: list[dict], updates: list[dict]) -> list[tuple[int, str]]:
    """(number of the update, kind) of each warning when it is first given."""
    seeing = UpdateHealth(earlier, max_first_log_ratio=0.1)
    return [(number, one["kind"]) for number, each in enumerate(updates) for one in seeing.see(each)]


def test_far_above_the_median_is_more_than_ten_times():
    """Of 1, ..., 9, 10, 11 the median is 6 (an update counts in its successors' medians); 60 is not far, 61 is."""
    usual = [update(float(norm)) for norm in range(1, 12)]
    assert said(usual, [update(60.0)]) == []
    assert said(usual, [update(61.0)]) == [(0, "Gradient norm")]
    assert said([], [*usual, update(60.0), update(61.0)]) == []  # by then the median is 6.5, and then 7
    assert said([], [*usual, update(60.0), update(61.0), update(71.0)]) == [(13, "Gradient norm")]
    seeing = UpdateHealth(usual, max_first_log_ratio=0.1)
    assert [len(seeing.see(update(norm))) for norm in (61.0, 1.0, 100.0, 99.0)] == [1, 0, 0, 0]
    (warned,) = seeing.warnings()
    assert warned["what"] == "gradient norm up to 1e+02: 3 of 4 updates are above 10 times the median of those before, 6"


def test_a_median_needs_enough_updates_and_forgets_old_ones():
    assert said([update(1.0)] * (MIN_UPDATES - 1), [update(99.0)]) == []
    assert said([update(1.0)] * MIN_UPDATES, [update(99.0)]) == [(0, "Gradient norm")]
    assert said([update(1.0)] * 1000 + [update(10.0)] * WINDOW, [update(99.0)]) == []
    assert said([update(0.0)] * 50, [update(1.0)]) == []  # all was clipped away: nothing is usual


def test_log_ratios_are_compared_with_updates_that_trained_the_step_that_decides():
    """A stage's first update says nothing; what no clip range would bind is not far; and where an update takes some of the
    steps, one with the step of great leverage is compared with those that had it."""
    assert said([update(ratio=1e-6)] * 20, [update(ratio=9e-5)]) == []
    assert said([update(ratio=1e-4)] * 20, [update(ratio=1.1e-3)]) == [(0, "Log-ratio")]
    assert said([update(ratio=1e-9, first=True)] * 20, [update(ratio=0.9)]) == []
    quiet, loud = update(steps={751: 0.003, 1: 0.001}), update(steps={751: 0.003, 51: 0.1})
    assert said([quiet] * 12 + [loud] * 12, [loud]) == []
    assert said([quiet] * 12 + [loud] * 9, [loud]) == []
    assert said([quiet] * 12 + [loud] * 12, [update(steps={51: 1.1})]) == [(0, "Log-ratio")]
    assert said([loud] * 12, [update(ratio=99.0, steps={751: 0.003, 51: 0.9})]) == []  # one transition among hundreds


def test_a_first_ratio_has_its_own_bound():
    """The clip range; and it is no warning of a run that collapses."""
    assert said([], [update(ratio=0.09, first=True)]) == []
    assert said([], [update(ratio=0.11, first=True), update()]) == [(0, "First log-ratio")]


def test_updates_skipped_in_a_row_are_counted_across_stages():
    skipped = update(None)
    assert said([], [skipped] * 9 + [update()] + [skipped] * 9) == []
    assert said([], [*[skipped] * 12, update(), *[skipped] * 12]) == [(9, "Skipped updates")]
    assert said([update(), *[skipped] * 7], [skipped] * 5) == [(2, "Skipped updates")]
    assert said([skipped] * 20, [update()]) == []


def test_a_leap_in_training_warns(workplace, overrides, harm, monkeypatch):
    """A stage whose first update has a gradient a thousand times as large, and makes a step a thousand times as long, warns
    of both, once each in the log, and in its manifest; and so if it was interrupted after that. Usual is what the updates of
    the stage before were, here 4 of them."""
    assert [stage_of(workplace, index).manifest("train")["warnings"] for index in (0, 1)] == [[], []]
    monkeypatch.setattr(health, "MIN_UPDATES", 3)
    stage, step, settings = stage_of(workplace, 1), AcceleratedOptimizer.step, overrides | {"run_name": "stage1"}
    stage.manifest_path("train").unlink()
    shutil.rmtree(stage.folder / "checkpoints")
    leaps = [10.0]  # rates of the next steps

    def long_step(self, *given):
        for group in self.param_groups:
            group["lr"] = leaps.pop() if leaps else 1e-2
        return step(self, *given)

    monkeypatch.setattr(AcceleratedOptimizer, "step", long_step)
    harm(lambda number, loss, metrics: (loss * (1.0 if number else 1000.0), metrics))
    stdout = ran(workplace, "train", settings)
    whole = stage.manifest("train")["warnings"]
    assert [one["kind"] for one in whole] == ["Gradient norm", "Log-ratio"]
    for name in ("gradient norm", r"mean \|log-ratio\| of a step"):
        assert len(re.findall(rf"stage1 train: {name} up to \S+: 1 of 1 updates are .* Try a new experiment", stdout)) == 1
    stage.manifest_path("train").unlink()
    shutil.rmtree(stage.checkpoint(2))
    assert "Try" not in ran(workplace, "train", settings)
    assert stage.manifest("train")["warnings"] == whole


# ---- groups without a contrast ----


def group(flat: int = 0, twins: int = 0, groups: int = 100, *, mean: float = 1.0, std: float = 0.1) -> dict:
    counts = {"num_groups": groups, "num_flat_groups": flat, "num_twin_groups": twins}
    return counts | {"stage": 0, "reward_mean": mean, "reward_std": std}


def kinds(*given, apart: dict | None = None) -> list[str]:
    return [one["kind"] for one in stage_warnings(*given, apart or {})]


def test_a_spread_of_rewards_that_is_gone_warns():
    """All groups at any time; nearly all if it was not so before. A sparse reward, whose groups mostly have none, may."""
    assert kinds([], group(99)) == []
    assert kinds([], group(100)) == ["Rewards of siblings"]
    assert kinds([group(50)] * 3, group(89)) == []
    assert kinds([group(50)] * 3, group(90)) == ["Rewards of siblings"]
    assert kinds([group(85)] * 3, group(95)) == []
    assert kinds([group(50), group(95), group(95)], group(95)) == []
    assert kinds([group(95)] * 3, group(100)) == ["Rewards of siblings"]


def test_a_reward_that_falls_warns():
    """By more than a standard deviation from the best stage; with 9 groups by more than two, which noise alone can make."""
    assert kinds([], group(std=0.0)) == []
    good, better = group(mean=0.2), group(mean=0.3) | {"stage": 1}
    assert kinds([good, better, good], group(mean=0.21)) == []
    (warned,) = stage_warnings([good, better, good], group(mean=0.19), {})
    assert warned["what"] == "mean reward 0.19, more than 1 standard deviation below that of stage 1, 0.3"
    assert kinds([better], group(mean=0.15, std=0.2)) == []
    assert kinds([better], group(mean=0.11, groups=9)) == []
    assert kinds([better], group(mean=0.09, groups=9)) == ["Mean reward"]
    assert kinds([group(mean=1.0, std=0.0)], group(mean=0.95, std=0.2)) == []
    assert kinds([group(mean=1.0, std=0.0)], group(100, mean=0.0, std=0.0)) == ["Mean reward", "Rewards of siblings"]


def scored(stage: int, groups: int = 100, **figures: tuple) -> dict:
    """A stage with figures: (mean, standard error, standard deviation of single images) of each reward."""
    reward = figures.get("reward", (0.0, 0.01, 0.1))
    return group(groups=groups, mean=reward[0], std=reward[2]) | {"stage": stage, "figures": {"reward": reward} | figures}


def test_a_watched_reward_that_falls_while_the_reward_rises_warns():
    """On training images, from its best stage; an earlier version's stages, which lack its error, are passed over."""
    first, better = scored(0, clip=(0.5, 0.02, 0.5)), scored(1, clip=(0.6, 0.02, 0.5))
    hacked = scored(2, reward=(0.1, 0.01, 0.1), clip=(0.4, 0.02, 0.5))
    (warned,) = stage_warnings([group(mean=0.0), first, better], hacked, {})
    assert warned["kind"] == "Reward hacking"
    assert warned["what"] == (
        "watched clip fell from 0.6 (stage 1) to 0.4 on training images, while what is trained on rose from 0 to 0.1"
    )
    assert kinds([first, better], scored(2, clip=(0.4, 0.02, 0.5))) == []
    assert kinds([first], scored(2, reward=(0.1, 0.01, 0.1), clip=(0.45, 0.02, 0.5))) == []
    assert kinds([group(mean=0.0)], hacked) == []


def test_of_rewards_normalised_each_by_itself_the_weighted_sum_says_nothing():
    """Rewards of weight 1 with deviations 0.1 and 10: that the large one falls by half a deviation moves the raw sum by more
    than its own deviation, which is no warning where the small one has risen; that both fall is one. A stage that has no
    errors, of an earlier version, is not compared."""
    apart = {"small": 1.0, "large": 1.0}

    def stage(index: int, small: float, large: float) -> dict:
        figures = {"small": (small, 0.01, 0.1), "large": (large, 1.0, 10.0)}
        return scored(index, reward=(small + large, 1.0, 4.0), **figures)

    first = stage(0, 0.0, 0.0)
    assert kinds([first], stage(1, 0.05, -5.0), apart=apart) == []
    assert kinds([first], stage(1, 0.05, -5.0)) == ["Mean reward"]
    assert kinds([first], stage(1, -0.1, -10.0), apart=apart) == ["Mean reward"]
    assert kinds([group(mean=9.0)], stage(1, -0.1, -10.0), apart=apart) == []


def test_identical_siblings_warn_beyond_a_few_groups():
    assert kinds([], group(0, 5)) == []
    assert kinds([], group(0, 6)) == ["Identical images"]
    assert kinds([], group(6, 6, 6)) == ["Rewards of siblings", "Identical images"]


@pytest.mark.usefixtures("no_pngs")
def test_a_blank_model_warns_in_log_manifest_and_report(finished, overrides, monkeypatch, tmp_path):
    """A model that draws nothing any more: the same picture in every group, the same reward, nothing selected."""
    work = tmp_path / "work"
    shutil.copytree(finished, work)
    run = overrides | {"stage_cnt": 3, "run_name": "stage2"}
    blank = torch.zeros(64, 64, 3, dtype=torch.uint8)
    monkeypatch.setattr(StableDiffusion, "decode", lambda self, latents: blank.expand(len(latents), -1, -1, -1))
    for index in (0, 1):
        selected = stage_of(work, index).manifest("select")
        assert (selected["num_flat_groups"], selected["num_twin_groups"], selected["warnings"]) == (0, 0, [])
    stdout = "".join(ran(work, verb, run) for verb in ("sample", "select", "train"))
    selected = stage_of(work, 2).manifest("select")
    assert [one["what"] for one in selected["warnings"]] == [
        "rewards are the same for all siblings in 6 of 6 groups, usual before: 0%",
        "6 of 6 groups have siblings whose images are identical",
    ]
    assert stdout.count("stage2 select: rewards are the same for all siblings in 6 of 6 groups") == 1
    assert re.search(r"stage2 done: 3 of 3 stages, .*, warnings in stage 2 \(see report.html\)", stdout)
    assert forecast.plan_line(settings_at(make_config(run), experiment(work))).endswith(
        ", warnings in stage 2 (see report.html)"
    )
    page = write_report(experiment(work)).read_text()
    assert page.index("<h2>Warnings</h2>") < page.index("<h2>Curves</h2>")
    section = page[page.index("<h2>Warnings</h2>") : page.index("</section>")]
    for words in (*(one["what"] for one in selected["warnings"]), "Try looking at", "in stage 2"):
        assert words in section
