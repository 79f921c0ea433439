"""What diversity is measured in: features of images, a function of (images uint8 [N,H,W,3], prompts [N]) -> [N,E]."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from b2diffurl.rewards import Reward, check_rewards, load_reward, reward_identity
from b2diffurl.runtime.hub import checksum, load_whole, model_files, model_folder


@dataclass(frozen=True)
class Features:
    """Features of an image, not finite where it has none, and the metric in which they are compared."""

    embed: Callable[[Tensor, Sequence[str]], Tensor]
    metric: str  # cosine | euclidean, or classes: the features are probabilities, for the Inception Score


def load_features(name: str, config: Mapping, device: torch.device, rewards: Mapping[str, Reward]) -> Features:
    """The features of that name; `rewards` are those whose model can be shared."""
    check_features(name, config)
    return FEATURES[name](config, device, rewards)


def check_features(name: str, config: Mapping, prompts: Sequence[str] = ()) -> None:
    """Refuse unknown features, or those whose model cannot be had or whose prompts they cannot read."""
    if not isinstance(name, str) or name not in FEATURES:
        raise ValueError(f"unknown features {name!r} in eval.diversity; known: {', '.join(FEATURES)}")
    try:
        if name in REWARD_OF:
            check_rewards([REWARD_OF[name]], config["reward"], prompts)
        else:
            model_files(config["eval"]["inception"]["model"], tokenizer=False)
    except (ValueError, OSError) as error:
        hint = "without it: --config.eval.diversity='()'"
        raise ValueError(f"eval.diversity asks for {name!r}, which cannot be had: {error} ({hint})") from None


def features_identity(name: str, config: Mapping) -> list[Any]:
    """What decides the numbers of these features."""
    if name in REWARD_OF:
        return reward_identity(REWARD_OF[name], config["reward"])
    return [name, [checksum(path) for path in model_files(config["eval"]["inception"]["model"], tokenizer=False)]]


def _clip(config: Mapping, device: torch.device, rewards: Mapping[str, Reward]) -> Features:
    clip = rewards.get("clip") or load_reward("clip", config["reward"], device)
    return Features(lambda images, prompts: clip.embed_images(images).cpu(), "cosine")


def _layout(config: Mapping, device: torch.device, rewards: Mapping[str, Reward]) -> Features:
    from b2diffurl.rewards.shapes import layouts

    return Features(layouts, "euclidean")


def _inception(config: Mapping, device: torch.device, rewards: Mapping[str, Reward]) -> Features:
    """Class probabilities of any image classifier of transformers."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    root = model_folder(config["eval"]["inception"]["model"], tokenizer=False)
    classifier = load_whole(AutoModelForImageClassification, root, torch.float32, device)
    processor = AutoImageProcessor.from_pretrained(root, backend="pil", trust_remote_code=False)

    @torch.no_grad()
    def classify(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = processor(images=list(images.permute(0, 3, 1, 2).cpu()), return_tensors="pt").pixel_values
        return classifier(pixel_values=pixels.to(device)).logits.softmax(1).cpu()

    return Features(classify, "classes")


FEATURES = {"clip": _clip, "layout": _layout, "inception": _inception}
REWARD_OF = {"clip": "clip", "layout": "shapes"}  # the reward that needs the same model and reads the same prompts
