"""What diversity is measured in: features of images, a function of (images uint8 [N,H,W,3], prompts [N]) -> [N,E].

A row for each name in FEATURES:

    clip       embeddings of the CLIP of reward `clip`                        cosine
    layout     where the things of the prompt are, by reward `shapes`         euclidean
    inception  class probabilities by any image classifier of transformers    classes
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from b2diffurl.configuration.settings import Judging, Rewards
from b2diffurl.rewards import Reward, check_rewards, load_reward, reward_identity
from b2diffurl.runtime.hub import checksum, load_whole, model_files, model_folder

FEATURES = ("clip", "layout", "inception")
REWARD_OF = {"clip": "clip", "layout": "shapes"}  # the reward that needs the same model and reads the same prompts


@dataclass(frozen=True)
class Features:
    """Features of an image, not finite where it has none, and the metric in which they are compared."""

    embed: Callable[[Tensor, Sequence[str]], Tensor]
    metric: str  # cosine | euclidean, or classes: the features are probabilities, for the Inception Score


def load_features(
    name: str, judging: Judging, rewards: Rewards, device: torch.device, loaded: Mapping[str, Reward]
) -> Features:
    """The features of that name. The model of a reward that is `loaded` already is shared."""
    check_features(name, judging, rewards)
    if name == "inception":
        return Features(load_classifier(judging.inception_model, device), "classes")
    if name == "layout":
        from b2diffurl.rewards.shapes import layouts

        return Features(layouts, "euclidean")
    clip = loaded.get("clip") or load_reward("clip", rewards, device)
    return Features(lambda images, prompts: clip.embed_images(images).cpu(), "cosine")


def check_features(name: str, judging: Judging, rewards: Rewards, prompts: Sequence[str] = ()) -> None:
    """Refuse unknown features, or those whose model cannot be had or whose prompts they cannot read."""
    if not isinstance(name, str) or name not in FEATURES:
        raise ValueError(f"unknown features {name!r} in eval.diversity; known: {', '.join(FEATURES)}")
    try:
        if name in REWARD_OF:
            check_rewards([REWARD_OF[name]], rewards, prompts)
        else:
            model_folder(judging.inception_model, tokenizer=False)
    except (ValueError, OSError) as error:
        hint = "without it: --config.eval.diversity='()'"
        raise ValueError(f"eval.diversity asks for {name!r}, which cannot be had: {error} ({hint})") from None


def features_identity(name: str, judging: Judging, rewards: Rewards) -> list[Any]:
    """What decides the numbers of these features."""
    if name in REWARD_OF:
        return reward_identity(REWARD_OF[name], rewards)
    return [name, [checksum(path) for path in model_files(judging.inception_model, tokenizer=False)]]


def load_classifier(model: str, device: torch.device) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """Class probabilities [N,E] of images by the classifier of that hub id or directory."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    root = model_folder(model, tokenizer=False)
    classifier = load_whole(AutoModelForImageClassification, root, torch.float32, device)
    processor = AutoImageProcessor.from_pretrained(root, backend="pil", trust_remote_code=False)

    @torch.no_grad()
    def classify(images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = processor(images=list(images.permute(0, 3, 1, 2).cpu()), return_tensors="pt").pixel_values
        return classifier(pixel_values=pixels.to(device)).logits.softmax(1).cpu()

    return classify
