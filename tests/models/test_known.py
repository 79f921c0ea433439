"""The sizes of the presets' models, which are known without their files."""

import math

import pytest
from conftest import make_config

from b2diffurl.configuration.settings import LoraSettings, ModelSettings, read_settings
from b2diffurl.models import family_of
from b2diffurl.models.known import KNOWN, expected_family, expected_sizes
from benchmarks import full_size, sd14
from benchmarks.random_weights import hole

BUILT = {
    "CompVis/stable-diffusion-v1-4": "sd14",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stabilityai/stable-diffusion-3.5-medium": "sd35_medium",
    "black-forest-labs/FLUX.1-dev": "flux_dev",
}


def model_at(name: str, *, mlp: bool, family: str = "auto") -> ModelSettings:
    return ModelSettings(family, name, "main", "", "", 0, LoraSettings(4, mlp))


@pytest.mark.long
@pytest.mark.parametrize("name", KNOWN)
def test_they_are_those_of_the_files(tmp_path, name):
    """Of the same architectures at full size: every number of the weights, of the LoRA with and without MLPs, of latents."""
    if BUILT[name] == "sd14":
        sd14.build(tmp_path, hole)
    else:
        full_size.write_holes(tmp_path, full_size.FULL_SIZE[BUILT[name]])
    for mlp in (False, True):
        of_files = family_of(KNOWN[name].family).sizes(model_at(str(tmp_path), mlp=mlp, family=KNOWN[name].family))
        known = expected_sizes(model_at(name, mlp=mlp))
        assert (known.latent_shape, known.image_px, known.embedding) == (
            of_files.latent_shape,
            of_files.image_px,
            of_files.embedding,
        )
        assert (known.lora, dict(known.weights), list(known.float32)) == (
            of_files.lora,
            dict(of_files.weights),
            list(of_files.float32),
        )


def test_sd14_by_hand():
    """Each of 16 blocks of SD 1.4 has two attentions: on itself C and C, and on the text 768 and C, for q, k, v and out."""
    widths = [320] * 5 + [640] * 5 + [1280] * 6  # of the blocks: two in a level down, three up, one in the middle
    on_itself = sum(4 * (width + width) for width in widths)
    on_text = sum(2 * (width + width) + 2 * (768 + width) for width in widths)
    assert KNOWN["CompVis/stable-diffusion-v1-4"].sizes.lora == on_itself + on_text


def test_another_resolution_and_unknown_models(overrides):
    """Latents follow the images; of a model that is neither here nor known nothing is told."""
    name = "black-forest-labs/FLUX.1-dev"
    settings = read_settings(make_config(overrides | {"pretrained.model": name, "pretrained.resolution": 512})).model
    sizes = expected_sizes(settings)
    assert (sizes.latent_shape, sizes.image_px) == ((16, 64, 64), (512, 512))
    assert math.prod(sizes.latent_shape) * 4 == math.prod(expected_sizes(model_at(name, mlp=False)).latent_shape)
    assert (expected_family(settings), expected_family(model_at("nobody/no-model", mlp=False))) == ("flux", None)
    assert expected_sizes(model_at("nobody/no-model", mlp=False)) is None
