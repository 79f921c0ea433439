"""Rewards: a function of (images uint8 [N,H,W,3], prompts [N]) that returns float32 [N].

A name is one of REWARDS, or `package.module:function`, your own function on the Python path. A reward may also return
(rewards, parts), parts a dict of float32 [N], which scores.jsonl then records.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from b2diffurl import files
from b2diffurl.models.hub import locate

Parts = dict[str, Tensor]
Reward = Callable[[Tensor, Sequence[str]], Tensor | tuple[Tensor, Parts]]


def load_reward(name: str, config: Mapping, device: torch.device) -> Reward:
    """The reward of that name; its module, and the packages it needs, are imported only now."""
    check_reward(name, config)
    return import_reward(name) if ":" in name else REWARDS[name](config, device)


def check_reward(name: str, config: Mapping, prompts: Sequence[str] = ()) -> None:
    """Refuse an unknown reward, one whose model cannot be had, or one that cannot read the prompts, before any work."""
    if ":" in name:
        import_reward(name)
    elif name not in REWARDS:
        raise ValueError(f"unknown reward {name!r}; known: {', '.join(REWARDS)}, or your own as package.module:function")
    if name == "clip":
        clip_directory(config)
    if name == "shapes":
        from b2diffurl.shapes.scene import parse

        for prompt in prompts:
            parse(prompt)


def import_reward(name: str) -> Reward:
    """The function that `package.module:function` names; a ValueError if the module has none."""
    module, _, function = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), function, None)
    except (ModuleNotFoundError, TypeError, ValueError) as error:
        hint = "write package.module:function, and keep the package beside the scripts or on PYTHONPATH"
        raise ValueError(f"reward {name!r}: {error}; {hint}") from None
    if not callable(reward):
        raise ValueError(f"reward {name!r}: {module} has no function {function!r}")
    return reward


def reward_fingerprint(name: str, config: Mapping) -> str:
    """SHA-256 of what decides a reward's numbers: the file of your function, or the weights of its model; "" if neither."""
    if ":" in name:
        source = getattr(importlib.import_module(name.partition(":")[0]), "__file__", None)
        return files.sha256(Path(source)) if source else ""
    if name == "clip":
        return " ".join(files.sha256(path) for path in sorted(clip_directory(config).glob("model*.safetensors")))
    return ""


def clip_directory(config: Mapping) -> Path:
    """The directory of the CLIP model that the configuration names."""
    root = locate(config["model"], patterns=["*.json", "*.txt", "model*.safetensors"])
    if not (root / "config.json").is_file() or not list(root.glob("model*.safetensors")):
        raise FileNotFoundError(f"{root} is no CLIP directory: it needs config.json and model.safetensors.")
    return root


def score(reward: Reward, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
    """Rewards [N] and their parts, whichever form the reward returns."""
    with torch.no_grad():
        result = reward(images, prompts)
    rewards, parts = result if isinstance(result, tuple) else (result, {})
    if not all(isinstance(value, Tensor) for value in (rewards, *parts.values())):
        raise ValueError(
            f"the reward returned {type(rewards).__name__}; it must be a tensor [N], or that and a dict of them"
        )
    if rewards.shape != (len(prompts),):
        raise ValueError(f"the reward returned shape {tuple(rewards.shape)} for {len(prompts)} images")
    return rewards.float().cpu(), {key: value.float().cpu() for key, value in parts.items()}


def _clip(config: Mapping, device: torch.device) -> Reward:
    from b2diffurl.rewards.clip import Clip

    return Clip(clip_directory(config), device)


def _shapes(config: Mapping, device: torch.device) -> Reward:
    from b2diffurl.rewards.shapes import shapes

    return shapes


REWARDS = {"clip": _clip, "shapes": _shapes}
