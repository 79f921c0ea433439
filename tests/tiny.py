"""Tiny models of the real classes with random weights, on disk in the layout their real counterparts have."""

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

MAX_TOKENS, WIDTH = 77, 16
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

# scheduler/scheduler_config.json of CompVis/stable-diffusion-v1-4, to the letter
V1_4_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.7.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def stable_diffusion(root: Path, *, prediction_type: str = "epsilon", **scheduler) -> Path:
    """A Stable Diffusion of 8x8x4 latents and 64x64 px in directory `root`; `scheduler` goes into its scheduler's JSON."""
    torch.manual_seed(0)
    tokens = tokenizer()
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
        ),
        vae=AutoencoderKL(
            block_out_channels=(4, 8, 8, 8),
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            sample_size=64,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_config(tokens))),
        tokenizer=tokens,
        scheduler=PNDMScheduler.from_config(V1_4_SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(root)
    kind = {} if prediction_type == "epsilon" else {"prediction_type": prediction_type}
    write_scheduler(root, V1_4_SCHEDULER | kind | scheduler)
    return root


def write_scheduler(root: Path, config: dict) -> None:
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2))


def clip(root: Path) -> Path:
    """A CLIP model with its tokenizer and image processor in directory `root`."""
    torch.manual_seed(1)
    tokens = tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = CLIPTextConfig(**text_config(tokens))
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)).save_pretrained(
        root
    )
    tokens.save_pretrained(root)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(root)
    return root


def tokenizer() -> CLIPTokenizer:
    """One token a letter, its form at the end of a word, and CLIP's two marks; the end mark also pads."""
    vocabulary = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")] + [BOS, EOS]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)}, merges=[], model_max_length=MAX_TOKENS
    )


def text_config(tokens: CLIPTokenizer) -> dict:
    return {
        "vocab_size": len(tokens),
        "hidden_size": WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
