"""What diversity is measured in: features of images, a function of (images uint8 [N,H,W,3], prompts [N]) -> [N,E]."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from b2diffurl.rewards import Reward, check_rewards, load_reward


@dataclass(frozen=True)
class Features:
    """Features of an image, not finite where it has none, and the metric in which they are compared."""

    embed: Callable[[Tensor, Sequence[str]], Tensor]
    metric: str  # of b2diffurl.diversity: cosine | euclidean


def load_features(name: str, config: Mapping, device: torch.device, rewards: Mapping[str, Reward]) -> Features:
    """The features of that name; `config` is that of the reward, `rewards` those whose model can be shared."""
    check_features(name, config)
    return FEATURES[name](config, device, rewards)


def check_features(name: str, config: Mapping, prompts: Sequence[str] = ()) -> None:
    """Refuse unknown features, or those whose model cannot be had or whose prompts they cannot read."""
    if name not in FEATURES:
        raise ValueError(f"unknown features {name!r} in eval.diversity; known: {', '.join(FEATURES)}")
    try:
        check_rewards([REWARD_OF[name]], config, prompts)
    except (ValueError, OSError) as error:
        hint = "without it: --config.eval.diversity='()'"
        raise ValueError(f"eval.diversity asks for {name!r}, which cannot be had: {error} ({hint})") from None


def _clip(config: Mapping, device: torch.device, rewards: Mapping[str, Reward]) -> Features:
    clip = rewards.get("clip") or load_reward("clip", config, device)
    return Features(lambda images, prompts: clip.embed_images(images).cpu(), "cosine")


def _layout(config: Mapping, device: torch.device, rewards: Mapping[str, Reward]) -> Features:
    from b2diffurl.rewards.shapes import layouts

    return Features(layouts, "euclidean")


FEATURES = {"clip": _clip, "layout": _layout}
REWARD_OF = {"clip": "clip", "layout": "shapes"}  # the reward that needs the same model and reads the same prompts
