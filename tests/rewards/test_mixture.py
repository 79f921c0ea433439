"""Mixtures and judges: weighted sums of recorded parts, standardised by the first stage."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import (
    assert_refused,
    experiment,
    judged,
    ran,
    refuse,
    run_script,
    stage_of,
)
from scored import CLIP, JPEG, REDNESS, jpeg_kb, pixels, redness, scores

from b2diffurl.configuration.rules import check
from b2diffurl.runtime import files


@pytest.mark.usefixtures("no_pictures")
def test_a_mixture_is_the_weighted_sum_of_recorded_parts(begin, module, overrides):
    """Three rewards, one of them the user's with a part of its own: each is recorded, and the reward is their weighted
    sum; alone, each says the same. run_eval.py reports the parts and the sum."""
    mine = module(REDNESS + "def both(images, prompts):\n    return redness(images, prompts), {'said': list(prompts)}\n")
    weights = {CLIP: 1.0, JPEG: 0.1, f"{mine}:both": -0.5}
    folder, settings = begin({"reward.weights": weights})
    ran(folder, "select", settings)
    rows, images = scores(folder), pixels(folder)
    for row, image in zip(rows, images, strict=True):
        assert row["parts"].keys() == {*weights, f"{mine}:both/said"}
        assert row["parts"][JPEG] == pytest.approx(-jpeg_kb(image), rel=1e-6)
        assert row["parts"][f"{mine}:both"] == pytest.approx(redness(image), rel=1e-5)
        assert row["parts"][f"{mine}:both/said"] == row["prompt"]
        total = sum(weight * row["parts"][name] for name, weight in weights.items())
        assert row["reward"] == pytest.approx(total, abs=1e-6)
    manifest = stage_of(folder).manifest("select")
    assert (manifest["reward"], manifest["scales"]) == (weights, None)
    assert "already finished" in ran(folder, "select", settings | {"reward.name": "shapes"})  # of no effect in a mixture
    (metrics,) = map(json.loads, stage_of(folder).metrics("select").read_text().splitlines())
    assert metrics[f"{JPEG}_mean"] == pytest.approx(-np.mean([jpeg_kb(image) for image in images]), rel=1e-6)

    shutil.rmtree(folder)
    alone, single = begin({})
    ran(alone, "select", single)
    assert [row["parts"][CLIP] for row in rows] == [row["reward"] for row in scores(alone)]

    shutil.rmtree(alone)
    row = judged(alone.parent, settings, "--checkpoint=base", "--sampler=training", "--prompts=train")
    result = json.loads(next((alone.parent / "model").rglob("result.json")).read_text())
    values = result["values"]
    assert {*weights, "reward"} <= values.keys()
    expected = [sum(weight * values[name][n] for name, weight in weights.items()) for n in range(6)]
    assert values["reward"] == pytest.approx(expected, abs=1e-6)
    assert row["reward"] == pytest.approx(np.mean(expected), abs=1e-6)


@pytest.mark.usefixtures("no_pictures")
def test_standardised_parts_keep_the_first_stages_scales(overrides, module, tmp_path):
    """With reward.standardise the parts are z-scores by the first stage's mean and population deviation, in the next stage
    and in run_eval.py, too; a part that is constant counts for nothing. The parts are recorded as they are."""
    mine = module("import torch\ndef constant(images, prompts):\n    return torch.full((len(prompts),), 0.1)\n")
    weights = {CLIP: 1.0, JPEG: 2.0, f"{mine}:constant": 50.0}
    settings = overrides | {"reward.weights": weights, "reward.standardise": True}
    refuse(
        tmp_path,
        "eval",
        settings,
        "standardise takes its scale from the first stage",
        arguments=(
            "--checkpoint=base",
            "--sampler=training",
        ),
    )
    for verb in ("sample", "select", "train"):
        ran(tmp_path, verb, settings)
    for verb in ("sample", "select"):
        ran(tmp_path, verb, settings | {"run_name": "stage1"})
    first = {name: np.array([row["parts"][name] for row in scores(tmp_path)]) for name in weights}
    scale = {name: (first[name].mean(), first[name].std()) for name in (CLIP, JPEG)}

    def total(parts: dict) -> np.ndarray:
        return sum(weights[name] * (np.array(parts[name]) - mean) / deviation for name, (mean, deviation) in scale.items())

    for index in range(2):
        rows = scores(tmp_path, index)
        parts = {name: [row["parts"][name] for row in rows] for name in weights}
        assert [-kb for kb in map(jpeg_kb, pixels(tmp_path, index))] == pytest.approx(parts[JPEG], rel=1e-6)
        assert [row["reward"] for row in rows] == pytest.approx(total(parts).tolist(), abs=1e-5)
        recorded = stage_of(tmp_path, index).manifest("select")["scales"]
        assert recorded.keys() == weights.keys()
        for name in scale:
            assert recorded[name] == pytest.approx(scale[name], rel=1e-6)
    assert np.mean([row["reward"] for row in scores(tmp_path)]) == pytest.approx(0, abs=1e-5)
    assert abs(np.mean([row["reward"] for row in scores(tmp_path, 1)])) > 1e-3
    ran(tmp_path, "eval", settings, "--checkpoint=base", "--sampler=training", "--prompts=train")
    values = json.loads(next(experiment(tmp_path).glob("eval/*/result.json")).read_text())["values"]
    assert values["reward"] == pytest.approx(total(values).tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward.weights": "clip"}, "reward.weights is 'clip'.*must be like"),
        ({"reward.weights": "['clip']"}, "reward.weights is .*must be like"),
        ({"reward.weights": "{}"}, "reward.weights is .*must be like"),
        ({"reward.weights": "{'clip': 0}"}, "reward.weights has 0 for 'clip'"),
        ({"reward.weights": "{'clip': '1'}"}, "reward.weights has '1' for 'clip'"),
        ({"reward.weights": "{'clip': True}"}, "reward.weights has True for 'clip'"),
        ({"reward.weights": "{'clip': 1e999}"}, "reward.weights has inf for 'clip'"),
        ({"reward.weights": "{'clip': 1.0, 'beauty': 1.0}"}, "beauty.*clip, pickscore.*shapes, http, file"),
        ({"reward.weights": "{1: 1.0}"}, "1"),
        ({"reward.standardise": True}, "standardise is on without reward.weights"),
        ({"reward.combine": "advantages"}, "combine is advantages without reward.weights; it must be sum"),
        (
            {"reward.combine": "product", "reward.weights": "{'clip': 1.0}"},
            "combine is 'product'; known: 'sum', 'advantages'",
        ),
        ({"reward.watch": "('clip',)"}, "watch names 'clip', which is trained on"),
        ({"reward.weights": "{'shapes': 1.0}", "reward.watch": "('shapes',)"}, "watch names 'shapes', which is trained on"),
        ({"reward.watch": f"('{JPEG}', '{JPEG}')"}, f"watch names '{JPEG}' twice"),
        ({"reward.watch": "('beauty',)"}, "beauty.*clip, pickscore.*shapes, http, file"),
        ({"reward.dtype": "int8"}, "reward.dtype is 'int8'; known: 'auto', 'float32'"),
        ({"reward.batch_size": 0}, "reward.batch_size is 0"),
        ({"reward.num_workers": 0}, "reward.num_workers is 0"),
    ],
    ids=str,
)
def test_reward_settings_that_cannot_work(empty, overrides, settings, said):
    """Weights that are none, a mixture or judge that makes no sense: refused before anything is sampled."""
    refuse(empty, "sample", overrides | settings, said)


def test_a_weight_that_is_not_a_number(config):
    """NaN has no literal on the command line; from Python it is refused, too, and a good mixture is not."""
    config.reward.weights = {"clip": 1.0, "shapes": float("nan")}
    with pytest.raises(ValueError, match=r"reward\.weights has nan for 'shapes'"):
        check(config)
    config.reward.weights = {"clip": 1.0, "shapes": -1}
    check(config)


def big(images, prompts):
    """A reward near the largest float32."""
    return torch.full((len(images),), 1e38)


def test_a_sum_that_is_not_finite(begin):
    """Each reward is finite, their weighted sum is beyond a float32: the run stops with the ids."""
    folder, settings = begin({"reward.weights": {f"{__name__}:big": 1e3}})
    said = r"reward \(weighted sum\) is not finite for images \[0, 1, 2, .*scores.jsonl"
    assert_refused(run_script(folder, "select", settings), said)


def test_standardised_evaluation_of_another_experiment(workplace, overrides):
    """An experiment that was selected without scales, or before there were any, has none to judge with: it is said so."""
    settings = overrides | {"reward.weights": {"clip": 1.0}, "reward.standardise": True}
    said, base = "has no selected stage with one", ("--checkpoint=base", "--sampler=training")
    refuse(workplace, "eval", settings, said, arguments=base)
    manifest = stage_of(workplace).manifest_path("select")
    without = {key: value for key, value in files.read_json(manifest).items() if key != "scales"}
    files.write_record(manifest, without)
    refuse(workplace, "eval", settings, said, arguments=base)
