"""Pictures from the base model, drawn as B2-DiffuRL draws them: DDIM with eta 1, 10 guided steps."""

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from b2diffurl.shapes.checker import check

NUM_STEPS, GUIDANCE, BATCH = 10, 2.0, 128


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
    ddim.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    batches = [
        ddim(
            prompts[start : start + BATCH],
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            eta=eta,
            generator=noise,
            output_type="np",
        ).images
        for start in range(0, len(prompts), BATCH)
    ]
    return (np.concatenate(batches) * 255).round().astype(np.uint8)


def accuracy(images: np.ndarray, prompts: list[str]) -> dict[str, float]:
    """Share of images that are well formed, and right in each part and as a whole."""
    verdicts = check(images, prompts)
    shares = {"well_formed": np.mean([verdict.well_formed for verdict in verdicts])}
    for part in verdicts[0].parts:
        shares[part] = np.mean([verdict.parts[part] for verdict in verdicts])
    shares["correct"] = np.mean([verdict.correct for verdict in verdicts])
    return {name: round(float(share), 4) for name, share in shares.items()}
