"""What flow-matching models share: a transformer with a LoRA on its attention, the steps that sample it, and its sizes.

N rows, latents [N,C,h,w]
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.models import diffusers_files, fit, flow_schedule, lora
from b2diffurl.models.diffusers_files import PipelineSpec
from b2diffurl.models.flow_schedule import SCHEDULER, FlowSchedule
from b2diffurl.models.lora import LoraSpec, State
from b2diffurl.models.pipeline_family import PipelineFamily
from b2diffurl.models.pipeline_model import PipelineModel, Shape
from b2diffurl.models.unet import latent_px
from b2diffurl.runtime.hub import find_local

NETWORK = "transformer"
BLOCKS = r"(?:single_)?transformer_blocks"
# A layer of a block under OneTrainer's key, with _ for dots, and the names of layers in which dots stand.
FLAT_KEY = re.compile(rf"lora_transformer_({BLOCKS})_(\d+)_(?:(attn2?|ff_context|ff)_)?(\w+)")
DOTTED = {name.replace(".", "_"): name for name in ("to_out.0", "net.0.proj", "net.2")}


def unflatten(state: State) -> State:
    """A LoRA under OneTrainer's keys under those of diffusers; other keys stay as they are."""
    return {unflatten_key(key): value for key, value in state.items()}


def unflatten_key(key: str) -> str:
    flat, _, half = key.partition(".lora_")
    match = FLAT_KEY.fullmatch(flat)
    if match is None:
        return key
    block, number, part, layer = match.groups()
    names = [NETWORK, block, number, *([part] if part else []), DOTTED.get(layer, layer)]
    return f"{'.'.join(names)}.lora_{ {'down.weight': 'A', 'up.weight': 'B'}.get(half, half) }.weight"


