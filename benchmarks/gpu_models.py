"""The models of benchmarks.on_gpu, with random weights: of the real sizes or, for --quick, tiny ones of the same classes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from b2diffurl.models import stable_diffusion
from benchmarks import full_size, sd14
from benchmarks.full_size import MEASURED, FullSize
from benchmarks.stage import once

# preset -> its model, a name in REAL and TINY
MODELS = {
    "sd14": "sd14",
    "sd14_nft": "sd14",
    "sd14_10gb": "sd14",
    "sdxl": "sdxl",
    "sdxl_24gb": "sdxl",
    "sd35": "sd35_medium",
    "sd35_24gb": "sd35_medium",
}
SCORER = "clip"
SMALL_TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
}
SMALL_VAE = {"block_out_channels": (4, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 64}
SMALL_UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
SMALL_XL_UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "norm_num_groups": 4,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 32,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 16,
}
SMALL_TRANSFORMER = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 40,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0,),
}
SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
SMALL = {
    "unet": SMALL_UNET,
    "transformer": SMALL_TRANSFORMER,
    "vae": SMALL_VAE,
    "text_encoder": SMALL_TEXT,
    "text_encoder_2": SMALL_TEXT,
}
SD14 = FullSize(
    stable_diffusion.PIPELINE,
    {"unet": sd14.UNET, "vae": sd14.VAE, "text_encoder": sd14.TEXT_ENCODER},
    sd14.V1_4_SCHEDULER,
)


def model_at(folder: Path, name: str, *, quick: bool) -> Path:
    """The folder of a model or of the scorer in `folder`, which is built if it is not there."""
    return once(partial(build_tiny if quick else build, name=name), folder / name)


def build(root: Path, name: str) -> Path:
    """Write a model of the real size."""
    builders = {"sd14": sd14.build, SCORER: sd14.build_clip}
    return builders[name](root) if name in builders else full_size.build_measured(root, name)


def build_tiny(root: Path, name: str) -> Path:
    """Write a tiny model of the same classes."""
    if name == SCORER:
        return sd14.write_clip(root, sd14.CLIP_TEXT | SMALL_TEXT, sd14.CLIP_VISION | SMALL_VISION)
    whole = SD14 if name == "sd14" else MEASURED[name]
    small = SMALL | ({"unet": SMALL_XL_UNET} if name == "sdxl" else {})
    configs = {part: dict(config) | small[part] for part, config in whole.configs.items()}
    return full_size.build(root, replace(whole, configs=configs))
