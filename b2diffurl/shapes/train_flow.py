"""The flow-matching base model: a small SD3 transformer on the latents, captions and frozen text encoders of the world."""

# B rows a batch, M captions of the grammar, L text tokens, D channels of a text token, E of a pooled caption
# x_sigma = (1 - sigma) x_0 + sigma eps; the network predicts v = eps - x_0

import logging
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from b2diffurl.shapes.dataset import training_scenes
from b2diffurl.shapes.sampling import accuracy, load_flow, sample_flow
from b2diffurl.shapes.scene import COLOURS, RELATIONS, SHAPES, CaptionErrors, Prompt, Scene, Thing, prompt_sets
from b2diffurl.shapes.tokens import new_tokenizer
from b2diffurl.shapes.train_base import Phase, training_caption, training_latents
from b2diffurl.shapes.train_vae import load_vae
from b2diffurl.shapes.training import fit

log = logging.getLogger(__name__)

BATCH, EMA_DECAY, SEED = 128, 0.998, 21
MAX_TOKENS = 10  # the longest caption has 8 words, a start and an end
WIDTH, NUM_LAYERS, NUM_HEADS = 96, 4, 3
MAX_ABSENT = 512  # text tokens that stand for a missing T5: the most that StableDiffusion3Pipeline takes
PREVIEW_EVERY = 500  # steps between snapshots of the running average in the model's directory

# As in PHASES of train_base.py: the first teaches shapes, colours and direction, the second makes right and reversed
# relations nearly as frequent. The text encoders know direction, so it needs no phase and no target of its own.
PHASES = (
    Phase("flow", 21, 9000, 1.5e-3, True, 0.3, 0.0, CaptionErrors(0.15, 0.03, 0.03, 0.03)),
    Phase("flow-web", 22, 1000, 6e-4, True, 0.5, 0.0, CaptionErrors(0.42, 0.04, 0.02, 0.02)),
)

SCHEDULER = {"num_train_timesteps": 1000, "shift": 1.0}


@dataclass(frozen=True)
class Captions:
    """Every caption of the grammar as StableDiffusion3Pipeline embeds it, without tokens for a T5."""

    rows: dict[str, int]
    states: torch.Tensor  # [M, L, D]
    pooled: torch.Tensor  # [M, E]


def train_flow(base_dir: Path, clip_dir: Path, flow_dir: Path) -> None:
    """Train on the latents of all scenes and save the whole pipeline directory."""
    pipeline = new_pipeline(base_dir, clip_dir)
    scenes, latents, captions = training_scenes(), training_latents(base_dir), embed_captions(pipeline)
    transformer = pipeline.transformer
    transformer.set_attn_processor(CountedTokens())
    for phase in PHASES:
        transformer = fit(
            phase.name,
            transformer,
            partial(phase_loss, phase, transformer, captions, scenes, latents),
            num_steps=phase.num_steps,
            peak_lr=phase.peak_lr,
            anneal=phase.anneal,
            seed=phase.seed,
            ema_decay=EMA_DECAY,
            on_save=partial(preview, pipeline, flow_dir),
        ).requires_grad_(True)


# --- the loss -------------------------------------------------------------------------------------


def phase_loss(
    phase: Phase,
    transformer: nn.Module,
    captions: Captions,
    scenes: list[Scene],
    latents: torch.Tensor,
    step: int,
    noise: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the predicted velocity on one batch."""
    picked = torch.randint(len(scenes), (BATCH,), generator=noise)
    rng = np.random.default_rng((phase.seed, step))
    rows = [captions.rows[training_caption(scenes[i], phase.errors, rng)] for i in picked.tolist()]
    x_0, eps = latents[picked], torch.randn(BATCH, *latents.shape[1:], generator=noise)
    sigma = noise_levels(phase.noisy_rate, noise)
    level = sigma.view(-1, 1, 1, 1)
    # The pipeline puts a row of zeros in the place of each token of a missing T5. Such tokens are all alike, so one of
    # them stands for any number if its attention is weighted; and the number is drawn, so that it does not matter.
    states = nn.functional.pad(captions.states[rows], (0, 0, 0, 1))
    v = transformer(
        hidden_states=(1 - level) * x_0 + level * eps,
        timestep=1000 * sigma,
        encoder_hidden_states=states,
        pooled_projections=captions.pooled[rows],
        joint_attention_kwargs={"log_weight": log_absent_tokens(noise)},
        return_dict=False,
    )[0]
    return (v - (eps - x_0)).square().mean()


def noise_levels(noisy_rate: float, noise: torch.Generator) -> torch.Tensor:
    """sigma [B]: logit-normal (arXiv 2403.03206, section 3.1) in even strata; a share of `noisy_rate` even in [0.5, 1]."""
    even, drawn, noisy = torch.rand(3, BATCH, generator=noise)
    logit_normal = torch.special.ndtri((torch.arange(BATCH) + even) / BATCH).sigmoid()
    return torch.where(noisy < noisy_rate, 0.5 + drawn / 2, logit_normal)


def log_absent_tokens(noise: torch.Generator) -> torch.Tensor:
    """Logarithm of how many tokens a missing T5 leaves, [B]: none for half of the rows, else 1 to MAX_ABSENT."""
    none, count = torch.rand(2, BATCH, generator=noise)
    return torch.where(none < 0.5, -torch.inf, (MAX_ABSENT**count).floor().log())


class CountedTokens:
    """Joint attention as in JointAttnProcessor2_0, but the last text token counts as often as its weight says."""

    def __call__(
        self, attn, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, log_weight: torch.Tensor, **_
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States of image [B, N, width] and text [B, L, width], log_weight [B] -> what is added to them, likewise."""

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([attn.norm_q(heads(attn.to_q(image))), attn.norm_added_q(heads(attn.add_q_proj(text)))], dim=2)
        key = torch.cat([attn.norm_k(heads(attn.to_k(image))), attn.norm_added_k(heads(attn.add_k_proj(text)))], dim=2)
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(text))], dim=2)
        bias = query.new_zeros(len(query), 1, 1, key.shape[2])
        bias[..., -1] = log_weight.view(-1, 1, 1)
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


