"""Scenes from the words of prompts: GenEval's own forms for all its classes, others' ways to write them, and refusals."""

from itertools import permutations

import pytest

from b2diffurl.rewards.geneval import COLORS, RELATIONS, Scene, Wanted
from b2diffurl.rewards.plain_prompts import NUMBERS, scene_of

# The classes of GenEval, those of COCO with a few renamed.
CLASSES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book,
clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
CLASSES = " ".join(CLASSES.split()).split(", ")
PLURALS = {
    "person": "people", "knife": "knives", "sheep": "sheep", "skis": "skis", "scissors": "scissors", "bench": "benches",
    "sandwich": "sandwiches", "couch": "couches", "toothbrush": "toothbrushes",
}  # fmt: skip


def named(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def test_the_forms_of_geneval_for_all_its_classes():
    """One, two, so many, in a colour, in a position, two in colours: what the words ask for is what its metadata say. Its
    own plurals add s, or es after s (knifes, skises); those of English are read as well."""
    for name in CLASSES:
        assert scene_of(f"a photo of {named(name)}") == Scene((Wanted(name),))
        for number, plural in ((2, name + ("es" if name[-1] == "s" else "s")), (4, PLURALS.get(name, ""))):
            if plural:
                asked = Scene((Wanted(name, number),), ((name, number + 1),))
                assert scene_of(f"a photo of {NUMBERS[number - 1]} {plural}") == asked
        for color in COLORS:
            assert scene_of(f"a photo of {named(color)} {name}") == Scene((Wanted(name, 1, color),))
    for n, (one, other) in enumerate(permutations(CLASSES, 2)):
        first, second, relation = COLORS[n % 10], COLORS[(n + 1 + n // 10) % 10], RELATIONS[n % 4]
        assert scene_of(f"a photo of {named(one)} and {named(other)}") == Scene((Wanted(one), Wanted(other)))
        colours = f"a photo of {named(first)} {one} and {named(second)} {other}"
        assert scene_of(colours) == Scene((Wanted(one, 1, first), Wanted(other, 1, second)))
        placed = Scene((Wanted(other), Wanted(one, 1, "", relation, 0)))
        assert scene_of(f"a photo of {named(one)} {relation} {named(other)}") == placed


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red circle left of a blue square",
         Scene((Wanted("square", 1, "blue"), Wanted("circle", 1, "red", "left of", 0)))),
        ("Two red apples to the left of a dog.",
         Scene((Wanted("dog"), Wanted("apple", 2, "red", "left of", 0)), (("apple", 3),))),
        ("a cat, a dog and two birds", Scene((Wanted("cat"), Wanted("dog"), Wanted("bird", 2)), (("bird", 3),))),
        ("a cat, a dog, and a bird", Scene((Wanted("cat"), Wanted("dog"), Wanted("bird")))),
        ("3 buses", Scene((Wanted("bus", 3),), (("bus", 4),))),
        ("one cat", Scene((Wanted("cat"),), (("cat", 2),))),
        ("an orange", Scene((Wanted("orange"),))),
        ("an orange orange", Scene((Wanted("orange", 1, "orange"),))),
        ("a photo of an orange and an orange cup", Scene((Wanted("orange"), Wanted("cup", 1, "orange")))),
        ("five mice", Scene((Wanted("mouse", 5),), (("mouse", 6),))),
        ("two horses above three potatoes", Scene((Wanted("potato", 3), Wanted("horse", 2, "", "above", 0)),
                                                  (("potato", 4), ("horse", 3)))),
        ("a picture of two strawberries", Scene((Wanted("strawberry", 2),), (("strawberry", 3),))),
    ],
)  # fmt: skip
def test_other_ways_to_write_them(prompt, scene):
    """Without `a photo of`, with capitals, a full stop, digits, commas, a number beside a position."""
    assert scene_of(prompt) == scene


@pytest.mark.parametrize(
    "prompt",
    [
        "cats", "a", "", "a photo of", "the cat", "eleven cats", "0 cats", "-1 cats", "a cat on a mat", "a cat sleeping",
        "a dog playing chess", "a cat with a hat", "a very large red house", "a photo of a cat and dog", "a red", "two red",
        "a cat left of a dog right of a bird", "a cat left of", "a cat and a dog left of a bird", "oil painting of a cat",
        "a cat!", "a 2nd cat", "a black white cat",
    ],
)  # fmt: skip
def test_prompts_of_other_forms(prompt):
    """Nothing is guessed: the error has the prompt, the forms that there are, and the setting for metadata."""
    with pytest.raises(ValueError, match="cannot tell what") as raised:
        scene_of(prompt)
    assert repr(prompt) in str(raised.value)
    assert all(
        words in str(raised.value) for words in ('"two clocks"', '"a dog left of a bench"', "reward.compose.metadata")
    )


def test_one_class_twice():
    """A red apple and a green apple would be judged by one box, by GenEval's rules."""
    with pytest.raises(ValueError, match="'a red apple and a green apple' cannot be judged: apple stands in include twice"):
        scene_of("a red apple and a green apple")
