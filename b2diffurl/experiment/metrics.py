"""Metrics files: JSON lines, one object an event; and a stopwatch for their seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from b2diffurl.runtime import files
from b2diffurl.runtime.stopwatch import working_sec


class Metrics:
    """Appends events to one phase's file.

    The file begins anew with `keep`: the events of an interrupted run that still count.
    """

    def __init__(self, path: Path, *, keep: list[dict] | None = None):
        self.path = path
        files.write_json_lines(path, keep or [])

    def log(self, event: str, **values: Any) -> None:
        with files.naming(self.path), self.path.open("a") as file:
            file.write(json.dumps({"event": event} | values, allow_nan=False) + "\n")


def read_events(path: Path, event: str | None = None) -> list[dict]:
    """The events of a metrics file, or only those called `event`; [] if there is no file.

    A last line that a crash has cut off is left out. A ValueError names a file that is damaged in any other way.
    """
    if not path.is_file():
        return []
    with files.damage_named(path):
        *whole, last = path.read_bytes().split(b"\n")  # `last` is empty unless the final line was cut off
        rows = [files.parse_json(line) for line in whole]
        with suppress(ValueError):
            rows += [files.parse_json(last)]
        if not all(isinstance(row, dict) and "event" in row for row in rows):
            raise ValueError("a line is no event")
    return [row for row in rows if event in (None, row["event"])]


def record_judging(root: Path, seconds: float, **facts: int | None) -> None:
    """Append to eval_seconds.jsonl how long a call took that judged checkpoints, with its amounts of work, for forecasts."""
    path = root / "eval_seconds.jsonl"
    with files.naming(path), path.open("a") as file:
        file.write(json.dumps({"event": "judged", **facts, "seconds": seconds}) + "\n")


def judgings(root: Path) -> list[dict]:
    """What `record_judging` has recorded; [] if that is damaged: it serves forecasts alone."""
    with suppress(ValueError):
        return read_events(root / "eval_seconds.jsonl", "judged")
    return []


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds that the block takes to `seconds[part]`."""
    started = working_sec()
    yield
    seconds[part] = seconds.get(part, 0.0) + working_sec() - started
