"""Exact checker: reads two clean shapes off the pixels and says which parts of a prompt hold.

A shape is fitted, not guessed: its ink gives centre and size, each of the four outlines is drawn there with
the renderer's own `coverage`, and the best one must match to a quarter of a pixel along its edge.
"""

# N images, H = W = 64 px, 2 objects an image (largest first), F outlines fitted to each

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from b2diffurl.shapes.scene import (
    AREA,
    COLOURS,
    IMAGE_PX,
    OPPOSITE,
    PERIMETER,
    SHAPES,
    Prompt,
    Thing,
    coverage,
    parse,
    pixel_grid,
)

# Limits of "clean", in RGB units of 0-255 and pixels; docs/shapes.md has what they accept and refuse.
INK_RGB = 90.0  # a pixel this far from the background belongs to a shape
MIN_INK_PX = 70  # a smaller patch is no shape
MAX_STRAY_PX = 10.0  # ink outside both shapes, in full pixels
MIN_BACKGROUND = 200.0  # light ground, each channel
MAX_COLOUR_RGB = 42.0  # from a shape's mean colour to the nearest named one
MAX_TONE_RGB = 12.0  # root mean square distance of a shape's inner pixels to their mean colour
MAX_EDGE_PX = 0.24  # mean distance between the drawn and the fitted outline
AXIS_RATIO = 1.25  # a relation needs an offset this many times that along the other axis
CHUNK = 32  # images at a time, so that they stay in the cache


@dataclass(frozen=True)
class Seen:
    """One clean shape found in an image."""

    thing: Thing
    x_px: float
    y_px: float
    size_px: float


@dataclass(frozen=True)
class Verdict:
    """What an image shows and what of its prompt is true; `problem` says why it is malformed."""

    well_formed: bool
    problem: str
    objects: tuple[Seen, ...]
    parts: dict[str, bool] = field(default_factory=dict)

    @property
    def correct(self) -> bool:
        return self.well_formed and all(self.parts.values())


def check(images: np.ndarray | torch.Tensor, prompts: Sequence[str]) -> list[Verdict]:
    """Judge each image, uint8 [N, 64, 64, 3], against its prompt; an unknown prompt is a ValueError."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts; give one prompt an image")
    meanings = [_parse(prompt) for prompt in prompts]
    return [
        Verdict(not problem, problem, objects, judge(objects, meaning))
        for (problem, objects), meaning in zip(look(images), meanings, strict=True)
    ]


_parse = cache(parse)


# --- from what is seen to what is true ------------------------------------------------------------


def judge(objects: tuple[Seen, ...], prompt: Prompt) -> dict[str, bool]:
    """Each part of the prompt: colours and shapes present, bound to each other, relation; no objects, all False.

    The relation is judged between the objects that fit the two named things best, so it can hold where a
    binding does not; if both ways round fit equally well it counts as False.
    """
    seen = [item.thing for item in objects]
    parts = {
        "colours": {thing.colour for thing in prompt.things} <= {thing.colour for thing in seen},
        "shapes": {thing.shape for thing in prompt.things} <= {thing.shape for thing in seen},
        "binding": set(prompt.things) <= set(seen),
    }
    if prompt.relation:
        parts["relation"] = bool(objects) and _relation_holds(objects, prompt)
    return parts


def _relation_holds(objects: tuple[Seen, ...], prompt: Prompt) -> bool:
    straight, crossed = (
        sum(_agreement(item.thing, thing) for item, thing in zip(order, prompt.things, strict=True))
        for order in (objects, objects[::-1])
    )
    if straight == crossed:
        return False
    relation = relation_between(*objects)
    return prompt.relation == (relation if straight > crossed else OPPOSITE.get(relation))


def _agreement(a: Thing, b: Thing) -> int:
    return (a.colour == b.colour) + (a.shape == b.shape)


def relation_between(first: Seen, second: Seen) -> str | None:
    """Where the first lies as seen from the second, None if too diagonal to say."""
    dx, dy = second.x_px - first.x_px, second.y_px - first.y_px
    if abs(dx) >= AXIS_RATIO * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= AXIS_RATIO * abs(dx):
        return "above" if dy > 0 else "below"
    return None


# --- from pixels to what is seen ------------------------------------------------------------------


def look(images: np.ndarray | torch.Tensor) -> list[tuple[str, tuple[Seen, ...]]]:
    """(problem, objects) of each image, uint8 [N, 64, 64, 3]: two objects and no problem, or a problem and none."""
    images = torch.as_tensor(images)
    if images.dtype != torch.uint8 or images.shape[1:] != (IMAGE_PX, IMAGE_PX, 3):
        given = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"expected uint8 images [N, {IMAGE_PX}, {IMAGE_PX}, 3], got {given}")
    return [result for chunk in images.split(CHUNK) for result in _look(chunk)]


def _look(images: torch.Tensor) -> list[tuple[str, tuple[Seen, ...]]]:
    pixels = images.float()  # [N, H, W, 3]
    rim = torch.cat([pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], dim=1)
    background = rim.median(dim=1).values  # [N, 3]
    contrast = pixels - background[:, None, None]
    distance = contrast.norm(dim=-1)  # [N, H, W]
    patches, ink_px = _two_largest_patches(distance > INK_RGB)  # [N, 2, H, W], [N, 3]
    inside = _grow(patches, -1)
    rgb = _masked_mean(pixels, inside)  # [N, 2, 3]
    own = _grow(patches, 2)

    stray_px = ((distance / 150).clamp(max=1) * (distance > 30) * (1 - own.amax(1))).sum((1, 2))
    spread = (pixels[:, None] - rgb[:, :, None, None]).square().sum(-1)
    tone = ((spread * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)).sqrt()  # [N, 2]
    to_palette = torch.cdist(rgb, torch.tensor(list(COLOURS.values()), dtype=torch.float32))  # [N, 2, 6]
    colour = to_palette.min(dim=-1)
    centre, sizes, edge_px = _fit_outlines(contrast, rgb - background[:, None], own)
    best = edge_px.min(dim=-1)

    rim_ink = patches[..., 0].amax((1, 2)) + patches[..., -1].amax((1, 2))
    rim_ink = rim_ink + patches[:, :, 0].amax((1, 2)) + patches[:, :, -1].amax((1, 2))
    problems = {  # the first that applies is the one reported
        "dark ground": background.amin(1) < MIN_BACKGROUND,
        "fewer than two shapes": ink_px[:, 1] < MIN_INK_PX,
        "more than two shapes": ink_px[:, 2] >= MIN_INK_PX,
        "cut at the rim": rim_ink > 0,
        "stray ink": stray_px > MAX_STRAY_PX,
        "two-tone": (tone > MAX_TONE_RGB).any(1),
        "unnamed colour": (colour.values > MAX_COLOUR_RGB).any(1),
        "unclear outline": (best.values > MAX_EDGE_PX).any(1),
    }
    fired = torch.stack(list(problems.values()), dim=1)
    sizes = sizes.gather(2, best.indices[..., None])[..., 0]
    return [
        (list(problems)[flags.index(True)], ())
        if any(flags)
        else ("", tuple(_seen(*values) for values in zip(*columns, strict=True)))
        for flags, *columns in zip(
            fired.tolist(), colour.indices.tolist(), best.indices.tolist(), centre.tolist(), sizes.tolist(), strict=True
        )
    ]


def _seen(colour: int, shape: int, centre: list[float], size_px: float) -> Seen:
    return Seen(Thing(list(COLOURS)[colour], SHAPES[shape]), *centre, size_px)


def _two_largest_patches(ink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks of the two largest connected patches, float [N, 2, H, W], and the three largest areas, [N, 3] px."""
    names = torch.arange(1, IMAGE_PX**2 + 1, dtype=torch.int16).view(1, IMAGE_PX, IMAGE_PX)
    ink = ink.short()
    label = ink * names
    while True:  # every pixel takes the largest name in its patch
        spread = label
        for _ in range(4):
            spread = _spread(spread) * ink
        if torch.equal(spread, label):
            break
        label = spread
    flat = label.flatten(1).long()
    area = torch.zeros(len(ink), IMAGE_PX**2 + 1).scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float32))
    area[:, 0] = 0
    ink_px, name = area.topk(3, dim=1)
    return (label[:, None] == name[:, :2, None, None]).float() * ink[:, None], ink_px


