"""Measuring a checkpoint: the same noise for each, the same numbers each time, and what belongs to an evaluation."""

import contextlib
import importlib
import shutil

import numpy as np
import pytest
import torch
from conftest import PROMPTS, experiment, judged, make_config, ran, run_evaluation, run_stage, snapshot
from PIL import Image
from safetensors.torch import load_file, save_file
from scored import CLIP, JPEG

from b2diffurl.configuration.plan import checked_settings
from b2diffurl.evaluation.generate import SamplerSettings
from b2diffurl.evaluation.measure import prompt_images
from b2diffurl.experiment.evaluation_table import record
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.runtime.files import read_json, write_record
from b2diffurl.runtime.logs import logger

SAMPLERS = {"training": SamplerSettings(num_steps=4, eta=1.0, guidance_scale=5.0)}


def test_judging_the_base_twice_gives_the_same_numbers(overrides, tmp_path):
    """Everything sampled and scored anew: every value is the same, and every image that is kept; by one process, also in a
    run of several.

    Both batches ask for the same three prompts, and draw them from noise of their own.
    """
    batch = {"eval.batch_size": len(PROMPTS)}
    (one,) = run_evaluation(tmp_path, overrides, ["base"], **batch)
    files = snapshot(tmp_path)
    shutil.rmtree(tmp_path / "model")
    (two,) = run_evaluation(tmp_path, overrides, ["base"], num_processes=2, **batch)
    assert one == two
    assert snapshot(tmp_path) == files
    assert len(set(one["values"]["reward"])) == 6


def test_a_lora_that_was_never_updated_equals_the_base(overrides, tmp_path):
    """A stage that selected nothing leaves the base: the same rewards to the bit, image by image, and a gain of 0."""
    run_stage(tmp_path, overrides | {"selection.pos_threshold": 1e9, "selection.neg_threshold": -1e9})
    base, last = run_evaluation(tmp_path, overrides, ["last", "base"])
    assert (base["checkpoint"], last["checkpoint"]) == ("base", "stage0")
    assert base["values"] == last["values"]
    assert (last["reward_gain"], last["reward_gain_se"]) == (0.0, 0.0)


@pytest.mark.parametrize("checkpoints", [["base", "last"], pytest.param(["last"], marks=pytest.mark.long)])
def test_a_rate_of_0_is_a_control(overrides, tmp_path, caplog, monkeypatch, checkpoints):
    """Its LoRA has had updates and is as fresh as at first: a warning, and it is judged, once."""
    monkeypatch.setattr(logger, "propagate", True)
    run_stage(tmp_path, overrides | {"train.learning_rate": 0.0})
    results = run_evaluation(tmp_path, overrides | {"train.learning_rate": 0.0}, checkpoints)
    assert "checkpoint_2/pytorch_lora_weights.safetensors has had" in caplog.text
    assert "is still the base model: none of them moved a weight, as with train.learning_rate=0" in caplog.text
    assert results[-1]["checkpoint"] == "stage0"
    if len(results) == 2:
        assert (results[-1]["reward_gain"], results[-1]["reward_gain_se"]) == (0.0, 0.0)
    caplog.clear()
    run_evaluation(tmp_path, overrides | {"train.learning_rate": 0.0}, checkpoints)
    assert "6 images\n" not in caplog.text.replace("6 images:", "")  # nothing is sampled a second time


@pytest.mark.parametrize(
    ("harmed", "said"),
    [
        pytest.param("00002.png", "00002.png is missing or cut off", marks=pytest.mark.long),
        ("cut", "00003.png is missing or cut off"),
        ("result.json", "result.json is damaged"),
    ],
)
def test_a_damaged_evaluation_is_made_again_when_it_is_asked_for(overrides, tmp_path, caplog, monkeypatch, harmed, said):
    """A picture that is gone or cut, a damaged result: named, and the same files are there afterwards. Without any picture,
    which saves room, the figures are read back."""
    monkeypatch.setattr(logger, "propagate", True)
    (result,) = run_evaluation(tmp_path, overrides, ["base"])
    folder, before = experiment(tmp_path) / result["folder"], snapshot(tmp_path)
    if harmed == "cut":
        (folder / "00003.png").write_bytes((folder / "00003.png").read_bytes()[:-20])
    elif harmed == "result.json":
        (folder / harmed).write_bytes((folder / harmed).read_bytes()[:-20])
    else:
        (folder / harmed).unlink()
    assert run_evaluation(tmp_path, overrides, ["base"]) == [result]
    assert f"{said}" in caplog.text
    assert "this evaluation is made again" in caplog.text
    assert snapshot(tmp_path) == before
    for path in folder.glob("*.png"):
        path.unlink()
    assert run_evaluation(tmp_path, overrides, ["base"]) == [result]
    assert not list(folder.glob("*.png"))


