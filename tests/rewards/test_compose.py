"""The reward compose: drawn scenes with the exact checker as detector, the real classes of detectors at tiny size against
the library's own processor and post-processing, colours against stock CLIP, metadata, and a select phase."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import tiny
import torch
from conftest import make_config, ran, refuse
from PIL import Image
from scored import NUM_IMAGES, pixels, scores
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2ForObjectDetection,
    Owlv2Processor,
)

from b2diffurl.configuration.settings import Rewards, read_settings
from b2diffurl.rewards import Reward, check_rewards, compose, load_reward, reward_identity, score
from b2diffurl.rewards.clip import Clip
from b2diffurl.rewards.detector import Detector
from b2diffurl.rewards.geneval import COLORS, Seen
from b2diffurl.shapes import checker
from b2diffurl.shapes.scene import (
    COLOURS,
    KINDS,
    OPPOSITE,
    CaptionErrors,
    corrupt,
    describe,
    holds,
    paint,
    random_scene,
    render,
)

CPU = torch.device("cpu")
CLASSES = ["circle", "wine glass"]
ASKED = ["a red circle", "two squares", "a blue cross left of a circle", "a circle and a green square"]


@pytest.fixture(scope="session")
def detectors(tmp_path_factory) -> Path:
    """A folder with `owlv2` and `grounding_dino`."""
    root = tmp_path_factory.mktemp("detectors")
    tiny.owlv2(root / "owlv2")
    tiny.grounding_dino(root / "grounding_dino")
    return root


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Images uint8 [6,48,64,3] of coloured tiles, wider than high."""
    tiles = torch.randint(0, 256, (6, 3, 4, 3), generator=torch.Generator().manual_seed(0))
    return tiles.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)


@pytest.fixture
def settings(detectors, models) -> Callable[..., Rewards]:
    """settings(changed, **keys) -> the rewards of a configuration with tiny models; keys as in reward.compose.<key>."""
    own = {"detector": str(detectors / "owlv2"), "clip": str(models / "clip")}

    def make(changed: dict | None = None, **keys) -> Rewards:
        values = {f"reward.compose.{key}": value for key, value in (own | keys).items()}
        return read_settings(make_config(values | (changed or {}))).rewards

    return make


@pytest.fixture
def load(settings) -> Callable[..., Reward]:
    return lambda **keys: load_reward("compose", settings(**keys), CPU)


# ---- drawn scenes, the checker as detector ----


class CheckerAsDetector:
    """Finds the shapes of the embedded world, of which the checker gives place and size, and notes their colours."""

    colours: ClassVar[dict[tuple, str]] = {}

    def __init__(self, *_):
        pass

    def __call__(self, image: Tensor, classes: list[str], threshold: float) -> list[Seen]:
        ((_, objects),) = checker.look(image[None])
        found = []
        for one in objects:
            half = one.size_px / 2
            box = (one.x_px - half, one.y_px - half, one.x_px + half, one.y_px + half)
            self.colours[box] = renamed(one.thing.colour)
            found += [Seen(one.thing.shape, 0.9, box)] if one.thing.shape in classes else []
        return found


class CheckersColour:
    def __init__(self, *_):
        pass

    def __call__(self, image: Tensor, one: Seen) -> str:
        return CheckerAsDetector.colours[one.box]


def renamed(words: str) -> str:
    """GenEval has no cyan."""
    return words.replace("cyan", "pink")


def drawn(count: int) -> tuple[np.ndarray, list[str]]:
    """Scenes with captions, half of them right and half with one of several errors; some images are spoiled."""
    rng = np.random.default_rng(0)
    errors = CaptionErrors(reversed_relation=0.15, other_axis=0.1, swapped_colours=0.1, wrong_attribute=0.15)
    scenes = [random_scene(rng) for _ in range(count)]
    prompts = [corrupt(describe(scene, KINDS[n % 3], rng), errors, rng) for n, scene in enumerate(scenes)]
    drawings = [render(scene) if n % 20 else paint([scene.first], scene.background) for n, scene in enumerate(scenes)]
    assert 0.3 < np.mean([holds(scene, prompt) for scene, prompt in zip(scenes, prompts, strict=True)]) < 0.8
    return np.stack(drawings), [str(prompt) for prompt in prompts]


