"""What Stable Diffusion and SDXL share: a UNet with a LoRA on its attention, sampled by DDIM, and its sizes.

N rows, latents [N,C,h,w]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.models import diffusers_files, noise_schedule
from b2diffurl.models.diffusers_files import ANOTHER_BASE
from b2diffurl.models.lora import LoraSpec, State
from b2diffurl.models.pipeline_family import PipelineFamily
from b2diffurl.models.pipeline_model import PipelineModel, Shape

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


def to_diffusers(state: State) -> State:
    """A LoRA of another program under diffusers' keys: today's, or those of diffusers before it used peft."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.lora_state_dict(state)[0]


LORA = LoraSpec(
    prefix="unet",
    title="UNet",
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    mlps=("ff.net.0.proj", "ff.net.2"),
    layers=r"(?:(?:down|up)_blocks\.\d+|mid_block)\.(?:attentions|resnets|(?:down|up)samplers)\.\d+"
    r"|conv_(?:in|out)|time_embedding",
    to_diffusers=to_diffusers,
)


class UNetModel(PipelineModel):
    """A frozen pipeline whose UNet carries a trainable LoRA."""

    lora_spec, compiled = LORA, ("ResnetBlock2D", "BasicTransformerBlock")
    landing: ClassVar[Mapping[str, Any]] = {}  # entries of the schedule that training samples by, over those of the file

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        # First, because it may be refused.
        schedule = diffusers_files.scheduler_config(model, self.spec)
        self._stock = noise_schedule.make_ddim(schedule).config
        self._scheduler = noise_schedule.make_ddim(schedule | self.landing | model.scheduler)
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        self.scheduler_config = {key: value for key, value in self._scheduler.config.items() if not key.startswith("_")}
        vae = diffusers_files.read_config(model, self.spec, "vae")
        self.latent_shape, self.image_px = self.measure(self.unet.config, vae, model.resolution)

    @classmethod
    def measure(cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> tuple[Shape, tuple[int, int]]:
        (height, width), px = latent_size(network, vae, resolution), latent_px(vae)
        return (network["in_channels"], height, width), (height * px, width * px)

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


class UNetFamily(PipelineFamily):
    """A family whose models are UNetModels."""

    model_class: ClassVar[type[UNetModel]]
    scheduler = "DDIMScheduler"

    def schedulers(self) -> list[str]:
        from diffusers.schedulers import KarrasDiffusionSchedulers

        # Diffusers' list of the schedulers that may replace one another in a Stable Diffusion pipeline.
        return sorted(scheduler.name for scheduler in KarrasDiffusionSchedulers if scheduler.name not in UNFIT_SCHEDULERS)

    def check_sampler(self, model: ModelSettings, sampling: Sampling, window: Window | None) -> None:
        schedule = diffusers_files.scheduler_config(model, self.spec(model)) | self.model_class.landing | model.scheduler
        noise_schedule.require_trainable(schedule, model, sampling, window)


# ---- what a UNet reads ----


def check_inputs(file: Path, unet: Mapping[str, Any], fed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a UNet, by its config in `file`, that reads anything beside latents, timesteps and text.

    `fed` are further entries of FED, of one family.
    """
    for key, values in {**fed, **FED}.items():
        if unet[key] not in values:
            raise ValueError(f"{file} has {key} {unet[key]!r}, for an input that is never given here. {ANOTHER_BASE}")


# ---- sizes ----


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
