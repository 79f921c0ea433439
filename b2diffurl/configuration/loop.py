"""The loop of a run: which scripts are called, and in which order.

start.py prints the calls for run_process.sh, which makes them. resident.py makes them in one process. The forecast counts
those that are left.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from b2diffurl.configuration.settings import Settings

ALL_SHOWN, GROWN = 20, 1.05  # see `is_shown`


@dataclass(frozen=True)
class Call:
    """One call of run_<script>.py: a phase of a stage, or an evaluation after a stage or at the end of the run."""

    script: str  # sample | select | train | eval
    stage: int | None = None  # None: the evaluation at the end of the run
    checkpoints: tuple[str, ...] = ()  # judged by the evaluation at the end
    prompts: tuple[str, ...] = ()  # prompt sets of an evaluation
    sampler: str = ""  # sampler of the evaluation at the end
    is_last: bool = False  # whether the run ends with it, and so with the verdict
    needs: str = "."  # a file in the experiment's folder; if it is missing the run stops before this call, and waits for it

    @property
    def flags(self) -> list[str]:
        """The flags of this call, in addition to the flags of the run."""
        if self.stage is None:
            lists = {"checkpoint": self.checkpoints, "prompts": self.prompts, "sampler": (self.sampler,)}
            given = [f"--{name}={','.join(values)}" for name, values in lists.items()]
            return [*([] if self.is_last else ["--noverdict"]), *given]
        return [f"--config.run_name=stage{self.stage}", *(["--due"] if self.script == "eval" else [])]

    def is_possible(self, root: Path) -> bool:
        """Whether what the call needs is in the experiment's folder `root`, which need not exist yet."""
        return self.needs == "." or (root / self.needs).exists()

    def evaluations(self, num_stages: int, every: int) -> set[tuple[str, str, str]]:
        """(checkpoint, prompt set, sampler) of each evaluation that this call makes; none if it is not an `eval`.

        After a stage there is one every `every` stages (0: never).
        """
        if self.script != "eval":
            return set()
        if self.stage is None:
            judged = [name.replace("last", f"stage{num_stages - 1}") for name in self.checkpoints]
            return {(checkpoint, prompts, self.sampler) for checkpoint in judged for prompts in self.prompts}
        due = every and (self.stage + 1) % every == 0
        judged = ("base", f"stage{self.stage}") if due else ()
        return {(checkpoint, prompts, "training") for checkpoint in judged for prompts in self.prompts}


def is_needed(call: Call, settings: Settings) -> bool:
    """Whether a script has to be started for a call: not to find that nothing is to be judged or shown after a stage."""
    if call.script != "eval" or call.stage is None:
        return True
    waits = settings.rewards.made_elsewhere
    return waits or is_shown(call.stage + 1) or bool(call.evaluations(settings.schedule.num_stages, settings.judging.every))


def is_shown(count: int) -> bool:
    """Whether report and trackers are made anew after this many stages, or evaluations.

    They are after each of the first 20, then whenever the run has grown by a twentieth. Each shows the whole run, and so all
    of them together take time in proportion to its length.
    """
    return count <= ALL_SHOWN or math.floor(math.log(count, GROWN)) > math.floor(math.log(count - 1, GROWN))


def calls(settings: Settings) -> Iterator[Call]:
    """All calls of a run, in order. A call whose work is already done skips it.

    If scores are made elsewhere (reward `file`) the run stops before training until a stage's scores are there. If training
    keeps an average of the LoRA it is judged at the end, too.
    """
    waits, held_out = settings.rewards.made_elsewhere, settings.prompts.meant("test")
    for stage in range(settings.schedule.num_stages):
        yield Call("sample", stage)
        yield Call("select", stage)
        yield Call("train", stage, needs=f"stage{stage}/select.json" if waits else ".")
        yield Call("eval", stage, prompts=(held_out,))
    # The LoRA itself comes last: run_eval.py --json prints the last result.
    judged = ("base", *(("last/ema",) if settings.training.optimizer.ema else ()), "last")
    yield Call("eval", checkpoints=judged, prompts=tuple(dict.fromkeys(("train", held_out))), sampler="training")
    yield Call("eval", checkpoints=judged, prompts=(held_out,), sampler="deployed", is_last=True)
