"""Each reward alone: against stock processor and forward one image at a time, Pillow's bytes, numbers by hand."""

import importlib.util
import inspect
import io
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, make_config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, normalize
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    DebertaModel,
    LlavaForConditionalGeneration,
)

from b2diffurl.configuration.settings import Rewards, read_settings
from b2diffurl.rewards import (
    REWARDS,
    Reward,
    RewardModule,
    check_rewards,
    load_reward,
    resolve_dtype,
    reward_identity,
    reward_module,
    score,
)
from b2diffurl.rewards.bertscore import TextScorer
from b2diffurl.runtime.files import sha256
from b2diffurl.runtime.hub import checksum
from b2diffurl.shapes.scene import RELATIONS, describe, random_scene, render, swap_colours

CPU = torch.device("cpu")
ASKED = ["a red circle", "a blue square", "a green cross", "a red circle and a blue square"]
QUESTION = "what is in this picture ?"
# How far a score may move with the batch size in float32, as a part of its size (rounding alone).
BATCH_RTOL = 2e-6
# How far a cosine may be from the float32 one: a few units in the last place of 11 and of 8 bits.
HALF_ATOL = {"float16": 2e-3, "bfloat16": 1.5e-2}


@pytest.fixture(scope="session")
def zoo(models, tmp_path_factory) -> Path:
    """A folder with `clip`, `llava` and `deberta`, another of each of the latter, the aesthetic `head`, and `owlv2`."""
    root = tmp_path_factory.mktemp("zoo")
    shutil.copytree(models / "clip", root / "clip")
    tiny.llava(root / "llava")
    tiny.llava(root / "llava_other", seed=5)
    tiny.deberta(root / "deberta")
    tiny.deberta(root / "deberta_other", seed=6)
    tiny.aesthetic_head(root / "head", tiny.WIDTH)
    tiny.owlv2(root / "owlv2")
    return root


@pytest.fixture(scope="session")
def images() -> Tensor:
    """Images uint8 [8,64,64,3] of 16 coloured tiles each."""
    tiles = torch.randint(0, 256, (8, 4, 4, 3), generator=torch.Generator().manual_seed(0))
    return tiles.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    return ASKED * 2


@pytest.fixture
def settings(zoo) -> Callable[..., Rewards]:
    """settings({key: value}) -> the rewards of a configuration whose models are the zoo's; keys as in reward.<key>."""
    mine = {
        "clip.model": zoo / "clip",
        "pickscore.model": zoo / "clip",
        "aesthetic.clip": zoo / "clip",
        "aesthetic.head": zoo / "head" / "head.pth",
        "bertscore.captioner": zoo / "llava",
        "bertscore.scorer": zoo / "deberta",
        "bertscore.question": QUESTION,
        "bertscore.max_new_tokens": 6,
        "bertscore.num_layers": 2,
        "compose.detector": zoo / "owlv2",
        "compose.clip": zoo / "clip",
    }

    def make(changed: dict | None = None) -> Rewards:
        values = {f"reward.{key}": value for key, value in (mine | (changed or {})).items()}
        values = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
        return read_settings(make_config(values)).rewards

    return make


@pytest.fixture
def load(settings) -> Callable[..., Reward]:
    """load(name, {key: value}) -> the reward with these settings on the CPU."""
    return lambda name, changed=None: load_reward(name, settings(changed), CPU)


def pictures(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in images]


# ---- CLIP, PickScore ----


def stock_logits(root: Path, images: Tensor, prompts: list[str]) -> tuple[Tensor, float]:
    """logits_per_image of stock CLIP, one picture and one prompt at a time, and its logit scale."""
    model = CLIPModel.from_pretrained(root)
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(root), AutoTokenizer.from_pretrained(root))
    with torch.no_grad():
        rows = [
            model(**processor(text=[prompt], images=picture, return_tensors="pt")).logits_per_image.item()
            for picture, prompt in zip(pictures(images), prompts, strict=True)
        ]
    return torch.tensor(rows), model.logit_scale.exp().item()


def test_clip_and_pickscore_are_stock_clips(zoo, load, images, prompts):
    """`pickscore` is stock CLIP's logit of an image and its prompt, one at a time; `clip` is that by the logit scale."""
    logits, scale = stock_logits(zoo / "clip", images, prompts)
    assert scale > 2
    assert len(set(logits.tolist())) == len(images)
    torch.testing.assert_close(load("clip")(images, prompts), logits / scale, rtol=0, atol=2e-6)
    torch.testing.assert_close(load("pickscore")(images, prompts), logits, rtol=0, atol=2e-6 * scale)


