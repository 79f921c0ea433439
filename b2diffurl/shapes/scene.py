"""Scenes of two coloured shapes: the caption grammar, the renderer, and captions that are partly wrong.

Pixels: x to the right, y down, pixel centres at + 0.5; images are uint8 [64, 64, 3].
A shape's place is its centre of mass; its `size_px` is a circle's diameter, a cross's arm span.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np
import torch

IMAGE_PX = 64
COLOURS = {
    "red": (216, 48, 44),
    "yellow": (244, 188, 32),
    "green": (44, 148, 70),
    "cyan": (40, 184, 206),
    "blue": (44, 78, 200),
    "purple": (150, 58, 178),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("attribute", "binding", "relation")

# Side or width of each shape in units of size_px, chosen so that all of them look equally large.
SQUARE_SIDE, TRIANGLE_WIDTH, CROSS_ARM = 0.88, 1.1, 0.36
TRIANGLE_HEIGHT = TRIANGLE_WIDTH * math.sqrt(3) / 2
REACH = 2 / 3 * TRIANGLE_HEIGHT  # the farthest any shape extends from its centre along an axis
AREA = {  # in units of size_px ** 2
    "circle": math.pi / 4,
    "square": SQUARE_SIDE**2,
    "triangle": TRIANGLE_WIDTH * TRIANGLE_HEIGHT / 2,
    "cross": 2 * CROSS_ARM - CROSS_ARM**2,
}
PERIMETER = {  # in units of size_px
    "circle": math.pi,
    "square": 4 * SQUARE_SIDE,
    "triangle": 3 * TRIANGLE_WIDTH,
    "cross": 4.0,
}


@dataclass(frozen=True)
class Thing:
    """What a caption names: one shape in one colour."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Prompt:
    """A caption's meaning: one thing, two things, or two things in a relation."""

    first: Thing
    second: Thing | None = None
    relation: str | None = None

    @property
    def kind(self) -> str:
        return "attribute" if self.second is None else "binding" if self.relation is None else "relation"

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    def __str__(self) -> str:
        return str(self.first) if self.second is None else f"{self.first} {self.relation or 'and'} {self.second}"


@dataclass(frozen=True)
class Placed:
    """A thing on the canvas, in its own tint of the colour."""

    thing: Thing
    x_px: float
    y_px: float
    size_px: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Two things such that `relation` holds from the first to the second."""

    first: Placed
    second: Placed
    relation: str
    background: tuple[float, float, float]


# --- captions -------------------------------------------------------------------------------------


def parse(caption: str) -> Prompt:
    """The meaning of "a red circle", "a red circle and a blue square" or "a red circle left of a blue square"."""
    for joint in ("and", *RELATIONS):
        first, found, second = caption.partition(f" {joint} ")
        if found:
            return Prompt(_thing(first, caption), _thing(second, caption), None if joint == "and" else joint)
    return Prompt(_thing(caption, caption))


def _thing(words: str, caption: str) -> Thing:
    match words.split(" "):
        case ["a", colour, shape] if colour in COLOURS and shape in SHAPES:
            return Thing(colour, shape)
    raise ValueError(
        f"not a prompt of the shapes world: {caption!r}. Write 'a red circle', 'a red circle and a blue square' or "
        f"'a red circle left of a blue square'; colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
        f"relations: {', '.join(RELATIONS)}"
    )


def describe(scene: Scene, kind: str, rng: np.random.Generator) -> Prompt:
    """A right caption of the given kind; which thing comes first is drawn."""
    first, second, relation = scene.first.thing, scene.second.thing, scene.relation
    if rng.random() < 0.5:
        first, second, relation = second, first, OPPOSITE[relation]
    return {
        "attribute": Prompt(first),
        "binding": Prompt(first, second),
        "relation": Prompt(first, second, relation),
    }[kind]


def holds(scene: Scene, prompt: Prompt) -> bool:
    """Whether the prompt is true of the scene."""
    first, second = scene.first.thing, scene.second.thing
    return any(
        prompt.first == one and prompt.second in (None, other) and prompt.relation in (None, relation)
        for one, other, relation in ((first, second, scene.relation), (second, first, OPPOSITE[scene.relation]))
    )


@dataclass(frozen=True)
class CaptionErrors:
    """How often a training caption is wrong, and in what way; at most one error a caption."""

    reversed_relation: float  # "left of" where it is right of
    other_axis: float  # "above" or "below" where it is left or right of
    swapped_colours: float
    wrong_attribute: float  # one colour or one shape replaced


def corrupt(prompt: Prompt, errors: CaptionErrors, rng: np.random.Generator) -> Prompt:
    """The prompt, or with the given rates a wrong one; errors that the kind cannot have leave it right."""
    rates = (errors.reversed_relation, errors.other_axis, errors.swapped_colours, errors.wrong_attribute)
    error = int(np.searchsorted(np.cumsum(rates), rng.random(), side="right"))
    if error == 0 and prompt.relation:
        return replace(prompt, relation=OPPOSITE[prompt.relation])
    if error == 1 and prompt.relation:
        same_axis = (prompt.relation, OPPOSITE[prompt.relation])
        return replace(prompt, relation=_other(RELATIONS, same_axis, rng))
    if error == 2 and prompt.second:
        return swap_colours(prompt)
    if error == 3:
        which = "second" if prompt.second and rng.random() < 0.5 else "first"
        return replace(prompt, **{which: _wrong_thing(getattr(prompt, which), prompt, rng)})
    return prompt


def swap_colours(prompt: Prompt) -> Prompt:
    """Each thing keeps its shape and takes the other's colour."""
    return replace(
        prompt,
        first=replace(prompt.first, colour=prompt.second.colour),
        second=replace(prompt.second, colour=prompt.first.colour),
    )


