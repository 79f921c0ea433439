"""What a guided evaluation and a trained transition cost the network alone, by how many it sees at once, compiled or not."""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from b2diffurl.configuration.settings import read_settings
from b2diffurl.models import Model, stable_diffusion
from b2diffurl.models.policy import load_policy
from b2diffurl.runtime.device import make_accelerator

REPEATS = 5
COMPILED = {  # classes of the modules that are compiled, each by itself
    "no": (),
    "blocks": stable_diffusion.COMPILED,
    "transformers": ("ResnetBlock2D", "Transformer2DModel"),
    "whole": ("UNet2DConditionModel",),
}
PLAIN_KINDS = {"evaluation": (8, 40), "transition": (8, 16, 32)}  # images at once
COMPILED_KINDS = {"evaluation": (40,), "transition": (16,)}  # one of each, for compiling it takes half a minute or more


def measure_network(config: ConfigDict, way: str) -> list[dict[str, Any]]:
    """Of one way to compile a row for each kind and number: `seconds` of one pass, the median of five after the first, whose
    `first_seconds` have compiling or reading back in them, and `peak_bytes` of a GPU; none for what its memory does not
    hold. To be called in a process of its own, for it changes what compiling means in it."""
    settings, rows = read_settings(config), []
    accelerator, compiles = make_accelerator(settings.compute), way != "no"
    stable_diffusion.COMPILED = COMPILED[way]
    model = load_policy(settings.model, accelerator, None, seed=settings.schedule.seed, compile=compiles)
    model.network = accelerator.prepare_model(model.network)
    for kind, sizes in (COMPILED_KINDS if compiles else PLAIN_KINDS).items():
        for size in sizes:
            if row := measure(model, accelerator, kind, size, settings.sampling.guidance_scale):
                rows.append({"kind": kind, "at_once": size, "compiled": way} | row)
    return rows


def measure(model: Model, accelerator: Accelerator, kind: str, size: int, guidance_scale: float) -> dict[str, Any] | None:
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    x_t, timesteps = torch.zeros(size, *model.latent_shape, device=device), torch.full((size,), 500, device=device)
    embeds = {name: value.expand(size, *value.shape[1:]).contiguous() for name, value in model.encode([""]).items()}

    def go() -> None:
        with torch.set_grad_enabled(kind == "transition"):
            output = model.predict(x_t, timesteps, embeds, embeds, guidance_scale)
            if kind == "transition":
                output.square().mean().backward()
        if cuda:
            torch.cuda.synchronize()

    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        first, *others = [timed(go) for _ in range(1 + REPEATS)]
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in model.trainable().values():
            parameter.grad = None
    found = {"seconds": sorted(others)[REPEATS // 2], "first_seconds": first}
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})


def timed(go: Callable[[], None]) -> float:
    started = time.perf_counter()
    go()
    return time.perf_counter() - started
