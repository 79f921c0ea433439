"""What is not finite stops a phase and leaves its evidence, until the phase is mended.

18 images of 6 groups, K = 3 siblings
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, flags, ran, run_script, run_stage, stage_of
from PIL import Image
from safetensors.torch import load_file, save_file

from b2diffurl.configuration.keys import KEYS, Key
from b2diffurl.configuration.limits import Number
from b2diffurl.experiment.metrics import read_events
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.runtime import files

REWARD = "rewards_of_test_watch"


def refused(folder: Path, verb: str, settings: dict) -> tuple[str, dict, dict]:
    """The message of a script that must stop with exit code 2, and the metadata and tensors of the evidence it names."""
    ended = run_script(folder, verb, settings)
    assert ended.code == 2, ended.stdout + ended.stderr
    message, hint = ended.stderr.splitlines()
    assert "run the same command again" in hint
    assert not any(stage_of(folder, index).finished(verb) for index in (0, 1) if stage_of(folder, index).debug.exists())
    path = folder / re.search(r"what they came from is in (\S+)", message)[1]
    assert path.parent.name == "debug"
    return message, files.read_metadata(path), load_file(path)


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """write(source): the body of a reward of the name that `settings` has."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> None:
        source = f"def redness(images, prompts):\n    values = images[..., 0].float().mean((1, 2)) / 255\n{body}"
        (tmp_path / f"{REWARD}.py").write_text(source)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        sys.modules.pop(REWARD, None)

    yield write
    sys.modules.pop(REWARD, None)


def test_a_reward_of_nan_is_kept_and_mended(overrides, reward, tmp_path):
    """NaN for image 5 alone: its id, prompt, reward and parts are in debug/, nothing is selected; when the reward is mended
    the same command leaves what a run leaves that never failed."""
    settings = overrides | {"reward.name": f"{REWARD}:redness"}
    sound = "    return values, {'half': values / 2, 'note': ['seen'] * len(images)}\n"
    reward(sound)
    broken, healthy = tmp_path / "broken", tmp_path / "healthy"
    broken.mkdir()
    run_stage(broken, settings, verbs=["sample"])
    shutil.copytree(broken, healthy)
    red = np.asarray(Image.open(stage_of(broken).image(5)))[..., 0].astype(int)
    reward(  # by where its red is, for two images may have as much of it
        f"    values[images[..., 0].flatten(1).long().cumsum(1).sum(1) == {red.cumsum().sum()}] = float('nan')\n{sound}"
    )
    message, facts, tensors = refused(broken, "select", settings)
    assert "redness is not finite for images [5] of" in message
    prompts = json.loads(stage_of(broken).prompts.read_text())
    assert facts == {"images": [5], "prompts": [prompts[5]], "texts": {f"{REWARD}:redness/note": ["seen"]}}
    assert tensors.keys() == {f"{REWARD}:redness", f"{REWARD}:redness/half", "(weighted sum)"}
    assert all(tensor.shape == (1,) and tensor.isnan().all() for tensor in tensors.values())
    assert not stage_of(broken).selection.exists()
    reward(sound)
    for folder in (broken, healthy):
        ran(folder, "select", settings)
    assert_same(broken, healthy)
    assert not stage_of(broken).debug.exists()


def test_a_lora_that_overflows_is_kept_and_mended(finished, overrides, tmp_path):
    """Weights near float32's end: the first batch's images are named, and their states kept; with the file mended the same
    command leaves what a run leaves that never failed."""
    sound = stage_of(finished, 1).checkpoints()[-1] / LORA_FILE
    weights = load_file(sound)
    name = next(name for name in weights if "lora_B" in name)
    lora, broken, healthy = tmp_path / LORA_FILE, tmp_path / "broken", tmp_path / "healthy"
    settings = overrides | {"resume_from": str(lora)}
    save_file(weights | {name: weights[name].index_fill(0, torch.tensor([0]), 3e38)}, lora)
    for folder in (broken, healthy):
        folder.mkdir()
    message, facts, tensors = refused(broken, "sample", settings)
    assert (
        "batch_00000.safetensors: log-probabilities or latents of images [0, 1, 2, 3, 4, 5], groups [0, 1], are not"
        in message
    )
    assert (facts["images"], facts["groups"], len(facts["prompts"])) == ([*range(6)], [0, 1], 2)
    assert tensors["log_probs"].shape == (2, 3, 2) and not tensors["log_probs"].isfinite().any()
    assert tensors["latents"].shape == (2, 3, 3, 4, 8, 8)
    assert [path.name for path in stage_of(broken).folder.iterdir()] == ["debug"]
    shutil.copy(sound, lora)
    for folder in (broken, healthy):
        ran(folder, "sample", settings)
    assert_same(broken, healthy)


def test_images_that_overflow_are_kept_and_mended(overrides, models, tmp_path):
    """A decoder with weights near float32's end: the batch's images are named and their latents kept. With the file
    mended the same command goes on."""
    base = shutil.copytree(models / "sd", tmp_path / "sd")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    sound = path.read_bytes()
    save_file(load_file(path) | {"decoder.conv_out.weight": torch.full((3, 4, 3, 3), 3e38)}, path)
    settings = overrides | {"pretrained.model": str(base)}
    message, facts, tensors = refused(tmp_path, "sample", settings)
    assert "among images [0, 1, 2, 3, 4, 5] the VAE decoded to non-finite values; use --config.mixed_precision" in message
    assert facts["images"] == [*range(6)]
    assert tensors["latents"].shape == (6, 4, 8, 8)
    assert tensors["latents"].isfinite().all()
    path.write_bytes(sound)
    ran(tmp_path, "sample", settings)
    assert not stage_of(tmp_path).debug.exists()


