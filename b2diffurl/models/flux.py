"""FLUX.1: dev, whose guidance is an input of its network, and schnell, which is distilled to a few steps and has none.

N rows, P prompts, L tokens, E text width, F pooled width, latents [N,C,h,w]. The network sees tokens of 2 x 2 latents
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import clip_text, diffusers_files, fit, flow_schedule, transformer, whole
from b2diffurl.models.diffusers_files import PipelineSpec
from b2diffurl.models.lora import State
from b2diffurl.models.transformer import FlowFamily, FlowModel, Layout

CLIP, CLIP_TOKENIZER = "text_encoder", "tokenizer"
T5, T5_TOKENIZER, USUAL_TOKENS = "text_encoder_2", "tokenizer_2", 512  # as many tokens as the pipeline of diffusers takes
PATCH, SIDE = 2, 128  # latents along the side of a token, and of an image whose size is not given


def read_layout(network: Mapping[str, Any]) -> Layout:
    return Layout(network.get("in_channels", 64) // PATCH**2, PATCH, SIDE)


def check_fit(root: Path, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a transformer that reads more than latents, and parts that do not fit one another. Not all need be given."""
    transformer.check_latents(root, parts, read_layout)
    if not {CLIP, T5} <= parts.keys():
        return
    clip_text.check_tokenizer(root, CLIP_TOKENIZER, CLIP, parts, PIPELINE)
    whole.read_tokenizer(root / T5_TOKENIZER, diffusers_files.class_of(T5_TOKENIZER, PIPELINE), parts[T5].config.vocab_size)
    config, pooled, width = parts["transformer"].config, parts[CLIP].config.hidden_size, parts[T5].config.d_model
    fit.require_equal(
        root, "transformer", "pooled_projection_dim", config.pooled_projection_dim, CLIP, {"hidden_size": pooled}
    )
    fit.require_equal(root, "transformer", "joint_attention_dim", config.joint_attention_dim, T5, {"d_model": width})


PIPELINE = PipelineSpec(
    family="flux",
    pipeline="FluxPipeline",
    network="transformer",
    classes={
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
    },
    unused=("image_encoder", "feature_extractor"),
    configs="black-forest-labs/FLUX.1-dev",
    check_fit=check_fit,
    schedule=flow_schedule,
)


def to_diffusers(state: State) -> State:
    """A LoRA of another program under diffusers' keys, those of kohya's scripts among them."""
    from diffusers import FluxPipeline

    state = transformer.unflatten(state)
    if all(map(LORA.has_key, state)):
        return state
    try:
        return FluxPipeline.lora_state_dict(dict(state))
    except (AssertionError, KeyError, ValueError, NotImplementedError):
        return state  # names of no such network are refused as they are


LORA = replace(transformer.LORA, to_diffusers=to_diffusers)


def pack(latents: Tensor) -> Tensor:
    """Tokens [N, h/2 * w/2, 4C] of latents [N,C,h,w]: each holds 2 x 2 of them, channel by channel."""
    patches = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [N,C,h/2,2,w/2,2]
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, latent_shape: tuple[int, int, int]) -> Tensor:
    """Latents [N,C,h,w] of their tokens."""
    channels, height, width = latent_shape
    patches = tokens.unflatten(1, (height // PATCH, width // PATCH)).unflatten(3, (channels, PATCH, PATCH))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


class Flux(FlowModel):
    """A frozen FLUX.1 whose transformer carries a trainable LoRA.

    The transformer is conditioned on T5's last hidden states and on the pooled output of a CLIP text encoder; dev's on the
    scale of guidance, too, for which it was distilled: there is no second pass without the prompt.
    """

    spec, lora_spec, compiled = PIPELINE, LORA, ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    read_layout = staticmethod(read_layout)

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        self._t5_tokens = transformer.num_text_tokens(model, USUAL_TOKENS)
        height, width = (side // PATCH for side in self.latent_shape[1:])
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(device, dtype)
        self._image_ids = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)  # [h/2 * w/2, 3]: 0, row, column
        if decoder:
            self._check_text(model.name)

    def _check_text(self, name: str) -> None:
        with self.encoders_at_work():
            words = [["", whole.some_word(self.parts[one])] for one in (CLIP_TOKENIZER, T5_TOKENIZER)]
            clip_text.require_words(name, CLIP, *self._pooled(words[0]))
            clip_text.require_words(name, T5, *self._t5(words[1]))

    def encode_one(self, prompt: str) -> Conditions:
        """prompt_embeds [1,L,E] and pooled_prompt_embeds [1,F]."""
        return {"prompt_embeds": self._t5([prompt]), "pooled_prompt_embeds": self._pooled([prompt])}

    @torch.no_grad()
    def _pooled(self, prompts: list[str]) -> Tensor:
        ids = clip_text.tokenize(self.parts[CLIP_TOKENIZER], prompts).input_ids
        return self.parts[CLIP](ids.to(self.bare.device)).pooler_output

    def _t5(self, prompts: list[str]) -> Tensor:
        return clip_text.encode_t5(self.parts[T5], self.parts[T5_TOKENIZER], prompts, self._t5_tokens)

    def num_tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        return clip_text.num_tokens_cut(self.parts[T5_TOKENIZER], prompts, self._t5_tokens)

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        unconditional: Conditions,
        guidance_scale: float,
        **_: Any,
    ) -> Tensor:
        """In one pass: dev's network reads the scale of guidance, schnell's takes none."""
        if self.bare.config.guidance_embeds:
            conditions = conditions | {"guidance": torch.full((1,), guidance_scale, device=x_t.device)}
        return super().predict(x_t, timesteps, conditions, unconditional, 1)

    def output(self, x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        embeds = conditions["prompt_embeds"]
        output = self.network(
            hidden_states=pack(x_t),
            timestep=timesteps / 1000,
            guidance=conditions.get("guidance"),
            pooled_projections=conditions["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=self._image_ids.new_zeros(embeds.shape[1], 3),
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return unpack(output.float(), self.latent_shape)


class FluxFamily(FlowFamily):
    title, tags = "FLUX.1", ("flux", "flux-diffusers")
    model_class = Flux
    readers = ("ComfyUI", "diffusers")

    def embedding(self, model: ModelSettings, configs: Mapping[str, Mapping]) -> int:
        """L * E + F."""
        return transformer.num_text_tokens(model, USUAL_TOKENS) * configs[T5]["d_model"] + configs[CLIP]["hidden_size"]

    def is_distilled(self, model: ModelSettings) -> bool:
        """As schnell is, whose network has no input for the scale of guidance."""
        return not diffusers_files.read_config(model, PIPELINE, "transformer").get("guidance_embeds", False)

    def num_passes(self, guidance_scale: float) -> int:
        """The scale of guidance is an input of the network."""
        return 1

    def check_guidance(self, model: ModelSettings, scales: Mapping[str, float]) -> None:
        refuse = transformer.require_no_guidance if self.is_distilled(model) else transformer.require_same_guidance
        refuse(model, scales)


FAMILY = FluxFamily()
