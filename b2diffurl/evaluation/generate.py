"""Generate images to judge and to show, with training's sampler or with any scheduler of diffusers.

N images
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from b2diffurl.algorithm.branching import denoise
from b2diffurl.algorithm.seeding import generator, noise_source
from b2diffurl.algorithm.types import Predict
from b2diffurl.configuration.settings import SamplerSettings, Settings
from b2diffurl.models import Model, family
from b2diffurl.models.policy import decode, predictor
from b2diffurl.runtime.batch_sizes import sampling_sizes


def training_sampler(settings: Settings) -> SamplerSettings:
    """The sampler that a stage's images are sampled with: the steps that are trained, or `sample.scheduler`."""
    given = settings.sampling.sampler
    if given.scheduler:
        return of_diffusers(settings, replace(given, sde=""), "sample.scheduler")
    return given if family(settings.model).describe(settings.model).is_flow else replace(given, sde="")


def deployed_sampler(settings: Settings) -> SamplerSettings:
    """The sampler that people will use the tuned model with, from `eval.deployed`."""
    deployed, base = settings.judging.deployed, family(settings.model)
    scheduler = deployed.scheduler or base.describe(settings.model).scheduler
    base.check_guidance(settings.model, settings.guidance_scales)
    guidance_scale = settings.guidance_scales["eval.deployed.guidance_scale"]
    chosen = replace(deployed, scheduler=scheduler, guidance_scale=guidance_scale)
    return of_diffusers(settings, chosen, "eval.deployed.scheduler")


def of_diffusers(settings: Settings, given: SamplerSettings, key: str) -> SamplerSettings:
    """A sampler whose scheduler was given by `key`, with the full name of its class, and without eta where it takes none.

    A ValueError if the family knows no such scheduler, or if diffusers lacks a package for it.
    """
    kind = scheduler_class(given.scheduler, family(settings.model).schedulers(), key)
    has_eta = "eta" in inspect.signature(kind.step).parameters
    return replace(given, eta=given.eta if has_eta else None, scheduler=kind.__name__)


SAMPLERS = {"training": training_sampler, "deployed": deployed_sampler}


def scheduler_class(name: str, known: Sequence[str], key: str) -> Any:
    """The scheduler class of diffusers with that name, which may lack the ending `Scheduler`. It must be one of `known`.

    `key` is the setting that gives it.
    """
    import diffusers

    full = name if name.endswith("Scheduler") else f"{name}Scheduler"
    if full not in known:
        raise ValueError(f"unknown {key} {name!r}; known: {', '.join(known)}")
    kind = getattr(diffusers, full)
    # Where a package is missing, diffusers has a dummy class that lists it.
    if lacking := [package for package in getattr(kind, "_backends", ()) if not find_spec(package)]:
        raise ValueError(f"{key} {name!r} needs {lacking[0]}: pip install {lacking[0]}")
    return kind


def sample_images(settings: Settings, model: Model, prompts: list[str], sampler: SamplerSettings, batch: int) -> Tensor:
    """Generate batch number `batch` of an evaluation: images uint8 [N,H,W,3], one for each prompt.

    The noise depends on (eval.seed, batch) alone, so every checkpoint and every sampler starts from the same x_T.
    """
    conditions, unconditional = model.encode(prompts), model.unconditional()
    device = next(iter(conditions.values())).device
    sizes = sampling_sizes(
        settings.output.root,
        device,
        len(prompts),
        micro_batch_size=settings.sampling.micro_batch_size,
        decode_batch_size=settings.sampling.decode_batch_size,
        given=[settings.model.resolution, settings.compute.compile],
    )

    def generate_latents(micro_batch_size: int) -> Tensor:
        # Made anew for each attempt, so that one which ran out of memory leaves no trace in the noise.
        rng = generator(settings.judging.seed, "eval", batch)
        noise = noise_source(rng, device)

        def predict_at(timesteps: Tensor) -> Predict:
            options = {"guidance_scale": sampler.guidance_scale, "micro_batch_size": micro_batch_size}
            return predictor(model, timesteps, conditions, unconditional, **options)

        x_T = noise((len(prompts), *model.latent_shape))
        if sampler.scheduler:
            scheduler = model.scheduler(sampler.scheduler, sampler.num_steps)
            return denoise_by(scheduler, predict_at(scheduler.timesteps), x_T, rng, sampler.eta)
        table = model.sampler(sampler.num_steps, sampler.eta, sde=sampler.sde)
        return denoise(predict_at(table.timesteps), table, x_T, noise, range(sampler.num_steps))

    latents = sizes.fit("sample.micro_batch_size", generate_latents)
    return sizes.fit("sample.decode_batch_size", lambda size: decode(model, latents, size))


def denoise_by(scheduler: Any, predict: Predict, x_T: Tensor, rng: torch.Generator, eta: float | None) -> Tensor:
    """Run a scheduler of diffusers from standard normal noise x_T [N,C,h,w], as the pipelines of diffusers do."""
    # Schedulers differ in what their `step` takes: not all have a generator, and few have an eta. Those of flow matching
    # neither scale what the network reads nor the first noise.
    accepted = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in (("eta", eta), ("generator", rng)) if key in accepted}
    scaled = getattr(scheduler, "scale_model_input", lambda x, _: x)
    x = x_T * getattr(scheduler, "init_noise_sigma", 1.0)
    for i, timestep in enumerate(scheduler.timesteps):
        output = predict(scaled(x, timestep), i)
        x = scheduler.step(output, timestep, x, **options, return_dict=False)[0]
    return x
