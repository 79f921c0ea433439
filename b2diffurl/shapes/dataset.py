"""The training scenes: drawn once, kept with their pictures and latents in the build folder."""

import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from b2diffurl.shapes.scene import Scene, random_scene, render
from b2diffurl.shapes.training import BUILD_DIR

log = logging.getLogger(__name__)

NUM_SCENES = 24_000
SCENE_SEED = 1


def training_scenes(count: int = NUM_SCENES) -> list[Scene]:
    """The first `count` scenes of the training set."""
    rng = np.random.default_rng(SCENE_SEED)
    return [random_scene(rng) for _ in range(count)]


def pictures(scenes: list[Scene]) -> torch.Tensor:
    """Their renderings, uint8 [N, 64, 64, 3]."""
    return torch.from_numpy(np.stack([render(scene) for scene in scenes]))


def training_pictures() -> torch.Tensor:
    """All training pictures, rendered on the first call."""
    path = BUILD_DIR / "pictures.safetensors"
    if not path.exists():
        log.info("rendering %d training scenes", NUM_SCENES)
        save_tensors({"pictures": pictures(training_scenes())}, path)
    return load_file(path)["pictures"]


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file in full or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, H, W, 3] to float [N, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float [N, 3, H, W] in [-1, 1] to uint8 [N, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
