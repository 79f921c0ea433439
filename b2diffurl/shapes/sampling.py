"""Pictures from the two base models, drawn as B2-DiffuRL draws them in training: with noise at every step."""

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)

from b2diffurl.shapes.checker import check

BATCH = 128
NUM_STEPS, GUIDANCE = 10, 2.0
FLOW_STEPS = 8


def load_pipeline(base_dir) -> StableDiffusionPipeline:
    """The base directory as stock diffusers loads it, its autoencoder in the layout that is fast on a CPU."""
    pipeline = StableDiffusionPipeline.from_pretrained(base_dir)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    *,
    seed: int,
    num_steps: int = NUM_STEPS,
    guidance: float = GUIDANCE,
    eta: float = 1.0,
) -> np.ndarray:
    """One picture a prompt, uint8 [N, 64, 64, 3]."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    ddim = StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)
    return draw(ddim, prompts, seed, num_inference_steps=num_steps, guidance_scale=guidance, eta=eta)


def draw(pipeline: DiffusionPipeline, prompts: list[str], seed: int, **how) -> np.ndarray:
    """One picture a prompt by the pipeline's own loop, uint8 [N, 64, 64, 3]."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    batches = [
        pipeline(prompts[start : start + BATCH], generator=noise, output_type="np", **how).images
        for start in range(0, len(prompts), BATCH)
    ]
    return (np.concatenate(batches) * 255).round().astype(np.uint8)


def load_flow(flow_dir) -> StableDiffusion3Pipeline:
    """The flow-matching base model as stock diffusers loads it, its autoencoder in the layout that is fast on a CPU."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(flow_dir, text_encoder_3=None, tokenizer_3=None)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def sample_flow(
    pipeline: StableDiffusion3Pipeline,
    prompts: list[str],
    *,
    seed: int,
    num_steps: int = FLOW_STEPS,
    guidance: float = GUIDANCE,
    stochastic: bool = True,
    absent_tokens: int = 0,
) -> np.ndarray:
    """One picture a prompt, uint8 [N, 64, 64, 3]; zeros for `absent_tokens` tokens stand for the missing T5.

    Stochastic steps are those of coefficient-preserving sampling (arXiv 2509.05952) with all noise fresh, others Euler's.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, stochastic_sampling=stochastic)
    noisy = StableDiffusion3Pipeline(**{**pipeline.components, "scheduler": scheduler})
    how = {"num_inference_steps": num_steps, "guidance_scale": guidance, "max_sequence_length": absent_tokens}
    with torch.random.fork_rng(devices=[]):  # the scheduler's steps take no generator from the pipeline
        torch.manual_seed(seed + 1)
        return draw(noisy, prompts, seed, **how)


def accuracy(images: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Share of images that are well formed, and right in each part and as a whole."""
    verdicts = check(images, prompts)
    shares = {"well_formed": np.mean([verdict.well_formed for verdict in verdicts])}
    for part in verdicts[0].parts:
        shares[part] = np.mean([verdict.parts[part] for verdict in verdicts])
    shares["correct"] = np.mean([verdict.correct for verdict in verdicts])
    return {name: round(float(share), 4) for name, share in shares.items()}
