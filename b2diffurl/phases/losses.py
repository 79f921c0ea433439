"""An objective's loss of stored samples under the current policy: of a sampler's transitions, or of images noised again.

A step is a transition of the sampler, or a band of noise levels.

N samples, S trained steps, s of them at once, c bands
U units, M of them at once: the loss has one term for each unit and step. A unit is a sample, or a contrast pair if the
objective is paired
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from b2diffurl.algorithm.noising import NoiseLevels, draw_held, draw_levels, per_row, step_of_level, window_levels
from b2diffurl.algorithm.transition import Transitions, require_stochastic, step_weights
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import Guidance, Sampling, Training
from b2diffurl.experiment.trajectories import Trajectories
from b2diffurl.models import Model
from b2diffurl.objectives import Objective
from b2diffurl.objectives.terms import noised_terms, transition_terms
from b2diffurl.phases.update_report import StepValues


@dataclass(frozen=True)
class Policy:
    """The policy that is trained, as a loss evaluates it."""

    model: Model
    guidance: Guidance

    def predict(
        self,
        samples: Trajectories,
        rows: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        unprompted: Tensor | None = None,  # [M] bool, rows that have no prompt; None: none of them
    ) -> Tensor:
        """The network's guided output at x_t [M,C,h,w], with the prompts of the samples `rows` [M]."""
        conditions = {name: value[samples.prompt_ids[rows]] for name, value in samples.conditions.items()}
        if unprompted is not None:
            conditions = {
                name: torch.where(per_row(unprompted, value), samples.unconditional[name], value)
                for name, value in conditions.items()
            }
        return self.model.predict(
            x_t,
            timesteps,
            conditions,
            samples.unconditional,
            self.guidance.scale,
            unconditional_gradient=self.guidance.unconditional_gradient,
        )

    def of_base(self, predict: Callable[[], Tensor]) -> Tensor:
        """`predict()` under the base policy."""
        with self.model.base_policy():
            return predict()

    def of_lora(self, lora: Mapping[str, Tensor], predict: Callable[[], Tensor]) -> Tensor:
        """`predict()` under the policy with other values of the LoRA's parameters."""
        with self.model.with_lora(lora):
            return predict()


class Loss(Protocol):
    """What the trainer asks of either loss."""

    policy: Policy
    step_weight: Tensor  # [S], mean 1

    def __call__(self, samples: Trajectories, advantages: Tensor, units: Tensor, steps: Tensor) -> StepValues:
        """The loss of `units` [M] or [M,2] at `steps` [s], some of 0..S-1, in one pass through the network.

        `units` are rows of `samples`, as are those of `advantages` [N,S]. All tensors are on one device.
        """

    def prepare(self, samples: Trajectories, rng: torch.Generator) -> Trajectories:
        """The samples of an update as `__call__` takes them. `rng` belongs to this update."""

    def timesteps(self, steps: Sequence[int]) -> list[float]:
        """The timesteps of the network at `steps`, for metrics."""


@dataclass(frozen=True)
class TransitionLoss:
    """The loss of a sampler's transitions."""

    policy: Policy
    objective: Objective
    table: Transitions
    window: Window
    step_weight: Tensor  # [S], mean 1

    def prepare(self, samples: Trajectories, rng: torch.Generator) -> Trajectories:
        return samples

    def __call__(self, samples: Trajectories, advantages: Tensor, units: Tensor, steps: Tensor) -> StepValues:
        rows, step = rows_and_steps(units, steps)
        i = self.window.start + step  # trajectories store the window; the table counts all T steps
        x_t, x_prev = samples.latents[rows, step], samples.latents[rows, step + 1]
        predict = partial(self.policy.predict, samples, rows, x_t, self.table.timesteps[i])
        terms = transition_terms(
            self.objective.terms,
            self.table,
            i,
            x_t,
            x_prev,
            old_log_prob=samples.log_probs[rows, step],
            advantage=advantages[rows, step],
            predict=predict,
            predict_base=partial(self.policy.of_base, predict),
        )
        return by_step(self.objective, terms, units, steps)

    def timesteps(self, steps: Sequence[int]) -> list[float]:
        return [self.table.timesteps[self.window.start + step].item() for step in steps]


@dataclass(frozen=True)
class NoisedImages(Trajectories):
    """Images and the noise that an update adds to them: to each c levels, one of each band."""

    level: Tensor  # [N,c] rows of the table of noise levels
    unprompted: Tensor  # [N,c] bool, copies that lose their prompt
    eps: Tensor  # [N,c,C,h,w]


