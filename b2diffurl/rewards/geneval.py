"""What a prompt asks for, and whether boxes in an image answer it, by the rules of GenEval (arXiv 2310.11513).

No model is needed here: boxes come from a detector, and the colours of their objects from a classifier.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from b2diffurl.configuration.limits import shown

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels; x to the right, y down
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
KINDS = ("objects", "count", "color", "position")  # of questions
MAX_OBJECTS = 16  # of a class in an image
MAX_CLASSES, MAX_LETTERS = 16, 40  # of a scene, and of a class's name: detectors read short texts only
ALONG = 0.5  # part of the way from one centre to the other that must lie along a relation's axis


@dataclass(frozen=True)
class Wanted:
    """A class of objects that an image is to show: an entry of `include` in GenEval's metadata."""

    name: str  # of the class
    count: int = 1  # at least so many
    color: str = ""  # one of COLORS; "": any
    relation: str = ""  # one of RELATIONS, to the objects of entry `target`; "": anywhere
    target: int = 0


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for."""

    include: tuple[Wanted, ...] = ()
    exclude: tuple[tuple[str, int], ...] = ()  # (class, n): there must be fewer than n

    @property
    def classes(self) -> list[str]:
        """The classes that a detector has to look for, each once."""
        return list(dict.fromkeys([*(one.name for one in self.include), *(name for name, _ in self.exclude)]))

    @property
    def counted(self) -> bool:
        """Whether it asks for a number of objects, so that doubtful ones must not count."""
        return any(self.asks_count(wanted) for wanted in self.include)

    def asks_count(self, wanted: Wanted) -> bool:
        return wanted.count > 1 or self.bound(wanted.name) < math.inf

    def bound(self, name: str) -> float:
        """There must be fewer objects of class `name` than this; infinity: any number may be there."""
        return min((count for one, count in self.exclude if one == name), default=math.inf)


@dataclass(frozen=True)
class Seen:
    """An object found in an image."""

    name: str  # of its class
    score: float  # how sure the detector is
    box: Box
    color: str = ""  # one of COLORS; "": nobody has looked


@dataclass(frozen=True)
class Answer:
    """Whether an image answers one of its prompt's questions rightly."""

    kind: str  # one of KINDS
    question: str  # in words: `red apple`
    right: bool


# --- metadata -------------------------------------------------------------------------------------


def read_scene(row: Mapping[str, Any]) -> Scene | None:
    """The scene of a line of GenEval's metadata, None if it has neither `include` nor `exclude`.

    A ValueError says what is wrong with the line. `tag` is not needed: what is asked follows from the entries.
    """
    if "include" not in row and "exclude" not in row:
        return None
    entries = {key: row.get(key, []) for key in ("include", "exclude")}
    for key, value in entries.items():
        if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
            raise ValueError(f'{key} is {shown(value)}; it must be a list like [{{"class": "bench", "count": 1}}]')
    include = tuple(read_wanted(entry) for entry in entries["include"])
    exclude = tuple(read_limit(entry) for entry in entries["exclude"])
    scene = Scene(include, exclude)
    require_possible(scene)
    return scene


def read_wanted(entry: Mapping[str, Any]) -> Wanted:
    """An entry of `include`: a class, and maybe count, color and position."""
    name, count = read_limit(entry, ("class", "count", "color", "position"))
    color, position = entry.get("color", ""), entry.get("position", ["", 0])
    if "color" in entry and color not in COLORS:
        raise ValueError(f"the color of {name} is {shown(color)}; known: {', '.join(COLORS)}")
    if not isinstance(position, list) or len(position) != 2 or type(position[1]) is not int:
        raise ValueError(f'the position of {name} is {shown(position)}; it must be like ["left of", 0]')
    if "position" in entry and position[0] not in RELATIONS:
        raise ValueError(f"the position of {name} is {shown(position[0])}; known: {', '.join(RELATIONS)}")
    return Wanted(name, count, color, *position)


def read_limit(entry: Mapping[str, Any], known: Sequence[str] = ("class", "count")) -> tuple[str, int]:
    """Class and count of an entry; a count that is missing is 1."""
    if unknown := sorted(entry.keys() - set(known)):
        raise ValueError(f"an entry has {shown(unknown[0])}; known: {', '.join(known)}")
    name, count = entry.get("class"), entry.get("count", 1)
    if not isinstance(name, str) or not is_name(name):
        raise ValueError(
            f"a class is {shown(name)}; it must be the name of a kind of object, of at most {MAX_LETTERS} letters, without "
            "full stops"
        )
    if type(count) is not int or not 1 <= count <= MAX_OBJECTS:
        raise ValueError(f"the count of {name} is {shown(count)}; it must be a whole number from 1 to {MAX_OBJECTS}")
    return name, count


def is_name(text: str) -> bool:
    """Whether a detector can look for a class of this name."""
    return any(map(str.isalnum, text)) and text.isprintable() and "." not in text and len(text) <= MAX_LETTERS


