"""Prompt files: the reference sets are what the paper describes, and loading refuses what is not a prompt file."""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import experiment, run_script, run_stage

from b2diffurl.algorithm.seeding import generator
from b2diffurl.configuration import prompts
from b2diffurl.configuration.prompts import batch_prompts, load_prompts, named_prompts, place_prompts
from b2diffurl.configuration.settings import read_settings

FOLDER = Path(__file__).parents[2] / "config" / "prompt"
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
    """A JSON list, JSON lines and text with a prompt a line say the same; blank lines are no prompts; each is placed."""
    (tmp_path / "p.json").write_text(json.dumps(["a cat", "ein Vögelchen"]), encoding="utf-8")
    (tmp_path / "p.txt").write_text("a cat\n\n  ein Vögelchen \n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat", "id": 3}\n\n{"prompt": "ein Vögelchen"}\r\n', encoding="utf-8")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a cat\u2028asleep"}\n', encoding="utf-8")
    assert load_prompts(tmp_path / "odd.jsonl") == ["a cat\u2028asleep"]  # a line only to str.splitlines
    for name, places in (
        ("p.json", ("entry 1", "entry 2")),
        ("p.txt", ("line 1", "line 3")),
        ("p.jsonl", ("line 1", "line 3")),
    ):
        assert load_prompts(str(tmp_path / name)) == ["a cat", "ein Vögelchen"]
        assert [place for place, _ in place_prompts(tmp_path / name)] == [f"{tmp_path / name}, {place}" for place in places]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[]", "holds no prompt"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", "\n", "holds no prompt"),
        ("p.json", "", "holds no prompt"),
        ("p", "", "holds no prompt"),
        ("p.csv", "id,prompt\n1,a cat\n", r"is a \.csv file, which is no list of prompts"),
        ("p.TSV", "a cat\n", r"is a \.tsv file"),
        ("p.yaml", "- a cat\n", r"is a \.yaml file"),
        ("p.JSON", '["a cat"', "is not JSON"),
        ("p", '["a cat"', "is not JSON"),
        ("p", '{"prompts": ["a cat"]}', 'line 1 has no "prompt"'),
        ("p.list", '{"prompt": "a cat"}\na dog\n', "line 2 is not JSON"),
        ("p.json", '["a cat"', "is not JSON"),
        ("p.json", '{"prompts": ["a cat"]}', "is not a list"),
        ("p.json", '"a cat"', "is not a list"),
        ("p.json", '["a cat", 7]', "entry 2: 7 is no prompt"),
        ("p.json", '["a cat", " "]', 'entry 2: " " is no prompt'),
        ("p.json", '["a cat", "a dog", ""]', 'entry 3: "" is no prompt'),
        ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": ""}', 'line 3: "" is no prompt'),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": null}', "line 2: null is no prompt"),
        ("p.jsonl", '{"prompt": "a cat"}\n"a dog"', 'line 2 has no "prompt"'),
        ("p.jsonl", '{"prompt": "a cat"}\n{"text": "a dog"}', 'line 2 has no "prompt"'),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": "a dog"', "line 2 is not JSON"),
    ],
)
def test_load_prompts_refuses_what_is_not_a_prompt_file(tmp_path, name, text, message):
    """Each kind of damage is named, with the file's path."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("p.TXT", "p.Txt", "p", "p.prompts", "my.v2"), "a cat|| a dog |"),
        (("p.JSON", "p.Json", "p", "p.list"), '["a cat",| "a dog"]|'),
        (("p.JSONL", "p.ndjson", "p", "p.list"), '{"prompt": "a cat"}|{"prompt": "a dog"}'),
    ],
)
def test_the_content_decides_where_the_suffix_says_nothing(tmp_path, names, text, end):
    """Nor do capitals, line ends or a byte order mark matter."""
    for name in names:
        for mark in (b"", b"\xef\xbb\xbf"):
            (tmp_path / name).write_bytes(mark + text.replace("|", end).encode())
            assert load_prompts(tmp_path / name) == ["a cat", "a dog"]


def test_what_is_no_file_or_no_text_is_no_prompt_file(tmp_path, monkeypatch):
    """A folder, a pipe, UTF-16, and a model's file, which is not read to its end first."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="is a folder, or no file"):
            load_prompts(path)
    (tmp_path / "p.txt").write_text("a cat\n", encoding="utf-16")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_prompts(tmp_path / "p.txt")
    monkeypatch.setattr(prompts, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match=r"has 14 bytes; a prompt file may have 10\."):
        load_prompts(tmp_path / "p.txt")


