"""Which family a base model belongs to: by the class of its pipeline or, in a single file, by the names of its tensors.

To add a family, give its pipeline class a line in PIPELINES, and what only its single files have a line in TENSORS.
"""

from collections.abc import Collection
from pathlib import Path

from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import whole
from b2diffurl.runtime import files
from b2diffurl.runtime.hub import find_local, locate, naming_settings

AUTO = "auto"  # pretrained.family: recognise it
INDEX = "model_index.json"  # in a model directory
# The pipeline class of diffusers that model_index.json names -> the family.
PIPELINES = {
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "Flux2KleinPipeline": "flux2",
}
# Pipelines that are no text-to-image model of a family, and why.
REFUSED = {
    "StableDiffusionInpaintPipeline": "an inpainting model, which also reads an image",
    "StableDiffusionXLInpaintPipeline": "an inpainting model, which also reads an image",
    "FluxFillPipeline": "an inpainting model, which also reads an image",
    "StableDiffusionXLImg2ImgPipeline": "a refiner, which only goes on with another model's images",
}
# What the name of a tensor in a single file begins with -> a family, or the name of models that are not supported. The first
# that any tensor has is taken.
TENSORS = {
    "model.diffusion_model.joint_blocks.": "sd3",
    "model.diffusion_model.double_blocks.": "flux",
    "double_blocks.": "flux",
    "conditioner.embedders.0.model.": "SDXL's refiner",
    "conditioner.": "sdxl",
    "cond_stage_model.": "stable_diffusion",
    "model.diffusion_model.label_emb.": "sdxl",
    "model.diffusion_model.input_blocks.": "stable_diffusion",
}
# A folder of a model directory without model_index.json -> the family. The first that is there is taken.
FOLDERS = {"tokenizer_3": "sd3", "transformer": "flux", "text_encoder_2": "sdxl", "unet": "stable_diffusion"}
# Of a UNet in a single file; those of inpainting read a masked image and its mask beside the latents.
FIRST_LAYER, INPAINTING_CHANNELS = "model.diffusion_model.input_blocks.0.0.weight", 9
GIVE = "Give another base (pretrained.model)"


def find_family(model: ModelSettings) -> str | None:
    """The family of a model by its files on this machine, None if they are not here; a ValueError if it is of none."""
    if model.family != AUTO:
        return model.family
    root = find_local(model.name, INDEX, revision=model.revision)
    if root is None:
        return None
    return family_of_directory(root) if root.is_dir() else family_of_file(root)


def family_name(model: ModelSettings) -> str:
    """The same; of a model that is not here, model_index.json is downloaded."""
    found = find_family(model)
    if found is None:
        with naming_settings({"pretrained.model": model.name}):
            root = locate(model.name, patterns=[INDEX], missing=missing_index, revision=model.revision)
        found = family_of_directory(root)
    return found


def missing_index(root: Path) -> str:
    return "" if (root / INDEX).is_file() else INDEX


def family_of_directory(root: Path) -> str:
    """The family of a model directory; a ValueError says why it is of none."""
    names = ", ".join(dict.fromkeys(PIPELINES.values()))
    if missing_index(root):
        found = next((family for folder, family in FOLDERS.items() if (root / folder).is_dir()), "")
        if not found:
            raise ValueError(f"{root} has no {INDEX}, which says what a model is. {GIVE}.")
        return found
    kind = str(files.read_object(root / INDEX).get("_class_name"))
    if kind in REFUSED:
        raise ValueError(f"{root} is {REFUSED[kind]} ({kind}). {GIVE}.")
    if kind not in PIPELINES:
        raise ValueError(
            f"{root} is a {kind}; supported are {', '.join(PIPELINES)}. {GIVE}, or, if its parts are those of one of these, "
            f"set pretrained.family to one of: {names}"
        )
    return PIPELINES[kind]


def family_of_file(path: Path) -> str:
    """The family of a single file; a ValueError says why it is of none."""
    whole.require_safetensors(path)
    shapes = whole.stored_shapes([path])
    found = family_of_tensors(shapes)
    if shapes.get(FIRST_LAYER, (0, 4))[1] == INPAINTING_CHANNELS:
        raise ValueError(f"{path} is {REFUSED['StableDiffusionInpaintPipeline']}. {GIVE}.")
    if found not in PIPELINES.values():
        raise ValueError(f"{path} is a model of {found or 'an unknown kind'}, which is not supported. {GIVE}.")
    return found


def family_of_tensors(names: Collection[str]) -> str:
    """The entry of TENSORS that fits the names of a single file's tensors; "" if none does."""
    return next((kind for begins, kind in TENSORS.items() if any(name.startswith(begins) for name in names)), "")
