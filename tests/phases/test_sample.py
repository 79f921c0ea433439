"""Sampling a stage: branches or independent images against stock diffusers, evaluations counted, and what is not finite."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from conftest import experiment, json_lines, run_stage, snapshot, stage_of, updates_of
from diffusers import DDIMScheduler, StableDiffusionPipeline
from gaussian import GaussianWorld
from safetensors.torch import load_file, save_file
from torch import Tensor

from b2diffurl.algorithm.seeding import generator
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import Outside, read_settings
from b2diffurl.experiment.stage import LORA_FILE, Stage
from b2diffurl.models.policy import decode, predictor
from b2diffurl.models.stable_diffusion import StableDiffusion
from b2diffurl.phases.sample import make_sampler
from b2diffurl.runtime import threads
from b2diffurl.runtime.files import read_image


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


def test_a_stage_s_table_takes_each_eta_in_its_place(config):
    """Steps 0 and 1 of eight by prefix_eta, the window by eta, and two of the four after it by suffix_eta; where an eta is
    not given it is the window's."""
    config.sample.num_steps = 8
    world, sampling, window = GaussianWorld(), read_settings(config).sampling, Window(2, 4)
    whole, weak, still = (world.sampler(8, eta) for eta in (1.0, 0.5, 0.0))
    plain = make_sampler(world, sampling, window)
    assert all(torch.equal(one, other) for one, other in zip(plain.columns, whole.columns, strict=True))
    found = make_sampler(world, replace(sampling, outside=Outside(0.5, 0.0, 2)), window)
    assert torch.equal(found.timesteps, whole.timesteps[[0, 1, 2, 3, 4, 6]])
    assert torch.equal(found.sigma, torch.cat([weak.sigma[:2], whole.sigma[2:4], still.sigma[:2]]))
    assert not found.sigma[4:].any()


@pytest.mark.parametrize(
    ("settings", "evaluations"),
    [
        ({}, 6 * 2 + 18 * 2),
        ({"sampling": "independent"}, 18 * 4),
        ({"split_step_left": 3, "split_stop": 2}, 6 * 1 + 18 * (1 + 2)),
        ({"curriculum": "early", "sample.suffix_eta": 0.0, "sample.suffix_steps": 1}, 18 * (2 + 1)),
    ],
    ids=str,
)
def test_evaluations_are_counted(overrides, tmp_path, monkeypatch, settings, evaluations):
    """The manifest's num_evaluations is the number of images, or prefixes of them, that the network saw at one step or
    another: branches share those of their prefix."""
    seen, predict = [], StableDiffusion.predict

    def counting(self, x_t: Tensor, *arguments) -> Tensor:
        seen.append(len(x_t))
        return predict(self, x_t, *arguments)

    monkeypatch.setattr(StableDiffusion, "predict", counting)
    run_stage(tmp_path, overrides | settings, verbs=["sample"])
    assert stage_of(tmp_path).manifest("sample")["num_evaluations"] == sum(seen) == evaluations
    assert json_lines(stage_of(tmp_path).metrics("sample"))[-1]["num_evaluations"] == evaluations


MOVING = {
    "sliding": {"curriculum": "sliding", "sample.suffix_eta": 0.0, "sample.suffix_steps": 1},
    "early": {"curriculum": "early", "split_step_left": 1, "split_step_right": 2, "sample.suffix_eta": 0.0}
    | {"sample.suffix_steps": 2, "sample.prefix_eta": 0.0},
}


