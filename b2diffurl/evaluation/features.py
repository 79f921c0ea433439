"""The image features in which diversity is measured.

The names in FEATURES, and the metric of each:

    clip       embeddings by the CLIP model of reward `clip`                           cosine
    layout     places and sizes of the prompt's things, by the checker of `shapes`     euclidean
    inception  class probabilities by any image classifier of transformers             classes
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from b2diffurl.configuration.settings import Judging, Rewards
from b2diffurl.rewards import Reward, check_rewards, load_reward, reward_identity
from b2diffurl.runtime.hub import MissingModelError, checksum, load_whole, model_files, model_folder, naming_settings

FEATURES = ("clip", "layout", "inception")
REWARD_OF = {"clip": "clip", "layout": "shapes"}  # the reward with the same model, which reads the same prompts


@dataclass(frozen=True)
class Features:
    """A function that computes features of images, and the metric that compares them."""

    embed: Callable[[Tensor, Sequence[str]], Tensor]  # (uint8 [N,H,W,3], prompts [N]) -> [N,E]; NaN if an image has none
    metric: str  # cosine | euclidean | classes: the features are class probabilities, for the Inception Score


def load_features(
    name: str, judging: Judging, rewards: Rewards, device: torch.device, loaded: Mapping[str, Reward | None]
) -> Features:
    """Load the features `name`. They share the model of a reward that is `loaded` already, by its name."""
    check_features(name, judging, rewards)
    if name == "inception":
        return Features(load_classifier(judging.inception_model, device), "classes")
    if name == "layout":
        from b2diffurl.rewards.shapes import layouts

        return Features(layouts, "euclidean")
    clip = loaded.get("clip") or load_reward("clip", rewards, device)
    return Features(lambda images, prompts: clip.embed_images(images).cpu(), "cosine")


def check_features(name: str, judging: Judging, rewards: Rewards, prompts: Sequence[str] = ()) -> None:
    """Raise a ValueError if features are unknown, if their model cannot be had, or if they cannot read the prompts."""
    if not isinstance(name, str) or name not in FEATURES:
        raise ValueError(f"unknown features {name!r} in eval.diversity; known: {', '.join(FEATURES)}")
    hint = "without it: --config.eval.diversity='()'"
    try:
        if name in REWARD_OF:
            check_rewards([REWARD_OF[name]], rewards, prompts)
        else:
            with naming_settings({"eval.inception.model": judging.inception_model}):
                model_folder(judging.inception_model, tokenizer=False)
    except MissingModelError as error:  # it names the setting
        error.said = f"eval.diversity asks for {name!r}, which cannot be had: {error.said} ({hint})"
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"eval.diversity asks for {name!r}, which cannot be had: {error} ({hint})") from None


def features_identity(name: str, judging: Judging, rewards: Rewards) -> list[Any]:
    """Everything that decides these features' numbers, for a checksum: names, settings, checksums of the model's files."""
    if name in REWARD_OF:
        return reward_identity(REWARD_OF[name], rewards)
    return [name, [checksum(path) for path in model_files(judging.inception_model, tokenizer=False)]]


def load_classifier(model: str, device: torch.device) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """A function that gives class probabilities [N,E] of images. `model` is a classifier's hub id or directory."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    root = model_folder(model, tokenizer=False)
    # Always float32 and PIL: the score must not depend on whether torchvision is installed.
    classifier = load_whole(AutoModelForImageClassification, root, torch.float32, device)
    processor = AutoImageProcessor.from_pretrained(root, backend="pil", trust_remote_code=False)

    @torch.no_grad()
    def classify(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = processor(images=list(images.permute(0, 3, 1, 2).cpu()), return_tensors="pt").pixel_values
        return classifier(pixel_values=pixels.to(device)).logits.softmax(1).cpu()

    return classify
