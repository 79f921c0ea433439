"""What is known of the presets' models without their files: their families and sizes."""

import math
from dataclasses import dataclass, replace

from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import FAMILIES, Sizes, base_sizes, family_here, family_of

CLIP_L, CLIP_G, T5_XXL = 123_060_480, 694_659_840, 4_762_310_656  # numbers in the weights of text encoders


@dataclass(frozen=True)
class Known:
    """A model of the hub."""

    family: str
    sizes: Sizes  # with a LoRA on attention alone
    lora_with_mlp: int  # how many numbers a LoRA of rank 1 has if it is on the MLPs, too


def large(channels: int, embedding: int, lora: int, **weights: int) -> Sizes:
    """The sizes of a model whose images have 1024 x 1024 pixels."""
    return Sizes((channels, 128, 128), (1024, 1024), embedding, lora, weights, ("vae",) if "unet" in weights else ())


KNOWN = {
    "CompVis/stable-diffusion-v1-4": Known(
        "stable_diffusion",
        Sizes(
            (4, 64, 64),
            (512, 512),
            59_136,
            199_296,
            {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": CLIP_L},
        ),
        374_016,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Known(
        "sdxl",
        large(4, 158_976, 1_451_520, unet=2_567_463_684, vae=83_653_863, text_encoder=CLIP_L, text_encoder_2=CLIP_G),
        2_616_320,
    ),
    "stabilityai/stable-diffusion-3.5-medium": Known(
        "sd3",
        large(
            16,
            1_366_016,
            746_496,
            transformer=2_469_663_936,
            vae=83_819_683,
            text_encoder=123_650_304,
            text_encoder_2=CLIP_G,
            text_encoder_3=T5_XXL,
        ),
        1_468_416,
    ),
    "black-forest-labs/FLUX.1-dev": Known(
        "flux",
        large(
            16,
            2_097_920,
            1_634_304,
            transformer=11_901_408_320,
            vae=83_819_683,
            text_encoder=CLIP_L,
            text_encoder_2=T5_XXL,
        ),
        3_385_344,
    ),
}


def expected_family(model: ModelSettings) -> str | None:
    """The family of a model by its files on this machine, or of a known one by its name; None if neither tells it."""
    found = family_here(model)
    if found is not None:
        return next(name for name in FAMILIES if family_of(name) is found)
    return KNOWN[model.name].family if model.name in KNOWN else None


def expected_sizes(model: ModelSettings) -> Sizes | None:
    """The sizes of a model by its files on this machine, or of a known one by its name; None if neither tells them."""
    here = base_sizes(model)
    if here or model.name not in KNOWN:
        return here
    one = KNOWN[model.name]
    sizes = replace(one.sizes, lora=one.lora_with_mlp if model.lora.mlp else one.sizes.lora)
    if not model.resolution:
        return sizes
    side = math.ceil(model.resolution * sizes.latent_shape[1] / sizes.image_px[0])
    return replace(sizes, latent_shape=(sizes.latent_shape[0], side, side), image_px=(model.resolution, model.resolution))
