"""The forward process, which makes an image noisy, and what a network should output there.

    x_t = signal x_0 + noise eps,   target = clean x_0 + noisy eps

A table holds a row (timestep, signal, noise, clean, noisy) for each noise level; ddim.py fills one. `target` is what a
network of the model's prediction type would output if it knew x_0 and eps. Nothing here depends on which type that is.

    L noise levels, from the least noise to the most
    T sampler steps, of which the window's are trained
    N images, C x H x W latents, c levels for each image
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.window import Window

HELD_SHARE = 0.2  # of an update's noised copies, if some are not trained but held to the base policy


@dataclass(frozen=True)
class NoiseLevels:
    """The L noise levels of a model. Compute the coefficients in float64 before you round them."""

    timesteps: Tensor  # [L] increasing; int64, or float32 where the network takes fractions
    signal: Tensor  # [L] float32, d x_t / d x_0
    noise: Tensor  # [L] float32, d x_t / d eps
    clean: Tensor  # [L] float32, d target / d x_0
    noisy: Tensor  # [L] float32, d target / d eps

    def to(self, device: torch.device | str) -> "NoiseLevels":
        return NoiseLevels(
            *(field.to(device) for field in (self.timesteps, self.signal, self.noise, self.clean, self.noisy))
        )

    def x_t(self, level: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
        """x_0 [N,C,H,W] noised by eps [N,C,H,W] to the levels [N], [N,C,H,W]."""
        return per_row(self.signal[level], x_0) * x_0 + per_row(self.noise[level], eps) * eps

    def target(self, level: Tensor, x_0: Tensor, eps: Tensor) -> Tensor:
        """What the network should output at the x_t of the same arguments, [N,C,H,W]."""
        return per_row(self.clean[level], x_0) * x_0 + per_row(self.noisy[level], eps) * eps

    @property
    def gain(self) -> Tensor:
        """|d x̂_0 / d output| of each level, [L]: an output that is off by e gives a clean image that is off by gain e.

        x̂_0 solves the two equations at the top for x_0, with the network's output in place of the target.
        """
        return self.noise / (self.signal * self.noisy - self.noise * self.clean).abs()


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """A number for each row, [N], in a shape that multiplies `like` [N, ...]."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def step_of_level(levels: NoiseLevels, table: Transitions) -> Tensor:
    """The sampler's step that passes through each noise level, [L] int64 in 0..T-1.

    A step has the levels below the one at which it begins, down to that to which it leads, and the one where it begins. The
    first step reaches up to pure noise, because other samplers begin there, and the last one down to the image.
    """
    begins = table.timesteps.flip(0).to(levels.timesteps)  # increasing
    return (table.num_steps - 1 - torch.searchsorted(begins, levels.timesteps)).clamp(min=0)


def window_levels(levels: NoiseLevels, table: Transitions, window: Window) -> tuple[int, int]:
    """The noise levels of the sampler's steps in the window, as a range of rows (first, end)."""
    step = step_of_level(levels, table)
    inside = ((step >= window.start) & (step < window.stop)).nonzero()
    return int(inside[0]), int(inside[-1]) + 1


def draw_levels(first: int, end: int, num_images: int, num_bands: int, rng: torch.Generator) -> Tensor:
    """Rows of first..end-1 for each image, [N,c] int64: each band of a c-th of that range has one of each image.

    Within a band the images' levels are spread evenly, too: each of N equal parts has one (stratified sampling, as in
    V-GRPO, arXiv 2604.23380). Every row is equally likely for every image.
    """
    order = torch.rand(num_bands, num_images, generator=rng).argsort(1)  # which part of the band an image gets
    within = (order + torch.rand(num_bands, num_images, generator=rng)) / num_images
    place = (torch.arange(num_bands).unsqueeze(1) + within) / num_bands  # [c,N] in 0..1
    return (first + place.double() * (end - first)).long().clamp(max=end - 1).T.contiguous()


def draw_held(
    level: Tensor, first: int, end: int, num_levels: int, rng: torch.Generator, *, without_prompt: bool
) -> tuple[Tensor, Tensor]:
    """Choose the copies that are held to the base policy: HELD_SHARE of them, at what the loss leaves out.

    Returns `level` [N,c] with theirs drawn anew, and which of the copies, [N,c] bool, lose their prompt. Held copies have
    levels outside first..end-1. `without_prompt` says that the unconditional output is left out, too: then half of them, or
    all if every level is in the window, lose their prompt instead and have any level.
    """
    num_outside = first + num_levels - end
    share = HELD_SHARE * level.numel() if num_outside or without_prompt else 0.0
    # Where half a copy or less is to be held, or to lose its prompt, chance decides, so that small updates have their share.
    count = round(share) or int(torch.rand((), generator=rng) < share)
    chosen = torch.randperm(level.numel(), generator=rng)[:count]
    lose = chosen if without_prompt else chosen[:0]
    if num_outside and without_prompt:
        lose = chosen[: count // 2 or int(torch.rand((), generator=rng) < count / 2)]
    keep = chosen[len(lose) :]
    outside = draw_levels(0, num_outside, len(keep), 1, rng).flatten() if len(keep) else level.new_empty(0)
    outside += (end - first) * (outside >= first)  # rows above the window come after it
    anywhere = draw_levels(0, num_levels, len(lose), 1, rng).flatten() if len(lose) else level.new_empty(0)
    drawn = level.flatten().index_copy(0, keep, outside).index_copy(0, lose, anywhere)
    unprompted = torch.zeros(level.numel(), dtype=torch.bool).index_fill(0, lose, True)
    return drawn.view_as(level), unprompted.view_as(level)