@pytest.fixture
def with_checker(load, monkeypatch) -> Callable[..., Reward]:
    """load(**keys) with the checker in place of the two models."""
    for name, stand_in in (("Detector", CheckerAsDetector), ("ColorOf", CheckersColour), ("Clip", CheckersColour)):
        monkeypatch.setattr(compose, name, stand_in)
    return load


def test_verdicts_on_drawn_scenes_are_the_checkers(with_checker):
    """On 400 scenes, right and wrong in shape, colour, binding, relation, or with a shape too few: `correct` is the
    checker's own verdict, and the objects are there exactly if its shapes are."""
    drawings, prompts = drawn(400)
    verdicts = checker.check(drawings, prompts)
    rewards, parts = score(with_checker(score="all"), torch.from_numpy(drawings), list(map(renamed, prompts)))
    assert rewards.tolist() == [float(verdict.correct) for verdict in verdicts]
    assert 100 < rewards.sum() < 300
    assert torch.equal(parts["correct"], rewards)
    assert [part == 1 for part in parts["objects"].tolist()] == [verdict.parts["shapes"] for verdict in verdicts]
    placed = [(verdict, part) for verdict, part in zip(verdicts, parts["position"].tolist(), strict=True) if part == part]
    assert len(placed) == sum("relation" in verdict.parts for verdict in verdicts) > 100
    assert all(part == 0 for verdict, part in placed if verdict.correct is False and not verdict.objects)


def test_the_fraction_of_right_answers(with_checker):
    """A red circle left of a blue square: five questions. Each mistake costs its own, and the words say which."""
    scene = random_scene(np.random.default_rng(3))
    first, second = scene.first.thing, scene.second.thing
    prompt = str(describe(scene, "relation", np.random.default_rng(0)))
    picture = torch.from_numpy(render(scene))[None]
    reward = with_checker()

    def judged(words: str) -> tuple[float, dict]:
        rewards, parts = score(reward, picture, [renamed(words)])
        return rewards.item(), {key: value[0] if isinstance(value, list) else value.item() for key, value in parts.items()}

    value, parts = judged(prompt)
    assert value == 1
    assert parts["count"] != parts["count"]  # NaN: no number was asked for
    assert {parts[key] for key in ("correct", "objects", "color", "position")} == {1.0}
    assert sorted(parts["found"].split(", ")) == sorted(
        renamed(f"1 {thing.colour} {thing.shape}") for thing in (first, second)
    )
    assert "wrong" not in parts["found"]
    turned = f"{first} {OPPOSITE[scene.relation]} {second}"
    value, parts = judged(turned)
    assert value == pytest.approx(4 / 5)
    assert (parts["correct"], parts["position"], parts["color"]) == (0.0, 0.0, 1.0)
    assert parts["found"].endswith(f"; wrong: {first.shape} {OPPOSITE[scene.relation]} {second.shape}")
    other = next(colour for colour in COLOURS if colour not in (first.colour, second.colour, "cyan"))
    value, parts = judged(f"a {other} {first.shape}")
    assert (value, parts["color"], parts["objects"]) == (0.5, 0.0, 1.0)
    value, parts = judged(f"two {first.shape}s" if first.shape != "cross" else "two crosses")
    assert (value, parts["count"], parts["objects"]) == (0.5, 0.0, 1.0)
    assert judged("a photo of a wine glass")[1]["found"] == "nothing; wrong: wine glass"


# ---- detectors ----


