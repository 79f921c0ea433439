"""Deliberately broken pictures, each of one kind, to measure what the checker refuses."""

from dataclasses import replace

import numpy as np
from PIL import Image, ImageFilter

from b2diffurl.shapes.scene import COLOURS, IMAGE_PX, SHAPES, Placed, Scene, Thing, paint, pixel_grid, random_scene, render

KINDS = ("merged", "cut", "blurred", "three shapes", "one shape", "two-tone")


def broken_picture(kind: str, rng: np.random.Generator) -> np.ndarray:
    """A random scene's picture, broken in the given way, uint8 [64, 64, 3]."""
    scene = random_scene(rng)
    first, second = scene.first, scene.second
    if kind == "merged":
        reach = (first.size_px + second.size_px) / 2 * rng.uniform(0.3, 0.6)
        towards = np.array([first.x_px - second.x_px, first.y_px - second.y_px])
        dx, dy = towards * (1 - reach / np.linalg.norm(towards))
        return paint([first, replace(second, x_px=second.x_px + dx, y_px=second.y_px + dy)], scene.background)
    if kind == "cut":
        return _at_the_rim(scene, rng) if rng.random() < 0.5 else _half(render(scene), first, scene.background, rng)
    if kind == "blurred":
        blur = ImageFilter.GaussianBlur(rng.uniform(2, 4))
        return np.array(Image.fromarray(render(scene)).filter(blur))
    if kind == "three shapes":
        return paint([first, second, _third(scene, rng)], scene.background)
    if kind == "one shape":
        return paint([first], scene.background)
    other = [rgb for colour, rgb in COLOURS.items() if colour != first.thing.colour]
    tinted = paint([replace(first, rgb=other[rng.integers(len(other))]), second], scene.background)
    return np.where(_beyond(first, rng)[..., None], tinted, render(scene))


def _at_the_rim(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The first shape pushed a quarter to a half over the image's edge."""
    place = rng.uniform(-0.2, 0.1) * scene.first.size_px
    axis = "x_px" if scene.relation in ("left of", "right of") else "y_px"
    value = place if scene.relation in ("left of", "above") else IMAGE_PX - place
    return paint([replace(scene.first, **{axis: value}), scene.second], scene.background)


def _half(picture: np.ndarray, item: Placed, background, rng: np.random.Generator) -> np.ndarray:
    """A third to two thirds of the shape wiped out by a straight cut."""
    x, y = pixel_grid()
    near = (x - item.x_px).abs().maximum((y - item.y_px).abs()) < 0.7 * item.size_px
    gone = near.numpy() & _beyond(item, rng)
    return np.where(gone[..., None], np.round(background).astype(np.uint8), picture)


def _beyond(item: Placed, rng: np.random.Generator) -> np.ndarray:
    """The pixels on one side of a random line that passes near the shape's centre, bool [64, 64]."""
    angle, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.1, 0.1) * item.size_px
    x, y = pixel_grid()
    return ((x - item.x_px) * np.cos(angle) + (y - item.y_px) * np.sin(angle) > shift).numpy()


def _third(scene: Scene, rng: np.random.Generator) -> Placed:
    """A shape more, as far from the two as 50 draws find."""
    places = rng.uniform(12, IMAGE_PX - 12, size=(50, 2))
    others = np.array([[item.x_px, item.y_px] for item in (scene.first, scene.second)])
    x_px, y_px = places[np.linalg.norm(places[:, None] - others, axis=-1).min(1).argmax()]
    colour = str(rng.choice(list(COLOURS)))
    return Placed(Thing(colour, str(rng.choice(SHAPES))), float(x_px), float(y_px), 15.0, COLOURS[colour])
