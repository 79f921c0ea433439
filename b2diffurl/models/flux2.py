"""FLUX.2-klein, whose text encoder is a Qwen3. The base models have guidance by a second pass; others are distilled.

N rows, P prompts, L tokens, E text width, latents [N,C,h,w]: each holds 2 x 2 of the VAE's, and is one token
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
from b2diffurl.models.recognise import INDEX
from b2diffurl.models.transformer import FlowFamily, FlowModel, Layout
from b2diffurl.runtime import files

FOLD, SIDE = 2, 64  # the VAE's latents along a latent, and latents along an image whose size is not given
USUAL_TOKENS, TEXT_LAYERS = 512, (9, 18, 27)  # of the text encoder, as in the pipeline of diffusers
IS_DISTILLED = "is_distilled"  # in model_index.json


def read_layout(network: Mapping[str, Any]) -> Layout:
    return Layout(network.get("in_channels", 128), patch=1, side=SIDE, fold=FOLD)


def check_fit(root: Path, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a transformer that reads more than latents, and parts that do not fit one another. Not all need be given."""
    transformer.check_latents(root, parts, read_layout)
    if "text_encoder" in parts:
        config, text = parts["transformer"].config, parts["text_encoder"].config
        whole.read_tokenizer(root / "tokenizer", diffusers_files.class_of("tokenizer", PIPELINE), text.vocab_size)
        width = {f"hidden_size, times {len(TEXT_LAYERS)},": len(TEXT_LAYERS) * text.hidden_size}
        fit.require_equal(root, "transformer", "joint_attention_dim", config.joint_attention_dim, "text_encoder", width)
        if text.num_hidden_layers < max(TEXT_LAYERS):
            raise ValueError(
                f"{root}/text_encoder/config.json has {text.num_hidden_layers} layers; the embeddings are taken from layers "
                f"{', '.join(map(str, TEXT_LAYERS))}. Get all parts from the same model."
            )


PIPELINE = PipelineSpec(
    family="flux2",
    pipeline="Flux2KleinPipeline",
    network="transformer",
    classes={
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
        "text_encoder": ["transformers", "Qwen3ForCausalLM"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    },
    unused=(),
    configs="black-forest-labs/FLUX.2-klein-base-4B",
    check_fit=check_fit,
    schedule=flow_schedule,
)
# In its single blocks one layer makes queries, keys, values and the MLP's first half.
LORA = replace(
    transformer.LORA,
    targets=(*transformer.LORA.targets, "to_qkv_mlp_proj"),
    mlps=("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
    layers=rf"{transformer.LORA.layers}|time_guidance_embed|(?:double|single)_stream_modulation\w*",
)


class Flux2(FlowModel):
    """A frozen FLUX.2-klein whose transformer carries a trainable LoRA.

    The transformer is conditioned on hidden states of three layers of the text encoder, side by side.
    """

    spec, lora_spec, compiled = PIPELINE, LORA, ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    read_layout = staticmethod(read_layout)

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        self._num_tokens = transformer.num_text_tokens(model, USUAL_TOKENS)
        one, height, width, tokens = (torch.arange(size) for size in (1, *self.latent_shape[1:], self._num_tokens))
        # Time, row, column and number of a token.
        self._image_ids = torch.cartesian_prod(one, height, width, one).to(device)
        self._text_ids = torch.cartesian_prod(one, one, one, tokens).to(device)
        if decoder:
            embeds = self.encode(["", whole.some_word(self.parts["tokenizer"])])["prompt_embeds"]
            clip_text.require_words(model.name, "text_encoder", *embeds)

    @torch.no_grad()
    def encode_one(self, prompt: str) -> Conditions:
        """prompt_embeds [1,L,E]."""
        options = {"padding": "max_length", "truncation": True, "max_length": self._num_tokens, "return_tensors": "pt"}
        tokens = self.parts["tokenizer"](self._as_message(prompt), **options).to(self.bare.device)
        # Without the head, which would give every token's probabilities of all words.
        output = self.parts["text_encoder"].model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True, use_cache=False
        )
        return {"prompt_embeds": torch.cat([output.hidden_states[layer] for layer in TEXT_LAYERS], dim=-1)}

    def _as_message(self, prompt: str) -> str:
        message = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return self.parts["tokenizer"].apply_chat_template(message, **options)

    def num_tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        lengths = map(len, self.parts["tokenizer"]([self._as_message(prompt) for prompt in prompts]).input_ids)
        return [max(0, length - self._num_tokens) for length in lengths]

    def output(self, x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        tokens = self.network(
            hidden_states=x_t.flatten(2).transpose(1, 2),
            timestep=timesteps / 1000,
            guidance=None,
            encoder_hidden_states=conditions["prompt_embeds"],
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return tokens.float().transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def vae_latents(self, latents: Tensor) -> Tensor:
        """By the mean and deviation of the VAE's latents, and unfolded."""
        vae = self.parts["vae"]
        mean, variance = (value.view(-1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
        latents = latents * (variance + vae.config.batch_norm_eps).sqrt().to(latents) + mean.to(latents)
        patches = latents.unflatten(1, (-1, FOLD, FOLD)).permute(0, 1, 4, 2, 5, 3)  # [N,C/4,h,2,w,2]
        return patches.flatten(4).flatten(2, 3)


class Flux2Family(FlowFamily):
    title, tags = "FLUX.2 klein", ("flux2", "flux2-diffusers")
    model_class = Flux2

    def embedding(self, model: ModelSettings, configs: Mapping[str, Mapping]) -> int:
        """L * E."""
        return transformer.num_text_tokens(model, USUAL_TOKENS) * len(TEXT_LAYERS) * configs["text_encoder"]["hidden_size"]

    def is_distilled(self, model: ModelSettings) -> bool:
        """As its model_index.json says."""
        index = diffusers_files.locate_configs(model, PIPELINE) / INDEX
        return bool(files.read_object(index).get(IS_DISTILLED)) if index.is_file() else False

    def index_entries(self, model: ModelSettings) -> dict[str, bool]:
        return {IS_DISTILLED: self.is_distilled(model)}


FAMILY = Flux2Family()
