"""Stable Diffusion 3 and 3.5, with three text encoders or without the third, T5.

N rows, P prompts, L tokens, E text width, F pooled width, latents [N,C,h,w]
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import clip_text, diffusers_files, fit, flow_schedule, transformer, whole
from b2diffurl.models.diffusers_files import PipelineSpec
from b2diffurl.models.recognise import INDEX
from b2diffurl.models.transformer import FlowFamily, FlowModel, Layout
from b2diffurl.runtime import files
from b2diffurl.runtime.hub import find_local

CLIP = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}  # {encoder: its tokenizer}
T5, T5_TOKENIZER, USUAL_TOKENS = "text_encoder_3", "tokenizer_3", 256  # as many tokens as the pipeline of diffusers takes


def read_layout(network: Mapping[str, Any]) -> Layout:
    patch = network.get("patch_size", 2)
    positions = (network.get("pos_embed_max_size", 96) or 0) * patch
    return Layout(network.get("in_channels", 16), patch, side=network.get("sample_size", 128), largest=positions)


def check_fit(root: Path, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a transformer that reads more than latents, and parts that do not fit one another. Not all need be given."""
    transformer.check_latents(root, parts, read_layout)
    if not CLIP.keys() <= parts.keys():
        return
    for encoder, tokenizer in CLIP.items():
        clip_text.check_tokenizer(root, tokenizer, encoder, parts, PIPELINE)
    config, text = parts["transformer"].config, [parts[encoder].config for encoder in CLIP]
    projections = {"projection_dim, of both": sum(one.projection_dim for one in text)}
    fit.require_equal(
        root, "transformer", "pooled_projection_dim", config.pooled_projection_dim, " and ".join(CLIP), projections
    )
    if sum(one.hidden_size for one in text) > config.joint_attention_dim:
        raise ValueError(
            f"{root}/transformer/config.json has joint_attention_dim {config.joint_attention_dim}, less than the "
            "hidden_size of the two CLIP text encoders together. Get all parts from the same model."
        )
    if T5 in parts:
        whole.read_tokenizer(
            root / T5_TOKENIZER, diffusers_files.class_of(T5_TOKENIZER, PIPELINE), parts[T5].config.vocab_size
        )
        width = {"d_model": parts[T5].config.d_model}
        fit.require_equal(root, "transformer", "joint_attention_dim", config.joint_attention_dim, T5, width)


PIPELINE = PipelineSpec(
    family="sd3",
    pipeline="StableDiffusion3Pipeline",
    network="transformer",
    classes={
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
    },
    unused=("image_encoder", "feature_extractor"),
    configs="stabilityai/stable-diffusion-3.5-medium",
    check_fit=check_fit,
    schedule=flow_schedule,
)
WITHOUT_T5 = replace(
    PIPELINE,
    classes={name: kind for name, kind in PIPELINE.classes.items() if name not in (T5, T5_TOKENIZER)},
    unused=(*PIPELINE.unused, T5, T5_TOKENIZER),
)


def spec_of(model: ModelSettings) -> PipelineSpec:
    """What the model's pipeline consists of: its model_index.json may say that it has no T5."""
    transformer.require_directory(model)
    root = find_local(model.name, INDEX, revision=model.revision)
    if root is None:  # nothing of it is here; on the hub they have it
        return PIPELINE
    index = files.read_object(root / INDEX) if (root / INDEX).is_file() else {}
    given = index.get(T5) not in (None, [], [None, None]) if index else (root / T5).is_dir()
    return PIPELINE if given else WITHOUT_T5


def num_t5_tokens(model: ModelSettings) -> int:
    """How many tokens T5 makes; rows of zeros stand in their place if there is no T5."""
    return transformer.num_text_tokens(model, USUAL_TOKENS, encoder=T5 in spec_of(model).weights)


class SD3(FlowModel):
    """A frozen Stable Diffusion 3 (arXiv 2403.03206) whose transformer carries a trainable LoRA.

    The transformer is conditioned on the last hidden states but one of two CLIP text encoders, on those of T5 or zeros in
    their place, and on the pooled outputs of the first two.
    """

    spec, compiled = PIPELINE, ("JointTransformerBlock",)
    read_layout = staticmethod(read_layout)

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        self.spec, self._t5_tokens = spec_of(model), num_t5_tokens(model)
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        if decoder:
            self._check_text(model.name)

    def _check_text(self, name: str) -> None:
        with self.encoders_at_work():
            for encoder, tokenizer in CLIP.items():
                clip_text.require_words(name, encoder, *self._clip(encoder, ["", self._word(tokenizer)])[0])
            if T5 in self.parts:
                clip_text.require_words(name, T5, *self._t5(["", self._word(T5_TOKENIZER)]))

    def _word(self, tokenizer: str) -> str:
        return whole.some_word(self.parts[tokenizer])

    def encode_one(self, prompt: str) -> Conditions:
        """prompt_embeds [1,L,E] and pooled_prompt_embeds [1,F]."""
        hidden, pooled = zip(*(self._clip(encoder, [prompt]) for encoder in CLIP), strict=True)
        of_t5 = self._t5([prompt])
        of_clip = torch.cat(hidden, dim=-1)
        of_clip = functional.pad(of_clip, (0, of_t5.shape[-1] - of_clip.shape[-1]))
        return {"prompt_embeds": torch.cat([of_clip, of_t5], dim=-2), "pooled_prompt_embeds": torch.cat(pooled, dim=-1)}

    @torch.no_grad()
    def _clip(self, encoder: str, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """The last hidden states but one [P,L,·] of a CLIP text encoder, and its projected pooled output [P,·]."""
        ids = clip_text.tokenize(self.parts[CLIP[encoder]], prompts).input_ids
        output = self.parts[encoder](ids.to(self.bare.device), output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    @torch.no_grad()
    def _t5(self, prompts: list[str]) -> Tensor:
        """T5's last hidden states [P,L,E]; zeros if there is no T5."""
        if T5 not in self.parts:
            size = len(prompts), self._t5_tokens, self.bare.config.joint_attention_dim
            return torch.zeros(size, dtype=self.parts["text_encoder"].dtype, device=self.bare.device)
        return clip_text.encode_t5(self.parts[T5], self.parts[T5_TOKENIZER], prompts, self._t5_tokens)

    def num_tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        """By T5, which reads the longest; without it by either of the others."""
        if T5 in self.parts:
            return clip_text.num_tokens_cut(self.parts[T5_TOKENIZER], prompts, self._t5_tokens)
        counts = [clip_text.num_tokens_cut(self.parts[tokenizer], prompts) for tokenizer in CLIP.values()]
        return [max(pair) for pair in zip(*counts, strict=True)]

    def output(self, x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return self.network(
            hidden_states=x_t,
            timestep=timesteps,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled_prompt_embeds"],
            return_dict=False,
        )[0].float()


class SD3Family(FlowFamily):
    title, tags = "Stable Diffusion 3", ("stable-diffusion-3", "stable-diffusion-3-diffusers")
    model_class = SD3

    def spec(self, model: ModelSettings) -> PipelineSpec:
        return spec_of(model)

    def embedding(self, model: ModelSettings, configs: Mapping[str, Mapping]) -> int:
        """L * E + F."""
        tokens = configs["text_encoder"]["max_position_embeddings"] + num_t5_tokens(model)
        return tokens * configs["transformer"]["joint_attention_dim"] + configs["transformer"]["pooled_projection_dim"]


FAMILY = SD3Family()