def test_repeated_prompts_are_embedded_once(load, images, prompts):
    """Four batches of the same prompts cost one call of the text tower; a new prompt costs one more, and 33 at once two."""
    clip, calls = load("clip"), []
    clip.model.text_model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(4):
        clip(images, prompts)
    assert len(calls) == 1
    clip(images, ["a cross", *prompts[1:]])
    assert len(calls) == 2
    clip.embed_prompts([chr(97 + n % 26) * (1 + n // 26) for n in range(33)])
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", HALF_ATOL)
def test_half_precision_gives_the_float32_score(load, images, prompts, dtype):
    """In float16 and bfloat16 the model is in that type, and the CLIP score is float32's within the stated bound."""
    half, full = load("clip", {"dtype": dtype}), load("clip", {"dtype": "float32"})
    assert {weight.dtype for weight in half.model.parameters()} == {getattr(torch, dtype)}
    assert half(images, prompts).dtype == torch.float32
    difference = (half(images, prompts) - full(images, prompts)).abs().max().item()
    assert 0 < difference < HALF_ATOL[dtype]
    assert {weight.dtype for weight in load("clip", {"dtype": "auto"}).model.parameters()} == {torch.float32}


def test_weights_as_a_pickle_are_read_as_tensors_alone(zoo, load, images, prompts, tmp_path):
    """A model that has only pytorch_model.bin gives the same scores; one whose .bin holds code is refused, unexecuted."""
    shutil.copytree(zoo / "clip", tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(zoo / "clip").state_dict(), tmp_path / "clip" / "pytorch_model.bin")
    pickled = {"clip.model": tmp_path / "clip"}
    assert torch.equal(load("clip", pickled)(images, prompts), load("clip")(images, prompts))
    torch.save({"logit_scale": Touch(tmp_path / "owned")}, tmp_path / "clip" / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"(?i)weights.only"):
        load("clip", pickled)
    assert not (tmp_path / "owned").exists()


class Touch:
    """A pickle of it makes an empty file when code in pickles is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_clip_with_a_weight_missing_is_refused(zoo, load, tmp_path):
    """Weights that a checkpoint lacks are not drawn at random."""
    shutil.copytree(zoo / "clip", tmp_path / "clip")
    state = CLIPModel.from_pretrained(zoo / "clip").state_dict()
    del state["text_projection.weight"]
    save_file(state, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "clip")) + " lacks .*text_projection.weight"):
        load("clip", {"clip.model": tmp_path / "clip"})


def test_a_clip_with_a_weight_of_another_shape_is_refused(zoo, load, tmp_path):
    """It is named, and not drawn at random either."""
    shutil.copytree(zoo / "clip", tmp_path / "clip")
    state = CLIPModel.from_pretrained(zoo / "clip").state_dict()
    state["text_projection.weight"] = state["text_projection.weight"][:, :3].clone()
    save_file(state, tmp_path / "clip" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"clip has misshapen weights of CLIPModel, such as text_projection\.weight\."):
        load("clip", {"clip.model": tmp_path / "clip"})


def test_a_clip_with_the_tokenizer_of_another_model_is_refused(zoo, load, tmp_path):
    """One that counts further than its text encoder."""
    root = shutil.copytree(zoo / "clip", tmp_path / "clip")
    tokens = tiny.tokenizer()
    tokens.add_tokens(["extra"])
    tokens.save_pretrained(root)
    with pytest.raises(ValueError, match=r"clip does not fit its text encoder: the tokenizer counts to 54"):
        load("clip", {"clip.model": root})


# ---- the aesthetic head ----


def stock_aesthetic(zoo: Path, images: Tensor) -> Tensor:
    """LAION's head by hand on the normalised embedding of stock CLIP, one picture at a time."""
    model, processor = CLIPModel.from_pretrained(zoo / "clip"), CLIPImageProcessor.from_pretrained(zoo / "clip")
    state = torch.load(zoo / "head" / "head.pth", weights_only=True)
    rows = []
    for picture in pictures(images):
        with torch.no_grad():
            vision = model.vision_model(**processor(picture, return_tensors="pt")).pooler_output
            x = normalize(model.visual_projection(vision))
        for number in (0, 2, 4, 6, 7):
            x = linear(x, state[f"layers.{number}.weight"], state[f"layers.{number}.bias"])
        rows.append(x.item())
    return torch.tensor(rows)


@pytest.mark.parametrize("form", ["head.pth", "head.safetensors", "folder of a .pth", "folder of a .safetensors"])
def test_aesthetic_is_the_head_on_the_normalised_embedding(zoo, load, images, prompts, tmp_path, form):
    """Whichever form the head's file has, and whatever the prompt says."""
    head = zoo / "head" / form
    if form.startswith("folder"):
        head = tmp_path / "head"
        head.mkdir()
        shutil.copy(zoo / "head" / f"head{form.split()[-1]}", head)
    expected = stock_aesthetic(zoo, images)
    assert len(set(expected.tolist())) == len(images)
    aesthetic = load("aesthetic", {"aesthetic.head": head})
    torch.testing.assert_close(aesthetic(images, prompts), expected, rtol=0, atol=1e-6)
    assert torch.equal(aesthetic(images, prompts), aesthetic(images, prompts[::-1]))


def test_heads_that_are_none(zoo, load, tmp_path):
    """Two heads in a folder or none, another width, a layer too few: refused with the file's name."""
    head = tmp_path / "head"
    state = tiny.aesthetic_head(head, tiny.WIDTH + 1)
    with pytest.raises(ValueError, match=r"head\.pth.*layers\.0\.weight.*\[1024, 17\].*\[1024, 16\]"):
        load("aesthetic", {"aesthetic.head": head / "head.pth"})
    save_file({name: tensor for name, tensor in state.items() if "layers.7" not in name}, head / "head.safetensors")
    with pytest.raises(ValueError, match=r"head\.safetensors is not an aesthetic head.*Missing key.*layers\.7\.weight"):
        load("aesthetic", {"aesthetic.head": head / "head.safetensors"})
    shutil.copy(zoo / "head" / "head.safetensors", head / "another.safetensors")
    with pytest.raises(FileNotFoundError, match=re.escape(str(head)) + ".*has 2"):
        load("aesthetic", {"aesthetic.head": head})
    (tmp_path / "nothing").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nothing.*has 0"):
        load("aesthetic", {"aesthetic.head": tmp_path / "nothing"})


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_head_with_code_in_it_is_refused_and_the_code_not_run(load, tmp_path, write):
    """A .pth is read for its tensors alone. What is refused is a ValueError with the file's name, as any other bad head."""
    write({"layers.0.weight": Touch(tmp_path / "owned")}, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "head.pth"))):
        load("aesthetic", {"aesthetic.head": tmp_path / "head.pth"})
    assert not (tmp_path / "owned").exists()


# ---- BERTScore ----


def stock_caption(root: Path, image: Tensor) -> str:
    """LLaVA's words on one picture, by its own processor, chat template and generate."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(root), AutoProcessor.from_pretrained(root)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    inputs = processor(images=Image.fromarray(image.numpy()), text=text, return_tensors="pt")
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(tokens, skip_special_tokens=True).strip()


def hand_bertscore(root: Path, text: str, reference: str, layer: int) -> list[float]:
    """Precision, recall and F1 by their definition, from stock DeBERTa's states, one text at a time, marks left out."""
    model, tokenizer = DebertaModel.from_pretrained(root), AutoTokenizer.from_pretrained(root)
    with torch.no_grad():
        texts = [tokenizer(words, return_tensors="pt") for words in (text, reference)]
        states = [model(**one, output_hidden_states=True).hidden_states[layer][0, 1:-1] for one in texts]
    cosines = normalize(states[0].double(), dim=-1) @ normalize(states[1].double(), dim=-1).T
    best = cosines.clamp(min=0)  # torchmetrics has the marks as zero vectors, so no match is worse than 0
    precision, recall = best.amax(1).mean().item(), best.amax(0).mean().item()
    return [precision, recall, 2 * precision * recall / (precision + recall)]


def test_bertscore_is_the_recall_of_the_stock_caption(zoo, load, images, prompts):
    """The caption is what stock LLaVA says of that picture alone; precision, recall and F1 are those by hand; recall is the
    reward; the captions are among the parts, as strings, and differ."""
    rewards, parts = score(load("bertscore"), images, prompts)
    assert parts["caption"] == [stock_caption(zoo / "llava", image) for image in images]
    assert len(set(parts["caption"])) > 2
    for n, (caption, prompt) in enumerate(zip(parts["caption"], prompts, strict=True)):
        expected = hand_bertscore(zoo / "deberta", caption, f"The image contains {prompt}", 2)
        assert [parts[key][n].item() for key in ("precision", "recall", "f1")] == pytest.approx(expected, abs=2e-6)
    assert torch.equal(rewards, parts["recall"])


@pytest.mark.parametrize(("num_layers", "layer"), [(1, 1), (3, 3), (0, 3)])
def test_bertscore_of_texts_of_very_different_lengths(zoo, num_layers, layer):
    """Each pair has its own score in whatever order they come (torchmetrics, given all at once, mixes them up), from the
    layer asked for, 0 being the last."""
    texts = ["a red circle and a blue square and a green cross in this picture", "blue", "a cross", "square and circle"]
    references = ["cross", "a blue square and a red circle and what is in the image", "a green cross", "a"]
    found = TextScorer(str(zoo / "deberta"), num_layers, CPU)(texts, references)
    for n, pair in enumerate(zip(texts, references, strict=True)):
        expected = hand_bertscore(zoo / "deberta", *pair, layer)
        assert [found[key][n].item() for key in ("precision", "recall", "f1")] == pytest.approx(expected, abs=2e-6)


def test_captioner_and_scorer_can_be_swapped_each_alone(zoo, load, images, prompts):
    """Another captioner says something else; another scorer rates the same captions differently, as it does by hand."""
    _, mine = load("bertscore")(images, prompts)
    _, captioned = load("bertscore", {"bertscore.captioner": zoo / "llava_other"})(images, prompts)
    _, scored = load("bertscore", {"bertscore.scorer": zoo / "deberta_other"})(images, prompts)
    assert captioned["caption"] == [stock_caption(zoo / "llava_other", image) for image in images] != mine["caption"]
    assert scored["caption"] == mine["caption"]
    expected = hand_bertscore(zoo / "deberta_other", mine["caption"][0], f"The image contains {prompts[0]}", 2)
    assert scored["recall"][0].item() == pytest.approx(expected[1], abs=2e-6) != mine["recall"][0].item()


def test_bertscore_edges(zoo, load):
    """An empty caption scores 0; a layer the scorer has not got is refused with its depth."""
    found = TextScorer(str(zoo / "deberta"), 2, CPU)(["", "a red circle"], ["a red circle", "a red circle"])
    assert {key: value[0].item() for key, value in found.items()} == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert found["recall"][1].item() == pytest.approx(1, abs=1e-6)
    for number in (4, -1):
        with pytest.raises(ValueError, match=f"num_layers is {number}.*has 3 layers"):
            load("bertscore", {"bertscore.num_layers": number})


def test_a_repeated_text_is_embedded_once(zoo):
    """The scorer's network is called once for what 40 pairs have in common, and not again when they come again."""
    scorer, calls = TextScorer(str(zoo / "deberta"), 2, CPU), []
    scorer.model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        scorer(ASKED * 10, ["the image"] * 40)
    assert len(calls) == 1


# ---- neighbours and batches ----

MODEL_REWARDS = ("clip", "pickscore", "aesthetic", "bertscore")


@pytest.mark.parametrize("name", MODEL_REWARDS)
def test_a_score_does_not_depend_on_the_neighbours(load, images, prompts, name):
    """In a batch of the same shape an image's score is the same to the bit, whatever images and prompts are beside it."""
    one = score(load(name), images[:4], prompts[:4])[0]
    other = score(load(name), torch.cat([images[4:7], images[3:4]]), [*prompts[:1] * 3, prompts[3]])[0]
    assert one[3] == other[3]
    assert not torch.equal(one[:3], other[:3])


@pytest.mark.parametrize("name", MODEL_REWARDS)
def test_a_score_does_not_depend_on_the_batch_size(load, images, prompts, name):
    """One by one, three at once and all at once: the same score within rounding."""
    reward = load(name)
    whole = score(reward, images, prompts)[0]
    for size in (1, 3):
        pieces = [score(reward, images[n : n + size], prompts[n : n + size])[0] for n in range(0, len(images), size)]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=BATCH_RTOL, atol=1e-6)