def _grow(mask: torch.Tensor, px: int) -> torch.Tensor:
    """The mask with its edge moved out (px > 0) or in (px < 0)."""
    if px < 0:
        return 1 - _grow(1 - mask, -px)
    for _ in range(px):
        mask = _spread(mask)
    return mask


def _spread(values: torch.Tensor) -> torch.Tensor:
    """The largest value of each pixel's 3 x 3 neighbourhood; a tenth of max_pool2d's time."""
    rows = values.clone()
    rows[..., 1:] = torch.maximum(rows[..., 1:], values[..., :-1])
    rows[..., :-1] = torch.maximum(rows[..., :-1], values[..., 1:])
    both = rows.clone()
    both[..., 1:, :] = torch.maximum(both[..., 1:, :], rows[..., :-1, :])
    both[..., :-1, :] = torch.maximum(both[..., :-1, :], rows[..., 1:, :])
    return both


def _masked_mean(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean colour under each mask, [N, 2, 3]."""
    total = mask.flatten(2) @ pixels.flatten(1, 2)
    return total / mask.sum((2, 3)).clamp(min=1)[..., None]


def _fit_outlines(
    contrast: torch.Tensor, full: torch.Tensor, own: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centres [N, 2, 2], sizes [N, 2, F] and mean edge errors [N, 2, F] of the four outlines, all in px."""
    x, y = pixel_grid()
    # Ink of each pixel: how far it is from the ground's colour (0) to the shape's (1).
    strength = (full * full).sum(-1)[..., None].clamp(min=1)
    ink = ((full @ contrast.flatten(1, 2).mT) / strength).clamp(0, 1).unflatten(2, (IMAGE_PX, IMAGE_PX)) * own
    area = ink.sum((2, 3)).clamp(min=1)
    centre = torch.stack([(ink * axis).sum((2, 3)) / area for axis in (x, y)], dim=-1)
    dx, dy = x - centre[..., :1, None], y - centre[..., 1:, None]
    sizes, errors = [], []
    for shape in SHAPES:
        size = (area / AREA[shape]).sqrt()
        misfit = (coverage(shape, dx, dy, size[..., None, None]) - ink).abs().sum((2, 3))
        sizes.append(size)
        errors.append(misfit / (PERIMETER[shape] * size))
    return centre, torch.stack(sizes, -1), torch.stack(errors, -1)
