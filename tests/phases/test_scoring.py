"""Scoring a stage: what is watched, images read ahead and in order, models loaded once, parts of any form."""

import contextlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import (
    experiment,
    judged,
    make_config,
    ran,
    refuse,
    stage_of,
)
from PIL import Image
from scored import JPEG, NUM_IMAGES, REDNESS, jpeg_kb, pixels, redness, scores
from transformers import PreTrainedModel

from b2diffurl.configuration.settings import read_settings
from b2diffurl.phases.scoring import Batches, score_images
from b2diffurl.rewards import load_reward
from b2diffurl.runtime import files

CPU = torch.device("cpu")


@pytest.mark.usefixtures("no_pictures")
def test_a_watched_reward_is_recorded_and_changes_nothing(begin, sampled, module):
    """What is watched stands in scores.jsonl, with its parts, and in the metrics; rewards, parts and selection are what they
    are without it. run_eval.py reports it beside the reward."""
    mine = module(REDNESS + "def both(images, prompts):\n    return redness(images, prompts), {'said': list(prompts)}\n")
    folder, settings = begin({})
    ran(folder, "select", settings)
    without, chosen = scores(folder), stage_of(folder).selection.read_bytes()
    assert all("watch" not in row for row in without)
    shutil.rmtree(folder)
    folder, settings = begin({"reward.watch": (JPEG, f"{mine}:both")})
    ran(folder, "select", settings)
    assert stage_of(folder).selection.read_bytes() == chosen
    rows = scores(folder)
    watched = [row.pop("watch") for row in rows]
    assert rows == without
    for seen, image, row in zip(watched, pixels(folder), rows, strict=True):
        assert seen.pop(f"{mine}:both/said") == row["prompt"]
        assert seen == pytest.approx({JPEG: -jpeg_kb(image), f"{mine}:both": redness(image)}, rel=1e-5)
    (metrics,) = map(json.loads, stage_of(folder).metrics("select").read_text().splitlines())
    assert metrics[f"watch/{JPEG}_mean"] == pytest.approx(np.mean([seen[JPEG] for seen in watched]), rel=1e-6)
    result = judged(folder, settings, "--checkpoint=base", "--sampler=training", "--prompts=train")
    assert result[JPEG] < 0 < result[f"{mine}:both"]


def unselect(folder: Path, index: int) -> dict[str, bytes]:
    """Leave the stage as it was before run_select.py; what was selected and scored then."""
    stage = stage_of(folder, index)
    before = {path.name: path.read_bytes() for path in (stage.selection, stage.scores)}
    for verb in ("select", "train"):
        stage.manifest_path(verb).unlink()
    shutil.rmtree(stage.folder / "checkpoints")
    for path in (stage.selection, stage.scores):
        path.unlink()
    return before


def test_who_watches_may_change_and_what_is_trained_may_not(workplace, overrides, models, tmp_path):
    """From stage to stage a judge and its settings may come and go; another model of the trained reward is refused."""
    before = unselect(workplace, 1)
    second = overrides | {"run_name": "stage1"}
    moved = shutil.copytree(models / "clip", tmp_path / "moved")
    refuse(workplace, "select", second | {"reward.clip.model": str(moved)}, "reward.clip.model is .*moved.*, was ")
    refuse(workplace, "select", second | {"reward.name": JPEG}, f"reward.name is '{JPEG}', was 'clip'")
    refuse(workplace, "select", second | {"reward.weights": {"clip": 1.0}}, r"reward.weights is {'clip': 1.0}, was None")
    refuse(workplace, "select", second | {"reward.dtype": "bfloat16"}, "reward.dtype is 'bfloat16', was 'auto'")
    watching = {"reward.watch": ("pickscore",), "reward.pickscore.model": str(moved)}
    ran(workplace, "select", second | watching)
    assert stage_of(workplace, 1).selection.read_bytes() == before["selection.json"]
    scale = float(np.exp(2.6592))
    for row in scores(workplace, 1):
        assert row["watch"]["pickscore"] == pytest.approx(scale * row["reward"], rel=1e-4)


def test_an_experiment_begun_before_goes_on(workplace, overrides):
    """Its config.json has reward.model and none of the keys that came later; it selects the same. Another model is refused
    there as well."""
    before = unselect(workplace, 1)
    path = experiment(workplace) / "config.json"
    recorded = files.read_json(path)
    model = recorded["config"]["reward"]["clip"]["model"]
    recorded["config"]["reward"] = {"name": "clip", "model": model, "batch_size": 4}
    files.write_record(path, recorded)
    second = overrides | {"run_name": "stage1"}
    refuse(workplace, "select", second | {"reward.clip.model": "another/clip"}, "reward.clip.model is .*, was ")
    ran(workplace, "select", second)
    stage = stage_of(workplace, 1)
    assert {path.name: path.read_bytes() for path in (stage.selection, stage.scores)} == before


@pytest.mark.parametrize("content", [b"", b"not a picture", "half"])
def test_an_image_that_cannot_be_read(begin, sampled, tmp_path, content):
    """run_select.py notices that a file is not what was written; reading it anyway names it as well."""
    folder, settings = begin({})
    path = stage_of(folder).image(3)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if content == "half" else content)
    refuse(folder, "select", settings, r"00003\.png.*checksum")
    with pytest.raises(ValueError, match=r"00003\.png cannot be read as an image"):
        files.read_image(path)
    path.unlink()
    refuse(folder, "select", settings, r"00003\.png is missing")
    with pytest.raises(ValueError, match=r"00003\.png cannot be read as an image"):
        files.read_image(path)


