"""A base model with something missing is refused in one sentence, before any work; one that is whole passes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT, assert_refused, refuse, start, unfinish
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

SHAPES = ROOT / "model" / "shapes" / "base"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.fixture
def base(models, tmp_path) -> Path:
    """A copy of the tiny model, to break."""
    return shutil.copytree(models / "sd", tmp_path / "base")


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(path)), path, {"format": "pt"})


def without(number: int, part: str = "") -> Callable[[dict], dict]:
    """Removes the first tensors whose names hold `part`."""

    def change(tensors: dict) -> dict:
        gone = [key for key in sorted(tensors) if part in key][:number]
        return {key: value for key, value in tensors.items() if key not in gone}

    return change


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_missing_tensor(base, part):
    """Of any part: its folder, its class, the first tensors and what to do."""
    name = min(load_file(base / WEIGHTS[part]))
    rewrite(base / WEIGHTS[part], without(1))
    with pytest.raises(ValueError, match=rf"base/{part} is not a whole \w+: it lacks tensors \({name}\)\. Get its"):
        tiny.load_model(base)


@pytest.mark.parametrize("script", ["dry run", "sample"])
def test_a_missing_layer_before_any_work(overrides, empty, tmp_path, script):
    """The text encoder of the embedded model without three tensors: refused by the dry run and by the first phase."""
    broken = shutil.copytree(SHAPES, tmp_path / "no_layer")
    rewrite(broken / WEIGHTS["text_encoder"], without(3, "layers.0"))
    settings = overrides | {"pretrained.model": str(broken)}
    said = r"no_layer/text_encoder is not a whole CLIPTextModel: it lacks tensors \(encoder\.layers\.0\.\S+, .*\)\. Get"
    if script == "dry run":
        assert_refused(start(empty, settings, "--dry_run"), said)
        assert not list(empty.iterdir())
    else:
        refuse(empty, "sample", settings, said)


def test_unknown_and_misshapen_tensors(base):
    """Those are named, too, each with the shape that it should have."""
    rewrite(base / WEIGHTS["vae"], lambda tensors: tensors | {"odd.weight": tensors["encoder.conv_in.bias"].clone()})
    with pytest.raises(ValueError, match=r"whole AutoencoderKL: it has unknown tensors \(odd\.weight\)\."):
        tiny.load_model(base)
    rewrite(base / WEIGHTS["unet"], lambda tensors: tensors | {"conv_in.weight": tensors["conv_in.weight"][:, :3].clone()})
    said = (
        r"whole UNet2DConditionModel: it has misshapen tensors \(conv_in\.weight is \(8, 3, 3, 3\), not \(8, 4, 3, 3\)\)\."
    )
    with pytest.raises(ValueError, match=said):
        tiny.load_model(base)


def test_a_unet_saved_with_its_lora(base):
    """The remedy is to fuse it."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    unet.save_pretrained(base / "unet")
    with pytest.raises(ValueError, match=r"base/unet .*lacks .*to_q\.weight.* It was saved with a LoRA attached: fuse"):
        tiny.load_model(base)


def test_shards_are_whole(base):
    """A part may lie in several files; one that its index names must be there, and all of them together must be whole."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    (base / WEIGHTS["unet"]).unlink()
    unet.save_pretrained(base / "unet", max_shard_size="50kB")
    shards = sorted((base / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    loaded = tiny.load_model(base).unet
    assert torch.equal(loaded.conv_in.weight, unet.conv_in.weight)
    rewrite(shards[1], without(1))
    with pytest.raises(ValueError, match="lacks tensors"):
        tiny.load_model(base)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        tiny.load_model(base)


def lose_vocabulary(base: Path) -> None:
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (base / "tokenizer" / name).unlink(missing_ok=True)


@pytest.mark.parametrize("script", ["dry run", "sample"])
def test_a_tokenizer_without_vocabulary(overrides, empty, tmp_path, script):
    """Transformers would make one up, to which all prompts are the empty one."""
    broken = shutil.copytree(SHAPES, tmp_path / "no_vocabulary")
    lose_vocabulary(broken)
    settings = overrides | {"pretrained.model": str(broken)}
    said = r"no_vocabulary/tokenizer lacks a tokenizer \(tokenizer\.json, or vocab\.json and merges\.txt, or"
    if script == "dry run":
        assert_refused(start(empty, settings, "--dry_run"), said)
    else:
        refuse(empty, "sample", settings, said)


def test_a_vocabulary_that_is_lost_between_two_stages(workplace, overrides, base):
    """The next stage's first phase refuses the base."""
    settings = overrides | {"pretrained.model": str(base), "run_name": "stage1"}
    unfinish(workplace, "sample")
    lose_vocabulary(base)
    refuse(workplace, "sample", settings, r"base/tokenizer lacks a tokenizer")


@pytest.mark.parametrize("kept", ["vocab.json", "merges.txt"])
def test_half_a_vocabulary(base, kept):
    """Words without merges, or merges without words, are no tokenizer."""
    lose_vocabulary(base)
    (base / "tokenizer" / kept).write_text("{}")
    with pytest.raises(FileNotFoundError, match="base/tokenizer lacks a tokenizer"):
        tiny.load_model(base)


def test_a_tokenizer_of_another_model(base):
    """One that counts further than the text encoder, that lets longer prompts pass, or that knows no word."""
    tokens = tiny.tokenizer()
    tokens.add_tokens(["extra"])
    tokens.save_pretrained(base / "tokenizer")
    with pytest.raises(ValueError, match=r"the tokenizer counts to 54, and text_encoder/config\.json has vocab_size 54\."):
        tiny.load_model(base)
    tokens = tiny.tokenizer()
    tokens.model_max_length = 78
    tokens.save_pretrained(base / "tokenizer")
    with pytest.raises(
        ValueError, match=r"model_max_length is 78, .* reads 77 tokens\. Set model_max_length in tokenizer_con"
    ):
        tiny.load_model(base)
    tokens = CLIPTokenizer(vocab={tiny.BOS: 0, tiny.EOS: 1}, merges=[], model_max_length=77)
    tokens.save_pretrained(base / "tokenizer")
    with pytest.raises(ValueError, match="base/tokenizer reads every prompt as the empty one"):
        tiny.load_model(base)