def test_advantages_that_overflow(overrides, tmp_path, monkeypatch):
    """A weight of 1e38 for good images: losses are finite, the gradient is not, and no parameter is stepped; one of 3.3e38:
    the advantage itself is beyond a float32."""
    monkeypatch.setitem(KEYS, "train.beta1", Key(Number("[0, 1e39]")))
    for weight, verb, said in ((1e38, "train", "the gradient is not finite, though the losses of images"),
                               (3.3e38, "select", "advantages of images")):  # fmt: skip
        folder = tmp_path / f"{weight:g}"
        settings = overrides | {"train.beta1": weight}
        folder.mkdir()
        run_stage(folder, settings, verbs=["sample"])
        if verb == "train":
            ran(folder, "select", settings)
        message, facts, tensors = refused(folder, verb, settings)
        assert said in message
        assert set(facts["images"]) <= set(range(18))
        assert facts["images"]
        assert not stage_of(folder).checkpoints()
        if verb == "select":
            assert tensors["advantages"].isinf().sum() == len(facts["images"])
            continue
        rows = json.loads(stage_of(folder).selection.read_text())
        assert set(facts["images"]) <= {row["id"] for row in rows}
        assert (facts["update"], facts["grad_norm"], facts["timesteps"]) == (0, "inf", [251, 1])
        assert tensors["losses"].shape == (len(facts["images"]), 2)
        assert tensors["losses"].isfinite().all()
        assert tensors["losses"].abs().max() > 1e37
        gradients = {name: value for name, value in tensors.items() if name.startswith("gradient.")}
        assert gradients
        assert max(value.abs().max() for value in gradients.values()) > 1e18  # whose square is beyond a float32


@pytest.mark.parametrize("which", ["loss", "log_ratio"])
def test_what_overflows_in_training_is_kept_and_mended(workplace, finished, overrides, harm, monkeypatch, which):
    """In the second epoch the loss of the first image of each micro-batch is inf; or its log-ratio, of which clipping leaves
    no trace in loss and gradient. Those images are named, with states and losses. The same command goes on from the first
    epoch and ends in the bits of a run that never failed."""
    stage = stage_of(workplace, 1)
    bad = sum(event["epoch"] == 1 for event in read_events(stage.metrics("train"), "update"))
    for path in (stage.manifest_path("train"), stage.metrics("train")):
        path.unlink()
    shutil.rmtree(stage.folder / "checkpoints")

    def overflowing(num_updates, loss, metrics):
        factor = torch.where((torch.arange(len(loss)) == 0) & (num_updates == bad), torch.inf, 1.0)
        if which == "loss":
            return loss * factor, metrics
        return loss, metrics | {"log_ratio": metrics["log_ratio"].where(factor == 1, -torch.inf)}

    harm(overflowing)
    settings = overrides | {"run_name": "stage1"}
    message, facts, tensors = refused(workplace, "train", settings)
    assert f"stage1, update {bad}: the loss or log-probability of images {facts['images']} is not finite" in message
    assert [path.name for path in stage.checkpoints()] == ["checkpoint_1"]
    rows = [facts["images_of_losses"].index(image) for image in facts["images"]]
    assert 0 < len(rows) < len(facts["images_of_losses"])
    found = tensors["losses" if which == "loss" else "log_ratios"]
    assert (~found.isfinite()).any(1).nonzero().flatten().tolist() == rows
    assert tensors["latents"].shape == (len(rows), 4, 4, 8, 8)
    gradients = [value for name, value in tensors.items() if name.startswith("gradient.")]
    assert gradients
    assert all(value.isfinite().all() for value in gradients) == (which == "log_ratio")
    monkeypatch.undo()
    ran(workplace, "train", settings)
    assert_same(workplace, finished)


ONE_RANK_OVERFLOWS = """
import os, runpy, sys, torch
from dataclasses import replace
from functools import wraps
from b2diffurl.objectives import OBJECTIVES
from b2diffurl.phases.trainer import Trainer

sound, update, running = OBJECTIVES["ddpo"], Trainer.update, []

def noted(self, *given):
    running[:] = [self]
    return update(self, *given)

@wraps(sound.loss)
def loss(*tensors, **options):
    found, metrics = sound.loss(*tensors, **options)
    return found * (torch.inf if (os.environ["RANK"], running[0].num_updates) == ("1", 1) else 1.0), metrics

Trainer.update, OBJECTIVES["ddpo"] = noted, replace(sound, loss=loss)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_all_processes_stop_where_one_meets_what_is_not_finite(overrides, tmp_path):
    """Of two the second has a loss of inf: both know, name its images and end with code 2, the first if torchrun has not
    ended it by then."""
    run_stage(tmp_path, overrides, verbs=["sample", "select"])
    (tmp_path / "spy.py").write_text(ONE_RANK_OVERFLOWS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "spy.py"]
    script = [str(ROOT / "run_train.py"), f"--config={ROOT}/config/stage_process.py:sd14", *flags(overrides)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([*launch, *script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0
    found = {path.stem[-1]: files.read_metadata(path)["images"] for path in stage_of(tmp_path).debug.glob("*.safetensors")}
    assert f"stage0, update 1: the loss or log-probability of images {found['1']} is not finite" in ended.stderr
    assert set(re.findall(r"exitcode +: (-?\d+) ", ended.stderr)) <= {"2", "-15"}
    assert found.get("0", found["1"]) == found["1"]
    assert [path.name for path in stage_of(tmp_path).checkpoints()] == []