# ---- how it runs ----


@pytest.fixture
def scored(begin, overrides) -> Callable:
    """scored(batch_size, num_workers) -> JPEG sizes of the sampled stage's images."""
    folder, settings = begin({})
    rewards = read_settings(make_config(settings)).rewards
    reward, stage = load_reward("jpeg_incompressibility", rewards, CPU), stage_of(folder)

    def run(batch_size: int, num_workers: int, reward=reward) -> list[float]:
        prompts = json.loads(stage.prompts.read_text())
        found = score_images("jpeg", reward, Batches(stage, prompts, batch_size), num_workers=num_workers)
        return torch.cat([batch.rewards for batch in found]).tolist()

    run.stage = stage
    return run


@pytest.mark.parametrize(("batch_size", "num_workers"), [(4, 1), (4, 4), (5, 3), (1, 2), (18, 1), (50, 4)])
def test_reading_ahead_changes_nothing(scored, batch_size, num_workers):
    """Any number of readers, a batch size that divides or does not or is too large: each image its own score, in order."""
    images = [np.asarray(Image.open(scored.stage.image(n))) for n in range(NUM_IMAGES)]
    assert scored(batch_size, num_workers) == pytest.approx([jpeg_kb(image) for image in images], rel=1e-6)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("num_workers", [1, 4])
def test_an_unreadable_image_among_many_is_named(scored, num_workers):
    """In whichever batch it is, the error names it and comes at once."""
    for number in (17, 9, 0):
        scored.stage.image(number).write_bytes(b"\x89PNG")
        with pytest.raises(ValueError, match=f"{number:05d}.png cannot be read") as raised:
            scored(4, num_workers)
        first = number // 4 * 4
        assert f"images {first} to {min(first + 3, 17)} of" in raised.value.__notes__[0]


@pytest.mark.timeout(30)
def test_the_next_batch_is_read_while_one_is_scored(scored):
    """While the first batch is scored a reader waits at the second's first image, here a pipe that nobody fills."""
    pipe, opened = scored.stage.image(4), []
    pipe.unlink()
    os.mkfifo(pipe)

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        for _ in range(1000):
            with contextlib.suppress(OSError):  # there is no reader yet
                opened.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                break
            time.sleep(0.01)
        for descriptor in opened:
            os.close(descriptor)
        if not opened:  # whoever reads it later must not wait for ever
            pipe.unlink()
        return torch.zeros(len(prompts))

    with pytest.raises(ValueError, match=r"00004\.png cannot be read"):
        scored(4, 4, reward)
    assert opened


def test_a_model_is_loaded_once_a_stage(begin, models, tmp_path, monkeypatch):
    """One load for each reward that needs a model, however many batches there are; the captioner's and the scorer's too."""
    loaded, load = [], PreTrainedModel.from_pretrained.__func__

    def counting(cls, *args, **kwargs):
        loaded.append(cls.__name__)
        return load(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counting))
    tiny.aesthetic_head(tmp_path / "head", tiny.WIDTH)
    local = {"pickscore.model": models / "clip", "aesthetic.clip": models / "clip",
             "aesthetic.head": tmp_path / "head" / "head.pth", "bertscore.captioner": tiny.llava(tmp_path / "llava"),
             "bertscore.scorer": tiny.deberta(tmp_path / "deberta"), "bertscore.question": "what is this ?",
             "bertscore.num_layers": 2, "bertscore.max_new_tokens": 4}  # fmt: skip
    local = {f"reward.{key}": value if isinstance(value, int) else str(value) for key, value in local.items()}
    folder, settings = begin(
        local | {"reward.weights": {"clip": 1.0, "aesthetic": 0.1, "bertscore": 1.0}, "reward.watch": ("pickscore",)}
    )
    loaded.clear()
    ran(folder, "select", settings)
    assert Counter(loaded) == {"CLIPModel": 3, "LlavaForConditionalGeneration": 1, "DebertaModel": 1}
    for row in scores(folder):
        assert isinstance(row["parts"]["bertscore/caption"], str)
        assert row["parts"]["bertscore"] == row["parts"]["bertscore/recall"] > 0


def test_the_checker_on_prompts_of_different_forms(begin, overrides, tmp_path):
    """The checker's `relation` is there for the prompts that have one, wherever in the stage they come."""
    (tmp_path / "mixed.txt").write_text("a red circle\n" * 5 + "a red circle left of a blue square\n")
    settings = overrides | {"reward.name": "shapes", "eval.diversity": (), "prompt_random_choose": 0}
    settings |= {"prompt_file": str(tmp_path / "mixed.txt")}
    folder = tmp_path / "mixed"
    folder.mkdir()
    for verb in ("sample", "select"):
        ran(folder, verb, settings)
    rows = scores(folder)
    asked = ["left of" in row["prompt"] for row in rows]
    assert sum(asked) == 3
    assert all(row["parts"]["relation"] is not None for row, relation in zip(rows, asked, strict=True) if relation)
    assert rows[0]["parts"]["relation"] is None
