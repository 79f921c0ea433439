"""Prompt files: the reference sets are what the paper describes, and loading refuses what is not a prompt file."""

import json
import re
from pathlib import Path

import pytest

from b2diffurl.prompts import load_prompts

FOLDER = Path(__file__).parent.parent / "config" / "prompt"
ANIMALS = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo
"""
ACTIVITIES = ("washing dishes", "riding a bike", "playing chess")
RELATION = re.compile(r"(an? \w+) (on the left of|on the right of|on top of|below) (an? \w+)")


def load(template: int) -> tuple[list[str], list[str]]:
    return tuple(load_prompts(FOLDER / f"template{template}_{part}.json") for part in ("train", "test"))


@pytest.mark.parametrize(("template", "counts"), [(1, (45, 90)), (2, (40, 40)), (3, (40, 30))])
def test_sizes_and_disjointness(template, counts):
    """Each template has the paper's number of prompts, none twice, none in both of its files."""
    train, test = load(template)
    assert (len(train), len(test)) == counts
    assert len({*train, *test}) == sum(counts)


@pytest.mark.parametrize("template", [1, 2, 3])
def test_articles(template):
    """`an` stands before a vowel and only there."""
    train, test = load(template)
    for article, word in re.findall(r"\b(an?) (\w+)", "\n".join(train + test)):
        assert article == ("an" if word[0] in "aeiou" else "a"), word


def test_template1():
    """The 45 animals in order, fifteen to an activity in training; each is tested on its other two."""
    train, test = ([re.fullmatch(r"an? (\w+) (.+)", prompt).groups() for prompt in prompts] for prompts in load(1))
    assert train == [(animal, ACTIVITIES[n // 15]) for n, animal in enumerate(ANIMALS.split())]
    trained = dict(train)
    for animal in ANIMALS.split():
        assert {activity for name, activity in test if name == animal} == {*ACTIVITIES} - {trained[animal]}


def test_template2():
    """Colours and fruits or vegetables of the test set are not seen in training; all of both are combined."""
    (colours, plants), (new_colours, new_plants) = (
        map(set, zip(*(prompt.split() for prompt in prompts), strict=True)) for prompts in load(2)
    )
    assert not colours & new_colours
    assert not plants & new_plants
    assert len(colours) * len(plants) == len(new_colours) * len(new_plants) == 40


def test_template3():
    """No pair of objects of the test set meets in training, in either order; every relation is in both sets."""
    train, test = ([RELATION.fullmatch(prompt).groups() for prompt in prompts] for prompts in load(3))
    assert not {frozenset((a, b)) for a, _, b in train} & {frozenset((a, b)) for a, _, b in test}
    assert len({relation for _, relation, _ in train}) == len({relation for _, relation, _ in test}) == 4
    assert all(a != b for a, _, b in train + test)


def test_load_prompts_reads_json_and_text(tmp_path):
    """A JSON list and a text file with a prompt a line say the same; blank lines are no prompts."""
    (tmp_path / "p.json").write_text(json.dumps(["a cat", "ein Vögelchen"]), encoding="utf-8")
    (tmp_path / "p.txt").write_text("a cat\n\n  ein Vögelchen \n", encoding="utf-8")
    assert load_prompts(tmp_path / "p.json") == load_prompts(str(tmp_path / "p.txt")) == ["a cat", "ein Vögelchen"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[]", "holds no prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.json", "", "is not JSON"),
        ("p.json", '["a cat"', "is not JSON"),
        ("p.json", '{"prompts": ["a cat"]}', "must be a JSON list of non-empty strings"),
        ("p.json", '"a cat"', "must be a JSON list of non-empty strings"),
        ("p.json", '["a cat", 7]', "must be a JSON list of non-empty strings"),
        ("p.json", '["a cat", " "]', "must be a JSON list of non-empty strings"),
    ],
)
def test_load_prompts_refuses_what_is_not_a_prompt_file(tmp_path, name, text, message):
    """Each kind of damage is named, with the file's path."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_load_prompts_names_a_missing_file(tmp_path):
    """A file that is not there is an error with its path."""
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.json"))):
        load_prompts(tmp_path / "none.json")
