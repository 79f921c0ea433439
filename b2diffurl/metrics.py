"""Metrics as JSON lines: one event, one object; wandb on top if asked for."""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from b2diffurl import files
from b2diffurl.experiment import Plan


class Metrics:
    """Appends events to one phase's file. `keep` holds the events of an interrupted run that still count."""

    def __init__(self, path: Path, *, keep: list[dict] | None = None, wandb_run: Any = None):
        self.path, self.wandb_run = path, wandb_run
        files.write_json_lines(path, keep or [])

    def log(self, event: str, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event} | values, allow_nan=False) + "\n")
        if self.wandb_run:
            numbers = {f"{event}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
            self.wandb_run.log(numbers)


def read_events(path: Path, event: str | None = None) -> list[dict]:
    """The events of a file, of one kind if given; a last line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [row for row in rows if event in (None, row["event"])]


def open_metrics(config: ConfigDict, plan: Plan, phase: str, keep: list[dict] | None = None) -> Metrics:
    """The metrics of one phase of the plan's stage, with a wandb run if config.wandb is `offline` or `online`."""
    run = None
    if config.wandb:
        import wandb

        folder = Path(config.log_path)
        folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project="b2diffurl",
            group=config.exp_name,
            name=f"stage{plan.stage.index}-{phase}",
            dir=str(folder),
            config=plan.record,
            mode=config.wandb,
            settings=wandb.Settings(silent=True),
        )
    return Metrics(plan.stage.metrics(phase), keep=keep, wandb_run=run)
