"""How far forecasts of a run's time are off: each one that real runs log, against what the rest really took.

python -m benchmarks.forecast run FOLDER         # 8 small runs of the shapes' presets, a minute or two each
python -m benchmarks.forecast run FOLDER --only sliding   # those that are named
python -m benchmarks.forecast run FOLDER --development    # other runs, for choosing the constants of reporting/forecast.py
python -m benchmarks.forecast table FOLDER       # of what was run: errors, and how many ranges held

Some runs are stopped half-way and gone on with: then the plan's line has a forecast, too.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from b2diffurl.runtime.paths import SHIPPED

GROUPS = 12  # in a batch, instead of 32
SECONDS = {"s": 1, "min": 60, "h": 3600, "days": 86400}
FORECAST = re.compile(r"about ([\d.]+) (s|min|h|days) \(([\d.]+)(?: (s|min|h|days))? to ([\d.]+) (s|min|h|days)\)")
KINDS = {"first batch": "after the first batch", " done: ": "after a stage", "plan: ": "when a run goes on"}


@dataclass(frozen=True)
class Run:
    """A small run: what it changes of a preset, and after which words in the log it is stopped and gone on with."""

    preset: str
    stages: int
    batches: int  # in a stage
    judged: int  # images of an evaluation
    every: int = 0  # stages between two evaluations
    stop_after: str = ""
    more: dict[str, Any] = field(default_factory=dict)

    def command(self, folder: Path, name: str) -> list[str]:
        settings = {"exp_name": name, "save_path": folder, "log_path": folder, "num_threads": 1, "stage_cnt": self.stages}
        settings |= {"sample.num_batches_per_epoch": self.batches, "eval.num_images": self.judged, "eval.every": self.every}
        settings |= {"sample.batch_size": GROUPS, "eval.batch_size": 32}
        flags = [f"--config.{key}={value}" for key, value in (settings | self.more).items()]
        return ["bash", str(SHIPPED / "run_process.sh"), *flags]


SHORT = {"train.num_epochs": 2, "train.save_interval": 2}
DEVELOPMENT = {
    "nft": Run("shapes", 3, 2, 32, more=SHORT),
    "flow": Run("shapes_flow", 4, 1, 32, 1, "stage1 done", SHORT),
    "ddpo": Run("shapes_ddpo", 3, 1, 32, 1),
    "growing": Run("shapes_ddpo", 4, 1, 32, 2, more={"split_step_left": 4}),
    "b2": Run("b2", 5, 1, 32, 0, "stage2 done"),
    "b2_nft": Run("b2_nft", 4, 1, 32, 2),
}
REPORTED = {
    "nft_long": Run("shapes", 5, 2, 32, 2, "stage2 done"),
    "nft_one": Run("shapes", 1, 4, 64),
    "flow_long": Run("shapes_flow", 4, 2, 32, 2),
    "ddpo_pairs": Run("shapes_ddpo", 3, 2, 32, 0, "stage0 done"),
    "sliding": Run("shapes", 4, 1, 32, 1, more={"curriculum": "sliding", "split_stop": 0, **SHORT}),
    "growing_far": Run("shapes_ddpo", 4, 1, 32, 3, more={"split_step_left": 2}),
    "all": Run("ddpo", 3, 1, 32, 1),
    "b2_nft_few": Run("b2_nft", 6, 1, 16, 3, "stage3 done"),
}


def make(folder: Path, name: str, run: Run) -> None:
    """Make a run and write <name>.lines.json: its parts, each a list of (seconds since 1970, line), the last one its end."""
    parts = [one(run.command(folder, name), run.preset, run.stop_after)]
    if run.stop_after:
        parts.append(one(run.command(folder, name), run.preset, ""))
    (folder / f"{name}.lines.json").write_text(json.dumps(parts))


def one(command: list[str], preset: str, stop_after: str) -> list[tuple[float, str]]:
    """The lines of one process with their times; it is stopped after a line with `stop_after`."""
    environment = os.environ | {"Preset": preset, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    how = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    lines = []
    with subprocess.Popen(command, **how) as process:
        for line in process.stdout:
            lines.append((time.time(), line.rstrip()))
            if stop_after and stop_after in line:
                process.terminate()
    return [*lines, (time.time(), f"ended with {process.returncode}")]


@dataclass(frozen=True)
class Forecast:
    """One forecast, all in seconds, and what the rest really took."""

    run: str
    kind: str  # one of KINDS
    low: float
    middle: float
    high: float
    actual: float

    @property
    def error(self) -> float:
        """How much longer it took, as a logarithm."""
        return math.log(self.actual / self.middle)


def forecasts(name: str, parts: list[list[tuple[float, str]]]) -> Iterator[Forecast]:
    """Each forecast of a run. A part that was stopped goes on with the next one: what lies between does not count.

    What a forecast after the first batch tells is the time of the whole run from then on.
    """
    spans = [part[-1][0] - part[0][0] for part in parts]
    for number, part in enumerate(parts):
        for when, line in part:
            if found := FORECAST.search(line):
                middle, low, high = found.group(1, 2), found.group(3, 4), found.group(5, 6)
                values = [float(value) * SECONDS[unit or high[1]] for value, unit in (low, middle, high)]
                kind = next(said for words, said in KINDS.items() if words in line)
                yield Forecast(name, kind, *values, part[-1][0] - when + sum(spans[number + 1 :]))


def table(folder: Path) -> str:
    """Markdown: a row for each kind of forecast, and one for all."""
    found = [
        one
        for path in sorted(folder.glob("*.lines.json"))
        for one in forecasts(path.name.partition(".")[0], json.loads(path.read_text()))
    ]
    rows = [
        "| forecast | how many | range held | median error | largest | median width of the range |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS.values(), "all"):
        if chosen := [one for one in found if kind in (one.kind, "all")]:
            held = sum(one.low <= one.actual <= one.high for one in chosen)
            errors = [abs(one.actual / one.middle - 1) for one in chosen]
            width = median(one.high / one.low for one in chosen)
            rows.append(
                f"| {kind} | {len(chosen)} | {held} ({held / len(chosen):.0%}) | {median(errors):.0%} | {max(errors):.0%} "
                f"| {width:.1f}-fold |"
            )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--only", nargs="*", default=())
    given = parser.parse_args()
    runs = DEVELOPMENT if given.development else REPORTED
    for name, run in runs.items() if given.what == "run" else ():
        if not given.only or name in given.only:
            given.folder.mkdir(parents=True, exist_ok=True)
            make(given.folder.absolute(), name, run)
    print(table(given.folder))


if __name__ == "__main__":
    main()
