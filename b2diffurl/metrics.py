"""Metrics as JSON lines: one event, one object."""

import json
from pathlib import Path
from typing import Any

from b2diffurl import files


class Metrics:
    """Appends events to one phase's file. `keep` holds the events of an interrupted run that still count."""

    def __init__(self, path: Path, *, keep: list[dict] | None = None):
        self.path = path
        files.write_json_lines(path, keep or [])

    def log(self, event: str, **values: Any) -> None:
        with files.naming(self.path), self.path.open("a") as file:
            file.write(json.dumps({"event": event} | values, allow_nan=False) + "\n")


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
