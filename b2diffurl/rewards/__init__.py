"""Rewards: a function of (images uint8 [N,H,W,3], prompts [N]) that returns float32 [N].

A name is one of REWARDS, or `package.module:function`, your own function on the Python path. A reward may also return
(rewards, parts), parts a dict of float32 [N] or of N strings, which scores.jsonl then records. docs/rewards.md has a table.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from b2diffurl import files
from b2diffurl.models.hub import locate

Parts = dict[str, Tensor | list[str]]
Reward = Callable[[Tensor, Sequence[str]], Tensor | tuple[Tensor, Parts]]

# The module of this package that has each reward, imported only when it is used. A module has two functions:
#   check(name, settings, prompts) -> the files that decide the reward's scores; refuses what cannot work, before any work
#   load(name, settings, device, dtype) -> the Reward
# `settings` is config.reward, whose section of the reward's name is its own.
REWARDS = {
    "clip": "clip",
    "pickscore": "pickscore",
    "aesthetic": "aesthetic",
    "bertscore": "bertscore",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "image_reward": "imscore",
    "hps_v2": "imscore",
    "vqascore": "imscore",
    "shapes": "shapes",
    "http": "http",
    "file": "file",
}
# What is downloaded of a model of transformers. In either form its weights are read as tensors alone; the second is for
# models that have not got the first.
MODEL_PARTS = ("*.json", "*.txt", "*.model", "*.jinja")
MODEL_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
ADDRESS = ("url", "timeout_sec", "num_retries")  # how a reward is reached, not what it says
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def reward_weights(settings: Mapping) -> dict[str, float]:
    """The rewards that are trained on, with their weights; one of weight 1 where there is no mixture."""
    return dict(settings["weights"] or {settings["name"]: 1.0})


def check_rewards(names: Sequence[str], settings: Mapping, prompts: Sequence[str] = ()) -> None:
    """Refuse an unknown reward, one whose model cannot be had, or one that cannot read the prompts, before any work."""
    for name in names:
        reward_module(name).check(name, settings, prompts)


def load_reward(name: str, settings: Mapping, device: torch.device) -> Reward:
    """The reward of that name on that device; the packages it needs are imported only now."""
    module = reward_module(name)
    module.check(name, settings, ())
    return module.load(name, settings, device, resolve_dtype(settings["dtype"], device))


def reward_identity(name: str, settings: Mapping) -> list[Any]:
    """What decides a reward's numbers: its name, its settings, and the SHA-256 of its files."""
    own = {key: value for key, value in dict(settings.get(name, {})).items() if key not in ADDRESS}
    return [name, own, [files.sha256(path) for path in reward_module(name).check(name, settings, ())]]


def reward_module(name: str) -> ModuleType:
    """The module that has the reward; a ValueError if there is none of that name."""
    if ":" not in name and name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(REWARDS)}, or your own as package.module:function")
    return importlib.import_module(f"b2diffurl.rewards.{REWARDS.get(name, 'own')}")


def resolve_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: float16 on CUDA, whose three more bits than bfloat16's keep siblings apart; float32 on the CPU."""
    if wanted == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[wanted]


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
    """Rewards float32 [N] and their parts, whichever form the reward returns; a ValueError if it returns something else."""
    with torch.no_grad():
        result = reward(images, prompts)
    rewards, parts = result if isinstance(result, tuple) else (result, {})
    if not isinstance(rewards, Tensor):
        raise ValueError(
            f"the reward returned {type(rewards).__name__}; it must be a tensor [N], or that and a dict of them"
        )
    if rewards.shape != (len(prompts),):
        raise ValueError(f"the reward returned shape {tuple(rewards.shape)} for {len(prompts)} images")
    for key, value in parts.items():
        if not isinstance(value, Tensor | list) or len(value) != len(prompts):
            raise ValueError(f"part {key!r} of the reward must be a tensor [{len(prompts)}], or as many strings")
    return rewards.float().cpu(), {
        key: value.float().cpu() if isinstance(value, Tensor) else value for key, value in parts.items()
    }


def by_name(name: str, rewards: Tensor, parts: Parts) -> Parts:
    """A reward's values under its name, and its parts as name/part."""
    return {name: rewards} | {f"{name}/{key}": value for key, value in parts.items()}


def model_folder(model: str) -> Path:
    """The directory of a model of transformers, by hub id or path; a FileNotFoundError says what is missing."""
    root = locate(model, patterns=MODEL_PARTS, weights=MODEL_WEIGHTS)
    if not (root / "config.json").is_file() or not any(any(root.glob(pattern)) for pattern in MODEL_WEIGHTS):
        raise FileNotFoundError(f"{root} is no model directory: it needs config.json and {' or '.join(MODEL_WEIGHTS)}.")
    return root


def model_files(model: str) -> list[Path]:
    """The files of a model of transformers that decide its output."""
    root = model_folder(model)
    weights = next(found for pattern in MODEL_WEIGHTS if (found := sorted(root.glob(pattern))))
    return [*weights, *sorted(root.glob("*.json"))]