@dataclass(frozen=True)
class NoisedLoss:
    """The loss of images that are noised again, to levels of the trained window. Some copies may be held to the base.

    These have levels outside the window or no prompt (noising.draw_held).
    """

    policy: Policy
    objective: Objective
    levels: NoiseLevels
    step_of: Tensor  # [L] step of the trained window that passes through each level
    window: tuple[int, int]  # rows of `levels`: first, end
    step_weight: Tensor  # [c], all 1
    old_lora: Mapping[str, Tensor]  # parameters of the policy that sampled
    base_everywhere: bool  # evaluate the base policy for trained copies, too: it has weight, or all shapes are to be equal
    without_prompt: bool  # some of the held copies have no prompt

    def prepare(self, samples: Trajectories, rng: torch.Generator) -> NoisedImages:
        num_images, bands = len(samples), len(self.step_weight)
        level = draw_levels(*self.window, num_images, bands, rng)
        unprompted = torch.zeros_like(level, dtype=torch.bool)
        if self.objective.options.outside_weight:
            num_levels = len(self.levels.timesteps)
            level, unprompted = draw_held(level, *self.window, num_levels, rng, without_prompt=self.without_prompt)
        eps = torch.randn(num_images, bands, *samples.latents.shape[2:], generator=rng)
        return NoisedImages(**vars(samples), level=level, unprompted=unprompted, eps=eps)

    def __call__(self, samples: NoisedImages, advantages: Tensor, units: Tensor, steps: Tensor) -> StepValues:
        rows, step = rows_and_steps(units, steps)
        x_0, level, eps = samples.latents[rows, -1], samples.level[rows, step], samples.eps[rows, step]
        x_t, t, (first, end) = self.levels.x_t(level, x_0, eps), self.levels.timesteps[level], self.window
        unprompted = samples.unprompted[rows, step]

        def predict(which: Tensor) -> Tensor:
            return self.policy.predict(samples, rows[which], x_t[which], t[which], unprompted[which])

        terms = noised_terms(
            self.objective.terms,
            self.levels,
            level,
            x_0,
            eps,
            trained=(level >= first) & (level < end) & ~unprompted,
            advantage=advantages[rows, self.step_of[level]],
            predict=predict,
            predict_old=lambda which: self.policy.of_lora(self.old_lora, partial(predict, which)),
            predict_base=lambda which: self.policy.of_base(partial(predict, which)),
            base_everywhere=self.base_everywhere,
            unused=self.objective.unused,
        )
        return by_step(self.objective, terms, units, steps)

    def timesteps(self, steps: Sequence[int]) -> list[float]:
        """The timestep in the middle of each band."""
        first, end = self.window
        middle = [first + int((step + 0.5) * (end - first) / len(self.step_weight)) for step in steps]
        return [self.levels.timesteps[row].item() for row in middle]


def make_loss(
    model: Model,
    sampling: Sampling,
    training: Training,
    window: Window,
    old_lora: Mapping[str, Tensor],  # the LoRA's parameters of the policy that sampled
    *,
    constant_shape: bool = False,
) -> Loss:
    """The loss of a stage; a ValueError if it is of transitions and one of the window's has no log-probability.

    With `constant_shape` every policy is given all rows of a micro-batch: a network is compiled anew for each number.
    """
    policy = Policy(model, training.guidance)
    objective, table = training.objective, policy.model.sampler(sampling.num_steps, sampling.eta, sde=sampling.sde)
    if not objective.on_noised_images:
        require_stochastic(table, window)
        return TransitionLoss(policy, objective, table, window, step_weights(table, window, training.steps.weight))
    levels = policy.model.noise_levels()
    return NoisedLoss(
        policy,
        objective,
        levels,
        step_of=(step_of_level(levels, table) - window.start).clamp(0, window.num_steps - 1),
        window=window_levels(levels, table, window),
        step_weight=torch.ones(training.steps.num_noise_levels, device=table.sigma.device),
        old_lora=old_lora,
        base_everywhere=constant_shape or objective.options.base_weight > 0,
        # Guidance that is sampled with, but not trained, needs an unconditional output that stays as it is.
        without_prompt=sampling.guidance_scale != 1 and training.guidance.scale == 1,
    )


def rows_and_steps(units: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each sample of `units` [M] or [M,2] at each of `steps` [s], and the step: both [s*M] or [s*2M], by step."""
    rows = units.movedim(0, -1).flatten()  # of pairs all the best, then the worst
    return rows.repeat(len(steps)), steps.repeat_interleave(len(rows))


def by_step(objective: Objective, terms: Sequence[Tensor | None], units: Tensor, steps: Tensor) -> StepValues:
    """The objective's loss and metrics at each step. `terms` are of the rows and steps of `rows_and_steps`."""
    # The objective takes the terms of one step, which of pairs are [2,M].
    shape = len(steps), *units.movedim(0, -1).shape
    split = [[None] * len(steps) if term is None else term.unflatten(0, shape) for term in terms]
    losses, metrics = zip(*(objective(*step_terms) for step_terms in zip(*split, strict=True)), strict=True)
    stacked = {name: torch.stack([each[name] for each in metrics]) for name in metrics[0]}
    return StepValues(torch.stack(losses), stacked.pop("log_ratio"), stacked.pop("clipped"), stacked)
