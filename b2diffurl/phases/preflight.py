"""Checks at the start of every sample phase: what a later phase would refuse is refused before hours of work are lost."""

from importlib.util import find_spec

from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.configuration.settings import Settings
from b2diffurl.evaluation.features import check_features
from b2diffurl.evaluation.generate import SAMPLERS
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
    if settings.judging.judge:
        # The judge scores held-out prompts, too, and may be unable to read one of them.
        held_out = load_prompts(settings.prompts.held_out_file)
        check_rewards([settings.judging.judge], settings.rewards, [*plan.prompts, *held_out])
    for name in settings.judging.diversity:
        check_features(name, settings.judging, settings.rewards, plan.prompts)
    check_sampler(plan, plan.window)
    for sampler in SAMPLERS.values():
        sampler(settings)  # for the error that it raises if diffusers has no such scheduler


def check_optimizer(settings: Settings) -> None:
    """Raise an ImportError if the optimizer's package is not installed."""
    if settings.training.optimizer.use_8bit and not find_spec("bitsandbytes"):
        raise ImportError("train.use_8bit_adam is True, which needs bitsandbytes: pip install bitsandbytes")
