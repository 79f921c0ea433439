"""CLIP score: cosine similarity of image and prompt (Radford et al. 2021, arXiv 2103.00020).

P distinct prompts, N images, E width of the embedding
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPModel, CLIPTokenizer

from b2diffurl.models.whole import read_tokenizer
from b2diffurl.rewards import Reward
from b2diffurl.rewards.pixels import Pixels
from b2diffurl.runtime import threads
from b2diffurl.runtime.hub import load_whole, model_files, model_folder

NOT_DECISIVE = ("model",)
TEXT_BATCH_SIZE = 32  # constant: a prompt's embedding must not depend on the prompts beside it


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    model_folder(own["model"])


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return model_files(own["model"])


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    return Clip(own["model"], device, dtype)


class Clip:
    """A CLIP model (hub id or directory) that scores images. Call it with images uint8 [N,H,W,3] and prompts [N]."""

    def __init__(self, model: str, device: torch.device, dtype: torch.dtype):
        root = model_folder(model)
        self.model = load_whole(CLIPModel, root, dtype, device)
        self.tokenizer = read_tokenizer(root, CLIPTokenizer, self.model.config.text_config.vocab_size)
        self.pixels = Pixels(root)
        self.device, self.dtype = device, dtype
        self.known: dict[str, Tensor] = {}  # prompt -> its embedding [E]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return cosine_similarity(self.embed_images(images), self.embed_prompts(prompts))

    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings float32 [N,E] of images uint8 [N,H,W,3], not normalised."""
        number = threads.at_once(len(images), len(images), self.device)
        cut = threads.pieces(len(images), len(images), number)
        return torch.cat([*threads.side_by_side(lambda part: self.embed(images[part]), cut, number)])

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """`embed_images` of a part of a batch."""
        features = self.model.get_image_features(pixel_values=self.pixels(images).to(self.device, self.dtype))
        return features.pooler_output.float()

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings float32 [N,E] of prompts, each cut to the text encoder's length. Equal prompts are embedded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.known]
        for start in range(0, len(new), TEXT_BATCH_SIZE):
            some = new[start : start + TEXT_BATCH_SIZE]
            tokens = self.tokenizer(
                [*some, *[""] * (TEXT_BATCH_SIZE - len(some))],
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            self.known |= dict(zip(some, features.pooler_output.float(), strict=False))
        return torch.stack([self.known[prompt] for prompt in prompts])
