"""Sampling a stage: branches or independent images against stock diffusers, evaluations counted, and what is not finite."""

import json

import pytest
import torch
from conftest import experiment, json_lines, run_stage, snapshot, stage_of
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from b2diffurl.algorithm.seeding import generator
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models.stable_diffusion import StableDiffusion


def test_a_non_finite_stage_is_not_sampled(finished, overrides, tmp_path):
    """A policy that has turned to NaN stops in sampling: what is needed to look into it is on disk, the error names batch
    and groups, and no sample is written."""
    stage, lora = Stage(experiment(tmp_path), 0), tmp_path / LORA_FILE
    trained = Stage(experiment(finished), 1).checkpoints()[-1] / LORA_FILE
    save_file({name: torch.full_like(value, 3e38) for name, value in load_file(trained).items()}, lora)
    with pytest.raises(FloatingPointError, match=r"batch_00000.*groups \[0, 1\]"):
        run_stage(tmp_path, overrides | {"resume_from": str(lora)})
    assert [path.relative_to(stage.folder).as_posix() for path in stage.folder.rglob("*.*")] == [
        "debug/batch_00000.safetensors"
    ]
    assert load_file(stage.debug / "batch_00000.safetensors")["log_probs"].isnan().any()


INDEPENDENT = {"sampling": "independent"}


def test_independent_siblings_share_nothing_but_their_prompt(overrides, models, tmp_path):
    """Each image is its own run of stock diffusers from its own noise, under its group's prompt; the last S + 1 states of
    each are stored, and no two siblings have a first one in common."""
    run_stage(tmp_path, overrides | INDEPENDENT, verbs=["sample"])
    stage, num_steps = stage_of(tmp_path), 2
    found = load_file(stage.batch(0))
    assert found["latents"].shape == (2, 3, num_steps + 1, 4, 8, 8)
    assert found["log_probs"].shape == (2, 3, num_steps)
    first = found["latents"][:, :, 0].flatten(0, 1).flatten(1)
    cosine = torch.cosine_similarity(first[:, None], first[None], dim=-1) - torch.eye(6)
    assert cosine.abs().max() < 0.5

    stock = StableDiffusionPipeline.from_pretrained(models / "sd")
    scheduler = DDIMScheduler.from_config(stock.scheduler.config)
    scheduler.set_timesteps(4)
    asked = json.loads(stage.prompts.read_text())[:6]
    assert asked[0] == asked[1] == asked[2] and asked[3] == asked[4] == asked[5]
    text, without = stock.encode_prompt(asked, torch.device("cpu"), 1, True)
    rng = generator(300, 0, "sample", 0)
    x = torch.randn(6, 4, 8, 8, generator=rng)
    for t in scheduler.timesteps:
        with torch.no_grad():
            eps = stock.unet(x, t, without).sample
            eps = eps + 5.0 * (stock.unet(x, t, text).sample - eps)
        noise = torch.randn(6, 4, 8, 8, generator=rng)
        x = scheduler.step(eps, t, x, eta=1.0, variance_noise=noise).prev_sample
    torch.testing.assert_close(found["latents"][:, :, -1].flatten(0, 1), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sampling", "evaluations"), [("branch", 6 * 2 + 18 * 2), ("independent", 18 * 4)])
def test_evaluations_are_counted(overrides, tmp_path, monkeypatch, sampling, evaluations):
    """The manifest's num_evaluations is the number of images, or prefixes of them, that the network saw at one step or
    another: branches share those of their prefix."""
    seen, predict = [], StableDiffusion.predict

    def counting(self, x_t: Tensor, *arguments) -> Tensor:
        seen.append(len(x_t))
        return predict(self, x_t, *arguments)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    run_stage(tmp_path, overrides | {"sampling": sampling}, verbs=["sample"])
    assert stage_of(tmp_path).manifest("sample")["num_evaluations"] == sum(seen) == evaluations
    assert json_lines(stage_of(tmp_path).metrics("sample"))[-1]["num_evaluations"] == evaluations


@pytest.mark.parametrize("sampling", ["branch", "independent"])
def test_a_stage_of_single_siblings(stage_with, sampling):
    """K = 1 and selection all: every phase ends, spread inside groups is 0, and no file holds a NaN or an infinity."""
    stage = stage_of(stage_with(**{"split_time": 1, "eval.selection": "all", "sampling": sampling}))
    assert len(json.loads(stage.selection.read_text())) == stage.manifest("sample")["num_images"] == 6
    assert stage.manifest("select")["reward_group_std"] == 0.0
    assert stage.manifest("train")["num_updates"] == 4

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for path in [*stage.folder.rglob("*.json"), *stage.folder.rglob("*.jsonl")]:
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=refuse)


def test_single_branches_are_independent_images(stage_with):
    """With K = 1 both kinds of sampling, and all that follows from it, are the same to the bit."""
    one, other = (
        stage_of(stage_with(**{"split_time": 1, "eval.selection": "all", "sampling": sampling}))
        for sampling in ("branch", "independent")
    )
    assert snapshot(one.images) == snapshot(other.images)
    for path in one.samples.iterdir():
        tensors, others = load_file(path), load_file(other.samples / path.name)
        assert all(torch.equal(value, others[key]) for key, value in tensors.items())
    lora = [load_file(stage.checkpoints()[-1] / LORA_FILE) for stage in (one, other)]
    assert all(torch.equal(value, lora[1][key]) for key, value in lora[0].items())
