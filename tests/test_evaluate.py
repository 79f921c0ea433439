"""Judging: the same noise for every checkpoint, figures that numpy agrees with, and one line of JSON at the end."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROMPTS, experiment, make_config, run_script, run_stage, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file

from b2diffurl.evaluate import SamplerSettings, evaluate, resolve_checkpoint, summarise_diversity
from b2diffurl.seeding import generator
from b2diffurl.stage import finished_stages

SETTINGS = SamplerSettings(num_steps=4, eta=1.0, guidance_scale=5.0)


def judged(folder, overrides: dict, checkpoints: list[str], prompts: list[str] | None = None, **more) -> list[dict]:
    with contextlib.chdir(folder):
        return evaluate(make_config(overrides, **more), checkpoints, prompts or ["test"], SETTINGS)


def test_judging_the_base_twice_gives_the_same_numbers(overrides, tmp_path):
    """Everything sampled and scored anew: every value is the same, and every image that is kept."""
    (one,) = judged(tmp_path, overrides, ["base"])
    files = snapshot(tmp_path)
    shutil.rmtree(tmp_path / "model")
    (two,) = judged(tmp_path, overrides, ["base"])
    assert one == two
    assert snapshot(tmp_path) == files
    assert len(set(one["values"]["reward"])) == 6


def test_a_lora_that_was_never_updated_equals_the_base(overrides, tmp_path):
    """A stage that selected nothing leaves the base: the same rewards to the bit, image by image, and a gain of 0."""
    run_stage(tmp_path, overrides | {"eval.pos_threshold": 1e9, "eval.neg_threshold": -1e9})
    base, last = judged(tmp_path, overrides, ["last", "base"])
    assert (base["checkpoint"], last["checkpoint"]) == ("base", "last")
    assert base["values"] == last["values"]
    assert (last["reward_gain"], last["reward_gain_se"]) == (0.0, 0.0)


def test_figures_by_numpy(workplace, overrides):
    """Means, standard errors and paired gains are those of the single values; a trained LoRA is not the base; both prompt
    sets are judged."""
    results = judged(workplace, overrides, ["base", "stage0", "last"], ["train", "test"], **{"eval.judge": "shapes"})
    assert [result["checkpoint"] for result in results] == ["base"] * 2 + ["stage0"] * 2 + ["last"] * 2
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
    base, last = judged(workplace, overrides, ["base", "last"], **{"eval.diversity": ("clip", "layout")})
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


def test_a_reward_of_the_users_own(overrides, tmp_path, monkeypatch):
    """`package.module:function` names any function on the Python path: its mean is the reward."""
    (tmp_path / "my_rewards.py").write_text(
        "def redness(images, prompts):\n    return images[..., 0].float().mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (result,) = judged(tmp_path, overrides, ["base"], **{"reward.name": "my_rewards:redness", "eval.num_images": 4})
    shown = sorted(Path(tmp_path, result["folder"]).glob("*.png"))
    assert result["values"]["reward"] == pytest.approx([np.asarray(Image.open(path))[..., 0].mean() for path in shown])


def test_what_a_reward_is_belongs_to_an_evaluation(overrides, tmp_path, monkeypatch):
    """Another line in the file of your reward, or other weights of the CLIP that only diversity uses: judged anew."""
    source = tmp_path / "constant_reward.py"
    source.write_text("def one(images, prompts):\n    return images[:, 0, 0, 0] * 0.0 + 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    clip = shutil.copytree(overrides["reward.clip.model"], tmp_path / "clip")
    settings = {"reward.name": "constant_reward:one", "reward.clip.model": str(clip), "eval.num_images": 2}
    folders = []
    for changed in (None, None, source, clip / "model.safetensors"):
        if changed == source:
            source.write_text(source.read_text() + "# another version\n")
        elif changed:
            weights = load_file(changed)
            save_file({name: value * 1.5 for name, value in weights.items()}, changed)
        folders.append(judged(tmp_path, overrides, ["base"], **settings)[0]["folder"])
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_evaluation_noise_is_its_own(overrides, tmp_path):
    """It depends on eval.seed and not on the experiment's seed, and is none of the training noise."""
    (one,) = judged(tmp_path, overrides, ["base"])
    (same,) = judged(tmp_path, overrides, ["base"], seed=301, exp_name="other")
    (other,) = judged(tmp_path, overrides, ["base"], exp_name="third", **{"eval.seed": 1})
    assert one["values"] == same["values"]
    assert one["values"] != other["values"]
    assert generator(0, "eval", 0).initial_seed() != generator(0, 0, "sample", 0).initial_seed()


def test_prompts_are_taken_in_turn_and_the_last_batch_is_cut(overrides, tmp_path):
    """Five images of three prompts in batches of four: the prompts in turn, five values, five images."""
    (result,) = judged(tmp_path, overrides, ["base"], **{"eval.num_images": 5})
    assert result["shown_prompts"] == [PROMPTS[n % 3] for n in range(5)]
    assert len(result["values"]["reward"]) == result["n_images"] == 5
    assert len(list(tmp_path.rglob("*.png"))) == 5


def test_judging_leaves_the_experiment_alone(workplace, overrides):
    """Only the eval folder is added, a second call changes nothing, and its last line is one JSON object."""
    before = snapshot(workplace)
    arguments = ("--checkpoint=base,last", "--prompts=train,test", "--grid")
    first = run_script(workplace, "eval", overrides, *arguments)
    assert first.code == 0, first.stderr
    after = snapshot(workplace)
    assert {name: after[name] for name in before} == before
    added = {name.removeprefix("model/lora/tiny/").split("/")[0] for name in after.keys() - before.keys()}
    assert added == {"eval", "before_after.png"}
    second = run_script(workplace, "eval", overrides, *arguments)
    assert snapshot(workplace) == after
    line, again = (json.loads(ended.stdout.splitlines()[-1]) for ended in (first, second))
    assert line == again
    assert {"reward", "accuracy", "n_images", "checkpoint"} <= line.keys()
    assert (line["n_images"], line["checkpoint"], line["prompts"]) == (6, "last", "test")
    assert str(experiment(workplace).relative_to(workplace) / "before_after.png") in first.stdout


def test_last_is_the_newest_finished_stage(workplace):
    """By number, not by name: stage10 comes after stage2. What is unfinished, or only looks like a stage, is none."""
    root = experiment(workplace)
    for name in ("stage2", "stage10", "stage9_backup", "stage11"):
        shutil.copytree(root / "stage1", root / name)
    (root / "stage11" / "train.json").unlink()
    assert [stage.index for stage in finished_stages(root, "train")] == [0, 1, 2, 10]
    assert resolve_checkpoint(root, "last").is_relative_to(root / "stage10")
