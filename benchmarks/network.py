"""Time and memory of a network alone, of any family: an evaluation and a trained transition, compiled in several ways."""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from b2diffurl.configuration.settings import Settings, read_settings
from b2diffurl.models import Model, family
from b2diffurl.models.pipeline_model import PipelineModel
from b2diffurl.models.policy import load_policy
from b2diffurl.runtime.device import make_accelerator

REPEATS = 5
# Ways to compile. `blocks` is what compile=True does. `transformers` are a UNet's blocks with what surrounds them.
# `graphs` is the whole network, replayed from CUDA graphs, so that Python launches no kernels.
COMPILED = ("no", "blocks", "transformers", "whole", "graphs")
AT_FEWER_ROWS = ("no", "graphs")  # the ways that are measured with a quarter of the rows, too: there Python is the limit
PROMPT = "a red circle left of a blue square"


def measure_network(config: ConfigDict, way: str, *, first_only: bool = False) -> list[dict[str, Any]]:
    """Measure the network compiled in one `way`, one of COMPILED: a row for each kind of pass and number of rows.

    `seconds` is the median of five passes. `first_seconds` is the pass before them, which includes compiling or reading the
    compiler's cache; with `first_only` it is the only one, and the rows of a prefix are compiled, too, as in a stage. On a
    GPU there is `peak_bytes`. A size that does not fit into memory has no row. Of the network as it is (`no`) rows have
    `flops`, of one evaluation or transition. With `graphs` they have `not_replayed`, the parts that torch made no CUDA graph
    of.

    Call it in a process of its own: it changes the model's class for the whole process.
    """
    settings, rows = read_settings(config), []
    accelerator, kind_of_model = make_accelerator(settings.compute), family(settings.model).model_class
    kind_of_model.compiled = compiled_classes(kind_of_model, way)
    if way == "graphs":
        torch._inductor.config.triton.cudagraphs = True
    seed = settings.schedule.seed
    model = load_policy(settings.model, accelerator, None, seed=seed, compile=way != "no")
    conditions = model.encode([PROMPT])
    if settings.training.gradient_checkpointing:
        model.checkpoint_gradients()
    model.network = accelerator.prepare_model(model.network)
    for kind, sizes in sizes_of(settings, fewer=way in AT_FEWER_ROWS, prefix=first_only and way == "blocks").items():
        for size in sizes:
            go = make_pass(model, kind, size, conditions, scale_of(settings, kind))
            if row := measure(go, model, accelerator, repeats=0 if first_only else REPEATS):
                rows.append({"kind": kind, "at_once": size, "compiled": way} | row)
    if way == "no":
        flops = {kind: count_flops(model, kind, conditions, scale_of(settings, kind)) for kind in {r["kind"] for r in rows}}
        rows = [row | {"flops": flops[row["kind"]]} for row in rows]
    if way == "graphs":
        rows = [row | {"not_replayed": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]} for row in rows]
    return rows


def compiled_classes(model: type[PipelineModel], way: str) -> tuple[str, ...]:
    """The classes of modules of which each instance is compiled by itself; a ValueError if the network has no such way."""
    network = model.spec.classes[model.spec.network][1]
    if way == "transformers":
        if not network.startswith("UNet"):
            raise ValueError(f"{network} consists of its blocks: there are none in it with surroundings of their own")
        return "ResnetBlock2D", "Transformer2DModel"
    return {"no": (), "blocks": model.compiled, "whole": (network,), "graphs": (network,)}[way]


def sizes_of(settings: Settings, *, fewer: bool, prefix: bool = False) -> dict[str, list[int]]:
    """{kind of pass: rows at once}: those of the settings; with `fewer` a quarter of them, too; with `prefix` its rows."""
    sampling = settings.sampling
    evaluation = sampling.micro_batch_size or sampling.num_groups * sampling.num_branches
    sizes = {"evaluation": {evaluation}, "transition": {settings.training.micro_batch_size}}
    if fewer:
        sizes = {kind: some | {max(1, size // 4) for size in some} for kind, some in sizes.items()}
    if prefix:
        sizes["evaluation"].add(min(evaluation, sampling.num_groups))
    return {kind: sorted(some) for kind, some in sizes.items()}


def scale_of(settings: Settings, kind: str) -> float:
    """The scale of guidance in this kind of pass."""
    return settings.sampling.guidance_scale if kind == "evaluation" else settings.training.guidance.scale


def make_pass(
    model: Model, kind: str, size: int, conditions: dict[str, Tensor], guidance_scale: float
) -> Callable[[], None]:
    """A function that makes one pass of this kind with `size` rows, `conditions` being those of one prompt [1, ...].

    Gradients are added to those that are there, as in all micro-batches of an update but its first.
    """
    device, levels = model.bare.device, model.noise_levels().timesteps
    x_t, timestep = torch.randn(size, *model.latent_shape, device=device), levels[len(levels) // 2].to(device)
    nothing = {name: value.to(device) for name, value in conditions.items()}
    embeds = {name: value.expand(size, *value.shape[1:]).contiguous() for name, value in nothing.items()}

    def go() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.set_grad_enabled(kind == "transition"):
            output = model.predict(x_t, timestep.expand(size), embeds, nothing, guidance_scale)
            if kind == "transition":
                output.square().mean().backward()  # any loss: only the time counts

    return go


def measure(go: Callable[[], None], model: Model, accelerator: Accelerator, *, repeats: int) -> dict[str, Any] | None:
    """The figures of one kind of pass; None if it does not fit into the GPU's memory."""
    cuda = accelerator.device.type == "cuda"
    for parameter in model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)

    def timed() -> float:
        started = time.perf_counter()
        go()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        first, *others = [timed() for _ in range(1 + repeats)]
    except torch.OutOfMemoryError:
        return None
    finally:
        for parameter in model.trainable().values():
            parameter.grad = None
    found = {"first_seconds": first} | ({"seconds": sorted(others)[repeats // 2]} if repeats else {})
    return found | ({"peak_bytes": torch.cuda.max_memory_allocated()} if cuda else {})


def count_flops(model: Model, kind: str, conditions: dict[str, Tensor], guidance_scale: float) -> int:
    """FLOPs of one evaluation or transition, attention and LoRA included; with gradients those of the LoRA alone.

    On the meta device: shapes are followed, nothing is computed, and the model cannot be used otherwise any more. What
    recomputes activations is counted again; attention is counted as plain products.
    """
    nn.Module.to(model.bare, "meta", torch.float32)  # not diffusers' own, which warns
    for name, value in vars(model).items():
        if isinstance(value, Tensor):
            setattr(model, name, value.to("meta"))
    go = make_pass(model, kind, 1, {name: value.float() for name, value in conditions.items()}, guidance_scale)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        go()
    return counter.get_total_flops()
