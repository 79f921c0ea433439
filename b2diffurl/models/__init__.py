"""Model adapters: the little that sampling and training need to know of a text-to-image model.

N rows, P prompts, latents [N,C,h,w], images [N,H,W,3]
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from b2diffurl.algorithm.transition import Transitions
from b2diffurl.experiment.trajectories import Conditions


class Model(Protocol):
    """A base model with a LoRA on its network."""

    network: nn.Module  # what is trained; the caller may put a wrapped one (DDP, autocast) in its place
    latent_shape: tuple[int, int, int]  # C, h, w
    fingerprint: str  # SHA-256 of the base network's weights
    scheduler_config: dict  # resolved, for manifests

    def sampler(self, num_steps: int, eta: float) -> Transitions:
        """The transitions of a sampler of `num_steps` steps; `eta` 0 adds no noise."""

    def scheduler(self, kind: type) -> Any:
        """A scheduler of that class of diffusers, for this model."""

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


def load_model(
    pretrained: Mapping, *, device: torch.device, dtype: torch.dtype, lora_rank: int, seed: int, decoder: bool
) -> Model:
    """Load the base model named by `pretrained` with a fresh LoRA whose initial values follow from `seed`.

    `decoder` False leaves out the text encoder and the image decoder, which training does not need.
    """
    if pretrained["family"] not in MODELS:
        raise ValueError(f"unknown pretrained.family {pretrained['family']!r}; known: {', '.join(MODELS)}")
    return MODELS[pretrained["family"]](
        pretrained, device=device, dtype=dtype, lora_rank=lora_rank, seed=seed, decoder=decoder
    )


def base_fingerprint(pretrained: Mapping) -> str:
    """SHA-256 of the base network's weights, without loading the model."""
    from b2diffurl.models import stable_diffusion

    return stable_diffusion.base_fingerprint(pretrained)


def _stable_diffusion(pretrained: Mapping, **options) -> Model:
    from b2diffurl.models.stable_diffusion import StableDiffusion

    return StableDiffusion(pretrained, **options)


MODELS = {"stable_diffusion": _stable_diffusion}
