"""What the settings lead to, the base model and the rewards: whether it can be used, and whether it is still the same."""

from dataclasses import replace

from b2diffurl.configuration import recorded
from b2diffurl.configuration.budget import Budget
from b2diffurl.configuration.plan import Plan
from b2diffurl.models import base_identity, family
from b2diffurl.rewards import file_checksums
from b2diffurl.runtime import files


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
