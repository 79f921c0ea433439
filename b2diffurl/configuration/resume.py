"""Which LoRA a stage starts from, and how many steps it trains.

How a run that was stopped goes on is elsewhere: each phase skips what is on disk already (Stage.finished, and the phases).
"""

from pathlib import Path

from b2diffurl.configuration.settings import Schedule
from b2diffurl.experiment.folder import find_lora
from b2diffurl.experiment.stage import LORA_FILE, Stage


def resume_source(stage: Stage, resume_from: str) -> Path | None:
    """The LoRA file that a stage starts from; None: a fresh LoRA.

    A stage goes on from the last checkpoint of the stage before it. `resume_from` ("": not given) is where a run starts. It
    is used for stage 0, for a stage whose predecessor is not in this experiment, and to choose an earlier checkpoint of the
    predecessor.
    """
    given = Path(resume_from) if resume_from else None
    before = Stage(stage.root, stage.index - 1)
    in_predecessor = given is not None and given.resolve().is_relative_to(before.folder.resolve())
    if stage.index > 0 and not in_predecessor:
        if before.finished("train"):
            before.verify("train", "checkpoints")
            return before.checkpoints()[-1] / LORA_FILE
        if given is None or before.folder.exists():
            raise ValueError(f"{stage.folder} follows {before.folder}, which is not trained yet. Run that stage first.")
    return None if given is None else find_lora(given)


def trained_steps(stage: Stage, schedule: Schedule) -> int:
    """S of this stage: as it was sampled, or by the schedule if it is not sampled yet.

    A ValueError if the stage was sampled with another S than split_step asks for.
    """
    wanted = schedule.num_trained_steps(stage.index)
    if not stage.finished("sample"):
        return wanted
    recorded = stage.manifest("sample")["num_trained_steps"]
    if schedule.given and recorded != wanted:
        raise ValueError(f"{stage.folder} was sampled with split_step {recorded}, not {wanted}. Use another exp_name.")
    return recorded