@pytest.mark.parametrize("harmed", ["00002.png", "result.json"])
def test_a_base_that_is_only_compared_with_is_not_made_again(workplace, overrides, caplog, monkeypatch, harmed):
    """Nor does the log say so, whatever of it is damaged."""
    (base,) = run_evaluation(workplace, overrides, ["base"])
    path = experiment(workplace) / base["folder"] / harmed
    path.write_bytes(path.read_bytes()[:-20])
    before = path.read_bytes()
    monkeypatch.setattr(logger, "propagate", True)
    run_evaluation(workplace, overrides, ["last"])
    assert "made again" not in caplog.text
    assert path.read_bytes() == before


def test_images_of_older_stages_go_with_the_next_evaluation(workplace, overrides, caplog):
    """Not those of base, newest stage and best one; the others' figures are read back, and nothing is drawn again."""
    root = experiment(workplace)
    judged = {row["checkpoint"]: row for row in run_evaluation(workplace, overrides, ["base", "stage0", "stage1"])}
    record(root, [judged["stage0"] | {"reward": -1e9}])  # it is not the best

    def pictures() -> dict[str, int]:
        return {name: len(list((root / row["folder"]).glob("*.png"))) for name, row in judged.items()}

    run_evaluation(workplace, overrides, ["base"], **{"keep.eval_images": -1})
    assert pictures() == {"base": 6, "stage0": 6, "stage1": 6}
    run_evaluation(workplace, overrides, ["base"])
    assert pictures() == {"base": 6, "stage0": 0, "stage1": 6}
    caplog.clear()
    again = run_evaluation(workplace, overrides, ["base", "stage0", "stage1"])
    assert {row["checkpoint"]: row for row in again} == judged
    assert "sampler: 6 images" not in caplog.text


