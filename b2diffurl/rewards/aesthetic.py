"""LAION's improved aesthetic predictor: how much people like a picture, from 1 to 10. The prompt is ignored.

A small MLP, the head, reads the picture's CLIP embedding. It was trained on people's ratings:
github.com/christophschuhmann/improved-aesthetic-predictor.
"""

import pickle
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from b2diffurl.rewards import Reward
from b2diffurl.rewards.clip import Clip
from b2diffurl.runtime.files import read_tensors
from b2diffurl.runtime.hub import locate, model_files, model_folder

NOT_DECISIVE = ("clip", "head")


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    head_file(own["head"])
    model_folder(own["clip"])


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return [head_file(own["head"]), *model_files(own["clip"])]


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    clip = Clip(own["clip"], device, dtype)
    head = load_head(head_file(own["head"]), clip.model.config.projection_dim).to(device)

    def aesthetic(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return head(normalize(clip.embed_images(images), dim=-1)).squeeze(-1)

    return aesthetic


def head_file(head: str) -> Path:
    """The file with the head's weights. `head` is this file, or a directory or hub repository that holds exactly one
    .safetensors or .pth file."""
    path = locate(head, patterns=[], weights=["*.safetensors", "*.pth"])
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
    if len(found) != 1:
        raise FileNotFoundError(f"{path} must hold one .safetensors or .pth file, the head's weights; it has {len(found)}.")
    return found[0]


def load_head(path: Path, width: int) -> nn.Module:
    """The head for CLIP embeddings [N,width], with the weights in `path`. From a .pth, a pickle, only tensors are read."""
    layers = nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    head = nn.Sequential(OrderedDict(layers=layers))  # LAION's file names its weights layers.0.weight, …
    try:
        if path.suffix == ".safetensors":
            state = read_tensors(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        head.load_state_dict(state)
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} is not an aesthetic head for {width} dimensions, or holds more than tensors: {reason}"
        ) from None
    return head.eval()