@pytest.mark.parametrize(
    ("curriculum", "windows"),
    [pytest.param("sliding", [[0, 2], [2, 4]], marks=pytest.mark.long), ("early", [[0, 1], [0, 2]])],
)
def test_a_run_in_moving_windows(overrides, tmp_path, curriculum, windows):
    """Two stages from samples to LoRA: records and files have the windows, every first ratio is 1, and the images are those
    that the tail leads to. A batch that was lost is sampled again to the same bits."""
    settings = overrides | MOVING[curriculum]
    for index, (start, stop) in enumerate(windows):
        run_stage(tmp_path, settings, index)
        stage, timesteps = stage_of(tmp_path, index), [751, 501, 251, 1][start:stop]
        sampled, trained = stage.manifest("sample"), stage.manifest("train")
        assert sampled["window"] == sampled["policy"]["window"] == trained["window"] == [start, stop]
        assert sampled["num_trained_steps"] == trained["num_trained_steps"] == stop - start
        assert abs(trained["max_abs_log_ratio_first_update"]) < 1e-5
        assert all(update["timesteps"] == timesteps for update in updates_of(stage))
        batch = load_file(stage.batch(0))
        assert batch["timesteps"].tolist() == timesteps
        assert batch["latents"].shape[:3] == (2, 3, stop - start + 1)
    before = snapshot(stage.folder)
    stage.batch(1).unlink()
    stage.manifest_path("sample").unlink()
    run_stage(tmp_path, settings, 1, verbs=["sample"])
    changed = {name for name, data in snapshot(stage.folder).items() if data != before[name]}
    assert changed <= {"sample.json", "metrics/sample.jsonl"}


def test_images_are_what_the_tail_leads_to(overrides, models, tmp_path):
    """From the last state of the window a deterministic DDIMScheduler of diffusers takes two of the three steps that are
    left: what it ends with, decoded, is the image on disk."""
    run_stage(tmp_path, overrides | MOVING["early"] | {"split_step_right": 1}, verbs=["sample"])
    stage, pipeline = stage_of(tmp_path), StableDiffusionPipeline.from_pretrained(models / "sd")
    x = load_file(stage.batch(0))["latents"][:, :, -1].flatten(0, 1)
    alphas = pipeline.scheduler.alphas_cumprod.double()
    text, without = pipeline.encode_prompt(json.loads(stage.prompts.read_text())[:6], torch.device("cpu"), 1, True)
    for t, following in ((501, 251), (251, 0)):
        with torch.no_grad():
            eps = pipeline.unet(x, t, without).sample
            eps = eps + 5.0 * (pipeline.unet(x, t, text).sample - eps)
        x_0 = (x - (1 - alphas[t]).sqrt() * eps) / alphas[t].sqrt()
        x = (alphas[following].sqrt() * x_0 + (1 - alphas[following]).sqrt() * eps).float()
    with torch.no_grad():
        pixels = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    expected = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    found = torch.stack([read_image(stage.image(n)) for n in range(6)])
    assert (found.float() - expected).abs().max() <= 1


@pytest.mark.parametrize("sampling", ["branch", "independent"])
def test_a_stage_of_single_siblings(stage_with, sampling):
    """K = 1 and selection all: every phase ends, spread inside groups is 0, and no file holds a NaN or an infinity."""
    stage = stage_of(stage_with(**{"split_time": 1, "selection.images": "all", "sampling": sampling}))
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
        stage_of(stage_with(**{"split_time": 1, "selection.images": "all", "sampling": sampling}))
        for sampling in ("branch", "independent")
    )
    assert snapshot(one.images) == snapshot(other.images)
    for path in one.samples.iterdir():
        tensors, others = load_file(path), load_file(other.samples / path.name)
        assert all(torch.equal(value, others[key]) for key, value in tensors.items())
    lora = [load_file(stage.checkpoints()[-1] / LORA_FILE) for stage in (one, other)]
    assert all(torch.equal(value, lora[1][key]) for key, value in lora[0].items())


# ---- side by side ----


def test_side_by_side_images_are_the_same(models, side_by_side, monkeypatch):
    """Up to rounding those of one thread; to the bit the same again."""
    model, steps = tiny.load_model(models / "sd"), torch.tensor([501, 1])
    conditions = model.encode(["a red circle", "a blue square"])
    x_t = torch.randn(6, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    found = []
    for number in (1, 2, 2):
        monkeypatch.setattr(threads, "MAX_AT_ONCE", number)
        predict = predictor(model, steps, conditions, model.unconditional(), guidance_scale=2.0, micro_batch_size=4)
        found.append((predict(x_t, 0), decode(model, x_t, 4)))
        assert not found[-1][0].requires_grad
    (alone, images), *both = found
    torch.testing.assert_close(both[0][0], alone, rtol=1e-4, atol=1e-5)
    assert (both[0][1].int() - images.int()).abs().max() <= 1
    assert all(torch.equal(one, again) for one, again in zip(*both, strict=True))
