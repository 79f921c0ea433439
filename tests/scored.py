"""What is on disk of the tiny experiment's images and scores, and rewards worked out by hand."""

import io
import json
from pathlib import Path

import numpy as np
from conftest import stage_of
from PIL import Image

NUM_IMAGES, BATCH = 18, 4  # of the tiny experiment's stage, and of its scorer
JPEG, CLIP = "jpeg_compressibility", "clip"
REDNESS = "def redness(images, prompts):\n    return images[..., 0].float().mean((1, 2)) / 255\n"


def scores(folder: Path, index: int = 0) -> list[dict]:
    return [json.loads(line) for line in stage_of(folder, index).scores.read_text().splitlines()]


def pixels(folder: Path, index: int = 0) -> list[np.ndarray]:
    """The stage's images as Pillow reads them."""
    return [np.asarray(Image.open(stage_of(folder, index).image(n))) for n in range(NUM_IMAGES)]


def jpeg_kb(image: np.ndarray) -> float:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return len(file.getvalue()) / 1000


def redness(image: np.ndarray) -> float:
    return float(image[..., 0].mean()) / 255
