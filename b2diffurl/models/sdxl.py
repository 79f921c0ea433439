"""Stable Diffusion XL, the base model (arXiv 2307.01952), and every model of its layout. Not its refiner, not inpainting.

N rows, P prompts, L tokens, E text width (of both encoders together), F pooled width, latents [N,C,h,w]
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.types import Conditions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.models import clip_text, diffusers_files, fit, lora, unet, whole
from b2diffurl.models.diffusers_files import PipelineSpec
from b2diffurl.models.lora import State
from b2diffurl.models.recognise import INDEX
from b2diffurl.models.unet import UNetFamily, UNetModel
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# The hub's schedule ends at alpha_bar 0.99915, so DDIM's last step would leave noise in the image. Ours ends at the image
# itself: the last step adds no noise, and has no log-probability. docs/method.md has what that changes in an image.
LANDING = {"set_alpha_to_one": True}
EMPTY_IS_ZERO = "force_zeros_for_empty_prompt"  # an entry of model_index.json, on by diffusers' default
BLOCKS_PER_LEVEL = 3  # of the original layout, in each level of the UNet
# kohya's scripts write this into SDXL's LoRAs. A1111 tells them by it from those of 1.x.
KOHYA = {"ss_base_model_version": "sdxl_base_v1-0"}


def check_fit(root: Path, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a UNet that reads other than it is given, and parts that do not fit one another. Not all need be given."""
    config = parts["unet"].config
    if config.addition_embed_type != "text_time":
        raise ValueError(
            f"{root}/unet/config.json is no UNet of SDXL: it has addition_embed_type {config.addition_embed_type!r}. "
            "Leave pretrained.family at auto, or give another base (pretrained.model)."
        )
    unet.check_inputs(root / "unet" / "config.json", config, {"encoder_hid_dim": (None,)})
    fit.check_latents(root, "unet", parts, config.in_channels)
    if not ENCODERS.keys() <= parts.keys():
        return
    for encoder, tokenizer in ENCODERS.items():
        clip_text.check_tokenizer(root, tokenizer, encoder, parts, PIPELINE)
    hidden, widths = [parts[encoder].config.hidden_size for encoder in ENCODERS], config.cross_attention_dim
    if {sum(hidden)} != {*(widths if isinstance(widths, list | tuple) else [widths])}:
        raise ValueError(
            f"{root}/unet/config.json has cross_attention_dim {widths}, but the text encoders' hidden sizes are "
            f"{hidden[0]} + {hidden[1]}. Get all parts from the same model."
        )
    # The pooled text, and six numbers of the image's size and place.
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    projection = {"projection_dim": parts["text_encoder_2"].config.projection_dim}
    fit.require_equal(root, "unet", "room for a pooled text of", pooled, "text_encoder_2", projection)


PIPELINE = PipelineSpec(
    family="sdxl",
    pipeline="StableDiffusionXLPipeline",
    network="unet",
    classes={
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
    },
    unused=("feature_extractor", "image_encoder"),
    configs="stabilityai/stable-diffusion-xl-base-1.0",
    check_fit=check_fit,
    heeds_force_upcast=True,
)


def to_diffusers(state: State) -> State:
    """A LoRA of another program under diffusers' keys. kohya's scripts name SDXL's layers as the original code does."""
    from diffusers import StableDiffusionXLPipeline

    config = SimpleNamespace(layers_per_block=BLOCKS_PER_LEVEL - 1)
    try:
        return StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=config)[0]
    except (IndexError, KeyError, ValueError):  # names of no UNet: they are refused as they are
        return state


LORA = replace(unet.LORA, layers=rf"{unet.LORA.layers}|add_embedding", to_diffusers=to_diffusers)


def empty_is_zero(model: ModelSettings) -> bool:
    """Whether the model was trained with zeros for the embedding of no prompt, as its model_index.json says."""
    index = diffusers_files.locate_configs(model, PIPELINE) / INDEX
    return bool(files.read_object(index).get(EMPTY_IS_ZERO, True)) if index.is_file() else True


def original_key(key: str) -> str:
    """The key of a layer of the UNet's attention, its block named as in the original code; "" for other layers."""
    match = re.match(r"unet\.(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.", key)
    if not match:
        return ""
    level, block = int(match[2] or 0), int(match[3])
    number = level * BLOCKS_PER_LEVEL + block
    names = {"down": f"input_blocks.{number + 1}", "mid": "middle_block", "up": f"output_blocks.{number}"}
    return f"unet.{names[match[1]]}.1.{key[match.end() :]}"


