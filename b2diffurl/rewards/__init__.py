"""Rewards: a function of (images uint8 [N,H,W,3], prompts [N]) that returns float32 [N].

A name is one of REWARDS, or `package.module:function`, your own function on the Python path. A reward may also return
(rewards, parts), parts a dict of float32 [N] or of N strings, which scores.jsonl then records. docs/rewards.md has a table.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from b2diffurl.experiment.stage import listed
from b2diffurl.runtime.hub import checksum

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
# Settings that do not say what a reward's scores are: where its files lie, which are known by their checksums, and patience.
NOT_DECISIVE = ("model", "clip", "head", "captioner", "scorer", "timeout_sec", "num_retries")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def reward_weights(settings: Mapping) -> dict[str, float]:
    """The rewards that are trained on, with their weights; one of weight 1 where there is no mixture."""
    return dict(settings["weights"] or {settings["name"]: 1.0})


def check_rewards(names: Sequence[str], settings: Mapping, prompts: Sequence[str] = ()) -> None:
    """Refuse an unknown reward, one whose model cannot be had, or one that cannot read the prompts, before any work."""
    for name in names:
        reward_module(name).check(name, settings, prompts)


def load_reward(name: str, settings: Mapping, device: torch.device) -> Reward:
    """The reward of that name, which `check_rewards` lets pass, on that device."""
    return reward_module(name).load(name, settings, device, resolve_dtype(settings["dtype"], device))


def reward_identity(name: str, settings: Mapping) -> list[Any]:
    """What decides a reward's numbers: its name, its settings, and the SHA-256 of its files, wherever they lie."""
    own = {key: value for key, value in dict(settings.get(name, {})).items() if key not in NOT_DECISIVE}
    return [name, own, [checksum(path) for path in reward_module(name).check(name, settings, ())]]


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


def score(reward: Reward, images: Tensor, prompts: Sequence[str], count: int | None = None) -> tuple[Tensor, Parts]:
    """Rewards float32 [count] and parts of the first `count` images, or all, whichever form the reward returns.

    The others pad the batch to a constant shape. A ValueError says what is wrong with what the reward returned.
    """
    with torch.no_grad():
        result = reward(images, prompts)
    rewards, parts = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(rewards, Tensor) or not isinstance(parts, Mapping):
        raise ValueError(
            f"the reward returned {type(result).__name__}; it must be a tensor [N], or that and a dict of parts"
        )
    for name, value in {"reward": rewards, **parts}.items():
        strings = isinstance(value, list) and all(isinstance(text, str) for text in value) and value is not rewards
        if not strings and not isinstance(value, Tensor):
            raise ValueError(
                f"{name!r} of the reward is {type(value).__name__}; it must be a tensor, or for a part N strings"
            )
        shape = tuple(value.shape) if isinstance(value, Tensor) else (len(value),)
        if shape != (len(prompts),):
            raise ValueError(f"{name!r} of the reward has shape {shape} for {len(prompts)} images")
    if "reward" in parts:
        raise ValueError("a part of the reward is called 'reward', as it is itself; call it otherwise")
    cut = {name: value[:count] for name, value in parts.items()}
    return rewards[:count].float().cpu(), {
        name: value.float().cpu() if isinstance(value, Tensor) else value for name, value in cut.items()
    }


@contextmanager
def noting(note: str) -> Iterator[None]:
    """An error inside carries `note`, which says where it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(note)
        raise


def join(batches: Sequence[tuple[Tensor, Parts]]) -> tuple[Tensor, Parts]:
    """Several batches as one. A part that a batch lacks is NaN, or an empty string, for its images."""
    parts: Parts = {}
    for key in dict.fromkeys(key for _, some in batches for key in some):
        of_strings = any(isinstance(some.get(key), list) for _, some in batches)
        missing = [[""] * len(rewards) if of_strings else torch.full((len(rewards),), torch.nan) for rewards, _ in batches]
        values = [some.get(key, nothing) for (_, some), nothing in zip(batches, missing, strict=True)]
        parts[key] = [text for value in values for text in value] if of_strings else torch.cat(values)
    return torch.cat([rewards for rewards, _ in batches]), parts


def by_name(name: str, rewards: Tensor, parts: Parts) -> Parts:
    """A reward's values under its name, and its parts as name/part."""
    return {name: rewards} | {f"{name}/{key}": value for key, value in parts.items()}


def require_finite(name: str, rewards: Tensor, where: str) -> None:
    """A FloatingPointError names the images, of those `where`, whose reward is not finite."""
    bad = (~rewards.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise FloatingPointError(f"reward {name} is not finite for images {listed(bad)} {where}")
