"""Refuse at the start what a later phase would refuse, before hours of work are lost to it."""

from importlib.util import find_spec

from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.configuration.settings import Settings
from b2diffurl.evaluation.features import check_features
from b2diffurl.evaluation.generate import deployed_sampler
from b2diffurl.rewards import check_rewards


def check_later_phases(plan: Plan) -> None:
    """Refuse what selecting, training or judging would refuse. What needs the model itself comes after it is loaded."""
    settings = plan.settings
    check_optimizer(settings)
    check_rewards([*settings.rewards.weights, *settings.rewards.watched], settings.rewards, plan.prompts)
    if settings.judging.judge:
        held_out = load_prompts(settings.prompts.held_out_file)
        check_rewards([settings.judging.judge], settings.rewards, [*plan.prompts, *held_out])
    for name in settings.judging.diversity:
        check_features(name, settings.judging, settings.rewards, plan.prompts)
    deployed_sampler(settings)


def check_optimizer(settings: Settings) -> None:
    """Refuse an optimizer that is not installed, before there is something to train on."""
    if settings.training.optimizer.use_8bit and not find_spec("bitsandbytes"):
        raise ImportError("train.use_8bit_adam is True, which needs bitsandbytes: pip install bitsandbytes")
