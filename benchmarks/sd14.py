"""Models of the real size without a download: Stable Diffusion v1.4 and CLIP ViT-H/14 with random weights.

python -m benchmarks.sd14 DIR    # Stable Diffusion, 2.1 GB in half precision, in seconds
"""

import itertools
import json
import string
import sys
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPImageProcessor, CLIPModel, CLIPTextModel

from benchmarks.random_weights import Fill, random_numbers, write_part

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# a literal copy of scheduler/scheduler_config.json of CompVis/stable-diffusion-v1-4
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
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
}
TEXT_ENCODER = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
CLIP_TEXT = TEXT_ENCODER | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
CLIP_VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "projection_dim": 1024,
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.2.2",
    "feature_extractor": [None, None],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def build(root: Path, fill: Fill | None = None) -> Path:
    """Write Stable Diffusion v1.4 into folder `root`, in the diffusers layout, its weights by `fill` (None: random)."""
    fill, diffusers_file = fill or random_numbers(), "diffusion_pytorch_model.safetensors"
    write_part(root / "unet", diffusers_file, UNet2DConditionModel, UNET, fill)
    write_part(root / "vae", diffusers_file, AutoencoderKL, VAE, fill)
    write_part(root / "text_encoder", "model.safetensors", CLIPTextModel, TEXT_ENCODER, fill)
    write_tokenizer(root / "tokenizer")
    write_json(root / "scheduler" / "scheduler_config.json", V1_4_SCHEDULER)
    write_json(root / "model_index.json", MODEL_INDEX)
    return root


def build_clip(root: Path) -> Path:
    """Write a CLIP ViT-H/14, the paper's reward model, with random weights (2 GB in half precision). Returns `root`."""
    return write_clip(root, CLIP_TEXT, CLIP_VISION)


def write_clip(root: Path, text: dict, vision: dict) -> Path:
    """Write a CLIP model with random weights, its tokenizer and image processor into folder `root`. Returns `root`."""
    config = {"text_config": text, "vision_config": vision, "projection_dim": text["projection_dim"]}
    write_part(root, "model.safetensors", CLIPModel, config, random_numbers())
    side = vision["image_size"]
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(root)
    write_tokenizer(root)
    return root


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with CLIP's vocabulary size and special tokens.

    CLIP's own merges are not at hand. All words of up to four letters stand in for them, as far as the vocabulary goes.
    """
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [character + "</w>" for character in alphabet]
    merges = []
    for length, end in itertools.product((2, 3, 4), ("", "</w>")):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            merges.append(("".join(letters[:-1]), letters[-1] + end))
    merges = merges[: TEXT_ENCODER["vocab_size"] - 2 - len(tokens)]
    tokens += ["".join(pair) for pair in merges] + [BOS, EOS]
    write_json(folder / "vocab.json", {token: n for n, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    config |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    write_json(folder / "tokenizer_config.json", config)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
