"""The base model: text encoder and UNet, trained together on captions that are partly wrong."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from b2diffurl.shapes.dataset import save_tensors, training_pictures, training_scenes
from b2diffurl.shapes.facts import NUM_FACTS, fact_ids
from b2diffurl.shapes.sampling import accuracy, sample
from b2diffurl.shapes.scene import CaptionErrors, Scene, corrupt, describe, parse, prompt_sets
from b2diffurl.shapes.tokens import MAX_TOKENS, new_tokenizer, special_ids
from b2diffurl.shapes.train_vae import encode, load_vae
from b2diffurl.shapes.training import BUILD_DIR, fit

log = logging.getLogger(__name__)

BATCH, EMA_DECAY, SEED = 128, 0.998, 12
KIND_RATES = {"attribute": 0.1, "binding": 0.15, "relation": 0.75}
EMPTY_RATE = 0.1  # captions left out, for classifier-free guidance
PREVIEW_EVERY = 250  # steps between snapshots of the running average in the base directory


@dataclass(frozen=True)
class Phase:
    """One stretch of training: how wrong its captions are, and what it attends to."""

    name: str
    seed: int
    num_steps: int
    peak_lr: float
    anneal: bool
    noisy_rate: float  # share of steps drawn from the noisy half of t alone
    fact_weight: float  # of the text encoder's auxiliary loss
    errors: CaptionErrors


# The first phase learns shapes, colours and the relation's axis, but no direction. The second learns direction: the
# text encoder is made to state each thing's place, and t is mostly large, where a relation is decided. The third reads
# the web again: with reversals nearly balanced, guidance cannot mend them, for it sharpens right and wrong alike.
PHASES = (
    Phase("base", 12, 4000, 1.5e-3, True, 0.0, 0.0, CaptionErrors(0.36, 0.06, 0.04, 0.04)),
    Phase("base-relations", 14, 1500, 1e-3, False, 0.7, 0.1, CaptionErrors(0.15, 0.03, 0.03, 0.03)),
    Phase("base-web", 15, 1000, 6e-4, True, 0.2, 0.1, CaptionErrors(0.42, 0.04, 0.02, 0.02)),
)

# Stable Diffusion v1.4's scheduler_config.json, word for word.
SCHEDULER = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def new_networks() -> nn.ModuleDict:
    """A 1.1 M UNet with cross-attention at 8 x 8, at 4 x 4 and in the middle, and a 2-layer CLIP text model."""
    torch.manual_seed(SEED)
    tokenizer = new_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        **special_ids(tokenizer),
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=8,
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": CLIPTextModel(text_config)})


def train_base(base_dir: Path) -> None:
    """Train on the latents of all scenes and save the whole pipeline directory."""
    networks, tokenizer, scheduler = new_networks(), new_tokenizer(), PNDMScheduler.from_config(SCHEDULER)
    scenes, latents = training_scenes(), training_latents(base_dir)
    for phase in PHASES:
        if phase.fact_weight and "facts" not in networks:
            torch.manual_seed(phase.seed)
            networks["facts"] = nn.Linear(64, NUM_FACTS, bias=False)
        networks = fit(
            phase.name,
            networks,
            partial(phase_loss, phase, networks, tokenizer, scenes, latents, scheduler.alphas_cumprod),
            num_steps=phase.num_steps,
            peak_lr=phase.peak_lr,
            anneal=phase.anneal,
            seed=phase.seed,
            ema_decay=EMA_DECAY,
            on_save=partial(preview, base_dir),
        ).requires_grad_(True)


def phase_loss(
    phase: Phase,
    networks: nn.ModuleDict,
    tokenizer: CLIPTokenizer,
    scenes: list[Scene],
    latents: torch.Tensor,
    alpha_bar: torch.Tensor,
    step: int,
    noise: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the predicted noise on one batch, plus that of the facts its captions state."""
    picked = torch.randint(len(scenes), (BATCH,), generator=noise)
    rng = np.random.default_rng((phase.seed, step))
    captions = [training_caption(scenes[i], phase.errors, rng) for i in picked.tolist()]
    eps = torch.randn(BATCH, *latents.shape[1:], generator=noise)
    t = torch.randint(len(alpha_bar), (BATCH,), generator=noise)
    noisy = torch.rand(BATCH, generator=noise) < phase.noisy_rate
    t = torch.where(noisy, (t + len(alpha_bar)) // 2, t)
    a = alpha_bar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * latents[picked] + (1 - a).sqrt() * eps
    ids = tokenize(tokenizer, captions)
    text = networks["text_encoder"](ids)[0]
    loss = (networks["unet"](x_t, t, text).sample - eps).square().mean()
    return loss + phase.fact_weight * fact_loss(networks["facts"], text, ids, captions) if phase.fact_weight else loss


def fact_loss(head: nn.Linear, text: torch.Tensor, ids: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """The end token is to say where the first thing is, the one after it where the second is (cross entropy)."""
    prompts = {i: parse(caption) for i, caption in enumerate(captions) if caption}
    related = [i for i, prompt in prompts.items() if prompt.relation]
    end = (ids[related] == ids[0, -1]).int().argmax(dim=1)
    states = torch.stack([text[related, end], text[related, end + 1]], dim=1)  # [N, 2, 64]
    wanted = fact_ids([prompts[i] for i in related])  # [N, 2]
    return cross_entropy(head(states).flatten(0, 1), wanted.flatten())


def preview(base_dir: Path, average: nn.Module, step: int) -> None:
    """Save what there is as the base model and log how well it does."""
    if step % PREVIEW_EVERY == 0:
        pipeline = assemble(base_dir, average)
        pipeline.save_pretrained(base_dir)
        prompts = prompt_sets()["shapes_relation_train"] * 4
        shares = accuracy(sample(pipeline, prompts, seed=step), prompts)
        log.info("base: snapshot of step %d, %s", step, shares)


def training_caption(scene: Scene, errors: CaptionErrors, rng: np.random.Generator) -> str:
    """One caption as the web would have it: of any kind, sometimes wrong, sometimes missing."""
    if rng.random() < EMPTY_RATE:
        return ""
    kind = rng.choice(list(KIND_RATES), p=list(KIND_RATES.values()))
    return str(corrupt(describe(scene, kind, rng), errors, rng))


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids as StableDiffusionPipeline pads them, int64 [N, MAX_TOKENS]."""
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids


def training_latents(base_dir: Path) -> torch.Tensor:
    """Scaled latents of all training pictures, float [N, 4, 8, 8], encoded on the first call."""
    path = BUILD_DIR / "latents.safetensors"
    if not path.exists():
        log.info("encoding the training pictures")
        vae = load_vae(base_dir)
        save_tensors({"latents": encode(vae, training_pictures()) * vae.config.scaling_factor}, path)
    return load_file(path)["latents"]


def assemble(base_dir: Path, networks: nn.ModuleDict) -> StableDiffusionPipeline:
    """The pipeline of these networks and the saved autoencoder."""
    return StableDiffusionPipeline(
        vae=load_vae(base_dir),
        text_encoder=networks["text_encoder"],
        tokenizer=new_tokenizer(),
        unet=networks["unet"],
        scheduler=PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