def require_possible(scene: Scene) -> None:
    """Refuse a scene that asks for nothing, or for more than a detector reads, or that no image can show."""
    if not scene.classes:
        raise ValueError("it asks for nothing: include and exclude are empty")
    if len(scene.classes) > MAX_CLASSES:
        raise ValueError(f"it has {len(scene.classes)} classes; a detector is told {MAX_CLASSES} at most")
    if unreadable := [name for name in scene.classes if not is_name(name)]:
        raise ValueError(f"{shown(unreadable[0])} is no name of a class, which has at most {MAX_LETTERS} letters")
    names = Counter(wanted.name for wanted in scene.include)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ValueError(
            f"{twice[0]} stands in include twice; by GenEval's rules both would be judged by the same boxes. Give it once."
        )
    for n, wanted in enumerate(scene.include):
        if wanted.count >= scene.bound(wanted.name):
            raise ValueError(f"it asks for {wanted.count} {wanted.name} and excludes {scene.bound(wanted.name)}")
        if wanted.relation and (wanted.target == n or not 0 <= wanted.target < len(scene.include)):
            raise ValueError(
                f"{wanted.name} is {wanted.relation} entry {wanted.target}; it must be another entry of include, from 0"
            )


# --- boxes ----------------------------------------------------------------------------------------


def keep(seen: Sequence[Seen], *, threshold: float, overlap: float) -> dict[str, list[Seen]]:
    """{class: its objects, surest first}, of those with a score above `threshold`, at most MAX_OBJECTS.

    Of two boxes of one class whose intersection over union is above `overlap` only the surer one stays; 1 keeps all.
    """
    kept: dict[str, list[Seen]] = {}
    for one in sorted(seen, key=lambda one: -one.score):
        others = kept.setdefault(one.name, [])
        if one.score > threshold and all(intersection_over_union(one.box, other.box) <= overlap for other in others):
            others.append(one)
    return {name: objects[:MAX_OBJECTS] for name, objects in kept.items()}


def intersection_over_union(a: Box, b: Box) -> float:
    """0 for boxes that are apart, or empty; 1 for equal ones."""
    shared = area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = area(a) + area(b) - shared
    return shared / union if union > 0 else 0.0


def area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def relations(a: Box, b: Box, margin: float) -> set[str]:
    """Where box `a` lies as seen from `b`: one of RELATIONS, two on a diagonal, none if they are in one place.

    Along each axis the offset of their centres is first made smaller by `margin` times the sum of their sizes. What is left
    must be more than half of the distance between the centres.
    """
    offset = [(a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2 for axis in (0, 1)]
    slack = [margin * (a[axis + 2] - a[axis] + b[axis + 2] - b[axis]) for axis in (0, 1)]
    distance = math.hypot(*offset)
    left = [math.copysign(max(abs(way) - room, 0), way) for way, room in zip(offset, slack, strict=True)]
    if distance == 0:
        return set()
    dx, dy = (way / distance for way in left)
    holds = {"left of": dx < -ALONG, "right of": dx > ALONG, "above": dy < -ALONG, "below": dy > ALONG}
    return {relation for relation, true in holds.items() if true}


# --- the verdict ----------------------------------------------------------------------------------


def judge(scene: Scene, seen: Mapping[str, Sequence[Seen]], *, margin: float) -> list[Answer]:
    """The questions of a scene, and whether the objects `seen` (of `keep`, with their colours) answer them.

    All answers are right exactly if the image is correct by GenEval's rules. So colours and positions are those of the
    surest boxes, as many as are asked for, and all of these must fit.
    """
    groups = [list(seen.get(wanted.name, ()))[: wanted.count] for wanted in scene.include]
    answers = []
    for wanted, group in zip(scene.include, groups, strict=True):
        found, enough = len(seen.get(wanted.name, ())), len(group) == wanted.count
        answers.append(Answer("objects", wanted.name, found > 0))
        if scene.asks_count(wanted):
            asked, bound = count_in_words(wanted, scene.bound(wanted.name)), scene.bound(wanted.name)
            answers.append(Answer("count", asked, wanted.count <= found < bound))
        if wanted.color:
            right = enough and all(one.color == wanted.color for one in group)
            answers.append(Answer("color", f"{wanted.color} {wanted.name}", right))
        if wanted.relation:
            target, others = scene.include[wanted.target], groups[wanted.target]
            pairs = [relations(one.box, other.box, margin) for one, other in product(group, others)]
            right = enough and len(others) == target.count and all(wanted.relation in found for found in pairs)
            answers.append(Answer("position", f"{wanted.name} {wanted.relation} {target.name}", right))
    included = {wanted.name for wanted in scene.include}
    for name, count in scene.exclude:
        if name not in included:
            asked = f"no {name}" if count == 1 else f"fewer than {count} {name}"
            answers.append(Answer("objects", asked, len(seen.get(name, ())) < count))
    return answers


def count_in_words(wanted: Wanted, bound: float) -> str:
    if bound == wanted.count + 1:
        return f"{wanted.count} {wanted.name}"
    return f"at least {wanted.count} {wanted.name}" + (f", fewer than {bound}" if bound < math.inf else "")


def describe(answers: Sequence[Answer], seen: Mapping[str, Sequence[Seen]]) -> str:
    """What was seen and what of it is wrong, for people: `2 clock, 1 red apple; wrong: 4 clock, green apple`."""
    things = Counter(f"{one.color} {one.name}".strip() for objects in seen.values() for one in objects)
    found = ", ".join(f"{count} {name}" for name, count in things.items()) or "nothing"
    wrong = ", ".join(answer.question for answer in answers if not answer.right)
    return f"{found}; wrong: {wrong}" if wrong else found
