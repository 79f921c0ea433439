"""Stable Diffusion 1.x and 2.x (epsilon and v-prediction), and every model of their layout.

N rows, P prompts, L tokens, E text width, latents [N,C,h,w]
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import clip_text, fit, lora, unet, whole
from b2diffurl.models.diffusers_files import PipelineSpec
from b2diffurl.models.unet import UNetFamily, UNetModel


def check_fit(root: Path, parts: Mapping[str, nn.Module]) -> None:
    """Refuse a UNet that reads more than it is given, and parts that do not fit one another. Not all need be given."""
    config = parts["unet"].config
    # text_time: SDXL; others than "text": Kandinsky
    unet.check_inputs(root / "unet" / "config.json", config, {"addition_embed_type": (None, "text")})
    fit.check_latents(root, "unet", parts, config.in_channels)
    if "text_encoder" in parts:
        key = "cross_attention_dim" if config.encoder_hid_dim is None else "encoder_hid_dim"
        widths = config[key] if isinstance(config[key], list | tuple) else [config[key]]
        hidden = {"hidden_size": parts["text_encoder"].config.hidden_size}
        for width in widths:
            fit.require_equal(root, "unet", key, width, "text_encoder", hidden)
        clip_text.check_tokenizer(root, "tokenizer", "text_encoder", parts, PIPELINE)


PIPELINE = PipelineSpec(
    family="stable_diffusion",
    pipeline="StableDiffusionPipeline",
    network="unet",
    classes={
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    },
    unused=("safety_checker", "feature_extractor", "image_encoder"),
    configs="CompVis/stable-diffusion-v1-4",
    check_fit=check_fit,
)


class StableDiffusion(UNetModel):
    """A frozen Stable Diffusion (arXiv 2112.10752) whose UNet carries a trainable LoRA.

    The UNet is conditioned on the last hidden states [L,E] of CLIP's text encoder.
    """

    spec = PIPELINE

    def __init__(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool):
        super().__init__(model, device=device, dtype=dtype, seed=seed, decoder=decoder)
        self.text_encoder, self.tokenizer = self.parts.get("text_encoder"), self.parts.get("tokenizer")
        if decoder:
            embeds = self.encode(["", whole.some_word(self.tokenizer)])["prompt_embeds"]
            clip_text.require_words(model.name, "text_encoder", *embeds)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditions:
        """prompt_embeds [P,L,E]. Padded, and cut to the text encoder's length, like in Stable Diffusion's own pipeline."""
        tokens = clip_text.tokenize(self.tokenizer, prompts)
        with self.encoders_at_work():
            # Few text encoders want a mask; the pipeline of diffusers asks in the same way.
            mask = None
            if getattr(self.text_encoder.config, "use_attention_mask", False):
                mask = tokens.attention_mask.to(self.text_encoder.device)
            ids = tokens.input_ids.to(self.text_encoder.device)
            return {"prompt_embeds": self.text_encoder(ids, attention_mask=mask)[0]}

    def prepare(self, prompts: Collection[str]) -> None:
        """Nothing: its text encoder is small, and prompts are encoded together, as they always were."""

    def num_tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        return clip_text.num_tokens_cut(self.tokenizer, prompts)

    def output(self, x_t: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        return self.network(x_t, timesteps, conditions["prompt_embeds"], return_dict=False)[0].float()


class StableDiffusionFamily(UNetFamily):
    title, tags = "Stable Diffusion", ("stable-diffusion", "stable-diffusion-diffusers")
    model_class = StableDiffusion

    def embedding(self, model: ModelSettings, configs: Mapping[str, Mapping]) -> int:
        """L * E: prompts are padded to full length."""
        return configs["text_encoder"]["max_position_embeddings"] * configs["text_encoder"]["hidden_size"]

    def index_entries(self, model: ModelSettings) -> dict[str, bool]:
        """No safety checker is loaded here."""
        return {"requires_safety_checker": False}

    def write_kohya(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """With kohya's metadata `ss_v2`, by which A1111 tells 2.x from 1.x: 2.x has text 1,024 wide."""
        text_width = next((value.shape[1] for key, value in state.items() if ".attn2.to_k.lora_A." in key), 0)
        lora.write_kohya(path, state, {"ss_v2": str(text_width == 1024)})


FAMILY = StableDiffusionFamily()
