"""Size of the image as a JPEG file at quality 95, in kB, as in DDPO (Black et al. 2023, arXiv 2305.13301, section 5.1)."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from b2diffurl.rewards import Reward

QUALITY = 95


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """Needs nothing, so nothing can be missing."""


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return []


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    return compressibility if name == "jpeg_compressibility" else incompressibility


def compressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Images uint8 [N,H,W,3] -> minus their JPEG size in kB (1,000 bytes) [N]."""
    return -incompressibility(images, prompts)


def incompressibility(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Images uint8 [N,H,W,3] -> their JPEG size in kB (1,000 bytes) [N]."""
    sizes = []
    for image in images.cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="jpeg", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)