def by_library(root: Path, image: Tensor, threshold: float) -> list[tuple[str, float, list[float]]]:
    """(class, score, box) by OWLv2's own processor, forward and post-processing, of one picture of Pillow's."""
    model, processor = Owlv2ForObjectDetection.from_pretrained(root), Owlv2Processor.from_pretrained(root, backend="pil")
    texts = [[f"a photo of a {name}" for name in CLASSES]]
    with torch.no_grad():
        inputs = processor(text=texts, images=Image.fromarray(image.numpy()), return_tensors="pt")
        (found,) = processor.post_process_grounded_object_detection(
            model(**inputs), threshold=threshold, target_sizes=[tuple(image.shape[:2])], text_labels=[CLASSES]
        )
    return list(zip(found["text_labels"], found["scores"].tolist(), found["boxes"].tolist(), strict=True))


def test_owlv2_is_the_librarys(detectors, images):
    """Classes, scores and boxes are to the bit those of the library's processor, model and post-processing."""
    detector, labels = Detector(str(detectors / "owlv2"), CPU, torch.float32), []
    for image in images:
        expected = by_library(detectors / "owlv2", image, 0.52)
        assert [(one.name, one.score, list(one.box)) for one in detector(image, CLASSES, 0.52)] == expected
        labels += [label for label, _, _ in expected]
    assert set(labels) == set(CLASSES)
    assert len(images) < len(labels) < 16 * len(images)


def test_grounding_dino_is_the_librarys(detectors, images):
    """Boxes and scores are those of the library where a class's token fits best; a box counts for the class of its best
    token. The tokenizer makes a token a letter, so after the first mark come 6, a full stop, and 9."""
    root = detectors / "grounding_dino"
    model = GroundingDinoForObjectDetection.from_pretrained(root)
    processor = GroundingDinoProcessor.from_pretrained(root, backend="pil")
    detector, labels = Detector(str(root), CPU, torch.float32), []
    for image in images:
        inputs = processor(text=[CLASSES], images=Image.fromarray(image.numpy()), return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        logits = outputs.logits[0]
        best = torch.stack([logits[:, 1:7].amax(1), logits[:, 8:17].amax(1)])
        outputs.logits[..., [0, 7, 17, 18]] = -torch.inf
        (found,) = processor.post_process_grounded_object_detection(outputs, threshold=0.3, target_sizes=[image.shape[:2]])
        kept = best.amax(0).sigmoid() > 0.3
        labels += [CLASSES[n] for n in best.argmax(0)[kept]]
        seen = detector(image, CLASSES, 0.3)
        assert [list(one.box) for one in seen] == found["boxes"].tolist()
        # A sigmoid of few numbers rounds otherwise than one of many.
        assert [one.score for one in seen] == pytest.approx(found["scores"].tolist(), rel=2e-7)
        assert [one.name for one in seen] == labels[-len(seen) :]
    assert set(labels) == set(CLASSES)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["owlv2", "grounding_dino"])
def test_a_detector_in_half_precision(detectors, images, name, dtype):
    """It runs, and its scores move."""
    full = Detector(str(detectors / name), CPU, torch.float32)(images[0], CLASSES, 0.0)
    half = Detector(str(detectors / name), CPU, dtype)(images[0], CLASSES, 0.0)
    assert {one.score for one in half} != {one.score for one in full}


def test_an_overflow_is_no_empty_image(detectors, images):
    """A NaN is above no threshold; the run stops with the remedy."""
    detector = Detector(str(detectors / "owlv2"), CPU, torch.float32)
    detector.model.class_head.logit_shift.bias.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=r"overflows in torch\.float32; take --config\.reward\.dtype=float32"):
        detector(images[0], CLASSES, 0.3)


@pytest.mark.parametrize(("name", "classes"), [("owlv2", ["x" * 40]), ("grounding_dino", ["wine glass"] * 7)])
def test_texts_are_not_cut(detectors, images, name, classes):
    """A class of which the model would read the beginning only, or not at all, stops the run with the remedy."""
    detector = Detector(str(detectors / name), CPU, torch.float32)
    detector.model.config.text_config.max_position_embeddings = 16  # as OWLv2 has it
    with pytest.raises(ValueError, match=r"reads \d+ tokens, and '.*' has \d+; give fewer classes, or shorter names"):
        detector(images[0], classes, 0.3)


