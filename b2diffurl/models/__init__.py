"""What the rest of the program asks of a base model, and of the family that it belongs to.

`Model` is one loaded model: network, text encoder, sampler, decoder. `Family` is everything else that differs between
families: files and whether they are whole, sizes, LoRA formats, schedulers, and the words of a model card. To add a family,
write a module in this package with FAMILY, a `Family`, and add a line to FAMILIES and to the tables of recognise.py.

N rows, P prompts, latents [N,C,h,w], images [N,H,W,3]
"""

import importlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.types import Conditions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.models import recognise
from b2diffurl.runtime.hub import naming_settings, require_path_or_id

# Family name -> module of this package, which is imported when the family is first used.
FAMILIES = {name: name for name in ("stable_diffusion", "sdxl", "sd3", "flux", "flux2")}


class Model(Protocol):
    """A base model with a LoRA on its network."""

    network: nn.Module  # the base network with the LoRA; the caller may replace it by a wrapped one (DDP, autocast)
    latent_shape: tuple[int, int, int]  # C, h, w
    fingerprint: str  # SHA-256 of the base network's weights
    scheduler_config: dict  # the scheduler's settings, defaults filled in, for manifests
    is_compiled: bool  # by `compile`

    def sampler(self, num_steps: int, eta: float, steps: Sequence[int] | None = None, *, sde: str = "") -> Transitions:
        """The transitions of a sampler with `num_steps` steps and noise level `eta`; with eta 0 it is deterministic.

        If `steps` are given, only these of them are taken. Each leads to the next one, the last to the image. `sde` is the
        kind of a flow-matching model's stochastic steps (algorithm/flow.py); others have one kind.
        """

    def noise_levels(self) -> NoiseLevels:
        """The noise levels that the network was trained on, and what it outputs there."""

    def scheduler(self, name: str, num_steps: int) -> Any:
        """A scheduler of diffusers by its class name, with this model's scheduler settings, set to `num_steps` steps.

        A ValueError if it cannot make so many.
        """

    def encode(self, prompts: list[str]) -> Conditions:
        """Encode prompts into what the network is conditioned on, each tensor [P, ...]."""

    def prepare(self, prompts: Collection[str]) -> None:
        """Encode these prompts now, and forget others, so that `encode` need not call the text encoders for them."""

    def unconditional(self) -> Conditions:
        """What guidance takes for no prompt, each tensor [1, ...]: `encode` of "", or zeros if the model was trained so."""

    def num_tokens_cut(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens `encode` cuts off at the end of each prompt; 0 where it reads all."""

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
        """The network's output [N,C,h,w] float32, classifier-free guidance included.

        x_t is [N,C,h,w], timesteps is a scalar or [N], conditions are [1, ...] or [N, ...], unconditional is [1, ...]. With
        `unconditional_gradient` False the unconditional half of guidance is a constant to autograd.
        """

    def reset(self) -> None:
        """Return to the state after loading: the fresh LoRA, no gradients, the network unwrapped."""

    def twin(self) -> "Model":
        """This model for another thread: the same tensors, but gradients of its own, and `with_lora` and `base_policy`."""

    def checkpoint_gradients(self) -> None:
        """From now on recompute activations in the backward pass instead of keeping them."""

    def compile(self) -> None:
        """From now on run the network by torch.compile. It compiles again for each new number of rows."""

    def base_policy(self) -> AbstractContextManager[None]:
        """A context in which `predict` uses the frozen base model: the same network with its LoRA disabled."""

    def with_lora(self, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """A context in which `predict` uses these values of the LoRA's parameters, which have the names of `trainable`."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode final latents to images uint8 [N,H,W,3]; a FloatingPointError if the decoder overflows."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by name, float32, always in the same order."""

    def adapter_state(self) -> dict[str, Tensor]:
        """The LoRA's tensors under the keys of its file."""

    def load_adapter(self, path: Path) -> None:
        """Load a LoRA file of any supported program; a ValueError says what does not fit."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a base model from which the sizes of an experiment's files, and of what is loaded, follow."""

    latent_shape: tuple[int, int, int]  # C, h, w
    image_px: tuple[int, int]  # height, width
    embedding: int  # how many numbers a prompt's embedding has
    lora: int  # how many numbers a LoRA of rank 1 has
    weights: Mapping[str, int] = field(default_factory=dict)  # how many numbers the weights of each part have
    float32: Collection[str] = ()  # the parts that are float32 in every precision


@dataclass(frozen=True)
class Description:
    """A family in words, for a model card."""

    title: str  # such as Stable Diffusion
    tags: tuple[str, ...]  # its tags on the Hugging Face hub
    pipeline: str  # the class of diffusers that loads it
    network: str  # the network that carries the LoRA, such as UNet
    scheduler: str = "DDIMScheduler"  # of diffusers, with which checkpoints are judged if the user names no other
    absent: tuple[str, ...] = ()  # parts that a model may lack, and lacks: diffusers has to be told of them
    readers: tuple[str, ...] = ("ComfyUI", "A1111", "Forge", "diffusers")  # programs that read what `write_kohya` writes

    @property
    def is_flow(self) -> bool:
        """Whether it is a flow-matching model: sample.sde chooses the steps that are trained; others take DDIM's."""
        return self.scheduler.startswith("FlowMatch")


class Family(Protocol):
    """FAMILY of a family's module. Importing that must be cheap: diffusers is imported when a model is loaded."""

    def load(self, model: ModelSettings, *, device: torch.device, dtype: torch.dtype, seed: int, decoder: bool) -> Model:
        """Load the base model, and add a fresh LoRA whose initial values follow from `seed`.

        `decoder` False leaves out text encoder and image decoder. Training needs neither.
        """

    def locate(self, model: ModelSettings) -> None:
        """See that all files of the model are on this machine. What is missing is downloaded."""

    def fingerprint(self, model: ModelSettings) -> str:
        """SHA-256 of the base network's weights, without loading the model."""

    def identity(self, model: ModelSettings) -> dict[str, str]:
        """{part of the pipeline: a checksum of all that decides its output}, without loading the model.

        Every part counts that decides an image: the network, encoders, tokenizers, the decoder, the scheduler.
        """

    def check_sampler(self, model: ModelSettings, sampling: Sampling, window: Window | None) -> None:
        """Raise a ValueError if training's sampler cannot be used, or if a step in `window` has no log-probability.

        It names what works. `window` is None if no step needs one.
        """

    def check_guidance(self, model: ModelSettings, scales: Mapping[str, float]) -> None:
        """Raise a ValueError if the model cannot be used with these scales of guidance, {setting: scale}.

        They are those of sampling, of training and of judging by the deployed sampler, sample.guidance_scale the first.
        """

    def num_passes(self, guidance_scale: float) -> int:
        """How many passes through the network an evaluation takes, with this scale of guidance."""

    def check(self, model: ModelSettings) -> None:
        """Refuse, by a ValueError or FileNotFoundError, a model that is not whole or that this family cannot run.

        It looks at what is on this machine, downloads nothing and loads no weights. `load` refuses the same.
        """

    def sizes(self, model: ModelSettings) -> Sizes | None:
        """The model's sizes, from its files; None if they are not on this machine. Downloads nothing."""

    def schedulers(self) -> Sequence[str]:
        """Class names of the diffusers schedulers that can sample a model of this family."""

    def read_lora(self, path: Path) -> dict[str, Tensor]:
        """Read a LoRA file of any program: float32 under the keys of diffusers and peft, with alpha = rank.

        Another alpha is folded into B. A ValueError says why a file is not a LoRA of one rank.
        """

    def write_kohya(self, path: Path, state: Mapping[str, Tensor]) -> None:
        """Write what `read_lora` returns in the format of kohya's scripts, for ComfyUI and similar programs."""

    def write_pipeline(self, folder: Path, model: ModelSettings, lora_file: Path, *, dtype: str) -> None:
        """Write the whole pipeline in the diffusers layout, with the LoRA fused into the network.

        `model.lora.rank` must be the rank of `lora_file`. `dtype` is torch's name of the weights' type, such as float16.
        """

    def describe(self, model: ModelSettings) -> Description:
        """The family in words, and what of a pipeline this model lacks. Downloads nothing."""


def family(model: ModelSettings) -> Family:
    """A base model's family, recognised by its files if pretrained.family is auto.

    Of a model that is not on this machine model_index.json is downloaded for that. A ValueError says that a model is of no
    family, or lists the families if the name is unknown.
    """
    return family_of(recognise.family_name(model))


def family_of(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"unknown pretrained.family {name!r}; known: {', '.join((recognise.AUTO, *FAMILIES))}")
    return importlib.import_module(f"b2diffurl.models.{FAMILIES[name]}").FAMILY


def family_here(model: ModelSettings) -> Family | None:
    """The same, None if only a model's files tell its family and they are not on this machine. Downloads nothing."""
    name = recognise.find_family(model)
    return family_of(name) if name else None


def base_fingerprint(model: ModelSettings) -> str:
    """SHA-256 of the base network's weights, without loading the model: which LoRAs fit it."""
    return family(model).fingerprint(model)


def base_identity(model: ModelSettings) -> dict[str, str]:
    """{part of the base model: a checksum of all that decides its output}: whether two images are of the same model."""
    return family(model).identity(model)


def base_sizes(model: ModelSettings) -> Sizes | None:
    """The base model's sizes; None if it is not on this machine. Downloads nothing."""
    found = family_here(model)
    return found.sizes(model) if found else None


def describe_base(model: ModelSettings) -> Description:
    """The base model's family in words."""
    return family(model).describe(model)


def check_base(model: ModelSettings) -> None:
    """Refuse a base model on this machine that is not whole, or that its family cannot run. Downloads nothing.

    A path at which there is nothing is refused, too.
    """
    with naming_settings({"pretrained.model": model.name}):
        require_path_or_id(model.name)
    if found := family_here(model):
        found.check(model)
