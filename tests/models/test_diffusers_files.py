"""A base model in one file of the original layout computes what its folder does."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from conftest import assert_refused, experiment, run_stage, stage_of, start
from diffusers import StableDiffusionPipeline
from foreign import open_clip, original_layout, output

from b2diffurl.configuration.settings import LoraSettings, ModelSettings
from b2diffurl.experiment.stage import LORA_FILE
from b2diffurl.models import stable_diffusion
from b2diffurl.runtime import files


@pytest.fixture(scope="module")
def single_file(models, tmp_path_factory) -> Path:
    """The tiny model as the one .safetensors file that the original Stable Diffusion code would read."""
    pipeline = StableDiffusionPipeline.from_pretrained(models / "sd", safety_checker=None)
    path = tmp_path_factory.mktemp("single") / "tiny.safetensors"
    safetensors.torch.save_file(original_layout(pipeline), path)
    return path


def test_single_file_is_the_directory(models, single_file):
    """A base in one file, its configs from a local directory, computes what the directory does, bit for bit."""
    directory, file = tiny.load_model(models / "sd"), tiny.load_model(single_file, config=str(models / "sd"))
    assert torch.equal(output(file), output(directory))
    assert torch.equal(file.encode(["a cross"])["prompt_embeds"], directory.encode(["a cross"])["prompt_embeds"])
    latents = torch.randn(2, *file.latent_shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(file.decode(latents), directory.decode(latents))
    assert file.scheduler_config == directory.scheduler_config
    assert file.fingerprint == files.sha256(single_file)


def test_stage_from_a_single_file(models, single_file, overrides, finished, tmp_path):
    """A stage on it ends in the LoRA that the directory gives, bit for bit."""
    run_stage(tmp_path, overrides | {"pretrained.model": str(single_file), "pretrained.config": str(models / "sd")})
    lora = "stage0/checkpoints/checkpoint_2/pytorch_lora_weights.safetensors"
    assert (experiment(tmp_path) / lora).read_bytes() == (experiment(finished) / lora).read_bytes()


def test_single_file_must_be_safetensors(models, overrides, empty, tmp_path):
    """A pickled checkpoint is refused before anything of it is read."""
    (tmp_path / "model.ckpt").write_bytes(b"never a pickle")
    with pytest.raises(ValueError, match=r"model\.ckpt is not a \.safetensors file"):
        tiny.load_model(tmp_path / "model.ckpt", config=str(models / "sd"))
    settings = overrides | {"pretrained.model": str(tmp_path / "model.ckpt"), "pretrained.config": "nobody/no-model"}
    assert_refused(start(empty, settings, "--dry_run"), r"model\.ckpt is not a \.safetensors file")


def test_single_file_needs_its_configs(single_file):
    """Without configs at hand, and no hub, the error names what is missing and how to get it."""
    with pytest.raises(FileNotFoundError, match=r"pretrained\.config.*CompVis/stable-diffusion-v1-4.*hf download"):
        tiny.load_model(single_file, config="CompVis/stable-diffusion-v1-4")


def test_a_single_file_that_lacks_a_part(models, single_file, tmp_path):
    """It is named. Diffusers would look elsewhere for it, or fill it with random numbers."""
    tensors = safetensors.torch.load_file(single_file)
    prefixes = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
    for part, prefix in prefixes.items():
        path = tmp_path / f"no_{part}.safetensors"
        safetensors.torch.save_file({key: value for key, value in tensors.items() if not key.startswith(prefix)}, path)
        said = rf"no_{part}\.safetensors has no {part}\. A single file must hold unet, vae, text_encoder\. Give another base"
        with pytest.raises(ValueError, match=said):
            tiny.load_model(path, config=str(models / "sd"))


def test_a_text_encoder_that_diffusers_does_not_find(models, single_file, tmp_path):
    """Some merged models leave out a part of its keys; diffusers reads it in the usual keys alone."""
    tensors = safetensors.torch.load_file(single_file)
    path = tmp_path / "merged.safetensors"
    safetensors.torch.save_file({key.replace(".text_model.", "."): value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"merged\.safetensors has no text_encoder\."):
        tiny.load_model(path, config=str(models / "sd"))


LACKS = r"is not a whole \w+: it lacks tensors "


@pytest.mark.parametrize(
    ("key", "said"),
    {
        "model.diffusion_model.time_embed.0.bias": rf"the unet in \S+ {LACKS}\(time_embedding\.linear_1\.bias\)",
        "first_stage_model.decoder.conv_in.bias": rf"the vae in \S+ {LACKS}\(decoder\.conv_in\.bias\)",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": rf"the text_encoder in \S+ {LACKS}",
        "model.diffusion_model.time_embed.cond_proj.weight": r"unet .* unknown tensors \(\S+cond_proj.* pretrained\.config",
        "model.diffusion_model.joint_blocks.0.x": r"changed\.safetensors is a model of sd3, and not of",
    }.items(),
)
def test_a_single_file_that_is_not_whole(models, single_file, tmp_path, key, said):
    """A tensor less in any part of it, one more in its UNet, or a model of another family."""
    tensors = safetensors.torch.load_file(single_file)
    if tensors.pop(key, None) is None:
        tensors[key] = torch.zeros(1)
    safetensors.torch.save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=said):
        tiny.load_model(tmp_path / "changed.safetensors", config=str(models / "sd"))


def test_a_single_file_with_the_text_encoder_of_2(models, single_file):
    """Open CLIP's keys, with queries, keys and values in one tensor, are the same text encoder."""
    tensors, prefix = safetensors.torch.load_file(single_file), "cond_stage_model.transformer.text_model."
    text = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    tensors |= {f"cond_stage_model.model.{key}": tensor for key, tensor in open_clip(text).items()}
    path = single_file.with_name("open_clip.safetensors")
    safetensors.torch.save_file(tensors, path)
    one, other = tiny.load_model(path, config=str(models / "sd")), tiny.load_model(models / "sd")
    assert torch.equal(one.encode(["a cross"])["prompt_embeds"], other.encode(["a cross"])["prompt_embeds"])