# ---- without a model ----


def test_jpeg_is_pillows_size_in_kb(load, images, prompts):
    """Bytes of Pillow's JPEG at quality 95 by 1,000; negative for compressibility. Grain, for flat tiles come out as large
    at other qualities."""
    grain = torch.randint(0, 32, images.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    images, expected = images ^ grain, []
    for picture in pictures(images):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        expected.append(len(file.getvalue()) / 1000)
    assert len(set(expected)) > 1
    assert load("jpeg_incompressibility")(images, prompts).tolist() == pytest.approx(expected, rel=1e-6)
    assert load("jpeg_compressibility")(images, prompts).tolist() == pytest.approx([-size for size in expected], rel=1e-6)


def test_shapes_says_whether_the_picture_shows_the_prompt(load):
    """1 for a right prompt, 0 with the colours swapped, on drawn scenes; the parts say what is wrong."""
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(6)]
    right = [describe(scene, "relation", rng) for scene in scenes]
    wrong = [swap_colours(prompt) for prompt in right]
    drawn = torch.from_numpy(np.stack([render(scene) for scene in scenes] * 2))
    rewards, parts = score(load("shapes"), drawn, [*map(str, right), *map(str, wrong)])
    assert any(relation in str(right[0]) for relation in RELATIONS)
    assert rewards.tolist() == [1.0] * 6 + [0.0] * 6
    assert parts["well_formed"].tolist() == [1.0] * 12


