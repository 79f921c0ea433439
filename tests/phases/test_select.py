"""Selecting: from scores to advantages, and never from a score that is not finite."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import json_lines, run_stage, stage_of
from safetensors.torch import load_file, save_file

from b2diffurl.experiment.stage import Stage
from b2diffurl.phases.scoring import Scores
from b2diffurl.phases.select import noted_figures, summarise


def test_a_non_finite_reward_stops_the_selection(workplace, overrides, models, tmp_path):
    """A scorer that has turned to NaN: the scores are on disk, the error names the images, nothing is selected."""
    broken = shutil.copytree(models / "clip", tmp_path / "clip")
    weights = load_file(broken / "model.safetensors")
    save_file({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, broken / "model.safetensors")
    settings = overrides | {"exp_name": "broken", "reward.clip.model": str(broken)}
    run_stage(tmp_path, settings, verbs=["sample"])
    with pytest.raises(FloatingPointError, match=r"images \[0, 1, 2"):
        run_stage(tmp_path, settings, verbs=["select"])
    stage = Stage(tmp_path / "model" / "lora" / "broken", 0)
    assert [json.loads(line)["reward"] for line in stage.scores.read_text().splitlines()] == [None] * 18
    assert not stage.finished("select")
    assert not stage.selection.exists()


INDEPENDENT = {"sampling": "independent"}
PLAIN_DDPO = INDEPENDENT | {"curriculum": "fixed", "split_step_left": 4, "split_step_right": 4, "selection.images": "all"}


def test_independent_images_of_all_steps_and_all_selected_are_plain_ddpo(stage_with):
    """Every image is selected, in order, with its normalised score, clamped, as advantage, and trained on in all its T steps
    in every epoch; the first update, here of all of them, is on the policy that sampled."""
    stage = stage_of(stage_with(**PLAIN_DDPO, **{"train.adv_clip_max": 0.5, "train.gradient_accumulation_steps": 64}))
    rows, prompts = json.loads(stage.selection.read_text()), json.loads(stage.prompts.read_text())
    rewards = np.array([row["reward"] for row in json_lines(stage.scores)])
    expected = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        same = rewards[[one == prompt for one in prompts]]
        expected.append((reward - same.mean()) / same.std(ddof=1))
    assert [(row["id"], row["group"], row["branch"]) for row in rows] == [(n, n // 3, n % 3) for n in range(18)]
    assert [row["score"] for row in rows] == pytest.approx(expected, rel=1e-5)
    assert [row["advantage"] for row in rows] == pytest.approx(np.clip(expected, -0.5, 0.5), rel=1e-5)
    selected, trained = stage.manifest("select"), stage.manifest("train")
    assert (selected["num_selected"], selected["num_best"], selected["num_worst"]) == (
        18,
        sum(score >= 0.5 for score in expected),
        sum(score < -0.5 for score in expected),
    )
    assert (trained["num_trained_steps"], trained["num_transitions"]) == (4, 18 * 4 * 2)
    assert trained["max_abs_log_ratio_first_update"] < 1e-5


def test_a_group_is_flat_by_every_reward_that_is_normalised_by_itself():
    """Two siblings whose weighted sum is the same though either tells them apart, and two that nothing tells apart."""
    parts = {"a": torch.tensor([0.0, 1.0, 2.0, 2.0]), "b": torch.tensor([1.0, 0.0, 3.0, 3.0])}
    scores = Scores(parts["a"] + parts["b"], parts, {}, None, {}, {})
    thresholds = SimpleNamespace(pos_threshold=0.5, neg_threshold=-0.5)
    assert summarise(scores, [], 2, thresholds, {})["num_flat_groups"] == 2
    assert summarise(scores, [], 2, thresholds, {"a": 1.0, "b": 1.0})["num_flat_groups"] == 1


def test_the_error_of_a_stage_s_mean_is_over_groups_or_prompts():
    """Siblings that are copies of each other count once: six groups of three prompts; eight prompts of one group each."""
    values = torch.arange(6.0).repeat_interleave(3)
    few = noted_figures(Scores(values, {}, {}, None, {}, {}), {}, (), ["a", "b", "c"] * 6, 3)
    assert few["reward"] == pytest.approx([2.5, np.std(range(6), ddof=1) / 6**0.5, values.std().item()])
    watch = {"clip": torch.tensor([*range(8)] * 2).float()}
    many = noted_figures(Scores(torch.zeros(16), {}, watch, None, {}, {}), {}, ("clip",), [str(n % 8) for n in range(16)], 2)
    assert many["clip"][:2] == pytest.approx([3.5, np.std(range(8), ddof=1) / 8**0.5])
