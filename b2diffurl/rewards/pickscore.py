"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): a CLIP trained on people's choices; cosine similarity times its logit
scale, before any softmax over candidates."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from b2diffurl.rewards import Reward
from b2diffurl.rewards.clip import Clip
from b2diffurl.runtime.hub import model_files


def check(name: str, settings: Mapping, prompts: Sequence[str]) -> list[Path]:
    return model_files(settings["pickscore"]["model"])


def load(name: str, settings: Mapping, device: torch.device, dtype: torch.dtype) -> Reward:
    clip = Clip(settings["pickscore"]["model"], device, dtype)
    scale = clip.model.logit_scale.detach().float().exp()

    def pickscore(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return scale * clip(images, prompts)

    return pickscore
