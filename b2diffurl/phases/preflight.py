"""Checks at the start of every sample phase: what a later phase would refuse is refused before hours of work are lost."""

from dataclasses import replace
from importlib.util import find_spec

from b2diffurl.configuration import recorded
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.prompts import load_prompts
from b2diffurl.configuration.settings import Settings
from b2diffurl.evaluation.features import check_features
from b2diffurl.evaluation.generate import deployed_sampler
from b2diffurl.models import base_identity, family
from b2diffurl.rewards import check_rewards, file_checksums
from b2diffurl.runtime import files


def check_later_phases(plan: Plan) -> None:
    """Raise the error that selecting, training or judging would raise later, as far as it shows without loading a model."""
    settings = plan.settings
    if not plan.stage.finished(
        "train"
    ):  # every phase refuses it on loading, and what is finished need not wait for the check
        family(settings.model).check(settings.model)
    check_optimizer(settings)
    check_rewards([*settings.rewards.weights, *settings.rewards.watched], settings.rewards, plan.prompts)
    if settings.judging.judge:
        # The judge scores held-out prompts, too, and may be unable to read one of them.
        held_out = load_prompts(settings.prompts.held_out_file)
        check_rewards([settings.judging.judge], settings.rewards, [*plan.prompts, *held_out])
    for name in settings.judging.diversity:
        check_features(name, settings.judging, settings.rewards, plan.prompts)
    check_sampler(plan, plan.num_trained_steps)
    deployed_sampler(settings)  # for the error that it raises if diffusers has no such scheduler


def check_base_model(plan: Plan) -> None:
    """Raise the error that loading the base model and sampling by it would raise in any stage, as far as its files show.

    Nothing is downloaded and no weights are loaded. A model that is not on this machine passes.
    """
    model = plan.settings.model
    family(model).check(model)
    if family(model).sizes(model):  # its files are here
        check_sampler(plan, max(Budget.of(plan.settings).planned_steps(plan.stage.root)))


def check_sampler(plan: Plan, num_trained_steps: int) -> None:
    """Raise a ValueError if the last S steps of training's sampler cannot be trained with the base model's scheduler."""
    settings = plan.settings
    family(settings.model).check_sampler(settings.model, settings.sampling, num_trained_steps)


def identified(plan: Plan, *, base_model: bool = True) -> Plan:
    """The plan with checksums of the base model and of the rewards in its record, compared with the experiment's.

    A ValueError names the part or the reward that is another. This reads gigabytes, so a finished phase leaves it out, and
    a phase that loads no `base_model` leaves out that.
    """
    rewards = plan.settings.rewards
    found = {"rewards": {name: files.digest(file_checksums(name, rewards)) for name in rewards.weights}}
    if base_model:
        found["base_model"] = base_identity(plan.settings.model)
    return replace(plan, record=recorded.identified(plan.record, found))


def check_optimizer(settings: Settings) -> None:
    """Raise an ImportError if the optimizer's package is not installed."""
    if settings.training.optimizer.use_8bit and not find_spec("bitsandbytes"):
        raise ImportError("train.use_8bit_adam is True, which needs bitsandbytes: pip install bitsandbytes")