@pytest.mark.parametrize("name", ["owlv2", "grounding_dino"])
def test_a_score_does_not_depend_on_neighbours_or_batch_size(detectors, load, images, name):
    """With neighbours that ask for more classes or fewer, or alone: the same bits in every part."""
    reward = load(detector=str(detectors / name), threshold=0.4)
    whole, parts = score(reward, images, [*ASKED, "a circle", "a cat and a dog"])
    for n in range(4):
        alone, alone_parts = score(reward, images[n : n + 1], ASKED[n : n + 1])
        assert alone.item() == whole[n].item()
        for key, value in alone_parts.items():
            assert repr(value[0]) == repr(parts[key][n])
    other, other_parts = score(reward, images[[5, 2]], ["two cats, a dog, a bird and a cow", ASKED[2]])
    assert (other[1], other_parts["found"][1]) == (whole[2], parts["found"][2])
    assert len(set(parts["found"])) == len(images)


def test_a_repeated_image_is_looked_at_once(with_checker, monkeypatch):
    """A batch that was filled up costs no more than its images; another prompt, or another image, is another question."""
    looked = []
    keep = compose.keep
    monkeypatch.setattr(compose, "keep", lambda seen, **options: looked.append(seen) or keep(seen, **options))
    drawings, captions = drawn(40)
    images, prompts = torch.from_numpy(drawings[1:3]), list(map(renamed, captions[1:3]))
    rows = [0, 1, 1, 1]
    repeated, parts = score(with_checker(), images[rows], [prompts[row] for row in rows])
    assert len(looked) == 2
    plain, plain_parts = score(with_checker(), images, prompts)
    assert repeated.tolist() == plain[rows].tolist()
    assert parts["found"] == [plain_parts["found"][row] for row in rows]
    looked.clear()
    score(with_checker(), images[[0, 0]], prompts)
    assert len(looked) == 2


# ---- colours ----


def stock_colour(root: Path, crop: Tensor, name: str) -> tuple[int, list[float]]:
    """The best of GenEval's ten colours for a crop, and how well each fits, by stock CLIP: three texts a colour."""
    model, tokens = CLIPModel.from_pretrained(root), CLIPTokenizer.from_pretrained(root)
    pixels = CLIPImageProcessor.from_pretrained(root)(Image.fromarray(crop.numpy()), return_tensors="pt")
    fits = []
    with torch.no_grad():
        embedding = normalize(model.get_image_features(**pixels).pooler_output)
        for color in COLORS:
            texts = (f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}", f"a photo of a {color} object")
            some = [model.get_text_features(**tokens(text, return_tensors="pt")).pooler_output for text in texts]
            mean = torch.stack([normalize(one) for one in some]).mean(0)
            fits.append((embedding @ normalize(mean).T).item())
    return int(np.argmax(fits)), fits


def test_colours_are_zero_shot_classes_of_clip(models, images):
    """The colour of a box is what stock CLIP says of its crop alone, with grey above and below a flat one."""
    color_of, found = compose.ColorOf(Clip(str(models / "clip"), CPU, torch.float32)), set()
    for image in images:
        one = Seen("circle", 0.9, (10.2, 20.0, 41.7, 35.0))  # 10..42 by 20..35: 32 x 15 px
        crop = torch.full((32, 32, 3), 0x99, dtype=torch.uint8)
        crop[8:23] = image[20:35, 10:42]
        best, fits = stock_colour(models / "clip", crop, "circle")
        mine = normalize(color_of.clip.embed_images(crop[None])) @ color_of.classifier("circle").T
        torch.testing.assert_close(mine[0], torch.tensor(fits), rtol=0, atol=2e-6)
        assert color_of(image, one) == COLORS[best]
        found.add(best)
    assert len(found) > 1


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((-9.0, -5.0, 10.0, 10.0), (0, 0, 10, 10)),
        ((50.0, 30.0, 99.0, 99.0), (50, 30, 64, 48)),
        ((20.0, 10.0, 20.0, 10.0), (20, 10, 21, 11)),
        ((70.0, 50.0, 90.0, 60.0), (63, 47, 64, 48)),  # wholly outside: its nearest pixel
        ((0.0, 0.0, 64.0, 48.0), (0, 0, 64, 48)),
    ],
)
def test_a_crop_is_the_part_of_a_box_in_the_image(images, box, region):
    """It is square, has at least a pixel, and what is added is grey."""
    left, top, right, bottom = region
    crop = compose.square_crop(images[0], Seen("circle", 0.9, box))
    side = max(right - left, bottom - top)
    assert crop.shape == (side, side, 3)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    inner = crop[y : y + bottom - top, x : x + right - left]
    assert torch.equal(inner, images[0, top:bottom, left:right])
    assert (crop.sum() - inner.sum()).item() == 0x99 * 3 * (side**2 - (right - left) * (bottom - top))


