"""The branch picture of a stage: its first group decoded at several sampler steps, the shared prefix and then each branch.

tree.png    a grid of tiles: a row for each branch, a column for each sampler step; what branches share stands in the first
            row of them only
tree.json   the prompt, and how many sampler steps each column's state is from noise; if branches part in a tree, also
            `together`, how many of them share a state in the columns after the prefix

K branches, T sampler steps, S of them trained from where the branches part, latents [C,h,w], images uint8 [H,W,3]
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from b2diffurl.algorithm.tree import Tree
from b2diffurl.algorithm.types import Predict
from b2diffurl.experiment.stage import Stage
from b2diffurl.runtime import files

TILE_PX = 256  # larger images are scaled down to this
NUM_SHARED, NUM_APART = 4, 4  # states shown of the prefix and of each branch, at most


@dataclass(frozen=True)
class GroupPicture:
    """One group as images [h,w,3], each under the number of sampler steps done by then."""

    prompt: str
    num_steps: int  # T
    shared: dict[int, np.ndarray]
    branches: list[dict[int, np.ndarray]]  # [K]; each branch's last key is T, its finished image
    together: dict[int, int]  # how many neighbouring branches share the image of that step


def recording_prefix(predict: Predict, num_prefix_steps: int, seen: list[Tensor]) -> Predict:
    """Wrap `predict`: before each step of the prefix it appends the first group's x_t [1,C,h,w] to `seen`."""

    def recorded(x_t: Tensor, i: int) -> Tensor:
        if i < num_prefix_steps:
            seen.append(x_t[:1])
        return predict(x_t, i)

    return recorded


@dataclass(frozen=True)
class Sheet:
    """A group's picture in the form of its files."""

    tiles: Tensor  # uint8 [K*h, columns*w, 3]: tree.png
    facts: dict[str, Any]  # tree.json


def decode_tree(
    prompt: str,
    prefix: list[Tensor],  # [1,C,h,w] before each shared step
    latents: Tensor,  # [K,S+1,C,h,w] after them: the trained window
    finished: Tensor,  # [K,C,h,w]
    num_steps: int,  # T
    tree: Tree,  # in which the K branches part
    decode: Callable[[Tensor], Tensor],
) -> Sheet:
    """Decode states of a group."""
    # All branches start from the same state, so the last shared one is taken from the first branch.
    states = dict(enumerate([*prefix, latents[:1, 0]]))
    states |= {len(states) + n: latents[:, n + 1] for n in range(latents.shape[1] - 1)} | {num_steps: finished}
    split, steps = len(prefix), list(states)
    shared, apart = spread(0, split, NUM_SHARED), [steps[n] for n in spread(split + 1, len(steps) - 1, NUM_APART)]
    # A state of the window belongs to the edges of the transition that led to it.
    together = [tree.leaves_below(tree.depth(step - split - 1)) for step in apart]
    chosen = [states[step] for step in shared]
    chosen += [states[step][::count] for step, count in zip(apart, together, strict=True)]
    # One call for all states: the decoder sees full batches.
    images = iter(shrink(decode(torch.cat(chosen))))
    tiles = [next(images) for _ in shared]
    sheet = torch.full((len(latents), len(shared) + len(apart), *tiles[0].shape), 255, dtype=torch.uint8)
    sheet[0, : len(shared)] = torch.stack(tiles)
    for column, count in enumerate(together):
        for branch in range(0, len(latents), count):
            sheet[branch, len(shared) + column] = next(images)
    facts = {"prompt": prompt, "num_steps": num_steps, "shared": shared, "branches": apart, "num_branches": len(latents)}
    facts |= {"together": together} if tree.after else {}
    return Sheet(sheet.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1).contiguous(), facts)


def save_tree(stage: Stage, sheet: Sheet) -> list[Path]:
    """Write tree.png and tree.json; returns their paths."""
    picture, facts = stage.folder / "tree.png", stage.folder / "tree.json"
    files.write_image(picture, sheet.tiles)
    files.write_record(facts, sheet.facts)
    return [picture, facts]


def load_tree(stage: Stage) -> GroupPicture | None:
    """Read tree.png and tree.json; None if the stage has none, a ValueError if they are damaged."""
    if not (stage.folder / "tree.json").is_file():
        return None
    if stage.finished("sample"):  # else there is no manifest to compare the files with
        stage.verify("sample", "tree.json", "tree.png")
    facts = files.read_json(stage.folder / "tree.json")
    sheet = files.read_image(stage.folder / "tree.png").numpy()
    columns, apart = [*facts["shared"], *facts["branches"]], facts["branches"]
    together = dict(zip(apart, facts.get("together", [1] * len(apart)), strict=True))
    rows = [np.split(row, len(columns), axis=1) for row in np.split(sheet, facts["num_branches"], axis=0)]
    tiles = [dict(zip(columns, row, strict=True)) for row in rows]
    return GroupPicture(
        facts["prompt"],
        facts["num_steps"],
        {step: tiles[0][step] for step in facts["shared"]},
        [{step: tiles[k - k % together[step]][step] for step in apart} for k in range(len(tiles))],
        together,
    )


def spread(first: int, last: int, count: int) -> list[int]:
    """At most `count` whole numbers, evenly spaced from `first` to `last`, both included; `last` alone if count is 1."""
    count = min(count, last - first + 1)
    # Counted down, so that a single number is `last`, the finished image.
    return [last - round((last - first) * n / max(1, count - 1)) for n in range(count)][::-1]


def shrink(images: Tensor) -> Tensor:
    """Scale images uint8 [N,H,W,3] down until no side is longer than TILE_PX; smaller ones stay as they are."""
    if max(images.shape[1:3]) <= TILE_PX:
        return images
    scale = TILE_PX / max(images.shape[1:3])
    size = (round(images.shape[2] * scale), round(images.shape[1] * scale))
    small = [Image.fromarray(image.numpy()).resize(size, Image.Resampling.LANCZOS) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small]))
