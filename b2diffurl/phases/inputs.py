"""What the settings lead to, the base model and the rewards: whether it can be used, and whether it is still the same."""

from dataclasses import replace

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration import recorded
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.recorded import exchanged
from b2diffurl.experiment.stage import finished_stages
from b2diffurl.models import base_identity, family
from b2diffurl.models.recognise import family_name
from b2diffurl.rewards import file_checksums
from b2diffurl.runtime import files
from b2diffurl.runtime.logs import logger


def check_sampler(plan: Plan, window: Window) -> None:
    """Raise a ValueError if the base model cannot be sampled so, or if a step in `window` cannot be trained."""
    settings = plan.settings
    needed = None if settings.training.objective.on_noised_images else window
    base = family(settings.model)
    base.check_sampler(settings.model, settings.sampling, needed)
    base.check_guidance(settings.model, settings.guidance_scales)


def identified(plan: Plan) -> Plan:
    """The plan with the base model's family and a checksum of each part in its record, compared with the experiment's.

    A ValueError names a part that is another. This reads gigabytes, so a finished phase leaves it out.
    """
    model = plan.settings.model
    return replace(plan, record=recorded.identified(plan.record, family_name(model), base_identity(model)))


def reward_checksums(plan: Plan) -> dict[str, str]:
    """{reward: a checksum of its files} of the rewards trained on: its model's files, or its code if it is the user's own.

    A ValueError names a reward that is another than the one by which the stage before was scored, unless changes are
    allowed. Within a stage it may change until the stage is scored: images do not depend on it, and a mistake can be mended.
    """
    rewards, stage = plan.settings.rewards, plan.stage
    now = {name: files.digest(file_checksums(name, rewards)) for name in rewards.weights}
    earlier = [one for one in finished_stages(stage.root, "select") if one.index < stage.index]
    before = earlier[-1].manifest("select").get("reward_files", {}) if earlier else {}
    for name in exchanged(before, now):
        said = f"the model or code of reward {name} is another than that of {earlier[-1].folder}"
        if not plan.record.content["config"]["allow_config_change"]:
            raise ValueError(
                f"{said}: its scores cannot be compared with the old ones. Put the old one back, or give the new experiment "
                "another exp_name; or, if you know what you do, --config.allow_config_change."
            )
        logger.warning("stage%d: %s", stage.index, said)
    return now