def test_only_colours_that_are_asked_for_are_looked_at(load, images, monkeypatch):
    """As many as are asked for, and none where no colour is."""
    asked = []
    monkeypatch.setattr(compose.ColorOf, "__call__", lambda self, image, one: asked.append(one.name) or "red")
    reward = load(threshold=0.0, count_threshold=0.0, overlap=1.0)
    reward(images[:1], ["two red circles and a square"])
    assert asked == ["circle"] * 2
    reward(images[:2], ["a circle", "a square"])
    assert asked == ["circle"] * 2


# ---- metadata ----

BENCH = {"tag": "position", "include": [{"class": "clock", "count": 1}], "prompt": "the bench of my childhood"}
WORSE = BENCH | {"include": [{"class": "clock", "count": 2}]}


def written(path: Path, *rows: dict | str) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def scene_found(rewards: Rewards, prompt: str) -> str:
    """The classes that a prompt is taken to ask for."""
    return compose.read_metadata(rewards.own["compose"])[prompt].classes


def test_metadata_of_prompt_files_need_not_be_named_twice(settings, tmp_path):
    """Lines of .jsonl prompt files with `include` are taken, of training and held-out prompts; lines without it, and other
    files, go by their words. A file named as metadata is taken instead of them."""
    train = written(tmp_path / "train.jsonl", BENCH, {"prompt": "a cat"})
    held_out = written(tmp_path / "test.jsonl", WORSE | {"prompt": "my two clocks"})
    found = settings({"prompt_file": train, "eval.prompt_file": held_out})
    assert scene_found(found, BENCH["prompt"]) == scene_found(found, "my two clocks") == ["clock"]
    check_rewards(["compose"], found, [BENCH["prompt"], "a cat", "my two clocks"])
    with pytest.raises(ValueError, match="cannot tell what the prompt 'another bench'"):
        check_rewards(["compose"], found, ["another bench"])
    other = written(tmp_path / "other.jsonl", BENCH | {"include": [{"class": "dog", "count": 1}]})
    named = settings({"prompt_file": train}, metadata=other)
    assert scene_found(named, BENCH["prompt"]) == ["dog"]
    with pytest.raises(ValueError, match="cannot tell what the prompt 'the bench"):
        check_rewards(["compose"], settings(), [BENCH["prompt"]])


def test_metadata_go_before_words(load, tmp_path, images):
    """Of `a cat` the metadata may ask for more than its words say."""
    rows = {"prompt": "a cat", "include": [{"class": "dog", "count": 1}]}
    _, parts = score(load(metadata=written(tmp_path / "m.jsonl", rows), threshold=1.0), images[:2], ["a cat", "a bird"])
    assert parts["found"] == ["nothing; wrong: dog", "nothing; wrong: bird"]