# ---- your own ----


@pytest.fixture
def own(tmp_path, monkeypatch) -> Callable[[str], str]:
    """own(source) -> the name of a module with that source on the Python path."""

    def write(source: str) -> str:
        name = f"own_rewards_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    yield write
    sys.modules.pop(f"own_rewards_{tmp_path.name}", None)


def test_your_own_function_with_parts(own, load, settings, images, prompts):
    """It may return rewards, or rewards and parts, numbers and strings; its source decides its identity."""
    module = own(
        "def plain(images, prompts):\n    return images.float().mean((1, 2, 3)).double()\n"
        "def parted(images, prompts):\n    return plain(images, prompts), {'length': 1.0 * plain(images, prompts),\n"
        "        'said': [prompt.upper() for prompt in prompts]}\n"
    )
    expected = [image.float().mean().item() for image in images]
    rewards, parts = score(load(f"{module}:plain"), images, prompts)
    assert (rewards.dtype, parts) == (torch.float32, {})
    assert rewards.tolist() == pytest.approx(expected, rel=1e-6)
    rewards, parts = score(load(f"{module}:parted"), images, prompts)
    assert parts["said"] == [prompt.upper() for prompt in prompts]
    assert parts["length"].tolist() == rewards.tolist()
    before = reward_identity(f"{module}:plain", settings())
    own("def plain(images, prompts):\n    return images.float().mean((1, 2, 3))\n")
    assert reward_identity(f"{module}:plain", settings()) != before


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("[0.0] * len(prompts)", "returned list"),
        ("None", "returned NoneType"),
        ("images.float().mean((1, 2, 3))[:-1]", r"shape \(7,\) for 8 images"),
        ("images.float().mean((2, 3))", r"shape \(8, 64\) for 8 images"),
        ("images.float().mean()", r"shape \(\) for 8 images"),
        ("(images.float().mean((1, 2, 3)), {'short': images.float().mean((1, 2, 3))[:3]})", r"'short' .*\(3,\) for 8"),
        ("(images.float().mean((1, 2, 3)), {'short': ['one']})", r"'short' .*\(1,\) for 8"),
        ("(images.float().mean((1, 2, 3)), {'odd': 'eight---'})", "'odd' .* is str"),
        ("(images.float().mean((1, 2, 3)), {'odd': [1.0] * 8})", "'odd' .* is list.* N strings"),
        ("(images.float().mean((1, 2, 3)), {'wide': images.float().mean((1, 2))})", r"'wide' .*\(8, 3\) for 8"),
        (
            "(images.float().mean((1, 2, 3)), {'reward': images.float().mean((1, 2, 3))})",
            "part of the reward is called 'reward'",
        ),
        ("(images.float().mean((1, 2, 3)), {}, {})", "returned tuple"),
    ],
)
def test_what_a_function_must_not_return(own, load, images, prompts, returned, said):
    """A list, another count, parts of another length: refused, with what came and how many there should be."""
    module = own(f"def reward(images, prompts):\n    return {returned}\n")
    with pytest.raises(ValueError, match=said):
        score(load(f"{module}:reward"), images, prompts)