def _wrong_thing(thing: Thing, prompt: Prompt, rng: np.random.Generator) -> Thing:
    if rng.random() < 0.5:
        return replace(thing, colour=_other(COLOURS, [other.colour for other in prompt.things], rng))
    return replace(thing, shape=_other(SHAPES, [other.shape for other in prompt.things], rng))


def _other(choices, excluded, rng: np.random.Generator) -> str:
    return str(rng.choice([choice for choice in choices if choice not in excluded]))


# --- pictures -------------------------------------------------------------------------------------


def random_scene(rng: np.random.Generator, *, repeats: bool = False) -> Scene:
    """Two things clearly apart along the relation's axis, in different colours and shapes unless `repeats`."""
    colours = rng.choice(list(COLOURS), size=2, replace=repeats)
    shapes = rng.choice(SHAPES, size=2, replace=repeats)
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    sizes = rng.uniform(17, 23, size=2)
    offset, centre = _arrangement(sizes, relation, rng)
    placed = [
        Placed(
            Thing(str(colours[i]), str(shapes[i])),
            *(float(value) for value in centre + sign * offset / 2),
            float(sizes[i]),
            _tint(COLOURS[colours[i]], 12, rng),
        )
        for i, sign in ((0, -1), (1, 1))
    ]
    return Scene(*placed, relation, _tint((243, 241, 237), 7, rng))


def _arrangement(sizes, relation: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) from the first thing to the second, and the middle between them; margins of 2 px, gaps of 3 or more."""
    reach = sizes.sum() / 2 + (REACH - 0.5) * sizes.max()  # only one of the two can be a triangle
    distance = rng.uniform(max(26, reach + 3), min(38, IMAGE_PX - 4 - 2 * REACH * sizes.max()))
    sideways = rng.uniform(-0.3, 0.3) * distance
    offset = np.array([distance, sideways] if relation in ("left of", "right of") else [sideways, distance])
    if relation in ("right of", "below"):
        offset = -offset
    margin = 2 + REACH * sizes.max() + np.abs(offset) / 2
    low = np.minimum(margin, IMAGE_PX / 2)
    return offset, rng.uniform(low, IMAGE_PX - low)


def _tint(rgb, spread: float, rng: np.random.Generator) -> tuple[float, float, float]:
    return tuple(float(value) for value in np.clip(np.array(rgb) + rng.uniform(-spread, spread, size=3), 0, 255))


def coverage(shape: str, dx: torch.Tensor, dy: torch.Tensor, size: torch.Tensor | float) -> torch.Tensor:
    """Share of each pixel inside the shape, 0 to 1, from its offset to the centre (all in px, broadcast)."""
    ax, ay = dx.abs(), dy.abs()
    if shape == "circle":
        outside = torch.hypot(dx, dy) - size / 2
    elif shape == "square":
        outside = torch.maximum(ax, ay) - SQUARE_SIDE / 2 * size
    elif shape == "triangle":  # equilateral, apex up: below its two slopes and above its base
        slope = ax * (math.sqrt(3) / 2) - dy / 2
        outside = torch.maximum(slope, dy) - TRIANGLE_HEIGHT / 3 * size
    else:
        long, arm = size / 2, CROSS_ARM / 2 * size
        outside = torch.minimum(torch.maximum(ax - long, ay - arm), torch.maximum(ax - arm, ay - long))
    return (0.5 - outside).clamp(0, 1)


def pixel_grid() -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of every pixel centre, each [64, 64]."""
    along = torch.arange(IMAGE_PX) + 0.5
    return along.expand(IMAGE_PX, IMAGE_PX), along[:, None].expand(IMAGE_PX, IMAGE_PX)