def test_the_dry_run_checks_a_single_file(models, single_file, overrides, empty, tmp_path):
    """As it checks a directory; what is whole passes."""
    settings = overrides | {"pretrained.model": str(single_file), "pretrained.config": str(models / "sd")}
    assert start(empty, settings, "--dry_run").code == 0
    tensors = safetensors.torch.load_file(single_file)
    del tensors["first_stage_model.decoder.conv_in.bias"]
    safetensors.torch.save_file(tensors, tmp_path / "changed.safetensors")
    settings["pretrained.model"] = str(tmp_path / "changed.safetensors")
    assert_refused(start(empty, settings, "--dry_run"), r"the vae in .* lacks tensors \(decoder\.conv_in\.bias\)")


@pytest.mark.parametrize("layout", ["single file", "hub", "transformers 5"])
def test_written_pipeline_has_the_hubs_names(models, single_file, finished, tmp_path, layout):
    """Whatever names the base's text encoder has: with `text_model.` on the hub, without in what transformers 5 saves."""
    base, config, prefix = tmp_path / "base", "", "text_model."
    if layout == "single file":
        base, config = single_file, str(models / "sd")
    else:
        path = shutil.copytree(models / "sd", base) / "text_encoder" / "model.safetensors"
        names = {key: prefix * (layout == "hub") + key.removeprefix(prefix) for key in safetensors.torch.load_file(path)}
        tensors = {names[key]: value for key, value in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    settings = ModelSettings("stable_diffusion", str(base), "main", "", config, resolution=0, lora=LoraSettings(4))
    lora = stage_of(finished).checkpoints()[-1] / LORA_FILE
    stable_diffusion.FAMILY.write_pipeline(tmp_path / "out", settings, lora, dtype="float32")
    written = safetensors.torch.load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    original = safetensors.torch.load_file(models / "sd" / "text_encoder" / "model.safetensors")
    assert written.keys() == {prefix + key.removeprefix(prefix) for key in original}
    assert all(torch.equal(written[prefix + key.removeprefix(prefix)], value) for key, value in original.items())
