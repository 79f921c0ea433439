"""Whether an image shows what its prompt asks for: objects, how many, in which colours and positions, as GenEval asks.

GenEval (Ghosh et al. 2023, arXiv 2310.11513) detects objects by Mask2Former, which knows 80 classes. Here a zero-shot
detector looks for the classes of the prompt, so they may be any. As it gives boxes and no masks, the ground beside an object
stays in the crop of which CLIP says the colour.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from b2diffurl.configuration.prompts import load_json, parse_text, read_text
from b2diffurl.rewards import Parts, Reward, different
from b2diffurl.rewards.clip import Clip
from b2diffurl.rewards.detector import Detector, check_detector
from b2diffurl.rewards.geneval import COLORS, KINDS, Answer, Scene, Seen, describe, judge, keep, read_scene
from b2diffurl.rewards.plain_prompts import scene_of
from b2diffurl.runtime.hub import model_files, model_folder
from b2diffurl.runtime.paths import resource

NOT_DECISIVE = ("detector", "clip", "metadata", "prompt_files")
GREY = 153  # of the ground that GenEval puts behind objects
COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def check(name: str, own: Mapping[str, Any], prompts: Sequence[str]) -> None:
    known = read_metadata(own)
    for prompt in prompts:
        if prompt not in known:
            scene_of(prompt)
    check_detector(own["detector"])
    model_folder(own["clip"])


def files(name: str, own: Mapping[str, Any]) -> list[Path]:
    return [*model_files(own["detector"]), *model_files(own["clip"]), *metadata_files(own)]


def load(name: str, own: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Reward:
    known = read_metadata(own)
    detector, color_of = Detector(own["detector"], device, dtype), ColorOf(Clip(own["clip"], device, dtype))
    scene = cache(lambda prompt: known.get(prompt) or scene_of(prompt))

    def look(image: Tensor, scene: Scene) -> dict[str, list[Seen]]:
        threshold = own["count_threshold"] if scene.counted else own["threshold"]
        seen = keep(detector(image, scene.classes, threshold), threshold=threshold, overlap=own["overlap"])
        return coloured(image, scene, seen, color_of)

    def compose(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        scenes = [scene(prompt) for prompt in prompts]
        first, rows = different(images, prompts)
        found = [look(images[row], scenes[row]) for row in first]
        seen = [found[row] for row in rows]
        answers = [judge(one, objects, margin=own["margin"]) for one, objects in zip(scenes, seen, strict=True)]
        parts = {kind: torch.tensor([share_right(some, (kind,)) for some in answers]) for kind in KINDS}
        parts["correct"] = torch.tensor([float(all(answer.right for answer in some)) for some in answers])
        parts["found"] = [describe(some, objects) for some, objects in zip(answers, seen, strict=True)]
        fraction = torch.tensor([share_right(some, KINDS) for some in answers])
        return parts["correct"] if own["score"] == "all" else fraction, parts

    return compose


def share_right(answers: Sequence[Answer], kinds: Sequence[str]) -> float:
    """The share of these kinds' questions that are answered rightly; NaN if there are none."""
    right = [answer.right for answer in answers if answer.kind in kinds]
    return sum(right) / len(right) if right else torch.nan


# --- what is asked --------------------------------------------------------------------------------


def metadata_files(own: Mapping[str, Any]) -> list[Path]:
    """The files with metadata: the one that is named, else those of the run's prompt files that have some."""
    if own["metadata"]:
        path = resource(own["metadata"])
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path.absolute()}, which reward.compose.metadata names (docs/rewards.md)")
        return [path]
    found = dict.fromkeys(resource(path) for path in own["prompt_files"])
    lines = [path for path in found if path.suffix.lower() in (".jsonl", ".ndjson") and path.is_file()]
    return [path for path in lines if any(read_scenes(path))]


def read_metadata(own: Mapping[str, Any]) -> dict[str, Scene]:
    """{prompt: its scene} of the files with metadata; a ValueError names the line that is wrong, or contradicts another."""
    scenes: dict[str, tuple[str, Scene]] = {}
    for path in metadata_files(own):
        for place, prompt, scene in read_scenes(path):
            other, known = scenes.setdefault(prompt, (place, scene))
            if known != scene:
                raise ValueError(f"{place} contradicts {other}: they ask for different things by the prompt {prompt!r}")
    if own["metadata"] and not scenes:
        raise ValueError(f'{own["metadata"]} has no metadata: none of its lines has "include" (docs/rewards.md)')
    return {prompt: scene for prompt, (_, scene) in scenes.items()}


def read_scenes(path: Path) -> Iterator[tuple[str, str, Scene]]:
    """(place, prompt, scene) of those lines of a JSON-lines file that have metadata; a ValueError names a wrong line."""
    for place, line in parse_text(path, read_text(path)):
        row = load_json(place, line)
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise ValueError(f'{place} has no "prompt": metadata are JSON lines with a prompt each (docs/rewards.md)')
        try:
            scene = read_scene(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if scene:
            yield place, row["prompt"], scene


# --- colours --------------------------------------------------------------------------------------


def coloured(image: Tensor, scene: Scene, seen: Mapping[str, list[Seen]], color_of: "ColorOf") -> dict[str, list[Seen]]:
    """The objects, with colours of those that the scene asks the colour of."""
    asked = {wanted.name: wanted.count for wanted in scene.include if wanted.color}
    return {
        name: [replace(one, color=color_of(image, one)) if n < asked.get(name, 0) else one for n, one in enumerate(objects)]
        for name, objects in seen.items()
    }


class ColorOf:
    """Which of COLORS an object has, by CLIP: call it with an image uint8 [H,W,3] and the object."""

    def __init__(self, clip: Clip):
        self.clip = clip
        self.classifier = cache(self.embed_colors)

    def __call__(self, image: Tensor, one: Seen) -> str:
        # One crop at a time: the score of a crop must not depend on how many there are.
        embedding = normalize(self.clip.embed_images(square_crop(image, one)[None]), dim=-1)
        return COLORS[(embedding @ self.classifier(one.name).T).argmax().item()]

    def embed_colors(self, name: str) -> Tensor:
        """An embedding for each of COLORS [10,E]: the mean of its texts', as in GenEval."""
        texts = [text.format(color=color, name=name) for color in COLORS for text in COLOR_TEXTS]
        embeddings = normalize(self.clip.embed_prompts(texts), dim=-1).unflatten(0, (len(COLORS), len(COLOR_TEXTS)))
        return normalize(embeddings.mean(1), dim=-1)


def square_crop(image: Tensor, one: Seen) -> Tensor:
    """The object's box, uint8 [S,S,3], with grey beside its shorter side.

    CLIP's processor cuts an image to its middle square. A long object would lose its ends, and a very thin one would first
    become huge.
    """
    height, width = image.shape[:2]
    left, top = (min(max(int(start), 0), size - 1) for start, size in zip(one.box, (width, height), strict=False))
    right, bottom = (max(start + 1, math.ceil(end)) for start, end in zip((left, top), one.box[2:], strict=True))
    crop = image[top:bottom, left:right]
    side = max(crop.shape[:2])
    square = image.new_full((side, side, 3), GREY)
    y, x = ((side - length) // 2 for length in crop.shape[:2])
    square[y : y + crop.shape[0], x : x + crop.shape[1]] = crop
    return square
