"""Checks at the start of every sample phase: what a later phase would refuse is refused before hours of work are lost."""

from collections.abc import Sequence
from importlib.util import find_spec

from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import named_prompts
from b2diffurl.configuration.settings import Settings
from b2diffurl.evaluation.features import check_features
from b2diffurl.evaluation.generate import SAMPLERS
from b2diffurl.evaluation.measure import named_scorers
from b2diffurl.models import check_base
from b2diffurl.phases.inputs import check_sampler
from b2diffurl.rewards import check_rewards


def check_later_phases(plan: Plan) -> None:
    """Raise the error that selecting, training or judging would raise later, as far as it shows without loading a model."""
    settings = plan.settings
    # A finished stage need not wait for this. Whatever loads the model later refuses the same.
    if not plan.stage.finished("train"):
        check_base(settings.model)
    check_optimizer(settings)
    check_rewards([*settings.rewards.weights, *settings.rewards.watched], settings.rewards, plan.prompts)
    check_judge(settings, plan.prompts)
    check_held_out_prompts(settings)
    for name in settings.judging.diversity:
        check_features(name, settings.judging, settings.rewards, plan.prompts)
    check_sampler(plan, plan.window)
    for sampler in SAMPLERS.values():
        sampler(settings)  # for the error that it raises if diffusers has no such scheduler


def check_judge(settings: Settings, prompts: Sequence[str]) -> None:
    """Raise a ValueError that names eval.judge if the judge cannot score one of the training prompts."""
    if judge := settings.judging.judge:
        try:
            check_rewards([judge], settings.rewards, prompts)
        except ValueError as error:
            raise ValueError(
                f"eval.judge, {judge}, cannot score the prompts (--config.eval.judge= is none): {error}"
            ) from None


def check_held_out_prompts(settings: Settings) -> None:
    """Raise a ValueError that names eval.prompt_file if the judge, or another reward, cannot score one of its prompts.

    All of them do when a checkpoint is judged.
    """
    prompts = [prompt for _, prompt in named_prompts(settings.prompts, "test")]
    try:
        check_rewards(named_scorers(settings), settings.rewards, prompts)
    except ValueError as error:
        path = settings.prompts.held_out_file
        raise ValueError(f"eval.prompt_file, {path}, has held-out prompts that cannot be scored: {error}") from None


def check_optimizer(settings: Settings) -> None:
    """Raise an ImportError if the optimizer's package is not installed."""
    if settings.training.optimizer.use_8bit and not find_spec("bitsandbytes"):
        raise ImportError("train.use_8bit_adam is True, which needs bitsandbytes: pip install bitsandbytes")
