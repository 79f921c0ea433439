"""Whether the parts of a pipeline fit one another, by their configs in directory `root`, and the model its objective."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models.diffusers_files import ANOTHER_BASE

# Models that their names on the hub call distilled to a few steps; of some no file tells it.
DISTILLED = re.compile(r"schnell|turbo|lightning|hyper-sd|\blcm\b|flash", re.IGNORECASE)


def require_equal(root: Path, network: str, key: str, value: Any, part: str, entry: Mapping[str, Any]) -> None:
    """Refuse a network whose entry `key` of its config is another than the one that another part's config has."""
    (other_key, other), *_ = entry.items()
    if value != other:
        raise ValueError(
            f"{root}/{network}/config.json has {key} {value}, but {part}/config.json has {other_key} {other}. "
            "Get both parts from the same model."
        )


def check_latents(root: Path, network: str, parts: Mapping[str, nn.Module], channels: int) -> None:
    """Refuse a network that reads more than latents, and a VAE of other latents (of `channels`) or without a scale."""
    config = parts[network].config
    inputs, outputs = config.in_channels, config.out_channels or config.in_channels
    if inputs != outputs:
        raise ValueError(
            f"{root}/{network}/config.json has in_channels {inputs} and out_channels {outputs}; models that also read an "
            f"image, such as for inpainting, are not supported. {ANOTHER_BASE}"
        )
    if "vae" not in parts:
        return
    vae = parts["vae"].config
    factor, shift = vae.get("scaling_factor", 1), vae.get("shift_factor")  # FLUX.2's has mean and deviation instead
    if not isinstance(factor, int | float) or not factor > 0:
        raise ValueError(f"{root}/vae/config.json has scaling_factor {factor!r}; it must be a number. {ANOTHER_BASE}")
    if not isinstance(shift, int | float | None):
        raise ValueError(f"{root}/vae/config.json has shift_factor {shift!r}; it must be a number. {ANOTHER_BASE}")
    key = "in_channels" if channels == inputs else "room for latent channels"
    require_equal(root, network, key, channels, "vae", {"latent_channels": vae.latent_channels})


def require_many_steps(model: ModelSettings, *, distilled: bool = False) -> None:
    """Refuse to train the steps of a model that is `distilled` to draw in a few of them, or that its name calls so."""
    if distilled or DISTILLED.search(Path(model.name).name):
        raise ValueError(
            f"{model.name} is distilled to draw an image in a few steps without noise between them, so it has not the many "
            "small stochastic steps that this objective trains. Take train.objective=nft or awm, which train on the images, "
            "or the model from which it was distilled (pretrained.model). If its name misleads, give its directory another."
        )
