"""Time and memory of the network alone: a guided evaluation and a trained transition, at several batch sizes."""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict

from b2diffurl.configuration.settings import read_settings
from b2diffurl.models import Model
from b2diffurl.models.policy import load_policy
from b2diffurl.models.stable_diffusion import StableDiffusion
from b2diffurl.runtime.device import make_accelerator

REPEATS = 5
COMPILED = {  # a way to compile -> the module classes of which each instance is compiled by itself
    "no": (),
    "blocks": StableDiffusion.compiled,
    "transformers": ("ResnetBlock2D", "Transformer2DModel"),
    "whole": ("UNet2DConditionModel",),
}
PLAIN_KINDS = {"evaluation": (8, 40), "transition": (8, 16, 32)}  # batch sizes
COMPILED_KINDS = {"evaluation": (40,), "transition": (16,)}  # one size each: compiling takes half a minute or more


def measure_network(config: ConfigDict, way: str) -> list[dict[str, Any]]:
    """Measure the network compiled in one `way` (a key of COMPILED): a row for each kind of pass and batch size.

    `seconds` is the median of five passes. `first_seconds` is the pass before them, which includes compiling or reading the
    compiler's cache. On a GPU there is `peak_bytes`. A size that does not fit into memory has no row.

    Call it in a process of its own: it sets StableDiffusion.compiled for the whole process.
    """
    settings, rows = read_settings(config), []
    accelerator, compiles = make_accelerator(settings.compute), way != "no"
    StableDiffusion.compiled = COMPILED[way]
    model = load_policy(settings.model, accelerator, None, seed=settings.schedule.seed, compile=compiles)
    model.network = accelerator.prepare_model(model.network)
    for kind, sizes in (COMPILED_KINDS if compiles else PLAIN_KINDS).items():
        for size in sizes:
            if row := measure(model, accelerator, kind, size, settings.sampling.guidance_scale):
                rows.append({"kind": kind, "at_once": size, "compiled": way} | row)
    return rows


def measure(model: Model, accelerator: Accelerator, kind: str, size: int, guidance_scale: float) -> dict[str, Any] | None:
    """The figures of one kind of pass at batch size `size`; None if it does not fit into the GPU's memory."""
    device, cuda = accelerator.device, accelerator.device.type == "cuda"
    x_t, timesteps = torch.zeros(size, *model.latent_shape, device=device), torch.full((size,), 500, device=device)
    embeds = {name: value.expand(size, *value.shape[1:]).contiguous() for name, value in model.unconditional().items()}

    def go() -> None:
        with torch.set_grad_enabled(kind == "transition"):
            output = model.predict(x_t, timesteps, embeds, embeds, guidance_scale)
            if kind == "transition":
                output.square().mean().backward()  # any loss: only the time counts
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
    """Seconds that one call takes."""
    started = time.perf_counter()
    go()
    return time.perf_counter() - started
