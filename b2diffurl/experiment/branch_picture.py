"""The branch picture's material: one group of a stage decoded on its way, its shared prefix and then its K branches.

tree.png    K rows of tiles: in the first one the shared states, beside them in each row that branch's states
tree.json   prompt, and how many sampler steps each column's state is from noise
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from b2diffurl.algorithm.types import Predict
from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files

TILE_PX = 256  # larger images are scaled down to it
NUM_SHARED, NUM_APART = 4, 4  # states shown of the prefix and of each branch, at most


@dataclass(frozen=True)
class Tree:
    """One group: its prompt and images uint8 [h,w,3] by the number of steps done."""

    prompt: str
    num_steps: int  # T
    shared: dict[int, np.ndarray]
    branches: list[dict[int, np.ndarray]]  # of each branch; the last one's key is T, the finished image


def recording_prefix(predict: Predict, num_prefix_steps: int, seen: list[Tensor]) -> Predict:
    """`predict` that adds the first group's x_t [1,C,h,w] of each prefix step to `seen`."""

    def recorded(x_t: Tensor, i: int) -> Tensor:
        if i < num_prefix_steps:
            seen.append(x_t[:1])
        return predict(x_t, i)

    return recorded


@dataclass(frozen=True)
class Sheet:
    """A tree as its files hold it."""

    tiles: Tensor  # uint8 [K*h, columns*w, 3]
    facts: dict[str, Any]


def decode_tree(prompt: str, prefix: list[Tensor], latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Sheet:
    """A group's states before each prefix step, [1,C,h,w], and after them, latents [K,S+1,C,h,w], as pictures."""
    split, num_steps = len(prefix), len(prefix) + latents.shape[1] - 1
    shared, apart = spread(0, split, NUM_SHARED), spread(split + 1, num_steps, NUM_APART)
    states = [*prefix, latents[:1, 0]]
    chosen = [states[step] for step in shared] + [latents[:, step - split] for step in apart]
    images = iter(shrink(decode(torch.cat(chosen))))
    tiles = [next(images) for _ in shared]
    sheet = torch.full((len(latents), len(shared) + len(apart), *tiles[0].shape), 255, dtype=torch.uint8)
    sheet[0, : len(shared)] = torch.stack(tiles)
    for column in range(len(apart)):
        for branch in range(len(latents)):
            sheet[branch, len(shared) + column] = next(images)
    facts = {"prompt": prompt, "num_steps": num_steps, "shared": shared, "branches": apart, "num_branches": len(latents)}
    return Sheet(sheet.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).contiguous(), facts)


def save_tree(stage: Stage, sheet: Sheet) -> list[Path]:
    """Write tree.png and tree.json; returns them."""
    picture, facts = stage.folder / "tree.png", stage.folder / "tree.json"
    files.write_image(picture, sheet.tiles)
    files.write_record(facts, sheet.facts)
    return [picture, facts]


def load_tree(stage: Stage) -> Tree | None:
    """What `save_tree` wrote, or None for a stage that has none; a ValueError if it is damaged."""
    if not (stage.folder / "tree.json").is_file():
        return None
    if stage.finished("sample"):
        stage.verify("sample", "tree.json", "tree.png")
    facts = files.read_json(stage.folder / "tree.json")
    sheet = files.read_image(stage.folder / "tree.png").numpy()
    columns = [*facts["shared"], *facts["branches"]]
    rows = [np.split(row, len(columns), axis=1) for row in np.split(sheet, facts["num_branches"], axis=0)]
    branches = [dict(zip(columns, row, strict=True)) for row in rows]
    return Tree(
        facts["prompt"],
        facts["num_steps"],
        {step: branches[0][step] for step in facts["shared"]},
        [{step: branch[step] for step in facts["branches"]} for branch in branches],
    )


def spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` whole numbers from first to last, both among them, as evenly as can be; of one number, the last."""
    count = min(count, last - first + 1)
    return [last - round((last - first) * n / max(1, count - 1)) for n in range(count)][::-1]


def shrink(images: Tensor) -> Tensor:
    """Images uint8 [N,H,W,3], no larger than TILE_PX."""
    if max(images.shape[1:3]) <= TILE_PX:
        return images
    scale = TILE_PX / max(images.shape[1:3])
    size = (round(images.shape[2] * scale), round(images.shape[1] * scale))
    small = [Image.fromarray(image.numpy()).resize(size, Image.Resampling.LANCZOS) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small]))
