"""GenEval's rules on boxes, without any model: against figures by hand, and its verdict written down once more."""

import json
import math
import random
import re

import pytest
from conftest import ROOT

from b2diffurl.rewards.geneval import (
    COLORS,
    MAX_OBJECTS,
    RELATIONS,
    Answer,
    Scene,
    Seen,
    Wanted,
    describe,
    intersection_over_union,
    judge,
    keep,
    read_scene,
    relations,
)

BENCH_LEFT_OF_DOG = Scene((Wanted("dog"), Wanted("bench", 1, "red", "left of", 0)))


def box(x: float, y: float, width: float = 20, height: float = 10) -> tuple[float, float, float, float]:
    """A box by its centre and size."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def seen(name: str, x: float, y: float, score: float = 0.9, color: str = "", **size: float) -> Seen:
    return Seen(name, score, box(x, y, **size), color)


def kept(*objects: Seen) -> dict[str, list[Seen]]:
    return keep(objects, threshold=0.5, overlap=0.5)


# ---- where a box lies ----


@pytest.mark.parametrize(
    ("x", "y", "found"),
    [
        (50, 100, {"left of"}),
        (150, 100, {"right of"}),
        (100, 50, {"above"}),
        (100, 150, {"below"}),
        (100, 100, set()),  # in one place
        # Widths are 20 and 20, so with a margin of 0.1 an offset of 4 px counts as none, and one of 8 as 4 of 8: half.
        (96, 100, set()),
        (92, 100, set()),
        (91.9, 100, {"left of"}),  # 4.1 of 8.1
        # Heights are 10 and 10: 2 px count as none, and 4 px as half.
        (100, 104, set()),
        (100, 104.1, {"below"}),
        (60, 60, {"left of", "above"}),  # 36 and 38 of 56.6
        # 36 of 44.7 along x, 18 of 44.7 along y: not above, though it lies higher.
        (60, 80, {"left of"}),
    ],
)
def test_where_a_box_lies(x, y, found):
    """As seen from a box of 20 x 10 px at (100, 100), with GenEval's margin, worked out by hand."""
    assert relations(box(x, y), box(100, 100), 0.1) == found


def test_larger_boxes_must_be_further_apart():
    """What counts is the sum of both sizes: 8.1 px are enough for widths of 20, but not for widths of 20 and 40."""
    assert relations(box(91.9, 100, width=40), box(100, 100), 0.1) == set()
    assert relations(box(91.9, 100, width=40), box(100, 100), 0.0) == {"left of"}


def test_opposite_relations():
    """Seen the other way round each relation is its opposite, wherever the boxes are."""
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    rng = random.Random(0)
    for _ in range(300):
        a, b = (box(rng.uniform(0, 99), rng.uniform(0, 99), rng.uniform(1, 60), rng.uniform(1, 60)) for _ in range(2))
        assert {opposite[one] for one in relations(a, b, 0.1)} == relations(b, a, 0.1)


# ---- which boxes count ----


def test_overlap_is_shared_area_by_area_of_both():
    """Boxes of 20 x 10 px, 5 px apart along x: 150 shared of 250. Apart or without area: 0."""
    assert intersection_over_union(box(0, 0), box(5, 0)) == 150 / 250
    assert intersection_over_union(box(0, 0), box(0, 0)) == 1
    assert intersection_over_union(box(0, 0), box(20, 0)) == intersection_over_union(box(0, 0), box(30, 30)) == 0
    assert intersection_over_union(box(0, 0, width=0), box(0, 0, width=0)) == 0


def test_of_boxes_on_one_object_the_surest_counts():
    """Two boxes of a class that share 60 % are one object, those that share a third are two; the surest come first. A box of
    another class stays, and so does every box if overlap is 1."""
    objects = [seen("cat", 5, 0, 0.7), seen("cat", 0, 0, 0.8), seen("cat", 15, 0, 0.9), seen("dog", 0, 0, 0.6)]
    # 5 and 15 share 100 of 300, 0 and 5 share 150 of 250, 0 and 15 share 50 of 350.
    found = keep(objects, threshold=0.5, overlap=0.5)
    assert [one.score for one in found["cat"]] == [0.9, 0.8]
    assert [one.score for one in found["dog"]] == [0.6]
    assert len(keep(objects, threshold=0.5, overlap=1.0)["cat"]) == 3
    assert [one.score for one in keep(objects, threshold=0.5, overlap=0.6)["cat"]] == [0.9, 0.8, 0.7]


