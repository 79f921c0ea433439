"""LAION's improved aesthetic predictor: how well people liked such pictures, from 1 to 10, by a CLIP image embedding.

The prompt plays no part. Head and training: github.com/christophschuhmann/improved-aesthetic-predictor.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from b2diffurl import files
from b2diffurl.models.hub import locate
from b2diffurl.rewards import Reward, model_files
from b2diffurl.rewards.clip import Clip

WIDTHS = (1024, 128, 64, 16, 1)  # of the head's layers; there is no activation between them


def check(name: str, settings: Mapping, prompts: Sequence[str]) -> list[Path]:
    return [head_file(settings["aesthetic"]["head"]), *model_files(settings["aesthetic"]["clip"])]


def load(name: str, settings: Mapping, device: torch.device, dtype: torch.dtype) -> Reward:
    clip = Clip(settings["aesthetic"]["clip"], device, dtype)
    head = load_head(head_file(settings["aesthetic"]["head"]), clip.model.config.projection_dim).to(device)

    def aesthetic(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return head(normalize(clip.embed_images(images), dim=-1)).squeeze(-1)

    return aesthetic


def head_file(head: str) -> Path:
    """The head's weights: that file, or the one .safetensors or .pth of a directory or hub repository."""
    path = locate(head, patterns=[], weights=["*.safetensors", "*.pth"])
    if path.is_file():
        return path
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pth"))
    if len(found) != 1:
        raise FileNotFoundError(f"{path} must hold one .safetensors or .pth file, the head's weights; it has {len(found)}.")
    return found[0]


def load_head(path: Path, width: int) -> nn.Module:
    """The head for embeddings [N,width] with the weights in `path`; a pickle is read for its tensors alone."""
    layers = [nn.Linear(before, after) for before, after in zip((width, *WIDTHS), WIDTHS, strict=False)]
    if path.suffix == ".safetensors":
        state = files.read_tensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} is damaged, or holds more than tensors, which is never run ({reason})") from None
    numbered = sorted({int(key.split(".")[1]) for key in state if key.startswith("layers.") and key.endswith(".weight")})
    if len(numbered) != len(layers):
        raise ValueError(f"{path} is no aesthetic head: it has {len(numbered)} layers.<n>.weight, not {len(layers)}")
    for layer, number in zip(layers, numbered, strict=True):
        weight, bias = state[f"layers.{number}.weight"], state[f"layers.{number}.bias"]
        if weight.shape != layer.weight.shape:
            raise ValueError(
                f"{path}: layer {number} is {tuple(weight.shape)}, not {tuple(layer.weight.shape)}; another CLIP?"
            )
        layer.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return nn.Sequential(*layers).eval()
