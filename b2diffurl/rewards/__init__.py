"""Rewards: how well each image does what is wanted of it. More is better.

A reward is a function of images uint8 [N,H,W,3] and their prompts [N]. It returns a float tensor [N], or that and a dict of
parts, each a float tensor [N] or N strings (a caption, an answer), which scores.jsonl records beside the score.

Its name is one of REWARDS, or `package.module:function`, your own function on the Python path. docs/rewards.md has a table,
and says how to add one.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from b2diffurl.configuration.settings import Rewards
from b2diffurl.experiment.not_finite import listed
from b2diffurl.runtime.hub import checksum

Parts = dict[str, Tensor | list[str]]
Reward = Callable[[Tensor, Sequence[str]], Tensor | tuple[Tensor, Parts]]


class RewardModule(Protocol):
    """The functions that a module of this package has, for each of its rewards.

    `name` is the reward's; a module may have several. `own` is its section of the settings, config.reward.<name>, or {}.
    A module may also have NOT_DECISIVE, the keys of `own` that do not change a score: where a model lies, whose files are
    known by their checksums, or how long to wait for an answer.
    """

    def check(self, name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
        """Refuse what cannot work, before any work: a model that cannot be had, a package that is not installed, a setting,
        a prompt that cannot be judged. The ValueError, OSError or ImportError says what to do.

        `prompts` are those to come, as far as they are known. Sampling, selecting and judging each ask, so it is quick
        and loads no model.
        """

    def files(self, name: str, own: Mapping[str, Any]) -> list[Path]:
        """The files that decide the scores, always in the same order; [] where there are none."""

    def load(self, name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
        """The reward, its model on `device` in `dtype`.

        It is called with one batch after the other, all of one shape. The last one is filled up, as a rule by repeating its
        last image and prompt, and what the reward says of those is dropped. An image's score depends on no other image, so
        batches inside have a constant shape, too. An exception ends the run; the same command scores the stage anew.
        """


# The module of this package that has each reward. It is imported only when it is used.
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
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def check_rewards(names: Sequence[str], rewards: Rewards, prompts: Sequence[str] = ()) -> None:
    """Refuse an unknown reward, one whose model cannot be had, or one that cannot read the prompts, before any work."""
    for name in names:
        reward_module(name).check(name, rewards.own.get(name, {}), prompts)


def load_reward(name: str, rewards: Rewards, device: torch.device) -> Reward:
    """The reward of that name, which `check_rewards` lets pass, on that device."""
    return reward_module(name).load(name, rewards.own.get(name, {}), device, resolve_dtype(rewards.dtype, device))


def reward_identity(name: str, rewards: Rewards) -> list[Any]:
    """What decides a reward's scores: its name, its settings, and the SHA-256 of its files, wherever they lie."""
    module, own = reward_module(name), rewards.own.get(name, {})
    passed_over = getattr(module, "NOT_DECISIVE", ())
    decisive = {key: value for key, value in own.items() if key not in passed_over}
    return [name, decisive, [checksum(path) for path in module.files(name, own)]]


def reward_module(name: str) -> RewardModule:
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
