"""The figures of an evaluation, by numpy: means, standard errors, paired gains, diversity by prompt."""

import numpy as np
import pytest
import torch
from conftest import PROMPTS, run_evaluation

from b2diffurl.evaluation.statistics import summarise_diversity
from b2diffurl.experiment.evaluation_table import describe, with_error


def test_figures_by_numpy(workplace, overrides):
    """Means, standard errors and paired gains are those of the single values; a trained LoRA is not the base; both prompt
    sets are judged."""
    results = run_evaluation(workplace, overrides, ["stage0", "last", "base"], ["train", "test"], **{"eval.judge": "shapes"})
    assert [result["checkpoint"] for result in results] == ["base"] * 2 + ["stage0"] * 2 + ["stage1"] * 2
    for result in results:
        base = next(one for one in results if one["checkpoint"] == "base" and one["prompts"] == result["prompts"])
        values = {key: np.array(numbers) for key, numbers in result["values"].items()}
        assert values["reward"].shape == values["accuracy"].shape == (6,)
        for key, numbers in values.items():
            assert result[key] == pytest.approx(numbers.mean())
            assert result[f"{key}_se"] == pytest.approx(numbers.std(ddof=1) / 6**0.5)
            difference = numbers - np.array(base["values"][key])
            if result is not base:
                assert result[f"{key}_gain"] == pytest.approx(difference.mean())
                assert result[f"{key}_gain_se"] == pytest.approx(difference.std(ddof=1) / 6**0.5)
        assert (result["values"]["reward"] == base["values"]["reward"]) == (result is base)


def test_diversity_is_reported_by_prompt_and_paired(workplace, overrides):
    """Six images of three prompts are three pairs; the mean, its error over prompts and the paired gain follow from them."""
    base, last = run_evaluation(workplace, overrides, ["base", "last"], **{"eval.diversity": ("clip", "layout")})
    pairs = [base["diversity"]["clip"]["all"], last["diversity"]["clip"]["all"]]
    assert pairs[0].keys() == pairs[1].keys() == set(PROMPTS)
    before, after = (np.array([one[prompt] for prompt in PROMPTS]) for one in pairs)
    assert (before > 0).all()
    assert (before != after).all()
    assert last["diversity/clip"] == pytest.approx(after.mean())
    assert last["diversity/clip_se"] == pytest.approx(after.std(ddof=1) / 3**0.5)
    assert last["diversity/clip_gain"] == pytest.approx((after - before).mean())
    assert last["diversity/clip_gain_se"] == pytest.approx((after - before).std(ddof=1) / 3**0.5)
    for result, pair in zip((base, last), pairs, strict=True):  # two images of similarity c: eigenvalues (1 +- c) / 2
        shares = {prompt: np.array([distance / 2, 1 - distance / 2]) for prompt, distance in pair.items()}
        expected = {prompt: np.exp(-(share * np.log(share)).sum()) for prompt, share in shares.items()}
        assert result["diversity"]["clip"]["vendi"] == pytest.approx(expected)
        assert result["diversity/clip_vendi"] == pytest.approx(np.mean(list(expected.values())))
    assert "vendi" not in last["diversity"]["layout"]  # distances of layouts are no similarities
    assert last["diversity/layout"] is None  # an untrained model shows no things, so it has no layouts
    assert "diversity/clip_right" not in last  # without a judge nobody knows which are right


def test_diversity_of_right_images_leaves_the_wrong_ones_out():
    """Rows 1 and 3 are wrong: what is left of prompt a is one pair, of prompt b a single image."""
    features = torch.tensor([[0.0], [50.0], [3.0], [90.0], [1.0]])
    found = summarise_diversity(features, list("aaabb"), [1.0, 0.0, 1.0, 0.0, 1.0], "euclidean")
    assert found == {"all": {"a": pytest.approx((50 + 3 + 47) / 3), "b": 89.0}, "right": {"a": 3.0}}


def test_one_image_has_no_error(overrides, tmp_path):
    """Nor has a mean over one prompt; it is left out of what is said, and is not 0."""
    (result,) = run_evaluation(tmp_path, overrides, ["base"], **{"eval.num_images": 1})
    assert result["reward_se"] is None
    assert result["diversity/clip"] is None
    assert describe(result).endswith(f"reward {result['reward']:.3f}")
    assert with_error(result, "reward") == f"{result['reward']:.3f}"