class SDXL(UNetModel):
    """A frozen SDXL whose UNet carries a trainable LoRA.

    The UNet is conditioned on the last hidden states but one of two text encoders, on the second one's pooled output, and on
    the sizes of the image. These are those of images made at `pretrained.resolution`, uncropped, as in diffusers' pipeline.
    """

    spec, lora_spec, landing = PIPELINE, LORA, LANDING

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        self._empty_is_zero = empty_is_zero(model)
        self._time_ids = torch.tensor([[*self.image_px, 0, 0, *self.image_px]], device=device)  # original size, crop, size
        if decoder:
            self._check_text(model.name)
            if self.parts["vae"].dtype != dtype:
                logger.info("the VAE runs in float32: its config has force_upcast, because it overflows in half precision")

    def _check_text(self, name: str) -> None:
        with self.encoders_at_work():
            for encoder, tokenizer in ENCODERS.items():
                embeds, _ = self._hidden(encoder, ["", whole.some_word(self.parts[tokenizer])])
                clip_text.require_words(name, encoder, *embeds)

    def encode_one(self, prompt: str) -> Conditions:
        """prompt_embeds [1,L,E] and pooled_prompt_embeds [1,F]."""
        (first, _), (second, pooled) = (self._hidden(encoder, [prompt]) for encoder in ENCODERS)
        return {"prompt_embeds": torch.cat([first, second], dim=-1), "pooled_prompt_embeds": pooled}

    @torch.no_grad()
    def _hidden(self, encoder: str, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The last hidden states but one [P,L,·] of a text encoder, and its first output: [P,F] of the one that pools."""
        ids = clip_text.tokenize(self.parts[ENCODERS[encoder]], prompts).input_ids
        output = self.parts[encoder](ids.to(self.unet.device), output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def unconditional(self) -> Conditions:
        embeds = super().unconditional()
        return {name: torch.zeros_like(value) for name, value in embeds.items()} if self._empty_is_zero else embeds

    def num_tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        counts = [clip_text.num_tokens_cut(self.parts[tokenizer], prompts) for tokenizer in ENCODERS.values()]
        return [max(pair) for pair in zip(*counts, strict=True)]

    def output(self, x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        embeds, pooled = conditions["prompt_embeds"], conditions["pooled_prompt_embeds"]
        added = {"text_embeds": pooled, "time_ids": self._time_ids.to(embeds.dtype).expand(len(x_t), -1)}
        return self.network(x_t, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0].float()

    def vae_latents(self, latents: Tensor) -> Tensor:
        config = self.parts["vae"].config
        if config.latents_mean is None or config.latents_std is None:
            return super().vae_latents(latents)
        mean, deviation = (torch.tensor(one).view(-1, 1, 1).to(latents) for one in (config.latents_mean, config.latents_std))
        return latents * deviation / config.scaling_factor + mean


class SDXLFamily(UNetFamily):
    title, tags = "Stable Diffusion XL", ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    model_class = SDXL

    def embedding(self, model: ModelSettings, configs: Mapping[str, Mapping]) -> int:
        """L * E + F."""
        one, two = (configs[encoder] for encoder in ENCODERS)
        return one["max_position_embeddings"] * (one["hidden_size"] + two["hidden_size"]) + two["projection_dim"]

    def check_sampler(self, model: ModelSettings, sampling: Sampling, window: Window | None) -> None:
        if window:
            fit.require_many_steps(model)
        super().check_sampler(model, sampling, window)

    def identity(self, model: ModelSettings) -> dict[str, str]:
        return super().identity(model) | {"empty prompt": files.digest({EMPTY_IS_ZERO: empty_is_zero(model)})}

    def index_entries(self, model: ModelSettings) -> dict[str, bool]:
        return {EMPTY_IS_ZERO: empty_is_zero(model), "add_watermarker": False}

    def write_kohya(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """With the original code's names of layers, as kohya's scripts write SDXL's."""
        renamed = {original_key(key): value for key, value in state.items()}
        # All or none: diffusers drops the one half of a file that has both kinds of names. ComfyUI and A1111 read either.
        lora.write_kohya(path, state if "" in renamed else renamed, KOHYA)


FAMILY = SDXLFamily()