def test_load_prompts_names_a_missing_file(tmp_path):
    """A file that is not there is an error with its path."""
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.json"))):
        load_prompts(tmp_path / "none.json")


def test_prompts_in_turn_come_equally_often(overrides, tmp_path):
    """With prompt_random_choose=0 each stage goes on through the file where the one before stopped: after stages of 6 groups
    and a file of 4 prompts, each prompt's count differs from any other's by at most one, in the order of the file."""
    (tmp_path / "four.txt").write_text("a red cat\na blue cat\na green cat\na grey cat\n")
    mine = overrides | {"prompt_file": str(tmp_path / "four.txt"), "prompt_random_choose": 0}
    for index in range(2):
        run_stage(tmp_path, mine, index)
    drawn = [json.loads((experiment(tmp_path) / f"stage{index}" / "prompts.json").read_text())[::3] for index in range(2)]
    assert drawn[0] + drawn[1] == (load_prompts(tmp_path / "four.txt") * 3)


def test_prompts_at_random_follow_from_the_seed():
    """The same generator seed draws the same prompts, another seed others; over many draws none is preferred."""
    prompts = [str(n) for n in range(10)]
    one, same, other = (batch_prompts(prompts, 2000, 0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one == same != other
    counts = [one.count(prompt) for prompt in prompts]
    assert max(abs(count - 200) for count in counts) < 5 * math.sqrt(200 * 0.9)


@pytest.mark.parametrize(
    "name", ["long.txt", *(pytest.param(f"long.{kind}", marks=pytest.mark.long) for kind in ("json", "jsonl"))]
)
def test_a_prompt_that_is_too_long_is_named(models, overrides, tmp_path, name):
    """75 letters and the tokenizer's two marks fit into its 77 tokens; with three more a warning names file, line and
    how many are cut off. It comes when the experiment begins, not with every stage, and when it is judged."""
    prompts = ["b" * 75, "a red circle", "b" * 78]
    lines = {".txt": prompts, ".jsonl": [json.dumps({"prompt": prompt}) for prompt in prompts]}
    text = json.dumps(prompts) if name == "long.json" else "\n".join(lines[Path(name).suffix])
    (tmp_path / name).write_text(text)
    place = re.escape(f"{tmp_path / name}, {'entry' if name == 'long.json' else 'line'} 3: the last 3 tokens are cut off")
    mine = overrides | {"prompt_file": str(tmp_path / name)}
    ended = run_script(tmp_path, "sample", mine)
    assert ended.code == 0, ended.stderr
    assert len(re.findall("cut off", ended.stdout)) == len(re.findall(place, ended.stdout)) == 1
    (experiment(tmp_path) / "stage0" / "sample.json").unlink()
    assert "cut off" not in run_script(tmp_path, "sample", mine).stdout
    judged = run_script(tmp_path, "eval", mine, "--checkpoint=base", "--prompts=train")
    assert len(re.findall(place, judged.stdout)) == 1


@pytest.mark.usefixtures("no_pictures")
def test_one_prompt_instead_of_a_file(config, overrides, tmp_path):
    """config.prompt is all that is trained on, sampled and judged as `train`; `test` is the held-out file still."""
    run_stage(tmp_path, overrides | {"prompt": "a red bird"}, verbs=["sample"])
    assert set(json.loads((experiment(tmp_path) / "stage0" / "prompts.json").read_text())) == {"a red bird"}
    config.prompt = "a red bird"
    sources = read_settings(config).prompts
    assert named_prompts(sources, "train") == [("prompt", "a red bird")]
    assert [prompt for _, prompt in named_prompts(sources, "test")] == load_prompts(overrides["eval.prompt_file"])


def test_prompts_in_turn_run_through_the_file():
    """Without a generator global batch b of n takes prompts b*n, b*n + 1, … modulo their number."""
    taken = [prompt for batch in range(3) for prompt in batch_prompts(list("abcd"), 3, batch, None)]
    assert taken == list("abcdabcda")


def test_random_prompts_are_uniform_and_fixed_by_their_generator():
    """Each prompt comes as often as chance has it (within 5 standard errors), and the key decides which."""
    drawn = batch_prompts(list("abcd"), 8000, 0, generator(0, "prompts"))
    assert drawn == batch_prompts(list("abcd"), 8000, 5, generator(0, "prompts"))
    assert all(abs(count - 2000) < 5 * (8000 * 0.25 * 0.75) ** 0.5 for count in Counter(drawn).values())
