"""Reward hacking warns early, and noise and good runs do not: recorded runs, and draws."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
from conftest import ROOT

from b2diffurl.evaluation import hacking
from b2diffurl.evaluation.hacking import Estimate, evaluation_warnings, fallen

# Evaluations of a run whose reward was the size as JPEG (the last is docs/rewards.md's), of 256 images on the same noise:
# reward, its error, that of its gain, accuracy by the checker, and the same of it. Up to stage 1 it may be chance.
#
#     Reward=jpeg_compressibility ExpName=jpeg StageCnt=7 BatchCnt=5 LR=1e-2 EvalEvery=1 bash run_process.sh \
#         --config.num_threads=1 --config.eval.num_images=256 --config.train.outside_weight=4
PLANTED = [
    (-1.8356, 0.0066, None, 0.4844, 0.0313, None),
    (-1.8297, 0.0058, 0.0039, 0.4766, 0.0313, 0.0265),
    (-1.8118, 0.0063, 0.0052, 0.4141, 0.0308, 0.0273),
    (-1.8205, 0.0068, 0.0049, 0.3789, 0.0304, 0.0283),
    (-1.7980, 0.0065, 0.0052, 0.3594, 0.0300, 0.0260),
    (-1.4240, 0.0060, 0.0060, 0.0180, 0.0059, 0.0220),
]


def evaluations(figures: list[tuple], name: str = "accuracy") -> list[dict]:
    rows = []
    for n, (reward, reward_se, reward_gain_se, value, se, gain_se) in enumerate(figures):
        row = {"reward": reward, "reward_se": reward_se, name: value, f"{name}_se": se, "n_images": 256}
        row |= {"reward_gain_se": reward_gain_se, f"{name}_gain_se": gain_se} if n else {}
        about = {"prompts": "test", "sampler": "training", "checkpoint": f"stage{n - 1}" if n else "base"}
        rows.append({"accuracy": None, "stage": n - 1 if n else None} | about | row)
    return rows


@pytest.mark.parametrize("name", ["accuracy", "pickscore"])
def test_a_small_file_is_no_good_picture(name):
    """The judge's accuracy, or a watched reward, falls while files get smaller: the second evaluation in which that is not
    chance warns, and those after it; each once, with what fell from where."""
    found = evaluation_warnings(evaluations(PLANTED, name), {})
    assert [(one["stage"], one["kind"]) for one in found] == [(stage, "Reward hacking") for stage in (2, 3, 4)]
    fell = {"accuracy": "accuracy fell from 48.4 ± 3.1 % (base) to 1.8 ± 0.6 %"}.get(
        name, "pickscore fell from 0.484 ± 0.031"
    )
    assert found[-1]["what"].startswith(f"held-out prompts, training sampler: {fell}")
    assert found[-1]["what"].endswith("while what is trained on rose, from -1.8356 ± 0.0066 to -1.4240 ± 0.0060")


def test_a_part_of_a_mixture_may_fall_for_the_others():
    """It is trained on, so it is weighed against them; what is only watched beside the mixture still warns."""
    rows = evaluations(PLANTED, "pickscore")
    assert evaluation_warnings(rows, {}, ("clip", "pickscore")) == []
    assert len(evaluation_warnings(rows, {}, ("clip", "aesthetic"))) == 3


def test_a_fall_without_a_rise_is_another_trouble():
    """A model that falls apart loses its reward, too; and one whose reward stays has hacked nothing."""
    for factor in (0.0, 1.0):
        worse = [(-1.8356 - factor * (row[0] + 1.8356), *row[1:]) for row in PLANTED]
        assert evaluation_warnings(evaluations(worse), {}) == []


def test_a_small_fall_does_not_warn_however_sure():
    """Three points of 48 by 100,000 images are 19 standard errors, and a seventeenth of a standard deviation."""
    figures = [(-1.8, 0.001, None, 0.48, 0.00158, None), (-1.7, 0.001, 0.001, 0.45, 0.00158, 0.00158)]
    rows = [row | {"n_images": 100_000} for row in evaluations(figures)]
    assert evaluation_warnings(rows, {}) == []


def test_what_was_learnt_and_lost_again_warns():
    """Accuracy rises to 90 % and falls to 60 %, above the base, while the reward goes on rising."""
    figures = [(0.1 * n, 0.005, 0.005, value, 0.03, 0.03) for n, value in enumerate((0.5, 0.7, 0.9, 0.6))]
    (warned,) = evaluation_warnings(evaluations(figures), {})
    assert (warned["stage"], warned["kind"]) == (2, "Reward hacking")
    assert "fell from 90.0 ± 3.0 % (stage1) to 60.0 ± 3.0 %" in warned["what"]


def test_images_that_are_all_alike_warn():
    """Of right images' diversity half the base's is lost, or without a judge four fifths of all images'; no rise of
    the reward, no warning."""

    def said(measure: str, share: float, rise: float = 0.1) -> list[str]:
        rows = evaluations([(0.0, 0.005, None, 0.5, 0.03, None), (rise, 0.005, 0.005, 0.5, 0.03, 0.03)])
        figures = {"diversity/clip": (0.2, 0.01), "diversity/clip_right": (0.05 if measure == "_right" else None, 0.003)}
        for row, factor in zip(rows, (1.0, share), strict=True):
            for key, (value, error) in figures.items():
                row |= {
                    key: value if value is None or key != f"diversity/clip{measure}" else factor * value,
                    f"{key}_se": error,
                }
        return [one["kind"] for one in evaluation_warnings(rows, {})]

    assert said("_right", 0.1) == ["Diversity"]
    assert said("_right", 0.55) == said("_right", 0.1, rise=0.0) == []
    assert said("", 0.02) == ["Diversity"]
    assert said("", 0.3) == []


def test_a_judge_that_is_the_reward_cannot_be_hacked_by_it():
    """Nor is it taken for a watched reward; its diversity is still looked at."""
    figures = [(value, 0.03, 0.03, value, 0.03, 0.03) for value in (0.5, 0.9, 0.6)]
    assert evaluation_warnings(evaluations(figures), {}) == []
    rows = [
        row | {"diversity/clip": share, "diversity/clip_se": 0.001}
        for row, share in zip(evaluations(figures[:2]), (0.2, 0.02), strict=True)
    ]
    assert [one["kind"] for one in evaluation_warnings(rows, {})] == ["Diversity"]


def recorded_curves() -> Iterator[list[dict]]:
    """The rows of evaluations of each recorded run that went as it should, once for each prompt set."""
    results = ROOT / "docs" / "results"
    study = json.loads((results / "study.json").read_text())
    for run in study["runs"]:
        for prompts in ("train", "test"):
            yield [point[prompts] | {"n_images": study["num_images"]} for point in run["curve"] if point.get(prompts)]
    for path in sorted(results.glob("learning*.json")):
        for rows in json.loads(path.read_text())["curves"].values():
            for prompts in ("train", "test"):
                yield sorted((row for row in rows if row["prompts"] == prompts), key=lambda row: row["queries"])


def test_good_runs_do_not_warn():
    """None of 114 recorded runs: the study's 105 and three seeds of each of three presets, on both prompt sets."""
    curves = list(recorded_curves())
    assert len(curves) == 2 * 114
    for curve in curves:
        about = [
            {"prompts": "test", "sampler": "training", "stage": n - 1 if n else None, "checkpoint": "stage" if n else "base"}
            for n in range(len(curve))
        ]
        assert evaluation_warnings([row | one for row, one in zip(curve, about, strict=True)], {}) == []