# ---- imscore ----

IMSCORE = {
    "image_reward": ("imreward", "ImageReward"),
    "hps_v2": ("hps", "HPSv2"),
    "vqascore": ("vqascore", "VQAScore"),
}
STAND_IN = """
import torch
asked = []
class Model(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, path):
        asked.append(("path", str(path)))
        return cls()
    def score(self, pixels, prompts):
        asked.append((pixels, prompts))
        rows = pixels.double().mean((1, 2, 3)) + torch.tensor([float(len(prompt)) for prompt in prompts])
        return rows.mean() if type(self).__name__ == "VQAScore" else rows[:, None]
"""


@pytest.fixture
def without_imscore(monkeypatch):
    """The package as if it were not installed, and no trace of it afterwards."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "imscore"]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "imscore"]:
        del sys.modules[name]


@pytest.fixture
def stand_in(without_imscore, tmp_path, monkeypatch) -> Path:
    """A package `imscore` with the interface the package documents, which notes what it is asked."""
    root = tmp_path / "site" / "imscore"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text(STAND_IN)
    for module, kind in IMSCORE.values():
        (root / module).mkdir()
        (root / module / "__init__.py").write_text("")
        (root / module / "model.py").write_text(f"from imscore import Model\nclass {kind}(Model):\n    pass\n")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


@pytest.mark.parametrize("name", IMSCORE)
def test_without_imscore_the_error_has_the_command(name, settings, monkeypatch):
    """Where the package is not installed the check says the exact pip command, and the file it names asks for imscore."""
    monkeypatch.setitem(sys.modules, "imscore", None)
    real = [path for path in sys.path if not (Path(path) / "imscore").is_dir()]
    monkeypatch.setattr(sys, "path", real)
    monkeypatch.delitem(sys.modules, "imscore")
    with pytest.raises(ModuleNotFoundError, match=f"{name} needs.*imscore: pip install -r requirements-rewards.txt"):
        check_rewards([name], settings())
    lines = (ROOT / "requirements-rewards.txt").read_text().splitlines()
    assert any(line.startswith("imscore==") for line in lines)


@pytest.mark.parametrize("name", IMSCORE)
def test_imscore_is_given_pixels_and_prompts(zoo, stand_in, load, settings, images, prompts, name):
    """The package's class is loaded from the model's folder and asked for float32 pixels [N,3,H,W] in 0..1 with their
    prompts; scores [N,1], and one score for all (so asked one by one), become [N]."""
    model = {f"{name}.model": zoo / "clip"}
    reward = load(name, model)
    found, _ = score(reward, images, prompts)
    expected = [image.float().mean().item() / 255 + len(prompt) for image, prompt in zip(images, prompts, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    (_, path), *asked = sys.modules["imscore"].asked
    assert path == str(zoo / "clip")
    assert len(asked) == (8 if name == "vqascore" else 1)
    assert torch.equal(torch.cat([pixels for pixels, _ in asked]), images.permute(0, 3, 1, 2).float() / 255)
    assert [prompt for _, some in asked for prompt in some] == prompts
    assert len(reward_identity(name, settings(model))[2]) >= 1


def test_the_real_imscore_has_that_interface():
    """Where the package is installed: its classes lie where the adapter looks and have these two functions."""
    pytest.importorskip("imscore", exc_type=ImportError)
    import importlib

    for module, kind in IMSCORE.values():
        found = getattr(importlib.import_module(f"imscore.{module}.model"), kind)
        assert list(inspect.signature(found.score).parameters)[1:3] == ["pixels", "prompts"]
        assert callable(found.from_pretrained)


# ---- what every model reward refuses ----


@pytest.mark.parametrize(
    "key",
    ["clip.model", "pickscore.model", "aesthetic.clip", "aesthetic.head", "bertscore.captioner",
     "bertscore.scorer", "compose.detector", "compose.clip", "image_reward.model", "hps_v2.model", "vqascore.model"],
)  # fmt: skip
def test_a_model_neither_here_nor_on_a_hub_in_reach(settings, stand_in, key):
    """The id is named, and the command that gets it; a folder that holds no model is named, too."""
    name = key.split(".")[0]
    with pytest.raises(FileNotFoundError, match=r"nobody/no-model.*hf download nobody/no-model"):
        check_rewards([name], settings({key: "nobody/no-model"}))
    if key != "aesthetic.head":
        with pytest.raises(FileNotFoundError, match=re.escape(str(stand_in)) + ".*(config.json|model.safetensors)"):
            check_rewards([name], settings({key: stand_in}))


def test_identity_follows_the_files(zoo, settings, tmp_path):
    """What tells two judges apart is what is in the model's files, not where they lie; a server is known by its address."""
    copy = shutil.copytree(zoo / "clip", tmp_path / "clip")
    moved = settings({"clip.model": copy})
    assert reward_identity("clip", moved) == reward_identity("clip", settings())
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"logit_scale_init_value": 1.0}))
    assert reward_identity("clip", moved) != reward_identity("clip", settings())
    llava = shutil.copytree(zoo / "llava", tmp_path / "llava")
    captioned = settings({"bertscore.captioner": llava})
    assert reward_identity("bertscore", captioned) == reward_identity("bertscore", settings())
    (llava / "chat_template.jinja").write_text("{{ messages }}")
    assert reward_identity("bertscore", captioned) != reward_identity("bertscore", settings())
    one, other = (reward_identity("http", settings({"http.url": f"http://{host}/"})) for host in "ab")
    assert one != other


