"""What of a run is done already. Its calls are left out, so that a run goes on at once, however many stages are finished.

What these calls would still do is done here for all of them together: check what the stages were made from, delete what a
killed phase has left, write the report again.
"""

from collections.abc import Sequence
from dataclasses import replace

from b2diffurl.configuration.loop import Call, calls
from b2diffurl.configuration.plan import Plan
from b2diffurl.configuration.resume import trained_window
from b2diffurl.experiment import lock
from b2diffurl.experiment.origin import require_origin
from b2diffurl.experiment.stage import ReadOnce, Stage, finished_stages
from b2diffurl.phases import select, train
from b2diffurl.phases.preflight import check_later_phases
from b2diffurl.phases.sample import restore_record
from b2diffurl.runtime.logs import logger


def calls_left(plan: Plan) -> list[Call]:
    """The calls of the run from the first phase that is not finished, in order; the others are checked and tidied up.

    Before them comes the evaluation of the newest trained stage if one is due there: it may have been interrupted. A
    ValueError names a finished stage that does not fit the others, or what a later phase would refuse.
    """
    loop = list(calls(plan.settings))
    first = next(n for n, call in enumerate(loop) if not is_done(plan, call))
    done, left = loop[:first], loop[first:]
    trained = finished_stages(plan.stage.root, "train")
    due = [] if left[0].stage is None else [call for call in done if is_due(plan, call, trained)]  # the end judges it, too
    check_done(plan, done)
    if done and left[0].script != "sample":  # which checks this itself
        stage = Stage(plan.stage.root, done[-1].stage if left[0].stage is None else left[0].stage)
        check_later_phases(replace(plan, stage=stage, window=trained_window(stage, plan.settings.schedule)))
    if lock.owner():  # the first machine does it for all
        tidy_up(plan, done)
        if trained and not due and left[0].stage is not None:
            from b2diffurl.phases.evaluate import show  # imports matplotlib, for which a new run need not wait

            show(plan.settings)  # the run may have been killed before
    for call in done:
        if call.script != "eval" and call.stage == left[0].stage:
            logger.info("stage%d %s: already finished", call.stage, call.script)
    return [*due, *left]


def is_done(plan: Plan, call: Call) -> bool:
    """Whether a phase is finished. Evaluations after a stage count as done, and those at the end do not."""
    return call.stage is not None and (call.script == "eval" or Stage(plan.stage.root, call.stage).finished(call.script))


def is_due(plan: Plan, call: Call, trained: Sequence[Stage]) -> bool:
    """Whether the call evaluates the newest trained stage."""
    newest = bool(trained) and trained[-1].index == call.stage
    return newest and bool(call.evaluations(plan.settings.schedule.num_stages, plan.settings.judging.every))


def check_done(plan: Plan, done: Sequence[Call]) -> None:
    """Raise a ValueError for a finished phase that was made from something else than is there now, or that lacks files.

    Checkpoints are compared by size. Whatever uses one compares its checksum.
    """
    look = ReadOnce(plan.stage.root, 0)
    for call in done:
        stage = replace(look, index=call.stage)
        if call.script == "sample":
            trained_window(stage, plan.settings.schedule)
            require_origin(stage)
        elif call.script == "train":
            stage.verify("train", "checkpoints", by_size=True)


def tidy_up(plan: Plan, done: Sequence[Call]) -> None:
    """Do what a run that was killed between a phase's manifest and its end has not done. Write a lost config.json again."""
    for call in done:
        of_stage = replace(plan, stage=Stage(plan.stage.root, call.stage))
        match call.script:
            case "sample":
                restore_record(of_stage)
            case "select":
                select.clean_up(of_stage)
            case "train":
                train.clean_up(of_stage)