LORA = LoraSpec(
    prefix=NETWORK,
    title="transformer",
    # The attention's projections of the image, and those of the text beside it.
    targets=("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    # Of image and text; of FLUX's single blocks the first half alone, as the second also reads the attention.
    mlps=("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    layers=rf"{BLOCKS}\.\d+|context_embedder|x_embedder|pos_embed|norm_out|proj_out|time_text_embed",
    to_diffusers=unflatten,
)


@dataclass(frozen=True)
class Layout:
    """How a transformer sees latents."""

    channels: int
    patch: int  # latents that a token stands for, along each side
    side: int  # of the model's own latents
    largest: int = 0  # side for which it has positions; 0: any
    fold: int = 1  # the VAE's latents along each side that one of these holds


ReadLayout = Callable[[Mapping[str, Any]], Layout]  # from the transformer's config


class FlowModel(PipelineModel):
    """A frozen pipeline whose transformer carries a trainable LoRA.

    It is given timesteps as fractions of 0..1000, float32. In half precision a network may round them by itself, as in its
    own pipeline.
    """

    lora_spec = LORA
    read_layout: ClassVar[ReadLayout]

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        # First, because it may be refused.
        self.schedule = find_schedule(model, self.spec, type(self).read_layout)
        resolved = flow_schedule.make_scheduler(self.schedule.config).config
        self.scheduler_config = {key: value for key, value in resolved.items() if not key.startswith("_")}
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        vae = diffusers_files.read_config(model, self.spec, "vae")
        self.latent_shape, _ = self.measure(self.bare.config, vae, model.resolution)

    @classmethod
    def measure(cls, network: Mapping[str, Any], vae: Mapping[str, Any], resolution: int) -> tuple[Shape, tuple[int, int]]:
        layout = cls.read_layout(network)
        (height, width), px = latent_size(layout, vae, resolution), latent_px(vae) * layout.fold
        return (layout.channels, height, width), (height * px, width * px)

    def sampler(self, num_steps: int, eta: float, steps: Sequence[int] | None = None, *, sde: str = "cps") -> Transitions:
        return self.schedule.table(num_steps, eta, sde, steps).to(self.bare.device)

    def noise_levels(self) -> NoiseLevels:
        return self.schedule.levels().to(self.bare.device)

    def scheduler(self, name: str, num_steps: int) -> Any:
        assert name == SCHEDULER, "no other is in schedulers()"
        return self.schedule.scheduler(num_steps, self.bare.device)

    def vae_latents(self, latents: Tensor) -> Tensor:
        return super().vae_latents(latents) + (self.parts["vae"].config.shift_factor or 0)


class FlowFamily(PipelineFamily):
    """A family whose models are FlowModels."""

    model_class: ClassVar[type[FlowModel]]
    scheduler = SCHEDULER
    readers = ("ComfyUI",)

    def is_distilled(self, model: ModelSettings) -> bool:
        """Whether its files say that the model is distilled to draw in a few steps without guidance."""
        return False

    def schedulers(self) -> list[str]:
        return [SCHEDULER]

    def check(self, model: ModelSettings) -> None:
        require_directory(model)
        super().check(model)

    def check_guidance(self, model: ModelSettings, scales: Mapping[str, float]) -> None:
        if self.is_distilled(model):
            require_no_guidance(model, scales)

    def check_sampler(self, model: ModelSettings, sampling: Sampling, window: Window | None) -> None:
        if window:
            fit.require_many_steps(model, distilled=self.is_distilled(model))
        schedule = find_schedule(model, self.spec(model), self.model_class.read_layout)
        flow_schedule.require_trainable(schedule, model, sampling, window)

    def write_kohya(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write a LoRA under OneTrainer's keys: kohya's form with diffusers' names of layers.

        ComfyUI reads them for all families, as well as diffusers' own keys. Other programs read the original code's names.
        """
        renamed: State = {}
        for key, value in state.items():
            layer, _, half = key.removeprefix(f"{NETWORK}.").partition(".lora_")
            flat = f"lora_transformer_{layer.replace('.', '_')}"
            renamed[f"{flat}.lora_{'down' if half.startswith('A') else 'up'}.weight"] = value
            renamed[f"{flat}.alpha"] = torch.tensor(float(lora.rank_of(state)))
        lora.write_tensors(path, renamed, {"format": "pt"})


def find_schedule(model: ModelSettings, spec: PipelineSpec, read_layout: ReadLayout) -> FlowSchedule:
    """The sigmas of a model for images of its size, from its files."""
    require_directory(model)
    layout = read_layout(diffusers_files.read_config(model, spec, NETWORK))
    height, width = latent_size(layout, diffusers_files.read_config(model, spec, "vae"), model.resolution)
    tokens = (height // layout.patch) * (width // layout.patch)
    return FlowSchedule(diffusers_files.scheduler_config(model, spec), tokens, spec.family)


def num_text_tokens(model: ModelSettings, usual: int, *, encoder: bool = True) -> int:
    """How many tokens T5 or Qwen gives the network: as its pipeline has them (`usual`) or as the user chose.

    None at all is a ValueError if there is such an `encoder`.
    """
    chosen = model.max_sequence_length
    if chosen == 0 and encoder:
        raise ValueError(
            f"pretrained.max_sequence_length is 0, so {model.name} would read no prompt. Give at least 1, or -1 for as many "
            "tokens as its pipeline takes."
        )
    return usual if chosen < 0 else chosen


def require_no_guidance(model: ModelSettings, scales: Mapping[str, float]) -> None:
    """Refuse guidance for a model that takes none."""
    for key, scale in scales.items():
        if scale != 1:
            raise ValueError(
                f"{key} is {scale:g}, and {model.name} takes no guidance: it is distilled to a few steps. Set {key}=1."
            )


def require_same_guidance(model: ModelSettings, scales: Mapping[str, float]) -> None:
    """Refuse training at another scale than sampling's for a model that reads the scale as an input."""
    sampled, trained = scales["sample.guidance_scale"], scales["train.guidance_scale"]
    if trained != sampled:
        raise ValueError(
            f"train.guidance_scale is {trained:g} and sample.guidance_scale {sampled:g}; {model.name} reads the scale as an "
            "input of its network, which is another policy at another scale. Set train.guidance_scale=0, which is as in "
            "sampling."
        )


# ---- whether the transformer fits the other parts ----


def require_directory(model: ModelSettings) -> None:
    """Refuse a single file."""
    root = find_local(model.name, f"{NETWORK}/config.json", revision=model.revision)
    if root is not None and root.is_file():
        raise ValueError(
            f"{root} is a single file, and most of those lack text encoders. Give the model's directory in the layout of "
            "diffusers, or its id on the hub (pretrained.model)."
        )


def check_latents(root: Path, parts: Mapping[str, nn.Module], read_layout: ReadLayout) -> None:
    """Refuse a transformer that reads more than latents, and a VAE of other latents or without a scale."""
    layout = read_layout(parts[NETWORK].config)
    fit.check_latents(root, NETWORK, parts, layout.channels // layout.fold**2)


# ---- sizes ----


def latent_size(layout: Layout, vae: Mapping[str, Any], resolution: int) -> tuple[int, int]:
    """Height and width of latents. With `resolution` 0 they are the model's own."""
    px = latent_px(vae) * layout.fold
    if not resolution:
        return layout.side, layout.side
    if resolution % (px * layout.patch):
        raise ValueError(f"pretrained.resolution is {resolution}; this model needs a multiple of {px * layout.patch} pixels")
    if layout.largest and resolution > layout.largest * px:
        raise ValueError(f"pretrained.resolution is {resolution}; this model draws at most {layout.largest * px} pixels")
    return resolution // px, resolution // px