# What tells one evaluation from another, of the settings in a reward's own section: none of where its files lie.
DECISIVE = {
    "bertscore": {
        "max_new_tokens": 6, "num_layers": 2, "question": QUESTION, "reference": "The image contains {prompt}",
    },
    "compose": {"score": "fraction", "threshold": 0.2, "count_threshold": 0.3, "overlap": 0.5, "margin": 0.1},
    "http": {"url": "http://a/"},
    "vlm": {
        "model": "", "score": "yes", "questions": (), "question_weights": (), "scale": (0, 10), "max_tokens": 256,
        "unreadable": "stop", "extra_body": None,
    },
}  # fmt: skip

# What the reader of the reward ocr is made of: the models in the package, and the thresholds between them.
OF_RAPIDOCR = [
    Path(importlib.util.find_spec("rapidocr").origin).parent / name
    for name in (
        "models/PP-OCRv6_det_small.onnx",
        "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "models/PP-OCRv6_rec_small.onnx",
        "config.yaml",
    )
]


@pytest.mark.parametrize("name", REWARDS)
def test_identity_is_name_settings_and_checksums(zoo, stand_in, settings, name):
    """The settings that decide, by hand, and the SHA-256 of every file of the model: weights, then the rest by kind."""
    models = {
        "clip": ["clip"],
        "pickscore": ["clip"],
        "aesthetic": ["head/head.pth", "clip"],
        "bertscore": ["llava", "deberta"],
        "compose": ["owlv2", "clip"],
    }
    changed = {f"{name}.model": zoo / "clip"} if name in IMSCORE else {}
    expected = []
    for folder in (zoo / model for model in models.get(name, [])):
        kinds = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
        expected += [path for kind in kinds for path in sorted(folder.glob(kind))] if folder.is_dir() else [folder]
    expected += [zoo / "clip" / "model.safetensors"] if name in IMSCORE else []
    expected += OF_RAPIDOCR if name == "ocr" else []
    found = reward_identity(name, settings(changed | {"http.url": "http://a/"}))
    assert found == [name, DECISIVE.get(name, {}), [sha256(path) for path in expected]]


