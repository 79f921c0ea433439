"""The embedded world keeps its promises: grammar, checker, prompt sets, and the weights that are shipped."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from b2diffurl.rewards.shapes import layouts
from b2diffurl.shapes.broken import KINDS as BROKEN_KINDS
from b2diffurl.shapes.broken import broken_picture
from b2diffurl.shapes.checker import Seen, check, judge, look
from b2diffurl.shapes.scene import (
    COLOURS,
    KINDS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    CaptionErrors,
    Placed,
    Prompt,
    Scene,
    Thing,
    all_relation_prompts,
    corrupt,
    describe,
    development_split,
    holds,
    paint,
    parse,
    prompt_sets,
    random_scene,
    render,
)

BASE_DIR, CLIP_DIR = Path("model/shapes/base"), Path("model/shapes/clip")
RED_CIRCLE, BLUE_SQUARE = Thing("red", "circle"), Thing("blue", "square")
NO_ERRORS = CaptionErrors(0, 0, 0, 0)


@pytest.fixture(scope="module")
def world():
    """2,000 scenes that no training has seen, their pictures, a right and a wrong caption for each."""
    from b2diffurl.shapes.figures import mismatch

    rng = np.random.default_rng(99)
    scenes = [random_scene(rng) for _ in range(2000)]
    right = [str(describe(scene, KINDS[i % 3], rng)) for i, scene in enumerate(scenes)]
    wrong = [str(mismatch(scene, rng)) for scene in scenes]
    return scenes, np.stack([render(scene) for scene in scenes]), right, wrong


@pytest.fixture(scope="module")
def vae():
    from b2diffurl.shapes.train_vae import load_vae

    return load_vae(BASE_DIR)


@pytest.fixture(scope="module")
def pipeline():
    from b2diffurl.shapes.sampling import load_pipeline

    return load_pipeline(BASE_DIR)


@pytest.fixture(scope="module")
def scorer():
    from transformers import CLIPModel, CLIPTokenizer

    return CLIPModel.from_pretrained(CLIP_DIR).eval(), CLIPTokenizer.from_pretrained(CLIP_DIR)


def through(vae, images):
    from b2diffurl.shapes.train_vae import round_trip

    return round_trip(vae, torch.from_numpy(images))


def scene_of(first: Thing, second: Thing, relation: str) -> Scene:
    """A hand-placed scene: 30 px apart along one axis."""
    x, y = {"left of": (-15, 0), "right of": (15, 0), "above": (0, -15), "below": (0, 15)}[relation]
    placed = [
        Placed(thing, 32.0 + sign * x, 32.0 + sign * y, 18.0, COLOURS[thing.colour])
        for thing, sign in ((first, 1), (second, -1))
    ]
    return Scene(*placed, relation, (245.0, 245.0, 240.0))


def accepted(verdicts) -> float:
    return float(np.mean([verdict.correct for verdict in verdicts]))


# --- grammar --------------------------------------------------------------------------------------


def test_every_prompt_of_the_grammar_survives_parsing():
    """str(parse(caption)) == caption for all attribute captions and a full cross of pairs and joints."""
    things = [Thing(colour, shape) for colour, shape in product(COLOURS, SHAPES)]
    prompts = [Prompt(thing) for thing in things]
    prompts += [Prompt(a, b, joint) for a, b in product(things, things) for joint in (None, *RELATIONS)]
    assert all(parse(str(prompt)) == prompt for prompt in prompts)


@pytest.mark.parametrize("caption", ["", "a cat", "a red circle near a blue square", "a red circle left of", "red circle"])
def test_an_unknown_prompt_is_refused_by_name(caption):
    with pytest.raises(ValueError, match=f"{caption!r}"):
        check(np.zeros((1, 64, 64, 3), np.uint8), [caption])


def test_a_caption_holds_both_ways_round():
    """ "A left of B" is "B right of A", for each relation; the reversed caption is false."""
    for relation in RELATIONS:
        scene = scene_of(RED_CIRCLE, BLUE_SQUARE, relation)
        assert holds(scene, Prompt(RED_CIRCLE, BLUE_SQUARE, relation))
        assert holds(scene, Prompt(BLUE_SQUARE, RED_CIRCLE, OPPOSITE[relation]))
        assert not holds(scene, Prompt(BLUE_SQUARE, RED_CIRCLE, relation))
        assert not holds(scene, Prompt(RED_CIRCLE, Thing("blue", "circle"), relation))


def test_caption_errors_come_at_their_rates():
    """Each kind of error appears as often as asked (4,000 draws, 3 standard errors); no rates, no errors."""
    rng, prompt = np.random.default_rng(0), Prompt(RED_CIRCLE, BLUE_SQUARE, "left of")
    assert all(corrupt(prompt, NO_ERRORS, rng) == prompt for _ in range(100))
    drawn = [corrupt(prompt, CaptionErrors(0.3, 0.1, 0.2, 0.1), rng) for _ in range(4000)]
    swapped = Prompt(Thing("blue", "circle"), Thing("red", "square"), "left of")
    counts = {
        0.3: sum(p.relation == "right of" for p in drawn),
        0.1: sum(p.relation in ("above", "below") for p in drawn),
        0.2: drawn.count(swapped),
    }
    for rate, count in counts.items():
        assert abs(count / 4000 - rate) < 3 * (rate * (1 - rate) / 4000) ** 0.5


def test_prompt_files_hold_the_sets_and_keep_halves_apart():
    """The committed files are what the code writes; no coloured shape of a train set is in any test set."""
    sets = prompt_sets()
    for name, prompts in sets.items():
        with open(f"config/prompt/{name}.json") as file:
            assert json.load(file) == prompts
    things = {
        half: {thing for name in sets if name.endswith(half) for p in sets[name] for thing in parse(p).things}
        for half in ("train", "test")
    }
    assert len(things["train"]) == len(things["test"]) == 12
    assert not things["train"] & things["test"]


def test_all_relation_prompts_and_those_to_tune_on():
    """The committed files again. 8 prompts of each training pair; mixed pairs, none of which is in a test set."""
    more = {"shapes_relation_train_all": all_relation_prompts()} | development_split()
    for name, prompts in more.items():
        with open(f"config/prompt/{name}.json") as file:
            assert json.load(file) == prompts
    every, tested = more["shapes_relation_train_all"], {*prompt_sets()["shapes_relation_test"]}
    assert len({*every}) == 384
    assert {*every} >= {*prompt_sets()["shapes_relation_train"]}
    assert not tested & {prompt for prompts in more.values() for prompt in prompts}
    pairs = [frozenset(parse(prompt).things) for prompt in every]
    assert {pairs.count(pair) for pair in pairs} == {8}
    of_test = {thing for prompt in tested for thing in parse(prompt).things}
    mixed = [parse(prompt) for prompt in more["shapes_development_mixed"]]
    assert all(len({*prompt.things} & of_test) == 1 for prompt in mixed)
    assert [sum(prompt.relation == relation for prompt in mixed) for relation in RELATIONS] == [24] * 4


def test_relation_sets_are_balanced():
    """48 prompts of 48 pairs a half: 12 of each relation, every thing 8 times, so every colour 16 times."""
    for half in ("train", "test"):
        prompts = [parse(caption) for caption in prompt_sets()[f"shapes_relation_{half}"]]
        assert len({frozenset(prompt.things) for prompt in prompts}) == 48
        assert [sum(p.relation == relation for p in prompts) for relation in RELATIONS] == [12] * 4
        named = [thing for prompt in prompts for thing in prompt.things]
        assert {named.count(thing) for thing in named} == {8}


# --- checker --------------------------------------------------------------------------------------


def test_checker_reads_what_was_drawn():
    """All 24 things are named right and found within half a pixel of where they were drawn."""
    for colour, shape in product(COLOURS, SHAPES):
        other = Thing("blue" if colour == "red" else "red", "circle")
        scene = scene_of(Thing(colour, shape), other, "above")
        ((problem, objects),) = look(render(scene)[None])
        assert problem == ""
        found = next(item for item in objects if item.thing == scene.first.thing)
        assert abs(found.x_px - scene.first.x_px) < 0.5 and abs(found.y_px - scene.first.y_px) < 0.5
        assert abs(found.size_px - scene.first.size_px) < 0.5


def test_layouts_are_what_was_drawn():
    """x, y and size of the things in the order of the prompt; NaN if one is missing, zeros for a thing not asked for."""
    scene = scene_of(RED_CIRCLE, BLUE_SQUARE, "left of")
    image = torch.from_numpy(render(scene))
    drawn = {item.thing: (item.x_px, item.y_px, item.size_px) for item in (scene.first, scene.second)}
    asked = ["a blue square right of a red circle", "a red circle", "a red circle left of a green square"]
    found = layouts(torch.stack([image] * 3), asked)
    torch.testing.assert_close(found[0], torch.tensor(drawn[BLUE_SQUARE] + drawn[RED_CIRCLE]).float(), atol=0.5, rtol=0)
    torch.testing.assert_close(found[1], torch.tensor(drawn[RED_CIRCLE] + (0.0,) * 3).float(), atol=0.5, rtol=0)
    assert found[2].isnan().tolist() == [False] * 3 + [True] * 3


def test_checker_accepts_right_captions_and_refuses_wrong_ones(world):
    """2,000 scenes: at least 99 % right, at most 1 % false accepts, all labels from the grammar."""
    _, images, right, wrong = world
    assert accepted(check(images, right)) >= 0.99
    assert accepted(check(images, wrong)) <= 0.01


@pytest.mark.parametrize("kind", BROKEN_KINDS)
def test_checker_flags_broken_pictures(kind, vae):
    """At least 95 % of merged, cut, blurred, ... pictures are malformed, after the autoencoder too.

    But for two-tone ones: it turns some of them into clean shapes of one tone, which are then rightly accepted.
    """
    rng = np.random.default_rng(7)
    images = np.stack([broken_picture(kind, rng) for _ in range(150)])
    assert np.mean([bool(problem) for problem, _ in look(images)]) >= 0.95
    assert np.mean([bool(problem) for problem, _ in look(through(vae, images))]) >= (0.92 if kind == "two-tone" else 0.95)


def test_parts_say_what_is_wrong():
    """A hand-worked table: which parts of "a red circle left of a blue square" hold for five pairs of objects."""
    prompt = Prompt(RED_CIRCLE, BLUE_SQUARE, "left of")

    def parts(left: tuple[str, str], right: tuple[str, str], dy: float = 0.0) -> str:
        objects = (Seen(Thing(*left), 16.0, 32.0, 18.0), Seen(Thing(*right), 48.0, 32.0 + dy, 18.0))
        return "".join(name[0] for name, holds in judge(objects, prompt).items() if holds)

    # c colours, s shapes, b binding, r relation
    assert parts(("red", "circle"), ("blue", "square")) == "csbr"
    assert parts(("blue", "square"), ("red", "circle")) == "csb"
    assert parts(("red", "circle"), ("blue", "square"), dy=30.0) == "csb"
    assert parts(("blue", "circle"), ("red", "square")) == "cs"
    assert parts(("red", "circle"), ("green", "square")) == "sr"
    assert not any(judge((), prompt).values())


def test_checker_refuses_what_is_no_image():
    with pytest.raises(ValueError, match="uint8"):
        look(np.zeros((1, 64, 64, 3), np.float32))
    with pytest.raises(ValueError, match="one prompt an image"):
        check(np.zeros((2, 64, 64, 3), np.uint8), ["a red circle"])


def test_blank_pictures_and_noise_are_malformed():
    """No input makes the checker fail or see two shapes: black, white, grey, noise."""
    rng = np.random.default_rng(0)
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (0, 128, 255)])
    noise = rng.integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    assert all(problem for problem, _ in look(np.concatenate([images, noise])))


def test_paint_is_antialiased():
    """Ink adds up to the shape's area within 1 %: the outlines are drawn at sub-pixel precision."""
    item = Placed(RED_CIRCLE, 30.3, 31.7, 18.0, (0.0, 0.0, 0.0))
    ink = (255 - paint([item], (255.0, 255.0, 255.0)).astype(float)).mean(-1).sum() / 255
    assert abs(ink / (np.pi * 81) - 1) < 0.01


