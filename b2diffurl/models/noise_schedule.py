"""A model's noise schedule, from its scheduler_config.json, and the DDIM sampler on it whose steps are trained.

Training samples by DDIM, whatever the class of the model's own scheduler: schedulers of one model share the noise schedule,
which is all that is taken from the file. `pretrained.scheduler` gives further entries, which count as if they stood in it.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b2diffurl.algorithm.ddim import make_noise_levels, make_transitions
from b2diffurl.algorithm.noising import NoiseLevels
from b2diffurl.algorithm.transition import Transitions
from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.settings import ModelSettings, Sampling
from b2diffurl.runtime import files

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

SCHEDULER_FILE = Path("scheduler", "scheduler_config.json")  # in a model directory
OWN_FILE = "Get the model's own scheduler_config.json."
# Entries that can make a model trainable and leave its noise schedule: no clipping, and steps that end above t = 0.
REMEDIES = {
    "clip_sample": False,
    "thresholding": False,
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
DDIM_SETTINGS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "timestep_spacing", "steps_offset", "set_alpha_to_one", "clip_sample", "thresholding",
)  # fmt: skip


def read_config(root: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The scheduler_config.json of model directory `root` with `overrides`; a ValueError if it is of another kind."""
    import diffusers

    path = root / SCHEDULER_FILE
    schedule = files.read_object(path)
    name = str(schedule.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and name.endswith("Scheduler")):
        raise ValueError(f"{path} names the class {name!r}, which is not a scheduler of diffusers. {OWN_FILE}")
    # For a class whose package is not installed diffusers has a dummy without parameters; then the entries have to do.
    known = {*(schedule if hasattr(kind, "_backends") else inspect.signature(kind).parameters)}
    if "beta_schedule" not in known:
        raise ValueError(
            f"{path} is of a {name}, which is not made of betas, so DDIM cannot take its noise schedule. {OWN_FILE}"
        )
    known |= {*inspect.signature(diffusers.DDIMScheduler).parameters}
    if unknown := sorted(overrides.keys() - known):
        raise ValueError(f"pretrained.scheduler has {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return schedule | dict(overrides)


def stock_scheduler(schedule: Mapping[str, Any]) -> Any:
    """The diffusers scheduler of the model's own class."""
    import diffusers

    return getattr(diffusers, schedule["_class_name"]).from_config(schedule)


def make_ddim(schedule: Mapping[str, Any]) -> "DDIMScheduler":
    """DDIM on a model's noise schedule; a ValueError if diffusers cannot make it."""
    from diffusers import DDIMScheduler

    try:
        return DDIMScheduler.from_config(schedule)
    except Exception as error:  # of any kind: the file may hold anything
        raise ValueError(f"DDIM cannot be made of this scheduler's settings: {error}") from None


def decisive(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a schedule that decide a sampler's steps, with DDIM's defaults filled in.

    They are listed, so that a later diffusers with one more default does not make the same schedule another.
    """
    resolved, own = make_ddim(schedule).config, {key: value for key, value in schedule.items() if not key.startswith("_")}
    return own | {key: resolved[key] for key in DDIM_SETTINGS}


def make_table(scheduler: "DDIMScheduler", num_steps: int, eta: float, steps: Sequence[int] | None = None) -> Transitions:
    """The table of DDIM's transitions with `num_steps` steps, or only `steps` of them, and noise level `eta`."""
    num_timesteps = len(scheduler.alphas_cumprod)
    scheduler.set_timesteps(num_steps)
    # The scheduler's offset can move the first timestep past the end, where diffusers would read no alpha.
    if scheduler.timesteps.max() >= num_timesteps:
        raise ValueError(f"sample.num_steps is {num_steps}; it must be less than this model's {num_timesteps} timesteps")
    return make_transitions(
        scheduler.timesteps if steps is None else scheduler.timesteps[list(steps)],
        scheduler.alphas_cumprod,
        scheduler.final_alpha_cumprod,
        eta=eta,
        prediction_type=scheduler.config.prediction_type,
    )


def make_levels(scheduler: "DDIMScheduler") -> NoiseLevels:
    """The table of noise levels, one for each training timestep."""
    return make_noise_levels(scheduler.alphas_cumprod, prediction_type=scheduler.config.prediction_type)


# ---- whether its steps can be trained ----


def require_trainable(schedule: Mapping[str, Any], model: ModelSettings, sampling: Sampling, window: Window | None) -> None:
    """Raise a ValueError if DDIM with the model's `schedule` cannot be trained.

    It names entries of pretrained.scheduler that mend it, which are found by trying them on this very schedule.
    """
    reason = why_untrainable(schedule, sampling, window)
    if not reason:
        return
    mended = (entries for entries in remedies(schedule) if not why_untrainable(schedule | entries, sampling, window))
    entries, remedy = next(mended, None), "No entry of pretrained.scheduler mends it."
    if entries:
        remedy = f'This works: --config.pretrained.scheduler="{dict(model.scheduler) | entries}"'
    if window and (stop := last_noisy(schedule, sampling, window)):
        remedy = f"{remedy}, or let windows end before them: --config.split_stop={stop}"
    raise ValueError(f"the scheduler of {model.name} cannot be trained with: {reason}. {remedy}")


def last_noisy(schedule: Mapping[str, Any], sampling: Sampling, window: Window) -> int:
    """The step before which a window must end to be trainable, if only its last step has no noise; else 0."""
    stop = window.stop - 1
    return stop if stop > window.start and not why_untrainable(schedule, sampling, Window(window.start, stop)) else 0


def remedies(schedule: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Combinations of REMEDIES that the schedule does not have yet, the smallest first."""
    news = {key: value for key, value in REMEDIES.items() if schedule.get(key) != value}
    for count in range(1, len(news) + 1):
        for keys in combinations(news, count):
            yield {key: news[key] for key in keys}


def why_untrainable(schedule: Mapping[str, Any], sampling: Sampling, window: Window | None) -> str:
    """Why DDIM's steps in `window` have no log-probability with this schedule, in words; "" if all have one.

    Without a window none of them needs one. Every step needs a finite prediction of the image in any case.
    """
    for key in ("clip_sample", "thresholding"):
        if schedule.get(key, key == "clip_sample"):  # diffusers' default is on for clip_sample, off for thresholding
            state = "on" if key in schedule else "not given, and on by DDIM's default"
            return f"{key} is {state}, but latents must not be clipped"
    try:
        table = make_table(make_ddim(schedule), sampling.num_steps, sampling.eta)
    except ValueError as error:
        return str(error)
    finite = table.a.isfinite() & table.b.isfinite() & table.sigma.isfinite()
    if not finite.all():
        kind, steps = schedule.get("prediction_type", "epsilon"), table.timesteps[~finite].tolist()
        return f"at t = {steps} there is no signal (alpha_bar is 0), and a prediction of {kind} gives no image there"
    trained = table.rows(window.start, window.stop) if window else table.rows(0, 0)
    silent = trained.timesteps[trained.sigma <= 0].tolist()
    return f"the steps from t = {silent} add no noise (sigma = 0), so they have no log-probability" if silent else ""