def test_noise_seldom_warns():
    """Ten looks at three watched rewards of 256 images that do not change, while the reward rises: below 2 % of runs, also
    where each look has noise of its own."""
    draw, warned = np.random.default_rng(1), 0
    for _ in range(200):
        looks = []
        for n in range(10):
            values = draw.normal(size=(3, 256))
            look = {f"watched{k}": Estimate(one.mean(), one.std() / 16, one.std()) for k, one in enumerate(values)}
            looks.append(look | {"reward": Estimate(0.1 * n, 0.001, 0.1)})
        warned += any(fallen(looks[:n], looks[n]) for n in range(1, 10))
    assert warned / 200 < 0.02


def test_rewards_normalised_each_by_itself_rise_in_their_own_units():
    """One rises by 2 of its standard deviations, of weight 1, the other falls by 1 of its own, of weight 1; the raw
    sum, which is not what is trained on, falls."""
    weights, units = {"small": 1.0, "large": 1.0}, {"small": 0.1, "large": 10.0}
    before = {"small": Estimate(0.0, 0.01, 0.1), "large": Estimate(0.0, 1.0, 10.0)}
    after = {"small": Estimate(0.2, 0.01, 0.1), "large": Estimate(-10.0, 1.0, 10.0)}
    was, here = (hacking.weighed(one, weights, units) for one in (before, after))
    assert here.mean - was.mean == pytest.approx((2 - 1) / 2**0.5)
    assert (here.error, here.deviation) == (pytest.approx(0.1), pytest.approx(1.0))