# --- the pipeline ---------------------------------------------------------------------------------


def new_pipeline(base_dir: Path, clip_dir: Path) -> StableDiffusion3Pipeline:
    """An untrained transformer beside the world's autoencoder and its two text encoders; there is no T5."""
    vae = load_vae(base_dir)
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it
    tokenizer = new_tokenizer()
    tokenizer.model_max_length = MAX_TOKENS
    base, clip = CLIPTextModel.from_pretrained(base_dir / "text_encoder"), CLIPModel.from_pretrained(clip_dir)
    encoders = [
        with_projection(base, torch.eye(base.config.hidden_size)),
        with_projection(clip.text_model, clip.text_projection.weight),
    ]
    return StableDiffusion3Pipeline(
        transformer=new_transformer(encoders),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def with_projection(text_model: nn.Module, projection: torch.Tensor) -> CLIPTextModelWithProjection:
    """The text model, its end token projected [E, D]."""
    config = CLIPTextConfig.from_dict(text_model.config.to_dict() | {"projection_dim": len(projection)})
    encoder = CLIPTextModelWithProjection(config).eval().requires_grad_(False)
    encoder.text_model.load_state_dict(text_model.state_dict())
    encoder.text_projection.weight.copy_(projection)
    return encoder


def new_transformer(encoders: list[CLIPTextModelWithProjection]) -> SD3Transformer2DModel:
    """1.3 M parameters on patches of 2 x 2; blocks begin as the identity, as in DiT (arXiv 2212.09748)."""
    torch.manual_seed(SEED)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        attention_head_dim=WIDTH // NUM_HEADS,
        caption_projection_dim=WIDTH,
        joint_attention_dim=sum(encoder.config.hidden_size for encoder in encoders),
        pooled_projection_dim=sum(encoder.config.projection_dim for encoder in encoders),
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )
    blocks = transformer.transformer_blocks
    modulations = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    for linear in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


@torch.no_grad()
def embed_captions(pipeline: StableDiffusion3Pipeline) -> Captions:
    """The empty caption and every caption of two different colours and shapes, 1,825 in all."""
    things = [Thing(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
    pairs = [(a, b) for a, b in permutations(things, 2) if a.colour != b.colour and a.shape != b.shape]
    prompts = [Prompt(thing) for thing in things]
    prompts += [Prompt(*pair, relation) for pair in pairs for relation in (None, *RELATIONS)]
    captions = ["", *map(str, prompts)]
    states, _, pooled, _ = pipeline.encode_prompt(
        captions, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    return Captions({caption: row for row, caption in enumerate(captions)}, states, pooled)


def save(pipeline: StableDiffusion3Pipeline, transformer: SD3Transformer2DModel, flow_dir: Path) -> None:
    """The pipeline with this transformer, whose weights take half the space in float16."""
    stored = deepcopy(transformer).half()
    StableDiffusion3Pipeline(**{**pipeline.components, "transformer": stored}).save_pretrained(flow_dir)


def preview(pipeline: StableDiffusion3Pipeline, flow_dir: Path, average: SD3Transformer2DModel, step: int) -> None:
    """Save what there is as the base model and log how well it does."""
    if step % PREVIEW_EVERY == 0:
        save(pipeline, average, flow_dir)
        prompts = prompt_sets()["shapes_relation_train"] * 4
        shares = accuracy(sample_flow(load_flow(flow_dir), prompts, seed=step), prompts)
        log.info("flow: snapshot of step %d, %s", step, shares)