def test_a_reward_of_the_users_own(overrides, tmp_path, monkeypatch):
    """`package.module:function` names any function on the Python path: its mean is the reward."""
    (tmp_path / "my_rewards.py").write_text(
        "def redness(images, prompts):\n    return images[..., 0].float().mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    (result,) = run_evaluation(tmp_path, overrides, ["base"], **{"reward.name": "my_rewards:redness", "eval.num_images": 4})
    shown = sorted((experiment(tmp_path) / result["folder"]).glob("*.png"))
    assert result["values"]["reward"] == pytest.approx([np.asarray(Image.open(path))[..., 0].mean() for path in shown])


def test_what_the_last_batch_has_too_much_is_the_last_image(overrides, tmp_path, monkeypatch):
    """So a judge that asks a server, or looks at images one by one, works for the images that count alone."""
    (tmp_path / "counting.py").write_text(
        "different = []\n"
        "def red(images, prompts):\n"
        "    different.append((len(images), len({(i.numpy().tobytes(), p) for i, p in zip(images, prompts)})))\n"
        "    return images[..., 0].float().mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run_evaluation(
        tmp_path, overrides, ["base"], **{"reward.name": "counting:red", "eval.num_images": 5, "eval.batch_size": 4}
    )
    assert importlib.import_module("counting").different == [(4, 4), (4, 1)]


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
        folders.append(run_evaluation(tmp_path, overrides, ["base"], **settings)[0]["folder"])
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3


def test_a_checkpoint_that_draws_the_base_s_images_is_refused(workplace, overrides):
    """Its weights are all zero though its state tells of updates: somebody lost what was learned."""
    folder = Stage(experiment(workplace), 1).checkpoints()[-1]
    elsewhere = shutil.copytree(folder, workplace / "copied")
    weights = load_file(elsewhere / LORA_FILE)
    save_file({name: value * 0 for name, value in weights.items()}, elsewhere / LORA_FILE)
    state = read_json(elsewhere / "state.json")
    del state["files"]  # of an earlier version, which noted no checksums
    write_record(elsewhere / "state.json", state)
    said = r"updates and draws exactly the base model's images"
    with pytest.raises(ValueError, match=said):  # whether the base is judged, too, or not
        run_evaluation(workplace, overrides, [str(elsewhere)])
    with pytest.raises(ValueError, match=said):
        run_evaluation(workplace, overrides, ["base", str(elsewhere)])
    with pytest.raises(ValueError, match=said):  # the base was judged before
        run_evaluation(workplace, overrides, [str(elsewhere)])
    with contextlib.chdir(workplace), pytest.raises(ValueError, match=said):
        prompt_images(checked_settings(make_config(overrides)), str(elsewhere), "a red circle", SAMPLERS["training"])
    shutil.copy(folder / LORA_FILE, elsewhere)
    base, tuned = run_evaluation(workplace, overrides, ["base", str(elsewhere)])
    assert base["images_sha256"] != tuned["images_sha256"]


def test_a_prompt_is_drawn_by_base_and_checkpoint(workplace, overrides):
    """One PNG of two rows on the same noise, which differ; the same bytes each time; base against itself is alike."""
    picture = workplace / judged(workplace, overrides, "--prompt=a red circle", "--sampler=training")["picture"]
    drawn = picture.read_bytes()
    assert Image.open(picture).width > 800
    said = ran(workplace, "eval", overrides, "--prompt=a red circle", "--sampler=training")
    assert said.splitlines()[-1] == f"Drawn: {picture.relative_to(workplace)}"
    assert picture.read_bytes() == drawn
    names = set()
    for arguments in (("--checkpoint=stage0",), ("--checkpoint=base",), ("--sampler=deployed",)):
        names.add(judged(workplace, overrides, "--prompt=a red circle", *arguments)["picture"])
    assert len(names | {str(picture.relative_to(workplace))}) == 4
    with contextlib.chdir(workplace):
        images = prompt_images(checked_settings(make_config(overrides)), "last", "a red circle", SAMPLERS["training"])
        alone = prompt_images(checked_settings(make_config(overrides)), "base", "a red circle", SAMPLERS["training"])
    assert (list(images), list(alone)) == (["base", "stage1"], ["base"])
    base, tuned = images.values()
    assert torch.equal(base, alone["base"])
    assert not torch.equal(base, tuned)
    assert len({image.numpy().tobytes() for image in base}) == len(base)


@pytest.mark.usefixtures("no_pictures")
def test_what_else_belongs_to_an_evaluation(begin):
    """An evaluation without a watched reward is not taken for one with it, though the judge has said the same; nor one of
    other weights, or of another precision, for this one."""
    folder, settings = begin({"eval.judge": JPEG})
    ran(folder, "eval", settings, "--checkpoint=base", "--sampler=training")
    watching = settings | {"reward.watch": (JPEG,)}
    result = judged(folder, watching, "--checkpoint=base", "--sampler=training")
    assert result[JPEG] == result["accuracy"] < 0
    folders = len([*(experiment(folder) / "eval").iterdir()])
    ran(folder, "eval", watching, "--checkpoint=base", "--sampler=training")
    assert len([*(experiment(folder) / "eval").iterdir()]) == folders == 2
    for weight in (1.0, 2.0):
        ran(folder, "eval", settings | {"reward.weights": {CLIP: weight}}, "--checkpoint=base", "--sampler=training")
    ran(folder, "eval", settings | {"reward.dtype": "bfloat16"}, "--checkpoint=base", "--sampler=training")
    assert len([*(experiment(folder) / "eval").iterdir()]) == 5


def test_a_reward_that_changes_what_it_is_given(overrides, tmp_path, monkeypatch):
    """It paints over its images and sorts its prompts: other rewards, diversity and pictures are as without it."""
    (tmp_path / "painter.py").write_text(
        "def brightness(images, prompts):\n    return images.float().mean((1, 2, 3))\n\n\n"
        "def zeroing(images, prompts):\n    mean = brightness(images, prompts)\n    images.zero_()\n"
        "    prompts.sort(reverse=True)\n    prompts[:] = prompts[:1] * len(prompts)\n    return mean\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"reward.watch": (JPEG, CLIP), "eval.judge": "shapes", "eval.diversity": ("clip", "layout")}
    (gentle,) = run_evaluation(tmp_path, overrides, ["base"], **settings, **{"reward.name": "painter:brightness"})
    (rough,) = run_evaluation(tmp_path, overrides, ["base"], **settings, **{"reward.name": "painter:zeroing"})
    identity = ("conditions", "folder", "content_sha256")
    assert {key: rough[key] for key in rough if key not in identity} == {
        key: gentle[key] for key in gentle if key not in identity
    }
    assert len(set(rough["values"][CLIP])) > 1
