"""Preference models of the package imscore (github.com/RE-N-Y/imscore), an optional dependency."""

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from b2diffurl.rewards import Reward
from b2diffurl.runtime.hub import locate

NOT_DECISIVE = ("model",)


@dataclass(frozen=True)
class Scorer:
    """Where imscore has a model."""

    module: str
    class_name: str
    one_by_one: bool = False  # its `score` returns one number for the whole batch, so images go in one at a time


SCORERS = {
    "image_reward": Scorer("imscore.imreward.model", "ImageReward"),
    "hps_v2": Scorer("imscore.hps.model", "HPSv2"),
    "vqascore": Scorer("imscore.vqascore.model", "VQAScore", one_by_one=True),
}


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    if importlib.util.find_spec("imscore") is None:
        raise ModuleNotFoundError(f"reward {name} needs the package imscore: pip install -r requirements-rewards.txt")
    model_folder(own["model"])


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return sorted(model_folder(own["model"]).glob("model*.safetensors"))


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    """`dtype` is ignored: a model keeps the precision in which imscore loads it. It takes images as float32 in 0..1."""
    scorer = SCORERS[name]
    with tokenizers_of_transformers_4():
        model_class = getattr(importlib.import_module(scorer.module), scorer.class_name)
        model = model_class.from_pretrained(model_folder(own["model"])).to(device).eval()

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = images.permute(0, 3, 1, 2).to(device).float() / 255
        size = 1 if scorer.one_by_one else len(pixels)
        starts = range(0, len(pixels), size)
        found = [model.score(pixels[start : start + size], list(prompts[start : start + size])) for start in starts]
        return torch.cat([value.float().reshape(size) for value in found])

    return reward


def model_folder(model: str) -> Path:
    """The directory with the model's weights. `hub.model_folder` will not do: these models may have no config.json."""
    root = locate(model, patterns=["*.json"], weights=["model*.safetensors"])
    if not any(root.glob("model*.safetensors")):
        raise FileNotFoundError(f"{root} has no model.safetensors, in which the package imscore keeps weights.")
    return root


@contextlib.contextmanager
def tokenizers_of_transformers_4() -> Iterator[None]:
    """Inside the block tokenizers have `additional_special_tokens_ids`: imscore 0.0.11 reads it, transformers 5 lacks it."""
    from transformers import PreTrainedTokenizerBase as Tokenizer

    if hasattr(Tokenizer, "additional_special_tokens_ids"):
        yield
        return
    Tokenizer.additional_special_tokens_ids = property(
        lambda self: self.convert_tokens_to_ids(list(self.extra_special_tokens))
    )
    try:
        yield
    finally:
        del Tokenizer.additional_special_tokens_ids
