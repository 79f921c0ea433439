"""A base model's family is recognised by its files; what is of no family is refused before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, experiment, make_config, refuse, run_script, start
from safetensors.torch import save_file

from b2diffurl.configuration.settings import ModelSettings, read_settings
from b2diffurl.models import base_sizes, check_base, recognise
from b2diffurl.runtime import files


def settings_of(name: object) -> ModelSettings:
    return read_settings(make_config({"pretrained.model": str(name)})).model


def index(root: Path, **entries) -> Path:
    """A model directory that has nothing but model_index.json."""
    root.mkdir(exist_ok=True)
    (root / "model_index.json").write_text(json.dumps(entries))
    return root


@pytest.mark.parametrize(("pipeline", "family"), recognise.PIPELINES.items())
def test_a_directory_says_what_it_is(tmp_path, pipeline, family):
    """By its pipeline's class, which is one of diffusers."""
    import diffusers

    assert hasattr(diffusers, pipeline)
    assert recognise.find_family(settings_of(index(tmp_path, _class_name=pipeline))) == family


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["model.diffusion_model.input_blocks.0.0.bias", "cond_stage_model.x"], "stable_diffusion"),
        (["model.diffusion_model.input_blocks.0.0.bias"], "stable_diffusion"),
        (["model.diffusion_model.joint_blocks.0.x", "text_encoders.clip_l.x"], "sd3"),
        (["double_blocks.0.img_attn.qkv.weight"], "flux"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "flux"),
        (["unet.lora_A.weight"], "is a model of an unknown kind, which is not supported"),
    ],
)
def test_a_single_file_says_what_it_is(tmp_path, names, found):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "one.safetensors")
    model = settings_of(tmp_path / "one.safetensors")
    if found in recognise.PIPELINES.values():
        assert recognise.find_family(model) == found
    else:
        with pytest.raises(ValueError, match=rf"one\.safetensors {found}"):
            recognise.find_family(model)


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("WanPipeline", "is a WanPipeline; supported are StableDiffusionPipeline, .*Give another base"),
        ("StableDiffusionInpaintPipeline", "is an inpainting model, which also reads an image"),
        ("StableDiffusionXLInpaintPipeline", "is an inpainting model, which also reads an image"),
        ("FluxFillPipeline", "is an inpainting model, which also reads an image"),
        ("StableDiffusionXLImg2ImgPipeline", "is a refiner, which only goes on with another model's images"),
        (["pipeline", "Evil"], r"is a \['pipeline', 'Evil'\]; supported are"),
        (None, "is a None; supported are"),
    ],
)
def test_another_pipeline_is_refused_before_any_work(overrides, empty, tmp_path, pipeline, said):
    """By the dry run as by the first phase: an unknown class with those that are supported."""
    settings = overrides | {"pretrained.model": str(index(tmp_path / "base", _class_name=pipeline))}
    assert_refused(start(empty, settings, "--dry_run"), said)
    refuse(empty, "sample", settings, said)


def test_without_an_index(models, tmp_path):
    """A directory is known by its folders."""
    base = shutil.copytree(models / "sd", tmp_path / "base")
    (base / "model_index.json").unlink()
    assert recognise.find_family(settings_of(base)) == "stable_diffusion"
    check_base(settings_of(base))
    (base / "text_encoder_2").mkdir()
    assert recognise.find_family(settings_of(base)) == "sdxl"
    with pytest.raises(ValueError, match=r"has no model_index\.json, which says what a model is\. Give another base"):
        check_base(settings_of(tmp_path))


def test_a_model_that_is_not_here(tmp_path, overrides):
    """Nothing can be said of it yet, so the plan is shown; whatever needs it says how to get it."""
    model = settings_of("nobody/no-model")
    assert (recognise.find_family(model), base_sizes(model), check_base(model)) == (None, None, None)
    with pytest.raises(FileNotFoundError, match=r"nobody/no-model is not, or not whole, in the local cache.* hf download"):
        recognise.family_name(model)
    ended = start(tmp_path, overrides | {"pretrained.model": "nobody/no-model"}, "--dry_run")
    assert (ended.code, "unknown until the base model is here" in ended.stdout) == (2, True)
    assert_refused(ended, r"pretrained\.model: nobody/no-model is not, or not whole, in the local cache")


def test_what_was_recognised_is_recorded(overrides, tmp_path):
    """So that exporting, which may do without the base model, knows the family; and a stage may be gone on with."""
    for _ in range(2):
        assert run_script(tmp_path, "sample", overrides).code == 0
        assert files.read_json(experiment(tmp_path) / "config.json")["config"]["pretrained"]["family"] == "stable_diffusion"