def test_identity_follows_the_metadata(settings, tmp_path):
    """Two evaluations whose prompts ask for different things differ, wherever the files lie. Lines without `include` decide
    nothing."""
    known = [
        reward_identity("compose", settings(metadata=written(tmp_path / f"{n}.jsonl", row)))
        for n, row in enumerate((BENCH, BENCH, WORSE))
    ]
    assert known[0] == known[1] != known[2]
    plain = written(tmp_path / "plain.jsonl", {"prompt": "a cat"})
    assert reward_identity("compose", settings({"prompt_file": plain})) == reward_identity("compose", settings())
    assert reward_identity("compose", settings({"prompt_file": str(tmp_path / "0.jsonl")})) == known[0]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["[1]"], r'm\.jsonl, line 1 has no "prompt"'),
        ([BENCH, '{"include": []}'], r'm\.jsonl, line 2 has no "prompt"'),
        ([BENCH, "{"], r"m\.jsonl, line 2 is not JSON"),
        (
            ["", BENCH | {"include": [{"class": "cat", "colour": "red"}]}],
            r"m\.jsonl, line 2: an entry has 'colour'; known: class",
        ),
        ([BENCH, BENCH, WORSE], r"line 3 contradicts .*m\.jsonl, line 1: .* the prompt 'the bench of my childhood'"),
        ([{"prompt": "a cat"}], r'm\.jsonl has no metadata: none of its lines has "include"'),
        ([], r"m\.jsonl has no metadata"),
    ],
)
def test_metadata_that_are_none(settings, tmp_path, rows, said):
    """The error names file and line, and what is wrong there."""
    with pytest.raises(ValueError, match=said):
        check_rewards(["compose"], settings(metadata=written(tmp_path / "m.jsonl", *rows)))


def test_what_is_refused_before_any_work(overrides, settings, detectors, models, tmp_path):
    """No such metadata; a model that is no detector; a prompt of an unknown form: in two lines, and nothing is written."""
    with pytest.raises(FileNotFoundError, match=r"no file at .*no\.jsonl, which reward\.compose\.metadata names"):
        check_rewards(["compose"], settings(metadata=str(tmp_path / "no.jsonl")))
    with pytest.raises(
        ValueError, match=r"clip is a model of type 'clip', and no zero-shot object detector of the types owlv2"
    ):
        check_rewards(["compose"], settings(detector=str(models / "clip")))
    own = {"reward.compose.detector": str(detectors / "owlv2"), "reward.compose.clip": str(models / "clip")}
    known = overrides | own | {"reward.name": "compose"}
    asked = known | {"prompt": "my cat"}
    refuse(tmp_path, "sample", asked, "cannot tell what the prompt 'my cat' asks for", "reward.compose.metadata")
    bad = written(tmp_path / "bad.jsonl", BENCH, BENCH | {"include": [{"class": "clock", "count": "one"}]})
    refuse(tmp_path, "sample", known | {"prompt_file": bad}, r"bad\.jsonl, line 2: the count of clock is 'one'")
    for key in own:
        refuse(tmp_path, "sample", known | {key: "google/no-model"}, "hf download google/no-model")


def test_owlv2_without_scipy(settings, monkeypatch):
    """Its processor needs the package; the check says how to get it."""
    monkeypatch.setattr("b2diffurl.rewards.detector.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"scipy: pip install -r requirements-rewards\.txt"):
        check_rewards(["compose"], settings())


# ---- a stage ----


def test_a_stage_is_scored(begin, detectors, models, load):
    """Selecting by compose with Grounding DINO: reward, parts and words of each image are those of the image alone."""
    own = {
        "reward.compose.detector": str(detectors / "grounding_dino"),
        "reward.compose.clip": str(models / "clip"),
        "reward.compose.threshold": 0.7,
    }
    folder, known = begin(own | {"reward.name": "compose"})
    ran(folder, "select", known)
    reward = load(detector=own["reward.compose.detector"], threshold=0.7)
    rows = scores(folder)
    assert len(rows) == NUM_IMAGES
    for row, image in zip(rows, pixels(folder), strict=True):
        value, parts = score(reward, torch.tensor(image)[None], [row["prompt"]])
        assert row["reward"] == value.item()
        assert row["parts"]["found"] == parts["found"][0]
        assert row["parts"]["count"] is row["parts"]["position"] is None
        assert row["parts"]["color"] == parts["color"].item()
    assert len({row["reward"] for row in rows}) > 1
