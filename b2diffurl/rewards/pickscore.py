"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP trained on which of two images people preferred.

The score is the cosine similarity times the model's logit scale, without the softmax over candidate images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.rewards import Reward
from b2diffurl.rewards.clip import Clip
from b2diffurl.runtime.hub import model_files, model_folder

NOT_DECISIVE = ("model",)


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    model_folder(own["model"])


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return model_files(own["model"])


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    clip = Clip(own["model"], device, dtype)
    scale = clip.model.logit_scale.detach().float().exp()

    def pickscore(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return scale * clip(images, prompts)

    return pickscore