@pytest.mark.parametrize("name", [*REWARDS, "json:dumps"])
def test_every_module_has_the_three_functions(settings, name):
    """Each takes what RewardModule says, in that order; what a module calls not decisive is a setting of the reward's."""
    module = reward_module(name)
    for function in ("check", "files", "load"):
        _, *asked = inspect.signature(getattr(RewardModule, function)).parameters
        assert list(inspect.signature(getattr(module, function)).parameters) == asked
    assert set(getattr(module, "NOT_DECISIVE", ())) <= settings().own.get(name, {}).keys()


def test_the_reward_that_the_documentation_adds(settings, images, tmp_path, monkeypatch):
    """docs/rewards.md's module: it checks prompts before work, its file decides its identity wherever that lies, its scores
    are what they are by hand, and its parts come along."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)
    (source,) = (block for block in blocks if "def check" in block)
    module = ModuleType("b2diffurl.rewards.colour")
    exec(source, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(REWARDS, "colour", "colour")
    rewards = []
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "table.json").write_text('{"red": [255, 0, 0], "blue": [0, 0, 255]}')
        rewards.append(replace(settings(), own={"colour": {"table": str(tmp_path / folder / "table.json")}}))
    check_rewards(["colour"], rewards[0], ["a red circle"])
    with pytest.raises(ValueError, match=r"'a green cross' names no colour.*red, blue"):
        check_rewards(["colour"], rewards[0], ASKED)
    assert reward_identity("colour", rewards[0]) == reward_identity("colour", rewards[1])
    (tmp_path / "other" / "table.json").write_text('{"red": [250, 0, 0], "blue": [0, 0, 255]}')
    assert reward_identity("colour", rewards[0]) != reward_identity("colour", rewards[1])
    found, parts = score(load_reward("colour", rewards[0], CPU), images[:2], ["a red circle", "a blue square"])
    assert parts["named"] == ["red", "blue"]
    for n, wanted in enumerate(([255, 0, 0], [0, 0, 255])):
        away = np.linalg.norm(images[n].numpy().reshape(-1, 3).mean(0) - wanted)
        assert parts["distance"][n].item() == pytest.approx(away, rel=1e-5)
        assert found[n].item() == pytest.approx(1 - away / 442, rel=1e-5)


@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic", "bertscore"])
@pytest.mark.parametrize("lost", ["tokenizer", "weights"])
def test_a_model_that_is_not_whole(zoo, load, tmp_path, name, lost):
    """Without its tokenizer transformers would read no word, without some of its weights draw them at random: refused."""
    key, source = {"bertscore": ("bertscore.scorer", "deberta"), "aesthetic": ("aesthetic.clip", "clip")}.get(
        name, (f"{name}.model", "clip")
    )
    model = shutil.copytree(zoo / source, tmp_path / "model")
    if lost == "tokenizer":
        for path in [*model.glob("*token*"), *model.glob("vocab*")]:
            path.unlink()
        with pytest.raises(FileNotFoundError, match=re.escape(str(model)) + ".*lacks a tokenizer"):
            load(name, {key: model})
        return
    state = load_file(model / "model.safetensors")
    kept = {key: tensor for key, tensor in state.items() if "layers.1." not in key and "layer.1." not in key}
    assert len(kept) < len(state)
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=re.escape(str(model)) + r" lacks weights of \w+, such as .*layers?\.1\."):
        load(name, {key: model})


# ---- the hub's cache ----


@pytest.fixture
def cached(tmp_path, monkeypatch) -> Callable[[str, Path, str], None]:
    """cached(id, folder, pattern): put the folder's files that match into the hub's cache as that model's only snapshot."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(model: str, folder: Path, pattern: str = "*") -> None:
        root = tmp_path / "hub" / f"models--{model.replace('/', '--')}"
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text("0" * 40)
        (root / "snapshots" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
        for path in folder.glob(pattern):
            shutil.copy(path, root / "snapshots" / ("0" * 40))

    return put


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
def test_a_model_in_the_hubs_cache(zoo, load, images, prompts, cached, tmp_path, form):
    """By id and offline: a whole model is taken, with weights in either form, or in shards; it scores as from its folder."""
    model = shutil.copytree(zoo / "clip", tmp_path / "model")
    if form != "safetensors":
        stock = CLIPModel.from_pretrained(zoo / "clip")
        (model / "model.safetensors").unlink()
        if form == "sharded":
            stock.save_pretrained(model, max_shard_size="10KB")
            assert len([*model.glob("model-*.safetensors")]) > 1
        else:
            torch.save(stock.state_dict(), model / "pytorch_model.bin")
    cached("somebody/clip", model)
    found = load("clip", {"clip.model": "somebody/clip"})(images, prompts)
    torch.testing.assert_close(found, load("clip")(images, prompts), rtol=0, atol=1e-6)


@pytest.mark.parametrize("lost", ["config.json", "tokenizer*", "model-00002*", "model*.safetensors"])
def test_a_model_that_is_not_whole_in_the_hubs_cache(zoo, settings, cached, tmp_path, lost):
    """Offline, a cache that lacks a part of the model is told apart from a model: the command that gets it is named."""
    model = shutil.copytree(zoo / "clip", tmp_path / "model")
    (model / "model.safetensors").unlink()
    CLIPModel.from_pretrained(zoo / "clip").save_pretrained(model, max_shard_size="10KB")
    missing = [*model.glob(lost), *(model.glob("vocab*") if "token" in lost else ())]
    assert missing
    for path in missing:
        path.unlink()
    cached("somebody/clip", model)
    with pytest.raises(FileNotFoundError, match=r"not whole.*hf download somebody/clip"):
        check_rewards(["clip"], settings({"clip.model": "somebody/clip"}))


def test_the_hubs_checksum_is_the_files(zoo, settings, tmp_path):
    """A large file of the hub's cache is a link to a blob of its SHA-256's name, which is believed; a copy has the same
    identity, and a folder that happens to be called blobs is read."""
    weights = zoo / "clip" / "model.safetensors"
    blob = tmp_path / "blobs" / sha256(weights)
    blob.parent.mkdir()
    shutil.copy(weights, blob)
    linked = shutil.copytree(zoo / "clip", tmp_path / "snapshots", ignore=shutil.ignore_patterns("*.safetensors"))
    (linked / "model.safetensors").symlink_to(blob)
    assert reward_identity("clip", settings({"clip.model": linked})) == reward_identity("clip", settings())
    blob.write_bytes(b"")
    assert checksum(linked / "model.safetensors") == sha256(weights)
    (tmp_path / "blobs" / "model").write_bytes(b"")
    assert checksum(tmp_path / "blobs" / "model") == sha256(blob)


def test_the_heads_pickle_alone_in_the_hubs_cache(zoo, load, images, prompts, cached):
    """A repository with a .pth and nothing else, as the aesthetic head's is."""
    cached("somebody/head", zoo / "head", "head.pth")
    found = load("aesthetic", {"aesthetic.head": "somebody/head"})(images, prompts)
    assert torch.equal(found, load("aesthetic")(images, prompts))


def test_half_precision_is_for_gpus():
    """Left to itself a scorer's model is float16 on CUDA and float32 on the CPU; a wish is kept on both."""
    wanted = {"auto": ("float32", "float16"), "float32": ("float32",) * 2, "bfloat16": ("bfloat16",) * 2}
    for name, dtypes in wanted.items():
        found = [resolve_dtype(name, torch.device(device)) for device in ("cpu", "cuda")]
        assert found == [getattr(torch, dtype) for dtype in dtypes]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["clip", "pickscore", "aesthetic", "bertscore"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_on_cuda(settings, images, prompts, name, dtype, monkeypatch):
    """A GPU gives the CPU's scores, in float32 without TF32 within 1e-4 of their size, in float16 within half a per cent."""
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):  # torch's own default is on for convolutions
        monkeypatch.setattr(backend, "allow_tf32", False)
    expected = score(load_reward(name, settings({"dtype": "float32"}), CPU), images, prompts)[0]
    found = score(load_reward(name, settings({"dtype": dtype}), torch.device("cuda")), images, prompts)[0]
    rtol = {"auto": 5e-3, "float32": 1e-4}[dtype]
    if not (name == "bertscore" and dtype == "auto"):  # near ties between words go either way: it has to run
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())
    assert found.isfinite().all()


def test_a_reward_that_fills_the_same_tensor_again(images, prompts):
    """Scores are copied out of what it returns: the next batch does not write over those of the batch before."""
    kept = torch.zeros(len(prompts))

    def reward(images: Tensor, prompts: list[str]) -> tuple[Tensor, dict]:
        kept.add_(1)
        return kept, {"part": kept}

    first, second = (score(reward, images, prompts) for _ in range(2))
    assert (first[0].tolist(), second[0].tolist()) == ([1.0] * len(prompts), [2.0] * len(prompts))
    assert first[1]["part"].tolist() == [1.0] * len(prompts)