def test_doubtful_boxes_and_very_many_do_not_count():
    """A score must be above the threshold; of a class the 16 surest count, after boxes on one object are one."""
    assert keep([seen("cat", 0, 0, 0.5)], threshold=0.5, overlap=0.5) == {"cat": []}
    crowd = [seen("cat", 100 * n, 0, 0.6 + n / 100) for n in range(20)]
    doubled = [seen("cat", 100 * n + 1, 0, 0.55) for n in range(20)]
    found = keep([*crowd, *doubled], threshold=0.5, overlap=0.5)["cat"]
    assert [one.score for one in found] == [0.6 + n / 100 for n in range(19, 19 - MAX_OBJECTS, -1)]


# ---- the verdict ----


@pytest.mark.parametrize(
    ("count", "right"), [(0, [False, False]), (2, [True, False]), (3, [True, True]), (4, [True, False])]
)
def test_a_number_is_exact(count, right):
    """Three clocks: there is one, and there are three and not four."""
    scene = Scene((Wanted("clock", 3),), (("clock", 4),))
    clocks = kept(*(seen("clock", 50 * n, 0) for n in range(count)))
    assert judge(scene, clocks, margin=0.1) == [Answer("objects", "clock", right[0]), Answer("count", "3 clock", right[1])]


def test_overlapping_boxes_are_counted_once():
    """Two clocks, each seen twice, are two clocks."""
    scene = Scene((Wanted("clock", 2),), (("clock", 3),))
    clocks = [seen("clock", 0, 0), seen("clock", 3, 0, 0.8), seen("clock", 60, 0), seen("clock", 60, 2, 0.7)]
    assert all(answer.right for answer in judge(scene, kept(*clocks), margin=0.1))
    assert not all(answer.right for answer in judge(scene, keep(clocks, threshold=0.5, overlap=1.0), margin=0.1))


def test_what_must_not_be_there():
    """A class that is excluded; one of which one is allowed; one that is asked for, without a number, at least once."""
    scene = Scene((Wanted("dog"),), (("cat", 1), ("bird", 2)))
    assert [answer.question for answer in judge(scene, {}, margin=0.1)] == ["dog", "no cat", "fewer than 2 bird"]
    for cats, birds, right in ((0, 1, [True, True]), (1, 2, [False, False]), (0, 0, [True, True])):
        objects = [seen("dog", 0, 50), *(seen("cat", 50, 0),) * cats, *(seen("bird", 50 * n, 99) for n in range(birds))]
        assert [answer.right for answer in judge(scene, kept(*objects), margin=0.1)] == [True, *right]
    assert not scene.counted
    assert Scene((Wanted("dog"),), (("dog", 2),)).counted


def test_colours_are_those_of_the_surest_boxes():
    """Of three apples the two surest are asked, and both must be red."""
    scene = Scene((Wanted("apple", 2, "red"),))
    apples = [("red", 0.9), ("green", 0.7), ("red", 0.8)]
    objects = [seen("apple", 50 * n, 0, score, color) for n, (color, score) in enumerate(apples)]
    assert [(one.kind, one.right) for one in judge(scene, kept(*objects), margin=0.1)] == [
        ("objects", True), ("count", True), ("color", True),
    ]  # fmt: skip
    objects = [seen("apple", 50 * n, 0, 1.7 - score, color) for n, (color, score) in enumerate(apples)]
    assert [one.right for one in judge(scene, kept(*objects), margin=0.1)] == [True, True, False]
    assert [one.right for one in judge(scene, kept(objects[0]), margin=0.1)] == [True, False, False]