def paint(placed: list[Placed], background: tuple[float, float, float]) -> np.ndarray:
    """Draw any number of things, later ones on top, uint8 [64, 64, 3]."""
    x, y = pixel_grid()
    canvas = torch.tensor(background).expand(IMAGE_PX, IMAGE_PX, 3)
    for item in placed:
        alpha = coverage(item.thing.shape, x - item.x_px, y - item.y_px, item.size_px)[..., None]
        canvas = canvas + alpha * (torch.tensor(item.rgb) - canvas)
    return canvas.round().to(torch.uint8).numpy()


def render(scene: Scene) -> np.ndarray:
    """The scene's picture, uint8 [64, 64, 3]."""
    return paint([scene.first, scene.second], scene.background)


# --- prompt sets ----------------------------------------------------------------------------------


def prompt_sets() -> dict[str, list[str]]:
    """{"shapes_<kind>_<train|test>": prompts}; no coloured shape of a train set is in any test set.

    Colour i and shape j go to train if i + j is even. Each half has 12 things and 48 pairs of different
    colour and shape; each pair gives one binding and one relation prompt, each relation 12 prompts.
    """
    sets: dict[str, list[str]] = {}
    for half, name in enumerate(("train", "test")):
        things = [
            Thing(colour, shape) for i, colour in enumerate(COLOURS) for j, shape in enumerate(SHAPES) if (i + j) % 2 == half
        ]
        rng = np.random.default_rng(half)
        pairs = [(a, b) for a, b in combinations(things, 2) if a.colour != b.colour and a.shape != b.shape]
        pairs = [pairs[i] if rng.random() < 0.5 else pairs[i][::-1] for i in rng.permutation(len(pairs))]
        sets[f"shapes_attribute_{name}"] = [str(Prompt(thing)) for thing in things]
        sets[f"shapes_binding_{name}"] = [str(Prompt(*pair)) for pair in pairs]
        sets[f"shapes_relation_{name}"] = [str(Prompt(*pair, RELATIONS[i % 4])) for i, pair in enumerate(pairs)]
    return sets


def all_relation_prompts() -> list[str]:
    """Every relation prompt of the train half: each of its 48 pairs in both orders, with each relation, 384 in all."""
    pairs = [parse(prompt).things for prompt in prompt_sets()["shapes_relation_train"]]
    return [str(Prompt(*ordered, relation)) for a, b in pairs for ordered in ((a, b), (b, a)) for relation in RELATIONS]


def development_split() -> dict[str, list[str]]:
    """Prompts to tune on. None of them is in a test set.

    The relation prompts of the train half are split again, 36 to train and 12 to judge, three a relation. The 96 mixed ones
    name a thing of the train half and one of the test half, 24 a relation.
    """
    prompts, rng = prompt_sets()["shapes_relation_train"], np.random.default_rng(2)
    one, other = (
        [parse(name).things[0] for name in prompt_sets()[f"shapes_attribute_{half}"]] for half in ("train", "test")
    )
    across = [*product(one, other), *product(other, one)]
    pairs = [(a, b) for a, b in across if a.colour != b.colour and a.shape != b.shape]
    mixed = [str(Prompt(*pairs[n], RELATIONS[i % 4])) for i, n in enumerate(rng.permutation(len(pairs))[:96])]
    return {
        "shapes_development_train": prompts[:36],
        "shapes_development_test": prompts[36:],
        "shapes_development_mixed": mixed,
    }
