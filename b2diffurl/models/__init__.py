"""What the rest of the program asks of a base model, and of the family that it belongs to.

`Model` is one loaded model. `Family` is all else that differs between families: files, sizes, LoRA formats, schedulers and
words. A family is a module of this package that has the functions of `Family`; a line in FAMILIES adds it.

N rows, P prompts, latents [N,C,h,w], images [N,H,W,3]
"""

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.types import Conditions
from b2diffurl.configuration.settings import ModelSettings

# The module of this package that has each family, imported only when it is used.
FAMILIES = {"stable_diffusion": "stable_diffusion"}


class Model(Protocol):
    """A base model with a LoRA on its network."""

    network: nn.Module  # what is trained; the caller may put a wrapped one (DDP, autocast) in its place
    latent_shape: tuple[int, int, int]  # C, h, w
    fingerprint: str  # SHA-256 of the base network's weights
    scheduler_config: dict  # resolved, for manifests

    def sampler(self, num_steps: int, eta: float) -> Transitions:
        """The transitions of a sampler of `num_steps` steps; `eta` 0 adds no noise."""

    def scheduler(self, name: str) -> Any:
        """The scheduler of diffusers whose class has that name, for this model."""

    def encode(self, prompts: list[str]) -> Conditions:
        """What the network is conditioned on, each tensor [P, ...]."""

    def num_tokens_cut(self, prompt: str) -> int:
        """How many of the prompt's tokens are beyond what `encode` reads."""

    def predict(
        self,
        x_t: Tensor,
        timesteps: Tensor,
        conditions: Conditions,
        unconditional: Conditions,
        guidance_scale: float,
        *,
        unconditional_gradient: bool = True,
    ) -> Tensor:
        """Model output [N,C,h,w] float32 with classifier-free guidance inside; timesteps [N] or one, conditions [N, ...] or
        [1, ...]. Without `unconditional_gradient` guidance's unconditional half is a constant to autograd."""

    def reset(self) -> None:
        """Make the model as it was loaded: the fresh adapter, no gradients, nothing wrapped around the network."""

    def checkpoint_gradients(self) -> None:
        """From now on recompute activations in the backward pass instead of keeping them."""

    def compile(self) -> None:
        """From now on run the network by torch.compile, which compiles anew for each number of rows."""

    def base_policy(self) -> AbstractContextManager[None]:
        """Inside it `predict` is the frozen base model's: the same network with its adapter disabled."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 [N,H,W,3]."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name, float32, in a fixed order."""

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter as its LoRA file holds it."""

    def load_adapter(self, path: Path) -> None:
        """Load a LoRA file; a ValueError says what does not fit."""


@dataclass(frozen=True)
class Sizes:
    """What the sizes of an experiment's files follow from."""

    latent_shape: tuple[int, int, int]  # C, h, w
    image_px: int  # of a side
    embedding: int  # numbers in a prompt's embedding
    lora: int  # numbers in a LoRA of rank 1


@dataclass(frozen=True)
class Description:
    """A family in words, for a model card."""

    title: str  # Stable Diffusion
    tags: tuple[str, ...]  # of the Hugging Face hub
    pipeline: str  # the class of diffusers that loads it
    network: str  # what carries the LoRA: UNet


class Family(Protocol):
    """What a family's module has. Importing it costs little: what a loaded model needs is imported when one is loaded."""

    def load(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool) -> Model:
        """The base model with a fresh LoRA whose initial values follow from `seed`.

        `decoder` False leaves out the text encoder and the image decoder, which training does not need.
        """

    def fingerprint(self, model: ModelSettings) -> str:
        """SHA-256 of the base network's weights, without loading the model."""

    def sizes(self, model: ModelSettings) -> Sizes | None:
        """From the model's files if they are on this machine, else None; nothing is downloaded."""

    def schedulers(self) -> Sequence[str]:
        """The classes of diffusers that tuned models of this family can be sampled with."""

    def read_lora(self, path: Path) -> dict[str, Tensor]:
        """A LoRA file of any program, float32, under the keys of diffusers and peft; an alpha that is not the rank is
        folded into B. A ValueError says what is no LoRA of one rank."""

    def write_kohya(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """What `read_lora` returns as kohya's scripts write it, for ComfyUI and its like."""

    def write_pipeline(self, folder: Path, model: ModelSettings, lora_file: Path) -> None:
        """The base model with a LoRA of rank `model.lora_rank` fused into its network, float32, in the diffusers layout."""

    def describe(self) -> Description:
        """The family in words."""


def family(model: ModelSettings) -> Family:
    """The family of a base model; a ValueError lists the choices if there is none of that name."""
    if model.family not in FAMILIES:
        raise ValueError(f"unknown pretrained.family {model.family!r}; known: {', '.join(FAMILIES)}")
    return cast(Family, importlib.import_module(f"b2diffurl.models.{FAMILIES[model.family]}"))


def base_fingerprint(model: ModelSettings) -> str:
    """SHA-256 of the base network's weights, without loading the model."""
    return family(model).fingerprint(model)