def test_a_position_is_a_question_of_its_own():
    """A green bench left of the dog is wrong in its colour alone, a red one right of it in its position alone."""
    right = {kind: True for kind in ("objects", "color", "position")}
    for color, x, wrong in (("red", 20, {}), ("green", 20, {"color": False}), ("red", 180, {"position": False})):
        objects = kept(seen("dog", 100, 50), seen("bench", x, 50, color=color))
        answers = judge(BENCH_LEFT_OF_DOG, objects, margin=0.1)
        assert [one.question for one in answers] == ["dog", "bench", "red bench", "bench left of dog"]
        assert {one.kind: one.right for one in answers} == right | wrong
    alone = judge(BENCH_LEFT_OF_DOG, kept(seen("bench", 20, 50, color="red")), margin=0.1)
    assert [one.right for one in alone] == [False, True, True, False]


def test_what_was_found_is_said():
    """Objects by class and colour, and the questions that are answered wrongly."""
    objects = kept(seen("dog", 100, 50), seen("dog", 200, 50), seen("bench", 180, 50, color="green"))
    answers = judge(BENCH_LEFT_OF_DOG, objects, margin=0.1)
    assert describe(answers, objects) == "2 dog, 1 green bench; wrong: red bench, bench left of dog"
    assert describe(judge(Scene((Wanted("dog"),)), objects, margin=0.1), {"dog": objects["dog"]}) == "2 dog"
    assert describe(judge(Scene((Wanted("dog", 2),)), {}, margin=0.1), {}) == "nothing; wrong: dog, at least 2 dog"


def correct_by_geneval(include: list[dict], exclude: list[dict], objects: dict[str, list[Seen]]) -> bool:
    """GenEval's verdict step by step, from its metadata: an entry fits if enough objects of its class are there, the surest
    of them have its colour, and lie as it says from those of an entry that fits, too."""
    fitting: list[list[Seen] | None] = []
    for entry in include:
        group = objects.get(entry["class"], [])[: entry["count"]]
        fits = len(group) == entry["count"]
        fits = fits and sum(one.color == entry.get("color", one.color) for one in group) == entry["count"]
        if fits and "position" in entry:
            relation, target = entry["position"]
            fits = fitting[target] is not None
            fits = fits and all(relation in relations(one.box, two.box, 0.1) for one in group for two in fitting[target])
        fitting.append(group if fits else None)
    return None not in fitting and all(len(objects.get(entry["class"], [])) < entry["count"] for entry in exclude)


def test_all_answers_are_right_if_geneval_says_so():
    """On 4,000 random scenes and images, some three hundred of them correct, the questions agree with the verdict."""
    rng, verdicts = random.Random(1), []
    for _ in range(4000):
        names = rng.sample(["dog", "cat", "bench"], rng.randint(1, 2))
        include = [{"class": name, "count": rng.choice([1, 1, 2])} for name in names]
        for n, entry in enumerate(include):
            entry |= {"color": rng.choice(["red", "blue"])} if rng.random() < 0.3 else {}
            entry |= {"position": [rng.choice(RELATIONS), 0]} if n and rng.random() < 0.5 else {}
        exclude = [{"class": entry["class"], "count": entry["count"] + 1} for entry in include if rng.random() < 0.3]
        exclude += [{"class": "bird", "count": 1}] if rng.random() < 0.2 else []
        objects = [
            seen(rng.choice(["dog", "cat", "bench", "bird"]), rng.uniform(0, 99), rng.uniform(0, 99), rng.random(),
                 rng.choice(["red", "blue"]))
            for _ in range(rng.randint(0, 5))
        ]  # fmt: skip
        found = keep(objects, threshold=0.1, overlap=0.9)
        answers = judge(read_scene({"include": include, "exclude": exclude}), found, margin=0.1)
        verdicts.append(correct_by_geneval(include, exclude, found))
        assert all(answer.right for answer in answers) == verdicts[-1]
    assert 300 < sum(verdicts) < 3000


# ---- metadata ----


