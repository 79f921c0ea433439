"""What a later phase would refuse is refused at the start."""

import importlib.util

import pytest
import tiny
from conftest import (
    experiment,
    refuse,
    run_script,
)


def test_more_steps_than_the_scheduler_has_are_refused_before_sampling(overrides, tmp_path):
    """Not after the training, when the run is judged by it."""
    ended = run_script(tmp_path, "sample", overrides | {"eval.deployed.num_steps": 1001})
    assert ended.code == 2
    assert "1001" in ended.stderr
    assert not experiment(tmp_path).exists()


HUB_KEYS = {
    "clip": ("clip.model",),
    "pickscore": ("pickscore.model",),
    "aesthetic": ("aesthetic.clip", "aesthetic.head"),
    "bertscore": ("bertscore.captioner", "bertscore.scorer"),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in HUB_KEYS.items() for key in keys])
def test_a_model_out_of_reach(begin, overrides, tmp_path, name, key):
    """Offline, the id of a reward's model that is not here is named within seconds, with the command that gets it, before
    any sampling and again in selecting; as a judge that watches, too."""
    zoo = {"clip": tiny.clip(tmp_path / "clip"), "head": tmp_path / "head" / "head.pth"}
    tiny.aesthetic_head(tmp_path / "head", tiny.WIDTH)
    here = {
        "clip.model": zoo["clip"],
        "pickscore.model": zoo["clip"],
        "aesthetic.head": zoo["head"],
    }
    here |= {"aesthetic.clip": zoo["clip"], "bertscore.captioner": zoo["clip"], "bertscore.scorer": zoo["clip"]}
    missing = {f"reward.{other}": str(path) for other, path in here.items()} | {f"reward.{key}": "nobody/no-model"}
    missing |= {"eval.diversity": ()}
    folder, settings = begin(missing | {"reward.name": name})
    for verb in ("sample", "select"):
        refuse(folder, verb, settings, "nobody/no-model .*hf download nobody/no-model")
    if name != "clip":
        refuse(folder, "select", settings | {"reward.name": "clip", "reward.watch": (name,), "exp_name": "other"}, "nobody")


@pytest.mark.parametrize("name", ["image_reward", "hps_v2", "vqascore"])
def test_imscore_that_is_not_installed(empty, overrides, monkeypatch, name):
    """The pip command stands in the error, before any sampling."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "imscore" else find(name, *more))
    refuse(empty, "sample", overrides | {"reward.name": name}, f"{name} needs.*pip install -r requirements-rewards")


def test_an_unknown_reward_in_selecting(begin):
    """The names there are, are named; also for a function that is not in its module, and a module that is not there."""
    folder, settings = begin({"reward.name": "beauty"})
    refuse(folder, "select", settings, "unknown reward 'beauty'.*clip, pickscore.*shapes, http, file.*module:function")
