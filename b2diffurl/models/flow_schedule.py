"""A flow-matching model's noise schedule, from its scheduler_config.json, and the samplers on it whose steps are trained.

The sigmas are those of diffusers' FlowMatchEulerDiscreteScheduler. It shifts them towards the noise by itself: by the same
factor always, or by one that grows with the image. So it is never given sigmas that have been shifted: it would do it twice.

T sampler steps, L noise levels
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from b2diffurl.algorithm.flow import make_noise_levels, make_transitions
from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.models.noise_schedule import OWN_FILE, SCHEDULER_FILE
from b2diffurl.runtime import files

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
# Families whose pipelines begin with T sigmas that are evenly spaced from 1 to 1/T; others as the scheduler spaces them.
EVENLY_SPACED = ("flux", "flux2")
USUAL_STEPS = 50  # of FLUX.2, whose shift depends on their number
# What decides its sigmas. Listed, so that a later diffusers with one more default does not make the same schedule another.
SETTINGS = (
    "num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len",
    "max_image_seq_len", "invert_sigmas", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas",
    "use_beta_sigmas", "time_shift_type", "stochastic_sampling",
)  # fmt: skip
# Entries that make it another kind of sampler, and what they must be: its sigmas grow, or its steps draw noise of their own.
UNFIT = {"invert_sigmas": False, "stochastic_sampling": False}


def read_config(root: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of model directory `root` with `overrides`; a ValueError if it is of another kind."""
    import diffusers

    path = root / SCHEDULER_FILE
    schedule = files.read_object(path)
    if (name := schedule.get("_class_name")) != SCHEDULER:
        raise ValueError(f"{path} is of a {name}, and a flow-matching model is sampled by a {SCHEDULER}. {OWN_FILE}")
    known = inspect.signature(getattr(diffusers, SCHEDULER)).parameters
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"pretrained.scheduler has {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return schedule | dict(overrides)


def make_scheduler(schedule: Mapping[str, Any]) -> "FlowMatchEulerDiscreteScheduler":
    """The scheduler; a ValueError if diffusers cannot make it."""
    import diffusers

    try:
        return getattr(diffusers, SCHEDULER).from_config(schedule)
    except Exception as error:  # of any kind: the file may hold anything
        raise ValueError(f"{SCHEDULER} cannot be made of this scheduler's settings: {error}") from None


def decisive(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a schedule that decide a sampler's steps, with the defaults filled in."""
    resolved, own = make_scheduler(schedule).config, {key: value for key, value in schedule.items() if key[0] != "_"}
    return own | {key: resolved[key] for key in SETTINGS}


@dataclass(frozen=True)
class FlowSchedule:
    """The sigmas with which a model draws images of one size, as its pipeline in diffusers has them."""

    config: Mapping[str, Any]  # of its scheduler
    num_tokens: int  # patches of an image, by which a dynamic shift grows
    family: str

    def shift(self, num_steps: int) -> float | None:
        """mu, the logarithm of a dynamic shift's factor; None if the shift is the same for all images."""
        if not self.config.get("use_dynamic_shifting"):
            return None
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        if self.family == "flux2":
            return compute_empirical_mu(self.num_tokens, num_steps)
        resolved = make_scheduler(self.config).config
        ends = {key: resolved[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")}
        first, last, *shifts = ends.values()
        if not all(isinstance(end, int | float) for end in ends.values()) or first == last:
            raise ValueError(f"the scheduler shifts by the size of images, but cannot with {ends}. {OWN_FILE}")
        return calculate_shift(self.num_tokens, first, last, *shifts)

    def scheduler(self, num_steps: int, device: torch.device | str = "cpu") -> "FlowMatchEulerDiscreteScheduler":
        """The scheduler, set to `num_steps` steps. A ValueError if its sigmas do not fall from noise to image."""
        scheduler, sigmas = make_scheduler(self.config), None
        if self.family in EVENLY_SPACED:
            sigmas = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()
        scheduler.set_timesteps(num_steps, device=device, sigmas=sigmas, mu=self.shift(num_steps))
        falling = scheduler.sigmas.diff() < 0
        if not falling.all() or scheduler.sigmas[0] > 1:
            shown = ", ".join(f"{sigma:.3g}" for sigma in scheduler.sigmas[:3].tolist())
            raise ValueError(
                f"the scheduler's sigmas of {num_steps} steps must fall from at most 1, and are {shown}, …. {OWN_FILE}"
            )
        return scheduler

    def table(self, num_steps: int, eta: float, sde: str, steps: Sequence[int] | None = None) -> Transitions:
        """The transitions of a sampler with `num_steps` steps, or only `steps` of them, and noise level `eta`."""
        scheduler = self.scheduler(num_steps)
        chosen = list(range(num_steps) if steps is None else steps)
        sigmas = scheduler.sigmas[[*chosen, num_steps]]  # the last one is the image's
        return make_transitions(scheduler.timesteps[chosen], sigmas, eta=eta, sde=sde)

    def levels(self) -> NoiseLevels:
        """A noise level for each training timestep. They are shifted, so that all steps of a sampler have about as many."""
        scheduler = make_scheduler(self.config)
        sigmas, mu = scheduler.sigmas.flip(0), self.shift(USUAL_STEPS)  # from the least noise up, a static shift applied
        sigmas = sigmas if mu is None else scheduler.time_shift(mu, 1.0, sigmas.double())
        return make_noise_levels(sigmas * scheduler.config.num_train_timesteps, sigmas)


# ---- whether its steps can be trained ----


def require_trainable(schedule: FlowSchedule, model: ModelSettings, sampling: Sampling, window: Window | None) -> None:
    """Raise a ValueError if this sampler cannot be used, or if a step in `window` has no log-probability.

    It names what works. `window` is None if no step needs one.
    """
    resolved = make_scheduler(schedule.config).config
    if unfit := {key: value for key, value in UNFIT.items() if resolved[key] != value}:
        entries = dict(model.scheduler) | unfit
        raise ValueError(
            f"the scheduler of {model.name} has {min(unfit)} {resolved[min(unfit)]}, and so is no flow-matching sampler. "
            f'This works: --config.pretrained.scheduler="{entries}"'
        )
    table = schedule.table(sampling.num_steps, sampling.eta, sampling.sde)
    trained = table.rows(window.start, window.stop) if window else table.rows(0, 0)
    if silent := trained.timesteps[trained.sigma <= 0].tolist():
        last = sampling.num_steps - 1
        raise ValueError(
            f"the steps from t = {silent} add no noise, so they have no log-probability: with sample.sde {sampling.sde} the "
            f"last step has none. Take windows that end before it (split_stop={last}; with curriculum=early "
            f"split_step_right={last} or less), or sample.sde=flow."
        )
