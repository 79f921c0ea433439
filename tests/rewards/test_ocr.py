"""The reward `ocr`: what a prompt quotes, the score by hand, and real reading of rendered text."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version

import numpy as np
import pytest
import torch
from conftest import ROOT, json_lines, run_script, stage_of
from PIL import Image
from torch import Tensor

from b2diffurl.configuration.settings import Rewards, read_settings
from b2diffurl.rewards import Reward, check_rewards
from b2diffurl.rewards.ocr import MODELS, compare, edit_distance, letters, load, package_folder, quoted
from benchmarks.ocr import CONDITIONS, FONTS, NOTHING, Look, measure, picture

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ocr() -> Reward:
    """The reward with the real models, loaded once."""
    return load("ocr", {}, CPU, torch.float32)


@pytest.fixture
def settings(config) -> Rewards:
    return read_settings(config).rewards


def stacked(pictures: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(one) for one in pictures]))


# ---- what a prompt asks for ----


QUOTES = {
    'a shop sign that says "OPEN"': ["OPEN"],
    "a shop sign that says 'OPEN'": ["OPEN"],
    "a sign “Push”, a sign „Drücken“, a sign «Poussez», a sign »Drück«": ["Push", "Drücken", "Poussez", "Drück"],
    "‘DON’T PANIC’ on a book": ["DON’T PANIC"],
    "a sign that says 'DON'T PANIC'": ["DON'T PANIC"],
    "the dogs' bowl, and it's labelled 'REX'": ["REX"],
    "a rock 'n' roll poster, \"KISS\" on it": ["KISS"],  # single marks are apostrophes where there are double ones
    'a 12" pizza with the words "HOT" and "COLD"': ["HOT", "COLD"],  # a mark of inches
    'a door with the number "24"': ["24"],
    "一家商店，招牌上写着「营业中」": ["营业中"],
    '写着"你好"的招牌': ["你好"],
    'a title in two\nlines, "HELLO\nWORLD"': ["HELLO\nWORLD"],
}


@pytest.mark.parametrize("prompt", QUOTES)
def test_what_a_prompt_quotes(prompt):
    """Marks of every kind; apostrophes in words and inches are none."""
    assert quoted(prompt) == QUOTES[prompt]


REFUSED = {
    "a red circle": "quotes no text",
    "the dogs' bowl": "quotes no text",
    'a sign that says "OPEN': "without its partner",
    'a sign that says "OPEN and one that says "CLOSED"': "without its partner",
    "a sign that says “OPEN": "without its partner",
    "a sign that says 'OPEN": "may be a quotation mark",
    "a sign that says 'OPEN' and one that says 'CLOSED": "may be a quotation mark",
    "a sign of the '90s that says 'OPEN'": "may be a quotation mark",
    'a sign that says "?!"': "no letter and no digit",
    'a sign that says " "': "no letter and no digit",
    'a sign that says ""': "without its partner",
}


@pytest.mark.parametrize("prompt", REFUSED)
def test_a_prompt_that_cannot_be_scored_is_refused_before_work(settings, prompt):
    """The error has the prompt, what is wrong with it, and what to write."""
    says = rf"{re.escape(repr(prompt))}.*{REFUSED[prompt]}.*in quotation marks"
    with pytest.raises(ValueError, match=says):
        check_rewards(["ocr"], settings, ['a sign that says "OPEN"', prompt])


@pytest.mark.parametrize(
    ("script", "text"), [("Cyrillic", "ПИВО"), ("Korean", "한국"), ("Arabic", "قهوة"), ("Thai", "กาแฟ")]
)
def test_a_script_that_the_reader_does_not_know_is_refused(settings, script, text):
    """It could never score: the error has the letters, and the scripts that are read, of which none is refused."""
    with pytest.raises(ValueError, match=rf"quotes [{letters(text)}]+, which the reader does not know. It reads Latin"):
        check_rewards(["ocr"], settings, [f'a sign that says "{text} 24"'])
    assert quoted('"Café Ωμέγα ½ 你好 営業中ーラーメン 々 Straße"')


def test_the_scripts_are_those_of_the_reader():
    """Of each script that is said to be known letters are in the alphabet that the model's file holds; of others none."""
    import onnxruntime

    path = package_folder() / MODELS["Rec"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    alphabet = set(session.get_modelmeta().custom_metadata_map["character"].splitlines())
    assert set("AzÉßΩμ你好あカー々09") <= alphabet
    assert not set("ПИВО한국قهوةกาแฟ") & alphabet


# ---- comparing ----


def test_edit_distance_by_hand_and_by_its_definition():
    """Known distances; and on random words the recursion that defines Levenshtein's distance."""
    for one, other, distance in [
        ("kitten", "sitting", 3),
        ("open", "", 4),
        ("", "ab", 2),
        ("open", "opne", 2),
        ("a", "a", 0),
    ]:
        assert edit_distance(one, other) == distance

    @cache
    def defined(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return defined(one[1:], other[1:])
        return 1 + min(defined(one[1:], other), defined(one, other[1:]), defined(one[1:], other[1:]))

    draw = random.Random(0)
    for _ in range(200):
        one, other = ("".join(draw.choices("abc", k=draw.randrange(9))) for _ in range(2))
        assert edit_distance(one, other) == defined(one, other)


def test_what_is_compared_of_a_text():
    """Letters and digits; case, spaces, punctuation and the form of a character do not count, accents do."""
    assert letters("  Don’t\nPANIC! ") == letters("DON'T PANIC") == "dontpanic"
    assert letters("ＯＰＥＮ ２４") == letters("open24")  # full width
    assert letters("STRASSE") == letters("straße")
    assert letters("caf\N{LATIN SMALL LETTER E WITH ACUTE}") == letters("CAFE\N{COMBINING ACUTE ACCENT}") != letters("cafe")
    assert letters("$ 9.99 +") == "999"


COMPARED = [
    # quotes, text that is read, score, exact
    (["OPEN"], "open", 1, True),
    (["OPEN"], "", 0, False),
    (["OPEN"], "OPN", 3 / 4, False),  # a letter is missing
    (["OPEN"], "OPFN", 3 / 4, False),  # is another
    (["OPEN"], "OOPNEN", 2 / 4, False),  # two too many
    (["OPEN"], "OPNE", 2 / 4, False),  # two have changed places
    (["OPEN"], "QUICKLY", 0, False),  # distance 7, more than 4: 0
    (["OPEN"], "we are OPEN 24 hours", 1, False),  # other text beside it is free
    (["OPEN"], "we are OPFN 24 hours", 0, False),  # but only there: 13 letters too many, and one another
    (["Hello World"], "HELLO WORLD.", 1, True),
    (["Hello World"], "Helo World", 9 / 10, False),
    (["LEFT", "RIGHT"], "left right", 1, True),
    (["LEFT", "RIGHT"], "right left", 1, True),  # a prompt seldom says what is further up
    (["LEFT", "RIGHT"], "right exit left", 1, False),
    (["LEFT", "RIGHT"], "rigt left", 8 / 9, False),
    (["LEFT", "RIGHT"], "left", 4 / 9, False),
    (["NO", "NO"], "no", 2 / 4, False),  # each has to be there
    (["ART", "PART"], "part", 4 / 7, False),  # in a place of its own
    (["ART", "PART"], "part art", 1, True),
    (["!", "STOP"], "stop", 1, True),
    (["TOM", "OTTO"], "ottotom", 1, True),  # TOM is there a second time, across both
    (["TOM", "OTTO"], "we are ottotom", 1, False),
    (["A", "B", "C", "D", "E"], "abcde", 1, True),  # more than four
]


@pytest.mark.parametrize(("quotes", "text", "expected", "exact"), COMPARED)
def test_scores_by_hand(quotes, text, expected, exact):
    """1 minus the edits as a part of the letters quoted; by Flow-GRPO's rule 1 where all is there, and never below 0."""
    found, is_exact = compare(quotes, text)
    assert found == pytest.approx(expected)
    assert is_exact == exact


def test_much_other_text_costs_no_time():
    """A page of text is scored at once: 0 without a table of edits, 1 if all is there."""
    page = "lorem ipsum dolor " * 10_000
    quotes = ["a sentence of many letters"] * 4
    assert compare(quotes, page) == (0.0, False)
    assert compare(quotes, page + " ".join(quotes)) == (1.0, False)


# ---- reading ----


EXACT = ["512 px", "64 px", "on noise", "turned by 30 degrees"]


@pytest.mark.parametrize("condition", EXACT)
def test_rendered_text_is_read(ocr, condition):
    """Text in two fonts is read letter by letter: large, tiny, on noise, and turned."""
    found = measure(ocr, [("Hello World", picture("Hello World", CONDITIONS[condition], font)) for font in FONTS[:2]])
    assert (found["score"], found["exact"]) == (1.0, 1.0)


def test_it_is_what_rapidocr_reads_in_the_file(ocr, tmp_path):
    """Used as its documentation has it, with its own choice of models, on the image as a PNG file: the same lines."""
    from rapidocr import RapidOCR

    image = picture("OPEN 24\nQuiet please\nbakery", Look(ink=(200, 40, 30), paper=(170, 200, 230), noise=30))
    image.save(tmp_path / "image.png")
    stock = RapidOCR(params={"Global.log_level": "error"})(tmp_path / "image.png")
    assert len(stock.txts) == 3
    assert ocr(stacked([image]), ['"OPEN"'])[1]["text"] == [" ".join(stock.txts)]


def test_upside_down_sideways_and_white_on_black(ocr):
    """Half a turn and a quarter are found and made up for; ink may be light and paper dark."""
    looks = [CONDITIONS[name] for name in ("upside down", "turned by 90 degrees", "white on black")]
    found = measure(ocr, [("Hello World", picture("Hello World", look)) for look in looks])
    assert found["exact"] == 1.0


def test_what_the_score_tells_apart(ocr):
    """Of one prompt: the right text, the right one and more, a wrong letter, another word, none; parts say what is read."""
    shown = ["OPEN 24", "OPEN 24\nhours", "OPEN 29", "CLOSED", ""]
    scores, parts = ocr(stacked([picture(text) for text in shown]), ['a sign that says "Open 24"'] * 5)
    assert scores.tolist() == pytest.approx([1, 1, 5 / 6, 0, 0])
    assert parts["exact"].tolist() == [1, 0, 0, 0, 0]
    assert parts["text"] == ["OPEN 24", "OPEN 24 hours", "OPEN 29", "CLOSED", ""]


def test_no_text_is_none(ocr):
    """Blank and noisy images have the score 0, and what is blurred beyond reading."""
    images = [picture("", Look(noise=noise, paper=(150, 150, 150))) for noise in (0, 60)]
    found = measure(ocr, [("OPEN", one) for one in (*images, picture("OPEN", Look(blur=0.3)))])
    assert found["score"] == 0
    assert len(NOTHING) == len(images)


def test_images_that_are_no_squares(ocr):
    """Wide and high ones are read; one of 8 px has a score, too."""
    sign = picture("OPEN", Look(size_px=256))
    wide, high = sign.crop((0, 64, 256, 192)), sign.crop((0, 64, 256, 192)).rotate(90, expand=True)
    for image, expected in [(wide, 1), (high, 1), (sign.resize((8, 8)), 0)]:
        assert ocr(stacked([image]), ['"OPEN"'])[0].item() == expected


def test_a_score_has_the_same_bits_whatever_its_neighbours(ocr, monkeypatch):
    """Text and score of an image alone are those in a batch, in another order, beside its like, on three threads."""
    pictures = [picture("OPEN", CONDITIONS["blurred by 0.1 of it"], FONTS[1]), picture("EXIT 7\nQuiet please"), picture("")]
    prompts = ['"OPEN"', '"EXIT" and "Quiett"', '"OPEN"']
    alone = [ocr(stacked([one]), [prompt]) for one, prompt in zip(pictures, prompts, strict=True)]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    order = [2, 0, 1, 1, 0]
    scores, parts = ocr(stacked([pictures[n] for n in order]), [prompts[n] for n in order])
    assert len({one.item() for one, _ in alone}) == 3
    assert scores.tolist() == [alone[n][0].item() for n in order]
    assert parts["text"] == [alone[n][1]["text"][0] for n in order]
    assert parts["exact"].tolist() == [alone[n][1]["exact"].item() for n in order]


def test_an_image_is_read_once_however_often_it_is_there(monkeypatch):
    """A batch padded by repeating its last image costs no more than what is in it."""
    seen = []
    monkeypatch.setattr("b2diffurl.rewards.ocr.reader", lambda: lambda image: seen.append(image) or "open")
    images = torch.tensor([0, 1, 1, 1], dtype=torch.uint8)[:, None, None, None].expand(4, 8, 8, 3)
    scores, parts = load("ocr", {}, CPU, torch.float32)(images, ['"OPEN"', '"OPEN"', '"PEN"', '"OPENS"'])
    assert len(seen) == 2
    assert (scores.tolist(), parts["text"]) == (pytest.approx([1, 1, 1, 4 / 5]), ["open"] * 4)


FRESH = """
import json, logging, socket
from pathlib import Path

def refuse(*given, **named):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
import numpy, torch
from b2diffurl.runtime import apart
from b2diffurl.rewards.ocr import load, package_folder
from benchmarks.ocr import picture

def state():
    root = logging.getLogger()
    found = [*package_folder().rglob("*.*"), *Path.home().rglob("*")]
    files = {str(path): path.stat().st_mtime_ns for path in found if path.suffix != ".pyc"}
    return apart.read() | {"root log": (root.level, list(root.handlers)), "files": files}

before = state()
read = load("ocr", {}, torch.device("cpu"), torch.float32)
scores, parts = read(torch.tensor(numpy.array(picture("OPEN")))[None], ['"OPEN"'])
after = state()
print(json.dumps([parts["text"], [name for name in before if before[name] != after[name]]]))
"""


@pytest.mark.long
def test_the_reader_leaves_the_process_as_it_was(tmp_path):
    """In a process of its own, without network: it reads; environment, log, signals, threads and warnings are as before, and
    nothing is printed. No file is written: not by rapidocr beside its models, nor by onnxruntime's telemetry at home."""
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    del environment["ORT_DISABLE_TELEMETRY"]
    ended = subprocess.run([sys.executable, "-c", FRESH], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [["OPEN"], []]
    assert ended.stderr == ""


def test_without_the_package_the_error_has_the_command(settings, monkeypatch):
    """Either package that is missing is named before work, with pip's command, and the file it names pins both."""
    find, pins = importlib.util.find_spec, (ROOT / "requirements-rewards.txt").read_text().splitlines()
    for package in ("rapidocr", "onnxruntime"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, gone=package: None if name == gone else find(name))
        with pytest.raises(ModuleNotFoundError, match=f"ocr needs.*{package}: pip install -r requirements-rewards.txt"):
            check_rewards(["ocr"], settings)
        assert f"{package}=={version(package)}" in pins


def test_another_version_of_the_package(settings, monkeypatch, tmp_path):
    """One whose wheel has other models is refused before work by the name of a model that it lacks."""
    monkeypatch.setattr("b2diffurl.rewards.ocr.package_folder", lambda: tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"PP-OCRv6_det_small.onnx is missing.*pip install -r requirements-rewards.txt"
    ):
        check_rewards(["ocr"], settings)


# ---- a run ----

DRAWN = {
    "exp_name": "tiny",
    "num_threads": 1,
    "stage_cnt": 1,
    "sample.batch_size": 1,
    "sample.num_batches_per_epoch": 1,
    "split_time": 2,
    "eval.judge": "",
    "eval.diversity": (),
    "eval.prompt_file": "prompts.txt",
    "pretrained.model": str(ROOT / "model/shapes/base"),
    "prompt_file": "prompts.txt",
    "reward.name": "ocr",
}


@pytest.mark.long
def test_a_stage_of_the_embedded_model(tmp_path):
    """Preset shapes with Reward=ocr and prompts that quote words: sampled, read and trained on; scores.jsonl has what was
    read, and the score that follows from it."""
    (tmp_path / "prompts.txt").write_text('a "red" circle\na "blue" square\n')
    for verb in ("sample", "select", "train"):
        ended = run_script(tmp_path, verb, DRAWN, preset="shapes")
        assert ended.code == 0, ended.stderr
    one = stage_of(tmp_path)
    rows = json_lines(one.scores)
    assert len(rows) == 2 and {row["prompt"] for row in rows} <= {'a "red" circle', 'a "blue" square'}
    for row in rows:
        assert row["reward"] == pytest.approx(compare([row["prompt"].split('"')[1]], row["parts"]["text"])[0])
        assert row["parts"].keys() == {"exact", "text"}
    assert one.finished("train")


@pytest.mark.parametrize("file", ["prompt_file", "eval.prompt_file"])
def test_a_run_whose_prompts_quote_nothing_ends_before_work(tmp_path, file):
    """Two lines that name the prompt and say what to write, exit code 2, and no image is sampled; of held-out prompts, too,
    which the run would score at its end, with their file."""
    (tmp_path / "prompts.txt").write_text('a "red" circle\n')
    (tmp_path / "plain.txt").write_text("a red circle\n")
    ended = run_script(tmp_path, "sample", DRAWN | {file: "plain.txt"}, preset="shapes")
    assert ended.code == 2
    assert "'a red circle' quotes no text. Put the text" in ended.stderr
    assert ("eval.prompt_file, plain.txt" in ended.stderr) == file.startswith("eval")
    assert not stage_of(tmp_path).images.exists()


def test_a_judge_that_cannot_score_such_prompts_is_named(tmp_path):
    """The judge of the preset shapes knows no quotes: the error says which setting it is, and how to do without."""
    (tmp_path / "prompts.txt").write_text('a "red" circle\n')
    ended = run_script(tmp_path, "sample", DRAWN | {"eval.judge": "shapes"}, preset="shapes")
    assert ended.code == 2
    assert "eval.judge, shapes, cannot score the prompts (--config.eval.judge= is none): not a prompt of" in ended.stderr