def test_a_line_of_metadata():
    """GenEval's own form, with everything that a line may have."""
    row = {
        "tag": "position",
        "include": [
            {"class": "clock", "count": 1},
            {"class": "bench", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "exclude": [{"class": "clock", "count": 4}],
        "prompt": "a bench",
    }
    wanted = (Wanted("clock"), Wanted("bench", 1, "red", "left of", 0))
    assert read_scene(row) == Scene(wanted, (("clock", 4),))
    assert read_scene(row).classes == ["clock", "bench"]
    assert read_scene(row).bound("clock") == 4
    assert read_scene(row).bound("bench") == math.inf
    assert read_scene({"prompt": "a bench", "tag": "none"}) is None
    assert read_scene({"include": [{"class": "cat"}]}) == Scene((Wanted("cat"),))


def test_the_line_of_metadata_in_the_documentation():
    """It asks five questions; a dog right of a red bench answers four of them."""
    (line,) = re.findall(r"```json\n(.*)\n```", (ROOT / "docs" / "rewards.md").read_text())
    scene = read_scene(json.loads(line))
    assert scene == Scene((Wanted("bench", 1, "red"), Wanted("dog", 1, "", "left of", 0)), (("cat", 1),))
    answers = judge(scene, kept(seen("dog", 150, 50), seen("bench", 50, 50, color="red")), margin=0.1)
    assert [answer.right for answer in answers] == [True, True, True, False, True]


BENCH = {"class": "bench", "count": 1}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"include": "bench"}, "include is 'bench'; it must be a list"),
        ({"include": None}, "include is None; it must be a list"),
        ({"exclude": ["bench"]}, r"exclude is \['bench'\]; it must be a list"),
        ({"include": []}, "asks for nothing"),
        ({"include": [{"count": 1}]}, "a class is None"),
        ({"include": [{"class": " "}]}, "a class is ' '"),
        ({"include": [{"class": "no. 5"}]}, "without full stops"),
        ({"include": [{"class": "a" * 41}]}, "of at most 40 letters"),
        ({"include": [{"class": "\ud800"}]}, "a class is"),  # half of a character, at which tokenizers fail
        ({"include": [{"class": "?"}]}, "a class is"),
        ({"include": [{"class": f"c{n}"} for n in range(17)]}, "it has 17 classes; a detector is told 16 at most"),
        ({"include": [{"class": "bench", "count": 0}]}, "the count of bench is 0"),
        ({"include": [{"class": "bench", "count": 17}]}, "the count of bench is 17; .* from 1 to 16"),
        ({"include": [{"class": "bench", "count": 1.0}]}, "the count of bench is 1.0"),
        ({"include": [{"class": "bench", "count": True}]}, "the count of bench is True"),
        ({"include": [{"class": "bench", "colour": "red"}]}, "an entry has 'colour'; known: class, count, color, position"),
        ({"include": [BENCH | {"color": "cyan"}]}, "the color of bench is 'cyan'; known: red, orange"),
        ({"include": [BENCH | {"color": None}]}, "the color of bench is None"),
        (
            {"include": [BENCH | {"position": "left of"}]},
            r"position of bench is 'left of'; it must be like \[\"left of\", 0\]",
        ),
        ({"include": [BENCH | {"position": ["beside", 0]}]}, "position of bench is 'beside'; known: left of"),
        ({"include": [BENCH | {"position": ["left of", 0]}]}, "bench is left of entry 0; it must be another entry"),
        ({"include": [BENCH | {"position": ["left of", 3]}]}, "bench is left of entry 3"),
        ({"include": [BENCH | {"position": ["left of", -1]}, {"class": "cat"}]}, "bench is left of entry -1"),
        ({"include": [BENCH, BENCH | {"color": "red"}]}, "bench stands in include twice"),
        ({"include": [BENCH], "exclude": [BENCH]}, "asks for 1 bench and excludes 1"),
        ({"exclude": [BENCH | {"color": "red"}]}, "an entry has 'color'; known: class, count"),
    ],
)
def test_malformed_metadata(row, said):
    """Each is refused with what was given and what is allowed."""
    with pytest.raises(ValueError, match=said):
        read_scene(row)


def test_geneval_has_ten_colours():
    assert len(set(COLORS)) == 10
    assert all(re.fullmatch("[a-z]+", color) for color in COLORS)
