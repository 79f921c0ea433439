"""A mixture's rewards, normalised by their sum or each by itself, with the history of each."""

import numpy as np
import pytest
import torch
from conftest import experiment, json_lines, make_config, plan, ran, refuse, stage_of
from scored import CLIP, JPEG, NUM_IMAGES, scores

from b2diffurl.configuration.settings import read_settings
from b2diffurl.phases.normalising import history, normalise_scores
from b2diffurl.phases.scoring import Scores
from b2diffurl.reporting.dry_run import describe
from b2diffurl.reporting.model_card import reward_with_models
from b2diffurl.runtime import files

WEIGHTS = {"x": 3.0, "y": 4.0}


def settings(**more):
    return read_settings(make_config({"reward.weights": WEIGHTS, "reward.combine": "advantages", "split_time": 2} | more))


def scored(x: list[float], y: list[float], **more) -> Scores:
    """A stage's scores by the mixture 3 x + 4 y."""
    parts = {"x": torch.tensor(x), "y": torch.tensor(y)}
    whole = 3 * parts["x"] + 4 * parts["y"]
    return Scores(**{"rewards": whole, "parts": parts, "watch": {}, "scales": None, "seconds": {}, "batch_sizes": {}} | more)


def row(prompt: str, x: float | None, y: float | None) -> dict:
    """A row of scores.jsonl. Its reward is not that of the parts, so that it shows if it is read instead of them."""
    return {"prompt": prompt, "reward": 1e6, "parts": {"x": x, "y": y}}


def test_two_rewards_of_two_prompts_by_hand():
    """Prompt a: x is 1 and 3 after 2, y is 300 and 100 after 200, so they score -1 and 1, and 1 and -1. Prompt b: x is
    flat, y is 10 and 30 with mean 20 and deviation sqrt(200). Weighed by 3/5 and 4/5."""
    stage = scored([1.0, 3.0, 0.1, 0.1], [300.0, 100.0, 10.0, 30.0])
    found = normalise_scores(settings(), list("aabb"), stage, [row("a", 2.0, 200.0)])
    of_x, of_y = [-1, 1, 0, 0], [1, -1, -np.sqrt(0.5), np.sqrt(0.5)]
    expected = [(3 * x + 4 * y) / 5 for x, y in zip(of_x, of_y, strict=True)]
    assert expected[:2] == [0.2, -0.2]
    assert found.scores.tolist() == pytest.approx(expected)
    assert torch.equal(found.edges[:, 0], found.scores)
    assert found.shares == pytest.approx({name: np.corrcoef(s, expected)[0, 1] for name, s in (("x", of_x), ("y", of_y))})


