"""The loop of a run: which scripts are called, and in which order.

start.py prints the calls for run_process.sh, which makes them. resident.py makes them in one process. The forecast counts
those that are left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Call:
    """One call of run_<script>.py: a phase of a stage, or an evaluation after a stage or at the end of the run."""

    script: str  # sample | select | train | eval
    stage: int | None = None  # None: the evaluation at the end of the run
    prompts: tuple[str, ...] = ()  # prompt sets of the evaluation at the end
    sampler: str = ""  # sampler of the evaluation at the end
    needs: str = "."  # a file in the experiment's folder; if it is missing the run stops before this call, and waits for it

    @property
    def flags(self) -> list[str]:
        """The flags of this call, in addition to the flags of the run."""
        if self.stage is None:
            return ["--checkpoint=base,last", f"--prompts={','.join(self.prompts)}", f"--sampler={self.sampler}"]
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
            last = f"stage{num_stages - 1}"
            return {(checkpoint, prompts, self.sampler) for checkpoint in ("base", last) for prompts in self.prompts}
        due = every and (self.stage + 1) % every == 0
        return {("base", "test", "training"), (f"stage{self.stage}", "test", "training")} if due else set()


def calls(num_stages: int, *, waits: bool = False) -> Iterator[Call]:
    """All calls of a run of `num_stages` stages, in order. A call whose work is already done skips it.

    `waits`: scores are made elsewhere (reward `file`), so the run stops before training until a stage's scores are there.
    """
    for stage in range(num_stages):
        yield Call("sample", stage)
        yield Call("select", stage)
        yield Call("train", stage, needs=f"stage{stage}/select.json" if waits else ".")
        yield Call("eval", stage)
    yield Call("eval", prompts=("train", "test"), sampler="training")
    yield Call("eval", prompts=("test",), sampler="deployed")
