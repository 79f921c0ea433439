"""What Stable Diffusion and SDXL share: a UNet with a LoRA on its attention, sampled by DDIM, and its sizes.

N rows, latents [N,C,h,w]
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import Sizes, diffusers_files, lora, noise_schedule
from b2diffurl.models.diffusers_files import ANOTHER_BASE, PipelineSpec
from b2diffurl.models.lora import LoraSpec
from b2diffurl.models.pipeline_model import PipelineModel
from b2diffurl.runtime import files

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # the layers that carry the LoRA
MLPS = ("ff.net.0.proj", "ff.net.2")  # those that may carry it beside
# How the names of a UNet's layers begin.
LAYERS = (
    r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:attentions|resnets|(?:down|up)samplers)\.\d+|conv_(?:in|out)|time_embedding"
)
# The first needs a network conditioned on sigma. The second draws noise that no generator controls, so it cannot be seeded.
UNFIT_SCHEDULERS = ("EDMEulerScheduler", "DPMSolverSDEScheduler")
# The values of a UNet's config with which it reads latents, timesteps and text alone. Nothing else is given to it.
FED: dict[str, tuple[Any, ...]] = {
    "time_cond_proj_dim": (None,),  # else the guidance scale, in latent consistency models (LCM)
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),  # else embeddings of images
    "attention_type": ("default",),  # else boxes (GLIGEN)
}


class UNetModel(PipelineModel):
    """A frozen pipeline whose UNet carries a trainable LoRA."""

    compiled = ("ResnetBlock2D", "BasicTransformerBlock")
    landing: ClassVar[Mapping[str, Any]] = {}  # entries of the schedule that training samples by, over those of the file

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        # First, because it may be refused.
        schedule = diffusers_files.scheduler_config(model, self.spec)
        self._stock = noise_schedule.make_ddim(schedule).config
        self._scheduler = noise_schedule.make_ddim(schedule | self.landing | model.scheduler)
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        self.scheduler_config = {key: value for key, value in self._scheduler.config.items() if not key.startswith("_")}
        vae_config = files.read_json(diffusers_files.locate_configs(model, self.spec) / "vae" / "config.json")
        size = latent_size(self.unet.config, vae_config, model.resolution)
        self.latent_shape = (self.unet.config.in_channels, *size)
        self.image_px = tuple(side * latent_px(vae_config) for side in size)  # height, width

    @property
    def unet(self) -> Any:
        return self.bare

    def sampler(self, num_steps: int, eta: float, steps: Sequence[int] | None = None, *, sde: str = "") -> Transitions:
        return noise_schedule.make_table(self._scheduler, num_steps, eta, steps).to(self.unet.device)

    def noise_levels(self) -> NoiseLevels:
        return noise_schedule.make_levels(self._scheduler).to(self.unet.device)

    def scheduler(self, name: str, num_steps: int) -> Any:
        import diffusers

        scheduler = getattr(diffusers, name).from_config(self._stock)
        scheduler.set_timesteps(num_steps, device=self.unet.device)
        return scheduler


def schedulers() -> list[str]:
    from diffusers.schedulers import KarrasDiffusionSchedulers

    # Diffusers' list of the schedulers that may replace one another in a Stable Diffusion pipeline.
    return sorted(scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name not in UNFIT_SCHEDULERS)


# ---- whether the UNet fits the other parts ----


def check_inputs(file: Path, unet: Mapping[str, Any], fed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a UNet, by its config in `file`, that reads anything beside latents, timesteps and text.

    `fed` are further entries of FED, of one family.
    """
    for key, values in {**fed, **FED}.items():
        if unet[key] not in values:
            raise ValueError(f"{file} has {key} {unet[key]!r}, for an input that is never given here. {ANOTHER_BASE}")
    if unet["in_channels"] != unet["out_channels"]:
        raise ValueError(
            f"{file} has in_channels {unet['in_channels']} and out_channels {unet['out_channels']}; models that also read "
            f"an image, such as for inpainting, are not supported. {ANOTHER_BASE}"
        )


def check_vae(root: Path, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> None:
    """Refuse a VAE without a scale, or of other latents than the UNet's, by the parts' configs in directory `root`."""
    factor = vae["scaling_factor"]
    if not isinstance(factor, int | float) or not factor > 0:
        raise ValueError(f"{root}/vae/config.json has scaling_factor {factor!r}; it must be a number. {ANOTHER_BASE}")
    latent = {"latent_channels": vae["latent_channels"]}
    require_equal(root, "in_channels", unet["in_channels"], "vae", latent)


def require_equal(root: Path, key: str, value: Any, part: str, entry: Mapping[str, Any]) -> None:
    """Refuse a UNet whose entry `key` of its config is another than the one that another part's config has."""
    (other_key, other), *_ = entry.items()
    if value != other:
        raise ValueError(
            f"{root}/unet/config.json has {key} {value}, but {part}/config.json has {other_key} {other}. "
            "Get both parts from the same model."
        )


# ---- sizes ----


def sizes(
    model: ModelSettings, spec: PipelineSpec, lora_spec: LoraSpec, embedding: Callable[[Mapping[str, Mapping]], int]
) -> Sizes | None:
    """A model's sizes, from its files; None if they are not on this machine. Downloads nothing.

    `embedding` counts the numbers of a prompt's embedding, from {part: its config.json}.
    """
    local = diffusers_files.find_here(model, spec)
    if local is None:
        return None
    weights, configs = local
    unet, vae = configs["unet"], configs["vae"]
    height, width = latent_size(unet, vae, model.resolution)
    px = latent_px(vae)
    return Sizes(
        latent_shape=(unet["in_channels"], height, width),
        image_px=(height * px, width * px),
        embedding=embedding(configs),
        lora=lora.count_numbers(weights, lora_spec.chosen(mlp=model.lora.mlp)),
        weights=diffusers_files.count_weights(model, spec),
        float32=diffusers_files.upcast_parts(vae, spec),
    )


def latent_size(unet: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> tuple[int, int]:
    """Height and width of latents, from the configs of UNet and VAE. With `resolution` 0 they are the UNet's own.

    As in the pipeline of diffusers, these may be one number, or a height and a width.
    """
    if not resolution:
        own = unet.get("sample_size")
        if own is None:
            raise ValueError("unet/config.json has no sample_size; set pretrained.resolution to the images' side in pixels")
        size = tuple(own) if isinstance(own, list | tuple) else (own, own)
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise ValueError(
                f"unet/config.json has sample_size {own!r}; it must be a number of latents, or height and width"
            )
        return size
    # Each of the UNet's down blocks but the last halves the latents, so they must divide evenly.
    multiple = latent_px(vae) * 2 ** (len(unet["block_out_channels"]) - 1)
    if resolution % multiple:
        raise ValueError(f"pretrained.resolution is {resolution}; this model needs a multiple of {multiple} pixels")
    return resolution // latent_px(vae), resolution // latent_px(vae)


def latent_px(vae: Mapping[str, Any]) -> int:
    """How many pixels a latent stands for, along each side: each of the VAE's blocks but the last halves an image."""
    return 2 ** (len(vae["block_out_channels"]) - 1)