def test_edges_of_a_tree_by_hand():
    """Leaves 1 3 | 4 8 by x and 80 40 | 30 10 by y, deviations sqrt(26/3) and ten times that: see test_tree.py for the edges
    by x; those by y are 2 2, 2 -2, -2 1, -2 -1 in that unit."""
    tree = settings(**{"split_times": (2, 2), "split_after": (3,)})
    found = normalise_scores(tree, ["a"] * 4, scored([1.0, 3.0, 4.0, 8.0], [80.0, 40.0, 30.0, 10.0]), [])
    expected = np.array([[0.4, 1.0], [0.4, -1.0], [-0.4, -0.4], [-0.4, 0.4]]) / np.sqrt(26 / 3)
    np.testing.assert_allclose(found.edges.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(found.scores.numpy(), expected.sum(1), atol=1e-6)


def test_relative_to_siblings_each_reward_is_compared_with_theirs():
    """With selection.advantage=group: of the pairs 0 2 | 4 8 by x each part's mean is 0, though the prompt's is not."""
    stage = scored([0.0, 2.0, 4.0, 8.0], [5.0, 5.0, 1.0, 2.0])
    found = normalise_scores(settings(**{"selection.advantage": "group"}), ["a"] * 4, stage, []).scores
    of_x = np.array([-1, 1, -2, 2]) / np.std([0, 2, 4, 8], ddof=1)
    of_y = np.array([0, 0, -0.5, 0.5]) / np.std([5, 5, 1, 2], ddof=1)
    np.testing.assert_allclose(found.numpy(), (3 * of_x + 4 * of_y) / 5, rtol=1e-6)


def test_the_sum_drowns_what_spreads_little():
    """y spreads a thousandth of x: of the sum its share is about what x and y have in common, here none; apart it is that of
    its weight, 4/5."""
    stage = scored([1.0, 1.0, -1.0, -1.0], [1e-3, -1e-3, 1e-3, -1e-3])
    of_sum = normalise_scores(settings(**{"reward.combine": "sum"}), ["a"] * 4, stage, [])
    apart = normalise_scores(settings(), ["a"] * 4, stage, [])
    assert of_sum.shares == pytest.approx({"x": 1.0, "y": 0.0}, abs=2e-3)
    assert apart.shares == pytest.approx({"x": 0.6, "y": 0.8})


def test_the_sum_has_the_history_of_the_sum():
    """Rewards 1 and 3 after a reward of 2 score -1 and 1; what the parts were is not asked."""
    stage = scored([1.0, 1.0], [1.0, 1.0], rewards=torch.tensor([1.0, 3.0]))
    rows = [{"prompt": "a", "reward": 2.0, "parts": {}}]
    assert normalise_scores(settings(**{"reward.combine": "sum"}), ["a", "a"], stage, rows).scores.tolist() == [-1.0, 1.0]


def test_images_that_a_reward_has_not_scored_are_not_in_its_history():
    """After the user has put another reward into the mixture, earlier images lack its score, or have null."""
    rows = [row("a", 1.0, None), {"prompt": "b", "reward": 5.0, "parts": {"x": 2.0}}, row("b", None, 3.0)]
    assert history(rows, "x") == [("a", 1.0), ("b", 2.0)]
    assert history(rows, "y") == [("b", 3.0)]
    assert [reward for _, reward in history(rows)] == [1e6, 5.0, 1e6]


@pytest.mark.usefixtures("no_pictures")
def test_two_stages_with_the_history_of_each_reward(overrides, tmp_path):
    """The second stage's scores, worked out from the two scores.jsonl: by prompt, each reward with its own history. The
    manifest says how rewards are combined, and the way cannot be changed."""
    weights = {CLIP: 1.0, JPEG: -2.0}
    mixture = overrides | {"reward.weights": weights, "reward.combine": "advantages", "selection.images": "all"}
    assert f"1 {CLIP} + -2 {JPEG}, each normalised by itself" in describe(plan(tmp_path, mixture))
    for verb in ("sample", "select", "train"):
        ran(tmp_path, verb, mixture)
    second = mixture | {"run_name": "stage1"}
    ran(tmp_path, "sample", second)
    refuse(tmp_path, "select", second | {"reward.combine": "sum"}, "reward.combine")
    said = ran(tmp_path, "select", second)

    earlier, now = scores(tmp_path), scores(tmp_path, 1)
    own = {}
    for name in weights:
        seen = [(one["prompt"], one["parts"][name]) for one in earlier + now]
        values = {prompt: np.array([value for other, value in seen if other == prompt]) for prompt, _ in seen}
        own[name] = np.array([(v - values[p].mean()) / values[p].std(ddof=1) for p, v in seen[NUM_IMAGES:]])
    expected = (own[CLIP] - 2 * own[JPEG]) / np.sqrt(5)
    rows = files.read_json(stage_of(tmp_path, 1).selection)
    assert [one["score"] for one in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [one["advantage"] for one in rows] == pytest.approx(expected.clip(-5, 5).tolist(), abs=1e-5)

    manifest, (metrics,) = stage_of(tmp_path, 1).manifest("select"), json_lines(stage_of(tmp_path, 1).metrics("select"))
    assert (manifest["combine"], manifest["num_history"]) == ("advantages", NUM_IMAGES)
    for name, alone in own.items():
        share = np.corrcoef(alone, expected)[0, 1]
        assert metrics[f"{name}_share"] == manifest[f"{name}_share"] == pytest.approx(share, abs=1e-5)
        assert f"share of {name} {share:.2f}" in said
        assert f", {name} {np.mean([one['parts'][name] for one in now]):.4f}" in said
    for one in now:  # the reward that is reported is the weighted sum
        assert one["reward"] == pytest.approx(one["parts"][CLIP] - 2 * one["parts"][JPEG], abs=1e-6)
    recorded = files.read_json(experiment(tmp_path) / "config.json")["config"]["reward"]
    assert recorded["combine"] == "advantages"
    assert reward_with_models(recorded).endswith(f"-2 × `{JPEG}`, each normalised by itself")
    assert reward_with_models(recorded | {"combine": "sum"}).endswith(f"`{JPEG}`")
