"""CLIP score: cosine similarity of image and prompt (Radford et al. 2021, arXiv 2103.00020)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer


class Clip:
    """The CLIP model in directory `root`; call it with images uint8 [N,H,W,3] and prompts [N]."""

    def __init__(self, root: Path, device: torch.device):
        model, info = CLIPModel.from_pretrained(root, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(f"{root} lacks weights of a CLIP model, such as {sorted(info['missing_keys'])[0]}.")
        self.model = model.to(device).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(root)
        self.processor = AutoImageProcessor.from_pretrained(root, backend="pil")
        self.device = device

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        distinct = list(dict.fromkeys(prompts))
        texts = self.embed_prompts(distinct)
        rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=self.device)
        return cosine_similarity(self.embed_images(images), texts[rows])

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Embeddings [N,E] of images uint8 [N,H,W,3]; their length means nothing."""
        pixels = self.processor(images=list(images.permute(0, 3, 1, 2).cpu()), return_tensors="pt").pixel_values
        features = self.model.get_image_features(pixel_values=pixels.to(self.device))
        return features.pooler_output if hasattr(features, "pooler_output") else features

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [P,E] of prompts, cut at the text tower's length."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return features.pooler_output if hasattr(features, "pooler_output") else features
