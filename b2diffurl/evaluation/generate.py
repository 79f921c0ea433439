"""Images to judge and to show: a policy's images of prompts, by training's sampler or by any scheduler of diffusers.

N images
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from b2diffurl.algorithm.branching import Predict, denoise
from b2diffurl.algorithm.seeding import generator, noise_source
from b2diffurl.configuration.settings import read_settings
from b2diffurl.models import Model, family
from b2diffurl.models.policy import decode, predictor
from b2diffurl.runtime.batch_sizes import sampling_sizes


@dataclass(frozen=True)
class SamplerSettings:
    """How evaluation images are made."""

    num_steps: int
    eta: float | None  # None: the scheduler has none
    guidance_scale: float
    scheduler: str = ""  # a class of diffusers; "": the transitions that are trained, b2diffurl.algorithm.ddim


def training_sampler(config: ConfigDict) -> SamplerSettings:
    """That with which the policy is trained."""
    return SamplerSettings(config.sample.num_steps, config.sample.eta, config.sample.guidance_scale)


def deployed_sampler(config: ConfigDict) -> SamplerSettings:
    """That with which people use the tuned model; a ValueError if diffusers has no such scheduler here."""
    deployed = config.eval.deployed
    kind = scheduler_class(deployed.scheduler, family(read_settings(config).model).schedulers())
    eta = deployed.eta if "eta" in inspect.signature(kind.step).parameters else None
    return SamplerSettings(deployed.num_steps, eta, deployed.guidance_scale or config.sample.guidance_scale, kind.__name__)


SAMPLERS = {"training": training_sampler, "deployed": deployed_sampler}


def scheduler_class(name: str, known: Sequence[str]) -> Any:
    """The scheduler of diffusers of that name, with or without `Scheduler` at its end; one of the `known`."""
    import diffusers

    full = name if name.endswith("Scheduler") else f"{name}Scheduler"
    if full not in known:
        raise ValueError(f"unknown eval.deployed.scheduler {name!r}; known: {', '.join(known)}")
    kind = getattr(diffusers, full)
    if lacking := [package for package in getattr(kind, "_backends", ()) if not find_spec(package)]:
        raise ValueError(f"eval.deployed.scheduler {name!r} needs {lacking[0]}: pip install {lacking[0]}")
    return kind


def make_scheduler(model: Model, settings: SamplerSettings, device: torch.device) -> Any:
    """The deployed scheduler at its steps; a ValueError if it cannot make so many."""
    scheduler = model.scheduler(settings.scheduler)
    scheduler.set_timesteps(settings.num_steps, device=device)
    return scheduler


def sample_images(config: ConfigDict, model: Model, prompts: list[str], settings: SamplerSettings, batch: int) -> Tensor:
    """Images uint8 [N,H,W,3] of one batch, from noise that follows from (eval.seed, batch) alone.

    Every sampler starts from the same x_T.
    """
    conditions, unconditional = model.encode(prompts), model.encode([""])
    device = next(iter(conditions.values())).device
    sizes = sampling_sizes(config, device, len(prompts))

    def latents(micro_batch_size: int) -> Tensor:
        rng = generator(config.eval.seed, "eval", batch)
        noise = noise_source(rng, device)

        def predict_at(timesteps: Tensor) -> Predict:
            return predictor(
                model,
                timesteps,
                conditions,
                unconditional,
                guidance_scale=settings.guidance_scale,
                micro_batch_size=micro_batch_size,
            )

        x_T = noise((len(prompts), *model.latent_shape))
        if settings.scheduler:
            scheduler = make_scheduler(model, settings, device)
            return denoise_by(scheduler, predict_at(scheduler.timesteps), x_T, rng, settings.eta)
        sampler = model.sampler(settings.num_steps, settings.eta)
        return denoise(predict_at(sampler.timesteps), sampler, x_T, noise, range(settings.num_steps))

    found = sizes.fit("sample.micro_batch_size", latents)
    return sizes.fit("sample.decode_batch_size", lambda size: decode(model, found, size))


def denoise_by(scheduler: Any, predict: Predict, x_T: Tensor, rng: torch.Generator, eta: float | None) -> Tensor:
    """Run a scheduler of diffusers from standard normal noise x_T [N,C,h,w], as its pipelines do; some have an eta."""
    takes = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", eta), ("generator", rng)) if key in takes}
    x = x_T * scheduler.init_noise_sigma
    for i, timestep in enumerate(scheduler.timesteps):
        output = predict(scheduler.scale_model_input(x, timestep), i)
        x = scheduler.step(output, timestep, x, **options, return_dict=False)[0]
    return x