# --- shipped weights ------------------------------------------------------------------------------


@pytest.mark.long
def test_autoencoder_keeps_scenes_readable(world, vae):
    """After a round trip at least 97 % of right captions are accepted, at most 1 % of wrong ones; unit latents."""
    from b2diffurl.shapes.train_vae import encode

    _, images, right, wrong = (column[:1000] for column in world)
    decoded = through(vae, images)
    assert accepted(check(decoded, right)) >= 0.97
    assert accepted(check(decoded, wrong)) <= 0.01
    assert abs(encode(vae, torch.from_numpy(images[:500])).std() * vae.config.scaling_factor - 1) < 0.05


def test_base_is_a_stable_diffusion_pipeline(pipeline):
    """Stock diffusers loads it, with Stable Diffusion v1.4's scheduler settings, epsilon prediction, no checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    assert type(pipeline) is StableDiffusionPipeline and type(pipeline.scheduler) is PNDMScheduler
    settings = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "clip_sample": False,
        "trained_betas": None,
        "prediction_type": "epsilon",
    }
    assert {key: pipeline.scheduler.config[key] for key in settings} == settings
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None


def test_base_is_fluent_and_imperfect(pipeline):
    """96 samples at the training sampler: well formed, right more often than chance, with room to improve."""
    from b2diffurl.shapes.sampling import accuracy, sample

    prompts = prompt_sets()["shapes_relation_test"] * 2
    shares = accuracy(sample(pipeline, prompts, seed=5), prompts)
    assert shares["well_formed"] >= 0.8
    assert 0.25 <= shares["correct"] <= 0.7


def test_scorer_is_not_blind_to_text(scorer):
    """Captions that differ in one word have different embeddings, read at the end token the config names."""
    model, tokenizer = scorer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert {name: getattr(model.config.text_config, name) for name in ids} == ids
    captions = ["a red circle left of a blue square", "a red circle right of a blue square", "a red circle"]
    inputs = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        text = model.get_text_features(**inputs).pooler_output
    cosine = torch.nn.functional.cosine_similarity(text[:, None], text[None], dim=-1)
    assert cosine[~torch.eye(3, dtype=bool)].max() < 0.95


def test_scorer_prefers_the_right_caption(scorer, world):
    """On 200 unseen pictures the right relation beats the reversed one, and colours beat swapped ones, >= 97 %."""
    from b2diffurl.shapes.figures import similarity
    from b2diffurl.shapes.scene import swap_colours

    scenes, images, _, _ = world
    rng, model = np.random.default_rng(1), scorer[0]
    right = [describe(scene, "relation", rng) for scene in scenes[:200]]
    reversed_ = [Prompt(prompt.first, prompt.second, OPPOSITE[prompt.relation]) for prompt in right]
    swapped = [swap_colours(prompt) for prompt in right]
    scores = [similarity(model, images[:200], [str(p) for p in prompts]) for prompts in (right, reversed_, swapped)]
    assert (scores[0] > scores[1]).mean() >= 0.97
    assert (scores[0] > scores[2]).mean() >= 0.97


def test_scorer_loads_like_the_real_clip(world):
    """AutoProcessor gives the pixels the scorer was trained on: (x / 255 - 0.5) / 0.5, no resampling."""
    from PIL import Image
    from transformers import AutoProcessor

    image = world[1][0]
    processor = AutoProcessor.from_pretrained(CLIP_DIR)
    pixels = processor(images=[Image.fromarray(image)], return_tensors="pt").pixel_values
    expected = torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(pixels.float(), expected, rtol=0, atol=1e-5)
