"""What is downloaded of a model of the hub, and when the hub's cache holds all of it."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from b2diffurl.configuration.settings import LoraSettings, ModelSettings
from b2diffurl.models import diffusers_files, family_of, stable_diffusion

HUB = {  # files of models on the hub, as far as they bear on what is downloaded
    "flux": [
        "flux1-dev.safetensors", "ae.safetensors", "dev_grid.jpg", "model_index.json", "README.md",
        "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
        "text_encoder_2/config.json", "text_encoder_2/model-00001-of-00002.safetensors",
        "text_encoder_2/model-00002-of-00002.safetensors", "text_encoder_2/model.safetensors.index.json",
        "tokenizer/merges.txt", "tokenizer/vocab.json", "tokenizer_2/spiece.model", "tokenizer_2/tokenizer.json",
        "transformer/config.json", "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
        "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ],
    "sd3": [
        "model_index.json", "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.safetensors", "text_encoder_2/model.fp16.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors", "text_encoder_3/model-00002-of-00002.safetensors",
        "text_encoder_3/model.fp16-00001-of-00002.safetensors", "text_encoder_3/model.fp16-00002-of-00002.safetensors",
        "text_encoder_3/model.safetensors.index.json", "text_encoder_3/model.safetensors.index.fp16.json",
        "sd3.5_medium.safetensors", "text_encoders/t5xxl_fp16.safetensors", "tokenizer_3/spiece.model",
        "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
    ],
    "stable_diffusion": [
        "v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors", "safety_checker/model.safetensors",
    ],
}  # fmt: skip


def model_at(name: str | Path) -> ModelSettings:
    return ModelSettings("auto", str(name), "main", "", "", 64, LoraSettings(4))


def downloaded(name: str, variant: str = "", plain: Sequence[str] = ()) -> list[str]:
    """The weight files of HUB's model that the hub's client downloads."""
    spec = family_of(name).spec(model_at("owner/name"))
    patterns = diffusers_files.file_patterns(variant, spec, plain)
    return [
        path for path in filter_repo_objects(HUB[name], allow_patterns=patterns) if path.endswith((".safetensors", ".bin"))
    ]


def test_what_is_downloaded():
    """Of each part one variant of the weights, whole or in shards, and no other file of weights."""
    parts = ("text_encoder/", "text_encoder_2/", "transformer/", "vae/")
    assert downloaded("flux") == [name for name in HUB["flux"] if name.startswith(parts) and name.endswith(".safetensors")]
    plain = [name for name in HUB["sd3"] if "/" in name and name.endswith("s") and "fp16" not in name]
    assert downloaded("sd3") == plain
    fp16 = [name for name in HUB["sd3"] if ".fp16" in name and name.endswith("s")]
    assert downloaded("sd3", "fp16") == fp16
    assert downloaded("sd3", "fp16", ["transformer", "vae"]) == fp16 + plain[-2:]
    assert downloaded("stable_diffusion", "fp16") == [name for name in HUB["stable_diffusion"] if "fp16" in name]
    assert downloaded("stable_diffusion") == [
        f"{part}/{kind}.safetensors"
        for part, kind in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        )
    ]
    common = diffusers_files.config_patterns(stable_diffusion.PIPELINE)
    assert common == ["model_index.json", "README.md", "*/*.json", "tokenizer/*"]


@pytest.mark.parametrize(
    "lost", ["transformer/diffusion_pytorch_model-00002-of-00002.safetensors", "vae/diffusion_pytorch_model.safetensors"]
)
def test_a_cached_model_that_lacks_a_shard_is_not_whole(tmp_path, lost):
    """So the rest is downloaded."""
    tiny.flux(tmp_path)
    stored = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(stored)
    stored.unlink()
    names = sorted(weights)
    shards = {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for shard, held in shards.items():
        save_file({name: weights[name] for name in held}, stored.parent / shard, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (stored.parent / f"{stored.name}.index.json").write_text(json.dumps(index))
    spec = family_of("flux").spec(model_at(tmp_path))
    assert diffusers_files.missing_file(tmp_path, spec, "") == ""
    family_of("flux").check(model_at(tmp_path))
    (tmp_path / lost).unlink()
    assert diffusers_files.missing_file(tmp_path, spec, "") == lost
