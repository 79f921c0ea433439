"""The loop of a run: which scripts are called, and in which order.

start.py writes it down, run_process.sh and resident.py walk it, and the forecast counts what is left of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One call of run_<script>.py: of a phase of a stage, or of `eval` after a stage or at the end."""

    script: str  # sample | select | train | eval
    stage: int | None = None  # None: at the end of the run
    prompts: tuple[str, ...] = ()  # judged at the end
    sampler: str = ""  # by which they are judged at the end
    needs: str = "."  # what must be in the experiment's folder, or the run ends before this call and waits

    @property
    def flags(self) -> list[str]:
        """What the script is told beside the run's own flags."""
        if self.stage is None:
            return ["--checkpoint=base,last", f"--prompts={','.join(self.prompts)}", f"--sampler={self.sampler}"]
        return [f"--config.run_name=stage{self.stage}", *(["--due"] if self.script == "eval" else [])]

    def evaluations(self, num_stages: int, every: int) -> set[tuple[str, str, str]]:
        """(checkpoint, prompt set, sampler) of everything that an `eval` call judges, every `every` stages after a stage."""
        if self.script != "eval":
            return set()
        if self.stage is None:
            last = f"stage{num_stages - 1}"
            return {(checkpoint, prompts, self.sampler) for checkpoint in ("base", last) for prompts in self.prompts}
        due = every and (self.stage + 1) % every == 0
        return {("base", "test", "training"), (f"stage{self.stage}", "test", "training")} if due else set()


def calls(num_stages: int, *, waits: bool = False) -> Iterator[Call]:
    """Every call of a run of that many stages, in order. A call whose work is done already has nothing to do.

    A run that `waits` for scores made elsewhere (reward `file`) ends before training on a stage that is not selected yet.
    """
    for stage in range(num_stages):
        yield Call("sample", stage)
        yield Call("select", stage)
        yield Call("train", stage, needs=f"stage{stage}/select.json" if waits else ".")
        yield Call("eval", stage)
    yield Call("eval", prompts=("train", "test"), sampler="training")
    yield Call("eval", prompts=("test",), sampler="deployed")
