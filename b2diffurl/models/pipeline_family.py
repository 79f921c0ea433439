"""A family of pipelines of diffusers: all of a `Family` that does not depend on the kind of network."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from b2diffurl.configuration.settings import ModelSettings
from b2diffurl.models import Description, Sizes, diffusers_files, lora
from b2diffurl.models.diffusers_files import PipelineSpec
from b2diffurl.models.lora import State
from b2diffurl.models.pipeline_model import PipelineModel


class PipelineFamily:
    """The answers that `b2diffurl.models.Family` asks for and documents, from the class of the family's models.

    UNetFamily and FlowFamily add what depends on the kind of network: `schedulers` and `check_sampler`. A family adds
    `embedding`, and whatever else is its own.
    """

    title: ClassVar[str]  # such as Stable Diffusion
    tags: ClassVar[tuple[str, ...]]  # its tags on the Hugging Face hub
    readers: ClassVar[tuple[str, ...]] = Description.readers
    scheduler: ClassVar[str]  # of diffusers, with which checkpoints are judged if the user names no other
    model_class: ClassVar[type[PipelineModel]]  # what `load` returns

    def spec(self, model: ModelSettings) -> PipelineSpec:
        """What this model's pipeline consists of."""
        return self.model_class.spec

    def embedding(self, model: ModelSettings, configs: Mapping[str, Mapping]) -> int:
        """How many numbers a prompt's embedding has, by {part: its config.json}."""
        raise NotImplementedError

    def index_entries(self, model: ModelSettings) -> dict[str, Any]:
        """Arguments of the pipeline's class beside its parts; they stand in model_index.json."""
        return {}

    def describe(self, model: ModelSettings) -> Description:
        kind, here = self.model_class, self.spec(model).classes
        absent = tuple(part for part in kind.spec.classes if part not in here)
        words = self.title, self.tags, kind.spec.pipeline, kind.lora_spec.title, self.scheduler
        return Description(*words, absent, self.readers)

    def load(
        self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool
    ) -> PipelineModel:
        return self.model_class(model, device=device, dtype=dtype, seed=seed, decoder=decoder)

    def locate(self, model: ModelSettings) -> None:
        diffusers_files.locate_base(model, self.spec(model))
        diffusers_files.locate_configs(model, self.spec(model))

    def fingerprint(self, model: ModelSettings) -> str:
        return diffusers_files.fingerprint(model, self.spec(model))

    def identity(self, model: ModelSettings) -> dict[str, str]:
        return diffusers_files.identity(model, self.spec(model))

    def check(self, model: ModelSettings) -> None:
        diffusers_files.check_here(model, self.spec(model))
        self.sizes(model)  # refuses a resolution that does not divide

    def check_guidance(self, model: ModelSettings, scales: Mapping[str, float]) -> None:
        """Any scale will do where guidance is a second pass without the prompt."""

    def num_passes(self, guidance_scale: float) -> int:
        """Guidance is a second pass without the prompt; by a scale of 1 it changes nothing."""
        return 2 - (guidance_scale == 1)

    def sizes(self, model: ModelSettings) -> Sizes | None:
        spec, kind = self.spec(model), self.model_class
        local = diffusers_files.find_here(model, spec)
        if local is None:
            return None
        weights, configs = local
        latent_shape, image_px = kind.measure(configs[spec.network], configs["vae"], model.resolution)
        return Sizes(
            latent_shape=latent_shape,
            image_px=image_px,
            embedding=self.embedding(model, configs),
            lora=lora.count_numbers(weights, kind.lora_spec.chosen(mlp=model.lora.mlp)),
            weights=diffusers_files.count_weights(model, spec),
            float32=diffusers_files.upcast_parts(configs["vae"], spec),
        )

    def read_lora(self, path: Path) -> State:
        return lora.read_lora(path, self.model_class.lora_spec)

    def write_pipeline(self, folder: Path, model: ModelSettings, lora_file: Path, *, dtype: str) -> None:
        tuned = self.load(model, device=torch.device("cpu"), dtype=torch.float32, seed=0, decoder=True)
        tuned.load_adapter(lora_file)
        tuned.bare.fuse_lora()
        tuned.bare.unload_lora()
        for name in tuned.spec.weights:  # only now: the sum of base and LoRA is rounded once
            # torch's own `to`: that of diffusers warns of layers to be kept
            nn.Module.to(tuned.parts[name], getattr(torch, dtype))
        diffusers_files.write_pipeline(folder, tuned.parts, model, tuned.spec, **self.index_entries(model))
