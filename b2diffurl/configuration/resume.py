"""Which LoRA a stage starts from, and which steps it trains.

How a run that was stopped goes on is elsewhere: each phase skips what is on disk already (Stage.finished, and the phases).
"""

from pathlib import Path

from b2diffurl.algorithm.window import Window
from b2diffurl.configuration.limits import naming
from b2diffurl.configuration.settings import Schedule
from b2diffurl.experiment.folder import find_lora
from b2diffurl.experiment.stage import LORA_FILE, Stage, finished_stages
from b2diffurl.runtime import files


def resume_source(stage: Stage, resume_from: str) -> Path | None:
    """The LoRA file that a stage starts from; None: a fresh LoRA.

    A stage goes on from the last checkpoint of the stage before it. `resume_from` ("": not given) is where a run starts. It
    is used for stage 0, for a stage whose predecessor is not in this experiment, and to choose an earlier checkpoint of the
    predecessor. An experiment that began from another LoRA than this one is refused.
    """
    given = Path(resume_from) if resume_from else None
    before = Stage(stage.root, stage.index - 1)
    if given is not None:
        check_beginning(stage.root, given)
    in_predecessor = given is not None and given.resolve().is_relative_to(before.folder.resolve())
    if stage.index > 0 and not in_predecessor:
        if before.finished("train"):
            before.verify("train", "checkpoints")
            return before.checkpoints()[-1] / LORA_FILE
        if given is None or before.folder.exists():
            raise ValueError(f"{stage.folder} follows {before.folder}, which is not trained yet. Run that stage first.")
    if given is None:
        return None
    with naming("resume_from"):
        return find_lora(given)


def check_beginning(root: Path, given: Path) -> None:
    """Refuse a LoRA to start from that is not the one the experiment in folder `root` began with: it would have no effect.

    One of the experiment's own checkpoints passes: a later stage may start from it.
    """
    begun = finished_stages(root, "sample")
    if not begun or given.resolve().is_relative_to(root.resolve()):
        return
    recorded = begun[0].manifest("sample").get("policy", {}).get("lora_sha256")  # "": a fresh LoRA
    with naming("resume_from"):
        lora = find_lora(given)
    if recorded is not None and files.sha256(lora) != recorded:
        began = "another LoRA" if recorded else "a fresh LoRA"
        raise ValueError(
            f"resume_from is {given}, but {root} began from {began}, and goes on from its own last checkpoint. Leave "
            "resume_from out to go on, or give another exp_name to start from that LoRA."
        )


def trained_window(stage: Stage, schedule: Schedule) -> Window:
    """The window of this stage: as it was sampled, or by the schedule if it is not sampled yet.

    A ValueError if the stage was sampled with another window than split_step asks for.
    """
    wanted = schedule.window(stage.index)
    recorded = stage.sampled_window(schedule.num_steps) or wanted
    if schedule.given and recorded != wanted:
        raise ValueError(
            f"{stage.folder} was sampled with the trained window {recorded}, not {wanted} of split_step {schedule.given}. "
            "Use another exp_name."
        )
    return recorded
