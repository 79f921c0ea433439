"""Images to judge by: noise of their own, prompts in turn, and any scheduler as stock diffusers has it."""

import numpy as np
import pytest
import torch
from conftest import PROMPTS, run_evaluation

from b2diffurl.algorithm.seeding import generator
from b2diffurl.configuration.settings import read_settings
from b2diffurl.evaluation.generate import SamplerSettings, sample_images, scheduler_class
from b2diffurl.models import stable_diffusion
from b2diffurl.models.policy import load_policy
from b2diffurl.runtime.device import make_accelerator

KNOWN = stable_diffusion.FAMILY.schedulers()


def test_evaluation_noise_is_its_own(overrides, tmp_path):
    """It depends on eval.seed and not on the experiment's seed, and is none of the training noise."""
    (one,) = run_evaluation(tmp_path, overrides, ["base"])
    (same,) = run_evaluation(tmp_path, overrides, ["base"], seed=301, exp_name="other")
    (other,) = run_evaluation(tmp_path, overrides, ["base"], exp_name="third", **{"eval.seed": 1})
    assert one["values"] == same["values"]
    assert one["values"] != other["values"]
    assert generator(0, "eval", 0).initial_seed() != generator(0, 0, "sample", 0).initial_seed()


def test_prompts_are_taken_in_turn_and_the_last_batch_is_cut(overrides, tmp_path):
    """Five images of three prompts in batches of four: the prompts in turn, five values, five images."""
    (result,) = run_evaluation(tmp_path, overrides, ["base"], **{"eval.num_images": 5})
    assert result["shown_prompts"] == [PROMPTS[n % 3] for n in range(5)]
    assert len(result["values"]["reward"]) == result["n_images"] == 5
    assert len(list(tmp_path.rglob("*.png"))) == 5


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "PNDM", "DPMSolverMultistepScheduler", "EulerAncestralDiscrete", "HeunDiscrete"]
)
def test_any_scheduler_draws_what_the_stock_pipeline_draws(config, models, name):
    """Stable Diffusion's own pipeline with that scheduler, from the same latents and later noise: the same image."""
    from diffusers import StableDiffusionPipeline

    settings = SamplerSettings(
        num_steps=6, eta=0.0, guidance_scale=5.0, scheduler=scheduler_class(name, KNOWN, "eval.deployed.scheduler").__name__
    )
    values = read_settings(config)
    model = load_policy(values.model, make_accelerator(values.compute), None, seed=0, compile=False)
    ours = sample_images(values, model, PROMPTS, settings, 0)
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = scheduler_class(name, KNOWN, "eval.deployed.scheduler").from_config(pipeline.scheduler.config)
    rng = generator(0, "eval", 0)
    latents = torch.randn(len(PROMPTS), *model.latent_shape, generator=rng)
    stock = pipeline(
        PROMPTS, latents=latents, generator=rng, num_inference_steps=6, guidance_scale=5.0, eta=0.0, output_type="np"
    ).images
    difference = np.abs(ours.numpy() / 255 - stock)
    assert difference.max() < 0.6 / 255
    assert stock.std() > 0.01


def test_samplers_are_checked_by_name():
    for name in ("Magic", "EDMEuler", "DPMSolverSDE"):
        with pytest.raises(ValueError, match=rf"unknown eval.deployed.scheduler '{name}'; known: .*DDIMScheduler, .*UniPC"):
            scheduler_class(name, KNOWN, "eval.deployed.scheduler")
